"""A core is added to an engine and taken away again under load, by each strategy, and nobody notices."""

import time
from functools import partial

import pytest
from tests.lab.crowds import Crowd, Crowds
from tests.lab.mirrored import FLOW_TABLE, Mirrored, mirrored
from tests.waiting import eventually

CROWD = Crowd(connections=2000, flows=200, ramp_seconds=2, leave_seconds=2, request_interval_ms=1000)


def resize(node: Mirrored, strategy: str, cores: int) -> float:
    """Ask for an engine of so many cores; seconds until it has all buckets."""
    began = time.monotonic()
    engine = {"cores": cores, "queuesPerCore": 2, "cpuPolicy": "Shared"}
    node.ask_for(1, {"strategy": strategy}, engine=engine, flowTable=FLOW_TABLE)
    eventually(lambda: owned(node, cores) == FLOW_TABLE["buckets"], 30, f"all buckets with {cores} cores")
    return time.monotonic() - began


def owned(node: Mirrored, cores: int) -> int:
    """Buckets of engines that have so many cores."""
    return sum(int(e["buckets"]) for e in node.engines() if len(e["cores"]) == cores)


def alone(node: Mirrored, cores: int) -> bool:
    """Whether there is one engine, of so many cores."""
    return [len(e["cores"]) for e in node.engines()] == [cores]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["Transfer", "Mirror"])
def test_row_6_a_core_more_and_a_core_less_break_and_reorder_nothing(strategy: str) -> None:
    with mirrored("pkl-core") as node:
        node.make(1, {"strategy": strategy})
        crowds = Crowds(node.lab, CROWD)
        took, outcomes = [], []
        for cores in (2, 1):
            took.append(resize(node, strategy, cores))
            outcomes.append(crowds.change())
            eventually(partial(alone, node, cores), 30, "the old engine gone")
        outcomes.append(crowds.here.stop())
    print(f"{strategy}: {took[0]:.2f} s until a core more serves, {took[1]:.2f} s until one less does")
    for outcome in outcomes:
        print(outcome)
        assert outcome.never_opened == 0
        assert outcome.broken == 0, outcome.what_broke()
        assert (outcome.datagrams_duplicated, outcome.datagrams_reordered) == (0, 0)
