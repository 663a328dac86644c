"""The `PacketStack` resource: strict, immutable models and the errors that a user sees.

`load` takes YAML text, `parse` one document. Both give `PacketStack` values or raise `ResourceError`, whose
`problems` name the field, its value, and what would be right. Nothing else is ever raised.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, ErrorDetails, core_schema

API_VERSION = "packetstack.io/v1alpha1"
KIND = "PacketStack"

MAX_BYTES = 1 << 20
"""Largest text that `load` reads, in bytes."""
MAX_NAME = 52
"""Longest name of a stack: names derived from it must fit a DNS label of 63 characters."""
MIN_BUCKETS, MAX_BUCKETS = 256, 8192
MAX_CORES = 32
MAX_METRICS = 32
"""Of an autoscaler, and as many schedules: each is read, or looked up, at each decision."""
MAX_QUEUES = 64
MAX_REPLICAS = 1000
MAX_LISTENERS = 256
MAX_BACKENDS = 4096
MAX_SNAT_ADDRESSES = 1024
MAX_ALLOWED_SOURCES = 64
MAX_FLOWS_PER_BUCKET = 60_000
"""A shard links its entries by 16-bit indexes."""

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class ResourceError(ValueError):
    """A resource that cannot be accepted. `problems`: one line each, `path: value is wrong; what would be right`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems(ValueError):
    """Several problems of one model, found after its fields were read. Pairs of (path below the model, text)."""

    def __init__(self, found: list[tuple[tuple[str | int, ...], str]]) -> None:
        super().__init__(found)
        self.found = found


# ---- kinds of values -----------------------------------------------------------------------------------------


