"""A ramp of real traffic: the pool follows it from one engine to four and back, and no connection breaks.

Writes what happened to build/autoscaled: autoscaled.png and cores-mirror.png are the pictures of docs/autoscaling.md.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
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


class Load:
    """Clients that ask again and again, for short answers."""

    def __init__(self, lab: Lab, watcher: Watcher) -> None:
        self._lab, self._watcher = lab, watcher
        self.begun: list[tuple[float, Traffic]] = []
        """When, on the watcher's clock, and who."""

    def begin(
        self, name: str, connections: int, interval_ms: int, ramp_seconds: float, leave_seconds: float = 0.0
    ) -> Traffic:
        """So many connections, which come and leave in so many seconds."""
        began = time.monotonic() - self._watcher.began
        traffic = Traffic(
            self._lab, TARGETS, connections=connections, request_interval_ms=interval_ms, answer_bytes="64-512",
            ramp_seconds=ramp_seconds, leave_seconds=leave_seconds, name=name,
        )  # fmt: skip
        self.begun.append((began, traffic))
        return traffic


def sizes(watcher: Watcher) -> list[int]:
    """Of the pool, one after the other."""
    found: list[int] = []
    for _, item in watcher.looks:
        if not found or found[-1] != item["spec"]["replicas"]:
            found.append(item["spec"]["replicas"])
    return found


@contextmanager
def plots(requests: list[tuple[float, float]], path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Three plots below the offered load, over time; afterwards they are a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888"}
    with plt.rc_context(style):
        figure, (load, *others) = plt.subplots(4, 1, sharex=True, figsize=(10, 8), layout="constrained")
        load.plot([t for t, _ in requests], [n for _, n in requests], color="#4e79a7")
        load.set_ylabel("requests/s")
        load.set_title("offered", loc="left", fontsize=10)
        yield tuple(others)
        for plot in (load, *others):
            plot.set_ylim(bottom=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def draw(watcher: Watcher, requests: list[tuple[float, float]], path: Path) -> None:
    """Offered load, packets, busy share and replicas over time."""
    at = [t for t, _ in watcher.looks]
    engines = [[e for e in item["status"]["engines"] if e["state"] == "Active"] for _, item in watcher.looks]
    packets = [sum(e["packetsPerSecond"] for e in es) for es in engines]
    replicas = [item["spec"]["replicas"] for _, item in watcher.looks]
    with plots(requests, path) as (each, busy, pool):
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
        pool.set_ylim(top=5)


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
        load = Load(lab, watcher)
        # These stay all the time: they see every resize.
        steady = load.begin("steady", 150, 2000, 2)
        steady.wait_open()
        time.sleep(4)
        ramp = load.begin("ramp", 600, 300, 14)
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
    draw(watcher, offered(load.begun), PICTURE)
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


def draw_cores(watcher: Watcher, requests: list[tuple[float, float]], path: Path) -> None:
    """Offered load, packets of a core, cores, and whose the connections are, over time."""
    looks = [(t, item) for t, item in watcher.looks if item["status"]["engines"]]
    at = [t for t, _ in looks]
    wanted = [item["spec"]["engine"]["cores"] for _, item in looks]
    serving = [max(len(e["cores"]) for e in item["status"]["engines"] if e["buckets"]) for _, item in looks]
    packets = [sum(e["packetsPerSecond"] for e in item["status"]["engines"]) for _, item in looks]
    slots = {e["slot"]: len(e["cores"]) for _, item in looks for e in item["status"]["engines"] if e["buckets"]}
    flows = [{e["slot"]: e["flows"] for e in item["status"]["engines"]} for _, item in looks]
    triggers = looks[0][1]["spec"]["autoscaling"]["vertical"]["triggers"]
    with plots(requests, path) as (each, cores, whose):
        each.plot(at, [p / n for p, n in zip(packets, serving, strict=True)], color="#59a14f")
        for bound in ("above", "below"):
            each.axhline(float(triggers[0][bound]), color="#e15759", linewidth=0.9, linestyle=(0, (4, 3)))
        each.set_ylabel("packets/s")
        each.set_title("of a core; dashed: above and below of the trigger", loc="left", fontsize=10)
        cores.step(at, wanted, where="post", color="black", linewidth=2, label="wanted")
        cores.step(at, serving, where="post", color="#4e79a7", linestyle=(0, (2, 2)), label="serving")
        cores.set_ylabel("cores")
        cores.set_ylim(top=2.6)
        cores.legend(loc="upper right", frameon=False, ncols=2)
        parts = [[each.get(slot, 0) for each in flows] for slot in slots]
        names = [f"set {n}, {cores} core{'s' if cores > 1 else ''}" for n, cores in enumerate(slots.values(), 1)]
        whose.stackplot(at, parts, labels=names, colors=["#4e79a7", "#f28e2b", "#59a14f"], alpha=0.8)
        whose.set_ylabel("connections")
        whose.set_title("whose they are", loc="left", fontsize=10)
        whose.set_xlabel("seconds")
        whose.legend(loc="upper right", frameon=False, ncols=3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["Transfer", "Mirror"])
def test_row_6_the_cores_of_an_engine_follow_a_ramp_of_traffic_and_no_connection_breaks(strategy: str) -> None:
    with Lab("pkl-cores") as lab:
        servers = Servers(lab)
        example = lab.directory / "vertical.yaml"
        document = yaml.safe_load(BY_CORES.read_text())
        document["spec"]["handover"] = {"strategy": strategy}
        example.write_text(json.dumps(document))
        lab.packetstack("up", str(example))
        watcher = Watcher(Client(lab.run_directory))
        load = Load(lab, watcher)

        def until(cores: int) -> None:
            def has() -> bool:
                item = watcher.looks[-1][1]
                there = [len(e["cores"]) for e in item["status"]["engines"] if e["buckets"]]
                return bool(item["spec"]["engine"]["cores"] == cores and there == [cores])

            eventually(has, LIMIT_SECONDS)

        steady = load.begin("steady", 50, 2000, 1)
        steady.wait_open()
        until(1)
        time.sleep(2)
        ramp = load.begin("ramp", 300, 300, 8, leave_seconds=5)
        until(2)
        ramp.wait_open()
        time.sleep(2)
        later = load.begin("later", 60, 2000, 3)  # a first set goes when the last connection of before has
        outcomes = [ramp.stop(), steady.stop()]
        until(1)
        time.sleep(2)
        outcomes.append(later.stop())
        watcher.stop()
        events = json.loads(lab.packetstack("events", "web", "-o", "json"))
        servers.stop()
    draw_cores(watcher, offered(load.begun), PICTURE.with_name(f"cores-{strategy.lower()}.png"))
    for part in outcomes:
        assert part.never_opened == 0
        assert part.broken == 0, part.what_broke()
    up, down = [e["message"] for e in events if e["reason"] == "EnginesResized"]
    assert up.startswith("1 x 1 core -> 1 x 2 cores: PacketsPerSecond ")
    assert down.startswith("1 x 2 cores -> 1 x 1 core: all triggers allow fewer cores")
