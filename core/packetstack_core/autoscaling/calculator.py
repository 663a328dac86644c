"""Replicas that one metric asks for; upstream's `replica_calculator.go`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from packetstack_core.autoscaling.metrics import MetricError, Pod, Sample
from packetstack_core.autoscaling.numbers import MAX_INT64, ceil32, ceil64, int32, int64, quotient, ratio_of
from packetstack_core.autoscaling.settings import Settings, Tolerances


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
        return asks(current if within(ratio) else ceil32(ratio * groups.ready))
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
    replicas = ceil32(again * len(values))
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
        used = int64(sum(values[name] for name in known))
        requested = int64(sum(requests[name] for name in known))
        if requested == 0:
            raise MetricError("no_matching_metrics", "no metrics returned matched known pods")
        percent = int32(quotient(int64(used * 100), requested))
        return ratio_of(percent, float(target)), quotient(used, len(known)), percent

    def fill(name: str) -> int:
        return quotient(int64(requests[name] * max(100, target)), 100)

    return _from_values(values, groups, view, measure, fill)


def by_average(samples: Mapping[str, Sample], view: View, target: int, *, resource: str = "") -> Calculation:
    """Replicas for an average of `target` milli-units per pod. Raises MetricError."""
    values, groups = _usable(samples, resource, view)

    def measure(values: Mapping[str, int]) -> tuple[float, int, None]:
        average = quotient(int64(sum(values.values())), len(values))
        return ratio_of(average, float(target)), average, None

    return _from_values(values, groups, view, measure, lambda _: target)


def by_value(total: int, view: View, target: int) -> Calculation:
    """Replicas for a value of `target` milli-units in all, taken to shrink with each ready pod. Raises MetricError."""
    current = view.scale.spec_replicas
    ratio = ratio_of(total, float(target))
    if current == 0:
        return Calculation(ceil32(ratio), total)
    if view.tolerances.within(ratio):
        return Calculation(current, total)
    if not view.pods:
        message = "no pods returned by selector while calculating replica count"
        raise MetricError("no_pods", f"unable to calculate ready pods: {message}")
    ready = sum(pod.phase == "Running" and pod.ready == "True" for pod in view.pods)
    return Calculation(ceil32(ratio * ready), total)


def by_value_per_replica(total: int, view: View, target: int) -> Calculation:
    """Replicas for `target` milli-units of the value for each of the replicas that the scale reports."""
    replicas = view.scale.status_replicas
    usage = ceil64(ratio_of(total, float(replicas)))
    if not view.tolerances.within(ratio_of(total, float(target) * float(replicas))):
        replicas = ceil32(ratio_of(total, float(target)))
    return Calculation(replicas, usage)


def external_total(values: Iterable[int]) -> int:
    """Sum of the series for a target of type Value: capped at MaxInt64."""
    total = 0
    for value in values:
        if value > 0 and total > MAX_INT64 - value:
            return MAX_INT64
        total = int64(total + value)
    return total


def external_total_per_replica(values: Iterable[int]) -> int:
    """Sum of the series for a target of type AverageValue: once below 0 it is taken for an overflow, MaxInt64."""
    total = 0
    for value in values:
        total = int64(total + value)
        if total < 0:
            return MAX_INT64
    return total


def by_external_per_replica(total: int, view: View, target: int) -> Calculation:
    """As `by_value_per_replica`, with the reported value kept at MaxInt64 when the sum was."""
    found = by_value_per_replica(total, view, target)
    return replace(found, usage=MAX_INT64) if float(total) >= float(MAX_INT64) else found


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
            total = int64(total + c.requests[resource])
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
