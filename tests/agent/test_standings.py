"""What the local agent gives the core to decide and show from, for stacks without a kernel below them."""

from pathlib import Path

import pytest
from tests.model.node import PlayedEngine, PlayedStack, managed, resource

from packetstack_agent import standings
from packetstack_agent.firewall import Firewall, Obstacle
from packetstack_agent.managed import Managed
from packetstack_agent.node import RunDirectory
from packetstack_core import standing
from packetstack_core.assignment import NOBODY, Owner, State
from packetstack_core.standing import Standing


def stands(one: Managed, place: Path, *obstacles: Obstacle) -> Standing:
    firewall = Firewall()
    firewall.obstacles = obstacles
    return standings.standing(one, RunDirectory(place), firewall)


def shown(it: Standing) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, str(c.reason)) for c in standing.conditions(it)}


def two(**spec: object) -> Managed:
    """A stack at its goal."""
    wanted = resource(**spec)
    one = managed(PlayedStack(wanted, [1, 2]), PlayedEngine(1, wanted), PlayedEngine(2, wanted))
    one.converged = True
    return one


def test_a_stack_at_its_goal_is_ready(tmp_path: Path) -> None:
    it = stands(two(), tmp_path)
    assert standing.ready(it)
    assert shown(it) == {
        "Available": ("True", "MinimumEnginesAvailable"),
        "Progressing": ("False", "Settled"),
        "CapacityAvailable": ("True", "EnoughCapacity"),
        "Degraded": ("False", "AsExpected"),
        "FirewallOpen": ("True", "NothingInTheWay"),
    }


def test_a_bucket_without_an_owner_or_with_an_open_fence_is_no_rest(tmp_path: Path) -> None:
    one = two()
    assert isinstance(one.stack, PlayedStack)
    one.stack.shards[0] = Owner(2, 0)
    assert not standing.ready(stands(one, tmp_path))
    one.stack.table[0] = one.stack.shards[0] = NOBODY
    assert not standing.ready(stands(one, tmp_path))


def test_an_engine_that_holds_buckets_is_not_removed_by_the_plan(tmp_path: Path) -> None:
    one = two(replicas=1)
    assert isinstance(one.stack, PlayedStack)
    one.engines[2].state = State.DRAINING
    one.stack.table = [Owner(1, 0)] * one.stack.buckets  # its shards still say engine 2
    it = stands(one, tmp_path)
    assert {e.slot: bool(e.holds) for e in it.pool.engines} == {1: False, 2: True}
    assert standing.plan(it.pool, 0.0).actions == ()


def test_an_engine_without_a_datapath_is_shown_with_its_buckets(tmp_path: Path) -> None:
    one = two()
    assert isinstance(one.engines[2], PlayedEngine)
    one.engines[2].serves = False
    (degraded,) = (c for c in standing.conditions(stands(one, tmp_path)) if c.type == "Degraded")
    assert degraded.reason == "EngineNotReady"
    assert degraded.message.endswith("no datapath serves its queues; 8 of 16 buckets get no service until one is")


@pytest.mark.parametrize(
    ("problem", "reason", "message"),
    [
        ("NoExclusiveCPU: 1 CPUs are free, it needs 2", "NoExclusiveCPU", "1 CPUs are free, it needs 2"),
        ("no memory", "EngineFailed", "no memory"),
    ],
)
def test_why_no_engine_can_be_made_is_shown(tmp_path: Path, problem: str, reason: str, message: str) -> None:
    one = two()
    one.problem = problem
    (capacity,) = (c for c in standing.conditions(stands(one, tmp_path)) if c.type == "CapacityAvailable")
    assert (capacity.value, capacity.reason, capacity.message) == (False, reason, message)


def test_an_engine_that_is_being_removed_counts_no_more(tmp_path: Path) -> None:
    one = two()
    one.engines[2].removing = True
    assert [e.slot for e in standings.pool(one, RunDirectory(tmp_path)).engines] == [1]
