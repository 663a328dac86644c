"""The computed day: its load is the one that is committed, and its queues are those of the books."""

import math
from decimal import Decimal

import pytest


@pytest.fixture(scope="module")
def day(bench_module):
    return bench_module("day")


def test_the_load_in_the_file_is_the_one_that_the_program_makes(day):
    assert day.LOAD.read_text().splitlines() == list(day.lines(day.synthetic(day.BURSTS)))


def test_one_queue_has_the_p99_of_its_formula(day):
    assert day.p99([day.Slice(3.0, 6)]) == pytest.approx(math.log(100) / 0.5, abs=1e-3)


def test_the_p99_is_over_packets_and_not_over_time(day):
    idle, busy = day.Slice(0.001, 1), day.Slice(0.9, 1)
    assert day.p99([idle] * 9 + [busy]) == pytest.approx(day.p99([busy]), rel=0.01)


def test_a_hundredth_of_the_packets_at_overload_is_an_endless_p99(day):
    assert day.p99([day.Slice(0.5, 1)] * 99 + [day.Slice(2.0, 1)]) == math.inf
    assert day.p99([day.Slice(0.5, 1)] * 999 + [day.Slice(2.0, 1)]) < 20


def test_engines_that_start_or_drain_cost_and_do_not_serve(day):
    load = day.Series([0.0, 600.0, 1200.0, 1800.0], {"Utilization": [*map(Decimal, (1, 4, 1, 1))]})
    made = day.ticks(load, 50, 8)
    slices = day.autoscaled(load, made)
    changes = [tick for tick in made if tick.replicas != tick.current]
    assert {tick.replicas > tick.current for tick in changes} == {True, False}
    for tick, slice_ in zip(made, slices, strict=True):
        assert slice_.engines == min(tick.current, tick.replicas)
    constant = sum(tick.replicas for tick in made) * day.INTERVAL_SECONDS / 3600
    assert day.engine_hours(made) > constant


def test_the_day_meets_both_goals_at_once_and_says_that_it_is_computed(day):
    rows = list(day.figures(day.simulate.read_series(day.LOAD, day.METRICS), 40, "a day", day.GOALS))
    assert [row.met for row in rows] == ["yes", "yes"]
    assert all("(computed)" in row.name for row in rows)
