"""What the watchdog sees and has mended. Engines, their processes and time are played."""

import asyncio
import socket
from collections.abc import Callable
from functools import partial

import pytest
from tests.model.node import PlayedEngine, PlayedStack, managed, resource, turns

from packetstack_agent import networks, processes
from packetstack_agent.attachments import Attachments, Link
from packetstack_agent.engines import Engine
from packetstack_agent.journal import Background, Journal
from packetstack_agent.managed import Managed
from packetstack_agent.processes import Process, Spent
from packetstack_agent.watchdog import (
    BLOCKED_SECONDS,
    BURNT_SECONDS,
    REST_SECONDS,
    STALLS,
    STARVED_SECONDS,
    STOPPED_SECONDS,
    WATCH_SECONDS,
    Watchdog,
    judge,
)
from packetstack_core.preconditions import Lack, Precondition


class Slow:
    """Repairs that end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int, str]] = []
        self.go_on = asyncio.Event()

    async def rebuild(self, managed: Managed, engine: Engine, why: str) -> None:
        await self._mend("rebuild", engine, why)

    async def lose(self, managed: Managed, engine: Engine, why: str) -> None:
        await self._mend("lose", engine, why)

    async def start_again(self, managed: Managed, engine: Engine, why: str) -> None:
        await self._mend("start again", engine, why)

    async def _mend(self, what: str, engine: Engine, why: str) -> None:
        self.begun.append((what, engine.slot, why))
        await self.go_on.wait()


class Init(Process):
    """An engine's init."""

    def __init__(self) -> None:
        self.lives = True

    def alive(self) -> bool:
        return self.lives


class Served(Attachments):
    """Somebody serves; who is killed is noted."""

    def __init__(self, killed: Callable[[], None]) -> None:
        class Serving(Link):
            def kill(self) -> None:
                killed()

        self.serving = Serving(1, -1, 1, socket.socket())
        self.serving.connection.close()
        self._ending = None


class World:
    """A watchdog over engines that turn unless a test says otherwise."""

    def __init__(self, count: int) -> None:
        self.now = 100.0
        self.wait = WATCH_SECONDS
        """Until the next look."""
        self.stack = PlayedStack(resource(replicas=count), owners=range(1, count + 1))
        self.engines = {slot: PlayedEngine(slot, self.stack.resource) for slot in range(1, count + 1)}
        self.inits = {slot: Init() for slot in self.engines}
        self.still: set[int] = set()
        """Slots of engines whose core does not turn."""
        self.killed: list[tuple[float, int]] = []
        for slot, engine in self.engines.items():
            engine.init = self.inits[slot]
            engine.attachments = Served(partial(self._kill, slot))
        self.repairs = Slow()
        self.journal = Journal()
        self.background = Background(self.journal)
        self.stacks = {"web": managed(self.stack, *self.engines.values())}
        self.watchdog = Watchdog(self.stacks, self.journal, self.background, self.repairs)

    def _kill(self, slot: int) -> None:
        self.killed.append((self.now, slot))

    async def live(self, seconds: float, turns_a_second: float = 1000.0) -> list[float]:
        """Cores turn so often meanwhile. Returns the times between the watchdog's looks."""
        end, waits, turned = self.now + seconds - 1e-6, [], 0.0
        while self.now < end:
            self.now += self.wait
            waits.append(self.wait)
            turned += self.wait * turns_a_second
            for slot, engine in self.engines.items():
                engine.cores[0].heartbeat += int(turned) if slot not in self.still else 0
            turned %= 1
            self.wait = self.watchdog.check_all(self.now)
            await turns(3)
        return waits

    async def end(self) -> None:
        self.repairs.go_on.set()
        await self.background.ended()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], World]:
    monkeypatch.setattr(networks, "is_there", lambda _: True)
    monkeypatch.setattr(processes, "spent", lambda *_: Spent("T", 1.0))
    return World


async def test_engines_that_turn_are_left_alone(world: Callable[[int], World]) -> None:
    w = world(3)
    await w.live(20)
    assert not w.killed
    assert not w.repairs.begun
    assert not w.journal.events


