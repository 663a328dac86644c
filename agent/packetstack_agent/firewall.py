"""The node's packet filter must let packets of stacks pass: it sees one side of each connection, and forwards them.

Two things stop them. Connection tracking calls packets of connections that it has seen from one side alone INVALID,
and standard rules drop those: a table of our own takes our addresses out of tracking. And chains may drop whatever no
rule accepts; an accept in a table of our own would not help there, since all chains of a hook see a packet. So it
stands in that very chain, right before what drops everything, and carries a comment that says whose it is.

The functions block and talk netlink, in the node's network namespace. Each may be repeated, and finds what was flushed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum

from packetstack_agent import iptables, networks, nftables
from packetstack_agent.errors import AgentError
from packetstack_agent.nftables import INET, IPV4, IPV6, Place, Tables
from packetstack_core.firewalls import (
    COMMENT,
    FORWARD,
    OWNERS,
    PREROUTING,
    Chain,
    Change,
    Drop,
    Rule,
    arrange,
    distinct,
    first_drop,
    packets,
    whose,
)
from packetstack_core.values import Network

TABLE = "packetstack"
_SETS = {4: "addresses4", 6: "addresses6"}
_CHAINS = {4: "ip", 6: "ip6"}
_PRIORITY = -310
"""Before `raw` (-300), where others may have looked already, and after defragmentation (-400)."""
_TRIES = 3
"""Looks in a row that find a chain changing before that is reported as an obstacle."""
_RULES = 2
"""Accepts that a chain needs: into the routed pair, and out of it."""


class Mode(StrEnum):
    """Who is to change the node's rules."""

    MANAGE = "Manage"
    """The agent, as far as stacks need it."""
    REPORT = "Report"
    """The administrator; the agent says what is in the way."""


@dataclass(frozen=True)
class Obstacle:
    """What stops packets of stacks, and what helps."""

    message: str
    remedy: str
    sure: bool = True
    """Not sure: it may stop some of them, or could not be looked at."""


