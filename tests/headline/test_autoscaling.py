"""A ramp of real traffic: the pool follows it from one engine to four and back, and no connection breaks.

Writes what happened to build/autoscaled/autoscaled.png, the picture of docs/autoscaling.md.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import eventually

from packetstack_cli.client import Client
from packetstack_cli.lab import Lab
from packetstack_cli.traffic import Outcome, Servers, Traffic

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/autoscaled.yaml"
BY_CORES = ROOT / "examples/vertical.yaml"
PICTURE = ROOT / "build/autoscaled/autoscaled.png"
TARGETS = ("192.0.2.10:80",)
LOOK_SECONDS = 0.25
LIMIT_SECONDS = 40.0
"""For the pool to follow: three sync periods would do on a machine of our own."""


class Watcher:
    """Looks at the stack until it is stopped: what it was at each time."""

    def __init__(self, client: Client) -> None:
        self.began = time.monotonic()
        self.looks: list[tuple[float, dict[str, Any]]] = []
        self._client, self._ended = client, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            item = self._client.call("get", name="web")[0]
            self.looks.append((time.monotonic() - self.began, item))

    def until(self, replicas: int) -> None:
        """Until so many engines are wanted, and they all serve."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            item = self.looks[-1][1] if self.looks else {}
            if item and item["spec"]["replicas"] == replicas and item["status"]["ready"]:
                return
            assert time.monotonic() < deadline, item and item["status"].get("autoscaling")
            time.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(10)


def ask(lab: Lab, name: str, connections: int, interval_ms: int, ramp_seconds: float) -> Traffic:
    """Connections that ask again and again, for short answers."""
    return Traffic(
        lab,
        TARGETS,
        connections=connections,
        request_interval_ms=interval_ms,
        answer_bytes="64-512",
        ramp_seconds=ramp_seconds,
        name=name,
    )


def sizes(watcher: Watcher) -> list[int]:
    """Of the pool, one after the other."""
    found: list[int] = []
    for _, item in watcher.looks:
        if not found or found[-1] != item["spec"]["replicas"]:
            found.append(item["spec"]["replicas"])
    return found


def draw(watcher: Watcher, requests: list[tuple[float, float]], path: Path) -> None:
    """Offered load, packets, busy share and replicas over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    at = [t for t, _ in watcher.looks]
    engines = [[e for e in item["status"]["engines"] if e["state"] == "Active"] for _, item in watcher.looks]
    packets = [sum(e["packetsPerSecond"] for e in es) for es in engines]
    replicas = [item["spec"]["replicas"] for _, item in watcher.looks]
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888"}
    with plt.rc_context(style):
        figure, (load, each, busy, pool) = plt.subplots(4, 1, sharex=True, figsize=(10, 8), layout="constrained")
        load.plot([t for t, _ in requests], [n for _, n in requests], color="#4e79a7")
        load.set_ylabel("requests/s")
        load.set_title("offered", loc="left", fontsize=10)
        each.plot(at, [p / len(es) if es else 0 for p, es in zip(packets, engines, strict=True)], color="#59a14f")
        each.axhline(1000, color="#e15759", linewidth=0.9, linestyle=(0, (4, 3)))
        each.set_ylabel("packets/s")
        each.set_title("of an engine, on average; dashed: the target", loc="left", fontsize=10)
        shares = [100 * sum(e["busy"] for e in es) / len(es) if es else 0 for es in engines]
        busy.plot(at, shares, color="#f28e2b")
        busy.set_ylabel("% busy")
        busy.set_title("cycles of an engine that do work, on average", loc="left", fontsize=10)
        pool.step(at, replicas, where="post", color="black", linewidth=2, label="wanted")
        ready = [item["status"]["readyReplicas"] for _, item in watcher.looks]
        pool.step(at, ready, where="post", color="#4e79a7", linestyle=(0, (2, 2)), label="serving")
        pool.set_ylabel("engines")
        pool.set_xlabel("seconds")
        pool.legend(loc="upper right", frameon=False, ncols=2)
        for plot in (load, each, busy, pool):
            plot.set_ylim(bottom=0)
        pool.set_ylim(top=5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def offered(traffics: list[tuple[float, Traffic]]) -> list[tuple[float, float]]:
    """Answered requests per second of all generators, by tenths of a second of the watcher's clock."""
    total: dict[int, float] = {}
    for began, traffic in traffics:
        for sample in traffic.samples:
            step = int((began + sample["elapsed"]) * 2)
            total[step] = total.get(step, 0.0) + sample["answers_per_second"] / 5
    return [(step / 2, n) for step, n in sorted(total.items())]


