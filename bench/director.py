"""The director's cost per packet and its pipeline, from the program bench/director.c."""

import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

from rows import Row, Unavailable, yes


def director(program: Path, objects: tuple[Path, Path], quick: bool) -> Iterator[Row]:
    """T3, T4, T5a: run time in the kernel less that of an empty program; packets/s beside an XDP_TX MAC swap."""
    rounds, packets = (5, 400_000) if quick else (11, 2_000_000)
    command = [str(program), *map(str, objects), str(rounds), str(packets)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Unavailable(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no permission")
    found: dict[str, list[float]] = {}
    for line in result.stdout.splitlines():
        name, value = line.split()
        found.setdefault(name, []).append(float(value))
    # A ratio is taken inside each round: what disturbs one half of a round disturbs the other as well.
    ratios = {
        (name, size): statistics.median(map(float.__truediv__, found[f"{name}_{size}"], found[f"{peer}_{size}"]))
        for name, peer in (
            ("handover", "director"),
            ("uplink", "director"),
            ("mirror", "director"),
            ("doubled", "pipeline"),
            ("pipeline", "swap"),
            ("director", "table"),
        )
        for size in ("1k", "1M")
    }
    figure = {name: statistics.median(values) for name, values in found.items()}
    for size, limit in (("1k", 75), ("1M", 120)):
        value, bare = figure[f"director_{size}"], figure[f"table_{size}"]
        yield Row(
            "T3",
            f"director, net of an empty program, {size} flows",
            round(value, 1),
            "ns/packet",
            "bare bucket table",
            round(bare, 1),
            round(ratios["director", size], 2),
            f"<= {limit}",
            yes(value <= limit),
        )
        ahead = figure[f"uplink_{size}"]
        yield Row(
            "T3",
            f"the same on an uplink, {size} flows",
            round(ahead, 1),
            "ns/packet",
            "routed pair",
            round(value, 1),
            round(ratios["uplink", size], 2),
            f"<= {limit}",
            yes(ahead <= limit),
        )
    flat = figure["director_1M"] / figure["director_1k"]
    yield Row("T3", "director, 1M / 1k flows", round(flat, 2), "x", goal="<= 1.8", met=yes(flat <= 1.8))
    for size in ("1k", "1M"):
        ratio = ratios["handover", size]
        yield Row(
            "T4",
            f"director, every word rewritten each ms, {size} flows",
            round(figure[f"handover_{size}"], 1),
            "ns/packet",
            "steady",
            round(figure[f"director_{size}"], 1),
            round(ratio, 2),
            "<= 1.3x",
            yes(ratio <= 1.3),
        )
    for size in ("1k", "1M"):
        yield Row(
            "T4",
            f"director, every bucket mirrored, {size} flows",
            round(figure[f"mirror_{size}"], 1),
            "ns/packet",
            "steady",
            round(figure[f"director_{size}"], 1),
            round(ratios["mirror", size], 2),
            "<= 1.6x",
            yes(ratios["mirror", size] <= 1.6),
        )
        yield Row(
            "T4",
            f"pipeline on one core, every packet to two engines, {size} flows",
            round(figure[f"doubled_{size}"]),
            "kpps",
            "to one",
            round(figure[f"pipeline_{size}"]),
            round(ratios["doubled", size], 2),
            ">= 0.6x",
            yes(ratios["doubled", size] >= 0.6),
        )
    for size, least in (("1k", 0.85), ("1M", 0.80)):
        ratio = ratios["pipeline", size]
        yield Row(
            "T5a",
            f"director's pipeline on one core, {size} flows",
            round(figure[f"pipeline_{size}"]),
            "kpps",
            "XDP_TX MAC swap",
            round(figure[f"swap_{size}"]),
            round(ratio, 2),
            f">= {least}x",
            yes(ratio >= least),
        )