async def test_a_core_that_does_not_turn_is_killed_after_the_limit_and_only_once(world: Callable[[int], World]) -> None:
    w = world(2)
    await w.live(1)
    w.still, began = {2}, w.now
    await w.live(0.9)
    [(when, slot)] = w.killed
    assert slot == 2
    assert STOPPED_SECONDS <= when - began + 1e-6 < STOPPED_SECONDS + 2 * WATCH_SECONDS


async def test_at_rest_the_watchdog_looks_less_often_and_finds_a_core_that_stops_all_the_same(
    world: Callable[[int], World],
) -> None:
    w = world(2)
    await w.live(0.3)
    assert set(await w.live(1)) == {WATCH_SECONDS}, "cores with packets"
    await w.live(0.2, turns_a_second=10)
    assert set(await w.live(1, turns_a_second=10)) == {REST_SECONDS}, "cores that sleep"
    w.still, began = {2}, w.now
    await w.live(0.5, turns_a_second=10)
    [(when, slot)] = w.killed
    assert slot == 2
    assert when - began < STOPPED_SECONDS + 2 * REST_SECONDS


async def test_an_engine_without_a_datapath_is_looked_at_often(world: Callable[[int], World]) -> None:
    w = world(1)
    await w.live(1, turns_a_second=10)
    assert w.wait == REST_SECONDS
    w.engines[1].attachments = None
    await w.live(0.3, turns_a_second=0)
    assert w.wait == WATCH_SECONDS


