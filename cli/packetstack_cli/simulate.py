"""`packetstack simulate`: a load series through the autoscaler of a stack, in virtual time.

A series is CSV. Its first column is `seconds`, each other one a metric of the stack by its name: what the whole
stack gets, which the active engines share equally. `Utilization` counts fully busy engines: 2.4 keeps four engines
60 % busy. `DropRatio` is the ratio itself. A value holds until the next row; an empty one is a metric that does not
answer.
"""

import csv
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from packetstack_cli.errors import CliError, unreadable
from packetstack_core.autoscalers import Autoscaling
from packetstack_core.autoscaling import rounds
from packetstack_core.autoscaling.calculator import Scale
from packetstack_core.autoscaling.metrics import ENGINE_CAPACITY, MetricError, Pod, Reading, Sample
from packetstack_core.autoscaling.options import State, is_active
from packetstack_core.autoscaling.spec import Metric, spec_of
from packetstack_core.autoscaling.status import Conditions, Record
from packetstack_core.resources import PacketStack
from packetstack_core.verbs import Json

MAX_TICKS = 100_000
NOT_IN_SERIES = MetricError("api_empty", "no value at this time")


@dataclass(frozen=True, slots=True)
class Series:
    """`values[metric]` at `times`, in seconds; None where the metric does not answer."""

    times: Sequence[float]
    values: dict[str, Sequence[Decimal | None]]

    def at(self, metric: str, now: float) -> Decimal | None:
        """The value that holds at a time. O(log rows)."""
        return self.values[metric][bisect_right(self.times, now) - 1]

    def decided_at(self, interval_seconds: float) -> list[float]:
        """When it is decided, from the first row to the last. CliError when that would be too often."""
        first, last = self.times[0], self.times[-1]
        if (last - first) / interval_seconds > MAX_TICKS:
            raise CliError(
                f"{last - first:g} s every {interval_seconds:g} s are more than {MAX_TICKS} decisions; ask fewer"
            )
        return [first + i * interval_seconds for i in range(int((last - first) / interval_seconds) + 1)]


@dataclass(frozen=True, slots=True)
class Tick:
    """One reconcile. `active` engines shared the load; the others of `current` were starting."""

    seconds: float
    load: dict[str, Decimal | None]
    active: int
    current: int
    replicas: int
    """From now on."""
    limits: tuple[int, int]
    """minReplicas and maxReplicas, perhaps of a schedule."""
    busy: float | None
    """Share of the engines' cycles that do work; None without `Utilization`."""
    record: Record
    conditions: Conditions

    def document(self) -> Json:
        """The decision as JSON or YAML would hold it."""
        return {
            "seconds": self.seconds,
            "load": {name: None if value is None else float(value) for name, value in self.load.items()},
            "busy": self.busy,
            "activeEngines": self.active,
            "currentReplicas": self.current,
            "replicas": self.replicas,
            "minReplicas": self.limits[0],
            "maxReplicas": self.limits[1],
            "proposals": [
                {"metric": p.metric, "replicas": p.replicas} | ({"error": p.error} if p.error else {})
                for p in self.record.proposals
            ],
            "decision": str(self.record),
            "conditions": [{"type": c.type, "status": c.status, "reason": c.reason} for c in self.conditions],
        }


def autoscaling_of(stack: PacketStack) -> Autoscaling:
    """What the stack says about its replicas. CliError when nothing."""
    if stack.spec.autoscaling is None:
        raise CliError(f"stack {stack.metadata.name}: has no spec.autoscaling, so nothing changes its replicas; add it")
    return stack.spec.autoscaling


def read_series(path: Path, metrics: Sequence[Metric]) -> Series:
    """A series with a column for each metric. CliError names the line."""
    return read_columns(path, [metric.name for metric in metrics])


