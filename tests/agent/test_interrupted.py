"""The agent dies in each step of a handover, and the next one finishes it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.node import BACKENDS, Node, ask, stack
from tests.waiting import eventually

INJECTED = Path(__file__).parents[2] / "build/meson/agent/libpacketstack-inject.so"

# The agent as it is, with a library that has steps to die at.
AGENT = f"""
from packetstack_core import abi
installed = abi.native
abi.native = lambda name: abi.Path({str(INJECTED)!r}) if name == "libpacketstack.so" else installed(name)
from packetstack_agent.main import main
main()
"""

STEPS = (
    "word:1", "word:40", "described:1", "opened:1", "ingress:1", "acknowledged:1", "egress:1", "fenced:1",
    "visited:1", "release:1", "release:30", "released:1", "word:80", "release:80",
)  # fmt: skip


@pytest.fixture(scope="module")
def served(node: Node) -> Iterator[Node]:
    """One stack for all steps."""
    node.up(stack())
    yield node
    node.command("down", "--all", "--yes")


@pytest.mark.parametrize("step", STEPS)
def test_a_handover_is_finished_by_the_agent_that_follows(served: Node, step: str) -> None:
    node, run = served, served.lab.run_directory
    connections = [node.connect() for _ in range(8)]
    answers = [ask(c) for c in connections]
    before = node.client.agent_pid()
    node.client.call("leave")
    eventually(lambda: not Path(f"/proc/{before}/fd/0").exists())
    agent = node.lab.start(
        "node", sys.executable, "-c", AGENT, "--run-dir", str(run),
        env={"PACKETSTACK_DIE_AT": step}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    eventually(node.client.alive, 30)
    wanted = 3 if node.status()["replicas"] < 3 else 2
    node.client.call("scale", name="web", replicas=wanted)
    agent.wait(20)
    assert agent.returncode == -signal.SIGKILL, f"no handover came to {step}"
    for c in connections[:4]:
        c.sendall(b"who?\n")  # some of them wait in a park ring now
    node.packetstack("upgrade", "--agent")
    for c, answer in zip(connections[:4], answers, strict=False):
        assert c.recv(4096).split()[0].decode() == answer
    node.wait_ready()
    assert len(node.status()["owners"]) == wanted
    for c, answer in zip(connections, answers, strict=True):
        assert ask(c) == answer
        c.close()
    assert node.who(tries=4) <= set(BACKENDS)
    drops = node.status()["drops"]["engine"]
    assert not any(drops.get(name, 0) for name in ("late", "not_owner", "park_full"))
