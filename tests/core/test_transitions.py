"""What the planner of sets decides, case by case."""

from collections import Counter
from dataclasses import replace

import pytest
from tests.core.transition_world import BUCKETS, MIRROR, World, desired, draining, kinds, mirror, started, switching

from packetstack_core import planning
from packetstack_core.assignment import NOBODY, Owner, State
from packetstack_core.kinds import MAX_SET_ID
from packetstack_core.planning import DrainEngine, RemoveEngine
from packetstack_core.resources import Handover
from packetstack_core.shards import FIRST
from packetstack_core.transitions import (
    AdoptKept,
    ChangeSet,
    EndSet,
    EngineSet,
    PromoteSet,
    RetireSet,
    Sets,
    SetState,
    SwitchBuckets,
    deadline,
    held,
    plan,
)

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


# ---- another build -----------------------------------------------------------------------------------------------

OTHER = "2.4.128.256.0.2.4.8.16.52.54.56.58.60.62.0"
TRANSFER = mirror(strategy="Transfer")


def shapes(world):
    return [(s.id, s.state, s.template, s.shard) for s in world.sets.known]


@pytest.mark.parametrize("strategy", ["Transfer", "Mirror"])
@pytest.mark.parametrize("template", ["a", "b"])
def test_a_build_of_another_shard_layout_gets_a_second_set_whatever_the_strategy(strategy, template):
    handover = mirror(strategy=strategy)
    world = World()
    world.settle(desired(2), handover)
    if not world.sets.known:  # runtimes know the set of each engine before there is a second one
        world.members = dict.fromkeys(world.engines, 1)
    world.connect_all()
    want = desired(2, template, shard=OTHER)
    world.settle(want, handover)
    assert shapes(world) == [(1, SetState.DRAINING, "a", FIRST), (2, SetState.CURRENT, template, OTHER)]
    assert world.switched == BUCKETS
    world.close_all(of=1)
    world.settle(want, handover)
    world.check_goal(want)
    world.connect_all()
    world.settle(desired(2, template), handover)  # and back
    assert [s.shard for s in world.sets.known] == [OTHER, FIRST]
    world.close_all()
    world.settle(desired(2, template), handover)
    world.check_goal(desired(2, template))


def test_a_stack_that_never_had_a_set_gets_none_for_its_own_layout():
    world = World()
    world.shard = OTHER
    world.settle(desired(2, shard=OTHER), TRANSFER)
    assert world.sets == Sets()


def test_the_first_set_is_what_serves_and_not_an_engine_of_the_build_that_is_wanted():
    world = World()
    world.settle(desired(3), TRANSFER)
    world.turn(desired(3, "b"), TRANSFER)  # an engine of the new image comes up, and is not let in
    world.members = dict.fromkeys(world.engines, 1)
    [made] = world.turn(desired(3, "b", shard=OTHER), TRANSFER)
    assert made.set == EngineSet(1, SetState.CURRENT, 3, "a", 2, 0.0)
    assert kinds(world.turn(desired(3, "b", shard=OTHER), TRANSFER)) == {"RemoveEngine": 1, "MakeSet": 1}
    world.settle(desired(3, "b", shard=OTHER), TRANSFER)
    assert [(s.template, s.shard) for s in world.sets.known][-1] == ("b", OTHER)


def test_a_set_of_a_layout_that_is_not_wanted_any_more_goes_before_it_has_a_bucket():
    world = started(2)
    while not world.set_in(SetState.ACTIVATING):
        world.turn(desired(2, shard=OTHER), TRANSFER)
    world.come_up()
    world.settle(desired(2), TRANSFER)
    assert shapes(world) == [(1, SetState.CURRENT, "a", FIRST)]
    assert world.switched == 0


def test_a_third_layout_waits_until_the_first_set_has_drained():
    third = desired(2, shard=OTHER.replace("2.", "3.", 1))
    world = started(2)
    world.settle(desired(2, shard=OTHER), TRANSFER)
    assert held(third, world.sets)
    assert not held(desired(2, shard=OTHER), world.sets)
    world.settle(third, TRANSFER)
    assert len(world.sets.known) == 2
    world.close_all()
    world.settle(third, TRANSFER)
    world.check_goal(third)
    assert [s.shard for s in world.sets.known] == [third.shard]


def test_flows_are_not_transferred_to_another_layout_at_the_deadline():
    ends = mirror("Transfer")
    world = started(2)
    world.settle(desired(2, shard=OTHER), ends)
    world.now += 10_000
    assert world.plan(desired(2, shard=OTHER), ends) == []
    assert deadline(ends, world.sets) is None


def test_while_paused_or_without_engines_nothing_is_made_for_another_layout():
    for want in (desired(2, shard=OTHER, paused=True), desired(0, shard=OTHER)):
        world = started(2)
        world.settle(want, TRANSFER)
        assert [s.shard for s in world.sets.known] == [FIRST]


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
    want = desired(3, "b")
    world = switching(want)
    (switch,) = world.plan(want)
    assert len(switch.moves) == BUCKETS
    world.do(SwitchBuckets(switch.moves[:10]))
    (rest,) = world.plan(want)
    assert rest == SwitchBuckets(switch.moves[10:])


