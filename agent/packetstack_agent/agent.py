"""The agent of a node: makes its parts, lets them work, ends them.

What the parts are, and who knows whom, is drawn in docs/architecture.md. Each owns its locks and its state; all run on the
event loop, and what blocks runs in worker threads.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from packetstack_agent import loading, namespaces
from packetstack_agent.applying import Applying
from packetstack_agent.balancing import Balancers
from packetstack_agent.director import Director
from packetstack_agent.engine_life import EngineLife
from packetstack_agent.errors import AgentError
from packetstack_agent.firewall import Firewall
from packetstack_agent.health import Health
from packetstack_agent.journal import Background, Journal
from packetstack_agent.keeping import Keeper
from packetstack_agent.managed import Stacks
from packetstack_agent.node import RunDirectory, clean
from packetstack_agent.scaling import Autoscalers
from packetstack_agent.shedding import Shedders
from packetstack_agent.status import Status
from packetstack_agent.surroundings import SurroundingsWatch
from packetstack_agent.takeover import Takeover
from packetstack_agent.underlay import Underlay
from packetstack_agent.verbs import Verbs
from packetstack_agent.watchdog import Watchdog
from packetstack_core.reasons import EventReason

AGAIN_SECONDS = 1.0
"""Until a part of the agent that a fault has ended begins again."""
SAVE_SECONDS = 1.0
"""Time between two tries to write a record that could not be written."""


class Agent:
    """One node's stacks, as long as it runs."""

    def __init__(self, run: RunDirectory, foreign: str = "") -> None:
        self.run = run
        self.stacks = Stacks()
        self.stacks.foreign = foreign
        self.journal = Journal()
        self.director = Director()
        self.firewall = Firewall()
        self.background = Background(self.journal)
        self.life = EngineLife(run, self.stacks, self.journal, self.background, self.director)
        self.watchdog = Watchdog(self.stacks, self.journal, self.background, self.life)
        self.health = Health(run, self.stacks, self.journal)
        self.underlay = Underlay(run, self.stacks, self.journal, self.director, self.firewall)
        self.surroundings = SurroundingsWatch(self.stacks, self.journal, self.underlay)
        self.keeper = Keeper(run, self.stacks, self.journal, self.life, self.watchdog, self.health, self.underlay)
        self.autoscalers = Autoscalers(run, self.stacks, self.journal, self.keeper)
        self.balancers = Balancers(self.stacks, self.journal, self.keeper)
        self.shedders = Shedders(self.stacks, self.journal, self.director)
        self.status = Status(
            self.director, self.health, self.autoscalers, self.balancers, self.shedders, self.firewall, run
        )
        self._applier = Applying(
            run, self.stacks, self.journal, self.director, self.life, self.keeper, self.health, self.underlay,
            (self.autoscalers, self.balancers, self.shedders),
        )  # fmt: skip
        self.verbs = Verbs(self.stacks, self.journal, self.keeper, self.autoscalers, self.status)
        self._tasks: list[asyncio.Task[None]] = []
        # What the web application, the follower of flow tables and the metrics ask for.
        self.event, self.events, self.news = self.journal.event, self.journal.events, self.keeper.news
        self.applying, self.apply, self.follow = self._applier.lock, self._applier.apply, self._applier.follow
        self.delete, self.planned = self._applier.delete, self.stacks.planned
        self.set_uplinks, self.set_firewall = self.underlay.set_uplinks, self.underlay.set_firewall

    @property
    def foreign(self) -> str:
        """Why the agent stands by: another build made what is there. It serves on, and nothing of it is touched."""
        return self.stacks.foreign

    async def start(self) -> None:
        """Load the programs, make the routed pair, go on with what an earlier agent left. AgentError if that cannot be."""
        if self.foreign:
            self.journal.event(
                "-", EventReason.LAYOUT_MISMATCH, f"{self.foreign}; this agent stands by and changes nothing"
            )
            return
        record, here = self.run.record, namespaces.own_inode()
        if record.documents and record.network != here:
            raise AgentError(
                f"{self.run.path}: its stacks are in another network namespace; start the agent there, as in nsenter --net"
            )
        record.network = here
        self.run.save(must=True)
        await asyncio.to_thread(self.director.open, self.run.pins)
        await self.underlay.start()
        takeover = Takeover(self.run, self.stacks, self.journal, self.director, self.life, self.keeper)
        await takeover.run(self.health, self.underlay)
        parts: dict[str, Callable[[], Awaitable[None]]] = {
            "surroundings": self.surroundings.watch,
            "packet filter": self.underlay.watch_firewall,
            "watchdog": self.watchdog.run,
            "directories of pods": self.life.forget_pods,
            "shedding": self.shedders.run,
            "autoscalers": self.autoscalers.run,
            "rebalancers": self.balancers.run,
            "load": partial(loading.measure, self.stacks, self.journal),
            "record": self._save,
        }
        for name, work in parts.items():
            self._tasks.append(asyncio.create_task(self.keep_up(name, work)))

    async def keep_up(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Let a part work until it is done or cancelled. A fault that ends it is reported, and it begins again."""
        done = False
        while not done:
            with self.journal.going_on("-", name):
                await work()
                done = True
            if not done:
                await asyncio.sleep(AGAIN_SECONDS)

    async def _save(self) -> None:
        """Write the record again when that has failed, until cancelled."""
        told = ""
        while True:
            if self.run.unsaved:
                self.run.save()
            if self.run.unsaved != told:
                told = self.run.unsaved
                reason = EventReason.RECORD_NOT_WRITTEN if told else EventReason.RECORD_WRITTEN
                self.journal.event(
                    "-", reason, told or "state.json is written again; changes are carried out as before"
                )
            await asyncio.sleep(SAVE_SECONDS)

    async def stop(self) -> None:
        """Remove everything, in the order in which nothing is missed. What cannot be read stays, as with `leave`."""
        self.life.end()
        for name in list(self.stacks):
            await self._applier.remove(name)
        await self._halt()
        if not self.stacks.unread:
            await asyncio.to_thread(clean, self.run)

    async def leave(self) -> None:
        """End, and leave all as it is: engines go on, and the next agent takes them over."""
        self.life.end()
        for managed in self.stacks.values():
            await self.keeper.end(managed)
        await self._halt()
        for managed in self.stacks.values():
            for engine in managed.engines.values():
                if engine.making is not None:
                    await asyncio.wait([engine.making])
                if engine.attachments is not None:
                    await engine.attachments.close()

    async def _halt(self) -> None:
        self.health.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.background.ended()
        await self.underlay.rest()
        self.director.close()
