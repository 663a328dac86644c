"""How a stack gets another set of engines while connections of the first one end: the planner of `Mirror`.

A set is engines that share one memory of flows, of a fixed size and template. `plan` compares what is wanted with the
sets that are there and names the next actions, for operator and local agent alike. It is level-based, as `planning`
is: it remembers nothing but `Sets`, which its caller keeps, and any action may fail, be repeated, or be done in part.
Inside a set engines are planned by `planning.plan`.

Rules
- One set is Current. When another size or template is wanted, a second one is made, Activating. The first serves on
  as it is, whatever becomes of the second.
- When each engine of the second set is ready and has the present configuration, it becomes Current and the first
  Draining; then the buckets are switched. A bucket that is switched has two owners: the new one takes what begins, its
  keeper has what it had.
- Until then it can be undone: an Activating set that is not wanted any more is removed. With another size it gets
  that size, with another template another set is made after it.
- A Draining set keeps its engines until it keeps no bucket. One that is given up is removed though it keeps some. One
  that is gone gives what it kept to another of its set; one is made if there is none, and for no other reason. Then they
  are removed, and the set is retired.
- There are never more than two sets. What is wanted while one drains is held (`held`), but for more engines of the
  same template: these join the Current set by Transfer. `policy: Hurry` ends the Draining set instead, and so does
  the deadline, as `onDeadline` says, when all buckets are switched; with `Keep` neither does.
- A bucket with a keeper is moved on neither side, but away from an engine that is gone.
- A set without engines that are wanted, or without a bucket, has nothing to keep: it gets another size or template as
  it is. So does one that shall have no engine: its flows stay in its memory, and go on when engines come back in time.
- With `strategy: Transfer` the one set gets any size or template as it is. An Activating one is removed first, a
  Draining one has its time first. A stack that never had another strategy has no set, and `planning.plan` alone.
- A build of another shard layout cannot have the flows of the set that is there. So whatever the strategy, it gets a
  second set, once, as with `Mirror`. `onDeadline: Transfer` does nothing between two such sets: the first keeps its connections.
- While paused sets stay what they are, and no bucket is switched but those of engines that go.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from packetstack_core import planning, shards
from packetstack_core.assignment import NOBODY, Move, Owner, State
from packetstack_core.kinds import MAX_SET_ID
from packetstack_core.planning import AssignBuckets, CreateEngine, Desired, Engine
from packetstack_core.resources import Handover
from packetstack_core.wording import counted


class SetState(StrEnum):
    """Where a set is in its life, as `kinds.TableSet` shows it."""

    ACTIVATING = "Activating"
    """Its engines come up."""
    CURRENT = "Current"
    """It takes new connections."""
    DRAINING = "Draining"
    """It keeps the connections that it has."""


@dataclass(frozen=True, slots=True)
class EngineSet:
    """A set of engines, as it is written down."""

    id: int
    state: SetState
    replicas: int
    """Engines that it shall have."""
    template: str
    """`engines.Engine.template_hash()` of its engines. Who makes them keeps their shape as long as the set is there."""
    queues: int
    """Queues of an engine of this template."""
    since: float
    """When it got its state, on the clock of `plan`'s `now`. That clock goes on while its owner is away."""
    shard: str = shards.FIRST
    """Shard layout of its memory, and of its engines' build. It stays."""


@dataclass(frozen=True, slots=True)
class Sets:
    """What has to be remembered of a stack's sets; the default is that of a new stack."""

    known: tuple[EngineSet, ...] = ()
    """Oldest first: one that is Current, and with it none, one before it (Draining) or one behind it (Activating)."""
    last: int = 0
    """Number that was given to a set last."""

    def one(self, state: SetState) -> EngineSet | None:
        """The set in this state; None if there is none."""
        return next((s for s in self.known if s.state is state), None)

    def after(self, action: "SetAction", now: float) -> "Sets":
        """What is to be written down for the action; the same value if it was already."""
        match action:
            case MakeSet(new):
                return self if new in self.known else Sets((*self.known, new), new.id)
            case ChangeSet(new):
                return replace(self, known=tuple(new if s.id == new.id else s for s in self.known))
            case PromoteSet(id_):
                return replace(self, known=tuple(_promoted(s, id_, now) for s in self.known))
            case RetireSet(id_):
                return replace(self, known=tuple(s for s in self.known if s.id != id_))


