"""The README's way from `make cluster` to traffic: its commands, in this order, on a cluster like that."""

import os
import re
import subprocess

from tests.cluster.install import ROOT
from tests.cluster.kubernetes_binaries import find

from .conftest import Installed, eventually

LAB_OF_MAKE_CLUSTER = "pkt0"


def commands() -> list[str]:
    """Of the block that begins with the image, without those that make and remove the cluster."""
    block = next(
        b for b in re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "make image" in b
    )
    return [line.removeprefix("# ") for line in block.splitlines() if not re.match(r"# (make|export) ", line)]


def test_the_readmes_commands_lead_from_a_cluster_to_traffic(packetstack: Installed) -> None:
    environment = os.environ | {
        "KUBECONFIG": str(packetstack.cluster.kubeconfig),
        "PATH": f"{find('kubectl').parent}:{os.environ['PATH']}",
    }
    found = commands()
    assert [c.split()[0] for c in found] == ["kubectl", "kubectl", "nsenter", "kubectl"]
    try:
        for command in found:
            words = command.replace(LAB_OF_MAKE_CLUSTER, packetstack.lab.prefix).split()

            def works(words: list[str] = words) -> bool:
                done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
                print(words, done.stdout[-200:], done.stderr[-300:])
                return done.returncode == 0

            if words[0] == "nsenter":
                eventually(works, "an answer", 20)  # the backends' pods may take longer than the engines
            else:
                assert works()
        packetstack.wait("default", "edge", 4)
    finally:
        packetstack.kubectl("delete", "-f", str(ROOT / "examples/kubernetes/cluster.yaml"), "--timeout=60s")
