"""The kinds that the operator writes: `FlowTable` and `PacketEngine`.

A `FlowTable` is all that an agent needs to know of a stack: engines, who owns which bucket, listeners with their
backends resolved. The operator writes its spec; each agent answers in its status, in a list keyed by node. A
`PacketEngine` shows one engine to a person; nothing is decided from it.

Engines are named by a number, their `id`: 1 to 1023 within a stack, given in turn, so that one is not used again
soon. The engine's pod is called `<stack>-<id>`. (An agent gives each engine a slot of its node; that is its own
business.)
"""

import base64
import binascii
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ValidationError, model_validator

from packetstack_core import reading, resources, shards, values
from packetstack_core.assignment import NOBODY, Owner, State
from packetstack_core.engines import Engine
from packetstack_core.limits import MAX_BUCKETS, MAX_CORES, MAX_QUEUES, MAX_REPLICAS
from packetstack_core.reading import ResourceError
from packetstack_core.resources import API_VERSION, Handover, Listener, Metadata, PacketStack, Snat
from packetstack_core.values import Items, Model, Whole
from packetstack_core.wording import show

MAX_ENGINE_ID = 1023
"""What ten bits of an owner hold; 0 is nobody."""
MAX_TABLE_ENGINES = 2 * MAX_REPLICAS
"""While a pool is replaced there may be twice as many as wanted."""

MAX_SET_ID = 65535
"""A stack that changes its set each minute comes to it after six weeks; then the first one is free again."""
MAX_SETS = 2
"""A third set waits until the first one has gone."""

EngineId = Annotated[int, Whole(1, MAX_ENGINE_ID, "an engine's id")]
StateName = Literal["Pending", "Starting", "Active", "Draining", "Failed"]


# ---- owners ----------------------------------------------------------------------------------------------------


def encode_owners(owners: Sequence[Owner | None]) -> str:
    """Owner by bucket as text: base64 of zlib of one little-endian 16-bit word each, `id << 6 | queue`, 0 = nobody."""
    words = array("H", (0 if o is None or o == NOBODY else o.slot << 6 | o.queue for o in owners))
    return base64.b64encode(zlib.compress(words.tobytes(), 9)).decode()


def decode_owners(text: str, buckets: int) -> list[Owner | None]:
    """What `encode_owners` wrote; all nobody for an empty text. ValueError for anything else, never more memory."""
    return list(_decoded(text, buckets)) if text else [NOBODY] * buckets


@lru_cache(maxsize=8)  # one look at a table asks several times
def _decoded(text: str, buckets: int) -> tuple[Owner, ...]:
    try:
        packed = base64.b64decode(text, validate=True)
        engine = zlib.decompressobj()
        data = engine.decompress(packed, 2 * buckets + 1)
        if len(data) != 2 * buckets or not engine.eof:
            raise ValueError
        words = array("H", data)
    except (ValueError, zlib.error, binascii.Error):
        raise ValueError(f"{show(text)} is not the owners of {buckets} buckets") from None
    named = {w: Owner(w >> 6, w & 63) if w >> 6 else NOBODY for w in set(words)}
    return tuple(named[w] for w in words)


# ---- FlowTable -------------------------------------------------------------------------------------------------


Owners = Annotated[str, values.Text(r"[A-Za-z0-9+/=]*", 65536, "base64", "what the operator writes")]
"""Owner by bucket, as `encode_owners` writes it; empty: all nobody's."""
SetId = Annotated[int, Whole(1, MAX_SET_ID, "a set's id")]
Template = Annotated[str, values.Text(r"[0-9a-f]+", 64, "a hash", "hexadecimal digits")]
_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"
Time = Annotated[str, values.Text(_TIME, 20, "a time", 'RFC 3339, UTC, as in "2026-01-31T12:00:00Z"')]


class TableNode(Model):
    """A node that takes part in a stack: its agent sees the whole table."""

    name: Annotated[str, values.DNS_NAME]
    """Name of the node."""


ShardLayout = Annotated[str, values.Text(shards.PATTERN, 96, "a shard layout", "what an agent has said of one")]
"""As `packetstack_core.shards` names it."""


