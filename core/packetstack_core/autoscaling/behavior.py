"""How fast replicas may change: stabilization windows and policies; in upstream a part of `horizontal.go`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import trunc
from typing import Literal

from packetstack_core.autoscaling.numbers import _MAX_INT32, _saturated, ceil32, int32
from packetstack_core.autoscaling.settings import Settings, Tolerances
from packetstack_core.reasons import ConditionReason


@dataclass(frozen=True, slots=True)
class Policy:
    """How much may change within a period."""

    type: Literal["Pods", "Percent"]
    value: int
    period_seconds: int

    def __str__(self) -> str:
        unit = "%" if self.type == "Percent" else " replicas"
        return f"{self.value}{unit} in {self.period_seconds} s"


@dataclass(frozen=True, slots=True)
class Rules:
    """How fast replicas may change in one direction."""

    policies: tuple[Policy, ...]
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    stabilization_window_seconds: int | None = None
    """None (only when scaling down): the controller's."""
    tolerance: float | None = None
    """None: the controller's."""


DEFAULT_UP = Rules((Policy("Pods", 4, 15), Policy("Percent", 100, 15)), stabilization_window_seconds=0)
DEFAULT_DOWN = Rules((Policy("Percent", 100, 15),))


@dataclass(frozen=True, slots=True)
class Behavior:
    """Both directions, with defaults filled in."""

    up: Rules = DEFAULT_UP
    down: Rules = DEFAULT_DOWN

    def with_window(self, settings: Settings) -> "Behavior":
        """With the controller's window where the scale-down rules leave it open."""
        if self.down.stabilization_window_seconds is not None:
            return self
        window = settings.downscale_stabilization_seconds
        return replace(self, down=replace(self.down, stabilization_window_seconds=window))


