"""The definitions on a real API server: it takes and refuses what the CLI does, with the same words."""

import copy
import http.client
import itertools
import json
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from tests.cluster.control_plane import ControlPlane
from tests.core.test_crds import ALL
from tests.core.test_kinds import ENGINE, table
from tests.core.test_resources import FULL, MINIMAL, UNORDERED, WRONG, changed, document, two, vertical

from packetstack_core import crd_rules, crds, kinds, limits, reading

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "crds"
MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"


class Api:
    """The API server, asked without a client library between: what it says is what is tested."""

    def __init__(self, control_plane: ControlPlane) -> None:
        address = urlsplit(control_plane.server)
        pki = control_plane.pki.directory
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self.connection = http.client.HTTPSConnection(str(address.hostname), address.port, timeout=30, context=context)
        self.kubectl = control_plane.kubectl
        self._names = itertools.count()

    def ask(
        self, method: str, path: str, body: object = None, kind: str = "application/json", accept: str = "*/*"
    ) -> tuple[int, Any]:
        """Status and answer."""
        self.connection.request(
            method, path, json.dumps(body) if body else None, {"Content-Type": kind, "Accept": accept}
        )
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def path(self, plural: str = "packetstacks", name: str = "", query: str = "") -> str:
        end = f"/{name}" if name else ""
        return f"/apis/packetstack.io/v1alpha1/namespaces/{NAMESPACE}/{plural}{end}?{query}"

    def try_out(self, doc: dict[str, Any]) -> tuple[int, Any]:
        """Creates it, but keeps nothing; unknown fields are refused, as kubectl has it."""
        return self.ask("POST", self.path(query="dryRun=All&fieldValidation=Strict"), placed(doc))

    def create(self, plural: str = "packetstacks", doc: dict[str, Any] | None = None) -> dict[str, Any]:
        """A new object under a name of its own."""
        made = placed(doc or document())
        made["metadata"]["name"] = f"{plural[:4]}-{next(self._names)}"
        status, answer = self.ask("POST", self.path(plural), made)
        assert status == 201, answer
        return dict(answer)

    def change(self, stack: dict[str, Any], patch: dict[str, Any]) -> tuple[int, Any]:
        return self.ask("PATCH", self.path(name=stack["metadata"]["name"]), patch, MERGE)


def placed(doc: dict[str, Any]) -> dict[str, Any]:
    """The document in the namespace of these tests, without what only a server writes."""
    doc = copy.deepcopy(doc)
    if isinstance(doc.get("metadata"), dict):
        kept = {k: v for k, v in doc["metadata"].items() if k not in ("uid", "resourceVersion", "managedFields")}
        doc["metadata"] = {**kept, "namespace": NAMESPACE}
    return doc


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Iterator[Api]:
    control_plane.define(*crds.definitions())
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    control_plane.apply(space)
    asked = Api(control_plane)
    yield asked
    asked.connection.close()
    control_plane.delete_namespace(NAMESPACE)


# ---- what is refused ---------------------------------------------------------------------------------------------

# What the schema itself says is said in Kubernetes' words.
STRUCTURAL = re.compile(
    r"must be of type|in body (should|must)|should be a non-negative|should have at least|accessor error"
    r"|Required value|Unsupported value|Too long|Duplicate value|unknown field|must be PacketStack|RFC 1123"
    r"|cannot be handled as|does not match the expected|some validation rules were not checked|evaluating rule"
)
# Null is the default to an API server, and what costs too much to compare is left to the operator.
TAKEN = [
    ("spec.replicas", None),
    ("spec.listeners.0.backends.endpoints.0.address", "192.0.2.70"),
    *(("spec.autoscaling", vertical(trigger)) for trigger in UNORDERED),
]

ENDPOINTS = "spec.listeners.0.backends.endpoints"
TARGET = {"type": "Utilization", "averageUtilization": 60}


def engine_metric(name: str, **target: Any) -> dict[str, Any]:
    return {"maxReplicas": 2, "metrics": [{"type": "Engine", "engine": {"name": name, "target": target}}]}


