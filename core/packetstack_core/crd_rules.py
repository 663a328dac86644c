"""What the API server checks and is told beside the shape of a field: rules in CEL, bounds of their cost, kinds of lists.

What one value can be is in the models' own schema; what several values must be together is a rule here, with the words
of `resources`. A path of the API server ends before an index where the rule sees a whole list. These stay with the
operator, as conditions, because a rule for them would cost more than an API server allows: more than MAX_BACKENDS in
all, backends that are the address of another listener or a SNAT address, and one address written in two ways.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from packetstack_core import autoscalers, kinds, limits, resources, vertical_autoscalers
from packetstack_core.engines import Engine, HugePages, Interface, PodTemplate
from packetstack_core.limits import MAX_FLOWS_PER_BUCKET, MAX_NAME, MAX_QUEUES, MAX_SNAT_ADDRESSES
from packetstack_core.statuses import PacketStackStatus

MAX_LISTENER_ENDPOINTS = 512
"""Endpoints that one listener may have in a PacketStack: each is checked by rules, whose cost is limited."""
MAX_SNAT_PREFIXES = 64
"""Items of `snat.addresses` in a PacketStack, for the same reason."""

Json = dict[str, Any]


# CEL compares what is there; absent fields have to be asked for with has(), unless they have a default.


def _rule(rule: str, says: str, *values: str, path: str = "", reason: str = "") -> Json:
    """A rule; `says` with a %s for each of `values`, expressions that are strings. `path`: the field below at fault.

    Messages are made by format(): other ways to add strings cost too much where no length is known.
    """
    text = _text(says)
    message = {"messageExpression": f"{text}.format([{', '.join(values)}])"} if values else {"message": says}
    return {"rule": rule, **message, **({"fieldPath": path} if path else {}), **({"reason": reason} if reason else {})}


def _text(words: str) -> str:
    return "'" + words.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _either(*cases: tuple[str, str], otherwise: str) -> str:
    """The text of the first condition that holds."""
    return "(" + "".join(f"{condition} ? {text} : " for condition, text in cases) + f"{otherwise})"


def _exactly_one(*names: str) -> Json:
    given = "[" + ", ".join(f"has(self.{name}) ? '{name}' : ''" for name in names) + "].filter(n, n != '')"
    some = f"'has %s and %s'.format([{given}[0], {given}[1]])"
    empty = (f"{given}.size() == 0", "'is empty'")
    return _rule(f"{given}.size() == 1", f"%s; use exactly one of {', '.join(names)}", _either(empty, otherwise=some))


def _member_of_type(members: Mapping[str, str]) -> Json:
    rule = " || ".join(f"self.type == '{kind}' && has(self.{member})" for kind, member in members.items())
    name = _either(*((f"self.type == '{kind}'", f"'{member}'") for kind, member in members.items()), otherwise="''")
    return _rule(rule, 'has type "%s" without %s; use the member that type names', "self.type", name)


_LIMITS = _rule(
    "!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
    "has minReplicas %s above maxReplicas %s; use minReplicas <= maxReplicas",
    "string(self.minReplicas)",
    "string(self.maxReplicas)",
)
_UNREACHABLE = "cannot be reached through a router; use a global or private unicast address"
_IP = [
    _rule(
        "isIP(self)",
        '"%s" %s',
        "self",
        _either(
            (
                "self.contains('%')",
                _text("has a zone; use the address without '%s'") + ".format([self.substring(self.indexOf('%'))])",
            ),
            ("self.startsWith('::ffff:')", "'is an IPv4-mapped address; use ' + self.substring(7)"),
            (
                "self.contains('/')",
                _text('is not an IP address; use one without a prefix length, as in "192.0.2.10" or "2001:db8::10"'),
            ),
            otherwise=_text('is not an IP address; use one, as in "192.0.2.10" or "2001:db8::10"'),
        ),
    ),
    _rule(
        "!isIP(self) || ip(self).isGlobalUnicast()",
        '"%s" %s',
        "self",
        _either(
            ("self == '255.255.255.255'", "'is the broadcast address; use a unicast address'"),
            otherwise=_text(_UNREACHABLE),
        ),
    ),
]
_PREFIX = [
    _rule(
        "isCIDR(self) || isIP(self)",
        '"%s" %s',
        "self",
        _either(
            ("self.contains('%')", "'has a zone; use the prefix without it'"),
            otherwise=_text('is not an address or prefix; use one as in "192.0.2.64/28" or "2001:db8::40/122"'),
        ),
    ),
    _rule(
        "!isCIDR(self) || cidr(self) == cidr(self).masked()",
        '"%s" has bits set behind the prefix length; use "%s"',
        "self",
        "string(cidr(self).masked())",
    ),
]
_CIDR = [
    *_PREFIX,
    _rule(
        "!isCIDR(self) || cidr(self).prefixLength() >= (cidr(self).ip().family() == 4 ? 22 : 118)",
        f'"%s" has more than {MAX_SNAT_ADDRESSES} addresses; use a longer prefix',
        "self",
    ),
    _rule(
        "isIP(self) ? ip(self).isGlobalUnicast() : !isCIDR(self) || cidr(self).ip().isGlobalUnicast()",
        f'"%s" {_UNREACHABLE}',
        "isIP(self) ? self : string(cidr(self).ip())",
    ),
]


def _shown(name: str) -> str:
    """A value that may be a number or a string, as a user would write it."""
    return f"(type({name}) == string ? '\"%s\"'.format([string({name})]) : string({name}))"


_SIZE = [
    _rule(
        "type(self) != string || isQuantity(self)",
        '%s is not a quantity; use a number with a unit, as in "512Mi"',
        _shown("self"),
    ),
    _rule(
        "type(self) != string || !isQuantity(self) || (quantity(self).isInteger() "
        "&& quantity(self).isGreaterThan(quantity('0')) && !quantity(self).isGreaterThan(quantity('1Ei')))",
        '%s is not a size in bytes; use a positive quantity, as in "512Mi"',
        _shown("self"),
    ),
]
_IMMUTABLE = [
    _rule(
        "self == oldSelf",
        "%s cannot replace %s; keep it, or create another stack",
        _shown("self"),
        _shown("oldSelf"),
        reason="FieldValueForbidden",
    )
]


def _family(version: int) -> Json:
    """A SNAT address of the family of each listener. Colons tell the family: other rules see to the rest."""
    of_family = "{}.contains(':')" if version == 6 else "!{}.contains(':')"
    listener, address = f"isIP(l.address) && {of_family.format('l.address')}", of_family.format("a")
    return _rule(
        f"!self.listeners.exists(l, {listener}) || self.snat.addresses.size() == 0 "
        f"|| self.snat.addresses.exists(a, {address})",
        f'"%s" is IPv{version}, but no SNAT address is; add an IPv{version} prefix to spec.snat.addresses',
        f"self.listeners.filter(l, {listener})[0].address",
        path=".listeners",
    )


_TWICE = (
    "self.listeners.filter(a, !self.listeners.exists_one(b, "
    "b.address == a.address && b.protocol == a.protocol && b.port == a.port))"
)
_IN_SNAT = (
    "self.listeners.filter(l, isIP(l.address) && self.snat.addresses.exists(a, "
    "isCIDR(a) ? cidr(a).containsIP(l.address) : a == l.address))"
)
_OVERLAPPING = (
    "self.addresses.filter(a, !self.addresses.exists_one(b, "
    "isCIDR(a) && isCIDR(b) ? cidr(a).containsCIDR(b) || cidr(b).containsCIDR(a) "
    ": isCIDR(a) && isIP(b) ? cidr(a).containsIP(b) : isIP(a) && isCIDR(b) ? cidr(b).containsIP(a) : a == b))"
)
_HOST_BITS = "((cidr(a).ip().family() == 4 ? 32 : 128) - cidr(a).prefixLength())"
_POWERS = [1 << bits for bits in range(MAX_SNAT_ADDRESSES.bit_length())]  # CEL cannot shift
_TOTAL = f"self.addresses.map(a, !isCIDR(a) ? 1 : {_HOST_BITS} < {len(_POWERS)} ? {_POWERS}[{_HOST_BITS}] : 0).sum()"
_OTHER_SOURCES = "self.allowedSources.filter(s, s.contains(':') != self.address.contains(':'))"
_OTHER_FAMILY = "self.backends.endpoints.filter(e, e.address.contains(':') != self.address.contains(':'))"
_TRIGGERS_TWICE = (
    "self.triggers.filter(t, self.triggers.filter(u, u.type == t.type "
    "&& (t.type != 'Schedule' || (has(t.schedule) && has(u.schedule) && u.schedule.name == t.schedule.name))).size() > 1)"
)
_CORES_BEYOND = (
    "self.triggers.filter(t, has(t.schedule) && (t.schedule.cores < self.minCores || t.schedule.cores > self.maxCores))"
)
_METRICS = {
    kind: kind[0].lower() + kind[1:]
    for kind in ("Engine", "Resource", "ContainerResource", "Pods", "Object", "External")
}
_TARGETS = {"Utilization": "averageUtilization", "Value": "value", "AverageValue": "averageValue"}

RULES: dict[type[BaseModel], list[Json]] = {
    resources.Spec: [
        _rule(
            f"{_TWICE}.size() == 0",
            '%s %s port %s is already listener "%s"; use another address, protocol or port',
            f"{_TWICE}[1].protocol",
            f"{_TWICE}[1].address",
            f"string({_TWICE}[1].port)",
            f"{_TWICE}[0].name",
            path=".listeners",
        ),
        _family(4),
        _family(6),
        _rule(
            f"{_IN_SNAT}.size() == 0",
            '"%s" is a SNAT address too; use an address outside of spec.snat.addresses',
            f"{_IN_SNAT}[0].address",
            path=".listeners",
        ),
        _rule(
            "!has(self.autoscaling) || !has(self.autoscaling.vertical) "
            f"|| self.autoscaling.vertical.maxCores * self.engine.queuesPerCore <= {MAX_QUEUES}",
            f"has maxCores %s x %s queuesPerCore = %s queues; use at most {MAX_QUEUES}",
            "string(self.autoscaling.vertical.maxCores)",
            "string(self.engine.queuesPerCore)",
            "string(self.autoscaling.vertical.maxCores * self.engine.queuesPerCore)",
            path=".autoscaling.vertical",
        ),
    ],
    Engine: [
        _rule(
            f"self.cores * self.queuesPerCore <= {MAX_QUEUES}",
            f"has %s cores x %s queuesPerCore = %s queues; use at most {MAX_QUEUES}",
            "string(self.cores)",
            "string(self.queuesPerCore)",
            "string(self.cores * self.queuesPerCore)",
        )
    ],
    Interface: [_exactly_one("devicePlugin", "resourceClaim", "attachment", "veth")],
    HugePages: [
        _rule(
            "type(self.size) == string ? !isQuantity(self.size) || !quantity(self.size).isInteger() "
            "|| quantity(self.size).asInteger() % quantity(self.pageSize).asInteger() == 0 "
            ": int(self.size) % quantity(self.pageSize).asInteger() == 0",
            'has size "%s"; use a multiple of pageSize %s',
            "string(self.size)",
            "self.pageSize",
        )
    ],
    resources.Listener: [
        _rule(
            f"!has(self.backends.endpoints) || {_OTHER_FAMILY}.size() == 0",
            '"%s" is IPv%s, the listener IPv%s; use one family (PacketStack does not translate between them)',
            f"{_OTHER_FAMILY}[0].address",
            "self.address.contains(':') ? '4' : '6'",
            "self.address.contains(':') ? '6' : '4'",
            path=".backends.endpoints",
        ),
        _rule(
            "!has(self.backends.endpoints) || !self.backends.endpoints.exists(e, e.address == self.address)",
            '"%s" is an address of this stack, so packets would go in circles; use the backend\'s own address',
            "self.address",
            path=".backends.endpoints",
        ),
        _rule(
            f"!has(self.allowedSources) || {_OTHER_SOURCES}.size() == 0",
            '"%s" is IPv%s, the listener IPv%s; use prefixes of its family',
            f"{_OTHER_SOURCES}[0]",
            "self.address.contains(':') ? '4' : '6'",
            "self.address.contains(':') ? '6' : '4'",
            path=".allowedSources",
        ),
    ],
    resources.Snat: [
        _rule(
            f"{_TOTAL} <= {MAX_SNAT_ADDRESSES}",
            f"has %s addresses in all; use at most {MAX_SNAT_ADDRESSES}",
            f"string({_TOTAL})",
            path=".addresses",
        ),
        _rule(
            f"{_OVERLAPPING}.size() == 0",
            '"%s" overlaps "%s"; use each address once',
            *(
                f"{_OVERLAPPING}[{i}] + (isCIDR({_OVERLAPPING}[{i}]) ? '' "
                f": {_OVERLAPPING}[{i}].contains(':') ? '/128' : '/32')"
                for i in (1, 0)
            ),
            path=".addresses",
        ),
    ],
    resources.Backends: [_exactly_one("service", "endpoints")],
    resources.FlowTable: [
        _rule(
            f"self.maxFlows <= self.buckets * {MAX_FLOWS_PER_BUCKET}",
            "%s does not fit %s buckets; use at most %s",
            "string(self.maxFlows)",
            "string(self.buckets)",
            f"string(self.buckets * {MAX_FLOWS_PER_BUCKET})",
            path=".maxFlows",
        )
    ],
    resources.UpdateStrategy: [
        _rule(
            "(self.maxSurge != 0 && self.maxSurge != '0%') "
            "|| (self.maxUnavailable != 0 && self.maxUnavailable != '0%')",
            "has maxSurge 0 and maxUnavailable 0, so no engine could be replaced; use 1 for either",
        )
    ],
    autoscalers.Metric: [_exactly_one(*_METRICS.values()), _member_of_type(_METRICS)],
    autoscalers.MetricTarget: [_exactly_one("averageUtilization", "value", "averageValue"), _member_of_type(_TARGETS)],
    autoscalers.EngineMetric: [
        _rule(
            "self.target.type == (self.name == 'Utilization' ? 'Utilization' : 'AverageValue')",
            'has target type "%s" for %s; use "%s"',
            "self.target.type",
            "self.name",
            "self.name == 'Utilization' ? 'Utilization' : 'AverageValue'",
        )
    ],
    autoscalers.Schedule: [_LIMITS],
    autoscalers.Autoscaling: [
        _LIMITS,
        _rule(
            "!has(self.vertical) || !has(self.vertical.decides) || self.vertical.decides == 'Cores' "
            "|| !has(self.metrics) || self.metrics.size() == 0",
            "has metrics and vertical.decides CoresAndReplicas, two who would decide the number of engines; "
            "leave one of them out",
        ),
        _rule(
            "!has(self.vertical) || (has(self.vertical.decides) ? self.vertical.decides == 'Cores' "
            ": has(self.metrics) && self.metrics.size() > 0) "
            "|| !(has(self.behavior) || has(self.panic) || has(self.fallback))",
            "has %s, which is for metrics, while vertical decides the number of engines; leave it out, or use "
            'vertical.decides "Cores"',
            _either(("has(self.behavior)", "'behavior'"), ("has(self.panic)", "'panic'"), otherwise="'fallback'"),
        ),
    ],
    vertical_autoscalers.Vertical: [
        _rule(
            "self.minCores <= self.maxCores",
            "has minCores %s above maxCores %s; use minCores <= maxCores",
            "string(self.minCores)",
            "string(self.maxCores)",
        ),
        _rule(
            f"!has(self.triggers) || {_TRIGGERS_TWICE}.size() == 0",
            "has %s twice; use one trigger of each type, and a name once",
            _either(
                (
                    f"{_TRIGGERS_TWICE}[0].type == 'Schedule'",
                    f"'schedule %s'.format([{_TRIGGERS_TWICE}[0].schedule.name])",
                ),
                otherwise=f"{_TRIGGERS_TWICE}[0].type",
            ),
        ),
        _rule(
            f"!has(self.triggers) || {_CORES_BEYOND}.size() == 0",
            "has schedule %s with %s cores; use %s to %s, as minCores and maxCores",
            f"{_CORES_BEYOND}[0].schedule.name",
            f"string({_CORES_BEYOND}[0].schedule.cores)",
            "string(self.minCores)",
            "string(self.maxCores)",
        ),
        _rule(
            "!has(self.triggers) || self.triggers.size() == 0 "
            "|| self.triggers.exists(t, !(t.type in ['QueueDepth', 'Drops', 'Schedule']))",
            "has no trigger that says when fewer cores do; add one, as Utilization or PacketsPerSecond",
        ),
    ],
    # That above is more than target, and target more than below, is left to the operator: comparing quantities costs
    # too much, for the reason that stands at _UNIT.
    vertical_autoscalers.Trigger: [
        _rule(
            "has(self.schedule) == (self.type == 'Schedule')",
            'has type "%s" %s',
            "self.type",
            _either(
                ("has(self.schedule)", "'with schedule; use type Schedule'"), otherwise="'without schedule; give it'"
            ),
        ),
        _rule(
            "self.type != 'Schedule' || !(has(self.above) || has(self.target) || has(self.below))",
            'has %s for "Schedule"; leave it out: a schedule has cores',
            _either(("has(self.above)", "'above'"), ("has(self.target)", "'target'"), otherwise="'below'"),
        ),
        _rule(
            "has(self.above) || self.type in ['Utilization', 'FlowMemory', 'Schedule']",
            'has type "%s" without above; give it',
            "self.type",
        ),
        _rule(
            "!has(self.target) || !(self.type in ['QueueDepth', 'Drops'])",
            'has target for "%s"; leave it out: it asks for one step more',
            "self.type",
        ),
    ],
}


# None takes away what the model gives.


def _map(*keys: str, **more: Any) -> Json:
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys), **more}


_UNIT = r"([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?"
# Patterns, not rules: a value that may be a number or a string counts as 3 MB of text for the cost of a rule.
_ABOVE_ZERO = {
    "minimum": 1,
    "pattern": rf"^\+?([0-9]*[1-9][0-9]*(\.[0-9]*)?|[0-9]*\.[0-9]*[1-9][0-9]*){_UNIT}$",
}
_NOT_NEGATIVE = {"minimum": 0, "pattern": rf"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+){_UNIT}$"}
_INT64 = {"format": "int64"}
_CONDITIONS = {"conditions": _map("type")}

FIELDS: dict[type[BaseModel], dict[str, Json]] = {
    resources.Spec: {"listeners": _map("name")},
    Engine: {
        "mode": {"x-kubernetes-validations": _IMMUTABLE},
        "memory": {"x-kubernetes-validations": _SIZE},
    },
    HugePages: {"size": {"x-kubernetes-validations": _SIZE}},
    PodTemplate: {"nodeSelector": {"x-kubernetes-map-type": "atomic"}},
    resources.Backends: {"endpoints": _map("address", "port", maxItems=MAX_LISTENER_ENDPOINTS)},
    resources.Endpoint: {"address": {"x-kubernetes-validations": _IP}},
    # UDP is not probed by TCP: which type of check is meant by none depends on the protocol, a default here would hide it.
    resources.Listener: {
        "address": {"x-kubernetes-validations": _IP},
        "allowedSources": {
            "x-kubernetes-list-type": "set",
            "items": {"x-kubernetes-validations": _PREFIX},
        },
        "healthCheck": {"default": None},
    },
    resources.HealthCheck: {"type": {"default": None}},
    resources.Snat: {
        "addresses": {
            "x-kubernetes-list-type": "set",
            "minItems": 1,
            "maxItems": MAX_SNAT_PREFIXES,
            "items": {"x-kubernetes-validations": _CIDR},
        },
    },
    resources.FlowTable: {
        "buckets": {
            "enum": [n for n in (1 << i for i in range(20)) if limits.MIN_BUCKETS <= n <= limits.MAX_BUCKETS],
            "x-kubernetes-validations": _IMMUTABLE,
        },
    },
    autoscalers.MetricTarget: {"value": _ABOVE_ZERO, "averageValue": _ABOVE_ZERO},
    autoscalers.ScalingRules: {"tolerance": _NOT_NEGATIVE},
    autoscalers.Autoscaling: {"schedules": _map("name")},
    # Agents write single items of a node's report, and only whole engines.
    kinds.FlowTableSpec: {"engines": _map("id"), "nodes": _map("name"), "sets": _map("id")},
    kinds.TableEngine: {"": {"x-kubernetes-map-type": "atomic"}},
    kinds.FlowTableStatus: {"nodes": _map("node")},
    kinds.NodeReport: {"engines": _map("id"), "observedGeneration": _INT64},
    kinds.EngineReport: {"": {"x-kubernetes-map-type": "atomic"}},
    kinds.Condition: {"lastTransitionTime": {"format": "date-time"}, "observedGeneration": _INT64},
    kinds.PacketEngineStatus: _CONDITIONS,
    PacketStackStatus: {
        **_CONDITIONS,
        "observedGeneration": _INT64,
        "flowTableGeneration": _INT64,
        "capacity": {"additionalProperties": _INT64},
    },
}
NAME_RULES = [
    _rule(
        f"self.metadata.name.size() <= {MAX_NAME}",
        f'"%s" has %s characters; use at most {MAX_NAME}',
        "self.metadata.name",
        "string(self.metadata.name.size())",
        path=".metadata.name",
    ),
    _rule(
        "!self.metadata.name.contains('.')",
        '"%s" is not a DNS label; use lower-case letters, digits and \'-\', as in "edge-1"',
        "self.metadata.name",
        path=".metadata.name",
    ),
]
