"""The cluster that other tests stand on does what a cluster does, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.cluster import Cluster
from tests.cluster.images import PAUSE
from tests.cluster.node import DEVICES, VETH_RESOURCE
from tests.cluster.processes import ClusterError, wait_until
from tests.cluster.slots import Slot

STATUS = "k8s.v1.cni.cncf.io/network-status"
NETWORKS = "k8s.v1.cni.cncf.io/networks"
ROOT = Path(__file__).resolve().parents[2]


def pod(name: str, namespace: str, *, networks: str = "", **spec: Any) -> dict[str, Any]:
    container = {"name": "pause", "image": PAUSE}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "annotations": {NETWORKS: networks} if networks else {},
        },
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [container], **spec},
    }


def attachment(name: str, namespace: str, bridge: str = "edge0") -> dict[str, Any]:
    """A network whose pods get a veth without an address, its other end on a bridge of the node."""
    config = {"cniVersion": "1.0.0", "name": name, "type": "bridge", "bridge": bridge, "ipam": {}}
    return {
        "apiVersion": "k8s.cni.cncf.io/v1",
        "kind": "NetworkAttachmentDefinition",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"config": json.dumps(config)},
    }


def ready(cluster: Cluster, name: str, namespace: str) -> dict[str, Any]:
    cluster.wait_for(f"pod/{name}", "--for=condition=Ready", "-n", namespace)
    found: dict[str, Any] = cluster.get("pod", name, "-n", namespace)
    return found


def network_status(found: dict[str, Any]) -> list[dict[str, Any]]:
    status: list[dict[str, Any]] = json.loads(found["metadata"]["annotations"][STATUS])
    return status


def in_pod(cluster: Cluster, found: dict[str, Any], *command: str) -> str:
    """Run a command of the machine in the network namespace of the pod."""
    address = found["status"]["podIP"]
    for path in cluster.node.run("ls", "/run/netns").stdout.split():
        enter = ("nsenter", f"--net=/run/netns/{path}")
        if f" {address}/" in cluster.node.run(*enter, "ip", "-o", "address").stdout:
            return cluster.node.run(*enter, *command).stdout
    raise AssertionError(f"no network namespace with {address}")


def links(cluster: Cluster) -> set[str]:
    """Interfaces of the node."""
    return set(cluster.node.run("ls", "/sys/class/net").stdout.split())


def test_a_pod_gets_ready_and_its_logs_can_be_read(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("plain", namespace))
    found = ready(cluster, "plain", namespace)
    assert found["spec"]["nodeName"] == "node0"
    assert cluster.kubectl("logs", "plain", "-n", namespace) == ""
    [status] = network_status(found)
    assert status == {**status, "name": "pods", "interface": "eth0", "ips": [found["status"]["podIP"]], "default": True}


def test_a_pod_reaches_the_api_at_its_service_address(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("caller", namespace))
    found = ready(cluster, "caller", namespace)
    answer = in_pod(cluster, found, "curl", "-sk", "--max-time", "20", "https://10.96.0.1/version")
    assert json.loads(answer)["code"] == 401


def test_a_pod_with_an_attachment_gets_net1_and_a_status(cluster: Cluster, namespace: str) -> None:
    cluster.apply(attachment("edge", namespace))
    cluster.apply(pod("attached", namespace, networks="edge"))
    found = ready(cluster, "attached", namespace)
    [link] = json.loads(in_pod(cluster, found, "ip", "-j", "link", "show", "dev", "net1"))
    primary, attached = network_status(found)
    assert primary["interface"] == "eth0"
    assert attached == {"name": f"{namespace}/edge", "interface": "net1", "mac": link["address"], "dns": {}}
    hosts = json.loads(cluster.node.run("ip", "-j", "link", "show", "master", "edge0").stdout)
    assert link["link_index"] in [host["ifindex"] for host in hosts]


def test_the_annotation_may_be_a_list_with_namespaces_and_interfaces(cluster: Cluster, namespace: str) -> None:
    cluster.apply(attachment("east", namespace), attachment("west", "default"))
    wanted = [{"name": "east", "interface": "up0"}, {"name": "west", "namespace": "default", "interface": "down0"}]
    cluster.apply(pod("both", namespace, networks=json.dumps(wanted)))
    status = network_status(ready(cluster, "both", namespace))
    assert [(entry["name"], entry["interface"]) for entry in status] == [
        ("pods", "eth0"),
        (f"{namespace}/east", "up0"),
        ("default/west", "down0"),
    ]


def test_a_missing_network_fails_the_pod_with_its_name(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("lost", namespace, networks="nowhere"))

    def messages() -> str:
        events = cluster.get("events", "-n", namespace, "--field-selector=reason=FailedCreatePodSandBox")["items"]
        return "\n".join(event["message"] for event in events)

    wait_until(messages, "an event of the failed sandbox")
    assert f"network {namespace}/nowhere:" in messages()
    assert '"nowhere" not found' in messages()


def test_a_deleted_pod_leaves_no_link_and_no_record_on_the_node(cluster: Cluster, namespace: str) -> None:
    def left() -> tuple[set[str], set[str]]:
        records = cluster.node.run("ls", "/var/lib/cni/attachments").stdout.split()
        return {link for link in links(cluster) if link.startswith("veth")}, set(records)

    cluster.apply(attachment("brief", namespace))
    before = left()
    cluster.apply(pod("gone", namespace, networks="brief"))
    ready(cluster, "gone", namespace)
    during = left()
    assert len(during[0] - before[0]) == 2
    assert len(during[1] - before[1]) == 1
    # Without its network: what was attached is undone all the same.
    cluster.kubectl("delete", "network-attachment-definition", "brief", "-n", namespace)
    cluster.kubectl("delete", "pod", "gone", "-n", namespace)
    wait_until(lambda: not (left()[0] & (during[0] - before[0])), "links gone")
    wait_until(lambda: not (left()[1] & (during[1] - before[1])), "record gone")


def test_a_host_path_is_the_nodes_and_not_the_machines(cluster: Cluster, namespace: str) -> None:
    path = f"/run/{namespace}"
    volume = {"name": "run", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
    mounted = {"name": "pause", "image": PAUSE, "volumeMounts": [{"name": "run", "mountPath": "/mnt"}]}
    cluster.apply(pod("writer", namespace, volumes=[volume], containers=[mounted]))
    ready(cluster, "writer", namespace)
    assert cluster.node.path_of(path).is_dir()
    assert not Path(path).exists()


def test_a_privileged_pod_sees_the_bpf_file_system_of_the_node(cluster: Cluster, namespace: str) -> None:
    volume = {"name": "bpf", "hostPath": {"path": "/sys/fs/bpf", "type": "Directory"}}
    container = {
        "name": "pause",
        "image": PAUSE,
        "securityContext": {"privileged": True},
        "volumeMounts": [{"name": "bpf", "mountPath": "/sys/fs/bpf", "mountPropagation": "HostToContainer"}],
    }
    cluster.apply(pod("agent", namespace, hostNetwork=True, hostPID=True, volumes=[volume], containers=[container]))
    ready(cluster, "agent", namespace)
    [pid] = cluster.node.run("pgrep", "--exact", "pause", "--newest").stdout.split()
    mounts = cluster.node.run("cat", f"/proc/{pid}/mounts").stdout
    assert " /sys/fs/bpf bpf " in mounts


def test_the_client_reaches_the_node_over_the_link_of_the_lab(cluster: Cluster) -> None:
    for address in ("10.71.1.1", "fd71:1::1"):
        cluster.lab.run("client", "ping", "-c1", "-W5", address)
    assert "up0" in links(cluster)


def test_a_device_becomes_the_interface_of_its_pod_and_comes_back(cluster: Cluster, namespace: str) -> None:
    cluster.node.offer_veths(DEVICES)
    device = attachment("ports", namespace)
    device["metadata"]["annotations"] = {"k8s.v1.cni.cncf.io/resourceName": VETH_RESOURCE}
    device["spec"]["config"] = json.dumps({"cniVersion": "1.0.0", "type": "host-device"})
    cluster.apply(device)
    container = {"name": "pause", "image": PAUSE, "resources": {"limits": {VETH_RESOURCE: "1"}}}
    ports = [f"port{i}" for i in range(DEVICES)]
    cluster.apply(*(pod(name, namespace, networks="ports", containers=[container]) for name in ports))
    for name in ports:
        found = ready(cluster, name, namespace)
        assert json.loads(in_pod(cluster, found, "ip", "-j", "link", "show", "dev", "net1"))
    assert not {*ports} & links(cluster)

    late = pod("late", namespace, networks="ports", containers=[container])
    cluster.apply(late)
    cluster.wait_for("pod/late", "--for=condition=PodScheduled=False", "-n", namespace)
    cluster.kubectl("delete", "pod", "port0", "-n", namespace)
    ready(cluster, "late", namespace)
    cluster.kubectl("delete", "pod", "late", *ports[1:], "-n", namespace)
    wait_until(lambda: {*ports} <= links(cluster), "ports back on the node")


def test_a_killed_kubelet_makes_the_node_not_ready_and_started_again_ready(cluster: Cluster) -> None:
    cluster.node.daemon("kubelet").kill()
    cluster.wait_for("node/node0", "--for=condition=Ready=Unknown")
    cluster.node.start_kubelet()
    cluster.wait_for("node/node0", "--for=condition=Ready")


# ---- beginning and end


def traces(slot: int) -> list[str]:
    """What a cluster of this number has on the machine, by name."""
    name = f"pkt{slot}"
    found = [str(path) for path in Path("/run/netns").glob(f"{name}-*")]
    found += [str(path) for path in Path("/sys/class/net").glob(f"{name}*")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/packetstack-{name}-*")]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if f"build/cluster/{slot}/" in line]
    found += processes(slot)
    if (directory := ROOT / "build/cluster" / str(slot)).exists():
        found.append(str(directory))
    return found


def processes(slot: int) -> list[str]:
    """Living ones that name the cluster's directory, have mounts of it, or are in a cgroup of its nodes."""
    marks = (f"build/cluster/{slot}/", f"packetstack-pkt{slot}-")
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = [(entry / name).read_bytes().decode(errors="replace") for name in ("cmdline", "mounts", "cgroup")]
        except OSError:  # it has ended meanwhile
            continue
        if any(mark in text for mark in marks for text in words):
            found.append(f"{entry.name}: {words[0] or 'ending'}")
    return found


