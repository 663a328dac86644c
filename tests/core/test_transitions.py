"""The planner of sets against a world in which actions fail, engines die, connections stay and wishes change at any time."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from packetstack_core import planning
from packetstack_core.assignment import NOBODY, Owner, State
from packetstack_core.kinds import MAX_SET_ID
from packetstack_core.planning import (
    ActivateEngine,
    AssignBuckets,
    CreateEngine,
    Desired,
    DrainEngine,
    Engine,
    GivenUp,
    RemoveEngine,
)
from packetstack_core.resources import Handover
from packetstack_core.transitions import (
    AdoptKept,
    ChangeSet,
    EndSet,
    EngineSet,
    MakeSet,
    Observed,
    PromoteSet,
    RetireSet,
    Sets,
    SetState,
    SwitchBuckets,
    deadline,
    held,
    plan,
)

BUCKETS = 64
MIRROR = Handover(strategy="Mirror")


def mirror(on_deadline="Keep", policy=None, strategy="Mirror"):
    return Handover(strategy=strategy, policy=policy, deadlineSeconds=100, onDeadline=on_deadline)


class World:
    """Carries out actions as a runtime would. Refuses what may never be asked for."""

    def __init__(self, buckets=BUCKETS):
        self.engines = {}
        self.members = {}
        self.configured = set()
        self.owners = [None] * buckets
        self.keepers = [None] * buckets
        self.open = Counter()  # (set, bucket) -> connections
        self.sets = Sets()
        self.next_slot = 1
        self.now = 0.0
        self.given_up = GivenUp()
        self.create_after = 0.0
        self.ended = []
        self.switched = 0
        self.made = []

    def observed(self, moving=(), pinned=()):
        pool = planning.Observed(
            tuple(self.engines.values()),
            tuple(self.owners),
            frozenset(moving),
            create_after=self.create_after,
            rebalanced=False,
            given_up=self.given_up,
        )
        return Observed(
            pool,
            frozenset(pinned),
            self.sets,
            dict(self.members),
            frozenset(self.configured),
            tuple(self.keepers),
        )

    def plan(self, want, handover=MIRROR):
        return plan(want, handover, self.observed(), self.now)

    def state_of(self, slot):
        return next(s.state for s in self.sets.known if s.id == self.members[slot])

    def of(self, id_):
        return [e for e in self.engines.values() if self.members[e.slot] == id_]

    def gone(self, owner):
        engine = self.engines.get(owner.slot)
        return engine is None or engine.leaving or engine.state is State.FAILED or engine.down_since is not None

    def set_in(self, state):
        return self.sets.one(state)

    # ---- actions

    def do(self, action):
        match action:
            case MakeSet() | ChangeSet() | PromoteSet() | RetireSet():
                self.change_sets(action)
            case SwitchBuckets(moves):
                for move in moves:
                    self.switch(move)
            case AdoptKept(moves):
                for move in moves:
                    old = self.keepers[move.bucket]
                    assert self.gone(old), "moved without need"
                    assert self.members[move.to.slot] == self.set_in(SetState.DRAINING).id
                    self.check_target(move.to)
                    self.keepers[move.bucket] = move.to
            case EndSet(id_, rule):
                self.ended.append((id_, rule))
                assert self.set_in(SetState.DRAINING).id == id_
                for bucket, keeper in enumerate(self.keepers):
                    if keeper:
                        self.close(id_, bucket)
            case CreateEngine(template, queues, id_):
                assert any(s.id == id_ and s.template == template for s in self.sets.known)
                slot = self.next_slot
                self.next_slot += 1
                self.engines[slot] = Engine(
                    slot,
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
                self.members[slot] = id_
                self.made.append(id_)
            case ActivateEngine(slot):
                assert self.engines[slot].state in (State.STARTING, State.DRAINING)
                self.change(slot, state=State.ACTIVE)
            case DrainEngine(slot):
                self.change(slot, state=State.DRAINING)
            case RemoveEngine(slot):
                assert all(not o or o.slot != slot for o in self.owners), "never removes an owner"
                assert all(not k or k.slot != slot for k in self.keepers), "never removes a keeper"
                mute = self.engines[slot].down_since is not None
                assert mute or not self.engines[slot].holds, "never removes an engine that still holds a bucket"
                del self.engines[slot], self.members[slot]
                self.configured.discard(slot)
            case AssignBuckets(moves):
                for move in moves:
                    self.assign(move)

    def change_sets(self, action):
        match action:
            case MakeSet(new):
                assert new.id != self.sets.last, "never twice in a row"
                assert new.id not in {s.id for s in self.sets.known}
                assert 1 <= new.id <= MAX_SET_ID
            case PromoteSet(id_):
                able = [e for e in self.of(id_) if e.ready and e.slot in self.configured and e.state is State.ACTIVE]
                (wanted,) = (s.replicas for s in self.sets.known if s.id == id_)
                assert wanted == len(able) == len([e for e in self.of(id_) if e.state is State.ACTIVE])
            case RetireSet(id_):
                assert not self.of(id_)
                assert not sum(n for (s, _), n in self.open.items() if s == id_), "no connection is lost"
        self.sets = self.sets.after(action, self.now)

    def check_target(self, to):
        engine = self.engines[to.slot]
        assert engine.ready, "never gives a bucket to an engine that is not ready"
        assert engine.state is State.ACTIVE
        assert to.queue < engine.queues

    def switch(self, move):
        old = self.owners[move.bucket]
        current, draining = self.set_in(SetState.CURRENT).id, self.set_in(SetState.DRAINING).id
        assert self.members[old.slot] == draining
        assert self.engines[old.slot].ready, "a keeper has to answer"
        assert self.members[move.to.slot] == current
        assert move.to.slot in self.configured
        assert self.keepers[move.bucket] is None
        self.check_target(move.to)
        self.owners[move.bucket] = move.to
        self.keepers[move.bucket] = old
        self.switched += 1
        self.let_go()

    def assign(self, move):
        old = self.owners[move.bucket]
        assert move.to != old
        if move.to == NOBODY:
            assert old not in (None, NOBODY)
        else:
            self.check_target(move.to)
            if old not in (None, NOBODY) and old.slot in self.engines:
                assert self.members[old.slot] == self.members[move.to.slot], "only a switch leads to another set"
            assert self.keepers[move.bucket] is None or self.gone(old), "a bucket in mirror stays"
        self.owners[move.bucket] = move.to

    # ---- what happens

    def change(self, slot, **fields):
        self.engines[slot] = replace(self.engines[slot], **fields)

    def connect(self, bucket, count=1):
        owner = self.owners[bucket]
        if owner not in (None, NOBODY) and owner.slot in self.engines:
            self.open[self.members[owner.slot], bucket] += count

    def connect_all(self):
        for bucket in range(len(self.owners)):
            self.connect(bucket)

    def close(self, id_, bucket):
        self.open.pop((id_, bucket), None)
        self.let_go()

    def close_all(self, *, of=None):
        for id_, bucket in list(self.open):
            if of in (None, id_):
                self.open.pop((id_, bucket))
        self.let_go()

    def let_go(self):
        """Mirroring of a bucket ends when its keeper has nothing."""
        draining = self.set_in(SetState.DRAINING)
        for bucket, keeper in enumerate(self.keepers):
            if keeper and not self.open[draining.id, bucket] and not self.gone(keeper):
                self.keepers[bucket] = None

    def come_up(self):
        for slot, engine in list(self.engines.items()):
            if engine.state is State.PENDING:
                self.change(slot, state=State.STARTING)
            elif engine.state is not State.FAILED:
                self.change(slot, ready=True, down_since=None)
                self.configured.add(slot)

    def turn(self, want, handover=MIRROR):
        """Plans once and does it all. -> what was done"""
        actions = self.plan(want, handover)
        for action in actions:
            self.do(action)
            self.check()
        return actions

    def settle(self, want, handover=MIRROR, most=400):
        """Plans and acts until nothing is left to do."""
        for _ in range(most):
            for slot in list(self.engines):
                self.change(slot, holds=0)
            self.let_go()
            actions = self.turn(want, handover)
            if not actions and all(e.ready for e in self.engines.values()):
                return
            self.come_up()
        raise AssertionError(f"no rest after {most} rounds: {self.sets} {self.engines} {self.plan(want, handover)}")

    def check(self):
        assert len(self.sets.known) <= 2
        assert sum(s.state is SetState.CURRENT for s in self.sets.known) <= 1
        for bucket, owner in enumerate(self.owners):
            keeper = self.keepers[bucket]
            assert not keeper or self.set_in(SetState.DRAINING), "what is kept is kept by a set that drains"
            assert owner in (None, NOBODY) or owner.slot in self.engines

    def check_goal(self, want):
        (one,) = self.sets.known
        assert (one.state, one.replicas, one.template) == (SetState.CURRENT, want.replicas, want.template)
        assert len(self.engines) == want.replicas
        assert all(e.state is State.ACTIVE and e.template == want.template for e in self.engines.values())
        assert set(self.keepers) == {None}
        owned = Counter(o.slot if o else 0 for o in self.owners)
        assert set(owned) == (set(self.engines) or {0})
        assert max(owned.values()) - min(owned.values()) <= 1


def desired(replicas, template="a", queues=2, **limits):
    return Desired(replicas, template, queues, **limits)


def started(replicas=2, template="a"):
    """A stack with a connection in each bucket."""
    world = World()
    world.settle(desired(replicas, template))
    world.connect_all()
    world.made.clear()
    return world


def draining(before=2, want=None):
    """A stack whose first set keeps a connection in each bucket."""
    world = started(before)
    world.settle(want or desired(before, "b"))
    assert [s.state for s in world.sets.known] == [SetState.DRAINING, SetState.CURRENT]
    return world


def kinds(actions):
    return Counter(type(a).__name__ for a in actions)


# ---- the first set -----------------------------------------------------------------------------------------------


def test_a_new_stack_gets_one_set_and_no_switch():
    world = World()
    assert kinds(world.turn(desired(2))) == {"MakeSet": 1}
    world.settle(desired(2))
    world.check_goal(desired(2))
    assert world.switched == 0
    assert world.sets == Sets((EngineSet(1, SetState.CURRENT, 2, "a", 2, 0.0),), 1)


def test_before_the_first_bucket_is_given_a_set_takes_any_wish_as_it_is():
    world = World()
    world.turn(desired(2))
    world.turn(desired(2))
    world.settle(desired(3, "b"))
    world.check_goal(desired(3, "b"))
    assert world.sets.last == 1


# ---- activating --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("want", [desired(4), desired(1), desired(2, "b", queues=3), desired(3, "b")])
def test_another_size_or_template_is_another_set_and_the_first_goes_when_its_connections_have_closed(want):
    world = started(2)
    world.settle(want)
    assert [(s.id, s.state) for s in world.sets.known] == [(1, SetState.DRAINING), (2, SetState.CURRENT)]
    assert world.switched == BUCKETS
    assert len(world.of(1)) == 2, "it keeps its engines"
    assert all(world.members[o.slot] == 2 for o in world.owners)
    assert all(world.members[k.slot] == 1 for k in world.keepers)
    for bucket in range(BUCKETS - 1):
        world.close(1, bucket)
    assert world.plan(want) == [], "one connection keeps it all"
    world.close(1, BUCKETS - 1)
    world.settle(want)
    world.check_goal(want)


def test_no_bucket_is_switched_before_each_engine_is_ready_and_configured():
    world = started(2)
    want = desired(3, "b")
    world.settle(desired(2))
    for _ in range(3):
        world.turn(want)
        world.come_up()
    *others, last = [e.slot for e in world.of(2)]
    assert others
    world.turn(want)
    world.configured.discard(last)
    assert world.plan(want) == []
    world.configured.add(last)
    world.change(last, ready=False)
    assert world.plan(want) == []
    world.change(last, ready=True)
    assert world.plan(want) == [PromoteSet(2)]


def test_a_switch_that_was_done_in_part_goes_on():
    world = started(2)
    want = desired(3, "b")
    while not world.set_in(SetState.DRAINING):
        world.turn(want)
        world.come_up()
    (switch,) = world.plan(want)
    assert len(switch.moves) == BUCKETS
    world.do(SwitchBuckets(switch.moves[:10]))
    (rest,) = world.plan(want)
    assert rest == SwitchBuckets(switch.moves[10:])


def test_a_keeper_that_does_not_answer_is_waited_for():
    world = started(2)
    want = desired(3, "b")
    while not world.set_in(SetState.DRAINING):
        world.turn(want)
        world.come_up()
    world.change(1, ready=False)
    (switch,) = world.plan(want)
    assert {world.owners[m.bucket].slot for m in switch.moves} == {2}


def test_a_promotion_that_was_forgotten_is_written_down_again():
    world = started(2)
    want = desired(3, "b")
    while not world.set_in(SetState.DRAINING):
        before = world.sets
        world.turn(want)
        world.come_up()
    (switch,) = world.plan(want)
    world.do(SwitchBuckets(switch.moves[:1]))
    world.sets = before
    assert world.plan(desired(2)) == [PromoteSet(2)], "whatever is wanted by now"


def test_a_set_that_cannot_be_made_leaves_the_first_serving_and_is_tried_after_the_back_off():
    world = started(2)
    want = desired(4, "b")
    world.turn(want)
    world.create_after = 5.0
    before = list(world.owners)
    for world.now in (1.0, 2.0, 4.9):
        assert world.plan(want) == []
    world.now = 5.0
    assert kinds(world.turn(want)) == {"CreateEngine": 4}
    assert world.owners == before


def test_no_set_is_made_before_the_back_off_is_over():
    world = started(2)
    world.create_after = 5.0
    assert world.plan(desired(4)) == []
    world.now = 5.0
    assert kinds(world.plan(desired(4))) == {"MakeSet": 1}


def test_a_set_that_is_not_wanted_any_more_is_removed_while_the_first_serves():
    world = started(2)
    before = list(world.owners)
    for _ in range(3):
        world.turn(desired(4, "b"))
        world.come_up()
    assert len(world.engines) == 6
    world.settle(desired(2))
    world.check_goal(desired(2))
    assert world.owners == before
    assert sum(world.open.values()) == BUCKETS
    assert world.sets.last == 2


def test_before_the_switch_another_size_is_that_of_the_same_set():
    world = started(2)
    world.turn(desired(4, "b"))
    world.turn(desired(4, "b"))
    changed = replace(world.set_in(SetState.ACTIVATING), replicas=3)
    assert ChangeSet(changed) in world.turn(desired(3, "b"))
    world.settle(desired(3, "b"))
    assert world.sets.last == 2
    assert len(world.of(2)) == 3


def test_before_the_switch_another_template_is_another_set_after_the_second_has_gone():
    world = started(2)
    world.turn(desired(2, "b"))
    world.turn(desired(2, "b"))
    assert {e.template for e in world.of(2)} == {"b"}
    done = world.turn(desired(2, "c"))
    assert kinds(done) == {"RemoveEngine": 2}
    assert world.turn(desired(2, "c")) == [RetireSet(2)]
    world.settle(desired(2, "c"))
    assert [s.id for s in world.sets.known] == [1, 3]
    world.close_all()
    world.settle(desired(2, "c"))
    world.check_goal(desired(2, "c"))


def test_a_number_is_not_given_twice_in_a_row_and_begins_anew_after_the_last():
    world = started(2)
    world.sets = replace(world.sets, last=MAX_SET_ID - 1)
    (made,) = world.turn(desired(3))
    assert made.set.id == MAX_SET_ID
    world.settle(desired(2))
    (made,) = world.plan(desired(3))
    assert made.set.id == 2, "1 is there"


# ---- draining ----------------------------------------------------------------------------------------------------


def test_engines_of_a_set_that_keeps_nothing_go_when_none_of_their_rings_holds_a_packet():
    world = draining()
    want = desired(2, "b")
    world.change(1, holds=1)
    world.close_all(of=1)
    assert world.turn(want) == [DrainEngine(1), DrainEngine(2)]
    assert world.turn(want) == [RemoveEngine(2)]
    assert world.plan(want) == []
    world.change(1, holds=0)
    assert world.turn(want) == [RemoveEngine(1)]
    assert world.turn(want) == [RetireSet(1)]
    world.check_goal(want)


def test_what_a_keeper_that_is_gone_kept_goes_to_another_of_its_set_and_no_engine_is_made():
    world = draining(2)
    world.change(1, ready=False, down_since=0.0)
    world.now = 60.0
    want = desired(2, "b", replace_after=60.0)
    (adopted,) = [a for a in world.turn(want) if isinstance(a, AdoptKept)]
    assert len(adopted.moves) == BUCKETS // 2
    assert {m.to.slot for m in adopted.moves} == {2}
    assert world.made == [2, 2]
    world.settle(want)
    assert 1 not in world.engines


def test_the_only_keeper_is_replaced_so_that_its_connections_go_on():
    world = draining(1, desired(3))
    want = desired(3)
    world.change(1, leaving=True)
    world.settle(want)
    (engine,) = world.of(1)
    assert engine.slot != 1
    assert all(k == Owner(engine.slot, k.queue) for k in world.keepers)
    assert sum(world.open.values()) == BUCKETS
    world.close_all()
    world.settle(want)
    world.check_goal(want)


def test_a_bucket_in_mirror_leaves_an_engine_of_the_current_set_only_when_that_is_gone():
    world = draining(2)
    want = desired(2, "b")
    keepers = list(world.keepers)
    slot = world.of(2)[0].slot
    world.change(slot, ready=False)
    assert world.plan(want) == []
    world.change(slot, ready=True, leaving=True)
    world.settle(want)
    assert slot not in world.engines
    assert world.keepers == keepers


def test_buckets_that_no_engine_has_switched_yet_go_to_another_of_their_set_when_theirs_is_gone():
    world = started(2)
    want = desired(3, "b")
    while not world.set_in(SetState.DRAINING):
        world.turn(want)
        world.come_up()
    world.change(1, state=State.FAILED, ready=False, down_since=0.0)
    done = world.turn(want)
    assert kinds(done) == {"SwitchBuckets": 1, "AssignBuckets": 1}
    world.settle(want)
    assert world.switched == BUCKETS
    assert sum(world.open.values()) == BUCKETS


# ---- one at a time -----------------------------------------------------------------------------------------------


def test_growth_goes_on_in_the_current_set_and_buckets_in_mirror_stay():
    world = draining(2)
    for bucket in range(0, BUCKETS, 2):
        world.close(1, bucket)
    before = list(world.owners)
    want = desired(4, "b")
    assert not held(want, world.observed())
    world.settle(want)
    assert [s.replicas for s in world.sets.known] == [2, 4]
    moved = {b for b in range(BUCKETS) if before[b] != world.owners[b]}
    assert moved == set(range(0, BUCKETS, 2)), "all that may be moved is"
    owned = Counter(o.slot for o in world.owners)
    assert set(owned.values()) == {BUCKETS // 4}
    world.close_all()
    world.settle(want)
    world.check_goal(want)


@pytest.mark.parametrize("want", [desired(1, "b"), desired(2, "c"), desired(2), desired(0, "b")])
def test_anything_else_is_held_until_the_set_has_drained(want):
    world = draining(2)
    assert world.plan(want) == []
    assert held(want, world.observed())
    assert not held(desired(2, "b"), world.observed())
    world.close_all(of=1)
    world.settle(want)
    world.close_all()
    world.settle(want)
    world.check_goal(want)
    assert not held(want, world.observed())


@pytest.mark.parametrize("rule", ["Reset", "Transfer"])
def test_with_hurry_a_change_ends_the_set_that_drains(rule):
    world = draining(2)
    hurry = mirror(rule, "Hurry")
    assert world.plan(desired(2, "b"), hurry) == [], "nothing is in a hurry"
    assert world.plan(desired(1, "b"), hurry) == [EndSet(1, rule)]
    assert not any(isinstance(a, EndSet) for a in world.plan(desired(3, "b"), hurry)), "growth needs no end"
    world.turn(desired(1, "b"), hurry)
    world.settle(desired(1, "b"), hurry)
    world.check_goal(desired(1, "b"))


def test_with_hurry_a_set_that_shall_be_kept_is_kept():
    world = draining(2)
    assert world.plan(desired(1, "b"), mirror("Keep", "Hurry")) == []


def test_at_the_deadline_the_set_is_ended_again_and_again_until_it_keeps_nothing():
    world = draining(2)
    want, reset = desired(2, "b"), mirror("Reset")
    since = world.set_in(SetState.DRAINING).since
    assert deadline(reset, world.sets) == since + 100
    world.now = since + 99.9
    assert world.plan(want, reset) == []
    world.now = since + 100
    assert world.plan(want, reset) == world.plan(want, reset) == [EndSet(1, "Reset")]
    world.settle(want, reset)
    world.check_goal(want)
    assert deadline(reset, world.sets) is None


def test_with_keep_there_is_no_deadline():
    world = draining(2)
    world.now = 1e9
    assert world.plan(desired(2, "b")) == []
    assert deadline(MIRROR, world.sets) is None


# ---- nothing, a pause, another strategy --------------------------------------------------------------------------


def test_no_engines_are_wanted_and_then_some_again_in_the_same_set():
    world = started(2)
    world.settle(desired(0))
    world.check_goal(desired(0))
    assert set(world.owners) == {NOBODY}
    world.settle(desired(3, "b"))
    world.check_goal(desired(3, "b"))
    assert (world.sets.last, world.switched) == (1, 0)
    assert sum(world.open.values()) == BUCKETS, "flows wait in the set's memory"


def test_no_engines_are_wanted_while_a_set_comes_up():
    world = started(2)
    world.turn(desired(4))
    world.turn(desired(4))
    world.settle(desired(0))
    world.check_goal(desired(0))


def test_while_paused_no_transition_begins_or_goes_on():
    world = started(2)
    assert world.plan(desired(4, paused=True)) == []
    world.turn(desired(4))
    assert world.plan(desired(4, paused=True)) == []
    assert world.plan(desired(2, paused=True)) == [], "nor is one undone"
    world.settle(desired(4))
    before = list(world.sets.known)
    reset = mirror("Reset", "Hurry")
    world.now = 1e9
    assert world.plan(desired(1, paused=True), reset) == []
    assert list(world.sets.known) == before


def test_while_paused_only_buckets_of_engines_that_go_are_switched():
    world = started(2)
    while not world.set_in(SetState.DRAINING):
        world.turn(desired(3))
        world.come_up()
    want = desired(3, paused=True)
    assert world.plan(want) == []
    world.change(1, leaving=True)
    (switch,) = [a for a in world.plan(want) if isinstance(a, SwitchBuckets)]
    assert {world.owners[m.bucket].slot for m in switch.moves} == {1}


@pytest.mark.parametrize("want", [desired(0), desired(1), desired(3), desired(2, "b"), desired(4, paused=True)])
def test_without_sets_transfer_is_planned_as_ever(want):
    world = started(2)
    world.sets, world.members = Sets(), dict.fromkeys(world.engines)
    world.change(1, leaving=True)
    observed = world.observed(moving=[1, 2])
    assert plan(want, Handover(), observed, 0.0) == planning.plan(want, observed.pool, 0.0)


def test_a_stack_with_engines_that_changes_to_mirror_has_them_as_its_first_set():
    world = started(3)
    world.sets, world.members = Sets(), dict.fromkeys(world.engines)
    (made,) = world.plan(desired(5, "b"))
    assert made.set == EngineSet(1, SetState.CURRENT, 3, "a", 2, 0.0), "what is wanted is the second one"
    world.sets = world.sets.after(made, 0.0)
    assert kinds(world.plan(desired(5, "b"))) == {"MakeSet": 1}
    assert world.plan(desired(3)) == []


def test_a_stack_that_changes_to_mirror_while_a_template_is_rolled_out_ends_that_first():
    world = started(2)
    world.sets, world.members = Sets(), dict.fromkeys(world.engines)
    world.change(2, template="b")
    (made,) = world.plan(desired(2, "b"))
    assert (made.set.replicas, made.set.template) == (2, "b")


def test_a_stack_that_changes_to_transfer_has_its_set_changed_as_it_is():
    world = started(2)
    world.settle(desired(3, "b"), Handover())
    world.check_goal(desired(3, "b"))
    assert (world.sets.last, world.switched) == (1, 0)
    assert world.plan(desired(3, "b"), MIRROR) == []


def test_with_transfer_a_set_that_comes_up_is_removed_and_one_that_drains_has_its_time():
    world = started(2)
    world.turn(desired(4))
    world.turn(desired(4))
    world.settle(desired(4), Handover())
    world.check_goal(desired(4))
    assert world.switched == 0
    world = draining(2)
    assert world.plan(desired(1, "b"), Handover()) == []
    world.close_all(of=1)
    world.settle(desired(1, "b"), Handover())
    world.check_goal(desired(1, "b"))


def test_engines_of_a_set_that_is_none_of_the_stacks_are_not_guessed_at():
    world = started(2)
    world.members[1] = 9
    with pytest.raises(ValueError, match="engine 1 is of set 9"):
        world.plan(desired(2))


def test_buckets_that_a_person_has_placed_are_switched_like_others():
    world = started(2)
    want = desired(9, "b")
    while not world.set_in(SetState.DRAINING):
        world.turn(want)
        world.come_up()
    (switch,) = plan(want, MIRROR, world.observed(pinned=range(BUCKETS)), 0.0)
    assert len(switch.moves) == BUCKETS


# ---- any history -------------------------------------------------------------------------------------------------


class Histories(RuleBasedStateMachine):
    """Any interleaving of wishes, deaths, slow starts, connections and failed actions; then peace, and the goal must come."""

    @initialize(replicas=st.integers(0, 3))
    def start(self, replicas):
        self.world = World(buckets=16)
        self.want = desired(replicas, replace_after=60.0)
        self.handover = MIRROR
        self.zero = replicas == 0
        self.transferred = False

    @rule(replicas=st.integers(0, 4))
    def scale(self, replicas):
        self.want = replace(self.want, replicas=replicas)
        self.zero |= replicas == 0

    @rule(template=st.sampled_from("abc"), queues=st.integers(1, 3))
    def change_template(self, template, queues):
        self.want = replace(self.want, template=f"{template}{queues}", queues=queues)

    @rule(paused=st.sampled_from([False, False, True]))
    def pause(self, paused):
        self.want = replace(self.want, paused=paused)

    @rule(
        strategy=st.sampled_from(["Mirror", "Mirror", "Transfer"]),
        policy=st.sampled_from([None, "Hold", "Hurry"]),
        on_deadline=st.sampled_from(["Keep", "Reset", "Transfer"]),
    )
    def change_handover(self, strategy, policy, on_deadline):
        if not self.world.sets.known:
            strategy = "Mirror"  # else nothing here is used
        self.handover = mirror(on_deadline, policy, strategy)

    @rule(data=st.data())
    def act(self, data):
        """Some of the plan succeeds: each action is carried out, fails, or is carried out in part."""
        self.world.let_go()
        observed = self.world.observed()
        for action in plan(self.want, self.handover, observed, self.world.now):
            outcome = data.draw(st.sampled_from(["done", "done", "done", "failed", "part"]))
            if outcome == "failed":
                break
            if outcome == "part" and isinstance(action, AssignBuckets | SwitchBuckets | AdoptKept):
                self.world.do(replace(action, moves=action.moves[: len(action.moves) // 2]))
                break
            self.world.do(action)
            self.world.check()
        self.world.given_up = self.world.given_up.after(self.want, observed.pool, self.world.now)

    @rule(times=st.integers(1, 6))
    def go_on(self, times):
        for _ in range(times):
            self.world.let_go()
            self.world.turn(self.want, self.handover)
            self.world.come_up()

    @rule(bucket=st.integers(0, 15))
    def connect(self, bucket):
        self.world.connect(bucket)

    @rule(bucket=st.integers(0, 15))
    def close(self, bucket):
        for s in self.world.sets.known:
            self.world.close(s.id, bucket)

    @rule(seconds=st.sampled_from([1.0, 30.0, 200.0]))
    def time_passes(self, seconds):
        self.world.now += seconds

    @rule(seconds=st.sampled_from([0.0, 60.0]))
    def back_off(self, seconds):
        self.world.create_after = self.world.now + seconds

    @precondition(lambda self: self.world.engines)
    @rule(
        data=st.data(),
        change=st.sampled_from(["ready", "unready", "fail", "start", "leave", "hold", "configured", "stale"]),
    )
    def something_happens(self, data, change):
        world = self.world
        slot = data.draw(st.sampled_from(sorted(world.engines)))
        engine = world.engines[slot]
        if engine.state is State.FAILED:
            return
        if change == "fail":
            world.change(slot, state=State.FAILED, ready=False, down_since=world.now)
        elif change == "start" and engine.state is State.PENDING:
            world.change(slot, state=State.STARTING)
        elif change == "leave":
            world.change(slot, leaving=True)
        elif change == "hold":
            world.change(slot, holds=1)
        elif change == "configured":
            world.configured.add(slot)
        elif change == "stale":
            world.configured.discard(slot)
        elif engine.state is not State.PENDING:
            world.change(slot, ready=change == "ready", down_since=None if change == "ready" else world.now)

    @invariant()
    def the_world_is_sound(self):
        self.world.check()

    @invariant()
    def a_bucket_that_was_given_stays_given(self):
        owners = self.world.owners
        assert self.zero or all(o is None for o in owners) or NOBODY not in owners

    @invariant()
    def the_plan_is_a_function_of_what_is_seen(self):
        world = self.world
        first, again = world.plan(self.want, self.handover), world.plan(self.want, self.handover)
        assert first == again

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world, want = self.world, replace(self.want, paused=False)
        world.create_after = 0.0
        for _ in range(4):  # what is held may be one thing after another
            world.settle(want, self.handover)
            world.close_all()
        world.settle(want, self.handover)
        world.check_goal(want)
        assert world.plan(want, self.handover) == []


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from("ab")), min_size=1, max_size=6), st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_flapping_wishes_break_no_connection_and_leave_no_bucket_without_an_owner(wishes, turns):
    world = started(2)
    for replicas, template in wishes:
        for _ in range(turns):
            world.turn(desired(replicas, template))
            world.come_up()
            assert all(o not in (None, NOBODY) for o in world.owners)
    assert sum(world.open.values()) == BUCKETS
    last = desired(*wishes[-1])
    for _ in range(3):
        world.settle(last)
        world.close_all()
    world.settle(last)
    world.check_goal(last)
