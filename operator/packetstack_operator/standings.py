"""How a stack of the cluster stands: fills what the core decides and shows from, by the API server's objects. Pure."""

from collections.abc import Sequence

from packetstack_core import shards
from packetstack_core.assignment import NOBODY, Owner, State
from packetstack_core.kinds import SetReport, TableEngine
from packetstack_core.reasons import ConditionReason, Problem, split
from packetstack_core.standing import EngineStanding, Pool, Standing, staying
from packetstack_core.transitions import SetState
from packetstack_operator import observing, obstacles, pods
from packetstack_operator.facts import Facts, Plan
from packetstack_operator.observing import Conflict

AGENT_LABEL = "app.kubernetes.io/component=agent"
"""Label of the agents' pods, as the chart makes them."""
AGENT_SECONDS = 10.0
"""How long an agent may take to answer a flow table with engines of its node."""
LAYOUT = f"{ConditionReason.LAYOUT_MISMATCH}: "
"""So begins what an agent says of memory that another build has made, or of an engine of another build."""


def pool(found: Facts, plan: Plan) -> Pool:
    """What the planner decides from: the engines and owners of the plan as it is now."""
    return Pool(
        spec=found.stack.spec,
        template=found.template,
        engines=[
            EngineStanding(
                slot=e.id,
                name=e.name,
                state=State(e.state),
                ready=found.ready(e),
                why_not_ready=_message_of(found, e),
                template=e.template,
                queues=e.queues,
                flows=found.reported[e.id].flows if e.id in found.reported else 0,
                holds=found.holds(e),
                load=found.world.loads.get(e.id, 0.0),
                down_since=_down_since(found, plan, e),
                leaving=found.leaves(e, plan.node),
                evicted=e.name in found.pods and observing.terminating(found.pods[e.name]),
                set=e.set,
                configured=found.current and e.id in found.reported and bool(found.reported[e.id].configured),
            )
            for _, e in sorted(plan.entries.items())
        ],
        owners=plan.owners,
        moving=frozenset(),  # the agent holds back what it is not done with
        pinned=frozenset(),  # nobody moves buckets by hand in a cluster
        create_after=plan.memory.create_after,
        rebalanced=plan.rebalanced,
        given_up=plan.memory.given_up,
        sets=plan.sets,
        keepers=_keepers(found, plan),
        shard=_shard(found, plan),
        present_shard=_present_shard(found),
    )


def standing(found: Facts, plan: Plan, *, written: bool) -> Standing:
    """What the conditions of the stack follow from. `written`: the flow table is as the plan has it."""
    there = pool(found, plan)
    replicas = staying(there)
    return Standing(
        pool=there,
        planned=written and not plan.actions,
        followed=found.settled,
        remaining=len(set(found.pods) - {e.name for e in replicas}),
        obstacle=_obstacle(found, plan),
        lost=_lost(found),
        graver=_nothing_goes_on(found, plan) or _no_agent(found, plan) or _engines_are_wrong(found, replicas),
        lesser=_surroundings_are_wrong(found),
        firewall=_firewall(found.report.firewall) if found.report is not None else None,
        kept=_kept(found, plan, there),
        connections=_connections(found, plan),
        oldest=_oldest(found, plan),
    )


def _present_shard(found: Facts) -> str:
    return (found.report.shard if found.report is not None else None) or shards.FIRST


def _shard(found: Facts, plan: Plan) -> str:
    """Shard layout of the build that the present template's engines have, as far as one of them has shown it."""
    if (seen := plan.memory.shards.get(found.template)) is not None:
        return seen
    same = [s.shard for s in plan.sets.known if s.template == found.template]
    current = plan.sets.one(SetState.CURRENT)
    return same[-1] if same else current.shard if current is not None else _present_shard(found)


