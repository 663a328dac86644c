"""Rebalancers of the stacks of this node: they read load, and move queues between cores and buckets between engines.

Queues of every stack; buckets of those that the agent plans for. In a cluster the operator moves buckets.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from packetstack_agent import loading
from packetstack_agent.engines import Engine
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed
from packetstack_agent.natives import ffi, lib
from packetstack_core import rebalancing
from packetstack_core.assignment import Move, State
from packetstack_core.load import KEEP_SECONDS, Snapshot, bucket_loads, stack_load
from packetstack_core.reasons import EventReason
from packetstack_core.rebalancing import HOLD_SECONDS, Decision, Memory, Noted
from packetstack_core.verbs import Json
from packetstack_core.wording import counted

LOOK_SECONDS = 1.0
CLOSE_LOOK_SECONDS = 0.1
"""While the cores of an engine are busy and uneven."""
WINDOW_SECONDS = 0.3
"""Over which a close look takes the load: a core that sleeps counts its cycles only when it wakes."""
BUCKET_SECONDS = rebalancing.BUCKETS.period_seconds

Cycles = tuple[list[int], list[tuple[int, int]]]
"""All cycles so far by core; then by queue the core that serves it, and the busy cycles spent on it."""


@dataclass
class Balance:
    """What the rebalancer knows of one stack."""

    snapshot: Snapshot | None = None
    """Counters with those of buckets, as they were read last."""
    due: float = 0.0
    """When buckets are looked at next."""
    buckets: Memory = field(default_factory=Memory)
    queues: dict[int, Memory] = field(default_factory=dict)
    """What is remembered of the queues' moves, by slot."""
    cycles: dict[int, list[tuple[float, Cycles]]] = field(default_factory=dict)
    """Times and cycles that were read, by slot; oldest first."""
    decision: Decision | None = None
    """The last one about buckets."""
    noted: Noted = field(default_factory=Noted)
    moved_buckets: int = 0
    moved_queues: int = 0

    def document(self, managed: Managed) -> Json:
        """Its part of the stack's status."""
        d = self.decision
        return {
            "mode": managed.stack.resource.spec.rebalance.mode,
            "maxOverMean": round(d.before, 3) if d is not None else None,
            "bucketsMoved": self.moved_buckets,
            "queuesMoved": self.moved_queues,
            "lastMoves": list(managed.last_moves),
            "elephants": [
                {"bucket": e.bucket, "engine": e.owner.slot, "queue": e.owner.queue, "load": round(e.load, 3)}
                for e, _ in self.noted.elephants.values()
            ],
        }


class Mover(Protocol):
    """Who moves buckets."""

    async def rebalance(self, managed: Managed, moves: Sequence[Move], why: str) -> int:
        """Move buckets for the load's sake. Returns how many were moved; AgentError if it cannot be written down."""

    def even_out(self, managed: Managed) -> None:
        """Engines shall have equally many buckets again."""


