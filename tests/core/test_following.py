"""An agent follows a flow table: it reaches it, one step after the other, and drops nothing on the way."""

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packetstack_core import kinds
from packetstack_core.assignment import NOBODY, Move, Owner
from packetstack_core.following import Assign, Attach, Attached, Detach, Mirrored, follow, table_is_live, target
from packetstack_core.kinds import FlowTableSpec
from packetstack_core.transitions import (
    AdoptKept,
    EndSet,
    EngineSet,
    MakeSet,
    PromoteSet,
    RetireSet,
    SetState,
    SwitchBuckets,
)

BUCKETS = 256


def table(
    owners: list[Owner | None], *engines: int | tuple[int, str], state: str = "Active", **spec: Any
) -> FlowTableSpec:
    """A table with engines of two queues; their pods are called after their ids, or as given."""
    named = [(e, f"uid-{e}") if isinstance(e, int) else e for e in engines]
    document: dict[str, Any] = {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "FlowTable",
        "metadata": {"name": "web"},
        "spec": {
            "node": "n1",
            "owners": kinds.encode_owners(owners),
            "engines": [
                {
                    "id": i, "name": f"web-{i}", "podUid": uid.replace("uid", "0"),
                    "state": state, "template": "ab", "queues": 2, "cores": 1,
                }
                for i, uid in named
            ],
            "listeners": [{"name": "a", "address": "192.0.2.1", "port": 80, "backends": {"endpoints": []}}],
            "snat": {"addresses": ["192.0.2.64/28"]},
            "flowTable": {"buckets": BUCKETS},
            **spec,
        },
    }  # fmt: skip
    return kinds.read(kinds.FlowTable, document).spec


def there(i: int, slot: int, ready: bool = True) -> Attached:
    return Attached(i, slot, f"0-{i}", ready)


def all_of(owner: Owner | None) -> list[Owner | None]:
    return [owner] * BUCKETS


def test_an_engine_whose_pod_runs_is_attached_once() -> None:
    wanted = table(all_of(NOBODY), 1)
    steps = follow(wanted, [], all_of(NOBODY), frozenset())
    assert [s.engine.id for s in steps if isinstance(s, Attach)] == [1]
    assert follow(wanted, [there(1, 7, ready=False)], all_of(NOBODY), frozenset()) == []


def test_buckets_go_to_the_engines_slot_when_it_serves() -> None:
    wanted = table(all_of(Owner(1, 1)), 1)
    assert follow(wanted, [there(1, 7, ready=False)], all_of(NOBODY), frozenset()) == []
    steps = follow(wanted, [there(1, 7)], all_of(NOBODY), frozenset({3}))
    assert steps == [Assign(tuple(Move(b, Owner(7, 1)) for b in range(BUCKETS) if b != 3))]


def test_an_engine_that_does_not_serve_now_keeps_its_buckets() -> None:
    wanted = table(all_of(Owner(2, 0)), 1, 2)
    steps = follow(wanted, [there(1, 7, ready=False), there(2, 8)], all_of(Owner(7, 0)), frozenset())
    assert steps == []


def test_buckets_of_a_lost_engine_go_to_others() -> None:
    wanted = table(all_of(Owner(2, 0)), 2)
    steps = follow(wanted, [there(2, 8)], all_of(Owner(7, 0)), frozenset())
    assert steps == [Assign(tuple(Move(b, Owner(8, 0)) for b in range(BUCKETS)))]


def test_an_engine_that_the_table_does_not_name_is_detached_when_it_owns_nothing() -> None:
    wanted = table(all_of(Owner(2, 0)), 2)
    both = [there(1, 7), there(2, 8)]
    assert Detach(7) not in follow(wanted, both, [Owner(7, 0), *all_of(Owner(8, 0))[1:]], frozenset())
    assert follow(wanted, both, all_of(Owner(8, 0)), frozenset()) == [Detach(7)]
    assert not table_is_live(wanted, both, all_of(Owner(8, 0)))
    assert table_is_live(wanted, both[1:], all_of(Owner(8, 0)))


def test_an_engine_that_has_not_finished_its_last_handover_is_not_detached() -> None:
    wanted = table(all_of(Owner(2, 0)), 2)
    both = [there(1, 7), there(2, 8)]
    assert follow(wanted, both, all_of(Owner(8, 0)), frozenset({3}), held={7, 8}) == []
    assert follow(wanted, both, all_of(Owner(8, 0)), frozenset(), held={8}) == [Detach(7)]


def test_an_engine_that_does_not_serve_and_is_named_no_more_is_detached_with_its_buckets() -> None:
    wanted = table(all_of(Owner(2, 0)), 2)
    both = [there(1, 7, ready=False), there(2, 8)]
    assert follow(wanted, both, all_of(Owner(7, 0)), frozenset()) == [Detach(7)]
    assert follow(wanted, both[1:], all_of(Owner(7, 0)), frozenset()) != []


def test_a_pod_of_the_same_name_is_another_engine() -> None:
    wanted = table(all_of(NOBODY), (1, "uid-9"))
    assert Detach(7) in follow(wanted, [there(1, 7)], all_of(NOBODY), frozenset())


