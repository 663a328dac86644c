"""One reconcile; upstream's `horizontal.go`.

`decide` takes the spec, what is remembered, what is measured and the time, and says what to write. The caller writes
it to `/scale`, at most `WRITE_ATTEMPTS` times on conflicts, and then calls `written` or `refused`. Nothing here reads
a clock, and what is remembered (`Memory`, `Status`) goes in and out as values. Times are seconds on any one scale.

Metrics of type `Engine` are ours; they follow the rules of Pods metrics and two of their own: a sample older than
`Settings.sample_max_age_seconds` (or as far in the future) counts as missing, and a proposal below the current
replicas is refused while the sample of any listed engine is missing. Only active engines are listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from packetstack_core.autoscaling.behavior import (
    READY,
    Bounded,
    Memory,
    Recommendation,
    limit_rate,
    limit_without_behavior,
    remember_event,
    stabilize,
    stabilize_without_behavior,
    tolerances_of,
)
from packetstack_core.autoscaling.calculator import (
    Calculation,
    Scale,
    View,
    _by_share,
    _usable,
    by_average,
    by_external_per_replica,
    by_utilization,
    by_value,
    by_value_per_replica,
    external_total,
    external_total_per_replica,
)
from packetstack_core.autoscaling.metrics import ENGINE_CAPACITY, MetricError, Pod, Reading, Sample
from packetstack_core.autoscaling.settings import Settings
from packetstack_core.autoscaling.spec import Metric, Spec
from packetstack_core.autoscaling.status import (
    Conditions,
    Decision,
    Error,
    MetricStatus,
    Proposal,
    Record,
    Status,
    set_condition,
    without_condition,
)
from packetstack_core.reasons import ConditionReason, Event, EventReason

WRITE_ATTEMPTS = 5
"""How often a write of `/scale` is tried when it conflicts; `retry.DefaultRetry` of client-go."""


class SelectorError(Exception):
    """A selector of the scale by which pods cannot be found. `event` is the reason of the event."""

    def __init__(
        self,
        event: Literal[
            EventReason.SELECTOR_REQUIRED, ConditionReason.INVALID_SELECTOR, ConditionReason.AMBIGUOUS_SELECTOR
        ],
        message: str,
    ) -> None:
        super().__init__(message)
        self.event = event


def _fresh(samples: Mapping[str, Sample], view: View) -> Mapping[str, Sample]:
    """Recent samples of the engines that are listed: unlike the metrics APIs we know exactly who is meant."""
    listed = {pod.name for pod in view.pods}
    limit = view.settings.sample_max_age_seconds
    return {
        name: sample for name, sample in samples.items() if name in listed and abs(view.now - sample.timestamp) <= limit
    }


def propose(metric: Metric, reading: Reading, view: View) -> Calculation:
    """Replicas that one metric asks for. Raises MetricError.

    Raises TypeError for a reading that is not of the metric's kind, which is an error of the caller.
    """
    target = metric.target.value
    kinds = {
        "Engine": ("Utilization", "AverageValue"),
        "Resource": ("Utilization", "AverageValue"),
        "ContainerResource": ("Utilization", "AverageValue"),
        "Pods": ("AverageValue",),
        "Object": ("AverageValue", "Value"),
        "External": ("AverageValue", "Value"),
    }
    if metric.type not in kinds:
        raise MetricError("invalid_target", f'unknown metric source type "{metric.type}"')
    if metric.target.type not in kinds[metric.type]:
        raise MetricError("invalid_target", _invalid_target(metric))
    if isinstance(reading, MetricError):
        raise reading
    if metric.type in ("Object", "External"):
        per_replica = metric.target.type == "AverageValue"
        if metric.type == "External" and isinstance(reading, Sequence):
            total = (external_total_per_replica if per_replica else external_total)(reading)
        elif metric.type == "Object" and isinstance(reading, int):
            total = reading
        else:
            raise TypeError(f"{metric.type} metric {metric.name}: a reading of type {type(reading).__name__}")
        if not per_replica:
            return by_value(total, view, target)
        return (by_external_per_replica if metric.type == "External" else by_value_per_replica)(total, view, target)
    if not isinstance(reading, Mapping):
        raise TypeError(f"{metric.type} metric {metric.name}: a reading of type {type(reading).__name__}")
    if metric.type == "Engine":
        return _of_engines(metric, _fresh(reading, view), view)
    resource = metric.name if metric.type in ("Resource", "ContainerResource") else ""
    if metric.target.type == "Utilization":
        return by_utilization(reading, view, target, resource=resource, container=metric.container)
    return by_average(reading, view, target, resource=resource)


def _of_engines(metric: Metric, samples: Mapping[str, Sample], view: View) -> Calculation:
    if metric.target.type == "Utilization":
        values, groups = _usable(samples, "", view)
        requests = {pod.name: ENGINE_CAPACITY for pod in view.pods}
        found = _by_share(values, groups, requests, view, metric.target.value)
    else:
        found = by_average(samples, view, metric.target.value)
    if found.missing and found.replicas < view.scale.spec_replicas:
        who = f"{found.missing} of {len(view.pods)} engines have no recent sample"
        raise MetricError("missing_samples", f"{who}, which may not lead to fewer replicas")
    return found


def _invalid_target(metric: Metric) -> str:
    kind = metric.type.lower()
    if metric.type in ("Object", "External"):
        return f"invalid {kind} metric source: neither a value target nor an average value target was set"
    names = "neither an average utilization target nor an average value (usage) target was set"
    return f"invalid resource metric source: {names}"


def _explained(metric: Metric, error: MetricError) -> tuple[ConditionReason, str, str]:
    """Reason and message of the event and the condition, and the error with what it was about."""
    text = str(error)
    api = error.kind in ("api_error", "api_empty")
    name = metric.name
    match metric.type:
        case "Resource" | "ContainerResource":
            if error.kind != "invalid_target":
                text = f"unable to get metrics for resource {name}: {text}" if api else text
                what = "utilization" if metric.target.type == "Utilization" else "usage"
                text = f"failed to get {name} {what}: {text}"
            about = f"{name} resource" if metric.type == "Resource" else f"{metric.container} container"
        case "Engine" | "Pods":
            text = f"unable to get metric {name}: {text}" if api else text
            about = metric.type.lower()
        case "Object":
            text = f"unable to get metric {name}: {text}" if api else text
            if metric.target.type == "AverageValue":
                text = f"failed to get {name} object metric: {text}"
            about = "object"
        case "External":
            text = f"unable to get external metric {name}: {text}" if api else text
            if metric.target.type == "AverageValue":
                text = f"failed to get {name} external metric: {text}"
            elif metric.target.type == "Value":
                text = f"failed to get external metric {name}: {text}"
            about = f"{name} external"
        case _:
            return ConditionReason.INVALID_METRIC_SOURCE_TYPE, text, text
    return ConditionReason(f"FailedGet{metric.type}Metric"), text, f"failed to get {about} metric value: {text}"


def no_scale(memory: Memory, status: Status, message: str, now: float, error: Error = "get_scale_failed") -> Decision:
    """The outcome when the target or its scale cannot be read."""
    text = f"spec.replicas cannot be read, so the number of engines stays: {message}"
    conditions = set_condition(status.conditions, "AbleToScale", "False", ConditionReason.FAILED_GET_SCALE, text, now)
    record = Record(status.current_replicas, status.desired_replicas, why=f"the scale cannot be read: {message}")
    event = Event(ConditionReason.FAILED_GET_SCALE, message)
    return Decision(memory, replace(status, conditions=conditions), record, events=(event,), error=error)


@dataclass(slots=True)
class _Metrics:
    """What the metrics together say. `replicas` is None when they may not be used."""

    replicas: int | None
    winner: str
    conditions: Conditions
    statuses: tuple[MetricStatus | None, ...]
    proposals: tuple[Proposal, ...]
    events: tuple[Event, ...]
    error: str


def _read_metrics(spec: Spec, conditions: Conditions, view: View, readings: Sequence[Reading]) -> _Metrics:
    if len(readings) != len(spec.metrics):
        raise ValueError(f"{len(readings)} readings for {len(spec.metrics)} metrics; give one for each")
    now = view.now
    replicas, winner = 0, ""
    statuses: list[MetricStatus | None] = []
    proposals: list[Proposal] = []
    failures: list[tuple[ConditionReason, str, str]] = []
    for metric, reading in zip(spec.metrics, readings, strict=True):
        title = metric.title()
        try:
            found = propose(metric, reading, view)
        except MetricError as failure:
            failures.append(_explained(metric, failure))
            statuses.append(None)
            proposals.append(Proposal(title, metric.target, error=str(failure)))
            continue
        if metric.target.type == "Value":
            statuses.append(MetricStatus(value=found.usage))
        else:
            statuses.append(MetricStatus(found.utilization, found.usage))
        proposals.append(Proposal(title, metric.target, found.replicas, found.usage, found.utilization, found.missing))
        if replicas == 0 or found.replicas > replicas:
            replicas, winner = found.replicas, title
    events = tuple(Event(reason, message) for reason, message, _ in failures)
    error = ""
    if failures:
        first = failures[0][2]
        error = f"invalid metrics ({len(failures)} invalid out of {len(spec.metrics)}), first error is: {first}"
    # Never fewer replicas on a part of the data.
    usable = len(failures) < len(spec.metrics) and not (failures and replicas < view.scale.spec_replicas)
    if usable:
        message = f"the number of engines follows {winner}"
        conditions = set_condition(
            conditions, "ScalingActive", "True", ConditionReason.VALID_METRIC_FOUND, message, now
        )
    elif failures:
        reason, text, _ = failures[0]
        message = f"no number of engines can be computed, so it stays: {text}"
        conditions = set_condition(conditions, "ScalingActive", "False", reason, message, now)
    return _Metrics(replicas if usable else None, winner, conditions, tuple(statuses), tuple(proposals), events, error)


def _bad_selector(conditions: Conditions, error: SelectorError, now: float) -> _Metrics:
    text = str(error)
    event = Event(error.event, text)
    reason, message = (
        ConditionReason.INVALID_SELECTOR,
        "the scale of the stack names no selector, so its engines cannot be counted",
    )
    if error.event is not EventReason.SELECTOR_REQUIRED:
        reason, message = error.event, text
    conditions = set_condition(conditions, "ScalingActive", "False", reason, message, now)
    return _Metrics(None, "", conditions, (), (), (event,), text)


def normalize(
    spec: Spec, settings: Settings, memory: Memory, conditions: Conditions, current: int, desired: int, now: float
) -> tuple[Bounded, Bounded, Memory, Conditions]:
    """`desired` after the windows, and then after the limits; then what is to be remembered and shown."""
    if spec.behavior is None:
        window = settings.downscale_stabilization_seconds
        stable, kept = stabilize_without_behavior(memory.recommendations, desired, window, now)
        limited = limit_without_behavior(
            minimum=spec.minimum, maximum=spec.maximum, current=current, desired=stable.replicas
        )
    else:
        behavior = spec.behavior.with_window(settings)
        stable, kept = stabilize(behavior, memory.recommendations, current, desired, now)
        limited = limit_rate(
            behavior,
            memory,
            minimum=spec.minimum,
            maximum=spec.maximum,
            current=current,
            desired=stable.replicas,
            now=now,
        )
    able = (stable.reason, stable.message) if stable.replicas != desired else READY
    conditions = set_condition(conditions, "AbleToScale", "True", *able, now)
    cut: Literal["True", "False"] = "True" if limited.replicas != stable.replicas else "False"
    conditions = set_condition(conditions, "ScalingLimited", cut, limited.reason, limited.message, now)
    return stable, limited, replace(memory, recommendations=kept), conditions


def _is_scaled_to_zero(conditions: Conditions) -> bool:
    return any(c.type == "ScaledToZero" and c.status == "True" for c in conditions)


def decide(
    spec: Spec,
    settings: Settings,
    memory: Memory,
    status: Status,
    scale: Scale,
    pods: Sequence[Pod],
    readings: Sequence[Reading],
    now: float,
    selector_error: SelectorError | None = None,
) -> Decision:
    """One reconcile, up to the write of `/scale`. O(pods x metrics).

    `readings`: one for each metric of the spec. `now` may go backwards: what was remembered for a later time
    counts until that time is reached and its window is over.
    Raises ValueError or TypeError only for readings that do not belong to the spec.
    """
    current = scale.spec_replicas
    message = "spec.replicas was read"
    conditions = set_condition(
        status.conditions, "AbleToScale", "True", ConditionReason.SUCCEEDED_GET_SCALE, message, now
    )
    if not memory.recommendations:
        # So that a controller that has just started does not scale down at once.
        memory = replace(memory, recommendations=(Recommendation(current, now),))
    from_zero = settings.scale_to_zero and _is_scaled_to_zero(conditions)
    shown = replace(status, current_replicas=current, current_metrics=(), conditions=conditions)

    if current == 0 and not (from_zero and (spec.minimum != 0 or spec.scales_to_zero())):
        message = "spec.replicas is 0, so the autoscaler rests; to have it work, set spec.replicas to 1 or more"
        conditions = set_condition(conditions, "ScalingActive", "False", ConditionReason.SCALING_DISABLED, message, now)
        if not settings.scale_to_zero:
            conditions = without_condition(conditions, "ScaledToZero")
        shown = replace(shown, desired_replicas=0, conditions=conditions)
        return Decision(memory, shown, Record(0, 0, why=message))
    if current > spec.maximum or 0 < current < spec.minimum:
        above = current > spec.maximum
        limit = spec.maximum if above else spec.minimum
        reason = f"Current number of replicas {'above Spec.MaxReplicas' if above else 'below Spec.MinReplicas'}"
        return Decision(memory, shown, Record(current, limit, why=reason), limit, reason)

    if selector_error is not None:
        metrics = _bad_selector(conditions, selector_error, now)
    else:
        view = View(pods, scale, tolerances_of(spec.behavior, settings), settings, now)
        metrics = _read_metrics(spec, conditions, view, readings)
    if metrics.replicas is None:
        shown = replace(shown, conditions=metrics.conditions, current_metrics=metrics.statuses)
        why = f"not scaled: {metrics.error}"
        record = Record(current, current, metrics.proposals, metrics.winner, why=why)
        events = (*metrics.events, Event(EventReason.FAILED_COMPUTE, metrics.error))
        return Decision(memory, shown, record, events=events, error="compute_failed")

    proposed = max(0, metrics.replicas)
    reason = ""
    if proposed > current:
        reason = f"{metrics.winner} above target"
    elif proposed < current:
        reason = "All metrics below target"
    stable, limited, memory, conditions = normalize(spec, settings, memory, metrics.conditions, current, proposed, now)
    desired, limited_by = limited.replicas, limited.by
    if current == 0 and from_zero and desired < spec.minimum:
        desired, limited_by = spec.minimum, "minReplicas"
        reason = reason or "Current number of replicas below Spec.MinReplicas"
    record = Record(
        current, desired, metrics.proposals, metrics.winner, proposed, stable.replicas, stable.by, desired, limited_by
    )
    shown = replace(shown, conditions=conditions, current_metrics=metrics.statuses)
    write = desired if desired != current else None
    if write is None:
        shown = replace(shown, desired_replicas=current)
    return Decision(memory, shown, record, write, reason, metrics.events, "partial_metrics" if metrics.error else "")


def written(decision: Decision, spec: Spec, settings: Settings, now: float) -> Decision:
    """The outcome after `/scale` was written."""
    current, replicas = decision.record.current, _to_write(decision)
    message = f"spec.replicas was set to {replicas}"
    status = decision.status
    conditions = set_condition(
        status.conditions, "AbleToScale", "True", ConditionReason.SUCCEEDED_RESCALE, message, now
    )
    if not settings.scale_to_zero:
        conditions = without_condition(conditions, "ScaledToZero")
    elif current > 0 and replicas == 0 and spec.minimum == 0 and spec.scales_to_zero():
        message = "the autoscaler removed all engines, since nothing asks for one"
        conditions = set_condition(conditions, "ScaledToZero", "True", ConditionReason.SCALED_TO_ZERO, message, now)
    else:
        message = "the autoscaler keeps an engine"
        conditions = set_condition(
            conditions, "ScaledToZero", "False", ConditionReason.NOT_SCALED_TO_ZERO, message, now
        )
    event = Event(EventReason.SUCCESSFUL_RESCALE, f"New size: {replicas}; reason: {decision.reason}")
    return replace(
        decision,
        memory=remember_event(decision.memory, spec.behavior, current, replicas, now),
        status=replace(status, desired_replicas=replicas, last_scale_time=now, conditions=conditions),
        events=(*decision.events, event),
    )


def refused(decision: Decision, message: str, now: float) -> Decision:
    """The outcome when `/scale` could not be written, for the reason `message`."""
    replicas = _to_write(decision)
    text = f"spec.replicas cannot be written, so the number of engines stays: {message}"
    conditions = set_condition(
        decision.status.conditions, "AbleToScale", "False", ConditionReason.FAILED_UPDATE_SCALE, text, now
    )
    event = Event(EventReason.FAILED_RESCALE, f"New size: {replicas}; reason: {decision.reason}; error: {message}")
    return replace(
        decision,
        status=replace(decision.status, conditions=conditions),
        events=(*decision.events, event),
        error="update_scale_failed",
    )


def _to_write(decision: Decision) -> int:
    if decision.write is None:
        raise ValueError("the decision writes nothing; call written or refused only when it has write")
    return decision.write
