"""What to do next so that a stack's engines become what its resource says: the planner of operator and local agent.

`plan` compares what is wanted with what is there and names the next actions. It is level-based: it remembers
nothing, any action may fail or be repeated, and at the goal it returns nothing.

Rules
- An engine is removed only when it owns no bucket, and none is still on its way from it. One that is given up cannot
  hand over: what is on its way from it is taken over without it.
- A bucket is given only to an engine that is ready and stays.
- Which engines stay: active ones before draining before starting ones, and those with more load first, of equal
  ones those with more flows: what carries least is the cheapest to move. So those that never served go first, and a
  draining engine is taken back when it is wanted again.
- Engines share the buckets evenly, unless these were moved by load: then in proportion to what they have.
- An engine that is leaving does not stay; another is made for it while it can still hand its buckets over.
- An engine with buckets that has not served for `replace_after` seconds is given up: it counts as leaving until it
  serves again, and each such engine in a row makes the next wait twice as long. While paused none is given up.
- Engines of another template are replaced: at most `max_surge` engines beyond `replicas` (draining ones are
  not counted, but for those that are given up), and never fewer than `replicas - max_unavailable` that are ready.
- `replicas` 0 takes the owner from every bucket and removes all engines. The flows stay in the arena and go
  on when an engine comes back before they time out.
- While paused all engines stay as they are, and no other is made. Only buckets that no engine will serve, since
  theirs is leaving, given up or gone, are given to active ones.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from packetstack_core import shards
from packetstack_core.assignment import NOBODY, EngineShare, Move, Owner, State, assign
from packetstack_core.resources import Spec


@dataclass(frozen=True, slots=True)
class Desired:
    """What the resource asks for."""

    replicas: int
    template: str
    """`engines.Engine.template_hash()`."""
    queues: int
    """Queues of an engine of this template."""
    max_surge: int = 1
    max_unavailable: int = 0
    paused: bool = False
    replace_after: float = 0.0
    """Seconds after which an engine that does not serve is given up; 0: never."""
    shard: str = shards.FIRST
    """Shard layout of the build that engines shall have. Only `transitions` looks at it."""

    @classmethod
    def of(cls, spec: Spec, template: str, shard: str) -> "Desired":
        """What a resource asks for, when engines are made from `template` and have a build of this shard layout."""
        return cls(
            replicas=spec.replicas,
            template=template,
            queues=spec.engine.queues,
            max_surge=spec.update_strategy.surge(spec.replicas),
            max_unavailable=spec.update_strategy.unavailable(spec.replicas),
            paused=spec.paused,
            replace_after=float(spec.repair.replace_after_seconds),
            shard=shard,
        )


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine as observed."""

    slot: int
    state: State
    ready: bool
    """Its datapath serves packets now."""
    template: str
    queues: int
    flows: int
    leaving: bool
    """It will be gone soon whatever is wanted: its pod is being deleted. It never stays."""
    holds: int
    """Buckets that packets reach it for though `owners` says another: they are on their way."""
    load: float
    """Load of the engine in busy cores; 0 if it is not known."""
    down_since: float | None
    """Since when its datapath does not serve, on the clock of `plan`'s `now`; None while it serves, or nobody knows."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Engines that were given up. One that fails again and again is not replaced again and again."""

    slots: frozenset[int] = frozenset()
    """Those that are still there, and have not served since."""
    count: int = 0
    """How many in a row."""
    at: float = 0.0
    """When the last one was, on the clock of `plan`'s `now`."""

    def patience(self, desired: Desired) -> float:
        """Seconds that the next one is given: twice as many for each one before it, up to 64 times."""
        return float(desired.replace_after * (1 << min(self.count, MOST_DOUBLINGS)))

    def after(self, desired: Desired, observed: "Observed", now: float) -> "GivenUp":
        """The value for the next plan, after one for this world."""
        slots = frozenset(given_up(desired, observed, now))
        if fresh := slots - self.slots:
            return GivenUp(slots, self.count + len(fresh), now)
        calm = all(e.down_since is None for e in observed.engines) and now > self.at + 2 * self.patience(desired)
        return GivenUp() if calm else GivenUp(slots, self.count, self.at)


@dataclass(frozen=True, slots=True)
class Observed:
    """What is there. `owners[b]` owns bucket b by the flow table; None or `NOBODY` if none does."""

    engines: Sequence[Engine]
    owners: Sequence[Owner | None]
    moving: frozenset[int]
    """Buckets with an open fence: they are left alone until it is closed."""
    create_after: float
    """No engine is created before this time, on the clock of `plan`'s `now`: back-off after failures."""
    rebalanced: bool
    """The numbers of buckets were set by load; see `assignment.assign`."""
    given_up: GivenUp


@dataclass(frozen=True, slots=True)
class CreateEngine:
    """Make an engine of this template, on any free slot."""

    template: str
    queues: int
    set: int | None = None
    """Set that it belongs to; None: the stack has no sets."""


@dataclass(frozen=True, slots=True)
class ActivateEngine:
    """Make it Active: it may own buckets from now on."""

    slot: int


