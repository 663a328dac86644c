"""Processes of a node as the agent must find them: whatever they are called, in containers too."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from packetstack_agent import processes

UID = "7920001a-ff85-4e83-9ec8-039a6cd7e419"
RENAMED = (
    "import ctypes, sys, time; ctypes.CDLL(None).prctl(15, b'\\xff)\\xfe', 0, 0, 0); print(flush=True); time.sleep(60)"
)
"""PR_SET_NAME; a name may be any bytes."""
FIRST = "import time; print(flush=True); time.sleep(60)"


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said a line."""
    made = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert made.stdout is not None
    try:
        made.stdout.readline()
        yield made
    finally:
        made.send_signal(signal.SIGKILL)
        made.wait()
        made.stdout.close()


def test_a_process_whose_name_is_no_text_is_a_process() -> None:
    with child("unshare", "--net", sys.executable, "-c", RENAMED) as renamed:
        there = Path(f"/proc/{renamed.pid}/ns/net")
        assert processes.in_namespace(there) == [renamed.pid]
        assert processes.start_time(renamed.pid) > 0
        found = processes.spent(renamed.pid, renamed.pid)
        assert found
        assert found.state in "SR"
        assert processes.of_pod(UID) == []


def test_a_thread_is_found_by_its_number_in_its_container() -> None:
    command = ("unshare", "--pid", "--fork", "--kill-child=KILL", sys.executable, "-c", FIRST)
    with child(*command) as outer:
        inner = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        assert processes.spent(inner, 1)
        assert processes.spent(inner, inner) is None


def test_a_stopped_thread_is_told_from_one_that_waits_or_runs() -> None:
    with child(sys.executable, "-c", RENAMED) as sleeper:
        os.kill(sleeper.pid, signal.SIGSTOP)
        os.waitpid(sleeper.pid, os.WUNTRACED)
        found = processes.spent(sleeper.pid, sleeper.pid)
        assert found
        assert found.state == "T"
    mine = processes.spent(os.getpid(), threading.get_native_id())
    assert mine
    assert mine.state == "R"
    assert mine.seconds > 0


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        (f"3:memory:/kubepods/besteffort/pod{UID}/0a1b", True),
        (f"0::/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-0a1b.scope", True),
        (f"0::/../../kubepods/pod{UID}", True),
        (f"3:memory:/kubepods/besteffort/pod{UID}0/0a1b", False),
        ("3:memory:/system.slice/other.service", False),
    ],
    ids=["cgroupfs", "systemd", "seen from a container", "begins alike", "none"],
)
def test_a_pods_process_is_told_by_its_cgroups(groups: str, found: bool) -> None:
    assert processes.names_pod(groups, UID) is found


def test_no_uid_is_no_pod() -> None:
    assert not processes.names_pod("3:memory:/kubepods/pod/0a1b", "")
    assert not processes.names_pod(f"3:memory:/kubepods/pod{UID}/0a1b", UID[:8])


@pytest.mark.parametrize(("cpuset", "anywhere"), [({0, 2, 4, 6}, True), ({0, 4}, False)])
def test_cpus_that_are_offline_are_no_cpuset(monkeypatch: pytest.MonkeyPatch, cpuset: set[int], anywhere: bool) -> None:
    affinity = [cpuset & {0}]
    numbers = {"SC_NPROCESSORS_CONF": 8, "SC_NPROCESSORS_ONLN": 4}  # 0, 2, 4 and 6: one thread a core
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sysconf", numbers.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity[-1])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: affinity.append(set(cpus) & cpuset))
    assert processes._may_run_anywhere() == anywhere
    assert affinity[-1] == cpuset & {0}


def test_cpus_are_a_process_s_own_when_they_are_as_many_as_its_cores_and_not_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_NPROCESSORS_ONLN": 4}.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2})
    assert processes.own_cpus(1, 2) == (2, 5)
    assert processes.own_cpus(1, 1) == processes.own_cpus(1, 4) == ()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert processes.own_cpus(1, 4) == ()
