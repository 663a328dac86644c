"""What to write next for one stack. Pure: a `World` and the time in, a `Decision` out.

Engines and buckets are planned by `packetstack_core.reconciling.plan`, as they are without Kubernetes; here its
actions become one flow table, pods and status. Whatever happens between two writes, or after any of them, the next
decision goes on from what is there. So their order counts:

- An engine is in the flow table before its pod exists, and its number is never given twice.
- A pod is deleted when the flow table no longer names its engine and the node's agent has let it go.
- What is not needed to serve comes after the status, so that its refusal is not all that is ever heard.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from packetstack_core import kinds, limits, reading, reconciling, resources
from packetstack_core.autoscaling import rounds
from packetstack_core.backing_off import ENGINE_SECONDS, back_off
from packetstack_core.kinds import (
    MAX_ENGINE_ID,
    Condition,
    FlowTable,
    FlowTableSpec,
    NodeReport,
    PacketEngine,
    PacketEngineStatus,
    PacketStackStatus,
    RebalanceStatus,
    TableEngine,
)
from packetstack_core.planning import NOBODY, Owner, State, moved
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import ConditionReason, Event, EventReason, Problem, Reason
from packetstack_core.reconciling import (
    ActivateEngine,
    AssignBuckets,
    CreateEngine,
    Desired,
    DrainEngine,
    Observed,
    RemoveEngine,
)
from packetstack_core.resources import API_VERSION, PacketStack
from packetstack_core.wording import counted
from packetstack_operator import observing, pods
from packetstack_operator.observing import Conflict, Holder, Raw, World
from packetstack_operator.outcome import Decision, Kind, Write

NODE_SECONDS = 30.0
"""So long a stack without engines waits for its node, where its flows are, to take one before it goes to another."""
AGENT_LABEL = "app.kubernetes.io/component=agent"
"""Label of the agents' pods, as the chart makes them."""
AGENT_SECONDS = 10.0
"""So long an agent may take to answer a flow table with engines of its node."""
REUSE_SECONDS = 2.0
"""After a pod with a device has gone, before one is made that may get it: a CNI plugin may still be resetting it."""

LAYOUT = f"{ConditionReason.LAYOUT_MISMATCH}: "
"""So begins what an agent says of memory that another build has made, or of an engine of another build."""


def decide(world: World, now: float) -> Decision:
    """`now`: Unix time in seconds."""
    refused = _refused(world)
    if refused is not None:
        return _only_status(world, *refused, now)
    return _Deciding(world, reading.parse(world.stack), now).decision()


def blocked(world: World, now: float) -> Decision:
    """The status alone, after a write of a decision was refused (`Memory.refused`): the rest was not carried out."""
    if _refused(world) is not None or world.memory.refused is None:
        return Decision(world.memory)
    deciding = _Deciding(world, reading.parse(world.stack), now)
    # Without its flow table nothing of a plan is true.
    whole = deciding.without_a_plan() if world.memory.refused.write[1] == "FlowTable" else deciding.decision()
    status = tuple(w for w in whole.writes if w.kind == resources.KIND)
    return Decision(world.memory, status, tuple(e for e in whole.events if e.reason == world.memory.refused.reason))


def _refused(world: World) -> Problem | None:
    """Reason and message for leaving everything as it is."""
    try:
        stack = reading.parse(world.stack)
    except ResourceError as e:
        return ConditionReason.INVALID_SPEC, e.problems[0]
    if stack.spec.engine.mode == "DPDK":
        return ConditionReason.NOT_SUPPORTED, 'spec.engine.mode: "DPDK" is not supported yet; use "AFXDP"'
    if stack.spec.handover.strategy == "Mirror":
        return ConditionReason.NOT_SUPPORTED, 'spec.handover.strategy: "Mirror" is not supported yet; use "Transfer"'
    if world.table is not None and not observing.owned_by(world.table, world.uid):
        return (
            ConditionReason.NAME_TAKEN,
            f"flow table {stack.name} belongs to another stack of this name; wait until it is deleted",
        )
    if world.conflict is not None and world.conflict.fresh:
        return ConditionReason.ADDRESS_CONFLICT, _conflict(world.conflict)
    table = observing.read_table(world.table)
    if table is not None and table.spec.flow_table.buckets != stack.spec.flow_table.buckets:
        return ConditionReason.INVALID_SPEC, "spec.flowTable.buckets: cannot be changed; create another stack"
    return None


def _only_status(world: World, reason: ConditionReason, message: str, now: float) -> Decision:
    former = _status(world.stack)
    conditions = {c.type: c for c in former.conditions}
    _set(conditions, world, "Degraded", True, reason, message, now)
    if former.ready_replicas == 0:
        _set(conditions, world, "Available", False, reason, message, now)
    status = former.model_copy(
        update={
            "observed_generation": observing.generation(world.stack),
            "selector": pods.selector(world.stack["metadata"]["name"]),
            "conditions": tuple(conditions[t] for t in sorted(conditions)),
        }
    )
    writes = (_status_write(world, status),) if status != former else ()
    events = (Event(reason, message),) if status != former else ()
    return Decision(world.memory, writes, events)


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
            empty = table.spec.model_copy(update={"engines": (), "owners": ""})
            writes.append(_table_write(world, empty))
            confirmed = False
        else:
            report = table.report()
            current = report is not None and report.observed_generation >= observing.generation(world.table)
            confirmed = table.spec.node is None or (current and report is not None and not report.engines)
    if confirmed:
        writes += [_delete("Pod", p) for p in world.pods if not observing.terminating(p)]
    return Decision(world.memory, tuple(writes), released=confirmed and not writes)


