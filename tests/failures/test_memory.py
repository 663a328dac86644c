"""An engine that does with its descriptors and its memory what it likes: it can break its own stack, and nothing else.

Descriptors are taken out of a real datapath and used as the user that it runs as.
"""

import ctypes
import fcntl
import mmap
import os
import random
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.lab.node import BACKENDS, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_agent.blueprints import FIRST_SET
from packetstack_agent.node import RunDirectory
from packetstack_core import abi

NOBODY = 65534
OTHER = "192.0.2.11"
PIDFD_GETFD = 438
AF_XDP = 44
LIBC = ctypes.CDLL(None, use_errno=True)


def datapath(node: Node, slot: int) -> int:
    """Its process."""
    return int(
        next(e["pid"] for item in node.client.call("get") for e in item["status"]["engines"] if e["slot"] == slot)
    )


def held(pid: int, wanted: Callable[[int], bool]) -> list[int]:
    """Copies of the descriptors of a process, those that are `wanted`."""
    found, process = [], os.pidfd_open(pid)
    for number in sorted(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()):
        fd = LIBC.syscall(PIDFD_GETFD, process, number, 0)
        if fd >= 0 and wanted(fd):
            found.append(fd)
        elif fd >= 0:
            os.close(fd)
    os.close(process)
    return found


def is_file(path: Path) -> Callable[[int], bool]:
    return lambda fd: os.path.samestat(os.fstat(fd), path.stat())


def is_map(fd: int) -> bool:
    return "map_type" in Path(f"/proc/self/fdinfo/{fd}").read_text()


