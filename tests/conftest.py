"""Fixtures for every folder of tests: a real Kubernetes, brought up when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster.control_plane import ControlPlane

# Imported only where used: most tests need no cluster, and these imports take a second.


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """An API server with controllers but no node: pods stay pending."""
    from tests.cluster.control_plane import ControlPlane
    from tests.cluster.slots import Slot

    with Slot() as slot, ControlPlane(slot.directory / "control-plane") as running:
        yield running
