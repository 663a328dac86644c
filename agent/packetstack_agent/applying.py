"""Stacks come, become others, and go: everything is checked before anything is changed, and undone if it fails."""

import asyncio
from collections.abc import Collection, Sequence
from typing import Protocol

from packetstack_agent import builds, networks
from packetstack_agent.blueprints import FIRST_SET
from packetstack_agent.director import Director
from packetstack_agent.engine_life import EngineLife
from packetstack_agent.errors import AgentError
from packetstack_agent.health import Health
from packetstack_agent.journal import Journal
from packetstack_agent.keeping import Keeper
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.natives import constant, packed
from packetstack_agent.node import RunDirectory
from packetstack_agent.stacks import Stack
from packetstack_agent.surveying import survey
from packetstack_agent.threads import to_the_end
from packetstack_agent.underlay import Underlay
from packetstack_core import preconditions, reading, shards, standing
from packetstack_core.kinds import FlowTable
from packetstack_core.preconditions import Precondition
from packetstack_core.reasons import EventReason
from packetstack_core.resources import PacketStack
from packetstack_core.values import Address
from packetstack_core.verbs import Json
from packetstack_core.wording import counted


class Forgetful(Protocol):
    """Who knows something of each stack by its name."""

    def forget(self, name: str) -> None:
        """The stack is gone."""


