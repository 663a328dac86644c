"""Connections that begin, or begin again, while a stack has two sets of engines: one of the two takes each, and it is served."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from ipaddress import ip_address
from typing import Any

import pytest
from tests.lab.mirrored import (
    ACK,
    FLOW_TABLE,
    SYN,
    VIP,
    Mirrored,
    Segment,
    Wire,
    answers_to_one_opener,
    dropped,
    mirrored,
    resets,
)
from tests.lab.node import ask
from tests.waiting import eventually

from packetstack_agent.hash_keys import hash_key
from packetstack_agent.natives import lib, packed
from packetstack_cli.lab import inside
from packetstack_core.hashing import bucket_of, ports_per_bucket

BUCKETS = 8192
SYN_ACKS = "tcp sport 80 tcp flags & (syn | ack) == (syn | ack)"


@pytest.fixture(scope="module")
def made() -> Iterator[Mirrored]:
    with mirrored("pkm-open", servers=False) as made:
        for address in made.lab.server_addresses:
            made.start_backend(address)
        made.lab.wait_for_listener("server", 8080)
        # A client may use a port again at once although it has closed first.
        made.lab.sysctl("client", {"net.ipv4.tcp_tw_reuse": "1", "net.ipv4.tcp_tw_reuse_delay": "1"})
        made.make(2)
        yield made


def openers(segments: list[Segment], outgoing: bool) -> Counter[tuple[str, int]]:
    """SYNs of each source."""
    return Counter((s.source, s.sport) for s in segments if s.flags & (SYN | ACK) == SYN and s.outgoing == outgoing)


def owners(segments: list[Segment]) -> set[int]:
    """At the server: from how many addresses and ports each opener came. A SYN that was sent again has its number still."""
    sources: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for s in segments:
        if s.flags & (SYN | ACK) == SYN and not s.outgoing:
            sources.setdefault((s.destination, s.number), set()).add((s.source, s.sport))
    return set(map(len, sources.values()))


def begin(lab: Mirrored, ports: range) -> list[socket.socket]:
    """Connections that begin."""
    begun = []
    with inside(lab.lab.namespace("client")):
        for port in ports:
            connection = socket.socket()
            connection.bind(("10.71.1.2", port))
            connection.setblocking(False)
            assert connection.connect_ex((VIP, 80)) == errno.EINPROGRESS
            begun.append(connection)
    return begun


def is_open(connection: socket.socket) -> bool:
    """Has it been answered?"""
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def slow_engine(lab: Mirrored, old: set[int]) -> dict[str, Any] | None:
    """One of the second set, which does not come further than to its first process."""
    engine = next((e for e in lab.engines() if e["slot"] not in old and e["initPid"]), None)
    if engine is not None:
        os.killpg(engine["initPid"], signal.SIGSTOP)
    return engine


def test_row_9_no_opener_goes_to_the_second_set_before_its_last_engine_is_ready(lab: Mirrored) -> None:
    old = lab.slots()
    client = Wire(lab.lab, "client", "c0")
    with ExitStack() as closing:

        def some_connect() -> None:
            for _ in range(20):
                ask(closing.enter_context(lab.connect()))

        some_connect()
        lab.scale(3)
        slow = eventually(partial(slow_engine, lab, old), every_seconds=0.001)
        assert slow is not None
        try:
            eventually(lambda: sum(e["ready"] for e in lab.engines() if e["slot"] not in old) == 2)
            some_connect()
            assert {int(slot) for slot in lab.status("demo")["owners"]} == old
            new = lab.slots() - old
            assert lab.live(new) == lab.counters(new)["forwarded"] == 0
        finally:
            os.killpg(slow["initPid"], signal.SIGCONT)
        lab.wait_switched()
        assert lab.slots() - old == new
        some_connect()
        assert (lab.live(old), lab.live(new)) == (40, 20)
    assert set(openers(client.read(), outgoing=True).values()) == {1}, "no SYN was left unanswered"


def test_row_16_half_open_connections_are_served_by_the_set_that_has_seen_their_first_syn(lab: Mirrored) -> None:
    ports = range(7000, 7030)
    server = Wire(lab.lab, "server", "s0")
    with ExitStack() as closing:
        with dropped(lab, "client", SYN_ACKS):
            begun = [closing.enter_context(c) for c in begin(lab, ports)]
            old, new = lab.switch()
            since = Wire(lab.lab, "server", "s0")
            client = Wire(lab.lab, "client", "c0")
            seen: list[Segment] = []

            def come_again() -> bool:
                """Has each SYN been sent since the switch?"""
                seen.extend(client.peek())
                return len(openers(seen, outgoing=True)) == len(ports)

            eventually(come_again)
        eventually(lambda: all(map(is_open, begun)))
        for connection in begun:
            connection.setblocking(True)
            connection.settimeout(3)
            ask(connection)
        assert lab.live(old) >= len(ports)
        assert lab.live(new) == 0
    seen += client.read()
    assert answers_to_one_opener(seen) == []
    assert resets(seen) == []
    assert owners(at_server := server.read()) == {1}, "each is one connection at its backend"
    assert len(openers(at_server, outgoing=False)) == len(ports)
    assert len(openers(since.read(), outgoing=False)) == len(ports), "what came again was sent on"


def connect_if_free(lab: Mirrored, source: tuple[str, int]) -> socket.socket | None:
    """A connection, unless the client itself has not seen the end of the one before."""
    try:
        return lab.connect(source=source)
    except OSError as e:
        if e.errno != errno.EADDRNOTAVAIL:
            raise
        return None


def test_row_16_ports_that_are_used_again_at_once_are_served_by_one_set(lab: Mirrored) -> None:
    ports = range(7100, 7300)
    held = [lab.connect(source=("10.71.1.2", port)) for port in ports]
    assert len({ask(c) for c in held}) > 1
    old, _ = lab.switch()
    client, server = Wire(lab.lab, "client", "c0"), Wire(lab.lab, "server", "s0")
    with ExitStack() as closing:
        for n, (connection, port) in enumerate(zip(held, ports, strict=True)):
            with connection:
                if n % 2:  # the backend closes first
                    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                else:
                    connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            again = eventually(partial(connect_if_free, lab, ("10.71.1.2", port)), 3, every_seconds=0.001)
            assert again is not None
            ask(closing.enter_context(again))
        rejected = lab.counters(old)["rejected_claimed"]
    assert rejected > 0, "the second set has begun connections that the first one still had"
    at_client, at_server = client.read(), server.read()
    assert owners(at_server) == {1}, "each is one connection at its backend"
    assert answers_to_one_opener(at_client) == []
    assert [s for s in resets(at_client) if not s.outgoing] == []
    # On a busy machine one in some thousands was sent twice: nothing keeps it behind what another CPU sent before.
    twice = {port for (_, port), times in openers(at_client, outgoing=True).items() if times > 1}
    assert len(twice) <= len(ports) / 100, [s for s in at_client if {s.sport, s.dport} & twice]


@pytest.fixture
def narrow(made: Mirrored) -> Iterator[Mirrored]:
    """A stack with one backend, whose buckets have seven SNAT ports each."""
    made.down()
    one = {"name": "web", "address": VIP, "protocol": "TCP", "port": 80, "healthCheck": {"type": "None"}}
    one["backends"] = {"endpoints": [{"address": "10.71.5.1", "port": 8080}]}
    table = FLOW_TABLE | {"buckets": BUCKETS, "maxFlows": 1 << 18}
    made.make(2, flowTable=table, listeners=[one], snat={"addresses": ["198.51.100.0/32"]})
    made.settle()
    yield made
    made.down()


def sources_by_bucket(lab: Mirrored, buckets: int, each: int) -> list[list[tuple[str, int]]]:
    """Addresses and ports of clients, by the bucket of what they send to port 80: so many of so many buckets."""
    key, vip = hash_key(next(lab.lab.run_directory.rglob("secret")), 0), packed(ip_address(VIP))
    found: dict[int, list[tuple[str, int]]] = {}
    for address in lab.lab.client_addresses:
        source = packed(ip_address(address))
        for port in range(2048, 65000):
            hash_ = lib().ps_flow_hash(*key, source, vip, socket.htons(port), socket.htons(80), socket.IPPROTO_TCP)
            bucket = bucket_of(int(hash_), BUCKETS)
            if bucket < buckets:
                found.setdefault(bucket, []).append((address, port))
        if all(len(found.get(b, ())) >= each for b in range(buckets)):
            return [found[b][:each] for b in range(buckets)]
    raise AssertionError(found)


def test_row_20_both_sets_together_give_no_port_out_twice(narrow: Mirrored) -> None:
    assert ports_per_bucket(BUCKETS) == 7
    by_bucket = sources_by_bucket(narrow, 27, 8)
    server = Wire(narrow.lab, "server", "s0")
    with ExitStack() as closing:

        def connect(source: tuple[str, int]) -> socket.socket:
            connection = closing.enter_context(narrow.connect(source=source, timeout_seconds=0.5))
            ask(connection)
            return connection

        def attempt(source: tuple[str, int]) -> socket.socket | None:
            try:
                return connect(source)
            except TimeoutError:
                return None

        old = [[connect(s) for s in sources[:5]] for sources in by_bucket]
        narrow.switch()
        young = [[connect(s) for s in sources[5:7]] for sources in by_bucket]
        assert attempt(by_bucket[0][7]) is None, "none is left"
        for connection in [c for some in old + young for c in some]:
            ask(connection)
        assert set(openers(server.read(), outgoing=False).values()) == {1}
        for some in old:
            some.pop().close()
        for sources in by_bucket:
            last = eventually(partial(attempt, sources[7]), 5, "a port is free again")
            assert last is not None
            young.append([last])
        for connection in [c for some in old + young for c in some]:
            ask(connection)
