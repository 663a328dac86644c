"""The chart without a cluster: what Helm makes of it, and that its documents say the same."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.charts.conftest import CHART, NAMESPACE, ROOT, VALUES, Render, helm
from tests.cluster.kubernetes_binaries import find

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def leaves(schema: dict[str, Any], values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Value by path, as far down as the schema names fields."""
    found: dict[str, Any] = {}
    for name, part in schema["properties"].items():
        if path == "" and name == "global":
            continue
        if "properties" in part:
            found |= leaves(part, values[name], f"{path}{name}.")
        else:
            found[path + name] = values[name]
    return found


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_helm_finds_no_fault_with_the_chart(values: Path) -> None:
    done = helm("lint", "--strict", "--values", str(values), str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_every_object_has_the_usual_labels_and_no_name_twice(render: Render, values: Path) -> None:
    seen = set()
    for o in render(values):
        meta = o["metadata"]
        key = (o["kind"], meta.get("namespace"), meta["name"])
        assert key not in seen
        seen.add(key)
        for label in ("name", "instance", "version", "component", "part-of", "managed-by"):
            assert f"app.kubernetes.io/{label}" in meta["labels"], key


def test_the_schema_describes_each_value_and_only_those() -> None:
    paths = leaves(SCHEMA, DEFAULTS)
    assert len(paths) > 20

    def every(schema: dict[str, Any], values: dict[str, Any]) -> None:
        assert set(schema["properties"]) - {"global"} == set(values)
        assert schema["additionalProperties"] is False
        for name, part in schema["properties"].items():
            if "properties" in part:
                every(part, values[name])

    every(SCHEMA, DEFAULTS)


@pytest.mark.parametrize(
    "wrong",
    [
        "replicas=2",
        "image.name=x",
        "operator.replicas=2",
        "agent.privileged=false",
        "networkPolicy.enable=true",
        "monitoring.alert.enabled=true",
        "monitoring.scrape=Pod",
        "agent.metricsPort=0",
        "agent.uplinks={eth1:client}",
        "agent.uplinks={eth1:}",
        "monitoring.alerts.disabled={NoSuchAlert}",
        "image.digest=sha256:1",
    ],
)
def test_a_value_that_the_chart_does_not_have_is_refused(wrong: str) -> None:
    done = helm("template", "packetstack", str(CHART), "--set", wrong)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


def test_the_readme_lists_each_value_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", (CHART / "README.md").read_text(), re.MULTILINE)
    assert {path: yaml.safe_load(default) for path, default in rows} == leaves(SCHEMA, DEFAULTS)
    assert [path for path, _ in rows] == list(leaves(SCHEMA, DEFAULTS))


def test_engines_get_the_image_of_the_operator(render: Render) -> None:
    digest = "sha256:" + "0" * 64
    for settings, image in (
        ((), "localhost/packetstack:0.1.0"),
        (('image={"repository": "registry.example/p", "tag": "9"}',), "registry.example/p:9"),
        ((f'image={{"tag": "9", "digest": "{digest}"}}',), f"localhost/packetstack@{digest}"),
    ):
        objects = render(None, *settings)
        operator = next(o for o in objects if o["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"][0]
        agent = next(o for o in objects if o["kind"] == "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
        assert operator["image"] == agent["image"] == image
        assert {"name": "PACKETSTACK_IMAGE", "value": image} in operator["env"]


def test_an_agent_has_no_limit_of_memory_since_flows_and_rings_of_all_stacks_are_charged_to_it(render: Render) -> None:
    agent = next(o for o in render(None) if o["kind"] == "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
    assert set(agent["resources"]) == {"requests"}


@pytest.mark.parametrize("on", [False, True])
def test_who_may_edit_a_namespace_may_make_stacks_in_it_only_if_the_cluster_says_so(render: Render, on: bool) -> None:
    objects = render(None, *(('rbac={"aggregateToEdit": true}',) if on else ()))
    roles = {o["metadata"]["name"]: o for o in objects if o["kind"] == "ClusterRole"}
    given = {
        name: {label.rpartition("/")[2] for label in role["metadata"]["labels"] if "/aggregate-to-" in label}
        for name, role in roles.items()
    }
    assert given["packetstack-edit"] == ({"aggregate-to-edit", "aggregate-to-admin"} if on else set())
    assert "aggregate-to-view" in given["packetstack-view"]
    assert {v for rule in roles["packetstack-view"]["rules"] for v in rule["verbs"]} == {"get", "list", "watch"}


def test_an_operator_of_named_namespaces_has_no_rights_elsewhere(render: Render) -> None:
    objects = render(CHART / "ci/namespaced-values.yaml")
    named = [
        (o["kind"], o["metadata"].get("namespace")) for o in objects if o["metadata"]["name"] == "packetstack-operator"
    ]
    assert ("Role", "team-a") in named
    assert ("RoleBinding", "team-b") in named
    assert ("ClusterRole", None) not in named
    assert ("ClusterRoleBinding", None) not in named
    deployment = next(o for o in objects if o["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["args"] == [
        "--agent-port=9470",
        "--namespace=team-a",
        "--namespace=team-b",
    ]


def test_the_operator_reaches_the_agents_at_the_port_that_they_are_given(render: Render) -> None:
    objects = render(CHART / "ci/everything-values.yaml")
    deployment = next(o for o in objects if o["kind"] == "Deployment")
    assert "--agent-port=9471" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    [policy] = [o for o in objects if o["kind"] == "NetworkPolicy"]
    assert {"ports": [{"port": 9471, "protocol": "TCP"}]} in policy["spec"]["egress"]


@pytest.mark.parametrize("on", [False, True])
def test_a_second_operator_stands_by_only_with_a_lease_and_the_right_to_it(render: Render, on: bool) -> None:
    objects = render(None, *(('operator={"standby": true}',) if on else ()))
    spec = next(o for o in objects if o["kind"] == "Deployment")["spec"]
    arguments = spec["template"]["spec"]["containers"][0]["args"]
    rights = [r for o in objects if o["kind"] == "Role" for r in o["rules"] if r["resources"] == ["leases"]]
    lease = f"--lease={NAMESPACE}/packetstack-operator"
    assert (spec["replicas"], lease in arguments, bool(rights)) == ((2, True, True) if on else (1, False, False))
    if not on:
        assert spec["strategy"] == {"type": "Recreate"}, "two at a time would write the same flow tables"
        return
    assert {v for r in rights for v in r["verbs"]} == {"create", "get", "update"}
    binding = next(o for o in objects if o["kind"] == "RoleBinding")
    assert binding["metadata"]["namespace"] == NAMESPACE
    assert binding["subjects"][0]["name"] == spec["template"]["spec"]["serviceAccountName"]


@pytest.mark.parametrize("component", ["operator", "agent"])
def test_the_programs_understand_their_arguments(render: Render, component: str) -> None:
    kind = {"operator": "Deployment", "agent": "DaemonSet"}[component]
    names = set()
    for values in VALUES:
        container = next(o for o in render(values) if o["kind"] == kind)["spec"]["template"]["spec"]["containers"][0]
        assert container["command"] == [f"packetstack-{component}"]
        names |= {word.split("=")[0] for word in container.get("args", ())}
    source = (ROOT / component / f"packetstack_{component}/main.py").read_text()
    for name in names:
        assert f'"{name}"' in source, f"packetstack-{component} has no {name}"


def test_monitors_and_policies_select_what_is_there(render: Render) -> None:
    for values in VALUES:
        objects = render(values)
        pods = {
            o["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: o["spec"]["template"]
            for o in objects
            if o["kind"] in ("Deployment", "DaemonSet")
        }
        services = [o for o in objects if o["kind"] == "Service"]
        for o in objects:
            if o["kind"] in ("ServiceMonitor", "PodMonitor", "NetworkPolicy", "Service"):
                spec = o["spec"]
                selector = spec.get("podSelector", spec.get("selector", {}))
                wanted = selector.get("matchLabels", selector)
                among = (
                    [s["metadata"]["labels"] for s in services]
                    if o["kind"] == "ServiceMonitor"
                    else [p["metadata"]["labels"] for p in pods.values()]
                )
                assert sum(wanted.items() <= labels.items() for labels in among) == 1, (
                    o["kind"],
                    o["metadata"]["name"],
                )
        for template in pods.values():
            assert [p["name"] for p in template["spec"]["containers"][0]["ports"]] == ["metrics"]


# ---- without Helm ----------------------------------------------------------------------------------------------


def test_the_agent_has_these_capabilities_and_no_other(render: Render) -> None:
    (agent,) = [o for o in render(VALUES[0]) if o["kind"] == "DaemonSet"]
    (container,) = agent["spec"]["template"]["spec"]["containers"]
    rights = container["securityContext"]
    documented = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    assert not rights.get("privileged")
    assert rights["capabilities"] == {"drop": ["ALL"], "add": sorted(documented)}
    assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
    assert rights["readOnlyRootFilesystem"]


def test_the_flat_manifest_is_what_the_charts_give(tmp_path: Path) -> None:
    target = tmp_path / "install.yaml"
    environment = {**os.environ, "HELM": str(find("helm"))}
    subprocess.run([ROOT / "deploy/render", target], check=True, env=environment)
    assert target.read_text() == (ROOT / "deploy/install.yaml").read_text(), "run make manifests"


def test_the_flat_manifest_has_no_trace_of_helm_and_makes_its_namespace_first() -> None:
    text = (ROOT / "deploy/install.yaml").read_text()
    assert "Helm" not in text
    assert "helm.sh" not in text
    objects = [o for o in yaml.safe_load_all(text) if o]
    assert (objects[0]["kind"], objects[0]["metadata"]["name"]) == ("Namespace", NAMESPACE)
    kinds = [o["kind"] for o in objects]
    assert kinds.count("CustomResourceDefinition") == 3
    assert {"Deployment", "DaemonSet", "ClusterRole", "NetworkPolicy"} <= set(kinds)


def test_the_overlay_that_the_kustomize_base_describes_changes_each_image(tmp_path: Path) -> None:
    base, overlay = tmp_path / "deploy", tmp_path / "mine"
    for directory in (base, overlay):
        directory.mkdir()
    for name in ("kustomization.yaml", "install.yaml"):
        (base / name).write_text((ROOT / "deploy" / name).read_text())
    described = re.findall(r"^#   (.*)$", (base / "kustomization.yaml").read_text(), re.MULTILINE)
    (overlay / "kustomization.yaml").write_text("\n".join(described))
    done = subprocess.run([find("kubectl"), "kustomize", overlay], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "localhost/packetstack" not in done.stdout
    assert done.stdout.count("registry.example/packetstack:0.1.0") == 3
