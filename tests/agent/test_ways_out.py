"""Where an engine's packets go: neighbours that change, next hops of every kind."""

import contextlib
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.agent.test_guards import checked, mac, up
from tests.director.frames import UDP, ip, transport
from tests.lab.node import VIP, VIP6, Node, stack
from tests.waiting import eventually

from packetstack_cli.lab import NODE_UPLINK, Room, inside

BACKEND, BACKEND6 = "10.71.5.1", "fd71:5::1"
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def definition() -> dict[str, Any]:
    """A stack that asks nobody for his health: only what its flows send goes to a neighbour."""

    def listener(address: str, backend: str) -> dict[str, Any]:
        return {
            "name": "v6" if ":" in address else "v4", "address": address, "protocol": "UDP", "port": 53,
            "healthCheck": {"type": "None"}, "backends": {"endpoints": [{"address": backend, "port": 5399}]},
        }  # fmt: skip

    return stack(replicas=1, listeners=[listener(VIP, BACKEND), listener(VIP6, BACKEND6)])


@pytest.fixture(autouse=True)
def end(node: Node) -> Iterator[None]:
    """No stack afterwards."""
    yield
    node.command("down", "--all", "--yes")


@dataclass
class Talk:
    """A client that asks a listener, and the backend behind it."""

    client: socket.socket
    backend: socket.socket

    def asks(self, size: int = 10, patience_seconds: float = 0.3) -> bool:
        """Whether a question of this size comes to the backend, and an answer of three bytes back."""
        return self._goes(size, patience_seconds) is not None and self.hears(3, patience_seconds)

    def hears(self, size: int, patience_seconds: float = 0.3) -> bool:
        """Whether an answer of this size to a small question comes to the client."""
        peer = self._goes(1, patience_seconds)
        if peer is None:
            return False
        with contextlib.suppress(OSError):  # told of the one before
            self.backend.sendto(bytes(size), peer)
        self.client.settimeout(patience_seconds)
        try:
            while len(self.client.recv(65536)) != size:
                pass
        except OSError:
            return False
        return True

    def _goes(self, size: int, patience_seconds: float) -> Any:
        with contextlib.suppress(OSError):
            self.client.send(bytes(size))
        self.backend.settimeout(patience_seconds)
        try:
            while True:
                data, peer = self.backend.recvfrom(65536)
                if len(data) == size:
                    return peer
        except TimeoutError:
            return None


@contextlib.contextmanager
def talk(node: Node, family: int) -> Iterator[Talk]:
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with inside(node.lab.namespace("server")):
        backend = socket.socket(kind, socket.SOCK_DGRAM)
        backend.bind((BACKEND if family == 4 else BACKEND6, 5399))
    with inside(node.lab.namespace("client")):
        client = socket.socket(kind, socket.SOCK_DGRAM)
        client.connect((VIP if family == 4 else VIP6, 53))
    with client, backend:
        yield Talk(client, backend)


@FAMILIES
@pytest.mark.parametrize("side", ["client", "backend"])
def test_a_neighbour_whose_mac_changed_without_a_word_is_found_anew(node: Node, side: str, family: int) -> None:
    room: Room = "client" if side == "client" else "server"
    device, port = ("c0", NODE_UPLINK) if side == "client" else ("s0", "dn0")
    net = {"client": 1, "backend": 2}[side]
    hop, own = (f"10.71.{net}.2", f"10.71.{net}.1") if family == 4 else (f"fd71:{net}::2", f"fd71:{net}::1")
    kind = f"net.ipv{family}.neigh.{port}"
    node.lab.sysctl("node", {f"{kind}.delay_first_probe_time": "1", f"{kind}.retrans_time_ms": "100"})
    up(node, definition())
    was, router = mac(node, room, device).hex(":"), mac(node, "node", port).hex(":")
    with talk(node, family) as both:
        assert both.asks()
        try:
            node.lab.run(room, "ip", "link", "set", device, "address", "02:00:00:00:00:51")
            # Who does not ask for the node's MAC does not tell its own.
            node.lab.run(room, "ip", "neigh", "replace", own, "dev", device, "lladdr", router, "nud", "permanent")
            node.lab.run("node", "ip", "neigh", "replace", hop, "dev", port, "lladdr", was, "nud", "stale")
            assert not both.asks()
            eventually(both.asks, 8)
        finally:
            node.lab.run(room, "ip", "neigh", "flush", "all", "nud", "permanent")
            node.lab.run(room, "ip", "link", "set", device, "address", was)
            node.lab.run("node", "ip", "neigh", "flush", "dev", port)


def test_a_backend_behind_a_gateway_of_the_other_family_is_served(node: Node) -> None:
    up(node, definition())
    route = ["ip", "route", "replace", "10.71.5.0/24", "via"]
    node.lab.run("node", *route, "inet6", "fd71:2::2", "dev", "dn0")
    try:
        with talk(node, 4) as both:
            assert all(both.asks() for _ in range(5))
    finally:
        node.lab.run("node", *route, "10.71.2.2")


def heard(tun: int, end: bytes) -> None:
    """Read packets until one ends so."""
    while select.select([tun], [], [], 5)[0]:
        if os.read(tun, 2000).endswith(end):
            return
    raise AssertionError(f"no packet that ends with {end!r}")


@FAMILIES
def test_a_client_behind_a_device_without_macs_is_served(node: Node, family: int) -> None:
    up(node, definition())
    with inside(node.lab.namespace("node")):
        tun = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tun7", 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
    client, address = ("10.71.8.2", VIP) if family == 4 else ("fd71:8::2", VIP6)
    try:
        node.lab.run("node", "ip", "link", "set", "tun7", "up")
        node.lab.run("node", "ip", "route", "add", client, "dev", "tun7")
        with talk(node, family) as both:
            both.backend.settimeout(3)
            for n in range(5):
                question = transport(UDP, 999, 53, bytes([n]))
                if family == 6:
                    question = checked(client, address, 999, 53, bytes([n]))
                os.write(tun, ip(client, address, UDP, question))
                data, peer = both.backend.recvfrom(100)
                both.backend.sendto(data + b" is right", peer)
                heard(tun, bytes([n]) + b" is right")
    finally:
        os.close(tun)
