"""The datapath processes of an engine: who serves its queues, who takes over next.

One conversation per process on the engine's socket, as include/packetstack/abi.h describes it. The end of the
connection says that the process is gone, every thread of it: only then may another one touch its queues.
"""

import array
import asyncio
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from packetstack_agent import builds, processes
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import constant, ffi, lib
from packetstack_core import shards

NOBODY = 65534
HELLO_SECONDS = 5.0
ANSWER_SECONDS = 10.0
"""Time for mapping the shared memory, or starting the cores, on a busy machine."""
STOP_SECONDS = 0.5
CONVERSATIONS = 8
"""Open at once; more than a datapath, its successor and a few that are ending is nonsense."""
MOST_FDS = 6 + 64 + 2 * 32
REFUSED_SECONDS = 0.25
"""How long a process that was not let in takes the place of one that might be: so often, and no oftener, it may ask."""
MOST_MESSAGES = 16
"""A process that serves says two things at the most in its life. One that never stops talking has lost its mind."""

Changed = Callable[[str], None]
"""Called with "ready", "resumed", "connected" (to the connection list), "died", "lost" or a reason for refusing."""


@dataclass(frozen=True)
class Connections:
    """The connection list of two sets whose traffic is mirrored."""

    fd: int
    numbers: tuple[int, int, int, int]
    """Buckets, entries, index slots, places for clients: see PS_MSG_CONNECTIONS."""


@dataclass(eq=False)
class Link:
    """A datapath process that serves queues."""

    pid: int
    pidfd: int
    generation: int
    connection: socket.socket
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process touches the queues no more."""
    connections: Connections | None = None
    """What it was told last to use."""
    asked: int = 0
    """Answers to that which are still to come."""

    def kill(self) -> None:
        """The process, and no other that may have its number later."""
        if self.pidfd >= 0:
            with suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


@dataclass
class Shared:
    """What datapath processes of an engine are given."""

    slot: int
    cores: int
    pin: tuple[int, ...] | None
    """CPU of each core; empty: none. None: the CPUs that the process has for itself, if it has as many as cores."""
    files: tuple[int, int, int, int, int]
    """Its set's arena and the map of that, engine file and its map, its set's configuration; the files to read alone."""
    rings: list[int]
    """UMEM, a socket per queue, a socket per core that wakes it, the core's end of each. Empty while only a running
    datapath has them."""
    queues: int
    view: Any
    """`struct ps_engine *`."""
    shard: str
    """Layout of its set's shards."""
    pod_uid: str = ""
    """UID of the pod whose processes alone may serve it; empty: processes that the agent has started."""
    connections: Connections | None = None
    """While traffic is mirrored; the descriptor is the agent's."""


