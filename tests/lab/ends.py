"""What begins and what ends on a wire, of TCP: cheap enough to be read at thousands of connections a second."""

from __future__ import annotations

import socket
import struct
from collections import defaultdict

from tests.lab.listening import all_kept, listen

from packetstack_cli.lab import Lab, Room

FIN, SYN, RST, ACK = 1, 2, 4, 16

# Of TCP without extension headers: SYN, FIN, RST. The first byte offsets are those of Ethernet's type and IP's protocol.
_FILTER = (
    (0x28, 0, 0, 12), (0x15, 0, 4, 0x0800), (0x30, 0, 0, 23), (0x15, 0, 8, 6), (0x30, 0, 0, 47), (0x05, 0, 0, 4),
    (0x15, 0, 5, 0x86DD), (0x30, 0, 0, 20), (0x15, 0, 3, 6), (0x30, 0, 0, 67), (0x45, 0, 1, 7), (0x06, 0, 0, 96),
    (0x06, 0, 0, 0),
)  # fmt: skip

Pair = tuple[bytes, int, bytes, int]
"""Address and port of who opens a connection, then of who is asked."""


class Ends:
    """Follows the connections that pass a device of the lab; `look` reads what has passed."""

    def __init__(self, lab: Lab, room: Room, device: str) -> None:
        self._socket = listen(lab, room, device, _FILTER)
        self._open: dict[Pair, tuple[int, set[bool]]] = {}
        """Number of the SYN, and which sides have closed."""
        self._answers: defaultdict[tuple[Pair, int], set[int]] = defaultdict(set)
        self.began, self.reset = 0, 0
        """Connections, and packets that ended one by force."""
        self.answers = 0
        """SYN-ACKs, repeated ones included."""
        self.used_twice: list[str] = []
        """Connections that began between two ends that had one already."""
        self.answered_twice: list[str] = []
        """Openers to which SYN-ACKs with two numbers came."""

    def look(self) -> None:
        """Reads what has passed since the last look. AssertionError if the kernel could not keep all."""
        while True:
            try:
                frame = self._socket.recv(96)
            except BlockingIOError:
                break
            self._take(frame)
        self._answers.clear()
        all_kept(self._socket)

    def close(self) -> None:
        """The end of it."""
        self._socket.close()

    def _take(self, frame: bytes) -> None:
        addresses, l4 = (frame[26:34], 34) if frame[12:14] == b"\x08\x00" else (frame[22:54], 54)
        half = len(addresses) // 2
        sport, dport, number, acked, _, flags = struct.unpack("!HHIIBB", frame[l4 : l4 + 14])
        pair = (addresses[:half], sport, addresses[half:], dport)
        back = (pair[2], dport, pair[0], sport)
        if flags & (SYN | ACK) == SYN:
            self._begin(pair, number)
        elif flags & SYN:
            self.answers += 1
            numbers = self._answers[back, acked]
            numbers.add(number)
            if len(numbers) == 2:
                self.answered_twice.append(shown(back))
        elif flags & RST:
            self.reset += 1
            self._open.pop(pair, None)
            self._open.pop(back, None)
        else:
            self._closed(pair, 0)
            self._closed(back, 1)

    def _begin(self, pair: Pair, number: int) -> None:
        known = self._open.get(pair)
        if known is not None and known[0] == number:
            return  # it came again
        if known is not None:
            self.used_twice.append(shown(pair))
        self.began += 1
        self._open[pair] = (number, set())

    def _closed(self, pair: Pair, side: int) -> None:
        known = self._open.get(pair)
        if known is not None:
            known[1].add(bool(side))
            if len(known[1]) == 2:
                del self._open[pair]


def shown(pair: Pair) -> str:
    """For people."""
    one, other = (socket.inet_ntop(socket.AF_INET if len(a) == 4 else socket.AF_INET6, a) for a in (pair[0], pair[2]))
    return f"{one} port {pair[1]} to {other} port {pair[3]}"
