"""Packets to a listener that is watched: who is a stranger, what is counted, what is dropped."""

import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from tests.director.frames import (
    CLIENT,
    DROP,
    ONE,
    REDIRECT,
    TCP,
    TWO,
    UDP,
    Director,
    Result,
    ethernet,
    icmp,
    ip,
    transport,
)

from packetstack_core import abi

NUMBER = 5
OPENERS, STRAYS = 0, 1
ACK, SYN, SYN_ACK = 0x10, 0x02, 0x12
MINUTE = 60_000_000_000
"""Between two strangers that are let through: with what may come at once, one passes."""


class Watched(Director):
    """With its first stack's TCP and UDP listeners watched, both families under one number."""

    def __init__(self) -> None:
        super().__init__()
        target = struct.pack("<QQIIII", ONE.key0, ONE.key1, ONE.offset, ONE.buckets - 1, ONE.number, NUMBER << 16)
        for family, vip in ONE.vip.items():
            for port, protocol in ((80, TCP), (53, UDP)):
                key = ip_address(vip).packed + struct.pack(">HBB", port, protocol, 0)
                self.put(f"listeners{family}", key, target)
                if family == 4:
                    wide = int.from_bytes(key, "little")
                    place = (wide * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 54
                    self.put("direct4", struct.pack("<I", place), struct.pack("<Q", wide) + target)

    def allow(self, openers_ns: int, strays_ns: int, half: int = 0) -> None:
        self.put(
            "watches", struct.pack("<I", NUMBER), struct.pack("<4QII3Q", 0, 0, openers_ns, strays_ns, half, 0, 0, 0, 0)
        )

    def know(self, hash32: int, half: int, known: bool = True) -> None:
        word = (hash32 >> 6 & abi.lib().PS_KNOWN_WORDS - 1) + half * abi.lib().PS_KNOWN_WORDS
        self.put("known", struct.pack("<I", word), struct.pack("<Q", known << (hash32 & 63)))

    def seen(self) -> list[int]:
        """Offered openers and strays, dropped openers and strays."""
        return self.per_cpu("watched", NUMBER, 4)

    def watched(self, frame: bytes) -> tuple[Result, list[int]]:
        before = self.seen()
        result = self.run(frame)
        return result, [after - b for after, b in zip(self.seen(), before, strict=True)]


@pytest.fixture(scope="module")
def director() -> Iterator[Watched]:
    d = Watched()
    yield d
    d.close()


def segment(flags: int, family: int = 4, sport: int = 999) -> bytes:
    body = bytearray(transport(TCP, sport, 80))
    body[13] = flags
    return ethernet(ip(CLIENT[family], ONE.vip[family], TCP, bytes(body)))


def datagram(family: int = 4, sport: int = 999) -> bytes:
    return ethernet(ip(CLIENT[family], ONE.vip[family], UDP, transport(UDP, sport, 53)))


def unreachable() -> bytes:
    quoted = ip(ONE.vip[4], CLIENT[4], TCP, transport(TCP, 80, 999))
    return ethernet(icmp(4, 3, quoted, "203.0.113.99", ONE.vip[4], code=1))


KINDS = {
    "a SYN": (segment(SYN), OPENERS),
    "a datagram": (datagram(), OPENERS),
    "a SYN, IPv6": (segment(SYN, 6), OPENERS),
    "a datagram, IPv6": (datagram(6), OPENERS),
    "an acknowledgement": (segment(ACK), STRAYS),
    "a SYN with an ACK": (segment(SYN_ACK), STRAYS),
    "an acknowledgement, IPv6": (segment(ACK, 6), STRAYS),
    "an ICMP error": (unreachable(), STRAYS),
}


@pytest.mark.parametrize(("frame", "kind"), KINDS.values(), ids=KINDS.keys())
def test_strangers_are_counted_by_kind_and_dropped_beyond_their_rate(
    director: Watched, frame: bytes, kind: int
) -> None:
    director.allow(0, 0)
    result, seen = director.watched(frame)
    assert result.action == REDIRECT
    assert seen == [kind == OPENERS, kind == STRAYS, 0, 0], "without a rate all are let through"
    director.allow(*((MINUTE, 0) if kind == OPENERS else (0, MINUTE)))
    assert director.watched(frame)[0].action == REDIRECT
    result, seen = director.watched(frame)
    assert (result.action, result.counted) == (DROP, {"received": 1, "drop_shed": 1})
    assert seen == [kind == OPENERS, kind == STRAYS, kind == OPENERS, kind == STRAYS]
    other = segment(ACK) if kind == OPENERS else segment(SYN)
    assert director.watched(other)[0].action == REDIRECT, "of the other kind there are not too many"


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize(("frame", "protocol"), [(segment(ACK), TCP), (datagram(), UDP)], ids=["TCP", "UDP"])
def test_packets_of_known_flows_are_let_through(director: Watched, frame: bytes, protocol: int, half: int) -> None:
    director.allow(MINUTE, MINUTE, half)
    while director.watched(frame)[0].action != DROP:
        pass
    _, upper = ONE.forward(4, CLIENT[4], 999, 80 if protocol == TCP else 53, protocol)
    director.know(upper, 1 - half)
    assert director.watched(frame)[0].action == DROP, "that half is not the one in use"
    director.know(upper, half)
    result, seen = director.watched(frame)
    assert (result.action, seen) == (REDIRECT, [0, 0, 0, 0])
    for at in (0, 1):
        director.know(upper, at, known=False)


def test_a_syn_is_a_strangers_whatever_its_addresses(director: Watched) -> None:
    director.allow(MINUTE, MINUTE)
    _, upper = ONE.forward(4, CLIENT[4], 999, 80, TCP)
    director.know(upper, 0)
    director.watched(segment(SYN))
    assert director.watched(segment(SYN))[0].action == DROP
    assert director.watched(segment(ACK))[0].action == REDIRECT
    director.know(upper, 0, known=False)


def test_later_fragments_of_a_known_flow_are_let_through(director: Watched) -> None:
    director.allow(0, 0)
    first = ip(CLIENT[4], ONE.vip[4], UDP, transport(UDP, 999, 53), ident=77, fragment=0x2000)
    later = ethernet(ip(CLIENT[4], ONE.vip[4], UDP, b"the rest", ident=77, fragment=2))
    assert director.watched(ethernet(first))[0].action == REDIRECT
    director.allow(MINUTE, MINUTE)
    director.watched(later)
    assert director.watched(later)[0].action == DROP
    _, upper = ONE.forward(4, CLIENT[4], 999, 53, UDP)
    director.know(upper, 0)
    assert director.watched(later)[0].action == REDIRECT
    director.know(upper, 0, known=False)


def test_backends_and_listeners_that_are_not_watched_are_left_alone(director: Watched) -> None:
    director.allow(MINUTE, MINUTE)
    for frame in (
        ethernet(ip("10.1.2.3", ONE.snat[4], TCP, transport(TCP, 8080, 4097))),
        ethernet(ip(CLIENT[4], TWO.vip[4], TCP, transport(TCP, 999, 80))),
        ethernet(ip(CLIENT[4], TWO.vip[4], UDP, transport(UDP, 999, 53))),
    ):
        for _ in range(3):
            result, seen = director.watched(frame)
            assert (result.action, seen) == (REDIRECT, [0, 0, 0, 0])


def test_an_even_stream_passes_at_its_rate(director: Watched) -> None:
    director.allow(1_000_000, 0)  # a thousand a second, 50 at once
    passed = sum(director.watched(datagram(sport=1000 + i))[0].action == REDIRECT for i in range(400))
    assert 50 <= passed < 400
