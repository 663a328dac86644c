"""Packets that are too long for a part of their way, both ways through an engine."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
from tests.agent.test_guards import counted, up
from tests.agent.test_ways_out import definition, talk
from tests.lab.node import Node
from tests.waiting import eventually

from packetstack_agent import networks
from packetstack_cli.lab import NODE_UPLINK, Room, inside


@pytest.fixture
def devices(node: Node) -> Iterator[Callable[..., None]]:
    """Sets MTUs of the lab's devices; as they were afterwards."""
    were: list[tuple[Room, str]] = []

    def set_mtu(mtu: int, *changed: tuple[Room, str]) -> None:
        for room, device in changed:
            node.lab.run(room, "ip", "link", "set", device, "mtu", str(mtu))
            were.append((room, device))

    yield set_mtu
    node.command("down", "--all", "--yes")
    set_mtu(1500, *were)
    for room in ("client", "server"):
        for version in ("-4", "-6"):
            node.lab.run(room, "ip", version, "route", "flush", "cache")  # what it was told of sizes


@dataclass(frozen=True)
class Path:
    """MTUs on the way, and a datagram too big for one of them."""

    mtu: int
    devices: tuple[tuple[Room, str], ...]
    uplinks: tuple[str, ...]
    says: str
    size: int
    counter: str = ""
    where: str = "host"


UP: tuple[tuple[Room, str], ...] = (("client", "c0"), ("node", NODE_UPLINK))
DOWN: tuple[tuple[Room, str], ...] = (("node", "dn0"), ("server", "s0"))
PATHS = {
    "long frames on an uplink for clients": Path(3000, UP, (NODE_UPLINK,), "client", 2800, "passed_too_long", "director"),
    "long frames on an uplink for backends": Path(3000, DOWN, ("dn0",), "backend", 2800, "passed_too_long", "director"),
    "frames one byte too long on an uplink": Path(1519, UP, (NODE_UPLINK,), "client", 1477),
    "frames that an engine just takes": Path(1519, UP, (NODE_UPLINK,), "client", 1476),
    "long frames on the pair from clients": Path(9000, UP, (), "client", 8000),
    "long frames on the pair from backends": Path(9000, DOWN, (NODE_UPLINK,), "backend", 8000),
    "less room at the backends": Path(1400, (("node", "dn0"),), (NODE_UPLINK,), "client", 1440, "to_kernel"),
    "less room at the clients": Path(1400, (("node", NODE_UPLINK),), ("dn0",), "backend", 1440, "to_kernel"),
    "less room at the clients, on the pair": Path(1400, (("node", NODE_UPLINK),), (), "backend", 1440, "to_kernel"),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_whoever_sends_too_big_a_packet_is_told_and_then_served(
    node: Node, devices: Callable[..., None], path: Path
) -> None:
    devices(path.mtu, *path.devices)
    up(node, definition(), *path.uplinks)
    for family in (4, 6):
        before = counted(node, path.counter, path.where) if path.counter else 0
        with talk(node, family) as both:
            assert both.asks()
            speak = both.asks if path.says == "client" else both.hears
            eventually(partial(speak, path.size), 3, f"a datagram of {path.size} bytes, IPv{family}")
        assert not path.counter or counted(node, path.counter, path.where) > before


def test_an_interface_that_a_plugin_made_for_shorter_packets_takes_those_of_the_routed_pair(node: Node) -> None:
    def mtu(room: Room, device: str) -> int:
        [link] = json.loads(node.lab.run(room, "ip", "-j", "link", "show", device).stdout)
        return int(link["mtu"])

    pair = f"ip link add cni7 mtu 1400 type veth peer name pod7 mtu 1400 netns {node.lab.namespace('server')}"
    node.lab.run("node", *pair.split())
    try:
        with inside(node.lab.namespace("node")):
            networks.find_engine_link(node.lab.netns_path("server"), "pod7")
        with inside(node.lab.namespace("server")):
            networks.set_up_engine_end("pod7")
        assert (mtu("node", "cni7"), mtu("server", "pod7")) == (1500, 1500)
    finally:
        node.lab.run("node", "ip", "link", "del", "cni7")
