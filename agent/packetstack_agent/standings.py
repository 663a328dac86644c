"""How a stack of this node stands: fills what the core decides and shows from, by shared memory and engines. Changes nothing."""

import time

from packetstack_agent import loading
from packetstack_agent.engine_life import is_lost
from packetstack_agent.engines import Engine
from packetstack_agent.firewall import Firewall
from packetstack_agent.managed import Managed
from packetstack_agent.natives import constant
from packetstack_agent.node import RunDirectory
from packetstack_core import preconditions
from packetstack_core.assignment import State
from packetstack_core.reasons import ConditionReason, Problem, split
from packetstack_core.standing import EngineStanding, Pool, Standing

LOAD_SECONDS = 5.0
"""Over which load is taken when an engine has to go."""


def pool(managed: Managed, run: RunDirectory) -> Pool:
    """What the planner decides from. Engines that are being removed count no more."""
    stack, now = managed.stack, time.monotonic()
    flows, held, loads = stack.flows_by_slot(), stack.held(), _loads(managed)
    return Pool(
        spec=stack.resource.spec,
        template=stack.resource.spec.engine.template_hash(),
        engines=[
            EngineStanding(
                slot=e.slot,
                name=loading.name(e),
                state=e.state,
                ready=e.ready,
                why_not_ready=trouble(e),
                template=e.blueprint.template,
                queues=e.blueprint.queues,
                flows=flows.get(e.slot, 0),
                holds=0 if is_lost(e, now) else held[e.slot],
                load=loads.get(e.slot, 0.0),
                down_since=None if e.ready else e.unserved_since or None,
                leaving=False,
                evicted=False,
                set=e.blueprint.set,
                configured=stack.is_configured(e),
            )
            for _, e in sorted(managed.engines.items())
            if not e.removing
        ],
        owners=stack.owners(),
        moving=stack.open_fences(),
        pinned=frozenset(managed.pinned),
        create_after=managed.create_after,
        rebalanced=run.record.rebalanced.get(stack.name, False),
        given_up=managed.given_up,
        sets=managed.sets,
        shard=managed.shard or stack.shard,
        present_shard=stack.shard,
        keepers=stack.keepers(),
    )


def standing(managed: Managed, run: RunDirectory, firewall: Firewall) -> Standing:
    """What the conditions of the stack follow from."""
    there = pool(managed, run)
    left = managed.stack.mirror.left() if managed.stack.mirror is not None else None
    return Standing(
        pool=there,
        planned=managed.converged,
        followed=not there.moving and all(o is not None and o.slot for o in there.owners),
        remaining=sum(e.state in (State.DRAINING, State.FAILED) for e in there.engines),
        obstacle=split(managed.problem, ConditionReason.ENGINE_FAILED) if managed.problem else None,
        lost=preconditions.problem(managed.lacks, lost=True),
        graver=None,
        lesser=preconditions.problem(managed.lacks, lost=False),
        firewall=firewall_problem(firewall),
        kept=left.buckets if left is not None else 0,
        connections=left.connections if left is not None else None,
        oldest=left.oldest_ticks / constant("PS_TICKS_PER_SECOND") if left is not None and left.connections else None,
    )


def firewall_problem(firewall: Firewall) -> Problem:
    """What was found in the node's packet filter, as for the condition FirewallOpen."""
    said = "; ".join(o.message for o in firewall.obstacles)
    if not said:
        return ConditionReason.NOTHING_IN_THE_WAY, ""
    sure = any(o.sure for o in firewall.obstacles)
    return ConditionReason.PACKETS_DROPPED if sure else ConditionReason.MAY_DROP_PACKETS, said


def trouble(engine: Engine) -> str:
    """Why the engine is not ready for packets; empty when it is."""
    if engine.ready:
        return "" if engine.probed or not engine.blueprint.pod else "no probe packet has come by yet"
    refused = engine.attachments.refused if engine.attachments is not None else ""
    return refused or "no datapath serves its queues"


def _loads(managed: Managed) -> dict[int, float]:
    """Cores' worth of load by slot, when one of the engines may have to go."""
    there = sum(e.state is not State.DRAINING for e in managed.engines.values())
    load = managed.history.load(LOAD_SECONDS) if there > managed.stack.resource.spec.replicas else None
    return {e.id: sum(e.cores) for e in load.engines} if load is not None else {}
