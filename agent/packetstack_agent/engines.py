"""One engine's life: namespace, veth pair, program, queues, processes.

The agent makes everything that needs a privilege and keeps the descriptors, so queues outlive the process that
serves them; the datapath gets copies over its socket. Functions that block are run in worker threads.
"""

import array
import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packetstack_agent import namespaces, networks
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import call, constant, ffi, lib, text
from packetstack_core import abi
from packetstack_core.reconciling import State

RING_SLOTS = 2048
"""Receive and transmit ring of a queue, each: what one queue may have to hold while its core does not run."""
SPARE_FRAMES = 4096
SPIN_US = {"Exclusive": 50, "Shared": 0}
"""How long a core polls empty queues before it sleeps. On shared cores polling takes time from others."""


@dataclass
class Blueprint:
    """What an engine is made from."""

    stack: str
    slot: int
    template: str
    queues: int
    cores: int
    cpu_policy: str
    cpus: tuple[int, ...]
    """CPU of each core; empty with cpuPolicy Shared: cores run where there is room."""
    memory_bytes: int
    namespace: str
    owner: str
    directory: Path
    arena: Path
    config: Path


@dataclass(eq=False)
class Engine:
    """A running engine as the agent holds it."""

    blueprint: Blueprint
    director: Any = None
    """`struct ps_director *`."""
    state: State = State.PENDING
    ready: bool = False
    pid: int = 0
    """Of the datapath, 0 = none is attached."""
    init: subprocess.Popen[bytes] | None = None
    ifindex: int = 0
    generation: int = 0
    view: Any = None
    """`struct ps_engine *`, shared with the datapath."""
    fds: Any = None
    fence: Any = None
    """`struct ps_fence_engine *`."""
    making: asyncio.Task[None] | None = None
    """Done when `make` is, whatever came of it: until then nothing of the engine may be removed."""
    removing: bool = False
    listener: socket.socket | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    """Arena, configuration, marker socket."""
    samples: dict[str, Any] = field(default_factory=dict)
    """Last rates; see `measuring`."""

    @property
    def slot(self) -> int:
        """The engine's number on this node."""
        return self.blueprint.slot

    @property
    def link(self) -> str:
        """Name of its program's pin."""
        return f"e{self.slot}"

    def core(self, index: int) -> Any:
        """`struct ps_core *`."""
        return ffi.cast("struct ps_core *", ffi.cast("char *", self.view) + self.view.cores_offset) + index

    def queue(self, index: int) -> Any:
        """`struct ps_queue *`."""
        at = ffi.cast("char *", self.view) + self.view.queues_offset + index * self.view.queue_stride
        return ffi.cast("struct ps_queue *", at)

    def counters(self) -> dict[str, int]:
        """Sum of the cores' counters, by name without prefix in lower case."""
        names = abi.enum_names("ps_counter")
        total = dict.fromkeys(range(constant("PS_COUNTERS")), 0)
        for c in range(self.blueprint.cores):
            values = self.core(c).counters
            for i in total:
                total[i] += values[i]
        return {names[i].removeprefix("PS_C_").lower(): n for i, n in total.items()}

    def kernel_drops(self) -> dict[str, int]:
        """What the kernel dropped before the engine saw it, summed over queues."""
        names = ("rx_dropped", "rx_ring_full", "rx_fill_ring_empty", "rx_invalid", "tx_invalid")
        total = dict.fromkeys(names, 0)
        out = ffi.new("uint64_t[6]")
        for q in range(self.blueprint.queues):
            call(lib().ps_queue_statistics, self.fds.sockets[q], out)
            for i, name in enumerate(names):
                # The fill ring is one for all queues: each socket reports the same number.
                total[name] = max(total[name], out[i]) if i == 2 else total[name] + out[i]
        # An empty fill ring is counted per attempt and, as a drop, in rx_dropped.
        total.pop("rx_fill_ring_empty")
        unstamped = ffi.new("uint64_t *")
        return total | ({"unstamped": int(unstamped[0])} if self._unstamped(unstamped) else {})

    def _unstamped(self, out: Any) -> bool:
        error = ffi.new("struct ps_error *")
        return bool(lib().ps_engine_unstamped(self.director, text(self.link), out, error) == 0)


def make(engine: Engine) -> None:
    """Namespace, links, program, queues, processes. Undone when a step fails. Blocks.

    `engine.view` is set last: who sees it may use everything.
    """
    b = engine.blueprint
    path = namespaces.create(b.namespace)
    try:
        _make(engine, path)
    except BaseException:
        destroy(engine)
        raise


