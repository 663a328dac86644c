"""Flags of the controller, with the defaults of kube-controller-manager 1.36."""

from dataclasses import dataclass


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
    """Age up to which a sample of an `Engine` metric counts: three sync periods of the default 15 s."""
