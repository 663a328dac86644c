"""T16: engine-hours of an autoscaled pool over a day, beside a static pool for the peak. Computed, no packet is sent.

The load is `day.csv`, made by `python bench/day.py`: how many engines it keeps fully busy, each minute. It is synthetic:
the trough at night is a quarter of the evening's peak, minutes differ by some 3 %, and three bursts of 20 to 35 % rise
within two minutes. So its mean is 0.45 of its busiest minute; the flatter a day, the less there is to save. The autoscaler is that of `packetstack simulate`, with the defaults of its behavior.

Times are those of a queue M/M/1 for each engine, which all have the same share of the load: of packets that take one
service time on average at a utilisation of r, the part exp(-(1 - r) t) takes longer than t service times. From r = 1 on
all do, however long t is. The p99 is over all packets of the day.

What speaks against the autoscaled pool is counted: its autoscaler sees a load 15 s late; an engine that starts serves
nobody for the 15 s, and costs; an engine that drains serves nobody, and costs. What packets wait in handovers is not: at
some 20 resizes, and 3.4 ms in each, that is less than a millionth of the day.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from packetstack_cli import simulate
from packetstack_cli.simulate import Series, Tick
from packetstack_core.autoscalers import Autoscaling
from packetstack_core.autoscaling.spec import spec_of
from rows import Row, yes

LOAD = Path(__file__).with_name("day.csv")
PICTURE = Path(__file__).resolve().parents[1] / "build" / "bench" / "day.png"
MINUTES = 24 * 60
INTERVAL_SECONDS = 15.0
"""Between two decisions, and how old the load is that they see."""
PEAK_UTILISATION = 0.6
"""Of the static pool in the busiest minute."""
GOALS = (0.65, 1.1)
"""Engine-hours and p99, beside those of the static pool."""
BURSTS = ((12 * 60 + 5, 10, 0.35), (17 * 60 + 30, 30, 0.2), (20 * 60 + 40, 15, 0.3))
"""From which minute, for how many, by how much."""


def synthetic(bursts: Sequence[tuple[int, int, float]]) -> list[float]:
    """Busy engines in each minute of a day."""
    chooser = random.Random(1)
    noise, load = 0.0, []
    for minute in range(MINUTES):
        angle = 2 * math.pi * (minute / 60 - 20) / 24  # the peak is at 20 o'clock
        day, half = 0.5 + 0.5 * math.cos(angle), 0.5 + 0.5 * math.cos(2 * angle)
        noise = 0.9 * noise + chooser.gauss(0, 0.013)  # about 0.03 in the long run
        burst = sum(by * min(1, (minute - at + 1) / 2) for at, long, by in bursts if at <= minute < at + long)
        load.append((1.5 + 5 * day * (0.8 + 0.2 * half)) * (1 + noise + burst))
    return load


def lines(load: Sequence[float]) -> Iterator[str]:
    """The file for `packetstack simulate`."""
    yield "seconds,Utilization"
    yield from (f"{60 * minute},{busy:.3f}" for minute, busy in enumerate(load))


@dataclass(frozen=True, slots=True)
class Slice:
    """A time with one load, in busy engines, and one number of engines that share it."""

    load: float
    engines: int

    def longer(self, service_times: float) -> float:
        """The part of its packets that takes longer."""
        idle = 1 - self.load / self.engines
        return math.exp(-idle * service_times) if idle > 0 else 1.0


def p99(slices: Sequence[Slice]) -> float:
    """Of all their packets, in service times; infinite when a hundredth comes at overload."""
    packets = sum(slice_.load for slice_ in slices)

    def above(service_times: float) -> bool:
        return sum(s.load * s.longer(service_times) for s in slices) > 0.01 * packets

    low, high = 0.0, 1.0
    while above(high):
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return high


def static(load: Series) -> list[Slice]:
    """A pool whose busiest minute is at `PEAK_UTILISATION`."""
    busy = [float(value or 0) for value in load.values["Utilization"]]
    engines = math.ceil(max(busy) / PEAK_UTILISATION)
    return [Slice(one, engines) for one in busy]


def wanted(target: int, most: int) -> Autoscaling:
    metric = {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": target}}
    body: dict[str, Any] = {"minReplicas": 2, "maxReplicas": most, "metrics": [{"type": "Engine", "engine": metric}]}
    return Autoscaling.model_validate(body)


METRICS = spec_of(wanted(40, 2)).metrics


def ticks(load: Series, target: int, most: int) -> list[Tick]:
    """Each decision of the day, made on a load that is `INTERVAL_SECONDS` old, from `most` engines on."""
    late = [load.times[0], *(at + INTERVAL_SECONDS for at in load.times[1:])]
    seen = Series(late, load.values)
    begin = datetime(2026, 1, 5, tzinfo=UTC)
    return simulate.simulate(wanted(target, most), seen, most, begin, INTERVAL_SECONDS, INTERVAL_SECONDS)


def autoscaled(load: Series, made: Sequence[Tick]) -> list[Slice]:
    """What packets meet after each decision: engines that serve already, and still do."""
    busy = [float(load.at("Utilization", tick.seconds) or 0) for tick in made]
    return [Slice(one, min(tick.active, tick.replicas)) for one, tick in zip(busy, made, strict=True)]


def engine_hours(made: Sequence[Tick]) -> float:
    """With those that start and those that drain."""
    return sum(max(tick.current, tick.replicas) for tick in made) * INTERVAL_SECONDS / 3600


def figures(load: Series, target: int, what: str, goals: tuple[float, float] | None = None) -> Iterator[Row]:
    """Engine-hours and p99 of a day, beside the static pool."""
    peak = static(load)
    engines = peak[0].engines
    made = ticks(load, target, engines)
    pool, peer = autoscaled(load, made), f"static pool of {engines}, {PEAK_UTILISATION:.0%} in the busiest minute"
    for name, unit, value, static_value, goal in (
        ("engine-hours", "h", engine_hours(made), 24.0 * engines, goals and goals[0]),
        ("p99 of a packet in an engine", "service times", p99(pool), p99(peak), goals and goals[1]),
    ):
        ratio = value / static_value
        said = (f"<= {goal}", yes(ratio <= goal)) if goal else ("", "")
        yield Row(
            "T16",
            f"{name}, {what} (computed)",
            round(value, 2),
            unit,
            peer,
            round(static_value, 2),
            round(ratio, 3),
            *said,
        )


def day(quick: bool) -> Iterator[Row]:
    """The day of the file at two targets, and a smoother one."""
    load = simulate.read_series(LOAD, METRICS)
    yield from figures(load, 40, "a day at a target of 40 %", GOALS)
    engines = static(load)[0].engines
    made = ticks(load, 40, engines)
    worst = max(p99([slice_]) for slice_ in autoscaled(load, made))
    static_worst = max(p99([slice_]) for slice_ in static(load))
    yield Row(
        "T16",
        "that p99 in the worst 15 s (computed)",
        round(worst, 2),
        "service times",
        "the static pool's worst minute",
        round(static_worst, 2),
        round(worst / static_worst, 3),
    )
    yield Row("T16", "resizes in that day (computed)", sum(tick.replicas != tick.current for tick in made), "")
    yield from figures(load, round(100 * PEAK_UTILISATION), "the same day at a target of 60 %")
    smooth = Series(load.times, {"Utilization": [round(Decimal(one), 3) for one in synthetic(())]})
    yield from figures(smooth, 40, "the same day without its bursts, at 40 %")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    simulate.draw(METRICS, made, "a day-like load, target 40 %", PICTURE)


if __name__ == "__main__":
    LOAD.write_text("\n".join(lines(synthetic(BURSTS))) + "\n")
