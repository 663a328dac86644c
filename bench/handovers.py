"""T1, T2, T10, T12, T15: what handovers, kills and restarts cost live traffic. Real packets in namespaces of the lab's own."""

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from packetstack_cli.backend import not_ready
from packetstack_cli.client import Client
from packetstack_cli.lab import Lab
from packetstack_cli.outage import Outage, hang
from packetstack_cli.traffic import Servers, Traffic
from rows import Row, yes

STACK = Path(__file__).parents[1] / "examples" / "demo.yaml"
TCP, UDP = "192.0.2.10:80", "192.0.2.10:53"


@contextmanager
def running(prefix: str, replicas: int) -> Iterator[tuple[Lab, Client, Servers]]:
    """The example's stack in a lab, with its servers."""
    with Lab(prefix) as lab:
        servers = Servers(lab)
        lab.packetstack("up", str(STACK))
        client = Client(lab.run_directory)
        client.call("scale", name="demo", replicas=replicas)
        settled(client)
        yield lab, client, servers


def settled(client: Client, timeout_seconds: float = 30) -> dict[str, Any]:
    """The status of the stack, once it is as its resource says."""
    for item in client.wait(["demo"], timeout_seconds):
        raise TimeoutError(not_ready(item, timeout_seconds))
    status: dict[str, Any] = client.get("demo")[0]["status"]
    return status


def resizes(quick: bool) -> Iterator[Row]:
    """T1: broken connections over 20 overlapping resizes."""
    connections, flows = (2000, 400) if quick else (10_000, 2_000)
    sizes = (4, 1, 3, 2, 4, 1, 4, 1, 2, 3, 1, 4, 2, 1, 3, 4, 1, 2, 4, 3)
    with running("pkb-resizes", 2) as (lab, client, servers):
        traffic = Traffic(
            lab, (TCP,), (UDP,), connections=connections, udp_flows=flows, request_interval_ms=4000, udp_interval_ms=400
        )
        traffic.wait_open()
        for i, size in enumerate(sizes):
            client.call("scale", name="demo", replicas=size)
            time.sleep((0.8, 0.3, 0.1, 0.5)[i % 4])
        settled(client)
        outcome = traffic.stop()
        servers.stop()
    what = f"{connections} TCP + {flows} UDP flows, {len(sizes)} resizes"
    yield Row("T1", f"broken connections, {what}", outcome.broken, "", goal="0", met=yes(outcome.broken == 0))
    lost = outcome.datagrams_lost
    yield Row("T1", f"datagrams lost of {outcome.datagrams_sent}", lost, "", goal="0 by a handover", met=yes(lost == 0))
    reordered = outcome.datagrams_reordered
    yield Row("T1", "datagrams reordered", reordered, "", goal="0", met=yes(reordered == 0))
    yield Row("T1", "longest time to an answer", outcome.longest_gap_ms, "ms")


def kills(quick: bool) -> Iterator[Row]:
    """T2, T15: outages as a client of the engine sees them, and what is lost meanwhile."""
    took: dict[str, list[float]] = {"datapath": [], "engine": [], "hang": []}
    pauses: list[float] = []
    with running("pkb-kills", 2) as (lab, client, servers), Outage(lab, client, "demo", ("192.0.2.10", 53)) as outage:
        traffic = Traffic(lab, (TCP,), (UDP,), connections=2000, udp_flows=200, request_interval_ms=1000)
        traffic.wait_open()
        for i in range(5 if quick else 20):
            for fault in ("datapath", "engine", "hang"):
                engine = settled(client)["engines"][i % 2]
                strike = {
                    "datapath": partial(os.kill, engine["pid"], signal.SIGKILL),
                    "engine": partial(os.killpg, engine["initPid"], signal.SIGKILL),
                    "hang": partial(hang, engine["pid"]),
                }[fault]
                took[fault].append(outage.after(engine["slot"], strike))
            slot = settled(client)["engines"][i % 2]["slot"]
            pauses.append(client.call("upgrade", name="demo", slot=slot)["pauseMilliseconds"])
            if i % 5 == 4:
                lab.packetstack("upgrade", "--agent")
        settled(client)
        outcome = traffic.stop()
        servers.stop()
    n = len(pauses)
    what = f"{outcome.connections} connections, {3 * n} kills and hangs, {n} hot restarts, {n // 5} agent restarts"
    yield Row("T2", f"broken of {what}", outcome.broken, "", goal="0", met=yes(outcome.broken == 0))
    for fault, goal in (("datapath", 10), ("engine", 60), ("hang", 200)):
        name = {"datapath": "kill -9 of a datapath", "engine": "kill -9 of a whole engine", "hang": "a hang"}[fault]
        median = statistics.median(took[fault])
        yield Row("T2", f"{name} -> its flows answered again, median of {n}", round(median, 1), "ms",
                  goal=f"<= {goal}", met=yes(median <= goal))  # fmt: skip
    lost = outcome.datagrams_lost
    yield Row("T15", f"datagrams lost of {outcome.datagrams_sent} meanwhile", lost, "", goal="0", met=yes(lost == 0))
    yield Row("T15", f"hot restart, nobody serves, median of {n}", round(statistics.median(pauses), 2), "ms")


