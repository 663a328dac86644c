"""Network namespaces: made, entered by a short-lived thread, and removed.

The calling thread's namespace never changes. `ip netns exec` is not used: it remounts /sys and hides mounts.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from packetstack_agent.errors import AgentError

T = TypeVar("T")

NAMESPACES = Path("/run/netns")

# From <sched.h> and <sys/mount.h>.
_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise AgentError(f"{what}: {os.strerror(errno)}")


def _in_thread(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1, thread_name_prefix="namespace") as thread:
        return thread.submit(call).result()


def create(name: str) -> Path:
    """Make a named network namespace, as `ip netns add` does; returns its path."""
    NAMESPACES.mkdir(parents=True, exist_ok=True)
    path = NAMESPACES / name
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o444))
    except FileExistsError:
        raise AgentError(f"network namespace {name}: exists already and is not ours; remove it first") from None

    def make() -> None:
        _check(_libc.unshare(_CLONE_NEWNET), f"network namespace {name}: cannot be made")
        source = b"/proc/thread-self/ns/net"
        _check(_libc.mount(source, os.fsencode(path), b"none", _MS_BIND, None), f"{path}: cannot be mounted")

    try:
        _in_thread(make)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def give_name(namespace: int, path: Path) -> None:
    """Make the path name this namespace (a descriptor) again; AgentError if it names another one."""
    if path.is_mount() or (path.exists() and path.stat().st_size):
        raise AgentError(f"network namespace {path.name}: the name belongs to another namespace; remove that one")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o444)
    source = f"/proc/self/fd/{namespace}".encode()
    _check(_libc.mount(source, os.fsencode(path), b"none", _MS_BIND, None), f"{path}: cannot be mounted")


def remove(path: Path) -> None:
    """Remove a named network namespace; does nothing when there is none."""
    _libc.umount2(os.fsencode(path), _MNT_DETACH)
    path.unlink(missing_ok=True)


def unmount(path: Path) -> None:
    """Unmount a file system of ours, also while it is in use."""
    _libc.umount2(os.fsencode(path), _MNT_DETACH)


def run_in(path: Path, call: Callable[[], T]) -> T:
    """Call `call` in a thread that is in the network namespace at `path`."""

    def enter() -> T:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _check(_libc.setns(descriptor, _CLONE_NEWNET), f"{path}: cannot be entered")
        finally:
            os.close(descriptor)
        return call()

    return _in_thread(enter)


def enter(descriptor: int) -> None:
    """Move the calling thread, for good: only for a process that is about to become another program."""
    _check(_libc.setns(descriptor, _CLONE_NEWNET), "network namespace: cannot be entered")


def own_inode() -> int:
    """Which network namespace the calling thread is in."""
    return Path("/proc/thread-self/ns/net").stat().st_ino
