"""Connections to the unix socket: who may have one, and what a command of an earlier build is told."""

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

EARLIER = {
    "error": "this packetstack command is of an earlier build than the agent and speaks another protocol; "
    "use the one that is installed with the agent"
}


def bound(path: Path) -> socket.socket:
    """A socket at this path, not listening yet, for root and the agent's own user alone."""
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.bind(str(path))
        path.chmod(0o600)
    except OSError:
        made.close()
        raise
    return made


def admitted(connection: socket.socket) -> bool:
    """Whether root or the agent's own user is at the other end."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.geteuid())


class Newcomer(asyncio.Protocol):
    """A connection that has said nothing yet. Its first byte tells HTTP from one JSON object a line, as it was before."""

    def __init__(self, http: Callable[[], asyncio.Protocol]) -> None:
        self._http = http
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Others than root and the agent's own user are hung up on."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not admitted(transport.get_extra_info("socket")):
            transport.close()

    def data_received(self, data: bytes) -> None:
        """The first bytes; all later ones go to the protocol that is chosen here."""
        if self._transport.is_closing():
            return
        if data.startswith(b"{"):
            self._transport.write(json.dumps(EARLIER).encode() + b"\n")
            self._transport.close()
            return
        protocol = self._http()
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(data)
