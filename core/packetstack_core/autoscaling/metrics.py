"""What is measured, of which pods, or why it is not; upstream's package `metrics`. Values are thousandths (`milli`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from packetstack_core.autoscaling.numbers import int64


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
    """A container of a pod. `requests`: resource -> milli-units."""

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
    """What the pod as a whole requests: resource -> milli-units."""


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
    return int64(sum(values)) if values and len(values) == len(named) else None


ENGINE_CAPACITY = 1000
"""What a fully busy engine shows as `Utilization`: the share of its cycles that do work, in thousandths."""