def show(value: object, limit: int = 60) -> str:
    """A value as a user would write it, on one line, at most `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def counted(number: int, what: str) -> str:
    """A number of things: "1 engine", "2 engines"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`; `what` it should be, for the error."""

    low: int
    high: int
    what: str = ""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "minimum": self.low, "maximum": self.high}

    def _check(self, value: int) -> int:
        if not self.low <= value <= self.high:
            wrong = f"is not {self.what}" if self.what else "is out of range"
            raise ValueError(f"{show(value)} {wrong}; use {self.low} to {self.high}")
        return value


@dataclass(frozen=True)
class Text:
    """A string that matches `pattern` and has at most `longest` characters; `what` it should be, and what to `use`."""

    pattern: str
    longest: int
    what: str
    use: str

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$", "maxLength": self.longest}

    def _check(self, value: str) -> str:
        if len(value) > self.longest:
            raise ValueError(f"{show(value)} has {len(value)} characters; use at most {self.longest}")
        if not re.fullmatch(self.pattern, value, re.ASCII):
            raise ValueError(f"{show(value)} is not {self.what}; use {self.use}")
        return value


_DNS_LABEL = Text(
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", 63, "a DNS label", "lower-case letters, digits and '-', as in \"edge-1\""
)
_STACK_NAME = Text(_DNS_LABEL.pattern, MAX_NAME, _DNS_LABEL.what, _DNS_LABEL.use)
DNS_NAME = Text(
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*",
    253,
    "a DNS name",
    "lower-case letters, digits, '-' and '.'",
)
_QUALIFIED = Text(
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?",
    316,
    "a qualified name",
    'a name as in "intel.com/sriov_vf"',
)
_PRINTABLE = Text(r"[\x20-\x7e]+", 1024, "printable text", "printable ASCII characters")

_SUFFIXES = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12),
    "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?(?:\d{1,18}(?:\.\d{0,9})?|\.\d{1,9}))(?:([eE][+-]?\d{1,2})|([a-zA-Z]{0,2}))", re.ASCII)


def quantity(text: str) -> Decimal:
    """The value of a Kubernetes quantity such as "512Mi", "0.05", "50m" or "1e3". Raises ValueError."""
    match = _QUANTITY.fullmatch(text)
    if match is None or (match[3] or "") not in _SUFFIXES:
        raise ValueError(f'{show(text)} is not a quantity; use a number with a unit, as in "512Mi"')
    return Decimal(match[1] + (match[2] or "")) * _SUFFIXES[match[3] or ""]


def _read_quantity(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value) if abs(value) < 1e18 else "too large"
    if isinstance(value, str):
        quantity(value)
    return value


def _read_bytes(value: object) -> object:
    value = _read_quantity(value)
    if isinstance(value, str):
        size = quantity(value)
        if size < 1 or size != size.to_integral_value() or size > 2**60:
            raise ValueError(f'{show(value)} is not a size in bytes; use a positive quantity, as in "512Mi"')
    return value


def _read_address(value: object) -> object:
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    if not isinstance(value, str):
        return show_kind(value, 'an IP address in quotes, as in "192.0.2.10"')
    try:
        address = ip_address(value)
    except ValueError:
        hint = " without a prefix length" if "/" in value else ""
        raise ValueError(
            f'{show(value)} is not an IP address; use one{hint}, as in "192.0.2.10" or "2001:db8::10"'
        ) from None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise ValueError(f"{show(value)} has a zone; use the address without '%{address.scope_id}'")
        if address.ipv4_mapped is not None:
            raise ValueError(f"{show(value)} is an IPv4-mapped address; use {address.ipv4_mapped}")
    if address.is_unspecified or address.is_multicast or address.is_loopback or address.is_link_local:
        raise ValueError(f"{show(value)} cannot be reached through a router; use a global or private unicast address")
    if address == IPv4Address("255.255.255.255"):
        raise ValueError(f"{show(value)} is the broadcast address; use a unicast address")
    return address


def _read_prefix(value: object) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str):
        show_kind(value, 'an address or a prefix in quotes, as in "192.0.2.64/28"')
    assert isinstance(value, str)
    base, slash, length = value.partition("/")
    if "%" in base:
        raise ValueError(f"{show(value)} has a zone; use the prefix without it")
    try:
        # A netmask such as /255.255.255.240 or /028 is understood by ip_network, but not by the API server's isCIDR.
        if slash and not re.fullmatch(r"0|[1-9]\d{0,2}", length, re.ASCII):
            raise ValueError
        network = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(
            f'{show(value)} is not an address or prefix; use one as in "192.0.2.64/28" or "2001:db8::40/122"'
        ) from None
    if network.network_address != ip_address(base):
        raise ValueError(f'{show(value)} has bits set behind the prefix length; use "{network}"')
    return network


def _read_source(value: object) -> object:
    network = _read_prefix(value)
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError(
            f'{show(value)} is not an address or prefix; use one as in "192.0.2.64/28" or "2001:db8::40/122"'
        )
    return network


def _read_network(value: object) -> object:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    network = _read_prefix(value)
    if network.num_addresses > MAX_SNAT_ADDRESSES:
        raise ValueError(f"{show(value)} has more than {MAX_SNAT_ADDRESSES} addresses; use a longer prefix")
    _read_address(str(value).partition("/")[0])
    return network


def show_kind(value: object, right: str) -> object:
    """Raises the error for a value of the wrong YAML kind."""
    raise ValueError(f"{show(value)} is {_kind(value)}; use {right}")


def _kind(value: object) -> str:
    if value is None:
        return "empty"
    names = {bool: "a boolean", int: "a number", float: "a decimal number", str: "a string", list: "a list"}
    return names.get(type(value), "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def _read_int_or_percent(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return show_kind(value, 'a whole number or a percentage, as in 1 or "25%"')
    if isinstance(value, str):
        if not re.fullmatch(r"\d{1,3}%", value, re.ASCII) or int(value[:-1]) > 100:
            raise ValueError(f'{show(value)} is not a percentage; use one from "0%" to "100%", or a whole number')
    elif not 0 <= value <= MAX_REPLICAS:
        raise ValueError(f"{show(value)} is out of range; use 0 to {MAX_REPLICAS}")
    return value


def _read_json(value: object) -> object:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        same = json.loads(text) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError(f"{show(value)} cannot be written as JSON; use plain strings, numbers, lists and mappings")
    return value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


T = TypeVar("T")
Items = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]
_AS_TEXT = PlainSerializer(str, return_type=str)
Ip = Annotated[Address, BeforeValidator(_read_address), _AS_TEXT, WithJsonSchema({"type": "string", "maxLength": 45})]
Cidr = Annotated[Network, BeforeValidator(_read_network), _AS_TEXT, WithJsonSchema({"type": "string", "maxLength": 49})]
Source = Annotated[
    Network, BeforeValidator(_read_source), _AS_TEXT, WithJsonSchema({"type": "string", "maxLength": 49})
]
Port = Annotated[int, Whole(1, 65535, "a port")]
Name = Annotated[str, _DNS_LABEL]
# The schemas of these are for Kubernetes, whose quantities are numbers or strings too.
_INT_OR_STRING = {"x-kubernetes-int-or-string": True}
Size = Annotated[str, BeforeValidator(_read_bytes), WithJsonSchema({**_INT_OR_STRING, "minimum": 1})]
Quantity = Annotated[str, BeforeValidator(_read_quantity), WithJsonSchema(_INT_OR_STRING)]
IntOrPercent = Annotated[
    int | str,
    BeforeValidator(_read_int_or_percent),
    WithJsonSchema({**_INT_OR_STRING, "minimum": 0, "maximum": MAX_REPLICAS, "pattern": "^(0?[0-9]{1,2}|100)%$"}),
]
Labels = dict[str, str]
Count = Annotated[int, Whole(0, MAX_REPLICAS, "a number of engines")]
Seconds = Annotated[int, Whole(1, 604_800, "a number of seconds")]
Opaque = Annotated[
    dict[str, Any],
    BeforeValidator(_read_json),
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""Handed to Kubernetes as it is."""


class Model(BaseModel):
    """What all parts of the resource share: immutable, no unknown fields, no silent conversions, camelCase in YAML."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=to_camel, hide_input_in_errors=True
    )

    def document(self) -> dict[str, Any]:
        """As YAML or JSON would hold it, defaults filled in, what is None left out; reading it gives the same value."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _exactly_one(model: Model, *names: str) -> None:
    given = [to_camel(n) for n in names if getattr(model, n) is not None]
    if len(given) != 1:
        has = f"has {' and '.join(given)}" if given else "is empty"
        raise ValueError(f"{has}; use exactly one of {', '.join(to_camel(n) for n in names)}")


# ---- engine --------------------------------------------------------------------------------------------------


class DevicePlugin(Model):
    """A virtual function that a Kubernetes device plugin hands out."""

    resource_name: Annotated[str, _QUALIFIED]
    """Of the device plugin, as in "intel.com/sriov_vf"."""
    network_attachment_definition: Annotated[str, _QUALIFIED]
    """What makes the device an interface of the pod: `name`, or `namespace/name`."""


class ResourceClaim(Model):
    """A virtual function by dynamic resource allocation."""

    resource_claim_template_name: Annotated[str, DNS_NAME]
    """A ResourceClaimTemplate in the stack's namespace."""


class Attachment(Model):
    """An interface that any CNI plugin makes; no device to allocate."""

    network_attachment_definition: Annotated[str, _QUALIFIED]
    """What makes the interface: `name`, or `namespace/name`."""


class Veth(Model):
    """A veth pair that the agent makes."""


class Interface(Model):
    """What the engine takes packets from: exactly one kind."""

    device_plugin: DevicePlugin | None = None
    resource_claim: ResourceClaim | None = None
    attachment: Attachment | None = None
    veth: Veth | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _exactly_one(self, "device_plugin", "resource_claim", "attachment", "veth")
        return self


class HugePages(Model):
    """Huge pages of an engine."""

    page_size: Literal["2Mi", "1Gi"] = "2Mi"
    """Of one page."""
    size: Size
    """Of all pages together; a multiple of `pageSize`."""

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        if quantity(self.size) % quantity(self.page_size):
            raise ValueError(f'has size "{self.size}"; use a multiple of pageSize {self.page_size}')
        return self


class TemplateMetadata(Model):
    """Labels and annotations that every engine pod gets."""

    labels: Labels = Field(default_factory=dict)
    """Beside PacketStack's own."""
    annotations: Labels = Field(default_factory=dict)
    """Beside PacketStack's own."""


class PodTemplate(Model):
    """Where engine pods may run. Without Kubernetes it has no effect."""

    metadata: TemplateMetadata = TemplateMetadata()
    """Labels and annotations that every engine pod gets."""
    node_selector: Labels = Field(default_factory=dict)
    """As of a pod."""
    tolerations: Items[Opaque] = ()
    """As of a pod."""
    affinity: Opaque = Field(default_factory=dict)
    """As of a pod."""
    topology_spread_constraints: Items[Opaque] = ()
    """As of a pod."""
    priority_class_name: Annotated[str, DNS_NAME] | None = None
    """As of a pod."""
    service_account_name: Annotated[str, DNS_NAME] | None = None
    """As of a pod; no token is mounted."""


class Engine(Model):
    """The shape of one engine."""

    mode: Literal["AFXDP", "DPDK"] = "AFXDP"
    """How packets reach user space. It cannot change later. `DPDK` is not built yet."""
    image: Annotated[str, _PRINTABLE] | None = None
    """Absent: the operator's own."""
    cores: Annotated[int, Whole(1, MAX_CORES, "a number of cores")] = 1
    """Worker threads."""
    cpu_policy: Literal["Exclusive", "Shared"] = "Shared"
    """`Exclusive`: whole pinned cores that poll before they sleep. `Shared`: cores sleep when idle."""
    queues_per_core: Annotated[int, Whole(1, MAX_QUEUES, "a number of queues")] = 4
    """Receive queues of each core; with `cores` at most 64 in all."""
    memory: Size = "512Mi"
    """Limit of the engine's processes; rings and flows are the agent's."""
    huge_pages: HugePages | None = None
    interface: Interface = Interface(veth=Veth())
    """What the engine takes packets from: exactly one kind. Absent: a veth pair."""
    pod_template: PodTemplate = PodTemplate()

    @model_validator(mode="after")
    def _queues_fit(self) -> Self:
        if self.queues > MAX_QUEUES:
            raise ValueError(
                f"has {self.cores} cores x {self.queues_per_core} queuesPerCore = {self.queues} queues; "
                f"use at most {MAX_QUEUES}"
            )
        return self

    @property
    def queues(self) -> int:
        """Receive queues of an engine."""
        return self.cores * self.queues_per_core

    @property
    def memory_bytes(self) -> int:
        """Memory limit of an engine, in bytes."""
        return int(quantity(self.memory))

    def template_hash(self) -> str:
        """Ten hexadecimal digits that differ when engines must be replaced."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


# ---- listeners -----------------------------------------------------------------------------------------------


class Endpoint(Model):
    """One backend. Weight 0: no new flows; live TCP flows stay."""

    address: Ip
    """IPv4 or IPv6, as the listener's."""
    port: Port
    """Where the backend listens."""
    weight: Annotated[int, Whole(0, 1000, "a weight")] = 1
    """Share of new flows. 0: none, live ones stay."""


class Service(Model):
    """Backends from a Kubernetes Service's EndpointSlices."""

    name: Name
    """In the stack's namespace."""
    port: Port
    """Of the Service, not of its pods."""


class Backends(Model):
    """Where a listener's flows go: exactly one kind."""

    service: Service | None = None
    endpoints: Items[Endpoint] | None = None
    """Addresses written out, each address and port once."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _exactly_one(self, "service", "endpoints")
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
    """Between two probes of a backend."""
    timeout_seconds: Annotated[int, Whole(1, 3600, "a number of seconds")] = 1
    """After which a probe has failed."""
    healthy_threshold: Annotated[int, Whole(1, 100, "a number of probes")] = 2
    """Probes in a row after which a backend is healthy."""
    unhealthy_threshold: Annotated[int, Whole(1, 100, "a number of probes")] = 3
    """Failures in a row after which it is not."""


class Listener(Model):
    """A virtual address, protocol and port, and its backends."""

    name: Name
    """Once per stack."""
    address: Ip
    """The virtual address, IPv4 or IPv6."""
    protocol: Literal["TCP", "UDP"] = "TCP"
    """Of the flows."""
    port: Port
    """The virtual port."""
    backends: Backends
    balancing: Literal["Maglev", "RoundRobin", "LeastFlows"] = "Maglev"
    """`Maglev`: by the flow's hash, few changes when backends change. `RoundRobin`: in turn. `LeastFlows`: fewest live
    flows per weight."""
    session_affinity: Literal["None", "ClientIP"] = "None"
    """`ClientIP`: all flows of a client address to one backend."""
    allowed_sources: Items[Source] | None = None
    """Addresses and prefixes of clients, 64 at most, of the listener's family; packets of others are dropped. Absent:
    everybody."""
    health_check: HealthCheck = HealthCheck()

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
        if sources is not None and not sources:
            found.append((("allowedSources",), "is empty; use at least one prefix, or leave it out for everybody"))
        if sources is not None and len(sources) > MAX_ALLOWED_SOURCES:
            text = f"has {len(sources)} prefixes; use at most {MAX_ALLOWED_SOURCES}"
            found.append((("allowedSources",), text))
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
    """What flows are dealt out by. It cannot change later."""
    max_flows: Annotated[int, Whole(1, MAX_BUCKETS * MAX_FLOWS_PER_BUCKET, "a number of flows")] = 1_000_000
    """What memory is set aside for."""
    tcp_idle_timeout_seconds: Seconds = 7440
    """An established connection without packets ends."""
    udp_idle_timeout_seconds: Seconds = 180
    """The same for UDP that was answered."""

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
    """`Transfer`: flows move with their bucket. `Mirror` is not built yet."""
    deadline_seconds: Seconds = 3600
    """For `Mirror`."""
    on_deadline: Literal["Keep", "Reset", "Transfer"] = "Keep"
    """For `Mirror`."""


class Rebalance(Model):
    """Whether load is evened out by moving queues and buckets."""

    mode: Literal["Auto", "Advice", "Off"] = "Auto"
    """`Auto`: they are moved. `Advice`: it is only said what would be. `Off`: nothing; numbers of buckets are even."""


class UpdateStrategy(Model):
    """How engines of another shape replace the present ones."""

    type: Literal["RollingUpdate"] = "RollingUpdate"
    """The only one."""
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


# ---- autoscaling: the shapes of autoscaling/v2 ---------------------------------------------------------------


class MetricTarget(Model):
    """What a metric shall be: the member that `type` names."""

    type: Literal["Utilization", "Value", "AverageValue"]
    """Names the member that is given."""
    average_utilization: Annotated[int, Whole(1, 10_000, "a percentage")] | None = None
    """Percent."""
    average_value: Quantity | None = None
    """Per engine."""
    value: Quantity | None = None
    """In all."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        member = {"Utilization": "average_utilization", "Value": "value", "AverageValue": "average_value"}[self.type]
        _exactly_one(self, "average_utilization", "value", "average_value")
        if getattr(self, member) is None:
            raise ValueError(f'has type "{self.type}" without {to_camel(member)}; use the member that type names')
        for name in ("value", "average_value"):
            text = getattr(self, name)
            if text is not None and quantity(text) <= 0:
                raise ValueError(f'has {to_camel(name)} "{text}"; use a quantity above 0')
        return self


class LabelSelector(Model):
    """As in Kubernetes."""

    match_labels: Labels = Field(default_factory=dict)
    """All of these."""
    match_expressions: Items[Opaque] = ()
    """As in Kubernetes."""


class MetricIdentifier(Model):
    """A metric of an external or custom metrics API."""

    name: Annotated[str, _PRINTABLE]
    """As the metrics API calls it."""
    selector: LabelSelector | None = None


class EngineMetric(Model):
    """A metric of the data plane, measured by the engines."""

    name: Literal["Utilization", "ActiveFlows", "NewFlowsPerSecond", "PacketsPerSecond", "BitsPerSecond", "DropRatio"]
    """`Utilization` has a target of that type, the others have an `AverageValue`."""
    target: MetricTarget

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if (self.name == "Utilization") != (self.target.type == "Utilization") or self.target.type == "Value":
            right = "Utilization" if self.name == "Utilization" else "AverageValue"
            raise ValueError(f'has target type "{self.target.type}" for {self.name}; use "{right}"')
        return self


class ResourceMetric(Model):
    """As in autoscaling/v2."""

    name: Annotated[str, _QUALIFIED]
    """`cpu` or `memory`."""
    target: MetricTarget


class ContainerResourceMetric(Model):
    """As in autoscaling/v2."""

    container: Name
    """Of the engine pods."""
    name: Annotated[str, _QUALIFIED]
    """`cpu` or `memory`."""
    target: MetricTarget


class PodsMetric(Model):
    """As in autoscaling/v2."""

    metric: MetricIdentifier
    target: MetricTarget


class ObjectReference(Model):
    """As in autoscaling/v2."""

    api_version: Annotated[str, _PRINTABLE] | None = None
    """As in autoscaling/v2."""
    kind: Annotated[str, _PRINTABLE]
    """As in autoscaling/v2."""
    name: Annotated[str, _PRINTABLE]
    """As in autoscaling/v2."""


class ObjectMetric(Model):
    """As in autoscaling/v2."""

    described_object: ObjectReference
    metric: MetricIdentifier
    target: MetricTarget


class ExternalMetric(Model):
    """As in autoscaling/v2."""

    metric: MetricIdentifier
    target: MetricTarget


class Metric(Model):
    """One metric: `type` and the member of that name."""

    type: Literal["Engine", "Resource", "ContainerResource", "Pods", "Object", "External"]
    """Names the member that is given."""
    engine: EngineMetric | None = None
    resource: ResourceMetric | None = None
    container_resource: ContainerResourceMetric | None = None
    pods: PodsMetric | None = None
    object: ObjectMetric | None = None
    external: ExternalMetric | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _exactly_one(self, "engine", "resource", "container_resource", "pods", "object", "external")
        member = self.type[0].lower() + self.type[1:]
        if next(iter(self.model_dump(exclude_none=True, exclude={"type"}, by_alias=True))) != member:
            raise ValueError(f'has type "{self.type}" without {member}; use the member that type names')
        return self


class ScalingPolicy(Model):
    """As in autoscaling/v2."""

    type: Literal["Pods", "Percent"]
    """Whether `value` counts engines or percent."""
    value: Annotated[int, Whole(1, 2**31 - 1, "a positive number")]
    """How much may change within the period."""
    period_seconds: Annotated[int, Whole(1, 1800, "a number of seconds")]
    """How far back changes count."""


class ScalingRules(Model):
    """As in autoscaling/v2. What is absent has the default of its direction."""

    stabilization_window_seconds: Annotated[int, Whole(0, 3600, "a number of seconds")] | None = None
    """How long a recommendation is remembered."""
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    """Which policy counts when several allow a change. `Disabled`: no scaling in this direction."""
    policies: Items[ScalingPolicy] | None = None
    """How fast. Absent: the default of the direction."""
    tolerance: Quantity | None = None
    """How far a metric may be off, as in "0.05"."""

    @model_validator(mode="after")
    def _checks(self) -> Self:
        if self.policies is not None and not self.policies:
            raise ValueError("has no policy; use at least one, or leave policies out for the default")
        if self.tolerance is not None and quantity(self.tolerance) < 0:
            raise ValueError(f'has tolerance "{self.tolerance}"; use a quantity of 0 or more')
        return self


class Behavior(Model):
    """As in autoscaling/v2."""

    scale_up: ScalingRules | None = None
    scale_down: ScalingRules | None = None


class Panic(Model):
    """Fast reaction to bursts, as Knative does it."""

    stable_window_seconds: Annotated[int, Whole(5, 600, "a number of seconds")] = 60
    """Length of the ordinary window."""
    window_percentage: Annotated[int, Whole(1, 100, "a percentage")] = 10
    """Length of the panic window, in percent of the ordinary one."""
    threshold_percentage: Annotated[int, Whole(110, 1000, "a percentage")] = 200
    """Load, in percent of what is there for it, that starts a panic."""


class Schedule(Model):
    """Other limits for some hours."""

    name: Name
    """Once per stack."""
    cron: Annotated[str, Text(r"\S+( \S+){4}", 100, "a cron schedule", 'five fields, as in "0 8 * * 1-5"')]
    """When it begins, as in "0 8 * * 1-5"."""
    time_zone: Annotated[str, Text(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", 64, "a time zone", '"Europe/Berlin"')] = "UTC"
    """Of `cron`, as in "Europe/Berlin"."""
    duration_seconds: Seconds
    """How long it lasts."""
    min_replicas: Count | None = None
    """Fewest engines while it lasts."""
    max_replicas: Count | None = None
    """Most engines while it lasts."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        _min_max(self.min_replicas, self.max_replicas)
        return self


class Fallback(Model):
    """What to do when metrics stay away, as KEDA does it."""

    failure_threshold: Annotated[int, Whole(1, 1000, "a number of failures")]
    """Failed readings in a row."""
    replicas: Count
    """Engines from then on."""


class Autoscaling(Model):
    """Scaling by load. Absent: a person, an HPA or KEDA writes `replicas`."""

    min_replicas: Count = 1
    """Fewest engines."""
    max_replicas: Annotated[int, Whole(1, MAX_REPLICAS, "a number of engines")]
    """Most engines."""
    metrics: Items[Metric] = ()
    """The one that asks for most engines counts."""
    behavior: Behavior | None = None
    sync_period_seconds: Annotated[int, Whole(1, 300, "a time in seconds")] = 15
    """Time between two decisions; the default is that of an HPA."""
    paused: bool = False
    """Decide, but change nothing."""
    panic: Panic | None = None
    schedules: Items[Schedule] = ()
    """Other limits for some hours."""
    fallback: Fallback | None = None

    @model_validator(mode="after")
    def _limits(self) -> Self:
        for what, found in (("metrics", self.metrics), ("schedules", self.schedules)):
            if len(found) > MAX_METRICS:
                raise ValueError(f"has {len(found)} {what}; use at most {MAX_METRICS}")
        _min_max(self.min_replicas, self.max_replicas)
        return self


def _min_max(low: int | None, high: int | None) -> None:
    if low is not None and high is not None and low > high:
        raise ValueError(f"has minReplicas {low} above maxReplicas {high}; use minReplicas <= maxReplicas")


class Spec(Model):
    """What the user wants."""

    replicas: Count = 1
    """Engines."""
    paused: bool = False
    """Change nothing, keep serving."""
    engine: Engine = Engine()
    listeners: Items[Listener]
    """What clients connect to."""
    snat: Snat
    unknown_flow: Literal["Drop", "Reset"] = "Drop"
    """What happens to TCP without a flow."""
    flow_table: FlowTable = FlowTable()
    handover: Handover = Handover()
    rebalance: Rebalance = Rebalance()
    update_strategy: UpdateStrategy = UpdateStrategy()
    autoscaling: Autoscaling | None = None

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        found = [*self._check_snat(), *self._check_listeners()]
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

    def _check_listeners(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        listeners = self.listeners
        if not listeners:
            yield ("listeners",), "is empty; use at least one listener"
        if len(listeners) > MAX_LISTENERS:
            yield ("listeners",), f"has {len(listeners)} listeners; use at most {MAX_LISTENERS}"
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

# Written by the API server; read back in by `kubectl get -o yaml | packetstack up -`.
_SERVER_FIELDS = (
    "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds",
    "managedFields", "ownerReferences", "finalizers", "selfLink", "generateName",
)  # fmt: skip


class Metadata(Model):
    """Name and labels."""

    name: Annotated[str, _STACK_NAME]
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

    def prefixes(self) -> tuple[Network, ...]:
        """What has to be routed to the stack: its virtual addresses and its SNAT prefixes."""
        return (*(ip_network(a) for a in self.virtual_addresses()), *self.spec.snat.addresses)

    def listening(self) -> set[tuple[Address, int, str]]:
        """Address, port and protocol of each listener."""
        return {(listener.address, listener.port, listener.protocol) for listener in self.spec.listeners}

    def with_replicas(self, replicas: int) -> "PacketStack":
        """The resource with another spec.replicas. ResourceError for one that it cannot have."""
        document = self.document()
        document["spec"]["replicas"] = replicas
        return parse(document)


def parse(document: Mapping[str, Any]) -> PacketStack:
    """One YAML document, already read. Raises ResourceError with all that is wrong."""
    if not isinstance(document, Mapping):
        raise ResourceError([f"document: {show(document)} is {_kind(document)}; use a mapping with kind {KIND}"])
    if isinstance(kind := document.get("kind", KIND), str) and kind != KIND:  # its fields are not ours to judge
        if difflib.get_close_matches(kind[:100], [KIND], 1, 0.8):
            raise ResourceError([f"kind: {show(kind)} is unknown; did you mean {KIND}?"])
        raise ResourceError([f"kind: {show(kind)} cannot be read here; use {KIND}, and kubectl apply for other kinds"])
    try:
        return PacketStack.model_validate(dict(document))
    except ValidationError as e:
        raise ResourceError([line for error in e.errors() for line in describe(error, PacketStack)]) from None
    except RecursionError:
        raise ResourceError(["document: is nested too deeply; use the fields that the documentation names"]) from None


def check_change(old: PacketStack, new: PacketStack) -> None:
    """Raises ResourceError if `new` changes what cannot change during a stack's life."""
    problems = []
    for path, was, wanted in (
        ("metadata.name", old.name, new.name),
        ("spec.engine.mode", old.spec.engine.mode, new.spec.engine.mode),
        ("spec.flowTable.buckets", old.spec.flow_table.buckets, new.spec.flow_table.buckets),
    ):
        if was != wanted:
            problems.append(f"{path}: {show(wanted)} cannot replace {show(was)}; keep it, or create another stack")
    if problems:
        raise ResourceError(problems)


# ---- YAML ----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys (the last would silently win) and aliases (they can grow without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        events: Any = self
        if events.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="an alias; write the value out", problem_mark=events.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{show(key.value)} occurs twice; use each field once", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(text: str) -> list[PacketStack]:
    """All documents of a YAML text; empty ones are left out. Raises ResourceError."""
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise ResourceError([f"file: has {size} bytes; use at most {MAX_BYTES}"])
    try:
        documents = list(yaml.load_all(text, _Loader))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        raise ResourceError([f"{where}: {_one_line(e.problem or e.context)}"]) from None
    except RecursionError:
        raise ResourceError(["file: is nested too deeply; use the fields that the documentation names"]) from None
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as e:
        # PyYAML's constructors raise these for values such as `0x_` or `!!int ""`.
        raise ResourceError([f"file: is not YAML that can be read ({_one_line(str(e))}); use plain values"]) from None
    stacks: list[PacketStack] = []
    problems: list[str] = []
    present = [(i, d) for i, d in enumerate(documents) if d is not None]
    for i, document in present:
        try:
            stacks.append(parse(document))
        except ResourceError as e:
            problems += [f"document {i + 1}: {p}" if len(present) > 1 else p for p in e.problems]
    if not present:
        problems.append(f"file: is empty; use a document with kind {KIND}")
    names: dict[str, int] = {}
    for i, stack in enumerate(stacks):
        if names.setdefault(stack.name, i) != i:
            problems.append(f"metadata.name: {show(stack.name)} occurs in two documents; use a name once")
    if problems:
        raise ResourceError(problems)
    return stacks


# ---- errors --------------------------------------------------------------------------------------------------


def _one_line(text: str | None) -> str:
    return " ".join((text or "cannot be read").split())[:200]


def _path(parts: tuple[str | int, ...]) -> str:
    text = ""
    for part in parts:
        name = "".join(c if c.isprintable() else "?" for c in str(part))[:60]
        text += f"[{part}]" if isinstance(part, int) else f".{name}" if text else name
    return text or "document"


_EXPECTED = {
    "int_type": "a whole number",
    "string_type": "a string; put it in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_MISSING: dict[str, str] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": "metadata with a name",
    "name": "a name",
    "spec": "spec with listeners and snat",
    "listeners": "at least one listener",
    "snat": "addresses, as in {addresses: [192.0.2.64/28]}",
    "addresses": 'at least one address or prefix, as in "192.0.2.64/28"',
    "address": "an IP address",
    "port": "1 to 65535",
    "backends": "endpoints or a service",
}


def describe(error: ErrorDetails, root: type[BaseModel]) -> Iterator[str]:
    """The lines for one error of a model; `root` is the model of the whole document."""
    path, kind, value = error["loc"], error["type"], error["input"]
    context = error.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, Problems):
        for below, text in cause.found:
            yield f"{_path((*path, *below))}: {text}"
    elif kind == "value_error":
        yield f"{_path(path)}: {cause}"
    elif kind == "missing":
        yield f"{_path(path)}: is missing; use {_MISSING.get(str(path[-1]), 'a value')}"
    elif kind in ("extra_forbidden", "invalid_key"):
        known = _fields_at(root, path[:-1])
        close = difflib.get_close_matches(str(path[-1])[:100], known, 1)
        right = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}" if known else "leave it out"
        yield f"{_path(path)}: is an unknown field; {right}"
    elif kind == "literal_error":
        right = str(context["expected"]).replace("'", '"')
        hint = " (in quotes: YAML reads a bare Off as false)" if isinstance(value, bool) and '"Off"' in right else ""
        yield f"{_path(path)}: {show(value)} is not allowed here; use {right}{hint}"
    elif kind in _EXPECTED:
        yield f"{_path(path)}: {show(value)} is {_kind(value)}; use {_EXPECTED[kind]}"
    else:
        yield f"{_path(path)}: {show(value)} is wrong: {_one_line(error['msg'])}"


def _fields_at(root: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Names of the fields that the mapping at `path` may have."""
    model: type[BaseModel] | None = root
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = next((f for f in model.model_fields.values() if f.alias == part), None)
        model = _model_in(field.annotation) if field else None
    return [f.alias or "" for f in model.model_fields.values()] if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner: Callable[[Any], tuple[Any, ...]] = lambda a: getattr(a, "__args__", ())  # noqa: E731
    return next((m for a in inner(annotation) if (m := _model_in(a))), None)
