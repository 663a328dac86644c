"""A second set of engines takes over by Mirror: connections stay where they are until they end, on real packets."""

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from tests.lab.node import BACKENDS, Node, ask, metric, stack
from tests.waiting import eventually

MIRROR = {"strategy": "Mirror"}
FLOWS = {"buckets": 256, "maxFlows": 20000, "tcpClosedTimeoutSeconds": 1, "tcpTimeWaitTimeoutSeconds": 1}


@pytest.fixture(autouse=True)
def _up(node: Node) -> Iterator[None]:
    node.up(stack(handover=MIRROR, flowTable=FLOWS))
    yield
    node.packetstack("down", "web")


def test_a_second_set_takes_new_connections_and_the_first_goes_when_its_own_have_ended(node: Node) -> None:
    before = [node.connect() for _ in range(40)]
    for connection in before:
        ask(connection)
    node.packetstack("scale", "web", "--replicas", "3")
    eventually(lambda: "BucketsSwitched" in node.reasons())
    after = [node.connect() for _ in range(40)]
    for connection in (*before, *after):
        ask(connection)
    _both_sets_are_shown_and_every_packet_is_counted(node)
    for connection in before:
        connection.close()
    seen = [(s["mirrored"], s["rejected"].get("not_kept", 0)) for s in _first_set_until_it_goes(node)]
    assert seen == sorted(seen), "a set's counters never fall, while its engines go neither"
    assert [s["state"] for s in node.status()["sets"]] == ["Current"]
    assert "no transition" in node.packetstack("transitions", "web")
    assert json.loads(node.packetstack("transitions", "-o", "json")) == []
    for connection in after:
        ask(connection)
        connection.close()


def _first_set_until_it_goes(node: Node) -> Iterator[dict[str, Any]]:
    """As it is shown, as often as can be asked."""
    deadline = time.monotonic() + 30
    while len(sets := node.status()["sets"]) > 1:
        assert time.monotonic() < deadline, sets
        yield sets[0]
    assert "SetRetired" in node.reasons()


def test_row_27_at_the_deadline_both_ends_of_a_connection_that_goes_on_are_reset(node: Node) -> None:
    node.up(stack(handover=MIRROR | {"deadlineSeconds": 1, "onDeadline": "Reset"}, flowTable=FLOWS))
    old = node.connect()
    ask(old)
    node.packetstack("scale", "web", "--replicas", "1")
    eventually(lambda: "SetEnded" in node.reasons())
    with pytest.raises(ConnectionResetError), old:
        eventually(lambda: not ask(old))  # asks again and again
    young = node.connect()
    eventually(lambda: "SetRetired" in node.reasons(), 30)
    with young:
        ask(young)


def test_row_24_limits_hold_over_both_sets_together(node: Node) -> None:
    limits = {"maxFlows": 30, "maxFlowsPerClient": 22}
    node.up(stack(handover=MIRROR, flowTable=FLOWS, listeners=[stack()["spec"]["listeners"][0] | {"limits": limits}]))
    greedy, modest = node.lab.client_addresses[:2]
    with contextlib.ExitStack() as held:

        def fill(client: str, most: int) -> int:
            """How many of so many connections the client gets."""
            for served in range(most):
                try:
                    ask(held.enter_context(node.connect(source=(client, 0), timeout_seconds=0.5)))
                except OSError:
                    return served
            return most

        assert (fill(greedy, 18), fill(modest, 2)) == (18, 2)
        node.packetstack("scale", "web", "--replicas", "1")
        eventually(lambda: _all_is_switched(node))
        assert fill(greedy, 30) == 22 - 18
        assert fill(modest, 30) == 30 - 22 - 2


