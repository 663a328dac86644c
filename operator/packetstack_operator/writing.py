"""The writes that make of what there is (`Facts`) what there shall be (`Plan`). Pure; nothing for what is as it shall be."""

from collections.abc import Mapping
from typing import Any, Literal

from packetstack_core import kinds, resources, shards
from packetstack_core.assignment import NOBODY
from packetstack_core.kinds import FlowTable, FlowTableSpec, TableSet
from packetstack_core.reasons import ConditionReason
from packetstack_core.resources import API_VERSION
from packetstack_core.statuses import PacketStackStatus
from packetstack_core.transitions import EngineSet
from packetstack_core.wording import timestamp
from packetstack_operator import conditions, observing, pod_deletion, pods
from packetstack_operator.facts import Facts, Plan, engine_status, stack_status
from packetstack_operator.observing import Raw, World
from packetstack_operator.outcome import Kind, Write

_ABSENT = dict.fromkeys(("node", "sets", "lastSet", "previousOwners"))
"""What a table may have had that the next one has not."""


def table(found: Facts, plan: Plan) -> list[Write]:
    """The flow table, if it is not as planned."""
    new, raw = _new_spec(found, plan), found.world.table
    if found.table is not None and raw is not None and found.table.spec == new and _has_marks(raw, found.world):
        return []
    return [table_write(found.world, new)]


def _new_spec(found: Facts, plan: Plan) -> FlowTableSpec:
    spec = found.stack.spec
    known = found.table.spec if found.table is not None else None
    if known is not None and [o or NOBODY for o in plan.owners] == known.owner_ids():
        owners = known.owners  # the same may be packed in more than one way
    elif all(o is None or o == NOBODY for o in plan.owners):
        owners = ""
    else:
        owners = kinds.encode_owners(plan.owners)
    sets, keepers = plan.sets, plan.keepers
    previous = kinds.encode_owners(keepers) if any(k is not None and k != NOBODY for k in keepers) else None
    if previous is not None and known is not None and known.previous_owners and keepers == known.keeper_ids():
        previous = known.previous_owners
    return FlowTableSpec.model_validate(
        {
            "sets": tuple(_set(plan, s) for s in sets.known) or None,
            "lastSet": sets.last or None,
            "previousOwners": previous,
            "node": plan.node,
            "engines": tuple(e for _, e in sorted(plan.entries.items())),
            "lastEngine": plan.last,
            "owners": owners,
            "listeners": found.listeners,
            "snat": spec.snat,
            "unknownFlow": spec.unknown_flow,
            "flowTable": spec.flow_table,
            "handover": spec.handover,
            "rebalance": spec.rebalance,
            "rebalanced": plan.rebalanced,
        }
    )


def _set(plan: Plan, known: EngineSet) -> TableSet:
    return TableSet.model_validate(
        {
            "id": known.id,
            "state": str(known.state),
            "replicas": known.replicas,
            "template": known.template,
            "queues": known.queues,
            "since": timestamp(known.since),
            "engine": plan.shapes.get(known.id),
            "ending": True if known.id in plan.ending else None,
            "shard": known.shard if known.shard != shards.FIRST else None,
        }
    )


def pods_to_create(found: Facts, plan: Plan) -> list[Write]:
    """Pods of engines that have none, as many as may be made now."""
    writes = []
    waiting = plan.node is None and any(plan.entries[i].template == found.template for i in plan.pods(found))
    early = found.stack.spec.engine.interface.veth is None and found.now < plan.memory.reuse_after
    for _, entry in sorted(plan.entries.items()):
        if entry.name in found.pods or entry.pod_uid or waiting or found.now < plan.memory.create_after:
            continue
        if early:
            plan.waits.wake(plan.memory.reuse_after)
            break
        shape = plan.shape(found.stack, entry.template)
        body = pods.pod(found.world.stack, found.stack, shape, entry, found.world.image, plan.node)
        writes.append(Write("create", "Pod", entry.name, body))
        waiting = plan.node is None
    return writes


