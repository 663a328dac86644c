"""What is around a bucket in mirror: both ends of its connections, the director's CPUs, queues, and what was promised.

The ends are TCP's as far as they matter here: they send what they may send, believe what is of their connection, and
say whether a connection lives. What becomes of the two copies of each packet is compared in `_done`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

KEEPER, NEWCOMER = 0, 1
CPUS = (0, 1)
Label = tuple[Any, ...]
"""A step: its name and what it is about."""


class Wrong(AssertionError):
    """A promise of the protocol was broken."""


class Packet(NamedTuple):
    """Kinds, small for replies: S(YN) A(cknowledgement or data) F(IN) R(eset) D(atagram); X: a reset that nobody sent."""

    kind: str
    conn: int
    inc: int
    """Which of the connections between these two ends: what sequence numbers tell."""
    number: int
    place: int
    """Of a reply: backend * 10 + SNAT port, which it is for; and 100 for UDP, whose ports are others."""
    epoch: int
    mirror: bool


class End(NamedTuple):
    """An end of a connection. At the client `state` is C(losed), S(YN sent), E; at the backend C, E or T(IME-WAIT)."""

    conn: int
    inc: int
    state: str
    sent_fin: bool = False
    got_fin: bool = False
    owes: bool = False
    """The backend has not answered the SYN."""


class Setting(NamedTuple):
    """What happens in a walk, how often at most. `udp`: connections with these numbers are UDP."""

    conns: int = 1
    udp: tuple[int, ...] = ()
    established: tuple[int, ...] = ()
    """Connections that the keeper has at the start."""
    opens: int = 1
    """Connections that each client begins."""
    again: int = 0
    """SYNs that are sent once more."""
    data: int = 0
    replies: int = 0
    fins: bool = False
    resets: int = 0
    forged: int = 0
    """Resets that neither end sent."""
    expiries: int = 0
    """Flows that idle out though both ends have not given up."""
    deaths: int = 0
    moves: int = 0
    """Engines that vanish with their queues."""
    backs: int = 0
    losses: int = 0
    hands: int = 0
    """Deadlines at which the keeper's connections go over to the newcomer."""
    interrupts: int = 0
    """Agents that die in this, while it can be undone."""
    room: int = 99
    """Flows that the newcomer's shard can hold."""
    leaves: int = 0
    """Backends that get no new flows any more."""
    ports: int = 2
    ended_before: bool = False
    """Connection 0 ended before, its backend keeps the port in TIME-WAIT."""
    any_cpu: bool = True
    """A connection's packets may come on any CPU; else the clients' on 0 and the backends' on 1."""


def is_reply(kind: str) -> bool:
    return kind.islower()


