"""Processes as the agent must know them: by something that cannot come to mean another process."""

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Process:
    """A process this agent has started, or one before it. Leads a session of its own."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self._child = child
        self._pidfd = os.pidfd_open(pid)
        self.started = start_time(pid)
        """In clock ticks since the machine's start: with the pid, it names this process alone."""

    @classmethod
    def known(cls, pid: int, started: int) -> "Process | None":
        """The process with this pid and start, if it still runs."""
        try:
            process = cls(pid)
        except OSError:
            return None
        if process.started != started or not process.alive():
            process.close()
            return None
        return process

    def alive(self) -> bool:
        """Whether it has not ended."""
        if self._pidfd < 0:
            return False
        ended = bool(select.select([self._pidfd], [], [], 0)[0])
        if ended and self._child is not None:
            self._child.poll()  # reaps it
        return not ended

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        with suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within this time. Blocks."""
        if self._pidfd >= 0:
            select.select([self._pidfd], [], [], seconds)
        return not self.alive()

    def end(self) -> None:
        """Terminate it; kill it if it does not end within two seconds. Blocks."""
        self.signal(signal.SIGTERM)
        if not self.wait(2.0):
            self.signal(signal.SIGKILL)
            self.wait(2.0)
        self.close()

    def close(self) -> None:
        """Forget it."""
        if self._pidfd >= 0:
            self.alive()
            os.close(self._pidfd)
            self._pidfd = -1


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat; OSError if there is no such process."""
    return int(_stat(Path(f"/proc/{pid}"))[19])


def _stat(entry: Path) -> list[bytes]:
    """Fields of a `stat` file of /proc, from the third on: the second is a name, and may be any bytes."""
    return (entry / "stat").read_bytes().rpartition(b")")[2].split()


@dataclass(frozen=True)
class Spent:
    """What a thread has done so far."""

    state: str
    """R runs or is ready to, S and D wait in the kernel, T and t are stopped: as in /proc (proc(5))."""
    seconds: float
    """CPU time, in steps of a clock tick of 10 ms."""


def spent(pid: int, thread: int) -> Spent | None:
    """State and CPU time of a thread; None if they cannot be read.

    `thread` is what the process calls it: in a container that is a number of its own pid namespace.
    """
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            names = re.search(rb"^NSpid:\t(.*)$", (task / "status").read_bytes(), re.MULTILINE)
            if names and int(names[1].split()[-1]) == thread:
                fields = _stat(task)
                return Spent(fields[0].decode(), (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND)
    except OSError:
        pass
    return None


CGROUPS = (Path("/proc/1/root/sys/fs/cgroup"), Path("/sys/fs/cgroup"))
"""Where the machine's cgroups may be: a container has a view of its own."""


@contextmanager
def way_to_all_cpus() -> Iterator[int]:
    """How a thread gets to run on any CPU when a cpuset keeps this one from some: an open file that it writes 0 to.

    Under the static CPU manager the kubelet gives CPUs to one pod and keeps all others off them, whenever such a pod
    comes; but a fence must visit every CPU. With cgroup v1 the file moves the thread that writes to it, and no other. With
    v2 only a whole process can leave, so this one does, and its threads stay on the CPUs that they have.
    -1: it is not needed, or cannot be; a fence that cannot visit all CPUs refuses to begin, and says so.
    """
    file = -1
    if not _may_run_anywhere():
        for root in CGROUPS:
            with suppress(OSError):
                file = os.open(root / "cpuset/tasks", os.O_WRONLY | os.O_CLOEXEC)
                break
        else:
            _leave_cpuset()
    try:
        yield file
    finally:
        if file >= 0:
            os.close(file)


def _leave_cpuset() -> None:
    allowed = os.sched_getaffinity(0)
    for root in CGROUPS:
        if (root / "cgroup.controllers").exists():  # v2
            with suppress(OSError):
                (root / "cgroup.procs").write_text(str(os.getpid()))
        if _may_run_anywhere():
            break
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended, or may not
            os.sched_setaffinity(int(thread.name), allowed)


def own_cpus(pid: int, count: int) -> tuple[int, ...]:
    """The CPUs that a process was given for itself: so many, and not all of the machine; else none."""
    try:
        allowed = os.sched_getaffinity(pid)
    except OSError:
        return ()
    own = len(allowed) == count < os.sysconf("SC_NPROCESSORS_ONLN")
    return tuple(sorted(allowed)) if own else ()


def _may_run_anywhere() -> bool:
    """Whether no cpuset keeps this thread from a CPU; its affinity stays as it was."""
    # Numbers of CPUs that are online may have gaps.
    allowed, every = os.sched_getaffinity(0), range(os.sysconf("SC_NPROCESSORS_CONF"))
    os.sched_setaffinity(0, every)
    found = len(os.sched_getaffinity(0)) >= os.sysconf("SC_NPROCESSORS_ONLN")
    os.sched_setaffinity(0, allowed)
    return found


def in_namespace(namespace: Path) -> list[int]:
    """Processes in a network namespace other than our own; none when it does not exist."""
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
                same = (there.st_ino, there.st_dev) == (wanted.st_ino, wanted.st_dev)
                if same and _stat(entry)[0] not in b"ZX":
                    found.append(int(entry.name))
    return found


def in_pod(uid: str, pid: int) -> bool:
    """Whether a process belongs to the pod with this UID: its cgroup, made by the kubelet, says so."""
    try:
        return names_pod(Path(f"/proc/{pid}/cgroup").read_text(errors="replace"), uid)
    except OSError:
        return False


def names_pod(groups: str, uid: str) -> bool:
    """Whether the cgroups of a process, as in /proc/PID/cgroup, are those of the pod with this UID."""
    # The systemd driver writes dashes as underscores. A UID that only begins like this one is another's.
    name = re.escape(uid).replace(r"\-", "[-_]")
    return bool(uid) and re.search(rf"pod{name}(?![-_0-9A-Za-z])", groups) is not None


def of_pod(uid: str) -> list[int]:
    """Processes of a pod, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and in_pod(uid, int(entry.name)):
            with suppress(OSError):
                if _stat(entry)[0] not in b"ZX":
                    found.append((start_time(int(entry.name)), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def clear(namespace: Path, spare_session: int = 0, seconds: float = 3.0) -> None:
    """Kill the processes in a network namespace, except those of one session, and wait until they are gone. Blocks."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = []
        for pid in in_namespace(namespace):
            with suppress(ProcessLookupError):
                if not spare_session or os.getsid(pid) != spare_session:
                    left.append(pid)
        if not left:
            return
        for pid in left:  # each time: one may have been forked by another before that one died
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def naming(directory: Path) -> list[int]:
    """Processes with a file of this directory on their command line: engines whose record or namespace is lost."""
    mark = bytes(directory) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if mark in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found
