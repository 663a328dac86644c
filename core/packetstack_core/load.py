"""Load of engines, from what their counters say at two times.

A `Snapshot` is what an agent reads for one stack: counters that only rise, as they are in shared memory. Whoever
needs a rate keeps a `History` and asks for the load of its last seconds. So any number of readers see the same
counters, and nobody must reset them.

Utilization is busy cycles by all cycles, never CPU time: a core that polls is always busy for the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from packetstack_core.assignment import Owner
from packetstack_core.limits import MAX_BUCKETS, MAX_CORES, MAX_QUEUES

MAX_ENGINES = 1023
"""Most engines that a stack may have on one node: slots of the flow table's word."""
KEEP_SECONDS = 60.0
"""How far back a history reaches."""
SHORTEST_SECONDS = 0.001
"""Shortest time between two snapshots that a rate is computed for."""
Count = Annotated[int, Field(ge=0, lt=2**64)]
"""A counter; an answer with another number is refused."""


# ---- counters --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CoreCounters:
    """Counters of one core, in cycles of the TSC."""

    busy_cycles: Count
    """Spent in turns of the loop that handled frames."""
    total_cycles: Count
    """All, also those spent asleep."""


@dataclass(frozen=True, slots=True)
class QueueCounters:
    """Counters of one receive queue."""

    core: Annotated[int, Field(ge=-1, le=255)]
    """Core that serves it; -1: none."""
    cycles: Count
    """Busy cycles spent on it."""
    packets: Count
    """Taken out of its ring."""
    depth: Count
    """Frames that wait in it now."""
    missed: Count = 0
    """Frames that found its ring full; the kernel dropped them."""


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Counters of one engine since its interface was made. `id`: its slot on the node, in a cluster its id in the flow table."""

    id: int
    name: str
    """Its own, in a cluster that of its pod."""
    state: str
    """`assignment.State`."""
    ready: bool
    """Its datapath serves."""
    cores: tuple[CoreCounters, ...]
    queues: tuple[QueueCounters, ...]
    packets: Count
    """Received."""
    bytes: Count
    """Received."""
    flows_created: Count
    dropped: Count
    """Frames that it received and dropped, for any reason."""
    flows: Count
    """Alive now."""
    missed: Count = 0
    """Dropped by the kernel before the engine received them."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One stack on one node at one time."""

    time: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Seconds, on a clock of the node that outlives its agent (CLOCK_MONOTONIC)."""
    engines: tuple[EngineCounters, ...]
    bucket_packets: tuple[Count, ...] = ()
    """Packets that engines have handled by bucket; empty where nobody asked for them."""


_SNAPSHOT = TypeAdapter(Snapshot)


def to_json(snapshot: Snapshot) -> bytes:
    """A snapshot as the body of an agent's answer."""
    return _SNAPSHOT.dump_json(snapshot)


def from_json(data: bytes) -> Snapshot:
    """What `to_json` wrote. ValueError for anything else, or more than a stack can have."""
    try:
        snapshot = _SNAPSHOT.validate_json(data)
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise ValueError(f"load: {where}: {error['msg']}; use an agent of this version") from None
    if (
        len(snapshot.engines) > MAX_ENGINES
        or len(snapshot.bucket_packets) > MAX_BUCKETS
        or any(len(e.cores) > MAX_CORES or len(e.queues) > MAX_QUEUES for e in snapshot.engines)
    ):
        raise ValueError("load: names more engines, cores, queues or buckets than a stack can have")
    return snapshot


# ---- rates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """Load of one receive queue."""

    core: int
    """Core that serves it; -1: none."""
    busy: float
    """Share of a core that it took."""
    packets_per_second: float
    depth: int
    """Frames that waited in it at the end."""
    asked: float = 1.0
    """Packets that came for it by those that it took: more than 1 while its ring is full."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load of one engine, over `window` seconds."""

    id: int
    name: str
    state: str
    ready: bool
    window: float
    cores: tuple[float, ...]
    """Busy share of each core, 0 to 1."""
    queues: tuple[QueueLoad, ...]
    active_flows: int
    new_flows_per_second: float
    packets_per_second: float
    bits_per_second: float
    drop_ratio: float
    """Dropped packets by all that came, 0 to 1."""

    @property
    def utilization(self) -> float:
        """Busy share of all its cores, 0 to 1."""
        return sum(self.cores) / len(self.cores)


@dataclass(frozen=True, slots=True)
class StackLoad:
    """Load of one stack on one node."""

    read: float
    """When the later of the two snapshots was read, on the reader's own clock."""
    engines: tuple[EngineLoad, ...]
    """Those that were in both snapshots, with counters that rose: of others nothing is known."""
    bucket_packets_per_second: tuple[float, ...] = ()