def read_columns(path: Path, wanted: Sequence[str]) -> Series:
    """A series with these columns. CliError names the line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(i, row) for i, row in enumerate(csv.reader(file), 1) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise unreadable(path, e) from None
    header = [cell.strip() for cell in rows[0][1]] if rows else []
    if not header or header[0] != "seconds" or sorted(header[1:]) != sorted(set(wanted)):
        right = ",".join(["seconds", *dict.fromkeys(wanted)])
        raise CliError(f"{path}: has the columns {','.join(header)[:80] or 'of an empty file'}; use {right}")
    times: list[float] = []
    values: dict[str, list[Decimal | None]] = {name: [] for name in header[1:]}
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise CliError(f"{path}: line {line} has {len(row)} cells; use {len(header)}, one for each column")
        cells = [_number(cell, f"{path}: line {line}") for cell in row]
        if cells[0] is None or (times and float(cells[0]) <= times[-1]):
            raise CliError(f"{path}: line {line} has seconds {row[0]!r}; use a number above that of the line before")
        times.append(float(cells[0]))
        for name, cell in zip(header[1:], cells[1:], strict=True):
            values[name].append(cell)
    if not times:
        raise CliError(f"{path}: has no line with values; use at least one")
    return Series(times, dict(values))


def _number(cell: str, where: str) -> Decimal | None:
    text = cell.strip()
    if not text:
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal(-1)
    if not value.is_finite() or not 0 <= value <= Decimal(10) ** 15:
        raise CliError(
            f"{where} has {text[:40]!r}; use a number from 0 to 1e15, or nothing for a metric without answer"
        )
    return value


def simulate(
    wanted: Autoscaling,
    series: Series,
    replicas: int,
    begin: datetime,
    interval_seconds: float | None = None,
    start_seconds: float = 5,
) -> list[Tick]:
    """Reconciles from the first row, which is at `begin`, to the last, from `replicas` active engines on.

    `interval_seconds`: None is the sync period. An engine serves `start_seconds` after it was asked for. CliError when
    there would be too many reconciles, or a schedule is wrong.
    """
    if interval_seconds is None:
        interval_seconds = wanted.sync_period_seconds
    first, times = series.times[0], series.decided_at(interval_seconds)
    try:
        for schedule in wanted.schedules:
            is_active(schedule, begin)
    except ValueError as e:
        raise CliError(f"spec.autoscaling.schedules: {e}") from None
    state = State()
    metrics = spec_of(wanted).metrics
    ready_at = [first] * replicas
    ticks = []
    for now in times:
        clock = begin.timestamp() + now - first
        active, current = sum(at <= now for at in ready_at), len(ready_at)
        pods = [Pod(f"engine-{j}", ready="True") for j in range(active)]
        load = {metric.name: series.at(metric.name, now) for metric in metrics}
        readings = {j: reading_of(metric, load[metric.name], active, clock) for j, metric in enumerate(metrics)}
        done = rounds.decide(wanted, state, Scale(current, current), pods, NOT_IN_SERIES, clock, readings)
        if done.decision.write is not None:
            # Those that serve longest stay.
            ready_at = sorted(ready_at)[: done.decision.write]
            ready_at += [now + start_seconds] * (done.decision.write - len(ready_at))
            done = rounds.written(done, clock)
        state, record = done.state, done.decision.record
        work = load.get("Utilization")
        busy = None if work is None or not active else min(1.0, float(work) / active)
        limits = (done.spec.minimum, done.spec.maximum)
        conditions = state.status.conditions
        ticks.append(Tick(now, load, active, current, len(ready_at), limits, busy, record, conditions))
    return ticks


def reading_of(metric: Metric, value: Decimal | None, active: int, now: float) -> Reading:
    """What so many engines, which share a value, give for a metric."""
    if value is None:
        return NOT_IN_SERIES
    milli = int((value * 1000).to_integral_value(ROUND_HALF_EVEN))
    if metric.type == "External":
        return (milli,)
    if metric.type == "Object":
        return milli
    if metric.type in ("Resource", "ContainerResource"):
        return MetricError("api_error", "cores that poll are busy without load; use a metric of type Engine")
    each = milli if metric.name == "DropRatio" else milli // active if active else 0
    if metric.name == "Utilization" and metric.type == "Engine":
        each = min(each, ENGINE_CAPACITY)
    return {f"engine-{j}": Sample(each, now) for j in range(active)}


@contextmanager
def plotting(rows: int, title: str, path: Path) -> Iterator[Sequence[Any]]:
    """Axes below each other, written to the file in the end. CliError without matplotlib or when it cannot be written."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise CliError(f"{path}: needs matplotlib; install packetstack[demo]") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, 1, sharex=True, figsize=(12, 2.4 * rows + 1), layout="constrained")
        try:
            yield axes
            axes[-1].set_xlabel("seconds")
            figure.suptitle(title)
            try:
                figure.savefig(path, dpi=110)
            except (OSError, ValueError) as e:
                raise CliError(f"{path}: cannot be written: {e}") from None
        finally:
            plt.close(figure)


def draw(metrics: Sequence[Metric], ticks: Sequence[Tick], title: str, path: Path) -> None:
    """Load and replicas over time, with the limits. CliError without matplotlib or when it cannot be written."""
    at = [tick.seconds for tick in ticks]
    names = list(ticks[0].load)
    with plotting(len(names) + 1, title, path) as axes:
        for plot, name, metric in zip(axes, names, metrics, strict=False):
            values = [float("nan") if (value := tick.load[name]) is None else float(value) for tick in ticks]
            plot.fill_between(at, values, step="post", color="#4e79a7", alpha=0.25, linewidth=0)
            plot.step(at, values, where="post", color="#4e79a7", label=f"load: {name}")
            if metric.target.type != "Value" and name != "DropRatio":
                unit = 100 if metric.target.type == "Utilization" else 1000
                held = [tick.active * metric.target.value / unit for tick in ticks]
                label = "what the active engines hold at the target"
                plot.step(at, held, where="post", color="#59a14f", linestyle=(0, (4, 3)), label=label)
            plot.set_ylim(0, 1.25 * plot.get_ylim()[1])
            plot.legend(loc="upper left", frameon=False, ncols=2)
        pool = axes[-1]
        asked = [float("nan") if tick.record.proposed is None else tick.record.proposed for tick in ticks]
        pool.plot(at, asked, ".", color="#f28e2b", markersize=3, label="asked for by the metrics")
        pool.step(at, [tick.replicas for tick in ticks], where="post", color="black", linewidth=2, label="replicas")
        for i, name in enumerate(("minReplicas", "maxReplicas")):
            limits = [tick.limits[i] for tick in ticks]
            pool.step(at, limits, where="post", color="#e15759", linewidth=0.9, linestyle=(0, (4, 3)))
            pool.annotate(
                name, (1, limits[-1]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        pool.set_ylim(0, 1.25 * max(max(tick.limits[1], tick.replicas) for tick in ticks))
        pool.set_ylabel("engines")
        pool.legend(loc="upper left", frameon=False, ncols=2)
