"""A run directory on a file system of its own, which can be filled or made read-only."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.lab.node import Node

LARGE_MIB = 64


@contextmanager
def own_disk(node: Node) -> Iterator[Path]:
    """The node's run directory, a tmpfs of `LARGE_MIB`; its stacks are ended before and after."""
    run = node.lab.run_directory
    node.command("down", "--all", "--yes")
    run.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE_MIB}m", "packetstack-test", run], check=True)
    try:
        yield run
    finally:
        remount(run, "rw")
        node.command("down", "--all", "--yes")
        subprocess.run(["umount", "-l", run], check=True)
        run.rmdir()


def remount(run: Path, options: str) -> None:
    """With other options of tmpfs."""
    subprocess.run(["mount", "-o", f"remount,{options}", run], check=True)


def fill(run: Path) -> Path:
    """Until no byte fits any more; the file that did it."""
    filler = run / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    return filler