def test_a_table_that_lost_its_owners_moves_nothing() -> None:
    assert follow(table(all_of(NOBODY), 1), [there(1, 7)], all_of(Owner(7, 0)), frozenset()) == []


def test_a_stack_that_shall_have_no_engine_gives_all_buckets_up() -> None:
    for wanted in (table(all_of(NOBODY)), table(all_of(NOBODY), 1, state="Draining")):
        steps = follow(wanted, [there(1, 7)], all_of(Owner(7, 0)), frozenset())
        assert Assign(tuple(Move(b, NOBODY) for b in range(BUCKETS))) in steps


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_following_ends_at_the_table_and_never_detaches_an_owner(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(1, 6), unique=True, min_size=1))
    wish = data.draw(
        st.lists(st.builds(Owner, st.sampled_from(ids), st.integers(0, 1)), min_size=BUCKETS, max_size=BUCKETS)
    )
    wanted = table(list(wish), *ids)
    before = data.draw(st.lists(st.integers(1, 9), unique=True))
    attached = [there(i, 100 + i) for i in before]
    lost = data.draw(st.lists(st.sampled_from(range(100, 112)), min_size=BUCKETS, max_size=BUCKETS))
    owners: list[Owner | None] = [Owner(s, 0) for s in lost]
    slot = 200
    for _ in range(8):
        steps = follow(wanted, attached, owners, frozenset())
        if not steps:
            break
        for step in steps:
            match step:
                case Attach(engine):
                    slot += 1
                    attached.append(Attached(engine.id, slot, engine.pod_uid, ready=data.draw(st.booleans())))
                case Assign(moves):
                    for move in moves:
                        owners[move.bucket] = move.to
                case Detach(gone):
                    assert gone not in {o.slot for o in owners if o}
                    attached = [a for a in attached if a.slot != gone]
        attached = [Attached(a.id, a.slot, a.pod_uid, ready=True) for a in attached]
    assert not follow(wanted, attached, owners, frozenset())
    assert table_is_live(wanted, attached, owners)
    assert sorted(a.id for a in attached) == sorted(ids)
    slots = {a.slot: a.id for a in attached}
    assert Counter((slots[o.slot], o.queue) for o in owners if o) == Counter((o.slot, o.queue) for o in wish)
    assert target(wanted, attached) == owners


# ---- two sets


def two(
    owners: list[Owner | None],
    *states: str,
    keepers: list[Owner | None] | None = None,
    gone: tuple[int, ...] = (),
    **first: Any,
) -> FlowTableSpec:
    """A table with sets of these states, numbered from 1: set n has the engines n and n + 10."""
    sets = [{"id": i, "state": state, **SET} for i, state in enumerate(states, 1) if state]
    sets[0] |= first
    ids = [e for i, state in enumerate(states, 1) for e in (i, i + 10) if state and e not in gone]
    engines = [
        {"id": i, "name": f"web-{i}", "podUid": f"0-{i}", "state": "Active", "template": "ab", "queues": 2, "cores": 1, "set": i % 10}
        for i in ids
    ]  # fmt: skip
    kept = {"previousOwners": kinds.encode_owners(keepers)} if keepers is not None else {}
    return table(owners, engines=engines, sets=sets, lastSet=len(states), **kept)


SET = {"replicas": 2, "template": "ab", "queues": 2, "since": "2026-11-30T12:00:00Z"}


def member(i: int, ready: bool = True) -> Attached:
    """Engine i, in slot 100 + i."""
    return Attached(i, 100 + i, f"0-{i}", ready, i % 10)


def known(*states: SetState) -> tuple[EngineSet, ...]:
    return tuple(EngineSet(i, state, 2, "ab", 2, 0.0) for i, state in enumerate(states, 1))


CURRENT, ACTIVATING, DRAINING = SetState.CURRENT, SetState.ACTIVATING, SetState.DRAINING
FIRST = [member(1), member(11)]
BOTH = [*FIRST, member(2), member(12)]


def test_a_set_gets_its_memory_before_its_engines() -> None:
    wanted = two(all_of(Owner(1, 0)), "Current", "Activating")
    alone = Mirrored((1,), 1, known(CURRENT), [1] * BUCKETS)
    assert follow(wanted, FIRST, all_of(Owner(101, 0)), frozenset(), mirrored=alone) == [
        MakeSet(known(CURRENT, ACTIVATING)[1])
    ]
    there = Mirrored((1, 2), 1, known(CURRENT, ACTIVATING), [1] * BUCKETS)
    steps = follow(wanted, FIRST, all_of(Owner(101, 0)), frozenset(), mirrored=there)
    assert [(s.engine.id, s.set) for s in steps if isinstance(s, Attach)] == [(2, 2), (12, 2)]
    assert not table_is_live(wanted, FIRST, all_of(Owner(101, 0)), alone)


