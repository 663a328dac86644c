"""What to write next for one stack. Pure: a `World` and the time in, a `Decision` out.

Engines and buckets are planned by `packetstack_core.planning.plan`, as they are without Kubernetes; here its
actions become one flow table, pods and status. Whatever happens between two writes, or after any of them, the next
decision goes on from what is there. So their order counts:

- An engine is in the flow table before its pod exists, and its number is never given twice.
- A pod is deleted when the flow table no longer names its engine and the node's agent has let it go.
- What is not needed to serve comes after the status, so that its refusal is not all that is ever heard.
"""

from collections import Counter
from dataclasses import replace

from packetstack_core import reading, resources, standing, transitions
from packetstack_core.assignment import NOBODY, moved
from packetstack_core.backing_off import ENGINE_SECONDS, back_off
from packetstack_core.kinds import MAX_ENGINE_ID, TableEngine
from packetstack_core.planning import (
    ActivateEngine,
    AssignBuckets,
    CreateEngine,
    DrainEngine,
    RemoveEngine,
)
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import ConditionReason, Event, EventReason, Problem
from packetstack_core.statuses import RebalanceStatus
from packetstack_core.transitions import SetState
from packetstack_core.wording import counted, timestamp
from packetstack_operator import changing_sets, conditions, facts, observing, obstacles, standings, writing
from packetstack_operator.facts import Facts, Plan, Waits
from packetstack_operator.observing import Memory, World
from packetstack_operator.outcome import Decision, Write

NODE_SECONDS = 30.0
"""How long a stack without engines waits for its node, where its flows are, to take one before it goes to another."""
REUSE_SECONDS = 2.0
"""After a pod with a device has gone, before one is made that may get it: a CNI plugin may still be resetting it."""


def decide(world: World, now: float) -> Decision:
    """`now`: Unix time in seconds."""
    refused = _refused(world)
    if refused is not None:
        return _only_status(world, *refused, now)
    found = facts.read(world, reading.parse(world.stack), now)
    return _compare(found, step(found))


def blocked(world: World, now: float) -> Decision:
    """The status alone, after a write of a decision was refused (`Memory.refused`): the rest was not carried out."""
    refused = world.memory.refused
    if _refused(world) is not None or refused is None:
        return Decision(world.memory)
    found = facts.read(world, reading.parse(world.stack), now)
    if refused.write[1] == "FlowTable":  # nothing of a plan is true
        plan = _begin(found)
        _follow_pods(found, plan)
        status = conditions.stack_status(found, plan, written=False)
        writes: tuple[Write, ...] = tuple(writing.status(found, status))
    else:
        plan = step(found)
        writes = tuple(w for w in _compare(found, plan).writes if w.kind == resources.KIND)
    return Decision(world.memory, writes, tuple(e for e in plan.events if e.reason == refused.reason))


def _compare(found: Facts, plan: Plan) -> Decision:
    """The writes that make of what there is what there shall be."""
    table = writing.table(found, plan)
    first = [
        *table,
        *writing.pods_to_create(found, plan),
        *writing.marks(found, plan),
        *writing.pods_to_delete(found, plan),
        *writing.packet_engines(found, plan),
    ]
    last = writing.budget(found)
    refused = plan.memory.refused
    if refused is not None and all(w.identity != refused.write for w in (*first, *last)):
        plan.memory = replace(plan.memory, refused=None)  # nobody wants it any more
    status = writing.status(found, conditions.stack_status(found, plan, written=not table))
    memory = replace(plan.memory, since=plan.waits.begun)
    return Decision(memory, (*first, *status, *last), tuple(plan.events), plan.waits.wake_at)


def _refused(world: World) -> Problem | None:
    """Reason and message for leaving everything as it is."""
    try:
        stack = reading.parse(world.stack)
    except ResourceError as e:
        return ConditionReason.INVALID_SPEC, e.problems[0]
    if problem := standing.unsupported(stack.spec, kubernetes=True):
        return ConditionReason.NOT_SUPPORTED, problem
    if world.table is not None and not observing.owned_by(world.table, world.uid):
        return (
            ConditionReason.NAME_TAKEN,
            f"flow table {stack.name} belongs to another stack of this name; wait until it is deleted",
        )
    if world.conflict is not None and world.conflict.fresh:
        return ConditionReason.ADDRESS_CONFLICT, standings.conflict_message(world.conflict)
    table = observing.read_table(world.table)
    if table is not None and table.spec.flow_table.buckets != stack.spec.flow_table.buckets:
        return ConditionReason.INVALID_SPEC, "spec.flowTable.buckets: cannot be changed; create another stack"
    return None


