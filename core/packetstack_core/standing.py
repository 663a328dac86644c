"""How a stack stands: what the planner sees of it, its conditions, its capacity, and what it cannot have.

Operator and local agent observe by other means, a watch of the API server or shared memory. Each fills a `Pool` and a
`Standing` with what it found; all that follows from these is computed here, once. No fact has a default, so that one
that is forgotten does not type-check.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from packetstack_core import hashing, planning, shards, transitions
from packetstack_core.assignment import Owner, State
from packetstack_core.planning import GivenUp
from packetstack_core.reasons import ConditionReason, Problem, Value
from packetstack_core.resources import Spec
from packetstack_core.transitions import EngineSet, Sets, SetState
from packetstack_core.values import Address
from packetstack_core.wording import at_least, counted

NAMED = 5
"""Engines that a message names at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStanding:
    """An engine, as its executor sees it."""

    slot: int
    """Its number in `Pool.owners`: the node's slot, or in a cluster the id of the flow table."""
    name: str
    """What a person knows it by."""
    state: State
    ready: bool
    """Its datapath serves packets now."""
    why_not_ready: str
    """What the executor knows about that; empty if nothing, or if it is ready."""
    template: str
    """Hash of the shape that it was made from."""
    queues: int
    flows: int
    """Live flows in the buckets that it owns; 0 if it is not known."""
    holds: int
    """Buckets whose packets may still be in its rings though `Pool.owners` says another: it must not be removed yet."""
    load: float
    """Load of its cores, in cores; 0 if it is not known."""
    down_since: float | None
    """Since when its datapath does not serve, on the clock of the planner's `now`; None while it does, or nobody knows."""
    leaving: bool
    """It will be gone soon whatever is wanted, and never stays."""
    evicted: bool
    """It leaves since somebody deletes its pod."""
    set: int | None
    """Set that it belongs to; None: the oldest, or the stack has none."""
    configured: bool
    """It has the present configuration of its set. Of a new set each has to, before buckets are switched to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The engines of a stack and who owns its buckets: all that the planner decides from."""

    spec: Spec
    template: str
    """Hash of the shape that engines are made from now."""
    engines: Sequence[EngineStanding]
    owners: Sequence[Owner | None]
    """Owner by bucket; None or `NOBODY` if it has none."""
    moving: frozenset[int]
    """Buckets with an open fence."""
    pinned: frozenset[int]
    """Buckets that a person gave to the engine that owns them. They stay there unless an engine has to go."""
    create_after: float
    """No engine is created before this time, on the clock of the planner's `now`: back-off after failures."""
    rebalanced: bool
    """Buckets were moved by load, so that their numbers are not even."""
    given_up: GivenUp
    """Engines that did not serve for too long, as `Plan.given_up` said last."""
    sets: Sets
    """What was written down of the stack's sets, as `Sets.after` said last."""
    shard: str
    """Shard layout of the build that engines shall have."""
    present_shard: str
    """That of the memory that there is, while `sets` are not known."""
    keepers: Sequence[Owner | None]
    """By bucket, who keeps connections that are older than its owner; None or `NOBODY`: nobody. Empty: none is kept."""

    def of_set(self, one: EngineSet) -> "list[EngineStanding]":
        """Engines of the set."""
        return [e for e in self.engines if (e.set or self.sets.known[0].id) == one.id]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A pool and its circumstances: all that its conditions follow from."""

    pool: Pool
    planned: bool
    """The planner wants nothing more, and what it wanted is written down."""
    followed: bool
    """Packets go to the owners in the pool, every bucket has one, and no handover is under way."""
    remaining: int
    """Engines that do not stay and are not gone yet."""
    obstacle: Problem | None
    """Why another engine could not be made."""
    lost: Problem | None
    """What the node lacks, so that packets are lost whatever engines do."""
    graver: Problem | None
    """What is wrong and worse than an engine that does not serve: packets may not go where the resource says."""
    lesser: Problem | None
    """What is wrong, but only worth a word when nothing else is."""
    firewall: Problem | None
    """What was found in the node's packet filter; None if nobody has looked."""
    kept: int
    """Buckets of which keepers have connections; perhaps fewer than `Pool.keepers` names."""
    connections: int | None
    """Connections that keepers have; None if it is not known."""
    oldest: float | None
    """When the one of them was seen last that is silent for the longest time, on the clock of the planner's `now`; None if
    it is not known."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition, without the time of its last change."""

    type: str
    value: bool | None
    """None: it is not known."""
    reason: ConditionReason
    message: str = ""

    @property
    def status(self) -> Value:
        """As Kubernetes writes it."""
        return "Unknown" if self.value is None else "True" if self.value else "False"


# ---- what the planner sees -------------------------------------------------------------------------------------


