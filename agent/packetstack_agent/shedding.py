"""Sheds the packets of strangers ahead of the engines' rings, while engines have more to do than they can.

What is let through is decided in packetstack_core.shedding, and kept by the director. At rest a look reads how full the
rings are and how busy the cores, and listeners are not watched.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from packetstack_agent.directing import Listening
from packetstack_agent.director import Director
from packetstack_agent.engines import Engine
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed
from packetstack_agent.natives import PROTOCOLS, call, constant, ffi, lib, packed, wire
from packetstack_core import shedding
from packetstack_core.reasons import EventReason
from packetstack_core.shedding import AT_REST, Sample, State
from packetstack_core.verbs import Json

LOOK_SECONDS = 0.1
URGENT_SECONDS = 0.03
"""The same while engines lose packets and it is being found out whose."""
KNOWN_SECONDS = 1.0
"""Time between two searches for the flows that are known, while listeners are watched."""
QUIET_SECONDS = 3.0
"""Time without a drop after which a flood is reported as over."""
KINDS = ("openers", "strays")
"""Kinds of packets of no known flow, in the order of the enum ps_stranger of abi.h."""

Kind = tuple[Listening, str]


@dataclass
class Shed:
    """What is shed of one kind of packets to one listener."""

    offered: float = 0.0
    """Packets of strangers a second, at the last look."""
    dropped: int = 0
    """Packets dropped since the agent began."""
    before: int = 0
    """Packets dropped before the present shedding began."""
    since: float = 0.0
    """When that was; 0 = nothing is dropped."""
    last: float = 0.0
    """When something was dropped last."""


@dataclass
class Shedder:
    """State of one stack's shedding."""

    state: State = AT_REST
    turned: tuple[float, dict[tuple[int, int], tuple[int, int]], int] | None = None
    """Last sample: its time, busy and all cycles by slot and core, packets that were handled."""
    numbers: dict[Listening, int] = field(default_factory=dict)
    """Places of the listeners that are watched."""
    counted: dict[Listening, tuple[float, tuple[int, ...]]] = field(default_factory=dict)
    """When and what was read of them last."""
    known: float = 0.0
    """When known flows were looked for last."""
    sheds: dict[Kind, Shed] = field(default_factory=dict)

    def document(self, names: dict[Listening, str]) -> list[Json]:
        """Its part of the stack's status: each listener and kind of which anything was ever dropped."""
        return [
            {
                "listener": names[place],
                "kind": kind,
                "active": shed.since > 0,
                "offeredPerSecond": round(shed.offered) if shed.since else 0,
                "allowedPerSecond": round(self.state.level) if shed.since and self.state.level is not None else None,
                "dropped": shed.dropped,
            }
            for (place, kind), shed in self.sheds.items()
            if shed.dropped and place in names
        ]


