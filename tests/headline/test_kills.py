"""Datapath processes and whole engines are killed and hung under live traffic: no connection may break."""

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_cli.outage import Outage, hang
from packetstack_cli.traffic import Outcome, Servers, Traffic

from .test_resize import DEMO, SIZES, TARGETS, UDP_TARGETS, drops, wait_ready

SERVED_AGAIN_MS = 1000
HANG_LIMIT_MS = 500


@dataclass
class Scene:
    """A pool under load."""

    lab: Lab
    client: Client
    traffic: Traffic
    outage: Outage
    outcome: Outcome | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    """Frames of all engines that are not in exactly one ring, at rest."""
    unseen: int = 0
    """Datagrams the server's own sockets dropped."""

    def engines(self) -> list[dict[str, Any]]:
        engines: list[dict[str, Any]] = self.client.call("get", name="demo")[0]["status"]["engines"]
        return engines

    def settle(self) -> None:
        """Until the pool is as wanted and every engine has a datapath."""
        wait_ready(self.client)


def frames(client: Client) -> dict[str, int]:
    """Sum of the engines' censuses, once nothing is under way any more."""
    deadline = time.monotonic() + 5
    while True:
        engines = client.call("census", name="demo").values()
        found = {kind: sum(e[kind] for e in engines) for kind in ("missing", "twice", "bad")}
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@contextmanager
def scene(prefix: str, connections: int = 400, udp_flows: int = 200, replicas: int = 2) -> Iterator[Scene]:
    """Afterwards nothing may be broken, and no datagram lost silently."""
    with Lab(prefix) as lab:
        # On one CPU each: what the kernel reorders when a sender changes its CPU in a burst is not the pool's doing.
        servers = Servers(lab, cpu=0)
        lab.packetstack("up", str(DEMO), "--uplink", NODE_UPLINK)
        lab.packetstack("scale", "demo", "--replicas", str(replicas))
        client = Client(lab.run_directory)
        before = drops(client, lab)
        traffic = Traffic(
            lab,
            TARGETS,
            UDP_TARGETS,
            connections=connections,
            udp_flows=udp_flows,
            request_interval_ms=1000 if connections < 5000 else 4000,
            udp_interval_ms=100 if udp_flows < 1000 else 400,
            new_rate=20,
            cpu=1,
        )
        traffic.wait_open()
        with Outage(lab, client, "demo", ("192.0.2.10", 53)) as outage:
            s = Scene(lab, client, traffic, outage)
            yield s
            s.settle()
        time.sleep(1)
        s.outcome = outcome = traffic.stop()
        s.frames = frames(client)
        after = drops(client, lab, outcome)
        s.unseen = servers.stop()["socket_drops"]
    s.dropped = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    print(f"{outcome}\ndropped: {s.dropped}")
    assert outcome.never_opened == 0
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_duplicated == 0
    assert s.frames["twice"] == s.frames["bad"] == 0, s.frames


def kill(pid: int) -> Callable[[], None]:
    return lambda: os.kill(pid, signal.SIGKILL)


def test_after_a_killed_datapath_its_flows_are_served_again_in_less_than_a_second() -> None:
    took = []
    with scene("pkl-kill") as s:
        for i in range(20):
            engines = s.engines()
            engine = engines[i % len(engines)]
            took.append(s.outage.after(engine["slot"], kill(engine["pid"])))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")
    assert statistics.median(took) < SERVED_AGAIN_MS
    assert s.outcome
    assert s.outcome.datagrams_lost == 0, s.dropped


def test_after_a_killed_engine_its_flows_are_served_again_in_less_than_a_second() -> None:
    took = []
    with scene("pkl-kill") as s:
        for i in range(10):
            engines = s.engines()
            engine = engines[i % len(engines)]
            took.append(s.outage.after(engine["slot"], lambda e=engine: os.killpg(e["initPid"], signal.SIGKILL)))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")
    assert statistics.median(took) < SERVED_AGAIN_MS
    assert s.outcome
    assert s.outcome.datagrams_lost == 0, s.dropped


def test_after_a_hang_its_flows_are_served_again_a_second_after_the_limit() -> None:
    took = []
    with scene("pkl-hang") as s:
        for i in range(6):
            engines = s.engines()
            engine = engines[i % len(engines)]
            took.append(s.outage.after(engine["slot"], lambda e=engine: hang(e["pid"])))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")
    assert statistics.median(took) < HANG_LIMIT_MS + SERVED_AGAIN_MS


@pytest.mark.parametrize("whole", [False, True], ids=["datapaths", "engines"])
def test_all_engines_killed_at_once_break_nothing(whole: bool) -> None:
    took = []
    with scene("pkl-all") as s:
        for _ in range(5):
            engines = s.engines()

            def strike(victims: list[dict[str, Any]] = engines) -> None:
                for e in victims:
                    if whole:
                        os.killpg(e["initPid"], signal.SIGKILL)
                    else:
                        os.kill(e["pid"], signal.SIGKILL)

            took.append(s.outage.after(engines[0]["slot"], strike))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")
    assert statistics.median(took) < SERVED_AGAIN_MS


def test_the_last_engine_killed_breaks_nothing() -> None:
    with scene("pkl-last", replicas=1) as s:
        for _ in range(5):
            engine = s.engines()[0]
            s.outage.after(engine["slot"], lambda e=engine: os.killpg(e["initPid"], signal.SIGKILL))
            s.settle()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "udp_flows", "sizes"),
    [(400, 200, SIZES[:7]), (10_000, 2_000, SIZES)],
    ids=["small", "full"],
)
def test_kills_and_hangs_during_resizes_break_nothing(connections: int, udp_flows: int, sizes: tuple[int, ...]) -> None:
    with scene("pkl-kres", connections, udp_flows) as s:
        for i, size in enumerate(sizes):
            s.client.call("scale", name="demo", replicas=size)
            time.sleep(0.05 * (i % 4))
            engine = next((e for e in s.engines() if e["pid"]), None)
            if engine is not None and i % 3 == 0:
                os.killpg(engine["initPid"], signal.SIGKILL)
            elif engine is not None:
                os.kill(engine["pid"], signal.SIGKILL if i % 3 == 1 else signal.SIGSTOP)
            time.sleep(1.5)
    assert s.outcome
    assert s.outcome.datagrams_lost <= sum(s.dropped.values()) + s.unseen, "a datagram was lost silently"


def test_an_agent_killed_during_resizes_goes_on_where_it_was() -> None:
    with scene("pkl-ares") as s:
        for i, size in enumerate((4, 1, 3, 2)):
            s.client.call("scale", name="demo", replicas=size)
            time.sleep(0.03 + 0.11 * i)
            agent = int((s.lab.run_directory / "agent.pid").read_text())
            os.kill(agent, signal.SIGKILL)
            while Path(f"/proc/{agent}/fd/0").exists():
                time.sleep(0.01)
            s.lab.packetstack("upgrade", "--agent")
            s.settle()
            assert sum(e["buckets"] > 0 for e in s.engines()) == size
    assert s.outcome
    assert s.outcome.datagrams_reordered == 0
