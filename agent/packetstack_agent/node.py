"""What the agent keeps about the node as a whole, and how all of it is removed, also after a crash."""

import json
import os
import shutil
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from packetstack_agent import cgroups, devices, firewall, namespaces, neighbours, networks, processes
from packetstack_agent.errors import AgentError
from packetstack_agent.namespaces import NAMESPACES
from packetstack_core.kinds import pod_directory
from packetstack_core.verbs import Json

DEFAULT_RUN_DIRECTORY = Path("/run/packetstack")
RECORD_LAYOUT = 3
"""Layout of state.json. A file of another layout is not read, and left as it is."""
_BEFORE_SETS = 2
"""One that can be read, but for `sets`; `layouts.check` tells of stacks that it has."""


@dataclass
class Record:
    """What must be known to clean up after a dead agent. Written before the thing it names is made."""

    uplinks: list[str] = field(default_factory=list)
    """`interface` or `interface:role`."""
    engines: dict[str, Json] = field(default_factory=dict)
    """Slot -> `Blueprint.record`, and `state`, `init`."""
    sets: dict[str, Json] = field(default_factory=dict)
    """Stack -> its sets of engines, as `Managed.note` writes them."""
    proxied: dict[str, list[str]] = field(default_factory=dict)
    """Device -> addresses answered for."""
    sysctls: dict[str, str] = field(default_factory=dict)
    """Values to put back."""
    documents: dict[str, Json] = field(default_factory=dict)
    """Stacks as last applied."""
    tables: dict[str, Json] = field(default_factory=dict)
    """Stack -> the flow table that it follows, with its generation in `metadata`. None here: the agent plans."""
    indexes: dict[str, int] = field(default_factory=dict)
    """Stack -> its place in the flow tables."""
    pinned: dict[str, dict[str, int]] = field(default_factory=dict)
    """Stack -> bucket -> slot, where a person put it."""
    rebalanced: dict[str, bool] = field(default_factory=dict)
    """Stacks whose buckets were moved by load."""
    autoscaling: dict[str, Json] = field(default_factory=dict)
    """Stack -> what its autoscaler showed last: `autoscaling` and `conditions` of the status."""
    unhealthy: list[list[Any]] = field(default_factory=list)
    """Backends, [address, port, stack, how it is checked]. Of earlier builds [address, port] alone."""
    leaving: dict[str, str] = field(default_factory=dict)
    """Directory of a pod that has no rings any more -> its UID. It goes when the pod has gone."""
    last_slot: int = 0
    network: int = 0
    """Inode of the node's network namespace."""
    metrics_listen: str = ""
    firewall: str = "Manage"
    """Who changes the node's packet filter: `firewall.Mode`."""
    layout: int = RECORD_LAYOUT


class RunDirectory:
    """The directory that names this agent's things, and its record of them."""

    def __init__(self, path: Path, pins: Path | None = None) -> None:
        """`pins`: a directory of a BPF file system that is there; by default one is mounted below `path`."""
        self.path = path.resolve()
        self._pins = pins
        self.record = Record()
        self._saving = threading.Lock()
        self.unsaved = ""
        """Why the record could not be written, empty when it is."""
        self.owner = f"packetstack {self.path}"
        self._written = ""
        """What the file says."""
        with suppress(FileNotFoundError):
            self.record = _read(self._file)
            self._written = self._content()

    @property
    def _file(self) -> Path:
        return self.path / "state.json"

    @property
    def socket(self) -> Path:
        """Where the agent listens."""
        return self.path / "agent.sock"

    @property
    def pins(self) -> Path:
        """Where programs and maps are pinned."""
        return self._pins or self.path / "bpf"

    def engine(self, name: int | str) -> Path:
        """An engine's directory, by its slot; that of a pod by `<namespace>_<name>`."""
        return self.path / "engines" / str(name)

    def stack(self, name: str) -> Path:
        """A stack's directory."""
        return self.path / "stacks" / name

    def flow_memory(self, stack: str, number: int) -> Path:
        """Directory of a set of engines of a stack."""
        return self.stack(stack) / "sets" / str(number)

    def memory(self, directory: Path) -> Path:
        """Where the map is pinned that engines write: that of the engine, or of the set of engines, with this directory."""
        if directory.parent.name == "engines":
            return self._pin("engine", directory.name)
        return self._pin("arena", f"{directory.parents[1].name}_{directory.name}")

    def _pin(self, kind: str, name: str) -> Path:
        return self.pins / f"{kind}_{name.replace('.', '+')}"  # there the kernel takes no dot

    def remove_stack(self, name: str) -> None:
        """Its files, and the memory of its flows, of all its sets of engines. Blocks."""
        shutil.rmtree(self.stack(name), ignore_errors=True)
        for pin in self.pins.glob(self._pin("arena", name).name + "_*"):  # a name has no underscore
            pin.unlink(missing_ok=True)

    def namespace(self, stack: str, slot: int) -> str:
        """Name of an engine's network namespace; two agents of one machine never choose the same."""
        mark = "" if self.path == DEFAULT_RUN_DIRECTORY else sha256(bytes(self.path)).hexdigest()[:6] + "-"
        return f"pkst-{mark}{stack}-{slot}"

    def _content(self) -> str:
        # Without indent: then the encoder is C, and no other thread changes the record meanwhile.
        return json.dumps(vars(self.record))

    def save(self, must: bool = False) -> None:
        """Write the record, whole or not at all. Called by the event loop and by worker threads.

        What the file says already is not written again: an agent may follow another on a full disk.
        If writing fails, `unsaved` says why, and the caller of the next `save` tries again; with `must` it is an
        AgentError, for what must not be made before it is written down.
        """
        fresh = self._file.with_suffix(".new")
        with self._saving:
            try:
                content = self._content()
                if content != self._written or not self._file.exists():
                    self.path.mkdir(parents=True, exist_ok=True)
                    fresh.write_text(content)
                    fresh.replace(self._file)
                    self._written = content
                self.unsaved = ""
            except OSError as e:
                self.unsaved = f"{self._file}: cannot be written: {e.strerror}"
                with suppress(OSError):
                    fresh.unlink(missing_ok=True)  # nothing new may be left to write
        if must and self.unsaved:
            raise AgentError(self.unsaved)

    def next_slot(self) -> int:
        """A slot that was not used for the longest time: packets may still carry an old one."""
        for step in range(1, 1024):
            slot = (self.record.last_slot + step - 1) % 1023 + 1
            if str(slot) not in self.record.engines:
                self.record.last_slot = slot
                return slot
        raise RuntimeError("no engine slot is free")