class _Deciding:
    """The steps of `decide`; each reads what those before it found."""

    def __init__(self, world: World, stack: PacketStack, now: float) -> None:
        self.world, self.stack, self.now = world, stack, now
        self.events: list[Event] = []
        # A wall clock may be set back: no pause is longer than it was meant to be.
        self.memory = replace(
            world.memory,
            create_after=min(
                world.memory.create_after, now + back_off(max(0, world.memory.failures - 1), ENGINE_SECONDS)
            ),
            reuse_after=min(world.memory.reuse_after, now + REUSE_SECONDS),
            given_up=replace(world.memory.given_up, at=min(world.memory.given_up.at, now)),
        )
        self.since: dict[str, float] = {}
        """What lasts, by a name -> since when."""
        self.wake_at: float | None = None
        self.template = pods.template(stack.spec.engine, world.image)
        if self.memory.template != self.template:  # what failed before says nothing about another shape
            self._forget_failures()
        # The name of a pod is taken once: its engine gets another number. A budget has no other name.
        still = {(k, name) for k, name in self.memory.taken & world.strangers if k != "Pod"}
        self.memory = replace(self.memory, taken=frozenset(still))
        self.pods = {str(p["metadata"]["name"]): p for p in world.pods if observing.is_engine(p, stack.name)}
        self.table = observing.read_table(world.table)
        self.report: NodeReport | None = self.table.report() if self.table is not None else None
        self.reported = {e.id: e for e in self.report.engines} if self.report is not None else {}
        """Engines that are attached on the stack's node."""
        self.current = self.table is not None and (
            self.report is not None and self.report.observed_generation >= observing.generation(world.table)
        )
        """The node's agent has seen the whole flow table as it is now."""
        self.node: str | None = None
        self.last = 0
        self.owners: list[Owner | None]
        self.entries: dict[int, TableEngine] = {}
        self._load()
        self.doubles = self._find_doubles()
        """Engine -> the older one that has the MAC of its interface."""
        self.actions: list[reconciling.Action] = []
        self.mode = stack.spec.rebalance.mode
        self.rebalanced = self.mode != "Off" and self.table is not None and self.table.spec.rebalanced
        """Buckets were moved by load: their numbers need not be even."""
        self.moved: RebalanceStatus | None = None
        """What was moved by load just now."""
        self.listeners, self.backend_problems = observing.resolve(stack, world)

    def decision(self) -> Decision:
        self._note_released_devices()
        self._drop_what_is_gone()
        self._follow_the_node()
        self._start()
        self._plan()
        self._rebalance()
        table_writes = self._table_writes(self._new_spec())
        first = [
            *table_writes,
            *self._pods_to_create(),
            *self._marks(),
            *self._pods_to_delete(),
            *self._packet_engines(),
        ]
        last = self._budget()
        refused = self.memory.refused
        if refused is not None and all(w.identity != refused.write for w in (*first, *last)):
            self.memory = replace(self.memory, refused=None)  # nobody wants it any more
        return self._decided([*first, *self._stack_status(settled=not table_writes), *last])

    def without_a_plan(self) -> Decision:
        """The status as it is when nothing of a plan is carried out."""
        self._drop_what_is_gone()
        self._follow_the_node()
        self._start()
        return self._decided(self._stack_status(settled=False))

    def _decided(self, writes: Sequence[Write]) -> Decision:
        self.memory = replace(self.memory, since=self.since)
        return Decision(self.memory, tuple(writes), tuple(self.events), self.wake_at)

    def _since(self, what: str, told: float | None = None) -> float:
        """Unix time since which this lasts, as `told` by others or first seen: never later than now.

        To be called in each decision in which it lasts. Clocks are set back, and those of others may be ahead: a wait
        from here on is never longer than it was meant to be, twice at most.
        """
        self.since[what] = min(self.world.memory.since.get(what, self.now if told is None else told), self.now)
        return self.since[what]

    # ---- what is there ---------------------------------------------------------------------------------------

    def _load(self) -> None:
        if self.table is not None:
            spec = self.table.spec
            self.node, self.last, self.owners = spec.node, spec.last_engine, spec.owner_ids()
            self.entries = {e.id: e for e in spec.engines}
            return
        # The table is new or lost. Pods tell which engines there are; who owns which bucket, nobody does: buckets
        # are given afresh, and the handovers keep their flows.
        self.owners = [NOBODY] * self.stack.spec.flow_table.buckets
        self.node = _status(self.world.stack).node or None
        self.last = max([0, *(int(e["spec"]["id"]) for e in self.world.engines)])
        for name in sorted(self.pods):
            entry = observing.from_pod(self.pods[name])
            if entry is not None and not observing.dead(self.pods[name], self.now):
                self.entries[entry.id] = entry
                self.last = max(self.last, entry.id)
        for entry in list(self.entries.values()):
            pod = self.pods[entry.name]
            interface = observing.interface_of(pod)
            if observing.running(pod) and interface is not None:
                # A label may be older than the last table was: an engine that runs may have buckets.
                state = "Draining" if entry.state == "Draining" else "Active"
                self._change(entry, state=state, pod_uid=str(pod["metadata"]["uid"]), interface=interface)
            elif entry.state != "Pending":
                self._change(entry, state="Pending")

    def _change(self, entry: TableEngine, **fields: Any) -> TableEngine:
        self.entries[entry.id] = entry.model_copy(update=fields)
        return self.entries[entry.id]

    def _event(self, reason: Reason, message: str) -> None:
        self.events.append(Event(reason, message))

    def _find_doubles(self) -> dict[int, Holder]:
        found = {}
        by_mac: dict[str, list[Holder]] = {}
        own: dict[int, Holder] = {}
        for i, report in self.reported.items():
            if not report.mac:
                continue
            starting = i in self.entries and self.entries[i].state in ("Pending", "Starting")
            meta = self.pods[report.name]["metadata"] if report.name in self.pods else {}
            since = str(meta.get("creationTimestamp") or "")
            own[i] = Holder(starting, since, self.stack.metadata.namespace, self.stack.name, i, report.name)
            by_mac.setdefault(report.mac, [*self.world.neighbours.get(report.mac, ())]).append(own[i])
        for i, holder in own.items():
            first = min(by_mac[self.reported[i].mac])
            if first != holder:
                found[i] = first
        return found

    def _note_released_devices(self) -> None:
        """A device whose pod has gone is not given to the next one at once."""
        known = self.memory.devices
        devices = frozenset(
            str(p["metadata"]["uid"]) for p in self.pods.values() if observing.was_given(p) and observing.node_of(p)
        )
        self.memory = replace(self.memory, devices=devices)
        if known - devices:
            self.memory = replace(self.memory, reuse_after=self.now + REUSE_SECONDS)

    def _forget_failures(self) -> None:
        self.memory = replace(self.memory, failures=0, create_after=0.0, problem=None, template=self.template)

    def _drop_what_is_gone(self) -> None:
        """Entries whose pods will not run again. Those that never ran count for the back-off."""
        for entry in list(self.entries.values()):
            pod = self.pods.get(entry.name)
            if pod is None:
                if entry.pod_uid:
                    del self.entries[entry.id]
                    message = f"engine {entry.id}: its pod {entry.name} is gone; its buckets go to other engines"
                    self._event(EventReason.ENGINE_LOST, message)
                elif ("Pod", entry.name) in self.world.strangers:
                    del self.entries[entry.id]
                    message = f"engine {entry.id}: pod {entry.name} exists and is not of this stack; it is made under another number"
                    self._event(EventReason.NAME_TAKEN, message)
                elif entry.template != self.template:  # and will never be: pods are made of the present template
                    del self.entries[entry.id]
                continue
            uid = str(pod["metadata"]["uid"])
            replaced = bool(entry.pod_uid) and entry.pod_uid != uid
            if not replaced and not observing.dead(pod, self.now):
                continue
            del self.entries[entry.id]
            status = pod.get("status", {})
            reason = "it was replaced" if replaced else str(status.get("reason") or observing.phase(pod))
            message = f"engine {entry.id}: pod {entry.name} ended: {reason} {status.get('message') or ''}".strip()
            if entry.pod_uid or observing.terminating(pod):
                self._event(EventReason.ENGINE_LOST, message)
            elif uid not in self.memory.counted:
                self._count_failure(uid, _admission(str(status.get("reason")), str(status.get("message"))), message)
        uids = {str(p["metadata"]["uid"]) for p in self.pods.values()}
        self.memory = replace(self.memory, counted=self.memory.counted & uids)

    def _count_failure(self, uid: str, reason: ConditionReason, message: str) -> None:
        pause = back_off(self.memory.failures, ENGINE_SECONDS)
        self.memory = replace(
            self.memory,
            failures=self.memory.failures + 1,
            create_after=self.now + pause,
            problem=(reason, message),
            counted=self.memory.counted | {uid},
        )
        self._event(EventReason.ENGINE_FAILED, f"{message}; next try in {pause:g} s")

    def _alive(self) -> dict[int, Raw]:
        """The pods of the engines in the table, by engine."""
        return {i: self.pods[e.name] for i, e in self.entries.items() if e.name in self.pods}

    def _follow_the_node(self) -> None:
        """The first engine that is placed says where all of them run."""
        placed = {i: node for i, pod in sorted(self._alive().items()) if (node := observing.node_of(pod)) is not None}
        if self.node is None:
            self.node = next(iter(placed.values()), None)
            return
        if self.node in placed.values():
            return
        refused = [(i, since) for i, pod in self._alive().items() if (since := _unschedulable_since(pod)) is not None]
        if not refused:
            return
        at = self._since("the node takes no engine", max(since for _, since in refused)) + NODE_SECONDS
        if self.now < at:
            self._wake(at)
            return
        message = (
            f"no pod of the stack could be scheduled on node {self.node} for {NODE_SECONDS:g} s, and none of its engines is left "
            "there: the stack goes to another node, and its live flows end"
        )
        self._event(EventReason.NODE_LOST, message)
        for i, _ in refused:  # their pods name that node
            del self.entries[i]
        self.node = None

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    def _start(self) -> None:
        for i, pod in self._alive().items():
            entry = self.entries[i]
            if entry.state != "Pending" or observing.terminating(pod) or observing.node_of(pod) != self.node:
                continue
            interface = observing.interface_of(pod)
            if observing.running(pod) and interface is not None:
                self._change(entry, state="Starting", pod_uid=str(pod["metadata"]["uid"]), interface=interface)

    # ---- the plan ----------------------------------------------------------------------------------------------

    def _leaves(self, entry: TableEngine) -> bool:
        """Whatever is wanted: its pod is being deleted, or is not where the others are."""
        pod = self.pods.get(entry.name)
        if pod is None:
            return False
        node = observing.node_of(pod)
        return observing.terminating(pod) or (node is not None and node != self.node)

    def _ready(self, entry: TableEngine) -> bool:
        report = self.reported.get(entry.id)
        if entry.state == "Starting" and entry.id in self.doubles:
            return False
        return entry.state != "Pending" and entry.name in self.pods and report is not None and report.ready

    def _double(self, number: int) -> str:
        """What is wrong with an engine that has the MAC of an older one."""
        other = self.doubles[number]
        pod = other.pod if other.namespace == self.stack.metadata.namespace else f"{other.namespace}/{other.pod}"
        report = self.reported[number]
        return f"pod {report.name}: its interface has MAC {report.mac}, which is that of pod {pod}; give each its own"

    def _why_not_ready(self, number: int) -> str:
        """Why an engine that is attached is not ready."""
        return self._double(number) if number in self.doubles else self.reported[number].message

    def _holds(self, entry: TableEngine) -> int:
        """Buckets that packets still reach it for, or may: 0 only if the agent says so."""
        if entry.state in ("Pending", "Starting"):
            return 0
        report = self.reported.get(entry.id)
        if not self.current or self.report is None:
            return 1
        if report is None:
            return 0
        return report.buckets if self.report.settled else max(1, report.buckets)

    def _plan(self) -> None:
        engines = [
            reconciling.Engine(
                slot=e.id,
                state=State(e.state),
                ready=self._ready(e),
                template=e.template,
                queues=e.queues,
                flows=self.reported[e.id].flows if e.id in self.reported else 0,
                leaving=self._leaves(e),
                holds=self._holds(e),
                load=round(self.world.loads.get(e.id, 0.0), 1),
                down_since=self._down_since(e),
            )
            for _, e in sorted(self.entries.items())
        ]
        desired = replace(Desired.of(self.stack), template=self.template)
        observed = Observed(
            engines,
            self.owners,
            create_after=self.memory.create_after,
            rebalanced=self.rebalanced,
            given_up=self.memory.given_up,
        )
        self.actions = reconciling.plan(desired, observed, self.now)
        self._give_up(desired, observed)
        if self.memory.create_after > self.now:
            self._wake(self.memory.create_after)
        missing = desired.replicas > sum(e.state not in ("Draining", "Failed") for e in self.entries.values())
        if not missing and all(e.state != "Pending" for e in self.entries.values()):
            self._forget_failures()
        for action in self.actions:
            self._act(action)

    def _down_since(self, entry: TableEngine) -> float | None:
        """Since when an engine with buckets does not serve; None while it does, or its agent has not said of late."""
        what = f"engine {entry.id} does not serve"
        if entry.state not in ("Active", "Draining") or self._ready(entry):
            return None
        if not self.current and what not in self.world.memory.since:
            return None
        since = self._since(what)
        # An agent that is away is no fault of its engines: the clock goes on, nothing is done.
        return since if self.current or entry.id in self.memory.given_up.slots else None

    def _give_up(self, desired: Desired, observed: Observed) -> None:
        """Remember which engines this plan gives up, and when the next one would be."""
        former = self.memory.given_up
        self.memory = replace(self.memory, given_up=former.after(desired, observed, self.now))
        patience = former.patience(desired)
        for i in sorted(self.memory.given_up.slots - former.slots):
            message = f"engine {i}: no datapath has served for {patience:g} s; others take its buckets, another is made"
            self._event(EventReason.ENGINE_LOST, message)
        for engine in observed.engines:
            at = reconciling.give_up_at(desired, observed, engine)
            if at is not None and at > self.now:
                self._wake(at)

    def _act(self, action: reconciling.Action) -> None:
        match action:
            case CreateEngine(template, queues):
                # Without a node one engine finds one; the others go where it is.
                if self.node is not None or all(e.template != template for e in self.entries.values()):
                    self._create(template, queues)
            case ActivateEngine(i):
                if self.entries[i].state == "Starting":
                    self._event(EventReason.ENGINE_ACTIVE, f"engine {i} serves and gets its share of the buckets")
                else:
                    self._event(
                        EventReason.ENGINE_ACTIVE,
                        f"engine {i} was draining, is wanted again and gets its share of the buckets",
                    )
                self._change(self.entries[i], state="Active")
            case DrainEngine(i):
                self._change(self.entries[i], state="Draining")
                self._event(
                    EventReason.ENGINE_DRAINING,
                    f"engine {i} hands its buckets over with their flows, and is removed then",
                )
            case AssignBuckets(moves):
                self.owners = moved(self.owners, moves)
            case RemoveEngine(i):
                del self.entries[i]
                self._event(EventReason.ENGINE_REMOVED, f"engine {i} owns no bucket any more and is removed")

    def _rebalance(self) -> None:
        """Buckets to other cores, when nothing else is to do and packets see the flow table that was looked at."""
        found, report = self.world.proposal, self.report
        if found is None or not found.moves or self.mode != "Auto" or self.actions or self.stack.spec.paused:
            return
        if not self.current or report is None or not report.settled:
            return
        if "FlowTable" in self.world.outdated:
            return  # a server that does not know the mark drops it: the next plan would move them back
        if found.generation != observing.generation(self.world.table):
            return
        able = {i: e.queues for i, e in self.entries.items() if e.state == "Active" and self._ready(e)}
        moves = [m for m in found.moves if m.to.queue < able.get(m.to.slot, 0)]
        if moves:
            self.owners = moved(self.owners, moves)
            self.rebalanced = True
            self.moved = RebalanceStatus.model_validate(
                {"lastTime": observing.timestamp(self.now), "buckets": len(moves), "message": found.message}
            )
            self._event(EventReason.REBALANCED, f"{counted(len(moves), 'bucket')}: {found.message}")

    def _create(self, template: str, queues: int) -> None:
        used = set(self.entries) | set(self.reported) | {observing.number_of(p) for p in self.pods.values()}
        used |= {o.slot for o in self.owners if o is not None}
        used |= {i for i in range(1, MAX_ENGINE_ID + 1) if ("Pod", f"{self.stack.name}-{i}") in self.world.strangers}
        after = [*range(self.last + 1, MAX_ENGINE_ID + 1), *range(1, self.last + 1)]
        number = next((i for i in after if i not in used), 0)
        if not number:
            return
        self.last = number
        shape = self.stack.spec.engine
        self.entries[number] = TableEngine.model_validate(
            {
                "id": number,
                "name": f"{self.stack.name}-{number}",
                "state": "Pending",
                "template": template,
                "queues": queues,
                "cores": shape.cores,
                "cpuPolicy": shape.cpu_policy,
            }
        )
        self._event(EventReason.ENGINE_CREATED, f"engine {number}: pod {self.stack.name}-{number}")

    # ---- writes ------------------------------------------------------------------------------------------------

    def _new_spec(self) -> FlowTableSpec:
        spec = self.stack.spec
        known = self.table.spec if self.table is not None else None
        if known is not None and [o or NOBODY for o in self.owners] == known.owner_ids():
            owners = known.owners  # the same may be packed in more than one way
        elif all(o is None or o == NOBODY for o in self.owners):
            owners = ""
        else:
            owners = kinds.encode_owners(self.owners)
        return FlowTableSpec.model_validate(
            {
                "node": self.node,
                "engines": tuple(e for _, e in sorted(self.entries.items())),
                "lastEngine": self.last,
                "owners": owners,
                "listeners": self.listeners,
                "snat": spec.snat,
                "unknownFlow": spec.unknown_flow,
                "flowTable": spec.flow_table,
                "handover": spec.handover,
                "rebalance": spec.rebalance,
                "rebalanced": self.rebalanced,
            }
        )

    def _table_writes(self, new: FlowTableSpec) -> list[Write]:
        raw = self.world.table
        if self.table is not None and raw is not None and self.table.spec == new and _has_marks(raw, self.world):
            return []
        return [_table_write(self.world, new)]

    def _pods_to_create(self) -> list[Write]:
        writes = []
        waiting = self.node is None and any(self.entries[i].template == self.template for i in self._alive())
        early = self.stack.spec.engine.interface.veth is None and self.now < self.memory.reuse_after
        for _, entry in sorted(self.entries.items()):
            if entry.name in self.pods or entry.pod_uid or waiting or self.now < self.memory.create_after:
                continue
            if early:
                self._wake(self.memory.reuse_after)
                break
            body = pods.pod(self.world.stack, self.stack, entry, self.world.image, self.node)
            writes.append(Write("create", "Pod", entry.name, body))
            waiting = self.node is None
        return writes

    def _marks(self) -> list[Write]:
        """Labels and the readiness of pods."""
        writes = []
        for name, pod in sorted(self.pods.items()):
            entry = self.entries.get(observing.number_of(pod))
            ours = entry is not None and entry.name == name
            meta = {"name": name, "namespace": self.stack.metadata.namespace}
            known = entry if ours else observing.from_pod(pod)
            if known is not None:
                labels = pods.pod_labels(self.stack.name, known, known.state if ours else "Draining")
                owners = pods.owner(self.world.stack)
                if not _within(labels, pod["metadata"].get("labels", {})) or not _within(
                    owners, pod["metadata"].get("ownerReferences")
                ):
                    body = {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {**meta, "labels": labels, "ownerReferences": owners},
                    }
                    writes.append(Write("apply", "Pod", name, body))
            if entry is None or not ours:
                continue
            report = self.reported.get(entry.id)
            ready = self._ready(entry)
            message = "" if ready or report is None else self._why_not_ready(entry.id)
            reason = ConditionReason.SERVING if ready else ConditionReason.NOT_SERVING
            condition = {"type": pods.DATA_PATH, "status": str(ready), "reason": str(reason)}
            if message:
                condition["message"] = message
            was: Raw = next(
                (c for c in pod.get("status", {}).get("conditions") or () if c["type"] == pods.DATA_PATH), {}
            )
            if {k: was.get(k) or "" for k in ("status", "reason", "message")} != {
                k: condition.get(k, "") for k in ("status", "reason", "message")
            }:
                since = observing.timestamp(self.now)
                if was.get("status") == condition["status"] and was.get("lastTransitionTime"):
                    since = was["lastTransitionTime"]
                body = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": meta,
                    "status": {"conditions": [{**condition, "lastTransitionTime": since}]},
                }
                writes.append(Write("apply", "Pod", name, body, "status"))
        return writes

    def _pods_to_delete(self) -> list[Write]:
        named = {e.name for e in self.entries.values()}
        still = {e.name for e in self.table.spec.engines} if self.table is not None else set()
        writes = []
        for name, pod in sorted(self.pods.items()):
            if name in named or observing.terminating(pod):
                continue
            never = observing.phase(pod) == "Pending" and not observing.started(pod)
            let_go = self.current and name not in still and observing.number_of(pod) not in self.reported
            if never or observing.dead(pod, self.now) or let_go:
                writes.append(_delete("Pod", pod))
        return writes

    def _packet_engines(self) -> list[Write]:
        present = {str(e["metadata"]["name"]): e for e in self.world.engines}
        wanted: dict[str, int] = {name: observing.number_of(pod) for name, pod in self.pods.items()}
        wanted |= {e.name: e.id for e in self.entries.values()}
        # One look longer than its entry: by it a pod is looked for that a watch does not bring.
        still = {e.name for e in self.table.spec.engines} if self.table is not None else set()
        writes = []
        for name, number in sorted(wanted.items()):
            raw = present.get(name)
            body = pods.packet_engine(self.world.stack, name, number)
            if raw is None or not _within({k: body[k] for k in ("metadata", "spec")}, raw):
                writes.append(Write("apply", "PacketEngine", name, body))
            former = _engine_status(raw)
            status = self._engine_status(name, number, former)
            if status != former:
                shown = {
                    "apiVersion": API_VERSION,
                    "kind": "PacketEngine",
                    "metadata": {"name": name, "namespace": self.stack.metadata.namespace},
                    "status": status.document(),
                }
                writes.append(Write("apply", "PacketEngine", name, shown, "status"))
        writes += [
            _delete("PacketEngine", raw)
            for name, raw in sorted(present.items())
            if name not in wanted and name not in still and not observing.terminating(raw)
        ]
        return writes

    def _engine_status(self, name: str, number: int, former: PacketEngineStatus) -> PacketEngineStatus:
        pod = self.pods.get(name)
        entry = self.entries.get(number) or (observing.from_pod(pod) if pod is not None else None)
        report = self.reported.get(number)
        if entry is None:
            return former
        ours = number in self.entries
        ready = ours and self._ready(entry)
        state = entry.state if ours else "Failed" if pod and observing.dead(pod, self.now) else "Draining"
        message = "" if ready or report is None else self._why_not_ready(number)
        if not ready and not message and pod is not None:
            obstacle = _obstacle(pod) or self._trouble(pod)
            message = obstacle[1] if obstacle is not None else ""
        # While buckets are on their way the numbers change many times a second: they are metrics then.
        settled = self.report is None or self.report.settled
        conditions: dict[str, Condition] = {c.type: c for c in former.conditions}
        reason = ConditionReason.SERVING if ready else ConditionReason(state)
        _set(conditions, self.world, "Ready", ready, reason, message, self.now)
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

    def _budget(self) -> list[Write]:
        body = pods.disruption_budget(self.world.stack)
        name, present = pods.budget_name(self.stack.name), self.world.budget
        if present is None:
            taken = ("PodDisruptionBudget", name) in self.world.strangers
            return [] if taken else [Write("create", "PodDisruptionBudget", name, body)]
        if _within({k: body[k] for k in ("metadata", "spec")}, present):
            return []
        return [Write("apply", "PodDisruptionBudget", name, body)]

    # ---- status ------------------------------------------------------------------------------------------------

    def _stack_status(self, settled: bool) -> list[Write]:
        former = _status(self.world.stack)
        spec = self.stack.spec
        staying = [e for e in self.entries.values() if e.state not in ("Draining", "Failed") and not self._leaves(e)]
        serving = [e for e in staying if e.state == "Active" and self._ready(e)]
        extra = len({p["metadata"]["name"] for p in self.pods.values()} - {e.name for e in staying})
        fresh = [e for e in staying if e.template == self.template]
        goal = (
            settled
            and not self.actions
            and len(serving) == len(staying) == len(fresh) == spec.replicas
            and not extra
            and (not spec.replicas or (self.current and self.report is not None and self.report.settled))
        )
        conditions = {c.type: c for c in former.conditions}

        def set_(kind: str, value: bool | None, reason: ConditionReason, message: str = "") -> None:
            was = conditions.get(kind)
            _set(conditions, self.world, kind, value, reason, message, self.now)
            bad = value if kind == "Degraded" else not value
            if kind != "Progressing" and (was is None or (was.status, was.reason) != (conditions[kind].status, reason)):
                other = was is not None and was.status != conditions[kind].status
                if (was is not None or kind != "Available") if bad else other:
                    self._event(reason, message or f"{kind} is {value}")

        available = bool(serving)
        starting = ConditionReason.ENGINES_STARTING if spec.replicas else ConditionReason.NO_REPLICAS
        set_("Available", available, ConditionReason.MINIMUM_ENGINES_AVAILABLE if available else starting)
        set_("Progressing", not goal and not spec.paused, *self._progress(goal, staying, fresh, serving))
        set_("CapacityAvailable", *self._capacity())
        set_("Degraded", *self._degraded(staying))
        if self.report is not None:
            set_("FirewallOpen", *_firewall(self.report.firewall))
        status = PacketStackStatus.model_validate(
            {
                "observedGeneration": observing.generation(self.world.stack),
                "replicas": min(len(staying), limits.MAX_REPLICAS),
                "readyReplicas": len(serving),
                "updatedReplicas": len(fresh),
                "drainingReplicas": extra,
                "selector": pods.selector(self.stack.name),
                "flowTableGeneration": observing.generation(self.world.table),
                "node": self.node or "",
                "capacity": self._flows(),
                "rebalance": self._rebalance_status(former.rebalance),
                "conditions": tuple(conditions[t] for t in sorted(conditions)),
            }
        )
        return [_status_write(self.world, status)] if status != former else []

    def _rebalance_status(self, former: RebalanceStatus | None) -> RebalanceStatus | None:
        elephants = self.world.proposal.elephants if self.world.proposal is not None else ()
        last = self.moved or former
        if last is None and not elephants:
            return None
        return (last or RebalanceStatus()).model_copy(update={"elephants": elephants})

    def _progress(
        self, goal: bool, staying: Sequence[TableEngine], fresh: Sequence[TableEngine], serving: Sequence[TableEngine]
    ) -> Problem:
        if goal:
            return ConditionReason.SETTLED, ""
        if self.stack.spec.paused:
            return ConditionReason.PAUSED, ""
        if len(fresh) < len(staying):
            return (
                ConditionReason.ROLLING_OUT,
                f"{len(fresh)} of {self.stack.spec.replicas} engines have the present template",
            )
        if len(serving) < self.stack.spec.replicas:
            return ConditionReason.ENGINES_STARTING, f"{len(serving)} of {self.stack.spec.replicas} engines serve"
        return ConditionReason.HANDOVER_IN_PROGRESS, ""

    def _capacity(self) -> tuple[bool, ConditionReason, str]:
        for _, pod in sorted(self._alive().items()):
            obstacle = _obstacle(pod) or self._trouble(pod)
            if obstacle is not None:
                return False, *obstacle
        if self.memory.problem is not None:
            return False, *self.memory.problem
        return True, ConditionReason.ENOUGH_CAPACITY, ""

    def _trouble(self, pod: Raw) -> Problem | None:
        """What the kubelet says about a pod that it cannot start. That is in no status, only in events."""
        name = str(pod["metadata"]["name"])
        message = self.world.troubles.get(name)
        if message is None:
            return None
        if re.search(r"network-attachment-definition", message, re.IGNORECASE):
            return ConditionReason.ATTACHMENT_NOT_FOUND, f"pod {name}: {message}"
        return ConditionReason.POD_NOT_STARTED, f"pod {name}: {message}"

    def _message_of(self, entry: TableEngine) -> str:
        report = self.reported.get(entry.id)
        return report.message if report is not None and not report.ready else ""

    def _degraded(self, staying: Sequence[TableEngine]) -> tuple[bool, ConditionReason, str]:
        if self.memory.refused is not None:
            return True, self.memory.refused.reason, self.memory.refused.message
        if self.report is not None and self.report.message:
            return True, *_reported(self.report.message)
        if self.world.conflict is not None:
            return True, ConditionReason.ADDRESS_CONFLICT, _conflict(self.world.conflict)
        if self.backend_problems:
            return True, ConditionReason.BACKEND_NOT_FOUND, "; ".join(self.backend_problems)[:1000]
        attached = [self.pods[e.name] for e in self.entries.values() if e.pod_uid and e.name in self.pods]
        if attached and self.report is None:
            at = self._since("no agent answers", min(map(observing.started_at, attached))) + AGENT_SECONDS
            if self.now >= at:
                return (
                    True,
                    ConditionReason.NO_AGENT,
                    f"the agent on {self.node} has not reported on this flow table for {AGENT_SECONDS:g} s: nothing is resized, packets "
                    f"go on by the table that it had. See whether it runs: kubectl get pods -A -l {AGENT_LABEL} -o wide",
                )
            self._wake(at)
        if self.doubles:
            return True, ConditionReason.DUPLICATE_MAC, self._double(min(self.doubles))
        if foreign := [e for e in staying if self._message_of(e).startswith(LAYOUT)]:
            names = ", ".join(e.name for e in foreign[:5])
            said = self._message_of(foreign[0]).removeprefix(LAYOUT)
            return True, ConditionReason.LAYOUT_MISMATCH, (
                f"{names}: {said}; the pod's image is of another build than the node's agent: let spec.engine.image be the "
                "agent's, or upgrade the agents"
            )  # fmt: skip
        lame = [e for e in staying if e.state == "Active" and not self._ready(e)]
        if lame:
            return True, ConditionReason.ENGINE_NOT_READY, self._lame(lame)
        strays = [e for e in self.entries.values() if e.name in self.pods and self._leaves(e)]
        if strays and any(observing.terminating(self.pods[e.name]) for e in strays):
            names = ", ".join(e.name for e in strays[:5])
            return True, ConditionReason.ENGINE_EVICTED, f"{names}: being deleted; its buckets go to another engine"
        name = pods.budget_name(self.stack.name)
        if ("PodDisruptionBudget", name) in self.world.strangers:
            return (
                True,
                ConditionReason.NAME_TAKEN,
                f"PodDisruptionBudget {name} is not of this stack, so that nothing holds evictions of its engines back; rename it",
            )
        if self.world.outdated:
            return (
                True,
                ConditionReason.CRD_OUTDATED,
                f"{self.world.outdated}: the cluster's definition is not of this operator's version, so that new fields are lost; "
                "apply the CRDs of its version",
            )
        return False, ConditionReason.AS_EXPECTED, ""

    def _lame(self, engines: Sequence[TableEngine]) -> str:
        """Which active engines do not serve, why, and how many buckets wait for them."""
        said = next((r.message for e in engines if (r := self.reported.get(e.id)) and r.message), "")
        numbers = {e.id for e in engines}
        waiting = sum(o is not None and o.slot in numbers for o in self.owners)
        return (
            f"{', '.join(e.name for e in engines[:5])}: {said or 'no datapath is attached'}; {waiting} of "
            f"{len(self.owners)} buckets get no service until one is"
        )

    def _flows(self) -> dict[str, int]:
        """Flows that SNAT ports allow: about 15 a bucket for each pair of SNAT address and backend at 4,096 buckets."""
        buckets = self.stack.spec.flow_table.buckets
        per_bucket = 65536 // buckets - max(1, 1024 // buckets)
        snat = Counter(a.version for a in self.stack.snat_addresses())
        places = {(e.address, e.port) for li in self.listeners for e in li.backends.endpoints or () if e.weight}
        pairs = sum(snat[address.version] for address, _ in places)
        return {
            "pairs": pairs,
            "flows": pairs * per_bucket * buckets,
            "maxFlows": self.stack.spec.flow_table.max_flows,
        }


