"""The operator scales a stack under real traffic: by load from one to four engines and back, by triggers from one to two cores and back."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.waiting import eventually

from packetstack_cli.traffic import Outcome, Servers, Traffic

from .conftest import BUCKETS, PORT, SHORT, VIP, WAIT_SECONDS, Installed
from .conftest import stack as a_stack

EXAMPLE = Path(__file__).parents[2] / "examples/autoscaled.yaml"
UP_SECONDS, DOWN_SECONDS = 40.0, 60.0
"""For the pool to follow: a few sync periods, and the start of pods on a machine that is shared."""


def example(space: str) -> dict[str, Any]:
    """examples/autoscaled.yaml before the lab's servers, of engines that fit four times on a small node.

    Its target is lower, so that half of the traffic would do when the machine is busy.
    """
    spec: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())["spec"]
    made = a_stack("web", space)["spec"]
    del spec["replicas"]  # in a cluster it is the autoscaler's from the beginning
    spec["engine"]["memory"] = made["engine"]["memory"]
    spec["listeners"][0]["backends"] = made["listeners"][0]["backends"]
    spec["autoscaling"]["syncPeriodSeconds"] = 3
    spec["autoscaling"]["metrics"][0]["engine"]["target"]["averageValue"] = "500"
    return {**a_stack("web", space), "spec": spec}


class Pool:
    """The stack, and the sizes that it had."""

    def __init__(self, packetstack: Installed, space: str) -> None:
        self.packetstack, self.space = packetstack, space
        self.sizes: list[int] = []
        self.began = time.monotonic()

    def look(self) -> dict[str, Any]:
        raw: dict[str, Any] = self.packetstack.cluster.get("packetstack", "web", "-n", self.space)
        size = raw["spec"]["replicas"]
        if not self.sizes or self.sizes[-1] != size:
            self.sizes.append(size)
            decision = raw.get("status", {}).get("autoscaling", {}).get("decision")
            print(f"{time.monotonic() - self.began:5.1f} s: {size} engines ({decision})")
        return raw

    def until(self, replicas: int, seconds: float) -> dict[str, Any]:
        """Until so many engines are wanted, and serve, and no other is left."""
        deadline = time.monotonic() + seconds
        while True:
            raw = self.look()
            status = raw.get("status", {})
            if (
                raw["spec"]["replicas"] == status.get("readyReplicas") == replicas
                and status.get("drainingReplicas", 0) == 0
            ):
                return raw
            assert time.monotonic() < deadline, json.dumps(status, indent=1)
            time.sleep(0.5)


@pytest.mark.slow
def test_the_pool_follows_a_ramp_of_traffic_and_breaks_no_connection(
    packetstack: Installed, servers: Servers, space: str
) -> None:
    packetstack.cluster.apply(example(space))
    packetstack.wait(space, "web", 1)
    pool = Pool(packetstack, space)
    # These stay all the time: they see every resize.
    steady = Traffic(packetstack.lab, [f"{VIP}:{PORT}"], connections=80, request_interval_ms=2000, name="steady")
    steady.wait_open()
    ramp = Traffic(
        packetstack.lab, [f"{VIP}:{PORT}"], connections=400, request_interval_ms=500, ramp_seconds=8, name="ramp"
    )
    ramp_began = time.monotonic()
    pool.until(4, UP_SECONDS)
    up = time.monotonic() - ramp_began
    ramp.wait_open()
    time.sleep(1)
    ramped = ramp.stop()
    raw = pool.until(1, DOWN_SECONDS)
    took = time.monotonic() - ramp_began
    time.sleep(2.5)  # each connection has its turn once more
    outcome = steady.stop()
    print(f"{pool.sizes}: 4 engines after {up:.1f} s, 1 after {took:.1f} s\n{ramped}\n{outcome}")
    highest = pool.sizes.index(4)
    assert pool.sizes[: highest + 1] == sorted(pool.sizes[: highest + 1]), "no flapping on the way up"
    assert pool.sizes[highest:] == sorted(pool.sizes[highest:], reverse=True), "no flapping on the way down"
    for part in (outcome, ramped):
        assert part.broken == 0, part.what_broke()
    assert outcome.connections >= 80
    assert ramped.connections >= 400
    conditions = {c["type"]: (c["status"], c["reason"]) for c in raw["status"]["conditions"]}
    assert conditions["ScalingActive"] == ("True", "ValidMetricFound")
    events = packetstack.cluster.get("events", "-n", space)["items"]
    rescaled = [e["message"] for e in events if e["reason"] == "SuccessfulRescale"]
    assert any("engine metric PacketsPerSecond above target" in message for message in rescaled)
    assert any("All metrics below target" in message for message in rescaled)
    assert not [e for e in events if e["reason"] == "ExternallyScaled"]


class Sized:
    """A stack of one engine with 1 or 2 cores: more for 200 flows or 60 new ones a second of a core, fewer when both are low."""

    def __init__(self, packetstack: Installed, space: str, strategy: str) -> None:
        self.packetstack, self.space = packetstack, space
        triggers = [
            {"type": "ActiveFlows", "above": 200, "target": 160, "below": 120},
            {"type": "NewFlowsPerSecond", "above": 60, "target": 48, "below": 28},
        ]
        vertical = {"maxCores": 2, "triggers": triggers, "holdSeconds": 2, "coolDownSeconds": 2}
        autoscaling = {"maxReplicas": 1, "syncPeriodSeconds": 1, "vertical": vertical}
        made = a_stack("web", space, handover={"strategy": strategy}, autoscaling=autoscaling, flowTable=SHORT)
        del made["spec"]["replicas"], made["spec"]["engine"]["cores"]
        packetstack.cluster.apply(made)
        packetstack.wait(space, "web", 1)
        self.outcomes: list[Outcome] = []

    def open(self, name: str, connections: int, new_rate: int = 0) -> Traffic:
        made = Traffic(
            self.packetstack.lab, [f"{VIP}:{PORT}"], connections=connections, request_interval_ms=1000,
            new_rate=new_rate, name=name,
        )  # fmt: skip
        made.wait_open()
        return made

    def close(self, *some: Traffic) -> None:
        """Nothing of it was broken."""
        for traffic in some:
            outcome = traffic.stop()
            assert outcome.broken == 0, outcome.what_broke()
            self.outcomes.append(outcome)

    def cores(self) -> int:
        """Those that the resource wants."""
        return int(self.packetstack.cluster.get("packetstack", "web", "-n", self.space)["spec"]["engine"]["cores"])

    def until(self, cores: int) -> None:
        """Until it wants so many, and an engine that has them owns all buckets."""
        began = time.monotonic()
        eventually(lambda: self.cores() == cores, WAIT_SECONDS, f"{cores} cores wanted")
        wanted = time.monotonic() - began
        eventually(
            lambda: {len(e["cores"]) for e in self._live() if e["buckets"] == BUCKETS} == {cores},
            WAIT_SECONDS, f"an engine with {cores} cores has all buckets",
        )  # fmt: skip
        print(f"{cores} cores wanted after {wanted:.1f} s, there after {time.monotonic() - began:.1f} s")

    def _live(self) -> list[dict[str, Any]]:
        engines: list[dict[str, Any]] = self.packetstack.live(self.space, "web")["engines"]
        return engines


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["Transfer", "Mirror"])
def test_cores_follow_two_triggers_up_and_down_and_no_connection_breaks(
    packetstack: Installed, servers: Servers, space: str, strategy: str
) -> None:
    stack = Sized(packetstack, space, strategy)
    old, crowd = stack.open("old", 40), stack.open("crowd", 240)
    stack.until(2)
    busy = stack.open("busy", 20, new_rate=35)
    time.sleep(1.2)  # each connection has its turn once more
    stack.close(old, crowd)  # with Mirror the first set has nothing left
    packetstack.wait(space, "web", 1)
    time.sleep(6)
    assert stack.cores() == 2, "one of two triggers does not allow fewer"
    last = stack.open("last", 40)
    stack.close(busy)
    stack.until(1)
    time.sleep(1.2)
    stack.close(last)
    packetstack.wait(space, "web", 1)
    print(f"{strategy}: {sum(o.connections for o in stack.outcomes)} connections, none broken")
    events = [e for e in packetstack.cluster.get("events", "-n", space)["items"] if e["reason"] == "EnginesResized"]
    changes = {e["message"].partition(":")[0] for e in events}
    assert changes == {"1 x 1 core -> 1 x 2 cores", "1 x 2 cores -> 1 x 1 core"}
