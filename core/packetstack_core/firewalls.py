"""What a node's packet filter does with packets of stacks, and where an accept of ours has to stand. Pure.

A chain is followed as the kernel does, for packets of which only this is known: by which interface they come or leave,
and what connection tracking says of them. A rule that asks for anything else matches *some* of them. So a verdict is
sure, or it is not; what is not sure is never called an obstacle, and never a reason to change something.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

PREROUTING, FORWARD = "prerouting", "forward"
COMMENT = "packetstack"
"""Marks a rule of ours in a chain of somebody else."""
DEEPEST, MOST_RULES = 8, 4000
"""How far jumps are followed. Beyond, nothing is sure."""

INVALID, ESTABLISHED, RELATED, NEW, UNTRACKED = 1, 2, 4, 8, 64
"""States of a packet's connection, as bits of nf_tables' `ct state`."""
PROTOCOLS = {b"\x06", b"\x11"}
"""Packets of stacks are TCP or UDP. (ICMP too; but a rule for it alone decides nothing for a stack.)"""
_NFPROTO = {4: b"\x02", 6: b"\x0a"}
"""How `meta nfproto` tells the family."""
_XT_UNTRACKED = 256
"""The same of the match `conntrack` of iptables: 1 << (IP_CT_NUMBER + 3). The other bits are equal."""


@dataclass(frozen=True)
class Expression:
    """A part of a rule, as nf_tables has it; `name` alone where the rest is not understood."""

    name: str
    key: int = 0
    """Which property, for `meta` and `ct`. For `cmp` 0 means equal, 1 not equal; for a set 0 means in it, 1 not in it."""
    register: int = 0
    text: str = ""
    """A verdict, the name of a set, of a match or a target."""
    chain: str = ""
    """Where a verdict jumps to."""
    data: bytes = b""
    to_verdict: bool = False
    verdicts: tuple[tuple[bytes, str, str], ...] = ()
    """Entries of a look-up of a connection's state: key, verdict and chain for `vmap`, keys alone for `set`."""


@dataclass(frozen=True)
class Rule:
    """One rule. `handle`: its number in the table, or its place in the chain of legacy iptables."""

    handle: int
    expressions: tuple[Expression, ...]
    comment: str = ""

    @property
    def ours(self) -> bool:
        """Whether we have put it there."""
        return self.comment == COMMENT


@dataclass(frozen=True)
class Chain:
    """A chain and, once they are read, its rules. Of a chain that is jumped to, `hook` is empty."""

    family: str
    """"ip", "ip6" or "inet"."""
    table: str
    name: str
    hook: str = ""
    policy: str = "accept"
    rules: tuple[Rule, ...] = ()

    @property
    def place(self) -> str:
        """As people write it."""
        return f"chain {self.name} of table {self.family} {self.table}"


@dataclass(frozen=True)
class Packet:
    """What is known of packets. An empty interface: any but the routed pair's."""

    came_by: str
    leaves_by: str
    state: int
    family: int = 0
    """4 or 6; 0: either."""


@dataclass(frozen=True)
class Drop:
    """Where all packets of a kind end."""

    chain: Chain
    """The one with the rule, which may be reached by jumps; of a policy the base chain."""
    base: Chain
    index: int
    """Position of the rule in the base chain that drops or leads to it; one after the last means the policy."""
    rule: Rule | None
    """None: the policy."""
    state: int
    """State of the packets' connection that the rule asks for, as bits; 0 if it asks for none."""
    sure: bool
    """No rule before it may have accepted some of them."""

    @property
    def what(self) -> str:
        """The rule, as a part of a sentence."""
        if self.rule is None:
            return f"the policy of {self.chain.place} drops what no rule accepts"
        what = "packets of connections in state INVALID" if self.state == INVALID else "what no rule before it accepts"
        return f"a rule in {self.chain.place} drops {what}"


Find = Callable[[Chain, str], Sequence[Rule]]
"""Rules of the chain with this name in the table of the other."""


def first_drop(base: Chain, packet: Packet, find: Find, *, ours: bool = False) -> Drop | None:
    """Where packets of this kind end in a base chain, if they do; without `ours` as if no rule were ours."""
    walk = _Walk(base, packet, find)
    through, drop = walk.chain(replace(base, rules=tuple(r for r in base.rules if ours or not r.ours)), 0)
    if drop is None and through and base.policy == "drop":
        drop = Drop(base, base, len(base.rules), None, 0, walk.sure)
    if drop is None or drop.rule is None:
        return drop
    return replace(drop, base=base, index=next(i for i, r in enumerate(base.rules) if r.handle == walk.top))


