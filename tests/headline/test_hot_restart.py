"""Running parts are replaced while packets flow at a high rate: not one may be lost, and the table stays as it is."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_cli.traffic import Servers, Traffic

from .test_resize import DEMO, TARGETS, UDP_TARGETS, drops

RESTARTS = 10
FLOWS = 1000


class Pool:
    """One engine and its agent."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.client = Client(lab.run_directory)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.client.call("get", name="demo")[0]["status"]
        return status

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


@pytest.mark.slow
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
def test_a_part_replaced_under_load_loses_no_packet(replace: Callable[[Pool], str], packets_per_second: int) -> None:
    """Packets through the one engine, requests and answers together."""
    with Lab("pkl-hot") as lab:
        servers = Servers(lab)
        lab.packetstack("up", str(DEMO), "--uplink", NODE_UPLINK)
        lab.packetstack("scale", "demo", "--replicas", "1")
        pool = Pool(lab)
        interval_ms = 2000 * FLOWS // packets_per_second
        traffic = Traffic(
            lab, TARGETS, UDP_TARGETS, connections=200, udp_flows=FLOWS, udp_interval_ms=interval_ms, new_rate=10
        )
        traffic.wait_open()
        before, table = drops(pool.client, lab), pool.table()
        rates, said = [], []
        for _ in range(RESTARTS):
            at = len(traffic.samples)
            said.append(replace(pool))
            while len(traffic.samples) < at + 6:  # tenths of a second
                time.sleep(0.05)
                assert traffic.running
            rates.append(2 * traffic.latest["echoes_per_second"])
        assert pool.table() == table
        outcome = traffic.stop()
        after = drops(pool.client, lab, outcome)
        counted = servers.stop()
    dropped = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    print(f"{said}\npackets/s {rates}\n{outcome}\ndropped {dropped}\nserver {counted}")
    assert max(rates) > 0.9 * packets_per_second, "the generator did not send what the test is about"
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_reordered == 0
    assert outcome.datagrams_duplicated == 0
    assert outcome.datagrams_lost == 0
