"""Metrics of type `Engine`: what the load of a stack says of each of its engines."""

from collections.abc import Mapping
from typing import Any

from packetstack_core.assignment import State
from packetstack_core.autoscaling.metrics import ENGINE_CAPACITY, Sample
from packetstack_core.load import StackLoad

VALUES: Mapping[str, Any] = {
    "Utilization": lambda e: e.utilization * ENGINE_CAPACITY,
    "ActiveFlows": lambda e: e.active_flows * 1000,
    "NewFlowsPerSecond": lambda e: e.new_flows_per_second * 1000,
    "PacketsPerSecond": lambda e: e.packets_per_second * 1000,
    "BitsPerSecond": lambda e: e.bits_per_second * 1000,
    "DropRatio": lambda e: e.drop_ratio * 1000,
}
"""By name of an `Engine` metric: an engine's value, in milli-units."""


def samples(load: StackLoad, metric: str) -> dict[str, Sample]:
    """An `Engine` metric's samples by engine. Only active ones: one that starts or drains is in no average."""
    value = VALUES[metric]
    return {e.name: Sample(round(value(e)), load.read, e.window) for e in load.engines if e.state == State.ACTIVE.value}