def said(action: "MakeSet | PromoteSet") -> str:
    """What an event says of it, whoever carries it out."""
    match action:
        case MakeSet(new):
            engines = counted(new.replicas, "engine")
            return f"set {new.id} is being made with {engines}; the present one serves until it is ready"
        case PromoteSet(number):
            return f"set {number} takes new connections from now on; the set before it keeps those that it has"


def _promoted(known: EngineSet, id_: int, now: float) -> EngineSet:
    state = SetState.CURRENT if known.id == id_ else SetState.DRAINING
    return known if known.state is state else replace(known, state=state, since=now)


@dataclass(frozen=True, slots=True)
class Observed:
    """What is there."""

    pool: planning.Observed
    """Engines of all sets, and the present owners of the buckets. Slots are not used twice, whatever the set."""
    pinned: frozenset[int]
    """Buckets that a person gave to the engine that owns them; they stay there unless an engine has to go."""
    sets: Sets
    members: Mapping[int, int | None]
    """Set of each engine, by slot; None: the oldest."""
    configured: frozenset[int]
    """Slots of the engines that have the present configuration of their set."""
    keepers: Sequence[Owner | None]
    """By bucket, who keeps connections that are older than the present owner; None or `NOBODY`: nobody does. Empty: nobody
    keeps anything."""
    shard: str = shards.FIRST
    """Shard layout of the memory that there is, while no set is known."""


# ---- actions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakeSet:
    """Make the memory of a set, anew if there is some, then write the set down. Of the first set: engines and memory that
    are there become its own."""

    set: EngineSet


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """Write down a set as it is to be from now on: of another size or template."""

    set: EngineSet


@dataclass(frozen=True, slots=True)
class PromoteSet:
    """Write down, at once, that this set is Current and the other one Draining, before the first bucket is switched."""

    id: int


@dataclass(frozen=True, slots=True)
class SwitchBuckets:
    """Give the buckets to engines of the Current set. Their present owners are of the Draining set and become keepers."""

    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class AdoptKept:
    """Give what an engine that is gone kept to another keeper of its set. The present owners stay."""

    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class EndSet:
    """End the connections that the set keeps; again until it keeps none."""

    id: int
    rule: Literal["Reset", "Transfer"]


@dataclass(frozen=True, slots=True)
class RetireSet:
    """Free the memory of a set that has no engine and keeps nothing, then forget it."""

    id: int


SetAction = MakeSet | ChangeSet | PromoteSet | RetireSet
"""What changes `Sets`, by `Sets.after`."""
Action = planning.Action | SetAction | SwitchBuckets | AdoptKept | EndSet


# ---- what to do ------------------------------------------------------------------------------------------------


def plan(desired: Desired, handover: Handover, observed: Observed, now: float) -> list[Action]:
    """The next actions, to be carried out in this order; empty at the goal.

    `now`: seconds on the clock of `EngineSet.since` and `planning.Observed.create_after`. Raises ValueError if sets or
    members contradict each other. O(engines x log + buckets).
    """
    if observed.sets.known:
        return _Plan(desired, handover, observed, now).actions()
    if handover.strategy == "Transfer" and (desired.shard == observed.shard or desired.paused):
        engines = observed.pool.engines
        moving = observed.pool.moving | _pins(observed, engines, desired.replicas)
        return list(planning.plan(desired, replace(observed.pool, moving=moving), now))
    return [MakeSet(_first(desired, observed, now))]


