"""A stack gets other sets of engine pods by Mirror, under live traffic, whoever is killed meanwhile: no connection breaks.

All tests share one stack; each begins with one set of the size that it needs, and ends with one set.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from kubernetes.utils.quantity import parse_quantity
from tests.cluster.images import PAUSE
from tests.cluster.install import NAMESPACE, REPOSITORY
from tests.waiting import eventually

from packetstack_cli.main import main
from packetstack_cli.target import Target
from packetstack_cli.traffic import Outcome, Servers, Traffic

from .conftest import BUCKETS, PORT, SHORT, UDP_PORT, VIP, WAIT_SECONDS, Installed, stack

CONNECTIONS, FLOWS = 200, 20
SPACE, NAME = "mirror", "web"

pytestmark = pytest.mark.slow


class Scene:
    """The stack, and what a client has open through it."""

    def __init__(self, packetstack: Installed) -> None:
        self.packetstack = packetstack
        self.traffic: list[Traffic] = []
        self._wanted: dict[str, Any] = {}
        self._phases: list[tuple[str, float]] = []

    # ---- the stack

    def begin(self, replicas: int, **handover: Any) -> None:
        """One set of so many engines, whatever was before."""
        self._wanted = {"replicas": replicas, "handover": {"strategy": "Mirror", **handover}, "flowTable": SHORT}
        self.change()
        self._until_one_set(replicas)

    def change(self, **spec: Any) -> None:
        """Apply it with these parts of its spec."""
        self._wanted |= spec
        self._phases = [("changed", time.monotonic())]
        self.packetstack.cluster.apply(stack(NAME, SPACE, **self._wanted))

    def status(self) -> dict[str, Any]:
        return self.packetstack.status(SPACE, NAME)

    def sets(self) -> list[dict[str, Any]]:
        """Oldest first; none before the operator has seen the stack."""
        found: list[dict[str, Any]] = self.status().get("sets", [])
        return found

    def states(self) -> list[str]:
        return [s["state"] for s in self.sets()]

    def condition(self, kind: str) -> tuple[str, str]:
        return self.packetstack.condition(SPACE, NAME, kind)

    def events(self, reason: str) -> list[str]:
        """Messages of the stack's events for this reason."""
        found = self.packetstack.cluster.get("events", "-n", SPACE, f"--field-selector=reason={reason}")["items"]
        return [e["message"] for e in found if e["involvedObject"]["name"] == NAME]

    def pods(self) -> list[str]:
        return sorted(p["metadata"]["name"] for p in self.packetstack.engines(SPACE, NAME))

    def engines(self, number: int) -> list[dict[str, Any]]:
        """Engines of a set, as the node's agent has them."""
        return [e for e in self.packetstack.live(SPACE, NAME)["engines"] if e["set"] == number]

    def until(self, what: str, *states: str) -> list[dict[str, Any]]:
        """Until there are sets in these states."""
        eventually(lambda: self.states() == [*states], WAIT_SECONDS, what)
        self._phases.append((what, time.monotonic()))
        return self.sets()

    def until_it_drains(self) -> tuple[int, int]:
        """Until a second set has all buckets, and the first has connections left; returns their numbers."""
        eventually(
            lambda: self.states() == ["Draining", "Current"]
            and self.sets()[1]["buckets"] == BUCKETS
            and self.sets()[0].get("connections", 0) > CONNECTIONS // 2,
            WAIT_SECONDS, "a second set with all buckets",
        )  # fmt: skip
        self._phases.append(("switched", time.monotonic()))
        first, second = self.sets()
        assert first["silentSince"]
        return int(first["id"]), int(second["id"])

    def _until_one_set(self, replicas: int) -> None:
        eventually(
            lambda: self.status().get("replicas") == replicas and self.states() == ["Current"],
            WAIT_SECONDS, "one set",
        )  # fmt: skip
        self.packetstack.wait(SPACE, NAME, replicas)

    # ---- what is killed

    def kill_engine(self, number: int, *, whole: bool) -> None:
        """The datapath of an engine of this set, or all of its container; returns when another one serves."""
        engine = self.engines(number)[0]
        pid = engine["pid"]
        if whole:  # its init: the kubelet starts the container again
            pid = int(self.packetstack.cluster.node.run("ps", "-o", "ppid=", "-p", str(pid)).stdout)
        self.packetstack.cluster.node.run("kill", "-9", str(pid))

        def serves_again() -> bool:
            now = next(e for e in self.engines(number) if e["name"] == engine["name"])
            return bool(now["ready"] and now["pid"] not in (0, engine["pid"]))

        eventually(serves_again, WAIT_SECONDS, f"a successor in {engine['name']}")

    def kill_operator(self) -> None:
        """And its pod is made anew: the kubelet starts a container again after growing pauses."""
        node = self.packetstack.cluster.node
        for pid in node.run("pgrep", "-f", "bin/packetstack-operator").stdout.split():
            node.run("kill", "-9", pid, check=False)
        of_it = ("-n", NAMESPACE, "-l", "app.kubernetes.io/component=operator")
        self.packetstack.kubectl("delete", "pod", *of_it, "--force", "--grace-period=0")

    def until_the_operator_is_back(self) -> None:
        words = ("rollout", "status", "deployment/packetstack-operator", "-n", NAMESPACE, "--timeout=60s")
        self.packetstack.kubectl(*words)

    # ---- traffic

    def open(self, name: str = "traffic", **more: Any) -> Traffic:
        """Connections and flows that stay, and short ones beside them."""
        options = {"connections": CONNECTIONS, "udp_flows": FLOWS, "new_rate": 20} | more
        made = Traffic(
            self.packetstack.lab, [f"{VIP}:{PORT}"], [f"{VIP}:{UDP_PORT}"],
            request_interval_ms=1000, cpu=1, name=name, **options,
        )  # fmt: skip
        self.traffic.append(made)
        made.wait_open()
        return made

    def close(self, traffic: Traffic, replicas: int) -> Outcome:
        """Nothing is broken; all is closed, and so many engines of one set are left."""
        time.sleep(1.2)  # each connection has its turn once more
        outcome = self.stop(traffic)
        assert outcome.connections >= CONNECTIONS
        assert outcome.broken == 0, outcome.what_broke()
        assert outcome.datagrams_duplicated == 0, "one was handled by both sets"
        self._until_one_set(replicas)
        self._phases.append(("one set", time.monotonic()))
        assert self.packetstack.answers()
        before = self._phases[0][1]
        print("; ".join(f"{what} after {at - before:.1f} s" for what, at in self._phases[1:]))
        return outcome

    def stop(self, traffic: Traffic) -> Outcome:
        self.traffic.remove(traffic)
        outcome = traffic.stop()
        self._phases.append(("closed", time.monotonic()))
        print(
            f"{outcome.connections} connections, {outcome.broken} broken; {outcome.datagrams_sent} datagrams, "
            f"{outcome.datagrams_lost} lost, {outcome.datagrams_reordered} reordered, {outcome.datagrams_duplicated} doubled; "
            f"longest gap {outcome.longest_gap_ms:.0f} ms"
        )
        return outcome

    def traces(self) -> set[str]:
        """What stacks leave on a node while they are there: pins, memory, directories of pods, links and namespaces."""
        node = self.packetstack.cluster.node
        files = node.run("find", "/sys/fs/bpf", "/run/packetstack", "/run/netns", check=False).stdout.split()
        return {*files, *node.run("ls", "/sys/class/net").stdout.split()}


