"""What the director does not take, and what it answers itself (BPF_PROG_TEST_RUN), on an uplink and on the routed pair.

The kernel of a node would refuse most of this; on an uplink the director is there before it, and on the pair nobody
knows how the kernel was set up.
"""

import struct
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import count

import pytest
from tests.director.frames import (
    BACKEND,
    BACKENDS,
    BROADCAST,
    CLIENT,
    CLIENTS,
    DROP,
    FAMILIES,
    FRAGMENT,
    ICMP,
    ICMPV6,
    NO_METADATA,
    NODE,
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
    checksum,
    ethernet,
    icmp,
    ip,
    options_header,
    transport,
)

WAYS = pytest.mark.parametrize("uplink", [False, True], ids=["routed", "uplink"])
PORT = {TCP: 80, UDP: 53}
FROM_UDP = 16
idents = count(1000)


@pytest.fixture(autouse=True)
def answers(director: Director) -> Iterator[None]:
    """A second's worth of answers, and the uplink as it was."""
    director.answers_again()
    yield
    director.uplink(CLIENTS | BACKENDS)


def opener(
    source: str,
    protocol: int = UDP,
    *,
    ttl: int = 64,
    options: bytes = b"",
    extensions: tuple[tuple[int, bytes], ...] = (),
) -> bytes:
    """A packet to a listener."""
    body = transport(protocol, 4321, PORT[protocol])
    vip = ONE.vip[ip_address(source).version]
    return ip(source, vip, protocol, body, ttl=ttl, options=options, extensions=extensions)


# ---- whose frame it is ----------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    "mac", ["020000000077", "ffffffffffff", "01005e000005", "020000000101"], ids=["another's", "broadcast", "multicast", "near"]
)  # fmt: skip
def test_a_frame_to_another_mac_is_left_to_the_kernel_on_an_uplink(director: Director, family: int, mac: str) -> None:
    for packet in (opener(CLIENT[family]), ip(BACKEND[family], ONE.snat[family], UDP, transport(UDP, 53, 5000))):
        frame = ethernet(packet, to=bytes.fromhex(mac))
        assert director.run(frame, uplink=True) == Result(PASS, frame, None, {"received": 1, "passed": 1})
        assert director.run(frame).action == REDIRECT  # what was routed to the pair has been looked at


def test_an_interface_that_is_no_uplink_any_more_takes_nothing(director: Director) -> None:
    director.put("uplinks", struct.pack("<I", 1), bytes(528))
    assert director.run(ethernet(opener(CLIENT[4])), uplink=True).counted == {"received": 1, "passed": 1}


@FAMILIES
def test_a_frame_in_a_vlan_in_which_the_node_is_not_is_left_to_the_kernel(director: Director, family: int) -> None:
    director.uplink(CLIENTS | BACKENDS, vlans=(77, 4094))
    for vlan, action in ((77, REDIRECT), (4094, REDIRECT), (0, REDIRECT), (78, PASS), (5, PASS), (4095, PASS)):
        frame = ethernet(opener(CLIENT[family]), (0x8100,), vlan=vlan)
        assert director.run(frame, uplink=True).action == action, vlan
    for tags in ((0x8100, 0x8100), (0x88A8, 0x8100), (0x88A8,)):
        frame = ethernet(opener(CLIENT[family]), tags, vlan=77)
        assert director.run(frame, uplink=True) == Result(PASS, frame, None, {"received": 1, "passed": 1})
    tagged_priority = ethernet(opener(CLIENT[family]), (0x8100,), vlan=5 << 13)
    assert director.run(tagged_priority, uplink=True).action == REDIRECT


# ---- sources -------------------------------------------------------------------------------------------------

MARTIANS = [
    "0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "224.0.0.5", "239.1.2.3", "240.0.0.1", "255.255.255.255", BROADCAST,
    "::", "::1", "ff02::1", "ff0e::1", "fe80::1", "febf::1", "::ffff:192.0.2.77", "::ffff:127.0.0.1",
]  # fmt: skip
HONEST = [
    "1.0.0.1",
    "126.255.255.255",
    "128.0.0.1",
    "223.255.255.254",
    "169.254.1.1",
    "fec0::1",
    "fd71::1",
    "::2",
    "2001:db8::",
]


