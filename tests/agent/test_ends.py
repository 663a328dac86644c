"""Both ends of an engine's interface: which frames get in and out, whoever else reaches them."""

import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from ipaddress import ip_address

import pytest
from tests.lab.node import BACKENDS, VIP, VIP6, Node, ask, stack
from tests.waiting import eventually

from packetstack_agent.natives import constant, ffi
from packetstack_cli.lab import inside

Send = Callable[[bytes], object]
"""Of a frame, from behind its addresses."""
LAST = 2**64 - 1
BACKEND_LISTENS = 5300
FOREIGN = ("203.0.113.66", "10.71.1.2", BACKENDS[1], "192.0.2.11", "127.0.0.1", "10.71.1.1", "0.0.0.0")
FOREIGN6 = ("2001:db8:66::1", "fd71:1::2", "::1", "fe80::1", "2001:db8:1::11")


def marker(kind: str, *, fence: int, slot: int = 0, queue: int = 0, token: int = 0) -> bytes:
    """A frame that begins behind the addresses."""
    made = ffi.new(
        "struct ps_marker *",
        {"magic": constant("PS_MARKER_MAGIC"), "kind": constant(kind), "slot": slot, "queue": queue, "fence": fence, "token": token},
    )  # fmt: skip
    return struct.pack(">H", constant("PS_MARKER_ETHERTYPE")) + bytes(ffi.buffer(made))


def datagram(source: str, destination: str, port: int, payload: bytes) -> bytes:
    """IPv4 or IPv6 with UDP, without the Ethernet header's addresses."""
    of, to = ip_address(source).packed, ip_address(destination).packed
    length = 8 + len(payload)
    pseudo = of + to + struct.pack(">HH", 17, length)
    udp = struct.pack(">HHHH", 4444, port, length, 0) + payload
    udp = udp[:6] + struct.pack(">H", checksum(pseudo + udp) or 0xFFFF) + udp[8:]
    if len(of) == 16:
        return struct.pack(">HIHBB", 0x86DD, 6 << 28, length, 17, 64) + of + to + udp
    head = struct.pack(">BBHIBBH", 0x45, 0, 20 + length, 0, 64, 17, 0) + of + to
    return b"\x08\x00" + head[:10] + struct.pack(">H", checksum(head)) + head[12:] + udp


def checksum(data: bytes) -> int:
    """The Internet checksum."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def host_ends(node: Node) -> dict[int, str]:
    """Host end of each engine's interface, by slot."""
    links = json.loads(node.lab.run("node", "ip", "-j", "-d", "link").stdout)
    names = [d["ifname"] for d in links if d["ifname"].startswith("pe")]
    return {int(n.rpartition("e")[2]): n for n in names}


def drops(node: Node, place: str, reason: str) -> int:
    return int(node.status()["drops"][place].get(reason, 0))


def scale(node: Node, replicas: int) -> None:
    """Engines come or go, and each has its buckets: all fences have closed."""
    node.packetstack("scale", "web", "--replicas", str(replicas))
    eventually(lambda: [e["state"] for e in node.status()["engines"]] == ["Active"] * replicas, 20)


@pytest.fixture
def connections(node: Node) -> Iterator[list[socket.socket]]:
    """Through a stack of two engines; each must still work in the end, with its backend."""
    node.command("down", "--all", "--yes")
    node.up(stack())
    made = [node.connect() for _ in range(16)]
    backends = [ask(c) for c in made]
    yield made
    assert [ask(c) for c in made] == backends
    for c in made:
        c.close()
    node.command("down", "--all", "--yes")


@pytest.fixture
def pod(node: Node, connections: list[socket.socket]) -> Iterator[Send]:
    """Sends frames to the interface of each engine, as they come from a bridge that an attachment's host end is a port of."""
    with ExitStack() as kept, inside(node.lab.namespace("node")):
        ends = [kept.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) for _ in host_ends(node)]
        for end, device in zip(ends, host_ends(node).values(), strict=True):
            end.bind((device, 0))

        def send(frame: bytes) -> object:
            for end in ends:
                end.send(b"\xff" * 6 + b"\x02\0\0\0\0\x99" + frame)
            return ends

        yield send


@pytest.fixture
def sender(node: Node) -> Iterator[Callable[..., Send]]:
    """Of frames from the namespace of the engine in this slot, as its program may send them: past its rings."""
    with ExitStack() as kept:

        def of(slot: int, name: str = "web") -> Send:
            place = next(e["namespace"] for e in node.status(name)["engines"] if e["slot"] == slot)
            with inside(place):
                opened = kept.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            opened.bind(("eth0", 0))
            link = json.loads(node.lab.run("node", "ip", "-j", "link", "show", host_ends(node)[slot]).stdout)[0]
            host = bytes.fromhex(link["address"].replace(":", ""))
            return lambda frame: opened.send(host + b"\x02\0\0\0\0\x77" + frame)

        yield of


@pytest.mark.parametrize("fence", [LAST, 1000, 2, 0])
def test_a_marker_that_the_agent_has_not_sent_is_dropped_and_counted_and_later_fences_close(
    node: Node, connections: list[socket.socket], pod: Send, fence: int
) -> None:
    before = drops(node, "kernel", "forged_marker")
    for queue in range(4):
        pod(marker("PS_MARKER_INGRESS", fence=fence, queue=queue, token=0x1234))
    pod(marker("PS_MARKER_INGRESS", fence=fence)[:20])  # and one that is cut
    eventually(lambda: drops(node, "kernel", "forged_marker") == before + 5 * 2)  # it went to both engines
    scale(node, 3)
    scale(node, 2)


