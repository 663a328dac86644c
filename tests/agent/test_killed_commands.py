"""Commands that are killed at any moment: said again, they do what they were to do, and whoever is served stays served."""

import os
import signal
import socket
import time
from typing import Any

import pytest
from tests.lab.node import BACKENDS, BACKENDS6, VIP6, Node, ask, listener, stack
from tests.waiting import eventually


def start(node: Node, *words: str) -> Any:
    return node.lab.start("node", *node.lab.command(*words))


@pytest.mark.parametrize("milliseconds", range(0, 700, 100))
def test_a_killed_down_is_repeated_and_leaves_nothing(node: Node, milliseconds: int) -> None:
    node.command("down", "--all", "--yes")
    before = node.traces()
    node.up(stack())
    first = start(node, "down", "--all", "--yes")
    time.sleep(milliseconds / 1000)
    first.kill()
    first.wait()
    second = node.command("down", "--all", "--yes")
    assert second.returncode == 0, second
    assert node.traces() == before
    node.up(stack())
    assert node.curl() in BACKENDS


@pytest.mark.parametrize("milliseconds", range(200, 600, 100))
def test_a_killed_move_is_repeated_and_all_is_right(node: Node, milliseconds: int) -> None:
    node.up(stack(replicas=2))
    node.lab.packetstack("scale", "web", "--replicas", "2")
    with node.connect() as connection, node.connect(VIP6) as connection6:
        served = ask(connection), ask(connection6)
        slot = node.status()["engines"][-1]["slot"]
        words = ("move", "web", "--buckets", "0-199", "--engine", str(slot))
        first = start(node, *words)
        time.sleep(milliseconds / 1000)
        first.kill()
        first.wait()
        node.lab.packetstack(*words)
        assert (ask(connection), ask(connection6)) == served
        assert next(e for e in node.status()["engines"] if e["slot"] == slot)["buckets"] >= 200
    assert node.who(VIP6) == set(BACKENDS6)


@pytest.mark.parametrize("milliseconds", range(0, 900, 150))
def test_a_killed_up_is_repeated_and_all_is_right(node: Node, milliseconds: int) -> None:
    file = node.lab.directory / "stack.yaml"
    node.up(stack())
    node.lab.packetstack("down", "--yes")
    first = start(node, "up", str(file))
    time.sleep(milliseconds / 1000)
    first.kill()
    first.wait()
    node.lab.packetstack("up", str(file))
    assert node.status()["readyReplicas"] == 2
    assert node.curl() in BACKENDS
    node.lab.packetstack("down", "--yes")
    assert not node.lab.run_directory.exists()


@pytest.mark.parametrize("words", [("scale", "web", "--replicas", "3"), ("upgrade", "web-1"), ("upgrade", "--agent")])
def test_a_killed_command_is_repeated_and_all_is_right(
    node: Node, served: socket.socket, words: tuple[str, ...]
) -> None:
    for milliseconds in range(100, 500, 80):
        first = start(node, *words)
        time.sleep(milliseconds / 1000)
        first.kill()
        first.wait()
        ask(served)
    node.lab.packetstack("upgrade", "--agent")
    node.lab.packetstack(*words)
    node.wait_ready()


def test_without_an_agent_all_stacks_are_ended_or_none(node: Node) -> None:
    listeners = [listener("other", "192.0.2.11", BACKENDS)]
    node.up(stack(), stack("other", replicas=1, listeners=listeners, snat={"addresses": ["198.51.100.8/31"]}))
    os.kill(node.client.agent_pid(), signal.SIGKILL)
    eventually(lambda: not node.client.alive())
    assert "other, web may go on without one; start another with: packetstack upgrade --agent" in node.refused("get")
    assert node.refused("down", "nope", "--yes") == "stack nope: not found; stacks of this agent: other, web"
    assert "only all stacks can be ended" in node.refused("down", "web", "--yes")
    assert "there are 2 stacks" in node.refused("down", "--yes")
    assert node.curl() in BACKENDS
    assert node.command("down", "--all", "--yes").returncode == 0
    assert not node.lab.run_directory.exists()
