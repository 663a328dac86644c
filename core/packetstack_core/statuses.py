"""The status of a `PacketStack`: what the operator, and its autoscaler and rebalancer, say of it."""

from typing import Annotated, Literal

from pydantic import Field

from packetstack_core.kinds import MAX_TABLE_ENGINES, Condition, SetId
from packetstack_core.limits import MAX_BUCKETS
from packetstack_core.values import Count, Items, Model, Whole


class MetricValue(Model):
    """A value of a metric; which member is there depends on the type of its target."""

    average_utilization: int | None = None
    """Mean over the engines in percent."""
    average_value: str | None = None
    """Sum divided by the number of engines, as a quantity."""
    value: str | None = None
    """The metric as a whole, as a quantity."""


class MetricReading(Model):
    """A metric of the autoscaler, as it was last read."""

    type: str
    """Type of the metric in `spec.autoscaling.metrics`."""
    name: str
    """Name of the metric."""
    target: MetricValue
    """Its target."""
    current: MetricValue
    """Its value when it was last read."""


class ScalingProposal(Model):
    """What one metric asked for."""

    metric: str
    """The metric, as reasons and conditions name it."""
    target: MetricValue
    """Its target."""
    value: MetricValue
    """Its value when it was read."""
    replicas: int | None = None
    """Engines that the metric asked for; absent when it failed."""
    missing: int = 0
    """Engines without a recent sample."""
    error: str = ""
    """Why it failed."""


class ScalingRecord(Model):
    """Why the last decision is what it is: each step's number, and what cut it."""

    current: int
    """Engines before the decision."""
    desired: int
    """Engines after the decision."""
    proposals: Items[ScalingProposal] = ()
    """What each metric asked for."""
    winner: str = ""
    """The metric that asked for most."""
    proposed: int | None = None
    """Engines that the winner asked for; absent when no metric counted."""
    stabilized: int | None = None
    """Engines after the stabilization windows."""
    stabilized_by: str = ""
    """The window that changed the number."""
    limited: int | None = None
    """Engines after policies, minReplicas and maxReplicas."""
    limited_by: str = ""
    """Policy or limit that changed the number."""
    why: str = ""
    """Why no metric counted, or what counted instead."""


class TriggerReading(Model):
    """A trigger of the vertical autoscaler, as it was last looked at."""

    trigger: str
    """Its type."""
    value: str = ""
    """Per core when it was looked at; empty where it is not known."""
    above: str = ""
    """Above it more is asked for."""
    below: str = ""
    """Below it, on the cores that would be left, less is allowed."""
    fires: bool = False
    """It asks for more."""
    cores: int | None = None
    """Cores of all engines that it asks for, or would do with; absent where it does not say."""
    note: str = ""
    """Why it does not say."""


class CongestionStatus(Model):
    """A size was too small; while this is remembered, no size is taken that would be so again."""

    trigger: str
    """Type of the trigger."""
    time: str
    """When it asked for more. RFC 3339, UTC."""
    packets_per_second: float
    """Of a core, then."""


class VerticalStatus(Model):
    """What the vertical autoscaler saw and decided last."""

    current_cores: int
    """`spec.engine.cores` when it decided."""
    desired_cores: int
    """Cores of an engine that it wants."""
    current_replicas: int
    """`spec.replicas` when it decided."""
    desired_replicas: int
    """Engines that it wants; the present number where that is not its own to decide."""
    min_cores: int
    """Fewest cores of an engine now, perhaps of a schedule."""
    max_cores: int
    """Most cores of an engine."""
    decides: Literal["Cores", "CoresAndReplicas"]
    """What it writes: `spec.engine.cores`, and perhaps `spec.replicas`."""
    schedule: str = ""
    """Name of the schedule that the fewest cores come from."""
    last_scale_time: str | None = None
    """When it last changed the size, in RFC 3339, UTC."""
    decision: str
    """What it decided and why, in one line."""
    how: str = ""
    """How the change comes about."""
    refused: str = ""
    """Reason that stood against another size that was asked for; see the condition VerticalScalingLimited."""
    triggers: Items[TriggerReading] = ()
    """What each trigger said."""
    congested: Items[CongestionStatus] = ()
    """What is remembered of sizes that were too small."""


