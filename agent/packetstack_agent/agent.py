"""The agent: stacks, engines and flow tables of one node, kept as their resources say.

One task per stack observes, asks the pure planner, and acts; it is woken by changes and once a second, and
every step may be repeated. The verbs below are what the CLI calls.
"""

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from packetstack_agent import engines, loading, namespaces, networks, nftables, processes
from packetstack_agent.balancing import Balancers
from packetstack_agent.counting import census
from packetstack_agent.director import Director
from packetstack_agent.engine_life import EngineLife, is_lost
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.firewall import Firewall, Mode, Obstacle
from packetstack_agent.journal import Background, Journal
from packetstack_agent.natives import call, constant, ffi, lib, packed, text
from packetstack_agent.node import RunDirectory, clean
from packetstack_agent.probes import Prober, Watched
from packetstack_agent.scaling import Autoscalers
from packetstack_agent.shedding import Shedders
from packetstack_agent.stacks import Managed, Stack
from packetstack_agent.status import Status, explain
from packetstack_agent.threads import to_the_end
from packetstack_agent.watchdog import Watchdog
from packetstack_core import following, kinds, reading, reconciling
from packetstack_core.kinds import FlowTable, FlowTableSpec
from packetstack_core.planning import Move, Owner, State
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import EventReason
from packetstack_core.reconciling import (
    ActivateEngine,
    AssignBuckets,
    CreateEngine,
    Desired,
    DrainEngine,
    Observed,
    RemoveEngine,
)
from packetstack_core.resources import PacketStack
from packetstack_core.values import Address, Network
from packetstack_core.wording import counted

T = TypeVar("T")

TICK_SECONDS = 1.0
LOAD_SECONDS = 5.0
"""Over which load is taken when an engine has to go."""
LOOK_SECONDS = 5.0
"""How often routes and programs are looked after when nothing tells that they changed."""
RULES_SECONDS = 0.1
"""From the first change of the node's packet filter until it is looked at: changes come in showers."""
UPGRADE_SECONDS = 10.0
REGAIN_SECONDS = 2.0
"""How long running datapaths may take to find a restarted agent."""


