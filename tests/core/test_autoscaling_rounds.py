"""The autoscaler of a stack in virtual time: from counters to replicas, status and conditions."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from packetstack_core import kinds, reading, resources, wording
from packetstack_core.autoscaling import rounds
from packetstack_core.autoscaling.calculator import Scale
from packetstack_core.autoscaling.metrics import MetricError, Pod
from packetstack_core.autoscaling.options import State
from packetstack_core.load import CoreCounters, EngineCounters, EngineLoad, History, Snapshot, StackLoad
from packetstack_core.statuses import AutoscalingStatus, PacketStackStatus

BUSY = {
    "type": "Engine",
    "engine": {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": 60}},
}
PACKETS = {
    "type": "Engine",
    "engine": {"name": "PacketsPerSecond", "target": {"type": "AverageValue", "averageValue": "1k"}},
}
QUEUED = {
    "type": "External",
    "external": {"metric": {"name": "queued"}, "target": {"type": "AverageValue", "averageValue": "10"}},
}
BEGIN = 1_000_000_000.0


def spec(**changes: Any) -> resources.Spec:
    """Of a stack whose autoscaler has these fields; `stack` are other fields of the spec."""
    stack = changes.pop("stack", {})
    fields = {"minReplicas": 1, "maxReplicas": 8, "metrics": [BUSY], "syncPeriodSeconds": 5}
    end = [{"address": "10.1.0.5", "port": 80}]
    document = {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketStack",
        "metadata": {"name": "web"},
        "spec": {
            "listeners": [{"name": "http", "address": "192.0.2.10", "port": 80, "backends": {"endpoints": end}}],
            "snat": {"addresses": ["192.0.2.64/28"]},
            "autoscaling": {**fields, **changes},
            **stack,
        },
    }
    return reading.parse(document).spec


def load_of(busy: Sequence[float], now: float, *, packets: float = 0.0) -> StackLoad:
    """Active engines that are so busy."""
    return StackLoad(
        now,
        tuple(
            EngineLoad(i, f"web-{i}", "Active", True, 5.0, (share,), (), 0, 0.0, packets, 0.0, 0.0)
            for i, share in enumerate(busy)
        ),
    )


def pods(replicas: int) -> list[Pod]:
    return [Pod(f"web-{i}", ready="True") for i in range(replicas)]


def each(busy: float, engines: int) -> list[float]:
    """Each engine is as busy."""
    return [busy] * engines


class Pool:
    """A stack in virtual time: the autoscaler decides each sync period, its wish is there one second later."""

    def __init__(self, wanted: resources.Spec, replicas: int, state: State | None = None) -> None:
        self.spec, self.replicas, self.now, self.state = wanted, replicas, BEGIN, state or State()
        self.active = replicas
        self.shown: AutoscalingStatus | None = None
        self.sizes = [replicas]

    def step(
        self,
        busy: Callable[[int], Sequence[float]],
        change: Callable[[StackLoad], StackLoad | MetricError] = lambda load: load,
    ) -> rounds.Round:
        """One sync period. `busy`: how busy each of so many engines is; `change`: what becomes of that on its way."""
        assert self.spec.autoscaling
        self.now += self.spec.autoscaling.sync_period_seconds
        self.active = self.replicas
        measured = change(load_of(busy(self.active), self.now))
        scale = Scale(self.replicas, self.replicas)
        done = rounds.reconcile(self.spec, self.state, scale, pods(self.active), measured, self.now)
        if done.decision.write is not None:
            self.replicas = done.decision.write
            done = rounds.written(done, self.now)
        self.state = done.state
        self.shown = rounds.show(done, self.shown, self.now)
        self.sizes.append(self.replicas)
        return done

    def condition(self, kind: str) -> tuple[str, str]:
        """Its status and reason."""
        found = next(c for c in rounds.conditions(self.state) if c.type == kind)
        return found.status, found.reason

    @property
    def status(self) -> AutoscalingStatus:
        assert self.shown
        return self.shown


def evenly(work: float) -> Callable[[int], Sequence[float]]:
    """So many fully busy engines' work, shared."""
    return lambda engines: [min(1.0, work / engines)] * engines


