"""The operator scales a stack by the load of its engines under real traffic: one to four engines and back."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from packetstack_cli.traffic import Servers, Traffic

from .conftest import PORT, VIP, Installed
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
