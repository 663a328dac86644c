"""The engine's own packet handler (engine/datapath/nat.h), as tests/c/engine_lib.c offers it, with Python's manners."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import cffi

from packetstack_core import abi

from .endpoint import SYN, Flag, Segment

LIBRARY = Path(__file__).parents[2] / "build/meson/tests/libpacketstack-engine-test.so"
SOURCE = Path(__file__).parents[1] / "c/engine_lib.c"
ENTRIES = 16
"""Flows that a bucket has room for."""
TICKS = 10
"""Of a second."""
TCP, UDP = 6, 17


def declarations() -> str:
    """What the library declares at the head of its source, for the outside."""
    text = SOURCE.read_text()
    flow = re.search(r"^struct engine_flow \{.*?^\};$", text, re.DOTALL | re.MULTILINE)
    functions = re.findall(r"^(?!static)[a-z].*\);$", text, re.MULTILINE)
    assert flow, f"{SOURCE}: declares no struct engine_flow"
    return "\n".join(("struct engine;", flow[0], *functions))


ffi = cffi.FFI()
ffi.cdef(declarations())


@cache
def library() -> Any:
    """The built library."""
    assert LIBRARY.exists(), f"{LIBRARY}: not built; run `make build`"
    return ffi.dlopen(str(LIBRARY))


@cache
def flow_states() -> dict[int, str]:
    """Names of enum ps_flow_state, as "ESTABLISHED"."""
    return {number: name.removeprefix("PS_FLOW_") for number, name in abi.enum_names("ps_flow_state").items()}


Place = tuple[IPv4Address, int]
"""Address and port."""


@cache
def _place(address: int, port: int) -> Place:
    return IPv4Address(address), port


VIP: Place = IPv4Address("192.0.2.10"), 80
OTHER_PORT = 81
SNATS = IPv4Address("192.0.2.64"), IPv4Address("192.0.2.65")
BACKENDS = tuple(IPv4Address("10.2.0.0") + i for i in range(3))
BACKEND_PORT = 8080


@dataclass(frozen=True)
class Flow:
    """A flow as the engine has it. `idle` is in seconds."""

    state: str
    client: Place
    vip: Place
    snat: Place
    backend: Place
    bucket: int
    idle: float


class Engine:
    """One engine with one VIP, in memory. Time stands still until `advance`."""

    def __init__(self, entries: int = ENTRIES) -> None:
        self._lib = library()
        self._engine = ffi.gc(self._lib.engine_new(entries, 2 * entries), self._lib.engine_free)
        self._entries = entries
        self._buffer = ffi.new("uint8_t[2048]")
        self._flows = ffi.new("struct engine_flow[64]")

    def handle(self, frame: bytes) -> bytes | None:
        """What is sent on for this frame, or None when it is dropped."""
        self._buffer[0 : len(frame)] = frame
        verdict = self._lib.engine_handle(self._engine, self._buffer, len(frame))
        assert verdict in (0, 1), f"verdict {verdict}"
        return bytes(ffi.buffer(self._buffer, len(frame))) if verdict == 1 else None

    def advance(self, seconds: float) -> None:
        """Time passes, and expired flows end."""
        self._lib.engine_advance(self._engine, round(seconds * TICKS))

    def flows(self) -> list[Flow]:
        """All flows there are (64 at the most)."""
        n = self._lib.engine_flows(self._engine, self._flows, 64)
        return [
            Flow(
                flow_states()[f.state],
                _place(f.client, f.client_port),
                _place(f.vip, f.vip_port),
                _place(f.snat, f.snat_port),
                _place(f.backend, f.backend_port),
                f.bucket,
                f.idle / TICKS,
            )
            for f in self._flows[0:n]
        ]

    def flow(self, client: Place, vip: Place = VIP) -> Flow | None:
        """The flow of a client's tuple."""
        return next((f for f in self.flows() if f.client == client and f.vip == vip), None)

    def unsound(self) -> str:
        """What is wrong with shards or counters; empty when nothing is."""
        wrong = self._lib.engine_unsound(self._engine)
        return "" if wrong == ffi.NULL else ffi.string(wrong).decode()

    def bucket(self, client: Place, port: int = VIP[1]) -> int:
        """The bucket of a client's tuple."""
        return int(self._lib.engine_bucket(self._engine, int(client[0]), client[1], port))

    def timeout(self, state: str) -> float:
        """Idle limit of a state in seconds."""
        number = next(n for n, name in flow_states().items() if name == state)
        return float(self._lib.engine_timeout(self._engine, number) / TICKS)

    def flood(self, bucket: int, times: int = 3) -> None:
        """Openers for every listener from sources that nobody has, several times what a bucket holds."""
        for port, protocol in ((VIP[1], TCP), (OTHER_PORT, TCP), (VIP[1], UDP)):
            self._lib.engine_flood(self._engine, bucket, port, protocol, times * self._entries)

    def crowd(self, bucket: int) -> None:
        """Connections of other clients, more than the bucket holds."""
        for port in (VIP[1], OTHER_PORT):
            self._lib.engine_crowd(self._engine, bucket, port, self._entries)

    def survives_flood(self, flow: Flow) -> bool:
        """Would this flow be there after a flood of its bucket, and in a crowd? Nothing is changed."""

        def flood() -> None:
            self.flood(flow.bucket)
            self.crowd(flow.bucket)
            self.flood(flow.bucket)

        return self._try(flow, flood)

    def survives_seconds(self, flow: Flow, seconds: float) -> bool:
        """Would this flow be there if nothing came for so long? Nothing is changed."""
        return self._try(flow, lambda: self.advance(seconds))

    def _try(self, flow: Flow, what: Any) -> bool:
        self._lib.engine_keep(self._engine)
        what()
        after = self.flow(flow.client, flow.vip)
        self._lib.engine_restore(self._engine)
        return after is not None and (after.snat, after.backend) == (flow.snat, flow.backend)


