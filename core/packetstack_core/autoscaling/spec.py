"""What the resource asks of the autoscaler, in the numbers of the algorithm; defaults as in upstream's `defaults.go`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from packetstack_core import autoscalers
from packetstack_core.autoscaling.behavior import DEFAULT_DOWN, DEFAULT_UP, Behavior, Policy, Rules
from packetstack_core.autoscaling.numbers import approximate, milli
from packetstack_core.values import quantity


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
    """Name of the container, for ContainerResource."""
    described_kind: str = ""
    """Kind of the described object, for Object."""
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
