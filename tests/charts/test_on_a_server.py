"""Charts and examples before a real API server: it must accept each object, and rights must be what the table says."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.charts.conftest import CHART, NAMESPACE, ROOT, VALUES, Render, helm
from tests.charts.test_examples import EXAMPLES, documents
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubernetes_binaries import find

from packetstack_core import kinds, resources
from packetstack_operator import pods

# Kinds of others, which a bare control plane does not know.
FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "NetworkAttachmentDefinition", "ScaledObject"}
OPERATOR = f"system:serviceaccount:{NAMESPACE}:packetstack-operator"
AGENT = f"system:serviceaccount:{NAMESPACE}:packetstack-agent"


@pytest.fixture(scope="module")
def server(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """With the kinds, the namespaces that the values name, and the roles of the default values."""
    crds = helm("template", "crds", str(ROOT / "charts/packetstack-crds"))
    assert crds.returncode == 0, crds.stderr
    names = (NAMESPACE, "team-a", "team-b")
    spaces = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in names]
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": NAMESPACE}}
    roles = [o for o in rendered() if "rbac" in o["apiVersion"]]
    apply(control_plane, [*yaml.safe_load_all(crds.stdout), *spaces, account, *roles])
    control_plane.kubectl("wait", "--for=condition=Established", "crd", "--all")
    yield control_plane
    delete(control_plane, [*spaces, *roles])


def rendered() -> list[dict[str, Any]]:
    """The chart's objects by its defaults."""
    done = helm("template", "packetstack", str(CHART), "--namespace", NAMESPACE)
    return [o for o in yaml.safe_load_all(done.stdout) if o]


def kubectl(server: ControlPlane, *words: str, objects: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """kubectl with objects on its standard input; not checked."""
    command = [str(find("kubectl")), "--kubeconfig", str(server.kubeconfig), *words, "-f", "-"]
    text = yaml.safe_dump_all([o for o in objects if o])
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def apply(server: ControlPlane, objects: list[dict[str, Any]], *words: str) -> None:
    done = kubectl(server, "apply", "--server-side", "--validate=strict", *words, objects=objects)
    assert done.returncode == 0, done.stderr


def delete(server: ControlPlane, objects: list[dict[str, Any]]) -> None:
    kubectl(server, "delete", "--ignore-not-found", "--wait=false", objects=objects)


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_server_accepts_each_object_of_the_chart(server: ControlPlane, render: Render, values: Path) -> None:
    own = [o for o in render(values) if o["kind"] not in FOREIGN]
    assert len(own) > 10
    apply(server, own, "--dry-run=server")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_server_accepts_the_examples(server: ControlPlane, path: Path) -> None:
    own = [o for o in documents(path) if o["kind"] not in FOREIGN]
    if own:
        apply(server, own, "--dry-run=server", "--namespace=default")


# ---- Pod Security ----------------------------------------------------------------------------------------------


def refusal(server: ControlPlane, level: str, pod: dict[str, Any]) -> str:
    """What Pod Security of this level has against a pod; empty when nothing."""
    name = f"at-{level}"
    labels = {"pod-security.kubernetes.io/enforce": level}
    apply(server, [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}])
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
    apply(server, [account])
    spec = {k: v for k, v in pod["spec"].items() if k != "serviceAccountName"}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one", "namespace": name}, "spec": spec}
    done = kubectl(server, "create", "--dry-run=server", objects=[body])
    return done.stderr


def pod_of(kind: str) -> dict[str, Any]:
    found = next(o for o in rendered() if o["kind"] == kind)
    template: dict[str, Any] = found if kind == "Pod" else found["spec"]["template"]
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
    stack = resources.parse(raw)
    engine = kinds.TableEngine(id=1, name="edge-1", state="Pending", template="0", queues=4, cores=1)
    said = refusal(server, "baseline", pods.pod(raw, stack, engine, "localhost/packetstack:0.1.0", None))
    assert 'violates PodSecurity "baseline:latest": hostPath volumes (volume "run")' in said


# ---- rights ----------------------------------------------------------------------------------------------------


Right = tuple[str, str, str, str]
"""Who, verb, resource, group."""


def allowed(server: ControlPlane, rights: list[Right]) -> list[Right]:
    """Those of `rights` that the server grants, by SubjectAccessReviews."""
    reviews: list[dict[str, Any]] = []
    for who, verb, resource, group in rights:
        name, _, sub = resource.partition("/")
        asked = {"verb": verb, "group": group, "resource": name, "subresource": sub, "namespace": "default"}
        spec = {"user": who, "groups": ["system:serviceaccounts", "system:authenticated"], "resourceAttributes": asked}
        reviews.append({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec})
    done = kubectl(server, "create", "-o", "jsonpath={.status.allowed} ", objects=reviews)
    assert done.returncode == 0, done.stderr
    return [right for right, answer in zip(rights, done.stdout.split(), strict=True) if answer == "true"]


TABLE = yaml.safe_load((CHART / "files/rbac.yaml").read_text())


def test_programs_have_the_rights_of_the_table(server: ControlPlane) -> None:
    rights = [
        (who, verb, resource, group)
        for who, part in ((OPERATOR, "operator"), (OPERATOR, "operatorCluster"), (AGENT, "agent"))
        for rule in TABLE[part]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for group in rule["apiGroups"]
    ]
    assert len(rights) > 40
    assert allowed(server, rights) == rights


def test_programs_have_no_other_rights(server: ControlPlane) -> None:
    roles = {o["metadata"]["name"]: o for o in rendered() if o["kind"] == "ClusterRole"}
    assert roles["packetstack-operator"]["rules"] == TABLE["operator"] + TABLE["operatorCluster"]
    assert roles["packetstack-agent"]["rules"] == TABLE["agent"]
    rights = [
        (OPERATOR, "get", "secrets", ""),
        (OPERATOR, "get", "configmaps", ""),
        (OPERATOR, "create", "pods/exec", ""),
        (OPERATOR, "create", "packetstacks", "packetstack.io"),
        (OPERATOR, "delete", "packetstacks", "packetstack.io"),
        (OPERATOR, "patch", "clusterroles", "rbac.authorization.k8s.io"),
        (OPERATOR, "patch", "customresourcedefinitions", "apiextensions.k8s.io"),
        (AGENT, "patch", "flowtables", "packetstack.io"),
        (AGENT, "get", "packetstacks", "packetstack.io"),
        (AGENT, "get", "pods", ""),
        (AGENT, "get", "secrets", ""),
        (AGENT, "patch", "nodes", ""),
    ]
    assert allowed(server, rights) == []
