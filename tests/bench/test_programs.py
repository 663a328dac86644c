"""The benchmarks' own programs, which nothing else builds."""

import subprocess
from pathlib import Path

import pytest

MESON = Path(__file__).parents[2] / "build/meson"


@pytest.mark.parametrize(
    "target",
    [
        "bench/bench_memory",
        "bench/bench_tracking",
        "bench/bench_director",
        "bench/bench_director.bpf.o",
        "bench/bench_path",
        "bench/bench_path.bpf.o",
        "bench/bench_streams",
    ],
)
def test_a_program_of_the_benchmarks_builds(target: str) -> None:
    built = subprocess.run(["ninja", "-C", str(MESON), target], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:]
