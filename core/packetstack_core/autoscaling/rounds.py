"""The autoscaler of a stack, as operator and local runtime run it: resource, load and state in, replicas and status out.

One round: `reconcile` with what is measured. If its decision has `write`, the caller writes that number to
`spec.replicas` and calls `written`, or `refused` if it could not. `show` and `conditions` give what the stack's
status says of it, and `resume` gets the state of an autoscaler that starts anew from that: when it scaled last, and
its conditions. Windows and rates begin anew then, and a fresh autoscaler does not scale down at once, as an HPA.

Two writers of `spec.replicas` would undo each other. If somebody else wrote it (`is_changed_by_other`, or the caller knows it),
the caller calls `step_aside`: nothing is decided any more, and `ScalingActive` is `False` for the reason `ExternallyScaled`.
A round with `autoscaling.paused` ends that, and so does a status without it, as after a time without `spec.autoscaling`.

Nothing here reads a clock. Times are seconds since 1970; `StackLoad.read` must be of the same clock. A caller whose clock
may have been set goes on with the state `by_the_clock`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from packetstack_core import autoscalers, kinds, resources
from packetstack_core.assignment import State as EngineState
from packetstack_core.autoscaling import controller
from packetstack_core.autoscaling.behavior import Memory
from packetstack_core.autoscaling.calculator import Scale
from packetstack_core.autoscaling.engine_metrics import samples
from packetstack_core.autoscaling.metrics import MetricError, Pod, Reading
from packetstack_core.autoscaling.options import State, with_decision, with_schedule
from packetstack_core.autoscaling.options import reconcile as _reconcile
from packetstack_core.autoscaling.settings import Settings
from packetstack_core.autoscaling.spec import Metric, Spec, Target, spec_of
from packetstack_core.autoscaling.status import Condition, Conditions, Decision, Proposal, Record, Status, set_condition
from packetstack_core.load import StackLoad
from packetstack_core.reasons import AUTOSCALER, ConditionReason, Event
from packetstack_core.statuses import AutoscalingStatus, VerticalStatus
from packetstack_core.wording import timestamp

CONDITIONS = AUTOSCALER
"""Types that are the autoscaler's."""
SAMPLE_SECONDS = 15.0
"""A sample is never too old before."""
DRIFT_SECONDS = 1.0
"""A clock that is this much off within a sync period was set."""
_LONGEST = 500
"""Characters of a text in the status."""


@dataclass(frozen=True, slots=True)
class Round:
    """One reconcile of a stack."""

    decision: Decision
    """With `write`, it waits for `written` or `refused`."""
    state: State
    """For the next one."""
    spec: Spec
    """With the limits in force."""
    settings: Settings
    schedule: str = ""
    """Name of the schedule that the limits come from; "" without one."""


# ---- one round -------------------------------------------------------------------------------------------------


def engines(load: StackLoad) -> list[Pod]:
    """The engines that count, when the load is all that is known of them; see `reconcile`."""
    return [Pod(e.name, ready="True") for e in load.engines if e.state == EngineState.ACTIVE.value]


def settings_of(wanted: autoscalers.Autoscaling) -> Settings:
    """Defaults of an HPA. A sample may be three sync periods old."""
    # Without a metric that needs no engine nobody would see the first packet, so there is no zero.
    scales_to_zero = spec_of(wanted).scales_to_zero()
    oldest = max(SAMPLE_SECONDS, 3.0 * wanted.sync_period_seconds)
    return Settings(scale_to_zero=scales_to_zero, sample_max_age_seconds=oldest)


def reconcile(
    stack: resources.Spec,
    state: State,
    scale: Scale,
    active: Sequence[Pod],
    measured: StackLoad | MetricError,
    now: float,
    answers: Mapping[int, Reading] | None = None,
) -> Round:
    """One reconcile of a stack that has `spec.autoscaling`. O(engines x metrics).

    `active`: its active engines, by the names that they have in the load; one without a sample is missing.
    `measured`: the load of the last sync period, or why it is not known. `answers`: readings of all other metrics by
    their index in `spec.autoscaling.metrics`; one that is not among them has no answer.
    """
    return decide(_wanted(stack), state, scale, active, measured, now, answers, held=stack.paused)


