"""`kubectl packetstack` on a cluster that serves: live numbers of the stack's node beside what the resources say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.kubernetes.conftest import VIP, Installed, stack

from packetstack_cli.main import main
from packetstack_cli.target import Target
from packetstack_cli.traffic import Servers, Traffic

pytestmark = pytest.mark.slow


class Served:
    """A stack of three engines, whose pods' numbers are not their slots on the node, with 20 open connections."""

    def __init__(self, packetstack: Installed, space: str) -> None:
        self.packetstack, self.space = packetstack, space

    def run(self, *words: str, kubeconfig: Path | None = None) -> Result:
        """`kubectl packetstack WORDS -n NAMESPACE`."""
        kubeconfig = kubeconfig or self.packetstack.cluster.kubeconfig
        target = Target(cluster=True, kubeconfig=kubeconfig, namespace=self.space)
        return CliRunner().invoke(main, words, obj=target, prog_name="kubectl packetstack")

    def said(self, *words: str) -> str:
        """What it printed."""
        result = self.run(*words)
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
        return result.stdout

    def data(self, *words: str) -> Any:
        """The same as data."""
        return json.loads(self.said(*words, "-o", "json"))


@pytest.fixture(scope="module")
def served(packetstack: Installed, servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All tests look at the same stack."""
    space = "command"
    packetstack.create_namespace(space)
    made = Served(packetstack, space)
    file = tmp_path_factory.mktemp("command") / "edge.yaml"
    file.write_text(json.dumps(stack("edge", space, replicas=2)))
    assert "stack edge: 2 engines ready" in made.said("up", str(file), "--timeout", "90")
    # The first engine goes, its slot is free, and the engine that comes has another number.
    packetstack.kubectl("delete", "pod", "edge-1", "-n", space, "--wait=true")
    packetstack.wait(space, "edge", 2)
    assert made.said("scale", "edge", "--replicas", "3", "--timeout", "90") == "stack edge: from 2 to 3 engines\n"
    traffic = Traffic(packetstack.lab, [f"{VIP}:80"], connections=20, request_interval_ms=50, seconds=300)
    traffic.wait_open()
    yield made
    broken = traffic.stop().broken
    assert made.said("down", "edge", "--yes") == "stack edge: removed\n"
    packetstack.cluster.control_plane.delete_namespace(space)
    assert broken == 0


def pods(served: Served) -> set[str]:
    return {p["metadata"]["name"] for p in served.packetstack.engines(served.space, "edge")}


def test_top_shows_cores_and_queues_of_engines_by_the_names_of_their_pods(served: Served) -> None:
    [item] = served.data("top")
    engines = item["status"]["engines"]
    assert {e["name"] for e in engines} == {f"edge-{e['slot']}" for e in engines} == pods(served)
    assert "edge-1" not in pods(served)
    assert all(len(e["cores"]) == 1 and len(e["cores"][0]["queues"]) == 2 for e in engines)
    assert sum(e["flows"] for e in engines) >= 20
    assert "3/3 engines" in served.said("top", "edge")


def test_describe_shows_what_resources_and_agent_know(served: Served) -> None:
    shown = served.said("describe", "edge")
    assert "3 ready of 3 wanted" in shown
    assert "its flow table settled at generation" in shown
    for condition in ("Available", "CapacityAvailable", "Degraded", "FirewallOpen", "Progressing"):
        assert condition in shown
    status = served.data("describe", "edge")["status"]
    assert status["flows"] == 20
    assert [b["healthy"] for b in status["backends"]] == [True] * len(status["backends"])
    assert set(status["drops"]) == {"director", "host", "engine", "kernel"}


def test_explain_names_the_pod_of_a_live_connection(served: Served) -> None:
    line = served.packetstack.lab.run("client", "ss", "-Htn", "state", "established", "dst", VIP).stdout.splitlines()[0]
    found = served.data("explain", "edge", "tcp", line.split()[2], f"{VIP}:80")
    assert found["flow"]["state"] == "established"
    assert found["owner"]["pod"] in pods(served)
    assert found["owner"]["pod"] == f"edge-{found['owner']['slot']}"
    assert f"-> engine {found['owner']['pod']}, which keeps this flow" in found["why"]
    assert found["node"] == "node0"


def test_events_are_those_of_operator_and_agent(served: Served) -> None:
    found = served.data("events", "edge")
    assert {"EngineCreated", "EngineActive", "EngineReady", "BucketsMoved"} <= {e["reason"] for e in found}
    assert {e["stack"] for e in found} == {"edge"}
    assert [e["time"] for e in found] == sorted(e["time"] for e in found)


def test_logs_are_those_of_a_pod_or_of_the_agents(served: Served) -> None:
    assert f"{served.space}.edge EngineReady" in served.said("logs")
    served.said("logs", sorted(pods(served))[0])


def test_metrics_name_the_stack_by_namespace_and_engines_by_their_pods_numbers(served: Served) -> None:
    shown = served.said("metrics")
    for pod in pods(served):
        assert f'packetstack_buckets{{engine="{pod.rpartition("-")[2]}",stack="{served.space}.edge"}}' in shown


def test_a_queue_moves_to_a_core_of_the_engine_that_is_named(served: Served) -> None:
    number = sorted(pods(served))[0].rpartition("-")[2]
    assert served.said("move", "edge", "--queue", f"{number}:1", "--core", "0").startswith(
        f"queue 1 of engine {number}"
    )
    result = served.run("move", "edge", "--queue", "1:0", "--core", "0")
    assert str(result.exception).startswith("engine 1: not found; there are: edge-")


def test_preflight_finds_nothing_missing_where_a_stack_serves(served: Served) -> None:
    found = served.data("preflight")
    assert {c["result"] for c in found} == {"ok"}, found
    node = [c["message"] for c in found if c["where"] == "node node0"]
    assert "net.ipv4.ip_forward=1" in node
    assert any(m.startswith("kernel ") for m in node)
    assert any("CPU manager none" in m for m in node)


def test_who_may_not_enter_the_agents_pod_sees_resources_only(served: Served) -> None:
    kubectl, user = served.packetstack.kubectl, "reader"
    kubectl("create", "clusterrole", user, "--verb=get,list", "--resource=packetstacks,packetengines,flowtables,events")
    kubectl("create", "rolebinding", user, f"--clusterrole={user}", f"--user={user}", "-n", served.space)
    few = served.packetstack.cluster.control_plane.kubeconfig_for(user)
    result = served.run("describe", "edge", kubeconfig=few)
    kubectl("delete", "clusterrole", user)
    assert result.exit_code == 0, result.output
    assert "without live numbers: pods is forbidden" in result.stderr
    assert "3 ready of 3 wanted" in result.stdout
