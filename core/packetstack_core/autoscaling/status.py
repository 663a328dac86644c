"""What the autoscaler says: conditions, events, the values of metrics, and the record of a decision."""

from dataclasses import dataclass, replace
from typing import Literal

from packetstack_core.autoscaling.behavior import Memory
from packetstack_core.autoscaling.spec import Target
from packetstack_core.reasons import ConditionReason, Event


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that is true or false of the autoscaler, and why; types and reasons are those of an HPA."""

    type: str
    status: Literal["True", "False"]
    reason: ConditionReason
    message: str
    last_transition: float


Conditions = tuple[Condition, ...]


def set_condition(
    conditions: Conditions,
    type_: str,
    status: Literal["True", "False"],
    reason: ConditionReason,
    message: str,
    now: float,
) -> Conditions:
    """With the condition in its place, or at the end; its time changes with its status only."""
    new = Condition(type_, status, reason, message, now)
    for i, old in enumerate(conditions):
        if old.type == type_:
            if old.status == status:
                new = replace(new, last_transition=old.last_transition)
            return (*conditions[:i], new, *conditions[i + 1 :])
    return (*conditions, new)


def without_condition(conditions: Conditions, type_: str) -> Conditions:
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