class AutoscalingStatus(Model):
    """What the autoscaler saw and decided last."""

    desired_replicas: int = 0
    """Engines that the autoscaler wants."""
    current_replicas: int = 0
    """`spec.replicas` when it decided."""
    last_scale_time: str | None = None
    """When it last changed `spec.replicas`, in RFC 3339, UTC."""
    min_replicas: int = 1
    """Fewest engines now, perhaps of a schedule."""
    max_replicas: int = 1
    """Most engines now, perhaps of a schedule."""
    schedule: str = ""
    """Name of the schedule that the limits come from."""
    current_metrics: Items[MetricReading] = ()
    """Metrics that could be read, with their values."""
    decision: str = ""
    """The record in one line."""
    decision_time: str = ""
    """Since when this status is what it is. RFC 3339, UTC."""
    record: ScalingRecord | None = None
    """Why the last decision is what it is."""
    vertical: VerticalStatus | None = None
    """What the vertical autoscaler saw and decided last; absent without `spec.autoscaling.vertical`."""


class RebalanceStatus(Model):
    """What the rebalancer has done. Live numbers are metrics."""

    last_time: str = ""
    """When it moved buckets last. RFC 3339, UTC."""
    buckets: Annotated[int, Whole(0, MAX_BUCKETS, "a number of buckets")] = 0
    """Buckets that were moved then."""
    message: str = ""
    """What the moves were for: load of the busiest core before and after."""
    elephants: Items[int] = ()
    """Buckets that take most of a core alone: no move of buckets helps them."""


class SetStatus(Model):
    """A set of engines. Live numbers are metrics."""

    id: SetId
    """Number of the set."""
    state: Literal["Activating", "Current", "Draining"]
    """`Activating`: its engines come up. `Current`: it takes new connections. `Draining`: it keeps those that it has."""
    since: str
    """When it got its state. RFC 3339, UTC."""
    engines: Annotated[int, Whole(0, MAX_TABLE_ENGINES, "a number of engines")]
    """Engines of the set that are there."""
    ready: Annotated[int, Whole(0, MAX_TABLE_ENGINES, "a number of engines")]
    """Those that serve."""
    buckets: Annotated[int, Whole(0, MAX_BUCKETS, "a number of buckets")]
    """Buckets whose new connections it takes."""
    kept_buckets: Annotated[int, Whole(0, MAX_BUCKETS, "a number of buckets")]
    """Buckets of which it keeps older connections, rounded down to a power of two."""
    connections: Annotated[int, Whole(0, 2**31 - 1, "a number of connections")] | None = None
    """Connections that it keeps, rounded down to a power of two; absent where it is not known."""
    silent_since: str = ""
    """When the one of them was seen last that is silent for the longest time. RFC 3339, UTC, in a cluster rounded down to a
    minute; empty where it is not known."""


class PacketStackStatus(Model):
    """How a stack is."""

    observed_generation: int = 0
    """Generation of the stack that this status was computed from."""
    replicas: Count = 0
    """Starting and active engines; draining ones are not among them."""
    ready_replicas: Count = 0
    """Engines that are in the flow table and serve."""
    updated_replicas: Count = 0
    """Engines that have the present template and image."""
    draining_replicas: Annotated[int, Whole(0, MAX_TABLE_ENGINES, "a number of engines")] = 0
    """Engines that are leaving."""
    selector: str = ""
    """Label selector of the active engines' pods, for HPA and KEDA."""
    flow_table_generation: int = 0
    """Generation of the flow table as it was last written."""
    node: str = ""
    """Node that the engines run on."""
    capacity: dict[str, int] = Field(default_factory=dict)
    """What the stack can carry: `pairs` of SNAT address and backend, `flows` that their ports allow, `maxFlows` that
    memory allows."""
    autoscaling: AutoscalingStatus | None = None
    """What the autoscaler saw and decided last; absent without `spec.autoscaling`."""
    rebalance: RebalanceStatus | None = None
    """What was moved by load; absent before anything was moved or found."""
    sets: Items[SetStatus] | None = None
    """The sets of engines; absent for a stack that never had `handover.strategy: Mirror`."""
    conditions: Items[Condition] = ()
    """Available, Progressing, Degraded, CapacityAvailable, FirewallOpen; with `Mirror` also ScalingHeld; with
    spec.autoscaling also those of an HPA; with spec.autoscaling.vertical also VerticalScalingActive, VerticalScalingLimited."""
