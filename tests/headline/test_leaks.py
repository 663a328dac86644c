"""Many kills under load leave nothing behind. PACKETSTACK_KILLS sets how many in the long test."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.lab.pool import Load, load, pool

from packetstack_agent.node import RunDirectory

KILLS = int(os.environ.get("PACKETSTACK_KILLS", "60"))
FEW_KILLS, WARM_UP = 15, 6


def traces(s: Load) -> dict[str, Any]:
    """All that a kill could leave."""
    run = s.lab.run_directory
    agent = int((run / "agent.pid").read_text())
    mark = RunDirectory(run).namespace("x", 0).removesuffix("x-0")
    processes = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                processes += f"{run}/engines".encode() in (entry / "cmdline").read_bytes()
            except OSError:
                continue
    datapath = s.engines()[0]["pid"]
    return {
        "processes": processes,
        "descriptors of the agent": len(list(Path(f"/proc/{agent}/fd").iterdir())),
        "threads of the datapath": len(list(Path(f"/proc/{datapath}/task").iterdir())),
        "descriptors of the datapath": len(list(Path(f"/proc/{datapath}/fd").iterdir())),
        "namespaces": sorted(p.name for p in Path("/run/netns").iterdir() if p.name.startswith(mark)),
        "pins": sorted(p.name for p in (run / "bpf").iterdir()),
        "files": sorted(str(p.relative_to(run)) for p in run.rglob("*") if "bpf" not in p.parts),
        "links": s.lab.run("node", "ip", "-br", "link").stdout.count("\n"),
    }


def resident_kib(pid: int) -> int:
    """Memory of the process itself, without what it shares."""
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("RssAnon"))
    return int(line.split()[1])


def at_rest(s: Load) -> dict[str, Any]:
    """What there is while the agent answers nobody and probes no backend."""
    looks = []
    for _ in range(30):
        looks.append(traces(s))
        time.sleep(0.05)
    return min(looks, key=lambda found: found["descriptors of the agent"])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [FEW_KILLS, pytest.param(KILLS, marks=pytest.mark.soak)])
def test_kills_of_datapaths_under_load_leave_nothing(kills: int) -> None:
    with pool("pkl-leak", replicas=2) as made, load(made) as s:
        agent = int((s.lab.run_directory / "agent.pid").read_text())

        def kill(number: int) -> None:
            engines = s.engines()
            engine = engines[number % len(engines)]
            os.kill(engine["pid"], signal.SIGKILL)
            deadline = time.monotonic() + 10
            while not all(e["pid"] not in (0, engine["pid"]) for e in s.engines()):
                assert time.monotonic() < deadline, s.engines()
                time.sleep(0.005)

        for i in range(WARM_UP):
            kill(i)
        before, memory = at_rest(s), resident_kib(agent)
        began = time.monotonic()
        for i in range(kills):
            kill(i)
        took = time.monotonic() - began
        s.settle()
        deadline = time.monotonic() + 5
        while (after := traces(s)) != before and time.monotonic() < deadline:
            time.sleep(0.1)  # somebody is being answered
        grown = resident_kib(agent) - memory
        print(f"{kills} kills in {took:.1f} s; the agent's memory grew by {grown} KiB")
    assert s.frames == {"missing": 0, "twice": 0, "bad": 0}
    assert after == before
    assert grown < 4096 + 2 * kills
