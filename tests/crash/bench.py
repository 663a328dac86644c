"""An engine whose datapath dies: the agent's own parts around it, and traffic that shows every wrong packet.

Namespaces, devices, programs, sockets, rings and handovers are the real ones; only the keeper, which answers the
datapath's socket and starts the next process, is a small one of this test. Packets are made and read here, so that
each can be held against what it must be: content, addresses, ports, TTL, checksums, order.
"""

import array
import contextlib
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from packetstack_agent import engines, namespaces, networks, stacks
from packetstack_agent.blueprints import Blueprint
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import call, constant, ffi, lib, text
from packetstack_cli.lab import Lab, inside
from packetstack_core import abi, reading, shards
from packetstack_core.assignment import Move, Owner

ROOT = Path(__file__).parents[2]
DATAPATH = ROOT / "build/meson/engine/packetstack-datapath-inject"
OWNER = "crash test"
SLOT, QUEUES, CORES, BUCKETS = 1, 2, 2, 256
VIP, CLIENT, BACKEND = "192.0.2.10", "10.71.4.200", "10.71.5.200"
UDP_PORT, TCP_PORT, BACKEND_PORT = 53, 80, 8080
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
FIN, SYN, RST, ACK = 1, 2, 4, 16
MAGIC = b"pkstcrsh"
CLIENT6, VIP6 = (bytes(10) + b"\xff\xff" + socket.inet_aton(a) for a in (CLIENT, VIP))
RING = 512
CPUS = (min(os.sched_getaffinity(0)),) * CORES
"""All cores on one CPU: behind the engine each CPU has a queue of its own, and a successor on another CPU may overtake
what its predecessor sent (docs/limits.md). Order is to be the datapath's alone here."""
CROWDED = 4
"""Buckets below this get openers only: each new one has to push the oldest out."""
IDLE_TENTHS = 50
"""After this time the sweep ends a flow, whatever its state. Flows that are still in use talk more often."""

STACK: dict[str, Any] = {
    "apiVersion": "packetstack.io/v1alpha1",
    "kind": "PacketStack",
    "metadata": {"name": "crash"},
    "spec": {
        "replicas": 1,
        "engine": {"cores": CORES, "queuesPerCore": 1, "cpuPolicy": "Shared"},
        "listeners": [
            {
                "name": name,
                "address": VIP,
                "protocol": name.upper(),
                "port": port,
                "healthCheck": {"type": "None"},
                "backends": {"endpoints": [{"address": BACKEND, "port": BACKEND_PORT}]},
            }
            for name, port in (("udp", UDP_PORT), ("tcp", TCP_PORT))
        ],
        "snat": {"addresses": ["198.51.100.0/31"]},
        "flowTable": {"buckets": BUCKETS, "maxFlows": 1024},
    },
}

POINTS = {n.removeprefix("PS_AT_"): i for i, n in abi.enum_names("ps_point").items() if n.startswith("PS_AT_")}
POINTS.pop("NOWHERE")
ADOPTING = [n for n in POINTS if n.startswith(("ADOPT", "REBUILD", "UNDO_RESTORED", "TORN"))]
SERVING = [n for n in POINTS if n not in ADOPTING]


def ones(data: bytes) -> int:
    """Sum of 16-bit words modulo 65535: 0 for data with a right checksum."""
    return int.from_bytes(data + b"\0" if len(data) & 1 else data, "big") % 65535


def checksum(data: bytes) -> int:
    return 65535 - ones(data)


@dataclass(frozen=True)
class Packet:
    """What matters of a frame."""

    protocol: int
    source: tuple[str, int]
    destination: tuple[str, int]
    payload: bytes
    flags: int = ACK
    ttl: int = 64
    sequence: int = 0
    acknowledged: int = 0

    def frame(self, to: bytes) -> bytes:
        """With Ethernet header and checksums."""
        pseudo = socket.inet_aton(self.source[0]) + socket.inet_aton(self.destination[0])
        if self.protocol == UDP:
            length = 8 + len(self.payload)
            head = struct.pack("!HHHH", self.source[1], self.destination[1], length, 0)
            at = 6
        else:
            length = 20 + len(self.payload)
            ports, numbers = (self.source[1], self.destination[1]), (self.sequence, self.acknowledged)
            head = struct.pack("!HHIIBBHHH", *ports, *numbers, 0x50, self.flags, 65535, 0, 0)
            at = 16
        check = checksum(pseudo + struct.pack("!HH", self.protocol, length) + head + self.payload)
        head = head[:at] + struct.pack("!H", check) + head[at + 2 :]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, self.ttl, self.protocol, 0) + pseudo
        ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
        return to + b"\x02\0\0\0\0\x01\x08\0" + ip + head + self.payload


