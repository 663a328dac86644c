"""Which bucket belongs to which queue: the fewest moves that make the owners' shares fair."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, lcm


@dataclass(frozen=True, slots=True)
class Owner:
    """A queue of an engine. Slot 0 is no engine: `NOBODY`."""

    slot: int
    queue: int


NOBODY = Owner(0, 0)
"""Owner of a bucket that has none: its packets are dropped and counted, its flows stay in the arena."""


class State(StrEnum):
    """Where an engine is in its life, as `PacketEngine` shows it."""

    PENDING = "Pending"
    """Being created."""
    STARTING = "Starting"
    """Created, never yet activated."""
    ACTIVE = "Active"
    """Owns buckets, or may."""
    DRAINING = "Draining"
    """Gets no more buckets and will be removed."""
    FAILED = "Failed"
    """Given up; it will not be ready again."""


@dataclass(frozen=True, slots=True)
class EngineShare:
    """An engine that takes part, with its queues and its weight relative to the others. Weight 0: gets nothing."""

    slot: int
    queues: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Move:
    """A bucket that gets another owner."""

    bucket: int
    to: Owner


def quotas(total: int, weights: Sequence[float], present: Sequence[int]) -> list[int]:
    """Splits `total` by `weights`: each share is its exact part rounded down or up, and they add up to `total`.

    Of all such roundings one that keeps the most of `present` is chosen: first the parts that have more present
    than their rounded-down share are rounded up, then those with the largest remainder, then the earlier ones.
    All zero weights count as equal ones. Raises ValueError for a weight below 0 or not finite.
    """
    if any(not isfinite(w) or w < 0 for w in weights):
        raise ValueError(f"weights: {list(weights)} has a value that is negative or not finite; use 0 or more")
    ratios = [float(w).as_integer_ratio() for w in weights] if any(weights) else [(1, 1)] * len(weights)
    unit = lcm(*(d for _, d in ratios))
    return _split(total, [n * (unit // d) for n, d in ratios], present)


def _split(total: int, weights: Sequence[int], present: Sequence[int]) -> list[int]:
    whole = sum(weights)
    shares, remainders = [], []
    for w in weights:
        share, remainder = divmod(total * w, whole)
        shares.append(share)
        remainders.append(remainder)
    left = total - sum(shares) if shares else 0
    if left:
        # Rounding up saves one move exactly where more is present than the part rounded down.
        fractional = [i for i, r in enumerate(remainders) if r]
        fractional.sort(key=lambda i: (present[i] <= shares[i], -remainders[i], i))
        for i in fractional[:left]:
            shares[i] += 1
    return shares


def assign(current: Sequence[Owner | None], engines: Sequence[EngineShare], rebalanced: bool = False) -> list[Move]:
    """The fewest moves after which every engine has its share of the buckets, and every queue of its engine's.

    `current[b]` owns bucket b; None has no owner yet. Owners that are not among `engines` (or are queues that
    an engine does not have) lose their buckets. Between engines exactly sum(max(0, owned - quota)) buckets move
    beside those without a valid owner; inside an engine a bucket moves only if its queue has too many. Moves
    come in bucket order. Without engines there is nothing to give buckets to, so there are no moves. O(buckets +
    engines x log). Raises ValueError for repeated slots or an engine without queues.

    `rebalanced`: the numbers of buckets were set by load, and their proportions are kept. The present number of
    each engine and queue is its weight (0 stays 0); an engine without buckets is a new one and has the mean. So all
    give to a new engine, and take from one that leaves, in proportion; else nothing moves.
    """
    if not engines:
        return []
    index = {e.slot: i for i, e in enumerate(engines)}
    if len(index) != len(engines):
        raise ValueError(f"engines: slots {sorted(e.slot for e in engines)} repeat one; use each slot once")
    for e in engines:
        if e.queues < 1:
            raise ValueError(f"engine {e.slot}: {e.queues} queues cannot own buckets; use 1 or more")

    held: list[list[int]] = [[] for _ in engines]
    homeless: list[int] = []
    for bucket, owner in enumerate(current):
        i = index.get(owner.slot) if owner is not None else None
        if i is None:
            homeless.append(bucket)
        else:
            held[i].append(bucket)
    present = [len(h) for h in held]
    weights: list[float] = [e.weight for e in engines]
    if rebalanced:
        owning, new = sum(n > 0 for n in present), sum(present)  # `new` is their mean, in units of 1 / owning
        weights = [(n * owning or new) if e.weight else 0 for n, e in zip(present, engines, strict=True)]
    shares = quotas(len(current), weights, present)
    if rebalanced:
        _leave_none_without(shares, weights)

    # Buckets that leave an engine are taken from its fullest queues: that also evens out what stays.
    stays: list[list[list[int]]] = []  # engine -> queue -> buckets
    queue_weights: list[list[int]] = []
    strays: list[list[int]] = []  # engine -> buckets on queues that it does not have (any more)
    for i, engine in enumerate(engines):
        queues: list[list[int]] = [[] for _ in range(engine.queues)]
        stray = []
        for bucket in held[i]:
            owner = current[bucket]
            if owner is not None and 0 <= owner.queue < engine.queues:
                queues[owner.queue].append(bucket)
            else:
                stray.append(bucket)
        kept = rebalanced and any(queues)
        queue_weights.append([len(q) for q in queues] if kept else [1] * engine.queues)
        surplus = len(held[i]) - shares[i]
        while surplus > 0 and stray:
            homeless.append(stray.pop())
            surplus -= 1
        if kept and surplus > 0:
            for owned, limit in zip(queues, _split(shares[i], queue_weights[i], queue_weights[i]), strict=True):
                while len(owned) > limit:
                    homeless.append(owned.pop())
        else:
            homeless.extend(_take_from_fullest(queues, surplus))
        stays.append(queues)
        strays.append(stray)

    homeless.sort()
    moves: list[Move] = []
    taken = 0
    for i, engine in enumerate(engines):
        queues = stays[i]
        deficit = shares[i] - sum(map(len, queues)) - len(strays[i])
        arriving = strays[i] + homeless[taken : taken + max(0, deficit)]
        taken += max(0, deficit)
        limits = _split(shares[i], queue_weights[i], [len(q) for q in queues])
        for q, owned in enumerate(queues):
            while len(owned) > limits[q]:
                arriving.append(owned.pop())
        arriving.sort()
        start = 0
        for q, owned in enumerate(queues):
            wanted = limits[q] - len(owned)
            moves += [Move(bucket, Owner(engine.slot, q)) for bucket in arriving[start : start + wanted]]
            start += wanted
    moves.sort(key=lambda m: m.bucket)
    return moves


def _leave_none_without(shares: list[int], weights: Sequence[float]) -> None:
    """Give one to each engine that rounding left without, as long as another has two: without any it would count as new."""
    for i in [i for i, share in enumerate(shares) if not share and weights[i]]:
        richest = max(range(len(shares)), key=lambda j: (shares[j], -j))
        if shares[richest] > 1:
            shares[richest] -= 1
            shares[i] = 1


def _take_from_fullest(queues: list[list[int]], count: int) -> list[int]:
    """Removes `count` buckets, each from a queue that has the most at that time."""
    taken: list[int] = []
    if count <= 0:
        return taken
    fullest = [(-len(buckets), q) for q, buckets in enumerate(queues)]
    heapq.heapify(fullest)
    for _ in range(count):
        size, q = fullest[0]
        taken.append(queues[q].pop())
        heapq.heapreplace(fullest, (size + 1, q))
    return taken


def moved(current: Sequence[Owner | None], moves: Sequence[Move]) -> list[Owner | None]:
    """The owners after `moves`."""
    owners = list(current)
    for move in moves:
        owners[move.bucket] = move.to
    return owners


def spread_queues(queues: int, cores: int) -> tuple[int, ...]:
    """The core of each queue: neighbours on different cores, and no core more than one queue above another."""
    if queues < 0 or cores < 1:
        raise ValueError(f"{queues} queues on {cores} cores; use at least one core")
    return tuple(q % cores for q in range(queues))
