"""Shapes of a cluster's answers: resources, as an agent would show them."""

from collections.abc import Sequence
from datetime import datetime

from packetstack_core.resources import API_VERSION
from packetstack_core.verbs import Json
from packetstack_core.wording import counted

COPIES = ("mirrored", "rejected")
"""Of a set of engines: counts of packets, which only an agent knows."""
LEFT = ("keptBuckets", "connections", "silentSince", "endsInSeconds")
"""The same of connections, which an operator knows roughly."""


def shown(stack: Json, table: Json | None, engines: Sequence[Json]) -> Json:
    """A PacketStack as the verb `get` of an agent shows one. Numbers that only an agent knows are None."""
    spec, given = stack["spec"], stack.get("status") or {}
    conditions = {c["type"]: c for c in given.get("conditions") or ()}
    meta = {k: v for k, v in stack["metadata"].items() if k != "managedFields"}
    counts = {k: int(given.get(k) or 0) for k in ("replicas", "readyReplicas", "updatedReplicas", "drainingReplicas")}
    listed = [_engine(e) for e in sorted(engines, key=lambda e: int(e["spec"]["id"]))]
    settled = conditions.get("Progressing", {}).get("status") == "False"
    available = conditions.get("Available", {}).get("status") == "True" or not spec["replicas"]
    seen = int(given.get("observedGeneration") or 0) >= int(meta.get("generation") or 0)
    full = counts["readyReplicas"] == counts["updatedReplicas"] == spec["replicas"]
    capacity = {"pairs": 0, "flows": 0, "maxFlows": int(spec.get("flowTable", {}).get("maxFlows") or 0)}
    status = {
        **given,
        **counts,
        "node": given.get("node") or "",
        "conditions": list(conditions.values()),
        "flows": sum(e["flows"] for e in listed),
        "ready": seen and settled and available and full,
        "engines": listed,
        "drops": None,
        "backends": _backends(table),
        "capacity": capacity | dict(given.get("capacity") or {}),
        "rebalance": _rebalance(spec, given.get("rebalance") or {}),
        "flowTable": _table(table),
    }
    return {"apiVersion": API_VERSION, "kind": "PacketStack", "metadata": meta, "spec": spec, "status": status}


def _engine(engine: Json) -> Json:
    status = engine.get("status") or {}
    known = {k: status[k] for k in ("node", "message") if status.get(k)}
    return {
        "slot": int(engine["spec"]["id"]),
        "name": name_of(engine),
        "state": status.get("state") or "Pending",
        "ready": bool(status.get("ready")),
        "buckets": int(status.get("buckets") or 0),
        "flows": int(status.get("flows") or 0),
        "pid": 0,
        "packetsPerSecond": None,
        "busy": None,
        "cores": [],
        **known,
    }


def _rebalance(spec: Json, given: Json) -> Json:
    """What the operator has moved; what cores and queues do, an agent knows."""
    moves = []
    if given.get("lastTime"):
        when = datetime.fromisoformat(str(given["lastTime"])).timestamp()
        moves.append(
            {"time": when, "what": counted(given.get("buckets", 0), "bucket"), "why": given.get("message", "")}
        )
    return {
        "mode": (spec.get("rebalance") or {}).get("mode", "Auto"),
        "maxOverMean": None,
        "bucketsMoved": None,
        "queuesMoved": None,
        "lastMoves": moves,
        "elephants": [{"bucket": b, "engine": None, "load": None} for b in given.get("elephants") or ()],
    }


def _backends(table: Json | None) -> list[Json]:
    listeners = table["spec"]["listeners"] if table is not None else ()
    ends = {(e["address"], e["port"]): e for li in listeners for e in li["backends"].get("endpoints") or ()}
    unknown = {"healthy": None, "flows": None, "flowsTotal": None}
    return [{"address": a, "port": p, "weight": e.get("weight", 1), **unknown} for (a, p), e in ends.items()]


def _table(table: Json | None) -> Json | None:
    """What the operator wants, and what the node's agent says of it."""
    if table is None:
        return None
    node = table["spec"].get("node")
    reports = (table.get("status") or {}).get("nodes") or ()
    report: Json = next((r for r in reports if r["node"] == node), {})
    kept = ("observedGeneration", "settled", "owned", "agentVersion", "message")
    return {"generation": table["metadata"]["generation"], **{k: report[k] for k in kept if k in report}}


def merged(status: Json, live: Json) -> Json:
    """What a node's agent knows better than the resources. Engines keep the operator's numbers."""
    by_name = {e["name"]: e for e in live["engines"]}
    engines = []
    for engine in status["engines"]:
        numbers = by_name.pop(engine["name"], {})
        engines.append({**engine, **numbers, "slot": engine["slot"], "state": engine["state"]})
    engines += [e | {"slot": number_of(e["name"])} for e in by_name.values()]
    moves = sorted([*status["rebalance"]["lastMoves"], *live["rebalance"]["lastMoves"]], key=lambda m: float(m["time"]))
    rebalance = {**status["rebalance"], "queuesMoved": live["rebalance"]["queuesMoved"], "lastMoves": moves}
    known = {k: live[k] for k in ("flows", "drops", "backends", "handover")}
    if "sets" in status:
        known["sets"] = [_set(s, live.get("sets") or ()) for s in status["sets"]]
    return {"engines": engines, "rebalance": rebalance, "leaving": live.get("leaving", []), **known}


def _set(known: Json, live: Sequence[Json]) -> Json:
    """A set of engines: what it shall be and has is the operator's, what becomes of packets and connections the agent's."""
    found: Json = next((s for s in live if s["id"] == known["id"]), {})
    # What it has left, an agent says that has heard of the same state.
    names = (*COPIES, *LEFT) if found.get("state") == known["state"] else COPIES
    return {**known, **{name: found[name] for name in names if name in found}}


def event_of(event: Json, stack: str, pod: str) -> Json:
    when = event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp")
    message = str(event.get("message") or "")
    return {
        "time": datetime.fromisoformat(when).timestamp() if when else 0.0,
        "type": str(event.get("type") or "Normal"),
        "stack": stack,
        "reason": str(event.get("reason") or ""),
        "message": f"pod {pod}: {message}" if pod else message,
    }


def name_of(document: Json) -> str:
    return str(document["metadata"]["name"])


def number_of(pod: str) -> int:
    """The operator's, of an engine."""
    return int(pod.rpartition("-")[2])


def agents_name(stack: Json) -> str:
    """What an agent calls a stack."""
    return f"{stack['metadata']['namespace']}.{stack['metadata']['name']}"


def endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