def marks(found: Facts, plan: Plan) -> list[Write]:
    """Labels and the readiness of pods."""
    writes = []
    for name, pod in sorted(found.pods.items()):
        entry = plan.entries.get(observing.number_of(pod))
        ours = entry is not None and entry.name == name
        meta = {"name": name, "namespace": found.stack.metadata.namespace}
        known = entry if ours else observing.from_pod(pod)
        if known is not None:
            labels = pods.pod_labels(found.stack.name, known, known.state if ours else "Draining")
            owners = pods.owner(found.world.stack)
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
        report = found.reported.get(entry.id)
        ready = found.ready(entry)
        message = "" if ready or report is None else found.why_not_ready(entry.id)
        reason = ConditionReason.SERVING if ready else ConditionReason.NOT_SERVING
        condition = {"type": pods.DATA_PATH, "status": str(ready), "reason": str(reason)}
        if message:
            condition["message"] = message
        was: Raw = next((c for c in pod.get("status", {}).get("conditions") or () if c["type"] == pods.DATA_PATH), {})
        if {k: was.get(k) or "" for k in ("status", "reason", "message")} != {
            k: condition.get(k, "") for k in ("status", "reason", "message")
        }:
            since = timestamp(found.now)
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


def pods_to_delete(found: Facts, plan: Plan) -> list[Write]:
    """Pods that may be deleted now."""
    return [
        delete("Pod", pod) for name, pod in sorted(found.pods.items()) if pod_deletion.may_go(found, plan, name, pod)
    ]


def packet_engines(found: Facts, plan: Plan) -> list[Write]:
    """PacketEngines and their statuses."""
    present = {str(e["metadata"]["name"]): e for e in found.world.engines}
    wanted: dict[str, int] = {name: observing.number_of(pod) for name, pod in found.pods.items()}
    wanted |= {e.name: e.id for e in plan.entries.values()}
    # One look longer than its entry: by it a pod is looked for that a watch does not bring.
    still = {e.name for e in found.table.spec.engines} if found.table is not None else set()
    writes = []
    for name, number in sorted(wanted.items()):
        raw = present.get(name)
        body = pods.packet_engine(found.world.stack, name, number)
        if raw is None or not _within({k: body[k] for k in ("metadata", "spec")}, raw):
            writes.append(Write("apply", "PacketEngine", name, body))
        former = engine_status(raw)
        status = conditions.engine_status(found, plan, name, number, former)
        if status != former:
            shown = {
                "apiVersion": API_VERSION,
                "kind": "PacketEngine",
                "metadata": {"name": name, "namespace": found.stack.metadata.namespace},
                "status": status.document(),
            }
            writes.append(Write("apply", "PacketEngine", name, shown, "status"))
    writes += [
        delete("PacketEngine", raw)
        for name, raw in sorted(present.items())
        if name not in wanted and name not in still and not observing.terminating(raw)
    ]
    return writes


def budget(found: Facts) -> list[Write]:
    """The PodDisruptionBudget of the engines."""
    body = pods.disruption_budget(found.world.stack)
    name, present = pods.budget_name(found.stack.name), found.world.budget
    if present is None:
        taken = ("PodDisruptionBudget", name) in found.world.strangers
        return [] if taken else [Write("create", "PodDisruptionBudget", name, body)]
    if _within({k: body[k] for k in ("metadata", "spec")}, present):
        return []
    return [Write("apply", "PodDisruptionBudget", name, body)]


def status(found: Facts, status: PacketStackStatus) -> list[Write]:
    """The stack's status, if it is another than it has."""
    return [status_write(found.world, status)] if status != stack_status(found.world.stack) else []


def status_write(world: World, status: PacketStackStatus) -> Write:
    """The stack's status, but for the autoscaler's part."""
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


def table_write(world: World, spec: FlowTableSpec) -> Write:
    """The whole flow table, or none if it is not the one of `world` any more."""
    meta = world.stack["metadata"]
    known = {"name": meta["name"], "namespace": meta["namespace"], **_table_marks(world)}
    if world.table is not None:
        # Refused if the table is not the one that this was decided from.
        known["resourceVersion"] = world.table["metadata"]["resourceVersion"]
    verb: Literal["create", "replace"] = "create" if world.table is None else "replace"
    made = spec.document() if verb == "create" else {**_ABSENT, **spec.document()}
    body = {"apiVersion": API_VERSION, "kind": FlowTable.__name__, "metadata": known, "spec": made}
    return Write(verb, "FlowTable", meta["name"], body)


def delete(kind: Kind, raw: Raw) -> Write:
    """The deletion of this object, and of no other one of its name."""
    return Write("delete", kind, str(raw["metadata"]["name"]), {"preconditions": {"uid": raw["metadata"]["uid"]}})


def _within(wanted: Any, present: Any) -> bool:
    """Whether all that is wanted is there, whatever else is."""
    if isinstance(wanted, Mapping):
        return isinstance(present, Mapping) and all(k in present and _within(v, present[k]) for k, v in wanted.items())
    if isinstance(wanted, list):
        return isinstance(present, list) and all(any(_within(w, p) for p in present) for w in wanted)
    return bool(wanted == present)
