"""A run directory that is full, or cannot be written, while packets flow: the agent goes on, and so does the next one."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.lab.disk import fill, remount
from tests.lab.node import Node, ask, stack
from tests.waiting import eventually


@pytest.fixture(params=["bytes", "files"])
def full(node: Node, disk: Path, request: pytest.FixtureRequest) -> Callable[[], object]:
    """A running stack on a disk where not one more byte or file fits; gives what makes room again."""
    node.up(stack())
    if request.param == "bytes":
        return fill(disk).unlink
    for _ in range(50):
        has = os.statvfs(disk)
        try:
            remount(disk, f"nr_inodes={has.f_files - has.f_ffree}")
            break
        except subprocess.CalledProcessError:  # one more file has come meanwhile
            time.sleep(0.02)
    return partial(remount, disk, "nr_inodes=100000")


def kill_agent(node: Node) -> None:
    agent = node.client.agent_pid()
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{agent}/fd/0").exists())


def test_many_events_on_a_full_disk_do_not_stop_the_agent(node: Node, full: Callable[[], object]) -> None:
    with node.connect() as connection:
        first = ask(connection)
        for n in range(40):  # more lines than the last page of the log has room for
            node.client.call(
                "move_buckets", name="web", buckets=[n], slot=node.status()["engines"][n % 2]["slot"], queue=0
            )
            node.client.call("move_queue", name="web", slot=node.status()["engines"][0]["slot"], queue=0, core=n % 2)
        eventually(lambda: "RecordNotWritten" in node.reasons())
        time.sleep(2.5)  # it is tried every second
        told = [e["count"] for e in node.client.call("events") if e["reason"] == "RecordNotWritten"]
        assert told == [1]
        full()
        eventually(lambda: "RecordWritten" in node.reasons())
        node.wait_ready()
        assert ask(connection) == first


def test_an_agent_that_dies_on_a_full_disk_is_followed(node: Node, full: Callable[[], object]) -> None:
    with node.connect() as connection:
        first = ask(connection)
        kill_agent(node)
        node.packetstack("upgrade", "--agent")
        node.wait_ready()
        victim = node.status()["engines"][0]["pid"]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: node.status()["engines"][0]["pid"] not in (0, victim))
        assert ask(connection) == first
        full()
        node.client.call("scale", name="web", replicas=3)
        eventually(lambda: node.status()["readyReplicas"] == 3)
        assert ask(connection) == first
