"""Packets through the director's program, one by one (BPF_PROG_TEST_RUN): what it does with each, and what it stamps.

The stamp is held against packetstack_core.hashing, the other implementation.
"""

import random
import socket
import struct
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest
from tests.director.frames import (
    BACKEND,
    CLIENT,
    DROP,
    FAMILIES,
    FRAGMENT,
    ICMP_FLAG,
    ICMPV6,
    ONE,
    OUR_MAC,
    PASS,
    PROTOCOLS,
    REDIRECT,
    REPLY,
    TCP,
    TWO,
    TX,
    UDP,
    Director,
    Result,
    Stack,
    ethernet,
    icmp,
    ip,
    options_header,
    transport,
)

from packetstack_core import abi

# ---- forward and back --------------------------------------------------------------------------------------


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("stack", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("tags", [(), (0x8100,)], ids=["untagged", "vlan"])
@pytest.mark.parametrize("uplink", [False, True], ids=["routed", "uplink"])
def test_a_clients_packet_is_stamped_for_its_owner_and_left_as_it_is(
    director: Director, family: int, protocol: int, port: int, stack: Stack, tags: tuple[int, ...], uplink: bool
) -> None:
    for sport in random.Random(port + family).sample(range(1, 65536), 20):
        packet = ip(CLIENT[family], stack.vip[family], protocol, transport(protocol, sport, port))
        frame = ethernet(packet, tags)
        result = director.run(frame, uplink=uplink)
        bucket, upper = stack.forward(family, CLIENT[family], sport, port, protocol)
        assert result == Result(REDIRECT, frame, stack.stamp(bucket, 0, upper), {"received": 1, "forwarded": 1})


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("stack", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("tags", [(), (0x8100,)], ids=["untagged", "vlan"])
def test_a_backends_packet_goes_to_the_bucket_in_its_port(
    director: Director, family: int, protocol: int, port: int, stack: Stack, tags: tuple[int, ...]
) -> None:
    for snat_port in (4096, 4097, 12345, 65535):
        frame = ethernet(ip(BACKEND[family], stack.snat[family], protocol, transport(protocol, port, snat_port)), tags)
        result = director.run(frame)
        bucket = snat_port & (stack.buckets - 1)
        assert result == Result(REDIRECT, frame, stack.stamp(bucket, REPLY, 0), {"received": 1, "forwarded": 1})


@pytest.mark.parametrize("length", [4, 20, 40])
def test_ipv4_options_do_not_matter(director: Director, length: int) -> None:
    packet = ip(CLIENT[4], ONE.vip[4], TCP, transport(TCP, 999, 80), options=b"\x01" * length)
    result = director.run(ethernet(packet))
    bucket, upper = ONE.forward(4, CLIENT[4], 999, 80, TCP)
    assert (result.action, result.stamp) == (REDIRECT, ONE.stamp(bucket, 0, upper))


CHAINS = {
    "hop-by-hop": ((0, options_header()),),
    "destination": ((60, options_header(24)),),
    "two": ((0, options_header()), (60, options_header(64))),
    "four": ((0, options_header()), (60, options_header()), (43, bytes(8)), (60, options_header(2048))),
    "routing, done": ((43, bytes([0, 0, 0, 0]) + bytes(4)),),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_ipv6_extension_headers_do_not_matter(director: Director, chain: tuple[tuple[int, bytes], ...]) -> None:
    packet = ip(CLIENT[6], ONE.vip[6], UDP, transport(UDP, 999, 53), extensions=chain)
    result = director.run(ethernet(packet))
    bucket, upper = ONE.forward(6, CLIENT[6], 999, 53, UDP)
    assert (result.action, result.stamp) == (REDIRECT, ONE.stamp(bucket, 0, upper))


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
def test_metadata_that_a_frame_came_with_is_replaced(director: Director, size: int) -> None:
    frame = ethernet(ip(CLIENT[4], ONE.vip[4], TCP, transport(TCP, 5, 80)))
    result = director.run(frame, metadata=b"\xee" * size)
    bucket, upper = ONE.forward(4, CLIENT[4], 5, 80, TCP)
    assert result == Result(REDIRECT, frame, ONE.stamp(bucket, 0, upper), {"received": 1, "forwarded": 1})


# ---- fragments -----------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("reply", [False, True], ids=["client", "backend"])
def test_later_fragments_follow_their_first(director: Director, family: int, reply: bool) -> None:
    if reply:
        source, destination, sport, dport = BACKEND[family], ONE.snat[family], 53, 5000
        bucket, upper, flags = 5000 & 4095, 0, REPLY
    else:
        source, destination, sport, dport = CLIENT[family], ONE.vip[family], 3333, 53
        bucket, upper = ONE.forward(family, source, sport, dport, UDP)
        flags = 0
    body = transport(UDP, sport, dport, bytes(100))
    more, later = (0x2000, 13) if family == 4 else (1, 13 << 3)
    ident = 700 + family + reply
    first = ip(source, destination, UDP, body[:104], ident=ident, fragment=more)
    last = ip(source, destination, UDP, body[104:] + bytes(4), ident=ident, fragment=later)
    early = director.run(ethernet(last))
    assert (early.action, early.stamp, early.counted) == (DROP, None, {"received": 1, "drop_fragment_early": 1})
    assert director.run(ethernet(first)).stamp == ONE.stamp(bucket, flags, upper)
    ports = sport << 16 | dport
    assert director.run(ethernet(last)).stamp == ONE.stamp(bucket, flags | FRAGMENT, ports)
    other = ip(source, destination, UDP, body[104:] + bytes(4), ident=ident + 10, fragment=later)
    assert director.run(ethernet(other)).action == DROP


def test_fragments_of_others_are_passed_on(director: Director) -> None:
    frame = ethernet(ip(CLIENT[4], "192.0.2.200", UDP, bytes(16), ident=1, fragment=5))
    assert director.run(frame, uplink=True).counted == {"received": 1, "passed": 1}


# ---- ICMP ------------------------------------------------------------------------------------------------------

ERRORS = [(4, 3), (4, 11), (4, 12), (6, 1), (6, 2), (6, 3), (6, 4)]
ROUTER = {4: "192.0.2.254", 6: "2001:db8:9::fe"}


@pytest.mark.parametrize(("family", "kind"), ERRORS)
@PROTOCOLS
def test_an_icmp_error_about_an_answer_to_a_client_follows_the_flow(
    director: Director, family: int, kind: int, protocol: int, port: int
) -> None:
    for stack in (ONE, TWO):
        ours = ip(stack.vip[family], CLIENT[family], protocol, transport(protocol, port, 2020)[:8])
        frame = ethernet(icmp(family, kind, ours, ROUTER[family], stack.vip[family]))
        bucket, upper = stack.forward(family, CLIENT[family], 2020, port, protocol)
        result = director.run(frame)
        assert result == Result(REDIRECT, frame, stack.stamp(bucket, ICMP_FLAG, upper), {"received": 1, "forwarded": 1})


@pytest.mark.parametrize(("family", "kind"), ERRORS)
@PROTOCOLS
def test_an_icmp_error_about_a_packet_to_a_backend_follows_the_flow(
    director: Director, family: int, kind: int, protocol: int, port: int
) -> None:
    for stack in (ONE, TWO):
        ours = ip(stack.snat[family], BACKEND[family], protocol, transport(protocol, 23456, port))
        frame = ethernet(icmp(family, kind, ours, ROUTER[family], stack.snat[family]))
        bucket = 23456 & (stack.buckets - 1)
        result = director.run(frame)
        assert (result.action, result.stamp) == (REDIRECT, stack.stamp(bucket, ICMP_FLAG | REPLY, 0))


@FAMILIES
def test_an_icmp_error_that_quotes_a_packet_of_someone_else_is_not_ours(director: Director, family: int) -> None:
    theirs = ip(BACKEND[family], CLIENT[family], TCP, transport(TCP, 80, 2020))
    frame = ethernet(icmp(family, 3, theirs, ROUTER[family], ONE.vip[family]))
    assert director.run(frame).counted == {"received": 1, "drop_not_ours": 1}
    forged = ip(ONE.vip[family], CLIENT[family], TCP, transport(TCP, 80, 2020))
    frame = ethernet(icmp(family, 3, forged, ROUTER[family], TWO.vip[family]))
    assert director.run(frame, uplink=True).counted == {"received": 1, "passed": 1}


@FAMILIES
@pytest.mark.parametrize("tags", [(), (0x88A8, 0x8100)], ids=["untagged", "qinq"])
def test_an_echo_request_to_a_virtual_address_is_answered(
    director: Director, family: int, tags: tuple[int, ...]
) -> None:
    request, reply = (8, 0) if family == 4 else (128, 129)
    asked = icmp(family, request, b"abcdefghijk", CLIENT[family], ONE.vip[family])
    result = director.run(ethernet(asked, tags))
    assert (result.action, result.counted) == (TX, {"received": 1, "echo_replied": 1})
    answer = icmp(family, reply, b"abcdefghijk", ONE.vip[family], CLIENT[family])
    frame = ethernet(answer, tags)
    assert result.frame == frame[6:12] + frame[:6] + frame[12:]


@FAMILIES
def test_an_echo_request_is_left_to_the_kernel_on_an_uplink(director: Director, family: int) -> None:
    asked = icmp(family, 8 if family == 4 else 128, b"abc", CLIENT[family], ONE.vip[family])
    assert director.run(ethernet(asked), uplink=True).counted == {"received": 1, "passed": 1}


def test_an_echo_request_behind_very_long_options_is_answered_right_or_not_at_all(director: Director) -> None:
    for length in (8, 120, 192, 200, 256, 512):
        message = icmp(6, 128, b"abc", CLIENT[6], ONE.vip[6])[40:]
        frame = ethernet(ip(CLIENT[6], ONE.vip[6], ICMPV6, message, extensions=((60, options_header(length)),)))
        result = director.run(frame)
        if result.action == TX:
            answer = icmp(6, 129, b"abc", ONE.vip[6], CLIENT[6])[40:]
            assert result.frame[54 + length :] == answer, length
        else:
            assert result.frame == frame
            assert result.counted == {"received": 1, "drop_not_ours": 1}
    assert result.action == DROP


# ---- what is not forwarded ---------------------------------------------------------------------------------------

OTHERS = {
    "another address": ip(CLIENT[4], "192.0.2.200", TCP, transport(TCP, 1, 80)),
    "a reset to another port": ip(CLIENT[4], ONE.vip[4], TCP, transport(TCP, 1, 81)[:13] + b"\4" + bytes(6)),
    "a fragment to another port": ip(CLIENT[4], ONE.vip[4], UDP, transport(UDP, 1, 80), fragment=0x2000),
    "another address, v6": ip(CLIENT[6], "2001:db8:1::3", TCP, transport(TCP, 1, 80)),
    "GRE": ip(CLIENT[4], ONE.vip[4], 47, bytes(20)),
    "echo reply": icmp(4, 0, b"abc", CLIENT[4], ONE.vip[4]),
    "echo to another": icmp(4, 8, b"abc", CLIENT[4], "192.0.2.200"),
    "neighbour solicitation": icmp(6, 135, bytes(16), CLIENT[6], ONE.vip[6]),
    "a route not yet at its end": ip(
        CLIENT[6], ONE.vip[6], TCP, transport(TCP, 1, 80), extensions=((43, bytes([0, 2, 0, 1]) + bytes(20)),)
    ),
}


@pytest.mark.parametrize("packet", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_not_ours_is_passed_on_untouched_or_dropped_on_the_pair(director: Director, packet: bytes) -> None:
    frame = ethernet(packet)
    assert director.run(frame, uplink=True) == Result(PASS, frame, None, {"received": 1, "passed": 1})
    assert director.run(frame) == Result(DROP, frame, None, {"received": 1, "drop_not_ours": 1})


def test_other_ethertypes_are_passed_on(director: Director) -> None:
    for kind in (0x0806, 0x88B5, 0x8847, 0x0005):
        frame = OUR_MAC + bytes(6) + struct.pack(">H", kind) + bytes(46)
        assert director.run(frame, uplink=True).counted == {"received": 1, "passed": 1}


def test_packets_of_a_bucket_without_owner_or_engine_are_dropped_by_name(director: Director) -> None:
    frame = ethernet(ip(CLIENT[4], ONE.vip[4], TCP, transport(TCP, 777, 80)))
    bucket, _ = ONE.forward(4, CLIENT[4], 777, 80, TCP)
    try:
        director.give(ONE, bucket, 5 << 32)
        assert director.run(frame).counted == {"received": 1, "drop_no_owner": 1}
        director.give(ONE, bucket, 5 << 32 | 9 << 22)
        assert director.run(frame).counted == {"received": 1, "drop_no_engine": 1}
        director.give(ONE, bucket, 5 << 32 | 1 << 22 | 2 << 6)  # mirrored, by a pair that nobody has made
        assert director.run(frame).counted == {"received": 1, "drop_no_engine": 1}
    finally:
        director.give(ONE, bucket, ONE.word(bucket))
    assert director.run(frame).action == REDIRECT


WHOLE = {
    "tcp": (ip(CLIENT[4], ONE.vip[4], TCP, transport(TCP, 1, 80, b"")), 34),
    "udp6": (ip(CLIENT[6], ONE.vip[6], UDP, transport(UDP, 1, 53, b"")), 54),
    "options": (ip(CLIENT[4], ONE.vip[4], TCP, transport(TCP, 1, 80, b""), options=b"\x01" * 12), 46),
    "extensions": (ip(CLIENT[6], ONE.vip[6], TCP, transport(TCP, 1, 80, b""), extensions=CHAINS["two"]), 126),
    "icmp": (icmp(4, 3, ip(ONE.vip[4], CLIENT[4], TCP, transport(TCP, 80, 1)[:8]), ROUTER[4], ONE.vip[4]), 0),
    "icmp6": (icmp(6, 1, ip(ONE.vip[6], CLIENT[6], TCP, transport(TCP, 80, 1)[:8]), ROUTER[6], ONE.vip[6]), 0),
    "echo": (icmp(4, 8, b"", CLIENT[4], ONE.vip[4]), 0),
    "echo6": (icmp(6, 128, b"", CLIENT[6], ONE.vip[6]), 0),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("tags", [(), (0x8100,), (0x88A8, 0x8100)], ids=["untagged", "vlan", "qinq"])
def test_a_packet_cut_off_anywhere_is_never_forwarded_without_its_ports(
    director: Director, name: str, tags: tuple[int, ...]
) -> None:
    packet, transport_at = WHOLE[name]
    frame = ethernet(packet, tags)
    assert director.run(frame).action in (REDIRECT, TX)
    for length in range(14, len(frame)):
        for uplink in (False, True):
            result = director.run(frame[:length], uplink=uplink)
            # The engine checks what is behind the ports of a plain IPv4 packet; here its header is enough.
            if result.action == REDIRECT:
                assert name == "tcp"
                assert length >= transport_at + 8
                continue
            assert result.action == (PASS if uplink else DROP), length
            assert (result.frame, result.stamp) == (frame[:length], None)
            assert len(result.counted) == 2


def test_ethernet_padding_is_no_part_of_the_packet(director: Director) -> None:
    packet = icmp(4, 3, ip(ONE.vip[4], CLIENT[4], TCP, transport(TCP, 80, 1)[:7]), ROUTER[4], ONE.vip[4])
    assert director.run(ethernet(packet) + b"\1" * 16).action == DROP


def test_every_frame_is_counted_once_whatever_is_in_it(director: Director) -> None:
    chooser = random.Random(7)
    packets = [packet for packet, _ in WHOLE.values()] + list(OTHERS.values())
    before = director.counters()
    rounds = 4000
    for _ in range(rounds):
        frame = bytearray(ethernet(chooser.choice(packets), chooser.choice([(), (0x8100,), (0x88A8, 0x8100)])))
        for _ in range(chooser.choice([0, 1, 1, 2, 8])):
            frame[chooser.randrange(len(frame))] = chooser.choice([0, 1, 255, chooser.randrange(256)])
        result = director.run(bytes(frame[: chooser.randrange(14, len(frame) + 1)]), uplink=chooser.random() < 0.5)
        assert result.action in (DROP, PASS, TX, REDIRECT)
        assert (result.stamp is not None) == (result.action == REDIRECT)
        assert sum(result.counted.values()) == 2, result
    after = director.counters()
    got = {name: after[name] - before[name] for name in after}
    assert got.pop("received") == rounds == sum(got.values())


def test_listeners_are_found_until_they_are_removed_whatever_takes_their_place(tmp_path: Path) -> None:
    """Through libpacketstack: thousands of listeners share the places of the direct table, and outlive an agent."""
    ffi, lib = abi.ffi, abi.lib()
    error = ffi.new("struct ps_error *")
    pins = tmp_path / "bpf"
    d = lib.ps_director_open(str(abi.NATIVE).encode(), str(pins).encode(), error)
    assert d != ffi.NULL, ffi.string(error.text)
    try:
        chooser = random.Random(3)
        target = ffi.new("struct ps_target *", {"key0": 1, "key1": 2, "mask": 255})
        address = bytes(10) + b"\xff\xff" + ip_address(ONE.vip[4]).packed
        ports = chooser.sample(range(1, 65536), 2000)
        here = Director(pins)
        for bucket in range(256):
            here.give(ONE, bucket, 1 << 22)

        def found(port: int) -> bool:
            frame = ethernet(ip(CLIENT[4], ONE.vip[4], TCP, transport(TCP, 1, port)))
            return here.run(frame).action == REDIRECT

        for port in ports:
            assert lib.ps_director_listener(d, address, socket.htons(port), TCP, target, error) == 0
        assert all(found(port) for port in ports)
        # What the next agent does.
        lib.ps_director_close(d)
        d = lib.ps_director_open(str(abi.NATIVE).encode(), str(pins).encode(), error)
        assert d != ffi.NULL, ffi.string(error.text)
        gone = set(chooser.sample(ports, 1000))
        for port in gone:
            assert lib.ps_director_listener(d, address, socket.htons(port), TCP, ffi.NULL, error) == 0
        assert [port for port in ports if found(port) == (port in gone)] == []
        here.close()
    finally:
        lib.ps_director_close(d)
        subprocess.run(["umount", str(pins)], check=True)