def all_killed(quick: bool) -> Iterator[Row]:
    """T2: outages when no engine is left; datagrams that come meanwhile may find no room, so none of them is promised."""
    kinds: dict[str, tuple[str, Callable[[int, int], None]]] = {
        "all datapaths": ("pid", os.kill),
        "all engines": ("initPid", os.killpg),
    }
    took: dict[str, list[float]] = {name: [] for name in kinds}
    with running("pkb-all", 2) as (lab, client, servers), Outage(lab, client, "demo", ("192.0.2.10", 53)) as outage:
        traffic = Traffic(lab, (TCP,), (UDP,), connections=2000, udp_flows=200, request_interval_ms=1000)
        traffic.wait_open()
        for _ in range(4 if quick else 20):
            for name, (field, kill) in kinds.items():
                engines = settled(client)["engines"]
                strike = partial(each, kill, [e[field] for e in engines])
                took[name].append(outage.after(engines[0]["slot"], strike))
        settled(client)
        outcome = traffic.stop()
        servers.stop()
    for name, seen in took.items():
        what = f"kill -9 of {name} at once -> flows answered again, median of {len(seen)}"
        yield Row("T2", what, round(statistics.median(seen), 1), "ms")
    what = f"broken of {outcome.connections} connections, all killed {sum(map(len, took.values()))} times"
    yield Row("T2", what, outcome.broken, "", goal="0", met=yes(outcome.broken == 0))


def each(kill: Callable[[int, int], None], pids: Iterable[int]) -> None:
    """SIGKILL to all of them."""
    for pid in pids:
        kill(pid, signal.SIGKILL)


def moves(quick: bool) -> Iterator[Row]:
    """T10: buckets between engines, queues between cores, under paced load; holds as packets see them."""
    rounds = 60 if quick else 400
    chooser = random.Random(1)
    with running("pkb-moves", 2) as (lab, client, servers):
        traffic = Traffic(
            lab, (TCP,), (UDP,), connections=100, udp_flows=400, request_interval_ms=500, udp_interval_ms=20
        )
        traffic.wait_open()
        gaps = scheduling_gaps(1 if quick else 3)
        before = client.call("get", name="demo")[0]["status"]
        slots = [e["slot"] for e in before["engines"] if e["state"] == "Active"]
        last = holds(before)
        seen: list[float] = []
        fences: list[float] = []
        for _ in range(rounds):
            first = chooser.randrange(0, 4096 - 64)
            moved = client.call(
                "move_buckets", name="demo", buckets=list(range(first, first + 64)), slot=chooser.choice(slots)
            )
            if moved["moved"]:
                fences.append(moved["longestMilliseconds"])
            now = holds(client.call("get", name="demo")[0]["status"])
            for queue, (count, total) in now.items():
                was = last.get(queue, (0, 0))
                if count > was[0]:
                    seen += [(total - was[1]) / (count - was[0]) / 1e6] * (count - was[0])
            last = now
        handed = []
        for _ in range(rounds):
            slot, queue, core = chooser.choice(slots), chooser.randrange(4), chooser.randrange(2)
            handed.append(client.call("move_queue", name="demo", slot=slot, queue=queue, core=core)["microseconds"])
        outcome = traffic.stop()
        servers.stop()
        after = client.call("get", name="demo")[0]["status"]
    seen.sort()
    late = after["drops"]["engine"]["late"]
    p50, p99 = statistics.median(seen), seen[int(len(seen) * 0.99)]
    gap = gaps[int(len(gaps) * 0.99)]
    done = f"{len(fences)} moves of 64 buckets, {len(handed)} of queues"
    yield Row("T10", f"datagrams lost of {outcome.datagrams_sent}, {done}", outcome.datagrams_lost, "", goal="0",
              met=yes(outcome.datagrams_lost == 0))  # fmt: skip
    yield Row("T10", "datagrams reordered", outcome.datagrams_reordered, "", goal="0",
              met=yes(outcome.datagrams_reordered == 0))  # fmt: skip
    yield Row("T10", "late packets", late, "", goal="counted, 0 here", met=yes(late == 0))
    yield Row("T10", "broken connections", outcome.broken, "", goal="0", met=yes(outcome.broken == 0))
    yield Row("T10", f"hold of a moved bucket's packets, median of {len(seen)}", round(p50, 3), "ms", goal="<= 1",
              met=yes(p50 <= 1))  # fmt: skip
    yield Row("T10", "hold, p99", round(p99, 3), "ms", "p99 scheduling gap of a spinner", round(gap, 3),
              round(p99 / gap, 2) if gap else "", "<= peer + 5", yes(p99 <= gap + 5))  # fmt: skip
    yield Row("T10", "fence, word stored to shards released, median", round(statistics.median(fences), 3), "ms")
    yield Row("T10", "queue to another core, median", round(statistics.median(handed), 1), "us")


