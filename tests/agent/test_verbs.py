"""What a person asks while something else happens to the same stack. Engines are played."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.model.node import PlayedEngine, PlayedStack, managed, resource, turns

from packetstack_agent import verbs
from packetstack_agent.agent import Agent
from packetstack_agent.errors import AgentError
from packetstack_agent.managed import Managed
from packetstack_agent.node import RunDirectory
from packetstack_core.assignment import Owner


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    """An agent that has begun nothing, with a stack of two engines."""
    made, stack = Agent(RunDirectory(tmp_path)), PlayedStack(resource(), owners=(1, 2))
    made.stacks["web"] = managed(stack, PlayedEngine(1, stack.resource), PlayedEngine(2, stack.resource))
    return made


def stack_of(agent: Agent) -> tuple[PlayedStack, Managed]:
    one = agent.stacks["web"]
    assert isinstance(one.stack, PlayedStack)
    return one.stack, one


async def while_it_waits(agent: Agent, asked: Callable[[], Any], happens: Callable[[], None]) -> Any:
    """Something happens to the stack after somebody has asked, and before its turn has come."""
    async with agent.stacks["web"].busy:
        task = asyncio.create_task(asked())
        await turns()
        happens()
    return await task


async def test_buckets_that_a_person_moves_go_to_that_engine_and_stay(agent: Agent) -> None:
    stack, one = stack_of(agent)
    done = await agent.verbs.move_buckets("web", [1, 3], 1, None)
    assert done["moved"] == 2
    assert stack.table[1] == stack.table[3] == Owner(1, 0)
    assert one.pinned == {1: 1, 3: 1}
    assert agent.run.record.pinned["web"] == {"1": 1, "3": 1}


async def test_buckets_of_a_stack_that_was_removed_meanwhile_are_not_touched(agent: Agent) -> None:
    stack, _ = stack_of(agent)
    with pytest.raises(AgentError, match="has been removed"):
        await while_it_waits(agent, lambda: agent.verbs.move_buckets("web", [1], 1, None), lambda: agent.stacks.clear())
    assert not stack.tries


async def test_a_queue_is_moved_in_the_memory_that_its_engine_has_then(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, one = stack_of(agent)
    moved_in: list[object] = []
    monkeypatch.setattr(verbs, "call", lambda _function, fence, *_: moved_in.append(fence))
    fresh = PlayedEngine(1, stack.resource)
    fresh.fence = "that of the engine that was made again"
    await while_it_waits(agent, lambda: agent.verbs.move_queue("web", 1, 0, 0), lambda: one.engines.update({1: fresh}))
    assert moved_in == [fresh.fence]


async def test_a_queue_of_an_engine_that_has_gone_meanwhile_is_refused(agent: Agent) -> None:
    _, one = stack_of(agent)
    with pytest.raises(AgentError, match="not an active engine"):
        await while_it_waits(agent, lambda: agent.verbs.move_queue("web", 1, 0, 0), lambda: one.engines.clear())
