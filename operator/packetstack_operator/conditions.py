"""Conditions and numbers in the status of a stack and of its engines. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from packetstack_core import limits
from packetstack_core.kinds import (
    Condition,
    PacketEngineStatus,
    PacketStackStatus,
    RebalanceStatus,
    TableEngine,
)
from packetstack_core.reasons import ConditionReason, Problem
from packetstack_core.resources import Spec
from packetstack_operator import facts, observing, obstacles, pods
from packetstack_operator.facts import Facts, Plan
from packetstack_operator.observing import Conflict, World

AGENT_LABEL = "app.kubernetes.io/component=agent"
"""Label of the agents' pods, as the chart makes them."""
AGENT_SECONDS = 10.0
"""So long an agent may take to answer a flow table with engines of its node."""
LAYOUT = f"{ConditionReason.LAYOUT_MISMATCH}: "
"""So begins what an agent says of memory that another build has made, or of an engine of another build."""


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


@dataclass(frozen=True, slots=True)
class _Counts:
    """The engines of a plan."""

    staying: Sequence[TableEngine]
    serving: Sequence[TableEngine]
    """Active and ready."""
    fresh: Sequence[TableEngine]
    """Made as the resource asks for now."""
    extra: int
    """Pods of engines that are leaving."""


def _count(found: Facts, plan: Plan) -> _Counts:
    entries = plan.entries.values()
    staying = [e for e in entries if e.state not in ("Draining", "Failed") and not found.leaves(e, plan.node)]
    return _Counts(
        staying,
        [e for e in staying if e.state == "Active" and found.ready(e)],
        [e for e in staying if e.template == found.template],
        len(set(found.pods) - {e.name for e in staying}),
    )


def stack_status(found: Facts, plan: Plan, *, written: bool) -> PacketStackStatus:
    """The stack's status; the plan gets an event for each condition that turns.

    `written`: the flow table is as the plan has it.
    """
    former = facts.stack_status(found.world.stack)
    counts = _count(found, plan)
    conditions = _stack_conditions(found, plan, counts, former, written)
    return PacketStackStatus.model_validate(
        {
            "observedGeneration": observing.generation(found.world.stack),
            "replicas": min(len(counts.staying), limits.MAX_REPLICAS),
            "readyReplicas": len(counts.serving),
            "updatedReplicas": len(counts.fresh),
            "drainingReplicas": counts.extra,
            "selector": pods.selector(found.stack.name),
            "flowTableGeneration": observing.generation(found.world.table),
            "node": plan.node or "",
            "capacity": _flows(found),
            "rebalance": _rebalance_status(found, plan, former.rebalance),
            "conditions": tuple(conditions[t] for t in sorted(conditions)),
        }
    )


def _stack_conditions(
    found: Facts, plan: Plan, counts: _Counts, former: PacketStackStatus, written: bool
) -> dict[str, Condition]:
    spec = found.stack.spec
    goal = (
        written
        and not plan.actions
        and len(counts.serving) == len(counts.staying) == len(counts.fresh) == spec.replicas
        and not counts.extra
        and (not spec.replicas or found.settled)
    )
    conditions = {c.type: c for c in former.conditions}

    def set_(kind: str, value: bool | None, reason: ConditionReason, message: str = "") -> None:
        was = conditions.get(kind)
        _set(conditions, found.world, kind, value, reason, message, found.now)
        bad = value if kind == "Degraded" else not value
        if kind != "Progressing" and (was is None or (was.status, was.reason) != (conditions[kind].status, reason)):
            other = was is not None and was.status != conditions[kind].status
            if (was is not None or kind != "Available") if bad else other:
                plan.event(reason, message or f"{kind} is {value}")

    available = bool(counts.serving)
    starting = ConditionReason.ENGINES_STARTING if spec.replicas else ConditionReason.NO_REPLICAS
    set_("Available", available, ConditionReason.MINIMUM_ENGINES_AVAILABLE if available else starting)
    set_("Progressing", not goal and not spec.paused, *_progress(goal, spec, counts))
    set_("CapacityAvailable", *_capacity(found, plan))
    set_("Degraded", *_degraded(found, plan, counts.staying))
    if found.report is not None:
        set_("FirewallOpen", *_firewall(found.report.firewall))
    return conditions


