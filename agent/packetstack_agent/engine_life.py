"""What becomes of engines: made, attached, lost, made again, removed. Whoever wants that says so elsewhere.

An engine's memory is used by handovers and configurations, which hold its stack's `busy`; so it goes only under that
lock. Its processes begin and end under the engine's own lock, so that engines of one stack need not wait for each other.
"""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import count

from pyroute2.netlink.exceptions import NetlinkError

from packetstack_agent import engines, processes
from packetstack_agent.blueprints import Blueprint
from packetstack_agent.counting import add_copies, add_drops
from packetstack_agent.director import Director
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.journal import Background, Journal
from packetstack_agent.managed import Managed
from packetstack_agent.natives import call, lib
from packetstack_agent.node import RunDirectory
from packetstack_agent.stacks import Stack
from packetstack_agent.threads import to_the_end
from packetstack_core import kinds
from packetstack_core.assignment import State
from packetstack_core.backing_off import ENGINE_SECONDS, back_off
from packetstack_core.kinds import TableEngine
from packetstack_core.planning import CreateEngine
from packetstack_core.reasons import EventReason
from packetstack_core.verbs import Json

AWAY_SECONDS = 10.0
"""How long nobody may serve an engine that leaves before it is removed with what stands in its rings."""
FORGET_SECONDS = 5.0
"""Time between two searches for pods that have gone."""
PROBE_SECONDS, PROBE_LOOKS = 0.01, 50
"""Time between two checks for a probe packet, and how many of them until the next one is sent."""


