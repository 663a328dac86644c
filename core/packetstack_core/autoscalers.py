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
    Text,
    Whole,
    exactly_one,
    quantity,
)


class MetricTarget(Model):
    """What a metric shall be: the member that `type` names."""

    type: Literal["Utilization", "Value", "AverageValue"]
    """Names the member that is given."""
    average_utilization: Annotated[int, Whole(1, 10_000, "a percentage")] | None = None
    """Percent."""
    average_value: Quantity | None = None
    """Per engine."""
    value: Quantity | None = None
    """In all."""

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
    """As in Kubernetes."""

    match_labels: Labels = Field(default_factory=dict)
    """All of these."""
    match_expressions: Items[Opaque] = ()
    """As in Kubernetes."""


class MetricIdentifier(Model):
    """A metric of an external or custom metrics API."""

    name: Annotated[str, PRINTABLE]
    """As the metrics API calls it."""
    selector: LabelSelector | None = None


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
    """As in autoscaling/v2."""

    name: Annotated[str, QUALIFIED_NAME]
    """`cpu` or `memory`."""
    target: MetricTarget


class ContainerResourceMetric(Model):
    """As in autoscaling/v2."""

    container: Name
    """Of the engine pods."""
    name: Annotated[str, QUALIFIED_NAME]
    """`cpu` or `memory`."""
    target: MetricTarget


class PodsMetric(Model):
    """As in autoscaling/v2."""

    metric: MetricIdentifier
    target: MetricTarget


class ObjectReference(Model):
    """As in autoscaling/v2."""

    api_version: Annotated[str, PRINTABLE] | None = None
    """As in autoscaling/v2."""
    kind: Annotated[str, PRINTABLE]
    """As in autoscaling/v2."""
    name: Annotated[str, PRINTABLE]
    """As in autoscaling/v2."""


class ObjectMetric(Model):
    """As in autoscaling/v2."""

    described_object: ObjectReference
    metric: MetricIdentifier
    target: MetricTarget


class ExternalMetric(Model):
    """As in autoscaling/v2."""

    metric: MetricIdentifier
    target: MetricTarget


class Metric(Model):
    """One metric: `type` and the member of that name."""

    type: Literal["Engine", "Resource", "ContainerResource", "Pods", "Object", "External"]
    """Names the member that is given."""
    engine: EngineMetric | None = None
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
    """As in autoscaling/v2."""

    type: Literal["Pods", "Percent"]
    """Whether `value` counts engines or percent."""
    value: Annotated[int, Whole(1, 2**31 - 1, "a positive number")]
    """How much may change within the period."""
    period_seconds: Annotated[int, Whole(1, 1800, "a number of seconds")]
    """How far back changes count."""


Policies = Annotated[
    Items[ScalingPolicy],
    Length(1, MAX_POLICIES, "policies", "at least one policy, or leave it out for the default"),
]


class ScalingRules(Model):
    """As in autoscaling/v2. What is absent has the default of its direction."""

    stabilization_window_seconds: Annotated[int, Whole(0, 3600, "a number of seconds")] | None = None
    """How long a recommendation is remembered."""
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    """Which policy counts when several allow a change. `Disabled`: no scaling in this direction."""
    policies: Policies | None = None
    """How fast. Absent: the default of the direction."""
    tolerance: Quantity | None = None
    """How far a metric may be off, as in "0.05"."""

    @model_validator(mode="after")
    def _checks(self) -> Self:
        if self.tolerance is not None and quantity(self.tolerance) < 0:
            raise ValueError(f'has tolerance "{self.tolerance}"; use a quantity of 0 or more')
        return self


class Behavior(Model):
    """As in autoscaling/v2."""

    scale_up: ScalingRules | None = None
    scale_down: ScalingRules | None = None


class Panic(Model):
    """Fast reaction to bursts, as Knative does it."""

    stable_window_seconds: Annotated[int, Whole(5, 600, "a number of seconds")] = 60
    """Length of the ordinary window."""
    window_percentage: Annotated[int, Whole(1, 100, "a percentage")] = 10
    """Length of the panic window, in percent of the ordinary one."""
    threshold_percentage: Annotated[int, Whole(110, 1000, "a percentage")] = 200
    """Load, in percent of what is there for it, that starts a panic."""


class Schedule(Model):
    """Other limits for some hours."""

    name: Name
    """Once per stack."""
    cron: Annotated[str, Text(r"\S+( \S+){4}", 100, "a cron schedule", 'five fields, as in "0 8 * * 1-5"')]
    """When it begins, as in "0 8 * * 1-5"."""
    time_zone: Annotated[str, Text(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", 64, "a time zone", '"Europe/Berlin"')] = "UTC"
    """Of `cron`, as in "Europe/Berlin"."""
    duration_seconds: Seconds
    """How long it lasts."""
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
    """Failed readings in a row."""
    replicas: Count
    """Engines from then on."""


class Autoscaling(Model):
    """Scaling by load. Absent: a person, an HPA or KEDA writes `replicas`."""

    min_replicas: Count = 1
    """Fewest engines."""
    max_replicas: Annotated[int, Whole(1, MAX_REPLICAS, "a number of engines")]
    """Most engines."""
    metrics: Annotated[Items[Metric], Length(0, MAX_METRICS, "metrics")] = ()
    """The one that asks for most engines counts."""
    behavior: Behavior | None = None
    sync_period_seconds: Annotated[int, Whole(1, 300, "a time in seconds")] = 15
    """Time between two decisions; the default is that of an HPA."""
    paused: bool = False
    """Decide, but change nothing."""
    panic: Panic | None = None
    schedules: Annotated[Items[Schedule], Length(0, MAX_SCHEDULES, "schedules")] = ()
    """Other limits for some hours."""
    fallback: Fallback | None = None

    @model_validator(mode="after")
    def _limits(self) -> Self:
        _min_max(self.min_replicas, self.max_replicas)
        return self


def _min_max(low: int | None, high: int | None) -> None:
    if low is not None and high is not None and low > high:
        raise ValueError(f"has minReplicas {low} above maxReplicas {high}; use minReplicas <= maxReplicas")
