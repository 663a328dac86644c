"""What is there of one stack, read once from its `World`; and what a decision makes of it, as a `Plan`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from packetstack_core import kinds, shards, transitions
from packetstack_core.assignment import NOBODY, Owner
from packetstack_core.autoscaling import together
from packetstack_core.engines import Engine
from packetstack_core.kinds import (
    EngineReport,
    FlowTable,
    NodeReport,
    PacketEngine,
    PacketEngineStatus,
    SetReport,
    TableEngine,
)
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import Event, Reason
from packetstack_core.resources import Listener, PacketStack
from packetstack_core.statuses import PacketStackStatus, RebalanceStatus
from packetstack_core.transitions import EngineSet, Sets, SetState
from packetstack_operator import backends, observing, pods
from packetstack_operator.observing import Holder, Memory, Raw, World


@dataclass(frozen=True, slots=True)
class Pool:
    """Engines and the owners of buckets, as a flow table has them."""

    node: str | None
    last: int
    """Number of the engine that was made last."""
    owners: Sequence[Owner | None]
    """By bucket."""
    entries: Mapping[int, TableEngine]
    """By number."""
    sets: Sets = field(default_factory=Sets)
    shapes: Mapping[int, Engine] = field(default_factory=dict)
    """Set -> what its engines are made from, image included, where that is known."""
    ending: frozenset[int] = frozenset()
    """Sets whose connections end now."""
    keepers: Sequence[Owner | None] = ()
    """By bucket, who is to keep connections that are older than its owner. Empty: nobody is."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found of a stack, before anything is decided."""

    world: World
    stack: PacketStack
    now: float
    """Unix time."""
    template: str
    """Hash of the shape that engines are made from now."""
    pods: Mapping[str, Raw]
    """Pods of engines, by name."""
    table: FlowTable | None
    report: NodeReport | None
    """What the agent of the stack's node said last."""
    reported: Mapping[int, EngineReport]
    """Engines that are attached on the stack's node."""
    current: bool
    """The node's agent has seen the whole flow table as it is now."""
    pool: Pool
    doubles: Mapping[int, Holder]
    """Engine -> the older one that has the MAC of its interface."""
    listeners: tuple[Listener, ...]
    """With endpoints in the place of services."""
    backend_problems: Sequence[str]

    @property
    def settled(self) -> bool:
        """The node's agent has seen the flow table as it is now, and packets do."""
        return self.current and self.report is not None and self.report.settled

    def ready(self, entry: TableEngine) -> bool:
        """Whether the engine serves its queues."""
        report = self.reported.get(entry.id)
        if entry.state == "Starting" and entry.id in self.doubles:
            return False
        return entry.state != "Pending" and entry.name in self.pods and report is not None and report.ready

    def leaves(self, entry: TableEngine, node: str | None) -> bool:
        """Whether it goes whatever is wanted: its pod is being deleted, or is not on `node`, where the others are."""
        pod = self.pods.get(entry.name)
        if pod is None:
            return False
        there = observing.node_of(pod)
        return observing.terminating(pod) or (there is not None and there != node)

    def holds(self, entry: TableEngine) -> int:
        """Buckets that packets still reach it for, or may: 0 only if the agent says so."""
        if entry.state in ("Pending", "Starting"):
            return 0
        report = self.reported.get(entry.id)
        if not self.current or self.report is None:
            return 1
        if report is None:
            return 0
        return report.buckets if self.report.settled else max(1, report.buckets)

    def kept(self, number: int) -> SetReport | None:
        """What the set keeps, by the agent that has seen the flow table as it is now; None if none says so."""
        if not self.settled or self.report is None:
            return None
        return next((s for s in self.report.sets or () if s.id == number), SetReport(id=number))

    def why_not_ready(self, number: int) -> str:
        """What the agent, or a doubled MAC, says of an engine that is attached."""
        return self.double(number) if number in self.doubles else self.reported[number].message

    def double(self, number: int) -> str:
        """What is wrong with an engine that has the MAC of an older one."""
        other = self.doubles[number]
        pod = other.pod if other.namespace == self.stack.metadata.namespace else f"{other.namespace}/{other.pod}"
        report = self.reported[number]
        return f"pod {report.name}: its interface has MAC {report.mac}, which is that of pod {pod}; give each its own"