def desired(pool: Pool) -> planning.Desired:
    """What the resource asks of the planner."""
    return planning.Desired.of(pool.spec, pool.template, pool.shard)


def observed(pool: Pool) -> transitions.Observed:
    """What the planner sees. Loads count to a tenth of a core: less is chance."""
    engines = [
        planning.Engine(
            slot=e.slot,
            state=e.state,
            ready=e.ready,
            template=e.template,
            queues=e.queues,
            flows=e.flows,
            leaving=e.leaving,
            holds=e.holds,
            load=round(e.load, 1),
            down_since=e.down_since,
        )
        for e in pool.engines
    ]
    there = planning.Observed(
        engines=engines,
        owners=pool.owners,
        moving=pool.moving,
        create_after=pool.create_after,
        rebalanced=pool.rebalanced and pool.spec.rebalance.mode != "Off",
        given_up=pool.given_up,
    )
    return transitions.Observed(
        pool=there,
        pinned=pool.pinned,
        sets=pool.sets,
        members={e.slot: e.set for e in pool.engines},
        configured=frozenset(e.slot for e in pool.engines if e.configured),
        keepers=pool.keepers,
        shard=pool.present_shard,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do next, and what to remember of it."""

    actions: tuple[transitions.Action, ...]
    """To be carried out in this order; empty at the goal."""
    given_up: GivenUp
    """Engines that did not serve for too long: for the next `Pool`."""
    patience: float
    """For so many seconds those that are new among them did not serve."""
    wake_at: float | None
    """When the next engine would be given up, or a set that drains be ended; None if nothing waits for a time."""


def plan(pool: Pool, now: float) -> Plan:
    """What to do next. `now`: seconds on the clock of `Pool.create_after`."""
    wanted, seen = desired(pool), observed(pool)
    times = [planning.give_up_at(wanted, seen.pool, e) for e in seen.pool.engines]
    times.append(transitions.deadline(pool.spec.handover, pool.sets))
    return Plan(
        actions=tuple(transitions.plan(wanted, pool.spec.handover, seen, now)),
        given_up=pool.given_up.after(wanted, seen.pool, now),
        patience=pool.given_up.patience(wanted),
        wake_at=min((at for at in times if at is not None and at > now), default=None),
    )


# ---- what is shown ---------------------------------------------------------------------------------------------


def staying(pool: Pool) -> list[EngineStanding]:
    """The engines that count as replicas: those that take new connections and are not on their way out."""
    current = pool.sets.one(SetState.CURRENT)
    engines = pool.engines if current is None else pool.of_set(current)
    return [e for e in engines if e.state not in (State.DRAINING, State.FAILED) and not e.leaving]


def serving(pool: Pool) -> list[EngineStanding]:
    """The replicas that packets are given to and that serve them."""
    return [e for e in staying(pool) if e.state is State.ACTIVE and e.ready]


def updated(pool: Pool) -> list[EngineStanding]:
    """The replicas of the present template."""
    return [e for e in staying(pool) if e.template == pool.template]


def settled(standing: Standing) -> bool:
    """Whether the pool is what the resource says, and packets see it."""
    return _as_wanted(standing) and not standing.remaining and len(standing.pool.sets.known) < 2


def _as_wanted(standing: Standing) -> bool:
    """Whether what takes new connections is what the resource says, and packets see it."""
    return standing.planned and has_its_size(standing.pool) and (standing.followed or not standing.pool.spec.replicas)


def has_its_size(pool: Pool) -> bool:
    """Whether as many engines serve as are wanted, all of the present template, and there are no others."""
    return len(serving(pool)) == len(staying(pool)) == len(updated(pool)) == pool.spec.replicas


def ready(standing: Standing) -> bool:
    """Whether there is nothing to wait for: all replicas serve and packets see it. A paused stack may differ otherwise,
    and a set that has nothing but old connections is not waited for."""
    pool, wanted = standing.pool, standing.pool.spec.replicas
    drains = any(s.set.state is SetState.DRAINING and not s.buckets for s in sets(standing))
    done = settled(standing) or (drains and _as_wanted(standing)) or (pool.spec.paused and standing.planned)
    return done and len(serving(pool)) == wanted and (standing.followed or not wanted)


@dataclass(frozen=True, slots=True)
class SetStanding:
    """A set of engines and what it has."""

    set: EngineSet
    engines: int
    """Engines that are there."""
    ready: int
    """Those that serve; of one that is Activating, those that may get buckets."""
    buckets: int
    """Buckets that it owns."""
    kept: int
    """Buckets of which it keeps older connections."""
    connections: int | None
    """Connections that it keeps; None if it is not known."""
    oldest: float | None
    """When the one of them was seen last that is silent for the longest time, on the clock of the planner's `now`; None if
    it is not known."""


def sets(standing: Standing) -> list[SetStanding]:
    """The sets of the stack, oldest first; none if it never had `Mirror`."""
    pool = standing.pool
    owned = Counter(o.slot for o in pool.owners if o is not None)
    found = []
    for one in pool.sets.known:
        engines, drains = pool.of_set(one), one.state is SetState.DRAINING
        able = [e for e in engines if e.ready and (e.configured or one.state is not SetState.ACTIVATING)]
        found.append(
            SetStanding(
                set=one,
                engines=len(engines),
                ready=len(able),
                buckets=sum(owned[e.slot] for e in engines),
                kept=standing.kept if drains else 0,
                connections=standing.connections if drains else 0,
                oldest=standing.oldest if drains else None,
            )
        )
    return found


def conditions(standing: Standing) -> tuple[Finding, ...]:
    """The conditions of the stack, but those of its autoscaler."""
    found = [
        _available(standing),
        _progressing(standing),
        _capacity_available(standing),
        _degraded(standing),
    ]
    if standing.firewall is not None:
        found.append(_firewall_open(standing.firewall))
    if standing.pool.sets.known or standing.pool.spec.handover.strategy == "Mirror":
        found.append(_scaling_held(standing))
    return tuple(found)


def _available(standing: Standing) -> Finding:
    pool = standing.pool
    if serving(pool):
        if standing.lost is not None:
            return Finding("Available", False, *standing.lost)
        return Finding("Available", True, ConditionReason.MINIMUM_ENGINES_AVAILABLE)
    reason = ConditionReason.ENGINES_STARTING if pool.spec.replicas else ConditionReason.NO_REPLICAS
    return Finding("Available", False, reason)


def _progressing(standing: Standing) -> Finding:
    pool, wanted = standing.pool, standing.pool.spec.replicas
    if settled(standing):
        return Finding("Progressing", False, ConditionReason.SETTLED)
    if pool.spec.paused:
        return Finding("Progressing", False, ConditionReason.PAUSED)
    if (found := _transition(standing)) is not None:
        return found
    fresh = len(updated(pool))
    if fresh < len(staying(pool)):
        text = f"{fresh} of {wanted} engines have the present template"
        return Finding("Progressing", True, ConditionReason.ROLLING_OUT, text)
    if len(serving(pool)) < wanted:
        text = f"{len(serving(pool))} of {wanted} engines serve"
        return Finding("Progressing", True, ConditionReason.ENGINES_STARTING, text)
    return Finding("Progressing", True, ConditionReason.HANDOVER_IN_PROGRESS)


def _transition(standing: Standing) -> Finding | None:
    """How far a second set is; None if there is none."""
    pool, there = standing.pool, {s.set.state: s for s in sets(standing)}
    if (second := there.get(SetState.ACTIVATING)) is not None:
        first = there[SetState.CURRENT].set.id
        text = (
            f"set {second.set.id}: {second.ready} of {counted(second.set.replicas, 'engine')} ready; set {first} serves"
        )
        return Finding("Progressing", True, ConditionReason.SET_ACTIVATING, text)
    if (old := there.get(SetState.DRAINING)) is None:
        return None
    if old.buckets:
        left = f"{at_least(old.buckets, 'bucket')} of {len(pool.owners)}"
        text = f"set {there[SetState.CURRENT].set.id} takes over: {left} are still those of set {old.set.id}"
        return Finding("Progressing", True, ConditionReason.SET_SWITCHING, text)
    return Finding("Progressing", True, ConditionReason.SET_DRAINING, _drains(pool, old))


def _drains(pool: Pool, old: SetStanding) -> str:
    """What a set that drains still has."""
    connections = f"{at_least(old.connections, 'connection')} in " if old.connections is not None else ""
    return f"set {old.set.id} keeps {connections}{at_least(old.kept, 'bucket')} of {len(pool.owners)}"


def _scaling_held(standing: Standing) -> Finding:
    pool = standing.pool
    if not transitions.held(desired(pool), pool.sets):
        return Finding("ScalingHeld", False, ConditionReason.NOTHING_HELD)
    (old,) = (s for s in sets(standing) if s.set.state is SetState.DRAINING)
    current, handover = pool.sets.one(SetState.CURRENT), pool.spec.handover
    other = ""
    if current is not None and current.shard != pool.shard:
        other = f" of a build with shard layout {shards.number(pool.shard)}"
    elif current is not None and current.template != pool.template:
        other = " of another template"
    if handover.on_deadline == "Keep":
        advice = "to end them: spec.handover.onDeadline Reset or Transfer, with policy Hurry"
    elif handover.policy == "Hurry":
        advice = f"they are being ended, by onDeadline {handover.on_deadline}"
    else:
        advice = (
            f"{handover.deadline_seconds} s after the switch they are ended, by onDeadline {handover.on_deadline}; "
            "at once with policy Hurry"
        )
    wait = "waits" if pool.spec.replicas == 1 else "wait"
    wanted = f"{counted(pool.spec.replicas, 'engine')}{other} {wait} until older connections have ended"
    text = f"{wanted}: {_drains(pool, old)}; {advice}"
    return Finding("ScalingHeld", True, ConditionReason.SET_DRAINING, text)


def _capacity_available(standing: Standing) -> Finding:
    if standing.obstacle is not None:
        return Finding("CapacityAvailable", False, *standing.obstacle)
    return Finding("CapacityAvailable", True, ConditionReason.ENOUGH_CAPACITY)


def _degraded(standing: Standing) -> Finding:
    pool = standing.pool
    for grave in (standing.graver, standing.lost):
        if grave is not None:
            return Finding("Degraded", True, *grave)
    draining = pool.sets.one(SetState.DRAINING)
    needed = staying(pool) + (pool.of_set(draining) if draining is not None else [])
    if silent := [e for e in needed if e.state is State.ACTIVE and not e.ready and not e.leaving]:
        return Finding("Degraded", True, ConditionReason.ENGINE_NOT_READY, _without_service(pool, silent))
    if evicted := [e for e in pool.engines if e.evicted]:
        text = f"{_names(evicted)}: being deleted; its buckets go to another engine"
        return Finding("Degraded", True, ConditionReason.ENGINE_EVICTED, text)
    if standing.lesser is not None:
        return Finding("Degraded", True, *standing.lesser)
    return Finding("Degraded", False, ConditionReason.AS_EXPECTED)


def _without_service(pool: Pool, silent: Sequence[EngineStanding]) -> str:
    """Which active engines do not serve, why, and how many buckets wait for them."""
    why = next((e.why_not_ready for e in silent if e.why_not_ready), "no datapath is attached")
    slots = {e.slot for e in silent}
    waiting = sum(o is not None and o.slot in slots for o in pool.owners)
    kept = sum(k is not None and k.slot in slots for k in pool.keepers)
    older = f", nor do the older connections of {kept}" if kept else ""
    return f"{_names(silent)}: {why}; {waiting} of {len(pool.owners)} buckets get no service until one is{older}"


def _names(engines: Sequence[EngineStanding]) -> str:
    return ", ".join(e.name for e in engines[:NAMED]) + (", ..." if len(engines) > NAMED else "")


def _firewall_open(found: Problem) -> Finding:
    reason, message = found
    if reason is ConditionReason.NOTHING_IN_THE_WAY:
        return Finding("FirewallOpen", True, reason)
    return Finding("FirewallOpen", None if reason is ConditionReason.MAY_DROP_PACKETS else False, reason, message)


# ---- what the resource comes to --------------------------------------------------------------------------------


def capacity(spec: Spec, backends: Collection[tuple[Address, int]]) -> dict[str, int]:
    """How many flows the stack can have: `pairs` of SNAT address and backend, the `flows` that their ports allow (15 a
    bucket for each pair at 4,096 buckets), and `maxFlows`, what memory was set aside for.

    `backends`: addresses and ports that may get new flows, as far as the executor knows.
    """
    buckets = spec.flow_table.buckets
    snat: Counter[int] = Counter()
    for network in spec.snat.addresses:
        snat[network.version] += network.num_addresses
    pairs = sum(snat[address.version] for address, _ in set(backends))
    return {
        "pairs": pairs,
        "flows": pairs * hashing.ports_per_bucket(buckets) * buckets,
        "maxFlows": spec.flow_table.max_flows,
    }


def unsupported(spec: Spec, *, kubernetes: bool) -> str:
    """What of the resource is not built, or needs Kubernetes: the field, its value, and what to use; empty if nothing."""
    if spec.engine.mode != "AFXDP":
        return f'spec.engine.mode: "{spec.engine.mode}" is not supported yet; use "AFXDP"'
    if spec.handover.strategy == "Mirror" and spec.handover.on_deadline == "Transfer":
        return 'spec.handover.onDeadline: "Transfer" is not supported yet; use "Keep" or "Reset"'
    if kubernetes:
        return ""
    if spec.engine.interface.veth is None:
        return "spec.engine.interface: only Kubernetes can give an engine such an interface; use {veth: {}}"
    for i, listener in enumerate(spec.listeners):
        if listener.backends.service is not None:
            path = f"spec.listeners[{i}].backends"
            return f'{path}: service "{listener.backends.service.name}" needs Kubernetes; use endpoints'
    return ""
