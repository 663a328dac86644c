"""Engines of both sets that never come back while connections of the older one are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.lab.mirrored import VIP, Mirrored, ask, mirrored
from tests.waiting import eventually

# The agent as it is, but that it does not wait ten seconds for a process that may follow.
AGENT = """
from packetstack_agent import engine_life
from packetstack_agent.main import main
engine_life.AWAY_SECONDS = 1.0
main()
"""


@pytest.fixture
def node() -> Iterator[Mirrored]:
    with mirrored("pkm-gone") as made:
        agent = made.lab.start(
            "node", sys.executable, "-c", AGENT, "--run-dir", str(made.lab.run_directory), stderr=subprocess.DEVNULL
        )
        eventually(made.client.alive, 30)
        made.make(2, repair={"replaceAfterSeconds": 1})
        made.settle()
        yield made
        made.down()
        agent.wait(20)


def never_comes_back(node: Mirrored, slot: int) -> None:
    """The engine's process dies, and no other can reach the agent."""
    engine = next(e for e in node.engines() if e["slot"] == slot)
    (node.lab.run_directory / "engines" / str(slot) / "engine.sock").unlink()
    os.kill(engine["pid"], signal.SIGKILL)


def test_row_32_what_engines_that_never_come_back_had_goes_to_others_of_their_set(node: Mirrored) -> None:
    kept = [node.connect(VIP, 80) for _ in range(40)]
    old, new = node.switch(3)
    owned = [node.connect(VIP, 80) for _ in range(40)]
    for connection in (*kept, *owned):
        ask(connection)

    gone = min(new)
    never_comes_back(node, gone)
    for connection in kept:
        ask(connection)  # those of the buckets that it owned, too
    eventually(lambda: gone not in node.slots(), 20, "the engine of the newer set removed")
    assert str(gone) not in node.status("demo")["owners"]
    young = [node.connect(VIP, 80) for _ in range(40)]
    for connection in (*kept, *owned, *young):
        ask(connection)
    assert node.live(old) >= len(kept)

    gone = min(old)
    never_comes_back(node, gone)
    eventually(lambda: gone not in node.slots(), 20, "the engine of the older set removed")
    for connection in (*kept, *owned, *young):
        ask(connection)
    for connection in kept:
        connection.close()
    node.retired(1)
    node.settle()
    for connection in (*owned, *young):
        ask(connection)
        connection.close()
