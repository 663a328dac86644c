"""Replays files of recorded HPA decisions through `packetstack_core.autoscaling` and prints what differs.

    python tests/hpa_replay.py FILE...

Exit status: 0 when nothing differs, 1 when something does, 2 when a file cannot be read or is not of the format
that core/hpa_vectors/README.md describes.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from packetstack_core.autoscaling import controller
from packetstack_core.autoscaling.behavior import (
    DEFAULT_DOWN,
    DEFAULT_UP,
    Behavior,
    Memory,
    Policy,
    Recommendation,
    Rules,
    ScaleEvent,
    limit_rate,
    limit_without_behavior,
    remember_event,
    stabilize,
    stabilize_without_behavior,
    tolerances_of,
)
from packetstack_core.autoscaling.calculator import Scale, View
from packetstack_core.autoscaling.metrics import Container, MetricError, Pod, Reading, Sample, usage
from packetstack_core.autoscaling.numbers import approximate
from packetstack_core.autoscaling.settings import Settings, Tolerances
from packetstack_core.autoscaling.spec import Metric, Spec, Target
from packetstack_core.autoscaling.status import Decision, Error, MetricStatus, Status
from packetstack_core.reasons import ConditionReason, EventReason, why_not

Case = Mapping[str, Any]
Found = tuple[str, Any, Any]
"""Where in the case, what the code gives, what was recorded."""

ABSENT = "absent"
WRITE_FAILURES = ("scaleUpdate", "conflict")
TARGET_FAILURES: dict[str, Error] = {
    "scaleGet": "get_scale_failed",
    "noMapping": "get_scale_failed",
    "mapping": "mapping_failed",
    "apiVersion": "invalid_api_version",
}


class BadFile(Exception):
    """A file that is not of the format, in one line."""


def differences(actual: Any, expected: Any, path: str = "") -> Iterator[Found]:
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in actual if key not in expected)]:
            where = f"{path}.{key}" if path else key
            yield from differences(actual.get(key, ABSENT), expected.get(key, ABSENT), where)
    elif isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            yield from differences(*pair, f"{path}[{i}]")
    elif actual != expected or isinstance(actual, bool) != isinstance(expected, bool):
        yield path, actual, expected


# ---- reading ---------------------------------------------------------------------------------------------------


def number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


def one_of(value: Any, *allowed: str | None) -> Any:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(filter(None, allowed))}")
    return value


def container(resource: str, item: Case) -> Container:
    requests = {resource: number(item["requestMilli"])} if "requestMilli" in item else {}
    return Container(item["name"], requests)


def calculator_pod(resource: str, item: Case) -> Pod:
    """Of the calculator family, where requests are those of the case's resource."""
    whole = [{**item, "name": "app"}]
    return replace(
        pod(item),
        containers=tuple(container(resource, c) for c in item.get("containers", whole)),
        sidecars=tuple(container(resource, c) for c in item.get("sidecars", [])),
        init_containers=tuple(container(resource, c) for c in item.get("initContainers", [])),
        requests=item.get("podRequestsMilli", {}),
    )


def pod(item: Case) -> Pod:
    return Pod(
        item["name"],
        phase=one_of(item.get("phase", "Running"), "Pending", "Running", "Succeeded", "Failed", "Unknown"),
        deleting=item.get("deleting", False),
        start_time=number(item["startTime"]) if "startTime" in item else None,
        ready=one_of(item.get("ready"), "True", "False", "Unknown", None),
        ready_transition=number(item.get("readyTransition", -math.inf)),
    )


def behavior(item: Case | None) -> Behavior | None:
    if item is None:
        return None
    return Behavior(
        rules(item.get("scaleUp", {}), DEFAULT_UP),
        rules(item.get("scaleDown", {}), DEFAULT_DOWN),
    )


def rules(item: Case, default: Rules) -> Rules:
    policies = tuple(
        Policy(one_of(p["type"], "Pods", "Percent"), number(p["value"]), number(p["periodSeconds"]))
        for p in item.get("policies") or []
    )
    tolerance = item.get("toleranceMilli")
    return Rules(
        policies or default.policies,
        one_of(item.get("selectPolicy", default.select_policy), "Max", "Min", "Disabled"),
        item.get("stabilizationWindowSeconds", default.stabilization_window_seconds),
        None if tolerance is None else approximate(Decimal(number(tolerance)) / 1000),
    )