def _rebalance_status(found: Facts, plan: Plan, former: RebalanceStatus | None) -> RebalanceStatus | None:
    elephants = found.world.proposal.elephants if found.world.proposal is not None else ()
    last = plan.moved or former
    if last is None and not elephants:
        return None
    return (last or RebalanceStatus()).model_copy(update={"elephants": elephants})


def _progress(goal: bool, spec: Spec, counts: _Counts) -> Problem:
    fresh, serving = len(counts.fresh), len(counts.serving)
    if goal:
        return ConditionReason.SETTLED, ""
    if spec.paused:
        return ConditionReason.PAUSED, ""
    if fresh < len(counts.staying):
        return ConditionReason.ROLLING_OUT, f"{fresh} of {spec.replicas} engines have the present template"
    if serving < spec.replicas:
        return ConditionReason.ENGINES_STARTING, f"{serving} of {spec.replicas} engines serve"
    return ConditionReason.HANDOVER_IN_PROGRESS, ""


def _capacity(found: Facts, plan: Plan) -> tuple[bool, ConditionReason, str]:
    for _, pod in sorted(plan.pods(found).items()):
        obstacle = obstacles.of_pod(pod, found.world.troubles)
        if obstacle is not None:
            return False, *obstacle
    if plan.memory.problem is not None:
        return False, *plan.memory.problem
    return True, ConditionReason.ENOUGH_CAPACITY, ""


Degraded = tuple[bool, ConditionReason, str]
"""Value, reason and message of the condition."""


def _degraded(found: Facts, plan: Plan, staying: Sequence[TableEngine]) -> Degraded:
    """The first thing that is wrong, in the order in which a person would want to know."""
    problem = (
        _nothing_goes_on(found, plan)
        or _no_agent(found, plan)
        or _engines_are_wrong(found, plan, staying)
        or _surroundings_are_wrong(found)
    )
    return (True, *problem) if problem is not None else (False, ConditionReason.AS_EXPECTED, "")


def _nothing_goes_on(found: Facts, plan: Plan) -> Problem | None:
    if plan.memory.refused is not None:
        return plan.memory.refused.reason, plan.memory.refused.message
    if found.report is not None and found.report.message:
        return _reported(found.report.message)
    if found.world.conflict is not None:
        return ConditionReason.ADDRESS_CONFLICT, conflict_message(found.world.conflict)
    if found.backend_problems:
        return ConditionReason.BACKEND_NOT_FOUND, "; ".join(found.backend_problems)[:1000]
    return None


def _no_agent(found: Facts, plan: Plan) -> Problem | None:
    attached = [found.pods[e.name] for e in plan.entries.values() if e.pod_uid and e.name in found.pods]
    if not attached or found.report is not None:
        return None
    at = plan.waits.since("no agent answers", min(map(observing.started_at, attached))) + AGENT_SECONDS
    if found.now < at:
        plan.waits.wake(at)
        return None
    return (
        ConditionReason.NO_AGENT,
        f"the agent on {plan.node} has not reported on this flow table for {AGENT_SECONDS:g} s: nothing is resized, packets "
        f"go on by the table that it had. See whether it runs: kubectl get pods -A -l {AGENT_LABEL} -o wide",
    )


