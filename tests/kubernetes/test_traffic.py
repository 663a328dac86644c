"""Live traffic through engine pods, while everything around them changes: no connection breaks."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.install import NAMESPACE, REPOSITORY
from tests.waiting import eventually

from packetstack_cli.traffic import Servers, Traffic

from .conftest import PORT, UDP_PORT, VIP, WAIT_SECONDS, Installed, stack

CONNECTIONS, FLOWS = 500, 50
AWAY_SECONDS = 30


class Scene:
    """A stack with traffic through it."""

    def __init__(self, packetstack: Installed, space: str) -> None:
        self.packetstack, self.space, self.name = packetstack, space, "web"

    def wait(self, replicas: int = 2, seconds: float = 60) -> None:
        self.packetstack.wait(self.space, self.name, replicas, seconds)

    def kubectl(self, *words: str) -> str:
        return self.packetstack.kubectl(*words, "-n", self.space)

    def pods(self) -> list[str]:
        return sorted(p["metadata"]["name"] for p in self.packetstack.engines(self.space, self.name))

    def serves_without(self, pid: int) -> bool:
        """Whether all engines serve, and none of them by this process."""
        engines = self.agent_status()["engines"]
        return all(e["ready"] and e["pid"] != pid for e in engines)

    def agent_status(self) -> dict[str, Any]:
        return self.packetstack.live(self.space, self.name)


@pytest.fixture
def scene(packetstack: Installed, servers: Servers, space: str) -> Iterator[Scene]:
    """Two engines, and connections that must not break whatever the test does."""
    packetstack.cluster.apply(stack("web", space))
    made = Scene(packetstack, space)
    made.wait()
    traffic = Traffic(
        packetstack.lab, [f"{VIP}:{PORT}"], [f"{VIP}:{UDP_PORT}"],
        connections=CONNECTIONS, udp_flows=FLOWS, request_interval_ms=1000, new_rate=20, cpu=1,
    )  # fmt: skip
    traffic.wait_open()
    yield made
    time.sleep(1.5)  # each connection has its turn once more
    outcome = traffic.stop()
    print(outcome)
    assert outcome.connections >= CONNECTIONS
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_reordered <= 5, "more than an overloaded CPU explains"


def test_a_new_stack_answers(packetstack: Installed, servers: Servers, space: str) -> None:
    packetstack.cluster.apply(stack("web", space))
    eventually(packetstack.answers, WAIT_SECONDS, "an answer")


def test_scaling_breaks_no_connection(scene: Scene) -> None:
    for replicas in (4, 1, 2):
        scene.packetstack.scale(scene.space, scene.name, replicas)


def test_another_image_replaces_all_engines_and_breaks_no_connection(scene: Scene) -> None:
    before = scene.pods()
    patch = f'{{"spec": {{"engine": {{"image": "{REPOSITORY}:next"}}}}}}'
    scene.kubectl("patch", "packetstack", scene.name, "--type=merge", "-p", patch)
    eventually(lambda: not set(before) & set(scene.pods()), WAIT_SECONDS, "engines of the other image")
    scene.wait()


@pytest.mark.parametrize("what", ["datapath", "container", "hangs"])
def test_a_killed_engine_breaks_no_connection(scene: Scene, what: str) -> None:
    before = scene.pods()
    for engine in scene.agent_status()["engines"]:
        pid = engine["pid"]
        if what == "container":  # its init: the kubelet starts the container again
            pid = int(scene.packetstack.cluster.node.run("ps", "-o", "ppid=", "-p", str(pid)).stdout)
        scene.packetstack.cluster.node.run("kill", "-STOP" if what == "hangs" else "-KILL", str(pid))
        eventually(lambda pid=engine["pid"]: scene.serves_without(pid), WAIT_SECONDS, "the engine's successor")
    scene.wait()
    assert scene.pods() == before


@pytest.mark.parametrize("how", ["delete", "force"])
def test_a_deleted_pod_breaks_no_connection(scene: Scene, how: str) -> None:
    victim = scene.pods()[0]
    force = ["--force", "--grace-period=0"] if how == "force" else []
    scene.kubectl("delete", "pod", victim, *force)
    eventually(lambda: len(scene.pods()) == 2 and victim not in scene.pods(), WAIT_SECONDS, "another engine")
    scene.wait()


def test_an_agent_that_is_replaced_breaks_no_connection(scene: Scene) -> None:
    before = scene.agent_status()
    agent = scene.packetstack.agent()
    scene.packetstack.kubectl("delete", "pod", agent, "-n", NAMESPACE)
    scene.packetstack.kubectl("rollout", "status", "daemonset/packetstack-agent", "-n", NAMESPACE, "--timeout=60s")
    eventually(lambda: scene.packetstack.agent() != agent, WAIT_SECONDS, "another agent")
    eventually(
        lambda: all(e["ready"] for e in scene.agent_status()["engines"]), WAIT_SECONDS, "engines of the other agent"
    )
    after = scene.agent_status()
    assert [(e["slot"], e["pid"]) for e in after["engines"]] == [(e["slot"], e["pid"]) for e in before["engines"]]
    assert (after["owners"], after["flowTableGeneration"]) == (before["owners"], before["flowTableGeneration"])
    scene.packetstack.scale(scene.space, scene.name, 3)


def test_an_operator_killed_in_the_middle_of_a_handover_breaks_no_connection(scene: Scene) -> None:
    for replicas in (3, 2):
        scene.kubectl("scale", "packetstack", scene.name, f"--replicas={replicas}")
        eventually(lambda: len(scene.pods()) == 3, WAIT_SECONDS, "the third engine's pod")
        for _ in range(2):
            kill_operator(scene.packetstack)
            time.sleep(2)
        scene.wait(replicas, 120)


def test_an_api_server_that_is_away_breaks_no_connection(scene: Scene) -> None:
    with scene.packetstack.cluster.control_plane.without("kube-apiserver"):
        time.sleep(AWAY_SECONDS / 2)
        victim = datapaths(scene.packetstack)[0]
        scene.packetstack.cluster.node.run("kill", "-9", str(victim))  # repaired by the agent alone
        time.sleep(AWAY_SECONDS / 2)
        assert victim not in datapaths(scene.packetstack)
    # To fewer engines: Kubernetes' own scheduler looks for the server with growing pauses.
    scene.packetstack.scale(scene.space, scene.name, 1)


def datapaths(packetstack: Installed) -> list[int]:
    """Processes of the node, by pid in the node."""
    return [int(p) for p in packetstack.cluster.node.run("pgrep", "-x", "packetstack-dat").stdout.split()]


def kill_operator(packetstack: Installed) -> None:
    """As the kernel would; the kubelet starts it again."""
    for pid in packetstack.cluster.node.run("pgrep", "-f", "bin/packetstack-operator", check=False).stdout.split():
        packetstack.cluster.node.run("kill", "-9", pid)
