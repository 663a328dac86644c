"""Two nodes, a stack on each of them, backends and a client in pods: all engines of a stack stay on its node.

Their kubelets have the static CPU manager: engines may own whole CPUs, and fences still visit all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.install import NAMESPACE as SYSTEM
from tests.cluster.install import REPOSITORY, TAG, install
from tests.cluster.kubernetes_binaries import find
from tests.cluster.processes import run
from tests.waiting import eventually

from packetstack_cli.traffic import Servers, Traffic

from .conftest import PORT, UDP_PORT, VIP, WAIT_SECONDS, Installed, stack

NAMESPACE, APART = "two-nodes", "exclusive"
PLACES = {"east": "node0", "west": "node1"}
VIPS = {"east": "192.0.2.21", "west": "192.0.2.22"}
SNATS = {"east": "198.51.100.16/30", "west": "198.51.100.32/30"}
BACKENDS = {"web-0": "node0", "web-1": "node1"}

ASK = """
import json, sys, threading, time, urllib.request
over, lock, failed, answers = threading.Event(), threading.Lock(), [], {}
def ask(vip):
    while not over.is_set():
        began = time.monotonic()
        try:
            with urllib.request.urlopen(f"http://{vip}/hostname", timeout=5) as answer:
                who = answer.read().decode().strip()
            with lock:
                counts = answers.setdefault(vip, {})
                counts[who] = counts.get(who, 0) + 1
        except OSError as e:
            failed.append(f"{vip}: {e} after {time.monotonic() - began:.1f} s")
        time.sleep(0.01)
