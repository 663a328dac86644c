"""T9, T11: how even one step makes skewed load, computed; and what that does for latency, on real packets."""

import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rows import Row, Unavailable, yes

if TYPE_CHECKING:
    from tests.lab.costly import Costly

    from packetstack_cli.traffic import Traffic

ROOT = Path(__file__).resolve().parents[1]
BUCKETS, GOALS = 512, {2: 1.012, 4: 1.023, 8: 1.035}
SLACK = 0.005
MANY_BUCKETS, MANY_ENGINES = 8192, 1000
COST_NS = 500_000
"""Of a packet. Two cores handle 4,000 a second, and each datagram passes them twice."""
RATE = 1_800
"""Datagrams a second: 90 % of that."""
FLOWS = 200
WARM_UP_SECONDS, SECONDS = 25.0, 40.0
TYPICAL = 1.12, 1.18
"""How uneven cores are by the time that they are busy, where one has 1.13 to 1.23 times the mean to do: it has no more
time than all. Half of all draws of such flows are above 1.17, and a third below 1.11, where static cores do as well."""


def steps(quick: bool) -> Iterator[Row]:
    """T9: one step over even counts in random order, zipf 1.0. Computed.

    The busiest core is compared with what it must have at least: the mean of all, or the biggest bucket where that is
    more. With 8 cores it is: one of 512 buckets has 14.7 % of the load, a core's mean is 12.5 %.
    """
    from packetstack_core.assignment import Owner
    from packetstack_core.rebalancing import BUCKETS as USUAL
    from packetstack_core.rebalancing import decide

    always = dataclasses.replace(USUAL, busy=0.0, excess=1.0)  # what a step can do, needed or not
    weights = [1 / (i + 1) for i in range(BUCKETS)]
    for cores, goal in GOALS.items():
        before, after, plain, moves, took = [], [], [], [], []
        for seed in range(50 if quick else 500):
            loads = [0.6 * cores * w / sum(weights) for w in weights]
            random.Random(seed).shuffle(loads)
            owners = [Owner(b * cores // BUCKETS + 1, 0) for b in range(BUCKETS)]
            places = {slot + 1: (0,) for slot in range(cores)}
            begun = time.perf_counter()
            decision = decide(loads, owners, places, 0.0, limits=always)
            took.append(time.perf_counter() - begun)
            before.append(decision.before / decision.possible)
            after.append(decision.after / decision.possible)
            plain.append(decision.after)
            moves.append(len(decision.moves))
        what = f"one step, zipf 1.0, {BUCKETS} buckets, {cores} cores (computed)"
        ends, begins = round(statistics.median(after), 4), round(statistics.median(before), 3)
        most = goal + SLACK
        yield Row("T9", f"{what}, busiest core by max(mean, biggest bucket)", ends, "", "before the step", begins,
                  round(ends / begins, 3), f"<= {most:.3f}", yes(ends <= most))  # fmt: skip
        yield Row("T9", f"{what}, the same, worst of {len(after)} starts", round(max(after), 4), "")
        yield Row("T9", f"{what}, busiest core by the mean", round(statistics.median(plain), 4), "")
        share = 100 * max(moves) / BUCKETS
        yield Row("T9", f"{what}, most buckets moved", round(share, 1), "%", goal="<= 10", met=yes(share <= 10))
        spent = statistics.median(took) * 1e3
        yield Row("T9", f"{what}, plan", round(spent, 3), "ms", goal="<= 1", met=yes(spent <= 1))
    loads = [2000 / (i + 1) for i in range(MANY_BUCKETS)]
    random.Random(1).shuffle(loads)
    owners = [Owner(b % MANY_ENGINES + 1, b // MANY_ENGINES % 4) for b in range(MANY_BUCKETS)]
    places = {slot + 1: (0, 1, 0, 1) for slot in range(MANY_ENGINES)}
    took = []
    for _ in range(3 if quick else 9):
        begun = time.perf_counter()
        decide(loads, owners, places, 0.0)
        took.append(time.perf_counter() - begun)
    spent = statistics.median(took) * 1e3
    what = f"one step, zipf 1.0, {MANY_BUCKETS} buckets, {MANY_ENGINES} engines (computed), plan"
    yield Row("T9", what, round(spent, 1), "ms", goal="<= 50", met=yes(spent <= 50))


def latencies(quick: bool) -> Iterator[Row]:
    """T11: latency at 90 % load of two cores, with buckets as hashing leaves them and as the rebalancer moves them."""
    sys.path.insert(0, str(ROOT))  # the engines are those of the tests
    from tests.lab.costly import DATAPATH, costly

    if not DATAPATH.exists():
        raise Unavailable(f"{DATAPATH}: not built; run make build")
    p50: dict[str, list[float]] = {"Off": [], "Auto": []}
    p95: dict[str, list[float]] = {"Off": [], "Auto": []}
    uneven: dict[str, list[float]] = {"Off": [], "Auto": []}
    lost: dict[str, int] = {"Off": 0, "Auto": 0}
    sent = reordered = 0
    with costly("pkb-skew", COST_NS) as stack:
        for _ in range(3 if quick else 5):
            for mode in p95:
                traffic, began = _typical(stack)
                stack.up(mode)
                time.sleep(max(0.0, began + WARM_UP_SECONDS - time.monotonic()))
                uneven[mode].append(stack.unevenness(SECONDS - WARM_UP_SECONDS))
                outcome = traffic.stop()
                found = outcome.report["datagrams"]["latency_ms"]
                p50[mode].append(found["p50"])
                p95[mode].append(found["p95"])
                lost[mode] += outcome.datagrams_lost
                if mode == "Auto":
                    sent, reordered = sent + outcome.datagrams_sent, reordered + outcome.datagrams_reordered
                stack.up("Off")
    runs = len(p95["Auto"])
    what = f"{FLOWS} flows, zipf 1.0, unevenly on two cores at 90 %"
    ms = {mode: statistics.median(values) for mode, values in p95.items()}
    ratio = ms["Auto"] / ms["Off"]
    yield Row("T11", f"{what}, p95 latency, rebalanced, median of {runs}", round(ms["Auto"], 1), "ms", "static",
              round(ms["Off"], 1), round(ratio, 3), "<= 0.25 of it", yes(ratio <= 0.25))  # fmt: skip
    half = {mode: statistics.median(values) for mode, values in p50.items()}
    yield Row("T11", f"{what}, median latency, rebalanced", round(half["Auto"], 1), "ms", "static",
              round(half["Off"], 1), round(half["Auto"] / half["Off"], 3))  # fmt: skip
    cores = {mode: statistics.median(values) for mode, values in uneven.items()}
    yield Row("T11", f"{what}, busiest core by the mean, rebalanced", round(cores["Auto"], 3), "", "static",
              round(cores["Off"], 3), round(cores["Auto"] / cores["Off"], 3))  # fmt: skip
    yield Row("T11", f"{what}, datagrams lost of {sent}, rebalanced", lost["Auto"], "", "static", lost["Off"])
    yield Row("T11", f"{what}, datagrams reordered, rebalanced", reordered, "", goal="0", met=yes(reordered == 0))


def _typical(stack: "Costly") -> tuple["Traffic", float]:
    """Traffic under way whose flows load the cores as unevenly as most, and when it began. The mode must be Off."""
    from tests.lab.costly import UDP

    from packetstack_cli.traffic import Traffic

    for _ in range(60):
        began = time.monotonic()
        traffic = Traffic(
            stack.lab, [], [UDP], connections=0, udp_flows=FLOWS, udp_rate=RATE, udp_skew=1.0,
            warm_up_seconds=WARM_UP_SECONDS,
        )  # fmt: skip
        time.sleep(1)
        if TYPICAL[0] <= stack.unevenness(2) <= TYPICAL[1]:
            return traffic, began
        traffic.stop()
    raise Unavailable("60 draws of flows loaded the cores evenly, or all too unevenly")
