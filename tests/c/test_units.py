"""Runs the C unit programs of this directory, built from the headers that the engine is built from."""

import subprocess
from pathlib import Path

import pytest
from tests.compiled import compiled

HERE = Path(__file__).parent
STRIDES = {("crash", "address,undefined"): ["7"]}
"""Two thirds of that program's instructions are the sanitizers' own: a death at every seventh. `make sanitize` takes each."""


@pytest.mark.parametrize("name", ["shard", "nat", "crash", "files"])
@pytest.mark.parametrize("sanitizers", ["", "address,undefined"], ids=["optimised", "sanitized"])
def test_random_histories_agree_with_the_reference(name: str, sanitizers: str) -> None:
    options = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1"] if sanitizers else ["-O2"]
    program = compiled("gcc", HERE / f"test_{name}.c", *options)
    result = subprocess.run(
        [str(program), *STRIDES.get((name, sanitizers), [])], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
