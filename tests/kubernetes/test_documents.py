"""docs/kubernetes.md is true: each of its commands is run, from an empty cluster to an empty cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cluster.cluster import Cluster
from tests.cluster.install import ARCHIVE, REPOSITORY, ROOT, TAG
from tests.cluster.kubernetes_binaries import find
from tests.cluster.processes import run, wait_until

DOCUMENT = ROOT / "docs/kubernetes.md"
BLOCK = re.compile(r"^```(console|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IMAGES = ("registry.example/packetstack:0.1.0", "registry.example/packetstack:0.1.1")
BACKENDS = {"10.1.0.5": "10.71.5.1", "10.1.0.6": "10.71.5.2"}
"""An address of the document -> one that the lab has."""
NOT_HERE = {"monitoring.scrape=PodMonitor": "needs the Prometheus operator; tests/charts check what the chart makes"}
"""Part of a command -> why it cannot be run here."""


@dataclass
class Reader:
    """Somebody with the document, an administrator's kubeconfig, and a root shell on the node."""

    cluster: Cluster
    directory: Path

    def do(self, command: str) -> None:
        """Run it where it belongs; the assertion has what it said."""
        if command.startswith("# "):
            self.cluster.node.run("sh", "-c", command[2:])
            return
        command = command.removeprefix("$ ")
        if command.startswith("curl "):
            self._until(lambda: self.cluster.lab.run("client", *command.split(), "--max-time", "5", check=False))
            return
        done = subprocess.run(
            ["bash", "-ec", command], cwd=self.directory, env=self._environment(), capture_output=True, text=True,
            timeout=300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def _until(self, attempt: Callable[[], subprocess.CompletedProcess[str]]) -> None:
        """A client whose packets come while the first neighbour is looked for tries again."""
        wait_until(lambda: attempt().returncode == 0, "an answer", timeout_seconds=20)

    def _environment(self) -> dict[str, str]:
        programs = [str(self.directory / "bin"), str(Path(sys.executable).parent)]
        homes = {f"HELM_{home}_HOME": str(self.directory / "helm") for home in ("CACHE", "CONFIG", "DATA")}
        path = os.pathsep.join([*programs, os.environ["PATH"]])
        return {**os.environ, **homes, "PATH": path, "KUBECONFIG": str(self.cluster.kubeconfig)}

    @contextmanager
    def before(self, command: str) -> Iterator[None]:
        """What the text says has happened when the command is needed."""
        if not command.startswith("$ kubectl patch packetstack edge"):
            yield
            return
        operator = "kubectl scale deployment/packetstack-operator -n packetstack-system --replicas"
        self.do("$ kubectl packetstack up edge.yaml -n shop")
        self.do(f"$ {operator}=0 && kubectl wait pod --for=delete -l app.kubernetes.io/component=operator -A")
        self.do("$ kubectl delete packetstack edge -n shop --wait=false")
        yield
        self.do("$ kubectl wait packetstack/edge --for=delete -n shop --timeout=20s")
        self.do(f"$ {operator}=1 && kubectl rollout status deployment/packetstack-operator -n packetstack-system")


@pytest.fixture
def reader(cluster: Cluster, tmp_path: Path) -> Iterator[Reader]:
    """With kubectl and helm, the charts, the image of this checkout under the document's names, and backends."""
    run(ROOT / "deploy/build-image", f"{REPOSITORY}:{TAG}", ARCHIVE, timeout_seconds=1200)
    cluster.node.load(ARCHIVE)
    # Other tests have had PacketStack in this cluster, and its kinds stay.
    kinds = [f"{kind}.packetstack.io" for kind in ("packetstacks", "packetengines", "flowtables")]
    cluster.kubectl("delete", "crd", *kinds, "--ignore-not-found")
    cluster.kubectl("delete", "namespace", "packetstack-system", "--ignore-not-found")
    for image in IMAGES:
        cluster.node.tag(f"{REPOSITORY}:{TAG}", image)
    (tmp_path / "bin").mkdir()
    for program in ("kubectl", "helm"):
        (tmp_path / "bin" / program).symlink_to(find(program))
    plugin = tmp_path / "bin/kubectl-packetstack"
    plugin.write_text(f"#!{sys.executable}\nfrom packetstack_cli.main import kubectl\nkubectl()\n")
    plugin.chmod(0o755)
    (tmp_path / "charts").symlink_to(ROOT / "charts")
    (tmp_path / "www").mkdir()
    servers = []
    for address in BACKENDS.values():
        serve = (sys.executable, "-m", "http.server", "8080", "--bind", address, "--directory", str(tmp_path / "www"))
        servers.append(cluster.lab.start("server", *serve))
        cluster.lab.wait_for_listener("server", 8080, server=servers[-1])
    yield Reader(cluster, tmp_path)
    for server in servers:  # those of other tests take these ports
        server.kill()
        server.wait()


@pytest.mark.slow
def test_every_command_on_the_page_about_kubernetes_works_in_its_order(reader: Reader) -> None:
    skipped = set()
    for kind, text in BLOCK.findall(DOCUMENT.read_text()):
        if kind == "yaml":
            for theirs, ours in BACKENDS.items():
                text = text.replace(theirs, ours)
            (reader.directory / "edge.yaml").write_text(text)
            continue
        for command in text.splitlines():
            if reasons := [part for part in NOT_HERE if part in command]:
                skipped |= set(reasons)
                continue
            with reader.before(command):
                reader.do(command)
    assert skipped == set(NOT_HERE), "what is not run is still on the page"
    left = reader.cluster.node.run("ip", "-br", "link").stdout
    assert not re.search(r"^(ps|pe)\d", left, re.MULTILINE), f"nothing is left on the node:\n{left}"
    objects = reader.cluster.kubectl("get", "crd,clusterrole,clusterrolebinding,namespace", "-o", "name").split()
    assert [o for o in objects if "packetstack" in o and "packetstack-tests" not in o] == []


def test_the_page_about_kubernetes_names_each_verb_of_the_command_or_why_not() -> None:
    from packetstack_cli.main import main

    text = DOCUMENT.read_text()
    missing = [verb for verb in main.commands if not re.search(rf"`?\b{verb}\b", text) and verb != "demo"]
    assert not missing