def holds(status: dict[str, Any]) -> dict[tuple[int, int], tuple[int, int]]:
    """(engine, queue) -> holds so far, their sum in ns."""
    return {
        (engine["slot"], queue["queue"]): (queue["holds"], queue["holdNanoseconds"])
        for engine in status["engines"]
        for core in engine["cores"]
        for queue in core["queues"]
    }


def scheduling_gaps(seconds: float) -> list[float]:
    """The longest pause of a spinning thread in each 10 ms, sorted, in ms: what this machine does to anybody."""
    found: list[float] = []

    def spin() -> None:
        end = time.monotonic() + seconds
        last = window = time.monotonic()
        longest = 0.0
        while last < end:
            now = time.monotonic()
            longest = max(longest, now - last)
            last = now
            if now - window > 0.01:
                found.append(longest * 1e3)
                window, longest = now, 0.0

    thread = threading.Thread(target=spin)
    thread.start()
    thread.join()
    return sorted(found)


def joining(quick: bool) -> Iterator[Row]:
    """T12: how fast a new engine has its share of new flows, and how fast a leaving one is gone."""
    rounds = 2 if quick else 5
    share: list[float] = []
    ready: list[float] = []
    gone: list[float] = []
    spec: list[float] = []
    with running("pkb-joining", 2) as (lab, client, servers):
        for _ in range(rounds):
            begun = time.time()
            client.call("scale", name="demo", replicas=3)
            status = settled(client)
            events = [e for e in client.call("events", name="demo") if e["time"] >= begun]
            at = {e["reason"]: e["time"] for e in events}
            ready.append(at["BucketsMoved"] - at["EngineReady"])
            spec.append(at["BucketsMoved"] - begun)
            new = max(e["slot"] for e in status["engines"])
            before = created(client)
            traffic = Traffic(lab, (TCP,), connections=1, new_rate=2000, seconds=4)
            while traffic.running:
                time.sleep(0.1)
            traffic.stop()
            flows = {slot: n - before.get(slot, 0) for slot, n in created(client).items()}
            share.append(100 * flows[new] / sum(flows.values()))
            begun = time.time()
            client.call("scale", name="demo", replicas=2)
            settled(client)
            deadline = time.time() + 10
            while not (left := [e for e in client.call("events", name="demo")
                                if e["time"] >= begun and e["reason"] == "EngineRemoved"]) and time.time() < deadline:  # fmt: skip
                time.sleep(0.01)
            moved = [
                e for e in client.call("events", name="demo") if e["time"] >= begun and e["reason"] == "BucketsMoved"
            ]
            gone.append(left[-1]["time"] - moved[-1]["time"])
        servers.stop()
    worst = max(abs(s - 100 / 3) for s in share)
    yield Row("T12", "new engine Ready -> its share of the buckets", round(statistics.median(ready), 3), "s",
              goal="<= 0.05", met=yes(statistics.median(ready) <= 0.05))  # fmt: skip
    yield Row("T12", "spec change -> its share of the buckets", round(statistics.median(spec), 3), "s")
    yield Row("T12", "new flows to the new engine of three, furthest from a third", round(worst, 2), "points",
              goal="<= 2", met=yes(worst <= 2))  # fmt: skip
    yield Row("T12", "last bucket gone -> engine gone", round(statistics.median(gone), 3), "s", goal="<= 0.1",
              met=yes(statistics.median(gone) <= 0.1))  # fmt: skip


def created(client: Client) -> dict[int, int]:
    """Flows created, by engine."""
    found = {}
    for line in client.metrics().splitlines():
        if line.startswith("packetstack_engine_packets_total{") and 'event="flows_created"' in line:
            labels, _, value = line.rpartition(" ")
            found[int(labels.split('engine="')[1].split('"')[0])] = int(float(value))
    return found