# ---- parts ---------------------------------------------------------------------------------------------------------


def _conflict(conflict: Conflict) -> str:
    return f"{conflict.address} belongs to stack {conflict.owner}; use another address"


def _status(stack: Raw) -> PacketStackStatus:
    """What was written last; an empty one if it cannot be read, so that it is written again.

    Without the autoscaler's part, which it writes itself: whoever names a field in an apply owns it.
    """
    try:
        status = PacketStackStatus.model_validate({**(stack.get("status") or {}), "autoscaling": None})
    except ValueError:
        return PacketStackStatus()
    # A server keeps the order in which conditions came; it says nothing.
    own = sorted((c for c in status.conditions if c.type not in rounds.CONDITIONS), key=lambda c: c.type)
    return status.model_copy(update={"conditions": tuple(own)})


def _engine_status(raw: Raw | None) -> PacketEngineStatus:
    try:
        return kinds.read(PacketEngine, raw).status if raw is not None else PacketEngineStatus()
    except ResourceError:
        return PacketEngineStatus()


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


def _status_write(world: World, status: PacketStackStatus) -> Write:
    meta = world.stack["metadata"]
    body = {
        "apiVersion": API_VERSION,
        "kind": resources.KIND,
        "metadata": {"name": meta["name"], "namespace": meta["namespace"]},
        "status": status.document(),
    }
    return Write("apply", "PacketStack", meta["name"], body, "status")


