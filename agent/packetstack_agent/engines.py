"""One engine's life: namespace, veth pair, program, queues, processes.

The agent makes everything that needs a privilege and keeps the descriptors, so queues outlive the process that
serves them; the datapath gets copies over its socket. Functions that block are run in worker threads.
"""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from packetstack_agent import builds, cgroups, namespaces, networks, processes
from packetstack_agent.attachments import NOBODY, Attachments, Changed, Shared
from packetstack_agent.blueprints import Blueprint
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import call, constant, ffi, lib, text
from packetstack_agent.processes import Process
from packetstack_agent.structs import Core, Queue
from packetstack_agent.ways import Made, Way
from packetstack_core import abi
from packetstack_core.assignment import State

RING_SLOTS = 2048
"""Receive and transmit ring of a queue, each: what one queue may have to hold while its core does not run."""
SPARE_FRAMES = 4096
SPIN_US = {"Exclusive": 50, "Shared": 0}
"""How long a core polls empty queues before it sleeps. On shared cores polling takes time from others."""


@dataclass(eq=False)
class Engine:
    """A running engine as the agent holds it."""

    blueprint: Blueprint
    director: Any = None
    """`struct ps_director *`."""
    state: State = State.PENDING
    init: Process | None = None
    ifindex: int = 0
    """Index of its interface's host end."""
    peer: int = 0
    """Index of its interface, in its own namespace."""
    shared: Shared | None = None
    """What its datapath processes get; there from `make` or `regain` on."""
    attachments: Attachments | None = None
    view: Any = None
    """`struct ps_engine *`, shared with the datapath. None until all of the engine may be used."""
    fds: Any = None
    fence: Any = None
    """`struct ps_fence_engine *`."""
    making: asyncio.Task[None] | None = None
    """Done when `make` is, whatever came of it: until then nothing of the engine may be removed."""
    removing: bool = False
    listener: socket.socket | None = None
    files: list[int] = field(default_factory=list)
    """Arena, configuration, marker socket."""
    processes: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while its processes are begun or ended."""
    silent_since: float = 0.0
    """No datapath serves it since then, or since its init was started again; 0 = one does."""
    unserved_since: float = 0.0
    """No datapath serves it since then, however often its init was started again; 0 = one does."""
    restarted: float = 0.0
    """When its init was last started again."""
    orphans: bool = False
    """Its namespace has processes of an init that has ended."""
    probed: bool = False
    """Whether it has answered a probe packet."""
    device: str = ""
    """Name of its interface's host end."""
    mac: str = ""
    """MAC address of its interface."""
    way: Way | None = None
    """What lies between this node and its queues; there from `make` or `regain` on."""

    @property
    def ready(self) -> bool:
        """Whether a datapath serves its queues."""
        return self.view is not None and self.attachments is not None and self.attachments.serving is not None

    @property
    def pid(self) -> int:
        """Process of the datapath; 0 if none serves."""
        serving = self.attachments.serving if self.attachments is not None else None
        return serving.pid if serving is not None else 0

    @property
    def slot(self) -> int:
        """The engine's number on this node."""
        return self.blueprint.slot

    @property
    def link(self) -> str:
        """Name of its program's pin."""
        return f"e{self.slot}"

    def core(self, index: int) -> Core:
        """One of its cores, in shared memory."""
        first = ffi.cast("struct ps_core *", ffi.cast("char *", self.view) + self.view.cores_offset)
        core: Core = first + index
        return core

    def queue(self, index: int) -> Queue:
        """One of its queues, in shared memory."""
        at = ffi.cast("char *", self.view) + self.view.queues_offset + index * self.view.queue_stride
        queue: Queue = ffi.cast("struct ps_queue *", at)
        return queue

    def served_by(self, index: int) -> int:
        """Core that serves a queue, -1: none of those that there are. An engine may write there what it likes."""
        core = (self.queue(index).cur & 0xFF) - 1
        return core if core < self.blueprint.cores else -1

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
        """What the kernel dropped before the engine saw it."""
        return self.ring_drops() | self.refused()

    def ring_drops(self) -> dict[str, int]:
        """What its rings did not take, summed over queues."""
        names = ("rx_dropped", "rx_ring_full", "rx_fill_ring_empty", "rx_invalid", "tx_invalid")
        total = dict.fromkeys(names, 0)
        for q in range(self.blueprint.queues):
            out = self._statistics(q)
            for i, name in enumerate(names):
                # The fill ring is one for all queues: each socket reports the same number.
                total[name] = max(total[name], out[i]) if i == 2 else total[name] + out[i]
        # An empty fill ring is counted per attempt and, as a drop, in rx_dropped.
        total.pop("rx_fill_ring_empty")
        return total

    def refused(self) -> dict[str, int]:
        """Frames that its program dropped: of those who reach its interface and are not the director. Empty: it has none."""
        out = ffi.new("uint64_t[3]")
        if lib().ps_engine_refused(self.director, text(self.link), out, ffi.new("struct ps_error *")):
            return {}
        return {"unstamped": int(out[0]), "forged_marker": int(out[1]), "misdirected": int(out[2])}

    def missed(self, index: int) -> int:
        """Frames that the kernel dropped because the queue's ring was full."""
        out = self._statistics(index)
        return int(out[0] + out[1])

    def _statistics(self, index: int) -> Any:
        out = ffi.new("uint64_t[6]")
        call(lib().ps_queue_statistics, self.fds.sockets[index], out)
        return out


