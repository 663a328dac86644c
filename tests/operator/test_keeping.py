"""The control loop of a stack, in virtual time: when it looks, what it writes, and what refusals and lost answers do."""

import asyncio

import pytest
from tests.operator.memory_api import operated

from packetstack_operator import keeping, showing
from packetstack_operator.keeping import RECHECK_SECONDS, TICK_SECONDS

pytestmark = pytest.mark.looptime


@pytest.fixture(autouse=True)
def events(monkeypatch):
    """Events of stacks, as they are posted."""
    posted = []
    monkeypatch.setattr(showing.kopf, "event", lambda _body, **event: posted.append(event))
    return posted


async def test_a_stack_gets_its_engines_and_then_rests():
    async with operated(3) as it:
        await it.run(20)
        it.model.check_goal()
        before, turns = len(it.api.asked), it.turns()
        await asyncio.sleep(200)
        assert len(it.api.asked) == before
        assert it.turns() - turns == pytest.approx(200 / TICK_SECONDS, abs=1)


async def test_a_change_is_acted_on_after_the_pause_that_gathers_bursts():
    async with operated(1) as it:
        await it.run(20)
        before, began = len(it.api.asked), asyncio.get_running_loop().time()
        it.model.set_spec(replicas=2)
        it.api.bring()
        await asyncio.sleep(0.2)
        times = [t for t, _ in it.api.asked[before:]]
        assert times[0] - began <= keeping.SETTLE_SECONDS


async def test_a_stack_at_rest_is_decided_about_again_only_after_minutes(monkeypatch):
    decided = []
    decide = keeping.deciding.decide
    monkeypatch.setattr(keeping.deciding, "decide", lambda *a: decided.append(1) or decide(*a))
    async with operated(1) as it:
        await it.run(20)
        decided.clear()
        await asyncio.sleep(RECHECK_SECONDS - 30)
        assert decided == []
        await asyncio.sleep(60)
        assert len(decided) == 1


async def test_a_conflict_is_no_error_and_is_tried_again_soon():
    async with operated(1) as it:
        await it.run(20)
        it.api.lags = True
        it.model.set_spec(replicas=2)
        it.model.change(("FlowTable", "edge"), lambda b: b["metadata"].update(labels={}))
        it.api.lags = False
        it.api.bring()
        await it.run(5)
        it.model.check_goal()
        assert it.errors("Refused") == 0


async def test_a_stack_that_is_deleted_is_let_go_by_its_node_first():
    async with operated(2) as it:
        await it.run(20)
        release = asyncio.create_task(it.delete())
        await it.run(5)
        await release
        assert set(it.model.words) == {0}
        assert it.model.attached == {}
        assert it.model.of("Pod") == []


async def test_a_deletion_does_not_wait_for_ever_for_an_agent(caplog):
    async with operated(1) as it:
        await it.run(20)
        assert await it.delete() == pytest.approx(keeping.RELEASE_SECONDS, abs=0.1)
        assert "has not answered" in caplog.text


async def test_a_deletion_that_leaves_orphans_leaves_the_engines_as_they_are():
    async with operated(1) as it:
        await it.run(20)
        before = len(it.api.asked)
        await it.delete(finalizers=["orphan"])
        assert len(it.api.asked) == before