def decide(
    wanted: autoscalers.Autoscaling,
    state: State,
    scale: Scale,
    active: Sequence[Pod],
    measured: StackLoad | MetricError,
    now: float,
    answers: Mapping[int, Reading] | None = None,
    *,
    held: bool = False,
) -> Round:
    """As `reconcile`, with `spec.autoscaling` alone. `held`: the stack as a whole is paused."""
    # What is remembered for later than now would hold the replicas until then.
    state = _map_times(state, lambda at: min(at, now))
    aside = is_external(state) and not wanted.paused
    if held:
        wanted = wanted.model_copy(update={"paused": True})
    settings = settings_of(wanted)
    at = datetime.fromtimestamp(now, UTC)
    try:
        spec, schedule = with_schedule(spec_of(wanted), wanted.schedules, at)
        if aside:
            return _round(_aside(state, scale), state, spec, settings, schedule)
        readings = [_reading(i, metric, measured, answers or {}) for i, metric in enumerate(spec.metrics)]
        # With the limits that were just found: schedules are not cheap.
        limits = {"schedules": (), "min_replicas": spec.minimum, "max_replicas": spec.maximum}
        limited = wanted.model_copy(update=limits)
        decision, spec, state = _reconcile(limited, settings, state, scale, active, readings, now, at)
    except ValueError as e:  # a schedule that cannot be read
        return _round(_invalid(state, scale, str(e), now), state, spec_of(wanted), settings, "")
    if wanted.paused:
        decision = replace(decision, status=replace(decision.status, desired_replicas=scale.spec_replicas))
    return _round(decision, state, spec, settings, schedule)


def written(done: Round, now: float) -> Round:
    """The round after its replicas were written."""
    decision = controller.written(done.decision, done.spec, done.settings, now)
    return replace(done, decision=decision, state=with_decision(done.state, decision))


def refused(done: Round, message: str, now: float) -> Round:
    """The round after its replicas could not be written, for the reason `message`."""
    decision = controller.refused(done.decision, message, now)
    return replace(done, decision=decision, state=with_decision(done.state, decision))


def _wanted(stack: resources.Spec) -> autoscalers.Autoscaling:
    if stack.autoscaling is None:
        raise TypeError("the stack has no spec.autoscaling; call only for one that has")
    return stack.autoscaling


def _round(decision: Decision, state: State, spec: Spec, settings: Settings, schedule: str) -> Round:
    return Round(decision, with_decision(state, decision), spec, settings, schedule)


def _reading(index: int, metric: Metric, measured: StackLoad | MetricError, answers: Mapping[int, Reading]) -> Reading:
    if index in answers:
        return answers[index]
    if metric.type != "Engine":
        return MetricError("api_empty", "nobody has read it")
    return measured if isinstance(measured, MetricError) else samples(measured, metric.name)


def by_the_clock(state: State, before: tuple[float, float], now: tuple[float, float]) -> State:
    """The state by a wall clock that may have been set: windows and policies last as long as they would have.

    `before`, `now`: wall clock and monotonic clock, at the last round and at this one.
    """
    jump = clock_jump(before, now)
    return _map_times(state, lambda at: at + jump) if jump else state


def clock_jump(before: tuple[float, float], now: tuple[float, float]) -> float:
    """Seconds by which the wall clock was set between these two; 0 for what a clock drifts. See `by_the_clock`."""
    jump = (now[0] - before[0]) - (now[1] - before[1])
    return jump if abs(jump) >= DRIFT_SECONDS else 0.0


