"""How the agent keeps a stack as its resource says, with played engines: no packets, no processes."""

import asyncio
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from tests.model.node import PlayedEngine, PlayedStack, managed, resource, turns

from packetstack_agent import agent as agents
from packetstack_agent import applying, engine_life, engines, neighbours, networks
from packetstack_agent.agent import Agent
from packetstack_agent.engine_life import AWAY_SECONDS
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.flow_memory import Report
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.node import RunDirectory
from packetstack_core.assignment import Move, Owner, State
from packetstack_core.planning import ActivateEngine, DrainEngine, RemoveEngine
from packetstack_core.preconditions import Surroundings
from packetstack_core.values import Network


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent that has begun nothing."""
    destroyed: list[int] = []
    monkeypatch.setattr(engines, "destroy", lambda engine: destroyed.append(engine.slot))
    monkeypatch.setattr(engines, "end_processes", lambda _: None)
    monkeypatch.setattr(engine_life, "add_drops", lambda *_: None)
    return Agent(RunDirectory(tmp_path))


def leaving(agent: Agent, mute: bool) -> tuple[PlayedStack, Managed]:
    """A stack that shall have one engine less than it has; the one that goes does not answer its fences."""
    stack = PlayedStack(resource(replicas=1), owners=(1, 2))
    one = managed(stack, PlayedEngine(1, stack.resource), PlayedEngine(2, stack.resource))
    agent.stacks["web"] = one
    if mute:
        stack.mute = {1, 2}
    return stack, one


def reasons(agent: Agent) -> list[str]:
    return [e["reason"] for e in agent.events]


async def settle(agent: Agent, one: Managed, steps: int) -> None:
    for _ in range(steps):
        await agent.keeper.step(one)
        await turns()
        await agent.background.ended()


async def test_an_engine_that_leaves_is_removed_when_it_has_handed_its_buckets_over(agent: Agent) -> None:
    stack, one = leaving(agent, mute=False)
    await settle(agent, one, 3)
    assert list(one.engines) in ([1], [2])
    assert set(stack.shards) == {Owner(next(iter(one.engines)), 0)}


async def test_an_engine_is_not_removed_while_it_still_holds_what_it_has_to_hand_over(agent: Agent) -> None:
    stack, one = leaving(agent, mute=True)
    await settle(agent, one, 8)
    assert set(one.engines) == {1, 2}, "its rings have packets that nobody else has"
    assert stack.open_fences()
    assert "EngineDoesNotAnswer" in reasons(agent)
    stack.mute = set()
    await settle(agent, one, 3)
    assert len(one.engines) == 1
    assert not stack.open_fences()
    assert stack.shard_slots() == set(one.engines)


@pytest.mark.parametrize("acknowledged", [True, False])
async def test_an_engine_that_has_acknowledged_a_fence_is_not_taken_for_one_that_hangs(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, acknowledged: bool
) -> None:
    stack, one = leaving(agent, mute=True)
    missed: list[int] = []
    monkeypatch.setattr(agent.watchdog, "fence_missed", lambda engine, _: missed.append(engine.slot))
    monkeypatch.setattr(stack, "transfer", lambda *_: Report(stalled=1, acknowledged=acknowledged))
    await agent.keeper.transfer(one, ())
    assert missed == ([] if acknowledged else [1])
    (said,) = (e["message"] for e in agent.events if e["reason"] == "EngineDoesNotAnswer")
    assert ("markers behind its packets do not come by" in said) == acknowledged


async def test_a_removal_that_waited_for_the_flow_table_looks_again_what_the_engine_holds(agent: Agent) -> None:
    stack, one = leaving(agent, mute=True)
    engine = one.engines[1]
    engine.state = State.DRAINING
    stack.table = [Owner(2, 0)] * len(stack.table)
    async with one.busy:
        agent.life.remove(one, 1)
        await turns()
    await agent.background.ended()
    assert 1 in one.engines
    assert not engine.removing, "the planner sees it again, and removes it when it may go"


async def test_an_engine_that_nobody_serves_any_more_is_waited_for_only_so_long(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, one = leaving(agent, mute=True)
    await settle(agent, one, 2)
    [gone] = [e for e in one.engines.values() if e.state is State.DRAINING]
    assert isinstance(gone, PlayedEngine)
    gone.serves, gone.unserved_since = False, 1000.0
    now = 1000.0 + AWAY_SECONDS - 1
    monkeypatch.setattr(time, "monotonic", lambda: now)
    await settle(agent, one, 2)
    assert len(one.engines) == 2, "its successor takes over what stands in the rings"
    now += 2
    await settle(agent, one, 3)
    assert gone.slot not in one.engines
    assert not stack.open_fences()


async def test_an_engine_whose_removal_fails_is_removed_later(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    _, one = leaving(agent, mute=False)
    destroy, fails = engines.destroy, [1]

    def refuse(engine: Engine) -> None:
        if fails:
            fails.pop()
            raise AgentError("interface pe1: cannot be removed")
        destroy(engine)

    monkeypatch.setattr(engines, "destroy", refuse)
    for _ in range(3):
        await agent.keeper.step(one)
        await turns()
        await agent.background.ended()
        await turns()
    assert "Failed" in reasons(agent)
    assert len(one.engines) == 1


async def test_a_plan_about_an_engine_that_has_gone_meanwhile_does_no_harm(agent: Agent) -> None:
    _, one = leaving(agent, mute=False)
    for action in (ActivateEngine(7), DrainEngine(7), RemoveEngine(7)):
        await agent.keeper.act(one, action)
    assert set(one.engines) == {1, 2}


@pytest.mark.looptime
async def test_a_backends_death_that_engines_could_not_be_told_of_is_told_later(agent: Agent) -> None:
    stack, one = leaving(agent, mute=False)
    [listener] = stack.resource.spec.listeners
    dead = ((ip_address("10.0.0.1"), 8080), listener.health_check)
    keeping = asyncio.create_task(agent.keeper._keep(one))
    await asyncio.sleep(1.5)
    stack.busy = True
    agent.health._prober.expect_unhealthy(("web", *dead))
    agent.health._changed(("web", *dead), False)
    await asyncio.sleep(5)
    assert not any(dead in told for told in stack.configured)
    assert "Failed" in reasons(agent)
    stack.busy = False
    await asyncio.sleep(2)
    assert stack.configured[-1] == {dead: False}
    told = len(stack.configured)
    await asyncio.sleep(10)
    assert len(stack.configured) == told, "and once is enough"
    keeping.cancel()


@pytest.mark.looptime
async def test_engines_that_take_no_configuration_do_not_keep_the_stack_from_what_else_it_needs(agent: Agent) -> None:
    stack, one = leaving(agent, mute=False)
    stack.busy = one.stale = True
    keeping = asyncio.create_task(agent.keeper._keep(one))
    await asyncio.sleep(5)
    assert len(one.engines) == 1
    keeping.cancel()


async def test_a_change_that_could_neither_be_made_nor_taken_back_is_worked_off_later(agent: Agent) -> None:
    stack, one = leaving(agent, mute=False)
    stack.busy = True
    with pytest.raises(AgentError):
        await agent._applier._change_stack(one, resource(replicas=1, backends=("10.0.0.2",)))
    assert one.stale
    stack.busy = False
    await agent.keeper.step(one)
    assert stack.configured
    assert not one.stale


class LoopsOwn(Stacks):
    """Whoever reads it in another thread may find that it changes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = threading.get_ident()

    def items(self) -> Any:
        assert threading.get_ident() == self.owner
        return super().items()

    def values(self) -> Any:
        assert threading.get_ident() == self.owner
        return super().values()

    def __iter__(self) -> Iterator[str]:
        assert threading.get_ident() == self.owner
        return super().__iter__()


