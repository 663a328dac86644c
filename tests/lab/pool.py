"""The stack of examples/demo.yaml under traffic that knows whether it was served."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packetstack_cli.backend import not_ready
from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_cli.outage import Outage
from packetstack_cli.traffic import Outcome, Servers, Traffic

DEMO = Path(__file__).parents[2] / "examples/demo.yaml"
TARGETS = ("192.0.2.10:80", "[2001:db8:1::10]:80")
UDP_TARGETS = ("192.0.2.10:53", "[2001:db8:1::10]:53")

# Sizes 1 to 4: up, down, there and back at once (flapping), one engine in the middle of all.
SIZES = (4, 1, 3, 2, 4, 1, 4, 1, 2, 3, 1, 4, 2, 1, 3, 4, 1, 2, 4, 3)

# Frames that are nobody's datagrams: neighbour discovery on links of the node's own.
NOT_TRAFFIC = ("not_ours", "unstamped")


class Pool:
    """The running stack `demo` in a lab; its engines stay from one load to the next."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.client = Client(lab.run_directory)

    def status(self) -> dict[str, Any]:
        """Of the stack."""
        status: dict[str, Any] = self.client.call("get", name="demo")[0]["status"]
        return status

    def engines(self) -> list[dict[str, Any]]:
        """Of the stack's status."""
        engines: list[dict[str, Any]] = self.status()["engines"]
        return engines

    def scale(self, replicas: int) -> None:
        """What `packetstack scale` does: until it is done."""
        self.client.scale("demo", replicas)
        self.settle()

    def settle(self, timeout_seconds: float = 30) -> dict[str, Any]:
        """Until the pool is as wanted and every engine has a datapath; its status."""
        for item in self.client.wait(["demo"], timeout_seconds):
            raise AssertionError(not_ready(item, timeout_seconds))
        return self.status()

    def drops(self, outcome: Outcome | None = None) -> dict[str, int]:
        """Every named drop between the generator's sockets and the servers', by place and reason."""
        drops = self.status()["drops"]
        named = {f"{place}.{reason}": n for place, reasons in drops.items() for reason, n in reasons.items()}
        named |= self.lab.device_drops()
        if outcome:
            named["generator.socket_drops"] = outcome.socket_drops
        return {name: n for name, n in named.items() if name.rpartition(".")[2] not in NOT_TRAFFIC}

    def frames(self) -> dict[str, int]:
        """Frames that are not in exactly one ring, of all engines, once nothing is under way any more."""
        deadline = time.monotonic() + 5
        while True:
            engines = self.client.call("census", name="demo").values()
            found = {kind: sum(e[kind] for e in engines) for kind in ("missing", "twice", "bad")}
            if not any(found.values()) or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


@contextmanager
def pool(prefix: str, replicas: int | None = None) -> Iterator[Pool]:
    """The demo's stack, with so many engines or as in its file, and no traffic."""
    with Lab(prefix) as lab:
        lab.packetstack("up", str(DEMO), "--uplink", NODE_UPLINK)
        made = Pool(lab)
        if replicas is not None:
            made.scale(replicas)
        yield made


@dataclass
class Load:
    """A pool under load, and after it: what became of the traffic."""

    pool: Pool
    traffic: Traffic
    outage: Outage
    outcome: Outcome | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    """Named drops of this time."""
    frames: dict[str, int] = field(default_factory=dict)
    """Frames of all engines that are not in exactly one ring, at rest."""
    unseen: int = 0
    """Datagrams that the server's own sockets dropped."""

    @property
    def lab(self) -> Lab:
        """Where the pool is."""
        return self.pool.lab

    @property
    def client(self) -> Client:
        """The pool's."""
        return self.pool.client

    def engines(self) -> list[dict[str, Any]]:
        """As now."""
        return self.pool.engines()

    def settle(self) -> None:
        """Until the pool is as wanted and every engine has a datapath."""
        self.pool.settle()


@contextmanager
def load(pool: Pool, connections: int = 400, udp_flows: int = 200) -> Iterator[Load]:
    """Traffic through the pool. Afterwards nothing may be broken, and no datagram doubled or lost silently in a ring."""
    # On one CPU each: what the kernel reorders when a sender changes its CPU in a burst is not the pool's doing.
    servers = Servers(pool.lab, cpu=0)
    before = pool.drops()
    traffic = Traffic(
        pool.lab,
        TARGETS,
        UDP_TARGETS,
        connections=connections,
        udp_flows=udp_flows,
        request_interval_ms=1000 if connections < 5000 else 4000,
        udp_interval_ms=100 if udp_flows < 1000 else 400,
        new_rate=20,
        cpu=1,
    )
    try:
        traffic.wait_open()
        with Outage(pool.lab, pool.client, "demo", ("192.0.2.10", 53)) as outage:
            loaded = Load(pool, traffic, outage)
            yield loaded
            loaded.settle()
        time.sleep(1)  # each connection has its turn once more
        loaded.outcome = outcome = traffic.stop()
        loaded.frames = pool.frames()
        after = pool.drops(outcome)
        loaded.unseen = servers.stop()["socket_drops"]
    finally:  # the next load finds its ports free, whatever became of this one
        traffic.stop()
        servers.stop()
    loaded.dropped = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    print(f"{outcome}\ndropped: {loaded.dropped}")
    assert outcome.never_opened == 0
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_duplicated == 0
    assert loaded.frames["twice"] == loaded.frames["bad"] == 0, loaded.frames
