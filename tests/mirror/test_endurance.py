"""Sets of engines take over from each other again and again. PACKETSTACK_ROUNDS sets how often in the long test."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.lab.crowds import Crowd, Crowds
from tests.lab.ends import Ends
from tests.lab.mirrored import FLOW_TABLE, Mirrored, mirrored
from tests.waiting import eventually

from packetstack_cli.lab import Room
from packetstack_cli.traffic import Outcome

ROUNDS = int(os.environ.get("PACKETSTACK_ROUNDS", "20"))
HANDOVER_DROPS = ("park_full", "late", "not_owner")
"""What a transition itself could cause."""


@dataclass(frozen=True)
class Size:
    """A crowd comes before each transition, and leaves by itself once all buckets are switched."""

    crowd: Crowd
    round: tuple[int, ...]
    """From one engine to so many, one after the other."""
    rounds: int
    udp_idle_seconds: int
    young: frozenset[str]
    """What is not held against the first round, as so few rounds do not show where it ends."""


SMALL = Size(Crowd(300, 60, 0.3, 0.2, 500), (2, 1), 2, 2, frozenset({"bytes of the agent"}))
FULL = Size(Crowd(10_000, 2_000, 6, 4, 4000), (2, 4, 2, 1), ROUNDS, 8, frozenset())


@dataclass
class Endured:
    """What was seen of all rounds."""

    outcomes: list[Outcome] = field(default_factory=list)
    """Of the crowds."""
    switching: list[float] = field(default_factory=list)
    """Seconds of each transition until all buckets were switched."""
    took: list[float] = field(default_factory=list)
    """And until the first set had gone."""
    held: list[dict[str, int]] = field(default_factory=list)
    """What there was after each round."""
    dropped: Counter[str] = field(default_factory=Counter)
    """In all, by place and reason."""
    again: dict[str, Counter[str]] = field(default_factory=dict)
    """TCP at each end: segments sent again, and segments that had come already."""


def segments(node: Mirrored, room: Room) -> Counter[str]:
    """Of TCP in a room's kernel: those sent again, and those of which a copy came before."""
    found: Counter[str] = Counter()
    for file in ("snmp", "netstat"):
        lines = node.lab.run(room, "cat", f"/proc/net/{file}").stdout.splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            for name, value in zip(names.split()[1:], values.split()[1:], strict=True):
                if name in ("RetransSegs", "TCPDSACKOldSent"):
                    found[name] += int(value)
    return found


def drops(node: Mirrored) -> Counter[str]:
    """Between the generator's sockets and the servers', by place and reason."""
    by_place = node.status("demo")["drops"]
    found = Counter({f"{place}.{reason}": n for place, reasons in by_place.items() for reason, n in reasons.items()})
    found.update(node.lab.device_drops())
    for name in [n for n in found if n.endswith((".not_ours", ".unstamped"))]:
        del found[name]  # neighbour discovery
    udp = re.findall(r"^Udp: (.*)$", node.lab.run("server", "cat", "/proc/net/snmp").stdout, re.MULTILINE)
    found["server.socket"] = int(dict(zip(*(line.split() for line in udp), strict=True))["RcvbufErrors"])
    return found


def held(node: Mirrored) -> dict[str, int]:
    """What the stack has now that could grow."""
    agent = int((node.lab.run_directory / "agent.pid").read_text())
    engines = [int(e["pid"]) for e in node.engines()]
    return {
        **node.remains(),
        "bytes of sets": node.memory_bytes(),
        "bytes of the agent": node.agent_bytes(),
        "descriptors of the agent": min(descriptors(agent) for _ in range(20)),  # fewest: it answers nobody
        "descriptors of engines": sum(map(descriptors, engines)),
    }


def descriptors(pid: int) -> int:
    """How many a process has open, now."""
    time.sleep(0.005)
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def transition(node: Mirrored, replicas: int, crowds: Crowds, seen: Endured) -> None:
    """From one size to another, until the first set has gone because its last connection has."""
    began = time.monotonic()
    node.scale(replicas)
    eventually(node.switched, 60, "all buckets switched")
    seen.switching.append(time.monotonic() - began)
    seen.outcomes.append(crowds.change())
    eventually(lambda: len(node.status("demo")["sets"]) == 1, 60, "the first set has gone")
    seen.took.append(time.monotonic() - began)
    node.settle(60)
    assert len(node.engines()) == replicas, "a set has gone when its engines have"
    assert node.count("InternalError") == 0


