"""How many engines a load asks for: the algorithm of `autoscaling/v2`, as pure functions.

The autoscaler gives what the HorizontalPodAutoscaler of Kubernetes 1.36 gives, bit for bit: replica counts,
conditions, reasons, messages and events. Sources: kubernetes/kubernetes `pkg/controller/podautoscaler`
(`replica_calculator.go`, `horizontal.go`, `metrics/utilization.go`) and `pkg/apis/autoscaling/v2/defaults.go`.

One reconcile: `decide` takes the spec, what is remembered, what is measured and the time, and says what to
write. The caller writes it to `/scale`, at most `WRITE_ATTEMPTS` times on conflicts, and then calls `written`
or `refused`. Nothing here reads a clock, and what is remembered (`Memory`, `Status`) goes in and out as values.

Units: times are seconds on any one scale; `milli` values are thousandths, as `Quantity.MilliValue()`.

Where Go leaves a result to the processor (a float that does not fit int32), this is as on arm64: it saturates,
so that an absurdly high metric asks for many engines, not for none. Integers wrap as in Go.

Metrics of type `Engine` are ours; they follow the rules of Pods metrics and two of their own: a sample older
than `Settings.sample_max_age_seconds` (or as far in the future) counts as missing, and a proposal below the
current replicas is refused while the sample of any listed engine is missing. Only active engines are listed.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from math import ceil, inf, isnan, nan, trunc
from typing import Literal

from packetstack_core import autoscalers
from packetstack_core.values import quantity

WRITE_ATTEMPTS = 5
"""How often a write of `/scale` is tried when it conflicts; `retry.DefaultRetry` of client-go."""

_MAX_INT32, _MAX_INT64 = 2**31 - 1, 2**63 - 1

# ---- numbers as in Go ------------------------------------------------------------------------------------------


def _int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _quotient(a: int, b: int) -> int:
    """Integer division towards zero; Python's rounds down."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _ratio(a: int, b: float) -> float:
    """Both sides are floats first: Python divides integers exactly, Go does not."""
    if b == 0:
        return inf if a > 0 else -inf if a < 0 else nan
    return float(a) / b


def _saturated(value: float, largest: int, rounding: Callable[[float], int]) -> int:
    if isnan(value):
        return 0
    return largest if value >= largest else -largest - 1 if value <= -largest - 1 else rounding(value)


def _ceil32(value: float) -> int:
    return _saturated(value, _MAX_INT32, ceil)


def _ceil64(value: float) -> int:
    return _saturated(value, _MAX_INT64, ceil)


def approximate(value: Decimal) -> float:
    """`Quantity.AsApproximateFloat64`: the digits of the canonical form times its power of ten.

    So 18m is 18 * 0.001 = 0.018000000000000002.
    """
    for exponent in (0, -3, -6, -9):
        digits = value.scaleb(-exponent)
        if digits == digits.to_integral_value():
            break
    return float(ceil(digits)) * float(f"1e{exponent}")


def milli(text: str) -> int:
    """Thousandths of a Kubernetes quantity, rounded up as `MilliValue` does. Raises ValueError."""
    return ceil(quantity(text) * 1000)


# ---- what is measured ------------------------------------------------------------------------------------------


class MetricError(Exception):
    """A metric that gives no proposal. `kind` names the class of the failure, the text is for people."""

    def __init__(
        self,
        kind: Literal[
            "api_error",
            "api_empty",
            "no_pods",
            "no_metrics",
            "missing_request",
            "container_not_found",
            "no_matching_metrics",
            "invalid_selector",
            "invalid_target",
            "missing_samples",
        ],
        message: str,
    ) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Container:
    """Of a pod. `requests`: milli-units per resource."""

    name: str
    requests: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that the selector of the target matches; for `Engine` metrics an active engine."""

    name: str
    phase: str = "Running"
    deleting: bool = False
    """It has a deletionTimestamp."""
    start_time: float | None = None
    ready: Literal["True", "False", "Unknown"] | None = None
    """Status of the Ready condition; None without one."""
    ready_transition: float = -inf
    """When `ready` last changed."""
    containers: Sequence[Container] = ()
    sidecars: Sequence[Container] = ()
    """Init containers that go on running."""
    init_containers: Sequence[Container] = ()
    """The others."""
    requests: Mapping[str, int] = field(default_factory=dict)
    """Of the pod as a whole: milli-units per resource."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A pod's value of a metric in milli-units, measured over `window` seconds until `timestamp`."""

    value: int
    timestamp: float = 0.0
    window: float = 0.0


