"""The autoscaler: every recorded decision of the HPA, laws that hold for any load, and what is ours."""

import ast
import copy
import importlib
import inspect
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import hpa_replay

from packetstack_core import autoscalers
from packetstack_core.autoscaling.behavior import DEFAULT_DOWN, DEFAULT_UP, Behavior, Memory, Policy, Recommendation
from packetstack_core.autoscaling.calculator import Scale, View
from packetstack_core.autoscaling.controller import SelectorError, decide, no_scale, propose, refused, written
from packetstack_core.autoscaling.metrics import Container, MetricError, Pod, Sample
from packetstack_core.autoscaling.numbers import approximate, milli
from packetstack_core.autoscaling.settings import Settings, Tolerances
from packetstack_core.autoscaling.spec import Metric, Spec, Target, spec_of
from packetstack_core.autoscaling.status import Decision, Status
from packetstack_core.reasons import ConditionReason
from packetstack_core.values import quantity

VECTORS = sorted((Path(__file__).parent / "hpa_vectors").glob("*.json"))
SETTINGS = Settings()
BUSY = Metric("Engine", "Utilization", Target("Utilization", 60))
PACKETS = Metric("Engine", "PacketsPerSecond", Target("AverageValue", 1_000_000))
QUEUE = Metric("External", "queue", Target("AverageValue", 10_000))
moderate = settings(max_examples=80, deadline=None)


def engines(count):
    return [Pod(f"engine-{i}", start_time=-3600, ready="True", ready_transition=-3590) for i in range(count)]


def view(pods):
    """Of a scale that has all of these pods."""
    return View(pods, Scale(len(pods), len(pods)), Tolerances(), SETTINGS, 0)


def samples(values, now=0.0):
    return {f"engine-{i}": Sample(value, now, 5) for i, value in enumerate(values) if value is not None}


def step(spec, memory, status, current, readings, now, pods=None, write=True):
    """One reconcile of a scale that does as it is told; returns the replicas after it, too."""
    pods = engines(current) if pods is None else pods
    decision = decide(spec, SETTINGS, memory, status, Scale(current, current), pods, readings, now)
    if decision.write is None or not write:
        return decision, current
    return written(decision, spec, SETTINGS, now), decision.write


def follow(spec, loads, current, seconds=15, start=0.0):
    """Replicas after each tick when each engine carries an equal part of the load, in engines fully busy."""
    memory, status, replicas = Memory(), Status(), []
    for i, load in enumerate(loads):
        now = start + i * seconds
        share = min(1000, round(1000 * load / current)) if current else 0
        decision, current = step(spec, memory, status, current, [samples([share] * current, now)], now)
        memory, status = decision.memory, decision.status
        replicas.append(current)
    return replicas


# ---- the recorded decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.name)
def test_every_recorded_decision_comes_out_the_same(path):
    for case in hpa_replay.cases(path):
        assert hpa_replay.replay(case) == [], case["id"]


def leaves(value, path=()):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def recorded_leaves(case):
    """Paths to all that was recorded in a case."""
    for path in leaves(case):
        if "expect" in path or path[0] == "final":
            yield path


def test_the_replay_notices_any_one_wrong_value():
    rng = random.Random(1)
    for path in VECTORS:
        for case in rng.sample([c for c in hpa_replay.cases(path) if "flags" not in c], 12):
            for where in rng.sample(found := list(recorded_leaves(case)), min(6, len(found))):
                wrong = copy.deepcopy(case)
                parent = wrong
                for key in where[:-1]:
                    parent = parent[key]
                old = parent[where[-1]]
                is_number = isinstance(old, int | float) and not isinstance(old, bool)
                parent[where[-1]] = old + 1 if is_number else "wrong"
                assert hpa_replay.replay(wrong), (case["id"], where)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("[", "not JSON"),
        ("\xff", "not JSON"),
        ("{}", "holds no cases"),
        ("[]", "holds no cases"),
        ("[7]", "7 is not a case"),
        ('[{"id": "x1"}]', "case x1: 'metrics' is missing"),
        ('[{"id": "x1", "fn": "nothing", "in": {}, "expect": {}}]', "case x1: 'nothing' is missing or unknown"),
        ('[{"id": "x1", "ticks": 5, "controller": 1, "spec": 2}]', "case x1: not of the format"),
        (
            '[{"id": "x1", "fn": "storeScaleEvent", "expect": {}, "in": '
            '{"prevReplicas": 1, "newReplicas": 2, "behavior": {"scaleUp": {"selectPolicy": "Mux"}}}}]',
            "case x1: not of the format: 'Mux' is none of Max, Min, Disabled",
        ),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_file_gets_one_clear_line(tmp_path, capsys, text, says):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    assert hpa_replay.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith(f"{path}: ")
    assert error.count("\n") == 1