def recommendations(items: list[Case]) -> tuple[Recommendation, ...]:
    return tuple(Recommendation(number(r["replicas"]), number(r["at"])) for r in items)


def events(items: list[Case]) -> tuple[ScaleEvent, ...]:
    return tuple(ScaleEvent(number(e["change"]), number(e["at"]), e.get("outdated", False)) for e in items)


def memory(item: Case) -> Memory:
    return Memory(
        recommendations(item.get("recommendations", [])),
        events(item.get("scaleUpEvents", [])),
        events(item.get("scaleDownEvents", [])),
    )


def target(item: Case) -> Target:
    members = {"Utilization": "averageUtilization", "AverageValue": "averageValueMilli", "Value": "valueMilli"}
    return Target(item["type"], number(item[members[item["type"]]]))


def metric(item: Case) -> Metric:
    kind = item["type"]
    source = item.get(kind[0].lower() + kind[1:], {})
    if kind not in ("Resource", "ContainerResource", "Pods", "Object", "External"):
        return Metric(kind, "", Target("Value", 1))
    return Metric(
        kind,
        source["name"] if kind in ("Resource", "ContainerResource") else source["metric"]["name"],
        target(source["target"]),
        container=source.get("container", ""),
        described_kind=source.get("describedObject", {}).get("kind", ""),
    )


DEFAULT_METRIC = Metric("Resource", "cpu", Target("Utilization", 80))


def spec(item: Case) -> Spec:
    return Spec(
        number(item["maxReplicas"]),
        tuple(metric(m) for m in item.get("metrics") or []) or (DEFAULT_METRIC,),
        number(item.get("minReplicas", 1)),
        behavior(item.get("behavior")),
    )


def failure(answer: Case) -> MetricError | None:
    match answer.get("error"):
        case None:
            return None
        case "fetch":
            return MetricError("api_error", "unable to fetch metrics")
        case "empty":
            return MetricError("api_empty", "no metrics returned")
        case other:
            raise ValueError(f"metrics error {other!r}; use fetch or empty")


# ---- writing ---------------------------------------------------------------------------------------------------


def show_behavior(of: Behavior) -> Case:
    return {"scaleUp": show_rules(of.up), "scaleDown": show_rules(of.down)}


def show_rules(of: Rules) -> Case:
    shown = {
        "stabilizationWindowSeconds": of.stabilization_window_seconds,
        "selectPolicy": of.select_policy,
        "policies": [{"type": p.type, "value": p.value, "periodSeconds": p.period_seconds} for p in of.policies],
        "toleranceMilli": None if of.tolerance is None else round(of.tolerance * 1000),
    }
    return {key: value for key, value in shown.items() if value is not None}


def show_memory(of: Memory) -> Case:
    shown = {
        "recommendations": [{"replicas": r.replicas, "at": r.at} for r in of.recommendations],
        "scaleUpEvents": show_events(of.up_events),
        "scaleDownEvents": show_events(of.down_events),
    }
    return {key: value for key, value in shown.items() if value}


def show_events(of: tuple[ScaleEvent, ...]) -> list[Case]:
    return [{"change": e.change, "at": e.at, **({"outdated": True} if e.outdated else {})} for e in of]


def show_metric(of: MetricStatus | None) -> Case | None:
    if of is None:
        return None
    shown = {
        "averageUtilization": of.average_utilization,
        "averageValueMilli": of.average_value,
        "valueMilli": of.value,
    }
    return {key: value for key, value in shown.items() if value is not None}


# ---- the three families ----------------------------------------------------------------------------------------


