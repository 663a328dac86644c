"""Row 33: what changing a pool costs those whom it serves, before, during and after; each way of changing it beside the others.

All ways get the same clients: long connections and short ones before and during the change, then others of the same kind,
so that the old ones can end. One round takes each way once, in turn.
"""

import csv
import os
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from handovers import holds, settled
from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_cli.traffic import Servers, Traffic
from rows import Row, Unavailable, yes

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/demo.yaml"
TARGET, UDP_TARGET = "192.0.2.10:80", "192.0.2.10:53"
BEFORE, AFTER = 2, 3
"""Engines."""
CONNECTIONS, NEW_RATE, INTERVAL_MS = 500, 100, 500
SAMPLE_SECONDS = 0.1
"""Between two samples of the generator."""
GONE_SECONDS = 60.0
TIMERS = {"tcpClosedTimeoutSeconds": 1, "tcpTimeWaitTimeoutSeconds": 1, "tcpHalfCloseTimeoutSeconds": 4,
          "udpIdleTimeoutSeconds": 2, "udpUnansweredTimeoutSeconds": 2}  # fmt: skip
PHASES = ("before", "during", "after")

TICKS = os.sysconf("SC_CLK_TCK")


class Phase(NamedTuple):
    """What clients and machine saw of a span of time."""

    p50: float
    """Milliseconds from a request to its answer; so are the next three."""
    p99: float
    p999: float
    gap: float
    """The longest that any connection waited, from when its request was due."""
    throughput: float
    """Answers a second."""
    cpu: float
    """Cores: the processes that serve, and the kernel's soft interrupts."""


class Scene(NamedTuple):
    """One change by one way."""

    phases: dict[str, Phase]
    broken: int
    acted: float
    """Seconds until the command was done."""
    left: float
    """Seconds from the end of the last old connection until nothing of before was left."""


@dataclass(frozen=True)
class Service:
    """What is being changed."""

    act: Callable[[], object]
    over: Callable[[], bool]
    """Is nothing of before left?"""
    mark: str
    """In the command line of each of its processes."""


class Work:
    """CPU time of the processes whose command line has a mark, and of soft interrupts. A context manager."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._found: dict[int, int] = {}
        self._known: dict[int, bool] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Work":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):  # who ends between two looks is short of as much
            self._look()

    def _look(self) -> None:
        with self._lock:
            for entry in Path("/proc").iterdir():
                if not entry.name.isdigit() or not self._known.get(int(entry.name), True):
                    continue
                pid = int(entry.name)
                try:
                    if pid not in self._known:
                        line = (entry / "cmdline").read_bytes().decode(errors="replace")
                        self._known[pid] = self._mark in line and "packetstack-traffic" not in line
                    if self._known[pid]:
                        words = (entry / "stat").read_text().rpartition(")")[2].split()
                        self._found[pid] = int(words[11]) + int(words[12])
                except OSError:
                    continue

    def seconds(self) -> float:
        """Since the machine was started."""
        self._look()
        soft = int(Path("/proc/stat").read_text().splitlines()[0].split()[7])
        return (sum(self._found.values()) + soft) / TICKS


# ---- the ways -------------------------------------------------------------------------------------------


def stack(lab: Lab, strategy: str, **spec: Any) -> Path:
    """The example's, for the listeners over IPv4."""
    document = yaml.safe_load(EXAMPLE.read_text())
    document["spec"]["handover"] = {"strategy": strategy}
    document["spec"]["engine"] = {"cores": 1, "cpuPolicy": "Shared", "queuesPerCore": 2}
    document["spec"]["flowTable"] |= TIMERS
    document["spec"] |= {"replicas": BEFORE, **spec}
    file = lab.directory / f"{strategy}-{document['spec']['replicas']}.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def reason(client: Client, kind: str) -> str:
    """Of a condition of the stack."""
    conditions = client.get("demo")[0]["status"]["conditions"]
    return next((c["reason"] for c in conditions if c["type"] == kind), "")


