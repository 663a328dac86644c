"""Keeps each stack as its resource or its flow table says: observes, asks the pure planner, acts.

One task a stack, woken by changes and once a second; every step may be repeated. Whoever wants something else of a stack
disturbs it; what becomes of it is decided here alone.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from packetstack_agent import standings
from packetstack_agent.engine_life import AWAY_SECONDS
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.flow_memory import Report
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.mirrors import Fences, Mirrors
from packetstack_agent.node import RunDirectory
from packetstack_agent.probes import Checked
from packetstack_agent.threads import to_the_end
from packetstack_core import following, reading, standing, transitions
from packetstack_core.assignment import Move, State
from packetstack_core.kinds import FlowTableSpec, TableEngine
from packetstack_core.planning import (
    ActivateEngine,
    AssignBuckets,
    CreateEngine,
    DrainEngine,
    RemoveEngine,
)
from packetstack_core.reasons import EventReason
from packetstack_core.transitions import ChangeSet, EndSet, MakeSet, RetireSet
from packetstack_core.wording import counted

TICK_SECONDS = 1.0
SETTLE_SECONDS = 5.0
"""Time between two checks whether a flow still has what only older configurations name."""
ROUNDS = 8
"""Most rounds of observing and acting in a step; another one follows only if the last changed something at once."""


class Engines(Protocol):
    """Who makes and removes engines. All of it is begun here and ends later; what prevents it is reported there."""

    def create(self, managed: Managed, action: CreateEngine) -> None:
        """Make one in a namespace of its own."""

    def attach(self, managed: Managed, wanted: TableEngine, number: int) -> None:
        """Make rings for one in a pod, with the memory of this set."""

    def become(self, engine: Engine, state: State) -> None:
        """Set the state of the engine, also for the next agent."""

    def remove(self, managed: Managed, slot: int) -> None:
        """Remove one that owns no bucket."""


class Verdicts(Protocol):
    """Who knows which backends are healthy."""

    def of(self, stack: str) -> Mapping[Checked, bool]:
        """Verdicts of a stack's backends."""


class Routes(Protocol):
    """Who routes addresses to this node."""

    async def route(self) -> None:
        """Make the routes those of the stacks as they are now."""


