"""A stack whose sets of engines take over from each other by Mirror, and what its client and its server see on the wire."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.lab.listening import all_kept, listen
from tests.lab.node import Node
from tests.lab.pool import DEMO
from tests.waiting import eventually

from packetstack_agent.node import RunDirectory
from packetstack_cli.backend import Wishes
from packetstack_cli.lab import NODE_UPLINK, Lab, Room, inside
from packetstack_cli.traffic import Servers
from packetstack_core import abi
from packetstack_core.resources import PacketStack

VIP = "192.0.2.10"
TCP, UDP = f"{VIP}:80", f"{VIP}:53"
ALL_TCP, ALL_UDP = (TCP, "[2001:db8:1::10]:80"), (UDP, "[2001:db8:1::10]:53")
TIMEOUTS = {
    "tcpClosedTimeoutSeconds": 1,
    "tcpTimeWaitTimeoutSeconds": 1,
    "tcpHalfCloseTimeoutSeconds": 4,
    "udpIdleTimeoutSeconds": 2,
    "udpUnansweredTimeoutSeconds": 2,
}
FLOW_TABLE = {"buckets": 256, "maxFlows": 20000, **TIMEOUTS}
SYN, ACK, RST, FIN = 2, 16, 4, 1


@dataclass(frozen=True)
class Segment:
    """An IPv4 packet, as it was on a wire."""

    outgoing: bool
    source: str
    destination: str
    protocol: int
    sport: int
    dport: int
    flags: int
    """Of TCP."""
    number: int
    """TCP's sequence number."""
    same: bytes
    """All that two copies have in common that two engines have sent on: without addresses, ports, TTL, checksums."""


class Wire:
    """Keeps what passes a device of the lab from now on."""

    def __init__(self, lab: Lab, room: Room, device: str) -> None:
        self._socket = listen(lab, room, device)

    def peek(self) -> list[Segment]:
        """What has passed since the last look: TCP and UDP over IPv4, without later fragments."""
        found = []
        while True:
            try:
                frame, address = self._socket.recvfrom(160)
            except BlockingIOError:
                break
            if (segment := _segment(frame, address[2] == 4)) is not None:
                found.append(segment)
        return found

    def read(self) -> list[Segment]:
        """The same; it is the last look. AssertionError if the kernel could not keep all."""
        found = self.peek()
        with self._socket:
            all_kept(self._socket)
        return found


def _segment(frame: bytes, outgoing: bool) -> Segment | None:
    if frame[12:14] != b"\x08\x00" or frame[23] not in (6, 17):
        return None
    l4 = 14 + (frame[14] & 15) * 4
    if struct.unpack("!H", frame[20:22])[0] & 0x1FFF or len(frame) < l4 + 8:
        return None
    tcp = frame[23] == 6
    sport, dport = struct.unpack("!HH", frame[l4 : l4 + 4])
    rest = frame[l4 + 4 : l4 + 16] + frame[l4 + 18 :] if tcp else frame[l4 + 8 :]
    return Segment(
        outgoing, socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34]), frame[23], sport, dport,
        frame[l4 + 13] if tcp else 0, struct.unpack("!I", frame[l4 + 4 : l4 + 8])[0] if tcp else 0,
        frame[16:20] + rest,
    )  # fmt: skip


def resets(segments: Sequence[Segment]) -> list[Segment]:
    """Those among them that end a connection."""
    return [s for s in segments if s.flags & RST]


def sent_twice(segments: Sequence[Segment]) -> dict[bytes, int]:
    """What came in more than once in the same form. Segments without content and with the IP identification 0 are no
    evidence: a kernel sends the same ones again."""
    seen = Counter(s.same for s in segments if not s.outgoing and s.same[2:4] != b"\0\0")
    return {same: n for same, n in seen.items() if n > 1}


