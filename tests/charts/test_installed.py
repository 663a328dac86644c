"""The charts in a real cluster: installed by Helm, with an example, and taken away again."""

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.charts.conftest import NAMESPACE, ROOT
from tests.charts.test_examples import documents
from tests.cluster.cluster import Cluster
from tests.cluster.install import REPOSITORY, TAG, helm, install
from tests.cluster.processes import wait_until

pytestmark = pytest.mark.slow

VIP = "192.0.2.10"


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Iterator[Cluster]:
    """With operator and agent, and the example whose backends are the pods of a Service."""
    install(cluster)
    cluster.apply(*example())
    for thing, condition in (("deployment/web", "Available"), ("packetstack/edge", "Available")):
        cluster.wait_for(thing, f"--for=condition={condition}")
    wait_until(lambda: page(cluster), "a page from the client")
    yield cluster
    cluster.kubectl("delete", "--ignore-not-found", "packetstack/edge", "service/web", "deployment/web")
    helm(cluster, "uninstall", "packetstack", "--ignore-not-found", "--wait")


def example() -> list[dict[str, Any]]:
    """examples/kubernetes/veth.yaml, with a web server that needs no registry."""
    web, service, stack = documents(ROOT / "examples/kubernetes/veth.yaml")
    web["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 0
    container = web["spec"]["template"]["spec"]["containers"][0]
    container["image"] = f"{REPOSITORY}:{TAG}"
    container["command"] = ["python3", "-m", "http.server", "80", "--directory", "/etc/apt"]
    container["resources"]["requests"]["cpu"] = "0"
    for o in (web, service, stack):
        o["metadata"]["namespace"] = "default"
    return [web, service, stack]


def page(cluster: Cluster) -> bool:
    """Whether the client gets a page from the virtual address."""
    enter = ["ip", "netns", "exec", cluster.lab.namespace("client")]
    ask = ["curl", "--silent", "--fail", "--max-time", "5", "--output", "/dev/null", f"http://{VIP}/"]
    return subprocess.run([*enter, *ask], check=False).returncode == 0


def left_on_the_node(cluster: Cluster) -> list[str]:
    """What an agent makes: pins, interfaces, files."""
    found = cluster.node.run(
        "sh", "-c", "ls -d /sys/fs/bpf/packetstack/* /run/packetstack/*", check=False
    ).stdout.split()
    links = cluster.node.run("ip", "-brief", "link").stdout.split("\n")
    return found + [line.split("@")[0] for line in links if line.startswith(("ps0", "ps1", "pe"))]


def ended(cluster: Cluster) -> Callable[[], bool]:
    """That no pod of the release is there; Helm does not wait for them."""
    return lambda: not cluster.get("pods", "--namespace", NAMESPACE)["items"]


def test_the_chart_s_own_test_passes(installed: Cluster) -> None:
    assert "Succeeded" in helm(installed, "test", "packetstack")


def test_operator_and_agent_export_the_stack(installed: Cluster) -> None:
    proxy = f"/api/v1/namespaces/{NAMESPACE}/services/packetstack-operator:8080/proxy/metrics"
    text = installed.kubectl("get", "--raw", proxy)
    assert 'packetstack_engines{namespace="default",stack="edge",state="Active"} 2.0' in text
    assert "packetstack_crd_outdated" in text
    agent = f"http://{installed.node.address}:9470/metrics"
    text = subprocess.run(["curl", "--silent", "--fail", agent], check=True, capture_output=True, text=True).stdout
    assert 'packetstack_node_engines{stack="default.edge",state="Active"} 2.0' in text
    assert 'packetstack_engine_packets_total{engine="1",event="received",stack="default.edge"}' in text


def test_a_stack_goes_on_serving_without_the_release_and_with_the_next_one(installed: Cluster) -> None:
    helm(installed, "uninstall", "packetstack", "--wait")
    wait_until(ended(installed), "end of operator and agent")
    answers = []
    for _ in range(20):
        answers.append(page(installed))
        time.sleep(0.05)
    install(installed)
    answers += [page(installed) for _ in range(20)]
    assert answers == [True] * 40
    wait_until(
        lambda: installed.get("packetstack", "edge")["status"].get("readyReplicas") == 2, "engines that are known again"
    )
    engines = installed.get("pods", "-l", "packetstack.io/stack=edge")["items"]
    assert sorted(pod["metadata"]["name"] for pod in engines) == ["edge-1", "edge-2"]


def test_nothing_is_left_on_a_node_when_the_stacks_are_deleted_first(installed: Cluster) -> None:
    assert left_on_the_node(installed) != []
    installed.kubectl("delete", "packetstack", "--all", "--all-namespaces")
    helm(installed, "uninstall", "packetstack", "--wait")
    wait_until(ended(installed), "end of operator and agent")
    assert left_on_the_node(installed) == []
    assert installed.get("crd", "packetstacks.packetstack.io")