Reading = Mapping[str, Sample] | Sequence[int] | int | MetricError
"""What the source of a metric answered: samples by pod (Engine, Resource, ContainerResource, Pods), the values of
the series that match (External), one value (Object), or why there is none. Values are milli-units."""


def usage(containers: Iterable[tuple[str, int | None]], container: str = "") -> int | None:
    """A pod's usage from the usage of its containers (None: not measured), or that of the named container.

    None when it is not known: of a whole pod that has no container or one that is not measured.
    """
    named = list(containers)
    if container:
        return next((value for name, value in named if name == container), None)
    values = [value for _, value in named if value is not None]
    return _int64(sum(values)) if values and len(values) == len(named) else None


@dataclass(frozen=True, slots=True)
class Tolerances:
    """How far the ratio of a metric to its target may be from 1 without an effect."""

    up: float = 0.1
    down: float = 0.1

    def within(self, ratio: float) -> bool:
        """Whether the ratio is near enough, both ends included."""
        return (1.0 - self.down) <= ratio <= (1.0 + self.up)


@dataclass(frozen=True, slots=True)
class Settings:
    """Flags of the controller, with the defaults of kube-controller-manager."""

    tolerance: float = 0.1
    downscale_stabilization_seconds: int = 300
    cpu_initialization_period_seconds: float = 300
    initial_readiness_delay_seconds: float = 30
    scale_to_zero: bool = False
    """Feature gate HPAScaleToZero."""
    configurable_tolerance: bool = True
    """Feature gate HPAConfigurableTolerance."""
    sample_max_age_seconds: float = 45
    """Of `Engine` metrics: three sync periods of the default 15 s."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What `/scale` of the target says."""

    spec_replicas: int
    status_replicas: int


@dataclass(frozen=True, slots=True)
class View:
    """What every metric of a reconcile is judged against."""

    pods: Sequence[Pod]
    scale: Scale
    tolerances: Tolerances
    settings: Settings
    now: float


# ---- replicas that one metric asks for -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Calculation:
    """Replicas that a metric asks for, and what it was: `usage` in milli-units, `utilization` in percent."""

    replicas: int
    usage: int
    utilization: int | None = None
    missing: int = 0
    """Pods without a sample."""


@dataclass(slots=True)
class _Groups:
    ready: int = 0
    unready: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)


def _is_cpu_unready(pod: Pod, sample: Sample, view: View) -> bool:
    if pod.ready is None or pod.start_time is None:
        return True
    if pod.start_time + view.settings.cpu_initialization_period_seconds > view.now:
        return pod.ready == "False" or sample.timestamp < pod.ready_transition + sample.window
    never_ready = pod.start_time + view.settings.initial_readiness_delay_seconds > pod.ready_transition
    return pod.ready == "False" and never_ready


def _group(samples: Mapping[str, Sample], resource: str, view: View) -> _Groups:
    groups = _Groups()
    for pod in view.pods:
        if pod.deleting or pod.phase == "Failed":
            groups.ignored.add(pod.name)
        elif pod.phase == "Pending":
            groups.unready.add(pod.name)
        elif pod.name not in samples:
            groups.missing.add(pod.name)
        elif resource == "cpu" and _is_cpu_unready(pod, samples[pod.name], view):
            groups.unready.add(pod.name)
        else:
            groups.ready += 1
    return groups


_Measure = Callable[[Mapping[str, int]], tuple[float, int, int | None]]
"""Values by pod -> ratio to the target, average, percent."""