def _engines_are_wrong(found: Facts, plan: Plan, staying: Sequence[TableEngine]) -> Problem | None:
    if found.doubles:
        return ConditionReason.DUPLICATE_MAC, found.double(min(found.doubles))
    if foreign := [e for e in staying if _message_of(found, e).startswith(LAYOUT)]:
        said = _message_of(found, foreign[0]).removeprefix(LAYOUT)
        return ConditionReason.LAYOUT_MISMATCH, (
            f"{_names(foreign)}: {said}; the pod's image is of another build than the node's agent: let spec.engine.image be "
            "the agent's, or upgrade the agents"
        )
    lame = [e for e in staying if e.state == "Active" and not found.ready(e)]
    if lame:
        return ConditionReason.ENGINE_NOT_READY, _lame(found, plan, lame)
    strays = [e for e in plan.entries.values() if e.name in found.pods and found.leaves(e, plan.node)]
    if strays and any(observing.terminating(found.pods[e.name]) for e in strays):
        return ConditionReason.ENGINE_EVICTED, f"{_names(strays)}: being deleted; its buckets go to another engine"
    return None


def _surroundings_are_wrong(found: Facts) -> Problem | None:
    name = pods.budget_name(found.stack.name)
    if ("PodDisruptionBudget", name) in found.world.strangers:
        return (
            ConditionReason.NAME_TAKEN,
            f"PodDisruptionBudget {name} is not of this stack, so that nothing holds evictions of its engines back; rename it",
        )
    if found.world.outdated:
        return (
            ConditionReason.CRD_OUTDATED,
            f"{found.world.outdated}: the cluster's definition is not of this operator's version, so that new fields are lost; "
            "apply the CRDs of its version",
        )
    return None


def _names(engines: Sequence[TableEngine]) -> str:
    return ", ".join(e.name for e in engines[:5])


def _message_of(found: Facts, entry: TableEngine) -> str:
    report = found.reported.get(entry.id)
    return report.message if report is not None and not report.ready else ""


def _lame(found: Facts, plan: Plan, engines: Sequence[TableEngine]) -> str:
    """Which active engines do not serve, why, and how many buckets wait for them."""
    said = next((r.message for e in engines if (r := found.reported.get(e.id)) and r.message), "")
    numbers = {e.id for e in engines}
    waiting = sum(o is not None and o.slot in numbers for o in plan.owners)
    return (
        f"{_names(engines)}: {said or 'no datapath is attached'}; {waiting} of "
        f"{len(plan.owners)} buckets get no service until one is"
    )


def _flows(found: Facts) -> dict[str, int]:
    """Flows that SNAT ports allow: about 15 a bucket for each pair of SNAT address and backend at 4,096 buckets."""
    buckets = found.stack.spec.flow_table.buckets
    per_bucket = 65536 // buckets - max(1, 1024 // buckets)
    snat = Counter(a.version for a in found.stack.snat_addresses())
    places = {(e.address, e.port) for li in found.listeners for e in li.backends.endpoints or () if e.weight}
    pairs = sum(snat[address.version] for address, _ in places)
    return {
        "pairs": pairs,
        "flows": pairs * per_bucket * buckets,
        "maxFlows": found.stack.spec.flow_table.max_flows,
    }


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


def conflict_message(conflict: Conflict) -> str:
    """Which address, whose it is, and what to do."""
    return f"{conflict.address} belongs to stack {conflict.owner}; use another address"


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
    since = was.last_transition_time if was is not None and was.status == status else observing.timestamp(now)
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


def _reported(text: str) -> Problem:
    """Reason and message of what an agent reports, as in "AddressConflict: 192.0.2.10 belongs to stack default/web"."""
    name, _, message = text.partition(": ")
    for reason in ConditionReason:
        if reason == name and message:
            return reason, message
    return ConditionReason.AGENT_PROBLEM, text


def _firewall(said: str) -> tuple[bool | None, ConditionReason, str]:
    """Whether the node's packet filter lets packets pass, by what its agent says."""
    if not said:
        return True, ConditionReason.NOTHING_IN_THE_WAY, ""
    reason, message = _reported(said)
    if reason is ConditionReason.MAY_DROP_PACKETS:
        return None, reason, message
    return False, ConditionReason.PACKETS_DROPPED, message
