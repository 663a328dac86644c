"""A small network in namespaces: client -- node -- server, for the demo and the tests.

    client                node                 server
    c0 10.71.1.2/24  --  up0 10.71.1.1    dn0 10.71.2.1  --  s0 10.71.2.2/24
       fd71:1::2/64          fd71:1::1        fd71:2::1          fd71:2::2/64

The node forwards. The client reaches virtual addresses, and the server SNAT addresses, by routes through the node.
Nothing of the machine is touched but the directory of named namespaces; what a dead earlier lab of the same name
left is removed first.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from packetstack_core.verbs import Json

Room = Literal["client", "node", "server"]
ROOMS: tuple[Room, ...] = ("client", "node", "server")

NODE_UPLINK = "up0"
LOCK_SECONDS = 300
LINK_ENDS: tuple[tuple[Room, str], ...] = (("client", "c0"), ("node", NODE_UPLINK), ("node", "dn0"), ("server", "s0"))
VIPS = ("192.0.2.0/24", "2001:db8:1::/64")
SNATS = ("198.51.100.0/24", "2001:db8:2::/64")

_CLONE_NEWNET = 0x40000000
_NETNS_DIR = Path("/run/netns")
_PACKETSTACK = (sys.executable, "-m", "packetstack_cli.main")
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(RuntimeError):
    """The lab could not be made, or a command in it failed: one line."""


class Lab:
    """Three network namespaces `<prefix>-client`, `-node`, `-server`; a context manager.

    `client_addresses` more addresses are given to the client (10.71.4.1, ... and fd71:4::1, ...), so that a
    generator has enough ports; `server_addresses` likewise to the server (10.71.5.1, ...).
    Processes started by `start()` are ended, and the namespaces removed, on exit, also after a failure.
    """

    def __init__(self, prefix: str = "pkl", *, client_addresses: int = 8, server_addresses: int = 4) -> None:
        self.prefix = prefix
        self.client_addresses = tuple(f"10.71.4.{n}" for n in range(1, client_addresses + 1))
        self.client_addresses6 = tuple(f"fd71:4::{n:x}" for n in range(1, client_addresses + 1))
        self.server_addresses = tuple(f"10.71.5.{n}" for n in range(1, server_addresses + 1))
        self.server_addresses6 = tuple(f"fd71:5::{n:x}" for n in range(1, server_addresses + 1))
        self.directory = Path()
        self.run_directory = Path(f"/run/packetstack-{prefix}")
        self._children: list[subprocess.Popen[str]] = []
        self._lock: socket.socket | None = None

    # ---- life

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise LabError("the lab needs root: it makes network namespaces")
        self._lock = _lock(self.prefix)
        self._remove()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-"))
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what was started and remove all. May be called twice."""
        for child in reversed(self._children):
            if child.poll() is None:
                child.terminate()
        for child in reversed(self._children):
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream:
                    stream.close()
        self._children.clear()
        self._remove()
        if self.directory != Path():
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock:
            self._lock.close()
            self._lock = None

    def _remove(self) -> None:
        """What this lab, or a dead one of the same name, has made."""
        if self.run_directory.exists():
            command = [*_PACKETSTACK, "--run-dir", str(self.run_directory), "down", "--all", "--yes"]
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
        remove_leftovers(self.prefix)

    def _make(self) -> None:
        client, node, server = (self.namespace(room) for room in ROOMS)
        _ip(None, [f"netns add {name}" for name in (client, node, server)])
        # No duplicate address detection: an address is there at once.
        for room in ROOMS:
            self.sysctl(
                room,
                {
                    "net.ipv6.conf.all.accept_dad": "0",
                    "net.ipv6.conf.default.accept_dad": "0",
                    "net.ipv4.ip_local_port_range": "2048 65000",
                    "net.core.somaxconn": "8192",
                    "net.ipv4.tcp_max_syn_backlog": "16384",
                    # A lab of thousands of flows between a handful of addresses, not an attack.
                    "net.ipv4.tcp_syncookies": "0",
                },
            )
        self.sysctl("node", {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1"})
        _ip(
            client,
            [
                "link set lo up",
                f"link add c0 txqueuelen 1000 numrxqueues 1 numtxqueues 1 type veth"
                f" peer name {NODE_UPLINK} netns {node} txqueuelen 1000 numrxqueues 1 numtxqueues 1",
            ],
        )
        _ip(
            server,
            [
                "link set lo up",
                f"link add s0 txqueuelen 1000 numrxqueues 1 numtxqueues 1 type veth"
                f" peer name dn0 netns {node} txqueuelen 1000 numrxqueues 1 numtxqueues 1",
            ],
        )
        _ip(
            client,
            [
                "link set c0 up",
                "addr add 10.71.1.2/24 dev c0",
                "addr add fd71:1::2/64 dev c0 nodad",
                *(f"addr add {address}/32 dev lo" for address in self.client_addresses),
                *(f"addr add {address}/128 dev lo nodad" for address in self.client_addresses6),
                "route add default via 10.71.1.1",
                "route add ::/0 via fd71:1::1",
            ],
        )
        _ip(
            server,
            [
                "link set s0 up",
                "addr add 10.71.2.2/24 dev s0",
                "addr add fd71:2::2/64 dev s0 nodad",
                *(f"addr add {address}/32 dev lo" for address in self.server_addresses),
                *(f"addr add {address}/128 dev lo nodad" for address in self.server_addresses6),
                "route add default via 10.71.2.1",
                "route add ::/0 via fd71:2::1",
            ],
        )
        _ip(
            node,
            [
                "link set lo up",
                f"link set {NODE_UPLINK} up",
                "link set dn0 up",
                f"addr add 10.71.1.1/24 dev {NODE_UPLINK}",
                f"addr add fd71:1::1/64 dev {NODE_UPLINK} nodad",
                "addr add 10.71.2.1/24 dev dn0",
                "addr add fd71:2::1/64 dev dn0 nodad",
                "route add 10.71.4.0/24 via 10.71.1.2",
                "route add fd71:4::/64 via fd71:1::2",
                "route add 10.71.5.0/24 via 10.71.2.2",
                "route add fd71:5::/64 via fd71:2::2",
            ],
        )
        # A virtual uplink hands over unfinished checksums and segments of 64 KB; a real one does not.
        for room, device in LINK_ENDS:
            self.run(room, "ethtool", "-K", device, "tx", "off", "tso", "off", "gso", "off", "gro", "off")
            # The ring of a veth holds 256 frames: what comes faster waits here instead of being lost.
            self.run(room, "tc", "qdisc", "replace", "dev", device, "root", "pfifo", "limit", "10000")
        # Neighbours are known before the first packet that counts.
        for address in ("10.71.1.2", "10.71.2.2", "fd71:1::2", "fd71:2::2"):
            self.run("node", "ping", "-c1", "-W5", address)

    # ---- use

    def namespace(self, room: Room) -> str:
        return f"{self.prefix}-{room}"

    def netns_path(self, room: Room) -> Path:
        return _NETNS_DIR / self.namespace(room)

    def sysctl(self, room: Room, values: dict[str, str]) -> None:
        """Set kernel variables of the room's namespace."""
        with inside(self.namespace(room)):
            for name, value in values.items():
                Path("/proc/sys", *name.split(".")).write_text(value)

    def run(
        self,
        room: Room,
        *command: str,
        check: bool = True,
        timeout_seconds: float = 60,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a room to its end; `LabError` with its last line if it fails."""
        done = subprocess.run(
            [*_entering(self.namespace(room)), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=None if env is None else {**os.environ, **env},
            check=False,
        )
        if check and done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise LabError(f"{room}: {' '.join(command)}: {said[-1] if said else f'exit code {done.returncode}'}")
        return done

    def start(
        self,
        room: Room,
        *command: str,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        stderr: int | IO[Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command in a room; it is ended with the lab."""
        # Not to outlive a killed lab.
        child = subprocess.Popen(
            [*_entering(self.namespace(room)), "setpriv", "--pdeathsig", "TERM", *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env=None if env is None else {**os.environ, **env},
        )
        self._children.append(child)
        return child

    def packetstack(self, *words: str, check: bool = True, timeout_seconds: float = 60) -> str:
        """The real command in the node, with a run directory of the lab's own; what it printed."""
        return self.run("node", *self.command(*words), check=check, timeout_seconds=timeout_seconds).stdout

    def command(self, *words: str) -> list[str]:
        """The real command with the lab's own run directory, for `run` and `start`."""
        return [*_PACKETSTACK, "--run-dir", str(self.run_directory), *words]

    def status(self, stack: str) -> Json:
        """The `status` of a stack, as `packetstack get STACK -o json` shows it."""
        status: Json = json.loads(self.packetstack("get", stack, "-o", "json"))["status"]
        return status

    def wait_for_listener(
        self, room: Room, *ports: int, server: subprocess.Popen[str] | None = None, timeout_seconds: float = 20
    ) -> None:
        """Until TCP sockets listen on all of `ports` in the room; `LabError` at once if `server` has ended."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            listening = self.run(room, "ss", "-Hltn").stdout
            open_ports = {line.split()[3].rpartition(":")[2] for line in listening.splitlines()}
            missing = [port for port in ports if str(port) not in open_ports]
            if not missing:
                return
            if server and server.poll() is not None:
                raise LabError(f"{room}: {server.args!r}: exit code {server.returncode}")
            if time.monotonic() > deadline:
                raise LabError(f"{room}: nobody listens on port {missing[0]} after {timeout_seconds:g} s")
            time.sleep(0.05)

    def device_drops(self) -> dict[str, int]:
        """Frames that the lab's own links lost, by `device.counter`; the node's engines are not among them."""
        drops: dict[str, int] = {}
        for room, device in LINK_ENDS:
            shown = self.run(room, "ip", "-j", "-s", "link", "show", "dev", device).stdout
            statistics = json.loads(shown)[0]["stats64"]
            for direction in ("rx", "tx"):
                for counter in ("dropped", "errors"):
                    drops[f"{device}.{direction}_{counter}"] = statistics[direction][counter]
            for line in self.run(room, "ethtool", "-S", device, check=False).stdout.splitlines():
                name, _, value = line.strip().partition(": ")
                if name.endswith(("_xdp_drops", "_drops", "xdp_xmit_errors", "xdp_tx_errors")) and value.isdigit():
                    drops[f"{device}.{name}"] = int(value)
            queue = json.loads(self.run(room, "tc", "-j", "-s", "qdisc", "show", "dev", device).stdout)
            drops[f"{device}.qdisc"] = sum(int(entry.get("drops", 0)) for entry in queue)
        return drops


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread is in the network namespace `namespace` meanwhile."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(_NETNS_DIR / namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def _lock(prefix: str) -> socket.socket:
    """Only one lab of a name at a time: the other is waited for. An abstract socket, so nothing is left by a crash."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock.bind(f"\0packetstack-lab-{prefix}")
        except OSError as e:
            if e.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            lock.close()
            raise LabError(f"lab {prefix}: another process has been using it for {LOCK_SECONDS} s") from None
        return lock


def remove_leftovers(prefix: str) -> None:
    """End the processes in the lab's namespaces and remove these. Does nothing when there are none."""
    names = [f"{prefix}-{room}" for room in ROOMS if (_NETNS_DIR / f"{prefix}-{room}").exists()]
    for sig in (signal.SIGTERM, signal.SIGKILL):
        pids = [pid for name in names for pid in _processes_in(name)]
        if not pids:
            break
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, sig)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(_processes_in(name) for name in names):
            time.sleep(0.02)
    for name in names:
        _ip(None, [f"netns del {name}"])


def _processes_in(namespace: str) -> list[int]:
    """Processes whose network namespace is this one."""
    try:
        wanted = (_NETNS_DIR / namespace).stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                there = (entry / "ns/net").stat()
                if state != "Z" and (there.st_ino, there.st_dev) == (wanted.st_ino, wanted.st_dev):
                    found.append(int(entry.name))
    return found


def _entering(namespace: str) -> list[str]:
    """The words before a command that make it run in the namespace; unlike `ip netns exec`, mounts stay as they are."""
    return ["nsenter", f"--net={_NETNS_DIR / namespace}", "--"]


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise LabError(f"setns: {os.strerror(error)}")


def _ip(namespace: str | None, lines: Sequence[str]) -> None:
    """`ip -batch`: all lines, in a namespace."""
    done = subprocess.run(
        [*(_entering(namespace) if namespace else ()), "ip", "-batch", "-"],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"ip ({namespace or 'machine'}): {done.stderr.strip().splitlines()[0]}")
