"""C programs of the tests: compiled when their sources or options have changed, and kept in build/tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build/tests"
INCLUDED = tuple(ROOT / name for name in ("include", "engine/datapath", "agent/native", "tests/c"))
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")


def compiled(compiler: str, source: Path, *options: str) -> Path:
    """The program. Raises CalledProcessError when it cannot be compiled."""
    command = [compiler, *FLAGS, *options, *(f"-I{directory}" for directory in INCLUDED), str(source)]
    made_of = hashlib.sha256(repr((command, _included())).encode() + source.read_bytes()).hexdigest()
    program = KEPT / f"{source.stem}-{made_of[:16]}"
    if not program.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        begun = program.with_name(f"{program.name}.{os.getpid()}")  # whole, whoever else compiles it or is killed
        subprocess.run([*command, "-o", str(begun)], check=True)
        begun.rename(program)
    return program


@cache
def _included() -> dict[str, str]:
    """Checksum of every file that a program could include."""
    files = (file for directory in INCLUDED for file in sorted(directory.rglob("*.[ch]")))
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