def to_us(source: str) -> list[bytes]:
    """All kinds of packets to our addresses with this source."""
    family = 6 if ":" in source else 4
    vip, snat = ONE.vip[family], ONE.snat[family]
    error = ip(vip, CLIENT[family], UDP, transport(UDP, 53, 4321))
    packets = [
        ip(source, vip, TCP, transport(TCP, 4321, 80)),
        ip(source, vip, UDP, transport(UDP, 4321, 53)),
        ip(source, snat, UDP, transport(UDP, 53, 5000)),
        icmp(family, 3, error, source, vip),
        icmp(family, 8 if family == 4 else 128, b"abcd", source, vip),
        ip(source, vip, UDP, transport(UDP, 4321, 53), ident=next(idents), fragment=0x2000 if family == 4 else 1),
        ip(source, vip, TCP, transport(TCP, 4321, 80), ttl=1),
    ]
    if family == 4:
        packets.append(ip(source, vip, UDP, transport(UDP, 4321, 53), options=b"\1" * 4))
    return packets


@WAYS
@pytest.mark.parametrize("source", MARTIANS)
def test_a_source_that_nobody_can_have_is_dropped(director: Director, source: str, uplink: bool) -> None:
    for packet in to_us(source):
        frame = ethernet(packet)
        assert director.run(frame, uplink=uplink) == Result(DROP, frame, None, {"received": 1, "drop_martian": 1})


@WAYS
@pytest.mark.parametrize("source", HONEST)
def test_a_source_beside_those_is_taken(director: Director, source: str, uplink: bool) -> None:
    assert [director.run(ethernet(packet), uplink=uplink).action for packet in to_us(source)[:3]] == [REDIRECT] * 3


@WAYS
@FAMILIES
def test_no_packet_goes_from_one_of_our_addresses_to_another(director: Director, family: int, uplink: bool) -> None:
    for source in (ONE.vip[family], TWO.vip[family], ONE.snat[family], TWO.snat[family]):
        for packet in to_us(source):
            result = director.run(ethernet(packet), uplink=uplink)
            assert (result.action, result.counted) == (DROP, {"received": 1, "drop_own_source": 1})


@FAMILIES
def test_the_nodes_own_address_is_a_client_on_the_pair_and_nobody_on_an_uplink(director: Director, family: int) -> None:
    for packet in to_us(NODE[family]):
        assert director.run(ethernet(packet), uplink=True).counted == {"received": 1, "drop_own_source": 1}
        assert director.run(ethernet(packet)).action in (REDIRECT, TX)


def test_an_address_that_shares_a_bit_of_the_filter_with_ours_is_taken(director: Director) -> None:
    def bit(text: str) -> int:
        return (int.from_bytes(ip_address(text).packed, "little") * 0x9E3779B1 & 0xFFFFFFFF) >> 17

    ours = bit(ONE.vip[4])
    other = next(a for i in range(1 << 20) if bit(a := str(ip_address(0x0A000000 + i))) == ours)
    assert director.run(ethernet(opener(other))).action == REDIRECT


# ---- uplinks for one side ------------------------------------------------------------------------------------


@FAMILIES
def test_an_uplink_for_clients_takes_no_replies_and_one_for_backends_no_openers(
    director: Director, family: int
) -> None:
    vip, snat = ONE.vip[family], ONE.snat[family]
    from_client = [
        opener(CLIENT[family]), opener(CLIENT[family], TCP), opener(CLIENT[family], ttl=1),
        icmp(family, 3, ip(vip, CLIENT[family], UDP, transport(UDP, 53, 4321)), CLIENT[family], vip),
    ]  # fmt: skip
    from_backend = [
        ip(BACKEND[family], snat, TCP, transport(TCP, 80, 5000)),
        ip(BACKEND[family], snat, UDP, transport(UDP, 53, 5000), ttl=1),
        ip(BACKEND[family], snat, UDP, transport(UDP, 53, 5000), ident=next(idents), fragment=0x2000 if family == 4 else 1),
        icmp(family, 3, ip(snat, BACKEND[family], UDP, transport(UDP, 5000, 53)), BACKEND[family], snat),
    ]  # fmt: skip
    for flags, taken, refused in ((CLIENTS, from_client, from_backend), (BACKENDS, from_backend, from_client)):
        director.uplink(flags)
        for packet in taken:
            assert director.run(ethernet(packet), uplink=True).action in (REDIRECT, PASS)
        for packet in refused:
            assert director.run(ethernet(packet), uplink=True).counted == {"received": 1, "drop_wrong_uplink": 1}
            assert director.run(ethernet(packet)).action in (REDIRECT, TX)  # the pair is for both


