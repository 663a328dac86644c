"""What a user writes: accepted as documented, or refused with one line that names field, value and remedy."""

import copy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from packetstack_core import reading
from packetstack_core.reading import ResourceError, check_change, load, parse
from packetstack_core.values import quantity

MINIMAL = """
apiVersion: packetstack.io/v1alpha1
kind: PacketStack
metadata: {name: edge}
spec:
  listeners:
  - name: web
    address: 192.0.2.10
    port: 443
    backends: {endpoints: [{address: 10.1.0.5, port: 8443}]}
  snat: {addresses: [192.0.2.64/28]}
"""

FULL = """
apiVersion: packetstack.io/v1alpha1
kind: PacketStack
metadata: {name: edge, namespace: net, labels: {a: b}, uid: 6f1c, managedFields: [{manager: kubectl}]}
spec:
  replicas: 2
  paused: false
  engine:
    mode: AFXDP
    image: example.org/packetstack:1
    cores: 2
    cpuPolicy: Exclusive
    queuesPerCore: 4
    memory: 512Mi
    hugePages: {pageSize: 2Mi, size: 256Mi}
    interface:
      devicePlugin: {resourceName: intel.com/sriov_vf, networkAttachmentDefinition: edge-vf}
    podTemplate:
      metadata: {labels: {team: net}}
      nodeSelector: {pool: edge}
      tolerations: [{key: edge, operator: Exists}]
      affinity: {nodeAffinity: {}}
      topologySpreadConstraints: [{maxSkew: 1}]
      priorityClassName: high
      serviceAccountName: engine
  listeners:
  - name: web
    address: 192.0.2.10
    protocol: TCP
    port: 443
    backends: {service: {name: web, port: 8443}}
    balancing: LeastFlows
    sessionAffinity: ClientIP
    onBackendDown: Reset
    onNoBackend: Reset
    slowStartSeconds: 30
    limits: {maxFlows: 50000, newFlowsPerSecond: 2000, maxFlowsPerClient: 100}
  - name: dns
    address: 2001:db8::10
    protocol: UDP
    port: 53
    backends: {endpoints: [{address: 2001:db8:1::5, port: 53, weight: 1}, {address: 2001:db8:1::6, port: 53}]}
    balancing: RoundRobin
  snat: {addresses: [192.0.2.64/28, "2001:db8::40/124", 198.51.100.7]}
  unknownFlow: Reset
  flowTable:
    buckets: 8192
    maxFlows: 2000000
    tcpIdleTimeoutSeconds: 600
    tcpOpeningTimeoutSeconds: 30
    tcpHalfCloseTimeoutSeconds: 60
    tcpClosedTimeoutSeconds: 10
    tcpTimeWaitTimeoutSeconds: 120
    udpIdleTimeoutSeconds: 60
    udpUnansweredTimeoutSeconds: 30
  handover: {strategy: Mirror, deadlineSeconds: 60, onDeadline: Reset}
  rebalance: {mode: Advice}
  updateStrategy: {type: RollingUpdate, maxSurge: 25%, maxUnavailable: 0}
  autoscaling:
    minReplicas: 2
    maxReplicas: 12
    metrics:
    - type: Engine
      engine: {name: Utilization, target: {type: Utilization, averageUtilization: 60}}
    - type: Pods
      pods: {metric: {name: x, selector: {matchLabels: {a: b}}}, target: {type: AverageValue, averageValue: 10k}}
    - type: External
      external: {metric: {name: queue}, target: {type: Value, value: 30}}
    behavior:
      scaleUp: {tolerance: "0", stabilizationWindowSeconds: 0, policies: [{type: Pods, value: 4, periodSeconds: 15}]}
      scaleDown: {tolerance: "0.05", stabilizationWindowSeconds: 300, selectPolicy: Min}
    paused: false
    panic: {thresholdPercentage: 300}
    schedules: [{name: day, cron: "0 8 * * 1-5", timeZone: Europe/Berlin, durationSeconds: 36000, minReplicas: 4}]
    fallback: {failureThreshold: 3, replicas: 6}
status: {replicas: 3}
"""


def document(text=MINIMAL):
    return yaml.safe_load(text)


def changed(path, value, text=MINIMAL):
    """The document with the value at `path` ("spec.listeners.0.port") replaced, or the field removed for `...`."""
    result = copy.deepcopy(document(text))
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    at = result
    for p in parents:
        at = at[p] if isinstance(at, list) else at.setdefault(p, {})
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return result


