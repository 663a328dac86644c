"""The CustomResourceDefinitions, made from the models, so that API server and CLI take and refuse the same.

`python -m packetstack_core.crds DIRECTORY...` writes one file a kind. What one value can be comes from the models; what
several values must be together is in `crd_rules`.
"""

import ast
import functools
import hashlib
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from packetstack_core import kinds, resources
from packetstack_core.crd_rules import FIELDS, NAME_RULES, RULES, Json
from packetstack_core.resources import API_VERSION
from packetstack_core.statuses import PacketStackStatus

GROUP, VERSION = API_VERSION.split("/")
SCHEMA_HASH = f"{GROUP}/schema-hash"
"""Annotation with `schema_hash`: an operator sees that the API server holds another version than its own."""
CATEGORY = "packetstack-io"
"""`kubectl get packetstack-io` lists all kinds. (`packetstack` would hide the kind of that name.)"""


# ---- schemas -----------------------------------------------------------------------------------------------------


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    source = inspect.getsource(sys.modules[module])
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """What the string below each field of the model says."""
    body = _classes(model.__module__)[model.__name__].body
    docs = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return docs


class _Marked(GenerateJsonSchema):
    """JSON schema whose objects name their model, whose fields have descriptions, and whose defaults say what differs."""

    def model_schema(self, schema: Any) -> Json:
        made = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        for name, text in _field_docs(model).items():
            made["properties"][model.model_fields[name].alias or name]["description"] = text
        return {**made, "x-model": model}

    def encode_default(self, dft: Any) -> Any:
        return dft.model_dump(by_alias=True, exclude_defaults=True) if isinstance(dft, BaseModel) else dft


def _merged(one: Json, other: Json) -> Json:
    both = {**one, **other}
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            both[key] = _merged(one[key], other[key])
    return {k: v for k, v in both.items() if v is not None}


def _schema(model: type[BaseModel], *, rules: bool, defaults: bool) -> Json:
    """The structural schema of a model: no references, no titles, whole defaults."""
    whole = model.model_json_schema(by_alias=True, schema_generator=_Marked)
    definitions = whole.pop("$defs", {})

    def structural(node: Json) -> Json:
        node = {k: v for k, v in node.items() if k != "title"}
        if "$ref" in node:
            return structural({**definitions[node.pop("$ref").rpartition("/")[2]], **node})
        if "anyOf" in node:
            (some,) = (one for one in node.pop("anyOf") if one != {"type": "null"})
            return structural({**some, **node})
        if "const" in node:
            node["enum"] = [node.pop("const")]
        if node.get("type") == "integer":
            node["format"] = "int64" if node.get("maximum", 0) >= 2**31 else "int32"
        if "items" in node:
            node["items"] = structural(node["items"])
            node["x-kubernetes-list-type"] = "atomic"
        if node.get("additionalProperties") is False:
            del node["additionalProperties"]
        elif isinstance(node.get("additionalProperties"), dict):
            node["additionalProperties"] = structural(node["additionalProperties"])
        of = node.pop("x-model", None)
        if of:
            extra = FIELDS.get(of, {})
            fields = {name: _merged(structural(f), extra.get(name, {})) for name, f in node["properties"].items()}
            node = {**node, "properties": fields, **extra.get("", {})}
            if of in RULES:
                node["x-kubernetes-validations"] = RULES[of]
            if node.get("default") is not None:
                # A rule sees a default as it is written, without the defaults of the fields in it.
                inner = {name: f["default"] for name, f in fields.items() if "default" in f}
                node["default"] = {**inner, **node["default"]}
        if node.get("default") in (None, "", (), {}):
            node.pop("default", None)
        return node

    # Lists are bounded for the rules that go through them; the endpoints of a Service may be many.
    unwanted = set() if rules else {"x-kubernetes-validations", "maxItems"}
    unwanted |= set() if defaults else {"default"}
    return cast(Json, _without(unwanted, structural(whole)))


def _without(keys: set[str], node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without(keys, v) for k, v in node.items() if k not in keys}
    return [_without(keys, v) for v in node] if isinstance(node, list | tuple) else node


def _column(name: str, path: str, kind: str = "string", **more: Any) -> Json:
    return {"name": name, "type": kind, "jsonPath": path, **more}


