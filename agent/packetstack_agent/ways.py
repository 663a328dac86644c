"""The way of packets between this node and one engine: both ends of its interface, the programs on them, its namespace's name.

It is kept as it was made. Whoever takes something of it away changes devices of ours, so all of it is put back.
"""

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from packetstack_agent import devices, namespaces, networks
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import call, lib, text
from packetstack_core.preconditions import MEANWHILE, Device, Lack, Part, Precondition, differences


@dataclass(frozen=True)
class Made:
    """An engine's way as it was made."""

    slot: int
    link: str
    """Name of the pin of its program."""
    place: Path
    """Its network namespace."""
    name: Path | None
    """The name that the agent has given to that; None for a pod's."""
    host_index: int
    host: Device
    inside: Device
    end: Any
    """`struct ps_end *`: what its programs know of it."""
    program: int
    """Of the host end. A descriptor that is the engine's."""


class Way:
    """Of one engine; from its end on, `close` was called."""

    def __init__(self, director: Any, made: Made) -> None:
        """`director`: a `struct ps_director *`. AgentError or OSError if the namespace cannot be entered. Blocks."""
        self._director = director
        self._made = made
        self._namespace = os.open(made.place, os.O_RDONLY | os.O_CLOEXEC)
        self._here = devices.control()
        self.lacks: tuple[Lack, ...] = ()
        """What could not be put back at the last look."""
        self.lost = ""
        """Why the engine has to be made again; empty while it need not."""
        self.closed = False
        self._using = threading.Lock()
        """Held while it is looked at: until then its descriptors stay."""
        try:
            self._inside, self.watcher, self._index = namespaces.run_in(made.place, partial(_enter, made.inside.name))
        except BaseException:
            os.close(self._namespace)
            self._here.close()
            raise

    def close(self) -> None:
        """Let go of the namespace."""
        with self._using:
            if not self.closed:
                self.closed = True
                os.close(self._namespace)
                for each in (self._here, self._inside, self.watcher):
                    each.close()

    def drain(self) -> None:
        """Forget the news of its namespace's devices."""
        with suppress(OSError):  # there are no more, or there were too many
            while not self.closed and self.watcher.recv(65536):
                pass

    def unchanged(self) -> bool:
        """Whether what tells of no change is as it was: the engine's program and the name of its namespace. Cheap."""
        program = lib().ps_link_device(self._director, text(self._made.link))
        return int(program) == self._index and (self._made.name is None or self._is_named(self._made.name))

    def look(self, masters: Mapping[int, int]) -> list[str]:
        """Put back what is not as it was made; a line for each. `masters`: whose port each device of this node is. Blocks.

        What cannot be put back is in `lacks`, or in `lost`.
        """
        with self._using:
            return [] if self.closed else self._look(masters)

    def _look(self, masters: Mapping[int, int]) -> list[str]:
        done: list[str] = []
        lacks: list[Lack] = []
        steps: tuple[tuple[Precondition, Callable[[], str]], ...] = (
            (Precondition.NAMESPACE, self.keep_name),
            (Precondition.HOST_END, partial(self._keep_host_end, masters)),
            (Precondition.HOST_PROGRAM, self._keep_host_program),
            (Precondition.ENGINE_END, self._keep_inside),
            (Precondition.ENGINE_END, self._keep_program),
        )
        for what, step in steps:
            try:
                if said := step():
                    done.append(f"engine {self._made.slot}: {said}")
            except (AgentError, OSError) as e:
                # Without a name it serves on; all else is in the way of packets.
                problem = f"{e}; {what.meanwhile}; it is tried again"
                lacks.append(Lack(what, f"engine {self._made.slot}", problem, lost=what is not Precondition.NAMESPACE))
            if self.lost:
                break
        self.lacks = tuple(lacks)
        return done

    def keep_name(self) -> str:
        """The name of its namespace is there, or AgentError; returns what was wrong. Blocks."""
        name = self._made.name
        if name is None or self._is_named(name):
            return ""
        namespaces.give_name(self._namespace, name)
        return f"its network namespace had lost its name, {name}, and has it again; packets went on"

    # ---- its parts

    def _is_named(self, name: Path) -> bool:
        try:
            return os.path.samestat(name.stat(), os.fstat(self._namespace))
        except OSError:
            return False

    def _keep_host_end(self, masters: Mapping[int, int]) -> str:
        made, index = self._made.host, self._made.host_index
        seen = devices.look(self._here, index)
        if seen is None:  # the watchdog sees that too
            self.lost = f"interface {made.name} is gone"
            return ""
        changed = differences(replace(seen, master=masters.get(index, 0)), made)
        if "master" in changed:
            networks.release(index)
        return self._put_back(self._here, seen, made, changed)

    def _keep_host_program(self) -> str:
        if call(lib().ps_host_attach, self._made.host_index, self._made.program) == 0:
            return ""
        return (
            f"the program on {self._made.host.name} (tc filter) was gone and is there again; meanwhile packets went on through "
            "the kernel, and handovers waited"
        )

    def _keep_inside(self) -> str:
        seen = devices.look(self._inside, self._index)
        if seen is None:
            self.lost = f"its interface {self._made.inside.name} is gone from its namespace"
            return ""
        return self._put_back(self._inside, seen, self._made.inside, differences(seen, self._made.inside))

    def _keep_program(self) -> str:
        link = text(self._made.link)
        if lib().ps_link_device(self._director, link) == self._index:
            return ""
        device = self._made.inside.name
        os.close(call(lib().ps_engine_attach, self._director, self._namespace, text(device), link, self._made.end))
        return f"the XDP program on its {device} was gone and is there again; {MEANWHILE['up']}"

    def _put_back(self, control: socket.socket, seen: Device, made: Device, changed: Mapping[Part, str]) -> str:
        if not changed:
            return ""
        devices.put_back(control, seen, made, changed)
        worst = next(harm for part, harm in MEANWHILE.items() if part in changed)
        return f"{made.name} {', '.join(changed.values())}, and is as it was made again; {worst}"


def _enter(device: str) -> tuple[socket.socket, socket.socket, int]:
    """In the engine's namespace: a socket to look at its interface by, one that tells of changes, the interface's index."""
    return devices.control(), networks.change_socket(), networks.index_of(device)
