"""A cluster with PacketStack in it, installed from the charts; a client and a server beside its node."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster.install import NAMESPACE, REPOSITORY, TAG, install

from packetstack_cli.client import DEFAULT_RUN_DIRECTORY, Client
from packetstack_cli.lab import NODE_UPLINK, inside
from packetstack_cli.traffic import Servers

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

VIP, SNAT = "192.0.2.10", "198.51.100.0/30"
PORT, UDP_PORT = 80, 5353
WAIT_SECONDS = 60.0
BUCKETS = 1024
SHORT = {
    "buckets": BUCKETS, "maxFlows": 50000, "udpIdleTimeoutSeconds": 3,
    "tcpClosedTimeoutSeconds": 1, "tcpTimeWaitTimeoutSeconds": 1,
}  # fmt: skip
"""`spec.flowTable` of a stack whose flows are forgotten soon after their connections have ended."""


def stack(name: str, namespace: str, **changes: Any) -> dict[str, Any]:
    """A stack with a TCP and a UDP listener before the lab's servers; `changes` replace parts of its spec."""
    backends = [f"10.71.5.{n}" for n in (1, 2, 3, 4)]
    tcp = {"endpoints": [{"address": b, "port": 8080} for b in backends]}
    udp = {"endpoints": [{"address": b, "port": 8081} for b in backends]}
    spec: dict[str, Any] = {
        "replicas": 2,
        "engine": {"cores": 1, "queuesPerCore": 2, "memory": "256Mi", "interface": {"veth": {}}},
        "listeners": [
            {"name": "tcp", "address": VIP, "port": PORT, "backends": tcp},
            {"name": "udp", "address": VIP, "protocol": "UDP", "port": UDP_PORT, "backends": udp},
        ],
        "snat": {"addresses": [SNAT]},
        "flowTable": {"buckets": BUCKETS, "maxFlows": 50000},
    }
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "metadata": meta, "spec": spec | changes}


def ready(pod: dict[str, Any]) -> bool:
    """Whether Kubernetes takes it for ready."""
    return ("Ready", "True") in ((c["type"], c["status"]) for c in pod["status"].get("conditions", ()))


class Installed:
    """What tests ask of the cluster with PacketStack in it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.lab = cluster.lab

    def kubectl(self, *words: str) -> str:
        """What it printed."""
        return self.cluster.kubectl(*words)

    def create_namespace(self, name: str) -> None:
        """One in which engines may have a host path."""
        self.cluster.control_plane.create_namespace(name, enforce="privileged")

    def agent(self, node: str = "node0") -> str:
        """Name of the agent's pod on this node."""
        pods = self.cluster.get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=agent")["items"]
        here = [p["metadata"] for p in pods if p["spec"]["nodeName"] == node]
        return str(next(p["name"] for p in here if not p.get("deletionTimestamp")))

    def live(self, namespace: str, name: str) -> dict[str, Any]:
        """Status of a stack as the agent of the first node has it."""
        client = Client(self.cluster.node.path_of(str(DEFAULT_RUN_DIRECTORY)))
        status: dict[str, Any] = client.call("get", name=f"{namespace}.{name}")[0]["status"]
        return status

    def ask_agent(self, *words: str) -> Any:
        """What the `packetstack` command prints in the agent's pod, as data."""
        words = ("exec", "-n", NAMESPACE, self.agent(), "-c", "agent", "--", "packetstack", *words, "-o", "json")
        return json.loads(self.kubectl(*words))

    def engines(self, namespace: str, name: str) -> list[dict[str, Any]]:
        """Pods of a stack that are not being deleted, by engine."""
        pods = self.cluster.get("pods", "-n", namespace, "-l", f"packetstack.io/stack={name}")["items"]
        return [p for p in pods if not p["metadata"].get("deletionTimestamp")]

    def status(self, namespace: str, name: str) -> dict[str, Any]:
        """Of a stack."""
        status: dict[str, Any] = self.cluster.get("packetstack", name, "-n", namespace).get("status", {})
        return status

    def condition(self, namespace: str, name: str, kind: str) -> tuple[str, str]:
        """Status and reason of a condition that the stack has."""
        conditions = self.status(namespace, name)["conditions"]
        return next((c["status"], c["reason"]) for c in conditions if c["type"] == kind)

    def settled(self, namespace: str, name: str, replicas: int) -> bool:
        """Whether the stack has this many engines, no others, and packets see its table."""
        raw = self.cluster.get("packetstack", name, "-n", namespace)
        table = self.cluster.get("flowtable", name, "-n", namespace)
        status, reports = raw.get("status", {}), table.get("status", {}).get("nodes", [])
        engines = self.engines(namespace, name)
        return (
            len(reports) == 1
            and status.get("observedGeneration") == raw["metadata"]["generation"]
            and status.get("readyReplicas") == status.get("updatedReplicas") == replicas
            and len(engines) == replicas
            and {p["metadata"]["uid"] for p in engines} == {e.get("podUid") for e in table["spec"]["engines"]}
            and all(map(ready, engines))
            and all(r["settled"] and r["observedGeneration"] == table["metadata"]["generation"] for r in reports)
        )

    def wait(self, namespace: str, name: str, replicas: int, seconds: float = WAIT_SECONDS) -> None:
        """Until it is `settled`; else the assertion says what stands in the way."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.settled(namespace, name, replicas):
                    return
            except Exception:  # the table is not there yet, the server is away
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        found = self.kubectl("get", "packetstack,flowtable,pod", "-n", namespace, "-o", "wide")
        raise AssertionError(
            f"not {replicas} engines in {seconds:g} s: {json.dumps(self.status(namespace, name))}\n{found}"
        )

    def scale(self, namespace: str, name: str, replicas: int, seconds: float = WAIT_SECONDS) -> None:
        """`kubectl scale`, and until it is done."""
        self.kubectl("scale", "packetstack", name, "-n", namespace, f"--replicas={replicas}")
        self.wait(namespace, name, replicas, seconds)

    def answers(self) -> bool:
        """Whether a connection from the client to the virtual address opens."""
        with inside(self.lab.namespace("client")):
            connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with connection:
            connection.settimeout(1)
            return connection.connect_ex((VIP, PORT)) == 0


@pytest.fixture(scope="session")
def packetstack(cluster: Cluster) -> Installed:
    """In the cluster that other tests have left without it; operator and agent run from this checkout's image."""
    install(cluster, f"--set=agent.uplinks={{{NODE_UPLINK}}}")
    cluster.node.tag(f"{REPOSITORY}:{TAG}", f"{REPOSITORY}:next")
    return Installed(cluster)


@pytest.fixture(scope="session")
def servers(packetstack: Installed) -> Servers:
    """TCP and UDP on the addresses of the lab's server."""
    # On one CPU: what the kernel reorders when a sender changes its CPU in a burst is not the engines' doing.
    return Servers(packetstack.lab, cpu=0)


@pytest.fixture
def space(packetstack: Installed) -> Iterator[str]:
    """A namespace of the test's own, in which engines may have a host path; deleted with all stacks in it."""
    name = f"test-{secrets.token_hex(4)}"
    packetstack.create_namespace(name)
    yield name
    packetstack.kubectl("delete", "packetstack", "--all", "-n", name, "--timeout=60s")
    packetstack.cluster.control_plane.delete_namespace(name)
