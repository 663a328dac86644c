"""A new agent takes over what an earlier one left: packets flow by the pinned table meanwhile."""

import asyncio
import time
from contextlib import suppress
from functools import partial

from packetstack_agent import builds, engines
from packetstack_agent.blueprints import FIRST_SET
from packetstack_agent.director import Director
from packetstack_agent.engine_life import EngineLife
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.health import Health
from packetstack_agent.journal import Journal
from packetstack_agent.keeping import Keeper
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.node import RunDirectory
from packetstack_agent.stacks import Stack
from packetstack_agent.underlay import Underlay
from packetstack_core import kinds, reading
from packetstack_core.assignment import State
from packetstack_core.kinds import FlowTable
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import EventReason
from packetstack_core.transitions import SetState
from packetstack_core.wording import counted

REGAIN_SECONDS = 2.0
"""How long running datapaths may take to find a restarted agent."""


class Takeover:
    """Makes `stacks` what the record says."""

    def __init__(
        self, run: RunDirectory, stacks: Stacks, journal: Journal, director: Director, life: EngineLife, keeper: Keeper
    ) -> None:
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._director = director
        self._life = life
        self._keeper = keeper

    async def run(self, health: Health, underlay: Underlay) -> None:
        """Stacks and engines of the record. A stack that cannot be read is reported and left as it is."""
        record = self._run.record
        for name in record.documents:
            try:
                self._stacks[name] = await asyncio.to_thread(self._read, name)
            except ResourceError as e:
                self._leave_unread(name, _unreadable(e.problems[0]))
            except AgentError as e:  # about one of its files
                self._leave_unread(name, str(e))
            except (LookupError, TypeError, ValueError, AttributeError, OSError) as e:
                self._leave_unread(name, _unreadable(f"{type(e).__name__}: {e}"))
        for slot, known in list(record.engines.items()):
            if isinstance(known, dict) and known.get("stack") in self._stacks:
                await self._life.regain(self._stacks[known["stack"]], int(slot), known)
        if not self._stacks:
            return
        health.resume()
        await self._wait_for_datapaths()
        for managed in self._stacks.values():
            for engine in list(managed.engines.values()):
                if engine.view is None and engine.making is None:
                    await self._life.rebuild(managed, engine, "no process has its descriptors any more")
            managed.stale = True
            await self._keeper.refresh(managed)
        await underlay.route()
        for name, managed in self._stacks.items():
            self._keeper.begin(managed)
            message = f"took over {counted(len(managed.engines), 'engine')}"
            self._journal.event(name, EventReason.AGENT_STARTED, message)

    async def _wait_for_datapaths(self) -> None:
        deadline = time.monotonic() + REGAIN_SECONDS
        for engine in [e for m in self._stacks.values() for e in m.engines.values()]:
            attachments = engine.attachments  # gone as soon as a fresh process finds that the descriptors are lost
            if attachments is not None and await asyncio.to_thread(engines.populated, engine):
                await attachments.until(partial(_is_ready, engine), deadline - time.monotonic())

    def _read(self, name: str) -> Managed:
        """A stack of the record. Any error if something is missing or has another form. Blocks."""
        record = self._run.record
        resource, index = reading.parse(record.documents[name]), int(record.indexes[name])
        pinned = {int(b): int(slot) for b, slot in record.pinned.get(name, {}).items()}
        table, generation = None, 0
        if name in record.tables:
            table = kinds.read(FlowTable, record.tables[name])
            generation = int(record.tables[name]["metadata"]["generation"])
        noted = record.sets.get(name, {})
        sets = {int(one["id"]): SetState(one["state"]) for one in noted.get("known", ())}
        [current] = [n for n, state in sets.items() if state is SetState.CURRENT] or [FIRST_SET]
        stack = Stack(
            name,
            resource,
            index,
            self._run.stack(name),
            self._run.memory,
            self._director.handle,
            sets or {current},
            current,
        )
        for slot, known in record.engines.items():
            if isinstance(known, dict) and known.get("stack") == name:
                self._life.blueprint(stack, known), State(known["state"]), int(slot), tuple(known["init"])
        managed = Managed(stack, pinned=pinned, table=table, generation=generation)
        managed.read(noted)
        if table is None:
            _keep_builds(stack)
        if len(sets) == 2:
            stack.mirror_from(*sets)
        return managed

    def _leave_unread(self, name: str, why: str) -> None:
        self._stacks.unread[name] = why
        self._journal.event(
            name,
            EventReason.RECORD_UNREADABLE,
            f"{why}; its engines serve meanwhile, and nothing follows them if they die",
        )


def _keep_builds(stack: Stack) -> None:
    """Earlier builds kept no copy of the datapath: the installed one is it, as long as it has their layout. Blocks."""
    for memory in stack.sets.values():
        with suppress(AgentError):
            builds.of(memory.directory, memory.shard)


def _unreadable(why: str) -> str:
    return f"its entry in state.json cannot be read ({why}); start the agent that wrote it"


def _is_ready(engine: Engine) -> bool:
    return engine.ready