def _make(engine: Engine, path: Path) -> None:
    b = engine.blueprint
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        link = networks.make_engine_link(b.slot, namespace, b.owner)
        engine.ifindex = link.ifindex
        mac = namespaces.run_in(path, networks.set_up_engine_end)
        # The engine's program before anything is directed to it: until then frames vanish silently.
        queues = call(lib().ps_engine_attach, engine.director, namespace, b"eth0", text(engine.link))
        call(lib().ps_host_attach, engine.director, link.ifindex)
        options = ffi.new(
            "struct ps_queue_options *",
            {
                "slot": b.slot,
                "queues": b.queues,
                "cores": b.cores,
                "rx_slots": RING_SLOTS,
                "tx_slots": RING_SLOTS,
                "spare_frames": SPARE_FRAMES,
                "mtu": 1500,
                "spin_us": SPIN_US[b.cpu_policy],
            },
        )
        ffi.memmove(options.mac, mac, 6)
        ffi.memmove(options.gateway_mac, link.host_mac, 6)
        b.directory.mkdir(parents=True, exist_ok=True)
        engine.fds = ffi.new("struct ps_queue_fds *")
        ffi.memmove(engine.fds, b"\xff" * ffi.sizeof("struct ps_queue_fds"), ffi.sizeof("struct ps_queue_fds"))
        try:
            call(lib().ps_queues_create, text(b.directory / "queues"), namespace, b"eth0", queues, options, engine.fds)
        finally:
            os.close(queues)
    finally:
        os.close(namespace)
    engine.files = [os.open(p, os.O_RDWR | os.O_CLOEXEC) for p in (b.arena, b.config)]
    ingress = call(lib().ps_packet_socket, -1, engine.ifindex)
    engine.files.append(ingress)
    engine.fence = ffi.new("struct ps_fence_engine *")
    engine.fence.slot = b.slot
    engine.fence.ifindex = engine.ifindex
    engine.fence.ingress = ingress
    engine.fence.egress = engine.fds.egress
    for i in range(len(engine.fence.events)):
        engine.fence.events[i] = engine.fds.events[i]
    cgroup = _limited(b)
    engine.listener = _listen(b.directory / "engine.sock")
    engine.init = _spawn(b, cgroup)
    view = call(lib().ps_engine_open, text(b.directory / "queues"), 0)
    engine.fence.engine = view
    engine.view = view


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(4)
    return listener


def _spawn(b: Blueprint, cgroup: Path | None) -> subprocess.Popen[bytes]:
    """Start the engine's init in its namespace, in a session of its own: the agent's end is not its end."""
    namespace = os.open(namespaces.NAMESPACES / b.namespace, os.O_RDONLY | os.O_CLOEXEC)

    def prepare() -> None:
        # Before init exists: what it forks at once must be limited too.
        if cgroup is not None:
            with suppress(OSError):
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        namespaces.enter(namespace)

    command = [str(abi.native("packetstack-init")), "--datapath", str(abi.native("packetstack-datapath"))]
    command += ["--socket", str(b.directory / "engine.sock")]
    command += ["--supervisor", sys.executable, "-P", "-m", "packetstack_engine.main", "--directory", str(b.directory)]
    try:
        with (b.directory / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare,
            )
    except OSError as e:
        raise AgentError(f"engine {b.slot}: cannot start {command[0]}: {e.strerror}") from None
    finally:
        os.close(namespace)


def destroy(engine: Engine, view: Any = None, fds: Any = None) -> None:
    """End the processes and remove all that `make` made; whatever is missing is fine. Blocks.

    `view` and `fds` are the engine's, when the caller has taken them away from it before other threads could
    meet them half gone.
    """
    b = engine.blueprint
    view, engine.view = view or engine.view, None
    fds, engine.fds = fds or engine.fds, None
    if engine.init is not None:
        end_process(engine.init.pid, engine.init.poll)
        engine.init = None
    if engine.listener is not None:
        engine.listener.close()
        engine.listener = None
    if engine.director is not None:
        error = ffi.new("struct ps_error *")
        lib().ps_director_engine(engine.director, b.slot, 0, error)
        lib().ps_engine_detach(engine.director, text(engine.link), error)
    if view is not None:
        lib().ps_unmap(view)
    if fds is not None:
        lib().ps_queues_close(fds)
    for fd in engine.files:
        with suppress(OSError):
            os.close(fd)
    engine.files.clear()
    networks.remove_engine_link(b.slot, b.owner)
    namespaces.remove(namespaces.NAMESPACES / b.namespace)
    shutil.rmtree(b.directory, ignore_errors=True)
    remove_cgroups(b.namespace)