@pytest.fixture
def number() -> Iterator[int]:
    with Slot() as slot:
        number = slot.number
    yield number
    with Slot(number) as slot:
        Cluster(slot, nodes=2).stop()


@pytest.mark.slow
def test_two_nodes_stop_without_a_trace_and_after_a_killed_run_too(number: int) -> None:
    script = f"""
from tests.cluster.cluster import Cluster
from tests.cluster.slots import Slot
from tests.cluster.test_cluster import pod, ready
with Slot({number}) as slot, Cluster(slot, nodes=2) as cluster:
    cluster.apply(*(pod(f"on{{i}}", "default", nodeName=f"node{{i}}") for i in range(2)))
    for i in range(2):
        ready(cluster, f"on{{i}}", "default")
    print("up", flush=True)
    input()
"""
    settings = [Path("/proc/sys") / name for name in ("vm/overcommit_memory", "kernel/panic", "net/ipv4/ip_forward")]
    before = [path.read_text() for path in settings]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout
        assert run.stdout.readline() == "up\n"
        assert processes(number)
        with pytest.raises(ClusterError, match="another process is using it"):
            Slot(number)
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while processes(number) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(number) == []

    with Slot(number) as slot, Cluster(slot, nodes=2, exclusive_cpus=True) as cluster:
        nodes = cluster.get("nodes")["items"]
        assert [node["metadata"]["name"] for node in nodes] == ["node0", "node1"]
        cluster.apply(*(pod(f"on{i}", "default", nodeName=f"node{i}") for i in range(2)))
        for i in range(2):
            found = ready(cluster, f"on{i}", "default")
        # From the first node to a pod of the second.
        cluster.node.run("ping", "-c1", "-W5", found["status"]["podIP"])
    assert traces(number) == []
    assert [path.read_text() for path in settings] == before