# ---- allowed sources -----------------------------------------------------------------------------------------

SOURCES = {
    4: (["10.1.0.0/16", "10.2.3.4/32"], ["10.1.255.255", "10.2.3.4"], ["10.2.3.5", "11.1.0.0", CLIENT[4]]),
    6: (["2001:db8:9::/48", "fd00::1/128"], ["2001:db8:9:ffff::1", "fd00::1"], ["2001:db8:a::1", "fd00::2"]),
}


@WAYS
@FAMILIES
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_listener_with_allowed_sources_takes_packets_of_no_others(
    director: Director, family: int, protocol: int, uplink: bool
) -> None:
    networks, good, bad = SOURCES[family]
    director.listen(TWO, family, 8443, protocol, 1)
    for network in networks:
        director.allow(TWO, family, 8443, protocol, network)
    more, later = (0x2000, 13) if family == 4 else (1, 13 << 3)
    for sources, expected in ((good, "forwarded"), (bad, "drop_not_allowed")):
        for source in sources:
            body = transport(protocol, 999, 8443, bytes(96))
            whole = director.run(ethernet(ip(source, TWO.vip[family], protocol, body)), uplink=uplink)
            assert whole.counted == {"received": 1, expected: 1}
            ident = next(idents)
            first = ip(source, TWO.vip[family], protocol, body, ident=ident, fragment=more)
            last = ip(source, TWO.vip[family], protocol, bytes(8), ident=ident, fragment=later)
            assert director.run(ethernet(first), uplink=uplink).counted == {"received": 1, expected: 1}
            result = director.run(ethernet(last), uplink=uplink).counted
            assert result == {"received": 1, expected if expected == "forwarded" else "drop_fragment_early": 1}
    # Sources of one listener are no other's.
    director.listen(TWO, family, 8444, protocol, 1)
    for source in good + bad:
        packet = ip(source, TWO.vip[family], protocol, transport(protocol, 999, 8444))
        assert director.run(ethernet(packet), uplink=uplink).counted == {"received": 1, "drop_not_allowed": 1}
    everybody = ip(bad[0], TWO.vip[family], protocol, transport(protocol, 999, PORT[protocol]))
    assert director.run(ethernet(everybody), uplink=uplink).action == REDIRECT


# ---- routes in packets -----------------------------------------------------------------------------------------

ROUTE = bytes([7, 4]) + ip_address("192.0.2.99").packed
"""Length, pointer and one hop of a source route."""


@PROTOCOLS
@pytest.mark.parametrize(
    "options",
    [
        b"\x83" + ROUTE + b"\0", b"\x89" + ROUTE + b"\0", b"\1\x83" + ROUTE, b"\1" * 32 + b"\x89" + ROUTE + b"\0",
        b"\x44\x0c\x05\0" + bytes(8) + b"\x83" + ROUTE + b"\0", b"\x83\3\4\0",
    ],
    ids=["loose", "strict", "behind padding", "at the end", "behind timestamps", "empty"],
)  # fmt: skip
def test_a_packet_with_a_source_route_is_left_to_the_kernel_and_dropped_on_the_pair(
    director: Director, protocol: int, port: int, options: bytes
) -> None:
    for source, destination, dport in ((CLIENT[4], ONE.vip[4], port), (BACKEND[4], ONE.snat[4], 5000)):
        for fragment in (None, 0x2000, 2):
            body = transport(protocol, 999, dport)
            frame = ethernet(ip(source, destination, protocol, body, options=options, fragment=fragment))
            assert director.run(frame, uplink=True) == Result(PASS, frame, None, {"received": 1, "passed": 1})
            assert director.run(frame) == Result(DROP, frame, None, {"received": 1, "drop_not_ours": 1})


