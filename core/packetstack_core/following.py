"""What an agent does next so that packets see a flow table: no plan of its own, only the way to the operator's.

`follow` compares a table with what is attached on the node and names the next actions. It is level-based, as
`planning.plan` is. Engines have two names: the table's *id*, and the *slot* that the node gave.

Rules
- A bucket goes to its owner of the table when that engine serves. Until then it stays where it is.
- An engine that does not serve now, but is still there, cannot hand over: its buckets wait.
- An engine that the table does not name is detached when no bucket is its own. If it does not serve, it is detached
  at once: its pod is gone or going, and others take its buckets without waiting for it.
- Nobody is an owner only when the stack shall have no engine. Else a table without owners is one that was lost and
  written anew: the buckets stay where they are until it says more.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from packetstack_core.assignment import NOBODY, Move, Owner
from packetstack_core.kinds import FlowTableSpec, TableEngine


@dataclass(frozen=True, slots=True)
class Attached:
    """An engine of the stack on this node."""

    id: int
    slot: int
    pod_uid: str
    ready: bool


@dataclass(frozen=True, slots=True)
class Attach:
    """Make rings for the engine in its pod, on any free slot."""

    engine: TableEngine


@dataclass(frozen=True, slots=True)
class Detach:
    """Take the rings away. It owns no bucket, or serves none."""

    slot: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Give the buckets to other owners, by Transfer."""

    moves: tuple[Move, ...]


Step = Attach | Assign | Detach

_STAYING = ("Pending", "Starting", "Active")


def follow(
    table: FlowTableSpec,
    attached: Sequence[Attached],
    owners: Sequence[Owner | None],
    moving: frozenset[int],
    held: Collection[int] = (),
) -> list[Step]:
    """The next actions, in this order; empty when nothing can be done now.

    `owners`: by bucket, as packets see them, `Owner.slot` being a slot. `moving`: buckets with an open fence. `held`:
    slots whose engines may still be handling packets of a bucket, whoever packets go to by now.
    """
    there = {e.id: e for e in attached}
    named = {e.id: e for e in table.engines}
    steps: list[Step] = [Attach(e) for e in table.engines if e.pod_uid and e.id not in there]
    mute = {e.slot for e in attached if not e.ready}
    moves = []
    for bucket, (wanted, now) in enumerate(zip(target(table, attached), owners, strict=True)):
        if wanted is None or wanted == (now or NOBODY) or bucket in moving or (now and now.slot in mute):
            continue
        moves.append(Move(bucket, wanted))
    if moves:
        steps.append(Assign(tuple(moves)))
    owning = {o.slot for o in owners if o is not None} | set(held)
    for engine in attached:
        wanted_here = named.get(engine.id)
        # A pod of the same name is another pod: what it had is gone.
        stranger = wanted_here is not None and wanted_here.pod_uid not in ("", engine.pod_uid)
        if (wanted_here is None or stranger) and (engine.slot not in owning or not engine.ready):
            steps.append(Detach(engine.slot))
    return steps


def unsupported(table: FlowTableSpec) -> str:
    """What of the table this version cannot carry out though it can read it: the field and why; empty if nothing."""
    if table.sets is not None or table.previous_owners is not None or any(e.set is not None for e in table.engines):
        return "spec.sets: this agent knows one set of engines only; upgrade it"
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


def table_is_live(table: FlowTableSpec, attached: Sequence[Attached], owners: Sequence[Owner | None]) -> bool:
    """Whether packets see the table: each bucket has the owner that it asks for, and no other engine is attached."""
    ids = {e.id for e in table.engines}
    return all(e.id in ids for e in attached) and all(
        wanted == (now or NOBODY) for wanted, now in zip(target(table, attached), owners, strict=True)
    )
