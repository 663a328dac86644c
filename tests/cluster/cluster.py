"""A whole cluster: control plane, nodes with pods, attachments, and rooms with links to the first node.

    machine   bridge pktN, 10.89.N.1          control plane on that address
    node I    eth0 10.89.N.1I                 pods 10.88.(16 N + I).0/24
    rooms     client -- node 0 -- server      as in packetstack_cli.lab, whose names and addresses they have

N is the number of the slot. The machine routes to the pods, forwards nothing and gets no rule of a packet filter.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.cluster.control_plane import ControlPlane
from tests.cluster.node import CLUSTER_LINK, Node
from tests.cluster.processes import run
from tests.cluster.slots import Slot

from packetstack_cli.lab import Lab

ATTACHMENTS = Path(__file__).with_name("attachments.yaml")


class Cluster:
    """A context manager; `start()` and `stop()` do the same.

    `archives` are OCI images for all nodes. `exclusive_cpus` as in `Node`.
    """

    def __init__(
        self, slot: Slot, *, nodes: int = 1, exclusive_cpus: bool = False, archives: Sequence[Path] = ()
    ) -> None:
        self.directory = slot.directory
        self.archives = tuple(archives)
        self.bridge = f"pkt{slot.number}"
        self.address = f"10.89.{slot.number}.1"
        self.lab = Lab(self.bridge)
        self.control_plane = ControlPlane(self.directory / "control-plane", address=self.address)
        self.kubeconfig = self.control_plane.kubeconfig
        self.nodes = [
            Node(
                index,
                self.control_plane,
                directory=self.directory / f"node{index}",
                # The first is the lab's own node: it has the links to the rooms.
                namespace=self.lab.namespace("node") + (str(index) if index else ""),
                address=f"10.89.{slot.number}.{10 + index}",
                pod_network=f"10.88.{16 * slot.number + index}.0/24",
                exclusive_cpus=exclusive_cpus,
                # The first as on most clusters; a second one shows that the other mode does it too.
                proxy_mode="nftables" if index else "iptables",
            )
            for index in range(nodes)
        ]

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- life

    def start(self) -> None:
        """Returns when all nodes are Ready: some 10 s. Raises `ClusterError` when something does not get ready."""
        try:
            self._remove_links()
            self.lab.__enter__()
            self._make_links()
            self.control_plane.start()
            self.kubectl("apply", "--server-side", "-f", str(ATTACHMENTS))
            for node in self.nodes:
                node.start(self.archives)
            # Pods that mount it, all with a ServiceAccount, would wait for it with growing pauses.
            self.wait_for("configmap/kube-root-ca.crt", "--for=create")
        except BaseException:
            self.stop(keep_logs=True)
            raise

    def stop(self, *, keep_logs: bool = False) -> None:
        """End all and leave nothing but, if asked, the logs. May be called twice."""
        for node in self.nodes:
            node.stop(keep_logs=keep_logs)
        self.control_plane.stop(keep_logs=keep_logs)
        self._remove_links()
        self.lab.close()
        if not keep_logs:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _make_links(self) -> None:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        for node in self.nodes:
            if node.index:
                run("ip", "netns", "add", node.namespace)
            near = f"{self.bridge}n{node.index}"
            far = ["peer", "name", CLUSTER_LINK, "netns", node.namespace]
            run("ip", "link", "add", near, "master", self.bridge, "up", "type", "veth", *far)
            inside = ["ip", "-n", node.namespace]
            run(*inside, "address", "add", f"{node.address}/24", "dev", CLUSTER_LINK)
            run(*inside, "link", "set", CLUSTER_LINK, "up")
            run(*inside, "link", "set", "lo", "up")
            run(*inside, "route", "add", "default", "via", self.address)
            for other in self.nodes:
                if other is not node:
                    run(*inside, "route", "add", other.pod_network, "via", other.address)
            run("ip", "route", "add", node.pod_network, "via", node.address)
            enter = ["nsenter", f"--net=/run/netns/{node.namespace}", "sysctl", "-qw"]
            run(*enter, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def _remove_links(self) -> None:
        """Of this cluster or a killed one in the same slot; the machine's routes go with the bridge."""
        links = Path("/sys/class/net")
        for link in [*links.glob(f"{self.bridge}n[0-9]"), *links.glob(self.bridge)]:
            run("ip", "link", "delete", link.name)
        for namespace in Path("/run/netns").glob(self.lab.namespace("node") + "[0-9]"):
            run("ip", "netns", "delete", namespace.name)

    # ---- use

    @property
    def node(self) -> Node:
        """The first node: the one with links to the rooms of `lab`."""
        return self.nodes[0]

    def kubectl(self, *words: str, stdin: str | None = None, timeout_seconds: float = 60) -> str:
        """What `kubectl` printed, run as admin; `ClusterError` with its last line when it fails."""
        return self.control_plane.kubectl(*words, stdin=stdin, timeout_seconds=timeout_seconds)

    def get(self, *words: str) -> Any:
        """As `ControlPlane.get`."""
        return self.control_plane.get(*words)

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Apply manifests given as dictionaries, server-side."""
        self.control_plane.apply(*manifests)

    def wait_for(self, thing: str, *words: str, timeout_seconds: float = 90) -> None:
        """`kubectl wait THING WORDS`, such as `("pod/a", "--for=condition=Ready", "-n", "x")`; `ClusterError` if not."""
        self.kubectl("wait", thing, *words, f"--timeout={timeout_seconds:g}s", timeout_seconds=timeout_seconds + 10)