def problems(doc):
    with pytest.raises(ResourceError) as caught:
        parse(doc)
    return caught.value.problems


def test_a_minimal_file_needs_only_listeners_and_snat():
    (stack,) = load(MINIMAL)
    assert (stack.name, stack.spec.replicas, stack.spec.flow_table.buckets) == ("edge", 1, 4096)
    assert stack.spec.engine.queues == 4
    assert stack.spec.engine.memory_bytes == 512 << 20
    assert stack.spec.engine.interface.veth is not None
    listener = stack.spec.listeners[0]
    assert (listener.protocol, listener.balancing, listener.session_affinity) == ("TCP", "Maglev", "None")
    assert (listener.health_check.type, listener.health_check.interval_seconds) == ("TCP", 2)
    assert [str(a) for a in stack.virtual_addresses()] == ["192.0.2.10"]
    snat = stack.snat_addresses()
    assert (len(snat), str(snat[0]), str(snat[-1])) == (16, "192.0.2.64", "192.0.2.79")


def test_everything_that_is_documented_is_accepted():
    (stack,) = load(FULL)
    assert stack.spec.update_strategy.surge(5) == 2
    assert stack.spec.listeners[1].health_check.type == "None", "UDP is not probed by TCP unless asked for"
    assert len(stack.snat_addresses()) == 33
    assert stack.spec.autoscaling.metrics[2].external.target.value == "30"
    assert stack.spec.listeners[0].limits.max_flows_per_client == 100
    assert stack.spec.listeners[1].limits.max_flows is None, "what is not said is not limited"


def test_timers_are_those_of_the_rfcs_and_shorter_ones_are_told_of():
    (stack,) = load(MINIMAL)
    table = stack.spec.flow_table
    assert table.tcp_idle_timeout_seconds >= 2 * 3600 + 4 * 60, "RFC 5382, REQ-5"
    assert table.tcp_half_close_timeout_seconds >= 240, "RFC 5382, REQ-5"
    assert table.tcp_closed_timeout_seconds >= 240, "RFC 7857, section 2"
    assert table.tcp_time_wait_timeout_seconds >= 60, "net/ipv4/tcp.c: TCP_TIMEWAIT_LEN"
    assert min(table.udp_idle_timeout_seconds, table.udp_unanswered_timeout_seconds) >= 120, "RFC 4787, REQ-5"
    assert stack.advice() == []
    (short,) = parse(changed("spec.flowTable.udpIdleTimeoutSeconds", 30)).advice()
    assert short.startswith("spec.flowTable.udpIdleTimeoutSeconds: 30 is below the 120 of RFC 4787")


@pytest.mark.parametrize("text", [MINIMAL, FULL])
def test_a_resource_survives_being_written_and_read(text):
    (stack,) = load(text)
    assert load(yaml.safe_dump(stack.document())) == [stack]


def test_the_template_hash_changes_with_the_engine_only():
    base = parse(document())
    assert base.spec.engine.template_hash() == parse(changed("spec.replicas", 5)).spec.engine.template_hash()
    assert base.spec.engine.template_hash() != parse(changed("spec.engine.cores", 2)).spec.engine.template_hash()


ENDPOINT = "spec.listeners.0.backends.endpoints.0"
SECOND = {
    "name": "two", "address": "192.0.2.11", "port": 443,
    "backends": {"endpoints": [{"address": "10.1.0.6", "port": 1}]},
}  # fmt: skip


def two(**fields):
    return changed("spec.listeners", [document()["spec"]["listeners"][0], {**SECOND, **fields}])


