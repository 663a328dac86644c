"""How a stack stands: what planner and conditions make of the facts, whoever found them."""

import dataclasses
import itertools
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from packetstack_core import hashing, shards, standing
from packetstack_core.assignment import NOBODY, Owner, State
from packetstack_core.planning import AssignBuckets, CreateEngine, DrainEngine, GivenUp, RemoveEngine
from packetstack_core.reading import parse
from packetstack_core.reasons import ConditionReason, why_not
from packetstack_core.resources import Spec
from packetstack_core.standing import EngineStanding, Finding, Pool, Standing
from packetstack_core.transitions import Action, EndSet, EngineSet, MakeSet, PromoteSet, Sets, SetState, SwitchBuckets

BUCKETS = 256


def spec(replicas: int = 2, **more: Any) -> Spec:
    endpoints = [{"address": "10.1.0.5", "port": 80}]
    listener = {"name": "web", "address": "192.0.2.10", "port": 80, "backends": {"endpoints": endpoints}}
    return parse(
        {
            "apiVersion": "packetstack.io/v1alpha1",
            "kind": "PacketStack",
            "metadata": {"name": "web"},
            "spec": {
                "replicas": replicas,
                "listeners": [listener],
                "snat": {"addresses": ["192.0.2.64/28"]},
                "flowTable": {"buckets": BUCKETS, "maxFlows": 1000},
                **more,
            },
        }
    ).spec


def engine(slot: int, **facts: Any) -> EngineStanding:
    """One that serves."""
    known = EngineStanding(
        slot=slot,
        name=f"web-{slot}",
        state=State.ACTIVE,
        ready=True,
        why_not_ready="",
        template="a",
        queues=4,
        flows=0,
        holds=0,
        load=0.0,
        down_since=None,
        leaving=False,
        evicted=False,
        set=None,
        configured=True,
    )
    return replace(known, **facts)


