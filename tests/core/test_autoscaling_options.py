"""Schedules against a second reading of cron, fallback, pause."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter
from hypothesis import given, settings
from hypothesis import strategies as st

from packetstack_core import autoscalers
from packetstack_core.autoscaling.behavior import Memory
from packetstack_core.autoscaling.calculator import Scale
from packetstack_core.autoscaling.controller import decide, written
from packetstack_core.autoscaling.metrics import MetricError, Pod, Sample
from packetstack_core.autoscaling.options import (
    State,
    failures,
    fall_back,
    hold,
    is_active,
    reconcile,
    with_decision,
    with_schedule,
)
from packetstack_core.autoscaling.settings import Settings
from packetstack_core.autoscaling.spec import Metric, Spec, Target
from packetstack_core.autoscaling.status import Status

SPEC = Spec(10, (Metric("Engine", "Utilization", Target("Utilization", 60)),), 2)
DOWN = MetricError("api_error", "no agent answers")


def schedule(cron, hours=1.0, zone="UTC", **limits):
    fields = {"name": "office", "cron": cron, "timeZone": zone, "durationSeconds": int(hours * 3600)}
    return autoscalers.Schedule.model_validate(fields | limits)


def at(text, zone="UTC"):
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))


def decided(reading, current=4, status=None):
    pods = [Pod(f"engine-{i}") for i in range(current)]
    return decide(SPEC, Settings(), Memory(), status or Status(), Scale(current, current), pods, [reading], 0.0)


def test_office_hours_have_limits_of_their_own():
    office = schedule("0 8 * * 1-5", hours=10, zone="Europe/Berlin", minReplicas=5)
    monday = "2026-11-23T"
    assert not is_active(office, at(monday + "07:59:59", "Europe/Berlin"))
    assert is_active(office, at(monday + "08:00:00", "Europe/Berlin"))
    assert is_active(office, at(monday + "17:59:59", "Europe/Berlin"))
    assert not is_active(office, at(monday + "18:00:00", "Europe/Berlin"))
    assert not is_active(office, at("2026-11-22T12:00:00", "Europe/Berlin")), "a Sunday"
    spec, name = with_schedule(SPEC, [office], at(monday + "12:00:00"))
    assert (spec.minimum, spec.maximum, name) == (5, 10, "office")
    assert with_schedule(SPEC, [office], at(monday + "23:00:00")) == (SPEC, "")


def test_the_first_active_schedule_wins_and_its_limit_moves_the_other():
    night, day = schedule("0 0 * * *", 24, maxReplicas=1), schedule("0 0 * * *", 24, minReplicas=20)
    now = at("2026-11-23T12:00:00")
    assert with_schedule(SPEC, [night, day], now)[0] == Spec(1, SPEC.metrics, 1)
    assert with_schedule(SPEC, [day, night], now)[0] == Spec(20, SPEC.metrics, 20)


def test_a_schedule_reaches_over_midnight_and_over_days():
    assert is_active(schedule("0 22 * * 5", 60), at("2026-11-23T09:59:00")), "from Friday 22:00 for 60 hours"
    assert not is_active(schedule("0 22 * * 5", 60), at("2026-11-23T10:00:00"))


def test_a_time_that_a_change_of_clocks_leaves_out_is_an_hour_later():
    skipped = schedule("30 2 29 3 *", 0.5, zone="Europe/Berlin")
    assert not is_active(skipped, at("2026-03-29T00:59:00"))
    assert is_active(skipped, at("2026-03-29T01:30:00")), "03:30 in Berlin"
    twice = schedule("30 2 25 10 *", 0.5, zone="Europe/Berlin")
    assert is_active(twice, at("2026-10-25T00:30:00"))
    assert not is_active(twice, at("2026-10-25T01:30:00"))


def test_days_of_the_month_and_of_the_week_are_either_when_both_are_given():
    both = schedule("0 0 1 * mon", 24)
    assert [is_active(both, at(f"2026-11-0{day}T12:00:00")) for day in (1, 2, 3)] == [True, True, False]
    assert not is_active(schedule("0 0 30 2 *", 24), at("2026-11-03T12:00:00")), "a day that never comes"


@pytest.mark.parametrize(
    "text",
    ["60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *", "x * * * *"],
)
def test_a_wrong_cron_is_named(text):
    with pytest.raises(ValueError, match="use five fields") as caught:
        is_active(schedule(text), at("2026-11-23T12:00:00"))
    assert "\n" not in str(caught.value)


def test_an_unknown_time_zone_is_named():
    with pytest.raises(ValueError, match="time zone"):
        is_active(schedule("0 0 * * *", zone="Europe/Nowhere"), at("2026-11-23T12:00:00"))


def matches(parts, minute):
    """Whether cron runs something in this minute; `parts` are of the forms that `fields` has."""

    def one(part, value, low):
        if part.startswith("*"):
            return (value - low) % int(part[2:] or 1) == 0
        spans = [item.partition("-") for item in part.split(",")]
        return any(int(first) <= value <= int(last or first) for first, _, last in spans)

    days = one(parts[2], minute.day, 1), one(parts[4], minute.isoweekday() % 7, 0)
    day = all(days) if "*" in (parts[2], parts[4]) else any(days)
    return one(parts[0], minute.minute, 0) and one(parts[1], minute.hour, 0) and day


fields = st.sampled_from(["*", "0", "*/7", "3,9", "1-5"])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(
        fields, fields, st.sampled_from(["*", "1,15", "28-31"]), st.just("*"), st.sampled_from(["*", "1-5", "0"])
    ),
    st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)),
    st.sampled_from([60, 600, 7200, 100_000]),
)
def test_a_schedule_is_active_exactly_when_a_minute_before_matched(parts, now, seconds):
    """Minute by minute, as a cron daemon finds its jobs."""
    now = now.replace(tzinfo=UTC)
    minute = now.replace(second=0, microsecond=0)
    expected = False
    while minute + timedelta(seconds=seconds) > now:
        if matches(parts, minute):
            expected = True
            break
        minute -= timedelta(minutes=1)
    assert is_active(schedule(" ".join(parts), seconds / 3600), now) == expected


def test_the_fallback_counts_after_as_many_failures_as_it_says():
    fallback = autoscalers.Fallback.model_validate({"failureThreshold": 3, "replicas": 6})
    status, failed = Status(desired_replicas=4), 0
    for reading, write in [(DOWN, None), (DOWN, None), (DOWN, 6)]:
        decision = decided(reading, status=status)
        failed = failures(failed, decision)
        decision = fall_back(decision, SPEC, status, fallback, failed)
        assert decision.write == write
    assert "3 times in a row" in str(decision.record)
    after = written(decision, SPEC, Settings(), 0.0)
    assert after.events[-1].message == "New size: 6; reason: Fallback, as no metric can be used"
    good = decided({f"engine-{i}": Sample(600) for i in range(4)})
    assert failures(failed, good) == 0
    assert fall_back(good, SPEC, status, fallback, 0) == good


@pytest.mark.parametrize(("replicas", "write"), [(1, 2), (40, 10), (4, None)])
def test_the_fallback_stays_between_the_limits(replicas, write):
    fallback = autoscalers.Fallback.model_validate({"failureThreshold": 1, "replicas": replicas})
    assert fall_back(decided(DOWN), SPEC, Status(), fallback, 1).write == write


def test_a_paused_stack_says_what_it_would_do_and_does_nothing():
    decision = hold(decided({f"engine-{i}": Sample(1000) for i in range(4)}))
    assert decision.write is None
    assert decision.status.desired_replicas == 4
    assert str(decision.record) == "4 -> 4: engine metric Utilization 100/60 % -> 7; paused, else 7"
    assert decision.events[-1].reason == "AutoscalingPaused"
    still = decided({f"engine-{i}": Sample(600) for i in range(4)})
    assert hold(still) == still


FLOWS = {
    "type": "Engine",
    "engine": {"name": "NewFlowsPerSecond", "target": {"type": "AverageValue", "averageValue": "1k"}},
}


def followed(loads, seconds=2.0, **options):
    """Replicas after each reconcile under a load of flows per second, which the engines share."""
    wanted = autoscalers.Autoscaling.model_validate({"maxReplicas": 50, "metrics": [FLOWS]} | options)
    state, current, replicas = State(), 2, []
    for i, load in enumerate(loads):
        now = i * seconds
        pods = [Pod(f"engine-{j}", ready="True") for j in range(current)]
        reading = DOWN if load is None else {pod.name: Sample(load * 1000 // current, now) for pod in pods}
        scale = Scale(current, current)
        decision, spec, state = reconcile(
            wanted, Settings(), state, scale, pods, [reading], now, at("2026-11-23T12:00:00")
        )
        if decision.write is not None:
            current = decision.write
            state = with_decision(state, written(decision, spec, Settings(), now))
        replicas.append(current)
    return replicas


CALM = {
    "behavior": {
        "scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]},
        "scaleDown": {"stabilizationWindowSeconds": 0},
    }
}


def test_a_panic_answers_a_burst_at_once_and_never_goes_down_before_it_is_over():
    burst = [2000] * 5 + [12000] * 5 + [2000] * 45
    assert max(followed(burst, **CALM)) == 3
    replicas = followed(burst, **CALM, panic={})
    # The panic window of 6 s sees the burst at once, and all of it two reconciles later.
    assert replicas[:8] == [2] * 5 + [6, 9, 12]
    # The load was last above the threshold at 10 s; a stable window of 60 s must pass.
    assert replicas[8:36] == [12] * 28
    assert replicas[36:] == [2] * 19


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.integers(0, 80_000), max_size=40), st.booleans(), st.booleans())
def test_with_all_options_replicas_stay_between_the_limits(loads, panics, falls_back):
    options = {"minReplicas": 2}
    options |= {"panic": {"thresholdPercentage": 110}} if panics else {}
    options |= {"fallback": {"failureThreshold": 2, "replicas": 90}} if falls_back else {}
    assert all(2 <= replicas <= 50 for replicas in followed(loads, 15.0, **options))


def test_without_options_nothing_is_added():
    loads = [2000, 9000, None, None, 1000, 30_000, 0] * 6
    assert followed(loads, 15.0) == followed(loads, 15.0, fallback={"failureThreshold": 3, "replicas": 9})


def test_a_schedule_of_each_minute_is_not_looked_up_for_hours(monkeypatch):
    looked, get_prev = [], croniter.get_prev
    monkeypatch.setattr(croniter, "get_prev", lambda *a, **k: looked.append(1) or get_prev(*a, **k))
    assert not is_active(schedule("* * * * *", 1.5 / 3600), at("2026-11-03T12:00:30"))
    assert not is_active(schedule("* * * * *", 1.5 / 3600, zone="Europe/Berlin"), at("2026-11-03T12:00:30"))
    assert len(looked) <= 4
