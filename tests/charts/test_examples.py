"""The examples for Kubernetes, as far as they can be judged without a server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.charts.conftest import ROOT

from packetstack_core import reading, resources

EXAMPLES = sorted((ROOT / "examples/kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of an example."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def test_the_readme_names_each_example() -> None:
    text = (ROOT / "examples/kubernetes/README.md").read_text()
    assert re.findall(r"\]\((\S+\.yaml)\)", text) != []
    assert sorted(re.findall(r"\]\((\S+\.yaml)\)", text)) == [path.name for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_stack_of_an_example_is_one_that_the_models_accept(path: Path) -> None:
    stacks = [d for d in documents(path) if d["kind"] == "PacketStack"]
    for stack in stacks:
        assert reading.parse(stack).name == "edge"
    for other in documents(path):
        target = other.get("spec", {}).get("scaleTargetRef")
        if target:
            assert target == {"apiVersion": resources.API_VERSION, "kind": resources.KIND, "name": "edge"}
    assert len(stacks) == (path.stem not in ("hpa", "keda"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_stack_uses_the_attachment_that_its_example_defines(path: Path) -> None:
    given = {d["metadata"]["name"]: d for d in documents(path) if d["kind"] == "NetworkAttachmentDefinition"}
    for definition in given.values():
        config = json.loads(definition["spec"]["config"])
        assert config["cniVersion"]
        assert config["type"] in ("bridge", "sriov")
    for stack in (d for d in documents(path) if d["kind"] == "PacketStack"):
        interface = stack["spec"]["engine"]["interface"]
        used = next(iter(interface.values()))
        if "networkAttachmentDefinition" in used:
            definition = given[used["networkAttachmentDefinition"]]
            resource = definition["metadata"].get("annotations", {}).get("k8s.v1.cni.cncf.io/resourceName")
            assert resource == used.get("resourceName")
        if "resourceClaimTemplateName" in used:
            assert used["resourceClaimTemplateName"] in [d["metadata"]["name"] for d in documents(path)]


@pytest.mark.parametrize("name", ["hpa", "keda"])
def test_an_autoscaler_asks_for_a_metric_of_the_agent(name: str) -> None:
    text = (ROOT / f"examples/kubernetes/{name}.yaml").read_text()
    known = (ROOT / "docs/metrics.md").read_text()
    metrics = set(re.findall(r"\b(packetstack_\w+_total)\b", text))
    assert metrics == {"packetstack_core_busy_cycles_total", "packetstack_core_cycles_total"}
    assert all(f"`{metric}`" in known for metric in metrics)
