"""The planner against a world in which actions fail, engines die and wishes change at any time."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from packetstack_core.assignment import NOBODY, EngineShare, Owner, State, assign, moved
from packetstack_core.planning import (
    ActivateEngine,
    AssignBuckets,
    CreateEngine,
    Desired,
    DrainEngine,
    Engine,
    GivenUp,
    Observed,
    RemoveEngine,
    give_up_at,
    plan,
)
from packetstack_core.reading import parse

BUCKETS = 64


class World:
    """Carries out actions as an agent would. Refuses what may never be asked for."""

    def __init__(self, buckets=BUCKETS):
        self.engines = {}
        self.owners = [None] * buckets
        self.next_slot = 1
        self.engine_moves = 0

    def observed(self, moving=()):
        return Observed(
            tuple(self.engines.values()),
            tuple(self.owners),
            frozenset(moving),
            create_after=0.0,
            rebalanced=False,
            given_up=GivenUp(),
        )

    def do(self, action):
        match action:
            case CreateEngine(template, queues):
                self.engines[self.next_slot] = Engine(
                    self.next_slot,
                    State.PENDING,
                    False,
                    template,
                    queues,
                    flows=0,
                    leaving=False,
                    holds=0,
                    load=0.0,
                    down_since=None,
                )
                self.next_slot += 1
            case ActivateEngine(slot):
                assert self.engines[slot].state in (State.STARTING, State.DRAINING)
                self.change(slot, state=State.ACTIVE)
            case DrainEngine(slot):
                assert self.engines[slot].state is not State.FAILED
                self.change(slot, state=State.DRAINING)
            case RemoveEngine(slot):
                assert all(o is None or o.slot != slot for o in self.owners), "never removes an owner"
                mute = self.engines[slot].down_since is not None
                assert mute or not self.engines[slot].holds, "never removes an engine that still holds a bucket"
                del self.engines[slot]
            case AssignBuckets(moves):
                for move in moves:
                    old = self.owners[move.bucket]
                    assert move.to != old
                    if move.to == NOBODY:
                        assert old not in (None, NOBODY)
                    else:
                        to = self.engines[move.to.slot]
                        assert to.ready, "never gives a bucket to an engine that is not ready"
                        assert to.state is State.ACTIVE
                        assert move.to.queue < to.queues
                    self.engine_moves += old is None or old.slot != move.to.slot
                    self.owners[move.bucket] = move.to

    def change(self, slot, **fields):
        self.engines[slot] = replace(self.engines[slot], **fields)

    def come_up(self):
        for slot, engine in list(self.engines.items()):
            if engine.state is State.PENDING:
                self.change(slot, state=State.STARTING)
            elif engine.state is not State.FAILED:
                self.change(slot, ready=True)

    def settle(self, desired, most=400):
        """Plans and acts until nothing is left to do. -> rounds"""
        for turn in range(most):
            for slot in list(self.engines):
                self.change(slot, holds=0)
            actions = plan(desired, self.observed(), now=0.0)
            for action in actions:
                self.do(action)
            if not actions and all(e.ready for e in self.engines.values()):
                return turn
            self.come_up()
        raise AssertionError(f"no rest after {most} rounds: {self.engines} {plan(desired, self.observed(), 0.0)}")

    def check_goal(self, desired):
        assert len(self.engines) == desired.replicas
        assert all(e.state is State.ACTIVE and e.template == desired.template for e in self.engines.values())
        owned = Counter(o.slot if o else 0 for o in self.owners)
        if desired.replicas:
            assert set(owned) == set(self.engines)
            assert max(owned.values()) - min(owned.values()) <= 1
        else:
            assert set(owned) == {0}


def desired(replicas, template="a", queues=2, **limits):
    return Desired(replicas, template, queues, **limits)


def started(replicas, template="a"):
    world = World()
    world.settle(desired(replicas, template))
    world.engine_moves = 0
    return world


def kinds(actions):
    return Counter(type(a).__name__ for a in actions)


def test_a_new_stack_gets_its_engines_and_then_its_buckets():
    world = World()
    assert kinds(plan(desired(3), world.observed(), 0)) == {"CreateEngine": 3}
    world.settle(desired(3))
    world.check_goal(desired(3))


def test_at_the_goal_there_is_nothing_to_do():
    assert plan(desired(3), started(3).observed(), 0) == []


@pytest.mark.parametrize("wish", [desired(0), desired(1), desired(5), desired(3, "b")])
def test_while_paused_nothing_is_done(wish):
    assert plan(replace(wish, paused=True), started(3).observed(), 0) == []


@pytest.mark.parametrize("trouble", [{"leaving": True}, {"state": State.FAILED, "ready": False}, None])
@pytest.mark.parametrize("replicas", [0, 3])
def test_while_paused_buckets_that_nobody_will_serve_go_to_those_that_serve_and_no_others_move(trouble, replicas):
    world = started(3)
    before = list(world.owners)
    if trouble is None:
        del world.engines[1]
    else:
        world.change(1, **trouble)
    world.settle(desired(replicas, paused=True))
    assert set(world.engines) == {2, 3}
    owned = Counter(o.slot for o in world.owners)
    assert set(owned) == {2, 3}
    assert max(owned.values()) - min(owned.values()) <= 1
    assert all(a == b for a, b in zip(before, world.owners, strict=True) if a.slot != 1)


def test_while_paused_an_engine_that_is_leaving_keeps_its_buckets_if_no_other_serves():
    world = started(1)
    world.change(1, leaving=True)
    assert kinds(plan(desired(1, paused=True), world.observed(), 0)) == {"DrainEngine": 1}
    world.change(1, state=State.DRAINING)
    assert plan(desired(1, paused=True), world.observed(), 0) == []


def test_before_the_back_off_is_over_no_engine_is_created():
    observed = replace(started(1).observed(), create_after=10.0)
    assert plan(desired(2), observed, now=9.9) == []
    assert kinds(plan(desired(2), observed, now=10.0)) == {"CreateEngine": 1}


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 3), (3, 2), (8, 7)])
def test_a_resize_moves_the_fewest_buckets(before, after):
    world = started(before)
    current = list(world.owners)
    world.settle(desired(after))
    world.check_goal(desired(after))
    slots = list(world.engines)
    best = assign(current, [EngineShare(slot, 2) for slot in slots])
    after_best = moved(current, best)
    least = sum(a.slot != b.slot for a, b in zip(current, after_best, strict=True))
    assert world.engine_moves == least


def test_an_engine_that_never_served_is_the_first_to_go():
    world = started(2)
    world.do(CreateEngine("a", 2))
    world.come_up()
    assert plan(desired(2), world.observed(), 0) == [RemoveEngine(3)]


def test_of_active_engines_the_one_with_the_fewest_flows_goes():
    world = started(3)
    for slot, flows in ((1, 50), (2, 10), (3, 40)):
        world.change(slot, flows=flows)
    actions = plan(desired(2), world.observed(), 0)
    assert actions[0] == DrainEngine(2)
    assert all(world.owners[m.bucket].slot == 2 for m in actions[1].moves), "only its own buckets move"


def test_of_active_engines_the_one_with_the_least_load_goes_whatever_flows_it_has():
    world = started(3)
    for slot, load, flows in ((1, 0.7, 10), (2, 0.2, 90), (3, 0.5, 20)):
        world.change(slot, load=load, flows=flows)
    actions = plan(desired(2), world.observed(), 0)
    assert DrainEngine(2) in actions
    assert sum(isinstance(a, DrainEngine) for a in actions) == 1


def test_buckets_that_were_moved_by_load_stay_until_the_mark_is_gone():
    world = started(2)
    owners = world.owners
    world.owners = [Owner(1, b % 2) if b < 48 else owner for b, owner in enumerate(owners)]
    observed = world.observed()
    assert plan(desired(2), replace(observed, rebalanced=True), 0) == []
    assert plan(desired(2), observed, 0), "even numbers again"


def test_a_draining_engine_is_taken_back_when_it_is_wanted_again():
    world = started(2)
    world.do(DrainEngine(2))
    assert plan(desired(2), world.observed(), 0) == [ActivateEngine(2)]


def test_an_engine_that_is_not_ready_keeps_its_buckets_and_gets_none():
    world = started(3)
    before = list(world.owners)
    world.change(2, ready=False)
    assert plan(desired(3), world.observed(), 0) == []
    for action in plan(desired(4), world.observed(), 0):
        world.do(action)
    world.change(4, state=State.STARTING, ready=True)
    for action in plan(desired(4), world.observed(), 0):
        world.do(action)
    assert [b for b, o in enumerate(before) if o.slot == 2] == [b for b, o in enumerate(world.owners) if o.slot == 2]


def test_a_failed_engine_is_replaced_and_removed_when_it_owns_nothing():
    world = started(2)
    world.change(2, state=State.FAILED, ready=False)
    actions = plan(desired(2), world.observed(), 0)
    assert kinds(actions) == {"CreateEngine": 1, "AssignBuckets": 1}
    for action in actions:
        world.do(action)
    assert RemoveEngine(2) in plan(desired(2), world.observed(), 0)


def test_an_engine_that_is_leaving_hands_over_to_another_that_is_made_for_it():
    world = started(1)
    world.change(1, leaving=True)
    assert kinds(plan(desired(1), world.observed(), 0)) == {"DrainEngine": 1, "CreateEngine": 1}
    world.settle(desired(1))
    world.check_goal(desired(1))
    assert 1 not in world.engines


def test_an_engine_that_is_leaving_is_not_taken_back():
    world = started(2)
    world.do(DrainEngine(2))
    world.change(2, leaving=True)
    assert kinds(plan(desired(2), world.observed(), 0)) == {"CreateEngine": 1, "AssignBuckets": 1}


def test_an_engine_is_kept_while_buckets_are_still_on_their_way_from_it():
    world = started(2)
    world.do(DrainEngine(2))
    world.change(2, holds=5)
    for action in plan(desired(1), world.observed(), 0):
        world.do(action)
    assert plan(desired(1), world.observed(), 0) == []
    world.change(2, holds=0)
    assert plan(desired(1), world.observed(), 0) == [RemoveEngine(2)]


def test_buckets_with_an_open_fence_are_left_alone():
    world = started(1)
    actions = plan(desired(1), world.observed(), 0)
    world.change(1, state=State.DRAINING)
    world.do(CreateEngine("a", 2))
    world.change(2, state=State.ACTIVE, ready=True)
    world.change(1, template="b")
    actions = plan(desired(1), world.observed(moving=range(60)), 0)
    (moves,) = [a.moves for a in actions if isinstance(a, AssignBuckets)]
    assert {m.bucket for m in moves} == {60, 61, 62, 63}


def test_an_open_fence_does_not_make_the_rest_move_too_far():
    world = started(1)
    world.do(CreateEngine("a", 2))
    world.change(2, state=State.ACTIVE, ready=True)
    (first,) = plan(desired(2), world.observed(), 0)
    for move in first.moves[:16]:
        world.owners[move.bucket] = move.to
    rest = plan(desired(2), world.observed(moving=[m.bucket for m in first.moves[:16]]), 0)
    assert len(rest[0].moves) <= 16 + 1


def test_zero_replicas_take_the_owners_first_and_then_the_engines():
    world = started(2)
    actions = plan(desired(0), world.observed(), 0)
    assert kinds(actions) == {"DrainEngine": 2, "AssignBuckets": 1}
    world.settle(desired(0))
    world.check_goal(desired(0))
    assert set(world.owners) == {NOBODY}
    world.settle(desired(1))
    world.check_goal(desired(1))


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1), (3, 0), (2, 2), (0, 4), (1, 4)])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_changed_template_is_rolled_out_within_its_limits(replicas, surge, unavailable):
    world = started(replicas)
    want = desired(replicas, "b", max_surge=surge, max_unavailable=unavailable)
    for _ in range(200):
        actions = plan(want, world.observed(), 0)
        for action in actions:
            world.do(action)
            lasting = [e for e in world.engines.values() if e.state is not State.DRAINING]
            assert len(lasting) <= replicas + max(surge, 1 if unavailable >= replicas else 0)
        able = sum(e.ready and e.state is State.ACTIVE for e in world.engines.values())
        assert able >= replicas - unavailable
        assert all(o not in (None, NOBODY) for o in world.owners), "every bucket has an owner all the time"
        if not actions and all(e.ready for e in world.engines.values()):
            break
        world.come_up()
    world.check_goal(want)


def test_a_template_that_never_gets_ready_leaves_the_old_engines_serving():
    world = started(3)
    want = desired(3, "broken")
    for _ in range(20):
        for action in plan(want, world.observed(), 0):
            world.do(action)
    assert sum(e.ready and e.state is State.ACTIVE for e in world.engines.values()) == 3
    assert len(world.engines) == 4


def test_what_is_desired_comes_from_the_resource():
    stack = parse(
        {
            "apiVersion": "packetstack.io/v1alpha1",
            "kind": "PacketStack",
            "metadata": {"name": "edge"},
            "spec": {
                "replicas": 4,
                "engine": {"cores": 2},
                "updateStrategy": {"maxSurge": "30%", "maxUnavailable": "30%"},
                "listeners": [
                    {"name": "w", "address": "192.0.2.1", "port": 1, "backends": {"endpoints": []}},
                ],
                "snat": {"addresses": ["192.0.2.64"]},
            },
        }
    )
    want = Desired.of(stack.spec, "a", "1")
    assert (want.replicas, want.queues, want.max_surge, want.max_unavailable) == (4, 8, 2, 1)
    assert want.template == "a"


class Reconciling(RuleBasedStateMachine):
    """Any interleaving of wishes, deaths, slow starts and failed actions; then peace, and the goal must come."""

    @initialize(replicas=st.integers(0, 4))
    def start(self, replicas):
        self.world = World(buckets=32)
        self.want = desired(replicas)

    @rule(replicas=st.integers(0, 5))
    def scale(self, replicas):
        self.want = replace(self.want, replicas=replicas)

    @rule(template=st.sampled_from("abc"), limits=st.sampled_from([(1, 0), (0, 1), (2, 1)]))
    def change_template(self, template, limits):
        self.want = replace(self.want, template=template, max_surge=limits[0], max_unavailable=limits[1])

    @rule(data=st.data())
    def act(self, data):
        """Some of the plan succeeds: each action is carried out, fails, or is carried out in part."""
        for action in plan(self.want, self.world.observed(), 0):
            outcome = data.draw(st.sampled_from(["done", "done", "done", "failed", "part"]))
            if outcome == "failed":
                return
            if outcome == "part" and isinstance(action, AssignBuckets):
                self.world.do(AssignBuckets(action.moves[: len(action.moves) // 2]))
                return
            self.world.do(action)

    @precondition(lambda self: self.world.engines)
    @rule(data=st.data(), change=st.sampled_from(["ready", "unready", "fail", "start", "leave", "hold"]))
    def something_happens(self, data, change):
        slot = data.draw(st.sampled_from(sorted(self.world.engines)))
        engine = self.world.engines[slot]
        if engine.state is State.FAILED:
            return
        if change == "fail":
            self.world.change(slot, state=State.FAILED, ready=False)
        elif change == "start" and engine.state is State.PENDING:
            self.world.change(slot, state=State.STARTING)
        elif change == "leave":
            self.world.change(slot, leaving=True)
        elif change == "hold":
            self.world.change(slot, holds=1)
        elif engine.state is not State.PENDING:
            self.world.change(slot, ready=change == "ready")

    @invariant()
    def owners_exist(self):
        assert all(o in (None, NOBODY) or o.slot in self.world.engines for o in self.world.owners)

    @invariant()
    def the_plan_is_a_function_of_what_is_seen(self):
        assert plan(self.want, self.world.observed(), 0) == plan(self.want, self.world.observed(), 0)

    def teardown(self):
        if hasattr(self, "world"):
            self.world.settle(self.want)
            self.world.check_goal(self.want)
            assert plan(self.want, self.world.observed(), 0) == []


TestReconciling = Reconciling.TestCase
TestReconciling.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_flapping_sizes_settle_without_an_unowned_bucket(sizes):
    world = started(2)
    for size in sizes:
        for action in plan(desired(size), world.observed(), 0):
            world.do(action)
        world.come_up()
        if 0 not in sizes:
            assert all(o is not None and o != NOBODY for o in world.owners)
    world.settle(desired(sizes[-1]))
    world.check_goal(desired(sizes[-1]))


def test_owners_given_by_another_shape_of_engine_are_respected():
    world = started(1)
    assert {o.queue for o in world.owners} == {0, 1}
    assert Owner(1, 0) in world.owners


# ---- engines that do not serve any more --------------------------------------------------------------------------


def down(world, slot, since=0.0, holds=5):
    world.change(slot, ready=False, down_since=since, holds=holds)


def test_an_engine_that_does_not_serve_for_long_hands_over_to_others_and_another_is_made():
    world = started(3)
    down(world, 2)
    want = desired(3, replace_after=60.0)
    assert plan(want, world.observed(), 59.9) == []
    actions = plan(want, world.observed(), 60.0)
    assert kinds(actions) == {"DrainEngine": 1, "CreateEngine": 1, "AssignBuckets": 1}
    for action in actions:
        world.do(action)
    assert 2 not in {o.slot for o in world.owners}
    assert RemoveEngine(2) in plan(want, world.observed(), 60.0), "it cannot hand over what it holds"


def given_up_after(world, want, now, known=None):
    """Plans and acts once. -> what the next plan is to know"""
    known = known or GivenUp()
    observed = replace(world.observed(), given_up=known)
    for action in plan(want, observed, now):
        world.do(action)
    return known.after(want, observed, now)


def test_the_only_engine_keeps_its_buckets_until_another_one_serves():
    world = started(1)
    down(world, 1)
    want = desired(1, replace_after=60.0)
    known = given_up_after(world, want, 60.0)
    assert {o.slot for o in world.owners} == {1}
    assert world.engines[1].state is State.DRAINING
    assert plan(want, replace(world.observed(), given_up=known), 61.0) == []
    world.change(2, state=State.STARTING, ready=True)
    given_up_after(world, want, 62.0, known)
    assert {o.slot for o in world.owners} == {2}


def test_an_engine_that_serves_again_before_another_one_does_is_taken_back():
    world = started(1)
    down(world, 1)
    want = desired(1, replace_after=60.0)
    known = given_up_after(world, want, 60.0)
    world.change(1, ready=True, down_since=None, holds=0)
    actions = plan(want, replace(world.observed(), given_up=known), 70.0)
    assert ActivateEngine(1) in actions
    assert RemoveEngine(2) in actions


def test_when_all_engines_do_not_serve_no_more_are_made_at_once_than_the_surge_says():
    world = started(4)
    for slot in list(world.engines):
        down(world, slot)
    actions = plan(desired(4, replace_after=60.0), world.observed(), 60.0)
    assert kinds(actions) == {"DrainEngine": 4, "CreateEngine": 1}


@pytest.mark.parametrize("want", [desired(3), desired(3, replace_after=60.0, paused=True)])
def test_without_a_limit_or_while_paused_no_engine_is_given_up(want):
    world = started(3)
    down(world, 2)
    assert plan(want, world.observed(), 1e6) == []


def test_a_draining_engine_that_does_not_serve_is_given_up_too():
    world = started(3)
    down(world, 2)
    world.change(2, state=State.DRAINING)
    want = desired(2, replace_after=60.0)
    assert not any(isinstance(a, RemoveEngine) for a in plan(want, world.observed(), 59.0))
    known = given_up_after(world, want, 60.0)
    given_up_after(world, want, 60.0, known)
    assert set(world.engines) == {1, 3}


def test_each_engine_in_a_row_that_is_given_up_is_given_twice_as_long():
    want = desired(1, replace_after=60.0)
    world, now, known = started(1), 0.0, GivenUp()
    waits = []
    for _ in range(9):
        (slot,) = world.engines
        down(world, slot, since=now)
        at = give_up_at(want, replace(world.observed(), given_up=known), world.engines[slot])
        waits.append(at - now)
        now = at
        while slot in world.engines:
            known = given_up_after(world, want, now, known)
            for engine in list(world.engines.values()):
                if engine.state is State.PENDING:
                    world.change(engine.slot, state=State.STARTING, ready=True)
    assert waits == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3840.0, 3840.0, 3840.0]
    assert list(world.engines) == [10]
    calm = replace(world.observed(), given_up=known)
    assert known.after(want, calm, now + 7000).count == 9
    assert known.after(want, calm, now + 7700) == GivenUp()
