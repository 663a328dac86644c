"""From YAML to resources, and the errors that a user sees.

`load` takes YAML text, `parse` one document. Both give `PacketStack` values or raise `ResourceError`, whose
`problems` name the field, its value, and what would be right. Nothing else is ever raised.
"""

import difflib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic_core import ErrorDetails

from packetstack_core.resources import API_VERSION, KIND, PacketStack
from packetstack_core.values import Problems
from packetstack_core.wording import kind_of, one_line, show

MAX_BYTES = 1 << 20
"""Largest text that `load` reads, in bytes."""


class ResourceError(ValueError):
    """A resource that cannot be accepted. `problems`: one line each, `path: value is wrong; what would be right`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def parse(document: Mapping[str, Any]) -> PacketStack:
    """One YAML document, already read. Raises ResourceError with all that is wrong."""
    if not isinstance(document, Mapping):
        raise ResourceError([f"document: {show(document)} is {kind_of(document)}; use a mapping with kind {KIND}"])
    if isinstance(kind := document.get("kind", KIND), str) and kind != KIND:  # its fields are not ours to judge
        if difflib.get_close_matches(kind[:100], [KIND], 1, 0.8):
            raise ResourceError([f"kind: {show(kind)} is unknown; did you mean {KIND}?"])
        raise ResourceError([f"kind: {show(kind)} cannot be read here; use {KIND}, and kubectl apply for other kinds"])
    try:
        return PacketStack.model_validate(dict(document))
    except ValidationError as e:
        raise ResourceError([line for error in e.errors() for line in describe(error, PacketStack)]) from None
    except RecursionError:
        raise ResourceError(["document: is nested too deeply; use the fields that the documentation names"]) from None


def with_replicas(stack: PacketStack, replicas: int, cores: int | None = None) -> PacketStack:
    """The resource with another spec.replicas, and perhaps spec.engine.cores. Raises ResourceError for a number that it
    cannot have."""
    document = stack.document()
    document["spec"]["replicas"] = replicas
    if cores is not None:
        document["spec"].setdefault("engine", {})["cores"] = cores
    return parse(document)


def check_change(old: PacketStack, new: PacketStack) -> None:
    """Raises ResourceError if `new` changes what cannot change during a stack's life."""
    problems = []
    for path, was, wanted in (
        ("metadata.name", old.name, new.name),
        ("spec.engine.mode", old.spec.engine.mode, new.spec.engine.mode),
        ("spec.flowTable.buckets", old.spec.flow_table.buckets, new.spec.flow_table.buckets),
    ):
        if was != wanted:
            problems.append(f"{path}: {show(wanted)} cannot replace {show(was)}; keep it, or create another stack")
    if problems:
        raise ResourceError(problems)


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys (the last would silently win) and aliases (they can grow without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        events: Any = self
        if events.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="an alias; write the value out", problem_mark=events.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{show(key.value)} occurs twice; use each field once", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(text: str) -> list[PacketStack]:
    """All documents of a YAML text; empty ones are left out. Raises ResourceError."""
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise ResourceError([f"file: has {size} bytes; use at most {MAX_BYTES}"])
    try:
        documents = list(yaml.load_all(text, _Loader))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        raise ResourceError([f"{where}: {one_line(e.problem or e.context)}"]) from None
    except RecursionError:
        raise ResourceError(["file: is nested too deeply; use the fields that the documentation names"]) from None
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as e:
        # PyYAML's constructors raise these for values such as `0x_` or `!!int ""`.
        raise ResourceError([f"file: is not YAML that can be read ({one_line(str(e))}); use plain values"]) from None
    stacks: list[PacketStack] = []
    problems: list[str] = []
    present = [(i, d) for i, d in enumerate(documents) if d is not None]
    for i, document in present:
        try:
            stacks.append(parse(document))
        except ResourceError as e:
            problems += [f"document {i + 1}: {p}" if len(present) > 1 else p for p in e.problems]
    if not present:
        problems.append(f"file: is empty; use a document with kind {KIND}")
    names: dict[str, int] = {}
    for i, stack in enumerate(stacks):
        if names.setdefault(stack.name, i) != i:
            problems.append(f"metadata.name: {show(stack.name)} occurs in two documents; use a name once")
    if problems:
        raise ResourceError(problems)
    return stacks


def _path(parts: tuple[str | int, ...]) -> str:
    text = ""
    for part in parts:
        name = "".join(c if c.isprintable() else "?" for c in str(part))[:60]
        text += f"[{part}]" if isinstance(part, int) else f".{name}" if text else name
    return text or "document"


_EXPECTED = {
    "int_type": "a whole number",
    "string_type": "a string; put it in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_MISSING: dict[str, str] = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "metadata": "metadata with a name",
    "name": "a name",
    "spec": "spec with listeners and snat",
    "listeners": "at least one listener",
    "snat": "addresses, as in {addresses: [192.0.2.64/28]}",
    "addresses": 'at least one address or prefix, as in "192.0.2.64/28"',
    "address": "an IP address",
    "port": "1 to 65535",
    "backends": "endpoints or a service",
}


def describe(error: ErrorDetails, root: type[BaseModel]) -> Iterator[str]:
    """The lines for one error of a model; `root` is the model of the whole document."""
    path, kind, value = error["loc"], error["type"], error["input"]
    context = error.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, Problems):
        for below, text in cause.found:
            yield f"{_path((*path, *below))}: {text}"
    elif kind == "value_error":
        yield f"{_path(path)}: {cause}"
    elif kind == "missing":
        yield f"{_path(path)}: is missing; use {_MISSING.get(str(path[-1]), 'a value')}"
    elif kind in ("extra_forbidden", "invalid_key"):
        known = _fields_at(root, path[:-1])
        close = difflib.get_close_matches(str(path[-1])[:100], known, 1)
        right = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}" if known else "leave it out"
        yield f"{_path(path)}: is an unknown field; {right}"
    elif kind == "literal_error":
        right = str(context["expected"]).replace("'", '"')
        hint = " (in quotes: YAML reads a bare Off as false)" if isinstance(value, bool) and '"Off"' in right else ""
        yield f"{_path(path)}: {show(value)} is not allowed here; use {right}{hint}"
    elif kind in _EXPECTED:
        yield f"{_path(path)}: {show(value)} is {kind_of(value)}; use {_EXPECTED[kind]}"
    else:
        yield f"{_path(path)}: {show(value)} is wrong: {one_line(error['msg'])}"


def _fields_at(root: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Names of the fields that the mapping at `path` may have."""
    model: type[BaseModel] | None = root
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = next((f for f in model.model_fields.values() if f.alias == part), None)
        model = _model_in(field.annotation) if field else None
    return [f.alias or "" for f in model.model_fields.values()] if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner: Callable[[Any], tuple[Any, ...]] = lambda a: getattr(a, "__args__", ())  # noqa: E731
    return next((m for a in inner(annotation) if (m := _model_in(a))), None)