def without(share: float) -> Callable[[StackLoad], StackLoad]:
    """A part of the engines is not measured."""
    return lambda load: StackLoad(load.read, load.engines[round(len(load.engines) * share) :])


def down(load: StackLoad) -> MetricError:
    return MetricError("api_error", "the node's agent does not answer")


# ---- deciding --------------------------------------------------------------------------------------------------


def test_a_step_of_load_is_answered_within_one_sync_period() -> None:
    pool = Pool(spec(), 2)
    for _ in range(5):
        pool.step(evenly(1.2))
    assert pool.replicas == 2
    pool.step(evenly(1.9))
    assert pool.replicas == 4, "95 % of two engines are 64 % of three, and 60 % are wanted"
    assert pool.status.decision == "2 -> 4: engine metric Utilization 95/60 % -> 4"


def test_ten_minutes_of_noise_around_the_target_change_nothing() -> None:
    chance = random.Random(7)
    pool = Pool(spec(syncPeriodSeconds=1), 4)
    for _ in range(600):
        pool.step(lambda n: [min(1.0, max(0.0, chance.gauss(0.6, 0.03))) for _ in range(n)])
    assert set(pool.sizes) == {4}


@given(seed=st.integers(0, 2**32), replicas=st.integers(1, 8))
@examples(max_examples=30, deadline=None)
def test_noise_within_the_tolerance_never_changes_anything(seed: int, replicas: int) -> None:
    chance = random.Random(seed)
    pool = Pool(spec(), replicas)
    for _ in range(60):
        pool.step(lambda n: [chance.uniform(0.55, 0.65) for _ in range(n)])
    assert set(pool.sizes) == {replicas}


def test_less_load_gives_engines_back_after_the_window_of_scaling_down() -> None:
    pool = Pool(spec(behavior={"scaleDown": {"stabilizationWindowSeconds": 60}}), 4)
    for _ in range(12):
        pool.step(evenly(0.5))
    assert pool.replicas == 4, "a fresh autoscaler does not know how much was asked for before"
    assert pool.condition("AbleToScale") == ("True", "ScaleDownStabilized")
    pool.step(evenly(0.5))
    assert pool.replicas == 1


def test_the_metric_that_asks_for_most_counts() -> None:
    wanted = spec(metrics=[BUSY, PACKETS])
    now = BEGIN
    done = rounds.reconcile(wanted, State(), Scale(2, 2), pods(2), load_of([0.6, 0.6], now, packets=2600.0), now)
    assert done.decision.record.proposed == 6
    assert done.decision.write == 4, "without behavior at most double, or 4"
    shown = rounds.show(done, None, now)
    assert shown.record
    assert shown.record.winner == "engine metric PacketsPerSecond"
    assert [(p.metric, p.replicas) for p in shown.record.proposals] == [
        ("engine metric Utilization", 2),
        ("engine metric PacketsPerSecond", 6),
    ]
    assert shown.record.proposals[1].value.average_value == "2600"
    assert [m.current.average_utilization for m in shown.current_metrics] == [60, None]


def test_only_active_engines_count() -> None:
    now = BEGIN
    measured = load_of([1.0, 0.0, 0.0], now)
    starting = tuple(
        e if e.id == 0 else EngineLoad(e.id, e.name, "Starting", True, 5.0, (0.0,), (), 0, 0, 0, 0, 0)
        for e in measured.engines
    )
    done = rounds.reconcile(spec(), State(), Scale(1, 1), pods(1), StackLoad(now, starting), now)
    assert done.decision.write == 2


def test_limits_of_a_schedule_hold_and_are_named() -> None:
    always = {"name": "always", "cron": "0 0 * * *", "durationSeconds": 86400, "minReplicas": 3}
    pool = Pool(spec(schedules=[always]), 1)
    pool.step(evenly(0.1))
    assert pool.replicas == 3
    assert (pool.status.schedule, pool.status.min_replicas, pool.status.max_replicas) == ("always", 3, 8)


def test_a_schedule_that_cannot_be_read_is_told_and_changes_nothing() -> None:
    wrong = {"name": "wrong", "cron": "61 8 * * *", "durationSeconds": 60, "minReplicas": 3}
    pool = Pool(spec(schedules=[wrong]), 1)
    done = pool.step(evenly(5.0))
    assert pool.replicas == 1
    assert pool.condition("ScalingActive") == ("False", "InvalidSchedule")
    assert 'cron "61 8 * * *" cannot be read' in done.decision.events[0].message