class Firewall:
    """What the agent has to do with the node's rules. `ensure` is not to be called by two threads at once."""

    def __init__(self, mode: Mode = Mode.MANAGE, *, changes: bool = True) -> None:
        """Without `changes` it only looks."""
        self.mode = mode
        self._changes = changes
        self.obstacles: tuple[Obstacle, ...] = ()
        """What was in the way at the last look."""
        self.put_back: list[str] = []
        """Where rules of ours were missing and are there again: taken away by whoever reports it."""
        self._looked: object = None
        """All that the last look depended on."""
        self._written: tuple[frozenset[Network], tuple[object, ...]] | None = None
        """What our table is for, and how it looked when it was made."""
        self._missed: dict[tuple[str, str, str], int] = {}
        """Chains that could not be changed, and how often in a row."""
        self._again = False
        """The last look did not come to an end."""
        self._accepted: set[tuple[str, str, str]] = set()
        """Chains in which we have an accept."""
        self._legacy = True
        """There are rules of which no change is told."""

    @property
    def is_told(self) -> bool:
        """Whether the kernel tells of whatever else would be found at another look.

        A table that belongs to a process goes with it, and the generation does not say so: what is in the way may be gone.
        """
        return self._looked is not None and not (self._legacy or self._again or self.obstacles)

    def ensure(self, prefixes: Iterable[Network], uplinks: Sequence[str] = ()) -> None:
        """Make packets to these prefixes pass, or find out what stops them. No prefix: nothing of ours stays."""
        wanted = frozenset(prefixes)
        try:
            with Tables() as tables:
                legacy = any(iptables.in_use(family) for family in iptables.FAMILIES)
                devices = _devices(uplinks) if self.mode is Mode.REPORT else ()
                now = (tables.generation(), wanted, self.mode, tuple(uplinks), tuple(devices))
                self._legacy = legacy and bool(wanted)
                if now == self._looked and self.is_told:
                    return
                self._again = False
                found: tuple[Obstacle, ...] = ()
                if wanted and self.mode is Mode.MANAGE:
                    found = tuple(self._ensure_table(tables, wanted))
                else:
                    remove(tables)
                    self._written = None
                    self._accepted.clear()
                if wanted:
                    found += tuple(self._examine(tables, _families(wanted), uplinks))
                self._looked = now  # a change since, be it ours, is a reason to look again
        except (AgentError, OSError) as e:
            self._looked = None
            found = (_unknown(e),)
        self.obstacles = found

    def examine(self, uplinks: Sequence[str]) -> None:
        """Find out what would be in the way."""
        try:
            with Tables() as tables:
                self.obstacles = tuple(self._examine(tables, ["inet", *_CHAINS.values()], uplinks))
        except (AgentError, OSError) as e:
            self.obstacles = (_unknown(e),)

    # ---- our own table

    def _ensure_table(self, tables: Tables, wanted: frozenset[Network]) -> Iterator[Obstacle]:
        there = _content(tables)
        if self._written == (wanted, there):
            return
        again = self._written is not None and self._written[0] == wanted
        try:
            tables.change(_table(wanted))
        except nftables.Refused as e:
            message = (
                f"packets to stacks are tracked: table inet {TABLE} cannot be made ({e}), and rules for INVALID packets"
            )
            yield Obstacle(
                f"{message} may drop them", "use a kernel with nf_tables, CONFIG_NFT_FIB_INET included", sure=False
            )
            return
        self._written = wanted, _content(tables)
        if again:
            self.put_back.append(f"table inet {TABLE}")

    # ---- chains of others

    def _examine(self, tables: Tables, families: Sequence[str], uplinks: Sequence[str]) -> Iterator[Obstacle]:
        owned = tables.owned()
        for place, base in _others_chains(tables):
            locked = (place.family, place.table) in owned
            yield from self._examine_chain(_Nft(tables, place, base), uplinks, families, locked=locked)
        for family in iptables.FAMILIES:
            if not iptables.in_use(family):
                continue
            try:
                legacy = _Legacy(iptables.chains(family))
            except AgentError as e:
                message = f"rules of legacy iptables ({family}) cannot be read: {e}"
                yield Obstacle(message, "install iptables", sure=False)
            else:
                yield from self._examine_chain(legacy, uplinks, families)

    def _examine_chain(
        self, chain: "_Nft | _Legacy", uplinks: Sequence[str], families: Sequence[str], *, locked: bool = False
    ) -> Iterator[Obstacle]:
        """`families`: of chains that packets of stacks see. `locked`: nobody may add a rule."""
        base = chain.base
        passed = base.family in families
        key = base.family, base.table, base.name
        if self.mode is Mode.REPORT or base.hook == PREROUTING:
            if passed:
                yield from _stops(chain, uplinks, families, tracked=self.mode is Mode.REPORT)
            return
        change = arrange(base, _certain(chain) if passed else None, _RULES)
        if change is None:
            if not any(r.ours for r in base.rules):
                self._accepted.discard(key)
            if passed:  # what ends only packets of some interface or family is somebody's will, but it is said
                yield from _stops(chain, uplinks, families, tracked=False, ours=True)
            return
        why = "its table belongs to a process that lets nobody else add a rule" if locked else ""
        if self._changes and not locked:
            try:
                chain.change(change)
                self._missed.pop(key, None)
            except AgentError as e:
                # What others change at this moment is looked at again as soon as it has changed.
                self._missed[key] = self._missed.get(key, 0) + 1
                self._again = True
                if self._missed[key] < _TRIES:
                    return
                why = f"no rule can be added: {e}"
        if why:
            for stop in _stops(chain, uplinks, families, tracked=False):
                yield replace(stop, message=f"{stop.message}; {why}")
        if why or not self._changes:
            return
        if change.insert and key in self._accepted and not change.remove:
            self.put_back.append(base.place)
        if change.insert:
            self._accepted.add(key)
        else:
            self._accepted.discard(key)


def _unknown(error: Exception) -> Obstacle:
    return Obstacle(f"the node's packet filter cannot be looked at: {error}", "see docs/install.md", sure=False)