def refused_to_nobody(work: Callable[[], object]) -> bool:
    """Whether the user of the datapath gets an OSError."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            work()
        except OSError:
            code = 0
        except ValueError:  # Python's mmap asks for the size first
            code = 2
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("file", ["stacks/web/sets/1/arena", "stacks/web/sets/1/config", "engines/{slot}/queues"])
def test_what_the_agent_writes_a_datapath_can_read_and_neither_write_nor_cut_nor_grow(node: Node, file: str) -> None:
    node.up_again()
    slot = node.status()["engines"][0]["slot"]
    path = node.lab.run_directory / file.format(slot=slot)
    before, [fd] = path.stat(), held(datapath(node, slot), is_file(path))
    assert before.st_mode & 0o777 == 0o600
    assert not before.st_size % mmap.PAGESIZE or path.name == "config"
    for tried in (
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 1 << 30),
        lambda: os.posix_fallocate(fd, 0, 1 << 30),
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.fchmod(fd, 0o666),
        lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
        lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    ):
        assert refused_to_nobody(tried), tried
    assert not refused_to_nobody(lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ))
    os.close(fd)
    assert (path.stat().st_size, path.stat().st_mode) == (before.st_size, before.st_mode)
    assert node.curl() in BACKENDS


def test_what_engines_write_can_be_neither_cut_nor_grown(node: Node) -> None:
    node.up_again()
    slot = node.status()["engines"][0]["slot"]
    maps = held(datapath(node, slot), is_map)
    assert len(maps) == 2, "the arena's and the engine's"
    for fd in maps:
        has = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        size = int(has["value_size"]) * int(has["max_entries"])
        for tried in (
            lambda fd=fd: os.ftruncate(fd, 0),
            lambda fd=fd: os.ftruncate(fd, 1 << 30),
            lambda fd=fd: os.posix_fallocate(fd, 0, 1 << 30),
            lambda fd=fd, size=size: mmap.mmap(fd, size + 4096, mmap.MAP_SHARED, mmap.PROT_READ),
        ):
            assert refused_to_nobody(tried)
        os.close(fd)


class Shared:
    """The memory of a stack and of its engines, mapped as the agent has it."""

    def __init__(self, node: Node, name: str) -> None:
        run, lib = RunDirectory(node.lab.run_directory), abi.lib()
        error = abi.ffi.new("struct ps_error *")
        directories = [run.flow_memory(name, FIRST_SET), *(run.engine(e["slot"]) for e in node.status(name)["engines"])]
        self._mapped, self.parts = [], []
        for directory in directories:
            opened, file, begin = (
                (lib.ps_arena_open, "arena", lib.PS_ARENA_FILE_BYTES)
                if directory.parent.name == "sets"
                else (lib.ps_engine_open, "queues", lib.PS_ENGINE_FILE_BYTES)
            )
            at = opened(os.fsencode(directory / file), os.fsencode(run.memory(directory)), error)
            assert at != abi.ffi.NULL, abi.ffi.string(error.text)
            self._mapped.append(at)
            self.parts.append(abi.ffi.buffer(abi.ffi.cast("char *", at) + begin, int(at.bytes) - begin))

    def spoil(self, what: Callable[[int], bytes]) -> None:
        """Every byte that engines may write."""
        for part in self.parts:
            part[:] = what(len(part))

    def close(self) -> None:
        for at in self._mapped:
            abi.lib().ps_unmap(at)


class Talking:
    """Questions over connections through a stack, from the beginning to the end."""

    def __init__(self, node: Node, address: str) -> None:
        self.answers, self.failed = 0, ""
        self._connections = [node.connect(address) for _ in range(4)]
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ends.is_set():
                for connection in self._connections:
                    ask(connection)
                    self.answers += 1
                time.sleep(0.002)
        except (OSError, AssertionError) as e:
            self.failed = repr(e)

    def sent_again(self) -> int:
        """Segments that were lost, so that the client sent them again: tcpi_total_retrans of <linux/tcp.h>."""
        asked = [c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104) for c in self._connections]
        return sum(struct.unpack_from("I", info, 100)[0] for info in asked)

    def end(self) -> None:
        self._ends.set()
        self._thread.join()
        for connection in self._connections:
            connection.close()


def other_stack() -> dict[str, Any]:
    return stack(
        "other", replicas=1, snat={"addresses": ["198.51.100.8/32"]}, listeners=[listener("web", OTHER, BACKENDS[:1])]
    )


def seeded(seed: int) -> Callable[[int], bytes]:
    source = random.Random(seed)
    return source.randbytes


@contextmanager
def two_stacks(node: Node) -> Iterator[Talking]:
    """`web` and `other`, and connections through the other one that must not notice anything."""
    node.command("down", "--all", "--yes")
    node.up(stack(), other_stack())
    talking = Talking(node, OTHER)
    pids = {e["slot"]: e["pid"] for e in node.status("other")["engines"]}
    drops = node.status("other")["drops"]["engine"]
    try:
        yield talking
        answers = talking.answers
        eventually(lambda: talking.answers > answers + 20 or talking.failed)
        assert not talking.failed
        assert not talking.sent_again()
        for engine in node.status("other")["engines"]:  # a test may resize it: another engine may be the one that stays
            assert engine["pid"] == pids.get(engine["slot"], engine["pid"])
        assert node.status("other")["drops"]["engine"] == drops
    finally:
        talking.end()
        node.command("down", "--all", "--yes")


RUBBISH = {
    "zeros": lambda n: bytes(n),
    "ones": lambda n: b"\xff" * n,
    "small numbers": lambda n: (b"\x01\x00\x00\x00\x02\x00\x00\x00" * (n // 8 + 1))[:n],
    **{f"seed {seed}": seeded(seed) for seed in range(3)},
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_in_all_that_engines_may_write_harms_their_own_stack_alone(node: Node, kind: str) -> None:
    with two_stacks(node) as talking:
        agent, shared = node.client.agent_pid(), Shared(node, "web")
        slot = node.status()["engines"][0]["slot"]
        requests: list[tuple[str, dict[str, Any]]] = [
            ("get", {}),
            ("census", {"name": "web"}),
            ("events", {}),
            ("move_queue", {"name": "web", "slot": slot, "queue": 0, "core": 1}),
            ("move_buckets", {"name": "web", "buckets": list(range(20)), "slot": slot}),
            ("scale", {"name": "web", "replicas": 3}),
            ("scale", {"name": "web", "replicas": 1}),
        ]
        for verb, request in requests:
            shared.spoil(RUBBISH[kind])
            with suppress(Exception):  # refused or not: it answers, and lives
                node.client.call(verb, **request)
            shared.spoil(RUBBISH[kind])
            assert node.client.metrics()
            assert not talking.failed
            time.sleep(0.2)
        shared.close()
        assert node.client.agent_pid() == agent
        assert not [e for e in node.client.call("events") if e["reason"] == "InternalError"]
        os.kill(agent, signal.SIGKILL)  # nor does the next agent fall over it
        eventually(lambda: not node.client.alive())
        node.packetstack("up", str(node.lab.directory / "stack.yaml"))
        assert not [e for e in node.client.call("events") if e["reason"] == "InternalError"]
        node.packetstack("down", "web", "--yes")
        assert [item["metadata"]["name"] for item in node.client.call("get")] == ["other"]
        run = node.lab.run_directory
        assert not (run / "stacks/web").exists()
        assert [pin.name for pin in (run / "bpf").glob("arena_*")] == ["arena_other_1"]


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("arena", "buckets", 8192),
        ("arena", "shard_stride", 1 << 40),
        ("arena", "shards_offset", 64),
        ("arena", "entries", 32000),
        ("arena", "index_slots", 0),
        ("arena", "clients_offset", 1 << 50),
        ("arena", "bytes", 1 << 40),
        ("arena", "backends", 5000),
    ],
)  # fmt: skip
def test_an_arena_whose_numbers_do_not_fit_is_not_used_and_named(node: Node, file: str, field: str, value: int) -> None:
    node.up_again()
    path = node.lab.run_directory / "stacks/web/sets/1" / file
    os.kill(node.client.agent_pid(), signal.SIGKILL)
    eventually(lambda: not node.client.alive())
    good = path.read_bytes()
    at = abi.ffi.from_buffer(
        f"struct ps_{file} *", content := bytearray(good + bytes(abi.ffi.sizeof("struct ps_arena")))
    )
    setattr(at, field, value)
    path.write_bytes(content[: len(good)])
    try:
        said = node.command("up", str(node.lab.directory / "stack.yaml"))
        assert said.returncode == 1
        assert "stacks/web/sets/1/arena" in said.stderr
        assert "not used" in said.stderr
    finally:
        if node.client.alive():
            os.kill(node.client.agent_pid(), signal.SIGKILL)
            eventually(lambda: not node.client.alive())
        path.write_bytes(good)
    node.packetstack("up", str(node.lab.directory / "stack.yaml"))
    assert node.curl() in BACKENDS


def test_an_agent_that_is_asked_without_end_at_an_engines_socket_still_answers_others(node: Node) -> None:
    with two_stacks(node):
        slot = node.status()["engines"][0]["slot"]
        flood = (
            "import os, socket\n"
            f"os.chdir({str(node.lab.run_directory / f'engines/{slot}')!r})\n"
            "while True:\n"
            "    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.setblocking(False)\n"
            "    try:\n"
            "        s.connect('engine.sock'); s.send(b'x')\n"
            "    except OSError: pass\n"
            "    s.close()\n"
        )
        flooding = subprocess.Popen(["python3", "-c", flood])
        try:
            began, times = len(node.client.call("events")), []
            for _ in range(20):
                asked = time.monotonic()
                node.client.call("get")
                times.append(time.monotonic() - asked)
                time.sleep(0.05)
            assert max(times) < 1.0
            assert len(node.client.call("events")) < began + 10
        finally:
            flooding.kill()
            flooding.wait()


def hello(node: Node, slot: int, fds: list[int]) -> bool:
    """Says to a new agent what the datapath would say, with these descriptors; whether it was believed."""
    run, lib, ffi = RunDirectory(node.lab.run_directory), abi.lib(), abi.ffi
    error = ffi.new("struct ps_error *")
    view = lib.ps_engine_open(
        os.fsencode(run.engine(slot) / "queues"), os.fsencode(run.memory(run.engine(slot))), error
    )
    message = ffi.new("struct ps_message *", {"kind": lib.PS_MSG_HELLO, "layout": lib.PS_LAYOUT_VERSION})
    message.generation = view.generation
    lib.ps_unmap(view)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        eventually(lambda: not connection.connect_ex(str(run.engine(slot) / "engine.sock")), every_seconds=0.001)
        socket.send_fds(connection, [bytes(ffi.buffer(message))], fds)
        return not select.select([connection], [], [], 1.0)[0]


@pytest.mark.parametrize(
    "wrong", ["frames", "a queue's socket", "two queues changed", "what wakes a core", "a full pipe", "one less"]
)
def test_an_agent_takes_back_no_other_descriptors_than_an_agent_has_given(node: Node, wrong: str) -> None:
    node.command("down", "--all", "--yes")
    node.up(stack(replicas=1))
    [engine] = node.status()["engines"]
    slot, pid = engine["slot"], engine["pid"]
    good = held(pid, is_given)
    assert len(good) == 1 + 2 + 2 * 2
    bad = list(good)
    opened: list[int] = []
    if wrong == "frames":
        bad[0] = os.memfd_create("packetstack-umem", os.MFD_ALLOW_SEALING)
        os.ftruncate(bad[0], os.fstat(good[0]).st_size)
        fcntl.fcntl(bad[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        opened.append(bad[0])
    elif wrong == "a queue's socket":
        bad[1] = socket.socket(AF_XDP, socket.SOCK_RAW).detach()
        opened.append(bad[1])
    elif wrong == "two queues changed":
        bad[1], bad[2] = bad[2], bad[1]
    elif wrong == "what wakes a core":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        bad[3], opened = ours.detach(), [theirs.detach()]
        opened.append(bad[3])
    elif wrong == "a full pipe":
        reading, bad[3] = os.pipe()
        os.set_blocking(bad[3], False)
        with suppress(BlockingIOError):
            while os.write(bad[3], bytes(4096)):
                pass
        os.set_blocking(bad[3], True)
        opened = [reading, bad[3]]
    else:
        bad.pop()
    os.kill(pid, signal.SIGSTOP)  # it is not who comes back
    agent = node.client.agent_pid()
    try:
        os.kill(agent, signal.SIGKILL)
        eventually(lambda: not node.client.alive())
        starting = node.lab.start("node", *node.lab.command("up", str(node.lab.directory / "stack.yaml")))
        assert not hello(node, slot, bad)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        for fd in {*good, *opened}:
            os.close(fd)
    starting.wait(30)
    eventually(lambda: node.status()["engines"][0]["ready"])
    assert node.status()["engines"][0]["pid"] == pid, "the one that served goes on"
    [said] = [e["message"] for e in node.client.call("events") if e["reason"] == "DatapathRefused"]
    assert said.endswith("so that it is not the datapath that served")
    assert node.curl() in BACKENDS


def test_an_engine_that_makes_a_wake_up_wait_holds_up_no_agent(node: Node) -> None:
    with two_stacks(node):
        slot = node.status()["engines"][0]["slot"]
        pid = datapath(node, slot)
        sockets = held(pid, is_core_end)
        assert len(sockets) == 4
        for fd in sockets:
            os.set_blocking(fd, True)  # the descriptions are shared with the agent
            one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, fileno=fd)
            with suppress(BlockingIOError):
                while one.send(b"x", socket.MSG_DONTWAIT):
                    pass
            one.detach()
        os.kill(pid, signal.SIGSTOP)
        try:
            for replicas in (3, 2):
                asked = time.monotonic()
                node.client.call("scale", name="other", replicas=replicas - 1)
                node.client.call("get")
                assert time.monotonic() - asked < 1
                time.sleep(0.2)
            node.client.call("scale", name="other", replicas=1)
            node.wait_ready("other")
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            for fd in sockets:
                os.close(fd)


def is_umem(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/memfd:packetstack-umem")


def is_socket(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("socket:")


def option(fd: int, name: int) -> int:
    # With all three numbers: else Python asks the kernel for them, and an AF_XDP socket does not tell.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, fileno=os.dup(fd)) as one:
        return one.getsockopt(socket.SOL_SOCKET, name)


def is_core_end(fd: int) -> bool:
    """One of a pair by which a core is woken."""
    return (
        is_socket(fd)
        and option(fd, socket.SO_DOMAIN) == socket.AF_UNIX
        and option(fd, socket.SO_TYPE) == socket.SOCK_DGRAM
    )


def is_given(fd: int) -> bool:
    """What a datapath brings to the next agent."""
    return is_umem(fd) or is_core_end(fd) or (is_socket(fd) and option(fd, socket.SO_DOMAIN) == AF_XDP)
