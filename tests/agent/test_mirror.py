"""A second set of engines takes over by Mirror: connections stay where they are until they end, on real packets."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from tests.lab.node import Node, ask, metric, stack
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


def test_row_24_a_listeners_limit_holds_over_both_sets_together(node: Node) -> None:
    limited = [li | {"limits": {"maxFlows": 30}} for li in stack()["spec"]["listeners"]]
    node.up(stack(handover=MIRROR, flowTable=FLOWS, listeners=limited))
    old = [node.connect() for _ in range(20)]
    for connection in old:
        ask(connection)
    node.packetstack("scale", "web", "--replicas", "1")
    eventually(lambda: "BucketsSwitched" in node.reasons())
    young, answered = [], 0
    with contextlib.suppress(OSError):
        while answered < 30:
            young.append(node.connect(timeout_seconds=0.5))
            ask(young[-1])
            answered += 1
    for connection in (*old, *young):
        connection.close()
    assert answered == 10


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
