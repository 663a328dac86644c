"""Evens out the load of cores with few moves: buckets between engines, queues between the cores of one engine.

What is made smaller is the sum of the squared loads of cores; a bucket moves only if that lowers it by more than
the move is worth. That is the objective of RSS++ (Barbette et al., CoNEXT 2019); the algorithm is a plain one: the
busiest core gives what fits best to the idlest, until nothing is gained or enough has moved.

Pure: what happened before comes in as a `Memory` and goes out as another, and so does the time.

Rules
- Nothing moves unless a core is busy, and busier than it need be. A core need not be busier than the mean of all,
  or than its biggest bucket: that can only be moved whole.
- A bucket that is bigger than that mean gets a core with as little else as possible.
- At most a tenth of the buckets move in one step, no bucket twice within half a minute, and no idle one.
- What the busiest core is spared must be worth more than the packets that wait while buckets are handed over.
"""

import heapq
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from packetstack_core.assignment import Move, Owner
from packetstack_core.reasons import Event, EventReason
from packetstack_core.wording import counted

Core = tuple[int, int]
"""Slot of an engine, and one of its cores."""

WORTH = 1e-5
"""A move must lower the sum of squared loads, each in units of the mean, by more than this."""
LEAST = 0.02
"""Less than this share of a core too much is never a reason to act."""
FAR = 0.02
"""Cores that have this much more than they must, in units of the mean, may also exchange a bucket for another."""
SWAPS = 64
"""So many of a core's biggest buckets are tried for that."""
HOLD_SECONDS = 0.001
"""Time that a handover holds packets back, where it is not known."""
TELL_SECONDS = 60.0
"""The same advice or elephant is reported again only after this."""
ELEPHANT_LOAD = 0.8
"""Share of a core above which a bucket alone is an elephant: no move of buckets helps its packets any more."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a rebalancer acts, and how far it goes."""

    busy: float
    """No core below this share of its time is relieved."""
    excess: float
    """Nor one whose load is below this many times what it must be, unless it has hardly any time left."""
    moves: float
    """Share of the buckets or queues that move in one step at most."""
    rest_seconds: float
    """Time for which a bucket or queue that was moved stays where it is."""
    period_seconds: float
    """Time in which a step must pay off: that to the next one."""


BUCKETS = Limits(busy=0.3, excess=1.1, moves=0.1, rest_seconds=30.0, period_seconds=5.0)
QUEUES = Limits(busy=0.3, excess=1.2, moves=0.5, rest_seconds=2.0, period_seconds=1.0)


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision hands to the next."""

    moved: Mapping[int, float] = field(default_factory=dict)
    """Bucket or queue -> when it was moved."""

    def after(self, moved: Collection[int], now: float, limits: Limits) -> "Memory":
        """With what moves now, without what may move again."""
        kept = {item: when for item, when in self.moved.items() if now - when < limits.rest_seconds}
        return Memory(kept | dict.fromkeys(moved, now))


@dataclass(frozen=True, slots=True)
class Elephant:
    """A bucket that alone takes most of a core."""

    bucket: int
    owner: Owner
    load: float
    """Share of a core that it takes."""

    def __str__(self) -> str:
        return f"bucket {self.bucket} of engine {self.owner.slot} takes {self.load:.0%} of a core; no move of buckets helps it"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to move. `before` and `after` are loads of the busiest core by the mean; 1 when nothing is loaded."""

    moves: tuple[Move, ...]
    before: float
    after: float
    """As predicted, from the same loads."""
    possible: float
    """The same if all could be moved and were divided as well as the biggest buckets allow."""
    elephants: tuple[Elephant, ...]
    isolated: tuple[int, ...]
    """Buckets that are bigger than what is left for a core: each shall have one almost to itself."""
    memory: Memory

    @property
    def why(self) -> str:
        """What the moves are for."""
        return f"busiest core {self.before:.2f} -> {self.after:.2f} of the mean, as predicted"

    def __str__(self) -> str:
        return f"{counted(len(self.moves), 'bucket')}: {self.why}"