NIGHT = {"name": "night", "cron": "0 20 * * *", "durationSeconds": 3600, "cores": 4}
BUSY = {
    "type": "Engine",
    "engine": {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": 50}},
}
UNORDERED = [
    {"type": "FlowMemory", "above": 101},
    {"type": "Utilization", "above": 100},
    {"type": "Utilization", "below": 80},
    {"type": "PacketsPerSecond", "above": "10k", "target": "20k"},
]
"""Triggers whose thresholds contradict each other, or can never be exceeded."""


def vertical(*triggers, **more):
    """spec.autoscaling with a vertical one of up to 4 cores."""
    return {"maxReplicas": 2, "vertical": {"maxCores": 4, "triggers": list(triggers)} | more}


WRONG = [
    ("spec.replicas", "2", 'spec.replicas: "2" is a string; use a whole number'),
    ("spec.replicas", -1, "spec.replicas: -1 is not a number of engines; use 0 to 1000"),
    ("spec.replicas", True, "spec.replicas: true is a boolean; use a whole number"),
    ("spec.replicas", 2.0, "spec.replicas: 2.0 is a decimal number; use a whole number"),
    ("spec.replicas", None, "spec.replicas: null is empty; use a whole number"),
    ("spec.paused", "yes", 'spec.paused: "yes" is a string; use true or false'),
    ("spec.replica", 2, "spec.replica: is an unknown field; did you mean replicas?"),
    ("spec.engine.pod_template", {}, "spec.engine.pod_template: is an unknown field; did you mean podTemplate?"),
    ("spec.engine.interface.veth", {"a": 1}, "spec.engine.interface.veth.a: is an unknown field; leave it out"),
    ("spec.listeners.0.port", 70000, "spec.listeners[0].port: 70000 is not a port; use 1 to 65535"),
    ("spec.listeners.0.port", 0, "spec.listeners[0].port: 0 is not a port; use 1 to 65535"),
    ("spec.listeners.0.port", ..., "spec.listeners[0].port: is missing; use 1 to 65535"),
    ("spec.listeners.0.address", "192.0.2.10/32", "use one without a prefix length"),
    ("spec.listeners.0.address", "192.0.2.300", 'spec.listeners[0].address: "192.0.2.300" is not an IP address; '),
    ("spec.listeners.0.address", "0.0.0.0", "cannot be reached through a router; use a global or private unicast"),
    ("spec.listeners.0.address", "224.0.0.1", "cannot be reached through a router"),
    ("spec.listeners.0.address", "127.0.0.1", "cannot be reached through a router"),
    ("spec.listeners.0.address", "255.255.255.255", "is the broadcast address"),
    ("spec.listeners.0.address", "::ffff:1.2.3.4", "is an IPv4-mapped address; use 1.2.3.4"),
    ("spec.listeners.0.address", "fe80::1%eth0", "has a zone; use the address without '%eth0'"),
    ("spec.listeners.0.address", 3221225994, "is a number; use an IP address in quotes"),
    ("spec.listeners.0.address", "192.0.2.65", 'spec.listeners[0].address: "192.0.2.65" is a SNAT address too;'),
    ("spec.listeners.0.protocol", "tcp", '[0].protocol: "tcp" is not allowed here; use "TCP" or "UDP"'),
    ("spec.listeners.0.balancing", "Random", 'use "Maglev", "RoundRobin" or "LeastFlows"'),
    ("spec.listeners.0.backends", {}, "[0].backends: is empty; use exactly one of service, endpoints"),
    ("spec.listeners.0.backends.service", {"name": "a", "port": 1}, "has service and endpoints; use exactly one"),
    ("spec.listeners.0.backends", [], "spec.listeners[0].backends: [] is a list; use a mapping"),
    (f"{ENDPOINT}.weight", 1.5, "backends.endpoints[0].weight: 1.5 is a decimal number; use a whole number"),
    (f"{ENDPOINT}.weight", -1, "backends.endpoints[0].weight: -1 is not a weight; use 0 to 1000"),
    (f"{ENDPOINT}.address", "2001:db8::5", '"2001:db8::5" is IPv6, the listener IPv4; use one family'),
    (f"{ENDPOINT}.address", "192.0.2.10", "is an address of this stack, so packets would go in circles"),
    (f"{ENDPOINT}.address", "192.0.2.70", "is an address of this stack, so packets would go in circles"),
    ("spec.listeners.0.healthCheck.type", "HTTP", '"HTTP" is not allowed here; use "TCP" or "None"'),
    ("spec.listeners", [], "spec.listeners: is empty; use at least one listener"),
    ("spec.listeners", {}, "spec.listeners: {} is a mapping; use a list"),
    ("spec.listeners", ..., "spec.listeners: is missing; use at least one listener"),
    ("spec.snat", ..., "spec.snat: is missing; use addresses, as in {addresses: [192.0.2.64/28]}"),
    ("spec.listeners.0.allowedSources", [], "allowedSources: is empty; use at least one prefix, or leave it out"),
    ("spec.listeners.0.allowedSources", ["everybody"], '[0]: "everybody" is not an address or prefix; use one as in'),
    ("spec.listeners.0.allowedSources", ["10.0.0.1/8"], 'has bits set behind the prefix length; use "10.0.0.0/8"'),
    ("spec.listeners.0.allowedSources", ["fe80::%eth0/64"], "has a zone; use the prefix without it"),
    ("spec.listeners.0.allowedSources", ["::ffff:10.0.0.0/120"], "is not an address or prefix; use one as in"),
    ("spec.listeners.0.allowedSources", ["10.0.0.0/8", "2001:db8::/32"], '[1]: "2001:db8::/32" is IPv6, the listener IPv4'),
    ("spec.listeners.0.allowedSources", ["10.0.0.0/8"] * 2, '[1]: "10.0.0.0/8" is there already; use each prefix once'),
    ("spec.listeners.0.allowedSources", [f"10.0.{i}.0/24" for i in range(65)], "has 65 prefixes; use at most 64"),
    ("spec.snat.addresses", [], "spec.snat.addresses: is empty; use at least one address or prefix"),
    ("spec.snat.addresses.0", "192.0.2.65/28", 'has bits set behind the prefix length; use "192.0.2.64/28"'),
    ("spec.snat.addresses.0", "192.0.2.64/33", "is not an address or prefix; use one as in"),
    ("spec.snat.addresses.0", "192.0.2.64/255.255.255.240", "is not an address or prefix; use one as in"),
    ("spec.snat.addresses.0", "192.0.2.64/028", "is not an address or prefix; use one as in"),
    ("spec.snat.addresses.0", "10.0.0.0/8", "has more than 1024 addresses; use a longer prefix"),
    ("spec.snat.addresses.0", "2001:db8::/64", "has more than 1024 addresses; use a longer prefix"),
    ("spec.snat.addresses", ["10.9.0.0/22", "10.10.0.0/32"], "addresses: has 1025 addresses in all; use at"),
    ("spec.snat.addresses", ["10.9.0.0/30", "10.9.0.1"], '[1]: "10.9.0.1/32" overlaps "10.9.0.0/30"'),
    ("spec.snat.addresses", ["2001:db8::40"], '"192.0.2.10" is IPv4, but no SNAT address is; add an IPv4 prefix'),
    ("spec.flowTable.buckets", 1000, "use one of 256, 512, 1024, 2048, 4096, 8192"),
    ("spec.flowTable.buckets", 128, "spec.flowTable.buckets: 128 is not a number of buckets"),
    ("spec.flowTable.buckets", 16384, "spec.flowTable.buckets: 16384 is not a number of buckets"),
    ("spec.flowTable", {"buckets": 256, "maxFlows": 2**25}, "33554432 does not fit 256 buckets; use at most"),
    ("spec.flowTable.tcpIdleTimeoutSeconds", 0, "0 is not a number of seconds; use 1 to 604800"),
    ("spec.flowTable.tcpTimeWaitTimeoutSeconds", 3601, "3601 is not a number of seconds; use 1 to 3600"),
    ("spec.listeners.0.limits", {"maxFlows": 0}, "limits.maxFlows: 0 is not a number of flows; use 1 to 491520000"),
    ("spec.listeners.0.limits", {"newFlowsPerSecond": 0}, "0 is not a number of flows; use 1 to 10000000"),
    ("spec.listeners.0.limits", {"maxFlowPerClient": 1}, "is an unknown field; did you mean maxFlowsPerClient?"),
    ("spec.listeners.0.onBackendDown", "Drop", '"Drop" is not allowed here; use "Keep" or "Reset"'),
    ("spec.listeners.0.onNoBackend", "Keep", '"Keep" is not allowed here; use "Drop" or "Reset"'),
    ("spec.listeners.0.slowStartSeconds", 3601, "3601 is not a number of seconds; use 0 to 3600"),
    ("spec.engine.cores", 33, "spec.engine.cores: 33 is not a number of cores; use 1 to 32"),
    ("spec.engine", {"cores": 32}, "has 32 cores x 4 queuesPerCore = 128 queues; use at most 64"),
    ("spec.engine.memory", "5Xi", 'spec.engine.memory: "5Xi" is not a quantity; use a number with a unit'),
    ("spec.engine.memory", "-1Mi", "is not a size in bytes; use a positive quantity"),
    ("spec.engine.memory", "1m", "is not a size in bytes; use a positive quantity"),
    ("spec.engine.memory", [], "spec.engine.memory: [] is a list; use a string"),
    ("spec.engine.hugePages", {"size": "3Mi"}, 'has size "3Mi"; use a multiple of pageSize 2Mi'),
    ("spec.engine.interface", {}, "is empty; use exactly one of devicePlugin, resourceClaim, attachment, veth"),
    ("spec.rebalance.mode", False, 'use "Auto", "Advice" or "Off" (in quotes: YAML reads a bare Off as false)'),
    ("spec.updateStrategy", {"maxSurge": 0}, "has maxSurge 0 and maxUnavailable 0, so no engine could be replaced"),
    ("spec.updateStrategy.maxSurge", "101%", "is not a percentage"),
    ("spec.updateStrategy.maxSurge", 1.5, "1.5 is a decimal number; use a whole number or a percentage"),
    ("spec.autoscaling", {"minReplicas": 3, "maxReplicas": 2}, "has minReplicas 3 above maxReplicas 2; use"),
    (
        "spec.autoscaling",
        {"maxReplicas": 2, "schedules": [{"name": "s", "cron": "0 8 * * *", "durationSeconds": 60}] * 33},
        "has 33 schedules; use at most 32",
    ),
    (
        "spec.autoscaling",
        {"maxReplicas": 2, "metrics": [{"type": "Engine", "engine": {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": 50}}}] * 33},
        "has 33 metrics; use at most 32",
    ),
    ("spec.autoscaling", {"maxReplicas": 2, "metrics": [{"type": "Pods"}]}, "metrics[0]: is empty; use exactly"),
    ("spec.autoscaling", {"maxReplicas": 2, "vertical": {}}, "vertical.maxCores: is missing"),
    ("spec.autoscaling", vertical(minCores=5), "vertical: has minCores 5 above maxCores 4; use minCores <= maxCores"),
    ("spec.autoscaling", vertical(maxCores=17), "vertical: has maxCores 17 x 4 queuesPerCore = 68 queues; use at most 64"),
    ("spec.autoscaling", vertical({"type": "Busy"}), "vertical.triggers[0].type"),
    ("spec.autoscaling", vertical({"type": "ActiveFlows"}), 'has type "ActiveFlows" without above; give it'),
    ("spec.autoscaling", vertical({"type": "Schedule"}), 'has type "Schedule" without schedule; give it'),
    ("spec.autoscaling", vertical({"type": "Utilization", "schedule": NIGHT}), 'has type "Utilization" with schedule; use type'),
    ("spec.autoscaling", vertical({"type": "Schedule", "schedule": NIGHT, "above": 1}), 'has above for "Schedule"; leave it out'),
    ("spec.autoscaling", vertical({"type": "Drops", "above": "0.01", "target": "0.001"}), 'has target for "Drops"; leave it out'),
    ("spec.autoscaling", vertical(UNORDERED[0]), "has above 101; use less than 100, or it could never be exceeded"),
    ("spec.autoscaling", vertical(UNORDERED[1]), "has above 100; use less than 100, or it"),
    ("spec.autoscaling", vertical(UNORDERED[2]), "has below 80, target 60, above 75; use 0 < below <"),
    ("spec.autoscaling", vertical(UNORDERED[3]), "target 20,000, above 10,000; use 0"),
    ("spec.autoscaling", vertical(*[{"type": "Utilization"}] * 2), "has Utilization twice; use one trigger of each type"),
    ("spec.autoscaling", vertical(*[{"type": "Schedule", "schedule": NIGHT}] * 2), "has schedule night twice; use one trigger of"),
    ("spec.autoscaling", vertical({"type": "Drops", "above": "0.01"}), "has no trigger that says when fewer cores do; add one"),
    ("spec.autoscaling", vertical({"type": "Schedule", "schedule": NIGHT | {"cores": 5}}), "has schedule night with 5 cores; use 1 to 4"),
    ("spec.autoscaling", vertical(decides="CoresAndReplicas") | {"metrics": [BUSY]}, "two who would decide the number of engines; leave"),
    ("spec.autoscaling", vertical() | {"panic": {}}, "has panic, which is for metrics, while vertical decides the number of engines"),
    ("metadata.name", "Edge", 'metadata.name: "Edge" is not a DNS label'),
    ("metadata.name", "a" * 53, "has 53 characters; use at most 52"),
    ("metadata.name", "edge\n", "is not a DNS label"),
    ("metadata.lables", {}, "metadata.lables: is an unknown field; did you mean labels?"),
    ("kind", "Pod", 'kind: "Pod" cannot be read here; use PacketStack, and kubectl apply for other kinds'),
    ("apiVersion", "v1", 'apiVersion: "v1" is not allowed here; use "packetstack.io/v1alpha1"'),
    ("spec", ..., "spec: is missing; use spec with listeners and snat"),
]  # fmt: skip
"""Path, a wrong value for it, part of the line that says so."""


@pytest.mark.parametrize(("path", "value", "expected"), WRONG)
def test_a_wrong_value_is_named_with_its_field_and_the_remedy(path, value, expected):
    found = problems(changed(path, value))
    assert any(expected in line for line in found), found
    assert all("\n" not in line and ": " in line and "; " in line for line in found), found


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        (
            two(address="192.0.2.10"),
            'spec.listeners[1]: TCP 192.0.2.10 port 443 is already listener "web"; use another',
        ),
        (two(name="web"), 'spec.listeners[1].name: "web" is already listeners[0]; use a name once'),
    ],
)
def test_overlapping_listeners_are_refused(doc, expected):
    assert [expected] == [line[: len(expected)] for line in problems(doc)]


def test_listeners_that_differ_in_protocol_or_port_do_not_overlap():
    assert parse(two(address="192.0.2.10", protocol="UDP"))
    assert parse(two(address="192.0.2.10", port=444))


def test_a_backend_listed_twice_is_refused():
    doc = changed("spec.listeners.0.backends.endpoints", [{"address": "10.1.0.5", "port": 1}] * 2)
    assert "endpoints[1]: 10.1.0.5 port 1 is already endpoints[0]; use each backend once" in problems(doc)[0]


def test_all_problems_are_told_at_once():
    doc = changed("spec.replicas", -1)
    doc["spec"]["listeners"][0]["port"] = 0
    doc["spec"]["bogus"] = 1
    assert len(problems(doc)) == 3


def test_what_cannot_change_is_refused():
    old, new = parse(document()), parse(changed("spec.flowTable.buckets", 8192))
    check_change(old, old)
    with pytest.raises(ResourceError, match=r"spec.flowTable.buckets: 8192 cannot replace 4096; keep it"):
        check_change(old, new)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "file: is empty"),
        ("---\n---\n", "file: is empty"),
        ("a: 1\na: 2\n", 'line 2, column 1: "a" occurs twice; use each field once'),
        ("a: &x 1\nb: *x\n", "line 2, column 4: an alias; write the value out"),
        ("a: [1\n", "line 2, column 1: "),
        ("- 1\n", "document: [1] is a list; use a mapping with kind PacketStack"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: !!int ''\n", "file: is not YAML that can be read"),
        ("a: 2026-13-45\n", "file: is not YAML that can be read"),
        ("a: \x00\n", "file: "),
        ("? [a, b]\n: 1\n", "line 1, column 3: "),
        ("[" * 5000, "file: is nested too deeply"),
        ("#" * (reading.MAX_BYTES + 1), "file: has 1048577 bytes; use at most 1048576"),
    ],
)
def test_text_that_is_not_a_resource_is_refused_in_one_line(text, expected):
    with pytest.raises(ResourceError) as caught:
        load(text)
    assert caught.value.problems[0].startswith(expected) or expected in caught.value.problems[0]
    assert "\n" not in caught.value.problems[0]


def test_a_document_of_another_kind_is_one_problem():
    others = "apiVersion: v1\nkind: Secret\nmetadata: {name: one}\ndata: {key: dmFsdWU=}\ntype: Opaque\n"
    with pytest.raises(ResourceError) as caught:
        load(f"{MINIMAL}---\n{others}")
    assert caught.value.problems == [
        'document 2: kind: "Secret" cannot be read here; use PacketStack, and kubectl apply for other kinds'
    ]


def test_a_kind_that_is_nearly_ours_is_a_typing_error():
    with pytest.raises(ResourceError, match=r'kind: "Packetstack" is unknown; did you mean PacketStack\?'):
        load(MINIMAL.replace("PacketStack", "Packetstack"))


def test_several_documents_are_read_and_empty_ones_skipped():
    other = MINIMAL.replace("name: edge", "name: two")
    assert [s.name for s in load(f"{MINIMAL}---\n---{other}")] == ["edge", "two"]


def test_a_problem_in_one_of_several_documents_says_which():
    other = MINIMAL.replace("port: 443", "port: 0").replace("name: edge", "name: two")
    with pytest.raises(ResourceError, match=r"document 2: spec.listeners\[0\].port: 0 is not a port"):
        load(f"{MINIMAL}---{other}")


def test_two_documents_of_one_name_are_refused():
    with pytest.raises(ResourceError, match=r'metadata.name: "edge" occurs in two documents'):
        load(f"{MINIMAL}---{MINIMAL}")


@pytest.mark.parametrize(
    ("text", "value"),
    [("512Mi", 512 << 20), ("1e3", 1000), ("50m", "0.05"), ("0.05", "0.05"), ("1k", 1000), ("1Gi", 1 << 30), ("2", 2)],
)
def test_quantities_are_those_of_kubernetes(text, value):
    assert quantity(text) == quantity(str(value))


@pytest.mark.parametrize(
    "value", [10**5000, "x" * 100_000, float("nan"), float("inf"), -(10**30)], ids=["int", "str", "nan", "inf", "neg"]
)
def test_an_enormous_value_is_refused_in_a_short_line(value):
    for path in ("spec.replicas", "spec.engine.memory", "spec.listeners.0.address", "spec.updateStrategy.maxSurge"):
        (line,) = problems(changed(path, value))
        assert len(line) < 250


def test_resources_cannot_be_changed_in_place():
    (stack,) = load(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        stack.spec.replicas = 3


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=4)
    | st.dates() | st.sampled_from(["TCP", "192.0.2.10", "::1", "1Mi", "10.0.0.0/8", "25%", 10**30, "\ud800"])
)  # fmt: skip
keys = st.text(max_size=8) | st.integers() | st.sampled_from(
    ["apiVersion", "kind", "metadata", "spec", "name", "listeners", "snat", "addresses", "engine", "backends",
     "endpoints", "port", "address", "status", "healthCheck", "type", "protocol", "autoscaling", "metrics", "target"]
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=30
)