class Attachments:
    """Listens on an engine's socket. All methods run on the event loop."""

    def __init__(self, listener: socket.socket, shared: Shared, changed: Changed) -> None:
        self.serving: Link | None = None
        self._ending: Link | None = None
        """Served, or was let in, and shall do so no more. Until it has stopped it may touch the queues."""
        self._closed = False
        """Nobody is let in any more."""
        self._listener = listener
        self._shared = shared
        self.pause_seconds = 0.0
        """How long nobody served while the last process followed one that could be told to stop."""
        self.refused = ""
        """Why the last process that was not let in was not."""
        self.foreign = ""
        """Shard layout of the last process that was not let in for that; empty as soon as another serves."""
        self._report = changed
        self._happened = asyncio.Event()
        self._generation = int(shared.view.generation)
        self._turn = asyncio.Lock()
        """Held while one process follows another."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    async def end(self) -> None:
        """Kill the process that serves, let no other in, and wait until it is gone: then its queues are nobody's."""
        self._report = _say_nothing
        self._accepting.cancel()
        self._closed = True
        self._kill()
        async with self._turn:  # whoever was being let in is in now, or is not
            for link in self._kill():
                await _until_stopped(link)

    def _kill(self) -> list[Link]:
        """All that may touch the queues."""
        there = [link for link in (self.serving, self._ending) if link is not None]
        for link in there:
            link.kill()
        return there

    async def close(self) -> None:
        """Hang up. The processes go on without us."""
        self._report = _say_nothing
        self._accepting.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(self._accepting, *self._tasks, return_exceptions=True)

    def _changed(self, what: str) -> None:
        self._report(what)
        self._happened.set()
        self._happened = asyncio.Event()

    async def until(self, true: Callable[[], bool], seconds: float) -> bool:
        """Wait for something that changes with who serves; False if it does not come true in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not true():
                    await self._happened.wait()
        return true()

    def connect(self, connections: Connections | None) -> None:
        """Whoever serves, or comes later, uses this connection list from now on; None: none. See `connected`."""
        self._shared.connections = connections
        if self.serving is not None:
            self._tell(self.serving)

    @property
    def connected(self) -> bool:
        """Whether the process that serves uses the present connection list."""
        link = self.serving
        return link is not None and not link.asked and link.connections is self._shared.connections

    def _tell(self, link: Link, anew: bool = False) -> None:
        """Tell it the present connection list, if it does not know it; `anew`: nobody knows what it knows."""
        wanted = self._shared.connections
        if link.connections is wanted and not anew:
            return
        message = _message("PS_MSG_CONNECTIONS")
        if wanted is not None:
            message.buckets, message.entries, message.index_slots, message.clients = wanted.numbers
        with suppress(OSError):  # it has ended: its successor is told
            _send_with(link.connection, message, () if wanted is None else (wanted.fd,))
        link.connections = wanted
        link.asked += 1

    def _answered(self, link: Link, message: Any) -> None:
        """It uses the list that it was told, or says why not."""
        link.asked -= 1
        if problem := bytes(ffi.buffer(message.text)).rstrip(b"\0").decode(errors="replace"):
            self._changed(f"datapath {link.pid} cannot use the connection list: {problem}")
            link.kill()  # its successor is told again
            return
        self._changed("connected")

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            if len(self._tasks) >= CONVERSATIONS:
                connection.close()
                await asyncio.sleep(REFUSED_SECONDS)  # who asks without end keeps the agent from nothing
                continue
            task = asyncio.create_task(self._talk(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _talk(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        fds: list[int] = []
        pidfd = -1
        link: Link | None = None
        try:
            pidfd = os.pidfd_open(pid)
            hello = await _receive(connection, HELLO_SECONDS, fds)
            if hello is not None and hello.kind == constant("PS_MSG_LOOK") and self._may_look(pid, uid):
                # The kernel maps no map by a descriptor that is for reading alone. The supervisor may what a datapath may.
                _send_with(connection, _message("PS_MSG_VIEW"), self._shared.files[2:4])
                return
            ours = hello is not None and self._may_serve(pid, uid, int(hello.generation))
            if not ours or hello.kind != constant("PS_MSG_HELLO"):
                self._changed(
                    f"process {pid} of user {uid} was not let in at its socket: it is no datapath of this engine, which goes on"
                )
                connection.close()
                await asyncio.sleep(REFUSED_SECONDS)
                return
            if hello.layout != constant("PS_LAYOUT_VERSION"):
                reason = f"LayoutMismatch: datapath has layout {hello.layout}, agent {constant('PS_LAYOUT_VERSION')}"
                _send(connection, "PS_MSG_REFUSED", reason)
                self.refused = reason
                self._changed(reason)
                return
            if (shard := builds.name_of(hello.shard)) != self._shared.shard:
                here = shards.number(self._shared.shard)
                reason = f"LayoutMismatch: datapath has shard layout {shards.number(shard)}, its set of engines {here}"
                _send(connection, "PS_MSG_REFUSED", reason)
                self.refused, self.foreign = reason, shard
                self._changed(reason)
                return
            link = Link(pid, pidfd, int(hello.generation), connection)
            if not (self._resume(link, fds) if link.generation else await self._follow(link)):
                return
            # It has touched the queues, or may have: only the end of its connection says that it does so no more.
            said = 0
            while (message := await _receive(connection)) is not None:
                if message.kind == constant("PS_MSG_CONNECTED") and link.asked > 0:
                    self._answered(link, message)
                    continue
                if message.kind == constant("PS_MSG_STOPPED"):
                    link.stopped.set()
                said += 1
                if said > MOST_MESSAGES:
                    link.kill()
                    await asyncio.sleep(0.01)
        except OSError:
            return  # it died meanwhile; its successor will ask
        except AgentError as e:  # the one before it lives: its queues are not free
            if link is not None:
                link.kill()  # its init starts another, which asks again
            self.refused = str(e)
            self._changed(self.refused)
        finally:
            connection.close()
            if link is not None:
                link.pidfd = -1
                link.stopped.set()
                if self._ending is link:
                    self._ending = None
                if self.serving is link:
                    self.serving = None
                    self._changed("died")
            for fd in (*fds, pidfd):
                if fd >= 0:
                    os.close(fd)

    def _may_serve(self, pid: int, uid: int, generation: int) -> bool:
        # Outside of a pod one that serves has given up its privileges, and a new one has not yet.
        return self._may_look(pid, uid) and (bool(self._shared.pod_uid) or uid == 0 or generation != 0)

    def _may_look(self, pid: int, uid: int) -> bool:
        # Outside of a pod nobody else, nor user nobody from elsewhere than the engine's directory, reaches this socket.
        return uid in (0, NOBODY) and (not self._shared.pod_uid or processes.in_pod(self._shared.pod_uid, pid))

    def _resume(self, link: Link, fds: list[int]) -> bool:
        """A process that served before this agent came. It brings what an earlier agent gave it."""
        s = self._shared
        if self._closed or (self.serving or self._ending) is not None or link.generation != s.view.generation:
            return False  # the one before it is not gone yet, or it is not the one: it asks again
        if not s.rings:
            if wrong := _unknown(s, fds):
                self._changed(f"refused process {link.pid}: {wrong}, so that it is not the datapath that served")
                return False
            s.rings = fds[:]
            fds.clear()
        self.serving = link
        self._tell(link, anew=True)
        self._changed("resumed")
        return True

    async def _follow(self, link: Link) -> bool:
        """A new process: takes over from the one that serves, or from a dead one. AgentError if that one does not end.

        False if it was not let in, so that it may be forgotten.
        """
        s = self._shared
        if not s.rings:
            _send(link.connection, "PS_MSG_REFUSED", "the engine's descriptors are lost; it is being made again")
            self._changed("lost")
            return False
        self._generation += 1
        link.generation = self._generation
        message = _message("PS_MSG_ATTACH")
        message.slot, message.queues, message.cores, message.generation = s.slot, s.queues, s.cores, link.generation
        pin = processes.own_cpus(link.pid, s.cores) if s.pin is None else s.pin
        for i in range(len(message.pin)):
            message.pin[i] = pin[i] if i < len(pin) else -1
        _send_with(link.connection, message, (*s.files, *s.rings))
        if not await self._said(link, "PS_MSG_PREPARED"):
            return False
        self._tell(link)
        async with self._turn:
            if self._closed:
                return False
            before = self.serving or self._ending
            self.serving, self._ending = None, before
            began = time.monotonic()
            if before is not None:
                await stop(before)
            self._ending = link
            s.view.generation = link.generation
            _send(link.connection, "PS_MSG_GO")
            if not await self._said(link, "PS_MSG_READY"):
                link.kill()  # it may hang, and must not wake up later
                self._changed("died")
                return True
            if before is not None:
                self.pause_seconds = time.monotonic() - began
            self.serving, self._ending, self.foreign = link, None, ""
            self._tell(link)  # of what has come meanwhile
            self._changed("ready")
        return True

    async def _said(self, link: Link, kind: str) -> bool:
        while (message := await _receive(link.connection, ANSWER_SECONDS)) is not None:
            if message.kind != constant("PS_MSG_CONNECTED") or not link.asked:
                break
            self._answered(link, message)
        return message is not None and message.kind == constant(kind)


def _say_nothing(_: str) -> None:
    """Whoever hangs up knows why."""


async def stop(link: Link) -> None:
    """Until this process touches the queues no more; it is killed if it does not stop by itself."""
    with suppress(OSError):
        _send(link.connection, "PS_MSG_STOP")
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await link.stopped.wait()
    except TimeoutError:
        link.kill()
        await _until_stopped(link)


async def _until_stopped(link: Link) -> None:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await link.stopped.wait()
    except TimeoutError:
        raise AgentError(
            f"datapath {link.pid}: was killed and has not ended, so that no other may have its queues; see its state in ps"
        ) from None


def _unknown(shared: Shared, fds: Sequence[int]) -> str:
    """What of the descriptors is not what the engine was given; empty: all is."""
    error = ffi.new("struct ps_error *")
    known = lib().ps_queues_known(shared.view, ffi.new("int[]", list(fds) or 1), len(fds), error) == 0
    return "" if known else str(ffi.string(error.text).decode())


def _message(kind: str, reason: str = "") -> Any:
    message = ffi.new("struct ps_message *")
    message.kind = constant(kind)
    message.layout = constant("PS_LAYOUT_VERSION")
    message.text = reason.encode()[: ffi.sizeof(message.text) - 1]
    return message


def _send(connection: socket.socket, kind: str, reason: str = "") -> None:
    """Small and rare: there is always room for it, or the process is beyond help."""
    connection.send(bytes(ffi.buffer(_message(kind, reason))), socket.MSG_NOSIGNAL)


def _send_with(connection: socket.socket, message: Any, fds: Sequence[int]) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([bytes(ffi.buffer(message))], control, socket.MSG_NOSIGNAL)


async def _receive(connection: socket.socket, seconds: float | None = None, fds: list[int] | None = None) -> Any:
    """One message, None at the end of the connection or when there is none in time. Descriptors go into `fds`.

    One of another size is of no kind: who sends it is still there.
    """
    size = ffi.sizeof("struct ps_message")
    try:
        async with asyncio.timeout(seconds):
            while True:
                await asyncio.sleep(0)  # who has always something to say holds up nobody else
                try:
                    data, control, _, _ = connection.recvmsg(
                        size + 1, socket.CMSG_SPACE(4 * MOST_FDS), socket.MSG_CMSG_CLOEXEC
                    )
                    break
                except BlockingIOError:
                    await _readable(connection)
    except (OSError, TimeoutError):
        return None
    came = array.array("i")
    for level, kind, content in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            came.frombytes(content[: len(content) - len(content) % 4])
    if fds is not None:
        fds.extend(came)
    else:
        for fd in came:
            os.close(fd)
    if not data:
        return None
    message = ffi.new("struct ps_message *")
    if len(data) == size:
        ffi.memmove(message, data, size)
    return message


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection.fileno())