class Around:
    """Clients, backends and what is on its way. All values within are immutable, so that a copy is cheap."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.word = "keeper"
        """Who owns: keeper, both, handing (the newcomer, once it has all), newcomer, or back (the keeper again)."""
        self.epoch = 1
        self.streams: tuple[tuple[tuple[Any, ...], ...], ...] = (((), ()), ((), ()))
        """side -> CPU -> packets and markers on their way"""
        self.parked: tuple[tuple[Packet, ...], ...] = ((), ())
        self.lost: tuple[frozenset[tuple[int, int]], ...] = (frozenset(), frozenset())
        """CPU -> (what for, side) of markers lost"""
        self.marks: tuple[int, ...] = (0, 0)
        """CPU -> bits of markers received: 1 << 2 * what for + side"""
        self.clients: tuple[End, ...] = tuple(End(c, 0, "C") for c in range(setting.conns))
        self.backends: dict[int, End] = {}
        """Place -> its end of the last connection that used it"""
        self.counts: dict[Any, int] = {}
        self.away = ("", "")
        """By side, how far it is with an engine that vanished: gone, paired (copies go to another), worded (so says the word)."""

    def _count(self, *what: Any) -> int:
        n = self.counts.get(what, 0) + 1
        self.counts = {**self.counts, what: n}
        return n

    def _left(self, what: str, *of: int) -> bool:
        most: int = getattr(self.setting, what)
        return most > 0 and self.counts.get((what, *of), 0) < most

    # ---- what is on its way --------------------------------------------------------------------------------------------

    def _arrive(self, p: Packet, cpu: int) -> None:
        to = [KEEPER] * (self.word in ("keeper", "both", "back")) + [NEWCOMER] * (
            self.word in ("both", "handing", "newcomer")
        )
        for side in to:
            if self._is_lost(side):
                self._done(p, "lost")
            else:
                self._append(side, cpu, p)

    def _done(self, p: Packet, verdict: str) -> None:
        raise NotImplementedError

    def _is_lost(self, side: int) -> bool:
        """Does nobody get what is sent there?"""
        return self.away[side] == "gone" or (self.away[side] == "paired" and self.word == "newcomer")

    def _append(self, side: int, cpu: int, frame: Any) -> None:
        streams = [list(s) for s in self.streams]
        streams[side][cpu] = (*streams[side][cpu], frame)
        self.streams = tuple(tuple(s) for s in streams)

    def _pop(self, side: int, source: int | None) -> None:
        if source is None:
            self.parked = tuple(p[1:] if i == side else p for i, p in enumerate(self.parked))
            return
        streams = [list(s) for s in self.streams]
        streams[side][source] = streams[side][source][1:]
        self.streams = tuple(tuple(s) for s in streams)

    def _park(self, side: int, p: Packet, source: int | None) -> None:
        if source is None:
            return
        self._pop(side, source)
        self.parked = tuple((*ps, p) if i == side else ps for i, ps in enumerate(self.parked))

    def _mark_all(self, why: int, *sides: int) -> None:
        """Markers from all CPUs. Later ones would show no less: who waits for them may be slow instead."""
        for side in sides:
            for cpu in CPUS:
                self._append(side, cpu, ("marker", why))

    def _do_mark(self, why: int, side: int, cpu: int) -> None:
        """Again, after one was lost."""
        self.lost = tuple(lost - {(why, side)} if i == cpu else lost for i, lost in enumerate(self.lost))
        self._append(side, cpu, ("marker", why))

    def _marked(self, why: int, side: int) -> bool:
        bit = 1 << 2 * why + side
        return bool(self.marks[0] & self.marks[1] & bit)

    # ---- the ends ------------------------------------------------------------------------------------------------------

    def _traffic(self) -> Iterator[Label]:
        """What clients and backends may send."""
        s, left = self.setting, self._left
        for c in self.clients:
            if c.conn in s.udp:
                if not c.inc or left("data", c.conn):
                    yield from self._on_cpus("D", c.conn)
                continue
            if s.ended_before and c.conn == 0:
                continue
            if c.state == "C" and c.inc < s.opens:
                yield from self._on_cpus("S", c.conn)
            if c.state == "S" and left("again", c.conn, c.inc):
                yield from self._on_cpus("S", c.conn)
            if c.state == "E":
                if left("data", c.conn):
                    yield from self._on_cpus("A", c.conn)
                if s.fins and not c.sent_fin:
                    yield from self._on_cpus("F", c.conn)
                if left("forged"):
                    yield from self._on_cpus("X", c.conn)
            if c.state != "C" and left("resets"):
                yield from self._on_cpus("R", c.conn)
        for place, b in self.backends.items():
            if b.state != "E" or b.owes:
                continue
            if b.conn in s.udp:
                if left("replies", b.conn):
                    yield from self._on_cpus("d", place, reply=True)
                continue
            client = self.clients[b.conn]
            heard = client.inc != b.inc or client.state != "S"
            if left("replies", b.conn) and heard:
                yield from self._on_cpus("a", place, reply=True)
            if s.fins and not b.sent_fin and heard:
                yield from self._on_cpus("f", place, reply=True)
            if left("resets"):
                yield from self._on_cpus("r", place, reply=True)

    def _owed(self) -> Iterator[Label]:
        for place, b in self.backends.items():
            if b.owes:
                yield from self._on_cpus("s", place, reply=True)

    def _on_cpus(self, kind: str, of: int, reply: bool = False) -> Iterator[Label]:
        for cpu in CPUS if self.setting.any_cpu else (int(reply),):
            yield ("send", kind, of, cpu)

    def _do_send(self, kind: str, of: int, cpu: int) -> None:
        """An end sends; the director stamps it by the word and it is on its way to one queue or two."""
        place = of if is_reply(kind) else -1
        end = self.backends[of] if is_reply(kind) else self.clients[of]
        if kind == "S" and end.state == "C":
            end = End(of, end.inc + 1, "S")
        elif kind == "S":
            self._count("again", of, end.inc)
        elif kind in "DAad":
            self._count("replies" if is_reply(kind) else "data", end.conn)
            if kind == "D" and not end.inc:
                end = End(of, 1, "E")
        elif kind in "Ff":
            end = end._replace(sent_fin=True)
            if end.got_fin:
                end = end._replace(state="C")
        elif kind in "Rr":
            self._count("resets")
            end = end._replace(state="C")
        elif kind == "X":
            self._count("forged")
        elif kind == "s":
            end = end._replace(owes=False)
        if is_reply(kind):
            self.backends = {**self.backends, of: end}
        else:
            self._client(of, end)
        number = self._count("sent", kind, end.conn, end.inc)
        self._arrive(Packet(kind, end.conn, end.inc, number, place, self.epoch, self.word == "both"), cpu)

    def _client(self, c: int, end: End) -> None:
        self.clients = (*self.clients[:c], end, *self.clients[c + 1 :])

    def _reach_backend(self, p: Packet, place: int) -> None:
        b = self.backends.get(place)
        if p.kind in "SD":
            if b is not None and b.state == "E" and b.conn != p.conn and self._alive(b.conn, b.inc):
                raise Wrong(f"{p} uses the port of {b}, which lives")
            if b is None or b.state != "E" or (p.kind == "D" and b.conn != p.conn):
                self.backends = {**self.backends, place: End(p.conn, p.inc, "E", owes=p.kind == "S")}
            elif p.kind == "S" and b.conn == p.conn and b.inc < p.inc == self.clients[p.conn].inc:
                self.backends = {**self.backends, place: b._replace(state="C", owes=False)}  # its answer is reset
            elif p.kind == "S" and (b.conn, b.inc) == (p.conn, p.inc) and self.clients[p.conn].state == "S":
                self.backends = {**self.backends, place: b._replace(owes=True)}
            return
        if b is None or (b.conn, b.inc) != (p.conn, p.inc) or b.state != "E":
            return
        if p.kind == "F":
            b = b._replace(got_fin=True, state="C" if b.sent_fin else "E")
        elif p.kind == "R":
            b = b._replace(state="C", owes=False)
        self.backends = {**self.backends, place: b}

    def _reach_client(self, p: Packet) -> None:
        end = self.clients[p.conn]
        if end.inc != p.inc or end.state == "C":
            b = self.backends.get(p.place)
            if p.kind == "s" and b is not None and (b.conn, b.inc) == (p.conn, p.inc):
                self.backends = {**self.backends, p.place: b._replace(state="C", owes=False)}  # the client resets it
            return
        if p.kind == "s":
            end = end._replace(state="E")
        elif p.kind == "f":
            end = end._replace(got_fin=True, state="C" if end.sent_fin else end.state)
        elif p.kind == "r":
            end = end._replace(state="C")
        self._client(p.conn, end)

    def _alive(self, c: int, inc: int) -> bool:
        """Do both ends have this connection?"""
        end = self.clients[c]
        if end.inc != inc or end.state == "C":
            return False
        if c in self.setting.udp:
            return False  # nobody knows
        return any((b.conn, b.inc, b.state) == (c, inc, "E") for b in self.backends.values())