def end_process(pid: int, poll: Callable[[], int | None]) -> None:
    """Terminate; kill what does not end within two seconds. `poll` tells (and reaps) the end."""
    for sig, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        if poll() is not None:
            break
        with suppress(ProcessLookupError):
            # Init's session: it and what it started.
            os.killpg(pid, sig)
        deadline = time.monotonic() + seconds
        while poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# ---- memory limit -----------------------------------------------------------------------------------------------

_CGROUP1 = Path("/sys/fs/cgroup/memory")
_CGROUP2 = Path("/sys/fs/cgroup")


def _limited(b: Blueprint) -> Path | None:
    """A memory cgroup for the engine, v1 or v2; None where there is none. The shared rings are the agent's, not counted."""
    if (_CGROUP1 / "memory.limit_in_bytes").exists():
        group, limit = _CGROUP1 / "packetstack" / b.namespace, "memory.limit_in_bytes"
    elif "memory" in _read(_CGROUP2 / "cgroup.controllers").split():
        group, limit = _CGROUP2 / "packetstack" / b.namespace, "memory.max"
        with suppress(OSError):
            group.parent.mkdir(exist_ok=True)
            (_CGROUP2 / "cgroup.subtree_control").write_text("+memory")
            (group.parent / "cgroup.subtree_control").write_text("+memory")
    else:
        return None
    try:
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(str(b.memory_bytes))
    except OSError:
        return None
    return group


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def remove_cgroups(name: str) -> None:
    """Remove an engine's cgroup, and the parent when it is the last."""
    for root in (_CGROUP1, _CGROUP2):
        for group in (root / "packetstack" / name, root / "packetstack"):
            with suppress(OSError):
                group.rmdir()


# ---- the datapath's socket --------------------------------------------------------------------------------------


async def attend(engine: Engine, changed: Callable[[Engine, str], None]) -> None:
    """Answer the engine's datapath processes, one after the other, until cancelled.

    `changed` is called with "ready", "died" or a reason for refusing.
    """
    loop = asyncio.get_running_loop()
    assert engine.listener is not None
    while True:
        connection, _ = await loop.sock_accept(engine.listener)
        with connection:
            connection.setblocking(False)
            pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            hello = await _receive(loop, connection)
            if hello is None or hello.kind != constant("PS_MSG_HELLO") or uid != 0:
                changed(engine, f"refused process {pid}: not a datapath")
                continue
            if hello.layout != constant("PS_LAYOUT_VERSION"):
                reason = f"LayoutMismatch: datapath has layout {hello.layout}, agent {constant('PS_LAYOUT_VERSION')}"
                await _send(loop, connection, _message("PS_MSG_REFUSED", reason))
                changed(engine, reason)
                continue
            try:
                _attach(engine, connection)
            except OSError:
                continue  # it died meanwhile; its successor will ask
            ready = await _receive(loop, connection)
            if ready is not None and ready.kind == constant("PS_MSG_READY"):
                engine.pid, engine.ready = pid, True
                changed(engine, "ready")
                while await _receive(loop, connection) is not None:
                    pass
            engine.pid, engine.ready = 0, False
            changed(engine, "died")


def _message(kind: str, reason: str = "") -> Any:
    message = ffi.new("struct ps_message *")
    message.kind = constant(kind)
    message.layout = constant("PS_LAYOUT_VERSION")
    message.text = reason.encode()[:127]
    return message


def _attach(engine: Engine, connection: socket.socket) -> None:
    b = engine.blueprint
    engine.generation += 1
    engine.view.generation = engine.generation
    message = _message("PS_MSG_ATTACH")
    message.slot, message.queues, message.cores, message.generation = b.slot, b.queues, b.cores, engine.generation
    for i in range(len(message.pin)):
        message.pin[i] = b.cpus[i] if i < len(b.cpus) else -1
    fds = [engine.files[0], engine.fds.engine, engine.files[1], engine.fds.umem]
    fds += [engine.fds.sockets[q] for q in range(b.queues)] + [engine.fds.events[c] for c in range(b.cores)]
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    connection.sendmsg([bytes(ffi.buffer(message))], control)


async def _receive(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> Any:
    """One message, None at the end of the connection."""
    size = ffi.sizeof("struct ps_message")
    try:
        data = await loop.sock_recv(connection, size + 1)
    except OSError:
        return None
    if len(data) != size:
        return None
    message = ffi.new("struct ps_message *")
    ffi.memmove(message, data, size)
    return message


async def _send(loop: asyncio.AbstractEventLoop, connection: socket.socket, message: Any) -> None:
    with suppress(OSError):
        await loop.sock_sendall(connection, bytes(ffi.buffer(message)))
