"""Maglev tables: true shares, few changes, the same for everybody."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packetstack_core import maglev

backend_lists = st.lists(
    st.tuples(st.text("0123456789.:", min_size=1, max_size=12), st.integers(0, 5)),
    max_size=20,
    unique_by=lambda b: b[0],
)


def named(entries, backends):
    return [backends[i][0] for i in entries]


def endpoints(count, weight=1):
    return [(f"10.0.{i // 250}.{i % 250}:80", weight) for i in range(count)]


@given(backend_lists)
@settings(max_examples=60)
def test_every_entry_names_a_backend_that_has_weight(backends):
    entries = maglev.table(backends, 509)
    assert len(entries) == (509 if any(w for _, w in backends) else 0)
    assert all(backends[i][1] > 0 for i in entries)
    total = sum(w for _, w in backends)
    for i, (_, weight) in enumerate(backends):
        assert abs(entries.count(i) - 509 * weight / max(1, total)) <= 2


@given(backend_lists, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_the_backends_changes_nothing(backends, random):
    shuffled = random.sample(backends, len(backends))
    assert named(maglev.table(backends, 251), backends) == named(maglev.table(shuffled, 251), shuffled)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_shares_are_within_one_percent_of_the_mean_or_one_entry(count):
    size = maglev.size_for(count)
    entries = maglev.table(endpoints(count), size)
    shares = [entries.count(i) for i in range(count)]
    assert max(shares) - min(shares) <= max(1, 0.01 * size / count)


@pytest.mark.parametrize("count", [3, 10, 40])
def test_removing_one_backend_moves_little_besides_its_own_entries(count):
    before = endpoints(count)
    size = maglev.size_for(count)
    old = named(maglev.table(before, size), before)
    gone = before[count // 2][0]
    after = [b for b in before if b[0] != gone]
    new = named(maglev.table(after, size), after)
    needless = sum(o != n and o != gone for o, n in zip(old, new, strict=True))
    assert needless <= 0.1 * size, "plain modulo would move nearly all"


def test_a_changed_weight_moves_little_besides_the_difference():
    before = endpoints(10, 2)
    after = [(before[0][0], 1), *before[1:]]
    old, new = (named(maglev.table(b, 4093), b) for b in (before, after))
    changed = sum(o != n for o, n in zip(old, new, strict=True))
    assert changed <= 0.25 * 4093


def test_a_backend_of_weight_zero_gets_nothing():
    assert set(maglev.table([("a", 1), ("b", 0), ("c", 3)], 251)) == {0, 2}
    assert maglev.table([("a", 0)], 251) == []
    assert maglev.table([], 251) == []


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="size: 250 is not a prime"):
        maglev.table([("a", 1)], 250)
    with pytest.raises(ValueError, match="twice"):
        maglev.table([("a", 1), ("a", 1)], 251)
    with pytest.raises(ValueError, match="too small"):
        maglev.table(endpoints(251), 251)
    with pytest.raises(ValueError, match="negative"):
        maglev.table([("a", -1)], 251)


def test_sizes_are_primes_that_fit_the_configuration():
    for p in maglev.PRIMES:
        assert all(p % d for d in range(2, int(p**0.5) + 1))
    assert maglev.size_for(0) == maglev.size_for(1) == 251
    assert maglev.size_for(40) == 4093
    assert maglev.size_for(4096) == maglev.PRIMES[-1]


def test_a_table_of_4093_takes_less_than_20_ms():
    def timed():
        start = time.thread_time()
        maglev.table(endpoints(40), 4093)
        return time.thread_time() - start

    assert min(timed() for _ in range(3)) < 0.02
