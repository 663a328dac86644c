"""Every fuzz program tries RUNS inputs, however busy the machine is; `make soak` lets each try for ten minutes."""

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.compiled import compiled

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.c"))
RUNS = 5_000
SANITIZERS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]


def fuzzed(name: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs one program at the lowest priority: beside it run tests that wait for others."""
    program = compiled("clang", HERE / f"fuzz_{name}.c", "-O1", *SANITIZERS)
    corpus = directory / "corpus"
    corpus.mkdir()
    if name == "nat":
        subprocess.run([compiled("clang", HERE / "seed.c", "-O1"), corpus], check=True)
    kept = HERE / "corpus" / name
    command = ["nice", "-n", "19", str(program), f"-runs={RUNS}", "-max_len=4096", "-print_final_stats=1"]
    command += [f"-artifact_prefix={directory}/", str(corpus), *([str(kept)] if kept.is_dir() else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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
    assert int(executed[1]) >= RUNS