def test_a_stack_without_another_metric_never_goes_to_zero() -> None:
    pool = Pool(spec(minReplicas=0, behavior={"scaleDown": {"stabilizationWindowSeconds": 0}}), 2)
    for _ in range(3):
        pool.step(evenly(0.0))
    assert pool.replicas == 1, "without an engine nobody would see the first packet"


def test_other_metrics_are_read_by_the_caller() -> None:
    wanted = spec(metrics=[BUSY, QUEUED])
    measured = load_of([0.6], BEGIN)
    done = rounds.reconcile(wanted, State(), Scale(1, 1), pods(1), measured, BEGIN, {1: [45_000]})
    assert done.decision.write == 4, "behavior allows no more at once"
    done = rounds.reconcile(wanted, State(), Scale(1, 1), pods(1), measured, BEGIN)
    assert done.decision.write is None
    assert "FailedGetExternalMetric" in [e.reason for e in done.decision.events]


# ---- partial data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(0.5), "4 of 8 engines have no recent sample"),
        (without(1.0), "did not receive metrics"),
        (down, "the node's agent does not answer"),
        (lambda load: StackLoad(load.read - 60, load.engines), "did not receive metrics"),
        (lambda load: StackLoad(load.read + 60, load.engines), "did not receive metrics"),
    ],
    ids=["half of the samples", "no sample", "metrics down", "old samples", "samples of the future"],
)
def test_engines_are_not_given_back_on_partial_data(
    change: Callable[[StackLoad], StackLoad | MetricError], said: str
) -> None:
    quick = {"scaleDown": {"stabilizationWindowSeconds": 0}}
    pool = Pool(spec(behavior=quick), 8)
    for _ in range(100):
        done = pool.step(evenly(0.1), change)
        assert pool.condition("ScalingActive") == ("False", "FailedGetEngineMetric")
        assert said in next(c.message for c in done.decision.status.conditions if c.type == "ScalingActive")
        assert pool.status.record
        assert said in pool.status.record.proposals[0].error
    assert set(pool.sizes) == {8}
    pool.step(evenly(0.1))
    assert pool.replicas == 1
    assert pool.condition("ScalingActive") == ("True", "ValidMetricFound")


def test_a_missing_engine_is_in_the_record_even_when_it_does_not_matter() -> None:
    pool = Pool(spec(), 4)
    pool.step(evenly(2.4), without(0.25))
    assert pool.status.decision == "4 -> 4: engine metric Utilization 60/60 %, 1 without a sample -> 4"
    assert pool.status.record
    assert pool.status.record.proposals[0].missing == 1


def test_half_of_the_samples_are_enough_to_grow() -> None:
    pool = Pool(spec(), 4)
    pool.step(evenly(4.0), without(0.5))
    assert pool.replicas == 4, "the two that are missing may do nothing"
    pool = Pool(spec(), 2)
    pool.step(lambda n: [1.0] * n, without(0.5))
    assert pool.replicas == 2
    pool.step(lambda n: [1.0] * n)
    assert pool.replicas == 4


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["all", "half", "none", "down"]), st.floats(-100, 100)),
        max_size=40,
    )
)
@examples(max_examples=150, deadline=None)
def test_whatever_happens_the_limits_hold_and_partial_data_takes_no_engine(
    history: list[tuple[float, str, float]],
) -> None:
    changes: dict[str, Callable[[StackLoad], StackLoad | MetricError]] = {
        "all": lambda load: load, "half": without(0.5), "none": without(1.0), "down": down,
    }  # fmt: skip
    pool = Pool(spec(minReplicas=2, behavior={"scaleDown": {"stabilizationWindowSeconds": 0}}), 4)
    for busy, what, jump in history:
        pool.now += jump  # the clock is set, forwards or backwards
        before = pool.replicas
        pool.step(partial(each, busy), changes[what])
        assert 2 <= pool.replicas <= 8
        if what != "all":
            assert pool.replicas >= before
        for known in rounds.conditions(pool.state):
            assert known.message
        PacketStackStatus.model_validate({"autoscaling": pool.status.model_dump(by_alias=True)})


