"""Charts and examples before a real API server: it must accept each object, and rights must be neither few nor many."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.charts.conftest import CHART, NAMESPACE, ROOT, VALUES, Render, helm
from tests.charts.test_examples import EXAMPLES, documents
from tests.cluster.control_plane import ControlPlane
from tests.cluster.processes import ClusterError, Daemon
from tests.cluster.server import Server
from tests.operator.players import ENGINES, PODS, STACKS, PlayedNode, wait

from packetstack_core import crds, kinds, reading
from packetstack_operator import pods

# Kinds of others, which a bare control plane does not know.
FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "NetworkAttachmentDefinition", "ScaledObject"}
OPERATOR = f"system:serviceaccount:{NAMESPACE}:packetstack-operator"
AGENT = f"system:serviceaccount:{NAMESPACE}:packetstack-agent"
TABLE = yaml.safe_load((CHART / "files/rbac.yaml").read_text())

METRICS = {"custom.metrics.k8s.io", "external.metrics.k8s.io"}
AUTOSCALING = {
    "minReplicas": 2,
    "maxReplicas": 3,
    "syncPeriodSeconds": 1,
    "metrics": [
        {"type": "Pods", "pods": {"metric": {"name": "a"}, "target": {"type": "AverageValue", "averageValue": "1"}}},
        {"type": "External", "external": {"metric": {"name": "b"}, "target": {"type": "Value", "value": "1"}}},
    ],
}

Json = dict[str, Any]
Right = tuple[str, str, str]
"""Verb, resource with its subresource, API group."""


class AuditedControlPlane(ControlPlane):
    """Writes down each request of the operator."""

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    def _run(self, name: str, *options: str) -> None:
        if name == "kube-apiserver":
            policy = self.directory / "audit.yaml"
            rules = [{"level": "Metadata", "users": [OPERATOR], "omitStages": ["RequestReceived"]}, {"level": "None"}]
            policy.write_text(json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}))
            options += (f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}")
        super()._run(name, *options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditedControlPlane]:
    """With the kinds, the namespaces that the values name, and the roles of the default values."""
    running = AuditedControlPlane(tmp_path_factory.mktemp("charts") / "control-plane")
    with running:
        for name in (NAMESPACE, "team-a", "team-b"):
            running.create_namespace(name)
        running.define(*crds.definitions())
        running.apply(*roles())
        yield running


def rendered(*arguments: str) -> list[Json]:
    """The chart's objects, by its defaults."""
    done = helm("template", "packetstack", str(CHART), "--namespace", NAMESPACE, *arguments)
    assert done.returncode == 0, done.stderr
    return [o for o in yaml.safe_load_all(done.stdout) if o]


def roles(*arguments: str) -> list[Json]:
    """Those that give rights."""
    return [o for o in rendered(*arguments) if o["apiVersion"].startswith("rbac.authorization.k8s.io/")]


def accepts(server: ControlPlane, objects: list[Json], *words: str) -> None:
    """A dry run: ClusterError names what the server does not take."""
    text = yaml.safe_dump_all(objects)
    server.kubectl("apply", "--server-side", "--validate=strict", "--dry-run=server", *words, "-f", "-", stdin=text)


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_server_accepts_each_object_of_the_chart(server: ControlPlane, render: Render, values: Path) -> None:
    own = [o for o in render(values) if o["kind"] not in FOREIGN]
    assert len(own) > 10
    accepts(server, own)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_server_accepts_the_examples(server: ControlPlane, path: Path) -> None:
    own = [o for o in documents(path) if o["kind"] not in FOREIGN]
    if own:
        accepts(server, own, "--namespace=default")


# ---- Pod Security ----------------------------------------------------------------------------------------------


def refusal(server: ControlPlane, level: str, pod: Json) -> str:
    """What Pod Security of this level has against a pod; empty when nothing."""
    name = f"at-{level}"
    server.create_namespace(name, enforce=level)
    spec = {k: v for k, v in pod["spec"].items() if k != "serviceAccountName"}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one", "namespace": name}, "spec": spec}
    try:
        server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(body))
    except ClusterError as e:
        return str(e)
    return ""


def pod_of(kind: str) -> Json:
    found = next(o for o in rendered() if o["kind"] == kind)
    template: Json = found if kind == "Pod" else found["spec"]["template"]
    return template