def held(desired: Desired, sets: Sets) -> bool:
    """Whether what is wanted waits until a set has drained."""
    current = sets.one(SetState.CURRENT)
    if current is None or sets.one(SetState.DRAINING) is None or desired.paused:
        return False
    return _needs_another(current, desired) or not (_is(current, desired) or _grows(current, desired))


def deadline(handover: Handover, sets: Sets) -> float | None:
    """When the Draining set is ended; None if there is none, or it has its time."""
    draining = sets.one(SetState.DRAINING)
    if draining is None or handover.on_deadline == "Keep":
        return None
    current = sets.one(SetState.CURRENT)
    if handover.on_deadline == "Transfer" and current is not None and current.shard != draining.shard:
        return None
    return draining.since + handover.deadline_seconds


def _is(known: EngineSet, desired: Desired) -> bool:
    return (known.replicas, known.template) == (desired.replicas, desired.template)


def _needs_another(known: EngineSet, desired: Desired) -> bool:
    """Whether the build that is wanted cannot have this set's flows."""
    return known.shard != desired.shard and desired.replicas > 0


def _grows(known: EngineSet, desired: Desired) -> bool:
    return known.template == desired.template and known.replicas < desired.replicas


def _as_wanted(known: EngineSet, desired: Desired) -> EngineSet:
    return replace(known, replicas=desired.replicas, template=desired.template, queues=desired.queues)


def _next_id(sets: Sets) -> int:
    taken = {s.id for s in sets.known}
    found = sets.last % MAX_SET_ID + 1
    while found in taken:
        found = found % MAX_SET_ID + 1
    return found


def _first(desired: Desired, observed: Observed, now: float) -> EngineSet:
    """The first set: the engines that are there, or what is wanted if there are none, or several templates."""
    there = [e for e in observed.pool.engines if e.state not in (State.DRAINING, State.FAILED) and not e.leaving]
    if desired.shard != observed.shard:  # one of the wish may be among them, and can serve nothing
        there = [e for e in there if e.state is State.ACTIVE] or there
    shapes = {(len(there), e.template, e.queues) for e in there}
    shape = shapes.pop() if len(shapes) == 1 else (desired.replicas, desired.template, desired.queues)
    return EngineSet(_next_id(observed.sets), SetState.CURRENT, *shape, now, observed.shard)


def _pins(observed: Observed, engines: Collection[Engine], replicas: int) -> frozenset[int]:
    """Buckets that are not moved to make numbers even."""
    return frozenset() if len(engines) > replicas else observed.pinned