@contextmanager
def watching(node: Mirrored) -> Iterator[tuple[Ends, Ends]]:
    """The client's wire and the server's."""
    wires = Ends(node.lab, "client", "c0"), Ends(node.lab, "server", "s0")
    yield wires
    for wire in wires:
        wire.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [pytest.param(SMALL, id="small"), pytest.param(FULL, id="full", marks=pytest.mark.soak)]
)
def test_row_30_rounds_of_transitions_break_nothing_double_nothing_and_leave_nothing(size: Size) -> None:
    seen = Endured()
    rooms: tuple[Room, ...] = ("client", "server")
    with mirrored("pkm-end") as node:
        table = FLOW_TABLE | {"maxFlows": 1 << 16, "udpIdleTimeoutSeconds": size.udp_idle_seconds}
        node.make(1, flowTable=table)
        node.settle()
        dropped, before = drops(node), {room: segments(node, room) for room in rooms}
        with watching(node) as (client, server):
            crowds = Crowds(node.lab, size.crowd)
            for n in range(size.rounds):
                for replicas in size.round:
                    transition(node, replicas, crowds, seen)
                    client.look()
                    server.look()
                seen.held.append(held(node))
                print(f"round {n + 1}: {max(seen.took[-len(size.round) :]):.1f} s at most, {seen.held[-1]}", flush=True)
            seen.outcomes.append(crowds.here.stop())
            client.look()
            server.look()
        seen.dropped = drops(node) - dropped
        seen.again = {room: segments(node, room) - before[room] for room in rooms}
    judge(size, seen, client, server)


def judge(size: Size, seen: Endured, client: Ends, server: Ends) -> None:
    """Says what was seen, and fails if it is not as it ought to be."""
    total = Counter[str]()
    for o in seen.outcomes:
        for name in ("connections", "broken", "never_opened", "requests", "datagrams_sent", "datagrams_lost"):
            total[name] += getattr(o, name)
        for name in ("datagrams_reordered", "datagrams_duplicated", "socket_drops"):
            total[name] += getattr(o, name)
    print(f"{size.rounds} rounds, {len(seen.took)} transitions: {dict(total)}")
    print(f"switched in {max(seen.switching):.2f} s at most; done in {max(seen.took):.1f} s at most")
    print(f"server: {server.began} began, {len(server.used_twice)} between ends in use, {server.reset} resets")
    print(
        f"client: {client.began} began, {client.answers} answers, {server.answers} sent by the server, {client.reset} resets"
    )
    print(f"TCP: {seen.again}; dropped: {dict(seen.dropped)}")
    print(f"after the first round: {seen.held[0]}\nafter the last: {seen.held[-1]}")
    assert total["never_opened"] == 0
    assert total["broken"] == 0, [o.what_broke() for o in seen.outcomes if o.broken]
    assert (total["datagrams_duplicated"], total["datagrams_reordered"]) == (0, 0)
    for reason in HANDOVER_DROPS:
        assert seen.dropped[f"engine.{reason}"] == 0
    assert total["datagrams_lost"] <= seen.dropped.total() + total["socket_drops"], "a datagram was lost silently"
    assert server.used_twice == [], "each SNAT port is one connection's"
    assert client.answered_twice == []
    assert client.answers <= server.answers, "no SYN-ACK was doubled on its way"
    assert (client.reset, server.reset) == (0, 0)
    for here, there in (("client", "server"), ("server", "client")):
        assert seen.again[here]["TCPDSACKOldSent"] <= seen.again[there]["RetransSegs"], (
            "a segment was doubled on its way"
        )
    # An agent loads code and fills what it keeps at hand in its first rounds.
    first, last = seen.held[min(1, len(seen.held) - 1)], seen.held[-1]
    grown = {name for name in first if abs(last[name] - first[name]) > 0.05 * first[name]}
    assert grown <= size.young, (first, last)
