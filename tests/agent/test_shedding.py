"""The agent's shedders: when listeners are watched, what the director is told, what people are. Engines are played."""

from typing import Any

import pytest
from tests.model.node import PlayedEngine, PlayedJournal, PlayedStack, listener, managed, resource

from packetstack_agent import shedding
from packetstack_agent.director import Director
from packetstack_agent.natives import ffi
from packetstack_agent.shedding import Shedders
from packetstack_core import abi
from packetstack_core.shedding import QUIET_LOOKS

WEB, LATE = listener(), listener("late", 81)
DNS = listener("dns", 53, "UDP")
CAPACITY, RING, LOOK = 20_000, 2048, 0.1


class Library:
    """Stands in for libpacketstack."""

    def __init__(self) -> None:
        self.watches = ffi.new("struct ps_watch[1024]")
        self.numbers: dict[bytes, int] = {}
        self.offered: dict[int, list[int]] = {}
        self.shed: dict[int, list[int]] = {}
        self.known = 0

    def ps_director_watch(self, _d: Any, address: bytes, port: int, protocol: int, number: int, _e: Any) -> int:
        self.numbers[bytes(address) + bytes([protocol])] = number
        return 0

    def ps_director_watches(self, _d: Any) -> Any:
        return self.watches

    def ps_director_watched(self, _d: Any, number: int, out: Any, _e: Any) -> int:
        out.offered, out.shed = self.offered.get(number, [0, 0]), self.shed.get(number, [0, 0])
        return 0

    def ps_director_forget(self, _d: Any, _half: int) -> None:
        pass

    def ps_director_know(self, _d: Any, _half: int, _arena: Any) -> None:
        self.known += 1

    def watched(self) -> list[int]:
        return sorted(n for n in self.numbers.values() if n)


class World:
    """An agent with one stack of one engine. `openers`: of the listener web, a second; each takes two packets' time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waiting, self.openers = 100.0, 0.0, 0.0
        self.lib = Library()
        wanted = resource(listeners=[WEB, DNS])
        self.engine = PlayedEngine(1, wanted)
        self.engine.view.rx_slots = RING
        self.managed = managed(PlayedStack(wanted), self.engine)
        self.journal = PlayedJournal(lambda: self.now)
        monkeypatch.setattr(shedding, "lib", lambda: self.lib)
        self.shedders = Shedders({"web": self.managed}, self.journal, Director(), lambda: self.now)

    @property
    def events(self) -> list[tuple[str, str]]:
        return [(reason, message) for _, reason, message in self.journal.told]

    def live(self, looks: int) -> None:
        for _ in range(looks):
            self.now += LOOK
            come = self.openers * LOOK
            passed = come
            number = self.shedders.of(self.managed).numbers.get(self.web())
            if number:
                step = self.lib.watches[number].step_ns[0]
                passed = min(come, LOOK * 1e9 / step) if step else come
                offered = self.lib.offered.setdefault(number, [0, 0])
                shed = self.lib.shed.setdefault(number, [0, 0])
                offered[0] += round(come)
                shed[0] += round(come - passed)
            done = min(self.waiting + 2 * passed, CAPACITY * LOOK)
            self.waiting = min(RING, self.waiting + 2 * passed - done)
            [queue], [core] = self.engine.queues, self.engine.cores
            queue.depth = round(self.waiting)
            queue.received += round(done)
            core.total_cycles += 1000
            core.busy_cycles += round(1000 * done / (CAPACITY * LOOK))
            self.shedders.shed(self.managed)

    def web(self) -> Any:
        return next(p for p in self.managed.stack.resource.listening() if p[2] == "TCP")

    def document(self) -> list[dict[str, Any]]:
        return self.shedders.of(self.managed).document(shedding.listener_names(self.managed))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_engines_that_keep_up_are_looked_at_and_no_more(world: World) -> None:
    world.openers = 0.4 * CAPACITY
    world.live(50)
    assert world.lib.numbers == {}
    assert world.lib.known == 0
    assert world.events == []
    assert world.document() == []


def test_a_flooded_listener_is_cut_and_told_of_once_and_released_when_it_is_over(world: World) -> None:
    world.openers = 2 * CAPACITY
    world.live(30)
    assert world.lib.watched() == [1, 2], "all listeners, for anyone may be the next"
    [one] = world.document()
    assert (one["listener"], one["kind"], one["active"]) == ("web", "openers", True)
    assert 0.2 * CAPACITY < one["allowedPerSecond"] < 0.6 * CAPACITY
    assert one["offeredPerSecond"] == pytest.approx(2 * CAPACITY)
    assert [reason for reason, _ in world.events] == ["FloodShed"]
    assert "listener web (TCP 192.0.2.10 port 80)" in world.events[0][1]
    world.openers = 10
    world.live(QUIET_LOOKS + 20)
    assert world.lib.watched() == []
    assert [reason for reason, _ in world.events] == ["FloodShed", "FloodEnded"]
    [one] = world.document()
    assert (one["active"], one["allowedPerSecond"]) == (False, None)
    dropped = one["dropped"]
    assert f"{dropped:,} packets were dropped" in world.events[1][1]
    world.openers = 2 * CAPACITY
    world.live(30)
    assert world.document()[0]["dropped"] > dropped, "it goes on counting"


def test_known_flows_are_looked_for_before_a_packet_is_dropped_and_once_a_second(world: World) -> None:
    world.openers = 2 * CAPACITY
    while not world.lib.known:
        world.live(1)
    assert all(list(w.step_ns) == [0, 0] for w in world.lib.watches)
    world.live(30)
    assert 3 <= world.lib.known <= 5
    assert len({w.half for w in world.lib.watches[1:3]}) == 1


def test_a_listener_that_comes_meanwhile_gets_the_level_too(world: World) -> None:
    world.openers = 2 * CAPACITY
    world.live(30)
    world.managed.stack.resource = resource(listeners=[WEB, DNS, LATE])
    world.live(1)
    numbers = world.shedders.of(world.managed).numbers
    assert len(numbers) == 3
    assert len({tuple(world.lib.watches[n].step_ns) for n in numbers.values()}) == 1


def test_an_engine_that_stands_still_is_no_flood(world: World) -> None:
    world.live(5)
    world.engine.queues[0].depth = RING
    for _ in range(20):
        world.now += LOOK
        world.shedders.shed(world.managed)
    assert world.lib.numbers == {}


def test_the_places_of_a_stack_that_is_gone_are_free_again(world: World) -> None:
    world.openers = 2 * CAPACITY
    world.live(30)
    world.shedders.forget("web")
    assert world.document() == []
    world.live(30)
    assert world.lib.watched() == [1, 2]


def test_places_are_as_many_as_the_director_has() -> None:
    assert len(Library().watches) == abi.lib().PS_MAX_WATCHED