def _only_status(world: World, reason: ConditionReason, message: str, now: float) -> Decision:
    former = facts.stack_status(world.stack)
    status = conditions.only(world, former, reason, message, now)
    if status == former:
        return Decision(world.memory)
    return Decision(world.memory, (writing.status_write(world, status),), (Event(reason, message),))


def release(world: World, now: float) -> Decision:
    """For a stack that is being deleted: its engines are let go on their node, then its pods are deleted.

    What is left (the flow table with its addresses) goes with the stack, as its owner.
    """
    del now
    table = observing.read_table(world.table)
    writes: list[Write] = []
    confirmed = True
    if table is not None and observing.owned_by(world.table or {}, world.uid):
        if table.spec.engines or any(o != NOBODY for o in table.spec.owner_ids()):
            alone = tuple(s for s in table.spec.sets or () if s.state == "Current") or None
            empty = table.spec.model_copy(update={"engines": (), "owners": "", "sets": alone, "previous_owners": None})
            writes.append(writing.table_write(world, empty))
            confirmed = False
        else:
            report = table.report()
            current = report is not None and report.observed_generation >= observing.generation(world.table)
            confirmed = table.spec.node is None or (current and report is not None and not report.engines)
    if confirmed:
        writes += [writing.delete("Pod", p) for p in world.pods if not observing.terminating(p)]
    return Decision(world.memory, tuple(writes), released=confirmed and not writes)


# ---- the steps of a plan -------------------------------------------------------------------------------------------


def step(found: Facts) -> Plan:
    """What there shall be next."""
    plan = _begin(found)
    _note_released_devices(found, plan)
    _follow_pods(found, plan)
    _reconcile(found, plan)
    _rebalance(found, plan)
    return plan


def _begin(found: Facts) -> Plan:
    """What there is, and what is remembered."""
    pool = found.pool
    rebalanced = found.stack.spec.rebalance.mode != "Off" and found.table is not None and found.table.spec.rebalanced
    plan = Plan(
        pool.node,
        pool.last,
        list(pool.owners),
        dict(pool.entries),
        _remembered(found.world, found.now),
        Waits(found.world.memory.since, found.now),
        rebalanced,
        pool.sets,
        dict(pool.shapes),
        pool.ending,
        list(pool.keepers),
    )
    _note_builds(found, plan)
    if plan.memory.template != found.template:  # what failed before says nothing about another shape
        plan.forget_failures(found.template)
    return plan


def _note_builds(found: Facts, plan: Plan) -> None:
    """Shard layouts of images, by engines that were not let in for theirs."""
    templates = {found.template, *(s.template for s in plan.sets.known)}
    known = {t: shard for t, shard in plan.memory.shards.items() if t in templates}
    for entry in plan.entries.values():
        report = found.reported.get(entry.id)
        if report is not None and report.shard is not None and entry.template in templates:
            known[entry.template] = report.shard
    plan.memory = replace(plan.memory, shards=known)


def _remembered(world: World, now: float) -> Memory:
    """The memory, cut to what is still true."""
    memory = world.memory
    # The name of a pod is taken once: its engine gets another number. A budget has no other name.
    taken = frozenset((kind, name) for kind, name in memory.taken & world.strangers if kind != "Pod")
    # A wall clock may be set back: no pause is longer than it was meant to be.
    longest = back_off(max(0, memory.failures - 1), ENGINE_SECONDS)
    return replace(
        memory,
        taken=taken,
        create_after=min(memory.create_after, now + longest),
        reuse_after=min(memory.reuse_after, now + REUSE_SECONDS),
        given_up=replace(memory.given_up, at=min(memory.given_up.at, now)),
    )


def _note_released_devices(found: Facts, plan: Plan) -> None:
    """A device whose pod has gone is not given to the next one at once."""
    known = plan.memory.devices
    devices = frozenset(
        str(p["metadata"]["uid"]) for p in found.pods.values() if observing.was_given(p) and observing.node_of(p)
    )
    plan.memory = replace(plan.memory, devices=devices)
    if known - devices:
        plan.memory = replace(plan.memory, reuse_after=found.now + REUSE_SECONDS)


