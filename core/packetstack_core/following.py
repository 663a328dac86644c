"""What an agent does next so that packets see a flow table: no plan of its own, only the way to the operator's.

`follow` compares a table with what is attached on the node and names the next actions. It is level-based, as
`planning.plan` is. Engines have two names: the table's *id*, and the *slot* that the node gave.

Rules
- A bucket goes to its owner of the table when that engine serves. Until then it stays where it is.
- An engine that does not serve now, but is still there, cannot hand over: its buckets wait.
- An engine that the table does not name is detached when no bucket is its own. If it does not serve, it is detached
  at once: its pod is gone or going, and others take its buckets without waiting for it.
- A bucket whose owner in the table is of another set than its present one is switched: that one keeps what it has.
- What an engine that is gone kept goes to the keeper that the table names, of the same set.
- Engines of a set are attached when the set has memory. A set that the table names no more goes when it has no engine.
- Nobody is an owner only when the stack shall have no engine. Else a table without owners is one that was lost and
  written anew: the buckets stay where they are until it says more.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from packetstack_core import shards
from packetstack_core.assignment import NOBODY, Move, Owner
from packetstack_core.kinds import MAX_SETS, FlowTableSpec, TableEngine, TableSet
from packetstack_core.transitions import (
    AdoptKept,
    ChangeSet,
    EndSet,
    EngineSet,
    MakeSet,
    PromoteSet,
    RetireSet,
    SetState,
    SwitchBuckets,
)


@dataclass(frozen=True, slots=True)
class Attached:
    """An engine of the stack on this node."""

    id: int
    slot: int
    pod_uid: str
    ready: bool
    set: int = 1


@dataclass(frozen=True, slots=True)
class Mirrored:
    """The sets of engines on this node; the default is a stack with one, of which the table says nothing."""

    sets: tuple[int, ...] = (1,)
    """Those that have memory."""
    current: int = 1
    """The one that takes new connections."""
    known: tuple[EngineSet, ...] = ()
    """What is written down of them. `EngineSet.since` says nothing here."""
    belongs: Sequence[int] = ()
    """By bucket, the set of its present owner; empty: `current`."""
    keepers: Sequence[Owner | None] = ()
    """By bucket, who keeps older connections; None: nobody. Empty: nobody keeps any."""

    def of(self, bucket: int) -> int:
        """Set of the bucket's present owner."""
        return self.belongs[bucket] if self.belongs else self.current


@dataclass(frozen=True, slots=True)
class Attach:
    """Make rings for the engine in its pod, on any free slot."""

    engine: TableEngine
    set: int


