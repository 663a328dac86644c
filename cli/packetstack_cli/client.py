"""The agent's socket as the CLI sees it, and starting an agent in the background."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from packetstack_core.resources import PacketStack

DEFAULT_RUN_DIRECTORY = Path("/run/packetstack")
ANSWER_SECONDS = 60
START_SECONDS = 20
STOP_SECONDS = 60
END_FLOWS = "packetstack upgrade --agent --end-flows"
"""What an agent says when this, and nothing else, lets it go on."""


class CliError(Exception):
    """One line for the user."""


class NoAgent(CliError):
    """Nobody answers."""


def unreadable(file: Path | str, e: Exception) -> CliError:
    """For a file that was not there, or is not what it should be."""
    return CliError(f"{file}: cannot be read: {getattr(e, 'strerror', None) or e}")


class Client:
    """One connection a call: an agent that was replaced is not noticed."""

    poll_seconds = 0.02

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory

    def call(self, verb: str, **arguments: Any) -> Any:
        """The answer to one verb. CliError with the agent's line if it refuses, NoAgent if there is none."""
        path = self.run_directory / "agent.sock"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ANSWER_SECONDS)
                connection.connect(str(path))
                connection.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
                with connection.makefile("rb") as answers:
                    line = answers.readline()
        except PermissionError:
            raise CliError(f"{path}: no permission; run as root") from None
        except TimeoutError:
            raise CliError(
                f"{path}: the agent has not answered for {ANSWER_SECONDS} s; see {self.run_directory / 'agent.log'}"
            ) from None
        except (FileNotFoundError, ConnectionError):
            if left := self.left_behind():
                problem = f"{', '.join(left)} may go on without one; start another with: packetstack upgrade --agent"
                raise NoAgent(f"{path}: no agent answers, and {problem}") from None
            raise NoAgent(
                f"{path}: no agent answers; start one with: packetstack up FILE (or name its --run-dir)"
            ) from None
        if not line:
            raise NoAgent(f"{path}: the agent went away; see {self.run_directory / 'agent.log'}")
        answer = json.loads(line)
        if "error" in answer:
            raise CliError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        """Nothing is kept open between calls."""

    # ---- what a cluster does in another way (`packetstack_cli.cluster`)

    def begin(self, metrics_listen: str | None) -> bool:
        """Start an agent if there is none. Whether it is ours to end should what follows fail."""
        # An agent that found stacks to go on with stays, whatever becomes of the file.
        if self.alive():
            if metrics_listen:
                click.echo(
                    "note: --metrics-listen counts only when `up` starts the agent, and one runs already", err=True
                )
            return False
        return self.start_agent(metrics_listen) and not self.call("get")

    def abandon(self) -> None:
        """End the agent that `begin` has started."""
        with suppress(NoAgent):
            self.stop_agent()

    def apply(
        self, stacks: Sequence[PacketStack], uplinks: Sequence[str], force: bool, firewall: str | None = None
    ) -> list[dict[str, str]]:
        """Make the stacks what they say: for each its name as `stack`, the `result`, and perhaps a `note`."""
        del force  # nobody else has a say here
        result: list[dict[str, str]] = self.call(
            "apply", documents=[s.document() for s in stacks], uplinks=list(uplinks), firewall=firewall
        )
        return result

    def check(self, stacks: Sequence[PacketStack]) -> None:
        """What reading them has not found. CliError."""

    def live(self, name: str | None, must: bool = True) -> list[dict[str, Any]]:
        """As the verb `get`, with numbers of this moment."""
        del must  # they are always there
        items: list[dict[str, Any]] = self.call("get", name=name)
        return items

    def left_behind(self) -> list[str]:
        """Stacks that there were when the agent was there last. Their packets go on without it."""
        return sorted(p.name for p in (self.run_directory / "stacks").glob("*"))

    def chosen(self, stacks: Sequence[str], name: str | None, everything: bool) -> list[str]:
        """Those that `down` shall end."""
        if name is not None and name not in stacks:
            raise CliError(f"stack {name}: not found; stacks of this agent: {', '.join(stacks) or 'none'}")
        if name is None and not everything and len(stacks) > 1:
            raise CliError(f"there are {len(stacks)} stacks ({', '.join(stacks)}); name one, or use --all")
        return [s for s in stacks if name in (None, s)]

    def remove(self, names: Sequence[str], last: bool) -> None:
        """End these stacks; `last`: there are no others, the agent goes too."""
        if last:
            self.stop_agent()
            return
        for name in names:
            self.call("delete", name=name)

    def log(self, engine: str | None) -> str:
        """What an engine (`web-1`, or its slot) or the agent has written."""
        path = self.run_directory / "agent.log"
        if engine is not None:
            slot = engine.rpartition("-")[2]
            path = self.run_directory / f"engines/{slot}/log"
            if not slot.isdecimal() or not path.exists():
                there = sorted((p.name for p in path.parents[1].glob("*")), key=lambda name: name.zfill(4))
                raise CliError(f"engine {engine}: has no log; engines: {', '.join(there) or 'none'}")
        try:
            return path.read_text(errors="replace")
        except OSError as e:
            raise unreadable(path, e) from None

    # ---- the agent

    def alive(self) -> bool:
        """Whether an agent answers."""
        try:
            self.call("get")
        except NoAgent:
            return False
        return True

    def start_agent(self, metrics_listen: str | None, end_flows: bool = False) -> bool:
        """Start an agent in the background and wait until it answers; CliError with its last line if it does not.

        `end_flows`: of stacks that another build has made with another memory layout. Returns False if somebody else has started one at the same time: then it is theirs.
        """
        if os.geteuid() != 0:
            raise CliError("packetstack up: needs root: it loads BPF programs and makes network namespaces")
        log = self.run_directory / "agent.log"
        command = [*agent_command(), "--run-dir", str(self.run_directory)]
        if metrics_listen:
            command += ["--metrics-listen", metrics_listen]
        if end_flows:
            command += ["--end-flows"]
        try:
            self.run_directory.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                agent = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
                )
        except OSError as e:
            raise CliError(f"{e.filename}: {e.strerror}; the agent needs to write to {self.run_directory}") from None
        deadline = time.monotonic() + START_SECONDS
        while not self.alive():
            ended = agent.poll() is not None and not self._running()
            if ended or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()
                self._forget()
                raise CliError(said[-1] if said else f"the agent did not start; see {log}")
            time.sleep(0.05)
        return agent.poll() is None

    def restart_agent(self, end_flows: bool = False) -> bool:
        """Let the agent end and another one take over; one that is dead is just followed.

        CliError, and nothing is stopped, when this build cannot take over what runs; not with `end_flows`. Returns
        whether the agent stood by, as one of a cluster does: then it makes the stacks as their tables say.
        """
        if not (self.run_directory / "state.json").exists():
            raise NoAgent(f"{self.run_directory}: there is no agent to follow; start one with: packetstack up FILE")
        if not end_flows:
            self.check_build()
        elif self._begun_anew():
            return True
        elif not (problem := self._agent_says("--check")[1]):
            raise CliError("nothing here was made by another build, so no flow has to end: packetstack upgrade --agent")
        elif END_FLOWS not in problem:  # something else is in the way
            raise CliError(problem)
        self._wait_until_gone("leave")
        self.start_agent(None, end_flows)
        return False

    def check_build(self) -> None:
        """CliError when what runs has another memory layout than the build that is installed now."""
        if problem := self._agent_says("--check")[1]:
            raise CliError(problem)

    def end_flows(self, name: str) -> dict[str, Any]:
        """For clusters: see `restart_agent`."""
        raise CliError(f"--end-flows {name}: is for all stacks of this host; use {END_FLOWS}")

    def _begun_anew(self) -> bool:
        """Let an agent that stands by end another build's flows, and wait until it has; False if none stands by."""
        deadline = time.monotonic() + START_SECONDS
        told = False
        while True:
            try:
                if self.call("end_flows") is None:
                    return told
                told = True
            except NoAgent:
                if not told:
                    return False
            except CliError:  # a build that knows no such verb
                return False
            if time.monotonic() > deadline:
                raise CliError(f"the agent does not come back; see {self.run_directory / 'agent.log'}")
            time.sleep(0.05)

    def agent_pid(self) -> int:
        """Of the agent of this directory."""
        return int((self.run_directory / "agent.pid").read_text())

    def stop_agent(self) -> None:
        """Tell the agent to remove everything and end; wait until it has."""
        self.call("stop")
        self._wait_until_gone()
        self._forget()

    def _wait_until_gone(self, told: str = "") -> None:
        """`told`: a verb that ends it. Said more than once: one that is still starting does not hear it yet."""
        deadline = time.monotonic() + STOP_SECONDS
        while self._running():
            with suppress(NoAgent):
                if told:
                    self.call(told)
            if time.monotonic() > deadline:
                raise CliError(f"the agent does not end; see {self.run_directory / 'agent.log'}")
            time.sleep(0.02)

    def _running(self) -> bool:
        """Whether a process is the agent of this directory: it holds a lock on its file."""
        try:
            with (self.run_directory / "agent.pid").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def clean(self) -> str:
        """Remove what a dead agent left."""
        said, problem = self._agent_says("--clean")
        if problem:
            raise CliError(problem)
        self._forget()
        return said

    def _agent_says(self, option: str) -> tuple[str, str]:
        """What an agent prints that only does this, and why it could not, if so."""
        command = [*agent_command(), "--run-dir", str(self.run_directory), option]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = (done.stderr.strip() or f"packetstack-agent {option} failed").splitlines()[-1]
        return done.stdout, problem if done.returncode else ""

    def examine_firewall(self) -> list[dict[str, str]]:
        """What in this host's packet filter would stop packets of stacks: result, message, remedy of each."""
        done = subprocess.run(
            [*agent_command(), "--run-dir", str(self.run_directory), "--examine-firewall"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr.strip() or "no answer").splitlines()[-1]
            return [{"result": "unknown", "message": f"the packet filter cannot be looked at: {said}", "remedy": ""}]
        found: list[dict[str, str]] = json.loads(done.stdout)
        return found

    def _forget(self) -> None:
        """The log goes last; the directory too, unless something else is in it."""
        if not (self.run_directory / "state.json").exists():
            (self.run_directory / "agent.log").unlink(missing_ok=True)
            with suppress(OSError):
                self.run_directory.rmdir()


def agent_command() -> list[str]:
    """How to run the agent: with this very Python, whatever PATH says."""
    return [sys.executable, "-P", "-m", "packetstack_agent.main"]