def tolerances_of(behavior: Behavior | None, settings: Settings) -> Tolerances:
    """Those of the behavior where it has them, else the controller's."""
    if behavior is None or not settings.configurable_tolerance:
        return Tolerances(settings.tolerance, settings.tolerance)
    up, down = behavior.up.tolerance, behavior.down.tolerance
    return Tolerances(settings.tolerance if up is None else up, settings.tolerance if down is None else down)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What the metrics asked for at a time."""

    replicas: int
    at: float


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """A change that was made: `change` replicas, always positive."""

    change: int
    at: float
    outdated: bool = False
    """Older than any policy looked back when an event was last stored; its place is used again."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the controller remembers between reconciles; a restart forgets it. The order is kept."""

    recommendations: tuple[Recommendation, ...] = ()
    up_events: tuple[ScaleEvent, ...] = ()
    down_events: tuple[ScaleEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class Bounded:
    """Replicas after a step, with the words for the condition."""

    replicas: int
    reason: ConditionReason
    message: str
    by: str = ""
    """What changed the number, for people; empty when nothing did."""


READY = (ConditionReason.READY_FOR_NEW_SCALE, "nothing holds a change of spec.replicas back")
_DOWN_STABILIZED = (
    ConditionReason.SCALE_DOWN_STABILIZED,
    "more engines were asked for within the scale-down window; the most of that time stay",
)
_UP_STABILIZED = (
    ConditionReason.SCALE_UP_STABILIZED,
    "fewer engines were asked for within the scale-up window; no more than the fewest of that time are added",
)
_WITHIN = (ConditionReason.DESIRED_WITHIN_RANGE, "the number of engines is within its limits")
_TOO_FEW = (ConditionReason.TOO_FEW_REPLICAS, "the load needs fewer engines than minReplicas")
_TOO_MANY = (ConditionReason.TOO_MANY_REPLICAS, "the load needs more engines than maxReplicas")
_UP_LIMIT = (
    ConditionReason.SCALE_UP_LIMIT,
    "the load needs more engines sooner than the policies of behavior allow",
)
_DOWN_LIMIT = (
    ConditionReason.SCALE_DOWN_LIMIT,
    "the load needs fewer engines sooner than the policies of behavior allow",
)


def _remember(
    recommendations: tuple[Recommendation, ...], desired: int, now: float, is_old: Callable[[Recommendation], bool]
) -> tuple[Recommendation, ...]:
    """With the new one in the place of the last old one, else at the end."""
    new = Recommendation(desired, now)
    for i in reversed(range(len(recommendations))):
        if is_old(recommendations[i]):
            return (*recommendations[:i], new, *recommendations[i + 1 :])
    return (*recommendations, new)


def stabilize(
    behavior: Behavior, recommendations: tuple[Recommendation, ...], current: int, desired: int, now: float
) -> tuple[Bounded, tuple[Recommendation, ...]]:
    """As near to `current` as the recommendations within the windows allow; then the memory with `desired` in it.

    The window of scaling down must be known: `Behavior.with_window`. When the replicas are `desired`, the reason
    does not apply.
    """
    up_window, down_window = (r.stabilization_window_seconds or 0 for r in (behavior.up, behavior.down))
    up_cutoff, down_cutoff = now - up_window, now - down_window
    lowest = min([r.replicas for r in recommendations if r.at > up_cutoff] + [desired])
    highest = max([r.replicas for r in recommendations if r.at > down_cutoff] + [desired])
    replicas = min(max(current, lowest), highest)
    by = ""
    if replicas != desired:
        up = desired > replicas
        by = f"{'scale-up' if up else 'scale-down'} window of {up_window if up else down_window} s"
    reason, message = _UP_STABILIZED if desired >= current else _DOWN_STABILIZED
    kept = _remember(recommendations, desired, now, lambda r: r.at < up_cutoff and r.at < down_cutoff)
    return Bounded(replicas, reason, message, by), kept


def stabilize_without_behavior(
    recommendations: tuple[Recommendation, ...], desired: int, window_seconds: float, now: float
) -> tuple[Bounded, tuple[Recommendation, ...]]:
    """The highest recommendation within the window; then the memory with `desired` in it."""
    cutoff = now - window_seconds
    replicas = max([r.replicas for r in recommendations if r.at >= cutoff] + [desired])
    by = f"scale-down window of {window_seconds} s" if replicas != desired else ""
    return Bounded(replicas, *_DOWN_STABILIZED, by), _remember(recommendations, desired, now, lambda r: r.at < cutoff)


def _changed(events: Iterable[ScaleEvent], period: float, now: float) -> int:
    cutoff = now - period
    return sum(event.change for event in events if event.at > cutoff)


def _rate_limit(rules: Rules, memory: Memory, current: int, now: float, up: bool) -> tuple[int, str]:
    """The furthest that the policies allow, and which one that is."""
    if rules.select_policy == "Disabled":
        return current, "selectPolicy Disabled"
    limits = []
    for policy in rules.policies:
        added = _changed(memory.up_events, policy.period_seconds, now)
        removed = _changed(memory.down_events, policy.period_seconds, now)
        start = int32(current - added + removed)
        if policy.type == "Pods":
            limit = int32(start + policy.value if up else start - policy.value)
        elif up:
            limit = ceil32(float(start) * (1 + float(policy.value) / 100))
        else:
            limit = _saturated(float(start) * (1 - float(policy.value) / 100), _MAX_INT32, trunc)
        limits.append((limit, f"policy {policy}"))
    furthest = max if up == (rules.select_policy == "Max") else min
    limit, by = furthest(limits, key=lambda found: found[0])
    return (max if up else min)(limit, current), by


def limit_rate(
    behavior: Behavior, memory: Memory, *, minimum: int, maximum: int, current: int, desired: int, now: float
) -> Bounded:
    """`desired` within the limits and as far from `current` as the policies of its direction allow."""
    if desired > current:
        limit, by = _rate_limit(behavior.up, memory, current, now, up=True)
        allowed, why, by = (limit, _UP_LIMIT, by) if maximum > limit else (maximum, _TOO_MANY, "maxReplicas")
        if desired > allowed:
            return Bounded(allowed, *why, by)
    elif desired < current:
        limit, by = _rate_limit(behavior.down, memory, current, now, up=False)
        allowed, why, by = (limit, _DOWN_LIMIT, by) if minimum < limit else (minimum, _TOO_FEW, "minReplicas")
        if desired < allowed:
            return Bounded(allowed, *why, by)
    return Bounded(desired, *_WITHIN)


def limit_without_behavior(*, minimum: int, maximum: int, current: int, desired: int) -> Bounded:
    """`desired` within the limits, at most doubled but up to 4 at any time."""
    limit = _saturated(max(2.0 * current, 4.0), _MAX_INT32, trunc)
    if desired < minimum:
        return Bounded(minimum, *_TOO_FEW, "minReplicas")
    if maximum > limit:
        allowed, why, by = limit, _UP_LIMIT, "at most double, or 4"
    else:
        allowed, why, by = maximum, _TOO_MANY, "maxReplicas"
    return Bounded(allowed, *why, by) if desired > allowed else Bounded(desired, *_WITHIN)


def remember_event(memory: Memory, behavior: Behavior | None, previous: int, replicas: int, now: float) -> Memory:
    """With the change from `previous` to `replicas`; without behavior nothing is remembered."""
    if behavior is None:
        return memory
    up = replicas > previous
    rules, events = (behavior.up, memory.up_events) if up else (behavior.down, memory.down_events)
    cutoff = now - max(policy.period_seconds for policy in rules.policies)
    kept = [replace(event, outdated=True) if event.at < cutoff else event for event in events]
    new = ScaleEvent(int32(replicas - previous if up else previous - replicas), now)
    free = max((i for i, event in enumerate(kept) if event.outdated), default=len(kept))
    kept[free : free + 1] = [new]
    return replace(memory, up_events=tuple(kept)) if up else replace(memory, down_events=tuple(kept))