class _Nft:
    """A base chain of nf_tables, with the chains that it leads to."""

    def __init__(self, tables: Tables, place: Place, base: Chain) -> None:
        self._tables, self._place = tables, place
        self._read: dict[str, tuple[Rule, ...]] = {}
        self.base = replace(base, rules=self.find(base, base.name))

    def find(self, chain: Chain, name: str) -> tuple[Rule, ...]:
        if name not in self._read:
            self._read[name] = tuple(self._tables.rules(replace(self._place, chain=name)))
        return self._read[name]

    def change(self, wanted: Change) -> None:
        where = (self._place.family, self._place.table, self._place.chain)
        messages = [nftables.delete_rule(*where, handle) for handle in wanted.remove]
        if wanted.insert:
            for leaving in (True, False):
                rule = nftables.device_is(networks.ROUTED, leaving=leaving) + nftables.accept()
                messages.append(nftables.new_rule(*where, rule, COMMENT, wanted.before))
        self._tables.change(messages)


class _Legacy:
    """FORWARD of legacy iptables, with the chains that it leads to."""

    def __init__(self, chains: dict[str, Chain]) -> None:
        self._chains = chains
        self.base = chains["FORWARD"]

    def find(self, chain: Chain, name: str) -> tuple[Rule, ...]:
        return self._chains[name].rules if name in self._chains else ()

    def change(self, wanted: Change) -> None:
        iptables.change(self.base, wanted, networks.ROUTED)


def _certain(chain: "_Nft | _Legacy") -> Drop | None:
    """The first place of the chain where all our packets end, of either way."""
    found = [first_drop(chain.base, p, chain.find) for p in packets(networks.ROUTED, "", tracked=False)]
    return min((d for d in found if d is not None), key=lambda d: d.index, default=None)


def _stops(
    chain: "_Nft | _Legacy", uplinks: Sequence[str], families: Sequence[str], *, tracked: bool, ours: bool = False
) -> Iterator[Obstacle]:
    """What ends our packets in this chain. Looked at for each interface that they may come by, and each family.

    `ours`: although our rules are there.
    """
    base = chain.base
    versions = [v for v, name in _CHAINS.items() if name in families and base.family in (name, "inet")]
    by: dict[str, list[Drop]] = {}
    for device in (*_devices(uplinks), ""):
        kinds = [replace(p, family=v) for p in packets(networks.ROUTED, device, tracked=tracked) for v in versions]
        if base.hook == PREROUTING:
            kinds = [replace(p, leaves_by="") for p in kinds]
        for packet in kinds:
            drop = first_drop(base, packet, chain.find, ours=ours)
            if drop is not None and (packet.came_by or not any(by)):
                by.setdefault(packet.came_by, []).append(drop)
    for drop in distinct(d for drops in by.values() for d in drops):
        which = sorted(
            device for device, drops in by.items() for d in drops
            if device not in ("", networks.ROUTED) and d.sure and (d.chain.place, d.rule) == (drop.chain.place, drop.rule)
        )  # fmt: skip
        owner = whose(drop.chain, OWNERS)
        message = drop.what + (f" ({owner})" if owner else "")
        if which:
            message += f"; it stops packets that come by {', '.join(dict.fromkeys(which))}"
        if uplinks:
            message += f"; what comes by the uplinks {', '.join(uplinks)} does not pass it"
        remedy = _remedy(base, owner) + ("; or let the agent open it (Manage)" if tracked else "")
        yield Obstacle(message, remedy, sure=drop.sure and not uplinks)


def _remedy(base: Chain, owner: str) -> str:
    pair = networks.ROUTED
    if owner == "firewalld":
        return (
            f"firewall-cmd --permanent --zone=trusted --add-interface={pair}, and a policy from ANY to trusted with "
            "target ACCEPT: see docs/install.md"
        )
    if base.hook == PREROUTING:
        return f"let that chain accept what comes for the stacks' addresses, and what comes by {pair}"
    if base.family in iptables.FAMILIES and base.name == "FORWARD":
        command = iptables.FAMILIES[base.family][0] + ("-legacy" if base.table == iptables.TABLE else "")
        return f"{command} -I FORWARD -o {pair} -j ACCEPT, and the same with -i {pair}"
    where = f"{base.family} {base.table} {base.name}"
    return (
        f'nft insert rule {where} oifname "{pair}" accept, and the same with iifname, by whoever may change that table'
    )


def _families(prefixes: Iterable[Network]) -> list[str]:
    """Families of chains that packets to these prefixes pass."""
    return ["inet", *sorted({_CHAINS[p.version] for p in prefixes})]


def _devices(uplinks: Sequence[str]) -> list[str]:
    """Interfaces with an address that clients or backends may be behind."""
    return [d for d in networks.with_addresses() if d not in uplinks]


