"""A stack that is flooded while it is used: two listeners of each protocol, one of each the flooded one.

One engine of the test build, whose packets take a set time each (see costly.py), so that twice its capacity is a rate
that any machine can send.
"""

import json
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tests.lab.costly import AGENT, CostlyStack

from packetstack_cli.client import Client
from packetstack_cli.lab import Lab, inside
from packetstack_cli.traffic import Outcome, Servers, Traffic
from packetstack_core import abi

FLOOD = Path(__file__).parents[2] / "build/meson/bench/packetstack-flood"
KINDS = ("syn", "udp", "ack", "fragment", "echo", "unreachable")
SOURCES = "10.80.0.0/12"
"""A million addresses, behind the client; nobody answers there."""
VIP = "192.0.2.10"
TCP, OTHER_TCP = f"{VIP}:80", f"{VIP}:81"
UDP, OTHER_UDP = f"{VIP}:53", f"{VIP}:54"
LISTENERS = {"web": ("TCP", 80), "web2": ("TCP", 81), "dns": ("UDP", 53), "dns2": ("UDP", 54)}
COST_NS = 40_000
"""Of a packet in the engine."""
TRIES, TRY_SECONDS = 3, 1.0
"""Of a datagram that opens a flow: as resolvers and others do who need an answer."""


def source_route(lab: Lab) -> None:
    """Packets to the flood's sources end in the client. The servers' own half-open state is not what is tried here."""
    lab.run("node", "ip", "route", "replace", SOURCES, "via", "10.71.1.2")
    lab.sysctl("server", {"net.ipv4.tcp_syncookies": "2"})


def flood(lab: Lab, kind: str, rate: float, seconds: float, seed: int | None = None) -> "Flood":
    """Packets of this kind to the first TCP or UDP listener, each from another source: always the same ones by a seed."""
    target = UDP if kind in ("udp", "fragment") else TCP
    link = json.loads(lab.run("node", "ip", "-j", "link", "show", "dev", "up0").stdout)
    words = ["--device", "c0", "--mac", link[0]["address"], "--kind", kind, "--target", target, "--sources", SOURCES]
    words += ["--rate", str(max(1, round(rate))), "--seconds", f"{seconds:g}"]
    words += ["--seed", str(seed or time.monotonic_ns())]
    return Flood(lab.start("client", str(FLOOD), *words, stdout=subprocess.PIPE))