def calculator(case: Case) -> Iterator[Found]:
    answer = case["metrics"]
    resource = case.get("resource", "")
    settings = Settings(
        cpu_initialization_period_seconds=number(case["cpuInitializationPeriodSeconds"]),
        initial_readiness_delay_seconds=number(case["initialReadinessDelaySeconds"]),
    )
    named = case.get("container", "")
    kinds = {
        "resourceUtilization": "ContainerResource" if named else "Resource",
        "resourceAverageValue": "ContainerResource" if named else "Resource",
        "podsAverageValue": "Pods",
        "objectValue": "Object",
        "objectAverageValue": "Object",
        "externalValue": "External",
        "externalAverageValue": "External",
    }
    kind = kinds[case["fn"]]
    asked = Metric(kind, resource, target(case["target"]), container=named)
    try:
        if case.get("badMetricSelector"):
            raise MetricError("invalid_selector", "the selector cannot be parsed")
        view = View(
            [calculator_pod(resource, item) for item in case.get("pods", [])],
            Scale(number(case.get("currentReplicas", 0)), number(case.get("statusReplicas", 0))),
            Tolerances(number(case["tolerances"]["scaleUp"]), number(case["tolerances"]["scaleDown"])),
            settings,
            now=0,
        )
        calculation = controller.propose(asked, calculator_reading(kind, answer, named), view)
    except MetricError as error:
        yield from differences({"error": error.kind}, dict(case["expect"]))
        return
    actual = {"replicas": calculation.replicas, "usageMilli": calculation.usage}
    if calculation.utilization is not None:
        actual["utilization"] = calculation.utilization
    yield from differences(actual, dict(case["expect"]))


def calculator_reading(kind: str, answer: Case, named: str) -> Reading:
    failed = failure(answer)
    if failed is not None:
        return failed
    if kind == "Object":
        return int(number(answer["valueMilli"]))
    if kind == "External":
        values = tuple(number(value) for value in answer.get("valuesMilli", []))
        return values or MetricError("api_empty", "no metrics returned")
    items = answer.get("pods", [])
    if not items:
        return MetricError("api_empty", "no metrics returned")
    samples = {}
    for item in items:
        # A single value is that of the container app.
        containers = item.get("containers", [{**item, "name": "app"}])
        value = usage([(c["name"], c.get("valueMilli")) for c in containers], named)
        if value is not None:
            samples[item["pod"]] = Sample(value, number(item["timestamp"]), number(item.get("windowSeconds", 0)))
    return samples


def one_function(case: Case) -> Iterator[Found]:
    given = case["in"]
    fn = case["fn"]
    actual = FUNCTIONS[fn](given)
    expected = dict(case["expect"])
    if fn == "storeScaleEvent":
        expected = {"scaleUpEvents": [], "scaleDownEvents": []} | expected
    yield from differences(actual, expected)


def run_stabilize(given: Case) -> Case:
    found, kept = stabilize(
        full(given), memory(given).recommendations, number(given["currentReplicas"]), desired(given), 0
    )
    return {"replicas": found.replicas, "reason": found.reason, **show_memory(Memory(kept))}


def run_rate(given: Case) -> Case:
    current, wanted = number(given["currentReplicas"]), desired(given)
    found = limit_rate(full(given), memory(given), **limits(given), current=current, desired=wanted, now=0)
    return {"replicas": found.replicas, "reason": found.reason}


def run_normalize(given: Case) -> Case:
    settings = Settings(downscale_stabilization_seconds=number(given["downscaleStabilizationSeconds"]))
    asked = Spec(given["maxReplicas"], (), given["minReplicas"], behavior(given.get("behavior")))
    current, wanted = number(given["currentReplicas"]), desired(given)
    _, limited, kept, conditions = controller.normalize(asked, settings, memory(given), (), current, wanted, 0)
    return {
        "replicas": limited.replicas,
        "conditions": [{"type": c.type, "status": c.status, "reason": c.reason} for c in conditions],
        "recommendations": show_memory(kept)["recommendations"],
    }


def run_legacy_stabilize(given: Case) -> Case:
    window = number(given["downscaleStabilizationSeconds"])
    found, kept = stabilize_without_behavior(memory(given).recommendations, desired(given), window, 0)
    return {"replicas": found.replicas, **show_memory(Memory(kept))}


def run_legacy_limit(given: Case) -> Case:
    current, wanted = number(given["currentReplicas"]), desired(given)
    found = limit_without_behavior(**limits(given), current=current, desired=wanted)
    return {"replicas": found.replicas, "reason": found.reason}


def run_store(given: Case) -> Case:
    previous, replicas = number(given["prevReplicas"]), number(given["newReplicas"])
    kept = remember_event(memory(given), behavior(given.get("behavior")), previous, replicas, 0)
    return {"scaleUpEvents": show_events(kept.up_events), "scaleDownEvents": show_events(kept.down_events)}


def run_default(given: Case) -> Case:
    settings = Settings(downscale_stabilization_seconds=number(given["downscaleStabilizationSeconds"]))
    found = behavior(given.get("behavior"))
    return {} if found is None else {"behavior": show_behavior(found.with_window(settings))}