@pytest.mark.parametrize("fence", [LAST, 1000])
def test_a_marker_of_a_fence_that_is_not_open_is_dropped_and_counted_though_it_has_the_token(
    node: Node, connections: list[socket.socket], pod: Send, fence: int
) -> None:
    for slot in host_ends(node):
        file = (node.lab.run_directory / "engines" / str(slot) / "queues").read_bytes()
        at = ffi.offsetof("struct ps_engine", "token")
        token = int.from_bytes(file[at : at + 8], "little")
        assert token
        pod(marker("PS_MARKER_INGRESS", fence=fence, token=token))
    eventually(lambda: drops(node, "engine", "unknown_marker") == 2)
    scale(node, 3)
    scale(node, 2)


def test_frames_of_others_at_an_engines_interface_are_dropped_and_counted_and_engines_are_scaled(
    node: Node, connections: list[socket.socket], pod: Send
) -> None:
    before = drops(node, "kernel", "unstamped")
    for _ in range(50):
        pod(datagram("10.71.1.2", VIP, 80, b"not by the director"))
        pod(datagram("fd71:1::2", VIP6, 80, b"not by the director"))
    eventually(lambda: drops(node, "kernel", "unstamped") >= before + 100 * 2)
    scale(node, 3)
    assert [bool(ask(c)) for c in connections] == [True] * len(connections)
    with node.connect() as one:
        ask(one)
    scale(node, 2)


def test_an_engine_answers_fences_for_itself_alone(
    node: Node, connections: list[socket.socket], sender: Callable[..., Send]
) -> None:
    first, second = sorted(host_ends(node))
    send = sender(first)
    before = drops(node, "host", "forged_marker")
    for slot in (first, second, 0, 1023, 65535):
        for fence in (LAST, 1000):
            send(marker("PS_MARKER_EGRESS", fence=fence, slot=slot))
    send(marker("PS_MARKER_EGRESS", fence=LAST, slot=second)[:20])
    eventually(lambda: drops(node, "host", "forged_marker") == before + 11)
    scale(node, 3)
    scale(node, 2)


@pytest.fixture
def heard(node: Node) -> Iterator[Callable[[], list[bytes]]]:
    """What a backend gets by UDP, of both families."""
    with inside(node.lab.namespace("server")):
        listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", BACKEND_LISTENS))
    listener.setblocking(False)

    found: list[bytes] = []

    def all_of_it() -> list[bytes]:
        with suppress(BlockingIOError):
            while True:
                found.append(listener.recv(2048))
        return found

    with listener:
        yield all_of_it


@pytest.mark.parametrize(
    ("foreign", "own", "backend"),
    # A virtual address is its stack's at the listeners' ports alone.
    [
        ((*FOREIGN, VIP), ("198.51.100.0", "198.51.100.1"), BACKENDS[0]),
        ((*FOREIGN6, VIP6), ("2001:db8:2::1",), "fd71:5::1"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_an_engine_sends_with_its_stacks_addresses_alone(
    node: Node,
    connections: list[socket.socket],
    heard: Callable[[], list[bytes]],
    sender: Callable[..., Send],
    foreign: tuple[str, ...],
    own: tuple[str, ...],
    backend: str,
) -> None:
    send = sender(min(host_ends(node)))
    before = drops(node, "host", "foreign_source")
    for source in foreign:
        send(datagram(source, backend, BACKEND_LISTENS, f"of {source}".encode()))
        send(datagram(source, "10.71.1.1" if "." in source else "fd71:1::1", 9999, b"to the node itself"))
    eventually(lambda: drops(node, "host", "foreign_source") == before + 2 * len(foreign))
    for source in own:  # behind those in the same queues
        send(datagram(source, backend, BACKEND_LISTENS, f"of {source}".encode()))
    got = eventually(lambda: found if len(found := heard()) == len(own) else None)
    assert sorted(got or ()) == sorted(f"of {source}".encode() for source in own)


def test_an_engine_does_not_send_with_another_stacks_addresses(
    node: Node,
    connections: list[socket.socket],
    heard: Callable[[], list[bytes]],
    sender: Callable[..., Send],
) -> None:
    other = json.loads(
        json.dumps(stack("other")).replace("192.0.2.10", "192.0.2.20").replace("198.51.100.0/31", "198.51.100.8/31")
    )
    other["spec"]["listeners"] = other["spec"]["listeners"][:1]
    other["spec"]["snat"]["addresses"] = ["198.51.100.8/31"]
    node.up(stack(), other)
    send = sender(min(e["slot"] for e in node.status("web")["engines"]))
    theirs = sender(min(e["slot"] for e in node.status("other")["engines"]), "other")
    before = drops(node, "host", "foreign_source")
    for source in ("192.0.2.20", "198.51.100.8"):
        send(datagram(source, BACKENDS[0], BACKEND_LISTENS, b"stolen"))
    theirs(datagram("198.51.100.8", BACKENDS[0], BACKEND_LISTENS, b"own"))
    got = eventually(lambda: heard() or None)
    assert got == [b"own"]
    assert drops(node, "host", "foreign_source") == before + 2