def counters(slot: int, busy: float, seconds: float) -> EngineCounters:
    cycles = round(seconds * 1000)
    core = CoreCounters(round(busy * cycles), cycles)
    return EngineCounters(slot, f"web-{slot}", "Active", True, (core,), (), 0, 0, 0, 0, 0)


def test_counters_that_restart_at_zero_and_time_that_goes_backwards_take_no_engine() -> None:
    wanted = spec(behavior={"scaleDown": {"stabilizationWindowSeconds": 0}})
    state, history = State(), History()
    since = [0.0, 0.0]
    told = []
    # At 30 s one engine begins anew, at 60 s the clock goes back by ten, at 80 s the node begins anew.
    for second in range(1, 120):
        node = second - 10 if second >= 60 else second
        if second == 30:
            since[1] = node
        if second == 80:
            history, since = History(), [node - 0.5, node - 0.5]
        now = BEGIN + node
        history.add(Snapshot(float(node), tuple(counters(i, 0.6, node - since[i]) for i in range(2))), now)
        if second % 5:
            continue
        measured = history.load(5.0) or MetricError("api_empty", "no load is measured yet")
        done = rounds.reconcile(wanted, state, Scale(2, 2), pods(2), measured, now)
        assert done.decision.write is None, second
        state = done.state
        active = next(c for c in rounds.conditions(state) if c.type == "ScalingActive")
        told.append(active.reason)
    assert told.count("FailedGetEngineMetric") == 2, "at 60 s and 80 s nothing is known"
    assert told[-1] == "ValidMetricFound"


# ---- the second writer -----------------------------------------------------------------------------------------


def test_a_second_writer_stops_the_autoscaler_until_it_was_paused() -> None:
    pool = Pool(spec(), 2)
    pool.step(evenly(1.2))
    assert not rounds.is_changed_by_other(pool.spec, pool.state, Scale(2, 2))
    assert rounds.is_changed_by_other(pool.spec, pool.state, Scale(5, 5))
    done = rounds.step_aside(pool.spec, pool.state, Scale(5, 5), "packetstack scale", pool.now)
    assert done.decision.write is None
    assert [e.reason for e in done.decision.events] == ["ExternallyScaled"]
    assert {c.type for c in done.state.status.conditions} == {"AbleToScale", "ScalingActive"}, "nothing limits it now"
    pool.state, pool.replicas = done.state, 5
    assert pool.condition("ScalingActive") == ("False", "ExternallyScaled")
    for work in (0.1, 8.0):
        done = pool.step(evenly(work))
        assert pool.replicas == 5
        assert not done.decision.events, "told once"
        assert "packetstack scale set spec.replicas to 5" in pool.status.decision
        assert "spec.autoscaling.paused" in pool.status.decision
    assert not rounds.is_changed_by_other(pool.spec, pool.state, Scale(7, 7)), "it does not care any more"

    pool.spec = spec(paused=True)
    pool.step(evenly(8.0))
    assert pool.replicas == 5
    pool.replicas = 6  # by a person, which is all right while it is paused
    assert not rounds.is_changed_by_other(pool.spec, pool.state, Scale(6, 6))
    pool.step(evenly(8.0))
    pool.spec = spec()
    assert not rounds.is_changed_by_other(pool.spec, pool.state, Scale(6, 6))
    pool.step(evenly(8.0))
    assert pool.replicas == 8
    assert pool.condition("ScalingActive") == ("True", "ValidMetricFound")


def test_by_hand_while_it_is_paused_and_blind_is_not_a_second_writer() -> None:
    pool = Pool(spec(paused=True), 2)
    pool.step(evenly(1.2))
    pool.replicas = 5
    pool.step(evenly(1.2), down)
    assert not rounds.is_changed_by_other(spec(), pool.state, Scale(5, 5))


def test_an_autoscaler_that_was_taken_away_and_put_back_takes_over() -> None:
    pool = Pool(spec(), 2)
    pool.step(evenly(1.2))
    pool.state = rounds.step_aside(pool.spec, pool.state, Scale(5, 5), "helm", pool.now).state
    assert rounds.is_external(rounds.resume(pool.status, rounds.conditions(pool.state)))
    assert not rounds.is_external(rounds.resume(None, ()))


