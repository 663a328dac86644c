"""What somebody who does not see a connection can send to it, one by one; and how connections end by themselves."""

import operator
from collections.abc import Callable
from functools import partial

import pytest

from .endpoint import ACK, FIN, NUMBERS, RST, SYN, Flag, Segment, State
from .engine import VIP
from .world import World

MADE_UP = 0xDEAD0000
"""A number far outside of every window here."""


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def idle() -> World:
    """A connection that both ends hold and on which nothing is said."""
    world = World()
    world.open()
    world.client.send(b"question")
    world.settle()
    assert world.peer
    world.peer.send(b"answer")
    world.settle()
    world.time_passes(20)
    world.settle()
    return world


def still_held(world: World) -> None:
    """Both ends hold it, the engine does, it would be kept for hours, and it carries data both ways."""
    world.check()
    world.settle()
    world.check()
    assert world.peer
    assert world.flow
    assert world.flow.state == "ESTABLISHED"
    world.time_passes(300)
    before = len(world.peer.received)
    world.client.send(b"more")
    world.settle()
    world.peer.send(b"of it")
    world.settle()
    world.check()
    assert len(world.peer.received) == before + 4
    assert bytes(world.client.received).endswith(b"of it")


SEQUENCES = {
    "made up": lambda expected: MADE_UP,
    "one before the window": lambda expected: expected - 1,
    "one inside the window": lambda expected: expected + 1,
    "the middle of the window": lambda expected: expected + 30000,
    "the end of the window": lambda expected: expected + 65534,
    "behind the window": lambda expected: expected + 66000,
    "half of all numbers away": lambda expected: expected + (1 << 31),
}
DIRECTIONS = ("from the client", "from the backend")


def inject(
    world: World, direction: str, flags: Flag, sequence: Callable[[int], int], ack: int = 0, right: bool = True
) -> None:
    """A segment in that direction whose number is made from what its receiver expects."""
    receiver = world.peer if direction == DIRECTIONS[0] else world.client
    assert receiver
    segment = Segment(sequence(receiver.expected) % NUMBERS, ack, flags, 100)
    assert not right or not receiver.would_change(segment)
    (world.inject_to_backend if direction == DIRECTIONS[0] else world.inject_to_client)(segment, right)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_a_reset_with_a_number_that_is_not_exact_leaves_an_idle_connection_established(
    idle: World, direction: str, sequence: Callable[[int], int]
) -> None:
    inject(idle, direction, RST, sequence)
    still_held(idle)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_resets_by_the_thousand_leave_an_idle_connection_established(idle: World, direction: str) -> None:
    for number in range(2000):
        inject(idle, direction, RST, partial(operator.add, 7 + number * 2_000_003))
    still_held(idle)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("flags", [RST, RST | ACK, FIN | ACK, SYN, SYN | ACK, ACK], ids=repr)
def test_a_segment_with_a_wrong_checksum_changes_nothing_though_its_numbers_are_right(
    idle: World, direction: str, flags: Flag
) -> None:
    receiver = idle.peer if direction == DIRECTIONS[0] else idle.client
    assert receiver
    inject(idle, direction, flags, lambda expected: expected, receiver.next, right=False)
    still_held(idle)


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_a_reset_and_a_syn_leave_a_live_connection_established_and_out_of_a_floods_way(
    idle: World, sequence: Callable[[int], int]
) -> None:
    inject(idle, DIRECTIONS[0], RST, sequence)
    inject(idle, DIRECTIONS[0], SYN, sequence)
    still_held(idle)
    assert idle.flow
    idle.engine.flood(idle.flow.bucket, 20)
    still_held(idle)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("flags", [SYN, SYN | ACK], ids=repr)
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_a_syn_leaves_a_connection_established(
    idle: World, direction: str, flags: Flag, sequence: Callable[[int], int]
) -> None:
    inject(idle, direction, flags, sequence, MADE_UP)
    still_held(idle)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("ack", [MADE_UP, 0], ids=["made up", "zero"])
