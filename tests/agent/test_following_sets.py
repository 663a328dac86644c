"""An agent follows a flow table with two sets of engines, with played engines and a played mirror."""

import time
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import pytest
from tests.agent.test_keeping import agent, reasons, settle  # noqa: F401
from tests.model.node import PlayedEngine, PlayedMemory, PlayedStack, managed, resource

from packetstack_agent import cluster
from packetstack_agent.agent import Agent
from packetstack_agent.engines import Engine
from packetstack_agent.flow_memory import Report
from packetstack_agent.managed import Managed
from packetstack_agent.mirroring import Left, Mirror
from packetstack_agent.natives import constant
from packetstack_core import kinds
from packetstack_core.assignment import Move, Owner
from packetstack_core.kinds import FlowTable, TableEngine
from packetstack_core.transitions import SetState

BUCKETS = 256


class PlayedMirror(Mirror):
    """Who keeps which bucket; each kept bucket has a connection until a test ends it."""

    def __init__(self, stack: "TwoSets") -> None:
        self.stack = stack
        self.kept: dict[int, Owner] = {}
        self.ended: set[int] = set()
        """Buckets whose last connection has closed."""
        self.seen = int(time.monotonic())
        """When each connection was seen last."""

    def keepers(self) -> list[Owner | None]:
        return [self.kept.get(b) for b in range(BUCKETS)]

    def left(self) -> Left:
        ticks = self.seen * constant("PS_TICKS_PER_SECOND")
        return Left(len(self.kept), len(self.kept), ticks, tuple(sorted(self.ended & self.kept.keys())))

    def switch(self, engines: Collection[Engine], moves: Sequence[Move]) -> Report:
        for move in moves:
            self.kept[move.bucket] = self.stack.table[move.bucket]
            self.stack.table[move.bucket] = self.stack.shards[move.bucket] = move.to
        return Report(len(moves), 1, [7])

    def end(self, engines: Collection[Engine], buckets: Sequence[int]) -> Report:
        for bucket in buckets:
            del self.kept[bucket]
        return Report(len(buckets), 1, [7])

    def adopt(self, engines: Collection[Engine], moves: Sequence[Move]) -> None:
        self.kept |= {m.bucket: m.to for m in moves}

    @property
    def unfinished(self) -> bool:
        return False

    def look_at_devices(self, engines: Collection[Engine]) -> None:
        """There are none."""

    def share(self) -> None:
        """Nothing is counted."""


class TwoSets(PlayedStack):
    """A stack whose sets come and go."""

    def add_set(self, number: int, shard: str = "") -> None:
        self.sets = self.sets | {number: PlayedMemory()}

    def remove_set(self, number: int) -> None:
        assert number != self.current
        self.sets = {n: m for n, m in self.sets.items() if n != number}

    def mirror_from(self, keeper: int, newcomer: int) -> None:
        self.mirror = PlayedMirror(self)

    def mirror_no_more(self) -> None:
        self.mirror = None

    def shard_slots(self) -> set[int]:
        kept = self.mirror.kept if isinstance(self.mirror, PlayedMirror) else {}
        return super().shard_slots() | {o.slot for o in kept.values()}


SET = {"replicas": 1, "template": "ab", "queues": 1, "since": "2026-11-30T12:00:00Z"}


def table(owner: int, sets: dict[int, str], engines: Sequence[int], keeper: int = 0) -> FlowTable:
    """Engine n is of set n, but for 3, which is of set 1."""
    shown = resource().document()["spec"]
    spec: dict[str, Any] = {
        "node": "n1",
        "sets": [{"id": i, "state": state, **SET} for i, state in sets.items()],
        "lastSet": 2,
        "engines": [
            {
                "id": i, "name": f"web-{i}", "podUid": f"0-{i}", "state": "Active", "template": "ab", "queues": 1, "cores": 1,
                "set": 1 if i == 3 else i,
            }
            for i in engines
        ],
        "owners": kinds.encode_owners([Owner(owner, 0)] * BUCKETS),
        "flowTable": {"buckets": BUCKETS},
        "listeners": shown["listeners"],
        "snat": shown["snat"],
    }  # fmt: skip
    if keeper:
        spec["previousOwners"] = kinds.encode_owners([Owner(keeper, 0)] * BUCKETS)
    body = {"apiVersion": "packetstack.io/v1alpha1", "kind": "FlowTable", "metadata": {"name": "web"}, "spec": spec}
    return kinds.read(FlowTable, body)


def engine(stack: PlayedStack, number: int, of: int) -> PlayedEngine:
    made = PlayedEngine(100 + number, stack.resource)
    b = made.blueprint
    b.id, b.pod, b.pod_uid, b.set = number, f"web-{number}", f"0-{number}", of
    return made