def _follow_pods(found: Facts, plan: Plan) -> None:
    """What has become of the engines' pods, whatever is wanted."""
    _drop_what_is_gone(found, plan)
    _follow_the_node(found, plan)
    _start(found, plan)


def _drop_what_is_gone(found: Facts, plan: Plan) -> None:
    """Entries whose pods will not run again. Those that never ran count for the back-off."""
    for entry in list(plan.entries.values()):
        pod = found.pods.get(entry.name)
        if pod is None:
            if entry.pod_uid:
                del plan.entries[entry.id]
                message = f"engine {entry.id}: its pod {entry.name} is gone; its buckets go to other engines"
                plan.event(EventReason.ENGINE_LOST, message)
            elif ("Pod", entry.name) in found.world.strangers:
                del plan.entries[entry.id]
                message = f"engine {entry.id}: pod {entry.name} exists and is not of this stack; it is made under another number"
                plan.event(EventReason.NAME_TAKEN, message)
            elif entry.template not in (found.template, *(s.template for s in plan.sets.known)):  # and will never be
                del plan.entries[entry.id]
            continue
        uid = str(pod["metadata"]["uid"])
        replaced = bool(entry.pod_uid) and entry.pod_uid != uid
        if not replaced and not observing.dead(pod, found.now):
            continue
        del plan.entries[entry.id]
        status = pod.get("status", {})
        reason = "it was replaced" if replaced else str(status.get("reason") or observing.phase(pod))
        message = f"engine {entry.id}: pod {entry.name} ended: {reason} {status.get('message') or ''}".strip()
        if entry.pod_uid or observing.terminating(pod):
            plan.event(EventReason.ENGINE_LOST, message)
        elif uid not in plan.memory.counted:
            _count_failure(
                found, plan, uid, obstacles.admission(str(status.get("reason")), str(status.get("message"))), message
            )
    uids = {str(p["metadata"]["uid"]) for p in found.pods.values()}
    plan.memory = replace(plan.memory, counted=plan.memory.counted & uids)


def _count_failure(found: Facts, plan: Plan, uid: str, reason: ConditionReason, message: str) -> None:
    pause = back_off(plan.memory.failures, ENGINE_SECONDS)
    plan.memory = replace(
        plan.memory,
        failures=plan.memory.failures + 1,
        create_after=found.now + pause,
        problem=(reason, message),
        counted=plan.memory.counted | {uid},
    )
    plan.event(EventReason.ENGINE_FAILED, f"{message}; next try in {pause:g} s")


def _follow_the_node(found: Facts, plan: Plan) -> None:
    """The first engine that is placed says where all of them run."""
    placed = {i: node for i, pod in sorted(plan.pods(found).items()) if (node := observing.node_of(pod)) is not None}
    if plan.node is None:
        plan.node = next(iter(placed.values()), None)
        return
    if plan.node in placed.values():
        return
    refused = [
        (i, since) for i, pod in plan.pods(found).items() if (since := obstacles.unschedulable_since(pod)) is not None
    ]
    if not refused:
        return
    at = plan.waits.since("the node takes no engine", max(since for _, since in refused)) + NODE_SECONDS
    if found.now < at:
        plan.waits.wake(at)
        return
    message = (
        f"no pod of the stack could be scheduled on node {plan.node} for {NODE_SECONDS:g} s, and none of its engines is left "
        "there: the stack goes to another node, and its live flows end"
    )
    plan.event(EventReason.NODE_LOST, message)
    for i, _ in refused:  # their pods name that node
        del plan.entries[i]
    plan.node = None


def _start(found: Facts, plan: Plan) -> None:
    for i, pod in plan.pods(found).items():
        entry = plan.entries[i]
        if entry.state != "Pending" or observing.terminating(pod) or observing.node_of(pod) != plan.node:
            continue
        interface = observing.interface_of(pod)
        if observing.running(pod) and interface is not None:
            plan.change(entry, state="Starting", pod_uid=str(pod["metadata"]["uid"]), interface=interface)


def _reconcile(found: Facts, plan: Plan) -> None:
    planned = standing.plan(standings.pool(found, plan), found.now)
    plan.actions = planned.actions
    for i in sorted(planned.given_up.slots - plan.memory.given_up.slots):
        message = (
            f"engine {i}: no datapath has served for {planned.patience:g} s; others take its buckets, another is made"
        )
        plan.event(EventReason.ENGINE_LOST, message)
    plan.memory = replace(plan.memory, given_up=planned.given_up)
    if planned.wake_at is not None:
        plan.waits.wake(planned.wake_at)
    if plan.memory.create_after > found.now:
        plan.waits.wake(plan.memory.create_after)
    if not _lacks_engines(found, plan) and all(e.state != "Pending" for e in plan.entries.values()):
        plan.forget_failures(found.template)
    for action in plan.actions:
        _act(found, plan, action)