def _from_values(
    values: dict[str, int], groups: _Groups, view: View, measure: _Measure, fill: Callable[[str], int]
) -> Calculation:
    """`fill` gives what a missing pod is taken for when the others ask for fewer replicas."""
    current, within = view.scale.spec_replicas, view.tolerances.within
    ratio, average, percent = measure(values)

    def asks(replicas: int) -> Calculation:
        return Calculation(replicas, average, percent, len(groups.missing))

    up_with_unready = bool(groups.unready) and ratio > 1.0
    if not up_with_unready and not groups.missing:
        return asks(current if within(ratio) else _ceil32(ratio * groups.ready))
    # What is not known counts against the direction in which the rest goes.
    if ratio < 1.0:
        values |= {name: fill(name) for name in groups.missing}
    elif ratio > 1.0:
        values |= dict.fromkeys(groups.missing, 0)
    if up_with_unready:
        values |= dict.fromkeys(groups.unready, 0)
    again, _, _ = measure(values)
    if within(again) or ratio < 1.0 < again or ratio > 1.0 > again:
        return asks(current)
    replicas = _ceil32(again * len(values))
    if (again < 1.0 and replicas > current) or (again > 1.0 and replicas < current):
        return asks(current)
    return asks(replicas)


def _usable(samples: Mapping[str, Sample], resource: str, view: View) -> tuple[dict[str, int], _Groups]:
    if not view.pods:
        raise MetricError("no_pods", "no pods returned by selector while calculating replica count")
    groups = _group(samples, resource, view)
    dropped = groups.ignored | groups.unready
    values = {name: sample.value for name, sample in samples.items() if name not in dropped}
    if not values:
        raise MetricError("no_metrics", "did not receive metrics for targeted pods (pods might be unready)")
    return values, groups


def by_utilization(
    samples: Mapping[str, Sample], view: View, target: int, *, resource: str, container: str = ""
) -> Calculation:
    """Replicas for a use of `target` percent of the pods' requests. Raises MetricError."""
    values, groups = _usable(samples, resource, view)
    requests = {pod.name: _request(pod, resource, container) for pod in view.pods}
    return _by_share(values, groups, requests, view, target)


def _by_share(
    values: dict[str, int], groups: _Groups, requests: Mapping[str, int], view: View, target: int
) -> Calculation:
    def measure(values: Mapping[str, int]) -> tuple[float, int, int]:
        # Samples of pods that are not in the list are left out here, but counted in len(values).
        known = [name for name in values if name in requests]
        used = _int64(sum(values[name] for name in known))
        requested = _int64(sum(requests[name] for name in known))
        if requested == 0:
            raise MetricError("no_matching_metrics", "no metrics returned matched known pods")
        percent = _int32(_quotient(_int64(used * 100), requested))
        return _ratio(percent, float(target)), _quotient(used, len(known)), percent

    def fill(name: str) -> int:
        return _quotient(_int64(requests[name] * max(100, target)), 100)

    return _from_values(values, groups, view, measure, fill)


def by_average(samples: Mapping[str, Sample], view: View, target: int, *, resource: str = "") -> Calculation:
    """Replicas for an average of `target` milli-units per pod. Raises MetricError."""
    values, groups = _usable(samples, resource, view)

    def measure(values: Mapping[str, int]) -> tuple[float, int, None]:
        average = _quotient(_int64(sum(values.values())), len(values))
        return _ratio(average, float(target)), average, None

    return _from_values(values, groups, view, measure, lambda _: target)


def by_value(total: int, view: View, target: int) -> Calculation:
    """Replicas for a value of `target` milli-units in all, taken to shrink with each ready pod. Raises MetricError."""
    current = view.scale.spec_replicas
    ratio = _ratio(total, float(target))
    if current == 0:
        return Calculation(_ceil32(ratio), total)
    if view.tolerances.within(ratio):
        return Calculation(current, total)
    if not view.pods:
        message = "no pods returned by selector while calculating replica count"
        raise MetricError("no_pods", f"unable to calculate ready pods: {message}")
    ready = sum(pod.phase == "Running" and pod.ready == "True" for pod in view.pods)
    return Calculation(_ceil32(ratio * ready), total)


def by_value_per_replica(total: int, view: View, target: int) -> Calculation:
    """Replicas for `target` milli-units of the value for each of the replicas that the scale reports."""
    replicas = view.scale.status_replicas
    usage = _ceil64(_ratio(total, float(replicas)))
    if not view.tolerances.within(_ratio(total, float(target) * float(replicas))):
        replicas = _ceil32(_ratio(total, float(target)))
    return Calculation(replicas, usage)


def external_total(values: Iterable[int]) -> int:
    """Sum of the series for a target of type Value: capped at MaxInt64."""
    total = 0
    for value in values:
        if value > 0 and total > _MAX_INT64 - value:
            return _MAX_INT64
        total = _int64(total + value)
    return total