class _Walk:
    def __init__(self, base: Chain, packet: Packet, find: Find) -> None:
        self.base, self.packet, self.find = base, packet, find
        self.sure = True
        """No rule so far may have accepted."""
        self.top = 0
        """Handle of the rule of the base chain that is being looked at."""
        self.looked = 0

    def chain(self, chain: Chain, depth: int) -> tuple[bool, Drop | None]:
        """Whether some packets come to its end, and where all that come end, if they do."""
        left = False  # some have gone back to where they came from
        for rule in chain.rules:
            self.looked += 1
            if self.looked > MOST_RULES:
                self.sure = False
                return False, None
            if depth == 0:
                self.top = rule.handle
            all_match, some_match, verdict, target, state = self._ask(rule)
            if not some_match or verdict in ("", "continue"):
                continue
            if verdict in ("drop", "reject"):
                if all_match:
                    return left, None if left else Drop(chain, self.base, 0, rule, state, self.sure)
                continue  # it ends some that it means; those are not ours to defend
            if verdict in ("jump", "goto"):
                if depth >= DEEPEST:
                    self.sure = False
                    continue
                inside = Chain(chain.family, chain.table, target, rules=tuple(self.find(chain, target)))
                through, drop = self.chain(inside, depth + 1)
                if all_match and (verdict == "goto" or not through):
                    return through or left, None if left else drop
                left = left or (verdict == "goto" and through)
                continue
            if all_match:  # accept, return, and what hands packets to somebody else
                return verdict == "return" or left, None
            if verdict == "return":
                left = True
            else:
                self.sure = False
        return True, None

    def _ask(self, rule: Rule) -> tuple[bool, bool, str, str, int]:
        """Whether it matches all, or some; its verdict, where it jumps to, and the state that it asks for."""
        every, state, verdict, target = True, 0, "", ""
        registers: dict[int, str] = {}
        masks: dict[int, int] = {}
        for e in rule.expressions:
            fits: bool | None = None
            match e.name:
                case "counter" | "log" | "notrack":
                    continue
                case "payload" | "fib" | "rt" | "exthdr" | "numgen" | "socket":
                    registers.clear()  # into which of them is not known
                    continue
                case "meta" | "ct":
                    known = {
                        ("meta", 6): "came_by", ("meta", 7): "leaves_by", ("meta", 15): "family", ("meta", 16): "protocol",
                        ("ct", 0): "state",
                    }  # fmt: skip
                    registers[e.register] = known.get((e.name, e.key), "")
                    masks.pop(e.register, None)
                    if e.name == "ct" and e.key != 0 and self.packet.state in (INVALID, UNTRACKED):
                        fits = False  # there is no connection that could be asked
                    else:
                        continue
                case "lookup" if registers.get(e.register) in ("came_by", "leaves_by") and e.verdicts:
                    named = self._named(e, getattr(self.packet, registers[e.register]))
                    if not e.to_verdict:
                        fits = None if named is None else bool(named) != bool(e.key)
                    elif named is None:
                        verdict = "some"
                    elif named:
                        _, verdict, target = named[0]
                        continue
                    else:
                        fits = False
                case "lookup" if not e.to_verdict and registers.get(e.register) == "protocol" and e.verdicts:
                    if not {k for k, _, _ in e.verdicts} & PROTOCOLS:
                        fits = bool(e.key)
                case "set":
                    fits = (struct.pack("=I", self.packet.state) in {k for k, _, _ in e.verdicts}) != bool(e.key)
                    state = self.packet.state
                case "bitwise":
                    if registers.get(e.register) == "state" and len(e.data) == 4:
                        masks[e.register] = struct.unpack("=I", e.data)[0]
                    else:
                        registers[e.register] = ""
                    continue
                case "cmp":
                    fits = self._compare(e, registers.get(e.register, ""), masks.get(e.register))
                    if registers.get(e.register) == "state":
                        state = self.packet.state
                case "match":
                    fits, asked = self._match(e)
                    state = state or asked
                case "immediate":
                    verdict, target = e.text, e.chain
                    continue
                case "reject":
                    verdict = "reject"
                    continue
                case "target":
                    verdict = {"REJECT": "reject", "DROP": "drop", "ACCEPT": "accept", "NFQUEUE": "queue"}.get(
                        e.text, verdict
                    )
                    continue
                case "queue":
                    verdict = "queue"
                    continue
                case "vmap":
                    key = struct.pack("=I", self.packet.state)
                    there = {k: (v, chain) for k, v, chain in e.verdicts}
                    verdict, target = there.get(key, ("", ""))
                    state = self.packet.state
                    continue
                case "lookup" if e.to_verdict:
                    verdict = "some"  # by what is not known
                case _:
                    registers.clear()
            if fits is False:
                return False, False, "", "", 0
            every = every and fits is True
        return every, True, verdict, target, state

    @staticmethod
    def _named(e: Expression, name: str) -> list[tuple[bytes, str, str]] | None:
        """What a set or map of names of interfaces has for this one; None if that cannot be told."""
        found = [(_same_name(name, key), verdict, chain) for key, verdict, chain in e.verdicts]
        if any(same is None for same, _, _ in found):
            return None
        return [(b"", verdict, chain) for same, verdict, chain in found if same]

    def _compare(self, e: Expression, what: str, mask: int | None) -> bool | None:
        equal: bool | None = None
        if what in ("came_by", "leaves_by"):
            equal = _same_name(getattr(self.packet, what), e.data)
        elif what == "state" and len(e.data) == 4 and e.key in (0, 1):
            masked = self.packet.state if mask is None else self.packet.state & mask
            equal = masked == struct.unpack("=I", e.data)[0]
        elif what == "protocol" and e.data not in PROTOCOLS:
            equal = False
        elif what == "family" and self.packet.family:
            equal = e.data == _NFPROTO[self.packet.family]
        if equal is None or e.key not in (0, 1):
            return None
        return equal == (e.key == 0)

    def _match(self, e: Expression) -> tuple[bool | None, int]:
        """Whether a match of iptables fits (None: some packets), and which connection states it asked for."""
        if e.text in ("comment", "nfacct"):  # the second one counts
            return True, 0
        wanted = None
        if e.text == "conntrack" and len(e.data) >= 152:  # struct xt_conntrack_mtinfo3, of which mtinfo2 is a part
            flags, inverted, wanted = struct.unpack_from("=HHH", e.data, 146)
            if flags != 1:  # XT_CONNTRACK_STATE alone
                return None, 0
        elif e.text == "state" and len(e.data) >= 4:
            wanted, inverted = struct.unpack_from("=I", e.data)[0], 0
        if wanted is None:
            return None, 0
        untracked = _XT_UNTRACKED if e.text == "conntrack" else UNTRACKED
        mine = untracked if self.packet.state == UNTRACKED else self.packet.state
        return bool(wanted & mine) != bool(inverted & 1), self.packet.state


