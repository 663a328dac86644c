"""What the node does to an agent: no disk, no memory, no core, floods, commands that are killed."""

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from packetstack_cli.lab import inside

from .conftest import BACKENDS, VIP, Node, ask, eventually, stack

SMALL_MIB, LARGE_MIB = 6, 64


@pytest.fixture
def disk(node: Node) -> Iterator[Path]:
    """A file system of its own for the run directory."""
    run = node.lab.run_directory
    node.command("down", "--all", "--yes")
    run.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE_MIB}m", "packetstack-test", run], check=True)
    yield run
    remount(run, "rw")
    node.command("down", "--all", "--yes")
    subprocess.run(["umount", "-l", run], check=True)
    run.rmdir()


def remount(run: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", run], check=True)


def fill(run: Path) -> Path:
    """Until no byte fits any more."""
    filler = run / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    return filler


def condition(node: Node, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in node.status()["conditions"] if c["type"] == kind)
    return found


def reasons(node: Node) -> list[str]:
    return [e["reason"] for e in node.client.call("events")]


def test_up_on_a_disk_that_is_too_small_says_which_file_and_leaves_nothing(node: Node, disk: Path) -> None:
    remount(disk, f"size={SMALL_MIB}m")
    before = node.traces()
    file = node.lab.directory / "stack.yaml"
    node.up(stack(replicas=0))  # it fits; the engines' files and a larger arena do not
    node.lab.packetstack("down", "--yes")
    file.write_text(file.read_text().replace('"maxFlows": 4096', '"maxFlows": 1000000'))
    said = node.refused("up", str(file))
    assert said.startswith(f"{disk}/stacks/web/arena: cannot take ")
    assert said.endswith("MiB for it: No space left on device")
    assert node.traces() == before


def test_a_full_disk_stops_changes_and_no_packets(node: Node, disk: Path) -> None:
    node.up(stack())
    with node.connect() as connection:
        first = ask(connection)
        filler = fill(disk)
        node.client.call("scale", name="web", replicas=3)
        eventually(lambda: condition(node, "CapacityAvailable")["status"] == "False")
        eventually(lambda: "RecordNotWritten" in reasons(node))
        assert len(node.status()["engines"]) == 2
        victim = node.status()["engines"][0]["pid"]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: node.status()["engines"][0]["pid"] not in (0, victim))
        assert ask(connection) == first
        filler.unlink()
        eventually(lambda: "RecordWritten" in reasons(node))
        eventually(lambda: node.status()["ready"], 20)
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


def test_an_engine_that_reaches_its_memory_limit_comes_back(node: Node, served: socket.socket) -> None:
    engine = node.status()["engines"][0]
    first, second = Path("/sys/fs/cgroup/memory/packetstack"), Path("/sys/fs/cgroup/packetstack")
    if (first / engine["namespace"]).exists():
        group, limit, used = first / engine["namespace"], "memory.limit_in_bytes", "memory.usage_in_bytes"
    elif (second / engine["namespace"] / "memory.max").exists():
        group, limit, used = second / engine["namespace"], "memory.max", "memory.current"
    else:
        pytest.skip("this kernel has no memory cgroup")
    before = (group / limit).read_text()
    (group / limit).write_text(str(int((group / used).read_text()) + (256 << 10)))
    for _ in range(3):
        pid = eventually(lambda: node.status()["engines"][0]["pid"])
        os.kill(pid, signal.SIGKILL)
        eventually(lambda p=pid: node.status()["engines"][0]["pid"] not in (0, p))
        ask(served)
    (group / limit).write_text(before)
    eventually(lambda: all(e["ready"] for e in node.status()["engines"]))


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
    node.command("down", "--all", "--yes")


# ---- floods -------------------------------------------------------------------------------------------------------


def ethernet(node: Node) -> bytes:
    """Header of frames from the client to the node."""
    with inside(node.lab.namespace("client")), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("c0", 0))
        own: bytes = s.getsockname()[4]
    with inside(node.lab.namespace("node")), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("up0", 0))
        other: bytes = s.getsockname()[4]
    return other + own + b"\x08\x00"


