"""Many stacks with many engines before one operator, and what it costs. Nodes and agents are played."""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import ControlPlane
from tests.operator.operator_process import USER, OperatorProcess, grant
from tests.operator.players import STACKS, TABLES, PlayedNode, Server, wait

from packetstack_core import crds

NAMESPACE = "crowd"


@dataclass(frozen=True, slots=True)
class Rest:
    """What the operator did while nothing changed."""

    writes: float
    """Requests that changed something, over all windows."""
    cpu: float
    """Median over the windows, in shares of one core."""
    resident: float
    """Memory at the end, in bytes."""


class Crowd:
    """`stacks` stacks of `engines` engines each, in one namespace."""

    def __init__(self, server: Server, operator: OperatorProcess, stacks: int, engines: int) -> None:
        self.server, self.operator, self.engines = server, operator, engines
        self.names = [f"stack-{number}" for number in range(stacks)]
        self.node = PlayedNode(server, NAMESPACE)
        self.node.room, self.node.batch = 2 * stacks * engines, 1 << 16

    def create(self, seconds: float) -> None:
        """All of them, until they are settled. AssertionError if that takes longer."""
        for number, name in enumerate(self.names):
            self.server.request("POST", STACKS.format(NAMESPACE), _stack(name, number, self.engines))
        deadline = time.monotonic() + seconds
        while unsettled := self._unsettled():
            assert time.monotonic() < deadline, f"not settled in {seconds:g} s: {len(unsettled)}, as {unsettled[0]}"
            self.node.step()
            assert self.node.broken == []

    def _unsettled(self) -> list[dict[str, Any]]:
        left = []
        for stack in self.server.items(STACKS.format(NAMESPACE)):
            status = stack.get("status", {})
            progressing = {c["type"]: c["status"] for c in status.get("conditions", ())}.get("Progressing")
            if status.get("readyReplicas") != self.engines or progressing != "False":
                left.append(status)
        return left

    def rest(self, windows: int, seconds: float) -> Rest:
        """Nothing changes for `windows` times `seconds`."""
        before, shares = self.operator.writes(), []
        for _ in range(windows):
            began, used = time.monotonic(), self._cpu_seconds()
            time.sleep(seconds)
            shares.append((self._cpu_seconds() - used) / (time.monotonic() - began))
        return Rest(self.operator.writes() - before, statistics.median(shares), self._resident_bytes())

    def reactions(self, count: int) -> list[float]:
        """Seconds from a change of one stack's replicas until its flow table has another engine, sorted."""
        taken = []
        for number in range(count):
            name = self.names[number % len(self.names)]
            began = time.monotonic()
            self._scale(name, self.engines + 1)
            wait(lambda name=name: self._named(name) == self.engines + 1, every=0.005)
            taken.append(time.monotonic() - began)
            self._scale(name, self.engines)
            wait(lambda name=name: self._named(name) == self.engines)
        return sorted(taken)

    def _scale(self, name: str, replicas: int) -> None:
        self.server.merge(f"{STACKS.format(NAMESPACE)}/{name}", {"spec": {"replicas": replicas}})

    def _named(self, name: str) -> int:
        return len(self.server.get(f"{TABLES.format(NAMESPACE)}/{name}")["spec"]["engines"])

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.operator.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _resident_bytes(self) -> float:
        pages = int(Path(f"/proc/{self.operator.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")


def _stack(name: str, number: int, engines: int) -> dict[str, Any]:
    address = f"198.18.{number // 250}.{number % 250 + 1}"
    backends = {"endpoints": [{"address": f"10.1.0.{n}", "port": 80} for n in range(1, 6)]}
    listener = {"name": "web", "address": address, "port": 80, "backends": backends}
    spec = {"replicas": engines, "listeners": [listener], "snat": {"addresses": [f"198.51.100.{number % 250 + 1}/32"]}}
    meta = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "metadata": meta, "spec": spec}


@contextmanager
def crowd(directory: Path, stacks: int, engines: int) -> Iterator[Crowd]:
    """An API server of their own without controllers: nobody but the operator and the players writes."""
    with ControlPlane(directory / "control-plane", controllers=False) as control_plane:
        control_plane.create_namespace(NAMESPACE)
        control_plane.apply(*crds.definitions())
        control_plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-0"}})
        for definition in crds.definitions():
            name = f"crd/{definition['metadata']['name']}"
            control_plane.kubectl("wait", "--for=condition=Established", name, "--timeout=30s")
        grant(control_plane)
        server = Server(control_plane.kubeconfig)
        kubeconfig = control_plane.kubeconfig_for(USER)
        try:
            with OperatorProcess(kubeconfig, directory / "operator.log") as operator:
                yield Crowd(server, operator, stacks, engines)
        finally:
            server.close()
