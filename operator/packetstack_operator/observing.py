"""What is there: objects of the API server, reduced to what decisions need. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from packetstack_core.assignment import Move
from packetstack_core.kinds import FlowTable, TableEngine, read
from packetstack_core.planning import GivenUp
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import ConditionReason, Problem
from packetstack_operator import pods

Raw = Mapping[str, Any]
"""An object as the API server gives it."""

NETWORK_STATUS = "k8s.v1.cni.cncf.io/network-status"
OVERDUE_SECONDS = 30.0
"""How long after the end of its grace period a pod may exist before its node counts as dead."""


@dataclass(frozen=True, slots=True)
class Slice:
    """An EndpointSlice, of which there may be many: only what backends are made of."""

    family: int
    """4 or 6; 0 for names."""
    ports: tuple[tuple[str, str, int], ...]
    """Name, protocol, number."""
    endpoints: tuple[tuple[str, bool, bool], ...]
    """Address, takes new flows, is terminating but serves."""

    @classmethod
    def of(cls, raw: Raw) -> "Slice":
        """From the API server's object. Absent conditions count as the API says."""
        endpoints = []
        for e in raw.get("endpoints") or ():
            conditions = e.get("conditions") or {}
            ready = conditions.get("ready") is not False
            serving = conditions.get("serving")
            serving = ready if serving is None else serving
            terminating = bool(conditions.get("terminating"))
            fresh = ready or (serving and not terminating)
            if e.get("addresses") and (fresh or serving):
                endpoints.append((e["addresses"][0], fresh, serving and terminating))
        ports = [
            (p.get("name") or "", p.get("protocol") or "TCP", p["port"])
            for p in raw.get("ports") or ()
            if p.get("port") is not None
        ]
        family = {"IPv4": 4, "IPv6": 6}.get(raw.get("addressType", ""), 0)
        return cls(family, tuple(ports), tuple(endpoints))


ServicePorts = Mapping[tuple[int, str], str]
"""(number, protocol) -> name of a Service's port."""


def service_ports(raw: Raw) -> dict[tuple[int, str], str]:
    """The ports of a Service."""
    listed = raw.get("spec", {}).get("ports") or ()
    return {(p["port"], p.get("protocol") or "TCP"): p.get("name") or "" for p in listed}


Named = tuple[str, str]
"""Kind and name of an object in the stack's namespace."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A write that the API server does not take, for as long as it is still wanted."""

    write: tuple[str, str, str, str]
    """`outcome.Write.identity`."""
    reason: ConditionReason
    message: str


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision hands to the next one of the same process. Losing it costs one early try."""

    failures: int = 0
    """Engines in a row that could not be made."""
    create_after: float = 0.0
    """Unix time before which no other is made."""
    problem: Problem | None = None
    """Reason and message of the last one."""
    counted: frozenset[str] = frozenset()
    """UIDs of pods that are in `failures`."""
    taken: frozenset[Named] = frozenset()
    """What could not be created since there is one of that name already."""
    template: str = ""
    """What all of this is about."""
    devices: frozenset[str] = frozenset()
    """UIDs of pods on a node whose interfaces were given to them."""
    reuse_after: float = 0.0
    """Unix time before which no pod is made that would be given the interface of one that has gone."""
    given_up: GivenUp = field(default_factory=GivenUp)
    """Engines in a row that were given up, on the wall clock."""
    refused: Refusal | None = None
    """What the API server refused last, but for pods, which are in `problem`."""
    since: Mapping[str, float] = field(default_factory=dict)
    """What lasts, by a name -> Unix time of its beginning, by the operator's own clock: see `deciding`."""
    shards: Mapping[str, str] = field(default_factory=dict)
    """Template -> shard layout of its image's build, where an engine was not let in by that of its set."""


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """An engine that is attached, and has a MAC. Those that were first are less."""

    starting: bool
    """It has never been active."""
    since: str
    """When its pod was made."""
    namespace: str
    stack: str
    number: int
    pod: str


@dataclass(frozen=True, slots=True, order=True)
class Claim:
    """Addresses that a stack names, by its resource or by its flow table. Of two claims the lesser one goes before."""

    idle: bool
    """No packets flow to them: it is not of a flow table in which engines own buckets."""
    since: str
    """When the resource or the flow table was made."""
    namespace: str
    stack: str
    version: int
    first: int
    last: int