class _Plan:
    """One look at the sets of a stack that has some."""

    def __init__(self, desired: Desired, handover: Handover, observed: Observed, now: float) -> None:
        self.desired, self.handover, self.observed, self.now = desired, handover, observed, now
        self.sets, self.pool = observed.sets, observed.pool
        current = self.sets.one(SetState.CURRENT)
        others = [s for s in self.sets.known if s is not current]
        if current is None or len(others) > 1 or any(s.state is SetState.CURRENT for s in others):
            raise ValueError(
                f"sets {[(s.id, str(s.state)) for s in self.sets.known]}: one has to be Current, one may be another"
            )
        self.current = current
        self.other = others[0] if others else None
        self.members = self._group()
        lost = planning.given_up(desired, self.pool, now)
        self.staying = {
            e.slot for e in self.pool.engines if e.state is not State.FAILED and not e.leaving and e.slot not in lost
        }
        keepers = observed.keepers or [None] * len(self.pool.owners)
        self.kept = {b: k for b, k in enumerate(keepers) if k is not None and k != NOBODY}

    def _group(self) -> dict[int, list[Engine]]:
        """Engines by set."""
        found: dict[int, list[Engine]] = {s.id: [] for s in self.sets.known}
        for engine in self.pool.engines:
            id_ = self.observed.members.get(engine.slot) or self.sets.known[0].id
            if id_ not in found:
                raise ValueError(f"engine {engine.slot} is of set {id_}, and that is none of the stack's")
            found[id_].append(engine)
        return found

    def actions(self) -> list[Action]:
        """All that is to be done now."""
        if self.other is None:
            return self._alone()
        if self.other.state is SetState.ACTIVATING:
            return self._activating(self.other)
        return self._draining(self.other)

    # ---- one set

    def _alone(self) -> list[Action]:
        found: list[Action] = []
        another = not self.desired.paused and _needs_another(self.current, self.desired)
        wanted = another or (not self.desired.paused and not _is(self.current, self.desired))
        nothing_to_keep = not self.current.replicas or not self.desired.replicas or not self._owned(self.current)
        in_place = wanted and not another and (nothing_to_keep or self.handover.strategy == "Transfer")
        if in_place:
            self.current = _as_wanted(self.current, self.desired)
            found.append(ChangeSet(self.current))
        found += self._in_current()
        if wanted and not in_place and self.now >= self.pool.create_after:
            id_, shard = _next_id(self.sets), self.desired.shard
            new = replace(self.current, id=id_, state=SetState.ACTIVATING, since=self.now, shard=shard)
            found.append(MakeSet(_as_wanted(new, self.desired)))
        return found

    # ---- a second one comes up

    def _activating(self, second: EngineSet) -> list[Action]:
        found = self._in_current()
        if self._owned(second):  # it was promoted, and that was forgotten
            return [*found, PromoteSet(second.id)]
        if self.desired.paused:
            return [*found, *self._engines(second, second.replicas, [], ())]
        another = _needs_another(self.current, self.desired)
        wanted = (
            self.desired.replicas > 0
            and (second.template, second.shard) == (self.desired.template, self.desired.shard)
            and (another or (self.handover.strategy == "Mirror" and not _is(self.current, self.desired)))
        )
        if not wanted:
            if not self.members[second.id]:
                return [*found, RetireSet(second.id)]
            return [*found, *self._engines(second, 0, [], ())]
        if second.replicas != self.desired.replicas:
            found.append(ChangeSet(_as_wanted(second, self.desired)))
        found += self._engines(second, self.desired.replicas, [], ())
        able = sum(self._able(e) for e in self.members[second.id])
        if able == second.replicas == self.desired.replicas:
            found.append(PromoteSet(second.id))
        return found

    def _able(self, engine: Engine) -> bool:
        """Whether it may get its first bucket."""
        active = engine.state is State.ACTIVE and engine.slot in self.staying
        return active and engine.ready and engine.slot in self.observed.configured

    # ---- the first one drains

    def _draining(self, old: EngineSet) -> list[Action]:
        found: list[Action] = []
        if not self.desired.paused and _grows(self.current, self.desired):
            self.current = _as_wanted(self.current, self.desired)
            found.append(ChangeSet(self.current))
        of_current = self._in_current(old)
        switched = {m.bucket for a in of_current if isinstance(a, SwitchBuckets) for m in a.moves}
        found += of_current
        waiting = self._owned(old)
        if not waiting and not self.kept:
            if not self.members[old.id]:
                return [*found, RetireSet(old.id)]
            return [*found, *self._engines(old, 0, [], ())]
        found += self._in_draining(old, waiting, switched)
        if self.kept and not waiting and self._is_ended():
            assert self.handover.on_deadline != "Keep"
            found.append(EndSet(old.id, self.handover.on_deadline))
        return found

    def _is_ended(self) -> bool:
        """Whether the Draining set has no more time."""
        at = deadline(self.handover, self.sets)
        if at is None or self.desired.paused:
            return False
        return self.now >= at or (self.handover.policy == "Hurry" and held(self.desired, self.sets))

    def _in_draining(self, old: EngineSet, waiting: Mapping[int, Owner], switched: Set[int]) -> list[Action]:
        """Its engines stay; what those had that are gone goes to others."""
        silent = {e.slot for e in self.members[old.id] if e.slot not in self.staying and not e.ready}
        holders: list[Owner | None] = []
        free = []
        for bucket in range(len(self.pool.owners)):
            holder = self.kept.get(bucket) or waiting.get(bucket)
            if holder is not None and holder.slot not in self.staying and bucket not in switched:
                free.append(bucket)
            # Nobody can have what it kept before it is removed: its process may come back to it until then.
            forsaken = bucket in self.kept and holder is not None and holder.slot in silent
            holders.append(None if forsaken else holder)
        active = sum(e.state is State.ACTIVE and e.slot in self.staying for e in self.members[old.id])
        found: list[Action] = []
        for action in self._engines(old, max(1, active), holders, free):
            if isinstance(action, AssignBuckets):
                kept = tuple(m for m in action.moves if m.bucket in self.kept)
                rest = tuple(m for m in action.moves if m.bucket not in self.kept)
                found += [AdoptKept(kept)] if kept else []
                found += [AssignBuckets(rest)] if rest else []
            else:
                found.append(action)
        return found

    # ---- the engines of a set

    def _owned(self, known: EngineSet) -> dict[int, Owner]:
        """Buckets that engines of the set own."""
        slots = {e.slot for e in self.members[known.id]}
        return {b: o for b, o in enumerate(self.pool.owners) if o is not None and o.slot in slots}

    def _in_current(self, old: EngineSet | None = None) -> list[Action]:
        """What is to be done with the engines of the Current set. `old`: buckets of this one are switched to it."""
        waiting = self._owned(old) if old is not None else {}
        ready = {e.slot for e in self.pool.engines if e.ready}
        pinned = _pins(self.observed, self.members[self.current.id], self.current.replicas)
        owners: list[Owner | None] = []
        free = []
        for bucket, owner in enumerate(self.pool.owners):
            if bucket in waiting:
                keeper = waiting[bucket].slot
                owners.append(None)
                movable = keeper in ready and (not self.desired.paused or keeper not in self.staying)
            else:
                owners.append(owner)
                stays = owner is not None and owner.slot in self.staying
                movable = bucket not in pinned and not (stays and bucket in self.kept)
            if movable:
                free.append(bucket)
        found: list[Action] = []
        for action in self._engines(self.current, self.current.replicas, owners, free, joining=bool(waiting)):
            if isinstance(action, AssignBuckets):
                moves = tuple(m for m in action.moves if m.bucket in waiting)
                rest = tuple(m for m in action.moves if m.bucket not in waiting)
                found += [AssignBuckets(rest)] if rest else []
                found += [SwitchBuckets(moves)] if moves else []
            else:
                found.append(action)
        return found

    def _engines(
        self,
        known: EngineSet,
        replicas: int,
        owners: Sequence[Owner | None],
        free: Iterable[int],
        joining: bool = False,
    ) -> list[planning.Action]:
        """`planning.plan` for one set: it sees these owners, and moves only what is free.

        `joining`: buckets come to the set by a switch, so they go to engines with the present configuration.
        """
        engines = self.members[known.id]
        if joining:
            engines = [replace(e, ready=e.ready and e.slot in self.observed.configured) for e in engines]
        if known.state is SetState.DRAINING:
            engines = [replace(e, template=known.template) for e in engines]  # none is replaced for its template
        # What is free stands last: there the fewest moves are looked for first.
        movable = frozenset(free) - self.pool.moving
        order = sorted(range(len(owners)), key=lambda b: b in movable)
        seen = replace(
            self.pool,
            engines=engines,
            owners=[owners[b] for b in order],
            moving=frozenset(i for i, b in enumerate(order) if b not in movable),
            rebalanced=self.pool.rebalanced and not joining,
        )
        wanted = replace(self.desired, replicas=replicas, template=known.template, queues=known.queues)
        found: list[planning.Action] = []
        for action in planning.plan(wanted, seen, self.now):
            match action:
                case CreateEngine():
                    found.append(replace(action, set=known.id))
                case AssignBuckets(moves):
                    there = (Move(order[m.bucket], m.to) for m in moves)
                    found.append(AssignBuckets(tuple(sorted(there, key=lambda m: m.bucket))))
                case _:
                    found.append(action)
        return found