def make(engine: Engine) -> None:
    """Namespace, links, program, queues, processes. Undone when a step fails. Blocks.

    `engine.view` is set last: who sees it may use everything.
    """
    b = engine.blueprint
    path = b.place() if b.pod else namespaces.create(b.namespace)
    try:
        _make(engine, path)
    except BaseException:
        destroy(engine)
        raise


def _make(engine: Engine, path: Path) -> None:
    b = engine.blueprint
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if b.interface:
            link = networks.find_engine_link(path, b.interface)
        else:
            link = networks.make_engine_link(b.slot, namespace, b.device, b.owner)
        engine.ifindex, engine.device = link.ifindex, socket.if_indextoname(link.ifindex)
        mac = namespaces.run_in(path, partial(networks.set_up_engine_end, b.device))
        engine.mac = mac.hex(":")
        # The engine's program before anything is directed to it: until then frames vanish silently.
        end = _end(b, secrets.randbits(64))
        queues = call(lib().ps_engine_attach, engine.director, namespace, text(b.device), text(engine.link), end)
        program = _host_program(engine, end)
        _forget_fences(engine)
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
                "token": end.token,
            },
        )
        ffi.memmove(options.mac, mac, 6)
        ffi.memmove(options.gateway_mac, link.host_mac, 6)
        b.directory.mkdir(parents=True, exist_ok=True)
        engine.fds = _no_descriptors()
        try:
            call(
                lib().ps_queues_create, text(b.directory / "queues"), text(b.memory), namespace, text(b.device), queues, options,
                engine.fds,
            )  # fmt: skip
        finally:
            os.close(queues)
    finally:
        os.close(namespace)
    view = call(lib().ps_engine_open, text(b.directory / "queues"), text(b.memory))
    _share(engine, view, (engine.fds.engine, engine.fds.map), _rings(b, engine.fds))
    _keep_way(engine, view, path, end, program)
    if not b.pod:
        engine.init = spawn(b)
    complete(engine)


def _end(b: Blueprint, token: int) -> Any:
    """What the programs at both ends of its interface know of it."""
    return ffi.new("struct ps_end *", {"token": token, "slot": b.slot, "stack": b.index})


def _host_program(engine: Engine, end: Any) -> int:
    """The program of its host end, attached. A descriptor among the engine's files."""
    program: int = call(lib().ps_host_program, engine.director, end)
    engine.files.append(program)
    call(lib().ps_host_attach, engine.ifindex, program)
    return program


def _forget_fences(engine: Engine) -> None:
    """What its egress path has answered begins with nothing: slots come round, and each arena counts its own fences."""
    most = constant("PS_MAX_CPUS")
    seen = lib().ps_director_egress(engine.director) + engine.slot * most
    ffi.memmove(seen, bytes(8 * most), 8 * most)


def _rings(b: Blueprint, fds: Any) -> list[int]:
    return [fds.umem, *fds.sockets[0 : b.queues], *fds.wake[0 : b.cores], *fds.woken[0 : b.cores]]


def _share(engine: Engine, view: Any, memory: tuple[int, int], rings: list[int]) -> None:
    """`memory`: the engine's file, to read, and its map."""
    b = engine.blueprint
    # What the agent writes engines may read alone, and neither cut nor grow it: with a descriptor to write they could.
    engine.files += [arena := _readable(b.arena)]
    engine.files += [flows := call(lib().ps_map_open, text(b.flows), 0)]
    engine.files += [config := _readable(b.config)]
    # In a pod it is the kubelet who gives CPUs.
    pin = None if b.pod and b.cpu_policy == "Exclusive" else b.cpus
    files = (arena, flows, *memory, config)
    engine.shared = Shared(b.slot, b.cores, pin, files, rings, b.queues, view, b.shard, b.pod_uid)
    engine.listener = _listen(b.directory / "engine.sock")


