"""What the planner of sets wants, as changes of the flow table; the node's agent carries them out. Pure."""

from packetstack_core.assignment import NOBODY, moved
from packetstack_core.reasons import EventReason
from packetstack_core.transitions import (
    Action,
    AdoptKept,
    ChangeSet,
    EndSet,
    EngineSet,
    MakeSet,
    PromoteSet,
    RetireSet,
    SetState,
    SwitchBuckets,
    said,
)
from packetstack_operator import pods
from packetstack_operator.facts import Facts, Plan


def act(found: Facts, plan: Plan, action: Action) -> None:
    """Put one action of `packetstack_core.transitions` into the plan."""
    match action:
        case MakeSet(new):
            plan.sets = plan.sets.after(action, found.now)
            _note_shape(found, plan, new)
            if new.state is SetState.ACTIVATING:
                plan.event(EventReason.SET_ACTIVATING, said(action))
        case ChangeSet(new):
            plan.sets = plan.sets.after(action, found.now)
            _note_shape(found, plan, new)
        case PromoteSet():
            plan.sets = plan.sets.after(action, found.now)
            plan.event(EventReason.SET_CURRENT, said(action))
        case SwitchBuckets(moves):
            plan.keepers = plan.keepers or [NOBODY] * len(plan.owners)
            for move in moves:
                plan.keepers[move.bucket] = plan.owners[move.bucket]
            plan.owners = moved(plan.owners, moves)
        case AdoptKept(moves):
            plan.keepers = moved(plan.keepers, moves)
        case EndSet(number):
            if number not in plan.ending:
                plan.ending |= {number}
                message = f"connections that set {number} keeps had not ended in time and end now"
                plan.event(EventReason.SET_ENDED, message)
        case RetireSet(number):
            plan.sets = plan.sets.after(action, found.now)
            plan.shapes.pop(number, None)
            plan.ending, plan.keepers = plan.ending - {number}, []
            plan.event(EventReason.SET_RETIRED, f"set {number} has no connection and no engine any more")


def _note_shape(found: Facts, plan: Plan, new: EngineSet) -> None:
    """Engines of the set are made from this shape as long as it is there. Of engines that are older nobody knows theirs, but
    where only the image is another: their pods have it."""
    shape = found.stack.spec.engine
    if new.template == found.template:
        plan.shapes[new.id] = shape.model_copy(update={"image": shape.image or found.world.image})
        return
    for number, pod in sorted(plan.pods(found).items()):
        image = str(pod["spec"]["containers"][0]["image"])
        older = [
            shape.model_copy(update={"image": named}) for named in (image, None)
        ]  # or it was the operator's default
        if plan.entries[number].template == new.template in [pods.template(s, image) for s in older]:
            plan.shapes[new.id] = older[0]
            return
