"""A kubelet with the static CPU manager: engines own whole CPUs, and fences still visit all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.install import NAMESPACE as SYSTEM
from tests.cluster.install import install

from packetstack_cli.lab import NODE_UPLINK
from packetstack_cli.traffic import Servers, Traffic

from .conftest import PORT, UDP_PORT, VIP, Installed, eventually, stack

NAMESPACE = "exclusive"


@pytest.fixture(scope="module")
def exclusive() -> Iterator[Installed]:
    """One node that keeps a CPU for all pods and gives the others away."""
    from tests.cluster.cluster import Cluster
    from tests.cluster.slots import Slot

    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two CPUs: one stays shared")
    with Slot() as slot, Cluster(slot, exclusive_cpus=True) as cluster:
        install(cluster, f"--set=agent.uplinks={{{NODE_UPLINK}}}")
        made = Installed(cluster)
        made.create_namespace(NAMESPACE)
        yield made
        cluster.kubectl("delete", "packetstack", "--all", "-n", NAMESPACE, "--timeout=60s")


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
def test_an_engine_has_its_cpu_for_itself_and_pools_beside_it_are_resized(exclusive: Installed) -> None:
    Servers(exclusive.lab)
    own = stack("own", NAMESPACE, replicas=1)
    own["spec"]["engine"]["cpuPolicy"] = "Exclusive"
    listeners = [{**li, "address": "192.0.2.11"} for li in own["spec"]["listeners"]]
    own["spec"] |= {"listeners": listeners, "snat": {"addresses": ["198.51.100.16/30"]}}
    exclusive.cluster.apply(stack("shared", NAMESPACE))
    exclusive.wait(NAMESPACE, "shared", 2)
    agent = exclusive.cluster.get("pod", exclusive.agent(), "-n", SYSTEM)["metadata"]["uid"]
    assert len(cpus(agent)) == os.cpu_count(), "nothing is given away yet"
    traffic = Traffic(
        exclusive.lab, [f"{VIP}:{PORT}"], [f"{VIP}:{UDP_PORT}"], connections=100, udp_flows=10, new_rate=10
    )
    traffic.wait_open()
    exclusive.cluster.apply(own)
    exclusive.wait(NAMESPACE, "own", 1)
    [pod] = exclusive.engines(NAMESPACE, "own")
    given = cpus(pod["metadata"]["uid"])
    assert len(given) == 1, "one core, one CPU"
    eventually(lambda: not given & cpus(agent), "the agent is kept off that CPU")
    for replicas in (3, 1):
        exclusive.scale(NAMESPACE, "shared", replicas)
    outcome = traffic.stop()
    print(outcome)
    assert outcome.broken == 0, outcome.what_broke()
    assert not given & cpus(agent)
    exclusive.kubectl("scale", "packetstack", "own", "-n", NAMESPACE, "--replicas=8")

    def refused() -> bool:
        return exclusive.condition(NAMESPACE, "own", "CapacityAvailable") == ("False", "NoExclusiveCPU")

    eventually(refused, "CapacityAvailable=False, NoExclusiveCPU")
