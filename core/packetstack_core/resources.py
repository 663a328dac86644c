"""The `PacketStack` resource: strict, immutable models of what its user writes."""

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)
from pydantic.alias_generators import to_camel

from packetstack_core.autoscalers import Autoscaling
from packetstack_core.engines import Engine
from packetstack_core.limits import (
    MAX_ALLOWED_SOURCES,
    MAX_BACKENDS,
    MAX_BUCKETS,
    MAX_FLOWS_PER_BUCKET,
    MAX_LISTENERS,
    MAX_QUEUES,
    MAX_SNAT_ADDRESSES,
    MIN_BUCKETS,
)
from packetstack_core.values import (
    STACK_NAME,
    Address,
    Cidr,
    Count,
    IntOrPercent,
    Ip,
    Items,
    Labels,
    Length,
    Model,
    Name,
    Network,
    Port,
    Problems,
    Seconds,
    ShortSeconds,
    Source,
    Whole,
    exactly_one,
)
from packetstack_core.wording import show

API_VERSION = "packetstack.io/v1alpha1"
KIND = "PacketStack"


# ---- listeners -----------------------------------------------------------------------------------------------


class Endpoint(Model):
    """One backend. Weight 0: no new flows; live TCP flows stay."""

    address: Ip
    """Address of the backend, of the listener's family."""
    port: Port
    """Port that the backend listens on."""
    weight: Annotated[int, Whole(0, 1000, "a weight")] = 1
    """Part of the new flows, in proportion to the other backends' weights. 0: no new flows; live TCP flows stay."""


class Service(Model):
    """Backends from a Kubernetes Service's EndpointSlices."""

    name: Name
    """Name of a Service in the stack's namespace."""
    port: Port
    """Number of the Service's port, not of its pods'."""