def test_the_first_set_is_written_down_with_the_engines_that_there_are() -> None:
    wanted = two(all_of(Owner(1, 0)), "Current")
    before = Mirrored((1,), 1, (), [1] * BUCKETS)
    assert follow(wanted, FIRST, all_of(Owner(101, 0)), frozenset(), mirrored=before) == [MakeSet(known(CURRENT)[0])]


def test_buckets_are_switched_when_the_other_set_is_the_one_for_new_connections() -> None:
    wanted = two(all_of(Owner(2, 0)), "Draining", "Current", keepers=all_of(Owner(1, 0)))
    before = Mirrored((1, 2), 1, known(CURRENT, ACTIVATING), [1] * BUCKETS)
    assert follow(wanted, BOTH, all_of(Owner(101, 0)), frozenset(), mirrored=before) == [PromoteSet(2)]
    after = Mirrored((1, 2), 2, known(DRAINING, CURRENT), [1] * BUCKETS)
    moves = tuple(Move(b, Owner(102, 0)) for b in range(BUCKETS))
    assert follow(wanted, BOTH, all_of(Owner(101, 0)), frozenset(), mirrored=after) == [SwitchBuckets(moves)]
    mute = [member(1, ready=False), *BOTH[1:]]
    assert follow(wanted, mute, all_of(Owner(101, 0)), frozenset(), mirrored=after) == [], "it cannot say what it keeps"


def draining(keeper: int, owner: int = 102) -> tuple[list[Owner | None], Mirrored]:
    sets = Mirrored((1, 2), 2, known(DRAINING, CURRENT), [2] * BUCKETS, all_of(Owner(keeper, 0)))
    return all_of(Owner(owner, 0)), sets


def test_what_an_engine_that_is_gone_kept_goes_to_the_keeper_of_the_table() -> None:
    wanted = two(all_of(Owner(2, 0)), "Draining", "Current", keepers=all_of(Owner(11, 1)), gone=(1,))
    owners, sets = draining(101)
    adopt = AdoptKept(tuple(Move(b, Owner(111, 1)) for b in range(BUCKETS)))
    held = {101, 102}
    assert follow(wanted, BOTH, owners, frozenset(), held, sets) == [], "it serves still"
    assert follow(wanted, BOTH[1:], owners, frozenset(), held, sets) == [adopt]
    late = [member(11, ready=False), *BOTH[2:]]
    assert follow(wanted, late, owners, frozenset(), held, sets) == []


def test_an_engine_that_keeps_connections_is_not_detached() -> None:
    wanted = two(all_of(Owner(2, 0)), "Draining", "Current", keepers=all_of(Owner(1, 0)), gone=(1, 11))
    owners, sets = draining(101)
    assert follow(wanted, BOTH, owners, frozenset(), {101, 102}, sets) == [Detach(111)]
    assert not table_is_live(wanted, BOTH, owners, sets)


def test_a_set_that_the_table_names_no_more_ends_and_goes_when_its_engines_have_gone() -> None:
    wanted = two(all_of(Owner(2, 0)), "", "Current")
    owners, sets = draining(101)
    assert follow(wanted, BOTH[2:], owners, frozenset(), {102}, sets) == [EndSet(1, "Reset")]
    over = Mirrored((1, 2), 2, known(DRAINING, CURRENT), [2] * BUCKETS, [None] * BUCKETS)
    assert RetireSet(1) not in follow(wanted, BOTH, owners, frozenset(), {102}, over)
    assert follow(wanted, BOTH[2:], owners, frozenset(), {102}, over) == [RetireSet(1)]
    assert not table_is_live(wanted, BOTH[2:], owners, over)
    gone = Mirrored((2,), 2, known(DRAINING, CURRENT)[1:])
    assert follow(wanted, BOTH[2:], owners, frozenset(), {102}, gone) == []
    assert table_is_live(wanted, BOTH[2:], owners, gone)


def test_connections_that_are_to_end_are_ended() -> None:
    wanted = two(all_of(Owner(2, 0)), "Draining", "Current", keepers=all_of(Owner(1, 0)), ending=True)
    owners, sets = draining(101)
    assert follow(wanted, BOTH, owners, frozenset(), {101, 102}, sets) == [EndSet(1, "Reset")]


def test_a_third_set_waits_for_the_first_to_go() -> None:
    wanted = two(all_of(Owner(2, 0)), "", "Current", "Activating")
    owners, _ = draining(101)
    over = Mirrored((1, 2), 2, known(DRAINING, CURRENT), [2] * BUCKETS, [None] * BUCKETS)
    steps = follow(wanted, BOTH[2:], owners, frozenset(), {102}, over)
    assert steps == [RetireSet(1)]
    gone = Mirrored((2,), 2, known(DRAINING, CURRENT)[1:], [2] * BUCKETS)
    assert [s.set.id for s in follow(wanted, BOTH[2:], owners, frozenset(), {102}, gone) if isinstance(s, MakeSet)] == [
        3
    ]


def test_a_table_that_names_no_set_leaves_those_that_there_are() -> None:
    owners, sets = draining(101)
    steps = follow(table(all_of(NOBODY), 1, 2, 11, 12), BOTH, owners, frozenset(), {101, 102}, sets)
    assert steps == []