def test_a_second_writer_outlives_the_autoscaler_that_saw_it() -> None:
    pool = Pool(spec(), 2)
    pool.step(evenly(1.2))
    pool.state = rounds.step_aside(pool.spec, pool.state, Scale(5, 5), "kubectl", pool.now).state
    pool.replicas = 5
    pool.step(evenly(1.2))
    pool.state = rounds.resume(pool.status, rounds.conditions(pool.state))
    pool.step(evenly(8.0))
    assert pool.replicas == 5
    assert pool.condition("ScalingActive") == ("False", "ExternallyScaled")


def test_while_it_is_paused_it_says_what_it_would_do() -> None:
    for paused in (spec(paused=True), spec(stack={"paused": True})):
        pool = Pool(paused, 2)
        pool.step(evenly(2.0))
        assert pool.replicas == 2
        assert pool.status.decision.endswith("paused, else 4")
        assert (pool.status.current_replicas, pool.status.desired_replicas) == (2, 2)


def test_a_paused_stack_does_not_give_the_replicas_back_to_its_autoscaler() -> None:
    pool = Pool(spec(), 2)
    pool.step(evenly(1.2))
    pool.state = rounds.step_aside(pool.spec, pool.state, Scale(5, 5), "kubectl", pool.now).state
    pool.spec = spec(stack={"paused": True})
    pool.step(evenly(1.2))
    assert rounds.is_external(pool.state)


# ---- status ----------------------------------------------------------------------------------------------------


def test_a_fresh_autoscaler_knows_when_it_scaled_last_and_takes_no_engine_at_once() -> None:
    pool = Pool(spec(behavior={"scaleDown": {"stabilizationWindowSeconds": 20}}), 2)
    pool.step(evenly(1.9))
    scaled, before = pool.status.last_scale_time, rounds.conditions(pool.state)
    assert scaled == wording.timestamp(BEGIN + 5)
    fresh = Pool(pool.spec, 4, rounds.resume(pool.status, before))
    fresh.now, fresh.shown = pool.now, pool.shown
    assert rounds.conditions(fresh.state) == before
    sizes = []
    for _ in range(5):
        fresh.step(evenly(0.1))
        sizes.append(fresh.replicas)
    assert sizes == [4, 4, 4, 4, 1]
    able = {c.type: c.last_transition_time for c in rounds.conditions(fresh.state)}
    assert able["AbleToScale"] == next(c.last_transition_time for c in before if c.type == "AbleToScale")


def test_the_status_does_not_change_when_nothing_does() -> None:
    pool = Pool(spec(), 2)
    pool.step(evenly(1.2))
    pool.step(evenly(1.2))
    before, known = pool.status, rounds.conditions(pool.state)
    for _ in range(10):
        pool.step(evenly(1.2))
    assert pool.status == before
    assert rounds.conditions(pool.state) == known
    pool.step(evenly(1.3))
    assert pool.status.decision_time == wording.timestamp(pool.now) != before.decision_time


def test_texts_in_the_status_are_bounded() -> None:
    pool = Pool(spec(), 2)
    pool.step(evenly(1.2), lambda _: MetricError("api_error", "x" * 100_000))
    assert len(pool.status.model_dump_json()) < 4000
    assert all(len(c.message) <= 500 for c in rounds.conditions(pool.state))


def test_a_refused_write_is_told_and_tried_again() -> None:
    now = BEGIN
    done = rounds.reconcile(spec(), State(), Scale(1, 1), pods(1), load_of([1.0], now), now)
    done = rounds.refused(done, "no quota", now)
    assert [e.reason for e in done.decision.events] == ["FailedRescale"]
    assert rounds.show(done, None, now).desired_replicas == 0
    again = rounds.reconcile(spec(), done.state, Scale(1, 1), pods(1), load_of([1.0], now + 5), now + 5)
    assert again.decision.write == 2


