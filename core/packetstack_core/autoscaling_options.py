"""What `spec.autoscaling` adds to `autoscaling/v2`, each of it off unless asked for: schedules, fallback, pause.

Around one reconcile: `with_schedule` before `autoscaling.decide`, `fall_back` or `hold` on its decision before
anything is written.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from itertools import product
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from packetstack_core import resources
from packetstack_core.autoscaling import Decision, Event, Spec, Status

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("day of the week", 0, 7))
_NAMES = {
    name: i
    for names, first in (
        ("jan feb mar apr may jun jul aug sep oct nov dec", 1),
        ("sun mon tue wed thu fri sat", 0),
    )
    for i, name in enumerate(names.split(), first)
}


class Cron:
    """A schedule of five fields as cron(8) reads them: `*`, numbers, names, lists, ranges, steps.

    A day matches when its month does and, of day of the month and day of the week, both, or either when neither
    is `*`. Raises ValueError with the field that is wrong.
    """

    def __init__(self, text: str) -> None:
        parts = text.split()
        if len(parts) != len(_FIELDS):
            raise ValueError(f'cron "{text}" has {len(parts)} fields; use five, as in "0 8 * * 1-5"')
        self.minutes, self.hours, self.days, self.months, weekdays = (
            _values(part, *field) for part, field in zip(parts, _FIELDS, strict=True)
        )
        self.weekdays = {day % 7 for day in weekdays}
        self._either = not parts[2].startswith("*") and not parts[4].startswith("*")

    def is_on(self, day: date) -> bool:
        """Whether anything begins on this day."""
        in_month, in_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (in_month or in_week if self._either else in_month and in_week)


def _values(part: str, name: str, low: int, high: int) -> set[int]:
    found: set[int] = set()
    for item in part.lower().split(","):
        span, slash, step = item.partition("/")
        first, dash, last = ("*", "", "") if span == "*" else span.partition("-")
        try:
            start = low if first == "*" else _NAMES[first] if first in _NAMES else int(first)
            # "5/10" begins at 5 and goes on to the end, as "5-59/10".
            end = (_NAMES[last] if last in _NAMES else int(last)) if dash else high if slash or first == "*" else start
            every = int(step) if slash else 1
        except ValueError:
            start, end, every = 0, 0, 0
        if not (low <= start <= end <= high and every > 0):
            raise ValueError(f'cron has {name} "{item}"; use {low} to {high}, ranges, lists and steps of these, or *')
        found |= set(range(start, end + 1, every))
    return found


def is_active(schedule: resources.Schedule, now: datetime) -> bool:
    """Whether a beginning of the schedule lies at most its duration back. O(days of the duration).

    `now` has a time zone. A beginning in an hour that a change of clocks leaves out is an hour later; one in an
    hour that comes twice is in the first. Raises ValueError for a wrong cron or an unknown time zone.
    """
    cron = Cron(schedule.cron)
    try:
        zone = ZoneInfo(schedule.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f'time zone "{schedule.time_zone}" is unknown; use one as in "Europe/Berlin"') from None
    duration = timedelta(seconds=schedule.duration_seconds)
    earliest = (now - duration).astimezone(zone).date() - timedelta(days=1)
    day = now.astimezone(zone).date()
    while day >= earliest:
        if cron.is_on(day):
            for hour, minute in product(cron.hours, cron.minutes):
                begin = datetime.combine(day, time_of_day(hour, minute), zone).astimezone(UTC)
                if begin <= now < begin + duration:
                    return True
        day -= timedelta(days=1)
    return False


def with_schedule(spec: Spec, schedules: Sequence[resources.Schedule], now: datetime) -> tuple[Spec, str]:
    """The spec with the limits of the first schedule that is active, and its name; "" without one.

    A limit that the schedule does not give stays, unless it contradicts the one that it gives.
    """
    for schedule in schedules:
        if is_active(schedule, now):
            low, high = schedule.min_replicas, schedule.max_replicas
            minimum = min(spec.minimum, spec.maximum if high is None else high) if low is None else low
            maximum = max(spec.maximum, minimum) if high is None else high
            return replace(spec, minimum=minimum, maximum=maximum), schedule.name
    return spec, ""


def failures(before: int, decision: Decision) -> int:
    """Reconciles in a row in which no metric could be used, with this one."""
    return before + 1 if decision.error == "compute_failed" else 0


def fall_back(decision: Decision, spec: Spec, status: Status, fallback: resources.Fallback, failed: int) -> Decision:
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
        events=(*decision.events, Event("Normal", "AutoscalingPaused", f"{current} engines stay; {why}")),
    )