def external_total_per_replica(values: Iterable[int]) -> int:
    """Sum of the series for a target of type AverageValue: once below 0 it is taken for an overflow, MaxInt64."""
    total = 0
    for value in values:
        total = _int64(total + value)
        if total < 0:
            return _MAX_INT64
    return total


def by_external_per_replica(total: int, view: View, target: int) -> Calculation:
    """As `by_value_per_replica`, with the reported value kept at MaxInt64 when the sum was."""
    found = by_value_per_replica(total, view, target)
    return replace(found, usage=_MAX_INT64) if float(total) >= float(_MAX_INT64) else found


def _request(pod: Pod, resource: str, container: str) -> int:
    """A pod's request in milli-units. Raises MetricError when there is none."""
    if not container and any(_is_pod_level(name) for name in pod.requests):
        return _pod_request(pod, resource)
    total = 0
    for c in [*pod.containers, *pod.sidecars]:
        if container in ("", c.name):
            if resource not in c.requests:
                message = f"missing request for {resource} in container {c.name} of Pod {pod.name}"
                raise MetricError("missing_request", message)
            total = _int64(total + c.requests[resource])
        if container == c.name:
            return total
    if container:
        raise MetricError("container_not_found", f"container {container} not found in Pod {pod.name}")
    return total


def _is_pod_level(resource: str) -> bool:
    return resource in ("cpu", "memory") or resource.startswith("hugepages-")


def _pod_request(pod: Pod, resource: str) -> int:
    """With pod-level requests: that of the resource, else what the scheduler takes the containers for (KEP-753)."""
    if resource in pod.requests and _is_pod_level(resource):
        return pod.requests[resource]
    groups = ([*pod.containers, *pod.sidecars], pod.sidecars, pod.init_containers)
    running, sidecars, init = ([c.requests[resource] for c in group if resource in c.requests] for group in groups)
    if not running and not init:
        raise MetricError("missing_request", f"missing pod-level request for {resource} in Pod {pod.name}")
    return max(sum(running), *(sum(sidecars) + value for value in init)) if init else sum(running)


# ---- behavior --------------------------------------------------------------------------------------------------


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
    """Of one direction."""

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
    reason: str
    message: str
    by: str = ""
    """What changed the number, for people; empty when nothing did."""


_READY = ("ReadyForNewScale", "recommended size matches current size")
_DOWN_STABILIZED = (
    "ScaleDownStabilized",
    "recent recommendations were higher than current one, applying the highest recent recommendation",
)
_UP_STABILIZED = (
    "ScaleUpStabilized",
    "recent recommendations were lower than current one, applying the lowest recent recommendation",
)
_WITHIN = ("DesiredWithinRange", "the desired count is within the acceptable range")
_TOO_FEW = ("TooFewReplicas", "the desired replica count is less than the minimum replica count")
_TOO_MANY = ("TooManyReplicas", "the desired replica count is more than the maximum replica count")
_UP_LIMIT = ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate")
_DOWN_LIMIT = ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate")


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
        start = _int32(current - added + removed)
        if policy.type == "Pods":
            limit = _int32(start + policy.value if up else start - policy.value)
        elif up:
            limit = _ceil32(float(start) * (1 + float(policy.value) / 100))
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
    new = ScaleEvent(_int32(replicas - previous if up else previous - replicas), now)
    free = max((i for i, event in enumerate(kept) if event.outdated), default=len(kept))
    kept[free : free + 1] = [new]
    return replace(memory, up_events=tuple(kept)) if up else replace(memory, down_events=tuple(kept))


# ---- status ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """As in the status of an HPA."""

    type: str
    status: Literal["True", "False"]
    reason: str
    message: str
    last_transition: float


Conditions = tuple[Condition, ...]


def set_condition(
    conditions: Conditions, type_: str, status: Literal["True", "False"], reason: str, message: str, now: float
) -> Conditions:
    """With the condition in its place, or at the end; its time changes with its status only."""
    new = Condition(type_, status, reason, message, now)
    for i, old in enumerate(conditions):
        if old.type == type_:
            if old.status == status:
                new = replace(new, last_transition=old.last_transition)
            return (*conditions[:i], new, *conditions[i + 1 :])
    return (*conditions, new)


