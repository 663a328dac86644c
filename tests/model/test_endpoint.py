"""The model of a TCP end against the RFCs that it cites."""

import pytest

from .endpoint import ACK, FIN, NUMBERS, RST, SYN, Endpoint, Segment, State


def pair(client: int = 1000, backend: int = 9000) -> tuple[Endpoint, Endpoint]:
    a, b = Endpoint(client), Endpoint(backend)
    b.listen()
    a.connect()
    return a, b


def settle(a: Endpoint, b: Endpoint) -> None:
    """Everything arrives, in order."""
    for _ in range(200):
        if not a.outbox and not b.outbox:
            return
        for here, there in ((a, b), (b, a)):
            sent, here.outbox = here.outbox, []
            for segment in sent:
                there.receive(segment)
    pytest.fail("the two never fall silent")


def established(client: int = 1000, backend: int = 9000) -> tuple[Endpoint, Endpoint]:
    a, b = pair(client, backend)
    settle(a, b)
    assert (a.state, b.state) == (State.ESTABLISHED, State.ESTABLISHED)
    return a, b


def test_a_handshake_teaches_both_ends_both_numbers_and_windows() -> None:
    a, b = established()
    assert (a.peer_number, b.peer_number) == (9000, 1000)
    assert (a.una, a.next, a.expected) == (1001, 1001, 9001)
    assert b.window == 65535 >> 7 << 7, "scaled in the third segment, not in the first two"


def test_lost_segments_of_a_handshake_are_sent_again() -> None:
    a, b = pair()
    a.outbox.clear()
    a.time_passes(1)
    b.receive(a.outbox.pop())
    b.outbox.clear()
    b.time_passes(1)
    a.receive(b.outbox.pop())
    a.outbox.clear()
    b.time_passes(1)
    settle(a, b)
    assert (a.state, b.state) == (State.ESTABLISHED, State.ESTABLISHED)


def test_numbers_wrap() -> None:
    a, b = established(NUMBERS - 3, NUMBERS - 1)
    a.send(bytes(range(200)) * 20)
    settle(a, b)
    assert bytes(b.received) == bytes(range(200)) * 20
    assert a.una == 3998


def test_segments_out_of_order_wait_for_those_before_them() -> None:
    a, b = established()
    a.send(b"x" * 1000 + b"y" * 1000 + b"z" * 500)
    first, second, third = a.outbox
    a.outbox.clear()
    for segment in (third, second, second):
        b.receive(segment)
    assert not b.received
    b.receive(first)
    assert bytes(b.received) == b"x" * 1000 + b"y" * 1000 + b"z" * 500
    assert b.outbox[-1].acknowledgement == a.next


def test_the_window_bounds_what_is_sent_and_a_closed_one_is_probed() -> None:
    a, b = established()
    b.capacity = 1500
    b.pause()
    a.send(b"1")
    settle(a, b)
    a.send(b"2" * 4000)
    settle(a, b)
    assert len(b.received) == 1408 + 1, "a window is a multiple of 128 here, and room was told before the first byte"
    a.time_passes(1)
    settle(a, b)
    b.resume()
    settle(a, b)
    for _ in range(9):
        a.time_passes(1)
        settle(a, b)
    assert len(b.received) == 4001


def test_a_side_that_closed_goes_on_receiving() -> None:
    a, b = established()
    a.send(b"question")
    a.close()
    settle(a, b)
    assert (a.state, b.state) == (State.FIN_WAIT_2, State.CLOSE_WAIT)
    b.send(b"answer")
    settle(a, b)
    assert bytes(a.received) == b"answer"
    b.close()
    settle(a, b)
    assert (a.state, b.state) == (State.TIME_WAIT, State.CLOSED)
    a.time_passes(60)
    assert (a.state, a.why) == (State.CLOSED, "closed")


def test_both_sides_may_close_at_once() -> None:
    a, b = established()
    a.close()
    b.close()
    settle(a, b)
    assert (a.state, b.state) == (State.TIME_WAIT, State.TIME_WAIT)