class Agent:
    """All verbs run on the event loop; what blocks runs in worker threads."""

    def __init__(self, run: RunDirectory, foreign: str = "") -> None:
        self.run = run
        self.foreign = foreign
        """Why the agent stands by: another build made what is there. It serves on, and nothing of it is touched."""
        self.begin_anew: Callable[[], None] = lambda: None
        """End, and begin again without it."""
        self.stacks: dict[str, Managed] = {}
        self.unread: dict[str, str] = {}
        """Stacks of the record that cannot be read, and why. Their engines serve; nothing of them is touched."""
        self.journal = Journal()
        self.event, self.events = self.journal.event, self.journal.events
        self.background = Background(self.journal)
        self.prober = Prober(self._health_changed)
        self.autoscalers = Autoscalers(self)
        self.balancers = Balancers(self)
        self.firewall = Firewall()
        self.shedders = Shedders(self)
        self._director = Director()
        self.life = EngineLife(run, self.stacks, self.journal, self.background, self._director)
        self.watchdog = Watchdog(self.stacks, self.journal, self.background, self.life)
        self.status: Status
        """There from `start` on."""
        self._attached: tuple[networks.Pair, dict[str, int]] | None = None
        """Pair and uplinks (name -> interface index) that the director was last put on."""
        self._obstacles: tuple[Obstacle, ...] = ()
        """In the node's packet filter, as last told."""
        self._own: Any = None
        """The node's own addresses, as the director knows them."""
        self._watches: list[asyncio.Task[None]] = []
        self._node = asyncio.Lock()
        """Held while routes, proxied addresses and attached programs are being changed."""
        self.applying = asyncio.Lock()
        """Held while stacks come, go or become others."""
        self.followed: Callable[[Managed], None] = lambda _: None
        """Called when a stack has been brought nearer to its flow table, or could not be."""

    # ---- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the programs, make the routed pair, go on with what an earlier agent left. AgentError if that cannot be."""
        if self.foreign:
            self.journal.event("-", EventReason.LAYOUT_MISMATCH, f"{self.foreign}; this agent stands by")
            return
        record, here = self.run.record, namespaces.own_inode()
        if record.documents and record.network != here:
            raise AgentError(
                f"{self.run.path}: its stacks are in another network namespace; start the agent there, as in nsenter --net"
            )
        record.network = here
        self.run.save(must=True)
        await asyncio.to_thread(self._director.open, self.run.pins)
        self.status = Status(
            self._director.handle, self.prober, self.autoscalers, self.balancers, self.shedders, self.firewall
        )
        self.firewall.mode = Mode(record.firewall)
        await asyncio.to_thread(self._attach)
        await self._take_over()
        watches = (
            self._watch_node,
            self._watch_firewall,
            self._measure_rates,
            self.watchdog.run,
            self.shedders.run,
            self.autoscalers.run,
            self.balancers.run,
        )
        for work in watches:
            self._watches.append(asyncio.create_task(work()))

    async def _take_over(self) -> None:
        """Stacks and engines of the record, as they are: packets flow by the pinned table meanwhile."""
        record = self.run.record
        for name in record.documents:
            try:
                self.stacks[name] = await asyncio.to_thread(self._read, name)
            except ResourceError as e:
                self._leave_unread(name, _unreadable(e.problems[0]))
            except AgentError as e:  # about one of its files
                self._leave_unread(name, str(e))
            except (LookupError, TypeError, ValueError, AttributeError, OSError) as e:
                self._leave_unread(name, _unreadable(f"{type(e).__name__}: {e}"))
        for slot, known in list(record.engines.items()):
            if isinstance(known, dict) and known.get("stack") in self.stacks:
                await self.life.regain(self.stacks[known["stack"]], int(slot), known)
        if not self.stacks:
            return
        for watched in self._backends():
            if was_unhealthy(record.unhealthy, watched):
                self.prober.expect_unhealthy(watched)
        self._watch_backends()
        deadline = time.monotonic() + REGAIN_SECONDS
        for engine in [e for m in self.stacks.values() for e in m.engines.values()]:
            attachments = engine.attachments  # gone as soon as a fresh process finds that the descriptors are lost
            if attachments is not None and await asyncio.to_thread(engines.populated, engine):
                await attachments.until(partial(_is_ready, engine), deadline - time.monotonic())
        for managed in self.stacks.values():
            for engine in list(managed.engines.values()):
                if engine.view is None and engine.making is None:
                    await self.life.rebuild(managed, engine, "no process has its descriptors any more")
            managed.stale = True
            await self._refresh(managed)
        await self._routes()
        for name, managed in self.stacks.items():
            managed.task = asyncio.create_task(self._keep(managed))
            self.journal.event(name, EventReason.AGENT_STARTED, f"took over {counted(len(managed.engines), 'engine')}")

    def _read(self, name: str) -> Managed:
        """A stack of the record. Any error if something is missing or has another form. Blocks."""
        record = self.run.record
        resource, index = reading.parse(record.documents[name]), int(record.indexes[name])
        pinned = {int(b): int(slot) for b, slot in record.pinned.get(name, {}).items()}
        table, generation = None, 0
        if name in record.tables:
            table = kinds.read(FlowTable, record.tables[name])
            generation = int(record.tables[name]["metadata"]["generation"])
        stack = Stack(name, resource, index, self.run.stack(name), self._director.handle)
        for slot, known in record.engines.items():
            if isinstance(known, dict) and known.get("stack") == name:
                self.life.blueprint(stack, known), State(known["state"]), int(slot), tuple(known["init"])
        return Managed(stack, pinned=pinned, table=table, generation=generation)

    def _leave_unread(self, name: str, why: str) -> None:
        self.unread[name] = why
        self.journal.event(name, EventReason.RECORD_UNREADABLE, f"{why}; it is left alone, its engines serve")

    async def stop(self) -> None:
        """Remove everything, in the order in which nothing is missed. What cannot be read stays, as with `leave`."""
        self.life.end()
        for name in list(self.stacks):
            await self._remove_stack(name)
        await self._halt()
        if not self.unread:
            await asyncio.to_thread(clean, self.run)

    async def leave(self) -> None:
        """End, and leave all as it is: engines go on, and the next agent takes them over."""
        self.life.end()
        for managed in self.stacks.values():
            if managed.task is not None:
                managed.task.cancel()
                await asyncio.gather(managed.task, return_exceptions=True)
        await self._halt()
        for managed in self.stacks.values():
            for engine in managed.engines.values():
                if engine.making is not None:
                    await asyncio.wait([engine.making])
                if engine.attachments is not None:
                    await engine.attachments.close()

    async def _halt(self) -> None:
        self.prober.close()
        async with self._node:  # so that no thread is using the director
            for task in self._watches:
                task.cancel()
            await asyncio.gather(*self._watches, return_exceptions=True)
        await self.background.ended()
        self._director.close()

    @property
    def director(self) -> Any:
        """`struct ps_director *`, None while it is not open."""
        return self._director.handle

    def _managed(self, name: str) -> Managed:
        try:
            return self.stacks[name]
        except KeyError:
            if self.foreign:
                raise AgentError(self.foreign) from None
            self._check_read(name)
            known = ", ".join(sorted(self.stacks)) or "none"
            raise AgentError(f"stack {name}: not found; stacks of this agent: {known}") from None

    def _check_read(self, name: str) -> None:
        if name in self.unread:
            raise AgentError(f"stack {name}: is left alone, its engines serve: {self.unread[name]}")

    # ---- applying --------------------------------------------------------------------------------------------

    async def apply(self, documents: Sequence[dict[str, Any]], uplinks: Sequence[str]) -> list[dict[str, str]]:
        """Make the stacks what the documents say. Everything is checked before anything is changed."""
        wanted = [reading.parse(d) for d in documents]
        roles = dict(networks.uplink_role(u) for u in uplinks)
        await asyncio.to_thread(self._check, {r.name: r for r in wanted}, dict(self.stacks))
        for resource in wanted:
            _check_local(resource)
        before: dict[str, str] = {}
        fresh: dict[str, str] = {}
        try:
            async with self._node:
                before = self._roles()
                for name, role in roles.items():
                    if before.get(name) != role:
                        fresh[name] = role
                        await to_the_end(self._attach_uplink, name, role)
            return await self._apply(wanted)
        except BaseException:
            async with self._node:
                for name in fresh:
                    with contextlib.suppress(AgentError):
                        if name in before:
                            await to_the_end(self._attach_uplink, name, before[name])
                        else:
                            await to_the_end(self._detach_uplink, name)
            raise

    async def _apply(self, wanted: Sequence[PacketStack]) -> list[dict[str, str]]:
        results = []
        for resource in wanted:
            managed = self.stacks.get(resource.name)
            if managed is not None and resource.spec.autoscaling is not None:
                resource = reading.with_replicas(resource, managed.stack.resource.spec.replicas)
            if managed is None:
                await self._add_stack(resource.name, resource)
                results.append({"stack": resource.name, "result": "created"})
            elif managed.stack.resource == resource:
                results.append({"stack": resource.name, "result": "unchanged"})
            else:
                note = await self._change_stack(managed, resource)
                results.append({"stack": resource.name, "result": "changed", "note": note})
        return results

    def _check(self, wanted: dict[str, PacketStack], there: dict[str, Managed]) -> None:
        """Whether stacks can become what is wanted; AgentError if not. `there`: those of now. Blocks."""
        after = {name: m.stack.resource for name, m in there.items()} | wanted
        if len(after) > constant("PS_MAX_STACKS"):
            raise AgentError(f"{len(after)} stacks: a node takes at most {constant('PS_MAX_STACKS')}")
        owners: dict[Any, str] = {}
        for name, resource in after.items():
            for address in (*resource.virtual_addresses(), *resource.snat_addresses()):
                if owners.setdefault(address, name) != name:
                    raise AgentError(
                        f"stack {name}: AddressConflict: {address} belongs to stack {owners[address]}; use another address"
                    )
        _check_leaving(wanted, owners, there)
        for name, resource in wanted.items():
            self._check_read(name)
            old = there.get(name)
            if old is not None:
                reading.check_change(old.stack.resource, resource)
            networks.check_forwarding(a.version for a in resource.virtual_addresses())
            networks.check_not_local(resource.prefixes())

    async def set_uplinks(self, wanted: Sequence[str]) -> None:
        """Run the director on exactly these, interfaces or networks. One that cannot be only costs speed: it is told."""
        names = []
        for uplink in wanted:
            try:
                name, role = networks.uplink_role(uplink)
                if "/" in name:
                    name = await asyncio.to_thread(networks.with_address_in, ip_network(name, strict=False))
                names.append(name)
                async with self._node:
                    if self._roles().get(name) != role:
                        await to_the_end(self._attach_uplink, name, role)
            except (AgentError, ValueError) as e:
                self.journal.event(
                    "-", EventReason.UPLINK_FAILED, f"--uplink {uplink}: {e}; its packets come by the routed pair"
                )
        async with self._node:
            for name in self._roles().keys() - set(names):
                await to_the_end(self._detach_uplink, name)

    def _roles(self) -> dict[str, str]:
        """The uplinks and their roles."""
        return dict(map(networks.uplink_role, self.run.record.uplinks))

    def _attach_uplink(self, name: str, role: str) -> None:
        index = networks.index_of(name)
        if name.startswith((networks.ROUTED, networks.DIRECTOR)):
            raise AgentError(f"interface {name}: is the agent's own; name one that leads to the network")
        roles = self._roles()
        networks.direct_uplinks(self._director.handle, {**roles, name: role})
        try:
            call(lib().ps_director_attach, self._director.handle, index, constant("PS_ROLE_UPLINK"), _pin(name))
        except AgentError:
            networks.direct_uplinks(self._director.handle, roles)
            raise
        self.run.record.uplinks = [networks.uplink_text(n, r) for n, r in {**roles, name: role}.items()]
        self.run.save(must=True)
        if self._attached is not None:
            self._attached[1][name] = index

    def _detach_uplink(self, name: str) -> None:
        roles = self._roles()
        if name in roles:
            with contextlib.suppress(AgentError):
                call(lib().ps_director_detach, self._director.handle, _pin(name))
            del roles[name]
            self.run.record.uplinks = [networks.uplink_text(n, r) for n, r in roles.items()]
            self.run.save()
            if self._attached is not None:
                self._attached[1].pop(name, None)
            networks.direct_uplinks(self._director.handle, roles)

    def _direct_own(self) -> None:
        """Tell the director the node's own addresses. Blocks."""
        found = networks.own_addresses()
        if found == self._own:
            return
        kinds = (constant("PS_OWN_NODE"), constant("PS_OWN_BROADCAST"))
        listed = [(packed(a), kind) for group, kind in zip(found, kinds, strict=True) for a in group]
        addresses, marks = b"".join(a for a, _ in listed), bytes(kind for _, kind in listed)
        call(lib().ps_director_node, self._director.handle, addresses, marks, len(listed))
        self._own = found

    def _attach(self) -> bool:
        """Pair and director on it and on the uplinks, whatever was taken away; returns whether something was. Blocks."""
        pair = networks.ensure_pair(self.run.owner)
        self._direct_own()
        call(lib().ps_director_attach, self._director.handle, pair.director, constant("PS_ROLE_ROUTED"), b"routed")
        call(lib().ps_routed_attach, self._director.handle, pair.routed, pair.routed_mac)
        uplinks = networks.direct_uplinks(self._director.handle, self._roles())
        for name, index in uplinks.items():
            with contextlib.suppress(AgentError):  # packets come by the routed pair or not at all
                call(lib().ps_director_attach, self._director.handle, index, constant("PS_ROLE_UPLINK"), _pin(name))
        changed = self._attached not in (None, (pair, uplinks))
        self._attached = pair, uplinks
        return changed

    async def _add_stack(self, name: str, resource: PacketStack, table: FlowTable | None = None) -> Managed:
        used = {m.stack.index for m in self.stacks.values()}
        for other in self.unread:
            if other not in self.run.record.indexes:  # any place in the flow tables may be that stack's
                self._check_read(other)
            used.add(self.run.record.indexes[other])
        index = min(i for i in range(constant("PS_MAX_STACKS")) if i not in used)
        self.run.record.indexes[name] = index
        # An agent may have been killed while it made a stack of this name, or ended one.
        await asyncio.to_thread(shutil.rmtree, self.run.stack(name), ignore_errors=True)
        stack = await asyncio.to_thread(Stack, name, resource, index, self.run.stack(name), self._director.handle)
        managed = Managed(stack, table=table)
        self.stacks[name] = managed
        try:
            self.run.record.documents[name] = resource.document()
            self.run.save(must=True)
            self._watch_backends()
            stack.healthy = self.prober.healthy(name)
            await stack.configure([])
            stack.direct()
            await self._routes()
        except BaseException:
            await self._remove_stack(name)
            raise
        managed.task = asyncio.create_task(self._keep(managed))
        self.journal.event(name, EventReason.CREATED, f"{counted(resource.spec.replicas, 'engine')} wanted")
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
        managed.settled = False
        managed.changed.set()
        self.journal.event(managed.stack.name, EventReason.CHANGED, "the resource was changed")
        notes = []
        if gone:
            names = ", ".join(f"{protocol} {address} port {port}" for address, port, protocol in sorted(gone, key=str))
            notes.append(f"flows of the removed listener {names} end")
        if used := {a: n for a, n in managed.stack.leaving.items() if n}:
            shown = ", ".join(f"{a} ({counted(used[a], 'flow')})" for a in sorted(used, key=packed))
            notes.append(f"SNAT address {shown} takes no new flows, and leaves when those end")
            self.journal.event(managed.stack.name, EventReason.ADDRESS_LEAVING, notes[-1])
        return "; ".join(notes)

    async def _become(self, managed: Managed, resource: PacketStack) -> None:
        old, managed.stack.resource = managed.stack.resource, resource
        self.run.record.documents[managed.stack.name] = resource.document()
        self.run.save()
        self._watch_backends()
        managed.stack.healthy = self.prober.healthy(managed.stack.name)
        if (old.spec.listeners, old.spec.snat, old.spec.flow_table, old.spec.unknown_flow) != (
            resource.spec.listeners, resource.spec.snat, resource.spec.flow_table, resource.spec.unknown_flow,
        ):  # fmt: skip
            managed.stale = True  # also if what follows fails
            await managed.stack.configure(list(managed.engines.values()))
            managed.stack.direct()
            managed.stale = False
            await to_the_end(managed.stack.count_leaving)
            await self._routes()

    async def _let_go(self) -> None:
        """What only older configurations name, and no flow any more, is nobody's from now on."""
        for name, managed in list(self.stacks.items()):
            if not managed.stack.unsettled or managed.busy.locked():
                continue
            async with managed.busy:
                if self.stacks.get(name) is not managed:
                    continue
                gone = await to_the_end(managed.stack.settle, list(managed.engines.values()))
                if gone:
                    self.journal.event(
                        name,
                        EventReason.ADDRESS_RELEASED,
                        f"SNAT address {', '.join(map(str, gone))}: no flow has it any more",
                    )

    async def _routes(self) -> None:
        async with self._node:
            await to_the_end(self._route, *self._wanted())
        self._tell_of_firewall()

    def _wanted(self) -> tuple[set[Network], set[Address]]:
        """What to route here, and the addresses in it: those of all stacks, as they are now."""
        there = [m.stack for m in self.stacks.values()]
        return {p for stack in there for p in stack.prefixes()}, {a for stack in there for a in stack.addresses()}

    def _route(self, prefixes: set[Network], addresses: set[Address]) -> list[Network]:
        """Routes, and answers to ARP and neighbour discovery, for exactly these. Returns routes that were gone. Blocks."""
        added = networks.ensure_routes(prefixes, keep=bool(self.unread))
        record = self.run.record
        wanted = networks.on_link(addresses) if addresses else {}
        for device, found in wanted.items():
            every = sorted({*record.proxied.get(device, []), *(str(a) for a in found)})
            if record.proxied.get(device) != every:
                record.proxied[device] = every
                self.run.save()
            networks.answer_for(device, found, record.sysctls)
        for device, names in list(record.proxied.items()):
            keep = {str(a) for a in wanted.get(device, [])}
            if keep == set(names) or self.unread:
                continue
            networks.answer_no_more(device, [ip_address(a) for a in names if a not in keep])
            record.proxied[device] = sorted(keep)
            if not keep:
                del record.proxied[device]
        self.run.save()
        self._open_firewall()
        return added

    async def set_firewall(self, mode: str) -> None:
        """Who changes the node's packet filter from now on: a `Mode`."""
        try:
            self.firewall.mode = Mode(mode)
        except ValueError:
            raise AgentError(f"--firewall {mode}: is not known; use {' or '.join(Mode)}") from None
        if self.run.record.firewall != mode:
            self.run.record.firewall = mode
            self.run.save()
            await self._routes()

    def _tell_of_firewall(self) -> None:
        """Events of what has changed since the last look at the node's packet filter."""
        put_back, self.firewall.put_back = self.firewall.put_back, []
        if put_back:
            message = f"{', '.join(put_back)}: rules of ours were gone and are there again"
            self.journal.event("-", EventReason.FIREWALL_RESTORED, message)
        before, self._obstacles = self._obstacles, self.firewall.obstacles
        for found in self._obstacles:
            message = f"{found.message}; {found.remedy}"
            if found not in before and found.sure:
                self.journal.event("-", EventReason.FIREWALL_IN_THE_WAY, message)
            elif found not in before:
                self.journal.event("-", EventReason.FIREWALL_UNCLEAR, message)
        if before and not self._obstacles:
            self.journal.event("-", EventReason.FIREWALL_OPEN, "the node's packet filter lets packets of stacks pass")

    async def follow(self, name: str, table: FlowTable, generation: int) -> None:
        """Make packets see this flow table, from now on. AgentError or ResourceError if that cannot be."""
        resource = table.stack()
        async with self.applying:
            managed = self.stacks.get(name)
            if managed is not None and managed.generation == generation and managed.table == table:
                return
            if managed is None or managed.stack.resource != resource:
                await asyncio.to_thread(self._check, {name: resource}, dict(self.stacks))
            if managed is None:
                managed = await self._add_stack(name, resource, table)
            elif managed.stack.resource.spec.model_copy(update={"replicas": 0}) != resource.spec.model_copy(
                update={"replicas": 0}
            ):
                await self._change_stack(managed, resource)
            else:
                managed.stack.resource = resource
                self.run.record.documents[name] = resource.document()
            managed.table, managed.generation = table, generation
            managed.settled = False  # until packets have been seen to follow it
            kept = table.document()
            kept["metadata"]["generation"] = generation
            self.run.record.tables[name] = kept
            self.run.save()
            managed.changed.set()

    async def delete(self, name: str) -> None:
        """End a stack: its addresses, engines and flows."""
        live = self._managed(name).stack.live()
        await self._remove_stack(name)
        self.journal.event(name, EventReason.DELETED, f"{live} live flows ended")

    async def _remove_stack(self, name: str) -> None:
        managed = self._managed(name)
        if managed.task is not None:
            managed.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await managed.task
        async with managed.busy:
            for engine in list(managed.engines.values()):
                await self.life.destroy(managed, engine)
            managed.stack.close()
            del self.stacks[name]
        self._watch_backends()
        record = self.run.record
        for part in (record.documents, record.indexes, record.pinned, record.tables, record.rebalanced):
            part.pop(name, None)
        self.autoscalers.forget(name)
        self.balancers.forget(name)
        self.shedders.forget(name)
        try:
            await self._routes()
        except Exception as e:  # the stack is gone all the same
            self.journal.event(name, EventReason.ROUTES_FAILED, str(e))
        shutil.rmtree(self.run.stack(name), ignore_errors=True)

    # ---- backends --------------------------------------------------------------------------------------------

    def _backends(self) -> list[Watched]:
        return [
            (name, (e.address, e.port), li.health_check)
            for name, managed in self.stacks.items()
            for li in managed.stack.resource.spec.listeners
            for e in li.backends.endpoints or ()
        ]

    def _watch_backends(self) -> None:
        self.prober.watch(self._backends())

    def _health_changed(self, watched: Watched, healthy: bool) -> None:
        name, place, check = watched
        managed = self.stacks.get(name)
        if managed is None:
            return
        listeners = [
            li.name
            for li in managed.stack.resource.spec.listeners
            if li.health_check == check and place in {(e.address, e.port) for e in li.backends.endpoints or ()}
        ]
        said = "answers the probes" if healthy else "does not answer the probes and gets no new flows"
        reason = EventReason.BACKEND_HEALTHY if healthy else EventReason.BACKEND_UNHEALTHY
        self.journal.event(name, reason, f"{place[0]} port {place[1]} {said} of listener {', '.join(listeners)}")
        managed.stale = True
        managed.changed.set()
        self.run.record.unhealthy = [
            [str(place[0]), place[1], name, check.model_dump(mode="json", by_alias=True)]
            for name, place, check in self.prober.unhealthy()
        ]
        self.run.save()

    async def _refresh(self, managed: Managed) -> None:
        """Write what has become known since the last configuration. What fails is told, and tried again in the next round."""
        if not managed.stale and managed.stack.due > time.monotonic():  # a backend that starts slowly may get more
            return
        async with managed.busy:
            stale, managed.stale = managed.stale, False  # it is set again by whoever learns more meanwhile
            try:
                managed.stack.healthy = self.prober.healthy(managed.stack.name)
                await managed.stack.configure(list(managed.engines.values()))
                if stale:
                    managed.stack.direct()
            except BaseException as e:
                managed.stale = True
                if not isinstance(e, AgentError):
                    raise
                self.journal.event(managed.stack.name, EventReason.FAILED, f"{e}; it is tried again")

    # ---- keeping a stack -------------------------------------------------------------------------------------

    async def _keep(self, managed: Managed) -> None:
        while True:
            managed.changed.clear()
            try:
                await self._step(managed)
            except AgentError as e:
                self.journal.event(managed.stack.name, EventReason.FAILED, str(e))
            except Exception as e:  # a bug: the next round may do better, the other stacks go on
                self.journal.event(managed.stack.name, EventReason.INTERNAL_ERROR, f"{type(e).__name__}: {e}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await managed.changed.wait()

    async def _step(self, managed: Managed) -> None:
        """Observe, plan, act; once more while that changes something at once."""
        if managed.table is not None:
            await self._step_after(managed, managed.table.spec)
            return
        for _ in range(8):
            await self._refresh(managed)
            if managed.stack.open_fences():
                # An engine did not answer, or the agent was interrupted: finish before anything new.
                await self._transfer(managed, ())
            actions = reconciling.plan(Desired.of(managed.stack.resource), self._observe(managed), time.monotonic())
            managed.settled = not actions and not managed.stack.open_fences()
            if not actions:
                return
            waiting = False
            for action in actions:
                waiting |= await self._act(managed, action)
            if waiting and all(isinstance(a, CreateEngine) for a in actions):
                return

    async def _step_after(self, managed: Managed, table: FlowTableSpec) -> None:
        """Follow the flow table, as far as that is possible now."""
        for _ in range(8):
            await self._refresh(managed)
            if managed.stack.open_fences():
                await self._transfer(managed, ())
            for wanted in table.engines:
                engine = next((e for e in managed.engines.values() if e.blueprint.id == wanted.id), None)
                state = State(wanted.state)
                if engine is not None and State.PENDING not in (engine.state, state) and engine.state is not state:
                    self.life.become(engine, state)
            stack = managed.stack
            steps = following.follow(
                table, _attached(managed), stack.owners(), stack.open_fences(), stack.shard_slots()
            )
            if time.monotonic() < managed.create_after:
                steps = [s for s in steps if not isinstance(s, following.Attach)]
            again = False
            for step in steps:
                match step:
                    case following.Attach(wanted):
                        self.life.attach(managed, wanted)
                    case following.Assign(moves):
                        again |= bool((await self._transfer(managed, moves, "by the flow table"))["moved"])
                    case following.Detach(slot):
                        self.life.remove(managed, slot)
            if not again:
                break
        managed.settled = not managed.stack.open_fences() and following.settled(
            table, _attached(managed), managed.stack.owners()
        )
        self.followed(managed)

    def _observe(self, managed: Managed) -> Observed:
        stack = managed.stack
        flows, held = stack.flows_by_slot(), stack.held()
        loads, now = _loads(managed), time.monotonic()
        seen = [
            reconciling.Engine(
                e.slot, e.state, e.ready, e.blueprint.template, e.blueprint.queues, flows.get(e.slot, 0),
                holds=0 if is_lost(e, now) else held[e.slot], load=loads.get(e.slot, 0.0),
            )
            for e in managed.engines.values()
            if not e.removing
        ]  # fmt: skip
        stay = {e.slot for e in seen if e.state is State.ACTIVE}
        if any(slot not in stay for slot in managed.pinned.values()):
            managed.pinned = {b: slot for b, slot in managed.pinned.items() if slot in stay}
            self._note_pinned(managed)
        fixed = managed.pinned if len(seen) <= stack.resource.spec.replicas else {}
        return Observed(
            seen, stack.owners(), frozenset(fixed) | stack.open_fences(), managed.create_after,
            rebalanced=stack.resource.spec.rebalance.mode != "Off" and self.run.record.rebalanced.get(stack.name, False),
        )  # fmt: skip

    def _note_pinned(self, managed: Managed) -> None:
        self.run.record.pinned[managed.stack.name] = {str(b): slot for b, slot in managed.pinned.items()}
        self.run.save()

    async def _act(self, managed: Managed, action: reconciling.Action) -> bool:
        """Carry out one action; returns whether its effect comes later."""
        name = managed.stack.name
        match action:
            case CreateEngine():
                self.life.create(managed, action)
                return True
            case ActivateEngine(slot):
                if engine := managed.engines.get(slot):  # else it has gone since it was observed
                    self.journal.event(name, EventReason.ENGINE_ACTIVE, f"engine {slot} was {engine.state}")
                    self.life.become(engine, State.ACTIVE)
            case DrainEngine(slot):
                if engine := managed.engines.get(slot):
                    self.life.become(engine, State.DRAINING)
                    self.journal.event(name, EventReason.ENGINE_DRAINING, f"engine {slot} hands its buckets over")
            case AssignBuckets(moves):
                await self._transfer(managed, moves)
            case RemoveEngine(slot):
                self.life.remove(managed, slot)
        return False

    async def _transfer(self, managed: Managed, moves: Sequence[Move], why: str = "as planned") -> dict[str, Any]:
        async with managed.busy:
            report = await to_the_end(managed.stack.transfer, list(managed.engines.values()), moves)
        managed.moved += report.moved
        managed.holds_ns.extend(report.hold_ns)
        longest = max(report.hold_ns, default=0) / 1e6
        if report.moved:
            buckets = counted(report.moved, "bucket")
            message = f"{buckets} by {counted(report.fences, 'fence')}, the longest {longest:.2f} ms"
            self.journal.event(managed.stack.name, EventReason.BUCKETS_MOVED, message)
            self.balancers.of(managed).note(buckets, why)
        engine = managed.engines.get(report.stalled)
        if report.stalled:
            self.journal.event(
                managed.stack.name, EventReason.ENGINE_DOES_NOT_ANSWER,
                f"engine {report.stalled} has not answered its markers; nothing is released until it does",
            )  # fmt: skip
            if engine is not None:
                self.watchdog.fence_missed(engine, time.monotonic())
        else:
            self.watchdog.fences_answered(managed.engines.values())
        return {
            "moved": report.moved,
            "fences": report.fences,
            "longestMilliseconds": longest,
            "stalled": report.stalled,
        }

    async def rebalance(self, managed: Managed, moves: Sequence[Move], why: str) -> int:
        """Move buckets for the load's sake: from now on their numbers need not be even. -> how many were moved"""
        self.run.record.rebalanced[managed.stack.name] = True
        self.run.save(must=True)  # else the next plan would move them back
        return int((await self._transfer(managed, moves, why))["moved"])

    def even_out(self, managed: Managed) -> None:
        """Engines shall have equally many buckets again."""
        if self.run.record.rebalanced.pop(managed.stack.name, None):
            self.run.save()
            managed.settled = False
            managed.changed.set()

    # ---- watching the node -----------------------------------------------------------------------------------

    async def _watch_node(self) -> None:
        """Routes vanish silently when links change, programs can be detached: put them back."""
        loop = asyncio.get_running_loop()
        watcher = networks.change_socket()
        try:
            while True:
                with contextlib.suppress(OSError):  # a TimeoutError too; an overflow means that much has changed
                    async with asyncio.timeout(LOOK_SECONDS):
                        await loop.sock_recv(watcher, 65536)
                await asyncio.sleep(0.05)
                while True:
                    try:
                        watcher.recv(65536)
                    except OSError:
                        break
                try:
                    await self._let_go()
                    async with self._node:
                        attached = await to_the_end(self._attach)
                        added = await to_the_end(self._route, *self._wanted())
                    used = {e.blueprint.directory.name for m in self.stacks.values() for e in m.engines.values()}
                    await to_the_end(self._forget_pods, used)
                except Exception as e:
                    self.journal.event("-", EventReason.ROUTES_FAILED, str(e))
                else:
                    self._tell_of_firewall()
                    if attached:
                        self.journal.event("-", EventReason.DIRECTOR_ATTACHED, "a link came, went or was made anew")
                    if added:
                        self.journal.event("-", EventReason.ROUTES_RESTORED, ", ".join(str(p) for p in added))
        finally:
            watcher.close()

    async def _watch_firewall(self) -> None:
        """Rules are flushed and loaded anew by their owners at any time; `_watch_node` looks in between too."""
        loop = asyncio.get_running_loop()
        try:
            watcher = nftables.change_socket()
        except OSError:
            return
        took = 0.0
        with watcher:
            while True:
                with contextlib.suppress(OSError):  # an overflow means that much has changed
                    await loop.sock_recv(watcher, 65536)
                await asyncio.sleep(max(RULES_SECONDS, 10 * took))  # never more than a tenth of a core
                while True:
                    try:
                        watcher.recv(65536)
                    except BlockingIOError:
                        break
                    except OSError:
                        continue
                try:
                    async with self._node:
                        began = time.monotonic()
                        await to_the_end(self._open_firewall)
                        took = time.monotonic() - began
                except Exception as e:
                    self.journal.event("-", EventReason.FIREWALL_FAILED, str(e))
                else:
                    self._tell_of_firewall()

    def _open_firewall(self) -> None:
        """Whatever is routed to stacks shall pass the node's packet filter. Blocks."""
        self.firewall.ensure(networks.routed(), self.run.record.uplinks)

    def _forget_pods(self, used: set[str]) -> None:
        """Remove the directories of pods that have gone, but none that is in use. Blocks."""
        leaving = self.run.record.leaving
        for name, uid in list(leaving.items()):
            if name not in used and not processes.of_pod(uid) and leaving.get(name) == uid:
                shutil.rmtree(self.run.engine(name), ignore_errors=True)
                leaving.pop(name)
        self.run.save()

    async def _measure_rates(self) -> None:
        told = ""
        while True:
            if self.run.unsaved:
                self.run.save()
            if self.run.unsaved != told:
                told = self.run.unsaved
                message = told or "is written again"
                self.journal.event("-", EventReason.RECORD_NOT_WRITTEN if told else EventReason.RECORD_WRITTEN, message)
            for managed in self.stacks.values():
                try:
                    managed.history.add(loading.snapshot(managed), time.time())
                except AgentError:
                    pass  # an engine is going: the next look does without it
                except Exception as e:
                    self.journal.event(managed.stack.name, EventReason.INTERNAL_ERROR, f"load: {type(e).__name__}: {e}")
            await asyncio.sleep(1.0)

    # ---- verbs -----------------------------------------------------------------------------------------------

    def get(self, name: str | None = None) -> list[dict[str, Any]]:
        """Stacks as they are, with status."""
        chosen = [self._managed(name)] if name is not None else [self.stacks[n] for n in sorted(self.stacks)]
        return [self.status.of(m) for m in chosen]

    async def scale(self, name: str, replicas: int) -> dict[str, Any]:
        """Set spec.replicas, as the scale subresource does."""
        managed = self.planned(name)
        was, note = self.set_replicas(managed, replicas), ""
        if was != replicas:
            self.journal.event(name, EventReason.SCALED, f"from {was} to {counted(replicas, 'engine')}")
            if self.autoscalers.step_aside(managed, "packetstack scale"):
                note = "its autoscaler changes nothing any more; packetstack explain says how to give the size back"
        return {"from": was, "to": replicas, "note": note}

    def set_replicas(self, managed: Managed, replicas: int) -> int:
        """Make it spec.replicas; returns what it was."""
        was = managed.stack.resource.spec.replicas
        managed.stack.resource = reading.with_replicas(managed.stack.resource, replicas)
        managed.settled = False
        self.run.record.documents[managed.stack.name] = managed.stack.resource.document()
        self.run.save()
        managed.changed.set()
        return was

    async def move_buckets(self, name: str, buckets: Sequence[int], slot: int, queue: int | None) -> dict[str, Any]:
        """Give buckets to an engine; they stay there while it does."""
        managed = self.planned(name)
        engine = self._active(managed, slot)
        wrong = [b for b in buckets if type(b) is not int or not 0 <= b < managed.stack.buckets]
        if wrong:
            raise AgentError(f"bucket {wrong[0]}: not there; stack {name} has buckets 0 to {managed.stack.buckets - 1}")
        if queue is not None and (type(queue) is not int or not 0 <= queue < engine.blueprint.queues):
            raise AgentError(f"engine {slot}: has no queue {queue}; use 0 to {engine.blueprint.queues - 1}")
        owners = managed.stack.owners()
        moves = [
            Move(b, Owner(slot, b % engine.blueprint.queues if queue is None else queue))
            for b in buckets
            if queue is not None or (owner := owners[b]) is None or owner.slot != slot
        ]
        managed.pinned |= dict.fromkeys(buckets, slot)
        self._note_pinned(managed)
        result = await self._transfer(managed, moves, "by hand")
        managed.settled = False  # the others are evened out around them
        managed.changed.set()
        return result

    async def move_queue(self, name: str, slot: int, queue: int, core: int) -> dict[str, Any]:
        """Let another core of the engine serve the queue."""
        managed = self._managed(name)
        engine = self._active(managed, slot)
        if not engine.ready:
            raise AgentError(f"engine {slot}: no datapath is attached; wait until it is ready")
        for what, number, there in (("queue", queue, engine.blueprint.queues), ("core", core, engine.blueprint.cores)):
            if type(number) is not int or not 0 <= number < there:
                raise AgentError(f"engine {slot}: has no {what} {number}; use 0 to {there - 1}")
        took = ffi.new("uint64_t *")
        async with managed.busy:  # the engine's memory stays while the thread looks into it
            self._active(managed, slot)
            await to_the_end(call, lib().ps_queue_to_core, engine.fence, queue, core, 2000, took)
        self.balancers.of(managed).note(f"queue {queue} of {loading.name(engine)} to core {core}", "by hand")
        self.journal.event(
            name, EventReason.QUEUE_MOVED, f"queue {queue} of engine {slot} to core {core} in {took[0] / 1000:.0f} us"
        )
        return {"microseconds": took[0] / 1000}

    async def upgrade(self, name: str, slot: int) -> dict[str, Any]:
        """Let a new datapath process, of the build that is installed now, follow the one that serves."""
        managed = self._managed(name)
        engine = self._active(managed, slot)
        before = engine.attachments.serving if engine.attachments is not None else None
        if before is None or engine.init is None or engine.attachments is None:
            raise AgentError(f"engine {slot}: no datapath is attached; wait until it is ready")
        attachments, old = engine.attachments, before.pid
        attachments.refused = ""
        engine.init.signal(signal.SIGHUP)
        await attachments.until(
            lambda: attachments.serving not in (None, before) or bool(attachments.refused), UPGRADE_SECONDS
        )
        if attachments.serving in (None, before):
            why = attachments.refused or f"no new datapath came within {UPGRADE_SECONDS:g} s"
            raise AgentError(f"engine {slot}: {why}; process {old} goes on; see packetstack logs {slot}")
        pause = attachments.pause_seconds * 1000
        self.journal.event(
            name,
            EventReason.ENGINE_UPGRADED,
            f"engine {slot}: datapath {engine.pid} follows {old} after {pause:.2f} ms",
        )
        return {"from": old, "to": engine.pid, "pauseMilliseconds": round(pause, 3)}

    def census(self, name: str) -> dict[int, dict[str, int]]:
        """By slot: frames that are not in exactly one ring. Exact while no packets flow."""
        return {e.slot: census(e) for e in self._managed(name).engines.values() if e.view is not None}

    def explain(
        self, name: str, protocol: str, source: str, sport: int, destination: str, dport: int
    ) -> dict[str, Any]:
        """Where a packet of this flow goes, and why."""
        managed = self._managed(name)
        pods = {e.slot: e.blueprint.pod for e in managed.engines.values() if e.blueprint.pod}
        return explain(managed.stack, pods, protocol, source, sport, destination, dport)

    def planned(self, name: str) -> Managed:
        """A stack that the agent plans for; AgentError for one that follows a table."""
        managed = self._managed(name)
        if managed.table is not None:
            raise AgentError(
                f"stack {name}: follows its FlowTable; change the PacketStack resource, as with kubectl scale"
            )
        return managed

    def _active(self, managed: Managed, slot: int) -> Engine:
        engine = managed.engines.get(slot)
        if engine is None or engine.state is not State.ACTIVE or engine.view is None:
            known = ", ".join(str(s) for s, e in sorted(managed.engines.items()) if e.state is State.ACTIVE) or "none"
            raise AgentError(f"engine {slot}: is not an active engine of stack {managed.stack.name}; active: {known}")
        return engine


def _check_leaving(wanted: dict[str, PacketStack], owners: dict[Any, str], there: dict[str, Managed]) -> None:
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


def _check_local(resource: PacketStack) -> None:
    """What the local runtime cannot do."""
    name, engine = resource.name, resource.spec.engine
    if engine.mode != "AFXDP":
        raise AgentError(f"stack {name}: spec.engine.mode: {engine.mode} is not built yet; use AFXDP")
    if engine.interface.veth is None:
        raise AgentError(f"stack {name}: spec.engine.interface: the local runtime makes veth pairs; use {{veth: {{}}}}")
    if resource.spec.handover.strategy != "Transfer":
        raise AgentError(f"stack {name}: spec.handover.strategy: Mirror is not built yet; use Transfer")
    for listener in resource.spec.listeners:
        if listener.backends.service is not None:
            raise AgentError(
                f"stack {name}: listener {listener.name}: backends.service needs Kubernetes; use endpoints"
            )


def _loads(managed: Managed) -> dict[int, float]:
    """Cores' worth of load by slot, to a tenth, when one of the engines may have to go: less is chance."""
    there = sum(e.state is not State.DRAINING for e in managed.engines.values())
    load = managed.history.load(LOAD_SECONDS) if there > managed.stack.resource.spec.replicas else None
    return {e.id: round(sum(e.cores), 1) for e in load.engines} if load is not None else {}


def _attached(managed: Managed) -> list[following.Attached]:
    return [
        following.Attached(e.blueprint.id, e.slot, e.blueprint.pod_uid, e.ready and e.probed)
        for e in managed.engines.values()
        if not e.removing
    ]


def was_unhealthy(record: Sequence[Sequence[Any]], watched: Watched) -> bool:
    """Whether the record of an earlier agent says so of this backend; that of an earlier build says it of all stacks."""
    name, (address, port), check = watched
    wanted = [str(address), port, name, check.model_dump(mode="json", by_alias=True)]
    return any(list(entry) == wanted[: len(entry)] for entry in record if len(entry) in (2, 4))


def _unreadable(why: str) -> str:
    return f"its entry in state.json cannot be read ({why}); start the agent that wrote it"


def _is_ready(engine: Engine) -> bool:
    return engine.ready


def _pin(uplink: str) -> bytes:
    """Name of the pin of an uplink's program. Dots, as of VLANs, are not allowed in it."""
    return text(f"uplink_{uplink}".replace(".", "_"))