def _without(conditions: Conditions, type_: str) -> Conditions:
    return tuple(c for c in conditions if c.type != type_)


@dataclass(frozen=True, slots=True)
class MetricStatus:
    """The last value of a metric: the members of `MetricValueStatus`, in milli-units and percent."""

    average_utilization: int | None = None
    average_value: int | None = None
    value: int | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """What is shown of the autoscaler, and outlives a restart of the controller."""

    current_replicas: int = 0
    desired_replicas: int = 0
    last_scale_time: float | None = None
    conditions: Conditions = ()
    current_metrics: tuple[MetricStatus | None, ...] = ()
    """In the order of the spec; None for one that failed."""


@dataclass(frozen=True, slots=True)
class Event:
    """For the people who look at the stack."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


# ---- metrics of the spec ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """`value`: percent for Utilization, else milli-units."""

    type: Literal["Utilization", "AverageValue", "Value"]
    value: int


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of the spec."""

    type: str
    """Engine, Resource, ContainerResource, Pods, Object or External."""
    name: str
    target: Target
    container: str = ""
    """Of ContainerResource."""
    described_kind: str = ""
    """Of Object."""
    selector: str = "nil"
    """The label selector as Go prints it."""

    def title(self) -> str:
        """What the metric is called in reasons and conditions."""
        if self.type in ("Resource", "ContainerResource"):
            if self.target.type != "Utilization":
                return f"{self.name} resource"
            container = "container " if self.type == "ContainerResource" else ""
            return f"{self.name} {container}resource utilization (percentage of request)"
        if self.type == "Object" and self.target.type == "Value":
            return f"{self.described_kind} metric {self.name}"
        if self.type in ("Object", "External"):
            return f"external metric {self.name}({self.selector})"
        return f"{self.type.lower()} metric {self.name}"


@dataclass(frozen=True, slots=True)
class Spec:
    """What the user wants."""

    maximum: int
    metrics: tuple[Metric, ...]
    minimum: int = 1
    behavior: Behavior | None = None

    def scales_to_zero(self) -> bool:
        """Whether a metric can be read without a pod."""
        return any(metric.type in ("Object", "External") for metric in self.metrics)


