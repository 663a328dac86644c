"""The kernel's nf_tables over netlink: what the agent reads of a node's rules, and the few messages it sends.

Netlink and not the program `nft`: nothing has to be installed, a rule of another program's version can be read as far
as it is understood, and a change is one transaction. Numbers are from linux/netfilter/nf_tables.h and nfnetlink.h.
All functions block, on the network namespace of the calling thread.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType

from packetstack_agent.errors import AgentError
from packetstack_core.firewalls import FORWARD, PREROUTING, Chain, Expression, Rule

INET, IPV4, IPV6 = 1, 2, 10
"""Families: NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6."""
FAMILIES = {INET: "inet", IPV4: "ip", IPV6: "ip6"}
_HOOKS = {0: PREROUTING, 2: FORWARD}

_NETLINK_NETFILTER = 12
_GROUP_NFTABLES = 7
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP, _CREATE, _APPEND = 0x1, 0x4, 0x300, 0x400, 0x800
_DUMP_INTERRUPTED = 0x10
_TRIES = 5
"""To read what others keep changing."""
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYSTEM = 10
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE, _GETRULE, _DELRULE = 0, 1, 2, 3, 4, 6, 7, 8
_NEWSET, _NEWSETELEM, _GETSETELEM, _GETGEN = 9, 12, 13, 16
_VERDICTS = {0: "drop", 1: "accept", -1: "continue", -2: "break", -3: "jump", -4: "goto", -5: "return"}
_INTERVAL, _INTERVAL_END, _OWNER = 0x4, 0x1, 0x2
_PROTOCOL = 16
"""Key of `meta` for the protocol above IP."""
_NAMES = {("meta", 6), ("meta", 7)}
"""`iifname` and `oifname`."""
_NAME_BYTES = 16
_ENOENT = 2
_LONGEST_ANSWER = 1 << 17
_WAIT_SECONDS = 5.0

Attributes = dict[int, bytes]


# ---- attributes ---------------------------------------------------------------------------------------------------


def attribute(kind: int, value: bytes | str | int) -> bytes:
    """One netlink attribute. Numbers are 32 bits in network order, as nf_tables has them; strings end with a zero."""
    if isinstance(value, str):
        value = value.encode() + b"\0"
    elif isinstance(value, int):
        value = struct.pack("!I", value & 0xFFFFFFFF)
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *inside: bytes) -> bytes:
    """An attribute of attributes."""
    return attribute(kind | 0x8000, b"".join(inside))


def attributes(data: bytes) -> list[tuple[int, bytes]]:
    """What `data` consists of, in order."""
    found, at = [], 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found.append((kind & 0x3FFF, data[at + 4 : at + length]))
        at += length + 3 & ~3
    return found


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, sequence number, flags and payload of each netlink message in `data`, in order."""
    at = 0
    while at + 16 <= len(data):
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data, at)
        yield kind, sequence, flags, data[at + 16 : at + length]
        at += length + 3 & ~3


def _number(data: bytes | None) -> int:
    return int(struct.unpack("!I", data)[0]) if data else 0


def _text(data: bytes | None) -> str:
    return (data or b"").rstrip(b"\0").decode(errors="replace")


# ---- expressions that the agent writes ----------------------------------------------------------------------------


def expression(name: str, *data: bytes) -> bytes:
    """One expression of a rule."""
    return nested(1, attribute(1, name), nested(2, *data))


def device_is(name: str, *, leaving: bool) -> bytes:
    """Matches packets that came in by, or leave by, the interface. As iptables and nft both write it."""
    load = expression("meta", attribute(2, 7 if leaving else 6), attribute(1, 1))
    return load + expression("cmp", attribute(1, 1), attribute(2, 0), nested(3, attribute(1, name.encode() + b"\0")))


def family_is(family: int) -> bytes:
    """Matches packets of an IP version in a table of both."""
    load = expression("meta", attribute(2, 15), attribute(1, 1))
    return load + expression("cmp", attribute(1, 1), attribute(2, 0), nested(3, attribute(1, bytes([family]))))


def destination_in(family: int, name: str) -> bytes:
    """Matches packets to an address of the set."""
    offset, length = (16, 4) if family == IPV4 else (24, 16)
    load = expression("payload", attribute(1, 1), attribute(2, 1), attribute(3, offset), attribute(4, length))
    return load + expression("lookup", attribute(2, 1), attribute(1, name))