class Waits:
    """What lasts, and when to decide again.

    Clocks are set back, and those of others may be ahead: a wait that begins with `since` is never longer than it was
    meant to be, twice at most.
    """

    def __init__(self, former: Mapping[str, float], now: float) -> None:
        self._former, self._now = former, now
        self.begun: dict[str, float] = {}
        """What lasts, by a name -> Unix time of its beginning."""
        self.wake_at: float | None = None
        """Unix time at which to decide again."""

    def known(self, what: str) -> bool:
        """Whether it has lasted since an earlier decision."""
        return what in self._former

    def since(self, what: str, told: float | None = None) -> float:
        """Unix time since which this lasts, as `told` by others or first seen: never later than now.

        To be called in each decision in which it lasts.
        """
        self.begun[what] = min(self._former.get(what, self._now if told is None else told), self._now)
        return self.begun[what]

    def wake(self, at: float) -> None:
        """Decide again at this Unix time, or before."""
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)


@dataclass(slots=True)
class Plan:
    """What there shall be next, while it is being worked out by the steps of `deciding`; then only read."""

    node: str | None
    last: int
    owners: list[Owner | None]
    entries: dict[int, TableEngine]
    memory: Memory
    waits: Waits
    rebalanced: bool
    """Buckets were moved by load: their numbers need not be even."""
    sets: Sets
    shapes: dict[int, Engine]
    ending: frozenset[int]
    keepers: list[Owner | None]
    moved: RebalanceStatus | None = None
    """What was moved by load just now."""
    actions: Sequence[transitions.Action] = ()
    events: list[Event] = field(default_factory=list)

    def event(self, reason: Reason, message: str) -> None:
        """To be shown when the plan has been carried out."""
        self.events.append(Event(reason, message))

    def change(self, entry: TableEngine, **fields: object) -> None:
        """Give the engine's entry other values."""
        self.entries[entry.id] = entry.model_copy(update=fields)

    def pods(self, facts: Facts) -> dict[int, Raw]:
        """The pods of the engines in the table, by engine."""
        return {i: facts.pods[e.name] for i, e in self.entries.items() if e.name in facts.pods}

    def shape(self, stack: PacketStack, template: str) -> Engine:
        """What an engine of this template is made from: the resource's shape if no set has another."""
        known = (self.shapes[s.id] for s in self.sets.known if s.template == template and s.id in self.shapes)
        return next(known, stack.spec.engine)

    def forget_failures(self, template: str) -> None:
        """Engines of this template may be made at once."""
        self.memory = replace(self.memory, failures=0, create_after=0.0, problem=None, template=template)


# ---- reading -------------------------------------------------------------------------------------------------------


def read(world: World, stack: PacketStack, now: float) -> Facts:
    """From the objects of the API server. `stack`: the resource of the world, parsed."""
    template = pods.template(stack.spec.engine, world.image)
    engines = {str(p["metadata"]["name"]): p for p in world.pods if observing.is_engine(p, stack.name)}
    table = observing.read_table(world.table)
    report = table.report() if table is not None else None
    reported = {e.id: e for e in report.engines} if report is not None else {}
    current = report is not None and report.observed_generation >= observing.generation(world.table)
    pool = _pool(table) if table is not None else _lost_pool(world, stack, engines, now)
    listeners, problems = backends.resolve(stack, world)
    doubles = _doubles(world, stack, engines, reported, pool)
    return Facts(
        world, stack, now, template, engines, table, report, reported, current, pool, doubles, listeners, problems
    )


def _pool(table: FlowTable) -> Pool:
    spec = table.spec
    known = tuple(
        EngineSet(
            s.id,
            SetState(s.state),
            s.replicas,
            s.template,
            s.queues,
            observing.seconds(s.since),
            s.shard or shards.FIRST,
        )
        for s in spec.sets or ()
    )
    return Pool(
        spec.node,
        spec.last_engine,
        spec.owner_ids(),
        {e.id: e for e in spec.engines},
        Sets(known, spec.last_set or 0),
        {s.id: s.engine for s in spec.sets or () if s.engine is not None},
        frozenset(s.id for s in spec.sets or () if s.ending),
        spec.keeper_ids() if spec.previous_owners else (),
    )