async def test_a_core_that_gets_no_cpu_has_more_time(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(1)
    monkeypatch.setattr(processes, "spent", lambda *_: Spent("R", 1.0))
    w.still = {1}
    await w.live(STARVED_SECONDS - 0.5)
    assert not w.killed
    await w.live(1)
    assert len(w.killed) == 1


NOTHING_YET = ""


@pytest.mark.parametrize(
    ("still", "spent", "why"),
    [
        (STOPPED_SECONDS - 0.01, Spent("T", 1.0), NOTHING_YET),
        (STOPPED_SECONDS, Spent("T", 1.0), "was stopped for 0.10 s"),
        (0.15, Spent("t", 1.0), "was stopped for 0.15 s"),
        (0.1, Spent("R", 1.0 + BURNT_SECONDS - 0.01), NOTHING_YET),
        (0.1, Spent("R", 1.0 + BURNT_SECONDS), "has not come to the end of a turn in 0.08 s of CPU time"),
        (STARVED_SECONDS, Spent("R", 1.0), NOTHING_YET),
        (STARVED_SECONDS + 1, Spent("R", 1.0), "has got no CPU for 6 s"),
        (BLOCKED_SECONDS, Spent("S", 1.0), NOTHING_YET),
        (0.6, Spent("S", 1.0), "has waited in the kernel for 0.6 s"),
        (0.6, Spent("D", 1.0), "has waited in the kernel for 0.6 s"),
        (STARVED_SECONDS, None, NOTHING_YET),
        (STARVED_SECONDS + 1, None, "has got no CPU for 6 s"),
    ],
)
def test_how_long_a_core_may_stay_without_a_turn_depends_on_what_its_thread_does(
    still: float, spent: Spent | None, why: str
) -> None:
    assert judge(still, Spent("R", 1.0), spent) == why


async def test_a_core_that_sleeps_between_turns_is_not_asked_for_its_thread(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(1)
    asked: list[int] = []
    monkeypatch.setattr(processes, "spent", lambda *_: asked.append(1))
    w.engines[1].cores[0].asleep = 1
    for _ in range(20):  # it turns each 0.1 s
        w.still = {1}
        await w.live(WATCH_SECONDS)
        w.still = set()
        await w.live(WATCH_SECONDS)
    assert not asked


async def test_an_engine_that_is_being_mended_keeps_nobody_from_seeing_that_another_one_hangs(
    world: Callable[[int], World],
) -> None:
    w = world(6)
    await w.live(1)
    for slot in range(1, 6):
        w.inits[slot].lives = False
    w.still, began = {6}, w.now
    await w.live(1)
    assert sorted(slot for _, slot, _ in w.repairs.begun) == [1, 2, 3, 4, 5], "all at once, each once"
    [(when, slot)] = w.killed
    assert slot == 6
    assert when - began < STOPPED_SECONDS + 2 * WATCH_SECONDS
    await w.end()


async def test_an_engine_that_is_being_mended_is_killed_when_it_hangs(world: Callable[[int], World]) -> None:
    w = world(1)
    await w.live(1)
    w.inits[1].lives = False
    await w.live(0.2)
    w.still = {1}
    await w.live(0.9)
    assert [slot for _, slot in w.killed] == [1]
    await w.end()


async def test_a_repair_that_fails_is_told_and_tried_again(world: Callable[[int], World]) -> None:
    class Failing(Slow):
        async def _mend(self, what: str, engine: Engine, why: str) -> None:
            self.begun.append((what, engine.slot, why))
            raise OSError("no more processes")

    w, repairs = world(1), Failing()
    w.watchdog = Watchdog(w.stacks, w.journal, w.background, repairs)
    w.inits[1].lives = False
    await w.live(1)
    assert len(repairs.begun) > 1
    assert {what for what, _, _ in repairs.begun} == {"start again"}
    assert [e["reason"] for e in w.journal.events] == ["Failed"]


async def test_an_interface_that_is_gone_is_a_reason_to_make_the_engine_again_or_to_lose_it(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(2)
    w.engines[2].blueprint.pod = "web-2"
    monkeypatch.setattr(networks, "is_there", lambda _: False)
    await w.live(0.2)
    assert {(what, slot) for what, slot, _ in w.repairs.begun} == {("rebuild", 1), ("lose", 2)}
    await w.end()


@pytest.mark.parametrize(("turning", "killed"), [(True, True), (False, False)])
async def test_fences_that_are_not_answered_are_a_reason_to_kill_only_while_the_cores_turn(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch, turning: bool, killed: bool
) -> None:
    w = world(1)
    monkeypatch.setattr(processes, "spent", lambda *_: Spent("R", 1.0))
    await w.live(1)
    w.still = set() if turning else {1}
    for _ in range(STALLS + 1):
        await w.live(0.6)
        w.watchdog.fence_missed(w.engines[1], w.now)
    assert bool(w.killed) == killed


class BrokenWay:
    """Of an engine's path something is missing that cannot be put back."""

    lost = ""
    lacks = (Lack(Precondition.HOST_END, "engine 1", "no permission", lost=True),)


async def test_no_datapath_is_killed_for_fences_that_cannot_reach_it(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(1)
    monkeypatch.setattr(w.engines[1], "way", BrokenWay())
    for _ in range(3 * STALLS):
        await w.live(0.6)
        w.watchdog.fence_missed(w.engines[1], w.now)
    assert not w.killed
    monkeypatch.setattr(w.engines[1], "way", None)
    for _ in range(STALLS):
        w.watchdog.fence_missed(w.engines[1], w.now)
    assert w.killed


async def test_an_engine_whose_interface_has_left_its_namespace_is_made_again(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w, way = world(1), BrokenWay()
    monkeypatch.setattr(way, "lost", "its interface eth0 is gone from its namespace")
    monkeypatch.setattr(w.engines[1], "way", way)
    await w.live(0.4)
    assert w.repairs.begun == [("rebuild", 1, "its interface eth0 is gone from its namespace")]
    await w.end()


async def test_fences_that_were_answered_between_make_the_count_begin_anew(world: Callable[[int], World]) -> None:
    w = world(1)
    for _ in range(3):
        for _ in range(STALLS - 1):
            w.watchdog.fence_missed(w.engines[1], w.now)
        w.watchdog.fences_answered(w.engines.values())
    assert not w.killed


async def test_what_was_seen_of_one_process_says_nothing_about_the_next(world: Callable[[int], World]) -> None:
    w = world(1)
    for _ in range(STALLS - 1):
        w.watchdog.fence_missed(w.engines[1], w.now)
    w.still = {1}
    await w.live(STOPPED_SECONDS / 2)
    w.engines[1].process = 77
    w.watchdog.fence_missed(w.engines[1], w.now)
    await w.live(STOPPED_SECONDS / 2)
    assert not w.killed
