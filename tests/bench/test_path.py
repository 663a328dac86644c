"""What the benchmark of the whole path makes of its slices."""

import itertools

import pytest


@pytest.fixture(scope="module")
def path(bench_module):
    return bench_module("path")


def test_each_round_takes_every_subject_once_and_none_is_always_the_first(path):
    taken = []
    found = path.interleaved({"a": 1.0, "b": 2.0, "c": 3.0}, lambda value: taken.append(value) or value, 3)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert [sorted(taken[i : i + 3]) for i in (0, 3, 6)] == [[1.0, 2.0, 3.0]] * 3
    assert {taken[0], taken[3], taken[6]} == {1.0, 2.0, 3.0}


def test_a_ratio_is_that_of_its_round_and_not_of_the_medians(path):
    found = {"own": [100.0, 300.0, 90.0], "peer": [50.0, 100.0, 100.0]}
    row = path.beside("T5b", "path", "kpps", found, "own", "peer", 1.6)
    assert (row.value, row.peer_value, row.ratio) == (100.0, 100.0, 2.0)
    assert row.met == "yes"
    assert "3 rounds, ratio in a round 0.90..3.00" in row.name


def test_a_goal_is_missed_by_the_median_of_the_ratios(path):
    row = path.beside("T14", "connections", "thousand/s", {"own": [6.0], "peer": [10.0]}, "own", "peer", 1.2)
    assert (row.ratio, row.goal, row.met) == (0.6, ">= 1.2x", "no")
    assert "1 round, " in row.name


def test_a_figure_without_a_goal_is_neither_met_nor_missed(path):
    row = path.beside("T5b", "path", "kpps", {"own": [1.0], "peer": [2.0]}, "own", "peer")
    assert (row.goal, row.met) == ("", "")


def test_where_fewer_is_better_the_goal_is_a_limit(path):
    found = {"own": [30.0], "peer": [20.0]}
    rows = [path.beside("T18", "round trip", "us", found, "own", "peer", goal, fewer=True) for goal in (1.3, 1.5)]
    assert [(row.goal, row.met) for row in rows] == [("<= 1.3x", "no"), ("<= 1.5x", "yes")]


def test_the_figures_of_a_slice_are_read_by_name(path):
    assert path.figures("answered_percent 99.98\narrived_kpps 612.5\n") == {
        "answered_percent": 99.98, "arrived_kpps": 612.5,
    }  # fmt: skip


def test_numbers_of_connections_do_not_come_twice_in_ten_slices(path):
    subject = path.Subject(lab=None)
    firsts = [next(subject.connections) for _ in range(10)]
    assert all(b - a >= 1 << 19 for a, b in itertools.pairwise(firsts))
