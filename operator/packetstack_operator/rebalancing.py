"""A task for each stack that may be rebalanced: it asks for load and proposes moves, which the next decision writes.

A stack at rest costs one small question now and then; for the load of buckets it is asked only when a core is busy, and
busier than another one.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import kopf

from packetstack_core import rebalancing
from packetstack_core.load import StackLoad, bucket_loads
from packetstack_core.rebalancing import BUCKETS, Memory, Noted
from packetstack_operator import observing
from packetstack_operator.loads import Key, LoadError, Loads
from packetstack_operator.metrics import Metrics
from packetstack_operator.observing import Proposal, Raw, World
from packetstack_operator.showing import Shown

IDLE_SECONDS = 15.0
"""Between two questions while no core is busy."""
SOON_SECONDS = 0.5
"""What an autoscaler has asked for in the period is not asked for again, but what was asked for before it is."""
FRESH_SECONDS = 30.0
"""So old a load may be for the choice of an engine that goes."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watched:
    """A stack that may be rebalanced."""

    body: kopf.Body
    """For its events."""
    read_world: Callable[[], World | None]
    """What the watches have brought."""
    memory: Memory = field(default_factory=Memory)
    proposed: tuple[Proposal, Memory] | None = None
    """The last proposal with moves, and the memory from when they are made."""
    proposal: Proposal | None = None
    noted: Noted = field(default_factory=Noted)
    events: Shown = field(default_factory=Shown)


class Rebalancers:
    """The rebalancers of all stacks. `wake`: called with a stack for which there is something to decide."""

    def __init__(self, loads: Loads, metrics: Metrics, wake: Callable[[Key], None]) -> None:
        self._loads, self._metrics, self._wake = loads, metrics, wake
        self._stacks: dict[Key, tuple[_Watched, asyncio.Task[None]]] = {}

    def follow(self, key: Key, stack: Raw, body: kopf.Body, read_world: Callable[[], World | None]) -> None:
        """A stack was seen: it gets a task if it may be rebalanced now, else it loses it."""
        if mode_of(stack) == "Off" or stack["spec"].get("paused"):
            self.forget(key)
        elif key not in self._stacks:
            watched = _Watched(body, read_world)
            self._stacks[key] = watched, asyncio.create_task(self._run(key, watched))

    def forget(self, key: Key) -> None:
        """The stack is gone, or is left as it is."""
        if key in self._stacks:
            self._stacks.pop(key)[1].cancel()

    def proposal(self, key: Key) -> Proposal | None:
        """What there is to say about a stack."""
        return self._stacks[key][0].proposal if key in self._stacks else None

    def engine_loads(self, key: Key) -> dict[int, float]:
        """Load of a stack's engines, in cores; empty if it is not known."""
        load = self._loads.load(key, BUCKETS.period_seconds)
        if load is None or self._loads.age(key) > FRESH_SECONDS:
            return {}
        return {e.id: sum(e.cores) for e in load.engines}

    async def _run(self, key: Key, watched: _Watched) -> None:
        pause = BUCKETS.period_seconds
        while True:
            await asyncio.sleep(pause)
            proposal = None
            try:
                world = watched.read_world()
                cores = await self._cores(key, world) if world is not None else []
                pause = BUCKETS.period_seconds if max(cores, default=0.0) >= BUCKETS.busy else IDLE_SECONDS
                if world is not None and rebalancing.is_worth_a_look(cores):
                    await self._loads.ask(key, world, buckets=True)
                    load = self._loads.load(key, BUCKETS.period_seconds, buckets=True)
                    # Asking took time: what is there now is what counts.
                    proposal = self._propose(watched, watched.read_world(), load)
            except LoadError:
                pause = IDLE_SECONDS  # the metrics tell of it
            except Exception:  # a bug: the next round may do better, other stacks go on
                self._metrics.errors.labels("InternalError").inc()
                log.exception("stack %s/%s: internal error", *key)
            proposal = self._with_elephants(watched, proposal)
            if proposal != watched.proposal:
                watched.proposal = proposal
                self._wake(key)

    async def _cores(self, key: Key, world: World) -> list[float]:
        """Loads of all cores, if there are two."""
        entries = (world.table or {}).get("spec", {}).get("engines") or ()
        if sum(int(e.get("cores", 1)) for e in entries) < 2:
            return []
        await self._loads.ask(key, world, age=BUCKETS.period_seconds - SOON_SECONDS)
        load = self._loads.load(key, BUCKETS.period_seconds)
        return [core for e in load.engines for core in e.cores] if load is not None else []

    def _propose(self, watched: _Watched, world: World | None, load: StackLoad | None) -> Proposal | None:
        table = observing.read_table(world.table) if world is not None else None
        report = table.report() if table is not None else None
        if world is None or world.table is None or table is None or report is None or load is None:
            return None
        generation = observing.generation(world.table)
        owners = table.spec.owner_ids()
        loads = bucket_loads(load, owners)
        if loads is None or not report.settled or report.observed_generation < generation:
            return None
        active = {e.id for e in table.spec.engines if e.state == "Active"}
        cores = {e.id: tuple(q.core for q in e.queues) for e in load.engines if e.id in active}
        if watched.proposed is not None and watched.proposed[0].generation != generation:
            # Another table alone says nothing: it may be that of other backends, or of a resize.
            if any(owners[m.bucket] == m.to for m in watched.proposed[0].moves):
                watched.memory = watched.proposed[1]
            watched.proposed = None
        now = asyncio.get_running_loop().time()
        d = rebalancing.decide(loads, owners, cores, now, watched.memory)
        watched.noted, events = watched.noted.after(d, now, advise=mode_of(world.stack) == "Advice")
        watched.events.show(watched.body, events)
        moves = d.moves if mode_of(world.stack) == "Auto" else ()
        if not moves:
            watched.proposed = None
            return None
        proposal = Proposal(generation, moves, d.why)
        watched.proposed = (proposal, d.memory)
        return proposal

    def _with_elephants(self, watched: _Watched, proposal: Proposal | None) -> Proposal | None:
        """A proposal with the elephants that were seen of late."""
        watched.noted = watched.noted.at(asyncio.get_running_loop().time())
        elephants = tuple(sorted(watched.noted.elephants))
        return replace(proposal or Proposal(0), elephants=elephants) if proposal or elephants else None


def mode_of(stack: Raw) -> str:
    """`spec.rebalance.mode`, with its default."""
    rebalance: Any = stack["spec"].get("rebalance") or {}
    return str(rebalance.get("mode") or "Auto")