def _condition(kind: str, field: str = "status") -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


_WIDE: Json = {"priority": 1}
_AGE = _column("Age", ".metadata.creationTimestamp", "date")


def _definition(
    kind: str,
    short: str,
    spec: type[BaseModel],
    status: type[BaseModel],
    columns: list[Json],
    selectable: list[str],
    rules: bool = False,
    scale: bool = False,
    description: str = "",
) -> Json:
    singular = kind.lower()
    subresources: Json = {"status": {}}
    if scale:
        # /scale fails where spec.replicas is absent, so it has a default, 1, as a Deployment has. Nobody owns a default:
        # a manifest that another hand scales names no replicas, or it would win over the first scale unasked.
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    root: Json = {
        "type": "object",
        "description": description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
            "spec": _schema(spec, rules=rules, defaults=True),
            "status": _schema(status, rules=False, defaults=False),
        },
    }
    if rules:
        root["x-kubernetes-validations"] = NAME_RULES
    version: Json = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [*columns, _AGE],
        "selectableFields": [{"jsonPath": path} for path in selectable],
        "subresources": subresources,
        "schema": {"openAPIV3Schema": root},
    }
    names = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": f"{singular}s",
        "singular": singular,
        "shortNames": [short],
        "categories": [CATEGORY],
    }
    made = {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{singular}s.{GROUP}",
            # Helm deletes no custom resource of a user together with a chart.
            "annotations": {"helm.sh/resource-policy": "keep", SCHEMA_HASH: schema_hash(made)},
        },
        "spec": made,
    }


def definitions() -> list[Json]:
    """The three CustomResourceDefinitions as documents."""
    return [
        _definition(
            "PacketStack",
            "pkst",
            resources.Spec,
            PacketStackStatus,
            [
                _column("Desired", ".spec.replicas", "integer"),
                _column("Engines", ".status.replicas", "integer"),
                _column("Ready", ".status.readyReplicas", "integer"),
                _column("Draining", ".status.drainingReplicas", "integer"),
                _column("Available", _condition("Available")),
                _column("Reason", _condition("Available", "reason"), **_WIDE),
                _column("Mode", ".spec.engine.mode", **_WIDE),
                _column("Node", ".status.node", **_WIDE),
            ],
            [".spec.engine.mode"],
            rules=True,
            scale=True,
            description=inspect.getdoc(resources.PacketStack) or "",
        ),
        _definition(
            "PacketEngine",
            "pke",
            kinds.PacketEngineSpec,
            kinds.PacketEngineStatus,
            [
                _column("Stack", ".spec.stack"),
                _column("State", ".status.state"),
                _column("Ready", ".status.ready", "boolean"),
                _column("Buckets", ".status.buckets", "integer"),
                _column("Node", ".status.node"),
                _column("Interface", ".status.interface", **_WIDE),
                _column("MAC", ".status.mac", **_WIDE),
                _column("Message", ".status.message", **_WIDE),
            ],
            [".spec.stack", ".status.state", ".status.node"],
            description=inspect.getdoc(kinds.PacketEngine) or "",
        ),
        _definition(
            "FlowTable",
            "pft",
            kinds.FlowTableSpec,
            kinds.FlowTableStatus,
            [
                _column("Node", ".spec.node"),
                _column("Generation", ".metadata.generation", "integer"),
                _column("Observed", ".status.nodes[*].observedGeneration"),
                _column("Settled", ".status.nodes[*].settled"),
                _column("Message", ".status.nodes[*].message", **_WIDE),
            ],
            [".spec.node"],
            description=inspect.getdoc(kinds.FlowTable) or "",
        ),
    ]


def schema_hash(spec: Json) -> str:
    """Sixteen hexadecimal digits that differ when a definition's `spec` does in more than its descriptions."""

    text = json.dumps(_without({"description"}, spec), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: the parts that kinds share are written out for each."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def files() -> dict[str, str]:
    """Text by file name."""
    head = "# Written by `make manifests` from the models in packetstack_core; change those.\n"
    return {
        f"{made['metadata']['name']}.yaml": head
        + yaml.dump(json.loads(json.dumps(made)), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        for made in definitions()
    }


def main(directories: list[str]) -> None:
    """Writes all files to each directory."""
    for directory in directories:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, text in files().items():
            (Path(directory) / name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
