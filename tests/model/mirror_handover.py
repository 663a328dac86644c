"""The deadline of a mirror with `onDeadline: Transfer`: what the keeper still has goes over to the newcomer.

The rules, and why in this order
1. *The newcomer waits.* Its engine acknowledges that it handles nothing of the bucket any more; the shard is WAITING again,
   at its epoch. It parks. The keeper goes on, and the word still says both. This alone can be undone without a loss,
   and an agent that died here leaves what one leaves that died in a switch.
2. *What is to come is counted.* Both numbers can only fall from here on. If it has no room, the newcomer is released
   again: the bucket stays mirrored, as with `Keep`. Later there is no way back: a packet that was sent to the newcomer
   alone has no copy for the keeper.
3. *The word names the newcomer alone, at the next epoch.* Then markers of all CPUs to the keeper's queue: when they are
   there, it has handled all copies that it will ever get, and acknowledges: GIVEN. Now nobody handles, nobody writes
   either shard, and whoever copies has both for himself.
4. *Each flow is copied whose entry is `live` or `closing`.* First its entry becomes `handed`, then the newcomer has it. What
   was claimed or is gone is not copied: the newcomer has another connection there. To do it twice does no harm.
5. *The newcomer is released*, at the epoch of the word. Then it ends as any mirror: markers to both queues, and the list goes.
   Until then the newcomer may have copies parked, or on their way, that the keeper has handled: *a copy of a flow
   that was handed is rejected*, but for a SYN on one that was `closing`, which the keeper has left to the newcomer.
The newcomer needs no markers before it waits: the list tells what its late copies are. It would not get them all anyway:
one CPU's packet of the new epoch would be parked before another CPU's of the old one.

What leaves the keeper's interface may be overtaken by what the newcomer sends: egress markers, as in a Transfer, belong
between 3 and 5. That is the same fence, and not in this model, in which what is sent has left.
"""

from collections.abc import Iterator

from .mirror_ends import KEEPER, NEWCOMER, Label, Packet, Wrong
from .mirror_engines import Engines, Flow

HAND = 4
"""What markers are for: all copies have come to the keeper."""


class Handover(Engines):
    """How far it is: the newcomer `waits`; the word says `handing`; the keeper's shard is `given`; the word says `newcomer`."""

    waits = False
    """The newcomer's shard is WAITING, after it was released."""
    kept_on = False
    """There was no room."""

    def _handing(self) -> Iterator[Label]:
        """What the agent and the engines do about it, once begun."""
        if self.word == "both" and self.waits:
            fits = self._fits() or not self.rules.room_first
            yield ("hand",) if fits and not any(self.away) else ("hand back",)
        elif self.word == "handing":
            if self.kept == "kept":
                ready = self._all_handled() if self.rules.given_by_markers else True
                if ready and self._between_packets(KEEPER):
                    yield ("given",)
                return
            copies = [c for c in self.flows[KEEPER] if not self._is_over(c)]
            yield from (("copy", c) for c in copies)
            if not copies or not self.rules.copies_all:
                yield ("release handed",)

    def _may_hand(self) -> Iterator[Label]:
        """The deadline comes, or an agent dies before there is no way back."""
        begun = self.word == "both" and self.kept == "kept" and self.newcomer_epoch == self.epoch
        if self._left("hands") and begun and not self.waits and not any(self.away) and self._between_packets(NEWCOMER):
            yield ("wait",) if self.rules.waits_first else ("hand",)
        if self._left("interrupts") and self.word == "both" and self.waits:
            yield ("interrupted",)

    def _between_packets(self, side: int) -> bool:
        return not self.dead[side] and self.pc[side] is None and self.redo[side] is None

    def _all_handled(self) -> bool:
        return self._marked(HAND, KEEPER) and not self.parked[KEEPER]

    def _comes(self) -> list[int]:
        """Connections that the newcomer is to get."""
        states = {c: self.list[c].state for c in self.flows[KEEPER] if c in self.list}
        return [c for c, state in states.items() if state in ("live", "closing")]

    def _fits(self) -> bool:
        return len(self.flows[NEWCOMER]) + len(self._comes()) <= self.setting.room

    def _is_over(self, c: int) -> bool:
        """Has the copy been made, or is there nothing to copy?"""
        state = self.list[c].state
        if state in ("claimed", "gone") and self.rules.leaves_claimed:
            return True
        return state == "handed" and self.flows[NEWCOMER].get(c) == self._copied(c)

    def _copied(self, c: int) -> Flow:
        return self.flows[KEEPER][c]._replace(idle=0, behind=())

    # ---- steps ---------------------------------------------------------------------------------------------------------

    def _do_wait(self) -> None:
        self._count("hands")
        self.waits = True

    def _do_hand_back(self) -> None:
        self.waits, self.kept_on = False, True

    def _do_interrupted(self) -> None:
        """The next agent takes it for a switch to be finished, and releases."""
        self._count("interrupts")
        self.waits = False

    def _do_hand(self) -> None:
        if not self.rules.waits_first:
            self._count("hands")
        self.word, self.epoch = "handing", self.epoch + 1
        self._mark_all(HAND, KEEPER)

    def _do_given(self) -> None:
        self.kept = "given"

    def _do_copy(self, c: int) -> None:
        """Half of it a time: whoever copies may die between any two."""
        f, e = self._copied(c), self.list[c]
        if e.state != "handed":
            return self._entry(c, e._replace(state="handed", closing=e.state == "closing"))
        there = self.flows[NEWCOMER]
        if c in there:
            raise Wrong(f"connection {c} takes the place of {there[c]} at the newcomer")
        if len(there) >= self.setting.room:
            raise Wrong(f"connection {c} has no room at the newcomer: {there}")
        if any(g.place == f.place and (d in self.setting.udp) == (c in self.setting.udp) for d, g in there.items()):
            raise Wrong(f"connection {c} comes to the newcomer with a port in use: {f}, {there}")
        return self._flow(NEWCOMER, c, f)

    def _do_release_handed(self) -> None:
        self.waits, self.word, self.newcomer_epoch = False, "newcomer", self.epoch
        self._mark_end()

    def _mark_end(self) -> None:
        raise NotImplementedError

    # ---- the newcomer's late copies --------------------------------------------------------------------------------------

    def _was_handled(self, p: Packet) -> str:
        """What becomes of a copy that the keeper had before it gave: "" if it is the newcomer's."""
        e = self._listed(p)[1]
        if not p.mirror or e is None or e.state != "handed" or not self.rules.handed_are_kept:
            return ""
        if p.kind == "S" and e.closing and not e.asked:
            return "" if self.rules.takes_left else "reject"
        return "asked" if p.kind == "S" else "reject"