MORE_WRONG: list[tuple[str, Any, str]] = [
    ("spec.listeners", two(address="192.0.2.10")["spec"]["listeners"], "use another address, protocol or port"),
    ("spec.listeners", two(name="web")["spec"]["listeners"], "use a name once"),
    ("spec.listeners", two(address="2001:db8::10", backends={"service": {"name": "a", "port": 1}})["spec"]["listeners"],
     '"2001:db8::10" is IPv6, but no SNAT address is; add an IPv6 prefix to spec.snat.addresses'),
    (ENDPOINTS, [{"address": "10.1.0.5", "port": 1}] * 2, "use each backend once"),
    (f"{ENDPOINTS}.0.address", "10.1.0.5/32", "use one without a prefix length"),
    (f"{ENDPOINTS}.0.address", "web.example", "is not an IP address"),
    (f"{ENDPOINTS}.0.address", "127.0.0.1", "cannot be reached through a router"),
    ("spec.snat.addresses.0", "fe80::%eth0/64", "has a zone; use the prefix without it"),
    ("spec.snat.addresses.0", "224.0.0.0/28", '"224.0.0.0" cannot be reached through a router'),
    ("spec.snat.addresses.0", "127.0.0.1", '"127.0.0.1" cannot be reached through a router'),
    ("spec.engine.hugePages", {"size": "many"}, '"many" is not a quantity'),
    ("spec.engine.hugePages", {"size": "1Gi", "pageSize": "4Ki"}, "is not allowed here"),
    ("spec.engine.hugePages", {"size": 1 << 20}, "use a multiple of pageSize 2Mi"),
    ("spec.engine.interface", {"veth": {}, "attachment": {"networkAttachmentDefinition": "a"}},
     "has attachment and veth; use exactly one of devicePlugin, resourceClaim, attachment, veth"),
    ("spec.engine.memory", 0, "is not a size in bytes"),
    ("spec.updateStrategy", {"maxSurge": "0%", "maxUnavailable": "0%"}, "no engine could be replaced"),
    ("spec.autoscaling", engine_metric("Utilization", type="AverageValue", averageValue=1),
     'has target type "AverageValue" for Utilization; use "Utilization"'),
    ("spec.autoscaling", engine_metric("ActiveFlows", **TARGET),
     'has target type "Utilization" for ActiveFlows; use "AverageValue"'),
    ("spec.autoscaling", engine_metric("ActiveFlows", type="AverageValue", value=1), "without averageValue"),
    ("spec.autoscaling", engine_metric("ActiveFlows", type="AverageValue", averageValue=1, value=1),
     "has value and averageValue; use exactly one"),
    ("spec.autoscaling", engine_metric("ActiveFlows", type="AverageValue"), "is empty; use exactly one"),
    ("spec.autoscaling", engine_metric("ActiveFlows", type="AverageValue", averageValue="0"), "above 0"),
    ("spec.autoscaling", engine_metric("ActiveFlows", type="AverageValue", averageValue=0), "above 0"),
    ("spec.autoscaling", engine_metric("ActiveFlows", type="AverageValue", averageValue="-5k"), "above 0"),
    ("spec.autoscaling", {"maxReplicas": 2, "metrics": [{"type": "Pods", "engine": {"name": "Utilization", "target": TARGET}}]},
     'has type "Pods" without pods; use the member that type names'),
    ("spec.autoscaling", {"maxReplicas": 2, "behavior": {"scaleUp": {"policies": []}}}, "is empty; use at least one policy"),
    ("spec.autoscaling", {"maxReplicas": 2, "behavior": {"scaleUp": {"tolerance": "-0.1"}}}, "0 or more"),
    ("spec.autoscaling.schedules", [{"name": "day", "cron": "0 8 * * *", "durationSeconds": 60, "minReplicas": 5, "maxReplicas": 4}],
     "has minReplicas 5 above maxReplicas 4; use minReplicas <= maxReplicas"),
    ("metadata.name", "a.b", '"a.b" is not a DNS label'),
]  # fmt: skip