def test_least_flows_counts_what_the_first_set_keeps_and_explain_finds_it_there(node: Node) -> None:
    [both, *_] = stack()["spec"]["listeners"]
    both |= {"balancing": "LeastFlows"}
    first = both | {"backends": {"endpoints": both["backends"]["endpoints"][:1]}}
    node.up(stack(handover=MIRROR, flowTable=FLOWS, listeners=[first]))
    with contextlib.ExitStack() as held:
        old = [held.enter_context(node.connect()) for _ in range(8)]
        assert {ask(connection) for connection in old} == {BACKENDS[0]}
        node.up(stack(handover=MIRROR, flowTable=FLOWS, listeners=[both]))
        node.packetstack("scale", "web", "--replicas", "1")
        eventually(lambda: _all_is_switched(node))
        young = [held.enter_context(node.connect()) for _ in range(8)]
        assert Counter(ask(connection) for connection in young) == {BACKENDS[1]: 8}
        assert [b["flows"] for b in node.status()["backends"]] == [8, 8]
        kept, own = (_explained(node, connection) for connection in (old[0], young[0]))
        old_slots = {e["slot"] for e in node.status()["engines"] if e["set"] == 1}
        assert kept["keeper"]["slot"] in old_slots
        assert kept["owner"]["slot"] not in old_slots
        assert kept["flow"]["state"] == "established"
        assert kept["why"].endswith("of the set before, which keeps this flow")
        assert (own["owner"]["slot"], own["keeper"]) == (kept["owner"]["slot"], None)
        assert own["why"].endswith(f"-> engine {own['owner']['slot']}, which keeps this flow")


def _all_is_switched(node: Node) -> bool:
    """Whether a second set has all buckets."""
    sets = node.status().get("sets", ())
    return len(sets) == 2 and bool(sets[1]["buckets"] == FLOWS["buckets"])


def _explained(node: Node, connection: socket.socket) -> dict[str, Any]:
    (client, sport), (address, port) = connection.getsockname()[:2], connection.getpeername()[:2]
    said: dict[str, Any] = json.loads(
        node.packetstack("explain", "web", f"tcp {client}:{sport} {address}:{port}", "-o", "json")
    )
    return said


def _both_sets_are_shown_and_every_packet_is_counted(node: Node) -> None:
    """While the first set keeps 40 connections and the second has 40."""
    shown = json.loads(node.packetstack("transitions", "web", "-o", "json"))
    old, new = shown["sets"]
    assert (old["state"], old["ready"], old["buckets"]) == ("Draining", 2, 0)
    assert 0 < old["keptBuckets"] <= old["connections"], "a bucket without a connection is not mirrored"
    assert (new["state"], new["ready"], new["buckets"], new["keptBuckets"]) == ("Current", 3, 256, 0)
    assert old["connections"] >= 40
    assert old["rejected"]["not_kept"] > 0
    assert new["rejected"]["kept"] > 0
    for words in (("transitions",), ("describe", "web"), ("top", "--once")):
        said = node.packetstack(*words)
        assert f"256 of 256 switched; {old['keptBuckets']} kept by both" in said
        assert "not_kept" in said
    eventually(lambda: _accounted(metric(node.client, "packetstack_engine_packets_total", "event")))
    assert (
        metric(node.client, "packetstack_rejected_packets_total", "reason")["not_kept"] >= old["rejected"]["not_kept"]
    )
    assert metric(node.client, "packetstack_kept_connections", "set") == {"1": old["connections"]}
    assert not any("rejected" in name for reasons in node.status()["drops"].values() for name in reasons)


def _accounted(frames: Counter[str]) -> bool:
    """Nothing is without a reason, and of two copies one is rejected."""
    rejected = sum(n for name, n in frames.items() if name.startswith("rejected_"))
    dropped = sum(n for name, n in frames.items() if name.startswith("drop_"))
    return (
        frames["received"] == frames["forwarded"] + dropped + rejected
        and frames["mirrored"] == 2 * rejected > 0
        and 64 * rejected <= frames["copied_bytes"] < frames["received_bytes"]
    )
