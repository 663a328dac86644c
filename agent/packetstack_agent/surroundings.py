"""Watches all that packets need of this node: the list is `preconditions` of the core.

Whatever changes wakes it, and it looks every 5 s besides: at each engine's way, and at the node's network as a whole if its
fingerprint is another one. What the agent has made it puts back, by the underlay and by each engine's way. What is the
administrator's it tells, to the journal and to the stacks that are concerned (`Managed.lacks`).
"""

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Iterator

from packetstack_agent import networks
from packetstack_agent.engines import Engine
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.surveying import survey
from packetstack_agent.threads import to_the_end
from packetstack_agent.underlay import Underlay
from packetstack_agent.ways import Way
from packetstack_core import preconditions
from packetstack_core.preconditions import Lack
from packetstack_core.reasons import EventReason

LOOK_SECONDS = 5.0
"""How often all of it is looked at when nothing tells that it changed; the node, if its fingerprint has changed."""
READ_SECONDS = 60.0
"""How often the node is read whatever its fingerprint says."""
GLANCE_SECONDS = 1.0
"""How often that is looked at of which nothing tells: whether programs are attached, and names of namespaces."""
GATHER_SECONDS = 0.05
"""From the first change until it is looked at: changes come in showers."""
SHARE = 4
"""Looks take at most one part of this and one of a core, however much changes."""


class Watched:
    """What the kernel tells of: this node's network, and those of the engines."""

    def __init__(self) -> None:
        self._node = networks.change_socket()
        self._epoll = select.epoll()
        self._epoll.register(self._node, select.EPOLLIN)
        self._ways: dict[int, Way] = {}
        self._changed = asyncio.Event()

    def close(self) -> None:
        self._epoll.close()
        self._node.close()

    def also(self, ways: Iterator[Way]) -> None:
        """These engines', and no others."""
        now = {way.watcher.fileno(): way for way in ways if not way.closed}
        for fd, way in now.items():
            if self._ways.get(fd) is not way:
                with contextlib.suppress(FileExistsError):
                    self._epoll.register(fd, select.EPOLLIN)
        self._ways = now  # a socket that is closed has left by itself

    async def wait(self, seconds: float) -> bool:
        """Until something changes, or for so long; whether something has."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._epoll.fileno(), self._changed.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        finally:
            loop.remove_reader(self._epoll.fileno())
        changed = self._changed.is_set()
        self._changed.clear()
        return changed

    def drain(self) -> None:
        """Forget all news: what comes from now on is another change."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._node.fileno():
                _drain(self._node)
            elif way := self._ways.get(fd):
                way.drain()


class SurroundingsWatch:
    """Looks after what `stacks` need of the node."""

    def __init__(self, stacks: Stacks, journal: Journal, underlay: Underlay) -> None:
        self._stacks = stacks
        self._journal = journal
        self._underlay = underlay
        self._read_at = -READ_SECONDS
        """When the node was read last."""
        self._fingerprint = b""
        """Of the node, before it was read; empty if it must be read again."""
        self._masters: dict[int, int] = {}
        """Whose port each device was then."""

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        with contextlib.closing(Watched()) as watched:
            looked, took = 0.0, 0.0
            while True:
                changed = await watched.wait(GLANCE_SECONDS)
                if changed:
                    await asyncio.sleep(max(GATHER_SECONDS, SHARE * took))
                watched.drain()
                began = time.monotonic()
                if changed or began - looked > LOOK_SECONDS or not self._unchanged():
                    await self.look(thorough=changed)
                    looked = time.monotonic()
                    took = looked - began
                watched.also(way for _, _, way in self._ways())

    def _ways(self) -> Iterator[tuple[Managed, Engine, Way]]:
        for managed in list(self._stacks.values()):
            for engine in list(managed.engines.values()):
                if engine.way is not None and not engine.removing:
                    yield managed, engine, engine.way

    def _unchanged(self) -> bool:
        return self._underlay.unchanged() and all(way.closed or way.unchanged() for _, _, way in self._ways())

    async def look(self, thorough: bool = True) -> None:
        """Put back what is ours, and find out what else is lacking. Not `thorough`: where it is not as at the last look."""
        fresh, now = await self._underlay.fingerprint(), time.monotonic()
        known = not thorough and fresh and fresh == self._fingerprint and now - self._read_at < READ_SECONDS
        broken: list[Lack] = []
        if not known:
            self._fingerprint, self._read_at = fresh, now
            broken = await self._underlay.put_back()
            self._masters = await asyncio.to_thread(networks.masters)
        restored = await self._look_at_ways()
        if not known:
            await self._find_lacks(broken)
        if broken or restored:
            self._fingerprint = b""

    async def _look_at_ways(self) -> bool:
        """Each engine's way; whether something of one was put back or is lacking."""
        some = False
        for managed, engine, way in self._ways():
            with self._journal.going_on(managed.stack.name, f"engine {engine.slot}"):
                for said in await to_the_end(way.look, self._masters):
                    self._journal.event(managed.stack.name, EventReason.PATH_RESTORED, said)
                    some = True
            some = some or bool(way.lacks)
        return some

    async def _find_lacks(self, broken: list[Lack]) -> None:
        """What each stack lacks, told once."""
        wanted = {name: managed.stack.prefixes() for name, managed in self._stacks.items()}
        uplinks = self._underlay.uplinks()
        around = await to_the_end(survey, [p for prefixes in wanted.values() for p in prefixes], uplinks)
        for name, prefixes in wanted.items():
            managed = self._stacks.get(name)
            if managed is None:
                continue
            lacks = [*broken, *(lack for e in managed.engines.values() if e.way is not None for lack in e.way.lacks)]
            self._tell(name, managed, tuple(lacks + preconditions.lacking(around, prefixes)))

    def _tell(self, name: str, managed: Managed, lacks: tuple[Lack, ...]) -> None:
        before, managed.lacks = managed.lacks, lacks
        for lack in lacks:
            if lack not in before:
                self._journal.event(name, lack.reason, lack.message)
        for lack in before:
            if not any((lack.what, lack.about) == (other.what, other.about) for other in lacks):
                self._journal.event(name, EventReason.PATH_OPEN, f"{lack.about}: is as packets need it again")
        if before != lacks:
            managed.changed.set()


def _drain(watcher: socket.socket) -> None:
    while True:
        try:
            watcher.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # an overflow: much has changed
            continue
