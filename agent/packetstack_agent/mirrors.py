"""Stacks get a second set of engines, and lose the first one when its connections have ended: carries out what the planner
of sets decides (`packetstack_core.transitions`), or a flow table asks for (`following`). Changes nothing but by the stack's task, which calls it.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from packetstack_agent import builds
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.flow_memory import Report
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.natives import lib
from packetstack_agent.node import RunDirectory
from packetstack_agent.stacks import Stack
from packetstack_agent.threads import to_the_end
from packetstack_core import transitions
from packetstack_core.assignment import Move
from packetstack_core.backing_off import ENGINE_SECONDS, back_off
from packetstack_core.reasons import EventReason
from packetstack_core.transitions import (
    AdoptKept,
    ChangeSet,
    EngineSet,
    MakeSet,
    PromoteSet,
    RetireSet,
    SetState,
    SwitchBuckets,
)
from packetstack_core.wording import counted

GRACE_SECONDS = 10.0
"""From a set's deadline on, for ends that send nothing."""
CONNECT_SECONDS = 0.5
"""How long engines may take to use a new connection list."""


class Fences(Protocol):
    """Who draws conclusions from fences that are not answered."""

    def fence_missed(self, engine: Engine, now: float) -> None:
        """The engine did not answer a fence in time."""

    def fences_answered(self, engines: Iterable[Engine]) -> None:
        """All did."""