@pytest.mark.slow
def test_the_pool_follows_a_ramp_of_traffic_and_breaks_no_connection() -> None:
    with Lab("pkl-auto") as lab:
        servers = Servers(lab)
        lab.packetstack("up", str(EXAMPLE))
        watcher = Watcher(Client(lab.run_directory))
        traffics = []

        def start(name: str, connections: int, interval_ms: int, ramp_seconds: float) -> Traffic:
            began = time.monotonic() - watcher.began
            traffic = ask(lab, name, connections, interval_ms, ramp_seconds)
            traffics.append((began, traffic))
            return traffic

        # These stay all the time: they see every resize.
        steady = start("steady", 150, 2000, 2)
        steady.wait_open()
        time.sleep(4)
        ramp = start("ramp", 600, 300, 14)
        watcher.until(4)
        ramp.wait_open()
        time.sleep(4)
        ramped = ramp.stop()
        watcher.until(1)
        time.sleep(2)
        outcome = steady.stop()
        said = lab.packetstack("explain", "web")
        watcher.stop()
        events = json.loads(lab.packetstack("events", "web", "-o", "json"))
        servers.stop()
    draw(watcher, offered(traffics), PICTURE)
    print(f"{sizes(watcher)}\n{ramped}\n{outcome}\n{said}")
    found = sizes(watcher)
    assert found[0] == found[-1] == 1
    assert max(found) == 4
    up = found[: found.index(4) + 1]
    assert up == sorted(up), "no flapping on the way up"
    down = found[found.index(4) :]
    assert down == sorted(down, reverse=True), "no flapping on the way down"
    for part in (outcome, ramped):
        assert isinstance(part, Outcome)
        assert part.never_opened == 0
        assert part.broken == 0, part.what_broke()
    rescaled = [e for e in events if e["reason"] == "SuccessfulRescale"]
    assert len(rescaled) >= len(found) - 1
    assert "engine metric PacketsPerSecond above target" in rescaled[0]["message"]


@pytest.mark.slow
def test_row_6_the_cores_of_an_engine_follow_a_ramp_of_traffic_and_no_connection_breaks() -> None:
    with Lab("pkl-cores") as lab:
        servers = Servers(lab)
        lab.packetstack("up", str(BY_CORES))
        client = Client(lab.run_directory)

        def has(cores: int) -> bool:
            item = client.call("get", name="web")[0]
            there = [len(e["cores"]) for e in item["status"]["engines"]]
            return bool(item["spec"]["engine"]["cores"] == cores and there == [cores] and item["status"]["ready"])

        steady = ask(lab, "steady", 50, 2000, 1)
        steady.wait_open()
        assert has(1)
        ramp = ask(lab, "ramp", 300, 300, 5)
        eventually(lambda: has(2), LIMIT_SECONDS)
        ramp.wait_open()
        ramped = ramp.stop()
        eventually(lambda: has(1), LIMIT_SECONDS)
        outcome = steady.stop()
        events = json.loads(lab.packetstack("events", "web", "-o", "json"))
        servers.stop()
    for part in (outcome, ramped):
        assert part.never_opened == 0
        assert part.broken == 0, part.what_broke()
    up, down = [e["message"] for e in events if e["reason"] == "EnginesResized"]
    assert up.startswith("1 x 1 core -> 1 x 2 cores: PacketsPerSecond ")
    assert down.startswith("1 x 2 cores -> 1 x 1 core: all triggers allow fewer cores")