def causes(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Field and text of each reason of a refusal; one without a field if it is about the whole."""
    found = [(cause.get("field", ""), cause["message"]) for cause in answer.get("details", {}).get("causes", [])]
    return found or [("", answer["message"])]


def refused_by_cli(path: str, value: Any) -> tuple[dict[str, Any], list[str]]:
    """The document with a wrong value in it, and the CLI's lines for it."""
    base = MINIMAL + "  autoscaling: {maxReplicas: 9}\n" if path.startswith("spec.autoscaling.") else MINIMAL
    doc = changed(path, value, base)
    with pytest.raises(reading.ResourceError) as refused:
        reading.parse(doc)
    return doc, refused.value.problems


@pytest.mark.parametrize(("path", "value", "expected"), [*WRONG, *MORE_WRONG])
def test_what_the_cli_refuses_the_server_refuses_in_the_same_words(
    api: Api, path: str, value: Any, expected: str
) -> None:
    doc, lines = refused_by_cli(path, value)
    assert any(expected in line for line in lines), lines
    status, answer = api.try_out(doc)
    if (path, value) in TAKEN:
        assert status == 201, answer
        return
    assert status in (400, 404, 422), answer
    by_rules = [(field, text) for field, text in causes(answer) if not STRUCTURAL.search(text)]
    same = [
        (at, field)
        for at, ours in (line.split(": ", 1) for line in lines)
        for field, text in by_rules
        if text.endswith(f": {ours}")
    ]
    assert same or len(by_rules) < len(causes(answer)), (by_rules, lines)
    # The rule may be that of a list above the item that the CLI names.
    assert all(at.startswith(re.sub(r"\.endpoints$|\[.*", "", field)) for at, field in same), same


def test_every_rule_is_broken_by_one_of_these_cases(api: Api) -> None:
    said = set()
    for path, value, _ in [*WRONG, *MORE_WRONG]:
        doc, _ = refused_by_cli(path, value)
        if (path, value) not in TAKEN:
            said |= {text for _, text in causes(api.try_out(doc)[1])}
    for name in ("spec.engine.mode", "spec.flowTable.buckets"):
        said.add(f"Forbidden: {name} cannot replace that; keep it, or create another stack")  # tried below
    rules = [rule for _, node in ALL for rule in node.get("x-kubernetes-validations", [])]
    assert len(rules) > 40
    for rule in rules:
        words = (
            re.match(r"'(.*?)(?<!\\)'\.format\(", rule["messageExpression"]) if "messageExpression" in rule else None
        )
        pattern = (
            ".*".join(re.escape(part) for part in words[1].replace("\\'", "'").split("%s"))
            if words
            else re.escape(rule["message"])
        )
        assert any(re.search(pattern, text) for text in said), rule


# ---- what is taken -----------------------------------------------------------------------------------------------


def stacks_of_the_examples() -> list[Any]:
    return [
        pytest.param(doc, id=str(path.relative_to(ROOT)))
        for path in sorted((ROOT / "examples").rglob("*.yaml"))
        for doc in yaml.safe_load_all(path.read_text())
        if doc["kind"] == "PacketStack"
    ]


def largest(listeners: int) -> dict[str, Any]:
    """As many backends and SNAT addresses as a stack can name, for so many listeners."""
    each = limits.MAX_BACKENDS // listeners
    named = [
        {
            "name": f"listener-{i}",
            "address": f"2001:db8:ffff:ffff:ffff:ffff:ffff:{i:x}",
            "port": 443,
            "backends": {"endpoints": [{"address": f"2001:db8:1::{i:x}:{j:x}", "port": 1} for j in range(each)]},
        }
        for i in range(listeners)
    ]
    doc = changed("spec.listeners", named)
    doc["spec"]["snat"]["addresses"] = [f"2001:db8:2::{i:x}0/124" for i in range(crd_rules.MAX_SNAT_PREFIXES)]
    return doc


@pytest.mark.parametrize(
    "doc",
    [
        pytest.param(document(), id="the smallest"),
        pytest.param(document(FULL), id="all fields"),
        pytest.param(two(address="192.0.2.10", protocol="UDP"), id="two protocols"),
        pytest.param(changed("spec.engine", {"cores": 4, "memory": 2**29, "hugePages": {"size": 2**22}}), id="numbers"),
        pytest.param(changed("spec.listeners.0.address", "2001:DB8::10") | {"spec": {**document()["spec"], "snat": {"addresses": ["2001:db8::40/122", "192.0.2.64"]}}}, id="addresses"),
        pytest.param(largest(limits.MAX_LISTENERS), id="most listeners"),
        pytest.param(largest(limits.MAX_BACKENDS // crd_rules.MAX_LISTENER_ENDPOINTS), id="most backends of a listener"),
        *stacks_of_the_examples(),
    ],
)  # fmt: skip
def test_the_server_takes_what_the_cli_takes_and_fills_in_the_same(api: Api, doc: dict[str, Any]) -> None:
    status, answer = api.try_out(doc)
    assert status == 201, answer["message"]
    wanted = reading.parse(placed(doc))
    assert reading.parse(answer) == wanted


@pytest.mark.parametrize(
    "spec", [{}, {"engines": []}, {"node": "n1", "engines": [ENGINE], "lastEngine": 7}], ids=["bare", "empty", "engine"]
)
def test_a_flow_table_comes_back_as_it_was_written(api: Api, spec: dict[str, Any]) -> None:
    doc = table(**spec)
    made = api.create("flowtables", doc)
    assert kinds.read(kinds.FlowTable, made).spec == kinds.read(kinds.FlowTable, doc).spec


def test_a_flow_table_holds_all_endpoints_of_a_large_service(api: Api) -> None:
    endpoints = [{"address": f"10.1.{i >> 8}.{i & 255}", "port": 80} for i in range(limits.MAX_BACKENDS)]
    listener = {"name": "a", "address": "192.0.2.1", "port": 80, "backends": {"endpoints": endpoints}}
    made = api.create("flowtables", table(listeners=[listener]))
    assert len(made["spec"]["listeners"][0]["backends"]["endpoints"]) == limits.MAX_BACKENDS


def test_two_engines_of_a_flow_table_have_two_ids(api: Api) -> None:
    status, answer = api.ask("POST", api.path("flowtables"), placed(table(engines=[ENGINE, ENGINE])))
    assert (status, causes(answer)[0][0]) == (422, "spec.engines[1]")


# ---- what cannot change ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["engine.mode", "flowTable.buckets"])
@pytest.mark.parametrize("value", ["other", "default"])
def test_what_cannot_change_is_refused_as_the_cli_does(api: Api, path: str, value: str) -> None:
    part, field = path.split(".")
    first, other = {"mode": ("DPDK", "AFXDP"), "buckets": (512, 1024)}[field]
    stack = api.create(doc=changed(f"spec.{part}.{field}", first))
    wanted = other if value == "other" else None
    status, answer = api.change(stack, {"spec": {part: {field: wanted}}})
    assert (status, answer["reason"]) == (422, "Invalid")
    new = copy.deepcopy(stack)
    new["spec"][part][field] = other if value == "other" else {"mode": "AFXDP", "buckets": 4096}[field]
    with pytest.raises(reading.ResourceError) as refused:
        reading.check_change(reading.parse(stack), reading.parse(new))
    ((at, text),) = causes(answer)
    assert [f"{at}: {text.removeprefix('Forbidden: ')}"] == refused.value.problems


def test_everything_else_can_change(api: Api) -> None:
    stack = api.create()
    whole = document(FULL)["spec"] | {"flowTable": {"maxFlows": 2000}}
    path = api.path(name=stack["metadata"]["name"])
    status, answer = api.ask("PUT", path, {**stack, "spec": whole})
    assert status == 200, answer["message"]


# ---- scale -------------------------------------------------------------------------------------------------------


def manager_of_replicas(stack: dict[str, Any]) -> list[tuple[str, str]]:
    """Who owns spec.replicas, and by which subresource."""
    return [
        (entry["manager"], entry.get("subresource", ""))
        for entry in stack["metadata"]["managedFields"]
        if "f:replicas" in entry["fieldsV1"].get("f:spec", {})
    ]


def read(api: Api, stack: dict[str, Any]) -> dict[str, Any]:
    status, answer = api.ask("GET", api.path(name=stack["metadata"]["name"]))
    assert status == 200
    return dict(answer)


def scaled(api: Api, stack: dict[str, Any], replicas: int) -> None:
    name = stack["metadata"]["name"]
    api.kubectl("scale", "pkst", name, f"--replicas={replicas}", "-n", NAMESPACE)


def test_kubectl_scales_a_stack_and_hpa_finds_its_selector(api: Api) -> None:
    stack = api.create()
    path = api.path(name=stack["metadata"]["name"] + "/status")
    selector = "packetstack.io/stack=edge,packetstack.io/engine-state=Active"
    api.ask("PATCH", path, {"status": {"replicas": 1, "selector": selector}}, MERGE)
    scaled(api, stack, 7)
    _, scale = api.ask("GET", api.path(name=stack["metadata"]["name"] + "/scale"))
    assert (scale["spec"], scale["status"]) == ({"replicas": 7}, {"replicas": 1, "selector": selector})
    assert read(api, stack)["metadata"]["generation"] == 2


def test_a_scale_beyond_the_limit_is_refused(api: Api) -> None:
    stack = api.create()
    body = {"spec": {"replicas": limits.MAX_REPLICAS + 1}}
    status, answer = api.ask("PATCH", api.path(name=stack["metadata"]["name"] + "/scale"), body, MERGE)
    assert status == 422
    assert "spec.replicas" in answer["message"]


def apply(api: Api, name: str, spec: dict[str, Any], manager: str = "gitops") -> tuple[int, Any]:
    """Server-side apply of a whole stack."""
    doc = placed(document())
    doc["metadata"]["name"] = name
    doc["spec"] |= spec
    return api.ask("PATCH", api.path(name=name, query=f"fieldManager={manager}"), doc, APPLY)


def test_a_manifest_without_replicas_never_undoes_a_scale(api: Api) -> None:
    _, stack = apply(api, "without-replicas", {})
    assert stack["spec"]["replicas"] == 1
    scaled(api, stack, 3)
    status, again = apply(api, "without-replicas", {"unknownFlow": "Reset"})
    assert (status, again["spec"]["replicas"]) == (200, 3)


def test_a_manifest_with_replicas_conflicts_with_a_scale(api: Api) -> None:
    _, stack = apply(api, "with-replicas", {"replicas": 2})
    scaled(api, stack, 3)
    assert manager_of_replicas(read(api, stack)) == [("kubectl", "scale")]
    status, answer = apply(api, "with-replicas", {"replicas": 2})
    assert (status, answer["reason"]) == (409, "Conflict")
    assert read(api, stack)["spec"]["replicas"] == 3


def test_replicas_put_into_a_manifest_after_a_scale_of_the_default_win(api: Api) -> None:
    """Nobody owns a default, and a scale of what nobody owns leaves no owner: documented, as Kubernetes has it."""
    _, stack = apply(api, "replicas-later", {})
    scaled(api, stack, 3)
    assert manager_of_replicas(read(api, stack)) == []
    status, answer = apply(api, "replicas-later", {"replicas": 2})
    assert (status, answer["spec"]["replicas"]) == (200, 2)


# ---- status ------------------------------------------------------------------------------------------------------


def report(api: Api, name: str, node: str, **said: Any) -> None:
    """What an agent does: apply its own item of the list."""
    body = {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "FlowTable",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "status": {"nodes": [{"node": node, **said}]},
    }
    path = api.path("flowtables", f"{name}/status", f"fieldManager=packetstack-agent-{node}&force=true")
    status, answer = api.ask("PATCH", path, body, APPLY)
    assert status == 200, answer


def test_each_agent_writes_its_own_report_and_takes_it_back(api: Api) -> None:
    name = api.create("flowtables", table())["metadata"]["name"]
    report(api, name, "n1", observedGeneration=1, engines=[{"id": 1, "name": "web-1", "ready": True}])
    report(api, name, "n2", observedGeneration=1)
    report(api, name, "n1", observedGeneration=1, settled=True)
    _, answer = api.ask("GET", api.path("flowtables", name))
    assert answer["metadata"]["generation"] == 1, "a report is no change of the table"
    nodes = kinds.read(kinds.FlowTable, answer).status.nodes
    assert [(n.node, n.settled, n.engines) for n in nodes] == [("n1", True, ()), ("n2", False, ())]


def test_a_report_changes_no_spec_and_a_spec_no_report(api: Api) -> None:
    stack = api.create()
    status = {"replicas": 1, "readyReplicas": 1}
    _, answer = api.change(stack, {"spec": {"paused": True}, "status": status})
    assert (answer["spec"]["paused"], answer.get("status")) == (True, None)
    path = api.path(name=stack["metadata"]["name"] + "/status")
    _, answer = api.ask("PATCH", path, {"spec": {"paused": False}, "status": status}, MERGE)
    assert (answer["spec"]["paused"], answer["status"]) == (True, status)


# ---- for people --------------------------------------------------------------------------------------------------


def condition(kind: str, reason: str) -> dict[str, Any]:
    return {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": "2026-01-01T00:00:00Z"}


def columns(api: Api, plural: str, name: str) -> dict[str, Any]:
    """What `kubectl get -o wide` prints of an object."""
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    _, answer = api.ask("GET", api.path(plural, name), accept=accept)
    shown = [column["name"] for column in answer["columnDefinitions"]]
    return dict(zip(shown, answer["rows"][0]["cells"], strict=True))


def test_the_columns_of_kubectl_get_say_how_a_stack_is(api: Api) -> None:
    name = api.create(doc=changed("spec.replicas", 3))["metadata"]["name"]
    status = {
        "replicas": 3,
        "readyReplicas": 2,
        "drainingReplicas": 1,
        "node": "n1",
        "conditions": [condition("Degraded", "Slow"), condition("Available", "MinimumEnginesAvailable")],
    }
    api.ask("PATCH", api.path(name=f"{name}/status"), {"status": status}, MERGE)
    shown = columns(api, "packetstacks", name)
    del shown["Age"]
    assert shown == {
        "Name": name, "Desired": 3, "Engines": 3, "Ready": 2, "Draining": 1, "Available": "True",
        "Reason": "MinimumEnginesAvailable", "Mode": "AFXDP", "Node": "n1",
    }  # fmt: skip


def test_the_columns_of_kubectl_get_say_how_a_flow_table_is(api: Api) -> None:
    name = api.create("flowtables", table())["metadata"]["name"]
    report(api, name, "n1", observedGeneration=1, settled=True)
    shown = columns(api, "flowtables", name)
    assert (shown["Node"], shown["Generation"], shown["Observed"], shown["Settled"]) == ("n1", 1, "1", "true")


def engine(stack: str) -> dict[str, Any]:
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketEngine",
        "metadata": {"name": ""},
        "spec": {"stack": stack, "id": 1},
    }


def test_objects_are_selected_by_the_fields_that_matter(api: Api) -> None:
    name = api.create("packetengines", engine("chosen"))["metadata"]["name"]
    api.create("packetengines", engine("other"))
    status = {"state": "Active", "node": "n7", "ready": True, "buckets": 5}
    api.ask("PATCH", api.path("packetengines", f"{name}/status"), {"status": status}, MERGE)
    for field in ("spec.stack=chosen", "status.state=Active", "status.node=n7"):
        _, answer = api.ask("GET", api.path("packetengines", query=f"fieldSelector={field}"))
        assert [item["metadata"]["name"] for item in answer["items"]] == [name], field
    here = api.create("flowtables", table(node="only-here"))["metadata"]["name"]
    _, answer = api.ask("GET", api.path("flowtables", query="fieldSelector=spec.node=only-here"))
    assert [item["metadata"]["name"] for item in answer["items"]] == [here]


def test_kubectl_knows_the_short_names_and_one_name_for_all(api: Api) -> None:
    api.create()
    api.create("packetengines", engine("web"))
    api.create("flowtables", table())
    for short in ("pkst", "pke", "pft"):
        assert api.kubectl("get", short, "-n", NAMESPACE)
    everything = api.kubectl("get", crds.CATEGORY, "-n", NAMESPACE, "-o", "name")
    assert {line.split(".")[0] for line in everything.split()} == {"packetstack", "packetengine", "flowtable"}
    assert "packetengine" not in api.kubectl("get", "packetstack", "-n", NAMESPACE, "-o", "name")


@pytest.mark.parametrize("field", ["spec", "spec.listeners", "spec.engine.interface", "spec.autoscaling.metrics.pods"])
def test_kubectl_explains_every_field(api: Api, field: str) -> None:
    text = api.kubectl("explain", f"pkst.{field}")
    assert "FIELDS:" in text
    assert "<no description>" not in text
