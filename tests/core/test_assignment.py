"""Min-move planning against independent oracles: brute force over all splits, and a maximum matching."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packetstack_core.assignment import NOBODY, EngineShare, Move, Owner, assign, moved, quotas, spread_queues


def engines_moves(current, moves):
    """Moves that change the engine, not only the queue."""
    return sum(current[m.bucket] is None or current[m.bucket].slot != m.to.slot for m in moves)


def counts(owners, slots):
    return {slot: sum(o is not None and o.slot == slot for o in owners) for slot in slots}


@st.composite
def situations(draw, most_engines=6, most_buckets=64):
    engines = [
        EngineShare(slot, draw(st.integers(1, 5)), draw(st.sampled_from([0.5, 1.0, 1.0, 1.0, 2.0, 3.3])))
        for slot in draw(st.lists(st.integers(1, 9), min_size=1, max_size=most_engines, unique=True))
    ]
    owner = st.none() | st.builds(Owner, st.integers(0, 9), st.integers(0, 5))
    return draw(st.lists(owner, max_size=most_buckets)), engines


@given(situations())
def test_a_plan_is_complete_fair_and_at_rest(situation):
    current, engines = situation
    moves = assign(current, engines)
    after = moved(current, moves)
    assert [m.bucket for m in moves] == sorted({m.bucket for m in moves}), "each bucket at most once, in order"
    assert all(current[m.bucket] != m.to for m in moves), "no move that changes nothing"
    by_slot = {e.slot: e for e in engines}
    assert all(o is not None and o.slot in by_slot and 0 <= o.queue < by_slot[o.slot].queues for o in after)
    whole = sum(e.weight for e in engines)
    for e in engines:
        owned = [o.queue for o in after if o.slot == e.slot]
        assert abs(len(owned) - len(current) * e.weight / whole) < 1 + 1e-9
        per_queue = [owned.count(q) for q in range(e.queues)]
        assert max(per_queue) - min(per_queue) <= 1
    assert assign(after, engines) == [], "a second plan at the goal is empty"
    assert assign(current, engines) == moves, "the same question has the same answer"


@given(situations())
def test_no_allowed_split_between_engines_needs_fewer_moves(situation):
    """Brute force over every rounding of the exact shares: moves = buckets - those that may stay."""
    current, engines = situation
    total = len(current)
    whole = sum(e.weight for e in engines)
    exact = [total * e.weight / whole for e in engines]
    near = [round(x) if abs(x - round(x)) < 1e-9 else None for x in exact]
    choices = [[n] if n is not None else [int(x), int(x) + 1] for x, n in zip(exact, near, strict=True)]
    present = counts(current, [e.slot for e in engines])
    least = min(
        total - sum(min(share, present[e.slot]) for share, e in zip(split, engines, strict=True))
        for split in itertools.product(*choices)
        if sum(split) == total
    )
    assert engines_moves(current, assign(current, engines)) == least


@given(situations())
@settings(max_examples=500)
def test_no_queue_gives_and_gets_in_one_plan(situation):
    """Otherwise its parked packets could wait for each other: see `ownership.Protections.apart`."""
    current, engines = situation
    moves = assign(current, engines)
    assert not {current[m.bucket] for m in moves} & {m.to for m in moves}


def most_that_stay(queues, limits_sets):
    return max(sum(min(n, limit) for n, limit in zip(queues, limits, strict=True)) for limits in limits_sets)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_inside_an_engine_no_even_split_needs_fewer_moves(queues):
    current = [Owner(1, q) for q, n in enumerate(queues) for _ in range(n)]
    low, extra = divmod(len(current), len(queues))
    splits = [
        [low + (q in rounded) for q in range(len(queues))]
        for rounded in itertools.combinations(range(len(queues)), extra)
    ]
    least = len(current) - most_that_stay(queues, splits)
    assert len(assign(current, [EngineShare(1, len(queues))])) == least


@given(situations(most_engines=3, most_buckets=10))
def test_the_plan_with_queues_is_a_minimum_over_all_assignments(situation):
    """Among plans with the least moves between engines, none has fewer moves between queues: all splits are tried."""
    current, engines = situation
    moves = assign(current, engines)
    after = moved(current, moves)
    between = engines_moves(current, moves)
    shares = counts(after, [e.slot for e in engines])
    # What can stay on its queue, at most, if each engine gets this share: per engine over all even splits.
    stay = 0
    for e in engines:
        per_queue = [sum(o == Owner(e.slot, q) for o in current) for q in range(e.queues)]
        low, extra = divmod(shares[e.slot], e.queues)
        splits = [[low + (q in up) for q in range(e.queues)] for up in itertools.combinations(range(e.queues), extra)]
        stay += most_that_stay(per_queue, splits)
    assert len(moves) - between <= len(current) - between - stay
    assert len(moves) == len(current) - stay


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1), (1, 3), (3, 2), (7, 8), (64, 63), (10, 10)])
def test_resizing_moves_exactly_the_surplus(before, after):
    old = [EngineShare(i + 1, 4) for i in range(before)]
    new = [EngineShare(i + 1, 4) for i in range(after)]
    current = moved([None] * 4096, assign([None] * 4096, old))
    moves = assign(current, new)
    owned = counts(moved(current, moves), [e.slot for e in new])
    expected = sum(max(0, n - owned.get(slot, 0)) for slot, n in counts(current, [e.slot for e in old]).items())
    assert engines_moves(current, moves) == expected
    assert max(owned.values()) <= -(-4096 // after)
    if 4096 // after >= 100:
        assert max(owned.values()) / (4096 / after) <= 1.01


# ---- after a rebalance -------------------------------------------------------------------------------------------


def test_a_new_engine_is_new_once_also_where_buckets_are_few():
    current = [Owner(6, 0), Owner(6, 0), Owner(6, 0), Owner(3, 0), Owner(7, 0), Owner(4, 0)]
    engines = [EngineShare(slot, 1) for slot in range(1, 7)]
    after = moved(current, assign(current, engines, rebalanced=True))
    assert sorted(o.slot for o in after) == [1, 2, 3, 4, 5, 6]
    assert assign(after, engines, rebalanced=True) == []


@given(situations())
@settings(max_examples=300)
def test_after_a_rebalance_the_present_numbers_are_the_shares(situation):
    current, given_ = situation
    engines = [EngineShare(e.slot, e.queues) for e in given_]
    moves = assign(current, engines, rebalanced=True)
    after = moved(current, moves)
    by_slot = {e.slot: e for e in engines}
    assert all(o is not None and o.slot in by_slot and 0 <= o.queue < by_slot[o.slot].queues for o in after)
    assert assign(after, engines, rebalanced=True) == [], "a second plan at the goal is empty"
    before = counts(current, by_slot)
    now = counts(after, by_slot)
    owning = [slot for slot, n in before.items() if n]
    if not owning:
        assert max(now.values()) - min(now.values()) <= 1, "all are new"
        return
    held = sum(before.values())
    units = held + (len(engines) - len(owning)) * held / len(owning)
    for slot, n in now.items():
        exact = len(current) * (before[slot] or held / len(owning)) / units
        assert abs(n - exact) < 1 + 1e-9
    homeless = len(current) - held
    gained = sum(max(0, now[s] - before[s]) for s in by_slot)
    assert engines_moves(current, moves) == gained, "no engine gives and gets"
    assert gained == homeless or len(owning) < len(engines), "without a new engine only homeless buckets move"


@given(situations())
def test_after_a_rebalance_nothing_moves_without_a_new_engine_or_a_homeless_bucket(situation):
    current, engines = situation
    by_slot = {e.slot: e for e in engines}
    owned = [o for o in current if o is not None and o.slot in by_slot and o.queue < by_slot[o.slot].queues]
    owning = [e for e in engines if any(o.slot == e.slot for o in owned)]
    assert assign(owned, owning, rebalanced=True) == []


def test_after_a_rebalance_all_give_to_a_new_engine_and_take_from_a_leaver_in_proportion():
    current = [Owner(1, 0)] * 200 + [Owner(1, 1)] * 100 + [Owner(2, 0)] * 100
    joined = moved(current, assign(current, [EngineShare(s, 2) for s in (1, 2, 3)], rebalanced=True))
    assert counts(joined, (1, 2, 3)) == {1: 200, 2: 67, 3: 133}
    assert [sum(o == Owner(1, q) for o in joined) for q in (0, 1)] == [133, 67], "queues too give in proportion"
    assert [sum(o == Owner(3, q) for o in joined) for q in (0, 1)] == [67, 66], "a new engine's are even"
    left = moved(joined, assign(joined, [EngineShare(s, 2) for s in (1, 2)], rebalanced=True))
    assert counts(left, (1, 2)) == {1: 300, 2: 100}


def test_owners_that_are_gone_lose_their_buckets():
    current = [Owner(1, 0), Owner(2, 0), NOBODY, None]
    assert assign(current, [EngineShare(1, 1)]) == [Move(b, Owner(1, 0)) for b in (1, 2, 3)]


def test_buckets_on_queues_that_an_engine_no_longer_has_move_inside_it():
    assert assign([Owner(1, 7), Owner(1, 0)], [EngineShare(1, 2)]) == [Move(0, Owner(1, 1))]


def test_without_engines_nothing_moves():
    assert assign([Owner(1, 0), None], []) == []


def test_an_engine_of_weight_zero_gives_everything_away():
    current = [Owner(1, 0)] * 8
    assert {m.to.slot for m in assign(current, [EngineShare(1, 1, 0.0), EngineShare(2, 1)])} == {2}


def test_weights_are_followed():
    owners = moved([None] * 4096, assign([None] * 4096, [EngineShare(1, 1, 1.0), EngineShare(2, 3, 3.0)]))
    assert counts(owners, [1, 2]) == {1: 1024, 2: 3072}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ValueError, match="weights"):
        quotas(8, [1.0, weight], [0, 0])


def test_impossible_engines_are_refused():
    with pytest.raises(ValueError, match="each slot once"):
        assign([None], [EngineShare(1, 1), EngineShare(1, 1)])
    with pytest.raises(ValueError, match="engine 3: 0 queues"):
        assign([None], [EngineShare(3, 0)])


@given(st.integers(0, 9000), st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
@settings(max_examples=200)
def test_quotas_add_up_and_are_roundings(total, weights):
    shares = quotas(total, weights, [0] * len(weights))
    assert sum(shares) == total
    whole = sum(weights) or len(weights)
    for share, w in zip(shares, weights, strict=True):
        assert abs(share - total * (w if sum(weights) else 1) / whole) < 1 + 1e-6 * total


def test_a_thousand_engines_with_all_buckets_are_planned_without_a_step_for_each_pair_of_them():
    engines = [EngineShare(i + 1, 4) for i in range(1000)]
    current = moved([None] * 8192, assign([None] * 8192, engines))
    # Some 10 ms; the bench says how many. Eight million steps would take a second.
    assert max(min(timed(current, engines[k:]) for _ in range(3)) for k in (0, 10, 500)) <= 0.3


def timed(current, engines):
    start = time.thread_time()
    assign(current, engines)
    return time.thread_time() - start


@given(st.integers(0, 64), st.integers(1, 32))
def test_queues_are_spread_evenly_over_cores(queues, cores):
    placed = spread_queues(queues, cores)
    per_core = [placed.count(c) for c in range(cores)]
    assert sum(per_core) == queues
    assert max(per_core) - min(per_core) <= 1
