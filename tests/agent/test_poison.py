"""A packet that ends every datapath process that handles it: dropped after two tries, counted, captured, told."""

import socket
import sys
from pathlib import Path

import pytest
from tests.lab.node import VIP, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_cli.lab import inside

INJECTED = Path(__file__).parents[2] / "build/meson/engine/packetstack-datapath-inject"

# The agent as it is, with datapaths that die of a certain payload.
AGENT = f"""
from packetstack_core import abi
installed = abi.native
abi.native = lambda name: abi.Path({str(INJECTED)!r}) if name == "packetstack-datapath" else installed(name)
from packetstack_agent.main import main
main()
"""


@pytest.mark.skipif(not INJECTED.exists(), reason="packetstack-datapath-inject is not built; run make build")
def test_a_packet_that_ends_every_datapath_is_dropped_and_told_of(node: Node) -> None:
    echo = listener("echo", VIP, ("10.71.5.1",), port=53) | {"protocol": "UDP"}
    node.lab.start("node", sys.executable, "-c", AGENT, "--run-dir", str(node.lab.run_directory))
    eventually(node.client.alive)
    node.up(stack(listeners=[*stack()["spec"]["listeners"], echo]))
    with node.connect() as connection:
        first = ask(connection)
        with inside(node.lab.namespace("client")):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            sender.sendto(b"poison!!" + bytes(40), (VIP, 53))
        event = eventually(
            lambda: next((e for e in node.client.call("events", name="web") if e["reason"] == "PacketDropped"), None)
        )
        assert "ended the datapath twice" in event["message"]
        assert ask(connection) == first
        node.wait_ready()
        status = node.status()
        assert status["drops"]["engine"]["poison"] == 1
        captures = [c for e in status["engines"] for c in e["captures"]]
        assert len(captures) == 1
        assert b"poison!!".hex() in captures[0]["bytes"]
        assert ask(connection) == first
    node.packetstack("down", "--yes")