@dataclass(frozen=True, slots=True)
class Noted:
    """What was seen and reported of late, so that it is not reported at every look."""

    elephants: Mapping[int, tuple[Elephant, float]] = field(default_factory=dict)
    """Bucket -> its elephant, and when that was last seen: one whose core is not busy for a moment has not gone."""
    advised: float | None = None
    """When moves were advised last."""

    def at(self, now: float) -> "Noted":
        """What still counts at this time."""
        kept = {b: (e, seen) for b, (e, seen) in self.elephants.items() if now - seen < TELL_SECONDS}
        return self if len(kept) == len(self.elephants) else replace(self, elephants=kept)

    def after(self, decision: Decision, now: float, *, advise: bool) -> tuple["Noted", list[Event]]:
        """What to remember of a decision, and what to show of it. `advise`: its moves are not made, only shown."""
        known = self.at(now)
        events = [Event(EventReason.ELEPHANT, str(e)) for e in decision.elephants if e.bucket not in known.elephants]
        seen = {**known.elephants, **{e.bucket: (e, now) for e in decision.elephants}}
        advised = known.advised
        if advise and decision.moves and (advised is None or now - advised >= TELL_SECONDS):
            advised = now
            events.append(Event(EventReason.REBALANCE_ADVICE, f"would move {decision}"))
        return Noted(seen, advised), events


def is_worth_a_look(cores: Collection[float], limits: Limits = BUCKETS) -> bool:
    """Whether `decide` may have something to say, by the loads of cores alone: else nobody need ask for those of buckets.
    With one core nothing can be done about what it says.

    What a core must have is not less than the load of the idlest one: a core without a bucket of its own has its part of the
    rest. So if the busiest is within the limits of the idlest, it is within those of what it must have; and below the
    load of an elephant half of what is left of a core is more than that.
    """
    if len(cores) < 2 or (most := max(cores)) < limits.busy:
        return False
    return most >= ELEPHANT_LOAD or most > limits.excess * min(cores)


def decide(
    loads: Sequence[float],
    owners: Sequence[Owner | None],
    cores: Mapping[int, Sequence[int]],
    now: float,
    memory: Memory = Memory(),
    *,
    stay: Collection[int] = (),
    hold_seconds: float = HOLD_SECONDS,
    limits: Limits = BUCKETS,
) -> Decision:
    """Which buckets to give to other cores.

    `loads[b]`: share of a core that bucket b takes. `cores`: by slot, of the engines that may take part, the core
    that serves each queue; -1 for none. `stay`: buckets that must not move (put there by hand, on their way).
    `now`: seconds, on the clock of `memory`. `hold_seconds`: how long a bucket's packets wait in a handover.
    O(buckets x log).
    """
    held: dict[Core, list[tuple[float, int]]] = {}
    by_queue = {
        slot: [held.setdefault((slot, core), []) if core >= 0 else None for core in row] for slot, row in cores.items()
    }
    for bucket, (load, owner) in enumerate(zip(loads, owners, strict=True)):
        if load > 0 and owner is not None and (rows := by_queue.get(owner.slot)) and owner.queue < len(rows):
            row = rows[owner.queue]
            if row is not None:
                row.append((load, bucket))
    bins = _Bins(held, {*stay, *_resting(memory, now, limits)})
    before, moves = bins.ratio(), dict[int, Core]()
    if bins.worth_it(limits):
        busiest = max(bins.loads.values())
        moves = bins.even(int(limits.moves * len(loads)))
        waiting = sum(loads[b] for b in moves) * hold_seconds
        if (busiest - max(bins.loads.values())) * limits.period_seconds <= waiting:
            moves = {}
    return Decision(
        _on_queues(moves, loads, owners, cores),
        before,
        bins.ratio() if moves else before,
        bins.possible(),
        tuple(Elephant(b, owner, load) for load, b in bins.above(ELEPHANT_LOAD) if (owner := owners[b]) is not None),
        bins.isolated(),
        memory.after(moves, now, limits),
    )


