"""The operator as a process of its own, with the rights that the chart gives it."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import yaml
from tests.cluster.control_plane import ControlPlane
from tests.operator.players import wait

ROOT = Path(__file__).resolve().parents[2]
RULES = yaml.safe_load((ROOT / "charts/packetstack/files/rbac.yaml").read_text())
USER = "packetstack-operator"
RBAC = "rbac.authorization.k8s.io"

DYING = """
import os, sys
from packetstack_operator import applying, main

write, left = applying.Api.write, int(sys.argv.pop(1))

async def dying(self, namespace, what):
    global left
    if left == 0:
        os.kill(os.getpid(), 9)
    left -= 1
    return await write(self, namespace, what)

applying.Api.write = dying
main.main()
"""
"""An operator that is killed instead of its (n + 1)th write."""


def grant(control_plane: ControlPlane, namespace: str | None = None) -> None:
    """The chart's rights: for all namespaces, or for one."""
    kind = "Role" if namespace else "ClusterRole"
    meta = {"name": USER} | ({"namespace": namespace} if namespace else {})
    rules = RULES["operator"] + ([] if namespace else RULES["operatorCluster"])
    control_plane.apply(
        {"apiVersion": f"{RBAC}/v1", "kind": kind, "metadata": meta, "rules": rules},
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": f"{kind}Binding",
            "metadata": meta,
            "roleRef": {"apiGroup": RBAC, "kind": kind, "name": USER},
            "subjects": [{"apiGroup": RBAC, "kind": "User", "name": USER}],
        },
    )


class OperatorProcess:
    """Runs from `start` to `stop` or `kill`. `dies_after`: writes after which it is killed."""

    def __init__(self, kubeconfig: Path, log: Path, *options: str) -> None:
        self.kubeconfig, self.log, self.options = kubeconfig, log, options
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "OperatorProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, dies_after: int | None = None) -> None:
        start = ["-m", "packetstack_operator"] if dies_after is None else ["-c", DYING, str(dies_after)]
        self.port = _free_port()
        options = ["--image", "localhost/packetstack:1", "--listen", f"127.0.0.1:{self.port}", *self.options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *start, *options],
                env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
                stderr=log,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> int:
        """As a kubelet does. -> its exit status"""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(20)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def metrics(self) -> str:
        def read() -> str:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                    return str(answer.read().decode())
            except OSError:
                return ""

        return str(wait(read))

    def writes(self) -> float:
        """Requests so far that changed something."""
        return self._total("packetstack_api_writes_total")

    def looks(self) -> float:
        """How often it has looked at a stack so far, whatever came of it."""
        return self._total("packetstack_reconcile_duration_seconds_count")

    def _total(self, metric: str) -> float:
        lines = [line for line in self.metrics().splitlines() if line.startswith(f"{metric}{{")]
        return sum(float(line.split()[-1]) for line in lines)

    def said(self) -> str:
        return self.log.read_text()


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