def answers_to_one_opener(segments: Sequence[Segment]) -> list[tuple[Any, ...]]:
    """At the client: openers to which SYN-ACKs came with two different numbers."""
    numbers: dict[tuple[Any, ...], set[int]] = {}
    for s in segments:
        if not s.outgoing and s.flags & (SYN | ACK) == SYN | ACK:
            acked = struct.unpack("!I", s.same[8:12])[0]
            numbers.setdefault((s.destination, s.dport, s.source, s.sport, acked), set()).add(s.number)
    return [key for key, found in numbers.items() if len(found) > 1]


def document(replicas: int, handover: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """The stack, with these parts instead of its own."""
    made: dict[str, Any] = yaml.safe_load(DEMO.read_text())
    for listener in made["spec"]["listeners"]:
        listener["healthCheck"] = {"type": "None"}
    made["spec"] |= {
        "replicas": replicas,
        "engine": {"cores": 1, "queuesPerCore": 2, "cpuPolicy": "Shared"},
        "handover": {"strategy": "Mirror", **(handover or {})},
        "flowTable": FLOW_TABLE,
        "rebalance": {"mode": "Off"},
        **spec,
    }
    return made


class Mirrored(Node):
    """A stack `demo` with Mirror, whose backends are the traffic generator's."""

    def make(self, replicas: int, handover: dict[str, Any] | None = None, **spec: Any) -> None:
        """Bring it up, or change it. `spec` replaces parts; `handover` adds to the strategy."""
        file = self.lab.directory / "stack.yaml"
        file.write_text(json.dumps(document(replicas, handover, **spec)))
        self.packetstack("up", str(file), "--uplink", NODE_UPLINK)

    def ask_for(self, replicas: int, handover: dict[str, Any] | None = None, **spec: Any) -> None:
        """Change what is wanted, as `make` does, and do not wait."""
        wanted = PacketStack.model_validate(document(replicas, handover, **spec), strict=False)
        self.client.apply([wanted], Wishes((NODE_UPLINK,), None, False))

    def down(self) -> None:
        """Nothing of it is left."""
        self.command("down", "--all", "--yes")

    def engines(self) -> list[dict[str, Any]]:
        """Of all sets."""
        engines: list[dict[str, Any]] = self.status("demo")["engines"]
        return engines

    def slots(self) -> set[int]:
        """Of all engines."""
        return {e["slot"] for e in self.engines()}

    def scale(self, replicas: int) -> None:
        """Ask for so many engines, and do not wait."""
        self.client.scale("demo", replicas)

    def count(self, reason: str) -> int:
        """Events with this reason."""
        return sum(int(e["count"]) for e in self.client.call("events", name="demo") if e["reason"] == reason)

    def switch(self, replicas: int | None = None) -> tuple[set[int], set[int]]:
        """Scale, until all buckets are switched; slots of the first set and of the second. None: to one engine, or to two
        if there is one."""
        before = self.slots()
        self.scale(replicas if replicas is not None else 1 if len(before) > 1 else 2)
        self.wait_switched()
        return before, self.slots() - before

    def wait_switched(self) -> None:
        """Until each bucket has its new owner."""
        eventually(self.switched, 20, "all buckets switched")

    def switched(self) -> bool:
        """Is a set draining, of which no bucket is the own any more?"""
        return self.reason("Progressing") == "SetDraining"

    def condition(self, kind: str) -> dict[str, str]:
        """Of the stack; empty if there is none."""
        found: list[dict[str, str]] = self.status("demo")["conditions"]
        return next((c for c in found if c["type"] == kind), {})

    def reason(self, kind: str) -> str:
        """Of a condition."""
        return self.condition(kind).get("reason", "")

    def live(self, slots: set[int]) -> int:
        """Connections and flows that these engines have."""
        return sum(e["flows"] for e in self.engines() if e["slot"] in slots)

    def kept(self) -> int:
        """Connections of the set that drains, by the list from which the other one knows them."""
        return sum(s["connections"] for s in self.status("demo")["sets"] if s["state"] == "Draining")

    def retired(self, times: int, timeout_seconds: float = 30) -> None:
        """Until so many sets have gone since the stack was made."""
        eventually(lambda: self.count("SetRetired") >= times, timeout_seconds, f"{times} sets retired")

    def settle(self, timeout_seconds: float = 30) -> None:
        """Until the stack is as its resource says, and has one set."""
        self.wait_ready("demo", timeout_seconds)
        eventually(lambda: len(self.status("demo")["sets"]) == 1, timeout_seconds)

    def counters(self, slots: set[int]) -> Counter[str]:
        """Of these engines together: packets by what became of them."""
        found: Counter[str] = Counter()
        for line in self.client.metrics().splitlines():
            if line.startswith("packetstack_engine_packets_total{"):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                if int(labels["engine"]) in slots:
                    found[labels["event"]] += int(float(line.rpartition(" ")[2]))
        return found

    def mirrored(self) -> int:
        """Packets that the director has sent to two engines."""
        found = re.search(r'director_packets_total\{[^}]*"mirrored"[^}]*\} (\S+)', self.client.metrics())
        return int(float(found[1])) if found else 0

    def remains(self) -> dict[str, int]:
        """How many processes, files and so on there are for the sets of engines."""
        run = self.lab.run_directory
        mark = RunDirectory(run).namespace("x", 0).removesuffix("x-0")
        with inside(self.lab.namespace("node")):
            links = len(socket.if_nameindex())
        return {
            "processes": len(self._processes()),
            "namespaces": sum(p.name.startswith(mark) for p in Path("/run/netns").iterdir()),
            "pins": sum(1 for _ in (run / "bpf").iterdir()),
            "files": sum("bpf" not in p.parts for p in run.rglob("*")),
            "links": links,
        }

    def memory_bytes(self) -> int:
        """Of all sets: shared memory, and what datapaths have for themselves."""
        run = self.lab.run_directory
        total = sum(int(abi.lib().ps_map_bytes(str(pin).encode())) for pin in (run / "bpf").glob("*"))
        total += sum(p.stat().st_size for p in run.rglob("*") if "bpf" not in p.parts and p.is_file())
        return total + sum(own_bytes(e["pid"]) for e in self.engines())

    def agent_bytes(self) -> int:
        """What the agent has for itself."""
        return own_bytes(int((self.lab.run_directory / "agent.pid").read_text()))


def own_bytes(pid: int) -> int:
    """Memory of a process, without what it shares."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def ask(connection: socket.socket, sequence: int = 1, size: int = 64) -> bytes:
    """A request of the generator's protocol; its answer. The connection must still work."""
    connection.sendall(struct.pack("=IIQQ", 0x50537171, size, sequence, 7))
    found = b""
    while len(found) < 16 + size:
        more = connection.recv(65536)
        assert more, "the connection was closed"
        found += more
    return found


def strike(lab: Mirrored, slot: int, whole: bool) -> None:
    """Kill a datapath, or its whole engine; returns when it serves again."""
    engine = next(e for e in lab.engines() if e["slot"] == slot)
    if whole:
        os.killpg(engine["initPid"], signal.SIGKILL)
    else:
        os.kill(engine["pid"], signal.SIGKILL)
    eventually(
        lambda: any(e["slot"] == slot and e["ready"] and e["pid"] != engine["pid"] for e in lab.engines()),
        15,
        f"engine {slot} serves again",
    )


@contextmanager
def dropped(node: Node, room: Room, rule: str) -> Iterator[None]:
    """Whoever is in this room gets no packet that the rule is about."""
    chain = "add chain inet lost in { type filter hook prerouting priority raw; }"
    node.lab.run(room, "nft", f"add table inet lost; {chain}; add rule inet lost in {rule} drop")
    try:
        yield
    finally:
        node.lab.run(room, "nft", "delete table inet lost")


@contextmanager
def mirrored(prefix: str, *, servers: bool = True, clients: int = 8) -> Iterator[Mirrored]:
    """A lab with servers, and without a stack. `clients`: addresses of the client, of each family."""
    with Lab(prefix, client_addresses=clients) as lab:
        serving = Servers(lab) if servers else None
        made = Mirrored(lab)
        try:
            yield made
        finally:
            made.down()
            if serving is not None:
                serving.stop()
