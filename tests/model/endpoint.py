"""One real end of a TCP connection, small but honest: what RFC 9293 and RFC 5961 say, and nothing that helps a test.

Sequence numbers wrap at 2**32. Windows are scaled (RFC 7323). Segments out of order wait. Nothing is sent again until
the test says that time has passed. Left out: congestion control, delayed acknowledgements, SACK, timestamps, urgent data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntFlag

NUMBERS = 1 << 32
MOST_CHALLENGES = 10
"""Challenges until time passes: two ends that do not know each other's numbers must fall silent (RFC 5961, 7)."""
TIME_WAIT_SECONDS = 60
"""Twice the maximum segment lifetime as Linux has it; RFC 9293, 3.4.2 says 240."""


class Flag(IntFlag):
    """Control bits of a segment (RFC 9293, 3.1)."""

    FIN = 1
    SYN = 2
    RST = 4
    PSH = 8
    ACK = 16


FIN, SYN, RST, ACK = Flag.FIN, Flag.SYN, Flag.RST, Flag.ACK


class State(Enum):
    """States of RFC 9293, 3.3.2."""

    CLOSED = "CLOSED"
    LISTEN = "LISTEN"
    SYN_SENT = "SYN-SENT"
    SYN_RECEIVED = "SYN-RECEIVED"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT_1 = "FIN-WAIT-1"
    FIN_WAIT_2 = "FIN-WAIT-2"
    CLOSE_WAIT = "CLOSE-WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST-ACK"
    TIME_WAIT = "TIME-WAIT"


SYNCHRONIZED = frozenset(State) - {State.CLOSED, State.LISTEN, State.SYN_SENT, State.SYN_RECEIVED}
"""Both ends know both initial sequence numbers (RFC 9293, 3.5.1)."""
ENDED = frozenset({State.CLOSED, State.TIME_WAIT})
"""Nothing more is owed to the other end, or expected of it."""
MAY_SEND = frozenset({State.ESTABLISHED, State.CLOSE_WAIT})
MAY_RECEIVE = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2})


@dataclass(frozen=True)
class Segment:
    """A TCP segment without ports. `window` is the field as sent; `scale` is the window scale option of a SYN."""

    sequence: int
    acknowledgement: int
    flags: Flag
    window: int = 0
    payload: bytes = b""
    scale: int | None = None

    def __repr__(self) -> str:
        names = "|".join(f.name or "" for f in Flag if self.flags & f) or "nothing"
        return f"<{names} {self.sequence}+{len(self.payload)} ack {self.acknowledgement} window {self.window}>"

    @property
    def length(self) -> int:
        """Sequence numbers that it takes: SEG.LEN of RFC 9293, 3.3.1."""
        return len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)

    @property
    def end(self) -> int:
        """The number behind its last one."""
        return (self.sequence + self.length) % NUMBERS


