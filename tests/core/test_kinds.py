"""FlowTable and PacketEngine: what they carry comes back, and nothing else is accepted."""

import base64
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packetstack_core import kinds
from packetstack_core.assignment import NOBODY, Owner
from packetstack_core.reading import ResourceError

ENGINE = {"id": 1, "name": "web-1", "state": "Active", "template": "ab12", "queues": 4, "cores": 1}


def table(**spec: Any) -> dict[str, Any]:
    """A flow table as the API server gives it."""
    whole = {
        "node": "n1",
        "engines": [ENGINE],
        "listeners": [{"name": "a", "address": "192.0.2.1", "port": 80, "backends": {"endpoints": []}}],
        "snat": {"addresses": ["192.0.2.64/28"]},
    }
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "FlowTable",
        "metadata": {"name": "web", "namespace": "shop", "uid": "1", "resourceVersion": "7"},
        "spec": {**whole, **spec},
    }


owners = st.lists(
    st.one_of(st.just(NOBODY), st.builds(Owner, st.integers(1, 1023), st.integers(0, 63))), min_size=256, max_size=256
)


@given(owners)
def test_owners_come_back_as_they_were_written(wanted: list[Owner]) -> None:
    assert kinds.decode_owners(kinds.encode_owners(wanted), 256) == wanted


def test_no_owners_are_nobodys() -> None:
    assert kinds.decode_owners("", 512) == [NOBODY] * 512


@pytest.mark.parametrize(
    "text",
    [
        "?",
        "AAAA",
        kinds.encode_owners([Owner(1, 1)] * 512),
        kinds.encode_owners([Owner(1, 1)] * 256)[:-8],
        base64.b64encode(zlib.compress(bytes(1 << 24))).decode(),
    ],
    ids=["no base64", "no zlib", "too many", "torn", "a bomb"],
)
def test_what_is_not_owners_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the owners of 256 buckets"):
        kinds.decode_owners(text, 256)


def test_a_flow_table_is_read_and_names_what_an_agent_carries_out() -> None:
    read = kinds.read(kinds.FlowTable, table())
    stack = read.stack()
    assert (stack.name, stack.metadata.namespace, stack.spec.replicas) == ("web", "shop", 1)
    assert stack.spec.listeners == read.spec.listeners


def test_limits_choices_and_timers_of_a_stack_reach_the_agent_by_its_flow_table() -> None:
    listener = {
        **table()["spec"]["listeners"][0],
        "limits": {"maxFlows": 7, "newFlowsPerSecond": 3, "maxFlowsPerClient": 2},
        "onBackendDown": "Reset",
        "onNoBackend": "Reset",
        "slowStartSeconds": 20,
    }
    timers = {"tcpOpeningTimeoutSeconds": 9, "tcpTimeWaitTimeoutSeconds": 120}
    given = kinds.read(kinds.FlowTable, table(listeners=[listener], flowTable=timers))
    # As the operator writes it, and the agent reads it.
    stack = kinds.read(kinds.FlowTable, given.document()).stack()
    assert stack.spec.listeners[0].document().items() >= {k: listener[k] for k in list(listener)[-4:]}.items()
    assert stack.spec.flow_table.document().items() >= timers.items()


def test_the_answer_of_the_tables_node_is_found() -> None:
    nodes = [{"node": "n0"}, {"node": "n1", "observedGeneration": 3}]
    read = kinds.read(kinds.FlowTable, {**table(), "status": {"nodes": nodes}})
    report = read.report()
    assert report is not None
    assert report.observed_generation == 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"engines": [ENGINE, ENGINE]}, "spec.engines[1].id: 1 is already engines[0]; use an id once"),
        ({"owners": "AAAA"}, 'spec.owners: "AAAA" is not the owners of 4096 buckets'),
        ({"ownerz": ""}, "spec.ownerz: is an unknown field; did you mean owners?"),
        ({"engines": [{**ENGINE, "id": 0}]}, "spec.engines[0].id: 0 is not an engine's id; use 1 to 1023"),
    ],
)
def test_a_wrong_flow_table_is_refused_with_the_field(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ResourceError) as e:
        kinds.read(kinds.FlowTable, table(**spec))
    assert said in e.value.problems


def test_a_table_as_earlier_operators_wrote_it_is_read_and_written_again_without_new_fields() -> None:
    stored = {
        **table()["spec"],
        "lastEngine": 3,
        "owners": kinds.encode_owners([Owner(1, 2)] * 4096),
        "rebalanced": True,
        "unknownFlow": "Drop",
    }
    read = kinds.read(kinds.FlowTable, table(**stored)).spec
    assert read.owner_ids() == [Owner(1, 2)] * 4096
    assert not {"nodes", "sets", "previousOwners"} & read.document().keys()
    assert not {"node", "set"} & read.document()["engines"][0].keys()


SET = {
    "id": 1, "state": "Current", "replicas": 2, "template": "ab", "queues": 1, "since": "2026-11-30T12:00:00Z",
}  # fmt: skip


def test_a_table_has_a_place_for_two_sets_and_for_several_nodes() -> None:
    spec = {
        "nodes": [{"name": "n1"}, {"name": "n2"}],
        "sets": [{**SET, "id": 1, "state": "Draining", "ending": True}, {**SET, "id": 2}],
        "lastSet": 2,
        "engines": [{**ENGINE, "set": 1}, {**ENGINE, "id": 2, "name": "web-2", "node": "n2", "set": 2}],
        "owners": kinds.encode_owners([Owner(2, 0)] * 4096),
        "previousOwners": kinds.encode_owners([Owner(1, 0)] * 4096),
    }
    read = kinds.read(kinds.FlowTable, table(**spec))
    assert kinds.read(kinds.FlowTable, read.document()) == read
    assert read.spec.document().items() >= {k: spec[k] for k in ("nodes", "sets", "lastSet", "previousOwners")}.items()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"nodes": [{"name": "n1"}] * 2}, "spec.nodes: has one of them twice; use each once"),
        ({"nodes": [{"name": "n2"}]}, 'spec.node: "n1" is not among nodes; add it there'),
        ({"engines": [{**ENGINE, "node": "n2"}]}, 'spec.engines[0].node: "n2" is not among nodes; use one of them'),
        ({"engines": [{**ENGINE, "set": 2}]}, "spec.engines[0].set: 2 is not among sets; use one of them"),
        ({"sets": [{**SET, "id": i} for i in (1, 2, 3)]}, "spec.sets: has 3 sets; use at most 2"),
        ({"previousOwners": "AAAA"}, 'spec.previousOwners: "AAAA" is not the owners of 4096 buckets'),
    ],
)
def test_nodes_and_sets_that_contradict_each_other_are_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ResourceError) as e:
        kinds.read(kinds.FlowTable, table(**spec))
    assert said in e.value.problems


def test_an_engine_of_a_stack_with_the_longest_name_is_read() -> None:
    name = "a" * 52
    engine = {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketEngine",
        "metadata": {"name": f"{name}-1023"},
        "spec": {"stack": name, "id": 1023},
    }
    assert kinds.read(kinds.PacketEngine, engine).metadata.name == f"{name}-1023"