def _read(path: Path) -> Record:
    try:
        content = json.loads(path.read_text())
        if content.get("layout") in (RECORD_LAYOUT, _BEFORE_SETS):
            return Record(**content | {"layout": RECORD_LAYOUT})
        problem = f"has layout {content.get('layout')}, this agent knows {RECORD_LAYOUT}"
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as e:
        problem = f"cannot be read ({e})"
    raise AgentError(f"LayoutMismatch: {path}: {problem}; start the agent that wrote it, or restore the file")


def clean(run: RunDirectory) -> list[str]:
    """Remove everything that the record names, whoever is dead or alive; returns what was removed. May be repeated."""
    removed = detach(run)
    if run.path.is_dir():
        for name in ("state.json", "state.new", "agent.sock"):
            (run.path / name).unlink(missing_ok=True)
        clear_engines(run)
        for name in ("stacks", "bpf"):
            shutil.rmtree(run.path / name, ignore_errors=True)
        # Last: by this file, and the lock on it, others see whether the agent that removes all this has ended.
        (run.path / "agent.pid").unlink(missing_ok=True)
        with suppress(OSError):
            run.path.rmdir()
    run.record = Record()
    return removed


def detach(run: RunDirectory) -> list[str]:
    """Take everything that the record names out of the kernel; files stay. Returns what was removed. May be repeated."""
    removed: list[str] = []
    record = run.record
    for pid in processes.naming(run.path / "engines"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for slot, engine in list(record.engines.items()):
        networks.remove_engine_link(int(slot), run.owner)
        if name := engine.get("namespace"):  # else its pod is the kubelet's
            processes.clear(NAMESPACES / name)
            namespaces.remove(NAMESPACES / name)
            cgroups.remove(name)
        removed.append(f"engine {slot}")
    for device, addresses in record.proxied.items():
        neighbours.answer_no_more(device, [ip_address(a) for a in addresses])
    for name, value in record.sysctls.items():
        with suppress(OSError):
            devices.set_sysctl(name, value)
    if networks.remove_pair(run.owner):
        firewall.clean()
    mounted = run.pins.is_mount()
    if mounted or (run.pins.is_dir() and run.pins.parent.is_mount()):
        # Links of uplinks go with their pins; the programs are detached when the last reference is gone.
        for pin in run.pins.iterdir():
            if pin.is_dir() and not pin.is_symlink():  # tc makes one in any BPF file system that it finds
                shutil.rmtree(pin, ignore_errors=True)
                continue
            with suppress(PermissionError):  # the kernel's own debug files
                pin.unlink()
        if mounted:
            namespaces.unmount(run.pins)
        else:
            run.pins.rmdir()
        removed.append("programs and maps")
    return removed


def clear_engines(run: RunDirectory) -> None:
    """Engines' files. The directory of a pod stays while the pod does: it is mounted there, for the next agent."""
    pods = dict(run.record.leaving)
    for engine in run.record.engines.values():
        if engine.get("pod"):
            pods[pod_directory(engine["stack"].partition(".")[0], engine["pod"])] = engine["pod_uid"]
    for directory in (run.path / "engines").glob("*"):
        for file in directory.iterdir():
            file.unlink()
        if "_" not in directory.name or (directory.name in pods and not processes.of_pod(pods[directory.name])):
            directory.rmdir()
    with suppress(OSError):
        (run.path / "engines").rmdir()