class Applying:
    """Adds stacks to `stacks`, changes and removes them."""

    def __init__(
        self,
        run: RunDirectory,
        stacks: Stacks,
        journal: Journal,
        director: Director,
        life: EngineLife,
        keeper: Keeper,
        health: Health,
        underlay: Underlay,
        forgetful: Sequence[Forgetful],
    ) -> None:
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._director = director
        self._life = life
        self._keeper = keeper
        self._health = health
        self._underlay = underlay
        self._forgetful = forgetful
        self.lock = asyncio.Lock()
        """Held while stacks come, go or become others. `follow` takes it; callers of all else hold it."""

    async def apply(self, documents: Sequence[Json], uplinks: Sequence[str]) -> list[dict[str, str]]:
        """Make the stacks what the documents say; AgentError or ResourceError if that cannot be, and nothing is changed."""
        wanted = [reading.parse(d) for d in documents]
        roles = dict(networks.uplink_role(u) for u in uplinks)
        await asyncio.to_thread(self._check, {r.name: r for r in wanted}, dict(self._stacks), roles)
        for resource in wanted:
            if problem := standing.unsupported(resource.spec, kubernetes=False):
                raise AgentError(f"stack {resource.name}: {problem}")
        async with self._underlay.with_uplinks(roles):
            return await self._apply(wanted)

    async def _apply(self, wanted: Sequence[PacketStack]) -> list[dict[str, str]]:
        results = []
        for resource in wanted:
            managed = self._stacks.get(resource.name)
            if managed is not None and resource.spec.autoscaling is not None:
                there = managed.stack.resource.spec
                cores = there.engine.cores if resource.spec.autoscaling.vertical is not None else None
                resource = reading.with_replicas(resource, there.replicas, cores)
            if managed is None:
                await self._add_stack(resource.name, resource)
                results.append({"stack": resource.name, "result": "created"})
            elif managed.stack.resource == resource:
                results.append({"stack": resource.name, "result": "unchanged"})
            else:
                note = await self._change_stack(managed, resource)
                results.append({"stack": resource.name, "result": "changed", "note": note})
        return results

    async def follow(self, name: str, table: FlowTable, generation: int) -> None:
        """Make packets see this flow table, from now on. AgentError or ResourceError if that cannot be."""
        resource = table.stack()
        async with self.lock:
            managed = self._stacks.get(name)
            if managed is not None and managed.generation == generation and managed.table == table:
                return
            if managed is None or managed.stack.resource != resource:
                await asyncio.to_thread(self._check, {name: resource}, dict(self._stacks), ())
            if managed is None:
                managed = await self._add_stack(name, resource, table)
            elif managed.stack.resource.spec.model_copy(update={"replicas": 0}) != resource.spec.model_copy(
                update={"replicas": 0}
            ):
                await self._change_stack(managed, resource)
            else:
                managed.stack.resource = resource
                managed.note(self._run.record)
            managed.table, managed.generation = table, generation
            kept = table.document()
            kept["metadata"]["generation"] = generation
            self._run.record.tables[name] = kept
            self._run.save()
            managed.disturb()  # until packets have been seen to follow it

    async def delete(self, name: str) -> None:
        """End a stack: its addresses, engines and flows."""
        live = self._stacks.find(name).stack.live()
        await self.remove(name)
        self._journal.event(name, EventReason.DELETED, f"{live} live flows ended")

    def _check(self, wanted: dict[str, PacketStack], there: dict[str, Managed], uplinks: Collection[str]) -> None:
        """Whether stacks can become what is wanted; AgentError if not. `there`: those of now. Blocks."""
        after = {name: m.stack.resource for name, m in there.items()} | wanted
        if len(after) > constant("PS_MAX_STACKS"):
            raise AgentError(f"{len(after)} stacks: a node takes at most {constant('PS_MAX_STACKS')}")
        owners: dict[Address, str] = {}
        for name, resource in after.items():
            for address in (*resource.virtual_addresses(), *resource.snat_addresses()):
                if owners.setdefault(address, name) != name:
                    raise AgentError(
                        f"stack {name}: AddressConflict: {address} belongs to stack {owners[address]}; use another address"
                    )
        _check_leaving(wanted, owners, there)
        for name, resource in wanted.items():
            self._stacks.check_read(name)
            old = there.get(name)
            if old is not None:
                reading.check_change(old.stack.resource, resource)
            around = survey(resource.prefixes(), uplinks)
            # What a stack that runs lacks already is told by its conditions, and is no reason to leave it as it is.
            known = preconditions.lacking(around, old.stack.resource.prefixes()) if old is not None else []
            for lack in preconditions.lacking(around, resource.prefixes()):
                if lack not in known and lack.what is not Precondition.DEVICE_FORWARDING:
                    raise AgentError(lack.message)
            networks.check_not_routed(resource.prefixes())

    async def _add_stack(self, name: str, resource: PacketStack, table: FlowTable | None = None) -> Managed:
        used = {m.stack.index for m in self._stacks.values()}
        for other in self._stacks.unread:
            if other not in self._run.record.indexes:  # any place in the flow tables may be that stack's
                self._stacks.check_read(other)
            used.add(self._run.record.indexes[other])
        index = min(i for i in range(constant("PS_MAX_STACKS")) if i not in used)
        self._run.record.indexes[name] = index
        # An agent may have been killed while it made a stack of this name, or ended one.
        await asyncio.to_thread(self._run.remove_stack, name)
        directory = self._run.stack(name)
        first = (table.spec.current_set() if table is not None else None) or FIRST_SET
        shard = await asyncio.to_thread(_first_shard, table)
        stack = await asyncio.to_thread(
            Stack, name, resource, index, directory, self._run.memory, self._director.handle, (first,), first, shard
        )
        managed = Managed(stack, table=table)
        self._stacks[name] = managed
        try:
            managed.note(self._run.record)
            self._run.save(must=True)
            self._health.watch()
            stack.healthy = self._health.of(name)
            await stack.configure([])
            stack.direct()
            await self._underlay.route()
        except BaseException:
            await self.remove(name)
            raise
        self._keeper.begin(managed)
        self._journal.event(name, EventReason.CREATED, f"{counted(resource.spec.replicas, 'engine')} wanted")
        return managed

    async def _change_stack(self, managed: Managed, resource: PacketStack) -> str:
        old = managed.stack.resource
        gone = old.listening() - resource.listening()
        async with managed.busy:
            try:
                await self._become(managed, resource)
            except BaseException:
                await self._become(managed, old)
                raise
        managed.disturb()
        self._journal.event(managed.stack.name, EventReason.CHANGED, "the resource was changed")
        notes = []
        if gone:
            names = ", ".join(f"{protocol} {address} port {port}" for address, port, protocol in sorted(gone, key=str))
            notes.append(f"flows of the removed listener {names} end")
        if used := {a: n for a, n in managed.stack.leaving.items() if n}:
            shown = ", ".join(f"{a} ({counted(used[a], 'flow')})" for a in sorted(used, key=packed))
            notes.append(f"SNAT address {shown} takes no new flows, and leaves when those end")
            self._journal.event(managed.stack.name, EventReason.ADDRESS_LEAVING, notes[-1])
        return "; ".join(notes)

    async def _become(self, managed: Managed, resource: PacketStack) -> None:
        old, managed.stack.resource = managed.stack.resource, resource
        managed.note(self._run.record)
        self._run.save()
        self._health.watch()
        managed.stack.healthy = self._health.of(managed.stack.name)
        if (old.spec.listeners, old.spec.snat, old.spec.flow_table, old.spec.unknown_flow) != (
            resource.spec.listeners, resource.spec.snat, resource.spec.flow_table, resource.spec.unknown_flow,
        ):  # fmt: skip
            managed.stale = True  # also if what follows fails
            await managed.stack.configure(list(managed.engines.values()))
            managed.stack.direct()
            managed.stale = False
            await to_the_end(managed.stack.count_leaving)
            await self._underlay.route()

    async def remove(self, name: str) -> None:
        """Remove a stack with all that belongs to it. If that fails it is kept, and may be removed again."""
        managed = self._stacks.find(name)
        await self._keeper.end(managed)
        try:
            await self._take_down(managed)
        except BaseException:
            self._keeper.begin(managed)
            raise
        self._health.watch()
        record = self._run.record
        for part in (record.documents, record.sets, record.indexes, record.pinned, record.tables, record.rebalanced):
            part.pop(name, None)
        for one in self._forgetful:
            one.forget(name)
        try:
            await self._underlay.route()
        except Exception as e:  # the stack is gone all the same
            self._journal.event(name, EventReason.ROUTES_FAILED, str(e))
        await asyncio.to_thread(self._run.remove_stack, name)

    async def _take_down(self, managed: Managed) -> None:
        await self._life.end_all(managed)
        async with managed.busy:
            for engine in list(managed.engines.values()):
                await self._life.destroy(managed, engine)
            managed.stack.close()
            del self._stacks[managed.stack.name]


def _first_shard(table: FlowTable | None) -> str:
    """Shard layout that a new stack begins with: its build's. In a cluster the table says it. Blocks."""
    if table is None:
        return builds.shard_of(builds.installed())
    return next((s.shard or shards.FIRST for s in table.spec.sets or () if s.state == "Current"), "")


def _check_leaving(wanted: dict[str, PacketStack], owners: dict[Address, str], there: dict[str, Managed]) -> None:
    """No stack may take a SNAT address that flows of another one still have, or make one its virtual address."""
    for name, managed in there.items():
        stack, own = managed.stack, wanted.get(name, managed.stack.resource)
        left = {*stack.resource.snat_addresses(), *stack.leaving} - set(own.snat_addresses())
        claimed = {a for a in left if a in owners}
        if not claimed:
            continue
        flows = stack.snat_flows()
        for address in sorted((a for a in claimed if flows.get(a)), key=packed):
            raise AgentError(
                f"stack {owners[address]}: AddressConflict: {address} was a SNAT address of stack {name}, and is in "
                f"use by {counted(flows[address], 'flow')} still; use another address, or wait until they end"
            )
