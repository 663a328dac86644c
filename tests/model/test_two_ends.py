"""Whatever somebody sends who does not see a connection, the flow's fate is what its two ends decide.

Hypothesis drives two real ends, the network between them, time, and the stranger; `World` says what must hold. A longer
search: `pytest tests/model --hypothesis-profile long`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from . import world
from .endpoint import ACK, FIN, MAY_SEND, NUMBERS, RST, SYN, TIME_WAIT_SECONDS, Endpoint, Flag, Segment, State, behind
from .engine import BACKEND_PORT, BACKENDS, SNATS, VIP, Engine, Flow, Place, parse
from .world import World

PROFILE = settings.default or settings()
LONG = PROFILE.max_examples > 100
FLAGS = [RST, RST | ACK, FIN, FIN | ACK, SYN, SYN | ACK, ACK, SYN | FIN, SYN | RST, FIN | RST, Flag(0), Flag(31)]
NUMBERS_DRAWN = st.integers(0, NUMBERS - 1)
NEAR = st.one_of(
    st.sampled_from([0, 1, -1, 2, 1000, -1000, 65534, 65535, 65536, -65535, -65536, 1 << 30, -(1 << 30), 1 << 31]),
    st.integers(-70000, 140000),
)
"""Distances from a number that an end uses."""
DATA = st.integers(1, 3000)
RARELY = st.sampled_from([False, False, False, True])
OFTEN = st.sampled_from([True, True, True, False])
Guess = tuple[Flag, int | tuple[int], int | tuple[int], int, int]
"""Flags, sequence number, acknowledgement, bytes, window. A number in a tuple is a distance from what the end expects."""
MADE_UP = st.tuples(
    st.sampled_from(FLAGS),
    st.one_of(NUMBERS_DRAWN, st.tuples(NEAR)),
    st.one_of(NUMBERS_DRAWN, st.tuples(NEAR)),
    st.sampled_from([0, 0, 1, 1000]),
    st.sampled_from([0, 1, 100, 65535]),
)


class TwoEnds(RuleBasedStateMachine):
    """One client and its backends. `stranger` alone does not see what they say."""

    @initialize(
        client=st.one_of(st.sampled_from([0, NUMBERS - 1, NUMBERS - 1000, (1 << 31) - 1]), NUMBERS_DRAWN),
        backend=st.one_of(st.sampled_from([0, NUMBERS - 1, NUMBERS - 1000, (1 << 31) - 1]), NUMBERS_DRAWN),
        capacity=st.sampled_from([1500, 65535, 1 << 20]),
        scale=st.sampled_from([None, 0, 7, 14]),
        hops=st.one_of(st.none(), st.integers(0, 6)),
    )
    def begin(self, client: int, backend: int, capacity: int, scale: int | None, hops: int | None) -> None:
        """With a connection that both ends hold, or so many steps into its handshake."""
        if scale in (None, 0):
            capacity = min(capacity, 65535)
        elif scale == 14:
            capacity = 1 << 20
        self.world = World(client, backend, capacity, scale)
        self.world.luck = False
        if hops is None:
            self.world.open()
        elif hops:
            self.connect()
            for _ in range(hops - 1):
                self.hop()

    def end(self, side: bool) -> Endpoint | None:
        return self.world.client if side else self.world.peer

    # ---- the two ends ----------------------------------------------------------------------------------

    @precondition(lambda self: self.world.client.state is State.CLOSED)
    @rule()
    def connect(self) -> None:
        if self.world.client.why:
            self.world.reconnect()
        else:
            self.world.client.connect()
        self.world.collect()

    @precondition(lambda self: self.world.ends())
    @rule(side=st.booleans(), size=DATA)
    def send(self, side: bool, size: int) -> None:
        end = self.end(side)
        if end and end.state in MAY_SEND and not end.closing:
            end.send(bytes(size))
            self.world.collect()

    @precondition(lambda self: self.world.ends())
    @rule(side=st.booleans())
    def close(self, side: bool) -> None:
        end = self.end(side)
        if end and end.state in MAY_SEND and not end.closing:
            end.close()
            self.world.collect()

    @precondition(lambda self: self.world.client.state is not State.CLOSED or self.world.peer)
    @rule(side=st.booleans(), really=RARELY)
    def abort(self, side: bool, really: bool) -> None:
        end = self.end(side)
        if really and end and end.state not in (State.CLOSED, State.LISTEN):
            end.abort()
            self.world.collect()

    @precondition(lambda self: self.world.ends())
    @rule(side=st.booleans(), what=st.sampled_from(["pause", "resume", "keep_alive"]))
    def other(self, side: bool, what: str) -> None:
        end = self.end(side)
        if end and end.state is not State.CLOSED:
            getattr(end, what)()
            self.world.collect()

    # ---- the network -----------------------------------------------------------------------------------

    @precondition(lambda self: self.world.sent)
    @rule(data=st.data(), copy=st.booleans())
    def through(self, data: Any, copy: bool) -> None:
        packet = self._draw(data, self.world.sent, copy)
        note(f"through the engine: {packet.segment}")
        self.world.through(packet)

    @precondition(lambda self: self.world.passed)
    @rule(data=st.data(), copy=st.booleans())
    def arrive(self, data: Any, copy: bool) -> None:
        packet = self._draw(data, self.world.passed, copy)
        note(f"arrives: {packet.segment}")
        self.world.arrive(packet)

    @precondition(lambda self: self.world.sent or self.world.passed)
    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        packet = self._draw(data, self.world.sent or self.world.passed, False)
        note(f"lost: {packet.segment}")

    @staticmethod
    def _draw(data: Any, queue: list[Any], copy: bool) -> Any:
        at = data.draw(st.integers(0, len(queue) - 1))
        return queue[at] if copy else queue.pop(at)

    @precondition(lambda self: self.world.sent or self.world.passed)
    @rule()
    def hop(self) -> None:
        """Nothing special: the oldest packet is where it is next."""
        if self.world.passed:
            self.world.arrive(self.world.passed.pop(0))
        else:
            self.world.through(self.world.sent.pop(0))

    @precondition(lambda self: self.world.sent or self.world.passed)
    @rule(really=RARELY)
    def settle(self, really: bool) -> None:
        if really:
            self.world.settle()

    @rule(seconds=st.sampled_from([0.1, 1, 1, 1, 1, 5, 5, 12, 31, 61, 121, 300, 900]))
    def time_passes(self, seconds: float) -> None:
        self.world.time_passes(seconds)

    # ---- the stranger ----------------------------------------------------------------------------------

    @rule(segment=MADE_UP, right=OFTEN, arrives=st.booleans())
    def inject_to_backend(self, segment: Guess, right: bool, arrives: bool) -> None:
        self.inject(True, segment, right, arrives)

    @rule(segment=MADE_UP, right=OFTEN, arrives=st.booleans())
    def inject_to_client(self, segment: Guess, right: bool, arrives: bool) -> None:
        self.inject(False, segment, right, arrives)

    def inject(self, to_backend: bool, guess: Guess, right: bool, arrives: bool) -> None:
        """To one end, as if from the other."""
        world, receiver = self.world, self.end(not to_backend)
        if to_backend and not receiver:
            receiver = world.last_peer
        flags, sequence, acknowledgement, size, window = guess
        expected, next_ = (receiver.expected, receiver.next) if receiver else (0, 0)
        segment = Segment(
            (sequence if isinstance(sequence, int) else expected + sequence[0]) % NUMBERS,
            (acknowledgement if isinstance(acknowledgement, int) else next_ + acknowledgement[0]) % NUMBERS,
            flags,
            window,
            bytes(size),
        )
        if right and not self.is_a_guess(receiver, self.end(to_backend), segment):
            return
        if receiver and self.in_both_windows(receiver, segment) and (right or not flags & FIN):
            return
        note(f"{segment}, checksum {'right' if right else 'wrong'}")
        if to_backend:
            world.inject_to_backend(segment, right)
        elif world.flow:
            world.inject_to_client(segment, right)
        else:
            world.inject((BACKENDS[0], BACKEND_PORT), (SNATS[0], 1024 + world.bucket), segment, right)
        if arrives and world.passed and world.passed[-1].sender is None:
            world.arrive(world.passed.pop())

    @staticmethod
    def in_both_windows(receiver: Endpoint, segment: Segment) -> bool:
        """By luck, too: its receiver may do without it, or be gone, and an engine sums up only what ends something."""
        ahead, late = behind(segment.sequence, receiver.expected), behind(receiver.next, segment.acknowledgement)
        near = abs(ahead) <= max(receiver.capacity, 65535) + 4000 and 0 <= late <= max(receiver.capacity, 66000)
        return near and segment.flags & (SYN | RST | ACK) == ACK

    def is_a_guess(self, receiver: Endpoint | None, sender: Endpoint | None, segment: Segment) -> bool:
        """False for what only luck hits: numbers that its receiver believes, or that the ends use themselves.

        A connection that such a segment ends is ended by chance one in 2**32 / window of them; no middle can know
        better than the end.
        """
        exact: set[int] = set()
        if receiver:
            exact |= {receiver.expected, *receiver.numbers_sent}
        if sender:
            exact |= {sender.next, sender.una, sender.number, *sender.ends_sent}
        if segment.flags & RST and segment.sequence in exact:
            return False
        if receiver is None:
            return True
        if receiver.state in (State.CLOSED, State.LISTEN):
            return True
        if receiver.state in (State.SYN_SENT, State.SYN_RECEIVED) and segment.acknowledgement == receiver.next:
            return False
        return not receiver.would_change(segment)

    @rule(
        stranger=st.integers(0, 2),
        flags=st.sampled_from([SYN, SYN, ACK, ACK, RST, FIN | ACK, SYN | ACK]),
        sequence=st.sampled_from([0, 1, 2, 1000]),
        acknowledgement=st.one_of(NUMBERS_DRAWN, st.tuples(NEAR)),
        right=st.booleans(),
        arrives=st.booleans(),
    )
    def open_alone(
        self,
        stranger: int,
        flags: Flag,
        sequence: int,
        acknowledgement: int | tuple[int],
        right: bool,
        arrives: bool,
    ) -> None:
        """A connection from an address that the stranger does not have: it never sees the answer."""
        world, place = self.world, self.world.strangers[stranger]
        flow = world.engine.flow(place)
        end = world.backends[flow.backend].ends.get(flow.snat) if flow else None
        number = acknowledgement if isinstance(acknowledgement, int) else (end.next if end else 0) + acknowledgement[0]
        segment = Segment(sequence, number % NUMBERS, flags, 1000)
        if right and end and segment.acknowledgement == end.next:
            return
        world.inject(place, VIP, segment, right)
        if arrives and world.passed and world.passed[-1].sender is None:
            world.arrive(world.passed.pop())

    @precondition(lambda self: self.world.ends())
    @rule()
    def flood(self) -> None:
        """What `check` tries after each step, for good. Only when there is a flow that it must not take."""
        self.world.engine.flood(self.world.bucket)

    # ---- and in the end ----------------------------------------------------------------------------------

    @precondition(lambda self: self.world.client.state is not State.CLOSED)
    @rule(who=st.sampled_from(["client", "backend", "both", "client aborts", "backend aborts"]), really=RARELY)
    def finish(self, who: str, really: bool) -> None:
        """The programs end it, and from here on nothing is lost."""
        if really:
            self.finish_now(who)

    def finish_now(self, who: str) -> None:
        world, peer = self.world, self.world.peer
        held = world.ends() is not None and not world.expired
        for name, end in (("client", world.client), ("backend", peer)):
            if end is None or end.state in (State.CLOSED, State.LISTEN):
                continue
            end.resume()
            world.collect()
            if who == f"{name} aborts":
                end.abort()
            elif who in (name, "both") and end.state in MAY_SEND and not end.closing:
                end.close()
            world.collect()
        world.finish()
        for end in (world.client, world.peer):
            if end and end.state in MAY_SEND and not end.closing:
                end.close()
        world.finish()
        if held and not world.expired:
            assert peer
            for end, other in ((world.client, peer), (peer, world.client)):
                # An end that aborts when it owes no more than a FIN says nothing (RFC 9293, 3.10.5).
                waits = end.state is State.FIN_WAIT_2 and other.why == "aborted"
                assert waits or end.state in (State.CLOSED, State.TIME_WAIT), f"{end.state} for ever"
        world.time_passes(TIME_WAIT_SECONDS + 1)
        world.finish()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.finish_now("both")


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(
    deadline=None,
    # A failure is found in seconds, and made short in minutes: that is left to the longer search.
    phases=PROFILE.phases if LONG else [Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


class Credulous(Engine):
    """An engine that believes any segment with these flags, whatever its numbers and its checksum."""

    flags = RST
    believed: ClassVar[dict[str, str]] = {"RST": "CLOSED", "FIN": "CLOSING", "ACK": "ESTABLISHED"}

    def __init__(self) -> None:
        super().__init__()
        self._deceived: set[Place] = set()

    def handle(self, frame: bytes) -> bytes | None:
        passed = super().handle(frame)
        source, destination, segment, _ = parse(frame)
        if segment.flags & (self.flags | SYN) == self.flags:
            self._deceived |= {f.client for f in self.flows() if source == f.client or destination == f.snat}
        return passed

    def flows(self) -> list[Flow]:
        state = self.believed[str(self.flags.name)]
        return [replace(f, state=state) if f.client in self._deceived else f for f in super().flows()]


@pytest.mark.parametrize("flags", [RST, FIN, ACK], ids=lambda flags: flags.name)
def test_an_engine_that_believes_whatever_comes_is_found_out(flags: Flag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Credulous, "flags", flags)
    monkeypatch.setattr(world, "Engine", Credulous)
    only_find = settings(
        TestTwoEnds.settings, phases=[Phase.generate], max_examples=200, database=None, report_multiple_bugs=False
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(TwoEnds, settings=only_find)