class Mirrors:
    """Makes, switches and retires sets of engines."""

    def __init__(self, run: RunDirectory, stacks: Stacks, journal: Journal, fences: Fences) -> None:
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._fences = fences

    async def prepare(self, managed: Managed) -> None:
        """What comes before anything new: engines know the list, what was begun is finished, what is over has ended."""
        _tell_engines(managed)
        mirror = managed.stack.mirror
        if mirror is None:
            return
        if mirror.unfinished:
            await self._change(managed, "switch", ())
            await self._change(managed, "end", ())
        over = (await asyncio.to_thread(mirror.left)).over
        if over:
            await self._change(managed, "end", over)
        async with managed.busy:
            await to_the_end(mirror.share)
            await to_the_end(mirror.look_at_devices, list(managed.engines.values()))

    async def act(self, managed: Managed, action: transitions.Action) -> bool:
        """Carry out one action of the planner of sets; returns whether its effect comes later."""
        match action:
            case MakeSet(new):
                return await self._make(managed, new)
            case ChangeSet():
                self._note(managed, action)
            case PromoteSet(number):
                self._note(managed, action)
                managed.stack.current = number
                self._journal.event(managed.stack.name, EventReason.SET_CURRENT, transitions.said(action))
            case SwitchBuckets(moves):
                return await self._switch(managed, moves)
            case AdoptKept(moves):
                await self._adopt(managed, moves)
            case RetireSet(number):
                if any(e.blueprint.set == number for e in managed.engines.values()):
                    return True  # those are being removed, and still have its memory
                await self._retire(managed, number)
            case _:
                return await self._end(managed)
        return False

    def _note(self, managed: Managed, action: transitions.SetAction) -> None:
        """Write down what the sets are from now on. AgentError if that cannot be."""
        before = managed.sets
        managed.sets = before.after(action, time.monotonic())
        try:
            managed.note(self._run.record)
            self._run.save(must=True)
        except AgentError:
            managed.sets = before
            managed.note(self._run.record)
            raise

    async def _make(self, managed: Managed, new: EngineSet) -> bool:
        """Memory first: without room the stack stays as it is, and the planner asks again later."""
        stack = managed.stack
        if new.state is SetState.CURRENT:  # the engines that there are
            self._note(managed, MakeSet(new))
            return False
        try:
            async with managed.busy:
                await to_the_end(stack.add_set, new.id, new.shard)
                try:
                    if managed.table is None:
                        await to_the_end(_keep_build, stack, new)
                    await to_the_end(stack.mirror_from, stack.current, new.id)
                except BaseException:
                    stack.remove_set(new.id)
                    raise
        except AgentError as e:
            pause = back_off(managed.failures, ENGINE_SECONDS)
            managed.failures += 1
            managed.create_after, managed.problem = time.monotonic() + pause, str(e)
            message = f"no second set of engines: {e}; the first serves as before, next try in {pause:g} s"
            self._journal.event(stack.name, EventReason.ENGINE_FAILED, message)
            return True
        self._note(managed, MakeSet(new))
        self._journal.event(stack.name, EventReason.SET_ACTIVATING, transitions.said(MakeSet(new)))
        return False

    async def _switch(self, managed: Managed, moves: Sequence[Move]) -> bool:
        deadline = time.monotonic() + CONNECT_SECONDS
        while late := [
            e for e in managed.engines.values() if e.ready and e.attachments and not e.attachments.connected
        ]:
            if time.monotonic() > deadline:
                names = ", ".join(e.blueprint.name for e in late)
                message = f"{names} does not use the connection list yet: no bucket is switched until it does"
                self._journal.event(managed.stack.name, EventReason.ENGINE_DOES_NOT_ANSWER, message)
                for engine in late:
                    self._fences.fence_missed(engine, time.monotonic())
                return True
            await asyncio.sleep(0.002)
        report = await self._change(managed, "switch", moves)
        if report.moved:
            longest = max(report.hold_ns, default=0) / 1e6
            message = (
                f"{counted(report.moved, 'bucket')} switched by {counted(report.fences, 'fence')}, the longest {longest:.2f} ms; "
                "their traffic is mirrored until the connections of before have ended"
            )
            self._journal.event(managed.stack.name, EventReason.BUCKETS_SWITCHED, message)
            managed.note_move(counted(report.moved, "bucket"), "another set takes new connections")
        return bool(report.stalled)

    async def _adopt(self, managed: Managed, moves: Sequence[Move]) -> None:
        mirror = managed.stack.mirror
        if mirror is None:
            return
        async with managed.busy:
            self._stacks.check_there(managed)
            await to_the_end(mirror.adopt, list(managed.engines.values()), moves)

    async def _end(self, managed: Managed) -> bool:
        """The connections that are left end: each with its next segments; those that are silent when `GRACE_SECONDS` are over."""
        mirror, now = managed.stack.mirror, time.monotonic()
        if mirror is None:
            return False
        if not mirror.keeper.ending:
            mirror.keeper.ending, managed.ending = True, now
            managed.stale = True
            managed.changed.set()
            left = await asyncio.to_thread(mirror.left)
            message = (
                f"{counted(left.connections, 'connection')} of the set before had not ended in time: both ends get a reset when they "
                f"send next, and what is silent for {GRACE_SECONDS:g} s is forgotten"
            )
            self._journal.event(managed.stack.name, EventReason.SET_ENDED, message)
        elif now - managed.ending > GRACE_SECONDS:
            kept = [b for b, owner in enumerate(mirror.keepers()) if owner is not None]
            await self._change(managed, "end", kept)
        return True

    async def _retire(self, managed: Managed, number: int) -> None:
        """Its engines have gone: the others forget the list, then the memory goes."""
        stack = managed.stack
        stack.mirror_no_more()
        _tell_engines(managed)
        async with managed.busy:
            if number in stack.sets:
                stack.remove_set(number)
        await asyncio.to_thread(lib().ps_heap_give_back)  # what was read of its flows
        self._note(managed, RetireSet(number))
        managed.gone_copies.pop(number, None)
        message = f"set {number} has no connection and no engine any more; its memory is free"
        self._journal.event(stack.name, EventReason.SET_RETIRED, message)

    async def _change(self, managed: Managed, what: str, values: Sequence[Move] | Sequence[int]) -> Report:
        """Switch or end buckets. An engine that does not answer is reported, and it is tried again."""
        mirror = managed.stack.mirror
        assert mirror is not None
        async with managed.busy:
            self._stacks.check_there(managed)
            work = mirror.switch if what == "switch" else mirror.end
            report: Report = await to_the_end(work, list(managed.engines.values()), values)
        managed.holds_ns.extend(report.hold_ns)
        if not report.stalled:
            self._fences.fences_answered(managed.engines.values())
            return report
        message = (
            f"engine {report.stalled} does not answer a fence: packets of the buckets that are being switched wait until it does; "
            f"see packetstack logs {report.stalled}"
        )
        self._journal.event(managed.stack.name, EventReason.ENGINE_DOES_NOT_ANSWER, message)
        if engine := managed.engines.get(report.stalled):
            self._fences.fence_missed(engine, time.monotonic())
        return report


def _keep_build(stack: Stack, new: EngineSet) -> None:
    """A new set keeps the build that is installed, or the present set's when that one has the layout. Blocks."""
    directory, build = stack.sets[new.id].directory, builds.installed()
    if builds.shard_of(build) != new.shard:
        build = builds.of(stack.sets[stack.current].directory, new.shard)
    builds.keep_if_possible(directory, build)


def _tell_engines(managed: Managed) -> None:
    """Which connection list the stack has now, if it has one."""
    for engine in managed.engines.values():
        if engine.attachments is not None:
            engine.attachments.connect(managed.stack.connections)
