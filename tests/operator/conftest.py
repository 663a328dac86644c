"""The operator's own process against a real API server, with the rights of the chart. Node and agent are played."""

import secrets
from contextlib import contextmanager

import pytest
from tests.cluster.server import Server
from tests.operator.counters import PlayedCounters
from tests.operator.operator_process import USER, OperatorProcess, grant
from tests.operator.place import Place
from tests.operator.players import STACKS, PlayedNode, wait

from packetstack_core import crds


@pytest.fixture(scope="module")
def server(control_plane):
    control_plane.define(*crds.definitions())
    control_plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-0"}})
    server = Server(control_plane.kubeconfig)
    yield server
    server.close()


@pytest.fixture(scope="module")
def kubeconfig(control_plane, server):
    grant(control_plane)
    return control_plane.kubeconfig_for(USER)


@pytest.fixture(scope="module")
def counters():
    with PlayedCounters() as running:
        yield running


@pytest.fixture(scope="module")
def operator(kubeconfig, counters, tmp_path_factory):
    log = tmp_path_factory.mktemp("operator") / "log"
    with OperatorProcess(kubeconfig, log, f"--agent-port={counters.port}") as running:
        yield running
        assert "internal error" not in running.said()
        assert "Traceback" not in running.said()


@contextmanager
def a_place(server, control_plane, counters):
    namespace = f"test-{secrets.token_hex(4)}"
    control_plane.create_namespace(namespace)
    with PlayedNode(server, namespace, counters=counters) as node:
        yield Place(server, namespace, node)
        node.agent, node.refuse = True, None
        server.delete(f"{STACKS.format(namespace)}/edge")
        wait(lambda: server.get(f"{STACKS.format(namespace)}/edge") is None)
        server.delete(f"/api/v1/namespaces/{namespace}")


@pytest.fixture
def place(server, control_plane, counters):
    with a_place(server, control_plane, counters) as made:
        yield made


@pytest.fixture
def another(server, control_plane, counters):
    """Another namespace, with a stack of the same name in it, and the same node."""
    with a_place(server, control_plane, counters) as made:
        yield made
