"""What the keeper and the newcomer do with a packet, and the list between them: rules 6 and 7 of the mirror."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .mirror_ends import KEEPER, NEWCOMER, Around, End, Label, Packet, Setting, Wrong, is_reply


@dataclass(frozen=True, slots=True)
class Rules:
    """What the protocol does against holes. Each can be left out, to show that the walk finds what it is for."""

    stays: bool = True
    """[1] A flow that has ended or idled out stays until it is swept."""
    reads_entry: bool = True
    """[2] The keeper reads the entry before any packet of a flow whose entry is not `live`."""
    asked: bool = True
    """[3] The newcomer leaves a mark when it rejects an opener on `live`; with it the keeper takes the opener."""
    revives_by_swap: bool = True
    """[4] A flow goes on after its end only by closing -> live."""
    drained: bool = True
    """[4] The keeper removes a flow when what stood in its ring as the entry became `closing` is handled."""
    udp_leaves: bool = True
    """[5] A UDP flow that is to leave its backend is given up; the keeper opens nothing for it."""
    ports_reserved: bool = True
    """[6] Ports on the list are taken until `gone`."""
    cursor: bool = True
    """[6] The newcomer takes up the search for ports where the keeper ended."""
    parks_unknown: bool = True
    """[7] Until the list is published the keeper parks mirrored packets without a flow."""
    every_marker: bool = True
    """The list is published when the markers of all CPUs are there."""
    scan_spares: bool = True
    """[8] A scan for open fences leaves shards in mirror alone."""
    fences_changes: bool = True
    """[9] A new epoch is released when its queue has all of the old one."""
    any_epoch: bool = True
    """[10] A side takes mirrored packets of any epoch as long as the shard is its own."""
    ends_by_markers: bool = True
    """[11] The list goes when markers of all CPUs came to both queues."""
    crash_rule: bool = True
    """[12] An adopter makes flows and entries agree."""
    by_slot: bool = True
    """[13] A copy goes to the queue that its stamp names for this engine."""
    sweeps_kept: bool = True
    """[15] The keeper goes on sweeping."""
    whole_key: bool = True
    """[16] An entry names the protocol too."""
    asks_for_any: bool = True
    """Openers on `closing` are for the newcomer whatever state the keeper's flow is in."""
    publishes_once: bool = True
    """Who adopts a shard that is KEPT leaves its list as it is."""
    waits_first: bool = True
    """The newcomer handles nothing from before the word names it alone until it has all that the keeper gives."""
    room_first: bool = True
    """Whether it has room is asked while there is a way back."""
    given_by_markers: bool = True
    """The keeper gives when the markers of all CPUs are there."""
    copies_all: bool = True
    """The newcomer is released when it has all."""
    leaves_claimed: bool = True
    """What was claimed is not given."""
    handed_are_kept: bool = True
    """Copies of what was given are the keeper's."""
    takes_left: bool = True
    """But for a SYN that it has left to the newcomer."""


class Flow(NamedTuple):
    """State: S (half open), E(stablished), C(losed), W (time-wait), U(DP)."""

    inc: int
    state: str
    place: int
    fins: int = 0
    """1: client's, 2: backend's, 4: the backend's came first, 8: a reset was believed."""
    other: int = 0
    """A SYN of another connection that was passed on."""
    idle: int = 0
    """-1: used since the ring was empty, 1: ended or idled out, 2: and all of `behind` is handled."""
    behind: tuple[Label, ...] = ()
    """Names of the packets that stood in the keeper's ring when the entry became `closing`."""


class Entry(NamedTuple):
    place: int
    state: str
    """live, closing, claimed, gone, or handed: the newcomer has the flow itself"""
    asked: bool = False
    closing: bool = False
    """It was, when it was handed."""


