"""The agent of this host as commands see it."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from packetstack_cli import preflight_host
from packetstack_cli.agent_process import START_SECONDS, AgentProcess
from packetstack_cli.asking import AgentSocket
from packetstack_cli.backend import Live, Removal, Wishes, not_ready
from packetstack_cli.checks import Check
from packetstack_cli.errors import CliError, EarlierAgent, NoAgent, unreadable
from packetstack_core import verbs
from packetstack_core.resources import PacketStack
from packetstack_core.verbs import Json

DEFAULT_RUN_DIRECTORY = Path("/run/packetstack")
READY_SECONDS = 30.0
"""How long stacks may take that are made anew."""
END_FLOWS = "packetstack upgrade --agent --end-flows"
"""What an agent says when this, and nothing else, lets it go on."""


class Client:
    """A `Backend`. There may be no agent at all: then NoAgent is raised, or one is started."""

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self._socket = AgentSocket(run_directory)
        self._process = AgentProcess(run_directory, self.alive)

    def call(self, verb: str, **arguments: Any) -> Any:
        """The answer to a verb by its name, for tests and benches. CliError, NoAgent."""
        known = verbs.TABLE[verb]
        return self._socket.ask(known, known.request.model_validate(arguments, strict=False))

    def close(self) -> None:
        """Nothing is kept open between questions."""

    def alive(self) -> bool:
        """Whether an agent answers, of whatever build."""
        try:
            self._socket.ask(verbs.EVENTS, verbs.OneOrAll())
        except NoAgent:
            return False
        except CliError:
            return True
        return True

    def agent_pid(self) -> int:
        """Process id of this directory's agent."""
        return self._process.pid()

    # ---- stacks ----------------------------------------------------------------------------------------------

    def begin(self, metrics_listen: str | None) -> bool:
        """Start an agent if there is none. Whether it is ours to end should what follows fail."""
        if self.alive():
            if metrics_listen:
                click.echo(
                    "note: --metrics-listen counts only when `up` starts the agent, and one runs already", err=True
                )
            return False
        # An agent that found stacks to go on with stays, whatever becomes of the file.
        return self._process.start(metrics_listen) and not self.get()

    def abandon(self) -> None:
        """End the agent that `begin` has started."""
        with suppress(NoAgent):
            self._stop()

    def apply(self, stacks: Sequence[PacketStack], wishes: Wishes) -> list[Json]:
        """All or none."""
        request = {
            "documents": [s.document() for s in stacks], "uplinks": list(wishes.uplinks), "firewall": wishes.firewall
        }  # fmt: skip
        return self._socket.ask(verbs.APPLY, verbs.Apply.model_validate(request, strict=False))

    def check(self, stacks: Sequence[PacketStack]) -> None:
        """Nobody else has a say here."""

    def get(self, name: str | None = None) -> list[Json]:
        """One stack or all."""
        return self._socket.ask(verbs.GET, verbs.OneOrAll(name=name))

    def live(self, name: str | None) -> Live:
        """All numbers of an agent are of this moment."""
        return Live(self.get(name))

    def wait(self, names: Sequence[str], seconds: float) -> list[Json]:
        """The agent answers when all are ready."""
        deadline = time.monotonic() + seconds
        while True:
            rest = max(0.0, deadline - time.monotonic())
            asked = verbs.Wait(names=tuple(names), seconds=min(rest, verbs.LONGEST_WAIT_SECONDS))
            waiting = self._socket.ask(verbs.WAIT, asked)
            if not waiting or rest == 0.0:
                return waiting

    def scale(self, name: str, replicas: int) -> Json:
        """Returns at once; `wait` says when the engines are there."""
        return self._socket.ask(verbs.SCALE, verbs.Scale(name=name, replicas=replicas))

    def move_buckets(self, name: str, buckets: Sequence[int], slot: int, queue: int | None) -> Json:
        """Returns when the engine owns them."""
        asked = verbs.MoveBuckets(name=name, buckets=tuple(buckets), slot=slot, queue=queue)
        return self._socket.ask(verbs.MOVE_BUCKETS, asked)

    def move_queue(self, name: str, slot: int, queue: int, core: int) -> Json:
        """Returns when the core serves it."""
        return self._socket.ask(verbs.MOVE_QUEUE, verbs.MoveQueue(name=name, slot=slot, queue=queue, core=core))

    def explain(self, question: verbs.Explain) -> Json:
        """Where a flow goes now, and why."""
        return self._socket.ask(verbs.EXPLAIN, question)

    def events(self, name: str | None) -> list[Json]:
        """The agent remembers the last 1,000."""
        return self._socket.ask(verbs.EVENTS, verbs.OneOrAll(name=name))

    def metrics(self) -> str:
        """Metrics of the agent, as Prometheus reads them."""
        return self._socket.read("/metrics")

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

    def preflight(self) -> list[Check]:
        """What this host has and lacks."""
        return preflight_host.examine(self._process.examine_firewall())

    # ---- ending ----------------------------------------------------------------------------------------------

    def removal(self, name: str | None, everything: bool) -> Removal:
        """Ends stacks, and with the last one the agent. Without an agent it ends all that one has left."""
        try:
            stacks = self.get()
        except (NoAgent, EarlierAgent) as e:
            return self._removal_without_agent(name, everything, e)
        chosen = _chosen([s["metadata"]["name"] for s in stacks], name, everything)
        flows = sum(s["status"]["flows"] for s in stacks if s["metadata"]["name"] in chosen)

        def carry_out() -> list[str]:
            if len(chosen) == len(stacks):
                self._stop()
            else:
                for one in chosen:
                    self._socket.ask(verbs.DELETE, verbs.Named(name=one))
            return [f"stack {one}: removed" for one in chosen]

        return Removal(f"{flows:,} live flows will end" if flows else "", carry_out)

    def _removal_without_agent(self, name: str | None, everything: bool, why: CliError) -> Removal:
        """Ends all that an agent has left. One of an earlier build, which cannot be asked, is told to leave first."""
        if not self.run_directory.exists():
            if not everything:
                raise why
            return Removal("", lambda: ["no stacks, and nothing left of any"])
        left = self._socket.left_behind()
        earlier = isinstance(why, EarlierAgent)
        said = "the agent is of an earlier build" if earlier else "no agent answers"
        if len(_chosen(left, name, everything)) < len(left):
            raise CliError(
                f"stack {name}: {said}, and without one to ask only all stacks can be ended; "
                "start another agent with packetstack upgrade --agent, or use down --all"
            )

        def carry_out() -> list[str]:
            if earlier:
                self._process.wait_until_gone(self._tell_to_leave)
            return self._process.clean()

        return Removal(f"{said}; all flows of {', '.join(left)} will end" if left else "", carry_out)

    def _tell_to_leave(self) -> None:
        self._socket.ask(verbs.LEAVE, verbs.Nothing())

    def _stop(self) -> None:
        """Tell the agent to remove everything and end; wait until it has."""
        self._socket.ask(verbs.STOP, verbs.Nothing())
        self._process.wait_until_gone()
        self._process.forget()

    # ---- another build ---------------------------------------------------------------------------------------

    def upgrade(self, name: str) -> Json:
        """Let datapaths of the build that is installed now follow those of a stack, or of an engine, as in `web-1` or its
        slot. Of a stack that needs a second set of engines for it: wait until that takes new connections."""
        # First: an agent of an earlier build cannot be asked for engines, and whether it can be followed says this.
        if self._process.has_state() and (problem := self._process.what_hinders()):
            raise CliError(problem)
        stacks = self.get()
        if name in (s["metadata"]["name"] for s in stacks):
            done: Json = {"stack": name} | self._socket.ask(verbs.UPGRADE, verbs.Upgrade(name=name))
            if "engines" not in done and (waiting := self.wait([name], READY_SECONDS)):
                raise CliError(not_ready(waiting[0], READY_SECONDS))
            return done
        engines = [e | {"stack": s["metadata"]["name"]} for s in stacks for e in s["status"]["engines"]]
        found = next((e for e in engines if name in (e["name"], str(e["slot"]))), None)
        if found is None:
            raise CliError(f"engine {name}: not found; there are {', '.join(e['name'] for e in engines) or 'none'}")
        done = self._socket.ask(verbs.UPGRADE, verbs.Upgrade(name=found["stack"], slot=found["slot"]))
        return {"engine": found["name"], **done}

    def restart_agent(self, end_flows: bool) -> int:
        """Let the agent end and another one take over; one that is dead is just followed.

        CliError, and nothing is stopped, when this build cannot take over what runs; not with `end_flows`.
        """
        if not self._process.has_state():
            raise NoAgent(f"{self.run_directory}: there is no agent to follow; start one with: packetstack up FILE")
        problem = self._process.what_hinders()
        if not end_flows:
            if problem:
                raise CliError(problem)
        elif self._begun_anew():  # an agent that stands by makes the stacks as their tables say
            return self.agent_pid()
        elif not problem:
            raise CliError("nothing here was made by another build, so no flow has to end: packetstack upgrade --agent")
        elif END_FLOWS not in problem:  # something else is in the way
            raise CliError(problem)
        self._process.wait_until_gone(self._tell_to_leave)
        self._process.start(None, end_flows)
        if end_flows and (waiting := self.wait([s["metadata"]["name"] for s in self.get()], READY_SECONDS)):
            raise CliError(not_ready(waiting[0], READY_SECONDS))
        return self.agent_pid()

    def end_flows(self, name: str) -> Json:
        """For clusters: see `restart_agent`."""
        raise CliError(f"--end-flows {name}: is for all stacks of this host; use {END_FLOWS}")

    def _begun_anew(self) -> bool:
        """Let an agent that stands by end another build's flows, and wait until it has; False if none stands by."""
        deadline = time.monotonic() + START_SECONDS
        told = False
        while True:
            try:
                if self._socket.ask(verbs.END_FLOWS, verbs.Nothing()) is None:
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


def _chosen(stacks: Sequence[str], name: str | None, everything: bool) -> list[str]:
    """Those that `down` shall end."""
    if name is not None and name not in stacks:
        raise CliError(f"stack {name}: not found; stacks of this agent: {', '.join(stacks) or 'none'}")
    if name is None and not everything and len(stacks) > 1:
        raise CliError(f"there are {len(stacks)} stacks ({', '.join(stacks)}); name one, or use --all")
    return [s for s in stacks if name in (None, s)]
