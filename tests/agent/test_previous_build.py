"""A node that runs the build before this one, whose memory has another layout: it serves on until flows may end."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from tests.lab.node import BACKENDS, Node, ask, stack
from tests.waiting import eventually

from packetstack_agent.natives import constant
from packetstack_cli.lab import NODE_UPLINK

ROOT = Path(__file__).parents[2]
COMMIT = "79cc0598b422b4960d48f3e3ded9049f82e87e08"
"""The last one whose memory has layout 2."""
PACKAGES = ("core", "agent", "engine", "cli", "operator")


@pytest.fixture(scope="module")
def previous() -> Path:
    """The previous build, built."""
    place = ROOT / "build/previous" / COMMIT
    if not (place / "core/packetstack_core/native/packetstack-datapath").exists():
        if subprocess.run(["git", "cat-file", "-e", f"{COMMIT}^{{commit}}"], cwd=ROOT, capture_output=True).returncode:
            pytest.skip(f"the history has no {COMMIT}: this is no full clone")
        place.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=place, input=archive, check=True)
        for line in (
            ["meson", "setup", "--wipe", "build/meson"] if (place / "build/meson").exists() else ["meson", "setup", "build/meson"],
            ["ninja", "--quiet", "-C", "build/meson"],
            ["meson", "install", "-C", "build/meson", "--no-rebuild", "--quiet"],
        ):  # fmt: skip
            subprocess.run(line, cwd=place, check=True, capture_output=True)
    return place


class Old:
    """The command of the previous build."""

    def __init__(self, node: Node, place: Path) -> None:
        self.node = node
        self.env = {"PYTHONPATH": os.pathsep.join(str(place / package) for package in PACKAGES)}

    def command(self, *words: str) -> CompletedProcess[str]:
        return self.node.lab.run("node", *self.node.lab.command(*words), check=False, env=self.env)


@pytest.fixture
def old(node: Node, previous: Path) -> Iterator[Old]:
    """It serves a stack."""
    running = Old(node, previous)
    file = node.lab.directory / "stack.yaml"
    file.write_text(json.dumps(stack()))
    said = running.command("up", str(file), "--uplink", NODE_UPLINK)
    assert said.returncode == 0, said.stderr
    eventually(lambda: len(list(node.lab.run_directory.glob("engines/*/supervisor.sock"))) == 2)  # all is there
    yield running
    node.command("down", "--all", "--yes")


@pytest.fixture
def held(node: Node, old: Old) -> Iterator[list[Any]]:
    """Connections through it."""
    with ExitStack() as kept:
        connections = [kept.enter_context(node.connect()) for _ in range(6)]
        for connection in connections:
            ask(connection)
        yield connections


def everything(node: Node) -> dict[str, Any]:
    """All that the old build has made: files that only it changes, pins, processes, devices, routes."""
    run = node.lab.run_directory
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        found[str(path)] = (path.lstat().st_mode, path.lstat().st_ino)
        if path.is_file() and path.parent.name != "bpf" and path.name not in ("arena", "queues", "log", "agent.log"):
            found[str(path)] += (hashlib.sha256(path.read_bytes()).hexdigest(),)
    traces = node.traces()
    # Whoever asks has processes too.
    traces["processes"] = sorted(p for p in traces["processes"] if "packetstack_cli" not in p)
    return found | traces


def alive(connections: list[Any]) -> bool:
    return all(ask(connection) in BACKENDS for connection in connections)


def kill_agent(node: Node) -> None:
    os.kill(node.client.agent_pid(), signal.SIGKILL)
    eventually(lambda: not node.client.alive())


def refusal() -> str:
    return f"LayoutMismatch: stack web has memory layout 2; this build has {constant('PS_LAYOUT_VERSION')}."


@pytest.mark.parametrize("words", [("upgrade", "--agent"), ("upgrade", "web-1"), ("upgrade", "2")], ids=" ".join)
def test_an_upgrade_to_this_build_is_refused_before_anything_is_stopped(
    node: Node, old: Old, held: list[Any], words: tuple[str, ...]
) -> None:
    before = everything(node)
    said = node.refused(*words)
    assert said.startswith(refusal())
    assert "keeps serving" in said
    assert said.endswith("by: packetstack upgrade --agent --end-flows")
    assert everything(node) == before
    assert alive(held)
    assert node.curl() in BACKENDS
    assert old.command("scale", "web", "--replicas", "3").returncode == 0, "its own agent goes on"
    assert alive(held)


def test_an_agent_of_this_build_does_not_follow_a_dead_one_of_the_previous(
    node: Node, old: Old, held: list[Any]
) -> None:
    kill_agent(node)
    before = everything(node)
    for words in (("up", str(node.lab.directory / "stack.yaml")), ("upgrade", "--agent")):
        assert node.refused(*words).startswith(refusal())
        assert everything(node) == before
    assert alive(held)
    assert old.command("up", str(node.lab.directory / "stack.yaml")).returncode == 0
    assert alive(held)
    assert node.curl() in BACKENDS


@pytest.mark.parametrize("dead", [False, True], ids=["its agent lives", "its agent is dead"])
def test_end_flows_lets_this_build_serve_the_same_stacks(node: Node, old: Old, held: list[Any], dead: bool) -> None:
    if dead:
        kill_agent(node)
    said = node.command("upgrade", "--agent", "--end-flows")
    assert said.returncode == 0, said.stderr
    assert node.who() == set(BACKENDS)
    status = node.status()
    assert status["ready"]
    assert status["readyReplicas"] == 2
    with node.connect() as connection:
        first = ask(connection)
        node.packetstack("upgrade", "--agent")
        node.packetstack("upgrade", status["engines"][0]["name"])
        node.packetstack("scale", "web", "--replicas", "1")
        assert ask(connection) == first
    assert "no flow has to end" in node.refused("upgrade", "--agent", "--end-flows")
    node.packetstack("down", "--yes")
    assert not node.lab.run_directory.exists()


def test_this_build_ends_the_stacks_of_the_previous(node: Node, old: Old) -> None:
    line = "the agent is of an earlier build, which this command cannot ask"
    assert line in node.refused("get")
    assert line in node.refused("scale", "web", "--replicas", "3")
    said = node.command("down")
    assert said.returncode == 0, said.stderr
    assert said.stderr == "the agent is of an earlier build; all flows of web will end\n"
    assert not node.lab.run_directory.exists()
    assert not node.traces()["processes"]


def test_a_command_of_the_previous_build_is_told_to_use_this_one(node: Node, old: Old) -> None:
    assert node.command("upgrade", "--agent", "--end-flows").returncode == 0
    said = old.command("get")
    assert said.returncode == 1
    assert said.stderr.startswith("this packetstack command is of an earlier build than the agent")
    assert said.stderr.count("\n") == 1


def test_an_agent_of_a_cluster_stands_by_until_it_is_told_to_end_flows(node: Node, old: Old, held: list[Any]) -> None:
    os.kill(node.client.agent_pid(), signal.SIGTERM)  # as the kubelet does
    eventually(lambda: not node.client.alive())
    before = everything(node)
    agent = [sys.executable, "-P", "-m", "packetstack_agent.main", "--run-dir", str(node.lab.run_directory)]
    new = node.lab.start("node", *agent, "--node", "n1", "--uplink", NODE_UPLINK, env={"KUBECONFIG": "/dev/null"})
    try:
        eventually(node.client.alive)
        mine = (str(node.lab.run_directory / "agent.pid"), str(node.lab.run_directory / "agent.sock"), "processes")
        after = everything(node)
        assert {k: v for k, v in after.items() if k not in mine} == {k: v for k, v in before.items() if k not in mine}
        assert [e["reason"] for e in node.client.call("events") if e["reason"] != "ApiServerLost"] == ["LayoutMismatch"]
        assert node.refused("scale", "web", "--replicas", "1").startswith(refusal())
        assert node.refused("down", "web").startswith("stack web: not found")
        assert alive(held)
        pid = node.client.agent_pid()
        said = node.command("upgrade", "--agent", "--end-flows")
        assert said.returncode == 0, said.stderr
        assert node.client.agent_pid() == pid, "a container ends with its first process"
        node.wait_ready()
        assert node.who() == set(BACKENDS)
    finally:
        new.terminate()
        new.wait(20)
