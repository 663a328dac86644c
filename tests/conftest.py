"""Fixtures for every folder of tests: a real Kubernetes, brought up when the first test asks for it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster
    from tests.cluster.control_plane import ControlPlane
    from tests.lab.node import Node

# Else a plugin's question for the loop makes one, beside each test that has none, and nobody closes it.
asyncio.set_event_loop(None)

ALONE = (
    "headline/test_floods.py",
    "headline/test_hot_restart.py",
    "headline/test_resize.py",
    "traffic/test_generator.py",
)
"""Tests that count each datagram, or measure a rate: two of them beside each other would measure each other.

Single tests of other files say so by the mark.
"""


CLUSTER = ("charts/test_installed.py", "cluster", "kubernetes/test_documents.py", "kubernetes")
"""Tests with a kubelet: one after the other, for they share a cluster, and two need more of the kernel than it has.

In this order: the last ones leave PacketStack in it, and the others begin without.
"""
SERVER = (
    "operator/test_operator_on_a_server.py",
    "operator/test_crds_on_a_server.py",
    "charts/test_on_a_server.py",
    "cli/test_cluster_commands.py",
    "agent/test_follower.py",
    "cluster/test_metrics_api.py",
)
"""Tests with an API server and no node: one after the other too, for each worker would start a control plane of its own."""
AUTOSCALED = ("operator/test_autoscaling.py", "operator/test_autoscalers.py")
"""The same, and they wait for one sync period after the other: beside those."""
LONG = (*CLUSTER, *AUTOSCALED, *SERVER, "headline", "failures", "agent", "firewall")
"""What takes longest begins first, so that nobody waits for the last one."""


def _place(item: pytest.Item) -> str:
    here = Path(__file__).parent
    return item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""


def _rank(item: pytest.Item, places: tuple[str, ...]) -> int:
    """Number of the first of these places in which the test is; those in none come last."""
    return next((n for n, place in enumerate(places) if _place(item).startswith(place)), len(places))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what must run alone: `make test` runs all others side by side before. `soak` tests run only when asked for."""
    if "soak" not in config.option.markexpr:
        left = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=left)
    for item in items:
        if _place(item).startswith(ALONE):
            item.add_marker(pytest.mark.alone)
    shared = [n for n, item in enumerate(items) if _place(item).startswith(CLUSTER)]  # also without workers
    in_order = sorted((items[n] for n in shared), key=lambda item: _rank(item, CLUSTER))
    for n, item in zip(shared, in_order, strict=True):
        items[n] = item
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _rank(item, LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Side by side: the tests of a file stay together, in their order; so do those with a kubelet, and those with a server."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].removeprefix("tests/")
            lanes = {"server": SERVER, "autoscaled": AUTOSCALED, "cluster": CLUSTER}
            return next((lane for lane, files in lanes.items() if file.startswith(files)), file)

    return Files(config, log)


# Imported only where used: most tests need no cluster, and these imports take a second.


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """An API server with controllers but no node: pods stay pending."""
    from tests.cluster.control_plane import ControlPlane
    from tests.cluster.slots import Slot

    with Slot() as slot, ControlPlane(slot.directory / "control-plane") as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One node with pods and attachments, joined to a client and a server; PacketStack is not in it."""
    from tests.cluster.cluster import Cluster
    from tests.cluster.slots import Slot

    with Slot() as slot, Cluster(slot) as running:
        yield running


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own in `cluster`; deleted, with its pods, after the test."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.control_plane.create_namespace(name)
    yield name
    cluster.control_plane.delete_namespace(name)


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node with real packets and without a stack, between a client and servers; one a module."""
    from tests.lab.node import serving_node

    with serving_node(f"a6-{request.module.__name__.rpartition('_')[2][:6]}") as made:
        yield made


@pytest.fixture
def disk(node: Node) -> Iterator[Path]:
    """A file system of its own for the node's run directory."""
    from tests.lab.disk import own_disk

    with own_disk(node) as directory:
        yield directory
