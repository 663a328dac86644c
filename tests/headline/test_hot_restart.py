"""Running parts are replaced while packets flow at a high rate: not one may be lost, and the table stays as it is."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab import pool as pools
from tests.lab.pool import TARGETS, UDP_TARGETS

from packetstack_cli.traffic import Servers, Traffic

FLOWS = 1000


class Pool(pools.Pool):
    """One engine and its agent, parts of which are replaced."""

    def table(self) -> tuple[Any, ...]:
        status = self.status()
        return status["owners"], status["flowTableGeneration"]

    def upgrade_datapath(self) -> str:
        slot = self.status()["engines"][0]["slot"]
        return f"{self.client.call('upgrade', name='demo', slot=slot)['pauseMilliseconds']} ms"

    def kill_agent(self) -> str:
        agent = self.client.agent_pid()
        os.kill(agent, signal.SIGKILL)
        while Path(f"/proc/{agent}/fd/0").exists():
            time.sleep(0.01)
        return self.upgrade_agent()

    def upgrade_agent(self) -> str:
        began = time.monotonic()
        self.lab.packetstack("upgrade", "--agent")
        return f"{time.monotonic() - began:.2f} s"

    def kill_supervisor(self) -> str:
        directory = self.lab.run_directory / "engines" / str(self.status()["engines"][0]["slot"])
        pid = supervisor(directory)
        os.kill(pid, signal.SIGKILL)
        while supervisor(directory) in (0, pid):
            time.sleep(0.01)
        return str(pid)


def supervisor(directory: Path) -> int:
    """Process of the engine of this directory, 0 = none."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if words[1:4] == [b"-P", b"-m", b"packetstack_engine.main"] and bytes(directory) in words:
            return int(entry.name)
    return 0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One engine, which is the same in all tests."""
    with pools.pool("pkl-hot", replicas=1) as made:
        yield Pool(made.lab)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [4, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("replace", "packets_per_second"),
    [
        (Pool.upgrade_datapath, 50_000),
        (Pool.upgrade_agent, 20_000),
        (Pool.kill_agent, 20_000),
        (Pool.kill_supervisor, 20_000),
    ],
    ids=["datapath upgraded", "agent upgraded", "agent killed", "supervisor killed"],
)
def test_a_part_replaced_under_load_loses_no_packet(
    pool: Pool, replace: Callable[[Pool], str], packets_per_second: int, restarts: int
) -> None:
    """Packets through the one engine, requests and answers together."""
    servers = Servers(pool.lab)
    interval_ms = 2000 * FLOWS // packets_per_second
    traffic = Traffic(
        pool.lab, TARGETS, UDP_TARGETS, connections=200, udp_flows=FLOWS, udp_interval_ms=interval_ms, new_rate=10
    )
    try:
        traffic.wait_open()
        before, table = pool.drops(), pool.table()
        rates, said = [], []
        for _ in range(restarts):
            at = len(traffic.samples)
            said.append(replace(pool))
            while len(traffic.samples) < at + 6:  # tenths of a second
                time.sleep(0.05)
                assert traffic.running
            rates.append(2 * traffic.latest["echoes_per_second"])
        assert pool.table() == table
        outcome = traffic.stop()
        after = pool.drops(outcome)
    finally:  # the next test finds its ports free
        traffic.stop()
        counted = servers.stop()
    dropped = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    print(f"{said}\npackets/s {rates}\n{outcome}\ndropped {dropped}\nserver {counted}")
    assert max(rates) > 0.9 * packets_per_second, "the generator did not send what the test is about"
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_reordered == 0
    assert outcome.datagrams_duplicated == 0
    assert outcome.datagrams_lost == 0