def test_the_replay_prints_what_differs_and_fails(tmp_path, capsys):
    case = {"id": "x", "fn": "legacyLimit", "expect": {"replicas": 9, "reason": "ScaleUpLimit"}}
    case["in"] = {"minReplicas": 1, "maxReplicas": 20, "currentReplicas": 2, "desiredReplicas": 10}
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps([case]))
    assert hpa_replay.main([str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: x: replicas is 4, recorded 9",
        f"{path}: 1 cases, 1 differ",
    ]


def test_a_tolerance_includes_both_of_its_ends():
    assert Tolerances(0.1, 0.1).within(1.1), "1 - 1.1 is below -0.1 in floats; the HPA compares with 1.0 + 0.1"
    assert Tolerances(0.1, 0.1).within(0.9)
    assert not Tolerances(0.1, 0.1).within(1.1000001)
    assert not Tolerances(0.0, 0.1).within(1.0000001)


def test_numbers_are_those_of_quantities():
    assert approximate(quantity("18m")) == 18 * 0.001 != 0.018
    assert approximate(quantity("0.05")) == 50 * 0.001
    assert approximate(quantity("2")) == 2.0
    assert [milli("1"), milli("1500m"), milli("100u"), milli("1Ki")] == [1000, 1500, 1, 1_024_000]


# ---- laws ------------------------------------------------------------------------------------------------------


policies = st.builds(
    Policy, st.sampled_from(["Pods", "Percent"]), st.integers(1, 200), st.sampled_from([15, 60, 120, 600])
)
selects = st.sampled_from(["Max", "Min", "Disabled"])


@st.composite
def behaviors(draw):
    def rules(default):
        return replace(
            default,
            policies=tuple(draw(st.lists(policies, min_size=1, max_size=3))),
            select_policy=draw(selects),
            stabilization_window_seconds=draw(st.sampled_from([0, 15, 60, 300])),
            tolerance=draw(st.sampled_from([None, 0.0, 0.05, 0.2])),
        )

    return draw(st.none() | st.builds(Behavior, st.just(rules(DEFAULT_UP)), st.just(rules(DEFAULT_DOWN))))


@st.composite
def specs(draw, metrics=(BUSY,)):
    minimum = draw(st.integers(1, 10))
    return Spec(draw(st.integers(minimum, 30)), metrics, minimum, draw(behaviors()))


# Shares of 1000 that an engine is busy; None: it has no sample.
readings = st.lists(st.none() | st.integers(0, 1000), max_size=30)


@moderate
@given(specs(), st.lists(st.tuples(readings, st.integers(-200, 400)), min_size=1, max_size=12), st.integers(0, 40))
def test_replicas_stay_between_the_limits_whatever_is_measured_and_however_time_runs(spec, ticks, current):
    memory, status, now = Memory(), Status(), 0.0
    for values, seconds in ticks:
        now += seconds
        before = current
        decision, current = step(spec, memory, status, current, [samples(values, now)], now)
        memory, status = decision.memory, decision.status
        if before == 0:
            assert current == 0, "somebody switched the stack off"
        elif spec.minimum <= before <= spec.maximum:
            assert spec.minimum <= current <= spec.maximum
        else:
            assert current in (spec.minimum, spec.maximum)
        if spec.minimum <= before <= spec.maximum:
            off = spec.behavior and [r.select_policy == "Disabled" for r in (spec.behavior.up, spec.behavior.down)]
            assert not (off and off[0] and current > before)
            assert not (off and off[1] and current < before)


@moderate
@given(specs(), st.lists(st.floats(0, 20), min_size=1, max_size=20), st.integers(1, 20))
def test_the_same_load_gives_the_same_replicas(spec, loads, current):
    first = follow(spec, loads, current)
    assert first == follow(spec, loads, current)
    assert first == follow(spec, loads, current, start=1e6), "only differences of times count"


@moderate
@given(st.integers(1, 20), st.lists(st.integers(-100, 100), min_size=41, max_size=41), behaviors())
def test_ten_minutes_of_noise_inside_the_tolerance_change_nothing(current, noise, behavior):
    if behavior is not None:
        behavior = Behavior(replace(behavior.up, tolerance=None), replace(behavior.down, tolerance=None))
    spec = Spec(1000, (PACKETS,), 1, behavior)
    memory, status = Memory(), Status()
    for i, thousandths in enumerate(noise):
        now = 15.0 * i
        # Engines differ by far more than the tolerance; their average stays inside it.
        values = [1_000_000 + 1_000 * thousandths] * current
        for j in range(0, current - 1, 2):
            values[j], values[j + 1] = values[j] + 700_000, values[j + 1] - 700_000
        decision, after = step(spec, memory, status, current, [samples(values, now)], now)
        memory, status = decision.memory, decision.status
        assert after == current, str(decision.record)
    assert status.last_scale_time is None


@moderate
@given(st.lists(st.none() | st.integers(0, 1000), min_size=1, max_size=20), st.data())
def test_more_load_never_asks_for_fewer_engines(values, data):
    if all(value is None for value in values):
        values[0] = 500
    more = [v if v is None else data.draw(st.integers(v, 1000)) for v in values]
    metric = replace(BUSY, type="Resource", name="busy")
    pods = [replace(p, requests={}, containers=[Container("a", {"busy": 1000})]) for p in engines(len(values))]

    def asked(of):
        return propose(metric, samples(of), view(pods)).replicas

    assert asked(values) <= asked(more)


@moderate
@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=20), st.integers(1, 20))
def test_engines_without_a_sample_never_turn_the_direction(values, missing):
    total = len(values) + missing
    metric = replace(PACKETS, type="Pods")
    average = sum(values) // len(values)
    found = propose(metric, samples(values), view(engines(total)))
    assert found.missing == missing
    assert found.replicas <= total if average < 1_000_000 else found.replicas >= total