def test_a_keeper_that_does_not_answer_is_waited_for():
    want = desired(3, "b")
    world = switching(want)
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


def test_buckets_go_to_engines_with_the_present_configuration_while_they_are_switched():
    want = desired(3, "b")
    world = switching(want)
    late = world.of(2)[0].slot
    world.configured.discard(late)
    (switch,) = world.plan(want)
    assert late not in {m.to.slot for m in switch.moves}


def test_a_bucket_with_an_open_fence_is_switched_when_it_is_closed():
    want = desired(3, "b")
    world = switching(want)
    (switch,) = plan(want, MIRROR, world.observed(moving=range(10)), 0.0)
    assert {m.bucket for m in switch.moves} == set(range(10, BUCKETS))


def test_buckets_are_switched_in_equal_parts_though_they_were_moved_by_load():
    want = desired(2, "b")
    world = switching(want)
    first = world.of(2)[0].slot
    (switch,) = world.plan(want)
    of_first = [m for m in switch.moves if m.to.slot == first]
    of_second = [m for m in switch.moves if m.to.slot != first]
    world.do(SwitchBuckets((*of_first[:2], *of_second[:6])))
    observed = world.observed()
    (switch,) = plan(want, MIRROR, replace(observed, pool=replace(observed.pool, rebalanced=True)), 0.0)
    assert Counter(m.to.slot for m in switch.moves)[first] == BUCKETS // 2 - 2


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


def test_a_keeper_that_does_not_come_back_is_removed_though_nobody_has_what_it_kept_yet():
    world = draining(2)
    world.change(1, ready=False, down_since=0.0)
    world.now = 60.0
    want = desired(2, "b", replace_after=60.0)
    world.do(DrainEngine(1))
    done = world.plan(want)
    assert kinds(done) == {"AdoptKept": 1, "RemoveEngine": 1}
    world.do(next(a for a in done if isinstance(a, RemoveEngine)))
    world.settle(want)
    assert {k.slot for k in world.keepers} == {2}
    assert sum(world.open.values()) == BUCKETS


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
    want = desired(3, "b")
    world = switching(want)
    world.change(1, state=State.FAILED, ready=False, down_since=0.0)
    done = world.turn(want)
    assert kinds(done) == {"SwitchBuckets": 1, "AssignBuckets": 1}
    world.settle(want)
    assert world.switched == BUCKETS
    assert sum(world.open.values()) == BUCKETS


def test_a_keeper_that_leaves_and_still_answers_is_switched_at_once_and_not_moved_before():
    want = desired(3, "b")
    world = switching(want)
    world.change(1, leaving=True)
    done = world.turn(want)
    assert kinds(done) == {"DrainEngine": 1, "SwitchBuckets": 1}
    world.settle(want)
    assert 1 not in world.engines
    assert sum(world.open.values()) == BUCKETS


def test_an_older_set_of_mixed_templates_keeps_its_engines():
    world = draining(2)
    world.change(2, template="older")
    assert world.plan(desired(2, "b")) == []


# ---- one at a time -----------------------------------------------------------------------------------------------


def test_growth_goes_on_in_the_current_set_and_buckets_in_mirror_stay():
    world = draining(2)
    for bucket in range(0, BUCKETS, 2):
        world.close(1, bucket)
    before = list(world.owners)
    want = desired(4, "b")
    assert not held(want, world.sets)
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
    assert held(want, world.sets)
    assert not held(desired(2, "b"), world.sets)
    world.close_all(of=1)
    world.settle(want)
    world.close_all()
    world.settle(want)
    world.check_goal(want)
    assert not held(want, world.sets)


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


def test_no_connection_is_ended_before_the_last_bucket_is_switched():
    want = desired(3, "b")
    world = switching(want)
    (switch,) = world.plan(want)
    world.do(SwitchBuckets(switch.moves[1:]))
    world.now = 1e9
    assert world.plan(want, mirror("Reset")) == [SwitchBuckets(switch.moves[:1])]
    world.turn(want, mirror("Reset"))
    assert world.plan(want, mirror("Reset")) == [EndSet(1, "Reset")]


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


def test_engines_that_are_wanted_again_before_all_have_gone_are_of_the_same_set():
    world = started(2)
    done = world.plan(desired(0))
    for action in done[:2]:
        world.do(action)
    assert world.set_in(SetState.CURRENT).replicas == 0
    world.settle(desired(2))
    world.check_goal(desired(2))
    assert world.sets.last == 1


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
    world = switching(desired(3))
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


def test_buckets_that_a_person_has_placed_stay_where_they_are_in_a_set_of_full_size():
    world = started(2)
    world.owners = [Owner(1, b % 2) for b in range(BUCKETS)]
    assert world.plan(desired(2))
    assert plan(desired(2), MIRROR, world.observed(pinned=range(BUCKETS)), 0.0) == []


def test_buckets_that_a_person_has_placed_are_switched_like_others():
    want = desired(9, "b")
    world = switching(want)
    (switch,) = plan(want, MIRROR, world.observed(pinned=range(BUCKETS)), 0.0)
    assert len(switch.moves) == BUCKETS
