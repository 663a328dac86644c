"""Every fuzz program for FUZZ_SECONDS, all at once: 15, or 120 where CI is set. `make soak` runs each for ten minutes."""

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.c"))
SECONDS = int(os.environ.get("FUZZ_SECONDS") or (120 if os.environ.get("CI") else 15))
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
INCLUDES = [f"-I{ROOT / name}" for name in ("include", "engine/datapath", "tests/c")]
SANITIZERS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]


def compiled(source: str, program: Path, *extra: str) -> Path:
    command = ["clang", *FLAGS, *extra, *INCLUDES, str(HERE / source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def fuzzed(name: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs one program at the lowest priority: beside it run tests that wait for others."""
    program = compiled(f"fuzz_{name}.c", directory / name, *SANITIZERS)
    corpus = directory / "corpus"
    corpus.mkdir()
    if name == "nat":
        subprocess.run([compiled("seed.c", directory / "seed"), corpus], check=True)
    kept = HERE / "corpus" / name
    command = ["nice", "-n", "19", str(program), f"-max_total_time={SECONDS}", "-max_len=4096", "-print_final_stats=1"]
    command += [f"-artifact_prefix={directory}/", str(corpus), *([str(kept)] if kept.is_dir() else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    with ThreadPoolExecutor(len(NAMES)) as pool:
        yield {name: pool.submit(fuzzed, name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fuzzing_finds_nothing(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = runs[name].result()
    report = result.stderr[-3000:]
    found = [line for line in result.stderr.splitlines() if re.search(r"not true|not so|runtime error|ERROR:", line)]
    assert result.returncode == 0, "\n".join([*found[:3], report])
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", result.stderr)
    assert executed, report
    assert int(executed[1]) > 1000, "next to nothing was tried"
