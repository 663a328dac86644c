"""Datapaths of two sets die in each step of a transition by Mirror, with the real agent and traffic that knows what it got."""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from tests.lab.mirrored import ALL_TCP, ALL_UDP, VIP, Mirrored, Wire, ask, mirrored, sent_twice
from tests.waiting import eventually

from packetstack_agent.natives import call, lib, text
from packetstack_cli.traffic import Traffic

from .bench import DATAPATH, POINTS, SERVING

# The agent as it is, with a datapath that has points to die at.
AGENT = f"""
from packetstack_core import abi
installed = abi.native
abi.native = lambda name: abi.Path({str(DATAPATH)!r}) if name == "packetstack-datapath" else installed(name)
from packetstack_agent.main import main
main()
"""

SWITCH = ["MARKER", "PUBLISH_BEGUN", "PUBLISH_HALF", "PUBLISHED_LIST", "KEPT", "FENCE_EMPTY", "FENCE_SHARDS"]
"""What a keeper passes in the switch alone."""
KEEPS = ["KEPT_ENDED", "KEPT_CLOSING", "KEPT_REMOVED", "KEPT_GONE", "KEPT_REVIVED"]
CLAIMS = ["CLAIMED", "ASKED"]
ANYWHERE = [p for p in SERVING if p.startswith(("REWRITE", "INSERT", "REMOVE", "STATE", "COMMITTED", "PUBLISHED_"))]
ORDER_SECONDS = 1.2
"""How long an engine may take to come to a point: it sweeps once a second."""
REST_SECONDS = 0.25
"""Between two deaths of an engine, but in the switch: a process has to come, and traffic to go on."""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(not DATAPATH.exists(), reason="packetstack-datapath-inject is not built"),
]


class Reaper:
    """Orders one death after another from the engines that there are."""

    def __init__(self, node: Mirrored, seed: int) -> None:
        self._node, self._random = node, random.Random(seed)
        self._views: dict[int, Any] = {}
        self._ordered: dict[int, tuple[str, float]] = {}
        self._next: dict[int, Iterator[str]] = {}
        self._resting: dict[int, float] = {}
        self.deaths: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._lock = threading.Lock()

    def __enter__(self) -> Reaper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        self._stop.set()
        self._thread.join()
        for view in self._views.values():
            lib().ps_unmap(view)

    def order(self, slot: int, points: Iterator[str]) -> None:
        """This engine dies at these points, as far as it comes to them."""
        if slot not in self._views:
            run = self._node.lab.run_directory
            (pin,) = [p for p in (run / "bpf").iterdir() if p.name == f"engine_{slot}"]
            self._views[slot] = call(lib().ps_engine_open, text(run / "engines" / str(slot) / "queues"), text(pin))
        with self._lock:
            self._next[slot] = points
            self._forget(slot)

    def has_orders(self, slots: set[int]) -> bool:
        """Is any of these still to die?"""
        with self._lock:
            return bool(slots & (self._next.keys() | self._ordered.keys()))

    def rest(self) -> None:
        """No more deaths until the next order."""
        with self._lock:
            self._next.clear()
            for slot in self._views:
                self._forget(slot)

    def _forget(self, slot: int) -> None:
        """What was ordered and has not come."""
        self._views[slot].die_at = 0
        self._ordered.pop(slot, None)

    def _run(self) -> None:
        while not self._stop.wait(0.003):
            now = time.monotonic()
            with self._lock:
                for slot, points in list(self._next.items()):
                    self._look(slot, points, now)

    def _look(self, slot: int, points: Iterator[str], now: float) -> None:
        view = self._views[slot]
        if slot in self._ordered:
            point, since = self._ordered[slot]
            if not view.die_at:
                self.deaths[point] += 1
                self._resting[slot] = now + (0 if point in SWITCH else REST_SECONDS)
            elif point in SWITCH or now - since < ORDER_SECONDS:
                return
            view.die_at = 0
            del self._ordered[slot]
        if now < self._resting.get(slot, 0):
            return
        point = next(points, None)
        if point is None:
            del self._next[slot]
            return
        view.die_after = 1 + self._random.randrange(1 if point in SWITCH else 3)
        view.die_at = POINTS[point]
        self._ordered[slot] = point, now

    def some(self, points: list[str]) -> Iterator[str]:
        """These in turn, and after each one any other, for ever."""
        for point in itertools.cycle(points):
            yield point
            yield self._random.choice(ANYWHERE)