def _table_marks(world: World) -> dict[str, Any]:
    return {"labels": kinds.labels(world.stack["metadata"]["name"]), "ownerReferences": pods.owner(world.stack)}


def _has_marks(raw: Raw, world: World) -> bool:
    return _within(_table_marks(world), raw["metadata"])


def _table_write(world: World, spec: FlowTableSpec) -> Write:
    meta = world.stack["metadata"]
    known = {"name": meta["name"], "namespace": meta["namespace"], **_table_marks(world)}
    if world.table is not None:
        # Refused if the table is not the one that this was decided from.
        known["resourceVersion"] = world.table["metadata"]["resourceVersion"]
    verb: Literal["create", "replace"] = "create" if world.table is None else "replace"
    made = spec.document() if verb == "create" else {"node": None, **spec.document()}
    body = {"apiVersion": API_VERSION, "kind": FlowTable.__name__, "metadata": known, "spec": made}
    return Write(verb, "FlowTable", meta["name"], body)


def _delete(kind: Kind, raw: Raw) -> Write:
    return Write("delete", kind, str(raw["metadata"]["name"]), {"preconditions": {"uid": raw["metadata"]["uid"]}})


def _within(wanted: Any, present: Any) -> bool:
    """Whether all that is wanted is there, whatever else is."""
    if isinstance(wanted, Mapping):
        return isinstance(present, Mapping) and all(k in present and _within(v, present[k]) for k, v in wanted.items())
    if isinstance(wanted, list):
        return isinstance(present, list) and all(any(_within(w, p) for p in present) for w in wanted)
    return bool(wanted == present)