def until(done: Callable[[], bool], what: str, seconds: float = GONE_SECONDS) -> None:
    """Asks twenty times a second."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {seconds:g} s")
        time.sleep(0.05)


@contextmanager
def engines(lab: Lab, strategy: str) -> Iterator[Service]:
    """A pool of engines that gets another size by this strategy."""
    lab.packetstack("up", str(stack(lab, strategy)), "--uplink", NODE_UPLINK)
    client = Client(lab.run_directory)

    def over() -> bool:
        status = client.get("demo")[0]["status"]
        return len(status["engines"]) == AFTER and len(status.get("sets", [])) < 2

    def act() -> None:
        client.scale("demo", AFTER)
        if strategy == "Mirror":
            until(lambda: reason(client, "Progressing") == "SetDraining", "all buckets switched")
        else:
            settled(client)

    try:
        yield Service(act, over, f"{lab.run_directory}")
    finally:
        lab.packetstack("down", "--all", "--yes")


@contextmanager
def restarted(lab: Lab) -> Iterator[Service]:
    """The same pool, ended and made anew with the other size."""
    lab.packetstack("up", str(stack(lab, "Transfer")), "--uplink", NODE_UPLINK)
    wider = stack(lab, "Transfer", replicas=AFTER)

    def act() -> None:
        lab.packetstack("down", "--all", "--yes")
        lab.packetstack("up", str(wider), "--uplink", NODE_UPLINK)

    try:
        yield Service(act, lambda: True, f"{lab.run_directory}")
    finally:
        lab.packetstack("down", "--all", "--yes")


PROXY = """
global
    maxconn 4000
    nbthread {threads}
defaults
    mode tcp
    balance roundrobin
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen web
    bind {target}
"""


@contextmanager
def reloaded(lab: Lab) -> Iterator[Service]:
    """haproxy with as many threads as there are engines. Its new process gets the listening sockets of the old one."""
    if not shutil.which("haproxy"):
        raise Unavailable("haproxy is not installed")
    file = lab.directory / "haproxy.cfg"
    places = [f"    server s{n} {address}:8080\n" for n, address in enumerate(lab.server_addresses)]

    def configure(threads: int) -> None:
        file.write_text(PROXY.format(threads=threads, target=TARGET) + "".join(places))

    lab.run("node", "ip", "addr", "add", "192.0.2.10/32", "dev", "lo")
    configure(BEFORE)
    with (lab.directory / "haproxy.log").open("w") as log:
        master = lab.start("node", "haproxy", "-W", "-f", str(file), stderr=log)
    lab.wait_for_listener("node", 80, server=master)

    def workers() -> set[int]:
        path = Path(f"/proc/{master.pid}/task/{master.pid}/children")
        return {int(word) for word in path.read_text().split()}

    until(lambda: len(workers()) == 1, "haproxy's worker")
    old = workers()

    def act() -> None:
        configure(AFTER)
        os.kill(master.pid, signal.SIGUSR2)
        until(lambda: bool(workers() - old), "haproxy's new worker")

    try:
        yield Service(act, lambda: not workers() & old, str(file))
    finally:
        master.terminate()
        master.wait(20)
        lab.run("node", "ip", "addr", "del", "192.0.2.10/32", "dev", "lo")


WAYS: dict[str, Callable[[Lab], AbstractContextManager[Service]]] = {
    "Transfer": lambda lab: engines(lab, "Transfer"),
    "Mirror": lambda lab: engines(lab, "Mirror"),
    "stop and restart": restarted,
    "haproxy reload": reloaded,
}


# ---- one change -----------------------------------------------------------------------------------------


def scene(lab: Lab, way: str, seconds: float) -> Scene:
    """Goes through one change by this way; each phase takes so many seconds."""
    clients: list[Traffic] = []

    def begin(name: str, connections: int, new_rate: int) -> Traffic:
        made = Traffic(
            lab, (TARGET,), connections=connections, new_rate=new_rate, request_interval_ms=INTERVAL_MS,
            answer_bytes="64-2048", ramp_seconds=1.0, name=name,
        )  # fmt: skip
        clients.append(made)
        return made

    with WAYS[way](lab) as service, Work(service.mark) as work:
        marks: dict[str, tuple[float, float, float]] = {}
        older = begin("older", CONNECTIONS, NEW_RATE)
        older.wait_open()
        began, used = time.time(), work.seconds()
        time.sleep(seconds)
        act, used_by_then = time.time(), work.seconds()
        marks["before"] = (began, act, used_by_then - used)
        service.act()
        acted = time.time() - act
        time.sleep(0.5)  # the old clients ask once in that time, and see
        broken = int(older.latest.get("broken", 0))
        if broken:
            begin("again", min(broken, CONNECTIONS), 0)  # as clients do
        time.sleep(max(0.0, act + seconds - time.time()))
        marks["during"] = (act, time.time(), work.seconds() - used_by_then)
        begin("newer", CONNECTIONS, NEW_RATE).wait_open()
        outcomes = [one.stop() for one in clients[:-1]]
        ended = time.time()
        until(service.over, "what was there before has gone")
        left = time.time() - ended
        time.sleep(0.5)
        began, used = time.time(), work.seconds()
        time.sleep(seconds)
        marks["after"] = (began, time.time(), work.seconds() - used)
        outcomes.append(clients[-1].stop())
    samples = [s for one in clients for s in one.samples]
    phases = {name: phase(samples, *mark) for name, mark in marks.items()}
    return Scene(phases, sum(o.broken for o in outcomes), acted, left)


def phase(samples: list[dict[str, Any]], began: float, ended: float, cpu_seconds: float) -> Phase:
    """Of the samples that fell in it, of all generators. Times are the machine's clock."""
    within = [s for s in samples if began + SAMPLE_SECONDS < s["time"] <= ended]
    counts: Counter[float] = Counter()
    for s in within:
        for ms, n in s["rtt_counts"]:
            counts[ms] += n
    gap = max((max(s["gap_ms"], s["waiting_ms"]) for s in within), default=0.0)
    span = ended - began
    return Phase(*(quantile(counts, q) for q in (0.5, 0.99, 0.999)), gap, counts.total() / span, cpu_seconds / span)