class Backends(Model):
    """Where a listener's flows go: exactly one kind."""

    service: Service | None = None
    """Pods of a Service, by its EndpointSlices; needs Kubernetes."""
    endpoints: Items[Endpoint] | None = None
    """Addresses written out, each address and port once."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        exactly_one(self, "service", "endpoints")
        seen: dict[tuple[Address, int], int] = {}
        found: list[tuple[tuple[str | int, ...], str]] = []
        for i, e in enumerate(self.endpoints or ()):
            first = seen.setdefault((e.address, e.port), i)
            if first != i:
                text = f"{e.address} port {e.port} is already endpoints[{first}]; use each backend once, with a weight"
                found.append((("endpoints", i), text))
        if found:
            raise Problems(found)
        return self


class HealthCheck(Model):
    """How the agent probes endpoints. A probe is a TCP connection; `None` takes all backends for healthy."""

    type: Literal["TCP", "None"] = "TCP"
    """`TCP`: a connection. `None`: all backends are healthy. Absent: `None` for UDP, `TCP` for TCP."""
    interval_seconds: Annotated[int, Whole(1, 3600, "a number of seconds")] = 2
    """Seconds between two probes of a backend."""
    timeout_seconds: Annotated[int, Whole(1, 3600, "a number of seconds")] = 1
    """Seconds after which a probe without an answer has failed."""
    healthy_threshold: Annotated[int, Whole(1, 100, "a number of probes")] = 2
    """Successful probes in a row after which a backend is healthy and gets new flows."""
    unhealthy_threshold: Annotated[int, Whole(1, 100, "a number of probes")] = 3
    """Failed probes in a row after which a backend is unhealthy and gets no new flows."""


class Limits(Model):
    """How much one listener may have. What is absent is not limited, beside the fair shares that all listeners get.

    Flows count once they are proven: TCP whose client has completed the handshake, UDP with questions and answers over
    some time. So forged sources use up nobody's allowance.
    """

    max_flows: Annotated[int, Whole(1, MAX_BUCKETS * MAX_FLOWS_PER_BUCKET, "a number of flows")] | None = None
    """Proven flows, over all engines of the node. Beyond it openers are dropped as `limit_flows`."""
    new_flows_per_second: Annotated[int, Whole(1, 10_000_000, "a number of flows")] | None = None
    """Openers a second, over all engines; as many may come at once. Others are dropped as `limit_rate`."""
    max_flows_per_client: Annotated[int, Whole(1, MAX_BUCKETS * MAX_FLOWS_PER_BUCKET, "a number of flows")] | None = (
        None
    )
    """Proven flows of one client address. Beyond it openers are dropped as `limit_client`."""


Sources = Annotated[
    Items[Source],
    Length(1, MAX_ALLOWED_SOURCES, "prefixes", "at least one prefix, or leave it out for everybody"),
]


class Listener(Model):
    """A virtual address, protocol and port, and its backends."""

    name: Name
    """Name of the listener, unique in the stack."""
    address: Ip
    """Virtual address that clients connect to, IPv4 or IPv6. It must be configured on no interface."""
    protocol: Literal["TCP", "UDP"] = "TCP"
    """Protocol of the flows that the listener takes."""
    port: Port
    """Port that clients connect to."""
    backends: Backends
    """Servers that flows go to."""
    balancing: Literal["Maglev", "RoundRobin", "LeastFlows"] = "Maglev"
    """`Maglev`: by the flow's hash, few changes when backends change. `RoundRobin`: in turn. `LeastFlows`: fewest live
    flows per weight."""
    session_affinity: Literal["None", "ClientIP"] = "None"
    """`ClientIP`: all flows of a client address to one backend."""
    allowed_sources: Sources | None = None
    """Addresses and prefixes of clients, 64 at most, of the listener's family; packets of others are dropped. Absent:
    everybody."""
    health_check: HealthCheck = HealthCheck()
    """How backends are probed."""
    on_backend_down: Literal["Keep", "Reset"] = "Keep"
    """Live TCP flows of a backend that fails its health check. `Keep`: their packets go on to it. `Reset`: the client's
    next packet is answered by a reset. UDP flows go to another backend either way."""
    on_no_backend: Literal["Drop", "Reset"] = "Drop"
    """A SYN that finds no backend: `Drop`, or `Reset` so that the client learns of it at once."""
    slow_start_seconds: Annotated[int, Whole(0, 3600, "a number of seconds")] = 0
    """Time in which the weight of a backend that was added, or is healthy again, rises from a small part to all of it.
    0: at once."""
    limits: Limits = Limits()
    """How much the listener may have. Absent: no limit beside the fair share of all listeners."""

    @model_validator(mode="before")
    @classmethod
    def _udp_is_not_probed_by_tcp(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("protocol") == "UDP":
            check = value.get("healthCheck", {})
            if isinstance(check, dict) and "type" not in check:
                return {**value, "healthCheck": {"type": "None", **check}}
        return value

    @model_validator(mode="after")
    def _sources(self) -> Self:
        sources, version = self.allowed_sources, self.address.version
        found: list[tuple[tuple[str | int, ...], str]] = []
        for i, source in enumerate(sources or ()):
            if source.version != version:
                text = f'"{source}" is IPv{source.version}, the listener IPv{version}; use prefixes of its family'
                found.append((("allowedSources", i), text))
            elif source in (sources or ())[:i]:
                found.append((("allowedSources", i), f'"{source}" is there already; use each prefix once'))
        if found:
            raise Problems(found)
        return self


# ---- the rest of the specification ---------------------------------------------------------------------------


class Snat(Model):
    """Source addresses of the packets that go to backends."""

    addresses: Items[Cidr]
    """Addresses and prefixes, 1024 addresses at most. Every address of a prefix is used; each listener needs one of its
    family."""


class FlowTable(Model):
    """Size and time limits. `buckets` cannot be changed later."""

    buckets: int = 4096
    """Buckets that flows are hashed into, a power of two; what moves between engines. It cannot change later."""
    max_flows: Annotated[int, Whole(1, MAX_BUCKETS * MAX_FLOWS_PER_BUCKET, "a number of flows")] = 1_000_000
    """Flows that memory is set aside for when the stack is made; a change has no effect on a stack that runs."""
    tcp_idle_timeout_seconds: Seconds = 7440
    """Seconds without a packet after which an established connection is forgotten. RFC 5382 asks for 7440 at least."""
    tcp_opening_timeout_seconds: ShortSeconds = 60
    """Seconds without a packet after which a connection is forgotten whose handshake is not complete."""
    tcp_half_close_timeout_seconds: Seconds = 240
    """Seconds without a packet after which a connection is forgotten that one side has closed. RFC 5382 asks for 240 at
    least."""
    tcp_closed_timeout_seconds: ShortSeconds = 240
    """Seconds for which a connection is remembered that both sides have closed, or a reset has ended. Its place and
    port are given away sooner when they are needed."""
    tcp_time_wait_timeout_seconds: ShortSeconds = 60
    """Seconds for which backends keep TIME_WAIT: the port of a connection that the backend closed first goes to no
    other client before."""
    udp_idle_timeout_seconds: Seconds = 180
    """Seconds without a packet after which a UDP flow is forgotten that was answered. RFC 4787 asks for 120 at least."""
    udp_unanswered_timeout_seconds: ShortSeconds = 120
    """Seconds without a packet after which a UDP flow is forgotten that was never answered; sooner when its place or
    port is needed."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        found: list[tuple[tuple[str | int, ...], str]] = []
        if not MIN_BUCKETS <= self.buckets <= MAX_BUCKETS or self.buckets & (self.buckets - 1):
            powers = ", ".join(str(MIN_BUCKETS << i) for i in range((MAX_BUCKETS // MIN_BUCKETS).bit_length()))
            found.append((("buckets",), f"{show(self.buckets)} is not a number of buckets; use one of {powers}"))
        elif self.max_flows > self.buckets * MAX_FLOWS_PER_BUCKET:
            most = self.buckets * MAX_FLOWS_PER_BUCKET
            found.append((("maxFlows",), f"{self.max_flows} does not fit {self.buckets} buckets; use at most {most}"))
        if found:
            raise Problems(found)
        return self


class Handover(Model):
    """How ownership of buckets changes. The deadline applies to `Mirror`."""

    strategy: Literal["Transfer", "Mirror"] = "Transfer"
    """`Transfer`: flows move with their bucket. `Mirror`: a second set of engines takes what is new, and the first keeps its
    flows until they have ended."""
    deadline_seconds: Seconds = 3600
    """Seconds after which `onDeadline` applies to the flows that have not ended; for `Mirror` alone."""
    on_deadline: Literal["Keep", "Reset", "Transfer"] = "Keep"
    """What happens to flows that have not ended at the deadline; for `Mirror` alone. `Transfer` is not built yet."""
    policy: Literal["Hold", "Hurry"] | None = None
    """What becomes of a change that comes while flows of the one before have not ended. `Hold`, the default: it waits.
    `Hurry`: the deadline comes at once, unless `onDeadline` is `Keep`. More engines of the same shape never wait. For
    `Mirror` alone."""


class Rebalance(Model):
    """Whether load is evened out by moving queues and buckets."""

    mode: Literal["Auto", "Advice", "Off"] = "Auto"
    """`Auto`: buckets and queues are moved by load. `Advice`: an event says what would be moved. `Off`: buckets are
    dealt out by number."""


class Repair(Model):
    """What happens to an engine that does not serve any more."""

    replace_after_seconds: Annotated[int, Whole(0, 86_400, "a number of seconds")] = 60
    """Seconds without a datapath after which its buckets go to others and another engine is made for it. 0: never."""


class UpdateStrategy(Model):
    """How engines of another shape replace the present ones."""

    type: Literal["RollingUpdate"] = "RollingUpdate"
    """`RollingUpdate`, the only one: engines are replaced one after the other, and hand their buckets over."""
    max_surge: IntOrPercent = 1
    """Engines allowed beyond `replicas`, as a number or a percentage (rounded up)."""
    max_unavailable: IntOrPercent = 0
    """Engines that may be missing, as a number or a percentage (rounded down)."""

    @model_validator(mode="after")
    def _can_go_on(self) -> Self:
        if self.max_surge in (0, "0%") and self.max_unavailable in (0, "0%"):
            raise ValueError("has maxSurge 0 and maxUnavailable 0, so no engine could be replaced; use 1 for either")
        return self

    def surge(self, replicas: int) -> int:
        """Engines allowed beyond `replicas`; percentages are rounded up."""
        return _resolve(self.max_surge, replicas, up=True)

    def unavailable(self, replicas: int) -> int:
        """Engines that may be missing; percentages are rounded down, but never both limits to 0."""
        return max(_resolve(self.max_unavailable, replicas, up=False), 1 - min(1, self.surge(replicas)))


def _resolve(value: int | str, replicas: int, up: bool) -> int:
    if isinstance(value, int):
        return value
    part = int(value[:-1]) * replicas
    return -(-part // 100) if up else part // 100


class Spec(Model):
    """What the user wants."""

    replicas: Count = 1
    """Engines that the stack shall have. Leave it out with `autoscaling`, or with an HPA."""
    paused: bool = False
    """Engines and buckets stay as they are and go on serving; backends are still followed."""
    engine: Engine = Engine()
    """Shape of each engine: cores, memory, interface, pod."""
    listeners: Annotated[Items[Listener], Length(1, MAX_LISTENERS, "listeners", "at least one listener")]
    """Virtual addresses that clients connect to, each with its backends."""
    snat: Snat
    """Source addresses of the packets that go to backends."""
    unknown_flow: Literal["Drop", "Reset"] = "Drop"
    """What happens to TCP packets that belong to no flow and open none: they are dropped, or answered by a reset."""
    flow_table: FlowTable = FlowTable()
    """Number of buckets and flows, and how long flows are remembered."""
    handover: Handover = Handover()
    """How a bucket goes to another engine."""
    rebalance: Rebalance = Rebalance()
    """Whether buckets and queues are moved by load."""
    repair: Repair = Repair()
    """What happens to an engine that does not serve any more."""
    update_strategy: UpdateStrategy = UpdateStrategy()
    """How engines of another shape replace the present ones."""
    autoscaling: Autoscaling | None = None
    """Scaling by load. Absent: a person, an HPA or KEDA writes `replicas`."""

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        found = [*self._check_snat(), *self._check_listeners(), *self._check_largest_engine()]
        if found:
            raise Problems(found)
        return self

    def _check_snat(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        networks = self.snat.addresses
        if not networks:
            yield ("snat", "addresses"), 'is empty; use at least one address or prefix, as in "192.0.2.64/28"'
        total = sum(n.num_addresses for n in networks)
        if total > MAX_SNAT_ADDRESSES:
            yield ("snat", "addresses"), f"has {total} addresses in all; use at most {MAX_SNAT_ADDRESSES}"
        for i, network in enumerate(networks):
            for j in range(i):
                if networks[j].version == network.version and networks[j].overlaps(network):
                    yield (
                        ("snat", "addresses", i),
                        f'"{network}" overlaps "{networks[j]}"; use each address once',
                    )

    def _check_largest_engine(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        vertical = self.autoscaling and self.autoscaling.vertical
        if vertical and vertical.max_cores * self.engine.queues_per_core > MAX_QUEUES:
            each = self.engine.queues_per_core
            text = f"has maxCores {vertical.max_cores} x {each} queuesPerCore = {vertical.max_cores * each} queues"
            yield ("autoscaling", "vertical"), f"{text}; use at most {MAX_QUEUES}"

    def _check_listeners(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        listeners = self.listeners
        total = sum(len(b.backends.endpoints or ()) for b in listeners)
        if total > MAX_BACKENDS:
            yield ("listeners",), f"has {total} backends in all; use at most {MAX_BACKENDS}"
        names: dict[str, int] = {}
        places: dict[tuple[Address, str, int], int] = {}
        virtual = {listener.address for listener in listeners}
        for i, listener in enumerate(listeners):
            at = ("listeners", i)
            if names.setdefault(listener.name, i) != i:
                text = f"{show(listener.name)} is already listeners[{names[listener.name]}]; use a name once"
                yield (*at, "name"), text
            place = (listener.address, listener.protocol, listener.port)
            if places.setdefault(place, i) != i:
                text = f"{listener.protocol} {listener.address} port {listener.port} is already listener"
                yield at, f"{text} {show(listeners[places[place]].name)}; use another address, protocol or port"
            version = listener.address.version
            if any(listener.address in n for n in self.snat.addresses if n.version == version):
                text = f'"{listener.address}" is a SNAT address too; use an address outside of spec.snat.addresses'
                yield (*at, "address"), text
            if self.snat.addresses and all(n.version != version for n in self.snat.addresses):
                text = f'"{listener.address}" is IPv{version}, but no SNAT address is'
                yield (*at, "address"), f"{text}; add an IPv{version} prefix to spec.snat.addresses"
            for j, endpoint in enumerate(listener.backends.endpoints or ()):
                path = (*at, "backends", "endpoints", j, "address")
                if endpoint.address.version != version:
                    text = f'"{endpoint.address}" is IPv{endpoint.address.version}, the listener IPv{version}'
                    yield path, f"{text}; use one family (PacketStack does not translate between them)"
                elif endpoint.address in virtual or any(
                    endpoint.address in n for n in self.snat.addresses if n.version == version
                ):
                    text = f'"{endpoint.address}" is an address of this stack, so packets would go in circles'
                    yield path, f"{text}; use the backend's own address"


# ---- the resource --------------------------------------------------------------------------------------------

_LEAST_TIMEOUTS = (
    ("tcp_idle_timeout_seconds", 7440, "RFC 5382 (REQ-5)", "connections end that are only silent"),
    ("tcp_half_close_timeout_seconds", 240, "RFC 5382 (REQ-5)", "answers may be cut off after the client's FIN"),
    ("udp_idle_timeout_seconds", 120, "RFC 4787 (REQ-5)", "flows end that are only silent"),
    ("udp_unanswered_timeout_seconds", 120, "RFC 4787 (REQ-5)", "late answers are dropped"),
)
"""Field of spec.flowTable, seconds that it should have, who says so, and what less of it means for traffic."""

# Written by the API server; read back in by `kubectl get -o yaml | packetstack up -`.
_SERVER_FIELDS = (
    "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds",
    "managedFields", "ownerReferences", "finalizers", "selfLink", "generateName",
)  # fmt: skip


class Metadata(Model):
    """Name and labels."""

    name: Annotated[str, STACK_NAME]
    namespace: Name = "default"
    labels: Labels = Field(default_factory=dict)
    annotations: Labels = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_server_fields(cls, value: object) -> object:
        return {k: v for k, v in value.items() if k not in _SERVER_FIELDS} if isinstance(value, dict) else value


class PacketStack(Model):
    """One stack as its user describes it."""

    api_version: Literal["packetstack.io/v1alpha1"]
    kind: Literal["PacketStack"]
    metadata: Metadata
    spec: Spec

    @model_validator(mode="before")
    @classmethod
    def _without_status(cls, value: object) -> object:
        return {k: v for k, v in value.items() if k != "status"} if isinstance(value, dict) else value

    @property
    def name(self) -> str:
        """The stack's name."""
        return self.metadata.name

    def snat_addresses(self) -> tuple[Address, ...]:
        """All SNAT addresses, in the order written. All of a prefix count: they are routed, not on a link."""
        return tuple(network[i] for network in self.spec.snat.addresses for i in range(network.num_addresses))

    def virtual_addresses(self) -> tuple[Address, ...]:
        """The listeners' addresses, each once, in the order written."""
        return tuple(dict.fromkeys(listener.address for listener in self.spec.listeners))

    def advice(self) -> list[str]:
        """What is allowed and will most likely be regretted: one line each, `path: value; what it means`."""
        table = self.spec.flow_table
        return [
            f"spec.flowTable.{to_camel(name)}: {getattr(table, name)} is below the {least} of {rfc}; {means}"
            for name, least, rfc, means in _LEAST_TIMEOUTS
            if getattr(table, name) < least
        ]

    def prefixes(self) -> tuple[Network, ...]:
        """What has to be routed to the stack: its virtual addresses and its SNAT prefixes."""
        return (*(ip_network(a) for a in self.virtual_addresses()), *self.spec.snat.addresses)

    def listening(self) -> set[tuple[Address, int, str]]:
        """Address, port and protocol of each listener."""
        return {(listener.address, listener.port, listener.protocol) for listener in self.spec.listeners}