class Shedders:
    """One for each stack."""

    def __init__(
        self,
        stacks: Mapping[str, Managed],
        journal: Journal,
        director: Director,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stacks = stacks
        self._journal = journal
        self._director = director
        self._clock = clock
        self._known: dict[str, Shedder] = {}
        self._half = 0
        """Half of the bits of known flows that is valid now: 0 or 1."""

    def of(self, managed: Managed) -> Shedder:
        """The shedder of a stack; made if it has none."""
        return self._known.setdefault(managed.stack.name, Shedder())

    def forget(self, name: str) -> None:
        """The stack is gone, and its listeners with it."""
        self._known.pop(name, None)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            urgent = False
            for managed in list(self._stacks.values()):
                with self._journal.going_on(managed.stack.name, "shedding"):
                    urgent |= self.shed(managed)
            await asyncio.sleep(URGENT_SECONDS if urgent else LOOK_SECONDS)

    def shed(self, managed: Managed) -> bool:
        """Decide for one stack what is shed, and have the director do so. Returns whether that should be decided again soon."""
        one, now = self.of(managed), self._clock()
        sample = _engines(managed, one, now)
        if not one.state.watched and (sample is None or sample.depth < shedding.FULL):
            return False
        if one.state.watched:
            self._watch(managed, one)
            if now - one.known >= KNOWN_SECONDS:
                self._know(one, now)
            offered = self._offered(one, now)
            sample = replace(sample or Sample(0.0, 0.0), offered=offered)
        assert sample is not None
        was, one.state = one.state, shedding.step(one.state, sample)
        if one.state.watched and not was.watched:
            self._know(one, now)  # before a packet is asked for
            self._watch(managed, one)
            self._offered(one, now)
        if one.state.level != was.level:
            self._allow(one)
        self._report(managed, one, now)
        if not one.state.watched:
            self._release(one)
        return one.state.urgent

    # ---- the director ----------------------------------------------------------------------------------------

    def _watch(self, managed: Managed, one: Shedder) -> None:
        """All listeners there are; idempotent."""
        listening = managed.stack.resource.listening()
        for place in one.numbers.keys() - listening:  # the director knows them no more
            del one.numbers[place]
            one.counted.pop(place, None)
        taken = {n for other in self._known.values() for n in other.numbers.values()}
        free = (n for n in range(1, constant("PS_MAX_WATCHED")) if n not in taken)
        for place in listening:
            number = one.numbers.get(place) or next(free, 0)
            if not number:
                continue
            if place not in one.numbers:
                one.numbers[place] = number
                watch = self._watches[number]
                watch.next_ns, watch.step_ns, watch.half = [0, 0], _step(one), self._half
            self._direct(place, number)

    def _direct(self, place: Listening, number: int) -> None:
        address, port, protocol = place
        call(lib().ps_director_watch, self._director.handle, packed(address), wire(port), PROTOCOLS[protocol], number)

    @property
    def _watches(self) -> Any:
        return lib().ps_director_watches(self._director.handle)

    def _allow(self, one: Shedder) -> None:
        for number in one.numbers.values():
            self._watches[number].step_ns = _step(one)

    def _know(self, one: Shedder, now: float) -> None:
        """Write the known flows of all stacks that are watched into the half that is not in use, and use it."""
        half, director = self._half ^ 1, self._director.handle
        lib().ps_director_forget(director, half)
        for name, other in self._known.items():
            if (other is one or other.numbers) and name in self._stacks:
                for memory in self._stacks[name].stack.sets.values():
                    lib().ps_director_know(director, half, memory.arena)
                other.known = now
        self._half = half
        for other in self._known.values():
            for number in other.numbers.values():
                self._watches[number].half = half

    def _offered(self, one: Shedder, now: float) -> dict[object, float] | None:
        """Strangers a second since the look before, by listener and kind; None if any is not known yet."""
        offered: dict[object, float] | None = {}
        out = ffi.new("struct ps_watched *")
        for place, number in one.numbers.items():
            call(lib().ps_director_watched, self._director.handle, number, out)
            values = tuple(int(n) for n in (*out.offered, *out.shed))
            when, before = one.counted.get(place, (now, values))
            one.counted[place] = (now, values)
            if now <= when:
                offered = None
                continue
            for i, kind in enumerate(KINDS):
                shed = one.sheds.setdefault((place, kind), Shed())
                shed.offered = (values[i] - before[i]) / (now - when)
                dropped = values[i + len(KINDS)] - before[i + len(KINDS)]
                if dropped and not shed.since:
                    shed.since, shed.before = now, shed.dropped
                if dropped:
                    shed.last = now
                shed.dropped += dropped
                if offered is not None:
                    offered[place, kind] = shed.offered
        return offered

    def _release(self, one: Shedder) -> None:
        """Nothing of it is watched any more."""
        for place in one.numbers:
            self._direct(place, 0)
        one.numbers, one.counted = {}, {}

    # ---- telling ---------------------------------------------------------------------------------------------

    def _report(self, managed: Managed, one: Shedder, now: float) -> None:
        names = listener_names(managed)
        for (place, kind), shed in one.sheds.items():
            if not shed.since or place not in names:
                continue
            what = f"listener {names[place]} ({place[2]} {place[0]} port {place[1]})"
            if shed.since == now:
                self._journal.event(
                    managed.stack.name, EventReason.FLOOD_SHED,
                    f"{what}: {shed.offered:,.0f} {kind} a second come, more than its share; about {one.state.level or 0:,.0f} "
                    "are let through, so that known flows and other listeners are served. If these are users, add engines",
                )  # fmt: skip
            elif not one.state.watched or now - shed.last > QUIET_SECONDS:
                lost, seconds = shed.dropped - shed.before, shed.last - shed.since
                shed.since = 0.0
                message = f"{what}: all {kind} are let through again; {lost:,} packets were dropped in {seconds:.0f} s"
                self._journal.event(managed.stack.name, EventReason.FLOOD_ENDED, message)


def _step(one: Shedder) -> list[int]:
    """Nanoseconds between two strangers of a kind, 0 for any."""
    return [max(1, round(1e9 / one.state.level)) if one.state.level else 0] * len(KINDS)


def listener_names(managed: Managed) -> dict[Listening, str]:
    """Names of the listeners by address, port and protocol."""
    return {(li.address, li.port, li.protocol): li.name for li in managed.stack.resource.spec.listeners}


def _engines(managed: Managed, one: Shedder, now: float) -> Sample | None:
    """What the engines did since the look before. None without any that did anything."""
    cycles: dict[tuple[int, int], tuple[int, int]] = {}
    depth = handled = 0
    slots = 1
    for engine in managed.engines.values():
        if not _readable(engine):
            continue
        slots = int(engine.view.rx_slots)
        for c in range(engine.blueprint.cores):
            core = engine.core(c)
            cycles[engine.slot, c] = (int(core.busy_cycles), int(core.total_cycles))
        for q in range(engine.blueprint.queues):
            queue = engine.queue(q)
            depth = max(depth, int(queue.depth))
            handled += int(queue.received)
    before, one.turned = one.turned, (now, cycles, handled)
    if before is None or now <= before[0] or handled < before[2]:
        return None
    busy = 0.0
    for at, (spent, turned) in cycles.items():
        old_spent, old_turned = before[1].get(at, (spent, turned))
        if turned > old_turned:
            busy = max(busy, (spent - old_spent) / (turned - old_turned))
    return Sample(busy, min(1.0, depth / slots), (handled - before[2]) / (now - before[0]))


def _readable(engine: Engine) -> bool:
    return engine.view is not None and engine.ready and not engine.removing
