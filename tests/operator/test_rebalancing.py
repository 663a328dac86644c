"""The operator's rebalancers: when agents are asked, what is proposed and told. In virtual time, with played loads."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from tests.operator.model import BUCKETS, Model

from packetstack_core.load import EngineLoad, QueueLoad, StackLoad
from packetstack_operator import rebalancing
from packetstack_operator.loads import LoadError
from packetstack_operator.rebalancing import IDLE_SECONDS, Rebalancers

pytestmark = pytest.mark.looptime
KEY = ("shop", "edge")


class Loads:
    """`shares`: share of a core by bucket."""

    def __init__(self, model, shares):
        self.model, self.shares = model, shares
        self.asked = []
        self.away = False

    async def ask(self, key, world, *, buckets=False, age=0.0):
        self.asked.append(buckets)
        if self.away:
            raise LoadError("away")

    def load(self, key, seconds, *, buckets=False):
        owners = self.model.table().spec.owner_ids()
        engines = []
        for entry in self.model.table().spec.engines:
            busy = sum(x for b, x in self.shares.items() if owners[b].slot == entry.id)
            queue = QueueLoad(0, busy, busy * 1000, 0)
            engines.append(
                EngineLoad(
                    entry.id, entry.name, entry.state, True, 5.0, (busy,), (queue,), 0, 0.0, busy * 1000, 0.0, 0.0
                )
            )
        rates = tuple(1000 * self.shares.get(b, 0.0) for b in range(BUCKETS)) if buckets else ()
        return StackLoad(time.time(), tuple(engines), rates)


@pytest.fixture
def played(monkeypatch):
    """-> a function that starts a rebalancer of a settled stack."""
    events = []
    monkeypatch.setattr(
        rebalancing.Shown, "show", lambda _self, _body, told: events.extend((e.reason, e.message) for e in told)
    )

    def start(shares, **spec):
        model = Model(2, engine={"cores": 1, "queuesPerCore": 1}, **spec)
        model.settle()
        loads, woken = Loads(model, shares), []
        metrics = SimpleNamespace(errors=SimpleNamespace(labels=lambda _: pytest.fail("an internal error")))
        rebalancers = Rebalancers(loads, metrics, woken.append)

        def look():
            model.proposal = rebalancers.proposal(KEY)
            return model.world()

        rebalancers.follow(KEY, model.stack, None, look)
        return SimpleNamespace(model=model, loads=loads, rebalancers=rebalancers, woken=woken, events=events, look=look)

    return start


def on(model, number):
    return [b for b, o in enumerate(model.table().spec.owner_ids()) if o.slot == number]


async def test_moves_are_proposed_and_once_written_not_again(played):
    p = played({})
    one, two = on(p.model, 1), on(p.model, 2)
    p.loads.shares = dict.fromkeys(one[:5], 0.15) | {two[0]: 0.15}
    await asyncio.sleep(2 * IDLE_SECONDS)
    proposal = p.rebalancers.proposal(KEY)
    assert p.woken == [KEY]
    assert {m.bucket for m in proposal.moves} <= set(one)
    assert len(proposal.moves) == 2
    p.look()
    p.model.operator()
    p.model.settle()
    await asyncio.sleep(60)
    assert p.rebalancers.proposal(KEY) is None
    assert len(p.model.events) == len([e for e in p.model.events if e.reason != "Rebalanced"]) + 1
    p.rebalancers.forget(KEY)


async def test_buckets_rest_only_when_they_were_moved_whatever_else_changes_the_table(played):
    p = played({})
    one, two = on(p.model, 1), on(p.model, 2)
    p.loads.shares = dict.fromkeys(one[:5], 0.15) | {two[0]: 0.15}
    await asyncio.sleep(2 * IDLE_SECONDS)
    proposed = {m.bucket for m in p.rebalancers.proposal(KEY).moves}
    for _ in range(3):  # backends come and go faster than the operator writes moves
        p.model.change(("FlowTable", "edge"), lambda b: b["spec"].update(lastEngine=b["spec"]["lastEngine"] + 1))
        p.model.agent()
        await asyncio.sleep(5)
    assert {m.bucket for m in p.rebalancers.proposal(KEY).moves} == proposed
    p.rebalancers.forget(KEY)


async def test_a_stack_at_rest_is_asked_seldom_and_never_for_its_buckets(played):
    p = played({})
    await asyncio.sleep(600)
    assert 0 < len(p.loads.asked) <= 600 / IDLE_SECONDS + 1
    assert not any(p.loads.asked)
    assert p.woken == []


async def test_a_busy_stack_that_is_even_is_asked_often_and_never_for_its_buckets(played):
    p = played({})
    one, two = on(p.model, 1), on(p.model, 2)
    p.loads.shares = dict.fromkeys([*one[:4], *two[:4]], 0.15)
    await asyncio.sleep(300)
    assert len(p.loads.asked) > 50
    assert not any(p.loads.asked)


async def test_a_stack_with_mode_off_or_one_core_is_not_asked(played):
    off = played({}, rebalance={"mode": "Off"})
    await asyncio.sleep(60)
    assert off.loads.asked == []
    one = played({})
    one.model.set_spec(replicas=1)
    one.model.settle()
    await asyncio.sleep(60)
    assert one.loads.asked == []
    one.rebalancers.follow(KEY, off.model.stack, None, one.look)
    assert one.rebalancers.proposal(KEY) is None


async def test_a_paused_stack_is_not_asked_and_nobody_is_woken(played):
    p = played({}, paused=True)
    p.loads.shares = dict.fromkeys(on(p.model, 1)[:5], 0.15)
    await asyncio.sleep(60)
    assert p.loads.asked == []
    assert p.woken == []


async def test_advice_is_told_now_and_then_and_nothing_is_proposed(played):
    p = played({}, rebalance={"mode": "Advice"})
    one = on(p.model, 1)
    p.loads.shares = dict.fromkeys(one[:5], 0.15)
    await asyncio.sleep(150)
    assert [reason for reason, _ in p.events] == ["RebalanceAdvice"] * 3
    assert p.rebalancers.proposal(KEY) is None


async def test_an_elephant_is_proposed_as_one_and_told_of_once(played):
    p = played({})
    one = on(p.model, 1)
    p.loads.shares = {one[0]: 0.95}
    await asyncio.sleep(120)
    assert p.rebalancers.proposal(KEY).elephants == (one[0],)
    assert [reason for reason, _ in p.events] == ["Elephant"]
    woken, p.loads.shares = len(p.woken), {}
    await asyncio.sleep(2 * IDLE_SECONDS)
    assert p.rebalancers.proposal(KEY).elephants == (one[0],), "a quiet moment does not end it"
    assert len(p.woken) == woken
    await asyncio.sleep(120)
    assert p.rebalancers.proposal(KEY) is None


async def test_while_no_agent_answers_nothing_is_proposed(played):
    p = played({})
    p.loads.shares = dict.fromkeys(on(p.model, 1)[:5], 0.15)
    p.loads.away = True
    await asyncio.sleep(60)
    assert p.rebalancers.proposal(KEY) is None
    assert p.woken == []
