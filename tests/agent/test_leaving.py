"""SNAT addresses are taken out of a resource while flows have them."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from tests.lab.node import BACKENDS, Node, ask, listener, stack
from tests.waiting import eventually

ROUTED, NEAR, FRESH = "198.51.100.0", "10.71.2.100", "198.51.100.6"
"""NEAR lies in the network that the node shares with the server, which asks for it by ARP."""


def web(*snat: str, **more: Any) -> dict[str, Any]:
    addresses = {"addresses": [f"{a}/32" for a in snat]}
    return stack(replicas=1, listeners=[listener("web", "192.0.2.10", BACKENDS)], snat=addresses, **more)


@pytest.fixture
def held(node: Node) -> Iterator[list[socket.socket]]:
    """Connections over both addresses."""
    node.up(web(ROUTED, NEAR))
    with ExitStack() as kept:
        connections = [kept.enter_context(node.connect()) for _ in range(16)]
        for connection in connections:
            ask(connection)
        yield connections
    node.command("down", "--all", "--yes")


def leaving(node: Node) -> dict[str, int]:
    return {left["address"]: left["flows"] for left in node.status()["leaving"]}


def routes(node: Node) -> str:
    return str(node.lab.run("node", "ip", "-4", "route", "show", "dev", "ps0").stdout)


def answered_for(node: Node) -> str:
    return str(node.lab.run("node", "ip", "neigh", "show", "proxy").stdout)


def test_connections_live_on_until_they_end_when_their_snat_address_leaves(
    node: Node, held: list[socket.socket]
) -> None:
    file = node.lab.directory / "stack.yaml"
    file.write_text(json.dumps(web(FRESH)))
    said = node.command("up", str(file))
    assert said.returncode == 0
    for address in (ROUTED, NEAR):
        assert f"{address} (" in said.stderr
    assert "takes no new flows, and leaves when those end" in said.stderr
    node.lab.run("server", "ip", "neigh", "flush", "dev", "s0")
    for connection in held:
        ask(connection)
    assert set(leaving(node)) == {ROUTED, NEAR}
    assert sum(leaving(node).values()) == len(held)
    described = node.packetstack("describe", "web")
    assert f"SNAT address {ROUTED}: {leaving(node)[ROUTED]} flow" in described
    with node.connect() as fresh:
        ask(fresh)
        source = fresh.getsockname()
        found = node.client.call(
            "explain", name="web", protocol="tcp", source=source[0], sport=source[1], destination="192.0.2.10", dport=80
        )
        assert found["flow"]["snat"].startswith(FRESH)

    os.kill(node.client.agent_pid(), signal.SIGKILL)
    eventually(lambda: not node.client.alive())
    node.packetstack("up", str(file))
    node.lab.run("server", "ip", "neigh", "flush", "dev", "s0")
    for connection in held:
        ask(connection)
    assert sum(leaving(node).values()) == len(held)
    assert f"{ROUTED} " in routes(node)


def test_an_address_that_no_flow_has_goes_at_once_with_its_route_and_its_answers_to_arp(
    node: Node, held: list[socket.socket]
) -> None:
    other = "10.71.2.101"
    node.up(web(ROUTED, NEAR, FRESH, other))
    eventually(lambda: f"{FRESH} " in routes(node))
    node.up(web(ROUTED, NEAR))
    eventually(lambda: not leaving(node), 20)
    eventually(lambda: "AddressReleased" in [e["reason"] for e in node.client.call("events", name="web")])
    eventually(lambda: f"{FRESH} " not in routes(node))
    eventually(lambda: other not in answered_for(node))  # after the routes
    assert NEAR in answered_for(node)
    for connection in held:
        ask(connection)


def test_an_address_that_comes_back_serves_its_old_flows_and_new_ones(node: Node, held: list[socket.socket]) -> None:
    node.up(web(FRESH))
    node.up(web(ROUTED, NEAR))
    for connection in held:
        ask(connection)
    assert set(leaving(node)) <= {FRESH}


def test_an_address_that_flows_still_have_goes_to_no_other_stack(node: Node, held: list[socket.socket]) -> None:
    before = node.status()["configurationGeneration"]
    other = stack(
        "other", replicas=1, listeners=[listener("o", "192.0.2.11", BACKENDS)], snat={"addresses": [f"{ROUTED}/32"]}
    )
    files = []
    for document in (web(FRESH), other):
        files.append(node.lab.directory / f"{document['metadata']['name']}.yaml")
        files[-1].write_text(json.dumps(document))
    said = node.refused("up", *map(str, files))
    assert f"stack other: AddressConflict: {ROUTED} was a SNAT address of stack web" in said
    assert "wait until they end" in said
    assert node.status()["configurationGeneration"] == before
    for connection in held:
        ask(connection)