def _map_times(state: State, other: Callable[[float], float]) -> State:
    """With other times for all that windows, rates and panic remember."""
    memory, panic = state.memory, state.panic
    return replace(
        state,
        memory=Memory(
            tuple(replace(r, at=other(r.at)) for r in memory.recommendations),
            tuple(replace(e, at=other(e.at)) for e in memory.up_events),
            tuple(replace(e, at=other(e.at)) for e in memory.down_events),
        ),
        panic=replace(
            panic,
            demands=tuple((other(at), value) for at, value in panic.demands),
            since=None if panic.since is None else other(panic.since),
        ),
    )


def _invalid(state: State, scale: Scale, problem: str, now: float) -> Decision:
    message = f"spec.autoscaling.schedules: {problem}"
    conditions = set_condition(
        state.status.conditions, "ScalingActive", "False", ConditionReason.INVALID_SCHEDULE, message, now
    )
    current = scale.spec_replicas
    status = replace(
        state.status, current_replicas=current, desired_replicas=current, current_metrics=(), conditions=conditions
    )
    event = Event(ConditionReason.INVALID_SCHEDULE, message)
    return Decision(state.memory, status, Record(current, current, why=message), events=(event,))


# ---- the second writer -----------------------------------------------------------------------------------------


def is_external(state: State) -> bool:
    """Whether the autoscaler has stepped aside."""
    return any(
        c.type == "ScalingActive" and c.reason is ConditionReason.EXTERNALLY_SCALED for c in state.status.conditions
    )


def is_changed_by_other(stack: resources.Spec, state: State, scale: Scale) -> bool:
    """Whether the replicas are not those that the last round left.

    A caller that dies between its write and its status sees that as well: it must know its own write.
    """
    if not state.status.conditions or is_external(state) or _wanted(stack).paused:
        return False  # nothing to compare with, known already, or allowed
    return scale.spec_replicas != state.status.desired_replicas


def step_aside(stack: resources.Spec, state: State, scale: Scale, who: str, now: float) -> Round:
    """The round in which it was seen that somebody else, `who`, wrote `spec.replicas`."""
    wanted = _wanted(stack)
    message = (
        f"{who} set spec.replicas to {scale.spec_replicas}, so the autoscaler changes it no more; to give it back, set "
        "spec.autoscaling.paused to true and then to false"
    )
    conditions = set_condition(
        state.status.conditions, "ScalingActive", "False", ConditionReason.EXTERNALLY_SCALED, message, now
    )
    state = State(status=replace(state.status, conditions=conditions))
    decision = replace(_aside(state, scale), events=(Event(ConditionReason.EXTERNALLY_SCALED, message),))
    try:
        spec, schedule = with_schedule(spec_of(wanted), wanted.schedules, datetime.fromtimestamp(now, UTC))
    except ValueError:
        spec, schedule = spec_of(wanted), ""
    return _round(decision, state, spec, settings_of(wanted), schedule)


def _aside(state: State, scale: Scale) -> Decision:
    why = next(c.message for c in state.status.conditions if c.type == "ScalingActive")
    current = scale.spec_replicas
    # What limits an autoscaler that decides nothing is not known.
    kept = tuple(c for c in state.status.conditions if c.type in ("AbleToScale", "ScalingActive"))
    status = replace(
        state.status, current_replicas=current, desired_replicas=current, current_metrics=(), conditions=kept
    )
    return Decision(state.memory, status, Record(current, current, why=why))


# ---- what is shown, and read again -----------------------------------------------------------------------------


def conditions(state: State, generation: int = 0) -> tuple[kinds.Condition, ...]:
    """The autoscaler's conditions. `generation`: of the stack."""
    return tuple(condition(c, generation) for c in state.status.conditions)


def condition(one: Condition, generation: int) -> kinds.Condition:
    """A condition as the stack's status has it."""
    return kinds.Condition.model_validate(
        {
            "type": one.type,
            "status": one.status,
            "reason": str(one.reason),
            "message": cut(one.message),
            "lastTransitionTime": timestamp(one.last_transition),
            "observedGeneration": generation,
        }
    )


