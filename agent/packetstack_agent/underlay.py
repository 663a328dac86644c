"""The node's own network under the stacks: routed pair, uplinks, routes, proxied addresses, packet filter.

All of it is put back when somebody takes it away. One lock covers every change, since the director's programs, the
routes and the filter must agree; what blocks runs in worker threads, which get values and read no stack.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from ipaddress import ip_address, ip_network

from packetstack_agent import neighbours, networks, nftables
from packetstack_agent.director import Director
from packetstack_agent.errors import AgentError
from packetstack_agent.firewall import Firewall, Mode, Obstacle
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Stacks
from packetstack_agent.natives import call, constant, lib, packed, text
from packetstack_agent.node import RunDirectory
from packetstack_agent.threads import to_the_end
from packetstack_core.reasons import EventReason
from packetstack_core.values import Address, Network

LOOK_SECONDS = 5.0
"""How often routes and programs are looked after when nothing tells that they changed."""
RULES_SECONDS = 0.1
"""Time from the first change of the node's packet filter until it is examined: changes come in showers."""


class Underlay:
    """Keeps the node's network as `stacks` need it."""

    def __init__(
        self, run: RunDirectory, stacks: Stacks, journal: Journal, director: Director, firewall: Firewall
    ) -> None:
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._director = director
        self._firewall = firewall
        self._lock = asyncio.Lock()
        """Held while anything here is being changed, also by a thread."""
        self._attached: tuple[networks.Pair, dict[str, int]] | None = None
        """Pair and uplinks (name -> interface index) that the director was last put on."""
        self._obstacles: tuple[Obstacle, ...] = ()
        """Obstacles in the node's packet filter, as they were last reported."""
        self._own: tuple[frozenset[Address], frozenset[Address]] | None = None
        """The node's own addresses, as the director knows them."""

    async def start(self) -> None:
        """Make the pair and put the director on it and on the uplinks of the record."""
        self._firewall.mode = Mode(self._run.record.firewall)
        async with self._lock:
            await to_the_end(self._attach)

    async def rest(self) -> None:
        """Wait until nothing is being changed."""
        async with self._lock:
            pass

    # ---- uplinks ---------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def with_uplinks(self, roles: Mapping[str, str]) -> AsyncIterator[None]:
        """Run the director on these uplinks too: name -> role. Taken back if what is done meanwhile fails."""
        before: dict[str, str] = {}
        fresh: list[str] = []
        try:
            async with self._lock:
                before = self._roles()
                for name, role in roles.items():
                    if before.get(name) != role:
                        fresh.append(name)
                        await to_the_end(self._attach_uplink, name, role)
            yield
        except BaseException:
            async with self._lock:
                for name in fresh:
                    with contextlib.suppress(AgentError):
                        if name in before:
                            await to_the_end(self._attach_uplink, name, before[name])
                        else:
                            await to_the_end(self._detach_uplink, name)
            raise

    async def set_uplinks(self, wanted: Sequence[str]) -> None:
        """Run the director on exactly these, interfaces or networks.

        An uplink that cannot be attached only costs speed; it is reported as UplinkFailed.
        """
        names = set()
        for uplink in wanted:
            try:
                name, role = networks.uplink_role(uplink)
                if "/" in name:
                    name = await asyncio.to_thread(networks.with_address_in, ip_network(name, strict=False))
                names.add(name)
                async with self._lock:
                    if self._roles().get(name) != role:
                        await to_the_end(self._attach_uplink, name, role)
            except (AgentError, ValueError) as e:
                message = f"--uplink {uplink}: {e}; its packets come by the routed pair"
                self._journal.event("-", EventReason.UPLINK_FAILED, message)
        async with self._lock:
            for name in self._roles().keys() - names:
                await to_the_end(self._detach_uplink, name)

    def _roles(self) -> dict[str, str]:
        """The uplinks and their roles."""
        return dict(map(networks.uplink_role, self._run.record.uplinks))

    def _attach_uplink(self, name: str, role: str) -> None:
        index = networks.index_of(name)
        if name.startswith((networks.ROUTED, networks.DIRECTOR)):
            raise AgentError(f"interface {name}: is the agent's own; name one that leads to the network")
        director, roles = self._director.handle, self._roles()
        networks.direct_uplinks(director, {**roles, name: role})
        try:
            call(lib().ps_director_attach, director, index, constant("PS_ROLE_UPLINK"), _pin(name))
        except AgentError:
            networks.direct_uplinks(director, roles)
            raise
        self._run.record.uplinks = [networks.uplink_text(n, r) for n, r in {**roles, name: role}.items()]
        self._run.save(must=True)
        if self._attached is not None:
            self._attached[1][name] = index

    def _detach_uplink(self, name: str) -> None:
        roles = self._roles()
        if name in roles:
            with contextlib.suppress(AgentError):
                call(lib().ps_director_detach, self._director.handle, _pin(name))
            del roles[name]
            self._run.record.uplinks = [networks.uplink_text(n, r) for n, r in roles.items()]
            self._run.save()
            if self._attached is not None:
                self._attached[1].pop(name, None)
            networks.direct_uplinks(self._director.handle, roles)

    def _attach(self) -> bool:
        """Pair and director on it and on the uplinks, whatever was taken away; returns whether something was. Blocks."""
        director = self._director.handle
        pair = networks.ensure_pair(self._run.owner)
        self._direct_own()
        call(lib().ps_director_attach, director, pair.director, constant("PS_ROLE_ROUTED"), b"routed")
        call(lib().ps_routed_attach, director, pair.routed, pair.routed_mac)
        uplinks = networks.direct_uplinks(director, self._roles())
        for name, index in uplinks.items():
            with contextlib.suppress(AgentError):  # packets come by the routed pair or not at all
                call(lib().ps_director_attach, director, index, constant("PS_ROLE_UPLINK"), _pin(name))
        changed = self._attached not in (None, (pair, uplinks))
        self._attached = pair, uplinks
        return changed

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

    # ---- routes ----------------------------------------------------------------------------------------------

    async def route(self) -> None:
        """Route the addresses of the stacks here, and no others, and let their packets pass the node's filter."""
        async with self._lock:
            await to_the_end(self._route, *self._wanted())
        self._report_firewall()

    def _wanted(self) -> tuple[set[Network], set[Address]]:
        """What to route here, and the addresses in it: those of all stacks, as they are now."""
        there = [m.stack for m in self._stacks.values()]
        return {p for stack in there for p in stack.prefixes()}, {a for stack in there for a in stack.addresses()}

    def _route(self, prefixes: set[Network], addresses: set[Address]) -> list[Network]:
        """Routes, and answers to ARP and neighbour discovery, for exactly these. Returns routes that were gone. Blocks."""
        keep = bool(self._stacks.unread)
        added = networks.ensure_routes(prefixes, keep=keep)
        record = self._run.record
        wanted = neighbours.on_link(addresses) if addresses else {}
        for device, found in wanted.items():
            every = sorted({*record.proxied.get(device, []), *(str(a) for a in found)})
            if record.proxied.get(device) != every:
                record.proxied[device] = every
                self._run.save()
            neighbours.answer_for(device, found, record.sysctls)
        for device, names in list(record.proxied.items()):
            stay = {str(a) for a in wanted.get(device, [])}
            if stay == set(names) or keep:
                continue
            neighbours.answer_no_more(device, [ip_address(a) for a in names if a not in stay])
            record.proxied[device] = sorted(stay)
            if not stay:
                del record.proxied[device]
        self._run.save()
        self._open_firewall()
        return added

    # ---- the packet filter -----------------------------------------------------------------------------------

    async def set_firewall(self, mode: str) -> None:
        """Who changes the node's packet filter from now on: a `Mode`."""
        try:
            self._firewall.mode = Mode(mode)
        except ValueError:
            raise AgentError(f"--firewall {mode}: is not known; use {' or '.join(Mode)}") from None
        if self._run.record.firewall != mode:
            self._run.record.firewall = mode
            self._run.save()
            await self.route()

    def _open_firewall(self) -> None:
        """Whatever is routed to stacks shall pass the node's packet filter. Blocks."""
        self._firewall.ensure(networks.routed(), self._run.record.uplinks)

    def _report_firewall(self) -> None:
        """Events of what has changed since the last look at the node's packet filter."""
        put_back, self._firewall.put_back = self._firewall.put_back, []
        if put_back:
            message = f"{', '.join(put_back)}: rules of ours were gone and are there again"
            self._journal.event("-", EventReason.FIREWALL_RESTORED, message)
        before, self._obstacles = self._obstacles, self._firewall.obstacles
        for found in self._obstacles:
            if found not in before:
                reason = EventReason.FIREWALL_IN_THE_WAY if found.sure else EventReason.FIREWALL_UNCLEAR
                self._journal.event("-", reason, f"{found.message}; {found.remedy}")
        if before and not self._obstacles:
            message = "the node's packet filter lets packets of stacks pass"
            self._journal.event("-", EventReason.FIREWALL_OPEN, message)

    # ---- watching --------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Routes vanish silently when links change, programs can be detached: put them back, until cancelled."""
        loop = asyncio.get_running_loop()
        with networks.change_socket() as watcher:
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
                await self._put_back()

    async def _put_back(self) -> None:
        try:
            async with self._lock:
                attached = await to_the_end(self._attach)
                added = await to_the_end(self._route, *self._wanted())
        except Exception as e:
            self._journal.event("-", EventReason.ROUTES_FAILED, f"{e}; packets come by uplinks alone until it works")
            return
        self._report_firewall()
        if attached:
            self._journal.event(
                "-",
                EventReason.DIRECTOR_ATTACHED,
                "the director runs where it should again: a link had come, gone or been made anew",
            )
        if added:
            prefixes = ", ".join(str(p) for p in added)
            message = f"routes to {prefixes} were missing and are there again; meanwhile packets came by uplinks alone"
            self._journal.event("-", EventReason.ROUTES_RESTORED, message)

    async def watch_firewall(self) -> None:
        """Rules are flushed and loaded anew by their owners at any time; `watch` looks in between too."""
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
                    async with self._lock:
                        began = time.monotonic()
                        await to_the_end(self._open_firewall)
                        took = time.monotonic() - began
                except Exception as e:
                    self._journal.event("-", EventReason.FIREWALL_FAILED, str(e))
                else:
                    self._report_firewall()


def _pin(uplink: str) -> bytes:
    """Name of the pin of an uplink's program. Dots, as of VLANs, are not allowed in it."""
    return text(f"uplink_{uplink}".replace(".", "_"))