@moderate
@given(
    specs(metrics=(BUSY, PACKETS, QUEUE)),
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 7), st.integers(-100, 200)), min_size=1, max_size=10),
    st.integers(1, 30),
)
def test_never_fewer_engines_on_a_part_of_the_data(spec, ticks, current):
    memory, status, now = Memory(), Status(), 0.0
    current = min(max(current, spec.minimum), spec.maximum)
    for value, failing, seconds in ticks:
        now += seconds
        given_ = [samples([value] * current, now), samples([1000 * value] * current, now), (value * 100,)]
        error = MetricError("api_error", "the metrics API is down")
        given_ = [error if failing >> i & 1 else reading for i, reading in enumerate(given_)]
        decision, after = step(spec, memory, status, current, given_, now)
        memory, status = decision.memory, decision.status
        assert after >= current
        assert decision.error in ("partial_metrics", "compute_failed")
        if decision.error == "compute_failed":
            active = next(c for c in status.conditions if c.type == "ScalingActive")
            assert (active.status, active.reason[:9]) == ("False", "FailedGet")
        current = after


@moderate
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(["none", "stale", "future"])), min_size=2, max_size=20),
    st.integers(0, 18),
)
def test_an_engine_without_a_recent_sample_keeps_its_stack_from_shrinking(found, blind):
    now, current = 1000.0, len(found)
    age = {"stale": now - 46, "future": now + 46}
    given_ = {}
    for i, (value, how) in enumerate(found):
        if i == blind % current:
            if how != "none":
                given_[f"engine-{i}"] = Sample(value, age[how])
        else:
            given_[f"engine-{i}"] = Sample(value, now)
    decision, after = step(Spec(50, (BUSY,)), Memory(), Status(), current, [given_], now)
    assert after >= current
    assert decision.record.proposals[0].missing == 1 or "no recent sample" in decision.record.proposals[0].error


