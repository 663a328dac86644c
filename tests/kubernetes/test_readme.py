"""The README's way from `make cluster` to traffic: its commands, in this order, on a cluster like that."""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest
from tests.cluster.install import ROOT, helm
from tests.cluster.kubernetes_binaries import find
from tests.waiting import eventually

from packetstack_cli.lab import NODE_UPLINK

from .conftest import WAIT_SECONDS, Installed

LAB_OF_MAKE_CLUSTER = "pkt0"


def opened(packetstack: Installed) -> tuple[str, str]:
    """Of the condition FirewallOpen: status and reason."""
    return packetstack.condition("default", "edge", "FirewallOpen")


def commands() -> list[str]:
    """Of the block that begins with the image, without those that make and remove the cluster."""
    block = next(
        b for b in re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "make image" in b
    )
    return [line.removeprefix("# ") for line in block.splitlines() if not re.match(r"# (make|export) ", line)]


def upgrade(packetstack: Installed, *values: str) -> None:
    """With other values of the chart; returns when the agent that has them is there."""
    chart = str(ROOT / "charts/packetstack")
    helm(packetstack.cluster, "upgrade", "packetstack", chart, "--reuse-values", "--wait", "--timeout=3m", *values)


@pytest.fixture(scope="module")
def plain(packetstack: Installed) -> Iterator[Installed]:
    """As the chart installs it: without an uplink, so that the node's rules see every packet of a client."""
    rules = packetstack.cluster.node.run("iptables", "-S", "KUBE-FORWARD").stdout
    assert "--ctstate INVALID" in rules, rules
    upgrade(packetstack, "--set-json=agent.uplinks=[]")
    yield packetstack
    upgrade(packetstack, f"--set=agent.uplinks={{{NODE_UPLINK}}}")


def test_the_readmes_commands_lead_from_a_cluster_to_traffic(plain: Installed) -> None:
    packetstack = plain
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
                eventually(works, 20, "an answer")  # the backends' pods may take longer than the engines
            else:
                assert works()
        packetstack.wait("default", "edge", 4)
        assert packetstack.condition("default", "edge", "FirewallOpen") == ("True", "NothingInTheWay")

        upgrade(packetstack, "--set=agent.firewall=Report")
        eventually(lambda: opened(packetstack) == ("False", "PacketsDropped"), WAIT_SECONDS, "FirewallOpen=False")
        assert not packetstack.answers()
        said = packetstack.kubectl("describe", "packetstack", "edge")
        assert "a rule in chain KUBE-FORWARD of table ip filter" in said
        assert "PacketsDropped" in packetstack.kubectl("get", "events", "-o", "wide")
        found = packetstack.ask_agent("preflight")
        assert any("KUBE-FORWARD" in c["message"] and c["result"] == "warning" for c in found), found
        upgrade(packetstack, "--set=agent.firewall=Manage")
        eventually(packetstack.answers, WAIT_SECONDS, "an answer")
        eventually(lambda: opened(packetstack)[0] == "True", WAIT_SECONDS, "FirewallOpen=True")
    finally:
        packetstack.kubectl("delete", "-f", str(ROOT / "examples/kubernetes/cluster.yaml"), "--timeout=60s")