def complete(engine: Engine) -> None:
    """All descriptors are there: from now on fences may include the engine."""
    b, shared = engine.blueprint, engine.shared
    assert shared is not None
    if engine.fds is None:
        engine.fds = _no_descriptors()
        namespace = os.open(b.place(), os.O_RDONLY | os.O_CLOEXEC)
        try:
            engine.fds.egress = call(lib().ps_packet_socket, namespace, engine.peer)
        finally:
            os.close(namespace)
        engine.fds.engine, engine.fds.map = shared.files[2:4]
        engine.fds.umem, *rest = shared.rings
        engine.fds.sockets[0 : b.queues] = rest[: b.queues]
        engine.fds.wake[0 : b.cores] = rest[b.queues : b.queues + b.cores]
        engine.fds.woken[0 : b.cores] = rest[b.queues + b.cores :]
    ingress = call(lib().ps_packet_socket, -1, engine.ifindex)
    engine.files.append(ingress)
    engine.fence = ffi.new("struct ps_fence_engine *")
    engine.fence.slot = b.slot
    engine.fence.ifindex = engine.ifindex
    engine.fence.ingress = ingress
    engine.fence.egress = engine.fds.egress
    ffi.memmove(engine.fence.wake, engine.fds.wake, ffi.sizeof(engine.fds.wake))
    engine.fence.engine = shared.view
    engine.view = shared.view


def _no_descriptors() -> Any:
    fds = ffi.new("struct ps_queue_fds *")
    ffi.memmove(fds, b"\xff" * ffi.sizeof("struct ps_queue_fds"), ffi.sizeof("struct ps_queue_fds"))
    return fds


def regain(engine: Engine, init: tuple[int, int]) -> None:
    """Take over an engine that an earlier agent has made. AgentError if something of it is missing. Blocks.

    `init`: its pid and start time. The descriptors of its queues are with its datapath, which brings them when it
    finds the new socket; until then the engine serves, and nothing can be moved to or from it.
    """
    b = engine.blueprint
    path = b.place()
    known = Process.known(*init) if not b.pod else None
    if not path.exists() and known is not None and known.alive():  # somebody has deleted the name alone
        with Path(f"/proc/{init[0]}/ns/net").open("rb") as own:
            namespaces.give_name(own.fileno(), path)
    if not path.exists():
        raise AgentError(f"network namespace {b.namespace}: is gone")
    link = networks.find_engine_link(path, b.interface) if b.interface else networks.engine_link(b.slot, b.owner)
    engine.ifindex, engine.peer = link.ifindex, link.peer
    view = call(lib().ps_engine_open, text(b.directory / "queues"), text(b.memory))
    if (view.slot, view.queues, view.cores) != (b.slot, b.queues, b.cores):
        lib().ps_unmap(view)
        raise AgentError(f"{b.directory}/queues: is of another engine than the record says")
    engine.device = socket.if_indextoname(engine.ifindex)
    engine.mac = bytes(view.mac)[:6].hex(":")
    engine.init = known
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The programs of this build, in place: no packet is without one.
        end = _end(b, view.token)
        os.close(call(lib().ps_engine_attach, engine.director, namespace, text(b.device), text(engine.link), end))
        program = _host_program(engine, end)
    finally:
        os.close(namespace)
    _share(engine, view, (_readable(b.directory / "queues"), call(lib().ps_map_open, text(b.memory), 0)), [])
    _keep_way(engine, view, path, end, program)


def _keep_way(engine: Engine, view: Any, path: Path, end: Any, program: int) -> None:
    """Remember what its way is made of. A CNI plugin's devices are kept as they are now, ours as we make them."""
    b = engine.blueprint
    host = networks.device(engine.ifindex)
    inside = namespaces.run_in(path, lambda: networks.device(networks.index_of(b.device)))
    ours = not b.interface
    made = Made(
        b.slot, engine.link, path, None if b.pod else path, engine.ifindex,
        replace(
            host, name=networks.engine_device(b.slot) if ours else host.name, up=True, offloads=frozenset(),
            mtu=view.mtu if ours else host.mtu, mac=bytes(view.gateway_mac)[:6], master=0 if ours else host.master,
        ),
        replace(inside, up=True, arp=False, offloads=frozenset(), mtu=view.mtu if ours else inside.mtu, mac=bytes(view.mac)[:6]),
        end, program,
    )  # fmt: skip
    engine.way = Way(engine.director, made)


