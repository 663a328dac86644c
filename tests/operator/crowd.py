"""Many stacks with many engines before one operator, and what it costs. Nodes and agents are played."""

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import ControlPlane
from tests.cluster.server import Server, ServerError
from tests.operator.counters import PlayedCounters, busy
from tests.operator.operator_process import USER, OperatorProcess, grant
from tests.operator.players import STACKS, TABLES, PlayedNode, wait

from packetstack_core import crds

NODES = 8
"""Each with its share of the stacks, in a namespace of its own."""
TARGET_PERCENT = 60


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
    """`stacks` stacks of `engines` engines each; `autoscaled` with a load that is just what their target asks for."""

    def __init__(
        self,
        server: Server,
        operator: OperatorProcess,
        counters: PlayedCounters,
        stacks: int,
        engines: int,
        autoscaled: bool,
    ) -> None:
        self.server, self.operator, self.engines, self.autoscaled = server, operator, engines, autoscaled
        self.places = [(f"crowd-{number % NODES}", f"stack-{number}") for number in range(stacks)]
        self.nodes = [PlayedNode(server, f"crowd-{number}", f"node-{number}", counters) for number in range(NODES)]
        if autoscaled:
            for place in self.places:
                counters.set_load(".".join(place), engines * TARGET_PERCENT / 100)
        for node in self.nodes:
            node.room, node.batch = 2 * stacks * engines, 1 << 16

    def create(self, seconds: float) -> None:
        """All of them, until they are settled. AssertionError if that takes longer."""
        for number, (namespace, name) in enumerate(self.places):
            body = _stack(namespace, name, number, self.engines)
            if self.autoscaled:
                limits = {"minReplicas": 1, "maxReplicas": 2 * self.engines}
                body["spec"]["autoscaling"] = {**limits, "metrics": [busy(TARGET_PERCENT)]}
            self.server.request("POST", STACKS.format(namespace), body)
        deadline = time.monotonic() + seconds
        with ThreadPoolExecutor(NODES) as pool:
            while unsettled := self._unsettled():
                assert time.monotonic() < deadline, f"not settled in {seconds:g} s: {len(unsettled)}, as {unsettled[0]}"
                list(pool.map(_play, self.nodes))

    def _unsettled(self) -> list[dict[str, Any]]:
        left = []
        for stack in self.server.items("/apis/packetstack.io/v1alpha1/packetstacks"):
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
            place = self.places[number % len(self.places)]
            began = time.monotonic()
            self._scale(place, self.engines + 1)
            wait(lambda place=place: self._named(place) == self.engines + 1, every=0.005)
            taken.append(time.monotonic() - began)
            self._scale(place, self.engines)
            wait(lambda place=place: self._named(place) == self.engines)
        return sorted(taken)

    def _scale(self, place: tuple[str, str], replicas: int) -> None:
        namespace, name = place
        self.server.merge(f"{STACKS.format(namespace)}/{name}", {"spec": {"replicas": replicas}})

    def _named(self, place: tuple[str, str]) -> int:
        namespace, name = place
        return len(self.server.get(f"{TABLES.format(namespace)}/{name}")["spec"]["engines"])

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.operator.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _resident_bytes(self) -> float:
        pages = int(Path(f"/proc/{self.operator.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")


def _play(node: PlayedNode) -> None:
    try:
        node.step()
    except ServerError as e:
        if e.status not in (404, 409):  # the operator was faster
            raise
    finally:
        node.server.close()  # of this thread


def _stack(namespace: str, name: str, number: int, engines: int) -> dict[str, Any]:
    address = f"198.18.{number // 250}.{number % 250 + 1}"
    backends = {"endpoints": [{"address": f"10.1.0.{n}", "port": 80} for n in range(1, 6)]}
    listener = {"name": "web", "address": address, "port": 80, "backends": backends}
    spec = {"replicas": engines, "listeners": [listener], "snat": {"addresses": [f"198.51.100.{number % 250 + 1}/32"]}}
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "metadata": meta, "spec": spec}


@contextmanager
def crowd(directory: Path, stacks: int, engines: int, *, autoscaled: bool = False) -> Iterator[Crowd]:
    """An API server of their own without controllers: nobody but the operator and the players writes."""
    with ControlPlane(directory / "control-plane", controllers=False) as control_plane:
        for number in range(NODES):
            control_plane.create_namespace(f"crowd-{number}")
        control_plane.define(*crds.definitions())
        for number in range(NODES):
            control_plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"node-{number}"}})
        grant(control_plane)
        server = Server(control_plane.kubeconfig)
        kubeconfig = control_plane.kubeconfig_for(USER)
        try:
            with (
                PlayedCounters() as counters,
                OperatorProcess(kubeconfig, directory / "operator.log", f"--agent-port={counters.port}") as operator,
            ):
                yield Crowd(server, operator, counters, stacks, engines, autoscaled)
        finally:
            server.close()
