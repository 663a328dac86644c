"""Sockets that hear what passes a device of the lab."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence

from packetstack_cli.lab import Lab, Room, inside

Instruction = tuple[int, int, int, int]
"""Of a classic BPF program: code, jt, jf, k."""


def listen(lab: Lab, room: Room, device: str, program: Sequence[Instruction] = ()) -> socket.socket:
    """One that gets all frames from now on, or those that the program lets pass, and never waits."""
    with inside(lab.namespace(room)):
        # With protocol 0 nothing comes before the filter is there.
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    if program:
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in program))
        attached = struct.pack("HL", len(program), ctypes.addressof(code))
        made.setsockopt(socket.SOL_SOCKET, 26, attached)  # SO_ATTACH_FILTER
    made.setsockopt(socket.SOL_SOCKET, 33, 512 << 20)  # SO_RCVBUFFORCE
    made.bind((device, 0x0003))
    return made


def all_kept(listening: socket.socket) -> None:
    """AssertionError if the kernel could not keep all since the last call."""
    dropped = struct.unpack("II", listening.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
    assert dropped == 0, f"{dropped} packets were not kept"
