"""Conditions and numbers in the status of a stack and of its engines. Pure."""

from packetstack_core import limits, reasons, standing
from packetstack_core.kinds import Condition, PacketEngineStatus
from packetstack_core.reasons import ConditionReason
from packetstack_core.standing import Finding, SetStanding
from packetstack_core.statuses import PacketStackStatus, RebalanceStatus, SetStatus
from packetstack_core.values import Address
from packetstack_core.wording import timestamp
from packetstack_operator import facts, observing, obstacles, pods, standings
from packetstack_operator.facts import Facts, Plan
from packetstack_operator.observing import World


def only(
    world: World, former: PacketStackStatus, reason: ConditionReason, message: str, now: float
) -> PacketStackStatus:
    """The status of a stack that is left as it is, for this reason."""
    conditions = {c.type: c for c in former.conditions}
    _set(conditions, world, "Degraded", True, reason, message, now)
    if former.ready_replicas == 0:
        _set(conditions, world, "Available", False, reason, message, now)
    return former.model_copy(
        update={
            "observed_generation": observing.generation(world.stack),
            "selector": pods.selector(world.stack["metadata"]["name"]),
            "conditions": tuple(conditions[t] for t in sorted(conditions)),
        }
    )


# ---- a stack -------------------------------------------------------------------------------------------------------


def stack_status(found: Facts, plan: Plan, *, written: bool) -> PacketStackStatus:
    """The stack's status; the plan gets an event for each condition that turns.

    `written`: the flow table is as the plan has it.
    """
    former = facts.stack_status(found.world.stack)
    stands = standings.standing(found, plan, written=written)
    conditions = {c.type: c for c in former.conditions}
    for finding in standing.conditions(stands):
        _turn(found, plan, conditions, finding)
    return PacketStackStatus.model_validate(
        {
            "observedGeneration": observing.generation(found.world.stack),
            "replicas": min(len(standing.staying(stands.pool)), limits.MAX_REPLICAS),
            "readyReplicas": len(standing.serving(stands.pool)),
            "updatedReplicas": len(standing.updated(stands.pool)),
            "drainingReplicas": stands.remaining,
            "selector": pods.selector(found.stack.name),
            "flowTableGeneration": observing.generation(found.world.table),
            "node": plan.node or "",
            "capacity": standing.capacity(found.stack.spec, _backends(found)),
            "sets": tuple(_set_status(s) for s in standing.sets(stands)) or None,
            "rebalance": _rebalance_status(found, plan, former.rebalance),
            "conditions": tuple(conditions[t] for t in sorted(conditions)),
        }
    )


def _turn(found: Facts, plan: Plan, conditions: dict[str, Condition], finding: Finding) -> None:
    """A condition as found, and an event if it got worse, or better than it was."""
    kind, value = finding.type, finding.value
    was = conditions.get(kind)
    _set(conditions, found.world, kind, value, finding.reason, finding.message, found.now)
    bad = value if kind in reasons.BAD else not value
    if kind != "Progressing" and (was is None or (was.status, was.reason) != (finding.status, finding.reason)):
        other = was is not None and was.status != finding.status
        if (was is not None or kind != "Available") if bad else other:
            plan.event(finding.reason, finding.message or f"{kind} is {value}")


def _set_status(known: SetStanding) -> SetStatus:
    return SetStatus.model_validate(
        {
            "id": known.set.id,
            "state": str(known.set.state),
            "since": timestamp(known.set.since),
            "engines": known.engines,
            "ready": known.ready,
            "buckets": known.buckets,
            "keptBuckets": known.kept,
            "connections": known.connections,
            "silentSince": timestamp(known.oldest) if known.oldest is not None else "",
        }
    )


def _rebalance_status(found: Facts, plan: Plan, former: RebalanceStatus | None) -> RebalanceStatus | None:
    elephants = found.world.proposal.elephants if found.world.proposal is not None else ()
    last = plan.moved or former
    if last is None and not elephants:
        return None
    return (last or RebalanceStatus()).model_copy(update={"elephants": elephants})


def _backends(found: Facts) -> set[tuple[Address, int]]:
    """Backends that may get new flows; which of them are healthy, the agent knows."""
    return {(e.address, e.port) for li in found.listeners for e in li.backends.endpoints or () if e.weight}


# ---- an engine -----------------------------------------------------------------------------------------------------


def engine_status(found: Facts, plan: Plan, name: str, number: int, former: PacketEngineStatus) -> PacketEngineStatus:
    """The status of the PacketEngine of this name."""
    pod = found.pods.get(name)
    entry = plan.entries.get(number) or (observing.from_pod(pod) if pod is not None else None)
    report = found.reported.get(number)
    if entry is None:
        return former
    ours = number in plan.entries
    ready = ours and found.ready(entry)
    state = entry.state if ours else "Failed" if pod and observing.dead(pod, found.now) else "Draining"
    message = "" if ready or report is None else found.why_not_ready(number)
    if not ready and not message and pod is not None:
        obstacle = obstacles.of_pod(pod, found.world.troubles)
        message = obstacle[1] if obstacle is not None else ""
    # While buckets are on their way the numbers change many times a second: they are metrics then.
    settled = found.report is None or found.report.settled
    conditions: dict[str, Condition] = {c.type: c for c in former.conditions}
    reason = ConditionReason.SERVING if ready else ConditionReason(state)
    _set(conditions, found.world, "Ready", ready, reason, message, found.now)
    return PacketEngineStatus.model_validate(
        {
            "state": state,
            "ready": ready,
            "node": (observing.node_of(pod) if pod is not None else None) or "",
            "pod": name,
            "interface": report.interface if report is not None else entry.interface,
            "mac": report.mac if report is not None else former.mac,
            "pciAddress": former.pci_address,
            "cores": entry.cores,
            "queues": entry.queues,
            "template": entry.template,
            "buckets": former.buckets if not settled else report.buckets if report is not None else 0,
            "flows": former.flows if not settled else report.flows if report is not None else 0,
            "message": message,
            "conditions": tuple(conditions.values()),
        }
    )


# ---- parts ---------------------------------------------------------------------------------------------------------


def _set(
    conditions: dict[str, Condition],
    world: World,
    kind: str,
    value: bool | None,
    reason: ConditionReason,
    message: str,
    now: float,
) -> None:
    """`value`: None if it is not known."""
    was, status = conditions.get(kind), "Unknown" if value is None else str(value)
    since = was.last_transition_time if was is not None and was.status == status else timestamp(now)
    conditions[kind] = Condition.model_validate(
        {
            "type": kind,
            "status": status,
            "reason": str(reason),
            "message": message,
            "lastTransitionTime": since,
            "observedGeneration": observing.generation(world.stack),
        }
    )
