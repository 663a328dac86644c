"""Measures what docs and README claim, each figure beside its peer in the same run.

Writes build/bench/results.csv and build/bench/results.png. `--quick` makes fewer repetitions, for CI: the same rows,
less steady. Figures are medians unless the name says otherwise. A benchmark that cannot run here says why and gives
no row; nothing is estimated.
"""

import argparse
import csv
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, fields
from pathlib import Path

import day
import director
import floods
import handovers
import path
import rebalancing
import reconciling
import resting
import streams
import transitions
from rows import Row, Unavailable, yes

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
MESON = ROOT / "build" / "meson"


def build(target: str) -> Path:
    """Builds one program of the meson build directory. -> its path"""
    subprocess.run(["ninja", "--quiet", "-C", str(MESON), target], check=True)
    return MESON / target


def repeated(program: Path, times: int) -> dict[str, float]:
    """Runs a program with the path of an arena that it may make. -> medians of the figures that it prints, by name"""
    place = Path("/dev/shm/packetstack-bench-arena")
    place.unlink(missing_ok=True)
    found: dict[str, list[float]] = {}
    try:
        for _ in range(times):
            lines = subprocess.run([str(program), str(place)], check=True, capture_output=True, text=True).stdout
            for line in lines.splitlines():
                name, value = line.split()
                found.setdefault(name, []).append(float(value))
    finally:
        place.unlink(missing_ok=True)
    return {name: statistics.median(values) for name, values in found.items()}


def tracking(quick: bool) -> Iterator[Row]:
    """T20: what following sequence numbers costs a packet of an established flow, beside looking at flags alone."""
    figure = repeated(build("bench/bench_tracking"), 3 if quick else 9)
    yield Row(
        "T20", "engine, packet of an established TCP flow, in one process", figure["tracked_cycles"], "cycles",
        "flags alone", figure["plain_cycles"], figure["ratio"], "<= 1.05", yes(figure["ratio"] <= 1.05),
    )  # fmt: skip


def memory(quick: bool) -> Iterator[Row]:
    """T7: bytes of an arena per live flow at 1M flows, beside the kernel's connection tracking entry."""
    figure = repeated(build("bench/bench_memory"), 1 if quick else 5)
    conntrack = slab_bytes("nf_conntrack")
    value = figure["bytes_per_flow"]
    yield Row("T7", "director, memory per flow", 0, "B", goal="0", met="yes")
    yield Row(
        "T7",
        "engine, memory per flow at 1M flows",
        round(value, 1),
        "B",
        "nf_conntrack entry" if conntrack else "",
        conntrack or "",
        round(value / conntrack, 2) if conntrack else "",
        "<= 96",
        yes(value <= 96 and figure["refused"] == 0),
    )
    yield Row("T7", "engine, open a flow (1M flows)", round(figure["open_ns"], 1), "ns")
    yield Row("T7", "engine, find a flow (1M flows)", round(figure["lookup_ns"], 1), "ns")


