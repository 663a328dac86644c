"""What is shown of a stack of a cluster: the operator's part from the resources, the agent's from the stack's node."""

from typing import Any

from packetstack_cli import shapes
from packetstack_core.verbs import Json


def a_set(number: int, state: str, **more: Any) -> Json:
    return {"id": number, "state": state, "buckets": 0, "keptBuckets": 0, "connections": 0, "silentSince": "", **more}


def merged(told: list[Json], known: list[Json]) -> list[Json]:
    """Sets of a stack whose resource and agent say this of them."""
    rebalance = {"lastMoves": [], "queuesMoved": 0}
    status = {"engines": [], "rebalance": rebalance, "sets": told}
    live = {**status, "flows": 7, "drops": {}, "backends": [], "handover": {}, "sets": known}
    found: list[Json] = shapes.merged(status, live)["sets"]
    return found


def test_what_sets_have_mirrored_rejected_and_left_is_the_agents_number() -> None:
    told = [a_set(4, "Draining", connections=128, engines=2), a_set(5, "Current", buckets=256, engines=3)]
    known = [
        a_set(4, "Draining", connections=200, keptBuckets=180, mirrored=9, rejected={"not_kept": 5}, endsInSeconds=3.5),
        a_set(5, "Current", buckets=250, mirrored=9, rejected={"kept": 4}, endsInSeconds=None),
    ]
    first, second = merged(told, known)
    assert (first["connections"], first["keptBuckets"], first["endsInSeconds"]) == (200, 180, 3.5)
    assert (first["mirrored"], first["rejected"]) == (9, {"not_kept": 5})
    assert (first["engines"], second["engines"], second["buckets"]) == (2, 3, 256)
    assert second["rejected"] == {"kept": 4}


def test_an_agent_that_has_not_heard_of_a_sets_state_says_nothing_of_what_it_has_left() -> None:
    told = [a_set(4, "Draining", connections=128, keptBuckets=128), a_set(5, "Current")]
    known = [a_set(4, "Current", mirrored=0, rejected={})]
    first, second = merged(told, known)
    assert (first["connections"], first["keptBuckets"], first["mirrored"]) == (128, 128, 0)
    assert second == a_set(5, "Current")