# ---- frames -----------------------------------------------------------------------------------------------


def _sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])) + (
        data[-1] << 8 if len(data) & 1 else 0
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _tcp_sum(ip: bytes, tcp: bytes) -> int:
    return _sum(ip[12:20] + struct.pack("!HH", TCP, len(tcp)) + tcp)


def build(source: Place, destination: Place, segment: Segment, right: bool = True) -> bytes:
    """An Ethernet frame with this segment. With `right` false its TCP checksum is wrong."""
    options = b""
    if segment.flags & SYN:
        options = struct.pack("!BBH", 2, 4, 1000)
        if segment.scale is not None:
            options += struct.pack("BBBB", 1, 3, 3, segment.scale)
    head = struct.pack(
        "!HHIIBBHHH",
        source[1],
        destination[1],
        segment.sequence,
        segment.acknowledgement,
        (20 + len(options)) // 4 << 4,
        int(segment.flags),
        segment.window,
        0,
        0,
    )
    tcp = bytearray(head + options + segment.payload)
    ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, TCP, 0))
    ip += source[0].packed + destination[0].packed
    ip[10:12] = struct.pack("!H", ~_sum(bytes(ip)) & 0xFFFF)
    check = ~_tcp_sum(bytes(ip), bytes(tcp)) & 0xFFFF
    tcp[16:18] = struct.pack("!H", check if right else check ^ 0x5555)
    return bytes.fromhex("020000000002 020000000001 0800") + ip + tcp


def parse(frame: bytes) -> tuple[Place, Place, Segment, bool]:
    """Source, destination, segment, and whether its checksum is right. The IPv4 header must be."""
    ip = frame[14:34]
    assert _sum(ip) == 0xFFFF, "IPv4 header checksum"
    tcp = frame[34 : 14 + int.from_bytes(ip[2:4], "big")]
    sport, dport, sequence, acknowledgement, size, flags, window = struct.unpack("!HHIIBBH", tcp[:16])
    header, scale, at = (size >> 4) * 4, None, 20
    while at < header and tcp[at]:
        if tcp[at] == 3:
            scale = tcp[at + 2]
        at += 1 if tcp[at] == 1 else tcp[at + 1]
    return (
        (IPv4Address(ip[12:16]), sport),
        (IPv4Address(ip[16:20]), dport),
        Segment(sequence, acknowledgement, Flag(flags), window, tcp[header:], scale),
        _tcp_sum(ip, tcp) == 0xFFFF,
    )