@dataclass(frozen=True, slots=True)
class Detach:
    """Take the rings away. It owns no bucket, or serves none."""

    slot: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Give the buckets to other owners, by Transfer."""

    moves: tuple[Move, ...]


Step = Attach | Assign | Detach | MakeSet | ChangeSet | PromoteSet | RetireSet | SwitchBuckets | AdoptKept | EndSet

_STAYING = ("Pending", "Starting", "Active")


def follow(
    table: FlowTableSpec,
    attached: Sequence[Attached],
    owners: Sequence[Owner | None],
    moving: frozenset[int],
    held: Collection[int] = (),
    mirrored: Mirrored = Mirrored(),
) -> list[Step]:
    """The next actions, in this order; empty when nothing can be done now.

    `owners`: by bucket, as packets see them, `Owner.slot` being a slot. `moving`: buckets with an open fence. `held`:
    slots whose engines may still be handling packets of a bucket, whoever packets go to by now.
    """
    steps = _sets(table, attached, mirrored)
    there = {e.id: e for e in attached}
    for engine in table.engines:
        set_ = table.set_of(engine) or mirrored.current
        if engine.pod_uid and engine.id not in there and set_ in mirrored.sets:
            steps.append(Attach(engine, set_))
    steps += _moves(table, attached, owners, moving, mirrored)
    named = {e.id: e for e in table.engines}
    owning = {o.slot for o in owners if o is not None} | set(held)
    for present in attached:
        wanted_here = named.get(present.id)
        # A pod of the same name is another pod: what it had is gone.
        stranger = wanted_here is not None and wanted_here.pod_uid not in ("", present.pod_uid)
        if (wanted_here is None or stranger) and (present.slot not in owning or not present.ready):
            steps.append(Detach(present.slot))
    return steps


def _sets(table: FlowTableSpec, attached: Sequence[Attached], mirrored: Mirrored) -> list[Step]:
    """What becomes of sets. A table that names none of those that there are was lost: they stay."""
    named, there = {s.id: s for s in table.sets or ()}, set(mirrored.sets)
    if not named.keys() & there:
        return []
    steps: list[Step] = []
    known = {s.id: s for s in mirrored.known}
    for i in mirrored.sets:
        state = known[i].state if i in known else SetState.CURRENT
        if i in named and known.get(i) != (shown := _engine_set(named[i], state)):
            steps.append(ChangeSet(shown) if i in known else MakeSet(shown))
    current = table.current_set()
    if current in there and current is not None and current != mirrored.current:
        steps.append(PromoteSet(current))
    kept = any(k is not None for k in mirrored.keepers)
    used = {e.set for e in attached} | set(mirrored.belongs) | {mirrored.current}
    for i in mirrored.sets:
        if kept and i != mirrored.current and (i not in named or named[i].ending):
            steps.append(EndSet(i, "Reset"))
        elif i not in named and i not in used:
            steps.append(RetireSet(i))
    if len(there) < MAX_SETS:
        fresh = (s for s in named.values() if s.id not in there and s.state != "Draining")  # that has nothing to keep
        steps += [MakeSet(_engine_set(s, SetState.ACTIVATING)) for s in fresh]
    return steps


def _engine_set(known: TableSet, state: SetState) -> EngineSet:
    return EngineSet(known.id, state, known.replicas, known.template, known.queues, 0.0, known.shard or shards.FIRST)


def _moves(
    table: FlowTableSpec,
    attached: Sequence[Attached],
    owners: Sequence[Owner | None],
    moving: frozenset[int],
    mirrored: Mirrored,
) -> list[Step]:
    sets = {e.slot: e.set for e in attached}
    mute = {e.slot for e in attached if not e.ready}
    assigned, switched = [], []
    for bucket, (wanted, now) in enumerate(zip(target(table, attached), owners, strict=True)):
        if wanted is None or wanted == (now or NOBODY) or bucket in moving or (now and now.slot in mute):
            continue
        other = now is not None and now != NOBODY and sets.get(wanted.slot, mirrored.of(bucket)) != mirrored.of(bucket)
        if not other:
            assigned.append(Move(bucket, wanted))
        elif sets[wanted.slot] == mirrored.current:  # the other way round there is none
            switched.append(Move(bucket, wanted))
    steps: list[Step] = []
    if assigned:
        steps.append(Assign(tuple(assigned)))
    if switched:
        steps.append(SwitchBuckets(tuple(switched)))
    if adopted := _adopted(table, attached, mirrored):
        steps.append(AdoptKept(adopted))
    return steps


def _adopted(table: FlowTableSpec, attached: Sequence[Attached], mirrored: Mirrored) -> tuple[Move, ...]:
    """What engines that are gone kept, and who is to have it."""
    there = {e.slot for e in attached}
    heirs = {e.id: e for e in attached if e.ready and e.set != mirrored.current}
    queues = {e.id: e.queues for e in table.engines}
    found = []
    for bucket, (keeper, wanted) in enumerate(zip(mirrored.keepers, table.keeper_ids(), strict=False)):
        if keeper is None or keeper.slot in there or wanted is None:
            continue
        if wanted.slot in heirs and wanted.queue < queues.get(wanted.slot, 0):
            found.append(Move(bucket, Owner(heirs[wanted.slot].slot, wanted.queue)))
    return tuple(found)


def unsupported(table: FlowTableSpec) -> str:
    """What of the table this version cannot carry out though it can read it: the field and why; empty if nothing."""
    if table.sets is not None and table.current_set() is None:
        return "spec.sets: none of them is Current; let the operator write the table anew"
    if {e.node for e in table.engines} - {None, table.node} or len(table.nodes or ()) > 1:
        return "spec.nodes: this agent knows stacks of one node only; upgrade it"
    return ""


def target(table: FlowTableSpec, attached: Sequence[Attached]) -> list[Owner | None]:
    """Owner by bucket that the table asks for, in slots; None where its engine does not serve here yet."""
    slots = {e.id: e.slot for e in attached if e.ready}
    queues = {e.id: e.queues for e in table.engines}
    nobody = None if any(e.state in _STAYING for e in table.engines) else NOBODY
    found: list[Owner | None] = []
    for owner in table.owner_ids():
        if owner is None or owner == NOBODY:
            found.append(nobody)
        elif owner.slot in slots and owner.queue < queues.get(owner.slot, 0):
            found.append(Owner(slots[owner.slot], owner.queue))
        else:
            found.append(None)
    return found


def table_is_live(
    table: FlowTableSpec,
    attached: Sequence[Attached],
    owners: Sequence[Owner | None],
    mirrored: Mirrored = Mirrored(),
) -> bool:
    """Whether packets see the table: each bucket has the owner that it asks for, and no other engine or set is there."""
    ids = {e.id for e in table.engines}
    if table.sets:
        named, needed = {s.id for s in table.sets}, {s.id for s in table.sets if s.state != "Draining"}
        if table.current_set() != mirrored.current or not needed <= set(mirrored.sets) <= named:
            return False
    return all(e.id in ids for e in attached) and all(
        wanted == (now or NOBODY) for wanted, now in zip(target(table, attached), owners, strict=True)
    )
