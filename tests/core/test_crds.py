"""The CustomResourceDefinitions: what Kubernetes demands of a schema, and that the written files are the models'."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from packetstack_core import crds, kinds, resources

WRITTEN = Path(__file__).resolve().parents[2] / "charts/packetstack-crds/templates"
FILES = crds.files()
DEFINITIONS = {made["spec"]["names"]["kind"]: made for made in crds.definitions()}


def root(kind: str) -> dict[str, Any]:
    """The schema of a whole object."""
    (version,) = DEFINITIONS[kind]["spec"]["versions"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below one, with its path."""
    yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from nodes(below, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}.*")


ALL = [(f"{kind}{path}", node) for kind in DEFINITIONS for path, node in nodes(root(kind))]


def test_the_written_files_are_what_the_models_say() -> None:
    assert {path.name: path.read_text() for path in WRITTEN.iterdir()} == FILES, "run `make manifests`"


def test_the_written_files_are_the_definitions_and_hold_no_template() -> None:
    for name, text in FILES.items():
        assert "{{" not in text, name
        read = yaml.safe_load(text)
        assert read == DEFINITIONS[read["spec"]["names"]["kind"]]


def test_schemas_are_structural() -> None:
    allowed = {
        "type", "description", "properties", "required", "items", "additionalProperties", "default", "enum", "format",
        "minimum", "maximum", "minItems", "maxItems", "maxLength", "pattern",
    }  # fmt: skip
    for path, node in ALL:
        for key in node:
            assert key in allowed or key.startswith("x-kubernetes-"), f"{path}: {key}"
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert node.get("default", 0) is not None, path


def test_every_field_has_a_description() -> None:
    kubernetes_own = ("apiVersion", "kind", "metadata", "name")
    bare = [
        f"{path}.{name}"
        for path, node in ALL
        for name, field in node.get("properties", {}).items()
        if "description" not in field and not (path.count(".") <= 1 and name in kubernetes_own)
    ]
    assert not bare


def test_the_keys_of_a_keyed_list_are_required_in_its_items() -> None:
    keyed = [(path, node) for path, node in ALL if node.get("x-kubernetes-list-type") == "map"]
    assert {path for path, _ in keyed} >= {
        "PacketStack.spec.listeners",
        "PacketStack.spec.listeners[].backends.endpoints",
        "PacketStack.status.conditions",
        "FlowTable.spec.engines",
        "FlowTable.status.nodes",
        "FlowTable.status.nodes[].engines",
    }
    for path, node in keyed:
        assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"]), path


def test_every_list_says_how_writers_share_it() -> None:
    for path, node in ALL:
        assert node.get("type") != "array" or "x-kubernetes-list-type" in node, path


def filled(value: Any, schema: dict[str, Any]) -> Any:
    """What an API server makes of a value: defaults for the fields that are absent."""
    if isinstance(value, list):
        return [filled(one, schema["items"]) for one in value]
    if not isinstance(value, dict):
        return value
    fields = schema.get("properties", {})
    there = {n: copy.deepcopy(f["default"]) for n, f in fields.items() if "default" in f} | value
    return {n: filled(one, fields[n]) if n in fields else one for n, one in there.items()}


def test_defaults_are_whole_so_that_rules_see_no_holes() -> None:
    for path, node in ALL:
        if "default" in node:
            assert filled(node["default"], node) == node["default"], path


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_the_defaults_are_those_of_the_models(protocol: str) -> None:
    backends = {"endpoints": [{"address": "10.1.0.5", "port": 8443}]}
    listener = {"name": "web", "address": "192.0.2.10", "protocol": protocol, "port": 443, "backends": backends}
    spec = {"listeners": [listener], "snat": {"addresses": ["192.0.2.64/28"]}, "autoscaling": {"maxReplicas": 3}}
    whole = filled(spec, root("PacketStack")["properties"]["spec"])
    assert whole["engine"]["interface"] == {"veth": {}}
    assert "healthCheck" not in whole["listeners"][0], "its type depends on the protocol"
    assert resources.Spec.model_validate(whole) == resources.Spec.model_validate(spec)


# ---- bounds ------------------------------------------------------------------------------------------------------

