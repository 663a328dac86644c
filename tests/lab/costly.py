"""Engines whose packets take a set time each, so that they and not the machine are the bottleneck.

They are of the test build, and wait instead of computing: a core is busy by its own clock and takes no CPU from others.
"""

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packetstack_cli.client import Client
from packetstack_cli.lab import Lab
from packetstack_cli.traffic import Servers, Traffic
from packetstack_core import abi

DATAPATH = Path(__file__).parents[2] / "build/meson/engine/packetstack-datapath-inject"
UDP, TCP = "192.0.2.10:53", "192.0.2.10:80"
COST_NS, RATE = 500_000, 900
"""Of a packet, and datagrams a second. Each passes an engine twice, so that two cores are busy for some half of the time."""

# The agent as it is, with datapaths of the test build.
AGENT = f"""
from packetstack_core import abi
installed = abi.native
abi.native = lambda name: abi.Path({str(DATAPATH)!r}) if name == "packetstack-datapath" else installed(name)
from packetstack_agent.main import main
main()
"""


def cost(queues: Path, ns: int) -> None:
    """What each packet takes from now on in the engine with this file."""
    with queues.open("r+b") as file:
        file.seek(abi.ffi.offsetof("struct ps_engine", "work_ns"))
        file.write(struct.pack("I", ns))


def skewed_traffic(
    lab: Lab, tcp: str, udp: str, unevenness: Callable[[float], float], cpu: int | None = None
) -> Traffic:
    """Which flows share a core is chance: until they load two cores unevenly. `cpu`: the generator's only one."""
    for _ in range(12):
        traffic = Traffic(
            lab, [tcp], [udp], connections=20, request_interval_ms=1000, answer_bytes="64", udp_flows=40,
            udp_rate=RATE, udp_skew=1.2, ramp_seconds=0.5, cpu=cpu,
        )  # fmt: skip
        traffic.wait_open()
        time.sleep(1.5)
        if unevenness(1.5) > 1.3:
            return traffic
        traffic.stop()
    raise AssertionError("12 times the load was even by chance")


def becomes_even(unevenness: Callable[[float], float], off: float, *, within: float, look: float, stay: float) -> float:
    """Busiest core by the mean once that is even, by looks of `look` seconds; it was `off`. It must stay so for `stay`."""
    deadline = time.monotonic() + within
    while (now := unevenness(look)) >= 1.2:
        assert time.monotonic() < deadline, f"max/mean is still {now:.2f}; it was {off:.2f}"
    assert unevenness(stay) < 1.2, "it stays"
    return now


def lost_around(lab: Lab) -> int:
    """Datagrams so far that the servers' sockets or the lab's links had no room for: tests beside this one take CPUs."""
    counters = lab.run("server", "cat", "/proc/net/snmp").stdout.splitlines()
    names, values = (line.split() for line in counters if line.startswith("Udp:"))
    return int(dict(zip(names, values, strict=True))["RcvbufErrors"]) + sum(lab.device_drops().values())


class CostlyStack:
    """A stack `web` in a lab, of engines whose packets take a set time each."""

    def __init__(self, lab: Lab, client: Client) -> None:
        self.lab, self.client = lab, client

    def make(
        self, engine: dict[str, Any], replicas: int, mode: str, listeners: dict[str, tuple[str, int]], max_flows: int
    ) -> None:
        """Brings it up. `mode`: of `spec.rebalance`; `listeners`: name -> protocol and port."""
        servers = [f"10.71.5.{n}" for n in range(1, 5)]
        spec = {
            "replicas": replicas,
            "engine": engine | {"cpuPolicy": "Shared"},
            "rebalance": {"mode": mode},
            "listeners": [
                {
                    "name": name,
                    "address": "192.0.2.10",
                    "protocol": protocol,
                    "port": port,
                    "healthCheck": {"type": "None"},
                    "backends": {
                        "endpoints": [{"address": a, "port": {"TCP": 8080, "UDP": 8081}[protocol]} for a in servers]
                    },
                }
                for name, (protocol, port) in listeners.items()
            ],
            "snat": {"addresses": ["198.51.100.0/29"]},
            "flowTable": {"maxFlows": max_flows},
        }
        meta = {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "metadata": {"name": "web"}}
        file = self.lab.directory / "web.yaml"
        file.write_text(json.dumps({**meta, "spec": spec}))
        self.lab.packetstack("up", str(file))

    def cost(self, ns: int) -> None:
        """What each packet takes from now on."""
        for engine in self.status()["engines"]:
            cost(self.lab.run_directory / "engines" / str(engine["slot"]) / "queues", ns)

    def status(self) -> dict[str, Any]:
        """Of the stack."""
        status: dict[str, Any] = self.client.call("get", name="web")[0]["status"]
        return status


class Costly(CostlyStack):
    """One with its servers, whose engines are to be evened out."""

    def __init__(self, lab: Lab, replicas: int, cores: int, queues_per_core: int) -> None:
        super().__init__(lab, Client(lab.run_directory))
        self._shape = {"cores": cores, "queuesPerCore": queues_per_core}
        self._replicas = replicas

    def up(self, mode: str) -> None:
        """With this `spec.rebalance.mode`."""
        self.make(self._shape, self._replicas, mode, {"tcp": ("TCP", 80), "udp": ("UDP", 53)}, 4096)

    def unevenness(self, seconds: float) -> float:
        """Busiest core by the mean of all, over this time."""
        total: dict[tuple[int, int], float] = {}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.5)
            for engine in self.status()["engines"]:
                for core in engine["cores"]:
                    at = (engine["slot"], core["core"])
                    total[at] = total.get(at, 0.0) + core["busy"]
        return max(total.values()) * len(total) / (sum(total.values()) or 1.0)

    def reasons(self) -> list[str]:
        """Of the stack's events."""
        return [e["reason"] for e in self.client.call("events", name="web")]


@contextmanager
def costly(
    prefix: str, cost_ns: int, *, replicas: int = 2, cores: int = 1, queues_per_core: int = 1
) -> Iterator[Costly]:
    """A stack with mode Off; ended with all that belongs to it."""
    with Lab(prefix) as lab:
        # On one CPU: what the kernel reorders when a sender changes its CPU in a burst is not the engines' doing.
        servers = Servers(lab, cpu=0)
        lab.start("node", sys.executable, "-c", AGENT, "--run-dir", str(lab.run_directory))
        made = Costly(lab, replicas, cores, queues_per_core)
        while not made.client.alive():
            time.sleep(0.05)
        made.up("Off")
        made.cost(cost_ns)
        yield made
        servers.stop()
        lab.packetstack("down", "--yes")