def quantile(counts: Counter[float], share: float) -> float:
    """Of values, of which there are so many each. 0 if there are none."""
    wanted, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen > wanted:
            return value
    return max(counts, default=0.0)


# ---- what Mirror costs engines ---------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one transition of a pool that has as much to do as it can."""

    before: float
    """Answers a second; so is `during`, when each bucket has its new owner."""
    during: float
    fence: float
    """Milliseconds that the slowest fence took; so is `held`."""
    held: float
    """That a packet which had to wait waited, on average."""


def cost(lab: Lab, strategy: str, seconds: float) -> Cost:
    """All buckets change their owner. Clients ask again as soon as they have an answer; with Mirror all of them are the older set's."""
    with engines(lab, strategy) as service:
        client = Client(lab.run_directory)
        traffic = Traffic(
            lab, (TARGET,), (UDP_TARGET,), connections=200, udp_flows=50, request_interval_ms=1, udp_interval_ms=50,
            answer_bytes="64", ramp_seconds=1.0,
        )  # fmt: skip
        traffic.wait_open()
        every = list(range(4096))
        slots = [e["slot"] for e in client.get("demo")[0]["status"]["engines"]]
        if strategy == "Transfer":
            client.call("move_buckets", name="demo", buckets=every, slot=slots[0])
        before = answers(traffic, seconds)
        was = client.get("demo")[0]["status"]
        if strategy == "Transfer":
            client.call("move_buckets", name="demo", buckets=every, slot=slots[1])
        else:
            service.act()
        now = client.get("demo")[0]["status"]
        during = answers(traffic, seconds)
        traffic.stop()
    last, seen = holds(was), holds(now)
    count, total = (sum(after[i] - last.get(queue, (0, 0))[i] for queue, after in seen.items()) for i in (0, 1))
    fences = now["handover"]["holdsMilliseconds"][len(was["handover"]["holdsMilliseconds"]) :]
    return Cost(before, during, max(fences), total / count / 1e6 if count else 0.0)


def answers(traffic: Traffic, seconds: float) -> float:
    """A second, from now on."""
    began = time.time()
    time.sleep(seconds)
    rates = [s["answers_per_second"] for s in traffic.samples if s["time"] > began + SAMPLE_SECONDS]
    return statistics.fmean(rates)


def costs(quick: bool) -> Iterator[Row]:
    """T4: both sets on the same cores, and how long a switch of all buckets holds packets, beside Transfer."""
    found: dict[str, list[Cost]] = {"Transfer": [], "Mirror": []}
    for _ in range(1 if quick else 5):
        for strategy, seen in found.items():
            with Lab("pkb-costs") as lab:
                servers = Servers(lab)
                seen.append(cost(lab, strategy, 1.5 if quick else 3.0))
                servers.stop()
    yield from cost_rows(found)