def _lost_pool(world: World, stack: PacketStack, engines: Mapping[str, Raw], now: float) -> Pool:
    """For a table that is new or lost. Pods tell which engines there are; who owns which bucket, nobody does.

    Buckets are given afresh, and the handovers keep their flows.
    """
    entries: dict[int, TableEngine] = {}
    last = max([0, *(int(e["spec"]["id"]) for e in world.engines)])
    for _, pod in sorted(engines.items()):
        entry = observing.from_pod(pod)
        if entry is None or observing.dead(pod, now):
            continue
        last = max(last, entry.id)
        interface = observing.interface_of(pod)
        update: dict[str, object] = {"state": "Pending"}
        if observing.running(pod) and interface is not None:
            # A label may be older than the last table was: an engine that runs may have buckets.
            state = "Draining" if entry.state == "Draining" else "Active"
            update = {"state": state, "pod_uid": str(pod["metadata"]["uid"]), "interface": interface}
        entries[entry.id] = entry.model_copy(update=update)
    status = stack_status(world.stack)
    nobody: list[Owner | None] = [NOBODY] * stack.spec.flow_table.buckets
    return Pool(status.node or None, last, nobody, entries, _lost_sets(status, entries), keepers=nobody)


def _lost_sets(status: PacketStackStatus, entries: Mapping[int, TableEngine]) -> Sets:
    """The sets of a table that is lost: the status says which there were, and engines what they are made of."""
    known = []
    for one in status.sets or ():
        own = [e for e in entries.values() if (e.set or status.sets[0].id) == one.id] if status.sets else []
        if own or one.state == "Current":
            staying = [e for e in own if e.state != "Draining"] or own
            template, queues = (staying[0].template, staying[0].queues) if own else ("0", 1)
            since = observing.seconds(one.since)
            known.append(EngineSet(one.id, SetState(one.state), len(staying), template, queues, since))
    return Sets(tuple(known), max((s.id for s in known), default=0))


def _doubles(
    world: World,
    stack: PacketStack,
    engines: Mapping[str, Raw],
    reported: Mapping[int, EngineReport],
    pool: Pool,
) -> dict[int, Holder]:
    found = {}
    by_mac: dict[str, list[Holder]] = {}
    own: dict[int, Holder] = {}
    for i, report in reported.items():
        if not report.mac:
            continue
        starting = i in pool.entries and pool.entries[i].state in ("Pending", "Starting")
        meta = engines[report.name]["metadata"] if report.name in engines else {}
        since = str(meta.get("creationTimestamp") or "")
        own[i] = Holder(starting, since, stack.metadata.namespace, stack.name, i, report.name)
        by_mac.setdefault(report.mac, [*world.neighbours.get(report.mac, ())]).append(own[i])
    for i, holder in own.items():
        first = min(by_mac[reported[i].mac])
        if first != holder:
            found[i] = first
    return found


def stack_status(stack: Raw) -> PacketStackStatus:
    """What was written last; an empty one if it cannot be read, so that it is written again.

    Without the autoscaler's part, which it writes itself: whoever names a field in an apply owns it.
    """
    try:
        status = PacketStackStatus.model_validate({**(stack.get("status") or {}), "autoscaling": None})
    except ValueError:
        return PacketStackStatus()
    # A server keeps the order in which conditions came; it says nothing.
    own = sorted((c for c in status.conditions if c.type not in together.CONDITIONS), key=lambda c: c.type)
    return status.model_copy(update={"conditions": tuple(own)})


def engine_status(raw: Raw | None) -> PacketEngineStatus:
    """What was written last; an empty one if it cannot be read, so that it is written again."""
    try:
        return kinds.read(PacketEngine, raw).status if raw is not None else PacketEngineStatus()
    except ResourceError:
        return PacketEngineStatus()