@pytest.fixture(scope="module")
def mirrored(packetstack: Installed, servers: Servers) -> Iterator[Installed]:
    packetstack.create_namespace(SPACE)
    yield packetstack
    packetstack.kubectl("delete", "packetstack", "--all", "-n", SPACE, "--timeout=60s")
    packetstack.cluster.control_plane.delete_namespace(SPACE)


@pytest.fixture
def scene(mirrored: Installed) -> Iterator[Scene]:
    made = Scene(mirrored)
    yield made
    for traffic in made.traffic:
        traffic.stop()


def test_row_29_fewer_engines_take_over_and_both_sets_are_shown_with_what_they_handle(scene: Scene) -> None:
    scene.begin(2)
    traffic = scene.open()
    scene.change(replicas=1)
    scene.until_it_drains()
    assert len(scene.pods()) == 3
    target = Target(cluster=True, kubeconfig=scene.packetstack.cluster.kubeconfig, namespace=SPACE)

    def shown() -> list[dict[str, Any]]:
        result = CliRunner().invoke(main, ["transitions", NAME, "-o", "json"], obj=target)
        assert result.exit_code == 0, result.output
        found: list[dict[str, Any]] = json.loads(result.stdout)["sets"]
        return found

    first, second = eventually(lambda: [s for s in shown() if s["mirrored"]][:2], what="mirrored packets of both sets")
    assert (first["ready"], second["ready"], second["buckets"]) == (2, 1, BUCKETS)
    assert first["connections"] >= CONNECTIONS, "exact, as the agent counts"
    assert second["rejected"]["kept"] > 0
    scene.close(traffic, 1)