def _on_queues(
    moves: Mapping[int, Core],
    loads: Sequence[float],
    owners: Sequence[Owner | None],
    cores: Mapping[int, Sequence[int]],
) -> tuple[Move, ...]:
    """Bucket -> (slot, core) as moves to the least loaded queue of that core, in order of buckets."""
    if not moves:
        return ()
    totals: dict[tuple[int, int], float] = {}
    for bucket, owner in enumerate(owners):
        if owner is not None and bucket not in moves:
            totals[owner.slot, owner.queue] = totals.get((owner.slot, owner.queue), 0.0) + loads[bucket]
    queues: dict[Core, list[tuple[float, int]]] = {}
    for slot, core in set(moves.values()):
        queues[slot, core] = [(totals.get((slot, q), 0.0), q) for q, c in enumerate(cores[slot]) if c == core]
        heapq.heapify(queues[slot, core])
    found = []
    for bucket in sorted(moves, key=lambda b: (-loads[b], b)):
        open_ = queues[moves[bucket]]
        load, queue = open_[0]
        heapq.heapreplace(open_, (load + loads[bucket], queue))
        found.append(Move(bucket, Owner(moves[bucket][0], queue)))
    return tuple(sorted(found, key=lambda m: m.bucket))


@dataclass(frozen=True, slots=True)
class QueueDecision:
    """Queue -> core, of one engine."""

    moves: Mapping[int, int]
    before: float
    """Load of the busiest core by the mean."""
    after: float
    memory: Memory


def spread(
    loads: Sequence[float],
    cores: Sequence[int],
    count: int,
    now: float,
    memory: Memory = Memory(),
    limits: Limits = QUEUES,
) -> QueueDecision:
    """Which queues of an engine other cores of it should serve.

    `loads[q]`: share of a core that queue q takes. `cores[q]`: the core that serves it. `count`: cores of the engine.
    """
    held: dict[Core, list[tuple[float, int]]] = {(0, core): [] for core in range(count)}
    for queue, (load, core) in enumerate(zip(loads, cores, strict=True)):
        if load > 0 and 0 <= core < count:
            held[0, core].append((load, queue))
    bins = _Bins(held, _resting(memory, now, limits))
    before, moves = bins.ratio(), dict[int, int]()
    if bins.worth_it(limits):
        moves = {queue: core for queue, (_, core) in bins.even(max(2, int(limits.moves * len(loads)))).items()}
    return QueueDecision(moves, before, bins.ratio(), memory.after(moves.keys(), now, limits))


def _resting(memory: Memory, now: float, limits: Limits) -> set[int]:
    return {item for item, when in memory.moved.items() if now - when < limits.rest_seconds}


