"""T17: what many stacks cost the operator, before a real API server. Nodes and agents are played, engines are not run."""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rows import Row, Unavailable, yes

if TYPE_CHECKING:
    from tests.operator.crowd import Rest

ROOT = Path(__file__).resolve().parents[1]
STACKS, ENGINES = 100, 10
WINDOW_SECONDS = 30.0
"""Half of the time in which the operator looks at each stack at rest once."""


def reconciling(quick: bool) -> Iterator[Row]:
    """At rest, and after a change of one stack of many."""
    sys.path.insert(0, str(ROOT))  # its players are those of the tests
    from tests.cluster import kubernetes_binaries
    from tests.operator.crowd import crowd

    missing = {"kube-apiserver", "kubectl"} & set(kubernetes_binaries.missing())
    if missing:
        raise Unavailable(f"{', '.join(sorted(missing))}: not there; `python -m tests.cluster binaries` makes them")
    if shutil.which("etcd") is None:
        raise Unavailable("etcd: not installed; install the package etcd-server")
    with tempfile.TemporaryDirectory() as directory, crowd(Path(directory), STACKS, ENGINES) as stacks:
        stacks.create(600)
        rest = stacks.rest(2 if quick else 5, WINDOW_SECONDS)
        taken = stacks.reactions(STACKS if quick else 2 * STACKS)
    with tempfile.TemporaryDirectory() as directory, crowd(Path(directory), STACKS, ENGINES, autoscaled=True) as stacks:
        stacks.create(600)
        time.sleep(WINDOW_SECONDS)  # the first decisions
        scaled = stacks.rest(2 if quick else 5, WINDOW_SECONDS)
    what = f"operator, {STACKS} stacks of {ENGINES} engines"
    yield from _at_rest(what, rest, cpu_goal=1.0, memory_goal=150.0)
    yield Row("T17", f"{what}, from a change to its flow table", round(taken[len(taken) // 2], 3), "s")
    p99 = taken[int(0.99 * len(taken))]
    yield Row("T17", f"{what}, the same, p99", round(p99, 3), "s", goal="<= 0.1", met=yes(p99 <= 0.1))
    yield from _at_rest(f"{what}, all autoscaled by load", scaled, cpu_goal=5.0, memory_goal=200.0)


def _at_rest(what: str, rest: "Rest", *, cpu_goal: float, memory_goal: float) -> Iterator[Row]:
    yield Row("T17", f"{what}, writes at rest", rest.writes, "requests", goal="0", met=yes(rest.writes == 0))
    cpu = round(100 * rest.cpu, 2)
    yield Row("T17", f"{what}, CPU at rest", cpu, "% of a core", goal=f"<= {cpu_goal:g}", met=yes(cpu <= cpu_goal))
    memory = round(rest.resident / 1e6, 1)
    yield Row("T17", f"{what}, memory", memory, "MB", goal=f"<= {memory_goal:g}", met=yes(memory <= memory_goal))
