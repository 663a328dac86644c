"""`packetstack simulate` for a stack whose triggers decide the cores of its engines: both autoscalers, in virtual time.

As `simulate`, but engines have cores: `Utilization` counts fully busy cores, engines share the load by their cores, and another
number of cores comes about as the stack says: one engine after the other, or with `Mirror` all at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from packetstack_cli.errors import CliError
from packetstack_cli.simulate import NOT_IN_SERIES, Series, plotting, reading_of
from packetstack_core import resources
from packetstack_core.autoscaling import together
from packetstack_core.autoscaling.metrics import MetricError, Pod, Reading
from packetstack_core.autoscaling.options import is_active
from packetstack_core.autoscaling.spec import Metric, spec_of
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.autoscaling.vertical import Seen
from packetstack_core.load import EngineLoad, QueueLoad, StackLoad
from packetstack_core.verbs import Json

COLUMNS = {"FlowMemory": "ActiveFlows", "Drops": "DropRatio"}
"""Column of a trigger that has not its own name."""


@dataclass(slots=True)
class _Engine:
    """An engine serves from a time on, and with other cores from another one on."""

    ready_at: float
    cores: int
    other_at: float = 0.0
    other: int = 0

    def resize(self, cores: int, at: float, now: float) -> None:
        self.cores = self.at(now)
        self.other_at, self.other = at, cores

    def at(self, now: float) -> int:
        return self.other if self.other and self.other_at <= now else self.cores


@dataclass(frozen=True, slots=True)
class SizeTick:
    """One round. `active` engines with `serving` cores in all shared the load."""

    seconds: float
    load: dict[str, Decimal | None]
    active: int
    serving: int
    before: Size
    size: Size
    """From now on."""
    busy: float | None
    """Share of the cores' cycles that do work; None without `Utilization`."""
    decision: str
    """What metrics said of the number of engines; "" where triggers decide it."""
    sized: str
    """What triggers said."""
    refused: str
    how: str
    conditions: tuple[Json, ...]

    def document(self) -> Json:
        """The round as JSON or YAML would hold it."""
        return {
            "seconds": self.seconds,
            "load": {name: None if value is None else float(value) for name, value in self.load.items()},
            "busy": self.busy,
            "activeEngines": self.active,
            "servingCores": self.serving,
            "currentReplicas": self.before.replicas,
            "currentCores": self.before.cores,
            "replicas": self.size.replicas,
            "cores": self.size.cores,
            "decision": self.decision,
            "coresDecision": self.sized,
            "refused": self.refused,
            "conditions": list(self.conditions),
        }


def metrics_of(stack: resources.Spec) -> tuple[Metric, ...]:
    """Those that decide the number of engines; none where triggers do."""
    wanted = stack.autoscaling
    return () if wanted is None or wanted.vertical_decides_replicas else spec_of(wanted).metrics


def columns_of(stack: resources.Spec) -> list[str]:
    """Columns that the series must have: of metrics and of triggers, each once."""
    vertical = stack.autoscaling.vertical if stack.autoscaling is not None else None
    triggers = [t.type for t in vertical.wanted_triggers if t.schedule is None] if vertical is not None else []
    return list(dict.fromkeys([*(m.name for m in metrics_of(stack)), *(COLUMNS.get(t, t) for t in triggers)]))