class News:
    """Stacks that were brought nearer to their flow table, or could not be. For one reader."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._some = asyncio.Event()

    def tell(self, name: str) -> None:
        """Something about this stack is new."""
        self._names.add(name)
        self._some.set()

    async def next(self) -> set[str]:
        """Wait for news; the names since the last call."""
        await self._some.wait()
        self._some.clear()
        names, self._names = self._names, set()
        return names


class Keeper:
    """Carries out what is wanted of the stacks."""

    def __init__(
        self,
        run: RunDirectory,
        stacks: Stacks,
        journal: Journal,
        engines: Engines,
        fences: Fences,
        verdicts: Verdicts,
        routes: Routes,
    ) -> None:
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._engines = engines
        self._fences = fences
        self._verdicts = verdicts
        self._routes = routes
        self._mirrors = Mirrors(run, stacks, journal, fences)
        self.news = News()

    def begin(self, managed: Managed) -> None:
        """Keep the stack from now on."""
        managed.task = asyncio.create_task(self._keep(managed))

    async def end(self, managed: Managed) -> None:
        """Keep it no more; what is being done for it ends first."""
        if managed.task is not None:
            managed.task.cancel()
            await asyncio.gather(managed.task, return_exceptions=True)

    async def _keep(self, managed: Managed) -> None:
        settle = 0.0
        while True:
            managed.changed.clear()
            with self._journal.going_on(managed.stack.name):
                await self.step(managed)
            managed.note_step()
            if time.monotonic() >= settle:
                settle = time.monotonic() + SETTLE_SECONDS
                with self._journal.going_on(managed.stack.name):
                    await self._let_go(managed)
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await managed.changed.wait()

    async def step(self, managed: Managed) -> None:
        """Observe, plan, act; once more while that changes something at once."""
        if managed.table is not None:
            await self._follow(managed, managed.table.spec)
            return
        for _ in range(ROUNDS):
            await self._prepare(managed)
            self._unpin(managed)
            pool = standings.pool(managed, self._run)
            plan = standing.plan(pool, time.monotonic())
            managed.given_up = plan.given_up
            managed.converged = not plan.actions and not managed.stack.open_fences()
            if managed.converged and len(pool.sets.known) < 2 and standing.has_its_size(pool):
                managed.lacks_nothing()
            if not plan.actions:
                return
            waiting = False
            for action in plan.actions:
                waiting |= await self.act(managed, action)
            if waiting and all(isinstance(a, CreateEngine | EndSet | RetireSet) for a in plan.actions):
                return

    async def _prepare(self, managed: Managed) -> None:
        """What comes before anything new: cores know what is known, and handovers that were begun are ended."""
        await self.refresh(managed)
        await self._mirrors.prepare(managed)
        if managed.stack.open_fences():  # an engine did not answer, or the agent was interrupted
            await self.transfer(managed, ())

    # ---- planning here ---------------------------------------------------------------------------------------

    def _unpin(self, managed: Managed) -> None:
        """A bucket that a person gave to an engine is free again when that engine goes."""
        stay = {e.slot for e in managed.engines.values() if e.state is State.ACTIVE and not e.removing}
        if any(slot not in stay for slot in managed.pinned.values()):
            self.pin(managed, {b: slot for b, slot in managed.pinned.items() if slot in stay})

    async def act(self, managed: Managed, action: transitions.Action) -> bool:
        """Carry out one action; returns whether its effect comes later."""
        name = managed.stack.name
        match action:
            case CreateEngine():
                self._engines.create(managed, action)
                return True
            case ActivateEngine(slot):
                if engine := managed.engines.get(slot):  # else it has gone since it was observed
                    self._journal.event(
                        name,
                        EventReason.ENGINE_ACTIVE,
                        f"engine {slot} gets its share of the buckets; it was {engine.state}",
                    )
                    self._engines.become(engine, State.ACTIVE)
            case DrainEngine(slot):
                if engine := managed.engines.get(slot):
                    self._engines.become(engine, State.DRAINING)
                    message = f"engine {slot} hands its buckets over"
                    self._journal.event(name, EventReason.ENGINE_DRAINING, message)
            case AssignBuckets(moves):
                await self.transfer(managed, moves)
            case RemoveEngine(slot):
                self._engines.remove(managed, slot)
            case _:
                return await self._mirrors.act(managed, action)
        return False

    def pin(self, managed: Managed, buckets: Mapping[int, int]) -> None:
        """These buckets stay on these slots, where a person has put them, and no others do."""
        managed.pinned = dict(buckets)
        self._run.record.pinned[managed.stack.name] = {str(b): slot for b, slot in buckets.items()}
        self._run.save()

    def resize(self, managed: Managed, replicas: int, cores: int | None = None) -> int:
        """Make it spec.replicas, and `cores` spec.engine.cores; returns what the replicas were."""
        stack = managed.stack
        was = stack.resource.spec.replicas
        stack.resource = reading.with_replicas(stack.resource, replicas, cores)
        managed.note(self._run.record)
        self._run.save()
        managed.disturb()
        return was

    def serve_by(self, managed: Managed, shard: str) -> None:
        """Its engines shall have a build with this shard layout. AgentError if that cannot be written down."""
        before, managed.shard = managed.shard, shard
        managed.note(self._run.record)
        try:
            self._run.save(must=True)
        except AgentError:
            managed.shard = before
            managed.note(self._run.record)
            raise
        managed.disturb()

    async def rebalance(self, managed: Managed, moves: Sequence[Move], why: str) -> int:
        """Move buckets for the load's sake: from now on their numbers need not be even. Returns how many were moved."""
        self._run.record.rebalanced[managed.stack.name] = True
        self._run.save(must=True)  # else the next plan would move them back
        return (await self.transfer(managed, moves, why)).moved

    def even_out(self, managed: Managed) -> None:
        """Engines shall have equally many buckets again."""
        if self._run.record.rebalanced.pop(managed.stack.name, None):
            self._run.save()
            managed.disturb()

    # ---- following a table -----------------------------------------------------------------------------------

    async def _follow(self, managed: Managed, table: FlowTableSpec) -> None:
        """Follow the flow table, as far as that is possible now."""
        stack = managed.stack
        for _ in range(ROUNDS):
            await self._prepare(managed)
            self._take_states(managed, table)
            attached, mirrored = _attached(managed), _mirrored(managed)
            steps = following.follow(
                table, attached, stack.owners(), stack.open_fences(), stack.shard_slots(), mirrored
            )
            if time.monotonic() < managed.create_after:
                steps = [s for s in steps if not isinstance(s, following.Attach | MakeSet)]
            again = False
            for step in steps:
                match step:
                    case following.Attach(wanted, number):
                        self._engines.attach(managed, wanted, number)
                    case following.Assign(moves):
                        again |= (await self.transfer(managed, moves, "by the flow table")).moved > 0
                    case following.Detach(slot):
                        self._engines.remove(managed, slot)
                    case MakeSet(new):
                        made = MakeSet(replace(new, since=time.monotonic()))
                        again |= not await self._mirrors.act(managed, made)
                    case ChangeSet(new):
                        since = next(s.since for s in managed.sets.known if s.id == new.id)
                        await self._mirrors.act(managed, ChangeSet(replace(new, since=since)))
                    case _:
                        again |= not await self._mirrors.act(managed, step)
            if not again:
                break
        managed.converged = not stack.open_fences() and following.table_is_live(
            table, _attached(managed), stack.owners(), _mirrored(managed)
        )
        self.news.tell(stack.name)

    def _take_states(self, managed: Managed, table: FlowTableSpec) -> None:
        there = {e.blueprint.id: e for e in managed.engines.values()}
        for wanted in table.engines:
            engine, state = there.get(wanted.id), State(wanted.state)
            if engine is not None and State.PENDING not in (engine.state, state) and engine.state is not state:
                self._engines.become(engine, state)

    # ---- configuration and flow table ------------------------------------------------------------------------

    async def refresh(self, managed: Managed) -> None:
        """Write what has become known since the last configuration. What fails is reported, and tried again in the next round."""
        if not managed.stale and managed.stack.due > time.monotonic():  # a backend that starts slowly may get more
            return
        async with managed.busy:
            stale, managed.stale = managed.stale, False  # it is set again by whoever learns more meanwhile
            try:
                managed.stack.healthy = self._verdicts.of(managed.stack.name)
                await managed.stack.configure(list(managed.engines.values()))
                if stale:
                    managed.stack.direct()
            except BaseException as e:
                managed.stale = True
                if not isinstance(e, AgentError):
                    raise
                self._journal.event(managed.stack.name, EventReason.FAILED, f"{e}; it is tried again")

    async def transfer(self, managed: Managed, moves: Sequence[Move], why: str = "as planned") -> Report:
        """Give buckets to other owners; without moves, end what was begun. An engine that does not answer is reported."""
        async with managed.busy:
            self._stacks.check_there(managed)
            report = await to_the_end(managed.stack.transfer, list(managed.engines.values()), moves)
        managed.moved += report.moved
        managed.holds_ns.extend(report.hold_ns)
        if report.moved:
            buckets = counted(report.moved, "bucket")
            longest = max(report.hold_ns, default=0) / 1e6
            message = f"{buckets} by {counted(report.fences, 'fence')}, the longest {longest:.2f} ms"
            self._journal.event(managed.stack.name, EventReason.BUCKETS_MOVED, message)
            managed.note_move(buckets, why)
        if not report.stalled:
            self._fences.fences_answered(managed.engines.values())
            return report
        if report.acknowledged:  # it is alive; another process of it would change nothing
            said = (
                "has answered a fence, but the markers behind its packets do not come by on this node: packets of the buckets that "
                "it hands over wait until they do; see PathRestored and PathBroken, or report it"
            )
        else:
            said = (
                "does not answer a fence: packets of the buckets that it hands over wait until it does, or nobody has served it for "
                f"{AWAY_SECONDS:g} s; see packetstack logs {report.stalled}"
            )
        self._journal.event(managed.stack.name, EventReason.ENGINE_DOES_NOT_ANSWER, f"engine {report.stalled} {said}")
        if not report.acknowledged and (engine := managed.engines.get(report.stalled)):
            self._fences.fence_missed(engine, time.monotonic())
        return report

    async def _let_go(self, managed: Managed) -> None:
        """What only older configurations name, and no flow any more, is nobody's from now on."""
        stack = managed.stack
        if not stack.unsettled or managed.busy.locked():
            return
        async with managed.busy:
            gone = await to_the_end(stack.settle, list(managed.engines.values()))
        if gone:
            message = f"SNAT address {', '.join(map(str, gone))}: no flow has it any more"
            self._journal.event(stack.name, EventReason.ADDRESS_RELEASED, message)
            await self._routes.route()


def _attached(managed: Managed) -> list[following.Attached]:
    return [
        following.Attached(e.blueprint.id, e.slot, e.blueprint.pod_uid, e.ready and e.probed, e.blueprint.set)
        for e in managed.engines.values()
        if not e.removing
    ]


def _mirrored(managed: Managed) -> following.Mirrored:
    stack = managed.stack
    known = tuple(replace(s, since=0.0) for s in managed.sets.known)
    return following.Mirrored(tuple(stack.sets), stack.current, known, stack.belongs(), stack.keepers())
