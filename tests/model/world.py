"""A client, backends, the network between them and the engine in its middle; and somebody who sees nothing of it.

A packet waits in `sent` until the engine gets it, then in `passed` until its receiver gets it. A test says what
happens when: see `through` and `arrive`, or `settle` for all of it in order. `check` says what must hold at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address
from itertools import count

from .endpoint import ACK, ENDED, FIN, NUMBERS, RST, SYN, SYNCHRONIZED, Endpoint, Segment, State, behind
from .engine import BACKEND_PORT, BACKENDS, VIP, Engine, Flow, Place, build, parse

CLIENT = IPv4Address("198.51.100.7")
STRANGERS = tuple(IPv4Address("203.0.113.1") + i for i in range(3))
"""Addresses that nobody has: what is sent to them vanishes."""
LONG_ENOUGH_SECONDS = 600
"""What both ends have given up is gone after this time, whatever its idle limits are."""


@dataclass(eq=False)
class Packet:
    """A frame on its way. `sender` is None when it was made up by somebody else."""

    frame: bytes
    sender: Endpoint | None
    segment: Segment


@dataclass
class Seen:
    """What has come by at the engine from one end."""

    end: int
    """The highest number behind a segment."""
    acknowledged: int | None = None
    fin: bool = False
    reset: bool = False
    """A reset that is exact for all that came by: at the end of what was sent, or of what was acknowledged."""


@dataclass
class Backend:
    """What listens at a backend's port: an end for each address and port that speaks to it."""

    numbers: count[int]
    ends: dict[Place, Endpoint] = field(default_factory=dict)


