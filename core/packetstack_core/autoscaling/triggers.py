"""What the triggers of `spec.autoscaling.vertical` ask for: sizes of a pool, and one look at its load.

A size is a number of engines of so many cores. Every trigger but a schedule has a value per core: that of all active
engines, by their cores. So the value on another size is the present one times the cores of now by the cores of then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import ceil

from packetstack_core.autoscaling.metrics import MetricError, Pod
from packetstack_core.autoscaling.options import is_active
from packetstack_core.load import EngineLoad, StackLoad
from packetstack_core.vertical_autoscalers import CONGESTION, PERCENT, Trigger, Vertical
from packetstack_core.wording import counted

_ROUNDING = 1e-9
"""So much of a core is an error of floats, not load."""


# ---- sizes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """So many engines with so many cores each."""

    replicas: int
    cores: int

    @property
    def total(self) -> int:
        """Cores of all engines."""
        return self.replicas * self.cores

    def __str__(self) -> str:
        return f"{self.replicas} x {counted(self.cores, 'core')}"


@dataclass(frozen=True, slots=True)
class Ladder:
    """The sizes that may be chosen, the smallest first."""

    sizes: tuple[Size, ...]

    def __contains__(self, size: Size) -> bool:
        """Whether the size is within the limits; it need not be one that would be chosen."""
        first, last = self.sizes[0], self.sizes[-1]
        return first.replicas <= size.replicas <= last.replicas and (
            min(s.cores for s in self.sizes) <= size.cores <= last.cores and size.total >= first.total
        )

    def nearest(self, size: Size) -> Size:
        """The smallest that has as many cores, or the largest."""
        return next((s for s in self.sizes if s.total >= size.total), self.sizes[-1])

    def above(self, size: Size) -> tuple[Size, ...]:
        return tuple(s for s in self.sizes if s.total > size.total)

    def below(self, size: Size) -> tuple[Size, ...]:
        return tuple(s for s in self.sizes if s.total < size.total)


def ladder(wanted: Vertical, least: int, replicas: tuple[int, int]) -> Ladder:
    """Cores first, from `least`, up to the most; then engines with all of those. `replicas`: fewest and most engines."""
    few, most = max(1, replicas[0]), max(1, *replicas)
    cores = [Size(few, n) for n in range(least, wanted.max_cores + 1)]
    return Ladder((*cores, *(Size(n, wanted.max_cores) for n in range(few + 1, most + 1))))


# ---- what is measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """The load of the active engines in sum."""

    cores: int
    """Of all active engines; one without a sample counts with the cores that it should have."""
    values: Mapping[str, float] = field(default_factory=dict)
    """By type of trigger, summed up over engines with a sample; `Drops` is a share of all that came."""
    missing: tuple[str, ...] = ()
    """Active engines without a recent sample."""
    sizes: frozenset[int] = frozenset()
    """Cores that engines with a sample have."""
    problem: str = ""
    """Why nothing is known."""


def measure(
    load: StackLoad | MetricError, active: Sequence[Pod], cores: int, flows_of_a_core: float, oldest: float, now: float
) -> Measured:
    """`flows_of_a_core`: share of the flow memory, in flows. `oldest`: age of a sample that still counts, in seconds."""
    names = [pod.name for pod in active]
    if isinstance(load, MetricError):
        return Measured(cores * len(names), missing=tuple(names), problem=str(load))
    age = now - load.read
    if abs(age) > oldest:
        when = f"{age:.0f} s old" if age > 0 else f"{-age:.0f} s in the future"
        return Measured(cores * len(names), missing=tuple(names), problem=f"the load is {when}")
    there = {e.name: e for e in load.engines if e.name in set(names)}
    known = [there[name] for name in names if name in there]
    missing = tuple(name for name in names if name not in there)
    return Measured(
        sum(len(e.cores) for e in known) + cores * len(missing),
        _sums(known, flows_of_a_core) if known else {},
        missing,
        frozenset(len(e.cores) for e in known),
        "" if known else "no active engine has a sample",
    )


def _sums(engines: Sequence[EngineLoad], flows_of_a_core: float) -> dict[str, float]:
    flows = float(sum(e.active_flows for e in engines))
    packets = sum(e.packets_per_second for e in engines)
    # Where nothing is received at all each engine's share counts alike.
    lost = sum(e.drop_ratio * e.packets_per_second for e in engines) / packets if packets else 0.0
    return {
        "Utilization": 100.0 * sum(sum(e.cores) for e in engines),
        "FlowMemory": 100.0 * flows / flows_of_a_core,
        "BitsPerSecond": sum(e.bits_per_second for e in engines),
        "PacketsPerSecond": packets,
        "ActiveFlows": flows,
        "NewFlowsPerSecond": sum(e.new_flows_per_second for e in engines),
        "QueueDepth": float(sum(q.depth for e in engines for q in e.queues)),
        "Drops": lost if packets else sum(e.drop_ratio for e in engines) / len(engines),
    }


# ---- one look --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """What one trigger said at a look."""

    trigger: str
    """Its type, for a schedule with its name."""
    value: float | None = None
    """Per core now; None if it is not known, and for a schedule."""
    above: float = 0.0
    target: float = 0.0
    below: float = 0.0
    fires: bool = False
    """It asks for more."""
    cores: int | None = None
    """Cores in all that it asks for if it fires, else the fewest that it would do with; None if it does not say."""
    note: str = ""
    """Why it does not say."""

    def __str__(self) -> str:
        if self.note:
            return f"{self.trigger}: {self.note}"
        unit = " %" if self.trigger in PERCENT else ""
        is_ = f"{self.trigger} {shown(self.value or 0.0)}{unit}"
        if self.fires:
            return f"{is_} is above {shown(self.above)}{unit} -> {counted(self.cores or 0, 'core')}"
        return f"{is_} (up above {shown(self.above)}{unit})"


@dataclass(frozen=True, slots=True)
class Look:
    """What all triggers came to: the size that they ask for now."""

    wish: Size
    """The present one if they ask for nothing."""
    asked: tuple[Asked, ...]
    capped: int = 0
    """Cores in all that were asked for beyond the largest size; 0: none."""
    packets_per_second: float = 0.0
    """Of a core, now."""

    @property
    def why(self) -> str:
        """What asks for more, or that all allow less."""
        return "; ".join(str(a) for a in self.asked if a.fires)


def look(wanted: Vertical, size: Size, rungs: Ladder, found: Measured, congested: Mapping[str, float]) -> Look:
    """One look. O(triggers x sizes). `congested`: packets per second of a core at which a trigger saw congestion last.

    An engine without a sample counts as idle, so that it cannot ask for more; and with one nobody allows less.
    """
    triggers = [t for t in wanted.wanted_triggers if t.schedule is None]
    asked = tuple(_ask(t, size, rungs, found, congested) for t in triggers)
    rate = found.values.get("PacketsPerSecond", 0.0) / max(1, found.cores)
    here = Look(size, asked, packets_per_second=rate)
    firing = [a.cores for a in asked if a.fires and a.cores is not None]
    if firing:
        larger, most = rungs.above(size), max(firing)
        if most <= size.total:
            return here  # what was asked for is enough, and not there yet
        capped = most if most > rungs.sizes[-1].total else 0
        if not larger:
            return replace(here, capped=capped or most)
        chosen = next((s for s in larger if s.total >= most), larger[-1])
        return replace(here, wish=larger[0] if wanted.step == "One" else chosen, capped=capped)
    if found.missing or found.problem or any(a.cores is None for a in asked):
        return here
    fewest = max((a.cores for a in asked if a.cores is not None), default=size.total)
    smaller = [s for s in rungs.below(size) if s.total >= fewest]
    if not smaller:
        return here
    return replace(here, wish=smaller[-1] if wanted.step == "One" else smaller[0])


def _ask(trigger: Trigger, size: Size, rungs: Ladder, found: Measured, congested: Mapping[str, float]) -> Asked:
    above, target, below = (float(t) for t in trigger.thresholds())
    if found.problem or not found.cores:
        return Asked(trigger.type, None, above, target, below, note=found.problem or "no engine is active")
    total = found.values[trigger.type]
    value = total if trigger.type == "Drops" else total / found.cores
    if value > above:
        needed = size.total + 1 if trigger.type in CONGESTION else ceil(total / target - _ROUNDING)
        return Asked(trigger.type, value, above, target, below, True, needed)
    fits = [s.total for s in rungs.below(size) if _does(trigger, s.total, value, total, below, found, congested)]
    return Asked(trigger.type, value, above, target, below, cores=fits[0] if fits else size.total)


def _does(
    trigger: Trigger,
    cores: int,
    value: float,
    total: float,
    below: float,
    found: Measured,
    congested: Mapping[str, float],
) -> bool:
    """Whether so many cores would do. Congestion comes all at once, so that its value says nothing of fewer cores: the
    rate of packets at which it came last does."""
    if trigger.type not in CONGESTION:
        return total / cores < below
    rate = congested.get(trigger.type)
    if value >= below or rate is None:
        return value < below
    above = float(trigger.thresholds()[0])
    return found.values["PacketsPerSecond"] / cores < rate * below / above


def least_cores(wanted: Vertical, now: datetime) -> tuple[int, str]:
    """Fewest cores now, and the name of the schedule that says so; "" without one. ValueError for one that is wrong."""
    found = wanted.min_cores, ""
    for trigger in wanted.triggers:
        if trigger.schedule is not None and is_active(trigger.schedule, now) and trigger.schedule.cores > found[0]:
            found = trigger.schedule.cores, trigger.schedule.name
    return found


def shown(value: float) -> str:
    """A number for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
