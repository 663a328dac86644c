"""How many packets of strangers each listener may have while engines have more to do than they can.

A stranger is a packet from a client that belongs to no known flow: an opener (a TCP SYN, a datagram), or a stray (an
acknowledgement, a fragment, an ICMP error). Packets of known flows (TCP that is established, UDP that is assured) and
of backends are never shed. What is decided is one level, in packets a second: openers and strays of each listener are
let through up to it. That is max-min fairness: whoever wants less than the level gets it all, and those that flood get
the same as each other.

The level falls by a fifth while engines stay behind, and rises by a twentieth while they have time left (additive
increase would be slow for fast engines and coarse for slow ones; with one level for all there is nothing to converge).
It stays while nothing has to be dropped, so that
who floods in bursts meets the same one; after a while there is none any more.

Pure: what happened before comes in as a `State` and goes out as another. One step is one look, ten a second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

BUSY = 0.8
"""Share of its time below which no core is pressed: it is its rings that were full for a moment, or it stood still."""
FULL, FALLING, EMPTY = 0.5, 0.05, 0.25
"""Shares of a ring: as full as that is pressed, unless it was fuller by FALLING at the look before; time is left when
it is emptier than EMPTY."""
SPARE = 0.92
"""Share of its time above which a core gets no more."""
LESS, MORE = 0.8, 1.05
FIRST = 0.5
"""Share of the strangers, or of what engines handle where that is less, that the first level lets through: many a
packet lets its backend answer, and then what waits in the rings has to be handled as well."""
LEAST = 0.05
"""Share of what engines handle below which strangers are not to blame: no level goes lower."""
STUCK_LOOKS, PATIENT_LOOKS, FEW = 20, 100, 0.5
"""Engines that are behind for STUCK_LOOKS at the lowest level, as by one flow that is too much for a core, are so because
of others when strangers are less than FEW of what they handle: all are let through for PATIENT_LOOKS."""
QUIET_LOOKS = 30
"""Without a drop, until listeners are watched no more. Who floods in bursts does not begin anew each time."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen since the look before."""

    busy: float
    """Share of its time that the busiest core spent on packets; 0 when it did not turn."""
    depth: float
    """How full the fullest ring is, 0 to 1."""
    handled: float = 0.0
    """Packets a second that the engines took out of their rings."""
    offered: Mapping[object, float] | None = None
    """Strangers a second that came, by listener and kind. None: not watched, or not for a whole look."""


@dataclass(frozen=True, slots=True)
class State:
    """What one step hands to the next."""

    watched: bool = False
    """Whether strangers are to be counted."""
    level: float | None = None
    """Packets a second that each listener may have of openers, and as many of strays. None: all of them."""
    depth: float = 0.0
    quiet: int = 0
    """Looks in a row at which nothing was dropped."""

    stuck: int = 0
    """Looks in a row at the lowest level; below 0, as many until there may be a level again."""

    @property
    def urgent(self) -> bool:
        """Whether engines lose packets and nothing is done about it yet: the next look should come soon."""
        return self.watched and self.level is None and not self.quiet and self.stuck >= 0


AT_REST = State()


def level_for(offered: Mapping[object, float], total: float) -> float:
    """The level at which `total` of the `offered` are let through; the greatest of them when all fit."""
    left, wants = total, sorted(offered.values())
    for i, want in enumerate(wants):
        share = left / (len(wants) - i)
        if want >= share:
            return share
        left -= want
    return wants[-1] if wants else 0.0


def admitted(offered: Mapping[object, float], level: float | None) -> float:
    """How many of them a level lets through."""
    return sum(want if level is None else min(want, level) for want in offered.values())


def step(state: State, sample: Sample) -> State:
    """Whether to watch, and the level, from now on."""
    behind = sample.busy >= BUSY and sample.depth >= FULL
    if not state.watched:
        return State(watched=True, depth=sample.depth) if behind else AT_REST
    offered, level = sample.offered, state.level
    if offered is None:
        return replace(state, depth=sample.depth)
    most, strangers = max(offered.values(), default=0.0), sum(offered.values())
    dropped = level is not None and most > level
    quiet = 0 if dropped or behind else state.quiet + 1
    if quiet >= QUIET_LOOKS:
        return AT_REST
    stuck = min(0, state.stuck + 1)
    if behind and sample.depth > state.depth - FALLING:
        least = max(1.0, level_for(offered, LEAST * sample.handled))
        if level is not None:
            stuck = state.stuck + 1 if level <= least else 0
            level = max(least, LESS * min(level, most))
        elif stuck == 0 and strangers > LEAST * sample.handled:
            level = max(least, level_for(offered, FIRST * min(strangers, sample.handled)))
        if stuck >= STUCK_LOOKS and strangers < FEW * sample.handled:
            level, stuck = None, -PATIENT_LOOKS
    elif dropped and sample.busy < SPARE and sample.depth < EMPTY:
        assert level is not None
        level *= MORE
    return State(True, level, sample.depth, quiet, stuck)