def run_tolerances(given: Case) -> Case:
    settings = Settings(tolerance=number(given["controllerTolerance"]))
    found = tolerances_of(behavior(given.get("behavior")), settings)
    return {"tolerances": {"scaleUp": found.up, "scaleDown": found.down}}


def full(given: Case) -> Behavior:
    settings = Settings(downscale_stabilization_seconds=given.get("downscaleStabilizationSeconds", 300))
    return (behavior(given["behavior"]) or Behavior()).with_window(settings)


def desired(given: Case) -> int:
    return int(number(given["desiredReplicas"]))


def limits(given: Case) -> dict[str, int]:
    return {"minimum": number(given["minReplicas"]), "maximum": number(given["maxReplicas"])}


FUNCTIONS: dict[str, Callable[[Case], Case]] = {
    "stabilizeWithBehavior": run_stabilize,
    "rateWithBehavior": run_rate,
    "normalizeWithBehavior": run_normalize,
    "legacyStabilize": run_legacy_stabilize,
    "legacyLimit": run_legacy_limit,
    "legacyNormalize": run_normalize,
    "storeScaleEvent": run_store,
    "defaultBehavior": run_default,
    "tolerances": run_tolerances,
}


def timeline(case: Case) -> Iterator[Found]:
    flags, gates = case["controller"], case.get("featureGates", {})
    settings = Settings(
        tolerance=number(flags["tolerance"]),
        downscale_stabilization_seconds=number(flags["downscaleStabilizationSeconds"]),
        cpu_initialization_period_seconds=number(flags["cpuInitializationPeriodSeconds"]),
        initial_readiness_delay_seconds=number(flags["initialReadinessDelaySeconds"]),
        scale_to_zero=gates.get("HPAScaleToZero", False),
        configurable_tolerance=gates.get("HPAConfigurableTolerance", True),
    )
    now_spec = spec(case["spec"])
    defaulted = {} if now_spec.behavior is None else show_behavior(now_spec.behavior)
    yield from differences(defaulted, dict(case.get("defaultedBehavior", {})), "defaultedBehavior")
    containers = tuple(Container(name, item) for name, item in case.get("containerRequestsMilli", {}).items())
    pods: tuple[Pod, ...] = ()
    remembered, status = Memory(), Status()
    for i, tick in enumerate(case["ticks"]):
        if "spec" in tick:
            now_spec = spec(tick["spec"])
        if tick.get("restart"):
            remembered = Memory()
        if "pods" in tick:
            pods = tuple(replace(pod(item), containers=containers) for item in tick["pods"])
        decision, wrote = reconcile(now_spec, settings, remembered, status, pods, tick)
        remembered, status = decision.memory, decision.status
        yield from differences(show_tick(decision, wrote), dict(tick["expect"]), f"tick {i} (t {tick['t']})")
    yield from differences(show_memory(remembered), dict(case.get("final", {})), "final")


def reconcile(
    now_spec: Spec,
    settings: Settings,
    remembered: Memory,
    status: Status,
    pods: tuple[Pod, ...],
    tick: Case,
) -> tuple[Decision, bool]:
    now, fail = number(tick["t"]), tick.get("fail", "")
    if fail in TARGET_FAILURES:
        return controller.no_scale(remembered, status, fail, now, TARGET_FAILURES[fail]), False
    if fail and not fail.startswith(WRITE_FAILURES):
        raise ValueError(f"fail {fail!r} is unknown")
    scale = Scale(number(tick["scale"]["specReplicas"]), number(tick["scale"]["statusReplicas"]))
    answers = tick.get("metrics") or [{"error": "empty"}] * len(now_spec.metrics)
    readings = [timeline_reading(*pair) for pair in zip(now_spec.metrics, answers, strict=True)]
    error = selector_error(tick, pods)
    decision = controller.decide(now_spec, settings, remembered, status, scale, pods, readings, now, error)
    if decision.write is None:
        return decision, False
    if fail == "scaleUpdate" or (fail and int(fail.removeprefix("conflict")) >= controller.WRITE_ATTEMPTS):
        return controller.refused(decision, fail, now), False
    return controller.written(decision, now_spec, settings, now), True