@pytest.fixture
def one(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Managed:  # noqa: F811
    """A stack with one engine, which has all buckets."""
    stack = TwoSets(resource(flowTable={"buckets": BUCKETS}), owners=(101,), buckets=BUCKETS)
    made = managed(stack)
    made.add(engine(stack, 1, 1))
    agent.stacks["web"] = made

    def attach(managed: Managed, wanted: TableEngine, number: int) -> None:
        managed.add(engine(stack, wanted.id, number))

    monkeypatch.setattr(agent.life, "attach", attach)
    return made


async def follow(agent: Agent, one: Managed, wanted: FlowTable) -> kinds.NodeReport:  # noqa: F811
    one.table, one.generation = wanted, one.generation + 1
    await settle(agent, one, 3)
    return cluster.report_of(one, "n1", "")


async def test_a_set_comes_takes_over_and_the_first_goes(agent: Agent, one: Managed) -> None:  # noqa: F811
    stack = one.stack
    report = await follow(agent, one, table(1, {1: "Current"}, [1]))
    assert report.settled
    assert [s.id for s in one.sets.known] == [1]

    report = await follow(agent, one, table(1, {1: "Current", 2: "Activating"}, [1, 2]))
    assert report.settled
    assert (list(stack.sets), stack.current, stack.mirror is not None) == ([1, 2], 1, True)
    assert [(e.id, e.configured) for e in report.engines] == [(1, True), (2, True)]

    report = await follow(agent, one, table(2, {1: "Draining", 2: "Current"}, [1, 2], keeper=1))
    assert report.settled
    assert stack.current == 2
    assert {o.slot for o in stack.owners() if o} == {102}
    assert {o.slot for o in stack.keepers() if o} == {101}
    kept = cluster.power_of_two_below(BUCKETS)
    assert [(s.id, s.kept_buckets, s.connections) for s in report.sets or ()] == [(1, kept, kept), (2, 0, 0)]
    assert [s.state for s in one.sets.known] == [SetState.DRAINING, SetState.CURRENT]

    assert isinstance(stack.mirror, PlayedMirror)
    stack.mirror.ended = set(range(BUCKETS))
    report = await follow(agent, one, table(2, {1: "Draining", 2: "Current"}, [1, 2], keeper=1))
    assert [(s.id, s.kept_buckets) for s in report.sets or ()] == [(1, 0), (2, 0)]

    report = await follow(agent, one, table(2, {2: "Current"}, [2]))
    assert report.settled
    assert (list(stack.sets), stack.mirror, [s.id for s in one.sets.known]) == ([2], None, [2])
    assert [e.id for e in report.engines] == [2]
    assert [r for r in reasons(agent) if r.startswith("Set") or r == "BucketsSwitched"] == [
        "SetActivating", "SetCurrent", "BucketsSwitched", "SetRetired",
    ]  # fmt: skip


async def test_since_when_a_connection_is_silent_is_told_to_a_minute(agent: Agent, one: Managed) -> None:  # noqa: F811
    await follow(agent, one, table(1, {1: "Current"}, [1]))
    await follow(agent, one, table(1, {1: "Current", 2: "Activating"}, [1, 2]))
    await follow(agent, one, table(2, {1: "Draining", 2: "Current"}, [1, 2], keeper=1))
    assert isinstance(one.stack.mirror, PlayedMirror)
    told = []
    for seconds in range(120):  # a packet a second
        one.stack.mirror.seen = int(time.monotonic()) - seconds
        first, second = cluster.report_of(one, "n1", "").sets or ()
        told.append(datetime.fromisoformat(first.silent_since or "").timestamp())
        assert 0 <= time.time() - seconds - told[-1] < 62
        assert second.silent_since is None
    assert 2 <= len(set(told)) <= 3


async def test_what_an_engine_that_is_gone_kept_goes_to_another_of_its_set(agent: Agent, one: Managed) -> None:  # noqa: F811
    await follow(agent, one, table(1, {1: "Current"}, [1]))
    await follow(agent, one, table(1, {1: "Current", 2: "Activating"}, [1, 2]))
    await follow(agent, one, table(2, {1: "Draining", 2: "Current"}, [1, 2], keeper=1))
    del one.engines[101]
    report = await follow(agent, one, table(2, {1: "Draining", 2: "Current"}, [2, 3], keeper=3))
    assert {o.slot for o in one.stack.keepers() if o} == {103}
    assert {o.slot for o in one.stack.owners() if o} == {102}
    assert report.settled
