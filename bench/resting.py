"""T13: what a pool costs that nobody uses: CPU time of its engines and of its agent."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from handovers import settled
from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab
from rows import Row, yes

EXAMPLE = Path(__file__).parents[1] / "examples/demo.yaml"
CALM_SECONDS = 5.0
"""From the last change until it is measured."""


def resting(quick: bool) -> Iterator[Row]:
    """One stack of two engines without a packet."""
    seconds, rounds = (10.0, 1) if quick else (20.0, 5)
    with Lab("pkb-rest") as lab:
        lab.packetstack("up", str(EXAMPLE), "--uplink", NODE_UPLINK)
        client = Client(lab.run_directory)
        settled(client)
        engines = [int(e["pid"]) for e in client.get("demo")[0]["status"]["engines"]]
        agent = int((lab.run_directory / "agent.pid").read_text())
        time.sleep(CALM_SECONDS)
        shares: dict[int, list[float]] = {pid: [] for pid in (agent, *engines)}
        for _ in range(rounds):
            began = {pid: worked(pid) for pid in shares}
            time.sleep(seconds)
            for pid, seen in shares.items():
                seen.append(100 * (worked(pid) - began[pid]) / seconds)
    for what, pids, goal in (("agent of one stack", [agent], 0.5), ("engine of 2 cores", engines, 0.2)):
        found = sorted(share for pid in pids for share in shares[pid])
        value = round(statistics.median(found), 2)
        name = f"{what}, at rest, {found[0]:.2f} to {found[-1]:.2f}"
        yield Row("T13", name, value, "% of a core", goal=f"<= {goal}", met=yes(value <= goal))


def worked(pid: int) -> float:
    """Seconds of CPU time that the threads of a process have had."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
