"""Sets of engines of several sizes take over from each other by Mirror, under traffic that knows whether it was served.

What is seen of each transition is gathered once, in `Seen`; tests look at one row each of what such a transition owes its users
(docs/checklist.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import pytest
from tests.lab.mirrored import (
    ALL_TCP,
    ALL_UDP,
    VIP,
    Mirrored,
    Segment,
    Wire,
    answers_to_one_opener,
    ask,
    mirrored,
    resets,
    sent_twice,
)
from tests.waiting import eventually

from packetstack_cli.traffic import Outcome, Traffic

SIZES = ((2, 4), (4, 2), (2, 1))


@dataclass
class Seen:
    """One transition, from before it began until the first set had gone."""

    old: set[int]
    """Slots of the first set."""
    new: set[int]
    processes: tuple[int, int] = (0, 0)
    """Of engines: when all buckets were switched, and when the first set had gone."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """Of connections and flows that were there before, and of those that came when all was switched."""
    client: list[Segment] = field(default_factory=list)
    server: list[Segment] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    """Connections that the first set has, by its own count: when all were switched, and as they were closed in steps."""
    known: list[int] = field(default_factory=list)
    """Those of them that the second set knew then."""
    mirrored: dict[str, int] = field(default_factory=dict)
    """Packets that the director had sent twice by that time: before and after connections were opened, when all buckets
    were switched, when the first set had gone, and when the last connections had closed."""
    in_transition: dict[str, Counter[str]] = field(default_factory=dict)
    """What engines of each set have counted during it."""
    remains: list[dict[str, int]] = field(default_factory=list)
    """What there was of engines before and after it."""
    memory: list[int] = field(default_factory=list)


def transition(node: Mirrored, replicas: int) -> Seen:
    """Goes through one, with traffic."""
    with ExitStack() as open_:
        mirrored = {"before": node.mirrored()}
        wires = Wire(node.lab, "client", "c0"), Wire(node.lab, "server", "s0")
        held = [open_.enter_context(node.connect(VIP, 80)) for _ in range(30)]
        before = Traffic(
            node.lab, ALL_TCP, ALL_UDP, connections=500, udp_flows=100, request_interval_ms=1000, udp_interval_ms=200,
            new_rate=40, ramp_seconds=0.7, name="before",
        )  # fmt: skip
        before.wait_open()
        mirrored["open"] = node.mirrored()
        seen = Seen(*node.switch(replicas))
        old, new = node.counters(seen.old), node.counters(seen.new)
        mirrored["switched"] = node.mirrored()
        seen.processes = (node.remains()["processes"], 0)
        after = Traffic(
            node.lab, ALL_TCP, ALL_UDP, connections=100, udp_flows=50, request_interval_ms=500, udp_interval_ms=200,
            ramp_seconds=0.3, name="after",
        )  # fmt: skip
        after.wait_open()
        count(node, seen, 500 + 100 + 30)  # short ones that began before have ended
        for connection in held:
            ask(connection)
        seen.in_transition = {"old": node.counters(seen.old) - old, "new": node.counters(seen.new) - new}
        retired = node.count("SetRetired")
        seen.outcomes["before"] = before.stop()
        for n in (30, 15):
            count(node, seen, n)
            for connection in held[n - 15 : n]:
                connection.close()
        node.retired(retired + 1)
        mirrored["retired"] = node.mirrored()
        seen.processes = (seen.processes[0], node.remains()["processes"])
        mirrored["after"] = node.mirrored()
        seen.outcomes["after"] = after.stop()
        seen.mirrored = mirrored
        seen.client, seen.server = (w.read() for w in wires)
    return seen


def count(node: Mirrored, seen: Seen, left: int) -> None:
    """Notes how many connections the first set has, and how many the second knows, once both have `left`, or else as last seen."""

    def look() -> bool:
        numbers.append((node.live(seen.old), node.kept()))
        return numbers[-1] == (left, left)

    numbers: list[tuple[int, int]] = []
    with suppress(AssertionError):
        eventually(look, 15)
    seen.live.append(numbers[-1][0])
    seen.known.append(numbers[-1][1])


@pytest.fixture(scope="module")
def lab() -> Iterator[Mirrored]:
    with mirrored("pkm-trans") as made:
        made.make(2)
        made.settle()
        yield made


@pytest.fixture(scope="module")
def seen(lab: Mirrored) -> dict[tuple[int, int], Seen]:
    """All three transitions, one after the other."""
    found = {}
    for sizes in SIZES:
        remains, memory = lab.remains(), lab.memory_bytes()
        found[sizes] = transition(lab, sizes[1])
        lab.settle()
        found[sizes].remains = [remains, lab.remains()]
        found[sizes].memory = [memory, lab.memory_bytes()]
    return found


@pytest.fixture(params=SIZES, ids=lambda sizes: "{}-to-{}".format(*sizes))
def one(request: pytest.FixtureRequest, seen: dict[tuple[int, int], Seen]) -> tuple[tuple[int, int], Seen]:
    return request.param, seen[request.param]


def test_row_8_the_second_set_is_distinct_and_complete(one: tuple[tuple[int, int], Seen]) -> None:
    (before, after), s = one
    assert (len(s.old), len(s.new)) == (before, after)
    assert not s.old & s.new
    assert s.processes == (3 * (before + after), 3 * after), "init, datapath and supervisor each"


def test_row_11_packets_are_mirrored_in_the_transition_and_no_longer(one: tuple[tuple[int, int], Seen]) -> None:
    _, s = one
    assert s.mirrored["before"] == s.mirrored["open"] < s.mirrored["retired"]
    assert s.mirrored["retired"] == s.mirrored["after"], "nothing is mirrored when the first set has gone"


def test_row_13_and_29_no_connection_breaks_and_none_is_reset(one: tuple[tuple[int, int], Seen]) -> None:
    _, s = one
    for name, outcome in s.outcomes.items():
        print(f"{name}: {outcome}")
        assert outcome.never_opened == 0
        assert outcome.broken == 0, outcome.what_broke()
    assert resets(s.client) == []
    assert resets(s.server) == []


def test_row_14_no_packet_is_handled_by_both_sets(one: tuple[tuple[int, int], Seen]) -> None:
    _, s = one
    print(f"{len(s.client)} packets at the client, {len(s.server)} at the server")
    assert sent_twice(s.client) == {}
    assert sent_twice(s.server) == {}
    assert answers_to_one_opener(s.client) == []
    assert all(o.datagrams_duplicated == 0 for o in s.outcomes.values())


def test_row_17_datagrams_of_old_and_new_flows_arrive_in_order(one: tuple[tuple[int, int], Seen]) -> None:
    _, s = one
    for outcome in s.outcomes.values():
        assert outcome.datagrams_sent > 0
        assert (outcome.datagrams_lost, outcome.datagrams_reordered) == (0, 0), outcome


def test_row_22_the_second_set_knows_each_connection_of_the_first(one: tuple[tuple[int, int], Seen]) -> None:
    _, s = one
    assert s.known == s.live == [500 + 100 + 30, 30, 15]
    assert s.in_transition["new"]["drop_no_flow"] == 0
    assert s.in_transition["old"]["drop_no_flow"] == 0


def test_row_25_the_first_set_counts_down_as_its_connections_close(one: tuple[tuple[int, int], Seen]) -> None:
    _, s = one
    assert s.live[1:] == [30, 15]


def test_row_28_all_of_a_set_is_freed(seen: dict[tuple[int, int], Seen]) -> None:
    before, after = seen[2, 4], seen[4, 2]  # two engines each
    print(f"{before.remains[0]}, {before.memory[0]} bytes; then {after.remains[1]}, {after.memory[1]} bytes")
    assert after.remains[1] == before.remains[0]
    assert abs(after.memory[1] - before.memory[0]) <= 0.05 * before.memory[0]