class World:
    """`client` is the current connection's end, `peer` the backend's end of it, once there is one."""

    def __init__(
        self,
        client_number: int = 1_000_000_000,
        backend_number: int = 2_000_000_000,
        capacity: int = 65535,
        scale: int | None = 7,
        port: int = 40000,
        **options: int,
    ) -> None:
        self.engine = Engine(**options)
        self.place: Place = (CLIENT, port)
        self.bucket = self.engine.bucket(self.place)
        self.strangers = [(a, self._port_of_bucket(a)) for a in STRANGERS]
        self.capacity, self.scale = capacity, scale
        # Each connection has numbers of its own, far from those before it (RFC 6528).
        self._client_numbers = count(client_number, 0x13579BDF)
        backend_numbers = count(backend_number, 0x2468ACE1)
        self.backends = {(a, BACKEND_PORT): Backend(backend_numbers) for a in BACKENDS}
        self.sent: list[Packet] = []
        self.passed: list[Packet] = []
        self.now = 0.0
        self.luck = True
        """False: what nobody's end has sent is lost when by the time it arrives it would be believed."""
        self.client = self._new_client()

    def _port_of_bucket(self, address: IPv4Address) -> int:
        return next(p for p in range(1024, 65536) if self.engine.bucket((address, p)) == self.bucket)

    def _new_client(self) -> Endpoint:
        self.seen: dict[Endpoint, Seen] = {}
        self.last_genuine = self.now
        self.expired = False
        self.hidden = False
        """Its handshake came by while the engine still held the connection before it, whose end nobody had seen."""
        self.asked = False
        """Since `last_genuine` the client has spoken."""
        self.ever_synchronized = getattr(self, "ever_synchronized", False)
        self.last_peer: Endpoint | None = None
        """The backend's end, also when it is gone and another one has its port."""
        return Endpoint(next(self._client_numbers) % NUMBERS, self.capacity, self.scale)

    # ---- who is there --------------------------------------------------------------------------------------

    def reconnect(self) -> None:
        """Another connection from the same port; the one before has ended at its client."""
        assert self.client.state is State.CLOSED
        self.client = self._new_client()
        self.client.connect()

    @property
    def peer(self) -> Endpoint | None:
        """The backend's end of the client's connection: both know each other's number."""
        flow, found = self.flow, None
        for place, backend in self.backends.items():
            for snat, end in backend.ends.items():
                if end.peer_number == self.client.number and (
                    self.client.state is State.SYN_SENT or end.number == self.client.peer_number
                ):
                    if flow and (flow.backend, flow.snat) == (place, snat):
                        self.last_peer = end
                        return end
                    found = found or end
        self.last_peer = found or self.last_peer
        return found

    @property
    def flow(self) -> Flow | None:
        """The flow of the client's tuple."""
        return self.engine.flow(self.place)

    def ends(self) -> tuple[Endpoint, Endpoint] | None:
        """Both ends while both are synchronized and have not ended."""
        peer = self.peer
        if peer and {self.client.state, peer.state} <= SYNCHRONIZED - ENDED:
            return self.client, peer
        return None

    # ---- the network ---------------------------------------------------------------------------------------

    def collect(self) -> None:
        """What the ends have to say is on its way."""
        for segment in self._taken(self.client):
            self.sent.append(Packet(build(self.place, VIP, segment), self.client, segment))
        for place, backend in self.backends.items():
            for snat, end in list(backend.ends.items()):
                self._collect_backend(place, snat, end)

    def _collect_backend(self, place: Place, snat: Place, end: Endpoint) -> None:
        for segment in self._taken(end):
            self.sent.append(Packet(build(place, snat, segment), end, segment))

    @staticmethod
    def _taken(end: Endpoint) -> list[Segment]:
        taken, end.outbox = end.outbox, []
        return taken

    def through(self, packet: Packet) -> None:
        """The engine gets this packet. What it must not do with it is an AssertionError."""
        had = self.flow
        frame = self.engine.handle(packet.frame)
        peer = self.peer
        genuine = packet.sender is not None and (packet.sender is self.client or packet.sender is peer)
        source, destination, _, _ = parse(packet.frame)
        known = had and (source == had.client or (source, destination) == (had.backend, had.snat))
        if genuine:
            # A SYN, or a reset, of a connection that lives keeps nothing: anybody may have sent it.
            if not (had and had.state in ("ESTABLISHED", "CLOSING") and packet.segment.flags & (SYN | RST)):
                # Where its beginning was hidden, its two ends keep the flow only by speaking in turns.
                if not self.hidden or (self.asked and packet.sender is peer):
                    self.last_genuine, self.asked = self.now, False
                elif packet.sender is self.client:
                    self.asked = True
            alive = peer is not None and not {self.client.state, peer.state} & (ENDED | {State.LISTEN})
            if frame is None and not self.expired and alive and (known or self.ends()) and not self._stale(packet):
                raise AssertionError(f"a packet between two ends that live was dropped: {packet.segment}, flow {had}")
            if frame is not None:
                self._note(packet)
        if packet.sender is not None and packet.segment.flags & (SYN | ACK) == SYN | ACK:
            # Its client may have given up meanwhile, and not know this end any more.
            answers = packet.segment.acknowledgement == (self.client.number + 1) % NUMBERS
            self.hidden |= bool(answers and had and had.state in ("ESTABLISHED", "CLOSING") and not self.ends())
        if frame is not None:
            _, _, segment, right = parse(frame)
            _, _, before, was_right = parse(packet.frame)
            assert (segment, right) == (before, was_right), "changed on its way"
            self.passed.append(Packet(frame, packet.sender, packet.segment))
        self._check_flows()

    def _stale(self, packet: Packet) -> bool:
        """A copy from so long ago that its receiver does no more than to say so."""
        receiver = self.peer if packet.sender is self.client else self.client
        return (
            receiver is not None
            and receiver.state in SYNCHRONIZED
            and behind(packet.segment.end, receiver.expected) < -receiver.capacity
        )

    def _note(self, packet: Packet) -> None:
        segment, sender = packet.segment, packet.sender
        assert sender is not None
        other = self.peer if sender is self.client else self.client
        if segment.flags & RST:
            ours, theirs = self.seen.get(sender), self.seen.get(other) if other else None
            if ours:
                ours.reset |= segment.sequence in (ours.end, theirs.acknowledged if theirs else None)
            return
        seen = self.seen.setdefault(sender, Seen(segment.end))
        if behind(segment.end, seen.end) > 0:
            # Overtaken by its own reset, which then looks like somebody else's.
            seen.reset &= behind(segment.end, seen.end) == 1 and bool(segment.flags & FIN)
            seen.end = segment.end
        seen.fin |= bool(segment.flags & FIN)
        if segment.flags & ACK and (
            seen.acknowledged is None or behind(segment.acknowledgement, seen.acknowledged) > 0
        ):
            seen.acknowledged = segment.acknowledgement
            # The same: who acknowledges more has not taken the other one's reset.
            if other in self.seen:
                self.seen[other].reset = False

    def arrive(self, packet: Packet) -> None:
        """Its receiver gets this packet, as the engine rewrote it."""
        source, destination, segment, right = parse(packet.frame)
        if not right:
            return
        lucky = packet.sender is None and not self.luck
        if destination == self.place:
            if lucky and self.client.would_change(segment):
                return
            self.client.receive(segment)
        elif destination in self.backends:
            backend = self.backends[destination]
            end = backend.ends.get(source)
            if end is None or end.state is State.CLOSED:
                # What a port without a connection answers is the listener's to say.
                if end:
                    self._collect_backend(destination, source, end)
                new = Endpoint(next(backend.numbers) % NUMBERS, self.capacity, self.scale)
                new.listen()
                new.receive(segment)
                if new.state is State.SYN_RECEIVED:
                    backend.ends[source] = new
                else:
                    for answer in self._taken(new):
                        self.sent.append(Packet(build(destination, source, answer), end, answer))
            elif lucky and end.would_change(segment):
                return
            else:
                end.receive(segment)
        self.ever_synchronized |= self.client.state in SYNCHRONIZED
        self.collect()

    def settle(self) -> None:
        """Everything passes and arrives, in order."""
        self.collect()
        for _ in range(1000 + 10 * len(self.sent + self.passed)):
            if self.sent:
                self.through(self.sent.pop(0))
            elif self.passed:
                self.arrive(self.passed.pop(0))
            else:
                return
        raise AssertionError("the ends never fall silent")

    def time_passes(self, seconds: float) -> None:
        """For the ends and for the engine."""
        peer = self.peer
        limit = "ESTABLISHED" if self._open() else "CLOSING" if self.ends() else "SYN"
        if self.now + seconds - self.last_genuine >= self.engine.timeout(limit) - 1:
            self.expired |= self.client.state in SYNCHRONIZED
        self.now += seconds
        self.engine.advance(seconds)
        for end in {id(e): e for b in self.backends.values() for e in b.ends.values()}.values():
            if end is peer or end.state is State.TIME_WAIT:
                end.time_passes(seconds)
        self.client.time_passes(seconds)
        self.collect()

    def inject(self, source: Place, destination: Place, segment: Segment, right: bool = True) -> None:
        """Somebody else sends this to the engine, now."""
        self.sent.insert(0, Packet(build(source, destination, segment, right), None, segment))
        self.through(self.sent.pop(0))

    def inject_to_backend(self, segment: Segment, right: bool = True) -> None:
        """As if the client had sent it."""
        self.inject(self.place, VIP, segment, right)

    def inject_to_client(self, segment: Segment, right: bool = True) -> None:
        """As if the backend had sent it, to the flow's SNAT address and port."""
        assert self.flow
        self.inject(self.flow.backend, self.flow.snat, segment, right)

    # ---- what must hold --------------------------------------------------------------------------------------

    def _open(self) -> bool:
        """Both ends hold the connection, and neither has begun to end it."""
        ends = self.ends()
        return bool(ends) and all(e.state is State.ESTABLISHED and not e.closing for e in ends or ())

    def _check_flows(self) -> None:
        """Only a client that has proved the backend's number has an established flow."""
        for flow in self.engine.flows():
            if flow.state == "ESTABLISHED":
                assert flow.client == self.place, f"established by nobody: {flow}"
                assert self.ever_synchronized, f"established before the client has proved anything: {flow}"

    def engine_knows_the_end(self) -> bool:
        """Both FINs and what acknowledges them, or a reset that was exact, have come by at the engine."""
        seen = list(self.seen.values())
        return not self.hidden and (
            any(s.reset for s in seen)
            or (
                len(seen) == 2
                and all(
                    one.fin and other.acknowledged is not None and behind(other.acknowledged, one.end) >= 0
                    for one, other in (seen, seen[::-1])
                )
            )
        )

    def check(self) -> None:
        """The flow's fate is what the two ends decide."""
        wrong = self.engine.unsound()
        assert not wrong, wrong
        self._check_flows()
        flow, ends, peer = self.flow, self.ends(), self.peer
        if ends and not self.expired and not all(e.closing for e in ends):
            assert flow, "both ends hold the connection, and the flow is gone"
            end = next(p for b in self.backends.values() for p, e in b.ends.items() if e is ends[1])
            assert flow.snat == end, f"the flow is another one: {flow}"
            idle = self.now - self.last_genuine
            if self._open():
                assert flow.state == "ESTABLISHED", f"both ends hold the connection: {flow}"
                left = self.engine.timeout("ESTABLISHED") - idle - 1
            else:
                assert flow.state not in ("CLOSED", "TIME_WAIT"), f"one side may still send: {flow}"
                left = self.engine.timeout("CLOSING") - idle - 1
            assert self.engine.survives_seconds(flow, max(left, 0)), f"it would not be kept for {left:.0f} s: {flow}"
            assert self.engine.survives_flood(flow), f"a flood would take it: {flow}"
        if self.client.state in ENDED and (peer is None or peer.state in ENDED) and self.engine_knows_the_end():
            # A stranger may have asked for another one since, with the same addresses.
            assert not flow or flow.state in ("CLOSED", "TIME_WAIT", "SYN", "SYN_ACK"), f"both ends have ended: {flow}"
            assert not flow or not self.engine.survives_seconds(flow, LONG_ENOUGH_SECONDS), f"held for nobody: {flow}"

    def open(self) -> None:
        """A connection that both ends hold, all acknowledged."""
        self.client.connect()
        self.settle()
        assert self._open()
        self.check()

    def finish(self) -> None:
        """Nothing is lost any more: whatever the two ends have decided comes about, and the flow's fate with it."""
        for _ in range(300):
            self.settle()
            self.check()
            ends = [e for e in (self.client, self.peer) if e]
            if all(e.state in ENDED for e in ends):
                return
            self.time_passes(1)
            if not self.sent:  # nobody has anything more to say
                return
