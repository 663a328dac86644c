"""What is let through of packets of strangers while engines have more to do than they can, by looks at made-up engines."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packetstack_core.shedding import AT_REST, EMPTY, QUIET_LOOKS, Sample, State, admitted, level_for, step

LOOK = 0.1
RING = 2048
BEHIND = Sample(busy=1.0, depth=0.9, handled=20_000.0)


@dataclass
class Engine:
    """Handles `capacity` packets a second; a stranger's packet takes `each` of them, with its answer."""

    capacity: float
    known: float
    each: float = 1.0
    state: State = AT_REST
    waiting: float = 0.0
    lost: list[float] = field(default_factory=list)
    """Share of the packets, by look, that found its ring full."""

    def look(self, offered: dict[object, float]) -> State:
        come = (self.known + self.each * admitted(offered, self.state.level)) * LOOK
        done = min(self.capacity * LOOK, self.waiting + come)
        left = self.waiting + come - done
        self.waiting = min(left, RING)
        self.lost.append((left - self.waiting) / come if come else 0.0)
        seen = dict(offered) if self.state.watched else None
        busy = done / (self.capacity * LOOK)
        self.state = step(self.state, Sample(busy, self.waiting / RING, done / LOOK, seen))
        return self.state


@pytest.mark.parametrize(
    ("offered", "total", "level"),
    [
        ({"a": 100.0}, 50.0, 50.0),
        ({"a": 100.0, "b": 10.0}, 60.0, 50.0),
        ({"a": 100.0, "b": 100.0, "c": 10.0}, 110.0, 50.0),
        ({"a": 100.0, "b": 100.0}, 50.0, 25.0),
        ({"a": 10.0, "b": 5.0}, 60.0, 10.0),
        ({}, 60.0, 0.0),
    ],
)
def test_who_wants_less_than_the_level_gets_all_and_the_others_get_the_same(
    offered: dict[object, float], total: float, level: float
) -> None:
    assert level_for(offered, total) == pytest.approx(level)


@pytest.mark.parametrize(
    "sample",
    [Sample(busy=1.0, depth=0.2), Sample(busy=0.3, depth=1.0), Sample(busy=0.0, depth=1.0)],
    ids=["busy with empty rings", "a ring that was full for a moment", "a core that stands still"],
)
def test_engines_that_are_not_behind_are_not_watched(sample: Sample) -> None:
    assert step(AT_REST, sample) == AT_REST


def test_first_it_is_counted_who_sends_and_only_then_something_is_dropped() -> None:
    watched = step(AT_REST, BEHIND)
    assert watched.watched
    assert watched.level is None
    assert step(watched, BEHIND).level is None, "nothing is known of the strangers yet"
    sample = Sample(1.0, 0.9, 20_000.0, {"flooded": 30_000.0, "other": 50.0})
    level = step(watched, sample).level
    assert level is not None
    assert 50.0 < level < 20_000.0


def test_strangers_are_not_dropped_when_known_flows_are_too_many() -> None:
    engine = Engine(capacity=20_000, known=40_000)
    for _ in range(100):
        assert engine.look({"a": 200.0, "b": 10.0}).level is None


def test_strangers_are_let_through_again_when_it_does_not_help_to_drop_them_unless_they_are_many() -> None:
    few = Engine(capacity=20_000, known=40_000)
    cut = sum(few.look({"a": 3_000.0}).level is not None for _ in range(600))
    assert 0 < cut < 200
    many = Engine(capacity=20_000, known=40_000)
    cut = sum(many.look({"a": 60_000.0}).level is not None for _ in range(600))
    assert cut > 590


def test_full_rings_that_empty_are_reason_enough_to_wait() -> None:
    state = State(watched=True, level=1000.0, depth=1.0)
    offered: dict[object, float] = {"flooded": 30_000.0}
    assert step(state, Sample(1.0, 0.9, 20_000.0, offered)).level == 1000.0
    assert step(state, Sample(1.0, 1.0, 20_000.0, offered)).level == pytest.approx(1000.0), "not below what is no flood"
    lower = step(State(True, 10_000.0, 1.0), Sample(1.0, 1.0, 20_000.0, offered)).level
    assert lower is not None
    assert lower < 10_000.0


def test_when_the_flood_is_over_all_are_let_through_again() -> None:
    engine = Engine(capacity=20_000, known=1_000)
    for _ in range(50):
        engine.look({"flooded": 60_000.0, "other": 50.0})
    assert engine.state.level is not None
    looks = 0
    while engine.look({"flooded": 20.0, "other": 50.0}) != AT_REST:
        looks += 1
        assert looks <= QUIET_LOOKS + 30


def test_a_flood_in_bursts_does_not_begin_anew_each_time() -> None:
    engine = Engine(capacity=20_000, known=1_000)
    for at in range(300):
        engine.look({"flooded": 60_000.0 if at % 20 < 10 else 0.0, "other": 50.0})
    assert sum(engine.lost[20:]) == 0


rates = st.floats(min_value=0, max_value=1e6)


@given(
    capacity=st.floats(min_value=1e3, max_value=1e6),
    known=st.floats(min_value=0, max_value=0.6),
    each=st.sampled_from([1.0, 1.5, 2.0]),
    wants=st.lists(st.floats(min_value=0, max_value=4.0), min_size=1, max_size=8),
)
def test_engines_keep_up_and_only_who_wants_more_than_the_others_is_cut(
    capacity: float, known: float, each: float, wants: list[float]
) -> None:
    engine = Engine(capacity, known * capacity, each)
    offered: dict[object, float] = {i: want * capacity for i, want in enumerate(wants)}
    for _ in range(400):
        engine.look(offered)
    load = known * capacity + each * sum(offered.values())
    level = engine.state.level
    if load <= 0.9 * capacity:
        assert level is None
        assert sum(engine.lost) == 0
        return
    if load < 1.1 * capacity:
        return  # about as much as it can
    assert level is not None
    late = engine.lost[200:]
    assert sum(late) / len(late) < 0.01, "known flows lose nothing to speak of"
    used = known * capacity + each * admitted(offered, level)
    assert used > 0.7 * capacity, "and the engine's time is used"
    fair = level_for(offered, (capacity - known * capacity) / each)
    assert level >= 0.6 * fair, "whoever wants less than a fair share is let through"


@given(depths=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), rates, rates), max_size=60))
def test_a_level_is_positive_and_is_given_up_when_nothing_is_dropped(
    depths: list[tuple[float, float, float, float]],
) -> None:
    state = AT_REST
    for busy, depth, handled, want in depths:
        state = step(state, Sample(busy, depth, handled, {"a": want} if state.watched else None))
        assert state.level is None or state.level >= 0
    for _ in range(1000):
        state = step(state, Sample(0.1, EMPTY / 2, 1000.0, {"a": 0.0} if state.watched else None))
    assert state == AT_REST
