"""What may befall a host while thousands of packets a second flow: who is served stays served."""

import os
import random
import re
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from tests.lab import pool as pools
from tests.lab.node import BACKENDS, VIP, Node, ask, listener, metric, stack
from tests.lab.pool import Load, Pool, load
from tests.waiting import eventually

from packetstack_cli.lab import Lab, inside

FRAMES = 40_000
MAX_FLOWS = 262_144
FRAMES_OF_NEW_FLOWS = 300_000
"""More than half of the demo's flow table, which is what flows without an answer may have."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Two engines; each test brings its own traffic."""
    with pools.pool("pkf-pool", replicas=2) as made:
        yield made


# ---- garbage, floods ----------------------------------------------------------------------------------------------


def packet(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    """Without a checksum of its payload: only what is of interest is right."""
    a, b = ip_address(source).packed, ip_address(destination).packed
    if len(a) == 16:
        return b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + a + b + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0) + a + b
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return b"\x08\x00" + header[:10] + struct.pack("!H", total) + header[12:] + payload


def sources(family: int, rng: random.Random) -> str:
    return (
        f"11.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
        if family == 4
        else (f"fd99::{rng.randrange(65536):x}:{rng.randrange(65536):x}")
    )


def datagram(port: int, rng: random.Random) -> bytes:
    data = rng.randbytes(rng.randrange(0, 32))
    return struct.pack("!HHHH", rng.randrange(1024, 65536), port, 8 + len(data), 0) + data


def opener(port: int, rng: random.Random) -> bytes:
    return struct.pack("!HHIIBBHHH", rng.randrange(1024, 65536), port, rng.randrange(1 << 32), 0, 0x50, 2, 1000, 0, 0)


VIPS = {4: "192.0.2.10", 6: "2001:db8:1::10"}
SNATS = {4: "198.51.100.1", 6: "2001:db8:2::1"}


def openers(family: int, rng: random.Random) -> bytes:
    """With a wrong checksum."""
    return packet(sources(family, rng), VIPS[family], 6, opener(80, rng))


def datagrams(family: int, rng: random.Random) -> bytes:
    return packet(sources(family, rng), VIPS[family], 17, datagram(53, rng))


def answers_to_nobody(family: int, rng: random.Random) -> bytes:
    """To SNAT addresses, as from backends."""
    return packet(sources(family, rng), SNATS[family], 17, datagram(rng.randrange(1024, 65536), rng))


def icmp_errors(family: int, rng: random.Random) -> bytes:
    """About flows that do not exist, or about nothing."""
    quoted = struct.pack("!HHHH", 53, rng.randrange(1024, 65536), 8, 0)
    inner = packet(VIPS[family], sources(family, rng), 17, quoted)[2:]
    if rng.randrange(2):
        inner = inner[: rng.randrange(len(inner))]
    kind = b"\x03\x04" if family == 4 else b"\x02\x00"
    return packet(sources(family, rng), VIPS[family], 1 if family == 4 else 58, kind + bytes(6) + inner)


def torn(family: int, rng: random.Random) -> bytes:
    """Of any protocol, cut off anywhere, with bits turned."""
    made = rng.choice((openers, datagrams, answers_to_nobody, icmp_errors))(family, rng)
    whole = bytearray(made[: rng.randrange(2, len(made) + 1)])
    for _ in range(rng.randrange(4)):
        whole[rng.randrange(2, len(whole)) if len(whole) > 2 else 0] ^= 1 << rng.randrange(8)
    return bytes(whole)


@dataclass
class Flood:
    """Frames from the client's end of its link, all different, at whatever rate this process has."""

    lab: Lab
    kind: Callable[[int, random.Random], bytes]
    frames: int
    sent: int = 0

    def run(self) -> None:
        rng = random.Random(5)
        with inside(self.lab.namespace("client")):
            sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with inside(self.lab.namespace("node")), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as node:
            node.bind(("up0", 0))
            to = node.getsockname()[4]
        with sender:
            sender.bind(("c0", 0))
            link = to + sender.getsockname()[4]
            for number in range(self.frames):
                frame = link + self.kind(4 if number % 2 else 6, rng)
                with suppress(OSError):  # the queue of the link is full
                    sender.send(frame.ljust(60, b"\0"))
                    self.sent += 1


def memory_kib(pid: int) -> int:
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("RssAnon"))
    return int(line.split()[1])