def pool(*engines: EngineStanding, **facts: Any) -> Pool:
    """Buckets lie in turn with the engines that serve."""
    able = [e.slot for e in engines if e.state is State.ACTIVE and not e.leaving]
    owners = [Owner(able[b % len(able)], b // len(able) % 4) if able else NOBODY for b in range(BUCKETS)]
    known = Pool(
        spec=spec(),
        template="a",
        engines=engines,
        owners=owners,
        moving=frozenset(),
        pinned=frozenset(),
        create_after=0.0,
        rebalanced=False,
        given_up=GivenUp(),
        sets=Sets(),
        shard=shards.FIRST,
        present_shard=shards.FIRST,
        keepers=(),
    )
    return replace(known, **facts)


def stands(*engines: EngineStanding, facts: dict[str, Any] | None = None, **circumstances: Any) -> Standing:
    """Of a stack that is at its goal, but for what is given."""
    known = Standing(
        pool=pool(*engines, **(facts or {})),
        planned=True,
        followed=True,
        remaining=0,
        obstacle=None,
        lost=None,
        graver=None,
        lesser=None,
        firewall=None,
        kept=0,
        connections=None,
        oldest=None,
    )
    return replace(known, **circumstances)


def actions(pool: Pool, now: float) -> list[Action]:
    return list(standing.plan(pool, now).actions)


def found(it: Standing, kind: str) -> Finding:
    (one,) = (c for c in standing.conditions(it) if c.type == kind)
    return one


def test_no_fact_has_a_default_so_that_none_is_forgotten() -> None:
    for facts in (EngineStanding, Pool, Standing):
        for field in dataclasses.fields(facts):
            assert field.default is field.default_factory is dataclasses.MISSING, field.name
            assert field.kw_only, field.name


# ---- what the planner sees -------------------------------------------------------------------------------------


def test_at_the_goal_nothing_is_planned() -> None:
    assert actions(pool(engine(1), engine(2)), 0.0) == []


def test_an_engine_whose_rings_may_hold_packets_is_not_removed() -> None:
    gone = engine(3, state=State.DRAINING)
    assert actions(pool(engine(1), engine(2), gone), 0.0) == [RemoveEngine(3)]
    assert actions(pool(engine(1), engine(2), replace(gone, holds=1)), 0.0) == []


def test_an_engine_that_leaves_is_replaced() -> None:
    planned = actions(pool(engine(1), engine(2, leaving=True)), 0.0)
    assert planned == [DrainEngine(2), CreateEngine("a", 4)]


def test_of_two_engines_the_one_with_less_load_goes_and_less_than_a_tenth_of_a_core_is_chance() -> None:
    one = {"facts": {"spec": spec(1)}}
    busy = stands(engine(1, load=0.2), engine(2, load=0.9), **one).pool
    assert actions(busy, 0.0)[0] == DrainEngine(1)
    alike = stands(engine(1, load=0.21, flows=9), engine(2, load=0.24, flows=1), **one).pool
    assert actions(alike, 0.0)[0] == DrainEngine(2)


def test_pinned_buckets_stay_unless_an_engine_has_to_go() -> None:
    uneven = [Owner(1, b % 4) for b in range(BUCKETS)]
    pinned = frozenset(range(BUCKETS))
    both = pool(engine(1), engine(2), owners=uneven, pinned=pinned)
    assert actions(both, 0.0) == []
    (moved,) = actions(replace(both, pinned=frozenset()), 0.0)
    assert isinstance(moved, AssignBuckets)
    planned = actions(replace(both, spec=spec(1), engines=[engine(1, flows=0), engine(2, flows=9)]), 0.0)
    assert any(isinstance(a, AssignBuckets) for a in planned)


def test_buckets_with_an_open_fence_wait() -> None:
    uneven = [Owner(1, b % 4) for b in range(BUCKETS)]
    assert actions(pool(engine(1), engine(2), owners=uneven, moving=frozenset(range(BUCKETS))), 0.0) == []


@pytest.mark.parametrize(("mode", "left_alone"), [("Auto", True), ("Advice", True), ("Off", False)])
def test_buckets_that_were_moved_by_load_stay_so_unless_that_is_switched_off(mode: str, left_alone: bool) -> None:
    uneven = [Owner(1 if b % 4 else 2, b // 4 % 4) for b in range(BUCKETS)]
    one = pool(engine(1), engine(2), owners=uneven, rebalanced=True, spec=spec(rebalance={"mode": mode}))
    assert (actions(one, 0.0) == []) == left_alone


def test_engines_are_made_from_the_template_of_the_pool_and_not_before_the_back_off_is_over() -> None:
    one = pool(engine(1), create_after=10.0, template="b")
    assert actions(one, 9.0) == []
    assert actions(one, 10.0) == [CreateEngine("b", 4)] * 2


def test_an_engine_that_has_not_served_for_too_long_is_given_up_and_remembered() -> None:
    one = pool(engine(1), engine(2, ready=False, down_since=100.0))
    before = standing.plan(one, 100.0)
    assert before.actions == ()
    assert before.wake_at == 100.0 + before.patience
    after = standing.plan(one, before.wake_at)
    assert DrainEngine(2) in after.actions
    assert (after.given_up.slots, after.wake_at) == (frozenset({2}), None)
    again = standing.plan(replace(one, given_up=after.given_up), before.wake_at + 1.0)
    assert again.patience == 2 * before.patience


# ---- conditions ------------------------------------------------------------------------------------------------


def test_a_stack_at_its_goal_is_available_settled_and_as_expected() -> None:
    it = stands(engine(1), engine(2))
    assert standing.settled(it)
    assert {c.type: (c.status, str(c.reason)) for c in standing.conditions(it)} == {
        "Available": ("True", "MinimumEnginesAvailable"),
        "Progressing": ("False", "Settled"),
        "CapacityAvailable": ("True", "EnoughCapacity"),
        "Degraded": ("False", "AsExpected"),
    }


@pytest.mark.parametrize(
    "it",
    [
        stands(engine(1), engine(2), planned=False),
        stands(engine(1), engine(2), followed=False),
        stands(engine(1), engine(2), remaining=1),
        stands(engine(1), engine(2, ready=False)),
        stands(engine(1), engine(2, template="old")),
        stands(engine(1)),
        stands(engine(1), engine(2), engine(3)),
        stands(engine(1), engine(2, leaving=True)),
    ],
)
def test_a_stack_is_settled_only_when_the_pool_is_wanted_and_packets_see_it(it: Standing) -> None:
    assert not standing.settled(it)
    assert found(it, "Progressing").value


def test_without_replicas_nobody_has_to_follow_and_the_stack_is_not_available() -> None:
    it = stands(facts={"spec": spec(0)}, followed=False)
    assert standing.settled(it)
    assert found(it, "Available") == Finding("Available", False, ConditionReason.NO_REPLICAS)


def test_what_progresses_is_said() -> None:
    old = stands(engine(1), engine(2, template="old"))
    assert found(old, "Progressing").reason is ConditionReason.ROLLING_OUT
    assert found(old, "Progressing").message == "1 of 2 engines have the present template"
    new = stands(engine(1), engine(2, state=State.STARTING))
    assert found(new, "Progressing").message == "1 of 2 engines serve"
    drains = stands(engine(1), engine(2), engine(3, state=State.DRAINING), remaining=1)
    assert found(drains, "Progressing").reason is ConditionReason.HANDOVER_IN_PROGRESS


def test_a_paused_stack_does_not_progress() -> None:
    it = stands(engine(1), facts={"spec": spec(paused=True)})
    assert (found(it, "Progressing").value, found(it, "Progressing").reason) == (False, ConditionReason.PAUSED)


def test_an_engine_without_a_datapath_is_named_with_the_buckets_that_nobody_serves() -> None:
    it = found(stands(engine(1), engine(2, ready=False)), "Degraded")
    assert (it.value, it.reason) == (True, ConditionReason.ENGINE_NOT_READY)
    assert it.message == "web-2: no datapath is attached; 128 of 256 buckets get no service until one is"
    why = found(stands(engine(1), engine(2, ready=False, why_not_ready="its pod ended")), "Degraded")
    assert why.message.startswith("web-2: its pod ended; 128 of 256 buckets")


def test_of_many_silent_engines_five_are_named() -> None:
    it = stands(*(engine(i, ready=False) for i in range(1, 8)), facts={"spec": spec(7)})
    assert found(it, "Degraded").message.startswith("web-1, web-2, web-3, web-4, web-5, ...: ")


def test_the_gravest_problem_is_shown() -> None:
    grave, less = (ConditionReason.NO_AGENT, "gone"), (ConditionReason.CRD_OUTDATED, "old")
    out = engine(3, leaving=True, evicted=True)
    sick = engine(2, ready=False)
    order = [
        (stands(engine(1), sick, out, graver=grave, lesser=less), "NoAgent"),
        (stands(engine(1), sick, out, lesser=less), "EngineNotReady"),
        (stands(engine(1), engine(2), out, lesser=less), "EngineEvicted"),
        (stands(engine(1), engine(2), lesser=less), "CRDOutdated"),
        (stands(engine(1), engine(2)), "AsExpected"),
    ]
    assert [str(found(it, "Degraded").reason) for it, _ in order] == [reason for _, reason in order]


def test_what_prevents_another_engine_is_shown() -> None:
    it = stands(engine(1), obstacle=(ConditionReason.NO_FREE_VF, "none left"))
    assert found(it, "CapacityAvailable") == Finding(
        "CapacityAvailable", False, ConditionReason.NO_FREE_VF, "none left"
    )


@pytest.mark.parametrize(
    ("reason", "status"),
    [("NothingInTheWay", "True"), ("PacketsDropped", "False"), ("MayDropPackets", "Unknown")],
)
def test_the_packet_filter_is_open_closed_or_unclear(reason: str, status: str) -> None:
    it = stands(engine(1), engine(2), firewall=(ConditionReason(reason), "said"))
    assert found(it, "FirewallOpen").status == status
    assert not any(c.type == "FirewallOpen" for c in standing.conditions(replace(it, firewall=None)))


def test_every_reason_that_is_given_is_one_of_its_condition() -> None:
    engines = [
        engine(1),
        engine(2, ready=False),
        engine(2, state=State.DRAINING),
        engine(2, leaving=True, evicted=True),
    ]
    flags = (True, False)
    for one, replicas, paused, followed in itertools.product(engines, (0, 1, 2), flags, flags):
        it = stands(one, facts={"spec": spec(replicas, paused=paused)}, followed=followed)
        for c in standing.conditions(it):
            assert not why_not(c.type, c.status, c.reason)


# ---- what the resource comes to --------------------------------------------------------------------------------


def test_the_capacity_is_that_of_the_ports_that_each_bucket_has() -> None:
    listeners = [{"name": "a", "address": "2001:db8::1", "port": 80, "backends": {"service": {"name": "a", "port": 1}}}]
    both = spec(listeners=listeners, snat={"addresses": ["192.0.2.64/28", "2001:db8::40/126"]})
    four, six = ((ip_address(a), 80) for a in ("10.1.0.5", "2001:db8:1::5"))
    assert standing.capacity(both, [])["pairs"] == 0
    assert standing.capacity(both, [four, four])["pairs"] == 16
    found = standing.capacity(both, [four, six])
    assert (found["pairs"], found["maxFlows"]) == (20, 1000)
    assert found["flows"] == 20 * sum(len(hashing.snat_ports(b, BUCKETS)) for b in range(BUCKETS))


def test_what_is_not_built_is_refused_everywhere_and_what_needs_kubernetes_without_it() -> None:
    everywhere: list[tuple[dict[str, Any], str]] = [
        ({"engine": {"mode": "DPDK"}}, 'spec.engine.mode: "DPDK" is not supported yet; use "AFXDP"'),
        (
            {"handover": {"strategy": "Mirror", "onDeadline": "Transfer"}},
            'spec.handover.onDeadline: "Transfer" is not supported yet; use "Keep" or "Reset"',
        ),
    ]
    for change, text in everywhere:
        assert standing.unsupported(spec(**change), kubernetes=True) == text
        assert standing.unsupported(spec(**change), kubernetes=False) == text
    sized = spec(autoscaling={"maxReplicas": 2, "vertical": {"maxCores": 2}})
    assert standing.unsupported(sized, kubernetes=True) == ""
    assert standing.unsupported(sized, kubernetes=False) == ""
    service = {"name": "web", "address": "192.0.2.10", "port": 80, "backends": {"service": {"name": "s", "port": 1}}}
    interface = {"interface": {"attachment": {"networkAttachmentDefinition": "a"}}}
    for alone, field in (
        ({"listeners": [service]}, "spec.listeners[0].backends"),
        ({"engine": interface}, "spec.engine"),
    ):
        assert standing.unsupported(spec(**alone), kubernetes=True) == ""
        assert standing.unsupported(spec(**alone), kubernetes=False).startswith(field)


def test_a_stack_whose_packets_are_lost_on_the_node_is_not_available_whatever_its_engines_do() -> None:
    off = ConditionReason.FORWARDING_OFF, "net.ipv4.ip_forward: is 0"
    it = stands(engine(1), engine(2), lost=off)
    for kind, value in (("Available", False), ("Degraded", True)):
        assert (found(it, kind).value, found(it, kind).reason, found(it, kind).message) == (value, *off)
    assert found(stands(lost=off), "Available").reason is ConditionReason.ENGINES_STARTING


# ---- sets ------------------------------------------------------------------------------------------------------

MIRROR = {"strategy": "Mirror", "deadlineSeconds": 100}


def set_of(number: int, state: SetState, replicas: int = 2, **facts: Any) -> EngineSet:
    return replace(EngineSet(number, state, replicas, "a", 4, 1000.0), **facts)


def two_sets(first: SetState, second: SetState, replicas: int = 2, **handover: Any) -> Standing:
    """Set 1 with engines 1 and 2, set 2 with 3 and 4. Buckets are those of the one that is Current."""
    members = {1: 1, 2: 1, 3: 2, 4: 2}
    engines = [engine(slot, set=number, template="ab"[number - 1]) for slot, number in members.items()]
    new = set_of(2, second, template="b")
    return stands(
        facts={
            "engines": engines,
            "spec": spec(replicas, handover=MIRROR | handover),
            "template": "b",
            "owners": [Owner((1, 3)[first is SetState.DRAINING] + b % 2, b // 2 % 4) for b in range(BUCKETS)],
            "keepers": [Owner(1 + b % 2, 0) if first is SetState.DRAINING else None for b in range(BUCKETS)],
            "sets": Sets((set_of(1, first), new), 2),
        },
        kept=BUCKETS if first is SetState.DRAINING else 0,
        connections=600 if first is SetState.DRAINING else None,
        oldest=900.0 if first is SetState.DRAINING else None,
    )


def activating(**more: Any) -> Standing:
    return two_sets(SetState.CURRENT, SetState.ACTIVATING, **more)


def draining(**more: Any) -> Standing:
    return two_sets(SetState.DRAINING, SetState.CURRENT, **more)


def changed(it: Standing, **facts: Any) -> Standing:
    return replace(it, pool=replace(it.pool, **facts))


def test_with_mirror_what_is_wanted_is_another_set() -> None:
    one = pool(engine(1), engine(2), sets=Sets((set_of(1, SetState.CURRENT),), 1), spec=spec(3, handover=MIRROR))
    (made,) = actions(one, 5.0)
    assert made == MakeSet(EngineSet(2, SetState.ACTIVATING, 3, "a", 4, 5.0))
    assert actions(replace(one, spec=spec(2, handover=MIRROR)), 5.0) == []


def test_a_set_is_promoted_when_each_engine_is_configured_and_then_switched_to_and_persons_buckets_too() -> None:
    it = activating()
    assert actions(it.pool, 0.0) == [PromoteSet(2)]
    late = [replace(e, configured=e.slot != 4) for e in it.pool.engines]
    assert actions(replace(it.pool, engines=late), 0.0) == []
    promoted = replace(it.pool, sets=it.pool.sets.after(PromoteSet(2), 0.0), pinned=frozenset(range(9)))
    (switch,) = actions(promoted, 0.0)
    assert isinstance(switch, SwitchBuckets)
    assert len(switch.moves) == BUCKETS


def test_a_plan_wakes_at_the_deadline_of_a_set_that_drains() -> None:
    it = draining(onDeadline="Reset").pool
    before = standing.plan(it, 1099.0)
    assert (before.actions, before.wake_at) == ((), 1100.0)
    assert standing.plan(it, 1100.0).actions == (EndSet(1, "Reset"),)
    assert standing.plan(it, 1100.0).wake_at is None
    assert standing.plan(draining().pool, 1099.0).wake_at is None


def test_replicas_are_the_engines_that_take_new_connections() -> None:
    for it, slots in ((activating(), [1, 2]), (draining(), [3, 4])):
        assert [e.slot for e in standing.staying(it.pool)] == [e.slot for e in standing.serving(it.pool)] == slots
    assert standing.updated(activating().pool) == []
    assert len(standing.updated(draining().pool)) == 2


def test_what_each_set_has_is_shown() -> None:
    first, second = standing.sets(draining())
    assert (first.set.id, first.engines, first.ready, first.buckets, first.kept) == (1, 2, 2, 0, BUCKETS)
    assert (first.connections, first.oldest) == (600, 900.0)
    assert (second.set.id, second.engines, second.ready, second.buckets, second.kept) == (2, 2, 2, BUCKETS, 0)
    assert (second.connections, second.oldest) == (0, None)
    assert standing.sets(stands(engine(1))) == []


def test_how_far_a_transition_is_is_said() -> None:
    it = activating()
    late = changed(it, engines=[replace(e, configured=e.slot != 4) for e in it.pool.engines])
    assert found(late, "Progressing") == Finding(
        "Progressing", True, ConditionReason.SET_ACTIVATING, "set 2: 1 of 2 engines ready; set 1 serves"
    )
    half = [Owner(1, 0) if b < 100 else Owner(3, 0) for b in range(BUCKETS)]
    assert found(changed(draining(), owners=half), "Progressing") == Finding(
        "Progressing",
        True,
        ConditionReason.SET_SWITCHING,
        "set 2 takes over: at least 64 buckets of 256 are still those of set 1",
    )
    assert found(draining(), "Progressing") == Finding(
        "Progressing",
        True,
        ConditionReason.SET_DRAINING,
        "set 1 keeps at least 512 connections in at least 256 buckets of 256",
    )


def test_a_stack_is_ready_when_only_old_connections_are_left_and_settled_when_they_have_ended() -> None:
    it = draining()
    assert standing.ready(it)
    assert not standing.settled(it)
    assert not standing.ready(activating())
    assert not standing.ready(changed(it, owners=[Owner(1, 0), *it.pool.owners[1:]])), "a bucket is to be switched"
    assert not standing.ready(changed(it, spec=spec(3, handover=MIRROR)))
    rest = [e for e in it.pool.engines if e.set == 2]
    done = changed(it, engines=rest, keepers=(), sets=Sets(it.pool.sets.known[1:], 2))
    assert standing.settled(done)


def test_what_is_held_names_the_set_that_drains_and_what_ends_it() -> None:
    assert found(draining(), "ScalingHeld") == Finding("ScalingHeld", False, ConditionReason.NOTHING_HELD)
    assert not found(draining(replicas=5), "ScalingHeld").value, "more of the same are not held"
    it = found(draining(replicas=1), "ScalingHeld")
    assert (it.value, it.reason) == (True, ConditionReason.SET_DRAINING)
    assert it.message == (
        "1 engine waits until older connections have ended: set 1 keeps at least 512 connections in at least 256 buckets "
        "of 256; to end them: spec.handover.onDeadline Reset or Transfer, with policy Hurry"
    )
    other = found(changed(draining(onDeadline="Reset"), template="c"), "ScalingHeld").message
    assert other.startswith("2 engines of another template wait until older connections have ended: set 1 keeps")
    assert other.endswith("100 s after the switch they are ended, by onDeadline Reset; at once with policy Hurry")
    hurry = found(draining(replicas=1, onDeadline="Transfer", policy="Hurry"), "ScalingHeld").message
    assert hurry.endswith("they are being ended, by onDeadline Transfer")


def test_a_stack_that_never_had_mirror_has_no_such_condition() -> None:
    assert not any(c.type == "ScalingHeld" for c in standing.conditions(stands(engine(1), engine(2))))
    new = stands(facts={"spec": spec(handover=MIRROR)})
    assert found(new, "ScalingHeld").value is False


def test_of_a_keeper_that_does_not_serve_the_older_connections_are_named() -> None:
    it = draining()
    sick = changed(it, engines=[replace(e, ready=e.slot != 1) for e in it.pool.engines])
    assert found(sick, "Degraded").message == (
        "web-1: no datapath is attached; 0 of 256 buckets get no service until one is, nor do the older connections of 128"
    )
    idle = activating()
    sick = changed(idle, engines=[replace(e, ready=e.slot != 3) for e in idle.pool.engines])
    assert not found(sick, "Degraded").value, "nobody needs it yet"


def test_every_reason_of_a_transition_is_one_of_its_condition() -> None:
    for it in (activating(), draining(), draining(replicas=1)):
        for c in standing.conditions(it):
            assert not why_not(c.type, c.status, c.reason)