def test_row_31_what_is_wanted_while_a_set_drains_is_held_until_it_has_ended(scene: Scene) -> None:
    scene.begin(1)
    traffic = scene.open()
    scene.change(replicas=2)
    _, second = scene.until_it_drains()
    pods = scene.pods()
    scene.change(replicas=1)
    eventually(lambda: scene.condition("ScalingHeld") == ("True", "SetDraining"), WAIT_SECONDS, "ScalingHeld")
    assert scene.pods() == pods
    assert scene.states() == ["Draining", "Current"]
    scene.close(traffic, 1)
    assert scene.condition("ScalingHeld") == ("False", "NothingHeld")
    assert scene.sets()[0]["id"] != second


def test_row_9_without_room_for_a_second_set_the_first_serves_and_with_room_it_comes(scene: Scene) -> None:
    scene.begin(1)
    traffic, before = scene.open(), scene.pods()
    fill(scene, 1)
    for again in (False, True):
        scene.change(replicas=2)
        eventually(lambda: scene.condition("CapacityAvailable") == ("False", "NoMemory"), WAIT_SECONDS, "no room")
        [first, second] = scene.until("no room", "Current", "Activating")
        assert (first["buckets"], first["ready"]) == (BUCKETS, 1)
        eventually(lambda: scene.sets()[1]["ready"] == 1, WAIT_SECONDS, "the one engine that has room")
        if again:
            scene.kill_engine(second["id"], whole=True)
        else:
            scene.change(replicas=1)
            scene.until("taken back", "Current")
            eventually(lambda: scene.condition("CapacityAvailable")[0] == "True", WAIT_SECONDS, "enough for one")
            eventually(lambda: scene.pods() == before, WAIT_SECONDS, "the pods of before")
    scene.packetstack.kubectl("delete", "pod", "filler", "-n", SPACE)
    scene.until_it_drains()
    assert scene.condition("CapacityAvailable") == ("True", "EnoughCapacity")
    scene.close(traffic, 2)