class Flood:
    """One that is under way."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def stop(self) -> dict[str, Any]:
        """Ends it."""
        self._process.terminate()
        return self.end()

    def end(self) -> dict[str, Any]:
        """Waits for its end; what was sent."""
        said, _ = self._process.communicate(timeout=120)
        report: dict[str, Any] = json.loads(said)
        return report


class Datagrams:
    """Opens UDP flows of a listener at an even rate, from ports never used before, until it is stopped."""

    def __init__(self, lab: Lab, target: str, rate: float) -> None:
        self.opened = self.answered = self.at_once = 0
        self._lab, self._rate = lab, rate
        address, _, port = target.rpartition(":")
        self._target = (address, int(port))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # struct datagram of cli/traffic/protocol.h; a summary is answered and not counted
        ask = struct.pack("=IIQIIQQQII", 0x50536464, 2, 1, 0, 0, 0, 0, 0, 0, 0)
        chooser = selectors.DefaultSelector()
        waiting: dict[socket.socket, tuple[int, float]] = {}  # tries, when the next is due
        with inside(self._lab.namespace("client")):
            due = time.monotonic()
            while not self._ended.is_set() or waiting:
                now = time.monotonic()
                if now >= due and not self._ended.is_set():
                    due += 1 / self._rate
                    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                    one.connect(self._target)
                    self.opened += 1
                    chooser.register(one, selectors.EVENT_READ)
                    waiting[one] = (0, now)
                for one, (tries, when) in list(waiting.items()):
                    if now < when:
                        continue
                    if tries == TRIES:
                        self._forget(chooser, waiting, one)
                    else:
                        waiting[one] = (tries + 1, now + TRY_SECONDS)
                        self._send(one, ask)
                for key, _ in chooser.select(0.005):
                    answered = key.fileobj
                    assert isinstance(answered, socket.socket)
                    self.answered += 1
                    self.at_once += waiting[answered][0] == 1
                    self._forget(chooser, waiting, answered)
        chooser.close()

    @staticmethod
    def _send(one: socket.socket, ask: bytes) -> None:
        with suppress(OSError):  # as when it is lost
            one.send(ask)

    @staticmethod
    def _forget(chooser: selectors.BaseSelector, waiting: dict[socket.socket, Any], one: socket.socket) -> None:
        chooser.unregister(one)
        waiting.pop(one)
        one.close()

    def stop(self) -> None:
        """No more; wait for the answers to those under way."""
        self._ended.set()
        self._thread.join(30)


class Openers:
    """New connections and flows of a TCP and a UDP listener, at an even rate."""

    def __init__(self, lab: Lab, name: str, tcp: str, udp: str, rate: int) -> None:
        self._connections = Traffic(
            lab, [tcp], connections=0, new_rate=rate, answer_bytes="64", timeout_seconds=8, name=f"{name}-new"
        )
        self._datagrams = Datagrams(lab, udp, rate)

    def stop(self) -> tuple[int, int]:
        """How many were served, and how many there were: connections that were answered in time, datagrams in three tries."""
        self._datagrams.stop()
        short = self._connections.stop().report["short_connections"]
        # Those that broke before they were open are counted as broken alone.
        return short["done"] + self._datagrams.answered, max(
            short["opened"], short["done"] + short["broken"]
        ) + self._datagrams.opened


class Established:
    """Connections and flows of a TCP and a UDP listener that are there before the flood."""

    def __init__(self, lab: Lab, name: str, tcp: str, udp: str, *, connections: int = 50, flows: int = 20) -> None:
        self._traffic = Traffic(
            lab, [tcp], [udp], connections=connections, udp_flows=flows, request_interval_ms=1000, udp_interval_ms=200,
            answer_bytes="64", ramp_seconds=0.5, name=name,
        )  # fmt: skip

    def open(self) -> None:
        """Waits until all are."""
        self._traffic.wait_open()

    def lost(self) -> int:
        """Datagrams that have not come back so far, those under way too."""
        return int(self._traffic.latest["datagrams_sent"] - self._traffic.latest["datagrams_received"])

    def stop(self) -> Outcome:
        """What became of them."""
        return self._traffic.stop()


def established(lab: Lab) -> list[Established]:
    """Those of the flooded listeners and of the others, all open."""
    both = [Established(lab, "own", TCP, UDP), Established(lab, "others", OTHER_TCP, OTHER_UDP)]
    for one in both:
        one.open()
    return both


ASSURED_SECONDS = 3.0
"""After that a UDP flow that is used counts as known: see PS_UDP_ASSURED_TICKS and shedding.py of the agent."""


@dataclass(frozen=True)
class Attack:
    """One flood, and what became of new flows meanwhile."""

    kind: str
    rate: float
    """Packets a second."""
    sent: int
    other: tuple[int, int]
    """Openers of the other listeners: served, of how many."""
    flooded: tuple[int, int]
    """The same of the flooded ones."""
    lost: int
    """Datagrams of established flows of all listeners."""

    @staticmethod
    def served(openers: tuple[int, int]) -> float:
        """Their share in percent."""
        return 100 * openers[0] / openers[1]


def attack(lab: Lab, kind: str, rate: float, seconds: float, established: Sequence[Established] = ()) -> Attack:
    """Floods the first listener of the kind's protocol, while new flows of all are opened."""
    before = sum(e.lost() for e in established)
    running = flood(lab, kind, rate, seconds)
    time.sleep(0.1)
    others, own = Openers(lab, "others", OTHER_TCP, OTHER_UDP, 20), Openers(lab, "own", TCP, UDP, 20)
    sent = running.end()["sent"]
    other, flooded_ = others.stop(), own.stop()
    time.sleep(0.3)
    lost = sum(e.lost() for e in established) - before
    return Attack(kind, rate, sent, other, flooded_, lost)