# What the server refuses and the model takes, since each item is compared with others there, which has its cost.
NARROWER = {"Backends.endpoints", "Snat.addresses"}
ITEMS: dict[str, Any] = {
    "Spec.listeners": {"name": "web", "address": "192.0.2.10", "port": 443, "backends": {"endpoints": []}},
    "Backends.endpoints": {"address": "10.1.0.5", "port": 8443},
    "Listener.allowedSources": "192.0.2.0/24",
    "Snat.addresses": "192.0.2.64/28",
    "Autoscaling.metrics": {
        "type": "Engine",
        "engine": {"name": "ActiveFlows", "target": {"type": "AverageValue", "averageValue": "1"}},
    },
    "Autoscaling.schedules": {"name": "day", "cron": "0 8 * * *", "durationSeconds": 60},
    "Vertical.triggers": {"type": "ActiveFlows", "above": "1"},
    "ScalingRules.policies": {"type": "Pods", "value": 1, "periodSeconds": 60},
}


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, be it in a list or optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in getattr(annotation, "__args__", ()) if (m := model_in(a))), None)


def fields(model: type[BaseModel], schema: dict[str, Any]) -> Iterator[tuple[str, FieldInfo, dict[str, Any]]]:
    """Every field of a model and the models in it: its name, and what model and definition say of it."""
    for field in model.model_fields.values():
        node = schema["properties"][field.alias]
        yield f"{model.__name__}.{field.alias}", field, node
        below = model_in(field.annotation)
        if below and "properties" in node.get("items", node):
            yield from fields(below, node.get("items", node))


EVERY = {name: (field, node) for name, field, node in fields(resources.Spec, root("PacketStack")["properties"]["spec"])}
BOUNDED = [
    pytest.param(name, *both, id=name)
    for name, both in EVERY.items()
    if both[1].keys() & {"minimum", "maximum", "minItems", "maxItems", "maxLength"}
    # Values that may be numbers or strings are compared by a server alone.
    and "x-kubernetes-int-or-string" not in both[1]
]


def takes(field: FieldInfo, value: Any) -> bool:
    """Whether the model takes a value of this field."""
    try:
        TypeAdapter(
            functools.reduce(lambda kind, more: Annotated[kind, more], field.metadata, field.annotation)
        ).validate_python(value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(("name", "field", "node"), BOUNDED)
def test_the_server_takes_exactly_the_sizes_that_the_model_takes(
    name: str, field: FieldInfo, node: dict[str, Any]
) -> None:
    for bound, beyond in (("minimum", -1), ("maximum", 1)):
        if bound in node:
            assert takes(field, node[bound])
            assert not takes(field, node[bound] + beyond)
    for bound, beyond in (("minItems", -1), ("maxItems", 1)):
        if bound in node:
            assert takes(field, [ITEMS[name]] * node[bound]), bound
            assert takes(field, [ITEMS[name]] * (node[bound] + beyond)) == (name in NARROWER), bound
    if "maxLength" in node:
        assert not takes(field, "a" * (node["maxLength"] + 1))


def test_every_list_of_a_stack_that_rules_go_through_is_bounded() -> None:
    assert {name for name, (_, node) in EVERY.items() if "maxItems" in node} == ITEMS.keys()


def test_reports_have_neither_defaults_nor_rules() -> None:
    for kind in DEFINITIONS:
        for path, node in nodes(root(kind)["properties"]["status"]):
            assert not {"default", "x-kubernetes-validations"} & node.keys(), path


def test_only_what_people_write_is_checked_by_rules() -> None:
    assert any("x-kubernetes-validations" in node for path, node in ALL if path.startswith("PacketStack.spec"))
    assert not any("x-kubernetes-validations" in node for path, node in ALL if not path.startswith("PacketStack"))


def test_the_hash_changes_with_the_schema_and_not_with_its_descriptions() -> None:
    made = DEFINITIONS["FlowTable"]
    digits = made["metadata"]["annotations"][crds.SCHEMA_HASH]
    assert digits == crds.schema_hash(made["spec"])
    other = copy.deepcopy(made["spec"])
    other["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["description"] = "Else."
    assert crds.schema_hash(other) == digits
    other["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["lastEngine"]["maximum"] = 7
    assert crds.schema_hash(other) != digits


def test_the_definition_read_back_from_yaml_has_the_same_hash() -> None:
    for text in FILES.values():
        read = yaml.safe_load(text)
        assert crds.schema_hash(read["spec"]) == read["metadata"]["annotations"][crds.SCHEMA_HASH]


def test_the_kinds_are_those_of_the_models() -> None:
    for model in (resources.PacketStack, kinds.FlowTable, kinds.PacketEngine):
        made = DEFINITIONS[model.__name__]
        assert made["metadata"]["name"] == f"{model.__name__.lower()}s.packetstack.io"
        assert made["spec"]["names"]["categories"] == [crds.CATEGORY]