def show(
    done: Round, before: AutoscalingStatus | None, now: float, vertical: VerticalStatus | None = None
) -> AutoscalingStatus:
    """`status.autoscaling` after this round. `before`: what it was. Equal rounds give equal statuses."""
    status, record, spec = done.decision.status, done.decision.record, done.spec
    values = status.current_metrics if len(status.current_metrics) == len(spec.metrics) else [None] * len(spec.metrics)
    fresh = AutoscalingStatus.model_validate(
        {
            "desiredReplicas": status.desired_replicas,
            "currentReplicas": status.current_replicas,
            "lastScaleTime": None if status.last_scale_time is None else timestamp(status.last_scale_time),
            "minReplicas": spec.minimum,
            "maxReplicas": spec.maximum,
            "schedule": done.schedule,
            "currentMetrics": [
                {
                    "type": metric.type,
                    "name": metric.name,
                    "target": _target(metric.target),
                    "current": {
                        "averageUtilization": value.average_utilization,
                        "averageValue": _quantity(value.average_value),
                        "value": _quantity(value.value),
                    },
                }
                for metric, value in zip(spec.metrics, values, strict=True)
                if value is not None
            ],
            "decision": cut(str(record)),
            "record": _record(record),
            "vertical": vertical,
        }
    )
    return stamped(fresh, before, now)


def stamped(fresh: AutoscalingStatus, before: AutoscalingStatus | None, now: float) -> AutoscalingStatus:
    """With the time since when it is so."""
    if before is not None and before.model_copy(update={"decision_time": ""}) == fresh:
        return before
    return fresh.model_copy(update={"decision_time": timestamp(now)})


def _reason(name: str) -> ConditionReason | None:
    """The reason of this name; None if another version wrote one that this one has not."""
    return next((reason for reason in ConditionReason if reason == name), None)


def resume(shown: AutoscalingStatus | None, known: Iterable[kinds.Condition]) -> State:
    """The state of an autoscaler that starts anew; `known`: the stack's conditions."""
    if shown is None:
        return State()
    kept = known_conditions(known, CONDITIONS)
    last = None if shown.last_scale_time is None else seconds(shown.last_scale_time)
    return State(status=Status(shown.current_replicas, shown.desired_replicas, last, kept))


def known_conditions(known: Iterable[kinds.Condition], types: Collection[str]) -> Conditions:
    """Those of these types that can be understood."""
    return tuple(
        Condition(c.type, c.status, reason, c.message, seconds(c.last_transition_time))
        for c in known
        if c.type in types and c.status != "Unknown" and (reason := _reason(c.reason)) is not None
    )


def seconds(text: str) -> float:
    """What `timestamp` wrote; 0 for anything else."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def cut(text: str) -> str:
    """A text that the status has room for."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _quantity(milli: int | None) -> str | None:
    """Thousandths as a Kubernetes quantity."""
    if milli is None:
        return None
    return str(milli // 1000) if milli % 1000 == 0 else f"{milli}m"


def _record(record: Record) -> dict[str, Any]:
    return {
        "current": record.current,
        "desired": record.desired,
        "proposals": [
            {
                "metric": cut(p.metric),
                "target": _target(p.target),
                "value": _value(p),
                "replicas": p.replicas,
                "missing": p.missing,
                "error": cut(p.error),
            }
            for p in record.proposals
        ],
        "winner": cut(record.winner),
        "proposed": record.proposed,
        "stabilized": record.stabilized,
        "stabilizedBy": record.stabilized_by,
        "limited": record.limited,
        "limitedBy": record.limited_by,
        "why": cut(record.why),
    }


def _target(target: Target) -> dict[str, Any]:
    match target.type:
        case "Utilization":
            return {"averageUtilization": target.value}
        case "AverageValue":
            return {"averageValue": _quantity(target.value)}
        case _:
            return {"value": _quantity(target.value)}


def _value(proposal: Proposal) -> dict[str, Any]:
    if proposal.target.type == "Value":
        return {"value": _quantity(proposal.usage)}
    return {"averageUtilization": proposal.utilization, "averageValue": _quantity(proposal.usage)}