def parse(frame: bytes) -> Packet | None:
    """The packet in a frame; None if it is not one of ours at all. ValueError names a wrong checksum."""
    if frame[12:14] != b"\x08\0" or frame[14] != 0x45 or MAGIC not in frame:
        return None
    ip, protocol = frame[14:34], frame[23]
    body = frame[34 : 14 + int.from_bytes(frame[16:18], "big")]
    if ones(ip):
        raise ValueError("wrong IP checksum")
    if ones(ip[12:20] + struct.pack("!HH", protocol, len(body)) + body):
        raise ValueError("wrong checksum over the payload")
    sport, dport = struct.unpack("!HH", body[:4])
    places = (socket.inet_ntoa(ip[12:16]), sport), (socket.inet_ntoa(ip[16:20]), dport)
    head = 8 if protocol == UDP else 20
    return Packet(protocol, *places, body[head:], body[13] if protocol == TCP else 0, ip[8])


def payload(flow: int, number: int, reply: bool) -> bytes:
    """Content of the number-th packet of a flow in one direction; no two are alike."""
    filler = bytes((flow * 7 + number * 13 + i) & 255 for i in range((flow * 31 + number * 17) % 96))
    return MAGIC + struct.pack("!II?", flow, number, reply) + filler


@dataclass(eq=False)
class Flow:
    """One flow, and what must come next of it at each end."""

    number: int
    protocol: int
    port: int
    crowded: bool = False
    snat: tuple[str, int] | None = None
    sent: list[int] = field(default_factory=lambda: [0, 0])
    """Packets sent: to the backend, to the client."""
    seen: list[int] = field(default_factory=lambda: [0, 0])
    numbers: list[int] = field(default_factory=lambda: [0xFFFFFF00, 0xFFFFFF80])
    """TCP: of the next byte to the backend, to the client. They wrap around soon."""


