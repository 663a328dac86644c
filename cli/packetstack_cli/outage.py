"""How long nobody is served after something was done to an engine, as a client of that engine sees it."""

import os
import random
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from packetstack_cli.client import Client
from packetstack_cli.lab import Lab, LabError, inside
from packetstack_core.verbs import Explain

EVERY_SECONDS = 0.001
GIVE_UP_SECONDS = 20.0
TRIES = 200

# struct datagram of cli/traffic/protocol.h: magic, kind, run, flow, -, sequence, sent_ns, then the server's part.
_DATAGRAM = struct.Struct("=IIQIIQQQII")
_MAGIC = 0x50536464
_DATA = 1


def hang(pid: int, limit_seconds: float = 5.0) -> None:
    """Stop a process, and return when it has: on a busy machine its threads go on for some time after the signal."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + limit_seconds
    with suppress(OSError):  # killed meanwhile
        while any(p.read_text().rpartition(")")[2].split()[0] != "T" for p in Path(f"/proc/{pid}/task").glob("*/stat")):
            if time.monotonic() > deadline:
                raise LabError(f"process {pid}: has not stopped for {limit_seconds:g} s")
            time.sleep(0.001)


class Outage:
    """UDP flows from the lab's client, each known by the engine that owns its bucket. A context manager."""

    def __init__(self, lab: Lab, client: Client, stack: str, target: tuple[str, int]) -> None:
        self._lab, self._client, self._stack, self._target = lab, client, stack, target
        self._run = random.getrandbits(63)
        self._sockets: list[socket.socket] = []
        self._sequence = 0

    def __enter__(self) -> "Outage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the flows' sockets."""
        for used in self._sockets:
            used.close()

    def after(self, slot: int, strike: Callable[[], object]) -> float:
        """Milliseconds from `strike()` to the answer of the first datagram that was sent after it and answered.

        A datagram is sent every millisecond, on a flow of a bucket that engine `slot` owns. LabError if none is
        answered in 20 s.
        """
        flow = self._flow_of(slot)
        self._send(flow)
        if not select.select([flow], [], [], 2.0)[0]:
            raise LabError(f"engine {slot}: does not serve before anything was done to it")
        self._drain(flow)
        last = self._sequence
        began = time.monotonic()
        strike()
        while time.monotonic() - began < GIVE_UP_SECONDS:
            self._send(flow)
            if select.select([flow], [], [], EVERY_SECONDS)[0] and self._drain(flow) > last:
                return (time.monotonic() - began) * 1000
        raise LabError(f"engine {slot}: served nobody for {GIVE_UP_SECONDS:g} s")

    def _flow_of(self, slot: int) -> socket.socket:
        for _ in range(TRIES):
            with inside(self._lab.namespace("client")):
                made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.setblocking(False)
            made.connect(self._target)
            source, sport = made.getsockname()
            flow = Explain(
                name=self._stack, protocol="udp", source=source, sport=sport,
                destination=self._target[0], dport=self._target[1],
            )  # fmt: skip
            found = self._client.explain(flow)
            if found["owner"]["slot"] == slot:
                self._sockets.append(made)
                return made
            made.close()
        raise LabError(f"engine {slot}: owns none of the buckets of {TRIES} flows")

    def _send(self, flow: socket.socket) -> None:
        self._sequence += 1
        message = _DATAGRAM.pack(_MAGIC, _DATA, self._run, len(self._sockets), 0, self._sequence, 0, 0, 0, 0)
        try:
            flow.send(message)
        except OSError:
            return  # an earlier ICMP error, told now

    def _drain(self, flow: socket.socket) -> int:
        """The highest sequence number that has come."""
        highest = 0
        while True:
            try:
                highest = max(highest, _DATAGRAM.unpack(flow.recv(_DATAGRAM.size))[5])
            except BlockingIOError:
                return highest
            except OSError:
                continue