class SelectorError(Exception):
    """A selector of the scale by which pods cannot be found. `event` is the reason of the event."""

    def __init__(
        self, event: Literal["SelectorRequired", "InvalidSelector", "AmbiguousSelector"], message: str
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


ENGINE_CAPACITY = 1000
"""What a fully busy engine shows as `Utilization`: the share of its cycles that do work, in thousandths."""


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


def _explained(metric: Metric, error: MetricError) -> tuple[str, str, str]:
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
            return "InvalidMetricSourceType", text, text
    return f"FailedGet{metric.type}Metric", text, f"failed to get {about} metric value: {text}"


# ---- one reconcile ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one metric asked for."""

    metric: str
    target: Target
    replicas: int | None = None
    """None when the metric failed."""
    usage: int | None = None
    """Milli-units."""
    utilization: int | None = None
    """Percent."""
    missing: int = 0
    """Pods without a sample."""
    error: str = ""

    def __str__(self) -> str:
        if self.replicas is None:
            return f"{self.metric}: {self.error}"
        if self.utilization is not None:
            at = f"{self.utilization}/{self.target.value} %"
        else:
            at = f"{(self.usage or 0) / 1000:g}/{self.target.value / 1000:g}"
        missing = f", {self.missing} without a sample" if self.missing else ""
        return f"{self.metric} {at}{missing} -> {self.replicas}"


@dataclass(frozen=True, slots=True)
class Record:
    """Why a decision is what it is: each step's number, and what cut it."""

    current: int
    desired: int
    proposals: tuple[Proposal, ...] = ()
    winner: str = ""
    """Title of the metric that asked for most."""
    proposed: int | None = None
    """The most that a metric asked for; None when no metric counted."""
    stabilized: int | None = None
    """After the stabilisation windows."""
    stabilized_by: str = ""
    limited: int | None = None
    """After the rate limits and minReplicas, maxReplicas."""
    limited_by: str = ""
    why: str = ""
    """Why no metric counted."""

    def __str__(self) -> str:
        steps = [str(p) for p in self.proposals]
        if self.stabilized_by:
            steps.append(f"{self.stabilized_by} -> {self.stabilized}")
        if self.limited_by:
            steps.append(f"{self.limited_by} -> {self.limited}")
        if self.why:
            steps.append(self.why)
        return f"{self.current} -> {self.desired}: " + "; ".join(steps)


Error = Literal[
    "",
    "invalid_api_version",
    "mapping_failed",
    "get_scale_failed",
    "compute_failed",
    "partial_metrics",
    "update_scale_failed",
]
"""Class of what went wrong in a reconcile; with `partial_metrics` it went on with the metrics that are there."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of a reconcile. With `write`, it is not at its end before `written` or `refused`."""

    memory: Memory
    status: Status
    record: Record
    write: int | None = None
    """Replicas to write to `/scale`; None: nothing."""
    reason: str = ""
    """Why they change."""
    events: tuple[Event, ...] = ()
    error: Error = ""


def no_scale(memory: Memory, status: Status, message: str, now: float, error: Error = "get_scale_failed") -> Decision:
    """The outcome when the target or its scale cannot be read."""
    text = f"the HPA controller was unable to get the target's current scale: {message}"
    conditions = set_condition(status.conditions, "AbleToScale", "False", "FailedGetScale", text, now)
    record = Record(status.current_replicas, status.desired_replicas, why=f"the scale cannot be read: {message}")
    event = Event("Warning", "FailedGetScale", message)
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
    failures: list[tuple[str, str, str]] = []
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
    events = tuple(Event("Warning", reason, message) for reason, message, _ in failures)
    error = ""
    if failures:
        first = failures[0][2]
        error = f"invalid metrics ({len(failures)} invalid out of {len(spec.metrics)}), first error is: {first}"
    # Never fewer replicas on a part of the data.
    usable = len(failures) < len(spec.metrics) and not (failures and replicas < view.scale.spec_replicas)
    if usable:
        message = f"the HPA was able to successfully calculate a replica count from {winner}"
        conditions = set_condition(conditions, "ScalingActive", "True", "ValidMetricFound", message, now)
    elif failures:
        reason, text, _ = failures[0]
        message = f"the HPA was unable to compute the replica count: {text}"
        conditions = set_condition(conditions, "ScalingActive", "False", reason, message, now)
    return _Metrics(replicas if usable else None, winner, conditions, tuple(statuses), tuple(proposals), events, error)


def _bad_selector(conditions: Conditions, error: SelectorError, now: float) -> _Metrics:
    text = str(error)
    event = Event("Warning", error.event, text)
    reason = "AmbiguousSelector" if error.event == "AmbiguousSelector" else "InvalidSelector"
    message = "the HPA target's scale is missing a selector" if error.event == "SelectorRequired" else text
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
    able = (stable.reason, stable.message) if stable.replicas != desired else _READY
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
    message = "the HPA controller was able to get the target's current scale"
    conditions = set_condition(status.conditions, "AbleToScale", "True", "SucceededGetScale", message, now)
    if not memory.recommendations:
        # So that a controller that has just started does not scale down at once.
        memory = replace(memory, recommendations=(Recommendation(current, now),))
    from_zero = settings.scale_to_zero and _is_scaled_to_zero(conditions)
    shown = replace(status, current_replicas=current, current_metrics=(), conditions=conditions)

    if current == 0 and not (from_zero and (spec.minimum != 0 or spec.scales_to_zero())):
        message = "scaling is disabled since the replica count of the target is zero"
        conditions = set_condition(conditions, "ScalingActive", "False", "ScalingDisabled", message, now)
        if not settings.scale_to_zero:
            conditions = _without(conditions, "ScaledToZero")
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
        events = (*metrics.events, Event("Warning", "FailedComputeMetricsReplicas", metrics.error))
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
    message = f"the HPA controller was able to update the target scale to {replicas}"
    status = decision.status
    conditions = set_condition(status.conditions, "AbleToScale", "True", "SucceededRescale", message, now)
    if not settings.scale_to_zero:
        conditions = _without(conditions, "ScaledToZero")
    elif current > 0 and replicas == 0 and spec.minimum == 0 and spec.scales_to_zero():
        message = "the HPA controller scaled the workload to zero"
        conditions = set_condition(conditions, "ScaledToZero", "True", "ScaledToZero", message, now)
    else:
        message = "the HPA controller did not scale the workload to zero"
        conditions = set_condition(conditions, "ScaledToZero", "False", "NotScaledToZero", message, now)
    event = Event("Normal", "SuccessfulRescale", f"New size: {replicas}; reason: {decision.reason}")
    return replace(
        decision,
        memory=remember_event(decision.memory, spec.behavior, current, replicas, now),
        status=replace(status, desired_replicas=replicas, last_scale_time=now, conditions=conditions),
        events=(*decision.events, event),
    )


def refused(decision: Decision, message: str, now: float) -> Decision:
    """The outcome when `/scale` could not be written, for the reason `message`."""
    replicas = _to_write(decision)
    text = f"the HPA controller was unable to update the target scale: {message}"
    conditions = set_condition(decision.status.conditions, "AbleToScale", "False", "FailedUpdateScale", text, now)
    event = Event("Warning", "FailedRescale", f"New size: {replicas}; reason: {decision.reason}; error: {message}")
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


# ---- from the resource -----------------------------------------------------------------------------------------


def spec_of(autoscaling: autoscalers.Autoscaling) -> Spec:
    """The spec in the numbers of this module.

    Without a metric it is the utilisation of the engines at 80 percent, as the HPA's default is that of the CPU.
    """
    metrics = tuple(_metric(metric) for metric in autoscaling.metrics)
    return Spec(
        autoscaling.max_replicas,
        metrics or (Metric("Engine", "Utilization", Target("Utilization", 80)),),
        autoscaling.min_replicas,
        _behavior(autoscaling.behavior) if autoscaling.behavior is not None else None,
    )


def _behavior(behavior: autoscalers.Behavior) -> Behavior:
    return Behavior(_rules(behavior.scale_up, DEFAULT_UP), _rules(behavior.scale_down, DEFAULT_DOWN))


def _rules(rules: autoscalers.ScalingRules | None, default: Rules) -> Rules:
    if rules is None:
        return default
    window = rules.stabilization_window_seconds
    return Rules(
        tuple(Policy(p.type, p.value, p.period_seconds) for p in rules.policies or ()) or default.policies,
        rules.select_policy,
        default.stabilization_window_seconds if window is None else window,
        None if rules.tolerance is None else approximate(quantity(rules.tolerance)),
    )


def _target(target: autoscalers.MetricTarget) -> Target:
    if target.type == "Utilization":
        return Target(target.type, target.average_utilization or 0)
    return Target(target.type, milli(target.value or target.average_value or "0"))


def _selector(selector: autoscalers.LabelSelector | None) -> str:
    """As Go prints a LabelSelector."""
    if selector is None:
        return "nil"
    labels = "".join(f"{key}: {value}," for key, value in sorted(selector.match_labels.items()))
    expressions = "".join(_expression(e) for e in selector.match_expressions if isinstance(e, Mapping))
    return (
        f"&LabelSelector{{MatchLabels:map[string]string{{{labels}}},"
        f"MatchExpressions:[]LabelSelectorRequirement{{{expressions}}},}}"
    )


def _expression(expression: Mapping[str, object]) -> str:
    values = expression.get("values") or ()
    shown = " ".join(map(str, values)) if isinstance(values, Collection) else ""
    key, operator = expression.get("key", ""), expression.get("operator", "")
    return f"LabelSelectorRequirement{{Key:{key},Operator:{operator},Values:[{shown}],}},"


def _metric(metric: autoscalers.Metric) -> Metric:
    if metric.engine is not None:
        return Metric("Engine", metric.engine.name, _target(metric.engine.target))
    if metric.resource is not None:
        return Metric("Resource", metric.resource.name, _target(metric.resource.target))
    if metric.container_resource is not None:
        source = metric.container_resource
        return Metric("ContainerResource", source.name, _target(source.target), container=source.container)
    if metric.pods is not None:
        return Metric("Pods", metric.pods.metric.name, _target(metric.pods.target))
    if metric.object is not None:
        identifier, kind = metric.object.metric, metric.object.described_object.kind
        target, selector = _target(metric.object.target), _selector(identifier.selector)
        return Metric("Object", identifier.name, target, described_kind=kind, selector=selector)
    if metric.external is None:
        raise ValueError(f"metric of type {metric.type} without its member")
    identifier = metric.external.metric
    return Metric("External", identifier.name, _target(metric.external.target), selector=_selector(identifier.selector))