@moderate
@given(st.lists(st.floats(0, 40), min_size=10, max_size=60), st.integers(1, 5), st.sampled_from([30, 60, 120]))
def test_no_period_sees_a_greater_change_than_its_policy_allows(loads, value, period):
    rules = {"policies": (Policy("Pods", value, period),), "stabilization_window_seconds": 0}
    behavior = Behavior(replace(DEFAULT_UP, **rules), replace(DEFAULT_DOWN, **rules))
    replicas = [10, *follow(Spec(100, (BUSY,), 1, behavior), loads, current=10)]
    for i in range(1, len(replicas)):
        began = replicas[max(0, i - period // 15)]
        if replicas[i] > replicas[i - 1]:
            assert replicas[i] <= began + value
        elif replicas[i] < replicas[i - 1]:
            assert replicas[i] >= began - value


@moderate
@given(st.lists(st.floats(0, 40), min_size=30, max_size=200), behaviors())
def test_what_is_remembered_stays_small(loads, behavior):
    spec = Spec(100, (BUSY,), 1, behavior)
    memory, status, current = Memory(), Status(), 10
    for i, load in enumerate(loads):
        values = [min(1000, round(1000 * load / current))] * current
        decision, current = step(spec, memory, status, current, [samples(values, 15.0 * i)], 15.0 * i)
        memory, status = decision.memory, decision.status
    assert len(memory.recommendations) <= 300 // 15 + 2
    assert max(len(memory.up_events), len(memory.down_events)) <= 600 // 15 + 2


def test_the_code_reads_no_clock():
    names = ("numbers", "metrics", "settings", "calculator", "behavior", "spec", "status", "controller")
    modules = [importlib.import_module(f"packetstack_core.autoscaling.{name}") for name in names]
    imports = {
        name
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    assert not imports & {"time", "datetime", "random", "os"}


# ---- one reconcile ---------------------------------------------------------------------------------------------


def condition(decision: Decision, kind):
    return next((c.status, c.reason) for c in decision.status.conditions if c.type == kind)


def test_a_step_of_load_is_answered_in_the_next_reconcile():
    assert follow(Spec(20, (BUSY,)), [2.4, 2.4, 4.8, 4.8], current=4) == [4, 4, 7, 8]


def test_a_controller_that_has_just_started_does_not_scale_down():
    replicas = follow(Spec(20, (BUSY,)), [0.6] * 25, current=8)
    assert replicas[:20] == [8] * 20
    assert replicas[-1] == 1


def test_the_record_says_what_each_step_did():
    rules = replace(DEFAULT_UP, policies=(Policy("Pods", 1, 60),))
    spec = Spec(10, (BUSY, PACKETS), 1, Behavior(up=rules))
    decision, after = step(spec, Memory(), Status(), 2, [samples([900, 900]), samples([1_050_000, 950_000])], now=0.0)
    assert after == 3
    record = decision.record
    assert [p.replicas for p in record.proposals] == [3, 2]
    assert record.winner == "engine metric Utilization"
    assert str(record) == (
        "2 -> 3: engine metric Utilization 90/60 % -> 3; engine metric PacketsPerSecond 1000/1000 -> 2"
    )
    decision, after = step(
        spec, decision.memory, decision.status, 3, [samples([990] * 3, 15.0), samples([0] * 3, 15.0)], now=15.0
    )
    assert after == 3
    assert decision.record.limited_by == "policy 1 replicas in 60 s"
    assert condition(decision, "ScalingLimited") == ("True", "ScaleUpLimit")
    decision, after = step(
        spec, decision.memory, decision.status, 3, [samples([0] * 3, 30.0), samples([0] * 3, 30.0)], now=30.0
    )
    assert (after, decision.record.proposed, decision.record.stabilized) == (3, 0, 3)
    assert "scale-down window of 300 s" in str(decision.record)
    assert condition(decision, "AbleToScale") == ("True", "ScaleDownStabilized")


def test_events_and_conditions_use_the_words_of_the_hpa():
    spec = Spec(10, (BUSY,))
    decision, _ = step(spec, Memory(), Status(), 2, [samples([900, 900])], now=7.0)
    assert [(e.kind, e.reason, e.message) for e in decision.events] == [
        ("Normal", "SuccessfulRescale", "New size: 3; reason: engine metric Utilization above target")
    ]
    assert [(c.type, c.status, c.reason, c.last_transition) for c in decision.status.conditions] == [
        ("AbleToScale", "True", "SucceededRescale", 7.0),
        ("ScalingActive", "True", "ValidMetricFound", 7.0),
        ("ScalingLimited", "False", "DesiredWithinRange", 7.0),
    ]
    down = MetricError("api_error", "the operator has no load yet")
    decision, after = step(spec, Memory(), decision.status, 3, [down], now=9.0)
    assert after == 3
    assert [e.reason for e in decision.events] == ["FailedGetEngineMetric", "FailedComputeMetricsReplicas"]
    assert next(c for c in decision.status.conditions if c.type == "ScalingActive").message == (
        "no number of engines can be computed, so it stays: unable to get metric Utilization: the operator has no load yet"
    )


def test_a_refused_write_is_no_scale_event():
    spec = Spec(10, (BUSY,), behavior=Behavior())
    decision, _ = step(spec, Memory(), Status(), 2, [samples([900, 900])], now=0.0, write=False)
    after = refused(decision, "conflict", 0.0)
    assert condition(after, "AbleToScale") == ("False", "FailedUpdateScale")
    assert (after.memory.up_events, after.error) == ((), "update_scale_failed")
    assert len(after.memory.recommendations) == 2
    with pytest.raises(ValueError, match="writes nothing"):
        refused(replace(decision, write=None), "conflict", 0.0)


def test_a_scale_that_cannot_be_read_keeps_what_is_known():
    known = Status(3, 4, 5.0)
    decision = no_scale(Memory(), known, "not found", 9.0)
    assert condition(decision, "AbleToScale") == ("False", "FailedGetScale")
    assert replace(decision.status, conditions=()) == known


def test_pods_that_cannot_be_told_apart_stop_scaling():
    error = SelectorError(ConditionReason.AMBIGUOUS_SELECTOR, "pods are selected by two autoscalers")
    spec = Spec(10, (BUSY,))
    decision = decide(spec, SETTINGS, Memory(), Status(), Scale(3, 3), engines(3), [{}], 0.0, error)
    assert (decision.write, condition(decision, "ScalingActive")) == (None, ("False", "AmbiguousSelector"))


def test_replicas_that_somebody_set_to_zero_stay_zero():
    spec = Spec(10, (BUSY,))
    decision = decide(spec, SETTINGS, Memory(), Status(), Scale(0, 0), [], [{}], 0.0)
    assert (decision.write, condition(decision, "ScalingActive")) == (None, ("False", "ScalingDisabled"))


def test_samples_of_engines_that_left_have_no_say():
    found = propose(BUSY, samples([600, 600, 0, 0, 0]), view(engines(2)))
    assert (found.replicas, found.utilization) == (2, 60)


def test_an_absurd_value_asks_for_many_engines_not_for_none():
    decision, after = step(Spec(10, (QUEUE,)), Memory(), Status(), 4, [(2**62,)], now=0.0)
    assert after == 8, str(decision.record)


def test_readings_that_do_not_belong_to_the_spec_are_an_error_of_the_caller():
    with pytest.raises(ValueError, match="0 readings for 1 metrics"):
        decide(Spec(10, (BUSY,)), SETTINGS, Memory(), Status(), Scale(1, 1), engines(1), [], 0.0)
    with pytest.raises(TypeError, match="Engine metric Utilization"):
        decide(Spec(10, (BUSY,)), SETTINGS, Memory(), Status(), Scale(1, 1), engines(1), [7], 0.0)


def test_a_resource_becomes_a_spec_with_defaults_filled_in():
    text = """
      maxReplicas: 8
      metrics:
      - {type: Engine, engine: {name: Utilization, target: {type: Utilization, averageUtilization: 60}}}
      - type: External
        external:
          metric: {name: queue, selector: {matchLabels: {b: "2", a: "1"}}}
          target: {type: Value, value: "1500m"}
      behavior:
        scaleUp: {tolerance: "0.018"}
        scaleDown: {policies: [{type: Pods, value: 1, periodSeconds: 60}]}
    """
    spec = spec_of(autoscalers.Autoscaling.model_validate(yaml.safe_load(text)))
    assert spec.metrics[0] == BUSY
    assert spec.metrics[1].target == Target("Value", 1500)
    assert spec.metrics[1].title() == (
        "external metric queue(&LabelSelector{MatchLabels:map[string]string{a: 1,b: 2,},"
        "MatchExpressions:[]LabelSelectorRequirement{},})"
    )
    assert spec.behavior == Behavior(
        replace(DEFAULT_UP, tolerance=0.018000000000000002), replace(DEFAULT_DOWN, policies=(Policy("Pods", 1, 60),))
    )
    bare = spec_of(autoscalers.Autoscaling.model_validate({"maxReplicas": 8}))
    assert (bare.minimum, bare.behavior, bare.metrics) == (
        1,
        None,
        (Metric("Engine", "Utilization", Target("Utilization", 80)),),
    )


def test_a_decision_over_a_thousand_engines_takes_a_fraction_of_20_ms():
    spec = Spec(2000, (BUSY, PACKETS), behavior=Behavior())
    pods = engines(1000)
    given_ = [samples([i % 1000 for i in range(1000)]), samples([i * 1000 for i in range(1000)])]
    memory = Memory(tuple(Recommendation(i, float(-i)) for i in range(240)))
    spent = []
    for _ in range(20):
        before = time.process_time()
        decide(spec, SETTINGS, memory, Status(), Scale(1000, 1000), pods, given_, 0.0)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.010