class TableSet(Model):
    """Engines that share one memory of flows. A stack has one set, and a second one while that takes over by Mirror."""

    id: SetId
    """Number of the set, unique in the table and not given twice in a row."""
    state: Literal["Activating", "Current", "Draining"]
    """`Activating`: its engines come up. `Current`: it takes new connections. `Draining`: it keeps those that it has."""
    replicas: Annotated[int, Whole(0, MAX_REPLICAS, "a number of engines")]
    """Engines that it shall have."""
    template: Template
    """Hash of the pod template that its engines are made from."""
    queues: Annotated[int, Whole(1, MAX_QUEUES, "a number of queues")]
    """Receive queues of an engine of this template."""
    since: Time
    """When it got its state. RFC 3339, UTC."""
    engine: Engine | None = None
    """Shape that its engines are made from, image included. Absent: the stack's, since nobody knows another."""
    ending: bool | None = None
    """The connections that it keeps end now, by resets. Absent: they have their time."""
    shard: ShardLayout | None = None
    """Layout of its shards, which its engines' build has too. Absent: layout 1."""


class TableEngine(Model):
    """An engine that the node's agent shall attach."""

    id: EngineId
    """Number of the engine, unique in the table and never given twice."""
    name: values.Name
    """Name of its pod."""
    pod_uid: Annotated[str, values.Text(r"[-0-9a-fA-F]*", 63, "a UID", "the pod's metadata.uid")] = ""
    """UID of its pod; empty until the pod runs: nothing is attached before."""
    interface: Annotated[str, values.Text(r"[A-Za-z0-9_.-]*", 15, "an interface's name", 'a name as in "net1"')] = ""
    """Name of its interface in the pod. Empty: the agent makes a veth pair."""
    state: StateName
    """State that the operator wants it in."""
    template: Template
    """Hash of the pod template that it was made from."""
    queues: Annotated[int, Whole(1, MAX_QUEUES, "a number of queues")]
    """Receive queues of the engine."""
    cores: Annotated[int, Whole(1, MAX_CORES, "a number of cores")]
    """Worker threads of the engine."""
    cpu_policy: Literal["Exclusive", "Shared"] = "Shared"
    """`Exclusive`: each core has a CPU of its own. `Shared`: cores share CPUs."""
    node: Annotated[str, values.DNS_NAME] | None = None
    """Node that it runs on, one of `nodes`; absent: `spec.node`."""
    set: SetId | None = None
    """Set that it belongs to; absent: the first of `sets`, or there are none."""


