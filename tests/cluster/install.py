"""PacketStack into a cluster of tests, as a user installs it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.kubernetes_binaries import find
from tests.cluster.processes import run

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "packetstack-system"
REPOSITORY, TAG = "localhost/packetstack", "dev"
ARCHIVE = ROOT / "build/image/packetstack.tar"


def install(cluster: Cluster, *options: str) -> None:
    """Build this checkout's image unless it is there, load it into all nodes, and install the charts.

    `options` are more words for `helm install`, as in `--set=agent.uplinks={up0,dn0}`. Returns when operator and
    agents are ready. Raises `ClusterError`.
    """
    run(ROOT / "deploy/build-image", f"{REPOSITORY}:{TAG}", ARCHIVE, timeout_seconds=1200)
    for node in cluster.nodes:
        node.load(ARCHIVE)
    cluster.control_plane.create_namespace(NAMESPACE, enforce="privileged")  # for the agent
    helm(cluster, "upgrade", "--install", "packetstack-crds", str(ROOT / "charts/packetstack-crds"))
    helm(
        cluster,
        *("upgrade", "--install", "packetstack", str(ROOT / "charts/packetstack"), "--wait", "--timeout=3m"),
        f"--set=image.repository={REPOSITORY},image.tag={TAG}",
        # With exclusive CPUs a node of two cores has one to give, and an engine needs all of it.
        "--set=operator.resources.requests.cpu=0,agent.resources.requests.cpu=0",
        *options,
    )


def helm(cluster: Cluster, *words: str) -> str:
    """What Helm printed, run as admin in PacketStack's namespace; `ClusterError` with its last line when it fails."""
    homes = {f"HELM_{home}_HOME": str(cluster.directory / "helm") for home in ("CACHE", "CONFIG", "DATA")}
    options = (f"--kubeconfig={cluster.kubeconfig}", f"--namespace={NAMESPACE}")
    return run(find("helm"), *words, *options, timeout_seconds=300, env={**os.environ, **homes})
