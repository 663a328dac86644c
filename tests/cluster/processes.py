"""Programs that run beside the tests and end with them, whatever ends the tests."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

POLL_SECONDS = 0.1


class ClusterError(RuntimeError):
    """The cluster could not be brought up, or a command in it failed: one line."""


class Daemon:
    """A program in the background that writes to `log` and is killed with the process that started it."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path, *, pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self.log = log
        self._again = (name, command, log)
        with log.open("ab") as output:
            # A session of its own, or Ctrl-C would end the cluster before the tests could tear it down.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """Raise `ClusterError` with the last line of the log when the program has ended."""
        code = self.process.poll()
        if code is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise ClusterError(f"{self.name}: ended with {code}: {lines[-1] if lines else 'it said nothing'}")

    def again(self) -> Daemon:
        """The same program, started once more."""
        return Daemon(*self._again)

    def kill(self) -> None:
        """End it at once; nothing of a cluster of tests is worth a slow goodbye. May be called twice."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_until(
    holds: Callable[[], object], what: str, *, daemons: Iterable[Daemon] = (), timeout_seconds: float = 90
) -> None:
    """Poll until `holds()` is true; `ClusterError` when one of `daemons` ends first or the time is up."""
    watched = tuple(daemons)
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        for daemon in watched:
            daemon.check()
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not after {timeout_seconds:g} s")
        time.sleep(POLL_SECONDS)


def run(
    *command: str | Path, stdin: str | None = None, timeout_seconds: float = 60, env: dict[str, str] | None = None
) -> str:
    """Run a command to its end and return what it printed; `ClusterError` with its last line when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        env=env,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        if len(said) > 1 and said[-1].startswith("command terminated"):  # kubectl exec: the reason comes before it
            said.pop()
        raise ClusterError(f"{Path(command[0]).name} {' '.join(map(str, command[1:4]))}: {said[-1]}")
    return done.stdout
