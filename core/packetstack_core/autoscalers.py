"""`spec.autoscaling` of a stack: the shapes of Kubernetes' `autoscaling/v2`, and what PacketStack adds to them."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)
from pydantic.alias_generators import to_camel

from packetstack_core.limits import MAX_METRICS, MAX_POLICIES, MAX_REPLICAS, MAX_SCHEDULES
from packetstack_core.values import (
    PRINTABLE,
    QUALIFIED_NAME,
    Count,
    Items,
    Labels,
    Length,
    Model,
    Name,
    Opaque,
    Quantity,
    Seconds,
    Whole,
    exactly_one,
    quantity,
)
from packetstack_core.vertical_autoscalers import CronText, Vertical, ZoneText


class MetricTarget(Model):
    """The value that the autoscaler keeps a metric at. Above it engines are added, below it they are removed."""

    type: Literal["Utilization", "Value", "AverageValue"]
    """Which of `averageUtilization`, `value` and `averageValue` is given; the other two are absent."""
    average_utilization: Annotated[int, Whole(1, 10_000, "a percentage")] | None = None
    """Mean over the engines in percent: of busy cycles for an `Engine` metric, of the pod's request for cpu or memory."""
    average_value: Quantity | None = None
    """Sum of the metric divided by the number of engines, as a quantity: "500m" is 0.5."""
    value: Quantity | None = None
    """The metric as a whole, whatever the number of engines, as a quantity."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        member = {"Utilization": "average_utilization", "Value": "value", "AverageValue": "average_value"}[self.type]
        exactly_one(self, "average_utilization", "value", "average_value")
        if getattr(self, member) is None:
            raise ValueError(f'has type "{self.type}" without {to_camel(member)}; use the member that type names')
        for name in ("value", "average_value"):
            text = getattr(self, name)
            if text is not None and quantity(text) <= 0:
                raise ValueError(f'has {to_camel(name)} "{text}"; use a quantity above 0')
        return self


class LabelSelector(Model):
    """Labels that a series of the metrics API must have. Absent: any series of that name."""

    match_labels: Labels = Field(default_factory=dict)
    """Label -> value; the series has all of them."""
    match_expressions: Items[Opaque] = ()
    """Conditions with `key`, `operator` (In, NotIn, Exists, DoesNotExist) and `values`; the series fulfils all of them."""


class MetricIdentifier(Model):
    """A metric of the custom or the external metrics API, by its name and labels."""

    name: Annotated[str, PRINTABLE]
    """Name of the metric in that API."""
    selector: LabelSelector | None = None
    """Labels that the series must have. Absent: any."""


class EngineMetric(Model):
    """A metric of the data plane, measured by the engines."""

    name: Literal["Utilization", "ActiveFlows", "NewFlowsPerSecond", "PacketsPerSecond", "BitsPerSecond", "DropRatio"]
    """`Utilization` has a target of that type, the others have an `AverageValue`."""
    target: MetricTarget

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if (self.name == "Utilization") != (self.target.type == "Utilization") or self.target.type == "Value":
            right = "Utilization" if self.name == "Utilization" else "AverageValue"
            raise ValueError(f'has target type "{self.target.type}" for {self.name}; use "{right}"')
        return self


class ResourceMetric(Model):
    """CPU or memory of the engines' pods, all containers together, from the resource metrics API (metrics-server).

    A core that polls always shows a whole CPU: use type `Engine` for load.
    """

    name: Annotated[str, QUALIFIED_NAME]
    """`cpu` or `memory`."""
    target: MetricTarget


class ContainerResourceMetric(Model):
    """CPU or memory of one container of the engines' pods, from the resource metrics API (metrics-server)."""

    container: Name
    """Name of the container in the engines' pods."""
    name: Annotated[str, QUALIFIED_NAME]
    """`cpu` or `memory`."""
    target: MetricTarget


class PodsMetric(Model):
    """A metric that the custom metrics API has for each engine's pod; its mean is compared with the target."""

    metric: MetricIdentifier
    target: MetricTarget


