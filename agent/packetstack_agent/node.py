"""What the agent keeps about the node as a whole, and how all of it is removed, also after a crash."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from packetstack_agent import devices, engines, namespaces, networks
from packetstack_agent.namespaces import NAMESPACES

DEFAULT_RUN_DIRECTORY = Path("/run/packetstack")


@dataclass
class Record:
    """What must be known to clean up after a dead agent. Written before the thing it names is made."""

    uplinks: list[str] = field(default_factory=list)
    engines: dict[str, str] = field(default_factory=dict)
    """Slot -> namespace."""
    proxied: dict[str, list[str]] = field(default_factory=dict)
    """Device -> addresses answered for."""
    sysctls: dict[str, str] = field(default_factory=dict)
    """Values to put back."""
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stacks as last applied."""
    last_slot: int = 0


class RunDirectory:
    """The directory that names this agent's things, and its record of them."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.record = Record()
        self._saving = threading.Lock()
        self.owner = f"packetstack {self.path}"
        with suppress(FileNotFoundError):
            self.record = Record(**json.loads(self._file.read_text()))

    @property
    def _file(self) -> Path:
        return self.path / "state.json"

    @property
    def socket(self) -> Path:
        """Where the agent listens."""
        return self.path / "agent.sock"

    @property
    def pins(self) -> Path:
        """The BPF file system."""
        return self.path / "bpf"

    def engine(self, slot: int) -> Path:
        """An engine's directory."""
        return self.path / "engines" / str(slot)

    def stack(self, name: str) -> Path:
        """A stack's directory."""
        return self.path / "stacks" / name

    def namespace(self, stack: str, slot: int) -> str:
        """Name of an engine's network namespace; two agents of one machine never choose the same."""
        mark = "" if self.path == DEFAULT_RUN_DIRECTORY else sha256(bytes(self.path)).hexdigest()[:6] + "-"
        return f"pkst-{mark}{stack}-{slot}"

    def save(self) -> None:
        """Write the record, whole or not at all. Called by the event loop and by worker threads."""
        with self._saving:
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = self._file.with_suffix(".new")
            # Without indent: then the encoder is C, and no other thread changes the record meanwhile.
            fresh.write_text(json.dumps(vars(self.record)))
            fresh.replace(self._file)

    def next_slot(self) -> int:
        """A slot that was not used for the longest time: packets may still carry an old one."""
        for step in range(1, 1024):
            slot = (self.record.last_slot + step - 1) % 1023 + 1
            if str(slot) not in self.record.engines:
                self.record.last_slot = slot
                return slot
        raise RuntimeError("no engine slot is free")


def clean(run: RunDirectory) -> list[str]:
    """Remove everything that the record names, whoever is dead or alive; returns what was removed. May be repeated."""
    removed: list[str] = []
    record = run.record
    for pid in processes_naming(run.path / "engines"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for slot, name in list(record.engines.items()):
        deadline = time.monotonic() + 3
        while (left := processes_of(NAMESPACES / name)) and time.monotonic() < deadline:
            for pid in left:  # each time: one may have been forked by another before that one died
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        networks.remove_engine_link(int(slot), run.owner)
        namespaces.remove(NAMESPACES / name)
        engines.remove_cgroups(name)
        removed.append(f"engine {slot}")
    for device, addresses in record.proxied.items():
        networks.answer_no_more(device, [ip_address(a) for a in addresses])
    for name, value in record.sysctls.items():
        with suppress(OSError):
            devices.set_sysctl(name, value)
    networks.remove_pair(run.owner)
    if run.pins.is_mount():
        # Links of uplinks go with their pins; the programs are detached when the last reference is gone.
        for pin in run.pins.iterdir():
            with suppress(PermissionError):  # the kernel's own debug files
                pin.unlink()
        namespaces.unmount(run.pins)
        removed.append("programs and maps")
    if run.path.is_dir():
        for name in ("state.json", "state.new", "agent.sock", "agent.pid"):
            (run.path / name).unlink(missing_ok=True)
        for name in ("engines", "stacks", "bpf"):
            shutil.rmtree(run.path / name, ignore_errors=True)
        with suppress(OSError):
            run.path.rmdir()
    run.record = Record()
    return removed


def processes_of(namespace: Path) -> list[int]:
    """Processes in a network namespace; none when it does not exist."""
    try:
        wanted = namespace.stat()
        own = Path("/proc/self/ns/net").stat()
    except OSError:
        return []
    if (wanted.st_ino, wanted.st_dev) == (own.st_ino, own.st_dev):
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                there = (entry / "ns/net").stat()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if (there.st_ino, there.st_dev) == (wanted.st_ino, wanted.st_dev) and state not in "ZX":
                    found.append(int(entry.name))
    return found


def processes_naming(directory: Path) -> list[int]:
    """Processes with a file of this directory on their command line: engines whose record or namespace is lost."""
    mark = bytes(directory) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if mark in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found