def engine_load(before: EngineCounters, after: EngineCounters, seconds: float) -> EngineLoad | None:
    """What an engine did in between; None if these are not two looks at the same running engine.

    A counter that went backwards, other cores or queues, or a core whose loop has not turned: it was made anew, or
    stands still.
    """
    if (
        seconds < SHORTEST_SECONDS
        or len(before.cores) != len(after.cores)
        or len(before.queues) != len(after.queues)
        or not after.cores
    ):
        return None
    cores = []
    for old, new in zip(before.cores, after.cores, strict=True):
        busy, total = new.busy_cycles - old.busy_cycles, new.total_cycles - old.total_cycles
        if total <= 0 or busy < 0:
            return None
        cores.append(min(1.0, busy / total))
    cycles = sum(a.total_cycles - b.total_cycles for b, a in zip(before.cores, after.cores, strict=True)) / len(cores)
    queues = []
    for was, now in zip(before.queues, after.queues, strict=True):
        spent, packets = now.cycles - was.cycles, now.packets - was.packets
        lost = now.missed - was.missed
        if spent < 0 or packets < 0 or lost < 0:
            return None
        asked = 1 + lost / packets if packets else 1.0
        queues.append(QueueLoad(now.core, min(1.0, spent / cycles), packets / seconds, now.depth, asked))
    packets, size = after.packets - before.packets, after.bytes - before.bytes
    created, dropped = after.flows_created - before.flows_created, after.dropped - before.dropped
    missed = after.missed - before.missed
    if min(packets, size, created, dropped, missed) < 0:
        return None
    return EngineLoad(
        after.id,
        after.name,
        after.state,
        after.ready,
        seconds,
        tuple(cores),
        tuple(queues),
        after.flows,
        created / seconds,
        packets / seconds,
        8 * size / seconds,
        min(1.0, (dropped + missed) / max(packets + missed, 1)),
    )


def stack_load(before: Snapshot, after: Snapshot, read: float) -> StackLoad:
    """What a stack's engines did between two snapshots of the same node. `read`: see `StackLoad`."""
    seconds = after.time - before.time
    known = {(e.id, e.name): e for e in before.engines}
    found = (engine_load(known[key], e, seconds) for e in after.engines if (key := (e.id, e.name)) in known and e.ready)
    old, new = before.bucket_packets, after.bucket_packets
    buckets: tuple[float, ...] = ()
    if seconds >= SHORTEST_SECONDS and len(old) == len(new) and all(a >= b for b, a in zip(old, new, strict=True)):
        buckets = tuple((a - b) / seconds for b, a in zip(old, new, strict=True))
    return StackLoad(read, tuple(e for e in found if e is not None), buckets)


@dataclass(slots=True)
class History:
    """Snapshots of one stack on one node, oldest first."""

    _kept: list[tuple[float, Snapshot]] = field(default_factory=list)

    def add(self, snapshot: Snapshot, read: float) -> None:
        """`read`: when it was read, on the reader's own clock. A clock that went backwards begins anew."""
        if self._kept and snapshot == self._kept[-1][1]:
            return  # an agent that is asked twice in a moment answers the same
        if self._kept and (snapshot.time <= self._kept[-1][1].time or read < self._kept[-1][0]):
            self._kept.clear()
        self._kept.append((read, snapshot))
        while len(self._kept) > 2 and self._kept[1][1].time < snapshot.time - KEEP_SECONDS:
            del self._kept[0]

    def load(self, seconds: float) -> StackLoad | None:
        """Load of the last `seconds`, as nearly as there are snapshots; None before two of them.

        An engine that was not there all that time, or was made anew meanwhile, has a window of its own.
        """
        if len(self._kept) < 2:
            return None
        read, last = self._kept[-1]
        earlier = [s for _, s in self._kept[:-1]]
        # The nearest one: of one a moment too young the one before might be twice as old.
        begin = min(range(len(earlier)), key=lambda i: abs(earlier[i].time - (last.time - seconds)))
        found = stack_load(earlier[begin], last, read)
        late = {(e.id, e.name) for e in last.engines if e.ready} - {(e.id, e.name) for e in found.engines}
        for snapshot in earlier[begin + 1 :] if late else ():
            rest = Snapshot(last.time, tuple(e for e in last.engines if (e.id, e.name) in late))
            more = stack_load(snapshot, rest, read).engines
            late -= {(e.id, e.name) for e in more}
            found = replace(found, engines=(*found.engines, *more))
        return found


def bucket_loads(load: StackLoad, owners: Sequence[Owner | None]) -> list[float] | None:
    """Share of a core that each bucket asks for: packets that came for it, times the cost of one in the queue that owns it.

    A queue whose ring is full loses packets of all its buckets alike, so each asks for more by the same part.

    `Owner.slot` is an `EngineLoad.id`. A queue without packets has the mean cost of the others. None when nothing is
    known of the buckets.
    """
    rates = load.bucket_packets_per_second
    if len(rates) != len(owners):
        return None
    busy = sum(q.busy for e in load.engines for q in e.queues)
    packets = sum(q.packets_per_second for e in load.engines for q in e.queues)
    mean = busy / packets if packets else 0.0
    cost = {
        Owner(e.id, i): q.asked * q.busy / q.packets_per_second if q.packets_per_second else mean
        for e in load.engines
        for i, q in enumerate(e.queues)
    }
    return [
        rate * cost.get(owner, mean) if owner is not None else 0.0 for rate, owner in zip(rates, owners, strict=True)
    ]
