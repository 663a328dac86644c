"""A Kubernetes node of the tests' own: containerd and kubelet in namespaces of this machine.

The node is a network namespace, a mount namespace and a pid namespace:

    network   joined to the machine by a bridge; forwards IPv4 and IPv6
    mounts    its own /run, /var/lib, /var/log, /proc and /sys, and a bpffs at /sys/fs/bpf: what a hostPath of a pod
              sees is the node's, not the machine's
    pids      what hostPID sees; and all its processes die with the first, whatever ends the tests

Of the machine it needs only cgroups, which are named after it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from tests.cluster import images
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubernetes_binaries import CNI_PLUGINS, device_plugin, find
from tests.cluster.processes import POLL_SECONDS, ClusterError, Daemon, wait_until

POD_NETWORK = "10.88.0.0/16"
CLUSTER_LINK = "eth0"  # the node's end of the link to the bridge
SOCKET = "/run/containerd/containerd.sock"
VETH_RESOURCE = "packetstack.io/veth"
DEVICES = 3
"""As many as tests ask a node for: those that share it ask for the same."""
ATTACHMENT_PLUGIN = Path(__file__).with_name("cni") / "attachment-stand-in"

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_V1 = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd")

# What kubelet would set for the whole machine. In the node it finds them set: files are mounted over them.
_KERNEL_VALUES = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}

# Runs as the first process of the node; $1 is the node's directory.
_INIT = """
set -e
cd "$1"
mount -t proc proc /proc
mkdir cgroup
mount --rbind /sys/fs/cgroup cgroup
mount -t sysfs sysfs /sys                       # with the devices of this network namespace
mount --rbind cgroup /sys/fs/cgroup
umount -l cgroup
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/netns /run/lock /run/packetstack
mount --bind var-lib /var/lib
mount --bind var-log /var/log
(cd kernel && find . -type f) | while read -r name; do mount --bind "kernel/$name" "/proc/sys/$name"; done
mount --make-rshared /                          # or no container could ask for mountPropagation
touch ready
trap '' CHLD                                    # ignored, also by what follows: orphans are reaped by the kernel
exec sleep infinity
"""


class Node:
    """`start()` and `stop()`; made and used by a `Cluster`.

    `namespace` is its network namespace, already there, with `CLUSTER_LINK` in it; `address` is on that link.
    `exclusive_cpus`: the static CPU manager, with one CPU that stays for all who have none of their own.
    `proxy_mode`: kube-proxy's, "iptables" or "nftables".
    """

    def __init__(
        self,
        index: int,
        control_plane: ControlPlane,
        *,
        directory: Path,
        namespace: str,
        address: str,
        pod_network: str,
        exclusive_cpus: bool = False,
        proxy_mode: str,
    ) -> None:
        self.name = f"node{index}"
        self.index = index
        self.control_plane = control_plane
        self.directory = directory
        self.namespace = namespace
        self.address = address
        self.pod_network = pod_network
        self.exclusive_cpus = exclusive_cpus
        self.proxy_mode = proxy_mode
        self.cgroup = f"packetstack-{namespace}"
        self._init: Daemon | None = None
        self._init_pid = 0
        self._veths = 0
        self._loaded: set[tuple[Path, int, int]] = set()
        self._daemons: dict[str, Daemon] = {}

    # ---- life

    def start(self, archives: Sequence[Path] = ()) -> None:
        """Returns when the node is Ready, some 3 s; the images of `archives` (OCI) are there then.

        Raises `ClusterError` when a part of it ends or does not get ready.
        """
        for name in (
            "kubelet",
            "kube-proxy",
            "containerd",
            "containerd-shim-runc-v2",
            "ctr",
            "runc",
            "iptables",
            "nft",
        ):
            find(name)
        # After a killed run the processes are gone, and with them every mount; files and cgroups are not.
        self._remove_cgroups()
        shutil.rmtree(self.directory, ignore_errors=True)
        for part in ("var-lib/kubelet", "var-lib/containerd", "var-lib/cni", "var-log/pods", "cni/bin", "cni/conf"):
            (self.directory / part).mkdir(parents=True)
        self._make_cgroups()
        self._start_init()
        self._write_cni()
        self._write_configuration()
        self.start_containerd()
        for archive in (images.pause(self.directory.parent), *archives):
            self.load(archive)
        # What an earlier node of this name said of itself would be believed.
        self.control_plane.api.delete(f"/api/v1/nodes/{self.name}")
        self.start_kubelet()
        self.start_kube_proxy()
        self.wait_ready()

    def stop(self, *, keep_logs: bool = False) -> None:
        """End every process of the node, pods included, and remove what it has made. May be called twice."""
        for daemon in (*self._daemons.values(), *((self._init,) if self._init else ())):
            daemon.kill()
        self._daemons.clear()
        self._init = None
        self._remove_cgroups()
        if not keep_logs:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_cgroups(self) -> None:
        for root in [*_CGROUPS.glob(f"*/{self.cgroup}"), *_CGROUPS.glob(self.cgroup)]:
            deadline = time.monotonic() + 10
            while root.exists():
                for path in [*sorted((p for p in root.rglob("*") if p.is_dir()), reverse=True), root]:
                    with suppress(OSError):  # killed processes leave it in a moment
                        path.rmdir()
                if time.monotonic() > deadline:
                    raise ClusterError(f"{root}: still has processes after 10 s")
                time.sleep(0 if not root.exists() else POLL_SECONDS)

    def _make_cgroups(self) -> None:
        if (_CGROUPS / "cgroup.controllers").exists():  # cgroup v2
            controllers = (_CGROUPS / "cgroup.controllers").read_text().split()
            (_CGROUPS / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
            (_CGROUPS / self.cgroup).mkdir()
            return
        for hierarchy in _CGROUP_V1:
            (_CGROUPS / hierarchy / self.cgroup).mkdir()
        for name in ("cpuset.cpus", "cpuset.mems"):  # a cpuset is born empty
            (_CGROUPS / "cpuset" / self.cgroup / name).write_text((_CGROUPS / "cpuset" / name).read_text())

    def _start_init(self) -> None:
        for name, value in _KERNEL_VALUES.items():
            path = self.directory / "kernel" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
        unshare = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child=KILL", "--"]
        self._init = Daemon(
            f"{self.name}: init",
            ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *unshare, "sh", "-c", _INIT, "sh", self.directory],
            self.directory / "init.log",
        )
        ready = self.directory / "ready"
        wait_until(ready.exists, f"{self.name}: mounts", daemons=[self._init], timeout_seconds=30)
        pid = self._init.pid
        self._init_pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    # ---- its programs; tests may kill and start them again

    def start_containerd(self) -> None:
        self._run("containerd", find("containerd"), "--config", self.directory / "containerd.toml")
        self._wait(lambda: self.run(find("ctr"), "version", check=False).returncode == 0, "containerd answers")

    def start_kubelet(self) -> None:
        self._run(
            "kubelet",
            find("kubelet"),
            f"--config={self.directory}/kubelet.yaml",
            f"--kubeconfig={self.control_plane.kubeconfig_for(f'system:node:{self.name}', groups=['system:nodes'])}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
            "--root-dir=/var/lib/kubelet",
            f"--cert-dir={self.directory}/certificates",
        )

    def start_kube_proxy(self) -> None:
        self._run("kube-proxy", find("kube-proxy"), f"--config={self.directory}/kube-proxy.yaml")

    def daemon(self, name: str) -> Daemon:
        """`containerd`, `kubelet` or `kube-proxy`, to be killed or looked at."""
        return self._daemons[name]

    def wait_ready(self, *, timeout_seconds: float = 90) -> None:
        def ready() -> bool:
            found = self.control_plane.api.get(f"/api/v1/nodes/{self.name}") or {"status": {"conditions": []}}
            return ("Ready", "True") in ((c["type"], c["status"]) for c in found["status"]["conditions"])

        self._wait(ready, f"{self.name}: Ready", timeout_seconds=timeout_seconds)

    def _run(self, name: str, *command: str | Path) -> None:
        if name in self._daemons:
            self._daemons[name].kill()
        # The parent waits outside of the pid namespace; it is the child in there that must not outlive it.
        inner = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        self._daemons[name] = Daemon(
            f"{self.name}: {name}", [*self._entering(), *inner], self.directory / f"{name}.log"
        )

    def _wait(self, holds: Callable[[], object], what: str, *, timeout_seconds: float = 60) -> None:
        wait_until(holds, what, daemons=self._daemons.values(), timeout_seconds=timeout_seconds)

    # ---- use

    def _entering(self) -> list[str]:
        return ["nsenter", f"--target={self._init_pid}", "--net", "--mount", "--pid", "--"]

    def run(
        self, *command: str | Path, check: bool = True, timeout_seconds: float = 60, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the node's namespaces to its end; `ClusterError` with its last line if it fails."""
        words = [str(word) for word in command]
        done = subprocess.run(
            [*self._entering(), *words],
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if check and done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
            raise ClusterError(f"{self.name}: {' '.join(words[:4])}: {said[-1]}")
        return done

    def start_program(self, name: str, *command: str | Path) -> Daemon:
        """Start a program in the node's namespaces (a device plugin, a capture); it ends with the node."""
        self._run(name, *command)
        return self._daemons[name]

    def load(self, archive: Path) -> None:
        """Import an OCI archive; pods must name the image with a tag other than `latest`, or never be pulled.

        Said again of a file that is the same, it does nothing.
        """
        file = archive.stat()
        loaded = (archive.resolve(), file.st_ino, file.st_mtime_ns)
        if loaded in self._loaded:
            return
        self.run(find("ctr"), "--namespace=k8s.io", "images", "import", archive.resolve(), timeout_seconds=300)
        self._loaded.add(loaded)

    def tag(self, image: str, name: str) -> None:
        """Another name for an image that is loaded: to the operator and the kubelet, another image."""
        self.run(find("ctr"), "--namespace=k8s.io", "images", "tag", "--force", image, name)

    def offer_veths(self, count: int) -> None:
        """Offer `count` devices of the resource `VETH_RESOURCE`: pairs of a `portI`, for a pod, and a `wireI`, which stays.

        An attachment gets the port when its NetworkAttachmentDefinition names the resource (`resourceName`) and the
        type `host-device`. Returns when the node has them to give. Said again with the same count, it does nothing.
        """
        if self._veths == count:
            return
        if self._veths:
            raise ClusterError(f"{self.name}: offers {self._veths} devices already, {count} are asked for")
        self._veths = count
        for number in range(count):
            self.run("ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", f"wire{number}")
            for end in (f"port{number}", f"wire{number}"):
                self.run("ip", "link", "set", end, "up")
        self.start_program("device-plugin", device_plugin(), VETH_RESOURCE, *(f"port{n}" for n in range(count)))

        def offered() -> bool:
            allocatable = self.control_plane.get("node", self.name)["status"]["allocatable"]
            return bool(allocatable.get(VETH_RESOURCE) == str(count))

        self._wait(offered, f"{self.name}: {count} devices of {VETH_RESOURCE}")

    def path_of(self, path: str) -> Path:
        """Where a file of the node, such as `/run/packetstack/agent.sock`, is seen from outside."""
        return Path(f"/proc/{self._init_pid}/root{path}")

    # ---- configuration

    def _write_cni(self) -> None:
        for plugin in CNI_PLUGINS.iterdir():
            (self.directory / "cni/bin" / plugin.name).symlink_to(plugin)
        # Isolated, and this very interpreter: the start is most of its time.
        source = ATTACHMENT_PLUGIN.read_text().split("\n", 1)[1]
        copy = self.directory / "cni/bin" / ATTACHMENT_PLUGIN.name
        copy.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{source}")
        copy.chmod(0o755)
        pki = self.control_plane.pki
        certificate, key = pki.issue(f"attachments-{self.name}", "packetstack-tests:attachments")
        cluster_network = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": "/var/lib/cni/addresses",
                "ranges": [[{"subnet": self.pod_network}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        configuration = {
            "cniVersion": "1.0.0",
            "name": "attachments",
            "type": ATTACHMENT_PLUGIN.name,
            "server": self.control_plane.server,
            "authority": str(pki.directory / "ca.crt"),
            "certificate": str(certificate),
            "key": str(key),
            "directory": "/var/lib/cni/attachments",
            "clusterNetwork": cluster_network,
        }
        (self.directory / "cni/conf/00-attachments.conf").write_text(json.dumps(configuration, indent=1))

    def _write_configuration(self) -> None:
        certificate, key = self.control_plane.pki.issue(
            f"kubelet-{self.name}", self.name, names=[self.name, self.address, "127.0.0.1"]
        )
        (self.directory / "resolv.conf").touch()  # there is no name server
        (self.directory / "containerd.toml").write_text(self._containerd())
        kubelet: dict[str, Any] = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failSwapOn": False,
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.control_plane.pki.directory / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "resolvConf": str(self.directory / "resolv.conf"),
            "clusterDNS": ["10.96.0.10"],  # nobody is there; without it every pod gets a warning
            # The lease is renewed every 2 s: with the controller manager's 12 s a dead node is seen in seconds.
            "nodeStatusUpdateFrequency": "4s",
            "nodeLeaseDurationSeconds": 8,
            # A full disk of the machine is no business of the tests.
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }
        if self.exclusive_cpus:
            kubelet |= {
                "cpuManagerPolicy": "static",
                # Half a CPU for other pods; the CPUs that are not given away are this, rounded up to whole ones.
                "kubeReserved": {"cpu": "500m"},
                "cpuManagerReconcilePeriod": "1s",
                "topologyManagerPolicy": "single-numa-node",
            }
        proxy = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": self.proxy_mode,
            "clientConnection": {"kubeconfig": str(self.control_plane.kubeconfig_for("system:kube-proxy"))},
            "hostnameOverride": self.name,
            "clusterCIDR": POD_NETWORK,
            "conntrack": {"maxPerCore": 0},  # a value of the machine, not of the namespace
        }
        (self.directory / "kubelet.yaml").write_text(yaml.safe_dump(kubelet, sort_keys=False))
        (self.directory / "kube-proxy.yaml").write_text(yaml.safe_dump(proxy, sort_keys=False))

    def _containerd(self) -> str:
        # restrict_oom_score_adj: without CAP_SYS_RESOURCE a negative score kills runc's first process.
        return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{images.PAUSE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{self.directory}/cni/bin"
    conf_dir = "{self.directory}/cni/conf"
"""