_CANNOT_START = (
    ConditionReason.CREATE_CONTAINER_CONFIG_ERROR,
    ConditionReason.CREATE_CONTAINER_ERROR,
    ConditionReason.RUN_CONTAINER_ERROR,
)
"""What the kubelet says of a container that it cannot start; the conditions have the same reasons."""


def _unschedulable_since(pod: Raw) -> float | None:
    if observing.node_of(pod) is not None:
        return None
    for c in pod.get("status", {}).get("conditions") or ():
        if c["type"] == "PodScheduled" and c["status"] == "False" and c.get("reason") == "Unschedulable":
            return observing.seconds(c["lastTransitionTime"]) if c.get("lastTransitionTime") else 0.0
    return None


def _obstacle(pod: Raw) -> Problem | None:
    """What a pod that does not run waits for, if it is something that is missing."""
    name = pod["metadata"]["name"]
    status = pod.get("status", {})
    for c in status.get("conditions") or ():
        unscheduled = c["type"] == "PodScheduled" and c["status"] == "False" and c.get("reason") == "Unschedulable"
        if unscheduled and observing.node_of(pod) is None:
            message = str(c.get("message") or "")
            return _shortage(message), f"pod {name}: {message}"
    for c in status.get("containerStatuses") or ():
        waiting = (c.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            return (
                ConditionReason.IMAGE_PULL_FAILED,
                f"pod {name}: image {c.get('image')}: {waiting.get('message') or reason}",
            )
        if reason in _CANNOT_START:
            return ConditionReason(reason), f"pod {name}: {waiting.get('message') or reason}"
    return None


def _shortage(message: str) -> ConditionReason:
    """The reason in a scheduler's message."""
    lacking = re.findall(r"Insufficient ([\w./-]+)", message)
    for resource in lacking:
        resource = resource.rstrip(".")
        if resource.startswith("hugepages-"):
            return ConditionReason.NO_HUGE_PAGES
        if "/" in resource:
            return ConditionReason.NO_FREE_VF
    if "cannot allocate all claims" in message or "resourceclaim" in message.lower():
        return ConditionReason.NO_FREE_VF
    if any(r.rstrip(".") == "cpu" for r in lacking):
        return ConditionReason.NO_EXCLUSIVE_CPU
    if any(r.rstrip(".") == "memory" for r in lacking):
        return ConditionReason.NO_MEMORY
    return ConditionReason.UNSCHEDULABLE


def _admission(reason: str, message: str) -> ConditionReason:
    """The reason in a kubelet's refusal."""
    if reason == "TopologyAffinityError":
        return ConditionReason.TOPOLOGY_REJECTED
    if reason == "OutOfcpu" or (reason == "UnexpectedAdmissionError" and "cpu" in message.lower()):
        return ConditionReason.NO_EXCLUSIVE_CPU
    if reason.startswith("OutOfhugepages"):
        return ConditionReason.NO_HUGE_PAGES
    if reason.startswith("OutOf") and "/" in reason:
        return ConditionReason.NO_FREE_VF
    if reason == "UnexpectedAdmissionError":
        return ConditionReason.DEVICE_NOT_READY
    return ConditionReason.NO_MEMORY if reason == "OutOfmemory" else ConditionReason.ENGINE_FAILED
