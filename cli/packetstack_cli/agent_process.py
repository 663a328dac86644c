"""The process of this host's agent: started in the background, followed by another one, cleaned up after."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from packetstack_cli.errors import CliError, EarlierAgent, NoAgent

START_SECONDS = 20
STOP_SECONDS = 60


class AgentProcess:
    """The agent of one run directory. `answers` says whether one answers there."""

    def __init__(self, run_directory: Path, answers: Callable[[], bool]) -> None:
        self._directory = run_directory
        self._answers = answers

    def pid(self) -> int:
        """Process id of the last agent."""
        return int((self._directory / "agent.pid").read_text())

    def has_state(self) -> bool:
        """Whether there is, or was, an agent that has not removed everything."""
        return (self._directory / "state.json").exists()

    def start(self, metrics_listen: str | None, end_flows: bool = False) -> bool:
        """Start an agent in the background and wait until it answers; CliError with its last line if it does not.

        `end_flows`: of stacks that another build has made with another memory layout. Returns False if somebody else
        has started one at the same time: then it is theirs.
        """
        if os.geteuid() != 0:
            raise CliError("packetstack up: needs root: it loads BPF programs and makes network namespaces")
        log = self._directory / "agent.log"
        command = [*agent_command(), "--run-dir", str(self._directory)]
        if metrics_listen:
            command += ["--metrics-listen", metrics_listen]
        if end_flows:
            command += ["--end-flows"]
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                agent = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
                )
        except OSError as e:
            raise CliError(f"{e.filename}: {e.strerror}; the agent needs to write to {self._directory}") from None
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            ended = agent.poll() is not None and not self.running()
            if ended or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()
                self.forget()
                raise CliError(said[-1] if said else f"the agent did not start; see {log}")
            time.sleep(0.05)
        return agent.poll() is None

    def running(self) -> bool:
        """Whether a process is the agent of this directory: it holds a lock on its file."""
        try:
            with (self._directory / "agent.pid").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def wait_until_gone(self, tell: Callable[[], None] | None = None) -> None:
        """`tell` asks it to end; more than once, since one that is still starting does not hear it yet."""
        deadline = time.monotonic() + STOP_SECONDS
        while self.running():
            if tell is not None:
                try:
                    tell()
                except NoAgent:
                    pass
                except EarlierAgent:  # a signal is understood by all builds, and ends no stack
                    with suppress(ProcessLookupError):
                        os.kill(self.pid(), signal.SIGTERM)
            if time.monotonic() > deadline:
                raise CliError(f"the agent does not end; see {self._directory / 'agent.log'}")
            time.sleep(0.02)

    def what_hinders(self) -> str:
        """Why the build that is installed now cannot take over what runs; empty if it can."""
        return self._says("--check")[1]

    def clean(self) -> list[str]:
        """Remove what a dead agent left: what was removed, in lines."""
        said, problem = self._says("--clean")
        if problem:
            raise CliError(problem)
        self.forget()
        return said.splitlines()

    def examine_firewall(self) -> list[dict[str, str]]:
        """What in this host's packet filter would stop packets of stacks: result, message, remedy of each."""
        said, problem = self._says("--examine-firewall")
        if problem:
            message = f"the packet filter cannot be looked at: {problem}"
            return [{"result": "unknown", "message": message, "remedy": ""}]
        found: list[dict[str, str]] = json.loads(said)
        return found

    def _says(self, option: str) -> tuple[str, str]:
        """What an agent prints that only does this, and why it could not, if so."""
        command = [*agent_command(), "--run-dir", str(self._directory), option]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = (done.stderr.strip() or f"packetstack-agent {option} failed").splitlines()[-1]
        return done.stdout, problem if done.returncode else ""

    def forget(self) -> None:
        """Remove the log, and the directory too, unless something else is in it."""
        if not self.has_state():
            (self._directory / "agent.log").unlink(missing_ok=True)
            with suppress(OSError):
                self._directory.rmdir()


def agent_command() -> list[str]:
    """How to run the agent: with this very Python, whatever PATH says."""
    return [sys.executable, "-P", "-m", "packetstack_agent.main"]