def cost_rows(found: dict[str, list[Cost]]) -> Iterator[Row]:
    """Medians, ratios within each round."""
    for strategy, name in (("Mirror", "while all connections are the older set's"), ("Transfer", "after all moved")):
        seen = found[strategy]
        ratios = sorted(one.during / one.before for one in seen)
        ratio = statistics.median(ratios)
        yield Row(
            "T4", f"{strategy}: closed-loop answers/s {name}, engines share cores; ratios {ratios[0]:.2f} to {ratios[-1]:.2f}",
            round(statistics.median(one.during for one in seen)), "answers/s", "before",
            round(statistics.median(one.before for one in seen)), round(ratio, 2),
            ">= 0.6x" if strategy == "Mirror" else "", yes(ratio >= 0.6) if strategy == "Mirror" else "",
        )  # fmt: skip
    for name, what in (
        ("fence", "slowest fence of all buckets' change"),
        ("held", "mean wait of a packet that was held in it"),
    ):
        mirror, transfer = ([getattr(one, name) for one in found[strategy]] for strategy in ("Mirror", "Transfer"))
        ratios = sorted(m / t for m, t in zip(mirror, transfer, strict=True) if t)
        yield Row(
            "T4", f"Mirror: {what}, {min(mirror):.2f} to {max(mirror):.2f}", round(statistics.median(mirror), 2), "ms",
            "Transfer", round(statistics.median(transfer), 2), round(statistics.median(ratios), 2) if ratios else "",
        )  # fmt: skip


# ---- rows -----------------------------------------------------------------------------------------------


def transitions(quick: bool) -> Iterator[Row]:
    """Row 33: all ways in turn, in each of some rounds."""
    yield from rows(measure(1 if quick else 5, 2.0 if quick else 4.0))


def measure(rounds: int, seconds: float) -> dict[str, list[Scene]]:
    """By way; each phase takes so many seconds."""
    found: dict[str, list[Scene]] = {}
    ways = [way for way in WAYS if way != "haproxy reload" or shutil.which("haproxy")]
    for _ in range(rounds):
        for way in ways:
            with Lab("pkb-ways") as lab:
                servers = Servers(lab)
                found.setdefault(way, []).append(scene(lab, way, seconds))
                servers.stop()
    return found


FIGURES = {"p50": "ms", "p99": "ms", "p999": "ms", "gap": "ms", "throughput": "answers/s", "cpu": "cores"}
SAID = {
    "p50": "time to an answer, p50", "p99": "time to an answer, p99", "p999": "time to an answer, p99.9",
    "gap": "longest gap of a connection", "throughput": "throughput", "cpu": "CPU",
}  # fmt: skip


def rows(found: dict[str, list[Scene]]) -> Iterator[Row]:
    """Medians over the rounds, during and after the change beside before; ratios within each round."""
    write(found, ROOT / "build/bench/transitions.csv")
    for way, scenes in found.items():
        broken = [s.broken for s in scenes]
        kept = way in ("Transfer", "Mirror")
        name = f"{way}: connections broken of {CONNECTIONS} and {NEW_RATE} new ones a second, worst of {len(scenes)} changes"
        yield Row("33", name, max(broken), "", goal="0" if kept else "", met=yes(max(broken) == 0) if kept else "")
        for name, unit in FIGURES.items():
            for when in ("during", "after"):
                pairs = [(getattr(s.phases[when], name), getattr(s.phases["before"], name)) for s in scenes]
                value, before = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs if b) if any(b for _, b in pairs) else ""
                yield Row("33", f"{way}, {when}: {SAID[name]}", round(value, 2), unit, "before", round(before, 2),
                          f"{ratio:.2f}" if ratio else "")  # fmt: skip
        yield Row("33", f"{way}: command done", round(statistics.median(s.acted for s in scenes), 2), "s")
        left = round(statistics.median(s.left for s in scenes), 2)
        yield Row("33", f"{way}: last old connection ended -> nothing of before is left", left, "s")


def write(found: dict[str, list[Scene]], path: Path) -> None:
    """Each figure of each way and phase: median, least, most."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["way", "phase", "figure", "unit", "median", "least", "most", "rounds"])
        for way, scenes in found.items():
            for when in PHASES:
                for name, unit in FIGURES.items():
                    values = [getattr(s.phases[when], name) for s in scenes]
                    spread = (statistics.median(values), min(values), max(values))
                    writer.writerow([way, when, name, unit, *(round(v, 3) for v in spread), len(values)])