def simulate(
    stack: resources.Spec,
    series: Series,
    size: Size,
    begin: datetime,
    interval_seconds: float | None = None,
    start_seconds: float = 5,
) -> list[SizeTick]:
    """Rounds from the first row, which is at `begin`, to the last; see `simulate.simulate`."""
    wanted = stack.autoscaling
    if wanted is None:
        raise TypeError("the stack has no spec.autoscaling; call only for one that has")
    every = wanted.sync_period_seconds if interval_seconds is None else interval_seconds
    first, times = series.times[0], series.decided_at(every)
    for schedule in (*wanted.schedules, *(t.schedule for t in (wanted.vertical.triggers if wanted.vertical else ()))):
        try:
            if schedule is not None:
                is_active(schedule, begin)
        except ValueError as e:
            raise CliError(f"spec.autoscaling: schedule {schedule.name if schedule else ''}: {e}") from None
    state, metrics, columns = together.State(), metrics_of(stack), columns_of(stack)
    engines = [_Engine(first, size.cores) for _ in range(size.replicas)]
    ticks = []
    for now in times:
        clock = begin.timestamp() + now - first
        serving = [e for e in engines if e.ready_at <= now]
        cores = [e.at(now) for e in serving]
        load = {name: series.at(name, now) for name in columns}
        answers = {j: _answer(m, load[m.name], cores, clock) for j, m in enumerate(metrics)}
        active = [Pod(f"engine-{j}", ready="True") for j in range(len(serving))]
        measured = _measured(load, cores, clock, every)
        done = together.reconcile(stack, state, Seen(size, active), len(engines), measured, clock, answers)
        before, goal = size, done.write
        done = together.ended(done) if goal is None else together.written(done, clock)
        if goal is not None:
            _change(engines, stack, goal, now, start_seconds)
            size = goal
        state = done.state
        work = load.get("Utilization")
        busy = None if work is None or not cores else min(1.0, float(work) / sum(cores))
        said = done.vertical
        ticks.append(
            SizeTick(
                now,
                load,
                len(serving),
                sum(cores),
                before,
                size,
                busy,
                str(done.horizontal.decision.record) if done.horizontal is not None else "",
                str(said) if said is not None else "",
                str((said and said.refusal) or ""),
                said.how if said is not None else "",
                tuple({"type": c.type, "status": c.status, "reason": c.reason} for c in together.conditions(state)),
            )
        )
    return ticks


def _change(engines: list[_Engine], stack: resources.Spec, goal: Size, now: float, start_seconds: float) -> None:
    """The engines on their way to another size. Those that serve longest stay."""
    engines.sort(key=lambda e: e.ready_at)
    del engines[goal.replicas :]
    for j, engine in enumerate(engines):
        if engine.at(now) != goal.cores:
            turn = 1 if stack.handover.strategy == "Mirror" else j + 1
            engine.resize(goal.cores, max(engine.ready_at, now) + turn * start_seconds, now)
    engines += [_Engine(now + start_seconds, goal.cores) for _ in range(goal.replicas - len(engines))]


def _answer(metric: Metric, value: Decimal | None, cores: Sequence[int], now: float) -> Reading:
    if metric.type == "Engine" and metric.name == "Utilization" and value is not None and cores:
        value = value * len(cores) / sum(cores)
    return reading_of(metric, value, len(cores), now)


def _measured(
    load: dict[str, Decimal | None], cores: Sequence[int], now: float, seconds: float
) -> StackLoad | MetricError:
    """Engines with so many cores share the load by them."""
    if any(value is None for value in load.values()):
        return NOT_IN_SERIES
    have = {name: float(value) for name, value in load.items() if value is not None}
    total = sum(cores)

    def engine(number: int, own: int) -> EngineLoad:
        part = {name: value * own / total for name, value in have.items()}
        return EngineLoad(
            number,
            f"engine-{number}",
            "Active",
            True,
            seconds,
            (min(1.0, have.get("Utilization", 0.0) / total),) * own,
            (QueueLoad(0, 0.0, 0.0, round(part.get("QueueDepth", 0.0))),),
            round(part.get("ActiveFlows", 0.0)),
            part.get("NewFlowsPerSecond", 0.0),
            part.get("PacketsPerSecond", 0.0),
            part.get("BitsPerSecond", 0.0),
            min(1.0, have.get("DropRatio", 0.0)),
        )

    return StackLoad(now, tuple(engine(j, own) for j, own in enumerate(cores)))


def draw(ticks: Sequence[SizeTick], title: str, path: Path) -> None:
    """Load, engines and cores over time. CliError without matplotlib or when it cannot be written."""
    at, names = [tick.seconds for tick in ticks], list(ticks[0].load)
    with plotting(len(names) + 2, title, path) as axes:
        for plot, name in zip(axes, names, strict=False):
            values = [float("nan") if (value := tick.load[name]) is None else float(value) for tick in ticks]
            plot.step(at, values, where="post", color="#4e79a7", label=f"load: {name}")
        counts = (("engines", [t.size.replicas for t in ticks]), ("cores in all", [t.size.total for t in ticks]))
        for plot, (name, numbers) in zip(axes[-2:], counts, strict=True):
            plot.step(at, numbers, where="post", color="black", linewidth=2, label=name)
        serving = [tick.serving for tick in ticks]
        axes[-1].step(at, serving, where="post", color="#59a14f", linestyle=(0, (4, 3)), label="cores that serve")
        for plot in axes:
            plot.set_ylim(0, 1.25 * plot.get_ylim()[1])
            plot.legend(loc="upper left", frameon=False, ncols=2)
