"""The agent dies in each step of a handover, by Transfer or by Mirror, and the next one finishes it."""

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


# Most buckets have no connection, so the switch is followed by their end.
SWITCH = ("opened:1", "mirrored:40", "alone:40")
SWITCH_AT_LENGTH = (
    "waiting:1", "mirrored:1", "ingress:1", "acknowledged:1", "release:30", "alone:1", "passed:1", "ended:1", "ended:40",
)  # fmt: skip
FLOWS = {"buckets": 256, "maxFlows": 20000, "tcpClosedTimeoutSeconds": 1, "tcpTimeWaitTimeoutSeconds": 1}


@pytest.fixture(scope="module")
def served(node: Node) -> Iterator[Node]:
    """One stack for all steps."""
    node.up(stack())
    yield node
    node.command("down", "--all", "--yes")


@pytest.fixture(scope="module")
def mirrored(node: Node) -> Iterator[Node]:
    """One stack for all steps that gets other numbers of engines by Mirror."""
    node.command("down", "--all", "--yes")
    node.up(stack(handover={"strategy": "Mirror"}, flowTable=FLOWS))
    yield node
    node.command("down", "--all", "--yes")


def die_in_a_change_of_size(node: Node, step: str) -> int:
    """An agent that dies in this step, because the stack gets another number of engines; that number."""
    before = node.client.agent_pid()
    node.client.call("leave")
    eventually(lambda: not Path(f"/proc/{before}/fd/0").exists())
    agent = node.lab.start(
        "node", sys.executable, "-c", AGENT, "--run-dir", str(node.lab.run_directory),
        env={"PACKETSTACK_DIE_AT": step}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    eventually(node.client.alive, 30)
    wanted = 3 if node.status()["replicas"] < 3 else 2
    node.client.call("scale", name="web", replicas=wanted)
    agent.wait(20)
    assert agent.returncode == -signal.SIGKILL, f"no handover came to {step}"
    return wanted


@pytest.mark.parametrize("step", STEPS)
def test_a_handover_is_finished_by_the_agent_that_follows(served: Node, step: str) -> None:
    node = served
    connections = [node.connect() for _ in range(8)]
    answers = [ask(c) for c in connections]
    wanted = die_in_a_change_of_size(node, step)
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


@pytest.mark.parametrize("step", [*SWITCH, *(pytest.param(s, marks=pytest.mark.soak) for s in SWITCH_AT_LENGTH)])
def test_row_32_a_switch_to_a_second_set_is_finished_by_the_agent_that_follows(mirrored: Node, step: str) -> None:
    node = mirrored
    older = [node.connect() for _ in range(8)]
    answers = [ask(c) for c in older]
    wanted = die_in_a_change_of_size(node, step)
    for c in older[:4]:
        c.sendall(b"who?\n")  # some of them wait in two park rings now
    node.packetstack("upgrade", "--agent")
    for c, answer in zip(older[:4], answers, strict=False):
        assert c.recv(4096).split()[0].decode() == answer
    eventually(lambda: len(node.status()["owners"]) == wanted, 20)
    newer = [node.connect() for _ in range(8)]
    for c, answer in zip(older, answers, strict=True):
        assert ask(c) == answer
        c.close()
    eventually(lambda: "SetRetired" in node.reasons(), 30)
    node.wait_ready()
    for c in newer:
        ask(c)
        c.close()
    drops = node.status()["drops"]["engine"]
    assert not any(drops.get(name, 0) for name in ("late", "not_owner", "park_full"))
