"""The lab leaves nothing behind, whatever happens in it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from packetstack_cli.lab import ROOMS, Lab, LabError, inside

NAMESPACES = Path("/run/netns")


def left(prefix: str) -> list[Path]:
    return [path for room in ROOMS if (path := NAMESPACES / f"{prefix}-{room}").exists()]


def test_client_reaches_server_through_the_node_by_both_families() -> None:
    with Lab("pkl-lab") as lab:
        assert len(left("pkl-lab")) == 3
        for address in ("10.71.2.2", "fd71:2::2", lab.server_addresses[0], lab.server_addresses6[0]):
            lab.run("client", "ping", "-c1", "-W2", address)
    assert not left("pkl-lab")


def test_a_failure_inside_leaves_nothing() -> None:
    lab = Lab("pkl-lab")
    children = []

    def fail() -> None:
        with lab:
            children.append(lab.start("server", "sleep", "1000"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert children[0].returncode is not None
    assert not left("pkl-lab")
    assert not lab.directory.exists()


def test_a_killed_lab_is_removed_by_the_next() -> None:
    program = (
        "import sys; from packetstack_cli.lab import Lab\n"
        "lab = Lab('pkl-lab').__enter__(); child = lab.start('node', 'sleep', '1000')\n"
        "print(child.pid, lab.directory, flush=True); sys.stdin.read()"
    )
    dead = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert dead.stdout
    pid, directory = dead.stdout.readline().split()
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    assert len(left("pkl-lab")) == 3
    with Lab("pkl-lab") as lab:
        lab.run("client", "ping", "-c1", "-W2", "10.71.2.2")
    assert not left("pkl-lab")
    stat = Path("/proc", pid, "stat")
    assert not stat.exists() or " Z " in stat.read_text()
    Path(directory).rmdir()


def test_a_command_that_fails_is_told_in_one_line() -> None:
    with Lab("pkl-lab") as lab, pytest.raises(LabError, match=r"^client: ls /nowhere: ls: cannot access '/nowhere'"):
        lab.run("client", "ls", "/nowhere")


def test_inside_changes_only_this_thread_and_comes_back() -> None:
    home = Path("/proc/thread-self/ns/net").readlink()
    with Lab("pkl-lab") as lab:
        with inside(lab.namespace("node")):
            assert Path("/proc/thread-self/ns/net").readlink() != home
        assert Path("/proc/thread-self/ns/net").readlink() == home
