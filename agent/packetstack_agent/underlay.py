"""The node's own network under the stacks: routed pair, uplinks, routes, proxied addresses, packet filter.

All of it is put back when somebody takes it away. One lock covers every change, since the director's programs, the
routes and the filter must agree; what blocks runs in worker threads, which get values and read no stack.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from ipaddress import ip_address, ip_network

from packetstack_agent import fingerprints, neighbours, networks, nftables, surveying
from packetstack_agent.director import Director
from packetstack_agent.errors import AgentError
from packetstack_agent.firewall import Firewall, Mode, Obstacle
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Stacks
from packetstack_agent.natives import call, constant, lib, packed, text
from packetstack_agent.node import RunDirectory
from packetstack_agent.threads import to_the_end
from packetstack_core.preconditions import Lack, Precondition
from packetstack_core.reasons import EventReason
from packetstack_core.values import Address, Network

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
            for reason, message in await to_the_end(self._attach):
                self._journal.event("-", reason, message)

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
                await self._rename()
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
        async with self._lock:
            await self._rename()
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

    async def _rename(self) -> None:
        for reason, message in await to_the_end(self._follow_names):
            self._journal.event("-", reason, message)

    def uplinks(self) -> list[str]:
        """Their names."""
        return list(self._roles())

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

    def _attach(self) -> list[tuple[EventReason, str]]:
        """Pair and director on it and on the uplinks, whatever was taken away; returns an event for each of that. Blocks."""
        director, before = self._director.handle, self._attached
        done = self._follow_names()
        pair, changed = networks.ensure_pair(self._run.owner, lib().ps_link_device(director, b"routed_end"))
        done += [(EventReason.PATH_RESTORED, said) for said in changed]
        self._direct_own()
        on = {networks.DIRECTOR: (b"routed", pair.director, "PS_ROLE_ROUTED")}
        uplinks = networks.direct_uplinks(director, self._roles())
        on |= {name: (_pin(name), index, "PS_ROLE_UPLINK") for name, index in uplinks.items()}
        again = [networks.ROUTED] if call(lib().ps_routed_attach, director, pair.routed, pair.routed_mac) else []
        for name, (pin, index, role) in on.items():
            try:
                again += [name] if call(lib().ps_director_attach, director, index, constant(role), pin) else []
            except AgentError:
                if role == "PS_ROLE_ROUTED":
                    raise
                continue  # packets come by the routed pair or not at all
        self._attached = pair, uplinks
        if before is not None:
            done += _attached_again(again)
            done += _gone(before[1].keys() - uplinks.keys())
        return done

    def _follow_names(self) -> list[tuple[EventReason, str]]:
        """Uplinks that have other names now: the record, and all that goes by their names, follows. Blocks."""
        done, director, record = [], self._director.handle, self._run.record
        for name, role in self._roles().items():
            index = lib().ps_link_device(director, _pin(name))
            now = networks.name_of(index) if index else name
            if now in ("", name) or now in self._roles():
                continue
            record.uplinks = [
                u if u != networks.uplink_text(name, role) else networks.uplink_text(now, role) for u in record.uplinks
            ]
            record.sysctls = {key.replace(f"/{name}/", f"/{now}/"): value for key, value in record.sysctls.items()}
            if name in record.proxied:
                record.proxied[now] = record.proxied.pop(name)
            self._run.save(must=True)
            call(lib().ps_link_rename, director, _pin(name), _pin(now))
            if self._attached is not None and name in self._attached[1]:
                self._attached[1][now] = self._attached[1].pop(name)
            done.append((EventReason.UPLINK_RENAMED, f"uplink {name} is called {now} now; packets go on"))
        return done

    def _direct_own(self) -> None:
        """Tell the director the node's own addresses. Blocks."""
        found = surveying.own_addresses()
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

    def unchanged(self) -> bool:
        """Whether programs that vanish without a word are where they were. Cheap."""
        if self._attached is None or self._lock.locked():
            return True
        pair, uplinks = self._attached
        wanted = {b"routed": pair.director, b"routed_end": pair.routed} | {_pin(n): i for n, i in uplinks.items()}
        return all(lib().ps_link_device(self._director.handle, pin) in (0, i) for pin, i in wanted.items())

    async def fingerprint(self) -> bytes:
        """Of all that `put_back` looks at; empty when that tells too little, so that it has to look."""
        if self._attached is None or not self._firewall.is_told:
            return b""
        routed = self._attached[0].routed
        try:
            return await asyncio.to_thread(
                fingerprints.of_node, routed, [*networks.KEPT_SYSCTLS, *self._run.record.sysctls]
            )
        except (AgentError, OSError):
            return b""

    async def put_back(self) -> list[Lack]:
        """Routes vanish silently when links change, programs can be detached: put all of it back. What cannot be is returned."""
        try:
            async with self._lock:
                attached = await to_the_end(self._attach)
                added = await to_the_end(self._route, *self._wanted())
        except Exception as e:
            self._journal.event("-", EventReason.ROUTES_FAILED, f"{e}; packets come by uplinks alone until it works")
            said = f"{e}; packets come by uplinks alone until it works; it is tried again"
            return [Lack(Precondition.PAIR, "routed pair", said, lost=not self._run.record.uplinks)]
        self._report_firewall()
        for reason, message in attached:
            self._journal.event("-", reason, message)
        if added:
            prefixes = ", ".join(str(p) for p in added)
            message = f"routes to {prefixes} were missing and are there again; meanwhile packets came by uplinks alone"
            self._journal.event("-", EventReason.ROUTES_RESTORED, message)
        return []

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


def _attached_again(names: Sequence[str]) -> list[tuple[EventReason, str]]:
    if not names:
        return []
    where = ", ".join(names)
    message = f"the director runs where it should again, on {where}: its program was taken away, or the link made anew"
    return [(EventReason.DIRECTOR_ATTACHED, message)]


def _gone(names: Collection[str]) -> list[tuple[EventReason, str]]:
    said = "is gone; its packets come by the routed pair, if by any way. It is an uplink again as soon as it is there"
    return [(EventReason.UPLINK_FAILED, f"uplink {name}: {said}") for name in sorted(names)]


def _pin(uplink: str) -> bytes:
    """Name of the pin of an uplink's program. Dots, as of VLANs, are not allowed in it."""
    return text(f"uplink_{uplink}".replace(".", "_"))