threads = [threading.Thread(target=ask, args=(vip,)) for vip in sys.argv[1:]]
for thread in threads: thread.start()
sys.stdin.read()
over.set()
for thread in threads: thread.join()
print(json.dumps({"failed": failed, "answers": answers}))
"""
"""Asks all addresses until its input ends: a connection for each request."""


@pytest.fixture(scope="module")
def two() -> Iterator[Installed]:
    """PacketStack on two nodes, with what the network between them must know: which addresses are where."""
    from tests.cluster.cluster import Cluster
    from tests.cluster.slots import Slot

    with Slot() as slot, Cluster(slot, nodes=2, exclusive_cpus=True) as cluster:
        install(cluster)
        for name, place in PLACES.items():
            here, there = sorted(cluster.nodes, key=lambda node: node.name != place)
            for network in (VIPS[name], SNATS[name]):
                run("ip", "-n", there.namespace, "route", "add", network, "via", here.address)
        made = Installed(cluster)
        for namespace in (NAMESPACE, APART):
            made.create_namespace(namespace)
        yield made
        for namespace in (NAMESPACE, APART):
            cluster.kubectl("delete", "packetstack", "--all", "-n", namespace, "--timeout=60s")


def pod(name: str, node: str, *command: str) -> dict[str, Any]:
    """A pod that needs no registry; /etc/hostname in it is its name."""
    container = {"name": "main", "image": f"{REPOSITORY}:{TAG}", "command": [*command]}
    meta = {"name": name, "namespace": NAMESPACE, "labels": {"app": name.partition("-")[0]}}
    spec = {
        "nodeSelector": {"kubernetes.io/hostname": node},
        "containers": [container],
        "terminationGracePeriodSeconds": 0,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def service() -> dict[str, Any]:
    """Of the backends on both nodes."""
    spec = {"selector": {"app": "web"}, "ports": [{"port": 8080, "targetPort": 8000}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": NAMESPACE}, "spec": spec}


def placed(name: str) -> dict[str, Any]:
    """A stack of one engine on its node, before the Service."""
    shape = {"cores": 1, "queuesPerCore": 2, "memory": "256Mi", "interface": {"veth": {}}}
    template = {"nodeSelector": {"kubernetes.io/hostname": PLACES[name]}}
    backends = {"service": {"name": "web", "port": 8080}}
    return stack(
        name,
        NAMESPACE,
        replicas=1,
        engine=shape | {"podTemplate": template},
        listeners=[{"name": "web", "address": VIPS[name], "port": 80, "backends": backends}],
        snat={"addresses": [SNATS[name]]},
    )


@contextmanager
def asking(two: Installed) -> Iterator[dict[str, Any]]:
    """Requests from the client's pod to both addresses; how they went is there at the end."""
    words = ["exec", "-i", "-n", NAMESPACE, "client", "--", "python3", "-c", ASK, *VIPS.values()]
    outcome: dict[str, Any] = {}
    command = [str(find("kubectl")), f"--kubeconfig={two.cluster.kubeconfig}", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        try:
            yield outcome
            said, _ = client.communicate("", timeout=30)
            outcome.update(json.loads(said))
        finally:
            client.kill()


def answers(two: Installed, vip: str) -> bool:
    """Whether a page comes to the client."""
    ask = f"import urllib.request; urllib.request.urlopen('http://{vip}/hostname', timeout=2)"
    words = ["exec", "-n", NAMESPACE, "client", "--", "python3", "-c", ask]
    kubectl = [str(find("kubectl")), f"--kubeconfig={two.cluster.kubeconfig}"]
    return subprocess.run([*kubectl, *words], check=False, capture_output=True).returncode == 0


def nodes_of(two: Installed, name: str) -> set[str]:
    """Where a stack's engines run."""
    return {p["spec"]["nodeName"] for p in two.engines(NAMESPACE, name)}


@pytest.mark.slow
def test_stacks_on_two_nodes_are_scaled_without_a_failed_request(two: Installed) -> None:
    serve = ("python3", "-m", "http.server", "8000", "--directory", "/etc")
    web = [pod(name, node, *serve) for name, node in BACKENDS.items()]
    two.cluster.apply(*web, pod("client", "node0", "sleep", "3600"), service(), *map(placed, PLACES))
    for name in (*BACKENDS, "client"):
        two.cluster.wait_for(f"pod/{name}", "--for=condition=Ready", "-n", NAMESPACE)
    for name, vip in VIPS.items():
        two.wait(NAMESPACE, name, 1)
        eventually(lambda vip=vip: answers(two, vip), WAIT_SECONDS, f"a page from {vip}")
    with asking(two) as outcome:
        for replicas in (2, 1):
            for name in PLACES:  # both at once
                two.kubectl("scale", "packetstack", name, "-n", NAMESPACE, f"--replicas={replicas}")
            for name, node in PLACES.items():
                two.wait(NAMESPACE, name, replicas)
                assert nodes_of(two, name) == {node}
    print(outcome)
    assert outcome["failed"] == []
    assert sorted(outcome["answers"]) == sorted(VIPS.values())
    assert all(set(counts) == set(BACKENDS) for counts in outcome["answers"].values())
    two.kubectl("delete", "packetstack", "--all", "-n", NAMESPACE, "--timeout=60s")


def cpus(uid: str) -> set[int]:
    """Where the pod's processes may run."""
    found: set[int] = set()
    for status in Path("/proc").glob("[0-9]*/task/[0-9]*/status"):
        try:
            if uid not in (status.parent / "cgroup").read_text():
                continue
            if "Name:\tpause" not in status.read_text():  # no container: it is not kept anywhere
                found |= os.sched_getaffinity(int(status.parent.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_an_engine_has_its_cpu_for_itself_and_pools_beside_it_are_resized(two: Installed) -> None:
    here = {"podTemplate": {"nodeSelector": {"kubernetes.io/hostname": "node0"}}}
    servers = Servers(two.lab)
    own, shared = stack("own", APART, replicas=1), stack("shared", APART)
    own["spec"]["engine"] |= here | {"cpuPolicy": "Exclusive"}
    shared["spec"]["engine"] |= here
    listeners = [{**li, "address": "192.0.2.11"} for li in own["spec"]["listeners"]]
    own["spec"] |= {"listeners": listeners, "snat": {"addresses": ["198.51.100.16/30"]}}
    two.cluster.apply(shared)
    two.wait(APART, "shared", 2)
    agent = two.cluster.get("pod", two.agent("node0"), "-n", SYSTEM)["metadata"]["uid"]
    assert len(cpus(agent)) == os.cpu_count(), "nothing is given away yet"
    traffic = Traffic(two.lab, [f"{VIP}:{PORT}"], [f"{VIP}:{UDP_PORT}"], connections=100, udp_flows=10, new_rate=10)
    traffic.wait_open()
    two.cluster.apply(own)
    two.wait(APART, "own", 1)
    [pod] = two.engines(APART, "own")
    given = cpus(pod["metadata"]["uid"])
    assert len(given) == 1, "one core, one CPU"
    eventually(lambda: not given & cpus(agent), WAIT_SECONDS, "the agent is kept off that CPU")
    for replicas in (3, 1):
        two.scale(APART, "shared", replicas)
    outcome = traffic.stop()
    print(outcome)
    assert outcome.broken == 0, outcome.what_broke()
    assert not given & cpus(agent)
    two.kubectl("scale", "packetstack", "own", "-n", APART, "--replicas=8")

    def refused() -> bool:
        return two.condition(APART, "own", "CapacityAvailable") == ("False", "NoExclusiveCPU")

    eventually(refused, WAIT_SECONDS, "CapacityAvailable=False, NoExclusiveCPU")
    servers.stop()