def accounted(s: Load) -> dict[str, Counter[str]]:
    return {
        "director": metric(s.client, "packetstack_director_packets_total", "result"),
        "engine": metric(s.client, "packetstack_engine_packets_total", "event"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [openers, datagrams, answers_to_nobody, icmp_errors, torn])
def test_garbage_and_floods_break_nothing_and_are_counted(
    pool: Pool, kind: Callable[[int, random.Random], bytes]
) -> None:
    new_flows = kind is datagrams
    with load(pool) as s:
        pids, before = [e["pid"] for e in s.engines()], accounted(s)
        memory = [memory_kib(pid) for pid in pids]
        flood = Flood(s.lab, kind, FRAMES_OF_NEW_FLOWS if new_flows else FRAMES)
        began = time.monotonic()
        flood.run()
        took = time.monotonic() - began
        assert [e["pid"] for e in s.engines()] == pids, "a datapath died"
        assert all(now - then < 1024 for now, then in zip(map(memory_kib, pids), memory, strict=True))
        deadline = time.monotonic() + 5
        while True:  # the counters are read one after the other while traffic flows: a few packets apart
            after = {place: n - before[place] for place, n in accounted(s).items()}
            d, e = after["director"], after["engine"]
            gap = [
                d["received"] - sum(n for name, n in d.items() if name not in ("received", "mirrored")),
                e["received"]
                - e["forwarded"]
                - sum(n for name, n in e.items() if name.startswith(("drop_", "rejected_"))),
            ]
            if max(map(abs, gap)) < 200 or time.monotonic() > deadline:
                break
        print(f"{kind.__name__}: {flood.sent} frames in {took:.1f} s; gaps {gap}; {after}")
        assert max(map(abs, gap)) < 200, (gap, after)
        assert flood.sent > flood.frames / 2
        if new_flows:
            assert e["flows_recycled"] > 0
            assert s.client.call("get", name="demo")[0]["status"]["flows"] < MAX_FLOWS
        if kind is openers:
            assert e["drop_bad_checksum"] > flood.sent / 2, "an opener that no backend would take made a flow"


# ---- a backend dies -----------------------------------------------------------------------------------------------

CHECK = {"type": "TCP", "intervalSeconds": 1, "timeoutSeconds": 1, "unhealthyThreshold": 1, "healthyThreshold": 1}


@pytest.mark.parametrize("silent", [False, True], ids=["reset", "silence"])
def test_a_dead_backends_flows_end_and_new_ones_go_elsewhere(node: Node, silent: bool) -> None:
    node.up(stack(listeners=[listener("web", VIP, BACKENDS, CHECK)]))
    dead = BACKENDS[1]
    rule = f"add rule inet dead input ip daddr {dead} drop"
    flows = {who: [] for who in BACKENDS}
    for _ in range(10):
        connection = node.connect()
        flows[ask(connection)].append(connection)
    try:
        if silent:
            node.lab.run("server", "nft", "add table inet dead; add chain inet dead input"
                         " { type filter hook input priority 0; }; " + rule)  # fmt: skip
        else:
            node.stop_backend(dead)
        eventually(lambda: any(not b["healthy"] for b in node.status()["backends"]))
        assert node.who(tries=20) == {BACKENDS[0]}
        for connection in flows[dead]:
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError if silent else (ConnectionError, AssertionError)):
                ask(connection)
        assert {ask(c) for c in flows[BACKENDS[0]]} == {BACKENDS[0]}
    finally:
        if silent:
            node.lab.run("server", "nft", "delete table inet dead")
        else:
            node.start_backend(dead)
    eventually(lambda: all(b["healthy"] for b in node.status()["backends"]))
    assert node.who() == set(BACKENDS)
    for connection in flows[dead]:
        if silent:  # the backend was never gone, only out of reach
            connection.settimeout(10)
            assert ask(connection) == dead
    for connection in (*flows[dead], *flows[BACKENDS[0]]):
        connection.close()


# ---- memory -------------------------------------------------------------------------------------------------------


class MemoryGroup:
    """An engine's memory cgroup, of either kind."""

    def __init__(self, namespace: str) -> None:
        first, second = (Path("/sys/fs/cgroup") / part / namespace for part in ("memory/packetstack", "packetstack"))
        if first.exists():
            self.limit, self._used = first / "memory.limit_in_bytes", first / "memory.usage_in_bytes"
            self._events = first / "memory.oom_control"
        elif (second / "memory.max").exists():
            self.limit, self._used = second / "memory.max", second / "memory.current"
            self._events = second / "memory.events"
        else:
            pytest.skip("this kernel has no memory cgroup")

    def killed(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        return int(re.search(r"^oom_kill (\d+)$", self._events.read_text(), re.M)[1])

    def tighten(self) -> None:
        """Down to what is in use, never up: the next page is too much."""
        with suppress(OSError):  # more was taken meanwhile
            self.limit.write_text(str(min(int(self.limit.read_text()), int(self._used.read_text()) + 4096)))


def test_processes_that_the_kernel_kills_for_their_memory_come_back_and_nothing_breaks(pool: Pool) -> None:
    with load(pool) as s:
        killed = 0
        for i in range(3):
            group = MemoryGroup(s.engines()[i % 2]["namespace"])
            limit, before = group.limit.read_text(), group.killed()
            for _ in range(20):  # a successor that had its memory before the limit came down lives
                if pid := s.engines()[i % 2]["pid"]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)  # its successor needs memory anew
                deadline = time.monotonic() + 0.5
                while group.killed() == before and time.monotonic() < deadline:
                    group.tighten()
                if group.killed() > before:
                    break
            time.sleep(0.5)  # the next ones need memory as well
            assert group.killed() > before, "the kernel killed nobody"
            killed += group.killed() - before
            group.limit.write_text(limit)
            s.settle()
        print(f"the kernel killed {killed} processes")
