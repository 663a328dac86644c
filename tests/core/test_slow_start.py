"""Slow start: a cold backend gets little, then more, then its share; nobody else loses by it."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packetstack_core import maglev, slow_start

WARM, COLD = "warm", "cold"
SECONDS = st.sampled_from([1, 2, 7, 10, 60, 3600])


def known(now: float) -> dict[str, float]:
    """Both backends, when the cold one came at `now`."""
    before = slow_start.since(None, [WARM], 0.0)
    return slow_start.since(before, [WARM, COLD], now)


def share(age: float, seconds: int) -> float:
    """What the cold backend has of its share."""
    warm, cold = slow_start.parts([WARM, COLD], known(1000.0), seconds, 1000.0 + age)
    return cold / warm


@given(SECONDS)
def test_a_share_begins_small_rises_and_is_whole_at_the_end(seconds: int) -> None:
    shares = [share(seconds * i / 40, seconds) for i in range(41)]
    assert shares == sorted(shares)
    assert shares[0] == 1 / (1 + min(seconds, slow_start.STEPS))
    assert shares[-2] < shares[-1] == 1
    assert share(1e9, seconds) == 1


@given(SECONDS, st.floats(0, 1))
def test_a_share_is_never_further_from_a_straight_line_than_a_step(seconds: int, fraction: float) -> None:
    assert abs(share(fraction * seconds, seconds) - fraction) <= 1 / min(seconds, slow_start.STEPS)


@given(SECONDS)
def test_every_step_is_announced_none_is_shorter_than_a_second_and_there_are_at_most_ten(seconds: int) -> None:
    now, steps = 1000.0, []
    while (then := slow_start.next_step(known(1000.0), seconds, now)) < math.inf:
        assert then - now >= 0.999
        assert share(then - 1000.0 - 1e-3, seconds) == share(now - 1000.0 + 1e-3, seconds)
        steps.append(then)
        now = then + 1e-6
    assert len(steps) == min(seconds, slow_start.STEPS)
    assert steps[-1] == pytest.approx(1000.0 + seconds)


def test_without_slow_start_a_new_backend_has_its_share_at_once() -> None:
    assert slow_start.parts([WARM, COLD], known(1000.0), 0, 1000.0) == [1, 1]
    assert slow_start.next_step(known(1000.0), 0, 1000.0) == math.inf


def test_backends_of_the_first_look_have_their_shares_so_a_new_agent_changes_nothing() -> None:
    first = slow_start.since(None, [WARM, COLD], 5.0)
    assert slow_start.parts([WARM, COLD], first, 60, 5.0) == [1, 1]
    assert slow_start.next_step(first, 60, 5.0) == math.inf


def test_a_backend_that_was_away_begins_again() -> None:
    away = slow_start.since(known(0.0), [WARM], 100.0)
    back = slow_start.since(away, [WARM, COLD], 200.0)
    assert back == {WARM: -math.inf, COLD: 200.0}
    assert slow_start.since(back, [COLD, WARM], 230.0) == back, "looking again changes nothing"


def test_where_all_rise_together_all_have_their_shares() -> None:
    nobody = slow_start.since(None, [], 0.0)
    back = slow_start.since(nobody, [WARM, COLD], 50.0)
    assert slow_start.parts([WARM, COLD], back, 60, 51.0) == [1, 1]


def test_a_rise_takes_nothing_from_the_shares_that_others_have_among_themselves() -> None:
    backends = [(f"10.0.0.{i}", 1 + i % 3) for i in range(8)]
    whole = maglev.table(backends, 1021)
    steady = maglev.table([(n, 0 if i == 5 else w) for i, (n, w) in enumerate(backends)], 1021)
    for part in range(1, 11):
        entries = maglev.rising(whole, steady, [part if i == 5 else 11 for i in range(8)])
        assert entries.count(5) == math.ceil(whole.count(5) * part / 11)
        left, total = 1021 - entries.count(5), sum(weight for _, weight in backends) - backends[5][1]
        for i, (_, weight) in enumerate(backends):
            assert i == 5 or abs(entries.count(i) - left * weight / total) <= 12


@given(st.lists(st.integers(1, 11), min_size=2, max_size=8), st.integers(0, 7))
def test_a_step_moves_only_the_entries_that_its_backend_gets(parts: list[int], who: int) -> None:
    who %= len(parts)
    parts = [*parts, 11]
    parts[who] = min(parts[who], 9)
    backends = [(f"10.0.0.{i}", 1) for i in range(len(parts))]
    whole = maglev.table(backends, 251)
    steady = maglev.table([(n, w if part == 11 else 0) for (n, w), part in zip(backends, parts, strict=True)], 251)
    raised = [part + (i == who) for i, part in enumerate(parts)]
    before, after = (maglev.rising(whole, steady, p) for p in (parts, raised))
    for old, new in zip(before, after, strict=True):
        assert old == new or new == who


def test_at_the_end_of_a_rise_the_table_is_that_of_all() -> None:
    backends = [(f"10.0.0.{i}", 2) for i in range(4)]
    whole = maglev.table(backends, 251)
    steady = maglev.table([*backends[:3], (backends[3][0], 0)], 251)
    tables = [maglev.rising(whole, steady, [11, 11, 11, part]) for part in range(1, 12)]
    assert tables[-1] == whole
    changes = [sum(a != b for a, b in itertools.pairwise(column)) for column in zip(*tables, strict=True)]
    assert max(changes) == 1, "an entry changes once"