@pytest.mark.parametrize(
    "options",
    [b"\0\x83" + ROUTE[:6], b"\x07" + ROUTE + b"\0", b"\x44\0\x83\3", b"\x94\4\0\0", b"\1\1\1\x83"],
    ids=["behind the end", "recorded", "behind rubbish", "router alert", "cut off"],
)
def test_other_options_are_no_source_route(director: Director, options: bytes) -> None:
    assert director.run(ethernet(opener(CLIENT[4], options=options))).action == REDIRECT


# ---- drivers without metadata --------------------------------------------------------------------------------


@FAMILIES
@PROTOCOLS
def test_where_no_stamp_can_be_made_a_frame_takes_the_routed_pair(
    director: Director, family: int, protocol: int, port: int
) -> None:
    director.uplink(CLIENTS | BACKENDS | NO_METADATA)
    reply = ip(BACKEND[family], ONE.snat[family], protocol, transport(protocol, port, 5000))
    for frame in (ethernet(opener(CLIENT[family], protocol)), ethernet(reply)):
        assert director.run(frame, uplink=True) == Result(PASS, frame, None, {"received": 1, "passed_metadata": 1})
        assert director.run(frame).action == REDIRECT
    # What is refused is refused before.
    assert director.run(ethernet(opener(ONE.vip[family], protocol)), uplink=True).action == DROP


# ---- answers -------------------------------------------------------------------------------------------------


def answered(result: Result, family: int, sent: bytes, source: str, destination: str) -> bytes:
    """What is behind the IP header of an answer that goes from `source` to `destination`; its checksums are right."""
    assert result.action == TX
    assert result.frame[:6] == sent[6:12]
    assert result.frame[6:14] == sent[:6] + sent[12:14]
    packet = result.frame[14:]
    if family == 4:
        assert packet[0] == 0x45
        assert checksum(packet[:20]) == 0
        protocol, body, addresses = packet[9], packet[20:], packet[12:20]
        assert struct.unpack(">H", packet[2:4])[0] == len(packet)
        assert packet[8] == 64
    else:
        protocol, body, addresses = packet[6], packet[40:], packet[8:40]
        assert struct.unpack(">H", packet[4:6])[0] == len(body)
        assert packet[7] == 64
    assert addresses == ip_address(source).packed + ip_address(destination).packed
    pseudo = b"" if protocol == ICMP else addresses + struct.pack(">IxxxB", len(body), protocol)
    assert checksum(pseudo + body) == 0
    return body


def quoted(result: Result, family: int, frame: bytes, source: str, destination: str, kind: int, code: int) -> None:
    body = answered(result, family, frame, source, destination)
    assert body[:2] == bytes([kind, code])
    assert body[4:8] == bytes(4)
    assert len(body) >= 8 + (28 if family == 4 else 48)
    assert frame[14:].startswith(body[8:])


@FAMILIES
@PROTOCOLS
def test_a_packet_without_hops_left_is_answered_by_time_exceeded(
    director: Director, family: int, protocol: int, port: int
) -> None:
    kind = 11 if family == 4 else 3
    for ttl in (0, 1):
        frame = ethernet(opener(CLIENT[family], protocol, ttl=ttl))
        result = director.run(frame)
        quoted(result, family, frame, ONE.vip[family], CLIENT[family], kind, 0)
        assert result.counted == {"received": 1, "time_exceeded_sent": 1}
        # On an uplink the kernel is the router that answers.
        assert director.run(frame, uplink=True) == Result(PASS, frame, None, {"received": 1, "passed": 1})
    frame = ethernet(ip(BACKEND[family], ONE.snat[family], protocol, transport(protocol, port, 5000), ttl=1))
    quoted(director.run(frame), family, frame, ONE.snat[family], BACKEND[family], kind, 0)
    assert director.run(ethernet(opener(CLIENT[family], protocol, ttl=2))).action == REDIRECT