Block = tuple[int, int]
"""IP version, and 256 addresses in a row: the first one without its last eight bits."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two stacks name one address, and this one comes second."""

    address: str
    owner: str
    """The other stack, `namespace/name`."""
    fresh: bool
    """No packets flow to this stack's address yet."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a stack's rebalancer has found, from the load of its buckets."""

    generation: int
    """Generation of the flow table that `moves` are for; of no use for another one."""
    moves: tuple[Move, ...] = ()
    """Where buckets should go; `Owner.slot` is an engine's id."""
    message: str = ""
    """What they would bring, for a person."""
    elephants: tuple[int, ...] = ()
    """Buckets that take most of a core alone."""


@dataclass(frozen=True, slots=True)
class World:
    """One stack and all that belongs to it."""

    stack: Raw
    image: str
    """The operator's own image: that of engines for which the resource names none."""
    table: Raw | None = None
    pods: Sequence[Raw] = ()
    engines: Sequence[Raw] = ()
    """PacketEngines."""
    budget: Raw | None = None
    services: Mapping[str, ServicePorts] = field(default_factory=dict)
    slices: Mapping[str, Sequence[Slice]] = field(default_factory=dict)
    strangers: frozenset[Named] = frozenset()
    """Objects of others that have the names of ours."""
    troubles: Mapping[str, str] = field(default_factory=dict)
    """Name of a pod -> the last warning about it, while its containers are being prepared."""
    neighbours: Mapping[str, Sequence[Holder]] = field(default_factory=dict)
    """MAC of an engine of this stack -> engines of other stacks on its node that report the same."""
    conflict: Conflict | None = None
    """An address of this stack that another one names too, which goes before it."""
    proposal: Proposal | None = None
    """None: there is nothing to move, and no elephant."""
    loads: Mapping[int, float] = field(default_factory=dict, compare=False)
    """Load of engines, in cores, where it is known. It changes all the time, and alone is no reason to decide again."""
    outdated: str = ""
    """Kinds whose definitions in the cluster are older or newer than this operator."""
    memory: Memory = Memory()

    @property
    def uid(self) -> str:
        """The stack's."""
        return str(self.stack["metadata"]["uid"])


def owned_by(raw: Raw, uid: str) -> bool:
    """Whether the object belongs to the stack with this UID. An orphan is taken in."""
    owners = [o for o in raw["metadata"].get("ownerReferences") or () if o.get("controller")]
    return not owners or owners[0]["uid"] == uid


def names_to_verify(world: World) -> set[Named]:
    """What may be there though no watch brings it: the watches see labels, which can be taken off by hand.

    Empty for a stack at rest. To be read by name, and handed to `with_looked_up`.
    """
    seen = {str(p["metadata"]["name"]) for p in world.pods}
    entries = (world.table or {}).get("spec", {}).get("engines") or ()
    ran = {str(e["name"]) for e in entries if e.get("podUid")}
    made = {str(e["metadata"]["name"]) for e in world.engines}
    return {("Pod", name) for name in (ran | made) - seen} | world.memory.taken


def with_looked_up(world: World, found: Mapping[Named, Raw]) -> World:
    """With what `names_to_verify` asked for: ours join the others of their kind. What is not in `found` is not there."""
    uids = {str(e.get("podUid")) for e in (world.table or {}).get("spec", {}).get("engines") or ()}
    names = {str(p["metadata"]["name"]) for p in world.pods}
    joined, budget, strangers = list(world.pods), world.budget, set()
    for (kind, name), raw in sorted(found.items()):
        owners = raw["metadata"].get("ownerReferences") or ()
        if not any(o["uid"] == world.uid for o in owners) and str(raw["metadata"]["uid"]) not in uids:
            strangers.add((kind, name))
        elif kind == "PodDisruptionBudget":
            budget = raw
        elif name not in names:
            joined.append(raw)
    return replace(world, pods=tuple(joined), budget=budget, strangers=frozenset(strangers))


def seconds(timestamp: str) -> float:
    """Unix time of an API server's timestamp."""
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


# ---- pods --------------------------------------------------------------------------------------------------------


