"""Commands that are killed at any moment: said again, they do what they were to do, and whoever is served stays served."""

import os
import signal
import socket
import sys

import pytest
from tests.lab.node import BACKENDS, BACKENDS6, VIP6, Node, ask, listener, stack
from tests.waiting import eventually

# The command as it is, killed before it asks its agent for the so-many-th time, while it waits for the so-many-th
# answer, or some milliseconds after it has begun to wait for that.
DYING = """
import os, signal, socket, sys, threading
moment, number, milliseconds = sys.argv.pop(1).split(":")
asked = answering = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def connect(self, address, connect=socket.socket.connect):
    global asked, answering
    if self.family == socket.AF_UNIX:
        asked += 1
        if moment == "before" and asked == int(number):
            die()
    connect(self, address)
    answering += self.family == socket.AF_UNIX

def waiting(name):
    real = getattr(socket.socket, name)
    def call(self, *arguments):
        if self.family == socket.AF_UNIX and moment == "waiting" and answering == int(number):
            if not int(milliseconds):
                die()
            threading.Timer(int(milliseconds) / 1000, die).start()
        return real(self, *arguments)
    setattr(socket.socket, name, call)

socket.socket.connect = connect
waiting("recv")
waiting("recv_into")
from packetstack_cli.main import main
main(prog_name="packetstack")
"""


def begin(node: Node, moment: str, *words: str) -> None:
    """The command, until it dies at `moment`."""
    moment, quick = (moment, True) if moment.count(":") == 2 else (f"{moment}:0", False)
    line = [sys.executable, "-c", DYING, moment, "--run-dir", str(node.lab.run_directory), *words]
    dying = node.lab.start("node", *line)
    dying.wait(30)
    done = dying.returncode == 0 and quick  # sooner than the milliseconds
    assert done or dying.returncode == -signal.SIGKILL, (
        f"{' '.join(words)}: ended with {dying.returncode} before {moment}"
    )


@pytest.mark.parametrize("moment", ["before:1", "waiting:1", "before:2", "waiting:2", "waiting:2:60"])
def test_a_killed_down_is_repeated_and_leaves_nothing(node: Node, moment: str) -> None:
    node.command("down", "--all", "--yes")
    before = node.traces()
    node.up(stack())
    begin(node, moment, "down", "--all", "--yes")
    second = node.command("down", "--all", "--yes")
    assert second.returncode == 0, second
    assert node.traces() == before


@pytest.mark.parametrize("moment", ["before:1", "waiting:1", "waiting:1:5", "waiting:1:30"])
def test_a_killed_move_is_repeated_and_all_is_right(node: Node, moment: str) -> None:
    node.up_again()
    with node.connect() as connection, node.connect(VIP6) as connection6:
        served = ask(connection), ask(connection6)
        slot = node.status()["engines"][-1]["slot"]
        words = ("move", "web", "--buckets", "0-199", "--engine", str(slot))
        begin(node, moment, *words)
        node.packetstack(*words)
        assert (ask(connection), ask(connection6)) == served
        assert next(e for e in node.status()["engines"] if e["slot"] == slot)["buckets"] >= 200
    assert node.who(VIP6) == set(BACKENDS6)


@pytest.mark.parametrize("moment", ["before:1", "before:3", "waiting:1", "waiting:3", "waiting:3:100"])
def test_a_killed_up_is_repeated_and_all_is_right(node: Node, moment: str) -> None:
    file = node.lab.directory / "stack.yaml"
    node.up_again()
    node.packetstack("down", "--yes")
    begin(node, moment, "up", str(file))
    node.packetstack("up", str(file))
    assert node.status()["readyReplicas"] == 2
    assert node.curl() in BACKENDS
    node.packetstack("down", "--yes")
    assert not node.lab.run_directory.exists()


@pytest.mark.parametrize("words", [("scale", "web", "--replicas", "3"), ("upgrade", "ENGINE"), ("upgrade", "--agent")])
def test_a_killed_command_is_repeated_and_all_is_right(
    node: Node, served: socket.socket, words: tuple[str, ...]
) -> None:
    words = tuple(node.status()["engines"][0]["name"] if word == "ENGINE" else word for word in words)
    for moment in ("before:1", "waiting:1", "waiting:1:60", "before:2"):
        begin(node, moment, *words)
        ask(served)
    node.packetstack("upgrade", "--agent")
    node.packetstack(*words)
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
