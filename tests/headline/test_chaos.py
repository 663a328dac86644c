"""Kills, hangs, restarts and resizes at random under live traffic: nothing may break.

PACKETSTACK_CHAOS_SECONDS sets the length, PACKETSTACK_CHAOS_SEED replays a run's choices.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.lab.pool import Load, load, pool

from packetstack_cli.errors import CliError, NoAgent
from packetstack_cli.lab import LabError

SECONDS = float(os.environ.get("PACKETSTACK_CHAOS_SECONDS", "120"))
SEED = int(os.environ.get("PACKETSTACK_CHAOS_SEED", random.randrange(1 << 32)))
CONNECTIONS, UDP_FLOWS = 2000, 200
SHORT_SECONDS, SHORT_SEED = 10.0, 20
"""Of each run of the suite: the same faults each time, of all kinds but a few."""


class Chaos:
    """Faults by name; each looks at the pool as it is."""

    def __init__(self, scene: Load, seed: int) -> None:
        self.scene = scene
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._agent_file = scene.lab.run_directory / "agent.pid"

    def one(self) -> None:
        """One fault, or one change of size."""
        kinds: dict[Callable[[], bool], int] = {
            self.kill_datapath: 5,
            self.kill_two_datapaths: 2,
            self.kill_engine: 3,
            self.kill_init: 1,
            self.kill_supervisor: 2,
            self.hang_datapath: 2,
            self.kill_agent: 2,
            self.upgrade_engine: 3,
            self.restart_agent: 1,
            self.delete_interface: 1,
            self.resize: 5,
        }
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        with suppress(ProcessLookupError):  # it has just ended by itself, or by an earlier fault
            if kind():
                self.done[kind.__name__] += 1

    def _engine(self) -> dict[str, Any]:
        return self.random.choice([e for e in self.scene.engines() if e["pid"]])

    def kill_datapath(self) -> bool:
        os.kill(self._engine()["pid"], signal.SIGKILL)
        return True

    def kill_two_datapaths(self) -> bool:
        engines = [e for e in self.scene.engines() if e["pid"]]
        for engine in self.random.sample(engines, min(2, len(engines))):
            os.kill(engine["pid"], signal.SIGKILL)
        return len(engines) > 1

    def kill_engine(self) -> bool:
        os.killpg(self._engine()["initPid"], signal.SIGKILL)
        return True

    def kill_init(self) -> bool:
        os.kill(self._engine()["initPid"], signal.SIGKILL)
        return True

    def kill_supervisor(self) -> bool:
        mark = f"{self.scene.lab.run_directory}/engines/{self._engine()['slot']}".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if b"packetstack_engine.main" in words and mark in words and b"--supervisor" not in words:
                    os.kill(int(entry.name), signal.SIGKILL)
                    return True
        return False

    def hang_datapath(self) -> bool:
        os.kill(self._engine()["pid"], signal.SIGSTOP)
        return True

    def kill_agent(self) -> bool:
        agent = int(self._agent_file.read_text())
        os.kill(agent, signal.SIGKILL)
        while Path(f"/proc/{agent}/fd/0").exists():
            time.sleep(0.01)
        time.sleep(self.random.random() / 2)
        self.scene.lab.packetstack("upgrade", "--agent")
        return True

    def restart_agent(self) -> bool:
        self.scene.lab.packetstack("upgrade", "--agent")
        return True

    def upgrade_engine(self) -> bool:
        try:
            self.scene.lab.packetstack("upgrade", self._engine()["name"])
        except LabError:  # it is just being killed, removed or made again
            return False
        return True

    def delete_interface(self) -> bool:
        self.scene.lab.run("node", "ip", "link", "del", f"pe{self._engine()['slot']}", check=False)
        return True

    def resize(self) -> bool:
        self.scene.client.call("scale", name="demo", replicas=self.random.randint(1, 4))
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "seed", "connections"),
    [
        pytest.param(SHORT_SECONDS, SHORT_SEED, 400, id="short"),
        pytest.param(SECONDS, SEED, CONNECTIONS, id="long", marks=pytest.mark.soak),
    ],
)
def test_random_kills_hangs_restarts_and_resizes_break_nothing(seconds: float, seed: int, connections: int) -> None:
    print(f"PACKETSTACK_CHAOS_SEED={seed} PACKETSTACK_CHAOS_SECONDS={seconds:g}")
    with pool("pkl-chaos") as made, load(made, connections, UDP_FLOWS) as s:
        chaos = Chaos(s, seed)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(chaos.random.expovariate(1.0))
            try:
                chaos.one()
            except (IndexError, NoAgent):
                continue  # no engine has a datapath at this moment
            except CliError as e:
                print(e)
        s.client.call("scale", name="demo", replicas=3)
        s.settle()
    print(dict(chaos.done))
    assert s.outcome
    lost = s.outcome.datagrams_lost
    # What stood in the rings of an interface when it was deleted is gone with it, and with it its counters.
    if not chaos.done["delete_interface"]:
        assert lost <= sum(s.dropped.values()) + s.unseen, "a datagram was lost silently"