def test_time_exceeded_quotes_options_and_extension_headers_up_to_the_ports(director: Director) -> None:
    frame = ethernet(opener(CLIENT[4], ttl=1, options=b"\1" * 40))
    result = director.run(frame)
    quoted(result, 4, frame, ONE.vip[4], CLIENT[4], 11, 0)
    assert len(result.frame) == 14 + 20 + 8 + 60 + 8
    frame = ethernet(opener(CLIENT[6], ttl=1, extensions=((60, options_header(64)),)))
    quoted(director.run(frame), 6, frame, ONE.vip[6], CLIENT[6], 3, 0)
    long = ethernet(opener(CLIENT[6], ttl=1, extensions=((60, options_header(256)),)))
    assert director.run(long) == Result(DROP, long, None, {"received": 1, "drop_ttl": 1})


@FAMILIES
def test_no_error_is_sent_about_an_error_or_a_later_fragment(director: Director, family: int) -> None:
    vip = ONE.vip[family]
    error = icmp(family, 3, ip(vip, CLIENT[family], UDP, transport(UDP, 53, 1)), CLIENT[family], vip)
    at = 8 if family == 4 else 7
    assert director.run(ethernet(error[:at] + b"\1" + error[at + 1 :])).action != TX
    more, later = (0x2000, 2) if family == 4 else (1, 2 << 3)
    ident = next(idents)
    first = ip(CLIENT[family], vip, UDP, transport(UDP, 7, 53), ident=ident, fragment=more)
    assert director.run(ethernet(first)).action == REDIRECT
    last = ip(CLIENT[family], vip, UDP, bytes(8), ident=ident, fragment=later, ttl=1)
    assert director.run(ethernet(last)).counted == {"received": 1, "drop_ttl": 1}


@FAMILIES
def test_udp_to_a_port_without_listener_is_told_that_it_is_unreachable(director: Director, family: int) -> None:
    frame = ethernet(ip(CLIENT[family], ONE.vip[family], UDP, transport(UDP, 5, 33434), ttl=1))
    result = director.run(frame)
    quoted(result, family, frame, ONE.vip[family], CLIENT[family], *((3, 3) if family == 4 else (1, 4)))
    assert result.counted == {"received": 1, "unreachable_sent": 1}
    assert director.run(frame, uplink=True).counted == {"received": 1, "passed": 1}  # it comes by the pair


def segment(flags: int, sequence: int = 1000, acknowledged: int = 7777, data: bytes = b"") -> bytes:
    return struct.pack(">HHIIBBHHH", 5, 81, sequence, acknowledged, 6 << 4, flags, 1000, 0, 0) + bytes(4) + data


FIN, SYN, RST, ACK = 1, 2, 4, 16


@FAMILIES
@pytest.mark.parametrize(
    ("flags", "data", "sequence", "acknowledged", "answer"),
    [
        (SYN, b"", 0, 1001, RST | ACK), (SYN, b"abc", 0, 1004, RST | ACK), (FIN, b"", 0, 1001, RST | ACK),
        (0, b"ab", 0, 1002, RST | ACK), (ACK, b"abc", 7777, 0, RST), (SYN | ACK, b"", 7777, 0, RST),
    ],
)  # fmt: skip
def test_tcp_to_a_port_without_listener_is_reset_as_by_a_host(
    director: Director, family: int, flags: int, data: bytes, sequence: int, acknowledged: int, answer: int
) -> None:
    packet = ip(CLIENT[family], ONE.vip[family], TCP, segment(flags, data=data))
    frame = ethernet(packet) + bytes(6)  # padding is no data
    result = director.run(frame)
    body = answered(result, family, frame, ONE.vip[family], CLIENT[family])
    assert struct.unpack(">HHIIBB", body[:14]) == (81, 5, sequence, acknowledged, 5 << 4, answer)
    assert (len(body), result.counted) == (20, {"received": 1, "reset_sent": 1})


@FAMILIES
def test_a_reset_is_not_answered(director: Director, family: int) -> None:
    frame = ethernet(ip(CLIENT[family], ONE.vip[family], TCP, segment(RST)))
    assert director.run(frame) == Result(DROP, frame, None, {"received": 1, "drop_not_ours": 1})


