"""What `spec.autoscaling` adds to `autoscaling/v2`, each of it off unless asked for: schedules, fallback, panic, pause.

`reconcile` is one reconcile with all of them: limits of a schedule, the decision of `autoscaling.decide`, the
fallback when it could not be made, panic when it is too slow, and no write while paused. As there, the caller
writes and then calls `with_decision`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from math import ceil
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from packetstack_core import autoscalers
from packetstack_core.autoscaling import controller
from packetstack_core.autoscaling.behavior import Memory
from packetstack_core.autoscaling.calculator import Scale
from packetstack_core.autoscaling.metrics import Pod, Reading
from packetstack_core.autoscaling.settings import Settings
from packetstack_core.autoscaling.spec import Spec, spec_of
from packetstack_core.autoscaling.status import Decision, Status
from packetstack_core.reasons import Event, EventReason
from packetstack_core.vertical_autoscalers import CoreSchedule

_CHANGE = timedelta(hours=3)
"""More than any clock is ever changed by."""


def is_active(schedule: autoscalers.Schedule | CoreSchedule, now: datetime) -> bool:
    """Whether a beginning of the schedule lies at most its duration back.

    `now` has a time zone. A beginning in an hour that a change of clocks leaves out is an hour later; one in an
    hour that comes twice is in the first. Raises ValueError for a wrong cron or an unknown time zone.
    """
    from croniter import CroniterBadDateError, CroniterError, croniter  # only here: few stacks have a schedule

    try:
        zone = ZoneInfo(schedule.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f'time zone "{schedule.time_zone}" is unknown; use one as in "Europe/Berlin"') from None
    duration = timedelta(seconds=schedule.duration_seconds)
    # On the wall's clock, with room for its changes on both sides. Where there are none, each minute less counts.
    times = (now - duration - _CHANGE, now, now + _CHANGE)
    room = _CHANGE if len({t.astimezone(zone).utcoffset() for t in times}) > 1 else timedelta(seconds=1)
    latest, earliest = (t.astimezone(zone).replace(tzinfo=None) for t in (now + room, now - duration - room))
    try:
        beginnings = croniter(schedule.cron, latest)
        while (beginning := beginnings.get_prev(datetime)) >= earliest:
            begin = beginning.replace(tzinfo=zone).astimezone(UTC)
            if begin <= now < begin + duration:
                return True
    except CroniterBadDateError:
        return False  # as on the 30th of February
    except CroniterError as e:
        raise ValueError(f'cron "{schedule.cron}" cannot be read ({e}); use five fields, as in "0 8 * * 1-5"') from None
    return False


def with_schedule(spec: Spec, schedules: Sequence[autoscalers.Schedule], now: datetime) -> tuple[Spec, str]:
    """The spec with the limits of the first schedule that is active, and its name; "" without one.

    A limit that the schedule does not give stays, unless it contradicts the one that it gives. Fewer than 1 engine
    only with a metric that can be read without an engine: else nothing would ever ask for the first one.
    """
    least = 0 if spec.scales_to_zero() else 1
    for schedule in schedules:
        if is_active(schedule, now):
            low, high = schedule.min_replicas, schedule.max_replicas
            minimum = min(spec.minimum, spec.maximum if high is None else high) if low is None else low
            maximum = max(spec.maximum, minimum) if high is None else high
            return replace(spec, minimum=max(minimum, least), maximum=max(maximum, least)), schedule.name
    return replace(spec, minimum=max(spec.minimum, least)), ""


def failures(before: int, decision: Decision) -> int:
    """Reconciles in a row in which no metric could be used, with this one."""
    return before + 1 if decision.error == "compute_failed" else 0


def fall_back(decision: Decision, spec: Spec, status: Status, fallback: autoscalers.Fallback, failed: int) -> Decision:
    """The decision, or the replicas of the fallback once the metrics failed often enough in a row.

    `failed` comes from `failures`, `status` is that before the decision.
    """
    if decision.error != "compute_failed" or failed < fallback.failure_threshold:
        return decision
    current = decision.record.current
    replicas = min(max(fallback.replicas, spec.minimum), spec.maximum)
    why = f"no metric could be used {failed} times in a row, so the fallback counts: {decision.record.why}"
    record = replace(decision.record, desired=replicas, limited=replicas, limited_by="fallback", why=why)
    shown = replace(decision.status, desired_replicas=status.desired_replicas if replicas != current else current)
    return replace(
        decision,
        status=shown,
        record=record,
        write=replicas if replicas != current else None,
        reason="Fallback, as no metric can be used",
    )


def hold(decision: Decision) -> Decision:
    """The decision without its write: for a stack whose autoscaling is paused. The record says what it would be."""
    if decision.write is None:
        return decision
    why = f"paused, else {decision.write}" + (f": {decision.record.why}" if decision.record.why else "")
    current = decision.record.current
    return replace(
        decision,
        status=replace(decision.status, desired_replicas=current),
        record=replace(decision.record, desired=current, why=why),
        write=None,
        reason="",
        events=(*decision.events, Event(EventReason.AUTOSCALING_PAUSED, f"{current} engines stay; {why}")),
    )


@dataclass(frozen=True, slots=True)
class PanicState:
    """What is remembered for the panic windows."""

    demands: tuple[tuple[float, float], ...] = ()
    """When, and how many engines would have been at their target exactly."""
    since: float | None = None
    """When the load was last above the threshold; None: no panic."""
    highest: int = 0
    """Most engines that this panic asked for."""


def _demand(decision: Decision, ready: int) -> float | None:
    """Engines that would be at their target; of several metrics the most. None when no metric says."""
    ratios = [
        (p.usage or 0 if p.utilization is None else p.utilization) / p.target.value
        for p in decision.record.proposals
        if p.replicas is not None and p.target.type != "Value"
    ]
    return max(ratios) * ready if ratios else None


def panic(
    decision: Decision, spec: Spec, wanted: autoscalers.Panic, state: PanicState, ready: int, now: float
) -> tuple[Decision, PanicState]:
    """The decision, or at once the most engines that a panic has asked for; and what to remember.

    As Knative's KPA (`pkg/autoscaler/scaling/autoscaler.go`): a panic begins when the average of the panic window
    needs `threshold_percentage` of the ready engines, never lowers the replicas, and ends when the load was below
    the threshold for a stable window. It goes past windows and policies of the behavior, not past the limits.
    """
    demand = _demand(decision, ready)
    if demand is None or ready == 0:
        return decision, state
    kept = [(at, value) for at, value in state.demands if now - wanted.stable_window_seconds < at < now]
    kept.append((now, demand))
    window = wanted.stable_window_seconds * wanted.window_percentage / 100
    recent = [value for at, value in kept if at > now - window]
    needed = ceil(sum(recent) / len(recent))
    since, highest = state.since, state.highest
    if 100 * needed >= wanted.threshold_percentage * ready:
        since = now
    elif since is not None and since + wanted.stable_window_seconds < now:
        since, highest = None, 0
    if since is not None:
        highest = max(highest, needed)
    state = PanicState(tuple(kept), since, highest)
    current = decision.record.current
    replicas = min(max(highest, current), spec.maximum)
    # A write to or from outside the limits is not ours to change.
    if since is None or decision.record.desired >= replicas or current > spec.maximum:
        return decision, state
    why = f"panic: {needed} engines needed by {ready}"
    record = replace(decision.record, desired=replicas, limited=replicas, limited_by="panic", why=why)
    if replicas == current:
        status = replace(decision.status, desired_replicas=current)
        return replace(decision, status=status, record=record, write=None, reason=""), state
    return replace(decision, record=record, write=replicas, reason=f"Panic, {needed} engines are needed"), state


@dataclass(frozen=True, slots=True)
class State:
    """All that is remembered between two reconciles of a stack."""

    memory: Memory = field(default_factory=Memory)
    status: Status = field(default_factory=Status)
    failed: int = 0
    """Reconciles in a row in which no metric could be used."""
    panic: PanicState = field(default_factory=PanicState)


def reconcile(
    wanted: autoscalers.Autoscaling,
    settings: Settings,
    state: State,
    scale: Scale,
    pods: Sequence[Pod],
    readings: Sequence[Reading],
    now: float,
    date_and_time: datetime,
) -> tuple[Decision, Spec, State]:
    """The decision of one reconcile, the spec that held for it, and what to remember.

    `now` is what the windows are measured in, `date_and_time` is for the schedules and has a time zone. Raises
    ValueError for a schedule that cannot be read.
    """
    spec, _ = with_schedule(spec_of(wanted), wanted.schedules, date_and_time)
    decision = controller.decide(spec, settings, state.memory, state.status, scale, pods, readings, now)
    failed = failures(state.failed, decision)
    if wanted.fallback is not None:
        decision = fall_back(decision, spec, state.status, wanted.fallback, failed)
    panicking = state.panic
    if wanted.panic is not None:
        decision, panicking = panic(decision, spec, wanted.panic, panicking, len(pods), now)
    if wanted.paused:
        decision = hold(decision)
    return decision, spec, State(decision.memory, decision.status, failed, panicking)


def with_decision(state: State, decision: Decision) -> State:
    """The state after `autoscaling.written` or `refused` gave this decision."""
    return replace(state, memory=decision.memory, status=decision.status)
