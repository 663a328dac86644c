"""Mirror for one bucket: two sets of engines that get a copy of each packet and agree by a list which of them handles it.

A pure model in the smallest steps that can interleave. The *keeper* owned the bucket before the switch and keeps its
connections, the *newcomer* takes new ones. They share nothing but the list that the keeper publishes, one state byte
a connection. Ends of connections, the director's CPUs, both queues and the agent are here too. `enabled` says what
can happen now, `do` lets it happen, `Wrong` is raised when a promise is broken; whoever drives the model chooses.

What the model takes for granted
- From one CPU to one queue order is kept; nothing across CPUs or queues. The two copies of a packet are apart.
- A core changes one word at a time, and may die between any two changes. Its packet is then handled again from the
  start (`tests/crash` shows that a batch happens once or not at all); queues and parking outlive it.
- A state byte changes by compare-and-swap that is tried again after another look, so a look and the change are one.
- Time is nothing but order: whatever has a timer may run out at any step. What is sent has left.
- A packet does not lie in a queue for as long as a timer runs (`_copies_late`); nothing else is taken from time.

Found by the walk, and changed in the rules (each with the shortest way to it):
1. *The keeper removes a flow only when all that stood in its receive ring as the entry became `closing` is handled;
   `gone` comes right after.* The rule had an empty ring between removal and `gone`, which helps nobody, and a busy ring is
   never seen empty. Way: a datagram comes, the newcomer sees `live` and rejects its copy; the flow idles out and the next
   sweep removes it; the keeper's copy finds no flow: taken by none.
2. *An opener at the keeper on `closing` is the newcomer's unless asked for, whatever state the flow is in*, not only
   CLOSED. Way: a half open flow idles out; the client's SYN comes again; the keeper handles it as one of its flow, the
   newcomer claims the entry: taken by both. *And whatever else would change such a flow makes it `live` first.*
3. *Of a mirrored packet the epoch does not count, only that the shard is still this side's (WAITING parks).* Way: the
   newcomer has parked a packet stamped e+1; an engine of the keeper's set vanishes, words say e+2; markers of all CPUs
   come, the newcomer is released at e+2: what it parked is late. To wait for the parking would not do: a packet stamped
   e+2 from one CPU is parked before one stamped e+1 from another, which waits behind it for a release that waits for it.
   So the side that stays needs no fence, and an engine may vanish before the release, too.
   Pair, word and shard of the side that moves change one after the other. The newcomer's pair goes first: copies that are
   stamped by the old word come to an engine that they do not name. The keeper's shard goes first: a bucket that ends before
   the word has changed has a queue to wait for. A newcomer is moved when it was released, not while it waits.
4. *The list goes only when both queues have handled what they parked, too.* Way: one opener, parked; released; nothing
   is on the list, so the bucket ends; all markers come, the list is unmapped; then the parked opener looks at it.
5. *The sweep goes through the entries, not the flows.* Way: a datagram is claimed; the keeper's copy removes the flow, as
   it must; nobody makes the entry `gone`, the bucket never ends. Then adopters need no rule of their own: the next sweep
   finds what the dead one left. But a KEPT shard's list is never made anew: claims would be lost.
6. *Rolled back, the keeper handles as its own what it had parked*, before the bucket is mirrored again. Way: a packet of
   a connection whose first one is under way on another CPU is parked; rolled back; nobody ever handles it.

What is not promised
- A reset that nobody sent and the keeper believed, together with a SYN of the same connection sent again.
- While its last packets are on the way an entry may be `closing` at the keeper before the newcomer sees a repeated SYN of
  it: the newcomer then opens a ghost of a connection that is over, as if the network had held back that SYN.
- A SYN on `closing` that a late packet of the connection before makes `live` between the two looks is taken by none, once.
- A datagram may be lost or reach two backends while its flow leaves one, and be lost when one behind it was claimed.
- Whoever dies, is rolled back or vanishes may lose openers; they come again and are heard (`check_openers`).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .mirror_ends import CPUS, KEEPER, NEWCOMER, Label, Packet, Setting, Wrong
from .mirror_engines import Rules
from .mirror_handover import HAND, Handover

SWITCH, END, BACK = 1, 2, 3
"""What markers are for."""
NOTHING, ALL = Setting(), Rules()


class Mirror(Handover):
    """One bucket of two sets."""

    def __init__(self, setting: Setting = NOTHING, rules: Rules = ALL) -> None:
        super().__init__(setting, rules)
        self.dead = (False, False)
        self.since = 0
        """Copies with an older epoch name a newcomer's engine that is gone."""

    def copy(self) -> "Mirror":
        new = Mirror.__new__(Mirror)
        new.__dict__.update(self.__dict__)
        return new

    def key(self) -> Any:
        """Equal for two that cannot be told apart from now on: which of two CPUs is which does not matter."""
        cpus = [(self.streams[0][cpu], self.streams[1][cpu], self.marks[cpu], self.lost[cpu]) for cpu in CPUS]
        if self.setting.any_cpu and not self.setting.deaths:  # `redo` names a CPU
            cpus.sort()
        return (
            *cpus,
            self.word, self.epoch, self.kept, self.waits, self.newcomer_epoch, self.rolled, self.unmapped, self.cursors,
            self.parked, self.pc, self.redo, self.dead, self.away, self.since, self.clients, self.serving, self.excused,
            tuple(sorted(self.list.items())), tuple(sorted(self.flows[0].items())), tuple(sorted(self.flows[1].items())),
            tuple(sorted(self.backends.items())), frozenset(self.counts.items()), tuple(sorted(self.half.items())),
        )  # fmt: skip

    # ---- what can happen -----------------------------------------------------------------------------------------------

    def enabled(self) -> list[Label]:
        """All steps. Those of `progress` happen some day without anybody's will."""
        progress = self.progress()
        return progress if self._takes_marker(progress) else [*progress, *self.environment()]

    def _takes_marker(self, progress: list[Label]) -> bool:
        if self.setting.losses or len(progress) != 1 or progress[0][0] != "take":
            return False
        return bool(self.streams[progress[0][1]][progress[0][2]][0][0] == "marker")

    def progress(self) -> list[Label]:
        for side in (KEEPER, NEWCOMER):
            if self.dead[side] or self.pc[side] is not None or self.redo[side] is not None or self.setting.losses:
                continue
            for cpu in CPUS:
                if self.streams[side][cpu] and self.streams[side][cpu][0][0] == "marker":
                    return [("take", side, cpu)]  # as if at once: who waits for it may be slow instead
        out: list[Label] = []
        for side in (KEEPER, NEWCOMER):
            if self.dead[side]:
                if not self.away[side]:
                    out.append(("adopt", side))
            elif self.pc[side] is not None:
                out.append(("go on", side))
            elif (redo := self.redo[side]) is not None:
                out.append(redo)
            else:
                out += [("take", side, cpu) for cpu in CPUS if self._takes(side, cpu)]
                if self.parked[side] and self._admits_parked(side):
                    out.append(("take parked", side))
        return [*out, *self._sweeps(), *self._agent(), *self._handing(), *self._owed()]

    def _takes(self, side: int, cpu: int) -> bool:
        return bool(self.streams[side][cpu])

    def _admits_parked(self, side: int) -> bool:
        p = self.parked[side][0]
        if side == NEWCOMER:
            if self.away[side] or self.waits:
                return False
            if self._counts_epoch(p):
                return self.word == "back" or self.newcomer_epoch >= p.epoch
            return self.word == "back" or self.newcomer_epoch > 0
        return self.rolled or (self.kept == "kept" and not self._too_new(p) and self.word != "back")

    def _sweeps(self) -> Iterator[Label]:
        """Timers of the keeper: they come some day for flows whose ends have given up."""
        if self.dead[KEEPER] or self.pc[KEEPER] is not None:
            return
        if self.kept != "kept":
            return
        if not self.rules.sweeps_kept:
            return
        names = {p[:4] for p in self._before(KEEPER)}
        for c, e in self.list.items():
            f = self.flows[KEEPER].get(c)
            if f is None:
                if e.state != "gone" and self.rules.crash_rule:
                    yield ("sweep", c)
            elif e.state in ("claimed", "gone"):
                if self.rules.crash_rule or e.state == "claimed":
                    yield ("sweep", c)
            elif self._copies_late(c):
                continue
            elif e.state == "live" and not self._alive(c, f.inc):
                yield ("expire", c)
            elif e.state == "closing" and (f.idle == 2 or not self.rules.drained or not names & set(f.behind)):
                yield ("sweep", c)

    def _copies_late(self, c: int) -> bool:
        """Was the flow used just now, or is a copy of what it took still before the newcomer, or what waits there for the
        flow to come? No timer runs out so soon."""
        f = self.flows[KEEPER][c]
        b = self.backends.get(f.place)
        return (
            f.idle < 0
            or (b is not None and b.owes)
            or (self.word == "handing" and any(p.conn == c and not p.mirror for p in self._before(NEWCOMER)))
            or any(n[1] == c and verdict in ("took", "passed", "lost") for n, verdict in self.half.items())
        )

    def _agent(self) -> Iterator[Label]:
        word = self.word
        yield from (("mark", *mark, cpu) for cpu in CPUS for mark in self.lost[cpu])
        if self.away[KEEPER]:
            yield ("keeper moves",)
        if self.away[NEWCOMER] and self.newcomer_epoch and not self.waits:
            yield ("newcomer moves",)
        if word == "keeper":
            yield ("switch",)
        elif word == "both" and not self.waits:
            if self.newcomer_epoch == 0:
                if self.kept == "kept" or not self.rules.scan_spares:
                    yield ("release",)
            elif self.newcomer_epoch < self.epoch:
                yield ("release",)
            elif self.kept == "kept" and all(e.state == "gone" for e in self.list.values()):
                yield ("end",)
        elif word == "newcomer" and not self.unmapped:
            if self._has_all(END) or not self.rules.ends_by_markers:
                yield ("unmap",)
        elif word == "back" and not self.rolled and self.pc[KEEPER] is None:
            if self._marked(BACK, KEEPER) or not self.rules.fences_changes:
                yield ("rolled",)
        elif word == "back" and self.rolled and not self.parked[KEEPER]:
            yield ("again",)
        if (
            word == "both"
            and self.kept == "owned"
            and not self.dead[KEEPER]
            and self.pc[KEEPER] is None
            and (self._marked(SWITCH, KEEPER) or not self.rules.every_marker)
        ):
            yield ("publish",)

    def _has_all(self, why: int) -> bool:
        """All that was on its way to both queues has been handled, also what they had parked."""
        return self._marked(why, KEEPER) and self._marked(why, NEWCOMER) and not any(self.parked)

    def environment(self) -> Iterator[Label]:
        """What ends and faults may do, as often as the setting allows."""
        s, left = self.setting, self._left
        yield from self._traffic()
        if left("expiries") and not self.dead[KEEPER] and self.pc[KEEPER] is None and self.rules.sweeps_kept:
            for c, f in self.flows[KEEPER].items() if self.kept != "given" else ():
                e = self.list.get(c)
                listed = self.kept == "owned" or (e is not None and e.state == "live")
                if listed and (self._alive(c, f.inc) or c in s.udp) and not self._copies_late(c):
                    yield ("expire", c)
        if left("deaths"):
            yield from (("die", side) for side in (KEEPER, NEWCOMER) if not self.dead[side])
        if left("moves") and self.word != "keeper":
            yield from (("move", side) for side in (KEEPER, NEWCOMER) if not self.away[side])
        if left("backs") and self.word == "both" and self.newcomer_epoch == 0 and not any(self.away):
            yield ("back",)
        if left("losses"):
            for side in (KEEPER, NEWCOMER):
                if self.pc[side] is None and self.redo[side] is None:
                    yield from (("lose", side, cpu) for cpu in CPUS if self.streams[side][cpu])
        if left("leaves") and self.serving:
            yield ("leave",)
        yield from self._may_hand()

    # ---- steps: the agent ----------------------------------------------------------------------------------------------

    def do(self, label: Label) -> None:
        """One step of `enabled`. Raises Wrong."""
        name, *args = label
        getattr(self, "_do_" + name.replace(" ", "_"))(*args)
        self.check()

    def _do_switch(self) -> None:
        self.word, self.epoch = "both", self.epoch + 1
        self._mark_all(SWITCH, KEEPER)

    def _do_release(self) -> None:
        self.newcomer_epoch = self.epoch

    def _do_end(self) -> None:
        self.word = "newcomer"
        if self.away[NEWCOMER] != "worded":  # else when its shard has been released
            self._mark_end()
        if self.away[KEEPER]:  # by its shard it was another's already, or nobody keeps anything
            if self.away[KEEPER] == "gone":
                self._adopt(KEEPER)
            self._set_away(KEEPER, "")

    def _mark_end(self) -> None:
        for side in (KEEPER, NEWCOMER):
            if self.away[side] == "gone" or (side == NEWCOMER and self.away[side]):  # nothing is on its way there
                self.marks = tuple(m | 1 << 2 * END + side for m in self.marks)
            else:
                self._mark_all(END, side)

    def _do_unmap(self) -> None:
        self.unmapped = True
        if self.kept == "given":
            self.flows = ({}, self.flows[NEWCOMER])  # its shard is nobody's

    def _do_back(self) -> None:
        self._count("backs")
        self.word, self.epoch, self.excused = "back", self.epoch + 1, True
        self._mark_all(BACK, KEEPER)

    def _do_rolled(self) -> None:
        """The keeper owns at the newest epoch, as before the switch."""
        self.rolled, self.kept, self.list = True, "owned", {}
        self._ring_is_empty()

    def _do_again(self) -> None:
        """The next try begins as the first one did."""
        self.word, self.rolled, self.marks = "keeper", False, (0, 0)

    def _do_leave(self) -> None:
        """A new configuration: backend 0 gets no new flows."""
        self._count("leaves")
        self.serving = False
        if self.kept == "kept" and self.rules.udp_leaves:
            for c, f in self.flows[KEEPER].items():
                e = self.list.get(c)
                if f.state == "U" and e is not None and e.state == "live" and self._leaves(f):
                    self._closing(c)

    # ---- steps: deaths -------------------------------------------------------------------------------------------------

    def _do_die(self, side: int) -> None:
        self._count("deaths")
        self._die(side)

    def _die(self, side: int) -> None:
        self.excused = True
        left = self.pc[side] or ()
        for what, source in pairwise(left):
            if isinstance(what, Packet):
                redo = ("take parked", side) if source is None else ("take", side, source)
                self.redo = tuple(redo if i == side else x for i, x in enumerate(self.redo))
        self._set_pc(side, None)
        self.dead = tuple(i == side or d for i, d in enumerate(self.dead))  # type: ignore[assignment]

    def _redone(self, side: int) -> None:
        self.redo = tuple(None if i == side else x for i, x in enumerate(self.redo))

    def _do_adopt(self, side: int) -> None:
        self._adopt(side)

    def _adopt(self, side: int) -> None:
        self.dead = tuple(i != side and d for i, d in enumerate(self.dead))  # type: ignore[assignment]
        if side != KEEPER:
            return
        if self.kept == "kept" and not self.rules.publishes_once:
            self._publish()

    def _do_lose(self, side: int, cpu: int) -> None:
        self._count("losses")
        frame = self.streams[side][cpu][0]
        self._pop(side, cpu)
        if isinstance(frame, Packet):
            self._done(frame, "lost")
            self._restart_timers(frame, "lost")
        else:
            self.lost = tuple(lost | {(frame[1], side)} if i == cpu else lost for i, lost in enumerate(self.lost))

    def _do_move(self, side: int) -> None:
        """An engine is gone with all that was on its way to it; another of its set goes on with its shard."""
        self._count("moves")
        self.excused = True
        for p in self._before(side):
            self._done(p, "lost")
        self.streams = tuple(((), ()) if i == side else s for i, s in enumerate(self.streams))
        self.parked = tuple(() if i == side else s for i, s in enumerate(self.parked))
        if side == KEEPER:
            self._ring_is_empty()
        self._die(side)
        self._redone(side)
        if self.word == "both":
            return self._set_away(side, "gone")
        self._adopt(side)
        if (self.word, side) not in (("newcomer", KEEPER), ("handing", KEEPER), ("back", NEWCOMER)):
            self.epoch += 1  # the word names another one now
        if side == NEWCOMER and self.newcomer_epoch and not self.waits:
            self.newcomer_epoch = self.epoch
        bits = sum(1 << 2 * why + side for why in (END, BACK, HAND))
        self.marks = tuple(m | bits for m in self.marks)  # nothing is on its way there: no markers are waited for
        return None

    def _set_away(self, side: int, how: str) -> None:
        self.away = tuple(how if i == side else a for i, a in enumerate(self.away))  # type: ignore[assignment]

    def _do_keeper_moves(self) -> None:
        """Its shard first, then the pair, which leads copies to the new engine, then the word."""
        if self.away[KEEPER] == "gone":
            self._set_away(KEEPER, "paired")
            return self._adopt(KEEPER)
        self._set_away(KEEPER, "")
        if self.kept == "owned":
            self.marks = tuple(m & ~(1 << 2 * SWITCH) for m in self.marks)
            self._mark_all(SWITCH, KEEPER)
        return None

    def _do_newcomer_moves(self) -> None:
        """The pair first: what is stamped by the old word comes to the new engine and is none of its. Then the word, then
        the shard, since nothing is on its way to the engine that is gone."""
        if self.away[NEWCOMER] == "gone":
            self._set_away(NEWCOMER, "paired")
            self.since = self.epoch + 1
            self._adopt(NEWCOMER)
        elif self.away[NEWCOMER] == "paired":
            self._set_away(NEWCOMER, "worded")
            self.epoch += 1
        else:
            self._set_away(NEWCOMER, "")
            self.newcomer_epoch = self.epoch
            if self.word == "newcomer":
                self._mark_end()

    # ---- steps: the list -----------------------------------------------------------------------------------------------

    def _do_publish(self) -> None:
        self._publish()
        if self.setting.deaths:
            self._set_pc(KEEPER, ("kept",))
        else:
            self.kept = "kept"

    def _do_expire(self, c: int) -> None:
        """The keeper's sweep finds a flow that has idled out."""
        f = self.flows[KEEPER][c]
        if self._alive(c, f.inc) or self.kept != "kept":
            self._count("expiries")
        if self.kept != "kept":
            self._lapse(c, f)
            self._remove(KEEPER, c)
            return
        self._closing(c)

    def _do_sweep(self, c: int) -> None:
        f, e = self.flows[KEEPER].get(c), self.list[c]
        if f is None:
            return self._then_gone(KEEPER, c)
        if e.state == "closing" and f.idle < 2 and self.rules.drained:
            self._flow(KEEPER, c, f._replace(idle=2, behind=()))
            return None
        if e.state == "closing":
            self._lapse(c, f)
        self._remove(KEEPER, c)
        return self._set_pc(KEEPER, ("gone", c))

    # ---- steps: a core and its packets ---------------------------------------------------------------------------------

    def _do_take(self, side: int, cpu: int) -> None:
        self._redone(side)
        frame = self.streams[side][cpu][0]
        if isinstance(frame, Packet):
            self._handle(side, frame, cpu)
            return
        self._pop(side, cpu)
        bit = 1 << 2 * frame[1] + side
        self.marks = tuple(m | bit if i == cpu else m for i, m in enumerate(self.marks))

    def _do_take_parked(self, side: int) -> None:
        self._redone(side)
        self._handle(side, self.parked[side][0], None)

    def _do_go_on(self, side: int) -> None:
        what = self.pc[side]
        assert what is not None
        self._set_pc(side, None)
        getattr(self, "_then_" + what[0])(side, *what[1:])

    def _handle(self, side: int, p: Packet, source: int | None) -> None:
        if side == NEWCOMER and p.mirror and p.epoch < self.since:
            return self._finish(side, p, source, "lost")
        if p.mirror and self.unmapped:
            raise Wrong(f"{p} came when the list was unmapped")
        if side == KEEPER:
            return self._keeper(p, source)
        return self._newcomer(p, source)

    # ---- checks --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold between any two steps. Raises Wrong."""
        ours = self.flows[KEEPER]
        for c, f in self.flows[NEWCOMER].items():
            for other, g in ours.items():
                if other != c and (g.place != f.place or (c in self.setting.udp) != (other in self.setting.udp)):
                    continue
                e = self.list.get(other)
                if e is None or e.state in ("live", "closing"):
                    what = "connection" if other == c else "port"
                    raise Wrong(f"both have {what} {c if other == c else f.place}: {g}, {e}; {f}")

    def at_rest(self) -> bool:
        return not self.progress()

    def check_rest(self) -> None:
        """What must hold when nothing happens any more by itself. Raises Wrong."""
        if any(self.parked):
            raise Wrong(f"parked for ever: {self.parked}")
        if any(p for side in self.streams for p in side):
            raise Wrong(f"never taken: {self.streams}")
        if self.half:
            raise Wrong(f"a copy vanished: {self.half}")
        if self.word == "both" and not any(self._alive(c, f.inc) for c, f in self.flows[KEEPER].items()):
            raise Wrong(f"it does not end, though no connection of the keeper lives: {self.list}")
        if self.word == "newcomer" and not self.unmapped:
            raise Wrong("the list stays")
        if self.word == "handing" or self.waits:
            raise Wrong(f"nobody handles: {self.word} {self.kept} {self.flows}")