@pytest.mark.parametrize("kind", ["Deployment", "Pod"])
def test_the_operator_and_the_chart_s_test_pass_the_restricted_profile(server: ControlPlane, kind: str) -> None:
    assert refusal(server, "restricted", pod_of(kind)) == ""


def test_the_agent_needs_a_namespace_for_privileged_pods(server: ControlPlane) -> None:
    assert 'violates PodSecurity "baseline' in refusal(server, "baseline", pod_of("DaemonSet"))
    assert refusal(server, "privileged", pod_of("DaemonSet")) == ""


def test_all_that_the_baseline_profile_has_against_an_engine_is_its_directory_of_the_node(server: ControlPlane) -> None:
    raw = documents(ROOT / "examples/kubernetes/veth.yaml")[-1]
    raw["metadata"] |= {"uid": "00000000-0000-0000-0000-000000000000", "namespace": "default"}
    stack = reading.parse(raw)
    engine = kinds.TableEngine(id=1, name="edge-1", state="Pending", template="0", queues=4, cores=1)
    pod = pods.pod(raw, stack, stack.spec.engine, engine, "localhost/packetstack:0.1.0", None)
    said = refusal(server, "baseline", pod)
    assert said.endswith('violates PodSecurity "baseline:latest": hostPath volumes (volume "run")')


# ---- rights ----------------------------------------------------------------------------------------------------


def table(*parts: str) -> set[Right]:
    """What these parts of files/rbac.yaml allow."""
    return {
        (verb, resource, group)
        for part in parts
        for rule in TABLE[part]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for group in rule["apiGroups"]
    }


def allowed(server: ControlPlane, who: str, rights: set[Right], namespace: str = "default") -> set[Right]:
    """Those of `rights` that the server grants, by SubjectAccessReviews."""
    ordered = sorted(rights)
    reviews: list[Json] = []
    for verb, resource, group in ordered:
        name, _, sub = resource.partition("/")
        asked = {"verb": verb, "group": group, "resource": name, "subresource": sub, "namespace": namespace}
        spec = {"user": who, "groups": ["system:serviceaccounts", "system:authenticated"], "resourceAttributes": asked}
        reviews.append({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec})
    said = server.kubectl("create", "-o", "jsonpath={.status.allowed} ", "-f", "-", stdin=yaml.safe_dump_all(reviews))
    return {right for right, answer in zip(ordered, said.split(), strict=True) if answer == "true"}


def test_programs_have_the_rights_of_the_table(server: ControlPlane) -> None:
    for who, parts in ((OPERATOR, ("operator", "operatorCluster")), (AGENT, ("agent",))):
        assert allowed(server, who, table(*parts)) == table(*parts)
    rules = {o["metadata"]["name"]: o["rules"] for o in roles() if o["kind"] == "ClusterRole"}
    assert rules["packetstack-operator"] == TABLE["operator"] + TABLE["operatorCluster"]
    assert rules["packetstack-agent"] == TABLE["agent"]


def test_programs_have_no_other_rights(server: ControlPlane) -> None:
    for who, rights in {
        OPERATOR: {
            ("get", "secrets", ""),
            ("get", "configmaps", ""),
            ("create", "pods/exec", ""),
            ("create", "packetstacks", "packetstack.io"),
            ("delete", "packetstacks", "packetstack.io"),
            ("patch", "clusterroles", "rbac.authorization.k8s.io"),
            ("patch", "customresourcedefinitions", "apiextensions.k8s.io"),
        },
        AGENT: {
            ("patch", "flowtables", "packetstack.io"),
            ("get", "packetstacks", "packetstack.io"),
            ("get", "pods", ""),
            ("get", "secrets", ""),
            ("patch", "nodes", ""),
        },
    }.items():
        assert allowed(server, who, rights) == set()


def used(server: AuditedControlPlane, start: int) -> tuple[set[Right], set[Right]]:
    """What the operator asked for since byte `start` of the log, and what of it was forbidden."""
    done: set[Right] = set()
    forbidden: set[Right] = set()
    for line in server.audit_log.read_bytes()[start:].splitlines():
        event = json.loads(line)
        at = event.get("objectRef")
        if at is None:
            continue  # discovery
        resource = at["resource"] + (f"/{at['subresource']}" if at.get("subresource") else "")
        group = at.get("apiGroup", "")
        # Of a metrics API each metric is a resource.
        right = (event["verb"], "*" if group in METRICS else resource, group)
        code = event.get("responseStatus", {}).get("code")
        (forbidden if code == 403 else done).add(right)
        if right[0] == "patch" and code == 201:  # an apply that creates needs both rights
            done.add(("create", *right[1:]))
    return done, forbidden