class Balancers:
    """One for each stack."""

    def __init__(
        self,
        stacks: Mapping[str, Managed],
        journal: Journal,
        mover: Mover,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stacks = stacks
        self._journal = journal
        self._mover = mover
        self._clock = clock
        self._known: dict[str, Balance] = {}

    def of(self, managed: Managed) -> Balance:
        """A stack's rebalancer."""
        return self._known.setdefault(managed.stack.name, Balance())

    def forget(self, name: str) -> None:
        """The stack is gone."""
        self._known.pop(name, None)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            close = False
            for managed in list(self._stacks.values()):
                with self._journal.going_on(managed.stack.name, "rebalancer"):
                    close |= await self.balance(managed)
            await asyncio.sleep(CLOSE_LOOK_SECONDS if close else LOOK_SECONDS)

    async def balance(self, managed: Managed) -> bool:
        """Move what the load of one stack asks for; returns whether its queues should be looked at again soon."""
        one, now = self.of(managed), self._clock()
        mode = managed.stack.resource.spec.rebalance.mode
        if mode == "Off":
            self._known[managed.stack.name] = Balance(moved_buckets=one.moved_buckets, moved_queues=one.moved_queues)
            self._mover.even_out(managed)
            return False
        if managed.stack.resource.spec.paused:
            return False
        close = mode == "Auto" and self._queues(managed, one, now)
        if managed.table is None and now >= one.due:
            one.due = now + BUCKET_SECONDS
            await self._buckets(managed, one, now, mode)
        return close

    # ---- queues between the cores of an engine ---------------------------------------------------------------

    def _queues(self, managed: Managed, one: Balance, now: float) -> bool:
        close = False
        before, one.cycles = one.cycles, {}
        for slot, engine in managed.engines.items():
            if engine.blueprint.cores < 2 or not engine.ready or engine.removing:
                continue
            read = _cycles(engine)
            kept = [*before.get(slot, ()), (now, read)]
            while len(kept) > 2 and kept[1][0] <= now - WINDOW_SECONDS:
                del kept[0]
            one.cycles[slot] = kept
            loads = _shares(kept[0][1], read) if len(kept) > 1 else None
            if loads is None:
                continue
            cores = [core for core, _ in read[1]]
            done = rebalancing.spread(loads, cores, engine.blueprint.cores, now, one.queues.get(slot, Memory()))
            busiest = max(sum(x for x, c in zip(loads, cores, strict=True) if c == core) for core in set(cores))
            uneven = busiest >= rebalancing.QUEUES.busy and done.before > rebalancing.QUEUES.excess
            close |= uneven and bool(done.memory.moved)  # else nothing can be done about it
            if done.moves and not managed.busy.locked():
                self._move_queues(managed, one, engine, done.moves)
                one.queues[slot] = done.memory
        return close

    def _move_queues(self, managed: Managed, one: Balance, engine: Engine, moves: Mapping[int, int]) -> None:
        """Ask for it; the core that serves a queue hands it over after its batch."""
        error, took = ffi.new("struct ps_error *"), ffi.new("uint64_t *")
        for queue, core in moves.items():
            lib().ps_queue_to_core(engine.fence, queue, core, 0, took, error)
            managed.note_move(f"queue {queue} of {loading.name(engine)} to core {core}", "load")
        one.moved_queues += len(moves)
        name = managed.stack.name
        self._journal.event(
            name, EventReason.QUEUES_REBALANCED, f"engine {engine.slot}: its cores share its queues by load"
        )

    # ---- buckets between engines -----------------------------------------------------------------------------

    async def _buckets(self, managed: Managed, one: Balance, now: float, mode: str) -> None:
        serving = {e.slot for e in managed.engines.values() if e.state is State.ACTIVE and e.ready and not e.removing}
        if sum(managed.engines[slot].blueprint.cores for slot in serving) < 2:
            one.snapshot = one.decision = None
            one.noted = Noted()
            return
        one.noted = one.noted.at(now)
        before, one.snapshot = one.snapshot, loading.snapshot(managed, with_buckets=True)
        fences = managed.stack.open_fences()
        if before is None or one.snapshot.time - before.time > KEEP_SECONDS:  # the stack was paused meanwhile
            return
        if not managed.converged or fences or managed.busy.locked():
            return
        load, owners = stack_load(before, one.snapshot, time.time()), managed.stack.owners()
        loads = bucket_loads(load, owners)
        if loads is None:
            return
        cores = {e.id: tuple(q.core for q in e.queues) for e in load.engines if e.id in serving}
        hold = statistics.median(managed.holds_ns) / 1e9 if managed.holds_ns else HOLD_SECONDS
        one.decision = d = rebalancing.decide(
            loads, owners, cores, now, one.buckets, stay=managed.pinned.keys(), hold_seconds=hold
        )
        one.noted, events = one.noted.after(d, now, advise=mode == "Advice")
        for event in events:
            self._journal.event(managed.stack.name, event.reason, event.message)
        if not d.moves:
            one.buckets = d.memory
            return
        if mode == "Advice":
            return
        one.buckets = d.memory
        moved = await self._mover.rebalance(managed, d.moves, d.why)
        one.moved_buckets += moved
        if moved:  # what was asked for may be overtaken by an engine that goes
            self._journal.event(managed.stack.name, EventReason.REBALANCED, f"{counted(moved, 'bucket')}: {d.why}")


def _cycles(engine: Engine) -> Cycles:
    b = engine.blueprint
    queues = [(engine.served_by(q), int(engine.queue(q).cycles)) for q in range(b.queues)]
    return [int(engine.core(c).total_cycles) for c in range(b.cores)], queues


def _shares(before: Cycles, after: Cycles) -> list[float] | None:
    """Share of a core that each queue took; None if that is not known."""
    (old_cores, old_queues), (new_cores, new_queues) = before, after
    turned = [new - old for old, new in zip(old_cores, new_cores, strict=False) if new > old]
    spent = [new - old for (_, old), (_, new) in zip(old_queues, new_queues, strict=False)]
    if not turned or len(spent) != len(new_queues) or min(spent) < 0:
        return None
    return [n * len(turned) / sum(turned) for n in spent]