class ObjectReference(Model):
    """An object of the stack's namespace."""

    api_version: Annotated[str, PRINTABLE] | None = None
    """API group and version of its kind, for example networking.k8s.io/v1. Absent: v1."""
    kind: Annotated[str, PRINTABLE]
    """Kind of the object, for example Ingress."""
    name: Annotated[str, PRINTABLE]
    """Name of the object."""


class ObjectMetric(Model):
    """A metric that the custom metrics API has for one object, for example requests a second of an Ingress.

    It can be read without an engine, so that `minReplicas: 0` is possible with it.
    """

    described_object: ObjectReference
    """The object that the metric is about."""
    metric: MetricIdentifier
    target: MetricTarget


class ExternalMetric(Model):
    """A metric of the external metrics API that belongs to no object of the cluster, for example the length of a queue.

    All series that match are added up. It can be read without an engine, so that `minReplicas: 0` is possible with it.
    """

    metric: MetricIdentifier
    target: MetricTarget


class Metric(Model):
    """One metric with its target: `type`, and the member that it names."""

    type: Literal["Engine", "Resource", "ContainerResource", "Pods", "Object", "External"]
    """Which member is given: engine, resource, containerResource, pods, object or external."""
    engine: EngineMetric | None = None
    """A metric that the engines measure: type Engine."""
    resource: ResourceMetric | None = None
    container_resource: ContainerResourceMetric | None = None
    pods: PodsMetric | None = None
    object: ObjectMetric | None = None
    external: ExternalMetric | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        exactly_one(self, "engine", "resource", "container_resource", "pods", "object", "external")
        member = self.type[0].lower() + self.type[1:]
        if next(iter(self.model_dump(exclude_none=True, exclude={"type"}, by_alias=True))) != member:
            raise ValueError(f'has type "{self.type}" without {member}; use the member that type names')
        return self


class ScalingPolicy(Model):
    """How much the number of engines may change within a period."""

    type: Literal["Pods", "Percent"]
    """Unit of `value`: engines, or percent of the engines at the beginning of the period."""
    value: Annotated[int, Whole(1, 2**31 - 1, "a positive number")]
    """Most engines, or percent, that may be added or removed within the period."""
    period_seconds: Annotated[int, Whole(1, 1800, "a number of seconds")]
    """Length of the period in seconds: changes of the last so many seconds count."""


Policies = Annotated[
    Items[ScalingPolicy],
    Length(1, MAX_POLICIES, "policies", "at least one policy, or leave it out for the default"),
]


class ScalingRules(Model):
    """How fast the number of engines may change in one direction. What is absent has the default of the direction."""

    stabilization_window_seconds: Annotated[int, Whole(0, 3600, "a number of seconds")] | None = None
    """Window in seconds: engines are added to the fewest, or removed to the most, that were asked for within it.

    Absent: 0 when scaling up, 300 when scaling down.
    """
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    """Which policy counts if several allow a change: the largest or the smallest change. `Disabled`: none in this direction."""
    policies: Policies | None = None
    """Limits of a change. Absent: 100 % in 15 s, and when scaling up also 4 engines in 15 s."""
    tolerance: Quantity | None = None
    """Deviation from the target that changes nothing, as a share of it: "0.05" is 5 %. Absent: 0.1."""

    @model_validator(mode="after")
    def _checks(self) -> Self:
        if self.tolerance is not None and quantity(self.tolerance) < 0:
            raise ValueError(f'has tolerance "{self.tolerance}"; use a quantity of 0 or more')
        return self


class Behavior(Model):
    """How fast the number of engines may change. Absent: the defaults of both directions."""

    scale_up: ScalingRules | None = None
    """When engines are added. Absent: at once, at most 4 engines or 100 % in 15 s, whichever is more."""
    scale_down: ScalingRules | None = None
    """When engines are removed. Absent: to the most that were asked for within 300 s, at most 100 % in 15 s."""