def ipv4(source: bytes, protocol: int, payload: bytes, fragment: int = 0, number: int = 1) -> bytes:
    def sum16(data: bytes) -> int:
        total = sum(struct.unpack(f"!{len(data) // 2}H", data))
        total = (total & 0xFFFF) + (total >> 16)
        return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF

    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), number, fragment, 64, protocol, 0)
    header += source + socket.inet_aton(VIP)
    return header[:10] + struct.pack("!H", sum16(header)) + header[12:] + payload


def flood(kind: str, rng: random.Random, frames: int, link: bytes) -> Iterator[bytes]:
    for i in range(frames):
        source = bytes([11]) + rng.randbytes(3)
        port = rng.randrange(1024, 65536)
        if kind == "garbage":
            yield link[: rng.choice((12, 14))] + rng.randbytes(rng.randrange(20, 200))
        elif kind == "garbage in IP":
            yield link + ipv4(source, rng.choice((6, 17, 1, 58, 255)), rng.randbytes(rng.randrange(0, 60)))
        elif kind == "SYN":
            yield link + ipv4(source, 6, struct.pack("!HHIIBBHHH", port, 80, i, 0, 0x50, 2, 1000, 0, 0))
        elif kind == "fragments":
            yield link + ipv4(source, 17, rng.randbytes(64), fragment=rng.choice((0x2000, 100)), number=i & 0xFFFF)
        else:
            yield link + ipv4(source, 6, struct.pack("!HHIIBBHHH", port, 80, i, i, 0x50, 0x10, 1000, 0, 0))


def memory_kib(pid: int) -> int:
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("RssAnon"))
    return int(line.split()[1])


@pytest.mark.parametrize("kind", ["garbage", "garbage in IP", "SYN", "fragments", "ACK"])
def test_floods_are_counted_and_existing_flows_go_on(node: Node, served: socket.socket, kind: str) -> None:
    engines = node.status()["engines"]
    before, drops = [memory_kib(e["pid"]) for e in engines], total(node)
    link = ethernet(node)
    with inside(node.lab.namespace("client")):
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with sender:
        sender.bind(("c0", 0))
        for number, frame in enumerate(flood(kind, random.Random(7), 20_000, link)):
            with suppress(BlockingIOError, OSError):
                sender.send(frame)
            if number % 5000 == 0:
                ask(served)
    ask(served)
    status = node.status()
    assert [e["pid"] for e in status["engines"]] == [e["pid"] for e in engines], "a datapath died"
    assert all(now - then < 1024 for now, then in zip([memory_kib(e["pid"]) for e in engines], before, strict=True))
    assert status["flows"] <= 4096 * 2
    if kind != "garbage":  # most of that is nobody's traffic, which passes
        assert total(node) > drops + 1000
    assert node.curl() in BACKENDS


def total(node: Node) -> int:
    """All named drops, and flows that were recycled to make room."""
    text = node.client.call("metrics")
    recycled = sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("packetstack_engine_packets_total") and 'event="flows_recycled"' in line
    )
    return int(recycled) + sum(sum(reasons.values()) for reasons in node.status()["drops"].values())


# ---- commands that are killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("milliseconds", range(0, 900, 75))
def test_a_killed_up_is_repeated_and_all_is_right(node: Node, milliseconds: int) -> None:
    file = node.lab.directory / "stack.yaml"
    node.up(stack())
    node.lab.packetstack("down", "--yes")
    command = [sys.executable, "-m", "packetstack_cli.main", "--run-dir", str(node.lab.run_directory), "up", str(file)]
    first = node.lab.start("node", *command)
    time.sleep(milliseconds / 1000)
    first.kill()
    first.wait()
    node.lab.packetstack("up", str(file))
    assert node.status()["readyReplicas"] == 2
    assert node.curl() in BACKENDS
    node.lab.packetstack("down", "--yes")
    assert not node.lab.run_directory.exists()


@pytest.mark.parametrize("words", [("scale", "web", "--replicas", "3"), ("upgrade", "web-1"), ("upgrade", "--agent")])
def test_a_killed_command_is_repeated_and_all_is_right(
    node: Node, served: socket.socket, words: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "packetstack_cli.main", "--run-dir", str(node.lab.run_directory), *words]
    for milliseconds in range(100, 500, 80):
        first = node.lab.start("node", *command)
        time.sleep(milliseconds / 1000)
        first.kill()
        first.wait()
        ask(served)
    node.lab.packetstack("upgrade", "--agent")
    node.lab.packetstack(*words)
    eventually(lambda: node.status()["ready"])