def _same_name(name: str, data: bytes) -> bool | None:
    """Whether an interface's name is the one of a rule; a rule's without a zero at its end is a beginning."""
    if not name:
        return False if data.startswith((b"ps0\0", b"ps1\0")) else None
    return name.encode().ljust(16, b"\0").startswith(data)


# ---- what to do ---------------------------------------------------------------------------------------------------


def packets(pair: str, came_by: str, *, tracked: bool) -> tuple[Packet, ...]:
    """Kinds of packets of stacks that netfilter sees: into the routed pair, and what comes back out of it.

    Tracked, the kernel sees one side of a connection: its first packet is new, the others are invalid.
    """
    states = (NEW, INVALID) if tracked else (UNTRACKED,)
    return tuple(Packet(*way, state) for way in ((came_by, pair), (pair, "")) for state in states)


@dataclass(frozen=True)
class Change:
    """What an accept of ours needs in one chain."""

    remove: tuple[int, ...] = ()
    """Handles of rules of ours that stand in the wrong place."""
    insert: bool = False
    before: int | None = None
    """The handle that ours shall stand in front of; None: at the end."""


def arrange(base: Chain, drop: Drop | None, rules: int) -> Change | None:
    """The change that lets packets pass, None if the chain is as it should be. `rules`: how many ours are.

    They stand right before what ends all packets, behind whatever looks at them more closely: a rule that drops some
    of them is somebody's will.
    """
    ours = [i for i, r in enumerate(base.rules) if r.ours]
    handles = tuple(base.rules[i].handle for i in ours)
    if drop is None:
        return Change(remove=handles) if ours else None
    if len(ours) == rules and ours == list(range(drop.index - rules, drop.index)):
        return None
    before = base.rules[drop.index].handle if drop.index < len(base.rules) else None
    return Change(remove=handles, insert=True, before=before)


def whose(chain: Chain, names: Mapping[str, str]) -> str:
    """Who has made the chain, by its name or its table's; empty if it cannot be told."""
    for beginning, owner in names.items():
        if chain.name.startswith(beginning) or chain.table.startswith(beginning):
            return owner
    return ""


OWNERS = {
    "KUBE-": "kube-proxy",
    "kube-proxy": "kube-proxy",
    "DOCKER": "Docker",
    "docker": "Docker",
    "cali-": "Calico",
    "FLANNEL": "flannel",
    "flannel": "flannel",
    "CILIUM": "Cilium",
    "firewalld": "firewalld",
    "filter_FORWARD": "firewalld",
    "ufw": "ufw",
    "LIBVIRT": "libvirt",
    "libvirt": "libvirt",
}
"""Whose rules these are, by how the name of a chain or table begins."""


def distinct(drops: Iterable[Drop]) -> list[Drop]:
    """One of each place: packets of several kinds end there."""
    found: dict[tuple[str, str, int], Drop] = {}
    for drop in drops:
        key = (drop.base.family, drop.chain.place, drop.rule.handle if drop.rule else 0)
        if key not in found or (drop.sure and not found[key].sure):
            found[key] = drop
    return list(found.values())