@pytest.fixture(scope="module")
def node() -> Iterator[Mirrored]:
    with mirrored("pkm-dead") as made:
        agent = made.lab.start(
            "node", sys.executable, "-c", AGENT, "--run-dir", str(made.lab.run_directory), stderr=subprocess.DEVNULL
        )
        eventually(made.client.alive, 30)
        made.make(1)
        made.settle()
        yield made
        made.down()
        agent.wait(20)


def abort(connection: socket.socket) -> None:
    """End it by a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def use_ports_again(node: Mirrored, connections: dict[int, socket.socket], until: Callable[[], bool]) -> int:
    """Connections that are ended, and begun anew with the same ports at once; how often."""
    n, deadline = 0, time.monotonic() + 6
    while not until() and time.monotonic() < deadline:
        for port in list(connections):
            abort(connections.pop(port))
            connections[port] = node.connect(VIP, 80, 8, source=(node.lab.client_addresses[0], port))
            ask(connections[port])
            n += 1
    return n


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_row_32_deaths_in_each_step_of_a_transition_harm_no_connection(node: Mirrored, rounds: int) -> None:
    seed = int(os.environ.get("PACKETSTACK_SEED", "1"))
    print(f"PACKETSTACK_SEED={seed}")
    deaths: Counter[str] = Counter()
    for i in range(rounds):
        deaths += a_transition(node, 2 - i % 2, seed + i)
    print(dict(deaths))
    must = {*SWITCH, "KEPT_ENDED", "KEPT_REMOVED", "KEPT_GONE", "CLAIMED"}
    assert not must - deaths.keys(), deaths


def a_transition(node: Mirrored, replicas: int, seed: int) -> Counter[str]:
    """To another number of engines. -> deaths by point"""
    before, retired = node.counters(node.slots()), node.count("SetRetired")
    wires = Wire(node.lab, "client", "c0"), Wire(node.lab, "server", "s0")
    traffic = Traffic(
        node.lab, ALL_TCP, ALL_UDP, connections=300, udp_flows=100, request_interval_ms=300, udp_interval_ms=100,
        new_rate=40, ramp_seconds=0.5, leave_seconds=3,
    )  # fmt: skip
    traffic.wait_open()
    first, address = 21000 + seed * 20, node.lab.client_addresses[0]
    ports = {p: node.connect(VIP, 80, source=(address, p)) for p in range(first, first + 12)}
    with Reaper(node, seed) as reaper:
        old = node.slots()
        for slot in old:
            reaper.order(slot, iter(SWITCH))
        node.scale(replicas)
        node.wait_switched()
        eventually(lambda: not reaper.has_orders(old), 20, "deaths at each point of the switch")
        new = node.slots() - old
        for slot in new:
            reaper.order(slot, reaper.some(CLAIMS))
        for slot in old:
            reaper.order(slot, reaper.some(KEEPS))
        n = use_ports_again(node, ports, lambda: bool(reaper.deaths["CLAIMED"]))
        for connection in ports.values():
            ask(connection)
            connection.close()
        kept = traffic.stop()
        with suppress(AssertionError):
            eventually(lambda: not node.live(old), 6)
        reaper.rest()
        counted = node.counters(old | new) - before
    node.retired(retired + 1)
    node.settle()
    client, server = (w.read() for w in wires)
    print(f"{kept}; {n} ports used again; {dict(reaper.deaths)}; {dict(counted)}")
    assert kept.broken == 0, kept.what_broke()
    assert (kept.datagrams_lost, kept.datagrams_duplicated) == (0, 0), kept
    assert sent_twice(client) == sent_twice(server) == {}
    for reason in ("drop_no_flow", "drop_not_owner", "late", "drop_park_full", "resets_sent"):
        assert counted[reason] == 0, reason  # a backend may reset what comes again because it was late
    return reaper.deaths