def not_for_this_host() -> bytes:
    """Matches packets whose destination is no address of the node. `fib daddr type != local`."""
    load = expression("fib", attribute(3, 2), attribute(2, 3), attribute(1, 1))
    local = struct.pack("=I", 2)  # RTN_LOCAL
    return load + expression("cmp", attribute(1, 1), attribute(2, 1), nested(3, attribute(1, local)))


def notrack() -> bytes:
    """Connection tracking does not look at the packet."""
    return expression("notrack")


def accept() -> bytes:
    """The packet has passed this chain. Counted, as iptables does it."""
    verdict = nested(2, nested(2, attribute(1, 1)))
    return expression("counter") + expression("immediate", attribute(1, 0), verdict)


def comment(text: str) -> bytes:
    """User data of a rule that nft and iptables show as a comment."""
    data = text.encode() + b"\0"
    return bytes([0, len(data)]) + data


# ---- changes, each one message of a transaction ------------------------------------------------------------------

Message = tuple[int, int, int, bytes]
"""Type, flags, family, attributes."""


def new_table(family: int, table: str) -> Message:
    """Make a table if it is not there."""
    return _NEWTABLE, _CREATE, family, attribute(1, table)


def delete_table(family: int, table: str) -> Message:
    """Remove a table with all that is in it."""
    return _DELTABLE, 0, family, attribute(1, table)


def new_chain(family: int, table: str, chain: str, hook: int, priority: int) -> Message:
    """A base chain of type filter that accepts what its rules let through."""
    where = nested(4, attribute(1, hook), attribute(2, priority))
    return (
        _NEWCHAIN, _CREATE, family,
        attribute(1, table) + attribute(3, chain) + where + attribute(5, 1) + attribute(7, "filter"),
    )  # fmt: skip


def new_set(family: int, table: str, name: str, number: int, version: int) -> Message:
    """A set of ranges of addresses. `number` tells it from others of the transaction."""
    kind, length = (7, 4) if version == 4 else (8, 16)  # nft's ipv4_addr and ipv6_addr
    return (
        _NEWSET, _CREATE, family,
        attribute(1, table) + attribute(2, name) + attribute(3, _INTERVAL) + attribute(4, kind)
        + attribute(5, length) + attribute(10, number),
    )  # fmt: skip


def new_elements(family: int, table: str, name: str, number: int, ranges: Sequence[tuple[bytes, bytes]]) -> Message:
    """Ranges of a set, each the first address and the one after the last (empty: there is none)."""
    elements = []
    for first, end in ranges:
        elements.append(nested(1, nested(1, attribute(1, first))))
        if end:
            elements.append(nested(1, nested(1, attribute(1, end)), attribute(3, _INTERVAL_END)))
    body = attribute(1, table) + attribute(2, name) + attribute(4, number) + nested(3, *elements)
    return _NEWSETELEM, _CREATE, family, body


def new_rule(
    family: int, table: str, chain: str, expressions: bytes, said: str = "", before: int | None = None
) -> Message:
    """A rule at the end of the chain, or before the one with the handle `before`."""
    body = attribute(1, table) + attribute(2, chain) + nested(4, expressions)
    if said:
        body += attribute(7, comment(said))
    if before is not None:
        return _NEWRULE, _CREATE, family, body + attribute(6, struct.pack("!Q", before))
    return _NEWRULE, _CREATE | _APPEND, family, body


def delete_rule(family: int, table: str, chain: str, handle: int) -> Message:
    """Remove one rule."""
    return _DELRULE, 0, family, attribute(1, table) + attribute(2, chain) + attribute(3, struct.pack("!Q", handle))


# ---- the kernel ---------------------------------------------------------------------------------------------------


class Refused(AgentError):
    """The kernel did not take a request. `errno` says why."""

    def __init__(self, errno: int) -> None:
        super().__init__(f"nf_tables: {os.strerror(errno)}")
        self.errno = errno


@dataclass(frozen=True)
class Place:
    """Where a chain is: number of the family, table, name."""

    family: int
    table: str
    chain: str