def test_a_fin_that_is_lost_is_sent_again() -> None:
    a, b = established()
    a.close()
    a.outbox.clear()
    a.time_passes(1)
    assert a.outbox[0].flags == FIN | ACK
    settle(a, b)
    assert b.state is State.CLOSE_WAIT


def test_an_abort_resets_the_other_end() -> None:
    a, b = established()
    a.abort()
    settle(a, b)
    assert (b.state, b.why) == (State.CLOSED, "reset")


def test_data_to_an_end_that_is_gone_is_answered_by_a_reset_that_is_believed() -> None:
    a, b = established()
    a.abort()
    a.outbox.clear()
    b.send(b"late")
    settle(a, b)
    assert (b.state, b.why) == (State.CLOSED, "reset")


@pytest.mark.parametrize("ahead", [1, 100, 65000])
def test_a_reset_inside_the_window_but_not_exact_is_challenged(ahead: int) -> None:
    a, b = established()
    b.receive(Segment(b.expected + ahead, 0, RST))
    assert b.state is State.ESTABLISHED
    assert b.outbox == [Segment(b.next, b.expected, ACK, 511)]
    settle(a, b)
    assert (a.state, b.state) == (State.ESTABLISHED, State.ESTABLISHED)


@pytest.mark.parametrize("ahead", [-1, -70000, 70000, 1 << 31])
def test_a_reset_outside_the_window_is_not_even_answered(ahead: int) -> None:
    _, b = established()
    b.receive(Segment((b.expected + ahead) % NUMBERS, 0, RST))
    assert (b.state, b.outbox) == (State.ESTABLISHED, [])


@pytest.mark.parametrize("ahead", [-1, 0, 100, 1 << 31])
def test_a_syn_in_a_connection_is_challenged(ahead: int) -> None:
    _, b = established()
    b.receive(Segment((b.expected + ahead) % NUMBERS, 0, SYN, 1000))
    assert b.state is State.ESTABLISHED
    assert [s.flags for s in b.outbox] == [ACK]


@pytest.mark.parametrize("ahead", [1, 5000, -70000, 1 << 31])
def test_data_with_an_acknowledgement_out_of_range_is_challenged_and_dropped(ahead: int) -> None:
    _, b = established()
    b.receive(Segment(b.expected, (b.next + ahead) % NUMBERS, ACK | FIN, 100, b"forged"))
    assert (b.state, bytes(b.received)) == (State.ESTABLISHED, b"")
    assert [s.flags for s in b.outbox] == [ACK]


def test_a_third_segment_with_a_wrong_number_is_answered_by_a_reset_and_opens_nothing() -> None:
    a, b = pair()
    b.receive(a.outbox.pop())
    b.receive(Segment(b.expected, b.next + 5, ACK, 100))
    assert b.state is State.SYN_RECEIVED
    assert b.outbox[-1] == Segment(b.next + 5, 0, RST)


def test_an_answer_to_another_syn_is_answered_by_a_reset_and_not_believed() -> None:
    a, _ = pair()
    a.outbox.clear()
    a.receive(Segment(77, a.next + 3, SYN | ACK, 100))
    assert (a.state, a.outbox) == (State.SYN_SENT, [Segment(a.next + 3, 0, RST)])


def test_a_keep_alive_is_answered() -> None:
    a, b = established()
    a.keep_alive()
    b.receive(a.outbox.pop())
    assert b.outbox == [Segment(b.next, b.expected, ACK, 511)]


def test_what_would_be_believed_is_told_without_being_believed() -> None:
    _, b = established()
    assert b.would_change(Segment(b.expected, 0, RST))
    assert not b.would_change(Segment(b.expected + 1, 0, RST))
    assert b.would_change(Segment(b.expected + 1, b.next, ACK, 100, b"x")), "it waits for what is before it"
    assert not b.would_change(Segment(b.expected, b.next + 1, ACK, 100, b"x"))
    assert (b.state, b.outbox, b.early) == (State.ESTABLISHED, [], {})