def test_answers_are_limited_and_what_is_not_answered_is_counted(director: Director) -> None:
    cases = {
        "time_exceeded_sent": ("drop_ttl", opener(CLIENT[4], ttl=1)),
        "reset_sent": ("drop_not_ours", ip(CLIENT[4], ONE.vip[4], TCP, segment(SYN))),
        "unreachable_sent": ("drop_not_ours", ip(CLIENT[4], ONE.vip[4], UDP, transport(UDP, 5, 54))),
    }
    for sent, (dropped, packet) in cases.items():
        director.answers_again()
        seen: dict[str, int] = {}
        for _ in range(1000):
            for name in director.run(ethernet(packet)).counted:
                seen[name] = seen.get(name, 0) + 1
        assert seen["received"] == seen[sent] + seen[dropped] == 1000
        assert 200 <= seen[sent] < 1000  # of each CPU in each second


# ---- echo requests -------------------------------------------------------------------------------------------


@FAMILIES
def test_an_echo_request_in_fragments_is_answered_fragment_by_fragment(director: Director, family: int) -> None:
    request, reply, protocol = (8, 0, ICMP) if family == 4 else (128, 129, ICMPV6)
    head = 20 if family == 4 else 40
    data = bytes(range(256)) * 8
    asked = icmp(family, request, data, CLIENT[family], ONE.vip[family])[head:]
    wanted = icmp(family, reply, data, ONE.vip[family], CLIENT[family])[head:]
    for extensions in ((), ((60, options_header()),)) if family == 6 else ((),):
        ident, got = next(idents), b""
        for start in range(0, len(asked), 800):
            more = start + 800 < len(asked)
            field = (0x2000 * more | start // 8) if family == 4 else start | more
            packet = ip(CLIENT[family], ONE.vip[family], protocol, asked[start : start + 800], ident=ident, fragment=field,
                        extensions=extensions)  # fmt: skip
            assert director.run(ethernet(packet), uplink=True).counted == {"received": 1, "passed": 1}
            result = director.run(ethernet(packet))
            assert result.counted == {"received": 1, "echo_replied": 1}
            back = ip(ONE.vip[family], CLIENT[family], protocol, wanted[start : start + 800], ident=ident, fragment=field,
                      extensions=extensions)  # fmt: skip
            assert result.frame[14:] == back
            got += wanted[start : start + 800]
        assert got == wanted


def test_later_fragments_of_icmp_that_was_no_echo_request_are_not_sent_back(director: Director) -> None:
    for kind in (0, 13):
        first = icmp(4, kind, bytes(64), CLIENT[4], ONE.vip[4])[20:]
        ident = next(idents)
        director.run(ethernet(ip(CLIENT[4], ONE.vip[4], ICMP, first, ident=ident, fragment=0x2000)))
        later = ip(CLIENT[4], ONE.vip[4], ICMP, bytes(8), ident=ident, fragment=9)
        assert director.run(ethernet(later)).action == DROP


@pytest.mark.parametrize("length", [4, 12, 40])
def test_an_echo_request_with_ipv4_options_is_answered(director: Director, length: int) -> None:
    options = b"\1" * length
    asked = icmp(4, 8, b"abcd", CLIENT[4], ONE.vip[4])[20:]
    wanted = icmp(4, 0, b"abcd", ONE.vip[4], CLIENT[4])[20:]
    result = director.run(ethernet(ip(CLIENT[4], ONE.vip[4], ICMP, asked, options=options)))
    assert result.counted == {"received": 1, "echo_replied": 1}
    assert result.frame[14:] == ip(ONE.vip[4], CLIENT[4], ICMP, wanted, options=options)


# ---- fragments -----------------------------------------------------------------------------------------------


def halves(source: str, destination: str, ident: int, sport: int = 7, dport: int = 53) -> tuple[bytes, bytes]:
    """First and last fragment of a datagram."""
    family = ip_address(source).version
    more, later = (0x2000, 13) if family == 4 else (1, 13 << 3)
    first = ip(source, destination, UDP, transport(UDP, sport, dport, bytes(96)), ident=ident, fragment=more)
    return ethernet(first), ethernet(ip(source, destination, UDP, bytes(8), ident=ident, fragment=later))


@FAMILIES
def test_a_second_first_fragment_with_other_ports_does_not_take_a_datagram_over(
    director: Director, family: int
) -> None:
    ident = next(idents)
    first, last = halves(CLIENT[family], ONE.vip[family], ident)
    forged, _ = halves(CLIENT[family], ONE.vip[family], ident, sport=8)
    assert director.run(first).action == REDIRECT
    assert director.run(forged).counted == {"received": 1, "drop_fragment_conflict": 1}
    bucket, _ = ONE.forward(family, CLIENT[family], 7, 53, UDP)
    assert director.run(last).stamp == ONE.stamp(bucket, FRAGMENT, 7 << 16 | 53)
    assert director.run(first).action == REDIRECT  # sent again


def test_a_flood_of_first_fragments_to_one_stack_takes_no_datagram_of_another(director: Director) -> None:
    first, last = halves(CLIENT[4], ONE.vip[4], next(idents))
    late_first, late_last = halves("192.0.2.99", ONE.vip[4], next(idents))
    assert director.run(first).action == REDIRECT
    for i in range(20_000):
        assert director.run(halves(str(ip_address(0x0B000000 + i * 257)), TWO.vip[4], i & 0xFFFF)[0]).action == REDIRECT
        if i == 10_000:
            assert director.run(late_first).action == REDIRECT
    assert director.run(last).action == REDIRECT
    assert director.run(late_last).action == REDIRECT


def test_a_flood_from_one_source_takes_no_datagram_of_another_source(director: Director) -> None:
    for i in range(3_000):
        director.run(halves("192.0.2.97", ONE.vip[4], i, sport=1 + i)[0])
    first, last = halves("192.0.2.98", ONE.vip[4], next(idents))
    assert director.run(first).action == REDIRECT
    for i in range(3_000, 6_000):
        director.run(halves("192.0.2.97", ONE.vip[4], i, sport=1 + i)[0])
    assert director.run(last).action == REDIRECT


def test_datagrams_under_way_outlive_a_flood_from_everywhere_and_new_ones_get_through(director: Director) -> None:
    first, last = halves(CLIENT[6], ONE.vip[6], next(idents))
    assert director.run(first).action == REDIRECT
    for i in range(6_000):
        director.run(halves(str(ip_address(0x0C000000 + i * 257)), ONE.vip[4], i, sport=1 + i)[0])
        if i % 100 == 0:
            new_first, new_last = halves("192.0.2.96", ONE.vip[4], 60_000 + i // 100)
            assert director.run(new_first).action == REDIRECT
            assert director.run(new_last).action == REDIRECT
    assert director.run(last).action == REDIRECT


@pytest.mark.parametrize("reply", [False, True], ids=["client", "backend"])
def test_later_fragments_of_ipv6_whose_header_names_another_extension_find_their_first(
    director: Director, reply: bool
) -> None:
    source, destination, sport, dport = (BACKEND[6], ONE.snat[6], 53, 5000) if reply else (CLIENT[6], ONE.vip[6], 7, 53)
    bucket, upper, flags = (5000 & 4095, 0, REPLY) if reply else (*ONE.forward(6, source, sport, dport, UDP), 0)
    ident = next(idents)
    datagram = bytes([UDP, 0]) + options_header()[2:] + transport(UDP, sport, dport, bytes(96))
    first = ip(source, destination, 60, datagram[:104], ident=ident, fragment=1)
    last = ip(source, destination, 60, datagram[104:], ident=ident, fragment=13 << 3)
    assert director.run(ethernet(first)).stamp == ONE.stamp(bucket, flags, upper)
    assert director.run(ethernet(last)).stamp == ONE.stamp(bucket, flags | FRAGMENT | FROM_UDP, sport << 16 | dport)


def test_the_mac_is_that_of_the_uplink(director: Director) -> None:
    frame = ethernet(opener(CLIENT[4]))
    assert frame[:6] == OUR_MAC
    assert director.run(frame, uplink=True).action == REDIRECT