@dataclass(frozen=True, slots=True)
class AssignBuckets:
    """Give the buckets to other owners: by Transfer, or at once where a bucket has no owner."""

    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class DrainEngine:
    """Make it Draining: its buckets go to others next."""

    slot: int


@dataclass(frozen=True, slots=True)
class RemoveEngine:
    """Remove it. It owns and holds no bucket."""

    slot: int


Action = CreateEngine | ActivateEngine | DrainEngine | AssignBuckets | RemoveEngine

MOST_DOUBLINGS = 6
"""Of the time that an engine is given: at a minute, an hour and four minutes at most."""

_KEEP = {State.ACTIVE: 0, State.DRAINING: 1, State.STARTING: 2, State.PENDING: 3}


def plan(desired: Desired, observed: Observed, now: float) -> list[Action]:
    """The next actions, to be carried out in this order; empty at the goal.

    `now`: seconds on the clock of `Observed.create_after`. O(engines x log + buckets).
    """
    owned = Counter(o.slot for o in observed.owners if o is not None and o.slot)
    lost = given_up(desired, observed, now)
    alive = [e for e in observed.engines if e.state is not State.FAILED and not e.leaving and e.slot not in lost]
    kept = alive if desired.paused else _kept(desired, alive, owned)
    actions: list[Action] = []

    stay = {e.slot for e in kept}
    serving = []
    for engine in kept:
        if desired.paused:
            if engine.ready and engine.state is State.ACTIVE:
                serving.append(engine)
            continue
        if engine.state is State.DRAINING or (engine.state is State.STARTING and engine.ready):
            actions.append(ActivateEngine(engine.slot))
        if engine.ready and engine.state is not State.PENDING:
            serving.append(engine)
    leaving = [e for e in observed.engines if e.slot not in stay]
    for engine in leaving:
        if engine.state is State.ACTIVE or (engine.state in (State.STARTING, State.PENDING) and owned[engine.slot]):
            actions.append(DrainEngine(engine.slot))

    missing = desired.replicas - sum(e.template == desired.template for e in kept)
    room = desired.replicas + desired.max_surge - len(kept) - len(lost)
    if now >= observed.create_after and not desired.paused:
        # With nobody to serve, one engine is made whatever the surge says.
        count = min(missing, max(room, 0 if kept else 1))
        actions += [CreateEngine(desired.template, desired.queues)] * max(0, count)

    # An engine that stays but is not ready keeps what it owns: it cannot hand it over now, and may be back soon.
    pinned = {e.slot for e in kept if not e.ready or desired.paused}
    moves = _moves(desired, observed, serving, pinned)
    if moves:
        actions.append(AssignBuckets(tuple(moves)))

    for engine in leaving:
        hands_over = engine.holds and engine.slot not in lost
        if not owned[engine.slot] and not hands_over and engine.state is not State.ACTIVE:
            actions.append(RemoveEngine(engine.slot))
    return actions


def give_up_at(desired: Desired, observed: Observed, engine: Engine) -> float | None:
    """When the engine is given up if it does not serve until then; None if it will not be, or is already."""
    had_buckets = engine.state in (State.ACTIVE, State.DRAINING)
    if not desired.replace_after or desired.paused or engine.down_since is None or not had_buckets:
        return None
    return None if engine.slot in observed.given_up.slots else engine.down_since + observed.given_up.patience(desired)


def given_up(desired: Desired, observed: Observed, now: float) -> set[int]:
    """Slots of the engines that have not served for so long that others take their place."""
    found = {e.slot for e in observed.engines if e.down_since is not None and not desired.paused}
    found &= observed.given_up.slots
    for engine in observed.engines:
        at = give_up_at(desired, observed, engine)
        if at is not None and now >= at:
            found.add(engine.slot)
    return found


def _kept(desired: Desired, alive: Sequence[Engine], owned: Counter[int]) -> list[Engine]:
    """The engines that stay for now, best first."""

    def rank(e: Engine) -> tuple[int, bool, float, int, int, int]:
        return (_KEEP[e.state], not e.ready, -e.load, -e.flows, -owned[e.slot], e.slot)

    fresh = sorted((e for e in alive if e.template == desired.template), key=rank)[: desired.replicas]
    stale = sorted((e for e in alive if e.template != desired.template), key=rank)
    able = sum(e.ready and e.state is State.ACTIVE for e in fresh)
    # Of the old template as many stay as the new one cannot yet replace.
    return fresh + stale[: max(0, desired.replicas - desired.max_unavailable - able)]


def _moves(desired: Desired, observed: Observed, serving: Sequence[Engine], pinned: set[int]) -> list[Move]:
    owners = observed.owners
    free = [b for b, owner in enumerate(owners) if owner is None or owner.slot not in pinned]
    if desired.replicas == 0 and not desired.paused:
        moves = [Move(b, NOBODY) for b in free if owners[b] not in (None, NOBODY)]
    else:
        shares = [EngineShare(e.slot, e.queues) for e in sorted(serving, key=lambda e: e.slot)]
        moves = [Move(free[m.bucket], m.to) for m in assign([owners[b] for b in free], shares, observed.rebalanced)]
    # Buckets with an open fence count where their word says, but wait for their next move.
    return [m for m in moves if m.bucket not in observed.moving]
