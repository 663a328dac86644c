"""An engine's first process, with real children: it follows what dies, however often, and ends all when told to."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from packetstack_core.abi import native

SLEEPS = "exec sleep 1000"
KILL_SECONDS = 1.5
"""Children that react to nothing are killed after 2 s."""


class Init:
    """packetstack-init whose children are shell scripts that write down their start."""

    def __init__(
        self, directory: Path, datapath: str, supervisor: str, linger: Path | None, logs: bool = False
    ) -> None:
        self.log = directory / "log"
        self._starts = {name: directory / name for name in ("datapath", "supervisor")}
        command = [str(native("packetstack-init")), *(["--linger", str(linger)] if linger else [])]
        for name, script in (("datapath", datapath), ("supervisor", supervisor)):
            self._starts[name].touch()
            command += [f"--{name}", "/bin/sh", "-c", f"echo $$ >> {self._starts[name]}; {script}"]
        if logs:
            command[1:1] = ["--log", str(self.log)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def starts(self, name: str = "datapath") -> list[int]:
        """Its processes, oldest first."""
        return [int(line) for line in self._starts[name].read_text().splitlines()]

    def follower(self, after: int, name: str = "datapath", seconds: float = 5) -> int:
        """The newest process, once there have been more than `after`."""
        deadline = time.monotonic() + seconds
        while len(started := self.starts(name)) <= after:
            assert time.monotonic() < deadline, f"{name} was not started again: {self.log.read_text()}"
            time.sleep(0.001)
        return started[-1]

    def end(self, seconds: float) -> float:
        """SIGTERM; how long it took to end."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(seconds) == 0
        return time.monotonic() - began

    def children(self) -> dict[int, str]:
        """State of each child: S, Z, ..."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit():
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[1]) == self.process.pid:
                        found[int(entry.name)] = fields[0]
        return found


Start = Callable[..., Init]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Init] = []

    def make(datapath: str = SLEEPS, supervisor: str = SLEEPS, linger: Path | None = None, logs: bool = False) -> Init:
        made.append(Init(tmp_path, datapath, supervisor, linger, logs))
        made[-1].follower(0, "datapath")
        made[-1].follower(0, "supervisor")
        return made[-1]

    yield make
    for init in made:
        with suppress(ProcessLookupError):
            os.killpg(init.process.pid, signal.SIGKILL)
        init.process.wait()


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether the process ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def test_a_datapath_killed_a_hundred_times_is_followed_each_time_and_the_supervisor_never_ends(start: Start) -> None:
    init = start()
    for n in range(1, 101):
        os.kill(init.follower(n - 1), signal.SIGKILL)
        init.follower(n)
    assert len(init.starts("supervisor")) == 1
    assert set(init.children()) == {init.starts()[-1], init.starts("supervisor")[-1]}


def test_a_datapath_that_ran_for_a_second_is_followed_at_once(start: Start) -> None:
    init = start()
    for n in range(1, 9):  # until the pauses have grown
        os.kill(init.follower(n - 1), signal.SIGKILL)
    took = []
    for n in range(8, 11):
        pid = init.follower(n)
        time.sleep(1.1)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        init.follower(n + 1)
        took.append(time.monotonic() - began)
    assert min(took) < 0.09, "as after a pause"


def test_a_datapath_that_ends_by_itself_is_started_twice_a_second_and_not_more(start: Start) -> None:
    init = start(datapath="exit 1")
    time.sleep(3)
    assert 3 <= len(init.starts()) <= 12
    assert "exited with 1; starting it again" in init.log.read_text()
    assert len(init.starts("supervisor")) == 1


@pytest.mark.parametrize("victims", [("supervisor",), ("datapath", "supervisor")])
def test_what_is_killed_is_started_again(start: Start, victims: tuple[str, ...]) -> None:
    init = start()
    for n in range(1, 11):
        for name in victims:
            os.kill(init.follower(n - 1, name), signal.SIGKILL)
        for name in victims:
            init.follower(n, name)
    assert len(init.starts("supervisor")) == 11
    assert len(init.starts("datapath")) == (11 if "datapath" in victims else 1)


def test_orphans_are_reaped(start: Start) -> None:
    init = start(supervisor=f"for i in 1 2 3 4 5; do (sleep 2 &); done; {SLEEPS}")
    deadline = time.monotonic() + 20
    while len(init.children()) < 7:
        assert time.monotonic() < deadline, "the orphans did not become its own"
    while len(init.children()) > 2:
        assert time.monotonic() < deadline, init.children()


def test_told_to_end_it_ends_its_children_at_once(start: Start) -> None:
    init = start()
    pids = init.starts() + init.starts("supervisor")
    assert init.end(5) < KILL_SECONDS, "none had to be killed"
    assert all(gone(pid, 0) for pid in pids)


@pytest.mark.parametrize("how", ["ignores the signal", "is stopped"])
def test_told_to_end_it_kills_a_child_that_does_not_react(start: Start, how: str) -> None:
    init = start(datapath="trap '' TERM; while true; do sleep 1000; done" if how == "ignores the signal" else SLEEPS)
    if how == "is stopped":
        child = init.follower(0)
        os.kill(child, signal.SIGSTOP)
        while init.children()[child] != "T":  # of two signals that wait, SIGTERM would come first
            time.sleep(0.001)
    assert init.end(10) > KILL_SECONDS
    assert gone(init.starts()[-1], 0)


def test_told_to_end_it_starts_nothing_any_more(start: Start) -> None:
    init = start()
    for n in range(1, 9):
        os.kill(init.follower(n - 1), signal.SIGKILL)
    init.end(2)
    count = len(init.starts())
    time.sleep(0.3)
    assert len(init.starts()) == count


def test_there_are_two_datapaths_at_most_and_either_may_go(start: Start) -> None:
    init = start()
    first = init.follower(0)
    for _ in range(3):
        init.process.send_signal(signal.SIGHUP)
    second = init.follower(1)
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    init.process.send_signal(signal.SIGHUP)
    third = init.follower(2)
    os.kill(third, signal.SIGKILL)
    assert gone(third)
    time.sleep(0.3)
    assert len(init.starts()) == 3, "the second goes on, nobody is missing"
    assert second in init.children()
    assert "the next one is there" in init.log.read_text()
    assert "the one before goes on" in init.log.read_text()
    os.kill(second, signal.SIGKILL)
    init.follower(3)


def test_a_command_that_cannot_be_run_is_told_and_the_other_one_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [native("packetstack-init"), "--datapath", "/nowhere/datapath", "--supervisor", "/bin/sleep", "1000"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 5
        while "datapath: cannot run /nowhere/datapath: No such file or directory" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(5) == 0


def test_told_to_end_it_lingers_while_the_agents_socket_is_there(start: Start, tmp_path: Path) -> None:
    socket = tmp_path / "engine.sock"
    socket.touch()
    init = start(linger=socket)
    init.process.terminate()
    time.sleep(0.5)
    assert init.process.poll() is None
    assert set(init.children().values()) == {"S"}
    socket.unlink()
    assert init.process.wait(5) == 0


def test_a_second_signal_does_not_linger(start: Start, tmp_path: Path) -> None:
    socket = tmp_path / "engine.sock"
    socket.touch()
    init = start(linger=socket)
    init.process.terminate()
    time.sleep(0.3)
    assert init.end(5) < 4


def test_a_log_is_cut_whatever_children_say_and_keeps_what_was_said_last(start: Start) -> None:
    talks = "yes 'the same again and again' | head -c 20000000; echo the last words; exec sleep 1000"
    init = start(talks, logs=True)
    sizes = []
    deadline = time.monotonic() + 30
    while "the last words" not in (text := init.log.read_text(errors="replace")):
        assert time.monotonic() < deadline, text[-200:]
        sizes.append(init.log.stat().st_size)
        time.sleep(0.002)
    assert max(sizes) < 1.2 * 2**20
    assert max(sizes) > 2**19, "what was said last stays"
    assert text.startswith("packetstack-init: this log was cut: ")
    assert text.splitlines()[1] == "the same again and again", "from a whole line on"


def test_a_child_that_never_stops_talking_keeps_nobody_from_being_followed(start: Start) -> None:
    init = start("exec yes", logs=True)
    os.kill(init.starts("supervisor")[-1], signal.SIGKILL)
    assert init.follower(1, "supervisor")
    os.kill(init.starts()[-1], signal.SIGKILL)
    assert init.follower(1)
    assert init.log.stat().st_size < 1.2 * 2**20
    assert init.end(5) < KILL_SECONDS


def test_what_children_and_init_say_is_in_the_log_in_turn(start: Start) -> None:
    init = start("echo one >&2; exit 3", logs=True)
    init.follower(2)
    said = init.log.read_text()
    assert said.index("one\n") < said.index("datapath (pid") < said.rindex("one\n")
