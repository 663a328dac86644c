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
from tests.core.test_kinds import ENGINE, table
from tests.core.test_resources import FULL, MINIMAL, SECOND, WRONG, changed, document, two

from packetstack_core import crds, kinds, resources

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
        self.connection.request(method, path, body and json.dumps(body), {"Content-Type": kind, "Accept": accept})
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
        kept = {k: v for k, v in doc["metadata"].items() if k not in ("uid", "managedFields")}
        doc["metadata"] = {**kept, "namespace": NAMESPACE}
    return doc


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Iterator[Api]:
    control_plane.apply(*crds.definitions())
    names = [f"crd/{made['metadata']['name']}" for made in crds.definitions()]
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names)
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    control_plane.apply(space)
    yield Api(control_plane)
    control_plane.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


# ---- what is refused ---------------------------------------------------------------------------------------------

# What the schema itself says is said in Kubernetes' words.
STRUCTURAL = re.compile(
    r"must be of type|should be (greater|less) than or equal|should have at least|should match|Required value"
    r"|Unsupported value|Too long|Too many|Duplicate value|unknown field|does not match the expected|is not valid"
    r"|RFC 1123|[Nn]ame.* required|cannot be handled as|does not match the namespace|some validation rules were not"
)
# The API server fills in defaults for null, and the cost of a rule bounds what it may compare: the operator says these.
LEFT_TO_THE_OPERATOR = {
    ("spec.replicas", None),
    ("spec.replicas", 2.0),
    ("spec.snat.addresses", ("10.9.0.0/22", "10.10.0.0/32")),
    ("spec.snat.addresses", ("10.9.0.0/30", "10.9.0.1")),
    ("spec.listeners.0.backends.endpoints.0.address", "192.0.2.70"),
}

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
    ("spec.autoscaling", {"maxReplicas": 2, "behavior": {"scaleUp": {"policies": []}}}, "has no policy"),
    ("spec.autoscaling", {"maxReplicas": 2, "behavior": {"scaleUp": {"tolerance": "-0.1"}}}, "0 or more"),
    ("spec.autoscaling.schedules", [{"name": "day", "cron": "0 8 * * *", "durationSeconds": 60, "minReplicas": 5, "maxReplicas": 4}],
     "has minReplicas 5 above maxReplicas 4; use minReplicas <= maxReplicas"),
    ("metadata.name", "a.b", '"a.b" is not a DNS label'),
]  # fmt: skip


def causes(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Field and text of each reason of a refusal; one without a field if it is about the whole."""
    found = [(cause.get("field", ""), cause["message"]) for cause in answer.get("details", {}).get("causes", [])]
    return found or [("", answer["message"])]


def frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


@pytest.mark.parametrize(("path", "value", "expected"), [*WRONG, *MORE_WRONG])
def test_what_the_cli_refuses_the_server_refuses_in_the_same_words(
    api: Api, path: str, value: Any, expected: str
) -> None:
    doc = document()
    if path.startswith("spec.autoscaling."):
        doc["spec"]["autoscaling"] = {"maxReplicas": 9}
        *parents, last = path.split(".")
        doc["spec"]["autoscaling"][last] = value
    else:
        doc = changed(path, value)
    with pytest.raises(resources.ResourceError) as refused:
        resources.parse(doc)
    assert any(expected in line for line in refused.value.problems), refused.value.problems
    status, answer = api.try_out(doc)
    left = isinstance(value, int | str | float | list | None) and (path, frozen(value)) in LEFT_TO_THE_OPERATOR
    if left:
        assert status == 201, answer
        return
    assert status in (400, 404, 422), answer
    said = [line.split(": ", 1) for line in refused.value.problems]
    for field, text in causes(answer):
        if STRUCTURAL.search(text):
            continue
        same = [at for at, ours in said if text.endswith(f": {ours}")]
        assert same, (field, text, said)
        assert any(at.startswith(field.split("[")[0]) for at in same), (field, same)