def fill(scene: Scene, engines: int) -> None:
    """A pod that asks for all memory of the node but what this many engines ask for."""
    get = scene.packetstack.cluster.get
    there = [p for space in (NAMESPACE, SPACE) for p in get("pods", "-n", space)["items"]]
    pods = [p for p in there if p["status"]["phase"] in ("Pending", "Running")]
    free = parse_quantity(get("node", "node0")["status"]["allocatable"]["memory"]) - sum(map(_memory, pods))
    [engine] = scene.packetstack.engines(SPACE, NAME)
    asked = {"requests": {"memory": str(int(free - _memory(engine) * engines - _memory(engine) // 2))}}
    containers = [{"name": "pause", "image": PAUSE, "resources": asked}]
    spec = {"terminationGracePeriodSeconds": 0, "containers": containers}
    meta = {"name": "filler", "namespace": SPACE}
    scene.packetstack.cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    scene.packetstack.cluster.wait_for("pod/filler", "--for=condition=Ready", "-n", SPACE)


def _memory(pod: dict[str, Any]) -> int:
    """Bytes that a pod asks for."""
    asked = [c.get("resources", {}).get("requests", {}).get("memory", "0") for c in pod["spec"]["containers"]]
    return sum(int(parse_quantity(quantity)) for quantity in asked)


def test_row_27_at_the_deadline_connections_that_are_left_are_reset_and_no_others(scene: Scene) -> None:
    scene.begin(2, onDeadline="Reset", deadlineSeconds=6)
    old = scene.open("old", new_rate=0)
    scene.change(replicas=1)
    first, _ = scene.until_it_drains()
    young = scene.open("young")
    message = f"connections that set {first} keeps had not ended in time and end now"
    eventually(lambda: message in scene.events("SetEnded"), WAIT_SECONDS, "an event")
    scene.until("ended", "Current")
    ended = scene.stop(old)
    assert ended.report["broken_by"]["reset"] == ended.broken == CONNECTIONS, ended.what_broke()
    scene.close(young, 1)


@pytest.mark.parametrize(
    "whole", [pytest.param(False, marks=pytest.mark.soak, id="datapath"), pytest.param(True, id="container")]
)
def test_row_32_engines_of_both_sets_are_killed_while_the_first_drains(scene: Scene, whole: bool) -> None:
    scene.begin(1)
    traffic = scene.open()
    scene.change(replicas=2)
    first, second = scene.until_it_drains()
    pods = scene.pods()
    for number in (second, first):
        scene.kill_engine(number, whole=whole)
    assert scene.pods() == pods
    scene.close(traffic, 2)


def test_row_32_an_operator_that_is_killed_before_the_switch_and_after_it_goes_on(scene: Scene) -> None:
    scene.begin(2)
    traffic = scene.open()
    scene.change(replicas=1)
    scene.until("begun", "Current", "Activating")
    scene.kill_operator()
    assert scene.states() == ["Current", "Activating"]
    first, second = scene.until_it_drains()
    scene.kill_operator()
    scene.until_the_operator_is_back()
    time.sleep(1)  # for it to do what is wrong
    assert [(s["id"], s["state"]) for s in scene.sets()] == [(first, "Draining"), (second, "Current")]
    scene.close(traffic, 1)


@pytest.mark.parametrize(
    "engines", [pytest.param(1, id="the-only-one"), pytest.param(2, marks=pytest.mark.soak, id="one-of-two")]
)
def test_row_32_a_pod_of_the_set_that_drains_is_deleted_and_another_engine_has_its_connections(
    scene: Scene, engines: int
) -> None:
    scene.begin(engines)
    traffic = scene.open()
    scene.change(replicas=3 - engines)
    first, _ = scene.until_it_drains()
    victim = scene.engines(first)[0]["name"]
    scene.packetstack.kubectl("delete", "pod", victim, "-n", SPACE, "--grace-period=3")
    eventually(
        lambda: [e["ready"] for e in scene.engines(first) if e["name"] != victim] == [True]
        and victim not in scene.pods(),
        WAIT_SECONDS, "another engine of the set",
    )  # fmt: skip
    scene.close(traffic, 3 - engines)


def test_row_8_another_image_comes_with_another_set(scene: Scene) -> None:
    scene.begin(2)
    traffic, before = scene.open(), scene.pods()
    scene.change(engine=stack(NAME, SPACE)["spec"]["engine"] | {"image": f"{REPOSITORY}:next"})
    scene.until_it_drains()
    fresh = [p for p in scene.packetstack.engines(SPACE, NAME) if p["metadata"]["name"] not in before]
    assert [p["spec"]["containers"][0]["image"] for p in fresh] == [f"{REPOSITORY}:next"] * 2
    scene.close(traffic, 2)
    assert not set(before) & set(scene.pods())


def test_row_28_nothing_is_left_of_a_stack_that_is_deleted_while_a_set_drains(scene: Scene) -> None:
    delete(scene)
    before = scene.traces()
    scene.begin(1)
    traffic = scene.open()
    scene.change(replicas=2)
    scene.until_it_drains()
    assert scene.traces() - before
    delete(scene)
    eventually(lambda: not scene.traces() - before, WAIT_SECONDS, "nothing of it on the node")
    assert not scene.packetstack.answers()
    scene.stop(traffic)


def delete(scene: Scene) -> None:
    """The stack, if there is one; until nothing of its name is in the API server or on the node."""
    kinds = ("packetstack", "flowtable", "packetengine", "pod", "poddisruptionbudget")
    scene.packetstack.kubectl("delete", "packetstack", "--all", "-n", SPACE, "--timeout=60s")
    get = scene.packetstack.cluster.get
    eventually(lambda: not any(get(kind, "-n", SPACE)["items"] for kind in kinds), WAIT_SECONDS, "nothing of it")
    marks = (f"{SPACE}_{NAME}", f"{SPACE}.{NAME}")
    eventually(lambda: not any(m in name for name in scene.traces() for m in marks), 2 * WAIT_SECONDS, "no trace of it")