def _lacks_engines(found: Facts, plan: Plan) -> bool:
    """Whether engines of the wanted template, or of a set that does not drain, are still to be made."""
    staying = [e for e in plan.entries.values() if e.state not in ("Draining", "Failed")]
    known = plan.sets.known
    if not known:
        return sum(e.template == found.template for e in staying) < found.stack.spec.replicas
    there = Counter((e.set or known[0].id, e.template) for e in staying)
    return any(there[s.id, s.template] < s.replicas for s in known if s.state is not SetState.DRAINING)


def _act(found: Facts, plan: Plan, action: transitions.Action) -> None:
    match action:
        case CreateEngine():
            # Without a node one engine finds one; the others go where it is.
            if plan.node is not None or all(e.template != action.template for e in plan.entries.values()):
                _create(found, plan, action)
        case ActivateEngine(i):
            if plan.entries[i].state == "Starting":
                plan.event(EventReason.ENGINE_ACTIVE, f"engine {i} serves and gets its share of the buckets")
            else:
                plan.event(
                    EventReason.ENGINE_ACTIVE,
                    f"engine {i} was draining, is wanted again and gets its share of the buckets",
                )
            plan.change(plan.entries[i], state="Active")
        case DrainEngine(i):
            plan.change(plan.entries[i], state="Draining")
            plan.event(
                EventReason.ENGINE_DRAINING,
                f"engine {i} hands its buckets over with their flows, and is removed then",
            )
        case AssignBuckets(moves):
            plan.owners = moved(plan.owners, moves)
        case RemoveEngine(i):
            del plan.entries[i]
            plan.event(EventReason.ENGINE_REMOVED, f"engine {i} owns no bucket any more and is removed")
        case _:
            changing_sets.act(found, plan, action)


def _rebalance(found: Facts, plan: Plan) -> None:
    """Buckets to other cores, when nothing else is to do and packets see the flow table that was measured."""
    proposal, spec = found.world.proposal, found.stack.spec
    if proposal is None or not proposal.moves or spec.rebalance.mode != "Auto" or plan.actions or spec.paused:
        return
    if len(plan.sets.known) > 1:
        return  # mirrored buckets stay where they are
    if not found.settled or proposal.generation != observing.generation(found.world.table):
        return
    if "FlowTable" in found.world.outdated:
        return  # a server that does not know the mark drops it: the next plan would move them back
    able = {i: e.queues for i, e in plan.entries.items() if e.state == "Active" and found.ready(e)}
    moves = [m for m in proposal.moves if m.to.queue < able.get(m.to.slot, 0)]
    if moves:
        plan.owners = moved(plan.owners, moves)
        plan.rebalanced = True
        plan.moved = RebalanceStatus.model_validate(
            {"lastTime": timestamp(found.now), "buckets": len(moves), "message": proposal.message}
        )
        plan.event(EventReason.REBALANCED, f"{counted(len(moves), 'bucket')}: {proposal.message}")


def _create(found: Facts, plan: Plan, action: CreateEngine) -> None:
    used = set(plan.entries) | set(found.reported) | {observing.number_of(p) for p in found.pods.values()}
    used |= {o.slot for o in plan.owners if o is not None}
    used |= {i for i in range(1, MAX_ENGINE_ID + 1) if ("Pod", f"{found.stack.name}-{i}") in found.world.strangers}
    after = [*range(plan.last + 1, MAX_ENGINE_ID + 1), *range(1, plan.last + 1)]
    number = next((i for i in after if i not in used), 0)
    if not number:
        return
    plan.last = number
    shape = plan.shape(found.stack, action.template)
    plan.entries[number] = TableEngine.model_validate(
        {
            "id": number,
            "name": f"{found.stack.name}-{number}",
            "state": "Pending",
            "template": action.template,
            "queues": action.queues,
            "set": action.set,
            "cores": shape.cores,
            "cpuPolicy": shape.cpu_policy,
        }
    )
    plan.event(EventReason.ENGINE_CREATED, f"engine {number}: pod {found.stack.name}-{number}")