def number_of(pod: Raw) -> int:
    """The engine that a pod is of, by its name, which nobody can change; 0 if that is none of an engine."""
    text = str(pod["metadata"]["name"]).rpartition("-")[2]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 5 else 0


def is_engine(pod: Raw, stack: str) -> bool:
    """Whether a pod with the labels or the owner of this stack is one that was made here."""
    meta = pod["metadata"]
    made = pods.SHAPE in (meta.get("annotations") or {}) or bool(meta.get("ownerReferences"))
    return made and number_of(pod) > 0 and meta["name"] == f"{stack}-{number_of(pod)}"


def phase(pod: Raw) -> str:
    """Pending, Running, Succeeded, Failed or Unknown."""
    return str(pod.get("status", {}).get("phase") or "Pending")


def node_of(pod: Raw) -> str | None:
    """Where it was put; None before."""
    name = pod.get("spec", {}).get("nodeName")
    return str(name) if name else None


def generation(thing: Raw | None) -> int:
    """Generation of an object's spec; 0 if there is no object, or it has none."""
    return int(thing["metadata"].get("generation") or 0) if thing is not None else 0


def terminating(pod: Raw) -> bool:
    """Somebody has deleted it, and it is in its grace period."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def dead(pod: Raw, now: float) -> bool:
    """Its containers will not run again."""
    if phase(pod) in ("Failed", "Succeeded"):
        return True
    # The timestamp is when the grace period ends. A node that is gone never confirms.
    deleted = pod["metadata"].get("deletionTimestamp")
    return bool(deleted) and now > seconds(deleted) + OVERDUE_SECONDS


def started(pod: Raw) -> bool:
    """Its container has run, so that an agent may have attached it."""
    listed = pod.get("status", {}).get("containerStatuses") or ()
    return any(
        c.get("restartCount") or "running" in (c.get("state") or {}) or "terminated" in (c.get("state") or {})
        for c in listed
    )


def prepares(pod: Raw) -> bool:
    """It has a node, and its network, devices and volumes are not there yet."""
    return node_of(pod) is not None and phase(pod) == "Pending" and not started(pod) and not terminating(pod)


def running(pod: Raw) -> bool:
    """Its container runs now."""
    listed = pod.get("status", {}).get("containerStatuses") or ()
    return phase(pod) == "Running" and any("running" in (c.get("state") or {}) for c in listed)


def started_at(pod: Raw) -> float:
    """Unix time since which its container runs; 0 if it does not."""
    for c in pod.get("status", {}).get("containerStatuses") or ():
        since = ((c.get("state") or {}).get("running") or {}).get("startedAt")
        if since:
            return seconds(since)
    return 0.0


def was_given(pod: Raw) -> bool:
    """Whether its interface is somebody else's: of a device plugin, a resource driver or a CNI plugin."""
    meta = pod["metadata"]
    return bool((meta.get("annotations") or {}).get(pods.NETWORKS) or pod.get("spec", {}).get("resourceClaims"))


def interface_of(pod: Raw) -> str | None:
    """The interface that the engine takes packets from; "" if the agent is to make one, None while it is not known."""
    wanted = pods.network(pod)
    if wanted is None:
        return pods.INTERFACE if pod.get("spec", {}).get("resourceClaims") else ""
    try:
        listed = json.loads(pod["metadata"]["annotations"][NETWORK_STATUS])
        for n in listed:
            if n.get("interface") and n.get("name") == wanted:
                return str(n["interface"])
    except (KeyError, ValueError, TypeError, AttributeError):
        pass
    return None


def from_pod(pod: Raw) -> TableEngine | None:
    """The flow table's entry of an engine, read back from its pod. None if the pod does not tell."""
    labels = pod["metadata"].get("labels", {})
    try:
        shape = json.loads(pod["metadata"].get("annotations", {}).get(pods.SHAPE, ""))
        return TableEngine.model_validate(
            {
                "id": number_of(pod),
                "name": pod["metadata"]["name"],
                "state": labels.get(pods.ENGINE_STATE),
                "template": labels.get(pods.REVISION),
                **shape,
            }
        )
    except (ValueError, TypeError, ValidationError):
        return None


def read_table(raw: Raw | None) -> FlowTable | None:
    """The flow table; None if there is none, or one that nobody could have written from here."""
    if raw is None:
        return None
    try:
        return read(FlowTable, raw)
    except ResourceError:
        return None
