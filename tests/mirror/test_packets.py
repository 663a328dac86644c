"""Packets of all kinds while a stack has two sets of engines: each set gets each once, one of the two sends it on."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
from tests.lab.mirrored import FLOW_TABLE, VIP, Mirrored, ask, mirrored
from tests.waiting import eventually

from packetstack_cli.lab import NODE_UPLINK, Room, inside
from packetstack_cli.traffic import Servers

CLIENT = "10.71.1.2"
LONG = struct.Struct("!I3996s")
UNDER_WAY = 32
"""Datagrams at a time: less than a ring of the lab's links holds."""


class Echoes:
    """Backends that send datagrams back, and know what they got."""

    def __init__(self, node: Mirrored) -> None:
        self.heard: Counter[bytes] = Counter()
        self._selector, self._ends = selectors.DefaultSelector(), socket.socketpair()
        self._selector.register(self._ends[1], selectors.EVENT_READ)
        with inside(node.lab.namespace("server")):
            for address in node.lab.server_addresses:
                backend = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                backend.bind((address, 8081))
                self._selector.register(backend, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                backend = key.fileobj
                assert isinstance(backend, socket.socket)
                if backend is self._ends[1]:
                    return
                datagram, client = backend.recvfrom(65536)
                self.heard[datagram] += 1
                backend.sendto(datagram, client)

    def stop(self) -> None:
        """No more."""
        self._ends[0].send(b"!")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._ends[0].close()


@dataclass
class Sets:
    """A stack whose first set keeps 400 connections, which are quiet, and some flows; all buckets are switched."""

    node: Mirrored
    echoes: Echoes
    old: set[int]
    new: set[int]
    flows: list[socket.socket]
    """Of UDP, at the first set."""
    connections: list[socket.socket]
    """At the first set."""
    closing: ExitStack

    def young(self, many: int) -> list[socket.socket]:
        """More flows, which have sent nothing yet."""
        return [self.closing.enter_context(flow(self.node)) for _ in range(many)]

    def counts(self) -> tuple[Counter[str], Counter[str], int]:
        """What engines of the first and of the second set did with packets, and how many were mirrored."""
        return self.node.counters(self.old), self.node.counters(self.new), self.node.mirrored()

    def has_forwarded(self, second: bool, before: tuple[Counter[str], Counter[str], int], packets: int) -> bool:
        """Has one of the sets sent so many on since then?"""
        was, now = (counts[1] if second else counts[0] for counts in (before, self.counts()))
        return now["forwarded"] - was["forwarded"] == packets


def flow(node: Mirrored) -> socket.socket:
    """A socket of the client."""
    with inside(node.lab.namespace("client")):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(3)
    made.bind((CLIENT, 0))
    made.connect((VIP, 53))
    return made


@pytest.fixture(scope="module")
def sets() -> Iterator[Sets]:
    with mirrored("pkm-pack", servers=False) as node, ExitStack() as closing:
        closing.callback(Servers(node.lab, udp_port=8090).stop)
        echoes = Echoes(node)
        closing.callback(echoes.stop)
        node.make(2, flowTable=FLOW_TABLE | {"udpIdleTimeoutSeconds": 600})
        connections = [closing.enter_context(node.connect(VIP, 80)) for _ in range(400)]
        flows = [closing.enter_context(flow(node)) for _ in range(8)]
        exchange(flows, 1)
        yield Sets(node, echoes, *node.switch(3), flows, connections, closing)


def exchange(flows: Sequence[socket.socket], each: int) -> list[bytes]:
    """So many numbered datagrams of each flow, there and back; what was sent. All must come back, in their order."""
    sent = []
    for first in range(0, each, UNDER_WAY):
        for number, some in enumerate(flows):
            numbered = [b"%d %d %d" % (some.fileno(), number, n) for n in range(first, min(each, first + UNDER_WAY))]
            for datagram in numbered:
                some.send(datagram)
            assert [some.recv(100) for _ in numbered] == numbered
            sent += numbered
    return sent


def test_row_10_each_set_gets_each_packet_of_an_old_flow_once_and_the_first_sends_it_on(sets: Sets) -> None:
    sets.echoes.heard.clear()
    old, new, mirrored = sets.counts()
    sent = exchange(sets.flows, 1250)
    both_ways = 2 * len(sent)
    eventually(lambda: sets.counts()[2] - mirrored == both_ways, 5, "all are mirrored")
    first, second = sets.counts()[0] - old, sets.counts()[1] - new
    assert fates(first) == dict.fromkeys(("received", "mirrored", "forwarded"), both_ways)
    assert fates(second) == dict.fromkeys(("received", "mirrored", "rejected_kept"), both_ways)
    assert sets.echoes.heard == Counter(sent)


def test_row_12_the_first_set_rejects_what_is_new_and_sends_nothing_for_it(sets: Sets) -> None:
    sets.echoes.heard.clear()
    old, new, mirrored = sets.counts()
    sent = exchange(sets.young(100), 20)
    both_ways = 2 * len(sent)
    eventually(lambda: (sets.counts()[1] - new)["forwarded"] == both_ways, 5, "the second set sends all on")
    first, mirrored = sets.counts()[0] - old, sets.counts()[2] - mirrored
    assert mirrored > both_ways / 2, "most buckets have an old connection"
    assert fates(first) == dict.fromkeys(("received", "mirrored", "rejected_not_kept"), mirrored)
    assert sets.echoes.heard == Counter(sent)


def fates(counts: Counter[str]) -> dict[str, int]:
    """Of these, how many packets came, and what became of them."""
    known = ("received", "mirrored", "forwarded")
    return {name: n for name, n in counts.items() if n and (name in known or name.startswith(("drop_", "rejected_")))}


def in_fragments(some: socket.socket, payload: bytes, ident: int) -> list[bytes]:
    """A datagram of this flow, whose second fragment comes last."""
    source, sport = some.getsockname()
    udp = struct.pack("!HHHH", sport, 53, 8 + len(payload), 0) + payload
    packets = []
    for at in range(0, len(udp), 1480):
        part = udp[at : at + 1480]
        more = at + 1480 < len(udp)
        packets.append(
            struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(part), ident, more << 13 | at // 8, 64, 17, 0)
            + socket.inet_aton(source) + socket.inet_aton(VIP) + part
        )  # fmt: skip
    return [packets[0], *reversed(packets[1:])]


def test_row_18_fragments_of_old_and_new_flows_are_handled_by_one_set(sets: Sets) -> None:
    sets.echoes.heard.clear()
    with inside(sets.node.lab.namespace("client")):
        raw = sets.closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
    sent: list[bytes] = []
    for flows, second in ((sets.flows, False), (sets.young(8), True)):
        counts = sets.counts()
        for some in flows:
            payload = LONG.pack(len(sent), bytes(range(256)) * 15 + bytes(156))
            for packet in in_fragments(some, payload, 1000 + len(sent)):
                raw.sendto(packet, (VIP, 0))
            assert some.recv(65536) == payload
            sent.append(payload)
        eventually(partial(sets.has_forwarded, second, counts, 6 * len(flows)), 5)
        assert sets.has_forwarded(not second, counts, 0)
    assert sets.echoes.heard == Counter(sent)


@contextmanager
def mtu(node: Mirrored, device: str, size: int) -> Iterator[None]:
    """The node cannot send longer packets there; afterwards nobody remembers."""
    rooms: tuple[Room, ...] = ("client", "server")
    node.lab.run("node", "ip", "link", "set", device, "mtu", str(size))
    try:
        yield
    finally:
        node.lab.run("node", "ip", "link", "set", device, "mtu", "1500")
        for room in rooms:
            node.lab.run(room, "ip", "route", "flush", "cache")


def test_row_19_whoever_sends_too_much_is_told_by_way_of_the_set_that_has_its_flow(sets: Sets) -> None:
    young = sets.closing.enter_context(sets.node.connect(VIP, 80))
    for connection in (sets.connections[0], young):
        with mtu(sets.node, NODE_UPLINK, 1400):
            ask(connection, size=20000)
    for some in (sets.flows[0], *sets.young(1)):
        some.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        exchange([some], 1)
        with mtu(sets.node, "dn0", 1400):
            some.send(bytes(1440))
            eventually(partial(refuses, some), 3, "the client knows the size")


def refuses(some: socket.socket) -> bool:
    """Does the client know that its datagram is too long?"""
    try:
        some.send(bytes(1440))
    except OSError:
        return True
    return False


def test_row_19_a_ping_has_one_answer(sets: Sets) -> None:
    said = sets.node.lab.run("client", "ping", "-c", "20", "-i", "0.02", VIP).stdout
    assert " 20 received" in said
    assert "DUP" not in said