def check_lines(error):
    assert error.problems
    assert all(p and "\n" not in p for p in error.problems)


@given(anything)
def test_no_document_raises_anything_but_a_resource_error(doc):
    try:
        parse(doc)
    except ResourceError as e:
        check_lines(e)


def paths(node, prefix=()):
    yield prefix
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from paths(value, (*prefix, key))


FULL_PATHS = [p for p in paths(document(FULL)) if p]


@given(st.lists(st.tuples(st.sampled_from(FULL_PATHS), anything), min_size=1, max_size=3))
@settings(max_examples=300)
def test_a_good_resource_with_anything_in_it_is_read_or_refused(edits):
    doc = document(FULL)
    for path, value in edits:
        at = doc
        try:
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = value
        except (TypeError, LookupError):
            continue
    try:
        stack = parse(doc)
    except ResourceError as e:
        check_lines(e)
    else:
        assert parse(stack.document()) == stack


@given(st.text(alphabet=st.sampled_from("abs:-[]{}!&*|>'\"# \n\t01.,?%@"), max_size=60))
@settings(max_examples=300)
def test_no_text_raises_anything_but_a_resource_error(text):
    with pytest.raises(ResourceError):
        load(text)


@given(st.integers(0, len(FULL)), st.text(max_size=3))
@settings(max_examples=100)
def test_a_damaged_file_is_read_or_refused(at, inserted):
    try:
        load(FULL[:at] + inserted + FULL[at:])
    except ResourceError as e:
        check_lines(e)


def test_a_listener_names_the_sources_that_it_takes_packets_from() -> None:
    sources = ["0.0.0.0/0", "10.0.0.0/8", "192.0.2.7"]
    stack = reading.parse(changed("spec.listeners.0.allowedSources", sources))
    assert [str(s) for s in stack.spec.listeners[0].allowed_sources or ()] == [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "192.0.2.7/32",
    ]
    assert reading.parse(stack.document()) == stack
    assert "allowedSources" not in reading.parse(document()).document()["spec"]["listeners"][0]
