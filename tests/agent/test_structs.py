"""The agent's view of shared memory is that of the C header."""

from typing import Any, get_type_hints

import pytest

from packetstack_agent.natives import ffi
from packetstack_agent.structs import Core, Queue, Ring


@pytest.mark.parametrize(("view", "struct"), [(Core, "ps_core"), (Ring, "ps_ring"), (Queue, "ps_queue")])
def test_each_field_that_the_agent_reads_is_there_and_of_that_kind(view: type, struct: str) -> None:
    fields: dict[str, Any] = dict(ffi.typeof(f"struct {struct}").fields)
    for name, hint in get_type_hints(view).items():
        assert name in fields, f"struct {struct} has no {name}"
        kind = fields[name].type.kind
        assert kind == {int: "primitive", Ring: "struct"}.get(hint, "array"), f"{struct}.{name} is {kind}"
