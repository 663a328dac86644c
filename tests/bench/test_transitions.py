"""What the benchmark of transitions makes of the generators' samples."""

import pytest


@pytest.fixture(scope="module")
def transitions(bench_module):
    return bench_module("transitions")


def sample(at, counts, gap=0.0, waiting=0.0):
    return {"time": at, "rtt_counts": counts, "gap_ms": gap, "waiting_ms": waiting}


def test_a_phase_is_of_the_samples_that_lie_in_it_whole_of_all_generators(transitions):
    samples = [sample(10.05, [[500.0, 9]]), sample(10.2, [[1.0, 98]], gap=3.0), sample(11.9, [[7.0, 2]], waiting=40.0),
               sample(12.1, [[900.0, 9]])]  # fmt: skip
    found = transitions.phase(samples, 10.0, 12.0, 1.0)
    assert (found.p50, found.p99, found.p999) == (1.0, 7.0, 7.0)
    assert found.gap == 40.0, "of a request that still waits, too"
    assert (found.throughput, found.cpu) == (50.0, 0.5)


def test_a_phase_in_which_nobody_was_answered_has_no_throughput(transitions):
    assert transitions.phase([], 10.0, 12.0, 0.0) == (0.0,) * 6


def test_each_figure_stands_beside_the_same_one_before_the_change(transitions, tmp_path, monkeypatch):
    monkeypatch.setattr(transitions, "ROOT", tmp_path)
    before, during = transitions.Phase(1, 2, 3, 4, 100, 0.5), transitions.Phase(1, 4, 6, 8, 50, 1.0)
    scene = transitions.Scene({"before": before, "during": during, "after": before}, 0, 0.1, 2.0)
    rows = {row.name: row for row in transitions.rows({"Mirror": [scene] * 5})}
    throughput = rows["Mirror, during: throughput"]
    assert (throughput.value, throughput.peer_value, throughput.ratio) == (50, 100, "0.50")
    assert rows["Mirror: connections broken of 500 and 100 new ones a second, worst of 5 changes"].met == "yes"
    assert (tmp_path / "build/bench/transitions.csv").read_text().count("\n") == 1 + 3 * 6