def _keepers(found: Facts, plan: Plan) -> Sequence[Owner | None]:
    """Who keeps older connections: as the flow table says, until the agent says that none is left.

    A flow table that was lost names nobody: then an engine of the set that drains stands for all of them.
    """
    draining = plan.sets.one(SetState.DRAINING)
    if draining is None:
        return ()
    kept = found.kept(draining.id)
    if kept is not None and not kept.kept_buckets:
        return ()
    if any(k is not None and k != NOBODY for k in plan.keepers):
        return plan.keepers
    first = plan.sets.known[0].id
    own = [e.id for e in plan.entries.values() if (e.set or first) == draining.id]
    return [Owner(own[0], 0)] * len(plan.owners) if own else ()


def _left(found: Facts, plan: Plan) -> SetReport | None:
    """What the set that drains has left, by the agent; None if none does, or if the agent does not say."""
    draining = plan.sets.one(SetState.DRAINING)
    return found.kept(draining.id) if draining is not None else None


def _kept(found: Facts, plan: Plan, there: Pool) -> int:
    left = _left(found, plan)
    return left.kept_buckets if left is not None else sum(k is not None and k != NOBODY for k in there.keepers)


def _connections(found: Facts, plan: Plan) -> int | None:
    left = _left(found, plan)
    return left.connections if left is not None else None


def _oldest(found: Facts, plan: Plan) -> float | None:
    left = _left(found, plan)
    return observing.seconds(left.silent_since) if left is not None and left.silent_since is not None else None


def conflict_message(conflict: Conflict) -> str:
    """Which address, whose it is, and what to do."""
    return f"{conflict.address} belongs to stack {conflict.owner}; use another address"


def _down_since(found: Facts, plan: Plan, entry: TableEngine) -> float | None:
    """Since when an engine with buckets does not serve; None while it does, or its agent has not said of late."""
    what = f"engine {entry.id} does not serve"
    if entry.state not in ("Active", "Draining") or found.ready(entry):
        return None
    if not found.current and not plan.waits.known(what):
        return None
    since = plan.waits.since(what)
    # An agent that is away is no fault of its engines: the clock goes on, nothing is done.
    return since if found.current or entry.id in plan.memory.given_up.slots else None


def _message_of(found: Facts, entry: TableEngine) -> str:
    report = found.reported.get(entry.id)
    return report.message if report is not None and not report.ready else ""


def _obstacle(found: Facts, plan: Plan) -> Problem | None:
    """Why another engine could not be made."""
    for _, pod in sorted(plan.pods(found).items()):
        obstacle = obstacles.of_pod(pod, found.world.troubles)
        if obstacle is not None:
            return obstacle
    return plan.memory.problem


def _nothing_goes_on(found: Facts, plan: Plan) -> Problem | None:
    if plan.memory.refused is not None:
        return plan.memory.refused.reason, plan.memory.refused.message
    if found.report is not None and found.report.message:
        return split(found.report.message, ConditionReason.AGENT_PROBLEM)
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


def _engines_are_wrong(found: Facts, replicas: Sequence[EngineStanding]) -> Problem | None:
    if found.doubles:
        return ConditionReason.DUPLICATE_MAC, found.double(min(found.doubles))
    # One of another shard layout gets a second set.
    served = {i for i, report in found.reported.items() if report.shard is not None}
    if foreign := [e for e in replicas if e.why_not_ready.startswith(LAYOUT) and e.slot not in served]:
        names = ", ".join(e.name for e in foreign[:5])
        said = foreign[0].why_not_ready.removeprefix(LAYOUT)
        return ConditionReason.LAYOUT_MISMATCH, (
            f"{names}: {said}; the pod's image is of another build than the node's agent: let spec.engine.image be "
            "the agent's, or upgrade the agents"
        )
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


def _lost(found: Facts) -> Problem | None:
    """What the stack's node lacks, by what its agent says."""
    said = found.report.lost if found.report is not None else ""
    return split(said, ConditionReason.PATH_BROKEN) if said else None


def _firewall(said: str) -> Problem:
    """What is in the node's packet filter, by what its agent says."""
    return split(said, ConditionReason.PACKETS_DROPPED) if said else (ConditionReason.NOTHING_IN_THE_WAY, "")
