"""PacketStack into a cluster of tests, as a user installs it."""

from __future__ import annotations

from tests.cluster.cluster import Cluster


def install(cluster: Cluster) -> None:
    """Nothing yet."""
