"""What the node does to an agent: no disk, no core, commands that are killed."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab.disk import fill, remount
from tests.lab.node import Node, ask, stack
from tests.waiting import eventually

from packetstack_agent import devices
from packetstack_agent.errors import AgentError

SMALL_MIB = 3


def condition(node: Node, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in node.status()["conditions"] if c["type"] == kind)
    return found


def test_up_on_a_disk_that_is_too_small_says_which_file_and_leaves_nothing(node: Node, disk: Path) -> None:
    remount(disk, f"size={SMALL_MIB}m")
    before = node.traces()
    file = node.lab.directory / "stack.yaml"
    file.write_text(json.dumps(stack()))  # the configuration does not fit
    said = node.refused("up", str(file))
    assert said.startswith(f"{disk}/stacks/web/sets/1/config: cannot take ")
    assert said.endswith("MiB for it: No space left on device")
    assert node.traces() == before


def test_a_full_disk_stops_changes_and_no_packets(node: Node, disk: Path) -> None:
    node.up(stack())
    with node.connect() as connection:
        first = ask(connection)
        filler = fill(disk)
        node.client.call("scale", name="web", replicas=3)
        eventually(lambda: condition(node, "CapacityAvailable")["status"] == "False")
        eventually(lambda: "RecordNotWritten" in node.reasons())
        assert len(node.status()["engines"]) == 2
        victim = node.status()["engines"][0]["pid"]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: node.status()["engines"][0]["pid"] not in (0, victim))
        assert ask(connection) == first
        filler.unlink()
        eventually(lambda: "RecordWritten" in node.reasons())
        node.wait_ready(timeout_seconds=20)
        assert node.status()["readyReplicas"] == 3
        assert ask(connection) == first


def test_a_run_directory_that_cannot_be_written_is_refused(node: Node, disk: Path) -> None:
    file = node.lab.directory / "stack.yaml"
    file.write_text(json.dumps(stack()))
    remount(disk, "ro")
    before = node.traces()
    for words in (("up", str(file)), ("down", "--all")):
        said = node.refused(*words)
        assert str(disk) in said
        assert "Read-only file system" in said
    assert node.traces() == before


def test_without_a_free_core_the_stack_stays_at_its_size(node: Node) -> None:
    cores = len(os.sched_getaffinity(0))
    node.up(stack(replicas=1, engine={"cores": 1, "queuesPerCore": 1, "cpuPolicy": "Exclusive"}))
    with node.connect() as connection:
        first = ask(connection)
        node.client.call("scale", name="web", replicas=cores + 1)
        eventually(lambda: condition(node, "CapacityAvailable")["reason"] == "NoExclusiveCPU")
        eventually(lambda: node.status()["readyReplicas"] == cores)
        time.sleep(1.2)  # one more try at the most
        failures = [e for e in node.client.call("events", name="web") if e["reason"] == "EngineFailed"]
        assert sum(e["count"] for e in failures) <= 4
        assert len(node.status()["engines"]) == cores
        assert ask(connection) == first
        node.client.call("scale", name="web", replicas=1)
        eventually(lambda: condition(node, "CapacityAvailable")["status"] == "True", 10, "nobody wants more any more")
        assert ask(connection) == first
    node.command("down", "--all", "--yes")


def test_what_tc_leaves_beside_the_pins_goes_with_them(node: Node) -> None:
    node.up(stack())
    (node.lab.run_directory / "bpf/tc/globals").mkdir(parents=True, exist_ok=True)
    node.command("down", "--all", "--yes")
    assert not node.lab.run_directory.exists()


@pytest.fixture
def one_cpu(node: Node) -> Iterator[Path]:
    """A cpuset with CPU 0 alone, as the kubelet's static CPU manager makes it for all pods but those with whole cores."""
    root = Path("/sys/fs/cgroup/cpuset")
    if not root.is_dir():
        pytest.skip("needs the cpuset hierarchy of cgroup v1")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two CPUs")
    node.command("down", "--all", "--yes")
    place = root / f"packetstack-test-{os.getpid()}"
    place.mkdir()
    for what in ("cpus", "mems"):
        (place / f"cpuset.{what}").write_text("0")
    yield place
    node.command("down", "--all", "--yes")
    for pid in (place / "cgroup.procs").read_text().split():
        (root / "cgroup.procs").write_text(pid)
    place.rmdir()


@pytest.mark.parametrize("when", ["before it starts", "while it runs"])
def test_an_agent_in_a_cpuset_without_all_cpus_hands_over_and_stays_on_its_cpus(
    node: Node, one_cpu: Path, when: str
) -> None:
    file = node.lab.directory / "stack.yaml"
    file.write_text(json.dumps(stack(replicas=2)))
    up = f"{sys.executable} -m packetstack_cli.main --run-dir {node.lab.run_directory} up {file} --uplink up0"
    enter = f"echo $$ > {one_cpu}/cgroup.procs; " if when == "before it starts" else ""
    node.lab.run("node", "sh", "-c", f"{enter}exec {up}")
    pid = (node.lab.run_directory / "agent.pid").read_text()
    if when == "while it runs":  # the kubelet gives a CPU to another pod
        (one_cpu / "cgroup.procs").write_text(pid)

    def cpus() -> list[set[int]]:
        return [os.sched_getaffinity(int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()]

    assert all(c == {0} for c in cpus())
    with node.connect() as connection:
        for replicas in (1, 3, 2):
            node.packetstack("scale", "web", "--replicas", str(replicas))
            assert ask(connection)
    assert all(c == {0} for c in cpus())
    assert (one_cpu / "cgroup.procs").read_text().split().count(pid) == 1


def test_a_kernel_whose_packet_handlers_can_be_interrupted_is_refused(tmp_path: Path) -> None:
    realtime = tmp_path / "realtime"
    devices.check_preemption(realtime)  # most kernels have no such file
    realtime.write_text("0\n")
    devices.check_preemption(realtime)
    realtime.write_text("1\n")
    with pytest.raises(AgentError, match="PREEMPT_RT"):
        devices.check_preemption(realtime)
