"""The operator moves buckets by load under real traffic: two engine pods that are loaded unevenly become even.

Their datapaths are replaced by those of the test build, whose packets take a set time each: see tests/lab/costly.py.
"""

import os
import shutil
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.processes import run
from tests.lab.costly import COST_NS, DATAPATH, becomes_even, cost, lost_around, skewed_traffic
from tests.waiting import eventually

from packetstack_cli.traffic import Servers
from packetstack_core import kinds, load
from packetstack_operator.pods import DIRECTORY, HOST_DIRECTORY

from .conftest import PORT, UDP_PORT, VIP, WAIT_SECONDS, Installed
from .conftest import stack as a_stack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATAPATH.exists(), reason="packetstack-datapath-inject is not built; run make build"),
]


class Costly:
    """The stack `web` of a namespace, with engines whose packets take a set time."""

    def __init__(self, packetstack: Installed, space: str) -> None:
        self.packetstack, self.space = packetstack, space
        node = packetstack.cluster.node
        self._load = f"http://{node.address}:9470/load?stack={space}.web&buckets=0"
        self._directories = [
            node.path_of(f"{HOST_DIRECTORY}/{kinds.pod_directory(space, pod['metadata']['name'])}")
            for pod in packetstack.engines(space, "web")
        ]
        for directory in self._directories:
            self._take_test_build(directory)
        packetstack.wait(space, "web", len(self._directories))
        for directory in self._directories:
            cost(directory / "queues", COST_NS)

    def _datapath(self, directory: Path) -> int:
        """The process that serves an engine; 0 without one."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = (process / "comm").read_text().startswith("packetstack-dat")
                if ours and (process / "root" / DIRECTORY[1:]).samefile(directory):
                    return int(process.name)
            except OSError:  # it has just ended
                continue
        return 0

    def _take_test_build(self, directory: Path) -> None:
        """The datapath that follows this one, which is killed, is of the test build."""
        shutil.copy(DATAPATH, directory / "datapath")
        old = self._datapath(directory)
        installed = Path(f"/proc/{old}/exe").readlink()
        run("nsenter", f"--target={old}", "--mount", "mount", "--bind", f"{DIRECTORY}/datapath", installed)
        os.kill(old, signal.SIGKILL)
        eventually(lambda: self._datapath(directory) not in (0, old), WAIT_SECONDS, "another datapath")

    def _look(self) -> load.Snapshot:
        with urllib.request.urlopen(self._load, timeout=5) as answer:
            return load.from_json(answer.read())

    def unevenness(self, seconds: float) -> float:
        """Busiest core by the mean of all, over this time."""
        before = self._look()
        time.sleep(seconds)
        found = load.stack_load(before, self._look(), time.time())
        cores = [core for engine in found.engines for core in engine.cores]
        return max(cores) * len(cores) / (sum(cores) or 1.0)

    def mode(self, mode: str) -> None:
        """Change `spec.rebalance.mode`."""
        patch = f'{{"spec": {{"rebalance": {{"mode": "{mode}"}}}}}}'
        self.packetstack.kubectl("patch", "packetstack", "web", "-n", self.space, "--type=merge", "-p", patch)


def test_two_unevenly_loaded_engines_become_even_and_no_packet_is_lost_or_reordered(
    packetstack: Installed, servers: Servers, space: str
) -> None:
    engine = {"cores": 1, "queuesPerCore": 1, "cpuPolicy": "Shared", "memory": "256Mi", "interface": {"veth": {}}}
    packetstack.cluster.apply(a_stack("web", space, engine=engine, rebalance={"mode": "Off"}))
    packetstack.wait(space, "web", 2)
    stack = Costly(packetstack, space)
    before = lost_around(packetstack.lab)
    traffic = skewed_traffic(packetstack.lab, f"{VIP}:{PORT}", f"{VIP}:{UDP_PORT}", stack.unevenness, cpu=1)
    off = stack.unevenness(4)
    assert off > 1.2, "with Off nothing becomes even"
    stack.mode("Auto")
    now = becomes_even(stack.unevenness, off, within=45, look=3, stay=6)
    outcome = traffic.stop()
    around = outcome.socket_drops + lost_around(packetstack.lab) - before
    print(f"max/mean {off:.2f} -> {now:.2f}; {around} lost around it; {outcome}")
    raw: dict[str, Any] = packetstack.cluster.get("packetstack", "web", "-n", space)
    events = packetstack.cluster.get("events", "-n", space)["items"]
    assert raw["status"]["rebalance"]["buckets"] > 0
    assert [e for e in events if e["reason"] == "Rebalanced"]
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_lost <= around, "one was lost on its way through the engines"
    assert outcome.datagrams_reordered == 0
    assert outcome.datagrams_duplicated == 0