class Flooded(CostlyStack):
    """One of one engine."""

    def start(self) -> None:
        """An agent."""
        self._agent = self.lab.start("node", sys.executable, "-c", AGENT, "--run-dir", str(self.lab.run_directory))
        while not self.client.alive():
            time.sleep(0.05)

    def leave(self) -> None:
        """The agent ends, and leaves all as it is."""
        self.client.call("leave")
        self._agent.wait(20)

    def up(self) -> None:
        """Makes the stack."""
        self.make({"cores": 1, "queuesPerCore": 1}, 1, "Off", LISTENERS, 65536)

    def metrics(self) -> dict[str, float]:
        """By name, and the values of the labels that tell samples apart, in the order of the labels' names."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.client.metrics()):
            for s in family.samples:
                labels = ".".join(str(v) for k, v in s.labels.items() if k not in ("stack", "engine"))
                found[f"{s.name}.{labels}"] = found.get(f"{s.name}.{labels}", 0.0) + s.value
        return found

    def arena_bytes(self) -> int:
        """Size of the memory that holds its flows; all of it is taken when it is made."""
        run = self.lab.run_directory
        files = sum(file.stat().st_size for file in run.rglob("stacks/*/sets/*/arena"))
        return files + sum(int(abi.lib().ps_map_bytes(str(pin).encode())) for pin in run.glob("bpf/arena_*"))

    def events(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.call("events", name="web")
        return found

    def rest(self, timeout_seconds: float = 20) -> dict[str, float]:
        """The metrics once no packet is under way any more."""
        before, deadline = self.metrics(), time.monotonic() + timeout_seconds
        while True:
            time.sleep(0.3)
            after = self.metrics()
            moving = "packetstack_director_packets_total.received", "packetstack_engine_packets_total.received"
            if all(before.get(m) == after.get(m) for m in moving):
                return after
            assert time.monotonic() < deadline, "packets are still under way"
            before = after

    def capacity(self, kind: str, rate: float = 3000, seconds: float = 1.5) -> float:
        """Packets a second of this kind that keep the engine busy all the time: what fewer take of it, with all answers."""
        before = self.metrics()
        running = flood(self.lab, kind, rate, seconds)
        sent = running.end()["sent"]
        time.sleep(0.2)
        after = self.metrics()

        def risen(name: str) -> float:
            return after.get(name, 0.0) - before.get(name, 0.0)

        if kind == "echo":  # the director answers
            return 1e9 / COST_NS
        return float(sent / (risen("packetstack_engine_packets_total.received") * COST_NS / 1e9))

    def unaccounted(self) -> dict[str, int]:
        """At rest: packets of which no counter says what became of them, by stage."""
        m = {name: int(value) for name, value in self.rest().items()}

        def total(family: str, *results: str) -> int:
            return sum(m.get(f"packetstack_{family}_packets_total.{result}", 0) for result in results)

        def dropped(family: str) -> int:
            return sum(v for k, v in m.items() if k.startswith(f"packetstack_{family}_packets_total.drop_"))

        # What is unstamped did not come from the director: the kernel's own messages on new interfaces.
        kernel = sum(
            v for k, v in m.items()
            if k.startswith("packetstack_drops_total.") and k.endswith(".kernel") and ".unstamped." not in k
        )  # fmt: skip
        director = sum(v for k, v in m.items() if k.startswith("packetstack_director_packets_total.")) - total(
            "director", "received"
        )
        engine = total("engine", "forwarded") + dropped("engine")
        return {
            "director": total("director", "received") - director,
            "rings": total("director", "forwarded") - total("engine", "received") - kernel,
            "engine": total("engine", "received") - engine,
        }


@contextmanager
def flooded(prefix: str, cost_ns: int = COST_NS) -> Iterator[Flooded]:
    """Brought up, with its servers; ended with all that belongs to it."""
    with Lab(prefix) as lab:
        source_route(lab)
        servers = Servers(lab)
        made = Flooded(lab, Client(lab.run_directory))
        made.start()
        made.up()
        made.cost(cost_ns)
        yield made
        servers.stop()
        lab.packetstack("down", "--yes")


RULES = """
table ip peer {{
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        {forwards}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        oifname "dn0" masquerade
    }}
}}
"""


@contextmanager
def translated(prefix: str) -> Iterator[Lab]:
    """The same listeners and backends in a lab whose node forwards with nftables: DNAT by a hash, masquerade, conntrack."""
    with Lab(prefix) as lab:
        source_route(lab)
        servers = Servers(lab)
        ports = {"TCP": 8080, "UDP": 8081}
        places = ", ".join(f"{i} : 10.71.5.{i + 1}" for i in range(4))
        forwards = "\n        ".join(
            f"ip daddr {VIP} {protocol.lower()} dport {port} dnat to jhash ip saddr . {protocol.lower()} sport mod 4 "
            f"map {{ {places} }}:{ports[protocol]}"
            for protocol, port in LISTENERS.values()
        )
        file = lab.directory / "peer.nft"
        file.write_text(RULES.format(forwards=forwards))
        lab.run("node", "nft", "-f", str(file))
        yield lab
        servers.stop()