class Engines(Around):
    """Shards and list of one bucket. A method that ends in `_finish`, `_park` or `_set_pc` handles a packet."""

    def __init__(self, setting: Setting, rules: Rules) -> None:
        super().__init__(setting)
        self.rules = rules
        self.kept = "owned"
        """The keeper's shard: owned, then kept."""
        self.newcomer_epoch = 0
        """Of the newcomer's shard; 0 = WAITING."""
        self.list: dict[int, Entry] = {}
        self.unmapped = False
        self.rolled = False
        """Rolled back: the keeper owns at the newest epoch."""
        self.flows: tuple[dict[int, Flow], ...] = ({}, {})
        self.cursors: tuple[int, ...] = (0, 0)
        self.pc: tuple[Label | None, ...] = (None, None)
        """What a core has still to do for its packet, which stands in its queue until then."""
        self.redo: tuple[Label | None, ...] = (None, None)
        """The step that an adopter begins with: its predecessor died in it."""
        self.serving = True
        """Backend 0 gets new flows. (Backend 1 always does.)"""
        self.half: dict[tuple[Any, ...], str] = {}
        """Packets of which one copy is done, and how."""
        self.excused = False
        """Openers may be lost: somebody died or it was rolled back. They come again."""
        for c in setting.established:
            self._start(c)
        if setting.ended_before:
            self.backends[0] = End(0, 0, "T")
            self.cursors = (1, 0)

    def _start(self, c: int) -> None:
        place = self._draw(KEEPER, c in self.setting.udp)
        self._flow(KEEPER, c, Flow(1, "U" if c in self.setting.udp else "E", place))
        self.backends = {**self.backends, place: End(c, 1, "E")}
        self._client(c, End(c, 1, "E"))

    def _entry(self, c: int, e: Entry) -> None:
        self.list = {**self.list, c: e}

    def _flow(self, side: int, c: int, f: Flow) -> None:
        flows = {**self.flows[side], c: f}
        self.flows = (flows, self.flows[1]) if side == KEEPER else (self.flows[0], flows)

    def _remove(self, side: int, c: int) -> None:
        flows = {k: v for k, v in self.flows[side].items() if k != c}
        self.flows = (flows, self.flows[1]) if side == KEEPER else (self.flows[0], flows)

    def _set_pc(self, side: int, what: Label | None) -> None:
        self.pc = tuple(what if i == side else x for i, x in enumerate(self.pc))

    def _find(self, side: int, p: Packet) -> tuple[int, Flow | None]:
        if not is_reply(p.kind):
            return p.conn, self.flows[side].get(p.conn)
        for c, f in self.flows[side].items():
            if f.place == p.place:
                return c, f
        return p.conn, None

    def _listed(self, p: Packet) -> tuple[int, Entry | None]:
        for c, e in self.list.items():
            if e.place == p.place if is_reply(p.kind) else c == p.conn:
                return c, e
            # Connections with the same addresses and ports are told apart by nothing else.
            if not self.rules.whole_key and not is_reply(p.kind):
                return c, e
        return p.conn, None

    # ---- the keeper ----------------------------------------------------------------------------------------------------

    def _keeper(self, p: Packet, source: int | None) -> None:
        c, f = self._find(KEEPER, p)
        if self.kept == "given":
            raise Wrong(f"{p} comes to the keeper, which has given all")
        if p.mirror and not self.rules.by_slot:
            return self._finish(KEEPER, p, source, "drop")
        if self.word == "back" and not self.rolled and not p.mirror and p.epoch == self.epoch:
            return self._park(KEEPER, p, source)
        if self.kept == "kept":
            if self._too_new(p):
                return self._park(KEEPER, p, source)
            return self._keeper_of_list(p, source, c, f)
        if self.rolled and not self.rules.fences_changes and p.epoch < self.epoch:
            return self._finish(KEEPER, p, source, "late")
        if f is None and p.mirror and not self.rolled:
            if self.rules.parks_unknown:
                return self._park(KEEPER, p, source)
            return self._finish(KEEPER, p, source, "reject")
        return self._own(KEEPER, p, source, c, f)

    def _keeper_of_list(self, p: Packet, source: int | None, c: int, f: Flow | None) -> None:
        if f is None:
            return self._finish(KEEPER, p, source, "reject")
        e = self.list.get(c)
        if e is None:  # a flow that is on no list: nobody knows of it
            e = Entry(f.place, "live")
        if e.state in ("claimed", "gone") and self.rules.reads_entry:
            self._remove(KEEPER, c)
            return self._finish(KEEPER, p, source, "reject")
        if f.state == "U" and self._leaves(f) and p.kind == "D":
            if self.rules.udp_leaves:
                return self._finish(KEEPER, p, source, "excused")
            self._remove(KEEPER, c)  # as today: it begins anew elsewhere
            return self._open(KEEPER, p, source)
        if f.state == "C" and e.state == "live":
            # Not said in the rules: only an adopter, or nobody, sees this.
            self._closing(c)
            e, f = self.list[c], self.flows[KEEPER][c]
        if e.state == "closing":
            ended = f.state in "C" or self.rules.asks_for_any
            if p.kind == "S" and ended:
                if not self.rules.asked or not e.asked or not self._serves(f.place):
                    return self._finish(KEEPER, p, source, "left")
                self._entry(c, Entry(e.place, "live"))
                return self._set_pc(KEEPER, ("reopened", c, p, source))
            if self._revives(f, p):
                if self.rules.revives_by_swap:
                    self._entry(c, e._replace(state="live"))
                return self._set_pc(KEEPER, ("tracked", c, p, source))
        if p.kind == "S" and f.state == "W":
            return self._then_reopened(KEEPER, c, p, source)
        return self._then_tracked(KEEPER, c, p, source)

    def _revives(self, f: Flow, p: Packet) -> bool:
        """Does the packet show that the flow goes on after its end?"""
        if p.kind in "RrXS" or (f.state == "U" and self._leaves(f)):
            return False
        if p.kind == "s" and p.inc == f.other:
            return True
        if f.state == "C":
            return bool(f.fins & 8) and p.inc == f.inc and p.kind in "Aa"
        return f.idle > 0 and (p.inc == f.inc or f.state == "U")

    def _then_tracked(self, side: int, c: int, p: Packet, source: int | None) -> None:
        f = self.flows[side][c]
        new, verdict = self._track(f, p)
        if new != f:
            self._flow(side, c, new)
        e = self.list.get(c) if side == KEEPER and self.kept == "kept" else None
        if e is not None and new.state == "C" and e.state == "live":
            if not self.rules.stays:
                self._remove(KEEPER, c)
            return self._set_pc(side, ("closed", c, p, source, verdict, f.place))
        return self._finish(side, p, source, verdict, f.place)

    def _then_closed(self, side: int, c: int, p: Packet, source: int | None, verdict: str, place: int) -> None:
        if c in self.flows[KEEPER]:
            self._closing(c)
        else:
            self._entry(c, self.list[c]._replace(state="closing"))
        self._finish(side, p, source, verdict, place)

    def _restart_timers(self, p: Packet, verdict: str) -> None:
        """A flow that was used just now does not idle out before what stands in the ring is handled: see Flow.idle."""
        if not self._before(KEEPER):
            self._ring_is_empty()
        elif p.conn in self.flows[KEEPER] and verdict in ("took", "passed"):
            f = self.flows[KEEPER][p.conn]
            if f.idle == 0:
                self._flow(KEEPER, p.conn, f._replace(idle=-1))

    def _ring_is_empty(self) -> None:
        for c, f in self.flows[KEEPER].items():
            if f.idle < 0:
                self._flow(KEEPER, c, f._replace(idle=0, behind=()))

    def _too_new(self, p: Packet) -> bool:
        return p.epoch > 2 and self._counts_epoch(p)

    def _counts_epoch(self, p: Packet) -> bool:
        """Of mirrored packets only the owner counts."""
        return not (p.mirror and self.rules.any_epoch)

    # ---- the newcomer --------------------------------------------------------------------------------------------------

    def _newcomer(self, p: Packet, source: int | None) -> None:
        if self.word == "back":
            return self._finish(NEWCOMER, p, source, "excused")
        if (
            self.newcomer_epoch == 0
            or self.waits
            or self.away[NEWCOMER]
            or (p.epoch > self.newcomer_epoch and self._counts_epoch(p))
        ):
            return self._park(NEWCOMER, p, source)
        if p.epoch < self.newcomer_epoch and self._counts_epoch(p):
            return self._finish(NEWCOMER, p, source, "late")
        handled = self._was_handled(p)
        if handled:
            return self._finish(NEWCOMER, p, source, handled)
        c, f = self._find(NEWCOMER, p)
        if f is None and p.mirror:
            c, e = self._listed(p)
            if e is not None and e.state != "gone":
                if p.kind in "SD" and e.state == "closing":
                    self._entry(c, e._replace(state="claimed"))
                    return self._set_pc(NEWCOMER, ("open", p, source, e.place))
                if p.kind in "SD" and e.state == "live" and self.rules.asked:
                    self._entry(c, e._replace(asked=True))
                    return self._finish(NEWCOMER, p, source, "asked")
                return self._finish(NEWCOMER, p, source, "reject")
        return self._own(NEWCOMER, p, source, c, f)

    def _was_handled(self, p: Packet) -> str:
        raise NotImplementedError

    def _then_open(self, side: int, p: Packet, source: int | None, place: int) -> None:
        """The claimer takes the entry's place, if it still serves."""
        if self._serves(place):
            return self._insert(side, p, source, place)
        return self._open(side, p, source)

    # ---- as without a mirror -------------------------------------------------------------------------------------------

    def _own(self, side: int, p: Packet, source: int | None, c: int, f: Flow | None) -> None:
        """As an engine does it without a mirror."""
        if f is not None and f.state == "U" and self._leaves(f) and p.kind == "D":
            self._remove(side, c)
            f = None
        if f is not None and p.kind == "S" and f.state in "CW" and not self._serves(f.place):
            self._remove(side, c)
            f = None
        if f is None and p.kind in "SD":
            return self._open(side, p, source)
        if f is None:
            if self._alive(p.conn, p.inc) and not self._elsewhere(p):
                raise Wrong(f"{('keeper', 'newcomer')[side]} answers {p} of a connection that it does not have")
            return self._finish(side, p, source, "drop")
        if p.kind == "S" and f.state in "CW":
            return self._then_reopened(side, c, p, source)
        return self._then_tracked(side, c, p, source)

    def _then_reopened(self, side: int, c: int, p: Packet, source: int | None) -> None:
        self._flow(side, c, Flow(p.inc, "S", self.flows[side][c].place))
        self._finish(side, p, source, "took", self.flows[side][c].place)

    def _track(self, f: Flow, p: Packet) -> tuple[Flow, str]:
        """What the packet does to the flow's state. -> and whether it is one of this connection, or only passed on"""
        if f.state == "U":
            return f._replace(idle=0, behind=()), "took"
        if p.inc != f.inc:
            if p.kind == "s" and p.inc == f.other:
                return Flow(p.inc, "E", f.place), "took"
            if p.kind == "S" and p.inc > f.inc:
                return f._replace(other=max(f.other, p.inc)), "passed"
            return f, "passed"
        if p.kind in "RrX":
            return (f._replace(state="C", fins=f.fins | 8, idle=1) if f.state == "E" else f), "took"
        if p.kind == "S" or f.state in "CW":
            if p.kind in "Aa" and f.state == "C" and f.fins & 8:
                return f._replace(state="E", fins=f.fins & ~8, idle=0, behind=()), "took"
            return f, "took"
        f = f._replace(idle=0, behind=())
        if p.kind == "s":
            return f._replace(state="E"), "took"
        if p.kind in "Ff":
            fins = f.fins | (1 if p.kind == "F" else 2)
            if p.kind == "f" and not f.fins & 1:
                fins |= 4
            if fins & 3 == 3:
                return f._replace(
                    fins=fins, state="W" if fins & 4 else "C", idle=0 if fins & 4 else 1, behind=()
                ), "took"
            return f._replace(fins=fins), "took"
        return f, "took"

    def _open(self, side: int, p: Packet, source: int | None) -> None:
        place = self._draw(side, p.kind == "D")
        if place < 0 or (side == NEWCOMER and len(self.flows[side]) >= self.setting.room):
            return self._finish(side, p, source, "excused")
        return self._insert(side, p, source, place)

    def _insert(self, side: int, p: Packet, source: int | None, place: int) -> None:
        self._flow(side, p.conn, Flow(p.inc, "U" if p.kind == "D" else "S", place))
        self._finish(side, p, source, "took", place)

    def _serves(self, place: int) -> bool:
        return self.serving or place % 100 >= 10

    def _leaves(self, f: Flow) -> bool:
        return not self._serves(f.place)

    def _draw(self, side: int, udp: bool) -> int:
        """-> a place that no flow of this side has, nor the list; -1 = there is none"""
        base, n = (100 if udp else 0) + (0 if self.serving else 10), self.setting.ports
        used = {f.place for f in self.flows[side].values()}
        if side == NEWCOMER and self.rules.ports_reserved:
            used |= {e.place for e in self.list.values() if e.state != "gone"}
        for i in range(n):
            at = (self.cursors[side] + i) % n
            if base + at not in used:
                self.cursors = tuple((at + 1) % n if s == side else x for s, x in enumerate(self.cursors))
                b = self.backends.get(base + at)
                if b is not None and b.state == "T":
                    raise Wrong(f"port {base + at} is handed out first, though the backend keeps it in TIME-WAIT")
                return base + at
        return -1

    def _finish(self, side: int, p: Packet, source: int | None, verdict: str, place: int = -1) -> None:
        """The packet leaves its queue, and in the same moment, if it goes on, reaches the other end."""
        self._pop(side, source)
        if verdict in ("took", "passed"):
            if is_reply(p.kind):
                self._reach_client(p)
            else:
                self._reach_backend(p, place)
        if side == KEEPER and self.kept == "kept":
            self._restart_timers(p, verdict)
        self._done(p, verdict)

    # ---- the list ------------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        self.list = {c: Entry(f.place, "live") for c, f in self.flows[KEEPER].items()}
        for c, f in self.flows[KEEPER].items():
            if f.state == "C":
                self._closing(c)
        if self.rules.cursor:
            self.cursors = (self.cursors[0], self.cursors[0])

    def _closing(self, c: int) -> None:
        self._entry(c, self.list[c]._replace(state="closing"))
        names = tuple(sorted({p[:4] for p in self._before(KEEPER) if p.conn == c}))
        self._flow(KEEPER, c, self.flows[KEEPER][c]._replace(idle=1, behind=names))

    def _before(self, side: int) -> list[Packet]:
        """Packets on their way to this side."""
        frames = (*self.streams[side][0], *self.streams[side][1], *self.parked[side])
        return [p for p in frames if isinstance(p, Packet)]

    def _then_kept(self, side: int) -> None:
        self.kept = "kept"

    def _then_gone(self, side: int, c: int) -> None:
        self._entry(c, self.list[c]._replace(state="gone"))

    def _lapse(self, c: int, f: Flow) -> None:
        """A connection that was not used for so long is over for its ends too."""
        if f.state == "U":
            return
        b = self.backends.get(f.place)
        if b is not None and (b.conn, b.inc) == (c, f.inc) and b.state == "E":
            self.backends = {**self.backends, f.place: b._replace(state="C", owes=False)}
            if self.clients[c].inc == f.inc:
                self._client(c, self.clients[c]._replace(state="C"))

    # ---- what was promised ---------------------------------------------------------------------------------------------

    def _done(self, p: Packet, verdict: str) -> None:
        """One copy of the packet is done. Of the last one: is what became of both what was promised?"""
        both = {verdict}
        if p.mirror:
            name = p[:4]
            if name not in self.half:
                self.half = {**self.half, name: verdict}
                return
            first = self.half[name]
            self.half = {k: v for k, v in self.half.items() if k != name}
            if first == verdict == "took" and not self._harmless_twice(p):
                raise Wrong(f"{p} is taken by both")
            both.add(first)
            if (first, verdict) == ("left", "asked") or ("left" in both and not self.serving):
                # A packet of the connection before revived it between the two, or its backend gets no new connections:
                return  # the client asks again
        if both & {"took", "passed"}:
            return
        if "late" in both:
            raise Wrong(f"{p} came when its epoch was over")
        if "lost" in both:
            return
        if p.kind in "SD":
            end = self.clients[p.conn]
            heard = self._alive(p.conn, p.inc) or self._claimed_for(p)
            wanted = not heard and (p.kind == "D" or (end.inc == p.inc and end.state == "S"))
            if wanted and not self.excused and "excused" not in both:
                raise Wrong(f"{p} is taken by none")
        elif p.kind == "s" and self._claimed_for(p):
            # The keeper had passed the SYN on through a flow that was ending, and then it was claimed: answered again.
            b = self.backends[p.place]
            self.backends = {**self.backends, p.place: b._replace(owes=(b.conn, b.inc) == (p.conn, p.inc))}
        elif not self._elsewhere(p) and self._alive(p.conn, p.inc):
            raise Wrong(f"{p} of a connection that lives is taken by none")

    def _harmless_twice(self, p: Packet) -> bool:
        """Segments of a connection that is over by now are no more than such as the network held back. A datagram may
        reach two backends while its flow leaves one."""
        e = self.list.get(p.conn)
        gave_up = ("moves",) in self.counts and e is not None and e.state in ("claimed", "gone")
        return not self.serving if p.kind == "D" else gave_up or not self._alive(p.conn, p.inc)

    def _elsewhere(self, p: Packet) -> bool:
        """Is it of a backend to which the client's connection does not lead any more?"""
        has = [flows[p.conn] for flows in self.flows if p.conn in flows]
        return is_reply(p.kind) and bool(has) and all(f.place != p.place for f in has)

    def _claimed_for(self, p: Packet) -> bool:
        """Has the newcomer a flow between these two, or is about to make one?"""
        claim, f = self.pc[NEWCOMER], self.flows[NEWCOMER].get(p.conn)
        has = [f.place] if f is not None and f.inc >= p.inc else []
        if claim is not None and claim[1].conn == p.conn:
            has.append(claim[3])
        return p.place in has if is_reply(p.kind) else bool(has)
