"""The planner of sets in histories in which actions fail, engines die, connections stay and wishes change at any time."""

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.core.transition_world import BUCKETS, MIRROR, World, desired, mirror, started

from packetstack_core.assignment import NOBODY, State
from packetstack_core.planning import AssignBuckets
from packetstack_core.transitions import AdoptKept, SwitchBuckets, plan


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
