"""The agent's rebalancers: when they look, what they move, what they tell. Time and counters are played."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.model.node import PlayedEngine, PlayedJournal, PlayedStack, flow_table, managed, resource

from packetstack_agent import balancing, loading, standings
from packetstack_agent.balancing import BUCKET_SECONDS, Balancers
from packetstack_agent.errors import AgentError
from packetstack_agent.managed import Managed
from packetstack_agent.node import RunDirectory
from packetstack_core import standing
from packetstack_core.assignment import Move, Owner
from packetstack_core.load import CoreCounters, EngineCounters, QueueCounters, Snapshot
from packetstack_core.rebalancing import TELL_SECONDS

CYCLES = 1_000_000
"""Of a second."""


class World:
    """One stack of engines of one core, whose buckets move at once. `loads`: share of a core by bucket."""

    def __init__(self, mode: str, loads: dict[int, float], engines: int = 2, **spec: Any) -> None:
        self.now = 100.0
        self.loads = loads
        self.stack = PlayedStack(resource(rebalance={"mode": mode}, **spec), range(1, engines + 1), 256)
        self.managed = managed(self.stack, *(PlayedEngine(slot, self.stack.resource) for slot in range(1, engines + 1)))
        self.managed.converged = True
        self.journal = PlayedJournal(lambda: self.now)
        self.moves: list[int] = []
        self.rebalanced = False
        self.full = False
        """No space is left for the record."""
        self.balancers = Balancers({"web": self.managed}, self.journal, self, lambda: self.now)
        self.spent = dict.fromkeys(range(1, engines + 1), 0.0)
        self.packets = dict.fromkeys(range(256), 0.0)

    @property
    def events(self) -> list[tuple[float, str, str]]:
        return self.journal.told

    def reasons(self) -> list[str]:
        return self.journal.reasons()

    async def rebalance(self, managed: Managed, moves: Sequence[Move], why: str) -> int:
        assert managed is self.managed
        assert "of the mean" in why
        if self.full:
            raise AgentError("state.json: cannot be written: No space left on device")
        self.rebalanced = True
        self.moves += [m.bucket for m in moves]
        for move in moves:
            self.stack.table[move.bucket] = self.stack.shards[move.bucket] = move.to
        return len(moves)

    def even_out(self, managed: Managed) -> None:
        assert managed is self.managed
        self.rebalanced = False

    def snapshot(self, _managed: Any, with_buckets: bool = False) -> Snapshot:
        assert with_buckets
        of_engine = [
            EngineCounters(
                slot, f"web-{slot}", "Active", True, (CoreCounters(round(self.spent[slot]), round(self.now * CYCLES)),),
                (QueueCounters(0, round(self.spent[slot]), round(self.spent[slot] / 100), 0),), 0, 0, 0, 0, 0,
            )
            for slot in self.managed.engines
        ]  # fmt: skip
        return Snapshot(self.now, tuple(of_engine), tuple(round(self.packets[b]) for b in range(256)))

    def second(self) -> None:
        """Packets of 100 cycles each."""
        self.now += 1
        for bucket, load in self.loads.items():
            owner = self.stack.table[bucket]
            self.spent[owner.slot] += load * CYCLES
            self.packets[bucket] += load * CYCLES / 100

    async def live(self, seconds: int) -> None:
        """A look each second."""
        for _ in range(seconds):
            self.second()
            await self.balancers.balance(self.managed)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    def make(mode: str, loads: dict[int, float], **more: Any) -> World:
        made = World(mode, loads, **more)
        monkeypatch.setattr(loading, "snapshot", made.snapshot)
        return made

    return make


SKEWED = {0: 0.2, 2: 0.2, 4: 0.2, 6: 0.2, 1: 0.1, 3: 0.1}
"""80 % on engine 1, 20 % on engine 2."""


async def test_auto_moves_buckets_of_the_busy_engine_once_and_then_rests(world: Callable[..., World]) -> None:
    w = world("Auto", SKEWED)
    await w.live(60)
    assert w.rebalanced
    assert w.reasons() == ["Rebalanced"]
    assert 0 < len(w.moves) <= 3, "one to the other, and two exchanged"
    assert "busiest core 1.60 -> 1." in w.events[0][2]
    shown = w.balancers.of(w.managed).document(w.managed)
    assert shown["mode"] == "Auto"
    assert shown["maxOverMean"] < 1.1
    assert shown["bucketsMoved"] == len(w.moves)


async def test_advice_only_tells_and_not_at_every_look(world: Callable[..., World]) -> None:
    w = world("Advice", SKEWED)
    await w.live(int(3 * TELL_SECONDS))
    assert not w.moves
    assert set(w.reasons()) == {"RebalanceAdvice"}
    assert 2 <= len(w.events) <= 4
    assert w.balancers.of(w.managed).document(w.managed)["maxOverMean"] == pytest.approx(1.6, abs=0.01)


async def test_off_does_nothing_and_makes_numbers_even_again(world: Callable[..., World]) -> None:
    w = world("Off", SKEWED)
    w.rebalanced = True
    await w.live(30)
    assert not w.moves
    assert not w.events
    assert not w.rebalanced


async def test_while_the_stack_is_not_settled_nothing_moves(world: Callable[..., World]) -> None:
    w = world("Auto", SKEWED)
    w.managed.converged = False
    await w.live(30)
    assert not w.moves
    w.managed.converged = True
    await w.live(int(BUCKET_SECONDS) + 1)
    assert w.moves


async def test_while_the_stack_is_paused_nothing_moves_and_the_mark_stays(world: Callable[..., World]) -> None:
    w = world("Auto", SKEWED, paused=True)
    w.rebalanced = True
    await w.live(30)
    assert not w.moves
    assert w.rebalanced


async def test_after_a_pause_what_was_before_says_nothing(world: Callable[..., World]) -> None:
    w = world("Auto", SKEWED)
    await w.live(1)
    w.stack.resource = resource(rebalance={"mode": "Auto"}, paused=True)
    await w.live(600)
    w.stack.resource = resource(rebalance={"mode": "Auto"})
    w.loads = {1: 0.1}
    await w.live(30)
    assert not w.moves


async def test_buckets_that_a_person_has_moved_stay(world: Callable[..., World]) -> None:
    w = world("Auto", SKEWED)
    w.managed.pinned = {0: 1, 2: 1}
    await w.live(60)
    assert w.moves
    assert not {0, 2} & set(w.moves)


async def test_an_elephant_is_told_of_but_not_at_every_look(world: Callable[..., World]) -> None:
    w = world("Auto", {0: 0.9, 1: 0.05})
    await w.live(int(2 * TELL_SECONDS))
    assert set(w.reasons()) == {"Elephant"}
    assert len(w.events) <= 3
    assert "bucket 0 of engine 1 takes 90% of a core" in w.events[0][2]
    assert w.balancers.of(w.managed).document(w.managed)["elephants"][0]["bucket"] == 0


async def test_in_a_cluster_buckets_are_the_operators(world: Callable[..., World]) -> None:
    w = world("Auto", SKEWED)
    w.managed.table = flow_table(w.stack.resource)
    await w.live(60)
    assert not w.moves


class Lib:
    """libpacketstack, as far as queues are moved: the engine does at once what is asked."""

    def __init__(self, engine: PlayedEngine) -> None:
        self.engine = engine
        self.moves: list[tuple[int, int]] = []

    def ps_queue_to_core(self, _fence: Any, queue: int, core: int, *_: Any) -> int:
        self.moves.append((queue, core))
        self.engine.queues[queue].cur = core + 1
        return 0


@pytest.mark.parametrize("mode", ["Auto", "Advice", "Off"])
async def test_hot_queues_of_one_core_are_parted_and_stay_where_they_are(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    w = world(mode, {}, engines=1, engine={"cores": 2, "queuesPerCore": 2, "cpuPolicy": "Shared"})
    engine = w.managed.engines[1]
    assert isinstance(engine, PlayedEngine)
    busy, lib = [0.4, 0.4, 0.0, 0.01], Lib(engine)
    for q, number in enumerate((0, 0, 1, 1)):
        engine.queues[q].cur = number + 1
    monkeypatch.setattr(balancing, "lib", lambda: lib)
    w.managed.table = flow_table(w.stack.resource)  # also in a cluster
    looks = []
    for _ in range(30):
        w.now += 0.1
        for core in engine.cores:
            core.total_cycles += round(0.1 * CYCLES)
        for q, share in enumerate(busy):
            engine.queues[q].cycles += round(0.1 * CYCLES * share)
        looks.append(await w.balancers.balance(w.managed))
    if mode != "Auto":
        assert not lib.moves
        return
    assert len(lib.moves) == 1
    assert sorted(engine.queues[q].cur for q in (0, 1)) == [1, 2]
    assert looks[1], "a busy engine that is uneven is looked at closely"
    assert not looks[-1], "and no more when it is even"
    assert w.reasons() == ["QueuesRebalanced"]
    queue, to = lib.moves[0]
    [last] = w.balancers.of(w.managed).document(w.managed)["lastMoves"]
    assert (last["what"], last["why"]) == (f"queue {queue} of web-1 to core {to}", "load")


async def test_one_hot_queue_that_no_move_helps_is_not_looked_at_closely(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world("Auto", {}, engines=1, engine={"cores": 2, "queuesPerCore": 1, "cpuPolicy": "Shared"})
    engine = w.managed.engines[1]
    assert isinstance(engine, PlayedEngine)
    lib = Lib(engine)
    monkeypatch.setattr(balancing, "lib", lambda: lib)
    w.managed.table = flow_table(w.stack.resource)
    looks = []
    for _ in range(10):
        w.now += 1
        for core in engine.cores:
            core.total_cycles += CYCLES
        engine.queues[0].cycles += round(0.9 * CYCLES)
        looks.append(await w.balancers.balance(w.managed))
    assert not lib.moves
    assert not any(looks)


@pytest.mark.looptime
async def test_moves_that_cannot_be_recorded_are_told_and_the_next_look_follows(world: Callable[..., World]) -> None:
    w = world("Auto", SKEWED)

    w.full = True
    looking = asyncio.create_task(w.balancers.run())
    for _ in range(80):
        w.second()
        await asyncio.sleep(1)
    looking.cancel()
    assert set(w.reasons()) == {"Failed"}
    assert len(w.reasons()) > 1
    assert "No space left on device" in w.events[0][2]


@pytest.mark.parametrize(("mode", "rebalanced"), [("Auto", True), ("Advice", True), ("Auto", False), ("Off", True)])
def test_the_planner_leaves_buckets_that_were_moved_by_load_where_they_are(
    tmp_path: Path, mode: str, rebalanced: bool
) -> None:
    played = PlayedStack(resource(rebalance={"mode": mode}))
    played.table = [Owner(1, 0)] * 100 + [Owner(2, 0)] * 156
    played.shards = list(played.table)
    one = managed(played, PlayedEngine(1, played.resource), PlayedEngine(2, played.resource))
    run = RunDirectory(tmp_path)
    run.record.rebalanced = {"web": True} if rebalanced else {}
    assert bool(standing.plan(standings.pool(one, run), 0.0).actions) != (rebalanced and mode != "Off")


def test_the_next_agent_knows_which_stacks_were_rebalanced(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.record.rebalanced["web"] = True
    run.save(must=True)
    assert RunDirectory(tmp_path).record.rebalanced == {"web": True}