def _readable(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def attend(engine: Engine, changed: Changed) -> None:
    """Answer the engine's datapath processes until `destroy` or `let_go`."""
    assert engine.listener is not None
    assert engine.shared is not None
    engine.attachments = Attachments(engine.listener, engine.shared, changed)


def _listen(path: Path) -> socket.socket:
    # To be reached from inside the directory alone, also by a datapath that has given up its privileges.
    path.parent.parent.chmod(0o700)
    path.parent.chmod(0o711)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    path.chmod(0o600)  # before it is another's: then it takes a right more
    os.chown(path, NOBODY, NOBODY)
    listener.listen(4)
    return listener


def spawn(b: Blueprint) -> Process:
    """Start the engine's init in its namespace, in a session of its own: the agent's end is not its end. Blocks."""
    cgroup = cgroups.limited(b.namespace, b.memory_bytes)
    namespace = os.open(namespaces.NAMESPACES / b.namespace, os.O_RDONLY | os.O_CLOEXEC)

    def prepare() -> None:
        # Before init exists: what it forks at once must be limited too.
        if cgroup is not None:
            with suppress(OSError):
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        namespaces.enter(namespace)

    command = [str(abi.native("packetstack-init")), "--log", str(b.directory / "log")]
    command += ["--datapath", str(builds.of(b.arena.parent, b.shard))]
    command += ["--socket", str(b.directory / "engine.sock")]
    command += ["--supervisor", sys.executable, "-P", "-m", "packetstack_engine.main", "--directory", str(b.directory)]
    try:
        with (b.directory / "log").open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare,
            )
        return Process(child.pid, child)
    except OSError as e:
        raise AgentError(f"engine {b.slot}: cannot start {command[0]}: {e.strerror}") from None
    finally:
        os.close(namespace)


def start_again(engine: Engine) -> None:
    """A new init. A datapath that still serves goes on until its successor takes over. Blocks."""
    if engine.way is not None:
        engine.way.keep_name()
    if engine.init is not None:
        engine.init.signal(signal.SIGKILL)
        engine.init.wait(2.0)
        engine.init.close()
    if not engine.ready:
        processes.clear(namespaces.NAMESPACES / engine.blueprint.namespace)
    engine.init = spawn(engine.blueprint)


def populated(engine: Engine) -> bool:
    """Whether any process is in its namespace. Blocks."""
    try:
        return bool(processes.in_namespace(engine.blueprint.place()))
    except AgentError:
        return False


def probe(engine: Engine) -> None:
    """Send a packet to each queue; the engine that gets them counts them as markers."""
    call(lib().ps_probe, engine.fence)


def end_orphans(engine: Engine) -> None:
    """Kill what earlier inits of the engine have started. Blocks."""
    if engine.init is not None:
        processes.clear(namespaces.NAMESPACES / engine.blueprint.namespace, engine.init.pid)


def end_processes(engine: Engine) -> None:
    """End init and all that it has started; those that are killed and do not end are left. Blocks for 7 s at most."""
    if engine.init is not None:
        engine.init.end()
        engine.init = None
    processes.clear(namespaces.NAMESPACES / engine.blueprint.namespace)


def destroy(engine: Engine) -> None:
    """End the processes and remove all that `make` made; whatever is missing is fine. Blocks.

    Nobody may use the engine's memory any more, and its `attachments` are closed. The processes of a pod are the
    kubelet's to end; one that shall end waits until its socket is gone.
    """
    b = engine.blueprint
    shared, fds = engine.shared, engine.fds
    engine.view = engine.fds = engine.shared = None
    if not b.pod:
        end_processes(engine)
    if engine.director is not None:
        error = ffi.new("struct ps_error *")
        lib().ps_director_engine(engine.director, b.slot, 0, error)
        lib().ps_engine_detach(engine.director, text(engine.link), error)
    if shared is not None:
        lib().ps_unmap(shared.view)
    if fds is not None:
        engine.files += [fds.engine, fds.map, fds.umem, fds.egress, *fds.sockets, *fds.wake, *fds.woken]
    elif shared is not None:
        engine.files += [*shared.files[2:4], *shared.rings]
    _close(engine)
    networks.remove_engine_link(b.slot, b.owner)
    b.memory.unlink(missing_ok=True)
    if b.pod:
        # The directory is mounted in the pod: it goes when the pod has gone.
        for name in ("queues", "engine.sock"):
            (b.directory / name).unlink(missing_ok=True)
        return
    namespaces.remove(namespaces.NAMESPACES / b.namespace)
    shutil.rmtree(b.directory, ignore_errors=True)
    cgroups.remove(b.namespace)


def _close(engine: Engine) -> None:
    if engine.way is not None:
        engine.way.close()
        engine.way = None
    if engine.listener is not None:
        engine.listener.close()
        engine.listener = None
    # The kernel waits out a grace period, some 20 ms, for each socket: all at once take as long as one.
    fds = [fd for fd in engine.files if fd >= 0]
    engine.files.clear()
    with ThreadPoolExecutor(max(1, len(fds))) as pool:
        for closing in [pool.submit(os.close, fd) for fd in fds]:
            with suppress(OSError):
                closing.result()
