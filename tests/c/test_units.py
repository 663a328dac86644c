"""Runs the C unit programs of this directory, built from the headers that the engine is built from."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
INCLUDES = [f"-I{ROOT / name}" for name in ("include", "engine/datapath", "agent/native", "tests/c")]


@pytest.mark.parametrize("name", ["shard", "nat", "crash", "files"])
@pytest.mark.parametrize("sanitizers", ["", "address,undefined"], ids=["optimised", "sanitized"])
def test_random_histories_agree_with_the_reference(name: str, sanitizers: str, tmp_path: Path) -> None:
    program = tmp_path / name
    extra = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1"] if sanitizers else ["-O2"]
    source = ROOT / f"tests/c/test_{name}.c"
    subprocess.run(["gcc", *FLAGS, *extra, *INCLUDES, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