class EngineLife:
    """Makes, mends and removes the engines of `stacks`, and writes them into the record."""

    def __init__(
        self,
        run: RunDirectory,
        stacks: Mapping[str, Managed],
        journal: Journal,
        background: Background,
        director: Director,
    ) -> None:
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._background = background
        self._director = director
        self._ending = False

    def end(self) -> None:
        """The agent ends: engines that are not ready yet are not waited for."""
        self._ending = True

    # ---- coming ----------------------------------------------------------------------------------------------

    def create(self, managed: Managed, action: CreateEngine) -> None:
        """Begin to make an engine in a namespace of its own. What stands against it is the stack's `problem`."""
        stack = managed.stack
        shape = managed.shapes.get(action.template, stack.resource.spec.engine)
        slot = self._run.next_slot()
        cpus: tuple[int, ...] = ()
        if shape.cpu_policy == "Exclusive":
            taken = {c for m in self._stacks.values() for e in m.engines.values() for c in e.blueprint.cpus}
            free = sorted(os.sched_getaffinity(0) - taken)
            if len(free) < shape.cores:
                self._failed(managed, slot, f"NoExclusiveCPU: {len(free)} CPUs are free, it needs {shape.cores}")
                return
            cpus = tuple(free[: shape.cores])
        known = {
            "stack": stack.name,
            "slot": slot,
            "template": action.template,
            "queues": action.queues,
            "cores": shape.cores,
            "cpu_policy": shape.cpu_policy,
            "cpus": cpus,
            "memory_bytes": shape.memory_bytes,
            "namespace": self._run.namespace(stack.name, slot),
            "set": action.set or stack.current,
        }
        self._begin(managed, Engine(self.blueprint(stack, known), self._director.handle))

    def attach(self, managed: Managed, wanted: TableEngine, number: int) -> None:
        """Begin to make rings for an engine in the pod that the operator has made for it, with the memory of this set."""
        stack = managed.stack
        slot = self._run.next_slot()
        known = {
            "stack": stack.name,
            "slot": slot,
            "template": wanted.template,
            "queues": wanted.queues,
            "cores": wanted.cores,
            "cpu_policy": wanted.cpu_policy,
            "cpus": (),
            "memory_bytes": 0,  # the kubelet limits it
            "namespace": "",
            "id": wanted.id,
            "pod": wanted.name,
            "pod_uid": wanted.pod_uid,
            "interface": wanted.interface,
            "set": number,
        }
        engine = Engine(self.blueprint(stack, known), self._director.handle)
        self._run.record.leaving.pop(engine.blueprint.directory.name, None)
        self._begin(managed, engine)

    def blueprint(self, stack: Stack, known: Json) -> Blueprint:
        """Blueprint of an engine from its entry in the record. KeyError or TypeError if something is missing."""
        memory = stack.sets[known["set"]]
        kept = {name: value for name, value in known.items() if name not in ("state", "init", "cpus")}
        directory = self._run.engine(
            kinds.pod_directory(stack.resource.metadata.namespace, known["pod"]) if known.get("pod") else known["slot"]
        )
        return Blueprint(
            **kept,
            cpus=tuple(known["cpus"]),
            owner=self._run.owner,
            directory=directory,
            arena=memory.arena_path,
            config=memory.config_path,
            index=stack.index,
            flows=memory.pin,
            memory=self._run.memory(directory),
            shard=memory.shard,
        )

    async def regain(self, managed: Managed, slot: int, known: Json) -> None:
        """Take an engine of the record over from an earlier agent, or make it again if something of it is missing."""
        engine = Engine(self.blueprint(managed.stack, known), self._director.handle)
        engine.state = State(known["state"])
        engine.probed = engine.state in (State.ACTIVE, State.DRAINING)  # it was, or it would not be
        managed.add(engine)
        if engine.state is State.PENDING:  # it was being made
            await self.destroy(managed, engine)
            return
        try:
            await asyncio.to_thread(engines.regain, engine, tuple(known["init"]))
        except (AgentError, NetlinkError, OSError) as e:
            await self.rebuild(managed, engine, str(e))
        else:
            self._attend(engine)

    def _begin(self, managed: Managed, engine: Engine) -> None:
        """Make it, when it has been written down that there is such an engine."""
        slot = engine.slot
        try:
            self._note(engine, must=True)
        except AgentError as e:
            self._run.record.engines.pop(str(slot))
            self._failed(managed, slot, str(e))
            return
        managed.add(engine)
        engine.making = asyncio.create_task(self._make(managed, engine))

    async def _make(self, managed: Managed, engine: Engine) -> None:
        b = engine.blueprint
        try:
            await asyncio.to_thread(engines.make, engine)
        except Exception as e:
            managed.engines.pop(b.slot, None)
            self._run.record.engines.pop(str(b.slot), None)
            if b.pod:
                self._run.record.leaving[b.directory.name] = b.pod_uid
            self._run.save()
            self._failed(managed, b.slot, str(e))
            managed.changed.set()
            return
        if engine.removing:
            return
        if engine.state is State.PENDING:
            engine.state = State.STARTING
        self._note(engine)
        self._attend(engine)

    def _failed(self, managed: Managed, slot: int, problem: str) -> None:
        """An engine could not be made: say why, and wait longer each time before the next try."""
        managed.problem = problem
        pause = back_off(managed.failures, ENGINE_SECONDS)
        managed.failures += 1
        managed.create_after = time.monotonic() + pause
        message = f"engine {slot}: {problem}; next try in {pause:g} s"
        self._journal.event(managed.stack.name, EventReason.ENGINE_FAILED, message)

    def become(self, engine: Engine, state: State) -> None:
        """Set the state of the engine, also for the next agent."""
        engine.state = state
        self._note(engine)

    def _note(self, engine: Engine, must: bool = False) -> None:
        """Write down what the next agent must know about the engine."""
        init = engine.init
        self._run.record.engines[str(engine.slot)] = engine.blueprint.record() | {
            "state": str(engine.state),
            "init": [init.pid, init.started] if init is not None else [0, 0],
        }
        self._run.save(must)

    # ---- serving ---------------------------------------------------------------------------------------------

    def _attend(self, engine: Engine) -> None:
        engine.silent_since = engine.unserved_since = time.monotonic()
        engines.attend(engine, lambda what: self._changed(engine, what))

    def _changed(self, engine: Engine, what: str) -> None:
        """Something about who serves it has changed: see `attachments.Changed`."""
        managed = self._stacks.get(engine.blueprint.stack)
        if managed is None or engine.removing:
            return
        name, slot = managed.stack.name, engine.slot
        if what == "resumed":
            try:
                if engine.view is None:
                    engines.complete(engine)
            except AgentError as e:
                self._background.spawn(name, self.rebuild(managed, engine, str(e)))
                return
        if what in ("ready", "resumed"):
            self._served(managed, engine)
        elif what == "died":
            engine.silent_since = engine.unserved_since = time.monotonic()
            self._journal.event(
                name,
                EventReason.DATAPATH_DIED,
                f"engine {slot}: its datapath ended; its init starts another, which goes on with its queues and flows",
            )
        elif what == "connected":
            managed.changed.set()
        elif what == "lost":
            self._background.spawn(name, self.rebuild(managed, engine, "no process has its descriptors any more"))
        else:
            self._journal.event(name, EventReason.DATAPATH_REFUSED, f"engine {slot}: {what}")
        managed.changed.set()

    def _served(self, managed: Managed, engine: Engine) -> None:
        name, slot = managed.stack.name, engine.slot
        call(lib().ps_director_engine, self._director.handle, slot, engine.ifindex)
        managed.lacks_nothing()
        engine.silent_since = engine.unserved_since = 0.0
        message = f"engine {slot}: datapath {engine.pid} serves its queues"
        self._journal.event(name, EventReason.ENGINE_READY, message)
        if engine.blueprint.pod and not engine.probed:
            self._background.spawn(name, self._probe(managed, engine))
        if engine.orphans:
            engine.orphans = False
            self._background.spawn(name, asyncio.to_thread(engines.end_orphans, engine))

    async def _probe(self, managed: Managed, engine: Engine) -> None:
        """Send packets through the engine until they come by: only then is it ready for others' packets."""
        before = -1
        for look in count():
            async with managed.busy:  # its memory stays meanwhile
                if not engine.ready or engine.removing or self._ending:
                    return
                came = engine.counters()["markers"]
                if before >= 0 and came - before >= engine.blueprint.queues:
                    engine.probed = True
                    break
                if look % PROBE_LOOKS == 0:
                    before = came
                    try:
                        await to_the_end(engines.probe, engine)
                    except AgentError as e:  # the next one may get through
                        self._journal.event(managed.stack.name, EventReason.FAILED, f"{e}; it is tried again")
            await asyncio.sleep(PROBE_SECONDS)
        managed.changed.set()

    # ---- mending ---------------------------------------------------------------------------------------------

    async def rebuild(self, managed: Managed, engine: Engine, why: str) -> None:
        """Make the engine again in its slot. It keeps its buckets and their flows, which are in the arena."""
        message = f"engine {engine.slot}: {why}; it is made again with its buckets and flows, whose packets are lost until it serves"
        self._journal.event(managed.stack.name, EventReason.ENGINE_LOST, message)
        if managed.engines.get(engine.slot) is not engine or engine.removing:
            return
        async with self._removing(managed, engine) as there:
            if not there:
                return
            await self._tear_down(managed, engine)
            fresh = managed.engines[engine.slot] = Engine(engine.blueprint, self._director.handle)
            fresh.state = engine.state
            fresh.making = asyncio.create_task(self._make(managed, fresh))
        await asyncio.wait([fresh.making])
        managed.changed.set()

    async def start_again(self, managed: Managed, engine: Engine, why: str) -> None:
        """Init and all it starts, in the namespace that is there: the next datapath takes the queues over."""
        message = (
            f"engine {engine.slot}: {why}; another init starts a datapath, which goes on with its queues and flows"
        )
        self._journal.event(managed.stack.name, EventReason.ENGINE_RESTARTED, message)
        gone = ""
        async with engine.processes:
            if engine.removing or engine.view is None:
                return
            engine.orphans, engine.restarted = True, time.monotonic()
            engine.silent_since = 0.0 if engine.ready else time.monotonic()
            try:
                await to_the_end(engines.start_again, engine)
            except FileNotFoundError as e:  # its namespace is gone, or named otherwise for good
                gone = str(e)
            self._note(engine)
        if gone:
            await self.rebuild(managed, engine, gone)

    async def lose(self, managed: Managed, engine: Engine, why: str) -> None:
        """An engine whose pod is gone. Its buckets go to others when the table says so; their flows are in the arena."""
        message = (
            f"engine {engine.slot}: {why}; packets of its buckets are lost until the operator gives them to others"
        )
        self._journal.event(managed.stack.name, EventReason.ENGINE_LOST, message)
        if managed.engines.get(engine.slot) is engine and not engine.removing:
            async with self._removing(managed, engine) as there:
                if there:
                    await self.destroy(managed, engine)
        managed.changed.set()

    # ---- going -----------------------------------------------------------------------------------------------

    def remove(self, managed: Managed, slot: int) -> None:
        """Begin to remove an engine that owns no bucket; one that has gone since it was observed is no fault."""
        engine = managed.engines.get(slot)
        if engine is not None and not engine.removing:
            engine.removing = True
            self._background.spawn(managed.stack.name, self._remove(managed, engine))

    async def _remove(self, managed: Managed, engine: Engine) -> None:
        """One that cannot be removed, or not yet, is planned for again."""
        if engine.making is not None:
            await asyncio.wait([engine.making])
        async with managed.busy:  # since it was observed, a fence may have been opened, and not closed
            if managed.engines.get(engine.slot) is engine and _must_stay(managed, engine):
                engine.removing = False
                return
        async with self._removing(managed, engine) as there:
            if not there:
                return  # the whole stack was removed meanwhile
            await self.destroy(managed, engine)
        message = f"engine {engine.slot} is not wanted any more"
        self._journal.event(managed.stack.name, EventReason.ENGINE_REMOVED, message)
        managed.changed.set()

    @asynccontextmanager
    async def _removing(self, managed: Managed, engine: Engine) -> AsyncIterator[bool]:
        """End who serves it, then hold the stack's `busy`. Whether the engine is there still.

        Processes that do not end keep nobody from the stack meanwhile. If anything fails the engine is there as before.
        """
        engine.removing = True
        try:
            await self.end_service(engine)
            async with managed.busy:
                yield managed.engines.get(engine.slot) is engine
        except BaseException:
            engine.removing = False
            raise

    async def end_service(self, engine: Engine) -> None:
        """End the processes that serve it, and let no others come. AgentError if one does not end."""
        if engine.making is not None:
            await asyncio.wait([engine.making])
        async with engine.processes:
            if not engine.blueprint.pod:
                await to_the_end(engines.end_processes, engine)
            elif (
                engine.attachments is not None
            ):  # its processes are not ours to start, but nobody may serve from now on
                await engine.attachments.end()

    async def end_all(self, managed: Managed) -> None:
        """End the processes of all its engines at once: they go with their stack. AgentError if one does not end."""
        there = list(managed.engines.values())
        for engine in there:
            engine.removing = True  # nobody starts them again
        try:
            await asyncio.gather(*(self.end_service(engine) for engine in there))
        except BaseException:
            for engine in there:
                engine.removing = False
            raise

    async def destroy(self, managed: Managed, engine: Engine) -> None:
        """End it and remove all of it, under the stack's `busy`. If that fails it is there as before, to try again."""
        engine.removing = True
        try:
            if engine.making is not None:
                await asyncio.wait([engine.making])
            await self._tear_down(managed, engine)
        except BaseException:
            engine.removing = False
            raise
        if engine.blueprint.pod:
            self._run.record.leaving[engine.blueprint.directory.name] = engine.blueprint.pod_uid
        managed.engines.pop(engine.slot, None)
        self._run.record.engines.pop(str(engine.slot), None)
        self._run.save()

    async def _tear_down(self, managed: Managed, engine: Engine) -> None:
        async with engine.processes:
            if engine.attachments is not None:
                if engine.blueprint.pod:
                    await engine.attachments.end()
                await engine.attachments.close()
                engine.attachments = None
            if engine.view is not None:
                add_drops(engine, managed.gone["engine"], managed.gone["kernel"])
                add_copies(engine, managed.gone_copies.setdefault(engine.blueprint.set, {}))
            engine.view = None  # nothing here may read it from now on: its memory goes
            await to_the_end(engines.destroy, engine)

    async def forget_pods(self) -> None:
        """Remove the directories of pods that have gone, until cancelled: such a directory is mounted in its pod."""
        while True:
            with self._journal.going_on("-", "directories of pods"):
                used = {e.blueprint.directory.name for m in self._stacks.values() for e in m.engines.values()}
                await to_the_end(self._forget, used)
            await asyncio.sleep(FORGET_SECONDS)

    def _forget(self, used: set[str]) -> None:
        leaving = self._run.record.leaving
        for name, uid in list(leaving.items()):
            if name not in used and not processes.of_pod(uid) and leaving.get(name) == uid:
                shutil.rmtree(self._run.engine(name), ignore_errors=True)
                leaving.pop(name)
        self._run.save()


def is_lost(engine: Engine, now: float) -> bool:
    """Whether nobody is expected any more to handle what stands in its rings."""
    return not engine.ready and bool(engine.unserved_since) and now - engine.unserved_since > AWAY_SECONDS


def _must_stay(managed: Managed, engine: Engine) -> bool:
    """Whether packets of a bucket stand in its rings, or may come to it still."""
    stack = managed.stack
    if managed.table is not None:
        return engine.ready and engine.slot in stack.shard_slots()
    owns = any(o is not None and o.slot == engine.slot for o in stack.owners())
    return owns or (engine.slot in stack.shard_slots() and not is_lost(engine, time.monotonic()))