# Rights that a life of a stack without mishaps does not use, each with the case that needs it.
SPARE = [
    ("list", "events", ""),  # about pods that do not start
    ("patch", "poddisruptionbudgets", "policy"),  # that were edited by hand
]


def live(
    server: AuditedControlPlane, namespace: str, directory: Path, *arguments: str
) -> tuple[set[Right], set[Right]]:
    """Run the real operator, with the rights of its ServiceAccount alone, through the life of a stack."""
    start = server.audit_log.stat().st_size if server.audit_log.exists() else 0
    client = Server(server.kubeconfig)
    web, service, stack = documents(ROOT / "examples/kubernetes/veth.yaml")
    for o in (web, service, stack):
        o["metadata"]["namespace"] = namespace
    command = ["env", f"KUBECONFIG={server.kubeconfig_for(OPERATOR)}", "PACKETSTACK_IMAGE=localhost/packetstack:0.1.0"]
    command += [
        sys.executable,
        "-c",
        "from packetstack_operator.main import main; main()",
        "--listen=127.0.0.1:0",
        *arguments,
    ]
    path = f"{STACKS.format(namespace)}/edge"

    def blind() -> bool:
        conditions = client.get(path).get("status", {}).get("conditions", ())
        return any(c["type"] == "ScalingActive" and c["status"] == "False" for c in conditions)

    def active(count: int) -> bool:
        operator.check()
        status = client.get(path).get("status", {})
        return bool(status.get("readyReplicas") == count and status.get("replicas") == count)

    operator = Daemon("packetstack-operator", command, directory / "operator.log")
    try:
        with PlayedNode(client, namespace) as node:
            server.apply(service, stack)
            wait(lambda: active(2), 30)
            client.merge(path, {"spec": {"replicas": 1}})
            wait(lambda: active(1), 30)
            client.merge(path, {"spec": {"autoscaling": AUTOSCALING}})
            wait(lambda: active(2), 30)
            wait(blind, 30)  # no metrics API is there, which it only hears when it may ask
            client.merge(path, {"spec": {"autoscaling": None, "replicas": 1}})
            wait(lambda: active(1), 30)
            client.merge(path, {"spec": {"engine": {"cores": 2}}})
            wait(lambda: client.get(path)["status"].get("updatedReplicas") == 1 and active(1), 30)
            wait(lambda: len(client.items(ENGINES.format(namespace))) == 1, 30)
            client.delete(path)
            wait(
                lambda: client.get(path) is None and not client.items(PODS.format(namespace), "packetstack.io/stack"),
                30,
            )
            assert node.broken == []
        operator.check()
    finally:
        operator.kill()
        client.close()
    return used(server, start)


def test_the_operator_uses_the_rights_of_the_table_and_needs_no_other(
    server: AuditedControlPlane, tmp_path: Path
) -> None:
    done, forbidden = live(server, "default", tmp_path)
    assert forbidden == set()
    unused = table("operator", "operatorCluster") - done
    assert sorted(unused) == SPARE, "rights that nothing uses, or SPARE ones that something does"


def test_an_operator_of_a_namespace_makes_do_with_a_role_there(server: AuditedControlPlane, tmp_path: Path) -> None:
    server.kubectl("delete", "clusterrolebinding", "packetstack-operator")
    server.apply(*roles("--values", str(CHART / "ci/namespaced-values.yaml")))
    try:
        assert allowed(server, OPERATOR, table("operator"), "team-b") == table("operator")
        assert allowed(server, OPERATOR, table("operator"), "default") == set()
        _, forbidden = live(server, "team-a", tmp_path, "--namespace=team-a", "--namespace=team-b")
        # Asked for, and done without.
        assert forbidden <= {
            ("get", "customresourcedefinitions", "apiextensions.k8s.io"),
            ("get", "namespaces", ""),
        }
    finally:
        server.apply(*roles())
