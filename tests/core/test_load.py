"""Rates from counters: exact where they are known, nothing where they are not."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packetstack_core.assignment import Owner
from packetstack_core.autoscaling.engine_metrics import samples
from packetstack_core.load import (
    CoreCounters,
    EngineCounters,
    History,
    QueueCounters,
    Snapshot,
    bucket_loads,
    engine_load,
    from_json,
    stack_load,
    to_json,
)


def engine(id_: int = 1, at: int = 0, *, state: str = "Active", ready: bool = True, busy: int = 60) -> EngineCounters:
    """An engine with two cores and two queues, `at` seconds after its beginning; its first core is `busy` percent busy."""
    return EngineCounters(
        id_, f"e{id_}", state, ready,
        (CoreCounters(busy * at, 100 * at), CoreCounters(0, 100 * at)),
        (QueueCounters(0, busy * at, 1000 * at, 5), QueueCounters(1, 0, 0, 0)),
        1000 * at, 64000 * at, 10 * at, 100 * at, 77, at,
    )  # fmt: skip


def test_rates_are_differences_by_time() -> None:
    load = engine_load(engine(at=2), engine(at=4), 2.0)
    assert load is not None
    assert load.cores == (0.6, 0.0)
    assert load.utilization == 0.3
    assert [q.busy for q in load.queues] == [0.6, 0.0]
    assert (load.packets_per_second, load.bits_per_second, load.new_flows_per_second) == (1000, 512000, 10)
    assert load.active_flows == 77
    assert load.drop_ratio == 101 / 1001


def test_what_the_kernel_dropped_came_too() -> None:
    before = replace(engine(at=2), dropped=0, missed=0)
    load = engine_load(before, replace(engine(at=4), packets=before.packets + 100, dropped=0, missed=100), 2.0)
    assert load is not None
    assert load.drop_ratio == 0.5


def test_the_same_answer_twice_is_one() -> None:
    history = History()
    for t in (1, 2, 2, 3, 3):
        history.add(Snapshot(float(t), (engine(at=t),)), 100.0 + t)
    load = history.load(1.0)
    assert load is not None
    assert load.engines[0].window == 1.0


@pytest.mark.parametrize("field", ["packets", "bytes", "flows_created", "dropped", "missed", "cores", "queues"])
def test_counters_that_restart_say_nothing(field: str) -> None:
    after = replace(engine(at=4), **{field: getattr(engine(at=1), field)})
    assert engine_load(engine(at=2), after, 2.0) is None


def test_a_core_that_stands_still_says_nothing() -> None:
    assert engine_load(engine(at=2), engine(at=2), 2.0) is None


def test_an_engine_of_another_shape_says_nothing() -> None:
    assert engine_load(replace(engine(at=2), cores=(CoreCounters(0, 1),)), engine(at=4), 2.0) is None


def test_time_that_goes_backwards_says_nothing() -> None:
    assert engine_load(engine(at=2), engine(at=4), -1.0) is None
    history = History()
    history.add(Snapshot(10.0, (engine(at=10),)), 100.0)
    history.add(Snapshot(4.0, (engine(at=4),)), 101.0)
    assert history.load(5.0) is None
    history.add(Snapshot(6.0, (engine(at=6),)), 103.0)
    load = history.load(5.0)
    assert load is not None
    assert load.engines[0].window == 2.0


def test_a_history_looks_as_far_back_as_asked() -> None:
    history = History()
    for t in range(200):
        history.add(Snapshot(float(t), (engine(at=t),)), 1000.0 + t)
    for seconds, window in ((1, 1), (15, 15), (1000, 61)):
        load = history.load(seconds)
        assert load is not None
        assert load.engines[0].window == pytest.approx(window, abs=1)
        assert load.read == 1199.0


def test_a_snapshot_that_is_a_moment_too_young_is_better_than_one_that_is_twice_as_old() -> None:
    history = History()
    for t in (0.0, 15.0, 29.99):
        history.add(Snapshot(t, (engine(at=t),)), 1000.0 + t)
    load = history.load(15.0)
    assert load is not None
    assert load.engines[0].window == pytest.approx(14.99)


def test_an_engine_that_came_later_or_was_made_anew_has_a_window_of_its_own() -> None:
    history = History()
    for t in range(1, 31):
        late, anew = engine(2, t - 20), engine(3, t if t < 26 else t - 25)
        history.add(Snapshot(float(t), (engine(1, t), *([late] if t > 20 else []), anew)), 1000.0 + t)
    load = history.load(15.0)
    assert load is not None
    assert {e.id: e.window for e in load.engines} == {1: 15.0, 2: 9.0, 3: 4.0}
    assert {e.packets_per_second for e in load.engines} == {1000.0}


def test_only_engines_that_serve_and_are_active_have_samples() -> None:
    engines = [
        (engine(1, 2), engine(1, 4)),
        (engine(2, 2), engine(2, 4, state="Draining")),
        (engine(3, 2), engine(3, 4, state="Starting")),
        (engine(4, 2), engine(4, 4, ready=False)),
    ]
    load = stack_load(Snapshot(0.0, tuple(a for a, _ in engines)), Snapshot(2.0, tuple(b for _, b in engines)), 50.0)
    found = samples(load, "Utilization")
    assert list(found) == ["e1"]
    assert (found["e1"].value, found["e1"].timestamp, found["e1"].window) == (300, 50.0, 2.0)
    assert samples(load, "PacketsPerSecond")["e1"].value == 1_000_000


def test_a_new_engine_is_unknown_until_it_was_seen_twice() -> None:
    load = stack_load(Snapshot(0.0, (engine(1, 2),)), Snapshot(2.0, (engine(1, 4), engine(2, 4))), 50.0)
    assert [e.id for e in load.engines] == [1]


def test_a_bucket_costs_what_its_packets_cost_in_its_queue() -> None:
    before = Snapshot(0.0, (engine(1, 2),), (0, 0, 0, 0))
    after = Snapshot(2.0, (engine(1, 4),), (1500, 500, 100, 0))
    load = stack_load(before, after, 50.0)
    # The first queue took 0.6 of a core for 1,000 packets a second; the second one had none, so the mean counts.
    assert bucket_loads(load, [Owner(1, 0), Owner(1, 0), Owner(1, 1), None]) == pytest.approx([0.45, 0.15, 0.03, 0])


def test_buckets_of_a_queue_whose_ring_is_full_ask_for_more_than_it_gets_done() -> None:
    before, after = engine(1, 2), engine(1, 4)
    full = (replace(after.queues[0], missed=1000), after.queues[1])  # 2,000 frames taken, 1,000 lost
    looks = Snapshot(0.0, (before,), (0, 0)), Snapshot(2.0, (replace(after, queues=full),), (1500, 500))
    assert bucket_loads(stack_load(*looks, 50.0), [Owner(1, 0), Owner(1, 0)]) == pytest.approx([0.675, 0.225])


def test_loads_of_buckets_that_were_not_read_are_unknown() -> None:
    load = stack_load(Snapshot(0.0, (engine(1, 2),)), Snapshot(2.0, (engine(1, 4),)), 50.0)
    assert bucket_loads(load, [Owner(1, 0)]) is None


counts = st.integers(0, 2**64 - 1)


@given(st.floats(0, 1e9), counts, st.lists(counts, max_size=8))
def test_what_is_written_is_read(time: float, packets: int, buckets: list[int]) -> None:
    snapshot = Snapshot(time, (replace(engine(), packets=packets),), tuple(buckets))
    assert from_json(to_json(snapshot)) == snapshot


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"time": "x", "engines": []}', b'{"time": 1, "engines": [{"id": 1}]}']
)
def test_an_answer_that_is_no_load_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="load: "):
        from_json(data)


@pytest.mark.parametrize("time", ["NaN", "Infinity", "1e999", "-1"])
def test_an_answer_from_no_time_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match="load: time"):
        from_json(f'{{"time": {time}, "engines": []}}'.encode())


@pytest.mark.parametrize("number", [-1, 2**64, 10**400])
@pytest.mark.parametrize("field", ["packets", "dropped", "flows"])
def test_an_answer_with_a_number_that_is_no_counter_is_refused(field: str, number: int) -> None:
    with pytest.raises(ValueError, match=f"load: .*{field}"):
        from_json(to_json(Snapshot(1.0, (replace(engine(), **{field: number}),))))


def test_two_answers_at_nearly_one_time_say_nothing() -> None:
    assert engine_load(engine(at=2), engine(at=4), 5e-324) is None


def test_an_answer_larger_than_a_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="more engines"):
        from_json(to_json(Snapshot(1.0, (), (0,) * 10000)))