def test_the_status_is_read_as_it_was_written() -> None:
    pool = Pool(spec(metrics=[BUSY, PACKETS]), 2)
    pool.step(evenly(1.9))
    parts = {"autoscaling": pool.status, "conditions": rounds.conditions(pool.state, 7)}
    document = PacketStackStatus.model_validate(parts).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert document["autoscaling"]["currentMetrics"][0] == {
        "type": "Engine",
        "name": "Utilization",
        "target": {"averageUtilization": 60},
        "current": {"averageUtilization": 95, "averageValue": "950m"},
    }
    read = PacketStackStatus.model_validate(document)
    assert read.autoscaling == pool.status
    assert {c.observed_generation for c in read.conditions} == {7}
    again = rounds.resume(read.autoscaling, read.conditions)
    assert rounds.conditions(again) == rounds.conditions(pool.state)


def test_unreadable_times_in_a_status_do_not_stop_it() -> None:
    wrong = kinds.Condition.model_validate(
        {"type": "AbleToScale", "status": "True", "reason": "x", "lastTransitionTime": "yesterday"}
    )
    shown = AutoscalingStatus.model_validate({"lastScaleTime": "?"})
    assert rounds.resume(shown, [wrong]).status.last_scale_time == 0.0


# ---- cost ------------------------------------------------------------------------------------------------------


def test_the_time_of_a_decision_does_not_run_away_with_engines() -> None:
    """Over a thousand engines it takes less than 20 ms on a machine of its own; five times that is not the machine's fault."""
    wanted, now = spec(maxReplicas=1000, metrics=[BUSY, PACKETS]), BEGIN
    measured, active = load_of([0.6] * 1000, now, packets=900.0), pods(1000)
    took = []
    for _ in range(20):
        began = time.thread_time()
        done = rounds.reconcile(wanted, State(), Scale(1000, 1000), active, measured, now)
        rounds.show(done, None, now)
        took.append(time.thread_time() - began)
    assert min(took) <= 0.1
    print(f"best {min(took) * 1000:.2f} ms")


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0, 1.5])
def test_a_clock_that_is_set_changes_no_decision(jump: float) -> None:
    wanted = spec(
        maxReplicas=20,
        behavior={
            "scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]},
            "scaleDown": {"stabilizationWindowSeconds": 60},
        },
        panic={"windowPercentage": 50, "thresholdPercentage": 200, "stableWindowSeconds": 60},
    )

    def story(jumps: set[int]) -> list[int]:
        state, wall, steady, replicas, sizes = State(), BEGIN, 0.0, 4, []
        for second in range(0, 600, 5):
            before = wall, steady
            wall, steady = wall + 5 + (jump if second in jumps else 0), steady + 5
            state = rounds.by_the_clock(state, before, (wall, steady))
            busy = 0.95 if second == 100 or 200 <= second < 320 else 0.4 if second < 400 else 0.1
            done = rounds.reconcile(
                wanted, state, Scale(replicas, replicas), pods(replicas), load_of([busy] * replicas, wall), wall
            )
            if done.decision.write is not None:
                replicas, done = done.decision.write, rounds.written(done, wall)
            state = done.state
            sizes.append(replicas)
        return sizes

    undisturbed = story(set())
    assert len(set(undisturbed)) > 3
    for second in range(0, 600, 45):
        assert story({second, second + 20}) == undisturbed


def test_a_clock_that_is_set_back_holds_no_window_and_no_policy_for_longer_than_they_are() -> None:
    wanted = spec(
        maxReplicas=20, behavior={"scaleUp": {"policies": [{"type": "Pods", "value": 4, "periodSeconds": 60}]}}
    )
    state, now, replicas, sizes = State(), BEGIN, 4, []
    for second in range(0, 900, 5):
        if second == 30:
            now -= 86_400
        busy = 1.0 if second < 300 else 0.01
        done = rounds.reconcile(
            wanted, state, Scale(replicas, replicas), pods(replicas), load_of([busy] * replicas, now), now
        )
        if done.decision.write is not None:
            replicas, done = done.decision.write, rounds.written(done, now)
        state, now = done.state, now + 5
        sizes.append(replicas)
    assert sizes[295 // 5] == 20, "the policy's period is over, and so is the next one"
    assert sizes[590 // 5] == 20, "the window of scaling down holds as ever"
    assert sizes[-1] == 1, "but not for a day"