class Panic(Model):
    """Fast reaction to bursts, as Knative does it."""

    stable_window_seconds: Annotated[int, Whole(5, 600, "a number of seconds")] = 60
    """Length of the ordinary window in seconds; a panic ends when the load was below the threshold for so long."""
    window_percentage: Annotated[int, Whole(1, 100, "a percentage")] = 10
    """Length of the panic window, in percent of the ordinary one."""
    threshold_percentage: Annotated[int, Whole(110, 1000, "a percentage")] = 200
    """Load, in percent of what the ready engines carry at their target, that starts a panic."""


class Schedule(Model):
    """Other limits for some hours."""

    name: Name
    """Name of the schedule, unique in the stack."""
    cron: CronText
    """When it begins: five fields, for example "0 8 * * 1-5"."""
    time_zone: ZoneText = "UTC"
    """Time zone of `cron`, for example "Europe/Berlin"."""
    duration_seconds: Seconds
    """How long it lasts, in seconds."""
    min_replicas: Count | None = None
    """Fewest engines while it lasts."""
    max_replicas: Count | None = None
    """Most engines while it lasts."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        _min_max(self.min_replicas, self.max_replicas)
        return self


class Fallback(Model):
    """What to do when metrics stay away, as KEDA does it."""

    failure_threshold: Annotated[int, Whole(1, 1000, "a number of failures")]
    """Readings in a row without a usable metric after which `replicas` holds."""
    replicas: Count
    """Engines from then on, until a metric can be used again."""


class Autoscaling(Model):
    """Scaling by load. Absent: a person, an HPA or KEDA writes `replicas`."""

    min_replicas: Count = 1
    """Fewest engines. 0 is possible only with a metric of type Object or External."""
    max_replicas: Annotated[int, Whole(1, MAX_REPLICAS, "a number of engines")]
    """Most engines."""
    metrics: Annotated[Items[Metric], Length(0, MAX_METRICS, "metrics")] = ()
    """Metrics with their targets; the one that asks for most engines counts. Absent: busy cycles of the engines at 80
    %."""
    behavior: Behavior | None = None
    """How fast the number of engines may change. Absent: the defaults of both directions."""
    sync_period_seconds: Annotated[int, Whole(1, 300, "a time in seconds")] = 15
    """Seconds between two decisions."""
    paused: bool = False
    """Decisions are made and shown, and nothing is changed."""
    panic: Panic | None = None
    """Fast reaction to bursts. Absent: none."""
    schedules: Annotated[Items[Schedule], Length(0, MAX_SCHEDULES, "schedules")] = ()
    """Other limits at some hours; the first one that is active counts."""
    fallback: Fallback | None = None
    """Number of engines when no metric can be used for long. Absent: the number stays."""
    vertical: Vertical | None = None
    """Scaling by the size of engines. Absent: `engine.cores` stays as it is."""

    @property
    def vertical_decides_replicas(self) -> bool:
        """Whether `vertical` decides the number of engines too."""
        return self.vertical is not None and self.vertical.decides_replicas(len(self.metrics))

    @model_validator(mode="after")
    def _limits(self) -> Self:
        _min_max(self.min_replicas, self.max_replicas)
        self._one_decides()
        return self

    def _one_decides(self) -> None:
        """Whoever decides the number of engines does it alone, and nothing is given that has no effect."""
        if self.vertical is not None and self.vertical.decides == "CoresAndReplicas" and self.metrics:
            says = "has metrics and vertical.decides CoresAndReplicas, two who would decide the number of engines"
            raise ValueError(f"{says}; leave one of them out")
        for name in ("behavior", "panic", "fallback") if self.vertical_decides_replicas else ():
            if getattr(self, name) is not None:
                says = f"has {name}, which is for metrics, while vertical decides the number of engines"
                raise ValueError(f'{says}; leave it out, or use vertical.decides "Cores"')


def _min_max(low: int | None, high: int | None) -> None:
    if low is not None and high is not None and low > high:
        raise ValueError(f"has minReplicas {low} above maxReplicas {high}; use minReplicas <= maxReplicas")