def test_a_fin_with_made_up_numbers_does_not_shorten_the_life_of_a_connection(
    idle: World, direction: str, sequence: Callable[[int], int], ack: int
) -> None:
    inject(idle, direction, FIN | ACK, sequence, ack)
    inject(idle, direction, FIN, sequence, ack)
    still_held(idle)


def test_fins_with_made_up_numbers_from_both_sides_do_not_close_a_connection(idle: World) -> None:
    for direction in DIRECTIONS:
        inject(idle, direction, FIN | ACK, SEQUENCES["made up"], MADE_UP)
    still_held(idle)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_data_and_acknowledgements_with_made_up_numbers_do_not_move_the_window_to_where_a_reset_is_believed(
    idle: World, direction: str
) -> None:
    inject(idle, direction, ACK, SEQUENCES["made up"], MADE_UP)
    inject(idle, DIRECTIONS[1 - DIRECTIONS.index(direction)], ACK, SEQUENCES["made up"], MADE_UP)
    inject(idle, direction, RST, SEQUENCES["made up"])
    inject(idle, direction, FIN | ACK, SEQUENCES["made up"], MADE_UP)
    still_held(idle)


@pytest.mark.parametrize("state", ["client closed", "backend closed"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("flags", [RST, FIN | ACK, SYN], ids=repr)
def test_nothing_made_up_ends_a_connection_of_which_one_side_still_sends(
    idle: World, state: str, direction: str, flags: Flag
) -> None:
    assert idle.peer
    one, other = (idle.client, idle.peer) if state == "client closed" else (idle.peer, idle.client)
    one.close()
    idle.settle()
    idle.check()
    inject(idle, direction, flags, SEQUENCES["made up"], MADE_UP)
    idle.settle()
    idle.check()
    idle.time_passes(60)
    other.send(b"the rest")
    idle.settle()
    idle.check()
    assert bytes(one.received).endswith(b"the rest")


# ---- opening ---------------------------------------------------------------------------------------------------


def half_open(world: World) -> None:
    """The backend has answered; the client has not."""
    world.client.connect()
    world.collect()
    world.through(world.sent.pop())
    world.arrive(world.passed.pop())
    world.through(world.sent.pop())
    assert world.flow
    assert world.flow.state == "SYN_ACK"


def opens(world: World) -> None:
    """It becomes a connection all the same."""
    for _ in range(5):
        world.settle()
        world.time_passes(1)
    world.settle()
    assert world.client.state is State.ESTABLISHED
    still_held(world)


@pytest.mark.parametrize("right", [False, True], ids=["wrong checksum", "wrong number"])
def test_an_acknowledgement_that_proves_nothing_does_not_establish(world: World, right: bool) -> None:
    place = world.strangers[0]
    world.inject(place, VIP, Segment(5, 0, SYN, 1000))
    world.arrive(world.passed.pop())
    backend = next(e for b in world.backends.values() for e in b.ends.values())
    world.through(world.sent.pop())
    world.passed.clear()
    number = backend.number + 1 if not right else MADE_UP
    world.inject(place, VIP, Segment(6, number, ACK, 1000), right)
    flow = world.engine.flow(place)
    assert flow
    assert flow.state in ("SYN", "SYN_ACK")
    assert not world.engine.survives_flood(flow)
    world.check()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("flags", [RST, RST | ACK, FIN | ACK, SYN, SYN | ACK, ACK], ids=repr)
@pytest.mark.parametrize("right", [True, False], ids=["", "wrong checksum"])
@pytest.mark.parametrize("when", ["asked", "answered"])
def test_nothing_made_up_disturbs_a_handshake(
    world: World, direction: str, flags: Flag, right: bool, when: str
) -> None:
    if direction == DIRECTIONS[1] and flags == SYN:
        # Two ends may ask each other, and a client believes it (RFC 9293, 3.5): made up is that it was asked.
        flags |= ACK
    if when == "asked":
        world.client.connect()
        world.collect()
        world.through(world.sent.pop())
    else:
        half_open(world)
    segment = Segment(MADE_UP, 0x12345678, flags, 100)
    (world.inject_to_backend if direction == DIRECTIONS[0] else world.inject_to_client)(segment, right)
    opens(world)


@pytest.mark.parametrize("when", ["asked", "answered"])
def test_a_made_up_syn_does_not_open_the_way_for_a_made_up_answer(world: World, when: str) -> None:
    if when == "asked":
        world.client.connect()
        world.collect()
        world.through(world.sent.pop())
    else:
        half_open(world)
    world.inject_to_backend(Segment(MADE_UP, 0, SYN, 100))
    world.inject_to_client(Segment(MADE_UP, 0x12345678, SYN | ACK, 100))
    opens(world)


def test_a_connection_opens_though_somebody_sent_a_syn_with_its_addresses_before(world: World) -> None:
    world.inject_to_backend(Segment(MADE_UP, 0, SYN, 100))
    world.client.connect()
    opens(world)


# ---- closing ---------------------------------------------------------------------------------------------------


def ended(world: World) -> None:
    """Both ends have, and so has the flow: it makes way, and is not kept for hours."""
    world.finish()
    assert world.client.state in (State.CLOSED, State.TIME_WAIT)
    assert world.peer is None or world.peer.state in (State.CLOSED, State.TIME_WAIT)
    assert world.engine_knows_the_end()
    assert not world.flow or world.flow.state in ("CLOSED", "TIME_WAIT")
    assert not world.flow or world.flow.state == "TIME_WAIT" or not world.engine.survives_flood(world.flow)


@pytest.mark.parametrize("first", ["client", "backend", "both"])
def test_an_orderly_close_closes_the_flow(idle: World, first: str) -> None:
    assert idle.peer
    ends = {"client": [idle.client, idle.peer], "backend": [idle.peer, idle.client]}.get(first)
    if ends:
        ends[0].close()
        idle.settle()
        idle.check()
        assert idle.flow
        assert idle.flow.state not in ("CLOSED", "TIME_WAIT")
        ends[1].send(b"last words")
        idle.settle()
        ends[1].close()
    else:
        idle.client.close()
        idle.peer.close()
    ended(idle)


@pytest.mark.parametrize("who", ["client", "backend"])
@pytest.mark.parametrize("in_flight", [False, True], ids=["quiet", "data in flight"])
@pytest.mark.parametrize("lost", [False, True], ids=["", "its reset is lost"])
def test_an_abort_closes_the_flow_whatever_is_in_flight(idle: World, who: str, in_flight: bool, lost: bool) -> None:
    assert idle.peer
    one, other = (idle.client, idle.peer) if who == "client" else (idle.peer, idle.client)
    if in_flight:
        one.send(b"x" * 3000)
        other.send(b"y" * 3000)
        idle.collect()
    one.abort()
    idle.collect()
    if lost:
        idle.sent.pop()
        idle.settle()
        if other.state is State.ESTABLISHED:
            other.close()
    ended(idle)


def test_data_that_a_reset_overtook_does_not_bring_the_flow_back(idle: World) -> None:
    assert idle.peer
    idle.peer.send(b"y" * 3000)
    idle.collect()
    idle.client.abort()
    idle.collect()
    idle.through(idle.sent.pop())  # the reset, ahead of the data
    while idle.sent:
        idle.through(idle.sent.pop(0))
    reset, *data = idle.passed
    idle.passed.clear()
    idle.arrive(reset)
    for packet in data:
        idle.arrive(packet)
    idle.sent.clear()  # what the client's closed port says of the data is lost
    assert idle.peer.state is State.CLOSED
    idle.check()
    assert not idle.flow or idle.flow.state == "CLOSED"


def test_a_made_up_reset_and_one_that_is_exact_close_the_flow_only_together_with_its_ends(idle: World) -> None:
    inject(idle, DIRECTIONS[0], RST, SEQUENCES["one inside the window"])
    still_held(idle)
    assert idle.peer
    idle.inject_to_backend(Segment(idle.peer.expected, 0, RST))
    idle.settle()
    assert idle.peer.state is State.CLOSED
    idle.client.close()
    idle.finish()
    assert idle.client.state in (State.CLOSED, State.TIME_WAIT)
    assert not idle.flow or idle.flow.state in ("CLOSED", "TIME_WAIT")


def test_a_client_port_is_used_again_as_soon_as_it_is_closed(idle: World) -> None:
    for first in ("backend", "client", "abort"):
        peer = idle.peer
        assert peer
        if first == "abort":
            idle.client.abort()
        else:
            one, other = (peer, idle.client) if first == "backend" else (idle.client, peer)
            one.close()
            idle.settle()
            other.close()
        ended(idle)
        if idle.client.state is State.TIME_WAIT:
            idle.client.time_passes(60)
        idle.reconnect()
        opens(idle)


def test_a_made_up_syn_after_the_close_establishes_nothing(idle: World) -> None:
    assert idle.peer
    idle.client.close()
    idle.settle()
    idle.peer.close()
    ended(idle)
    idle.inject_to_backend(Segment(MADE_UP, 0, SYN, 100))
    idle.passed.clear()
    for ack in (0, MADE_UP, 77):
        idle.inject_to_backend(Segment(MADE_UP + 1, ack, ACK, 100))
        idle.inject_to_client(Segment(MADE_UP, MADE_UP + 9, ACK, 100))
        assert idle.flow
        assert idle.flow.state != "ESTABLISHED"
    idle.check()


# ---- what is late ----------------------------------------------------------------------------------------------


def test_late_copies_of_a_handshake_leave_the_connection_established(world: World) -> None:
    world.client.connect()
    world.collect()
    copies = []
    while world.sent:
        copies.append(world.sent[0])
        world.through(world.sent.pop(0))
        world.arrive(world.passed.pop(0))
    assert len(copies) == 3
    world.client.send(b"question")
    world.settle()
    for order in (copies, copies[::-1], [copies[0], copies[1]], [copies[1], copies[2]]):
        for packet in order:
            world.through(packet)
            world.check()
    still_held(world)


def test_another_connection_is_kept_though_both_ends_forgot_the_one_before_unseen(idle: World) -> None:
    assert idle.peer
    idle.client.abort()
    idle.peer.abort()
    idle.collect()
    idle.sent.clear()  # both resets are lost
    assert idle.flow
    assert idle.flow.state == "ESTABLISHED"
    idle.reconnect()
    opens(idle)


def test_a_reset_of_an_old_connection_between_the_segments_of_a_new_handshake_does_not_stop_it(idle: World) -> None:
    assert idle.peer
    idle.client.abort()
    idle.collect()
    reset = idle.sent[-1]
    idle.settle()
    idle.reconnect()
    idle.collect()
    while idle.sent or idle.passed:
        idle.through(reset)
        idle.passed.remove(next(p for p in idle.passed if p.segment == reset.segment))
        if idle.passed:
            idle.arrive(idle.passed.pop(0))
        else:
            idle.through(idle.sent.pop(0))
    opens(idle)


def test_another_connection_opens_though_its_client_still_holds_nothing_and_the_backend_the_one_before(
    idle: World,
) -> None:
    old = idle.peer
    assert old
    idle.client.abort()
    idle.collect()
    idle.sent.clear()  # the reset is lost: the backend still holds the connection
    idle.reconnect()
    opens(idle)
    assert old.state is State.CLOSED
    assert idle.peer is not old
