"""A second set of engines takes over by Mirror: connections stay where they are until they end, on real packets."""

from collections.abc import Iterator

import pytest
from tests.lab.node import Node, ask, stack
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
    for connection in before:
        connection.close()
    eventually(lambda: "SetRetired" in node.reasons(), 30)
    for connection in after:
        ask(connection)
        connection.close()


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