def selector_error(tick: Case, pods: tuple[Pod, ...]) -> controller.SelectorError | None:
    selector = tick["scale"].get("selector")
    if selector == "":
        return controller.SelectorError(EventReason.SELECTOR_REQUIRED, "selector is required")
    if selector is not None:
        return controller.SelectorError(ConditionReason.INVALID_SELECTOR, f"selector {selector!r} cannot be parsed")
    if tick.get("otherSelectors") and pods:
        return controller.SelectorError(ConditionReason.AMBIGUOUS_SELECTOR, "pods are controlled by multiple HPAs")
    return None


def timeline_reading(asked: Metric, answer: Case) -> Reading:
    failed = failure(answer)
    if failed is not None:
        return failed
    if asked.type == "Object":
        return int(number(answer["valueMilli"]))
    if asked.type == "External":
        values = tuple(number(value) for value in answer.get("valuesMilli", []))
        return values or MetricError("api_empty", "no metrics returned")
    values = answer.get("podValuesMilli", {})
    if not values:
        return MetricError("api_empty", "no metrics returned")
    if asked.container == "nope":
        return {}
    times = answer.get("podTimestamps", {})
    return {
        name: Sample(number(value), number(times.get(name, answer["timestamp"])), number(answer["windowSeconds"]))
        for name, value in values.items()
    }


def show_tick(decision: Decision, wrote: bool) -> Case:
    status = decision.status
    problems = [why_not(c.type, c.status, c.reason) for c in status.conditions]
    assert not any(problems), problems
    rescaled = [e.message for e in decision.events if e.reason == "SuccessfulRescale"]
    shown: dict[str, Any] = {
        "currentReplicas": status.current_replicas,
        "desiredReplicas": status.desired_replicas,
    }
    optional = {
        "written": decision.write if wrote else None,
        "lastScaleTime": status.last_scale_time,
        "conditions": [
            {"type": c.type, "status": c.status, "reason": c.reason, "lastTransition": c.last_transition}
            for c in status.conditions
        ]
        or None,
        "currentMetrics": [show_metric(m) for m in status.current_metrics] or None,
        "events": [f"{e.kind} {e.reason}" for e in decision.events] or None,
        "rescaleReason": (rescaled[0].split("reason: ", 1)[1] or None) if rescaled else None,
        "error": decision.error or None,
    }
    return shown | {key: value for key, value in optional.items() if value is not None}


# ---- files -----------------------------------------------------------------------------------------------------


def is_left_out(case: Case, where: str) -> bool:
    """Whether the recorded value depends on the processor it was recorded on; the case says so itself."""
    flags = case.get("flags", [])
    if "replicas_float_overflow" in flags and (
        "ticks" in case or where.startswith(("replicas", "reason", "condition"))
    ):
        return True
    return "usage_float_overflow" in flags and where.endswith(("usageMilli", "averageValueMilli"))


def replay(case: Case) -> list[Found]:
    """What differs. Raises BadFile for a case that is not of the format."""
    if not isinstance(case, Mapping):
        raise BadFile(f"{json.dumps(case)[:60]} is not a case; use an object with id, fn or ticks, and expect")
    family = timeline if "ticks" in case else one_function if "in" in case else calculator
    try:
        return [found for found in family(case) if not is_left_out(case, found[0])]
    except KeyError as error:
        raise BadFile(f"case {case.get('id')}: {error} is missing or unknown") from error
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise BadFile(f"case {case.get('id')}: not of the format: {error}") from error


def cases(path: Path) -> list[Case]:
    """The cases of a file. Raises BadFile."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"not JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise BadFile("holds no cases; use a JSON array with one object per case")
    return found


def main(arguments: list[str]) -> int:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        print("usage: python tests/hpa_replay.py FILE...", file=sys.stderr)
        return 2
    outcome = 0
    for name in arguments:
        try:
            found = cases(Path(name))
            differing = 0
            for case in found:
                mismatches = replay(case)
                differing += bool(mismatches)
                for where, actual, expected in mismatches:
                    print(f"{name}: {case.get('id')}: {where} is {json.dumps(actual)}, recorded {json.dumps(expected)}")
        except BadFile as error:
            print(f"{name}: {error}", file=sys.stderr)
            outcome = 2
            continue
        print(f"{name}: {len(found)} cases, {differing} differ")
        outcome = outcome or int(differing > 0)
    return outcome


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