class Keeper:
    """One real engine, and the processes that serve it one after the other."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.examples: list[str] = []
        self.delivered = 0
        self.deaths = 0
        self.hits: Counter[str] = Counter()
        self.adoptions: list[float] = []
        self.flows: dict[int, Flow] = {}
        self.known: dict[int, Flow] = {}
        """Flows of which packets may still come."""
        self.places: dict[int, tuple[str, int]] = {}
        """Where the backend sees a flow come from."""
        self.numbers = 0
        self.port = 1024
        self.moves = 0
        self.blamed = 0
        self.refused = 0
        self.flows_may_be_rubbish = False
        self.alive = False
        self.handed = 0
        self._waiting: list[subprocess.Popen[bytes]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._moving = threading.Lock()
        self._stop = threading.Event()
        self._mover: threading.Thread | None = None
        self._died = 0.0
        self._counted: Counter[str] = Counter()

    def begin(self, seed: int) -> None:
        """Forget what was seen; from now on the choices are those of this seed. What the engine holds stays."""
        self.random = random.Random(seed)
        for seen in (self.faults, self.examples, self.hits, self.flows, self.known, self.places, self.adoptions):
            seen.clear()
        self.blamed = self.refused = 0
        self.flows_may_be_rubbish = False
        self._counted = Counter(self.engine.counters())

    def counters(self) -> dict[str, int]:
        """The engine's, since `begin()`."""
        return {name: n - self._counted[name] for name, n in self.engine.counters().items()}

    # ---- making

    def __enter__(self) -> "Keeper":
        try:
            with inside(self.lab.namespace("node")):
                self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        directory = self.lab.directory / "crash"
        directory.mkdir()
        self.pins = directory / "bpf"
        self.director = call(lib().ps_director_open, text(abi.NATIVE), text(self.pins))
        self.pair, _ = networks.ensure_pair(OWNER)
        mac = ffi.from_buffer("uint8_t[]", self.pair.routed_mac)
        call(lib().ps_routed_attach, self.director, self.pair.routed, mac)
        call(lib().ps_director_attach, self.director, self.pair.director, lib().PS_ROLE_ROUTED, b"routed")
        for device, index in networks.direct_uplinks(self.director, {"up0": "", "dn0": ""}).items():
            call(lib().ps_director_attach, self.director, index, lib().PS_ROLE_UPLINK, device.encode())
        self.stack = stacks.Stack(
            "deaths", reading.parse(STACK), 0, directory / "stack", lambda _: self.pins / "flows", self.director
        )
        networks.ensure_routes(self.stack.resource.prefixes())
        self.stack.direct()
        self.memory = self.stack.sets[self.stack.current]
        config = self.memory.config
        self.memory.prepare(self.stack._wanted(time.monotonic()))
        for state in range(constant("PS_FLOW_SYN"), constant("PS_FLOW_STATES")):
            config.buffer[1].timeout[state] = IDLE_TENTHS
        self.memory.publish()
        blueprint = Blueprint(
            "crash", SLOT, "", QUEUES, CORES, "Shared", CPUS, 0, f"{self.lab.prefix}-engine", OWNER,
            directory / "engine", self.memory.arena_path, self.memory.config_path, self.memory.pin, self.pins / "engine",
            shards.FIRST,
        )  # fmt: skip
        self.engine = engines.Engine(blueprint, self.director)
        self._make_engine()
        self.stack.transfer([self.engine], [Move(b, Owner(SLOT, b % QUEUES)) for b in range(BUCKETS)])
        self.macs = {
            room: bytes.fromhex(
                json.loads(self.lab.run("node", "ip", "-j", "link", "show", device).stdout)[0]["address"].replace(
                    ":", ""
                )
            )
            for room, device in (("client", "up0"), ("server", "dn0"))
        }
        self.sockets = {room: self._socket(room, device) for room, device in (("client", "c0"), ("server", "s0"))}
        self.adopt()

    def _make_engine(self) -> None:
        e, b = self.engine, self.engine.blueprint
        path = namespaces.create(b.namespace)
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            link = networks.make_engine_link(SLOT, namespace, "eth0", OWNER)
            e.ifindex = link.ifindex
            mac = namespaces.run_in(path, partial(networks.set_up_engine_end, "eth0"))
            end = ffi.new("struct ps_end *", {"token": 0x70616361706B, "slot": SLOT, "stack": self.stack.index})
            queues = call(lib().ps_engine_attach, self.director, namespace, b"eth0", text(e.link), end)
            program = call(lib().ps_host_program, self.director, end)
            call(lib().ps_host_attach, link.ifindex, program)
            os.close(program)
            call(lib().ps_director_engine, self.director, SLOT, link.ifindex)
            options = ffi.new(
                "struct ps_queue_options *",
                {
                    "slot": SLOT, "queues": QUEUES, "cores": CORES, "rx_slots": RING, "tx_slots": RING,
                    "spare_frames": 2 * RING, "mtu": 1500, "spin_us": 0, "token": end.token,
                },
            )  # fmt: skip
            ffi.memmove(options.mac, mac, 6)
            ffi.memmove(options.gateway_mac, link.host_mac, 6)
            b.directory.mkdir(parents=True)
            e.fds = ffi.new("struct ps_queue_fds *")
            call(
                lib().ps_queues_create, text(b.directory / "queues"), text(b.memory), namespace, b"eth0", queues, options,
                e.fds,
            )  # fmt: skip
            os.close(queues)
        finally:
            os.close(namespace)
        e.files = [os.open(p, os.O_RDONLY | os.O_CLOEXEC) for p in (b.arena, b.config)]
        e.files.append(call(lib().ps_packet_socket, -1, e.ifindex))
        e.files.append(call(lib().ps_map_open, text(b.flows), 0))
        e.fence = ffi.new("struct ps_fence_engine *")
        e.fence.slot, e.fence.ifindex = SLOT, e.ifindex
        e.fence.ingress, e.fence.egress = e.files[2], e.fds.egress
        e.fence.wake = e.fds.wake
        e.view = e.fence.engine = call(lib().ps_engine_open, text(b.directory / "queues"), text(b.memory))
        e.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        e.listener.bind(str(b.directory / "engine.sock"))
        e.listener.listen(8)
        e.listener.settimeout(5)

    def _socket(self, room: Any, device: str) -> socket.socket:
        with inside(self.lab.namespace(room)):
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(0x800))
        made.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        made.bind((device, 0x800))
        made.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING
        return made

    def close(self) -> None:
        """End what was started, remove what was made."""
        self.move_no_more()
        for process in (*self._waiting, *([self._process] if self._process else [])):
            process.kill()
            process.wait()
        if self._connection:
            self._connection.close()
        for made in getattr(self, "sockets", {}).values():
            made.close()
        with inside(self.lab.namespace("node")):
            if hasattr(self, "stack"):
                self.stack.close()
            if hasattr(self, "engine"):
                engines.destroy(self.engine)
            if hasattr(self, "director"):
                for name in (b"routed", b"routed_end", b"up0", b"dn0"):
                    lib().ps_director_detach(self.director, name, ffi.new("struct ps_error *"))
                lib().ps_director_close(self.director)
            networks.remove_pair(OWNER)
        if hasattr(self, "pins"):
            namespaces.unmount(self.pins)

    # ---- processes

    def _spawn(self) -> None:
        command = [str(DATAPATH), "--socket", str(self.engine.blueprint.directory / "engine.sock")]
        self._waiting.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False))

    def adopt(self) -> None:
        """Hand the engine to a process that has been waiting for it, and have another one wait."""
        while len(self._waiting) < 2:
            self._spawn()
        listener = self.engine.listener
        assert listener
        self._connection, _ = listener.accept()
        pid, _, _ = struct.unpack("3i", self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._process = next(p for p in self._waiting if p.pid == pid)
        self._waiting.remove(self._process)
        self._heard("HELLO")
        self._tell("ATTACH")
        self._heard("PREPARED")
        self._tell("GO")
        self.alive = True
        self._spawn()

    def _heard(self, kind: str) -> None:
        assert self._connection
        message = ffi.new("struct ps_message *")
        ffi.memmove(message, self._connection.recv(4096), ffi.sizeof("struct ps_message"))
        assert message.kind == constant(f"PS_MSG_{kind}")

    def _tell(self, kind: str) -> None:
        assert self._connection
        e, control = self.engine, []
        message = ffi.new("struct ps_message *", {"kind": constant(f"PS_MSG_{kind}"), "layout": e.view.layout})
        if kind == "ATTACH":
            e.view.generation += 1
            message.slot, message.queues, message.cores, message.generation = SLOT, QUEUES, CORES, e.view.generation
            for i in range(len(message.pin)):
                message.pin[i] = CPUS[i] if i < CORES else -1
            fds = [e.files[0], e.files[3], e.fds.engine, e.fds.map, e.files[1], e.fds.umem]
            fds += [*e.fds.sockets[0:QUEUES], *e.fds.wake[0:CORES], *e.fds.woken[0:CORES]]
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self._connection.sendmsg([bytes(ffi.buffer(message))], control)

    def died(self, wait_seconds: float = 0) -> bool:
        """Has the process gone? Its end of the socket tells, after all its threads have ended."""
        assert self._connection
        assert self._process
        while select.select([self._connection], [], [], wait_seconds)[0]:
            try:
                if self._connection.recv(4096):
                    continue  # it is ready
            except ConnectionResetError:
                pass
            self._connection.close()
            self._process.wait()
            self.alive = False
            self.deaths += 1
            self._died = time.monotonic()
            return True
        return False

    def kill(self) -> None:
        """At a moment that nobody chose."""
        assert self._process
        self._process.send_signal(signal.SIGKILL)
        assert self.died(10)

    def order_death(self, point: str, passes: int) -> None:
        self.engine.view.die_after = passes
        self.engine.view.die_at = POINTS[point]

    # ---- moves of buckets and queues, all the time

    def move_all_the_time(self) -> None:
        chooser = random.Random(self.random.random())

        def run() -> None:
            while not self._stop.wait(0.002):
                with self._moving, contextlib.suppress(AgentError):
                    if chooser.random() < 0.3:
                        took = ffi.new("uint64_t *")
                        queue, core = chooser.randrange(QUEUES), chooser.randrange(CORES)
                        call(lib().ps_queue_to_core, self.engine.fence, queue, core, 20, took)
                        self.handed += 1
                    first, queue = chooser.randrange(BUCKETS), chooser.randrange(QUEUES)
                    buckets = [(first + i) % BUCKETS for i in range(24)]
                    moves = [Move(b, Owner(SLOT, queue)) for b in buckets]
                    self.moves += self.stack.transfer([self.engine], moves).moved

        self._mover = threading.Thread(target=run)
        self._mover.start()

    def move_no_more(self) -> None:
        self._stop.set()
        if self._mover:
            self._mover.join()
            self._mover = None
        self._stop.clear()

    @contextlib.contextmanager
    def nothing_moving(self) -> Iterator[None]:
        with self._moving:
            deadline = time.monotonic() + 5
            while self.stack.open_fences() and time.monotonic() < deadline:
                self.stack.transfer([self.engine], [])
            assert not self.stack.open_fences(), "a handover does not end"
            yield

    # ---- traffic

    def fault(self, kind: str, example: str = "") -> None:
        self.faults[kind] += 1
        if len(self.examples) < 20:
            self.examples.append(f"death {self.deaths}: {kind}: {example}")

    def open_flow(self, protocol: int, crowded: bool = False) -> Flow:
        """A flow of a new client port."""
        self.numbers += 1
        listening = socket.htons(UDP_PORT if protocol == UDP else TCP_PORT)
        while True:
            self.port = 1024 + (self.port - 1023) % 64000
            port = socket.htons(self.port)
            bucket = lib().ps_flow_hash(*self.stack.key, CLIENT6, VIP6, port, listening, protocol) % BUCKETS
            if (bucket < CROWDED) == crowded:
                break
        flow = self.flows[self.numbers] = Flow(self.numbers, protocol, self.port, crowded)
        return flow

    def outgoing(self, flow: Flow, reply: bool = False, flags: int = ACK) -> tuple[str, bytes]:
        """(where it is sent, frame) of the flow's next packet in one direction."""
        content = payload(flow.number, flow.sent[reply], reply)
        flow.sent[reply] += 1
        numbers = flow.numbers[reply], flow.numbers[not reply] if flags & ACK else 0
        flow.numbers[reply] = (numbers[0] + len(content) + bool(flags & (SYN | FIN))) % (1 << 32)
        if reply:
            assert flow.snat
            packet = Packet(flow.protocol, (BACKEND, BACKEND_PORT), flow.snat, content, flags, 64, *numbers)
            return "server", packet.frame(self.macs["server"])
        port = UDP_PORT if flow.protocol == UDP else TCP_PORT
        packet = Packet(flow.protocol, (CLIENT, flow.port), (VIP, port), content, flags, 64, *numbers)
        return "client", packet.frame(self.macs["client"])

    def burst(self) -> list[tuple[str, bytes]]:
        """Packets of one cycle: flows open, talk in both directions, close, or are never answered."""
        chooser, frames = self.random, []
        talking = [f for f in self.flows.values() if f.snat]
        for flow in chooser.sample(talking, min(len(talking), 24)):
            if flow.protocol == UDP:
                frames += [self.outgoing(flow, reply) for reply in (False, True, False)]
                if chooser.random() < 0.05:
                    del self.flows[flow.number], flow
                continue
            if flow.seen == [1, 0]:
                frames += [self.outgoing(flow, True, SYN | ACK), self.outgoing(flow)]
            elif chooser.random() < 0.3:
                frames += [self.outgoing(flow, False, FIN | ACK), self.outgoing(flow, True, FIN | ACK)]
                flow.snat = None
            else:
                frames += [self.outgoing(flow), self.outgoing(flow, True), self.outgoing(flow)]
        for _ in range(max(2, 16 - len(talking) // 4)):
            frames.append(self.outgoing(self.open_flow(TCP), flags=SYN))
            frames.append(self.outgoing(self.open_flow(UDP)))
        frames += [self.outgoing(self.open_flow(TCP, crowded=True), flags=SYN) for _ in range(3)]
        return frames

    def send(self, frames: list[tuple[str, bytes]]) -> None:
        for room, frame in frames:
            self.sockets[room].send(frame)

    def receive(self) -> int:
        """Take what has come, hold it against what must come. -> packets"""
        n = 0
        for room in ("server", "client"):
            while True:
                try:
                    frame = self.sockets[room].recv(4096)
                except BlockingIOError:
                    break
                n += self._check(frame, room == "client")
        self.delivered += n
        return n

    def _check(self, frame: bytes, reply: bool) -> int:
        try:
            packet = parse(frame)
        except ValueError as e:
            self.fault(str(e))
            return 1
        if packet is None:
            return 0
        at = packet.payload.index(MAGIC) if MAGIC in packet.payload else -1
        if at:
            self.fault("wrong header length")
            return 1
        number, count, back = struct.unpack_from("!II?", packet.payload, len(MAGIC))
        flow = self.known.get(number)
        if flow is None or back != reply or packet.payload != payload(number, count, reply):
            self.fault("wrong content", f"flow {number} packet {count} reply {back}")
            return 1
        if packet.ttl != 63:
            self.fault("wrong TTL", str(packet.ttl))
        port = UDP_PORT if flow.protocol == UDP else TCP_PORT
        if reply and (packet.source != (VIP, port) or packet.destination != (CLIENT, flow.port)):
            self.fault("wrong addresses", f"reply {packet.source} -> {packet.destination}")
        if not reply:
            if packet.destination != (BACKEND, BACKEND_PORT) or not packet.source[0].startswith("198.51.100."):
                self.fault("wrong addresses", f"{packet.source} -> {packet.destination}")
            if flow.seen[0] == 0 and flow.number in self.flows and not flow.crowded:
                flow.snat = packet.source
            first = self.places.setdefault(number, packet.source)
            if first != packet.source:
                self.fault("another SNAT port", f"flow {number}: {first}, then {packet.source}")
        expected = flow.seen[reply]
        if count < expected:
            self.fault("twice or out of order", f"flow {number} reply {reply}: {count}, expected {expected}")
            return 1
        if count > expected and not (count == expected + 1 and self._blamed()):
            self.fault("gap", f"flow {number} reply {reply}: {count}, expected {expected}")
        flow.seen[reply] = count + 1
        return 1

    def _blamed(self) -> bool:
        """Two deaths in the rewriting of one packet are taken for its fault: was it dropped for that?"""
        if self.blamed == self.counters()["drop_poison"]:
            return False
        self.blamed += 1
        return True

    def _refused(self, flow: Flow) -> bool:
        """Rubbish that reads as established flows keeps their room (docs/limits.md): was this opener refused for that?"""
        if not self.flows_may_be_rubbish or any(flow.seen) or self.refused == self.counters()["drop_shard_full"]:
            return False
        self.refused += 1
        return True

    def settle(self, limit_seconds: float, second: tuple[str, int] | None = None) -> None:
        """Until all that was sent has come, adopting whenever the process dies. What does not come is lost."""
        begun = last = time.monotonic()
        ordered = None
        while time.monotonic() - last < limit_seconds:
            assert self._connection
            select.select([*self.sockets.values(), self._connection], [], [], 0.002)
            if self.died():
                if second:
                    ordered, second = second, None
                    self.order_death(*ordered)
                elif ordered and not self.engine.view.die_at:
                    self.hits[ordered[0]] += 1
                    ordered = None
                self.adopt()
                last = time.monotonic()
            if self.receive():
                last = time.monotonic()
                if self._died > begun:
                    self.adoptions.append(last - self._died)
                    begun = last
            if all(f.sent == f.seen for f in self.known.values()):
                break
        else:
            for flow in self.known.values():
                missing = sum(flow.sent) - sum(flow.seen)
                if missing > 0 and not (missing == 1 and (self._blamed() or self._refused(flow))):
                    self.fault("lost", f"{missing} of flow {flow.number}, {flow.sent} sent, {flow.seen} seen")
                if missing > 0:
                    self.flows.pop(flow.number, None)
        for flow in list(self.flows.values()):
            # Half-open flows may be evicted; only those that will be answered at once are used again.
            if flow.snat is None:
                del self.flows[flow.number]
        self.known = dict(self.flows)
        self.places = {n: p for n, p in self.places.items() if n in self.flows}

    def cycle(self, point: str | None, passes: int = 1, second: tuple[str, int] | None = None) -> None:
        """One burst, one death in it (or after it, if the point is not passed), all packets accounted for."""
        before = self.deaths
        self.known = dict(self.flows)
        frames = self.burst()
        self.known |= self.flows
        if point:
            self.order_death(point, passes)
        self.send(frames)
        self.settle(0.5, second)
        if self.deaths == before and point and point.startswith(("RECYCLE", "FENCE", "MARKER", "HANDED")):
            self.died_of_itself(0.05)
        if self.deaths == before:
            self.engine.view.die_at = 0
            self.kill()
            self.adopt()
        elif point:
            self.hits[point] += 1

    def died_of_itself(self, wait_seconds: float) -> None:
        """Points that time or handovers reach, not the burst."""
        if self.died(wait_seconds):
            self.adopt()

    def deaths_at(self, points: list[str], number: int) -> None:
        """So many deaths at these points, each as often as the others, some of them twice in a row."""
        chooser, until = self.random, self.deaths + number
        to_come: list[str] = []
        for i in range(1, number + 1):
            if self.deaths >= until:
                break
            # Some points are passed at each packet, some once in a batch.
            passes = 1 + chooser.randrange(20 if i % 2 else 2)
            second = None
            if chooser.random() < 0.3:
                second = chooser.choice(ADOPTING if chooser.random() < 0.7 else points), 1 + chooser.randrange(3)
            to_come = to_come or chooser.sample(points, len(points))
            self.cycle(to_come.pop(), passes, second)
            if i % 250 == 0:
                self.sweep()
                self.at_rest()

    def sweep(self) -> None:
        """Let a sweep go round, and die in it once: old flows end."""
        self.order_death(self.random.choice([p for p in SERVING if p.startswith(("REMOVE", "SWEPT"))]), 1)
        self.died_of_itself(1.2)
        self.engine.view.die_at = 0
        assert not self.died(1.2)
        self.flows.clear()

    # ---- at rest

    def census(self) -> tuple[int, int, int]:
        out = ffi.new("struct ps_census *")
        call(lib().ps_queues_census, self.engine.view, self.engine.fds, out)
        return out.missing, out.twice, out.bad

    def counted(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(flows that live, by backend and by listener, and those that are proven, as counted), (as they are)."""
        arena, room = self.memory.arena, ffi.new("struct ps_flow[]", 64)
        flags = [
            room[i].flags for b in range(BUCKETS) for i in range(lib().ps_arena_flows(arena, b, room, len(room)))
        ]  # fmt: skip
        proven, live = sum(bool(f & constant("PS_FLOW_PROVEN")) for f in flags), self.stack.live()
        listeners = [arena.listener_count[i] for i in range(constant("PS_MAX_NUMBERS"))]
        backends = sum(arena.backend_count[i].live for i in range(arena.backends))
        counted = backends, sum(entry.live for entry in listeners), sum(entry.proven for entry in listeners)
        return counted, (live, live, proven)

    def at_rest(self, limit_seconds: float = 5, counters: bool = True) -> None:
        """Frames, shards and backends' counters of flows, when nothing moves."""
        deadline = time.monotonic() + limit_seconds
        with self.nothing_moving():
            while any(self.census()) and time.monotonic() < deadline:
                time.sleep(0.001)
            if any(self.census()):
                self.fault("frames", f"missing, twice, bad: {self.census()}")
            error = ffi.new("struct ps_error *")
            while True:
                wrong = [b for b in range(BUCKETS) if lib().ps_arena_check(self.memory.arena, b, error)]
                counted, expected = self.counted()
                if not wrong and (not counters or counted == expected):
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        if wrong:
            self.fault("shard", f"{len(wrong)} shards: {ffi.string(error.text).decode()}")
        else:
            self.fault("counters", f"{counted} instead of {expected}")


@contextlib.contextmanager
def keeper(prefix: str, seed: int) -> Iterator[Keeper]:
    """An engine in a lab of its own."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with Lab(prefix) as lab, Keeper(lab, seed) as made:
        yield made