class FlowTableSpec(Model):
    """What packets shall see.

    Fields that are absent by default are not written: so agents of an earlier version read the tables of all stacks
    that do not use them.
    """

    node: Annotated[str, values.DNS_NAME] | None = None
    """Node that all engines run on which name no other; absent while there is none."""
    nodes: Items[TableNode] | None = None
    """All nodes that take part, when they are several."""
    sets: Items[TableSet] | None = None
    """The sets of engines, oldest first; absent for a stack that never had `handover.strategy: Mirror`."""
    last_set: SetId | None = None
    """Number that was given to a set last; absent without sets."""
    engines: Items[TableEngine] = ()
    """Engines that there shall be, and those that are leaving."""
    last_engine: Annotated[int, Whole(0, MAX_ENGINE_ID, "an engine's id")] = 0
    """Number that was given to an engine last."""
    owners: Owners = ""
    """Owner by bucket: base64 of zlib of a little-endian 16-bit word each, `id << 6 | queue`, 0 = nobody."""
    previous_owners: Owners | None = None
    """Who is to keep the connections that a bucket had before its present owner, written as `owners`: its traffic is
    mirrored to both until the node's agent finds that none is left. Absent: nobody does."""
    listeners: Items[Listener]
    """Listeners of the stack; Services are resolved to endpoints."""
    snat: Snat
    unknown_flow: Literal["Drop", "Reset"] = "Drop"
    """What happens to TCP packets that belong to no flow and open none."""
    flow_table: resources.FlowTable = resources.FlowTable()
    handover: Handover = Handover()
    rebalance: resources.Rebalance = resources.Rebalance()
    rebalanced: bool = False
    """Buckets were moved by load: engines have as many as they carry, and not equally many."""

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> "FlowTableSpec":
        found: list[tuple[tuple[str | int, ...], str]] = []
        ids: dict[int, int] = {}
        for i, engine in enumerate(self.engines):
            if ids.setdefault(engine.id, i) != i:
                found.append(
                    (("engines", i, "id"), f"{engine.id} is already engines[{ids[engine.id]}]; use an id once")
                )
        for name, text in (("owners", self.owners), ("previousOwners", self.previous_owners or "")):
            try:
                decode_owners(text, self.flow_table.buckets)
            except ValueError as e:
                found.append(((name,), str(e)))
        found += self._check_places()
        for i, listener in enumerate(self.listeners):
            if listener.backends.endpoints is None:
                found.append((("listeners", i, "backends"), "has a service; use the endpoints that it stands for"))
        if found:
            raise values.Problems(found)
        return self

    def _check_places(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Nodes and sets that engines name are there, once each."""
        nodes, sets = [n.name for n in self.nodes or ()], [s.id for s in self.sets or ()]
        named: list[tuple[str, list[str] | list[int]]] = [("nodes", nodes), ("sets", sets)]
        for field, there in named:
            if len(set(there)) < len(there):
                yield (field,), "has one of them twice; use each once"
        if len(sets) > MAX_SETS:
            yield ("sets",), f"has {len(sets)} sets; use at most {MAX_SETS}"
        if nodes and self.node is not None and self.node not in nodes:
            yield ("node",), f"{show(self.node)} is not among nodes; add it there"
        for i, engine in enumerate(self.engines):
            if engine.node is not None and engine.node not in (self.node, *nodes):
                yield ("engines", i, "node"), f"{show(engine.node)} is not among nodes; use one of them"
            if engine.set is not None and engine.set not in sets:
                yield ("engines", i, "set"), f"{engine.set} is not among sets; use one of them"

    def owner_ids(self) -> list[Owner | None]:
        """Owner by bucket; `Owner.slot` is an engine's id."""
        return decode_owners(self.owners, self.flow_table.buckets)

    def keeper_ids(self) -> list[Owner | None]:
        """Who is to keep older connections, by bucket; `Owner.slot` is an engine's id."""
        return decode_owners(self.previous_owners or "", self.flow_table.buckets)

    def set_of(self, engine: TableEngine) -> int | None:
        """Number of the set that the engine belongs to; None without sets."""
        return engine.set or (self.sets[0].id if self.sets else None)

    def current_set(self) -> int | None:
        """Number of the set that takes new connections; None without sets."""
        return next((s.id for s in self.sets or () if s.state == "Current"), None)


class EngineReport(Model):
    """An engine as its node's agent sees it."""

    id: EngineId
    """Number of the engine in the flow table."""
    name: str
    """Name of its pod."""
    ready: bool = False
    """Whether a datapath serves its queues and has answered a probe packet."""
    buckets: Annotated[int, Whole(0, MAX_BUCKETS, "a number of buckets")] = 0
    """Buckets whose packets reach this engine."""
    flows: Annotated[int, Whole(0, 2**31 - 1, "a number of flows")] = 0
    """Live flows, rounded down to a power of two so that the number changes seldom. Exact ones are metrics."""
    interface: str = ""
    """Name of its interface in its pod."""
    mac: str = ""
    """MAC address of its interface."""
    message: str = ""
    """Why it is not ready."""
    configured: bool | None = None
    """Whether it has the present configuration of its set, and knows of the other set's connections. Absent without
    sets."""
    shard: ShardLayout | None = None
    """Shard layout of its build, if that is not the one of its set, so that it was not let in."""


class SetReport(Model):
    """A set of engines as the node's agent sees it."""

    id: SetId
    """Number of the set in the flow table."""
    kept_buckets: Annotated[int, Whole(0, MAX_BUCKETS, "a number of buckets")] = 0
    """Buckets of which it keeps connections that are older than their owner, rounded down to a power of two."""
    connections: Annotated[int, Whole(0, 2**31 - 1, "a number of connections")] = 0
    """Connections that it keeps, rounded down to a power of two."""
    silent_since: Time | None = None
    """When the one of them was seen last that is silent for the longest time. RFC 3339, UTC, rounded down to a minute so
    that it changes seldom; absent without any."""


class NodeReport(Model):
    """A node's answer to a flow table."""

    node: str
    """Name of the node whose agent answers."""
    observed_generation: int = 0
    """Generation of the flow table that the report answers."""
    settled: bool = False
    """Each bucket's owner is the one of the observed generation, and no fence is open."""
    owned: Annotated[int, Whole(0, MAX_BUCKETS, "a number of buckets")] = 0
    """Buckets that have an owner."""
    engines: Items[EngineReport] = ()
    """Engines that are attached on the node."""
    agent_version: str = ""
    """Version of the agent's package."""
    layout: int = 0
    """Version of the shared memory's layout."""
    shard: ShardLayout | None = None
    """Layout of the shards of the set that takes new connections. Absent: layout 1."""
    message: str = ""
    """What stands in the way, as in "AddressConflict: 192.0.2.10 belongs to stack default/web"."""
    firewall: str = ""
    """What in the node's packet filter stops the stack's packets, as in "PacketsDropped: the policy of chain FORWARD"."""
    lost: str = ""
    """What the node lacks, so that packets of the stack are lost, as in "ForwardingOff: net.ipv4.ip_forward: is 0"."""
    sets: Items[SetReport] | None = None
    """Sets of engines that have memory on the node; absent where the flow table has no sets."""


class FlowTableStatus(Model):
    """The agents' answers."""

    nodes: Items[NodeReport] = ()
    """Answers of the agents, one for each node."""


class FlowTable(Model):
    """One a stack, of the same name and namespace."""

    api_version: Literal["packetstack.io/v1alpha1"]
    kind: Literal["FlowTable"]
    metadata: Metadata
    spec: FlowTableSpec
    status: FlowTableStatus = FlowTableStatus()

    def report(self) -> NodeReport | None:
        """What the agent of the stack's node said last."""
        return next((n for n in self.status.nodes if n.node == self.spec.node), None)

    def stack(self) -> PacketStack:
        """The part that an agent carries out, as a resource of its own."""
        spec = self.spec.document()
        kept = ("listeners", "snat", "unknownFlow", "flowTable", "handover", "rebalance")
        running = sum(e.state in ("Starting", "Active") for e in self.spec.engines)
        return reading.parse(
            {
                "apiVersion": API_VERSION,
                "kind": resources.KIND,
                "metadata": self.metadata.model_dump(by_alias=True),
                "spec": {name: spec[name] for name in kept} | {"replicas": running},
            }
        )


# ---- PacketEngine ----------------------------------------------------------------------------------------------


class Condition(Model):
    """One thing that is true, false or unknown of the object, and why."""

    type: str
    """Name of the condition, for example Available."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: str
    """Why it does or does not, in one word; docs/troubleshoot.md explains each."""
    message: str = ""
    """The same for a person: who is concerned, what it means, what to do."""
    last_transition_time: str
    """When `status` changed last, in RFC 3339, UTC."""
    observed_generation: int = 0
    """Generation of the object that the condition was computed from."""


class PacketEngineSpec(Model):
    """Which engine it is."""

    stack: values.Name
    """Name of its PacketStack."""
    id: EngineId
    """Number of the engine in the flow table."""


class PacketEngineStatus(Model):
    """How it is. Written when something changes; live numbers are metrics."""

    state: StateName = State.PENDING.value
    """State of the engine in the flow table."""
    ready: bool = False
    """Whether a datapath serves its queues."""
    node: str = ""
    """Node that its pod runs on."""
    pod: str = ""
    """Name of its pod."""
    interface: str = ""
    """Name of its interface in the pod."""
    mac: str = ""
    """MAC address of the interface."""
    pci_address: str = ""
    """PCI address of the virtual function; empty for other interfaces."""
    cores: int = 0
    """Worker threads of the engine."""
    queues: int = 0
    """Receive queues of the engine."""
    template: str = ""
    """Hash of the pod template that it was made from."""
    buckets: int = 0
    """Buckets whose packets reach this engine."""
    flows: int = 0
    """Live flows, rounded down to a power of two."""
    message: str = ""
    """Why it is not ready."""
    conditions: Items[Condition] = ()
    """Ready: whether the engine serves, and why not."""


class PacketEngineMetadata(Metadata):
    """As of a stack, but the name has the engine's id behind the stack's."""

    name: values.Name


class PacketEngine(Model):
    """One an engine, of the name of its pod."""

    api_version: Literal["packetstack.io/v1alpha1"]
    kind: Literal["PacketEngine"]
    metadata: PacketEngineMetadata
    spec: PacketEngineSpec
    status: PacketEngineStatus = PacketEngineStatus()


# ---- reading ---------------------------------------------------------------------------------------------------

K = TypeVar("K", FlowTable, PacketEngine)


def read(kind: type[K], document: Mapping[str, Any]) -> K:
    """An object as the API server gives it. ResourceError if it is not one of this kind."""
    try:
        return kind.model_validate(dict(document))
    except ValidationError as e:
        raise ResourceError([line for error in e.errors() for line in reading.describe(error, kind)]) from None


def pod_directory(namespace: str, pod: str) -> str:
    """Name of the directory that an engine's pod shares with its node's agent; no name of Kubernetes has an underscore."""
    return f"{namespace}_{pod}"


def labels(stack: str) -> dict[str, str]:
    """What marks an object as part of a stack."""
    return {
        "app.kubernetes.io/name": "packetstack",
        "app.kubernetes.io/managed-by": "packetstack-operator",
        "app.kubernetes.io/component": "engine",
        "packetstack.io/stack": stack,
    }