class Tables:
    """A connection to nf_tables of this network namespace; a context manager. AgentError if the kernel has none."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        except OSError as e:
            raise AgentError(f"this kernel has no nf_tables: {e.strerror}") from None
        self._socket.settimeout(_WAIT_SECONDS)
        self._sequence = count(1)

    def __enter__(self) -> "Tables":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def generation(self) -> int:
        """A number that every change of the rules makes another one."""
        return next((_number(dict(body).get(1)) for _, body in self._ask(_GETGEN, 0, b"", dump=False)), 0)

    def base_chains(self) -> Iterator[tuple[Place, Chain]]:
        """Base chains that filter IP packets which come in from a link or are forwarded, without rules, in their order."""
        found = []
        for family, body in self._ask(_GETCHAIN, 0, b"", dump=True):
            chain = dict(body)
            hook = dict(attributes(chain.get(4, b"")))
            if not hook:
                continue
            if family not in FAMILIES or _number(hook.get(1)) not in _HOOKS or _text(chain.get(7)) != "filter":
                continue  # chains for NAT and routing let everything through
            place = Place(family, _text(chain.get(1)), _text(chain.get(3)))
            priority = int(struct.unpack("!i", hook[2])[0])
            base = Chain(
                FAMILIES[family], place.table, place.chain, _HOOKS[_number(hook.get(1))],
                policy="drop" if 5 in chain and _number(chain[5]) == 0 else "accept",
            )  # fmt: skip
            found.append((priority, place, base))
        yield from ((place, base) for _, place, base in sorted(found, key=lambda f: f[0]))

    def rules(self, place: Place) -> Iterator[Rule]:
        """The rules of one chain."""
        where = attribute(1, place.table) + attribute(2, place.chain)
        for _, body in self._ask(_GETRULE, place.family, where, dump=True):
            rule = dict(body)
            if _text(rule.get(2)) != place.chain or _text(rule.get(1)) != place.table:
                continue  # a kernel that does not filter
            data = rule.get(7, b"")
            said = _text(data[2 : 2 + data[1]]) if len(data) > 2 and data[0] == 0 else ""
            handle = int(struct.unpack("!Q", rule[3])[0])
            expressions = [_expression(dict(attributes(e))) for _, e in attributes(rule.get(4, b""))]
            yield Rule(handle, tuple(self._with_maps(place, expressions)), said)

    def _with_maps(self, place: Place, expressions: Sequence[Expression]) -> Iterator[Expression]:
        """Look-ups of a connection's state, or of the protocol, are given with what there is to be found."""
        last = Expression("")
        for e in expressions:
            if e.name in ("meta", "ct", "payload", "fib"):
                last = e
            if e.name == "lookup" and (last.name, last.key) == ("ct", 0):
                name = "vmap" if e.to_verdict else "set"
                yield Expression(name, key=e.key, verdicts=tuple(self._verdicts(place, e.text)))
            elif e.name == "lookup" and (last.name, last.key) == ("meta", _PROTOCOL):
                yield replace(e, verdicts=tuple(self._verdicts(place, e.text)))
            elif e.name == "lookup" and (last.name, last.key) in _NAMES:
                yield replace(e, verdicts=self._by_name(place, e.text))
            else:
                yield e

    def _verdicts(self, place: Place, name: str) -> Iterator[tuple[bytes, str, str]]:
        for element in self.elements(Place(place.family, place.table, name)):
            parts = dict(attributes(element))
            key = dict(attributes(parts.get(1, b""))).get(1, b"")
            yield key, *_verdict(parts.get(2, b""))

    def _by_name(self, place: Place, name: str) -> tuple[tuple[bytes, str, str], ...]:
        """The same of names of interfaces; nothing if there are ranges, an element for all others, or concatenations."""
        elements = [dict(attributes(e)) for e in self.elements(Place(place.family, place.table, name))]
        found = tuple(self._verdicts(place, name))
        return () if any(3 in e for e in elements) or any(len(key) != _NAME_BYTES for key, _, _ in found) else found

    def elements(self, place: Place) -> Iterator[bytes]:
        """Elements of a set (`place.chain` is its name), as the kernel tells them."""
        where = attribute(1, place.table) + attribute(2, place.chain)
        for _, body in self._ask(_GETSETELEM, place.family, where, dump=True):
            yield from (element for _, element in attributes(dict(body).get(3, b"")))

    def owned(self) -> set[tuple[int, str]]:
        """Family and name of tables that only the process which made them may change."""
        found = ((family, dict(body)) for family, body in self._ask(_GETTABLE, 0, b"", dump=True))
        return {(family, _text(table.get(1))) for family, table in found if _number(table.get(2)) & _OWNER}

    def change(self, messages: Sequence[Message]) -> None:
        """All of it or nothing. `Refused` if the kernel does not take one of the messages."""
        numbers = [next(self._sequence) for _ in range(len(messages) + 2)]
        parts = [_message(_BATCH_BEGIN, _REQUEST, numbers[0], 0, b"", resource=_SUBSYSTEM)]
        for number, (kind, flags, family, body) in zip(numbers[1:], messages, strict=False):
            parts.append(_message(_SUBSYSTEM << 8 | kind, _REQUEST | _ACK | flags, number, family, body))
        parts.append(_message(_BATCH_END, _REQUEST, numbers[-1], 0, b"", resource=_SUBSYSTEM))
        self._socket.send(b"".join(parts))
        waiting, failed = set(numbers[1:-1]), 0
        while waiting:
            for kind, sequence, _, data in self._receive():
                if kind == _NLMSG_ERROR and sequence in numbers:
                    waiting.discard(sequence)
                    failed = failed or -struct.unpack_from("=i", data)[0]
                    if sequence not in numbers[1:-1] and failed:
                        waiting.clear()  # the whole batch was refused
        if failed:
            raise Refused(failed)

    def _ask(self, what: int, family: int, body: bytes, *, dump: bool) -> Iterator[tuple[int, list[tuple[int, bytes]]]]:
        """Family and attributes of each answer. Nothing if what was asked for is not there."""
        for _ in range(_TRIES):
            found, whole = self._ask_once(what, family, body, dump)
            if whole:
                break
        yield from found

    def _ask_once(
        self, what: int, family: int, body: bytes, dump: bool
    ) -> tuple[list[tuple[int, list[tuple[int, bytes]]]], bool]:
        """And whether nobody changed it meanwhile."""
        number = next(self._sequence)
        flags = _REQUEST | (_DUMP if dump else _ACK)
        self._socket.send(_message(_SUBSYSTEM << 8 | what, flags, number, family, body))
        found: list[tuple[int, list[tuple[int, bytes]]]] = []
        over, whole = False, True
        while not over:
            for kind, sequence, marks, data in self._receive():
                if sequence != number:
                    continue
                whole = whole and not marks & _DUMP_INTERRUPTED
                if kind == _NLMSG_ERROR:
                    problem = -struct.unpack_from("=i", data)[0]
                    if problem not in (0, _ENOENT):
                        raise Refused(problem)
                    over = True
                elif kind == _NLMSG_DONE:
                    over = True
                else:
                    found.append((data[0], attributes(data[4:])))
        return found, whole

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, sequence number, flags and payload of each message that has come."""
        try:
            data = self._socket.recv(_LONGEST_ANSWER)
        except TimeoutError:
            raise AgentError(f"nf_tables: no answer for {_WAIT_SECONDS:g} s") from None
        yield from messages(data)


def _message(kind: int, flags: int, sequence: int, family: int, body: bytes, resource: int = 0) -> bytes:
    payload = struct.pack("!BBH", family, 0, resource) + body
    return struct.pack("=IHHII", len(payload) + 16, kind, flags, sequence, 0) + payload


def _verdict(data: bytes) -> tuple[str, str]:
    """Name of the verdict and, of a jump, the chain; ("", "") for other data."""
    verdict = dict(attributes(dict(attributes(data)).get(2, b"")))
    if 1 not in verdict:
        return "", ""
    code = struct.unpack("!i", verdict[1])[0]
    return _VERDICTS.get(code & 0xFF if code > 0 else code, "queue"), _text(verdict.get(2))


def _expression(found: Attributes) -> Expression:
    """As far as the agent must understand it; of others the name alone."""
    name, data = _text(found.get(1)), dict(attributes(found.get(2, b"")))
    match name:
        case "meta" | "ct":
            return Expression(name, key=_number(data.get(2)), register=_number(data.get(1)))
        case "cmp":
            value = dict(attributes(data.get(3, b""))).get(1, b"")
            return Expression(name, key=_number(data.get(2)), register=_number(data.get(1)), data=value)
        case "bitwise":
            mask = dict(attributes(data.get(4, b""))).get(1, b"")
            return Expression(name, register=_number(data.get(1)), data=mask)
        case "immediate":
            verdict, chain = _verdict(data.get(2, b""))
            return Expression(name, text=verdict, chain=chain)
        case "lookup":
            to_verdict = 3 in data and _number(data[3]) == 0
            return Expression(
                name, key=_number(data.get(5)), text=_text(data.get(1)), register=_number(data.get(2)), to_verdict=to_verdict
            )  # fmt: skip
        case "match" | "target":
            return Expression(name, text=_text(data.get(1)), key=_number(data.get(2)), data=data.get(3, b""))
        case _:
            return Expression(name)


def change_socket() -> socket.socket:
    """A netlink socket that becomes readable when rules of this namespace change. OSError if the kernel has none."""
    watcher = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER)
    watcher.bind((0, 1 << _GROUP_NFTABLES - 1))
    return watcher
