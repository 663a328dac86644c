"""What the agent says of a flow. The stack is played: no engines, no packets."""

from array import array
from typing import Any

import pytest
from tests.model.node import PlayedStack, resource

from packetstack_agent.errors import AgentError
from packetstack_agent.explaining import Flow, explain
from packetstack_core import hashing
from packetstack_core.assignment import NOBODY, Owner

WEB = Flow.of("tcp", "10.0.0.9", 40000, "192.0.2.10", 80)


class Asked(PlayedStack):
    """A stack whose words can be read."""

    key = (1, 2)

    def words(self) -> "array[int]":
        return array("Q", [7 << 32 | owner.slot << 22 | owner.queue << 16 for owner in self.table])

    def flows(self, bucket: int) -> tuple[list[Any], list[Any]]:
        return [], []

    def parts(self, listener: Any) -> list[int]:
        return [1] * len(self.usable(listener))


def test_a_flow_is_followed_from_its_hash_to_its_backend() -> None:
    stack = Asked(resource(), owners=(1, 2))
    said = explain(stack, {}, WEB)
    bucket = hashing.flow_hash(*stack.key, WEB.client, WEB.address, 40000, 80, 6) % len(stack.table)
    slot = stack.table[bucket].slot
    assert said["bucket"] == bucket
    assert said["owner"] == {"slot": slot, "queue": 0, "epoch": 7}
    assert f"-> engine {slot}; no such flow yet, Maglev would choose 10.0.0.1 port 8080, one of 1" in said["why"]
    assert "-> engine shop-3;" in explain(stack, {slot: "shop-3"}, WEB)["why"]


def test_it_is_said_what_drops_a_packet() -> None:
    stack = Asked(resource(), owners=(1,))
    [listener] = stack.resource.spec.listeners
    elsewhere = Flow.of("udp", "10.0.0.9", 40000, "192.0.2.10", 80)
    assert explain(stack, {}, elsewhere)["why"] == (
        "no listener of stack web has UDP 192.0.2.10 port 80; not our traffic"
    )
    stack.healthy = {(place, listener.health_check): False for place, _ in stack.usable(listener)}
    assert "dropped as no_backend" in explain(stack, {}, WEB)["why"]
    stack.table = [NOBODY] * len(stack.table)
    assert "dropped as no_owner" in explain(stack, {}, WEB)["why"]
    stack.table = [Owner(1, 0)] * len(stack.table)
    narrow = listener.model_copy(update={"allowed_sources": ()})
    spec = stack.resource.spec.model_copy(update={"listeners": (narrow,)})
    stack.resource = stack.resource.model_copy(update={"spec": spec})
    assert "dropped as not_allowed" in explain(stack, {}, WEB)["why"]


@pytest.mark.parametrize(
    ("protocol", "source", "destination", "why"),
    [
        ("sctp", "10.0.0.1", "192.0.2.10", "not a flow"),
        ("tcp", "somebody", "192.0.2.10", "not a flow"),
        ("tcp", "10.0.0.1", "2001:db8::1", "is of two families"),
    ],
)
def test_what_is_no_flow_is_refused_with_an_example(protocol: str, source: str, destination: str, why: str) -> None:
    with pytest.raises(AgentError, match=why):
        Flow.of(protocol, source, 1, destination, 2)
