"""The agent as a whole: its parts work as long as it does."""

import asyncio
from pathlib import Path

import pytest

from packetstack_agent.agent import Agent
from packetstack_agent.node import RunDirectory


@pytest.mark.looptime
async def test_a_part_that_a_fault_ends_is_reported_and_begins_again(tmp_path: Path) -> None:
    agent, begun = Agent(RunDirectory(tmp_path)), 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise OSError("too many open files")
        await asyncio.sleep(3600)

    task = asyncio.create_task(agent.keep_up("routes", work))
    await asyncio.sleep(10)
    assert begun == 3
    [told] = agent.events
    assert (told["reason"], told["message"], told["count"]) == ("Failed", "routes: too many open files", 2)
    task.cancel()


async def test_a_part_that_has_nothing_to_do_ends(tmp_path: Path) -> None:
    agent = Agent(RunDirectory(tmp_path))

    async def work() -> None:
        """As without a packet filter."""

    async with asyncio.timeout(1):
        await agent.keep_up("packet filter", work)
    assert not agent.events
