"""Kinds of values that the fields of a resource hold, and `Model`, the base of all models.

A wrong value raises ValueError with the sentence `value is wrong; what would be right`, which `reading` completes by
the path of the field.
"""

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, core_schema

from packetstack_core.limits import MAX_NAME, MAX_REPLICAS, MAX_SNAT_ADDRESSES
from packetstack_core.wording import kind_of, show

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Problems(ValueError):
    """Several problems of one model, found after its fields were read. Pairs of (path below the model, text)."""

    def __init__(self, found: list[tuple[tuple[str | int, ...], str]]) -> None:
        super().__init__(found)
        self.found = found


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
class Length:
    """A list with a number of items from `low` to `high`; what they are called, and what to `use` instead of none."""

    low: int
    high: int
    items: str
    use: str = ""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), **({"minItems": self.low} if self.low else {}), "maxItems": self.high}

    def _check(self, value: tuple[object, ...]) -> tuple[object, ...]:
        if len(value) > self.high:
            raise ValueError(f"has {len(value)} {self.items}; use at most {self.high}")
        if len(value) < self.low:
            raise ValueError(f"is empty; use {self.use}")
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


DNS_LABEL = Text(
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", 63, "a DNS label", "lower-case letters, digits and '-', as in \"edge-1\""
)
STACK_NAME = Text(DNS_LABEL.pattern, MAX_NAME, DNS_LABEL.what, DNS_LABEL.use)
DNS_NAME = Text(
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*",
    253,
    "a DNS name",
    "lower-case letters, digits, '-' and '.'",
)
QUALIFIED_NAME = Text(
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?",
    316,
    "a qualified name",
    'a name as in "intel.com/sriov_vf"',
)
PRINTABLE = Text(r"[\x20-\x7e]+", 1024, "printable text", "printable ASCII characters")

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
        return _refuse_kind(value, 'an IP address in quotes, as in "192.0.2.10"')
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
        _refuse_kind(value, 'an address or a prefix in quotes, as in "192.0.2.64/28"')
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


def _refuse_kind(value: object, right: str) -> object:
    """Raises the error for a value of the wrong YAML kind."""
    raise ValueError(f"{show(value)} is {kind_of(value)}; use {right}")


def _read_int_or_percent(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return _refuse_kind(value, 'a whole number or a percentage, as in 1 or "25%"')
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
Name = Annotated[str, DNS_LABEL]
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
ShortSeconds = Annotated[int, Whole(1, 3600, "a number of seconds")]
Opaque = Annotated[
    dict[str, Any],
    BeforeValidator(_read_json),
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""Handed to Kubernetes as it is."""


class Model(BaseModel):
    """What all parts of the resource share: immutable, no unknown fields, no silent conversions, camelCase in YAML."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=to_camel, hide_input_in_errors=True, defer_build=True
    )

    def document(self) -> dict[str, Any]:
        """As YAML or JSON would hold it, defaults filled in, what is None left out; reading it gives the same value."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def exactly_one(model: Model, *names: str) -> None:
    given = [to_camel(n) for n in names if getattr(model, n) is not None]
    if len(given) != 1:
        has = f"has {' and '.join(given)}" if given else "is empty"
        raise ValueError(f"{has}; use exactly one of {', '.join(to_camel(n) for n in names)}")