def slab_bytes(name: str) -> int:
    """Size of a kernel object, or 0 where it cannot be read."""
    try:
        lines = Path("/proc/slabinfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[3]) for line in lines if line.split()[:1] == [name]), 0)


def planning(quick: bool) -> Iterator[Row]:
    """T8: how many buckets move when engines join and leave, beside a plain modulo table. Computed."""
    from packetstack_core.assignment import EngineShare, assign, moved

    buckets = 4096
    rounds = 40 if quick else 400
    chooser = random.Random(1)
    excess = worst = 0.0
    owners = moved([None] * buckets, assign([None] * buckets, [EngineShare(1, 2)]))
    slots = [1]
    times = []
    total = modulo = 0
    for _ in range(rounds):
        before = list(slots)
        if len(slots) == 1 or (len(slots) < 16 and chooser.random() < 0.5):
            slots.append(max(slots) + 1)
        else:
            slots.remove(chooser.choice(slots))
        engines = [EngineShare(slot, 2) for slot in slots]
        begun = time.perf_counter()
        plan = assign(owners, engines)
        times.append(time.perf_counter() - begun)
        counts = {slot: sum(owner is not None and owner.slot == slot for owner in owners) for slot in slots}
        # No plan can do with fewer: every slot's surplus over its share, rounded up as far as it goes, must leave.
        share, over = divmod(buckets, len(slots))
        by_surplus = sorted(counts.values(), reverse=True)
        least = sum(max(0, n - share - (i < over)) for i, n in enumerate(by_surplus))
        orphans = sum(owner is None or owner.slot not in counts for owner in owners)
        between = [m for m in plan if (owner := owners[m.bucket]) is None or owner.slot != m.to.slot]
        excess = max(excess, len(between) - least - orphans)
        total += len(between)
        modulo += sum(before[b % len(before)] != slots[b % len(slots)] for b in range(buckets))
        owners = moved(owners, plan)
        loads = [sum(owner is not None and owner.slot == slot for owner in owners) for slot in slots]
        worst = max(worst, max(loads) / (buckets / len(slots)))
    name = f"buckets moved over {rounds} joins and leaves"
    yield Row("T8", name, total, "buckets", "modulo table", modulo, round(total / modulo, 3))
    yield Row("T8", "moves beyond the minimum (computed)", excess, "buckets", goal="0", met=yes(excess == 0))
    yield Row("T8", "max/mean load (computed)", round(worst, 4), "", goal="<= 1.01", met=yes(worst <= 1.01))
    yield Row("T8", "plan, 4096 buckets, up to 16 engines", round(statistics.median(times) * 1e3, 3), "ms")


def director_cost(quick: bool) -> Iterator[Row]:
    """T3, T4, T5a: the director alone, beside programs that do less."""
    objects = (build("agent/director.bpf.o"), build("bench/bench_director.bpf.o"))
    yield from director.director(build("bench/bench_director"), objects, quick)


BENCHMARKS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "memory": memory,
    "tracking": tracking,
    "planning": planning,
    "director": director_cost,
    "path": path.path,
    "connections": path.connections,
    "streams": streams.streams,
    "resizes": handovers.resizes,
    "kills": handovers.kills,
    "all_killed": handovers.all_killed,
    "moves": handovers.moves,
    "joining": handovers.joining,
    "transitions": transitions.transitions,
    "costs": transitions.costs,
    "steps": rebalancing.steps,
    "skew": rebalancing.latencies,
    "floods": floods.floods,
    "reconciling": reconciling.reconciling,
    "resting": resting.resting,
    "day": day.day,
}


def plot(rows: list[Row], path: Path) -> None:
    """One bar per figure that has a peer: the ratio to it, on a common axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with_peer = [row for row in rows if isinstance(row.ratio, float)]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.5 * max(1, len(with_peer))), layout="constrained")
    for at, row in enumerate(reversed(with_peer)):
        colour = {"yes": "#2a7f4f", "no": "#b03a2e"}.get(row.met, "#3b6ea5")
        axes.barh(at, float(row.ratio), color=colour, height=0.55)
        axes.text(float(row.ratio), at, f"  {row.value} {row.unit}, peer {row.peer_value}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(with_peer)), [f"{r.target}  {r.name}\nbeside {r.peer}" for r in reversed(with_peer)])
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.35)
    axes.set_xlabel("ratio to the peer in the same run")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("only", nargs="*", choices=[[], *BENCHMARKS], help="run just these (default: all)")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name, benchmark in BENCHMARKS.items():
        if arguments.only and name not in arguments.only:
            continue
        try:
            for row in benchmark(arguments.quick):
                rows.append(row)
                beside = f"   {row.peer}: {row.peer_value} (x {row.ratio})" if row.peer else ""
                goal = f"   goal {row.goal}: {row.met}" if row.goal else ""
                print(f"{row.target:<4} {row.name}: {row.value} {row.unit}{beside}{goal}", flush=True)
        except Unavailable as reason:
            print(f"{name}: not measured: {reason}", file=sys.stderr)
    with (BUILD / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(astuple(row) for row in rows)
    plot(rows, BUILD / "results.png")
    missed = [row for row in rows if row.met == "no"]
    print(f"{len(rows)} figures, {len(missed)} goals missed; {BUILD.relative_to(ROOT)}/results.csv, results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
