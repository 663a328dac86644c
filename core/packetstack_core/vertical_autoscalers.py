"""`spec.autoscaling.vertical` of a stack: what triggers another size of its engines."""

from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import model_validator

from packetstack_core.limits import MAX_CORES, MAX_TRIGGERS
from packetstack_core.values import Items, Length, Model, Name, Quantity, Seconds, Text, Whole, quantity

Cores = Annotated[int, Whole(1, MAX_CORES, "a number of cores")]
CronText = Annotated[str, Text(r"\S+( \S+){4}", 100, "a cron schedule", 'five fields, as in "0 8 * * 1-5"')]
ZoneText = Annotated[str, Text(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", 64, "a time zone", '"Europe/Berlin"')]
TriggerType = Literal[
    "Utilization",
    "FlowMemory",
    "BitsPerSecond",
    "PacketsPerSecond",
    "ActiveFlows",
    "NewFlowsPerSecond",
    "QueueDepth",
    "Drops",
    "Schedule",
]
PERCENT = ("Utilization", "FlowMemory")
"""Triggers in percent; only these have a default for `above`."""
CONGESTION = ("QueueDepth", "Drops")
"""Triggers that say that a size is too small, but not by how much: they ask for one step more."""
ABOVE, TARGET, BELOW = Decimal(75), Decimal(60), Decimal(35)
"""Thresholds in percent. Where only `above` is given the others have the same proportion to it."""


class CoreSchedule(Model):
    """Hours at which at least so many cores are wanted, whatever the load."""

    name: Name
    """Name of the schedule."""
    cron: CronText
    """When it begins: five fields, for example "0 8 * * 1-5"."""
    time_zone: ZoneText = "UTC"
    """Time zone of `cron`, for example "Europe/Berlin"."""
    duration_seconds: Seconds
    """How long it lasts, in seconds."""
    cores: Cores
    """Fewest cores of an engine while it lasts."""


class Trigger(Model):
    """One trigger parameter with its thresholds. All values are per core: those of all active engines by their cores."""

    type: TriggerType
    """`Utilization`: busy cycles in percent. `FlowMemory`: flows in percent of the share of `flowTable.maxFlows` that the
    size has; the largest size has all of it. `BitsPerSecond`, `PacketsPerSecond`, `ActiveFlows`, `NewFlowsPerSecond`: of a
    core. `QueueDepth`: frames that wait, of a core. `Drops`: dropped packets by all that came, "0.01" is 1 %.
    `Schedule`: hours with more cores."""
    above: Quantity | None = None
    """Above it more cores are wanted, as a quantity. Absent: 75 for `Utilization` and `FlowMemory`; the others need it."""
    target: Quantity | None = None
    """Load that the new size shall have. Absent: 0.8 x `above`. Not for `QueueDepth` and `Drops`: one step more."""
    below: Quantity | None = None
    """Below it fewer cores do, with the load of now on the cores that would be left. Absent: 7/15 of `above`."""
    schedule: CoreSchedule | None = None
    """The hours: type Schedule."""

    def thresholds(self) -> tuple[Decimal, Decimal, Decimal]:
        """above, target, below."""
        above = ABOVE if self.above is None else quantity(self.above)
        target = above * TARGET / ABOVE if self.target is None else quantity(self.target)
        return above, target, above * BELOW / ABOVE if self.below is None else quantity(self.below)

    @model_validator(mode="after")
    def _fits_type(self) -> Self:
        given = [name for name in ("above", "target", "below") if getattr(self, name) is not None]
        if (self.type == "Schedule") != (self.schedule is not None):
            says = "without schedule; give it" if self.schedule is None else "with schedule; use type Schedule"
            raise ValueError(f'has type "{self.type}" {says}')
        if self.type == "Schedule":
            if given:
                raise ValueError(f'has {given[0]} for "Schedule"; leave it out: a schedule has cores')
            return self
        if self.above is None and self.type not in PERCENT:
            raise ValueError(f'has type "{self.type}" without above; give it')
        if self.target is not None and self.type in CONGESTION:
            raise ValueError(f'has target for "{self.type}"; leave it out: it asks for one step more')
        self._check_order()
        return self

    def _check_order(self) -> None:
        above, target, below = self.thresholds()
        if not 0 < below < target < above:
            shown = f"below {_text(below)}, target {_text(target)}, above {_text(above)}"
            raise ValueError(f"has {shown}; use 0 < below < target < above, or it would go up and down in turn")
        most = Decimal(100) if self.type in PERCENT else Decimal(1) if self.type == "Drops" else None
        if most is not None and above >= most:
            raise ValueError(f"has above {_text(above)}; use less than {most}, or it could never be exceeded")


class Vertical(Model):
    """Scaling by the size of engines: it decides `spec.engine.cores`, and without `metrics` the number of engines too."""

    decides: Literal["Cores", "CoresAndReplicas"] | None = None
    """`Cores`: `metrics` decide the number of engines. `CoresAndReplicas`: engines get all of `maxCores` before another
    engine comes; not with `metrics`. Absent: `Cores` with `metrics`, else `CoresAndReplicas`."""
    min_cores: Cores = 1
    """Fewest cores of an engine."""
    max_cores: Cores
    """Most cores of an engine: what the node or a licence has."""
    triggers: Annotated[Items[Trigger], Length(0, MAX_TRIGGERS, "triggers")] = ()
    """More cores if one of them asks for it; fewer only if each of them allows it. Absent: `Utilization` at its defaults."""
    hold_seconds: Annotated[int, Whole(0, 3600, "a number of seconds")] = 30
    """So long the triggers have to ask for more, or allow fewer, at each look: 3 looks with the default of
    `syncPeriodSeconds`."""
    cool_down_seconds: Annotated[int, Whole(0, 3600, "a number of seconds")] = 30
    """Least seconds between two changes."""
    step: Literal["Target", "One"] = "Target"
    """`Target`: at once to the size that has the load at its target. `One`: one core, or one engine, at a time."""

    @property
    def wanted_triggers(self) -> tuple[Trigger, ...]:
        """Those of the resource, or the default."""
        return tuple(self.triggers) or (Trigger(type="Utilization"),)

    def decides_replicas(self, metrics: int) -> bool:
        """Whether the number of engines is decided here too, with so many `metrics`."""
        return self.decides == "CoresAndReplicas" or (self.decides is None and not metrics)

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if self.min_cores > self.max_cores:
            raise ValueError(f"has minCores {self.min_cores} above maxCores {self.max_cores}; use minCores <= maxCores")
        seen: set[str] = set()
        for trigger in self.triggers:
            name = f"schedule {trigger.schedule.name}" if trigger.schedule else trigger.type
            if name in seen:
                raise ValueError(f"has {name} twice; use one trigger of each type, and a name once")
            seen.add(name)
            if trigger.schedule and not self.min_cores <= trigger.schedule.cores <= self.max_cores:
                limits = f"{self.min_cores} to {self.max_cores}"
                raise ValueError(
                    f"has {name} with {trigger.schedule.cores} cores; use {limits}, as minCores and maxCores"
                )
        if seen and not any(t.type not in (*CONGESTION, "Schedule") for t in self.triggers):
            raise ValueError(
                "has no trigger that says when fewer cores do; add one, as Utilization or PacketsPerSecond"
            )
        return self


def _text(value: Decimal) -> str:
    return f"{value.normalize():f}" if value < 1000 else f"{value:,.0f}"