def behind(a: int, b: int) -> int:
    """How far `a` is ahead of `b`, negative when it is before it: comparison modulo 2**32 (RFC 9293, 3.4)."""
    return (a - b + NUMBERS // 2) % NUMBERS - NUMBERS // 2


@dataclass(eq=False)
class Endpoint:
    """One end. Give it segments with `receive`, take what it sends from `outbox`.

    `number` is its initial sequence number, `capacity` its receive buffer in bytes, `scale` its window scale (None: the
    option is not offered, RFC 7323, 2.2).
    """

    number: int
    capacity: int = 65535
    scale: int | None = 7
    segment_bytes: int = 1000
    state: State = State.CLOSED
    passive: bool = False
    reading: bool = True
    why: str = ""
    """How it came to be CLOSED: "closed", "reset", "aborted", "listening again"."""
    outbox: list[Segment] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)
    unread: int = 0
    stream: bytearray = field(default_factory=bytearray)
    """All that was ever to be sent; the byte at i has the number `number` + 1 + i."""
    closing: bool = False
    """A FIN follows the stream."""
    una: int = 0
    next: int = 0
    window: int = 0
    """SND.UNA, SND.NXT, SND.WND in bytes."""
    most_window: int = 0
    window_sequence: int = 0
    window_acknowledgement: int = 0
    """MAX.SND.WND, SND.WL1, SND.WL2."""
    peer_number: int = 0
    expected: int = 0
    """IRS, RCV.NXT."""
    scale_in: int = 0
    scale_out: int = 0
    """How what it receives, and what it sends, is scaled."""
    early: dict[int, tuple[bytes, bool]] = field(default_factory=dict)
    """Segments that came before those in front of them, by sequence number: payload, and whether a FIN follows it."""
    numbers_sent: set[int] = field(default_factory=set)
    """Every number that it ever acknowledged."""
    ends_sent: set[int] = field(default_factory=set)
    """The number behind every segment that it ever sent."""
    waited: float = 0
    challenges: int = 0

    def __post_init__(self) -> None:
        self.una = self.next = self.number

    # ---- what a program does ----------------------------------------------------------------------------

    def listen(self) -> None:
        """Passive OPEN (RFC 9293, 3.10.1)."""
        self.state, self.passive = State.LISTEN, True

    def connect(self) -> None:
        """Active OPEN (RFC 9293, 3.10.1)."""
        self.state = State.SYN_SENT
        self.next = self._after(self.number, 1)
        self._send_syn()

    def send(self, data: bytes) -> None:
        """SEND (RFC 9293, 3.10.2): queued, and sent as far as the window lets it."""
        assert self.state in MAY_SEND
        assert not self.closing
        self.stream += data
        self._transmit()

    def close(self) -> None:
        """CLOSE (RFC 9293, 3.10.4): a FIN behind what is queued; it goes on receiving."""
        assert self.state in MAY_SEND
        assert not self.closing
        self.closing = True
        self._transmit()

    def abort(self) -> None:
        """ABORT (RFC 9293, 3.10.5): a reset with SND.NXT in the states in which the other end may know of us."""
        if self.state in SYNCHRONIZED - {State.CLOSING, State.LAST_ACK, State.TIME_WAIT} | {State.SYN_RECEIVED}:
            self._emit(Segment(self.next, self.expected, RST | ACK))
        self._end("aborted")

    def pause(self) -> None:
        """The program stops reading: the window shrinks by what comes."""
        self.reading = False

    def resume(self) -> None:
        """The program reads what there is; the window opens again, and the other end is told (RFC 9293, 3.8.6)."""
        self.reading = True
        if self.unread:
            self.unread = 0
            self._acknowledge()

    def keep_alive(self) -> None:
        """SEG.SEQ = SND.NXT - 1, without data (RFC 9293, 3.8.4). Only an idle end sends it."""
        if self.state in SYNCHRONIZED - ENDED and self.una == self.next:
            self._emit(Segment((self.next - 1) % NUMBERS, self.expected, ACK, self._window_field()))

    def time_passes(self, seconds: float) -> None:
        """TIME-WAIT ends after its time; else the oldest that is not acknowledged is sent again (RFC 9293, 3.8.1).

        With a closed window one byte beyond it is tried (3.8.6.1).
        """
        self.waited += seconds
        self.challenges = 0
        if self.state is State.TIME_WAIT:
            if self.waited >= TIME_WAIT_SECONDS:
                self._end("closed")
        elif self.state in (State.SYN_SENT, State.SYN_RECEIVED):
            self._send_syn()
        elif self.state in SYNCHRONIZED:
            if self.una == self.next and self._stream_end() != self.next:
                self._transmit(probe=True)
            elif self.una != self.next:
                self._send_from(self.una, min(behind(self.next, self.una), self.segment_bytes))

    # ---- what comes --------------------------------------------------------------------------------------

    def receive(self, segment: Segment) -> None:
        """SEGMENT ARRIVES (RFC 9293, 3.10.7)."""
        if self.state is State.CLOSED:
            self._answer_by_reset(segment)
        elif self.state is State.LISTEN:
            self._receive_listening(segment)
        elif self.state is State.SYN_SENT:
            self._receive_syn_sent(segment)
        else:
            self._receive_other(segment)

    def _answer_by_reset(self, segment: Segment) -> None:
        """RFC 9293, 3.10.7.1."""
        if segment.flags & RST:
            return
        if segment.flags & ACK:
            self._emit(Segment(segment.acknowledgement, 0, RST))
        else:
            self._emit(Segment(0, segment.end, RST | ACK))

    def _receive_listening(self, segment: Segment) -> None:
        """RFC 9293, 3.10.7.2. Data in a SYN is left to be sent again."""
        if segment.flags & RST:
            return
        if segment.flags & ACK:
            self._answer_by_reset(segment)
        elif segment.flags & SYN:
            self._learn(segment)
            self.state = State.SYN_RECEIVED
            self.next = self._after(self.number, 1)
            self._send_syn()

    def _receive_syn_sent(self, segment: Segment) -> None:
        """RFC 9293, 3.10.7.3."""
        acknowledged = bool(segment.flags & ACK)
        if acknowledged and segment.acknowledgement != self.next:
            self._answer_by_reset(segment)
            return
        if segment.flags & RST:
            if acknowledged:
                self._end("reset")
            return
        if not segment.flags & SYN:
            return
        self._learn(segment)
        if acknowledged:
            self.una = segment.acknowledgement
            self.state = State.ESTABLISHED
            self._acknowledge()
            self._transmit()
        else:
            self.state = State.SYN_RECEIVED
            self._send_syn()

    def _receive_other(self, segment: Segment) -> None:
        """RFC 9293, 3.10.7.4, with RFC 5961 as it says there."""
        if not self.acceptable(segment):
            if not segment.flags & RST:
                # A SYN that is sent again asks for its answer; what is answered else is an acknowledgement.
                if self.state is State.SYN_RECEIVED and segment.flags & SYN and segment.sequence == self.peer_number:
                    self._send_syn()
                elif segment.payload:
                    self._acknowledge()
                else:
                    self._challenge()
            return
        if segment.flags & RST:  # RFC 5961, 3.2
            if segment.sequence != self.expected:
                self._challenge()
            else:
                self._end("reset")
            return
        if segment.flags & SYN:  # RFC 5961, 4.2
            if self.state is State.SYN_RECEIVED and self.passive:
                self._end("listening again")
            else:
                self._challenge()
            return
        if segment.flags & ACK and self._take_acknowledgement(segment):
            self._take_text(segment)

    def acceptable(self, segment: Segment) -> bool:
        """Does a part of it lie in the window? (RFC 9293, 3.4, table 6)"""
        room = self.room()
        if not segment.length:
            return 0 <= behind(segment.sequence, self.expected) < room or segment.sequence == self.expected
        first, last = (behind(n, self.expected) for n in (segment.sequence, segment.end - 1))
        # With a closed window, its control bits and its acknowledgement still count (3.10.7.4).
        return 0 <= first < room or 0 <= last < room or (not room and not first)

    def _take_acknowledgement(self, segment: Segment) -> bool:
        """-> whether the rest of the segment counts."""
        ahead = behind(segment.acknowledgement, self.una)
        possible = ahead <= behind(self.next, self.una)
        if self.state is State.SYN_RECEIVED:
            if not (possible and ahead > 0):
                self._emit(Segment(segment.acknowledgement, 0, RST))
                return False
            self.state = State.ESTABLISHED
            self._take_window(segment)
        if not possible or ahead < -self.most_window:  # RFC 5961, 5.2
            self._challenge()
            return False
        if ahead > 0:
            self.una = segment.acknowledgement
        if ahead >= 0 and (
            behind(segment.sequence, self.window_sequence) > 0
            or (
                segment.sequence == self.window_sequence
                and behind(segment.acknowledgement, self.window_acknowledgement) >= 0
            )
        ):
            self._take_window(segment)
        if self._fin_sent() and self.una == self.next:
            self._fin_acknowledged()
        if self.state is not State.CLOSED:
            self._transmit()
        return self.state is not State.CLOSED

    def _fin_acknowledged(self) -> None:
        if self.state is State.FIN_WAIT_1:
            self.state = State.FIN_WAIT_2
        elif self.state is State.CLOSING:
            self._wait()
        elif self.state is State.LAST_ACK:
            self._end("closed")

    def _take_text(self, segment: Segment) -> None:
        if not segment.length:
            return
        if self.state in MAY_RECEIVE and self.room():
            first = max(0, -behind(segment.sequence, self.expected))
            at = self._after(segment.sequence, first)
            room = self.room() - behind(at, self.expected)
            payload, fin = segment.payload[first:], bool(segment.flags & FIN)
            if len(payload) > room:  # what does not fit is left to be sent again
                payload, fin = payload[:room], False
            if len(payload) >= len(self.early.get(at, (b"", False))[0]):
                self.early[at] = payload, fin or self.early.get(at, (b"", False))[1]
            self._take_early()
        elif self.state is State.TIME_WAIT and segment.flags & FIN:
            self.waited = 0
        self._acknowledge()

    def _take_early(self) -> None:
        """What now is in order goes to the program."""
        for at in sorted(self.early, key=lambda n: behind(n, self.expected)):
            skip = -behind(at, self.expected)
            if skip < 0:
                return
            payload, fin = self.early.pop(at)
            new = payload[skip:]
            self.received += new
            self.unread += 0 if self.reading else len(new)
            self.expected = self._after(self.expected, len(new))
            if fin and skip <= len(payload):
                self.expected = self._after(self.expected, 1)
                self.early.clear()
                self._fin_received()
                return

    def _fin_received(self) -> None:
        if self.state is State.ESTABLISHED:
            self.state = State.CLOSE_WAIT
        elif self.state is State.FIN_WAIT_1:
            if self.una == self.next:
                self._wait()
            else:
                self.state = State.CLOSING
        elif self.state is State.FIN_WAIT_2:
            self._wait()

    # ---- what it sends -----------------------------------------------------------------------------------

    def room(self) -> int:
        """RCV.WND in bytes."""
        return self.capacity - self.unread

    def _window_field(self, syn: bool = False) -> int:
        return min(self.room() >> (0 if syn else self.scale_out), 65535)

    def _send_syn(self) -> None:
        flags = SYN if self.state is State.SYN_SENT else SYN | ACK
        scale = self.scale if self.state is State.SYN_SENT or self.scale_in or self.scale_out else None
        self._emit(
            Segment(self.number, self.expected if flags & ACK else 0, flags, self._window_field(syn=True), scale=scale)
        )

    def _acknowledge(self) -> None:
        self._emit(Segment(self.next, self.expected, ACK, self._window_field()))

    def _challenge(self) -> None:
        """An acknowledgement in answer to what was not believed."""
        self.challenges += 1
        if self.challenges <= MOST_CHALLENGES:
            self._acknowledge()

    def _transmit(self, probe: bool = False) -> None:
        if self.state not in SYNCHRONIZED or self._fin_sent():
            return
        while self.next != self._stream_end():
            open_ = self.window - behind(self.next, self.una)
            if open_ <= 0:
                if not probe or self.una != self.next:
                    return
                open_ = 1
            size = min(open_, self.segment_bytes, behind(self._stream_end(), self.next))
            at, self.next = self.next, self._after(self.next, size)
            if self._fin_sent():
                self._fin_goes()
            self._send_from(at, size)

    def _fin_goes(self) -> None:
        if self.state is State.ESTABLISHED:
            self.state = State.FIN_WAIT_1
        elif self.state is State.CLOSE_WAIT:
            self.state = State.LAST_ACK

    def _send_from(self, at: int, length: int) -> None:
        offset = behind(at, self.number) % NUMBERS - 1
        payload = bytes(self.stream[offset : offset + length])
        fin = self.closing and len(payload) < length
        flags = ACK | (FIN if fin else Flag(0)) | (Flag.PSH if payload else Flag(0))
        self._emit(Segment(at, self.expected, flags, self._window_field(), payload))

    def _fin_sent(self) -> bool:
        return self.closing and self.next == self._stream_end()

    def _stream_end(self) -> int:
        """Behind all that it has to send: data, and its FIN when the program has closed."""
        return self._after(self.number, 1 + len(self.stream) + self.closing)

    def _emit(self, segment: Segment) -> None:
        if segment.flags & ACK:
            self.numbers_sent.add(segment.acknowledgement)
        self.ends_sent.add(segment.end % NUMBERS)
        self.outbox.append(segment)

    # ---- bookkeeping -------------------------------------------------------------------------------------

    def _learn(self, syn: Segment) -> None:
        """The other end's number and window from its SYN."""
        self.peer_number = syn.sequence
        self.expected = self._after(syn.sequence, 1)
        if syn.scale is not None and self.scale is not None:
            self.scale_in, self.scale_out = min(syn.scale, 14), self.scale
        self.window = self.most_window = syn.window
        self.window_sequence, self.window_acknowledgement = syn.sequence, syn.acknowledgement

    def _take_window(self, segment: Segment) -> None:
        self.window = segment.window << self.scale_in
        self.most_window = max(self.most_window, self.window)
        self.window_sequence, self.window_acknowledgement = segment.sequence, segment.acknowledgement

    def _wait(self) -> None:
        self.state, self.waited = State.TIME_WAIT, 0

    def _end(self, why: str) -> None:
        self.state, self.why = State.CLOSED, why

    @staticmethod
    def _after(number: int, count: int) -> int:
        return (number + count) % NUMBERS

    def would_change(self, segment: Segment) -> bool:
        """Would this segment be believed: change anything but what is sent in answer to it?"""
        twin = Endpoint(self.number)
        twin.__dict__.update(self.__dict__)
        twin.outbox, twin.numbers_sent, twin.ends_sent = [], set(), set()
        twin.received, twin.stream, twin.early = bytearray(), self.stream, dict(self.early)
        twin.receive(segment)
        return (twin.state, twin.una, twin.window, twin.expected, twin.early, bytes(twin.received)) != (
            self.state,
            self.una,
            self.window,
            self.expected,
            self.early,
            b"",
        )