async def test_stacks_are_never_counted_off_in_a_thread_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "Stacks", LoopsOwn)
    agent = Agent(RunDirectory(tmp_path))
    stack, _ = leaving(agent, mute=False)
    routed: list[set[Network]] = []

    def ensure(prefixes: set[Network], keep: bool) -> list[Network]:
        assert not keep
        routed.append(prefixes)
        return []

    monkeypatch.setattr(networks, "ensure_routes", ensure)
    monkeypatch.setattr(neighbours, "on_link", lambda _: {})
    monkeypatch.setattr(applying, "survey", lambda *_: Surroundings({}, (), ()))
    monkeypatch.setattr(networks, "check_not_routed", lambda _: None)
    monkeypatch.setattr(agent.underlay, "_open_firewall", lambda: None)
    await agent.underlay.route()
    assert routed == [set(stack.resource.prefixes())]
    assert [r["result"] for r in await agent.apply([stack.resource.document()], ())] == ["unchanged"]


async def test_inits_of_one_stack_are_started_again_side_by_side_also_while_its_flow_table_changes(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, one = leaving(agent, mute=False)
    both = threading.Barrier(2, timeout=5)
    monkeypatch.setattr(engines, "start_again", lambda _: both.wait())
    async with one.busy:
        await asyncio.gather(*(agent.life.start_again(one, e, "its init has ended") for e in one.engines.values()))


async def test_an_engine_whose_datapath_does_not_come_back_is_replaced(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(engines, "make", lambda engine: made.append(engine.slot))
    monkeypatch.setattr(engines, "attend", lambda *_: None)
    agent.run.record.last_slot = 2
    stack = PlayedStack(resource(repair={"replaceAfterSeconds": 60}), owners=(1, 2))
    dead = PlayedEngine(1, stack.resource)
    dead.serves, dead.unserved_since = False, time.monotonic()
    one = agent.stacks["web"] = managed(stack, dead, PlayedEngine(2, stack.resource))
    await settle(agent, one, 2)
    assert not made, "it may come back"
    assert stack.table.count(Owner(1, 0)) == len(stack.table) / 2
    dead.unserved_since -= 61
    await settle(agent, one, 4)
    assert set(one.engines) == {2, 3}
    assert made == [3]
    assert stack.shard_slots() == {2}, "until the new one serves"


@pytest.mark.parametrize("how", ["remove", "rebuild", "lose"])
async def test_processes_that_take_long_to_end_keep_nobody_from_their_stack(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stack, one = leaving(agent, mute=False)
    stack.table = stack.shards = [Owner(2, 0)] * len(stack.table)
    go_on = threading.Event()
    monkeypatch.setattr(engines, "end_processes", lambda _: go_on.wait(5))
    monkeypatch.setattr(engines, "make", lambda _: None)
    monkeypatch.setattr(engines, "attend", lambda *_: None)
    engine = one.engines[1]
    match how:
        case "remove":
            agent.life.remove(one, 1)
        case "rebuild":
            agent.background.spawn("web", agent.life.rebuild(one, engine, "its interface is gone"))
        case "lose":
            agent.background.spawn("web", agent.life.lose(one, engine, "its pod is gone"))
    await turns()
    async with asyncio.timeout(1):
        await agent.keeper.transfer(one, [Move(0, Owner(2, 0))])
    assert one.engines[1] is engine
    go_on.set()
    await agent.background.ended()
    assert one.engines.get(1) is not engine
