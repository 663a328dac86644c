"""Datapath processes and whole engines are killed and hung under live traffic: no connection may break.

How long nobody was served is printed; `make bench` has goals for it (T2).
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab import pool as pools
from tests.lab.pool import SIZES, Pool, load

from packetstack_cli.outage import hang


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One for all tests; each brings its own traffic."""
    with pools.pool("pkl-kill") as made:
        yield made


@pytest.fixture
def two(pool: Pool) -> Pool:
    """With two engines."""
    pool.scale(2)
    return pool


MANY = pytest.mark.parametrize("many", [4, pytest.param(10, marks=pytest.mark.soak)])


def kill(pid: int) -> Callable[[], None]:
    return lambda: os.kill(pid, signal.SIGKILL)


@MANY
def test_after_a_killed_datapath_its_flows_are_served_again(two: Pool, many: int) -> None:
    took = []
    with load(two) as s:
        for i in range(2 * many):
            engines = s.engines()
            engine = engines[i % len(engines)]
            took.append(s.outage.after(engine["slot"], kill(engine["pid"])))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")
    assert s.outcome
    assert s.outcome.datagrams_lost == 0, s.dropped


@MANY
def test_after_a_killed_engine_its_flows_are_served_again(two: Pool, many: int) -> None:
    took = []
    with load(two) as s:
        for i in range(many):
            engines = s.engines()
            engine = engines[i % len(engines)]
            took.append(s.outage.after(engine["slot"], lambda e=engine: os.killpg(e["initPid"], signal.SIGKILL)))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")
    assert s.outcome
    assert s.outcome.datagrams_lost == 0, s.dropped


@MANY
def test_after_a_hang_its_flows_are_served_again(two: Pool, many: int) -> None:
    took = []
    with load(two) as s:
        for i in range(many):
            engines = s.engines()
            engine = engines[i % len(engines)]
            took.append(s.outage.after(engine["slot"], lambda e=engine: hang(e["pid"])))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")


@pytest.mark.parametrize("whole", [False, True], ids=["datapaths", "engines"])
@MANY
def test_all_engines_killed_at_once_break_nothing(two: Pool, whole: bool, many: int) -> None:
    took = []
    with load(two) as s:
        for _ in range(many):
            engines = s.engines()

            def strike(victims: list[dict[str, Any]] = engines) -> None:
                for e in victims:
                    if whole:
                        os.killpg(e["initPid"], signal.SIGKILL)
                    else:
                        os.kill(e["pid"], signal.SIGKILL)

            took.append(s.outage.after(engines[0]["slot"], strike))
            s.settle()
    print(f"served again after {sorted(round(t, 1) for t in took)} ms")


@MANY
def test_the_last_engine_killed_breaks_nothing(pool: Pool, many: int) -> None:
    pool.scale(1)
    with load(pool) as s:
        for _ in range(many):
            engine = s.engines()[0]
            s.outage.after(engine["slot"], lambda e=engine: os.killpg(e["initPid"], signal.SIGKILL))
            s.settle()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "udp_flows", "sizes"),
    [
        pytest.param(400, 200, SIZES[:7], id="small"),
        pytest.param(10_000, 2_000, SIZES, id="full", marks=pytest.mark.soak),
    ],
)
def test_kills_and_hangs_during_resizes_break_nothing(
    two: Pool, connections: int, udp_flows: int, sizes: tuple[int, ...]
) -> None:
    with load(two, connections, udp_flows) as s:
        for i, size in enumerate(sizes):
            s.client.call("scale", name="demo", replicas=size)
            time.sleep(0.05 * (i % 4))
            engine = next((e for e in s.engines() if e["pid"]), None)
            if engine is not None and i % 3 == 0:
                os.killpg(engine["initPid"], signal.SIGKILL)
            elif engine is not None:
                os.kill(engine["pid"], signal.SIGKILL if i % 3 == 1 else signal.SIGSTOP)
            time.sleep(1.5)
    assert s.outcome
    assert s.outcome.datagrams_lost <= sum(s.dropped.values()) + s.unseen, "a datagram was lost silently"


@pytest.mark.alone
def test_an_agent_killed_during_resizes_goes_on_where_it_was(two: Pool) -> None:
    with load(two) as s:
        for i, size in enumerate((4, 1, 3, 2)):
            s.client.call("scale", name="demo", replicas=size)
            time.sleep(0.03 + 0.11 * i)
            agent = int((s.lab.run_directory / "agent.pid").read_text())
            os.kill(agent, signal.SIGKILL)
            while Path(f"/proc/{agent}/fd/0").exists():
                time.sleep(0.01)
            s.lab.packetstack("upgrade", "--agent")
            s.settle()
            assert sum(e["buckets"] > 0 for e in s.engines()) == size
    assert s.outcome
    assert s.outcome.datagrams_reordered == 0
