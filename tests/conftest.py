"""Fixtures for every folder of tests: a real Kubernetes, brought up when the first test asks for it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster
    from tests.cluster.control_plane import ControlPlane

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
    cluster.kubectl("delete", "namespace", name, "--wait=false")