class _Bins:
    """Cores, and what loads them: (load, number) of buckets or queues."""

    def __init__(self, held: Mapping[Core, list[tuple[float, int]]], stay: Collection[int]) -> None:
        self._rows = {b: sorted(row) for b, row in held.items()}
        self.loads = {b: sum([load for load, _ in row]) for b, row in self._rows.items()}
        self._biggest = {b: row[-1][0] if row else 0.0 for b, row in self._rows.items()}
        self._mean = sum(self.loads.values()) / len(self.loads) if self.loads else 0.0
        self._alone, self._rest = self._levels()
        # Of those that are to be alone, the biggest of a core keeps it, and the others go.
        alone = set(self._alone)
        stay = {*stay, *(row[-1][1] for row in self._rows.values() if row and row[-1] in alone)}
        self._movable = {b: [x for x in row if x[1] not in stay] for b, row in self._rows.items()}

    def _levels(self) -> tuple[list[tuple[float, int]], float]:
        """What must have a core alone, biggest first, and the mean of what is left for the other cores."""
        left, cores = sum(self.loads.values()), len(self.loads)
        alone: list[tuple[float, int]] = []
        largest = [(-row[-1][0], b, len(row) - 1) for b, row in self._rows.items() if row]
        heapq.heapify(largest)
        while largest and cores > 1 and -largest[0][0] * cores > left * (1 + 1e-9):
            load, b, at = largest[0]
            alone.append(self._rows[b][at])
            left, cores = max(0.0, left + load), cores - 1
            if at:
                heapq.heapreplace(largest, (-self._rows[b][at - 1][0], b, at - 1))
            else:
                heapq.heappop(largest)
        return alone, left / cores if cores else 0.0

    def ratio(self) -> float:
        """The busiest core by the mean."""
        return max(self.loads.values()) / self._mean if self._mean else 1.0

    def possible(self) -> float:
        """The least that `ratio` can be."""
        return max(self._rest, *(load for load, _ in self._alone), 0.0) / self._mean if self._mean else 1.0

    def above(self, least: float) -> list[tuple[float, int]]:
        """All of at least this load, biggest first."""
        return sorted((x for row in self._rows.values() for x in row[bisect_left(row, (least, -1)) :]), reverse=True)

    def isolated(self) -> tuple[int, ...]:
        """What is to have a core alone."""
        return tuple(number for _, number in self._alone)

    def _needed(self, b: Core) -> float:
        """The load that the core cannot get rid of."""
        return max(self._biggest[b], self._rest)

    def worth_it(self, limits: Limits) -> bool:
        """Whether a busy core has much more than it must.

        The longer its packets wait the sooner it has: also when half of the time is gone that it could be idle.
        """
        for b, load in self.loads.items():
            needed = self._needed(b)
            much = min(needed * (limits.excess - 1), max(LEAST, (1 - needed) / 2))
            if load >= limits.busy and load - needed > much:
                return True
        return False

    def even(self, most: int) -> dict[int, Core]:
        """Move up to `most` items to other cores, none twice. Returns item -> core."""
        moves: dict[int, Core] = {}
        full = [(-load, b) for b, load in self.loads.items()]
        idle = [(load, b) for b, load in self.loads.items()]
        heapq.heapify(full)
        heapq.heapify(idle)
        while len(moves) < most and full:
            load, giver = full[0]
            if -load != self.loads[giver]:
                heapq.heappop(full)
                continue
            while idle[0][0] != self.loads[idle[0][1]]:
                heapq.heappop(idle)
            taker = idle[0][1]
            pair = self._best(giver, taker, len(moves) + 2 <= most)
            if pair is None:
                heapq.heappop(full)  # nothing of it is worth a move
                continue
            there, back = pair
            for at, origin, goal in ((there, giver, taker), (back, taker, giver)):
                if at is not None:
                    size, number = self._movable[origin].pop(at)
                    moves[number] = goal
                    self.loads[origin] -= size
                    self.loads[goal] += size
            for b in (giver, taker):
                heapq.heappush(full, (-self.loads[b], b))
                heapq.heappush(idle, (self.loads[b], b))
        return moves

    def _best(self, giver: Core, taker: Core, may_swap: bool) -> tuple[int, int | None] | None:
        """What the giver should hand over, and what it should get for it if nothing fits by itself; as indexes."""
        gap = self.loads[giver] - self.loads[taker]
        least = WORTH * self._mean**2 / 2
        row, back = self._movable[giver], self._movable[taker]
        # What brings one of the two to its goal; half of the gap where that is no help.
        wanted = min(self.loads[giver] - self._rest, self._rest - self.loads[taker])
        if wanted <= 0:
            wanted = gap / 2
        at = bisect_left(row, (wanted, -1))
        gain, best = max(
            ((row[i][0] * (gap - row[i][0]), i) for i in (at - 1, at) if 0 <= i < len(row)), default=(0.0, -1)
        )
        if gain > least:
            return best, None
        if not may_swap or self.loads[giver] - self._needed(giver) < FAR * self._mean:
            return None
        swap, least = None, 2 * least
        for i in range(len(row) - 1, max(-1, len(row) - 1 - SWAPS), -1):
            at = bisect_left(back, (row[i][0] - gap / 2, -1))
            for j in (at - 1, at):
                if 0 <= j < len(back) and (gain := (d := row[i][0] - back[j][0]) * (gap - d)) > least:
                    swap, least = (i, j), gain
        return swap