def _others_chains(tables: Tables) -> Iterator[tuple[Place, Chain]]:
    for place, base in tables.base_chains():
        if (place.family, place.table) != (INET, TABLE) and base.hook in (FORWARD, PREROUTING):
            yield place, base


# ---- our table ----------------------------------------------------------------------------------------------------


def _table(prefixes: Iterable[Network]) -> list[nftables.Message]:
    """The messages that replace our table, whatever it was, in one step."""
    messages = [nftables.new_table(INET, TABLE), nftables.delete_table(INET, TABLE), nftables.new_table(INET, TABLE)]
    messages.append(nftables.new_chain(INET, TABLE, PREROUTING, 0, _PRIORITY))
    for number, (version, name) in enumerate(_SETS.items(), 1):
        messages.append(nftables.new_set(INET, TABLE, name, number, version))
        if ranges := _ranges(version, prefixes):
            messages.append(nftables.new_elements(INET, TABLE, name, number, ranges))
        family = IPV4 if version == 4 else IPV6
        rule = nftables.family_is(family) + nftables.destination_in(family, name) + nftables.notrack()
        messages.append(nftables.new_rule(INET, TABLE, PREROUTING, rule))
    # What engines send comes this way if the kernel must help. Packets to the node itself stay tracked: its own
    # connections to a virtual address are seen from both sides.
    out = nftables.device_is(networks.ROUTED, leaving=False) + nftables.not_for_this_host() + nftables.notrack()
    messages.append(nftables.new_rule(INET, TABLE, PREROUTING, out))
    return messages


def _ranges(version: int, prefixes: Iterable[Network]) -> list[tuple[bytes, bytes]]:
    """First address of each range, and the one after its last; neither overlap nor meet, as the kernel wants it."""
    length = 4 if version == 4 else 16
    found: list[tuple[int, int]] = []
    spans = ((int(p.network_address), int(p.broadcast_address) + 1) for p in prefixes if p.version == version)
    for first, end in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return [(a.to_bytes(length), b"" if b >> 8 * length else b.to_bytes(length)) for a, b in found]


def _content(tables: Tables) -> tuple[object, ...]:
    """Our table as the kernel has it; to be compared, not to be read."""
    chain = next((b for p, b in tables.base_chains() if (p.family, p.table) == (INET, TABLE)), None)
    rules = [r.expressions for r in tables.rules(Place(INET, TABLE, PREROUTING))]
    return chain, tuple(rules), *(tuple(tables.elements(Place(INET, TABLE, name))) for name in _SETS.values())


def remove(tables: Tables) -> None:
    """Take away our table and our rules in others' chains, whoever of us has put them there."""
    with suppress(nftables.Refused):
        tables.change([nftables.delete_table(INET, TABLE)])
    for place, base in _others_chains(tables):
        ours = tuple(r.handle for r in tables.rules(place) if r.ours) if base.hook == FORWARD else ()
        if ours:
            _Nft(tables, place, base).change(Change(remove=ours))
    for family in iptables.FAMILIES:
        if iptables.in_use(family):
            chain = iptables.chains(family)["FORWARD"]
            if ours := tuple(r.handle for r in chain.rules if r.ours):
                iptables.change(chain, Change(remove=ours), networks.ROUTED)


def clean() -> None:
    """Remove the agent's rules when no agent lives. What cannot be removed stays."""
    with suppress(AgentError, OSError), Tables() as tables:
        remove(tables)


# ---- told to people -----------------------------------------------------------------------------------------------


def examine(mode: Mode, uplinks: Sequence[str]) -> list[dict[str, str]]:
    """What `packetstack preflight` says of this node; nothing is changed. Each with `result`, `message`, `remedy`."""
    looking = Firewall(mode, changes=False)
    looking.examine(uplinks)
    found = [
        {"result": "warning" if o.sure else "unknown", "message": o.message, "remedy": o.remedy}
        for o in looking.obstacles
    ]
    if not found:
        said = "the agent keeps the way open" if mode is Mode.MANAGE else "nothing stops packets of stacks"
        found.append({"result": "ok", "message": f"packet filter (nftables, iptables): {said} ({mode})", "remedy": ""})
    return found
