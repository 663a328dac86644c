"""Finds engines that hang, or whose init, pod or interface is gone, and has them mended.

One look at all engines every 0.04 s, or 0.1 s while none has anything to do, reads shared memory and never waits: what takes time (a new init, a new engine, the
processes of a pod) is a task of that engine alone, so that no engine waits for another one's.
"""

import asyncio
import math
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from packetstack_agent import networks, processes
from packetstack_agent.counting import captures
from packetstack_agent.engines import Engine
from packetstack_agent.journal import Background, Journal
from packetstack_agent.managed import Managed
from packetstack_core.reasons import EventReason

WATCH_SECONDS = 0.04
"""Time between two checks of all engines."""
REST_SECONDS = 0.1
"""The same while no core has anything to do: a core that sleeps turns as often."""
REST_TURNS = 2
"""A core that turns more often between two checks has packets."""
STOPPED_SECONDS = 0.1
"""Time without a turn of its loop after which a core hangs whose thread somebody has stopped."""
BURNT_SECONDS = 0.08
"""CPU time in one turn, which handles some hundred packets in well below a millisecond."""
BLOCKED_SECONDS = 0.5
"""Time without a turn after which a core hangs whose thread waits in the kernel. A loop turns at least every 0.1 s, also when it sleeps."""
STARVED_SECONDS = 5.0
"""The same for a core that is ready to run and gets no CPU: killing it would not help."""
STALLS = 4
"""Fences of 0.5 s in a row, not answered by an engine whose cores turn."""
RESTART_SECONDS = 0.25
"""Time between two starts of an engine's init."""
SILENT_SECONDS = 3.0
"""How long init may take to bring a datapath."""
KILL_SECONDS = 1.0
"""Time between two times that one datapath is killed."""
CAPTURE_SECONDS = 1.0
"""Between two reports of captures: the engine says how many there are, and may say what it likes."""
LINK_SECONDS = 0.2
"""Between two looks at whether an engine's interface is there."""
GONE_SECONDS = 0.5
"""Time without a datapath after which the agent checks whether the engine's pod is there, and between two such checks."""


class Repairs(Protocol):
    """What can be done for an engine. Each returns when it is done, and may find that it is not needed any more."""

    async def rebuild(self, managed: Managed, engine: Engine, why: str) -> None:
        """Make it again in its slot."""

    async def lose(self, managed: Managed, engine: Engine, why: str) -> None:
        """Let go of one that cannot be had again."""

    async def start_again(self, managed: Managed, engine: Engine, why: str) -> None:
        """Start another init in its namespace."""


@dataclass
class Beat:
    """A core's loop, as it was seen."""

    count: int
    since: float
    """When that count was first seen."""
    spent: processes.Spent | None = None
    """What its thread had done when it was first found without a turn."""
    turns: int = 0
    """How many there were since the check before."""


@dataclass
class Watch:
    """What is known of one engine."""

    pid: int = 0
    """Process of the datapath that the rest is about."""
    beats: dict[int, Beat] = field(default_factory=dict)
    """Last turn seen, by core."""
    stalls: int = 0
    """Fences in a row that it has not answered in time, though its cores turned."""
    killed: float | None = None
    """When its datapath was last killed: it may take a while to end."""
    captured: int = 0
    """Captures that have been reported."""
    captured_told: float = -math.inf
    """When that was told last."""
    link_seen: float = 0.0
    """When it was last looked whether its interface is there."""
    pod_seen: float = 0.0
    """When it was last looked whether its pod is there."""
    mending: asyncio.Task[None] | None = None

    def rests(self, now: float) -> bool:
        """Whether a datapath serves it whose cores turn and have nothing to do."""
        return bool(self.beats) and all(
            b.turns <= REST_TURNS and now - b.since < 1.5 * STOPPED_SECONDS for b in self.beats.values()
        )


class Watchdog:
    """Watches the engines of `stacks`."""

    def __init__(
        self, stacks: Mapping[str, Managed], journal: Journal, background: Background, repairs: Repairs
    ) -> None:
        self._stacks = stacks
        self._journal = journal
        self._background = background
        self._repairs = repairs
        self._watched: WeakKeyDictionary[Engine, Watch] = WeakKeyDictionary()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        seconds = WATCH_SECONDS
        while True:
            await asyncio.sleep(seconds)
            seconds = self.check_all(time.monotonic())

    def check_all(self, now: float) -> float:
        """Check each engine that has been made; what it needs is done by tasks. Returns seconds until the next check."""
        seconds = REST_SECONDS
        for managed in list(self._stacks.values()):
            for engine in list(managed.engines.values()):
                if engine.removing or engine.view is None or (engine.making and not engine.making.done()):
                    continue
                with self._journal.going_on(managed.stack.name, f"engine {engine.slot}"):
                    self._check(managed, engine, now)
                    if not self._of(engine).rests(now):
                        seconds = WATCH_SECONDS
        return seconds

    def fence_missed(self, engine: Engine, now: float) -> None:
        """The engine did not answer a fence in time. One that has missed several, though its cores turn, is killed.

        Not one whose way is broken: then markers do not reach it, and another process would get none either.
        """
        watch = self._of(engine)
        if engine.way is not None and (engine.way.lost or engine.way.lacks):
            return
        if any(now - beat.since > BLOCKED_SECONDS for beat in watch.beats.values()):
            return  # it hangs, or starves: its cores show that
        watch.stalls += 1
        if watch.stalls >= STALLS and engine.ready:
            self._kill(engine, f"it has not answered {watch.stalls} fences", now)

    def fences_answered(self, engines: Iterable[Engine]) -> None:
        """All fences were answered in time."""
        for engine in engines:
            self._of(engine).stalls = 0

    def _of(self, engine: Engine) -> Watch:
        """What is known of the engine; of another datapath process nothing is."""
        watch = self._watched.setdefault(engine, Watch())
        if watch.pid != engine.pid:
            watch.pid, watch.stalls, watch.killed = engine.pid, 0, None
            watch.beats.clear()
        return watch

    def _check(self, managed: Managed, engine: Engine, now: float) -> None:
        watch = self._of(engine)
        if watch.mending is None or watch.mending.done():
            mend = self._needed(managed, engine, watch, now)
            watch.mending = self._background.spawn(managed.stack.name, mend) if mend is not None else None
        if engine.view.captured > watch.captured and now - watch.captured_told >= CAPTURE_SECONDS:
            watch.captured, watch.captured_told = int(engine.view.captured), now
            self._report_capture(managed, engine)
        elif engine.ready and (why := hung(engine, watch.beats, now)):
            self._kill(engine, why, now)

    def _needed(self, managed: Managed, engine: Engine, watch: Watch, now: float) -> Coroutine[Any, Any, None] | None:
        """What has to be done for the engine, if anything."""
        b, repairs = engine.blueprint, self._repairs
        if now - watch.link_seen > LINK_SECONDS:
            watch.link_seen = now
            if not networks.is_there(engine.ifindex):
                mend = repairs.lose if b.pod else repairs.rebuild
                return mend(managed, engine, f"interface {engine.device} is gone")
            if engine.way is not None and engine.way.lost:
                mend = repairs.lose if b.pod else repairs.rebuild
                return mend(managed, engine, engine.way.lost)
        silent = now - engine.silent_since if engine.silent_since else 0.0
        if b.pod:  # the kubelet starts what ends in it
            if silent > GONE_SECONDS and now - watch.pod_seen > GONE_SECONDS:
                watch.pod_seen = now
                return self._lose_without_pod(managed, engine)
        elif engine.init is None or not engine.init.alive():
            if now - engine.restarted > RESTART_SECONDS:
                return repairs.start_again(managed, engine, "its init has ended")
        elif silent > SILENT_SECONDS:
            return repairs.start_again(managed, engine, f"no datapath has come for {SILENT_SECONDS:g} s")
        return None

    async def _lose_without_pod(self, managed: Managed, engine: Engine) -> None:
        b = engine.blueprint
        if not await asyncio.to_thread(processes.of_pod, b.pod_uid):
            await self._repairs.lose(managed, engine, f"pod {b.pod} is gone")

    def _report_capture(self, managed: Managed, engine: Engine) -> None:
        name, last = managed.stack.name, captures(engine)[-1]
        self._journal.event(
            name, EventReason.PACKET_DROPPED,
            f"engine {engine.slot}: a packet of bucket {last['bucket']} ended the datapath twice, so it was dropped; the engine goes "
            f"on. That is a bug: report it with the captures of packetstack get {name} -o yaml",
        )  # fmt: skip

    def _kill(self, engine: Engine, why: str, now: float) -> None:
        """End a datapath that hangs. Its init starts another, which adopts the queues."""
        serving = engine.attachments.serving if engine.attachments is not None else None
        last = self._of(engine).killed
        if serving is not None and (last is None or now - last > KILL_SECONDS):
            self._journal.event(
                engine.blueprint.stack,
                EventReason.ENGINE_HUNG,
                f"engine {engine.slot}: {why}, so its datapath was killed; the next one goes on with its queues and flows",
            )
            watch = self._of(engine)
            watch.beats.clear()
            watch.stalls, watch.killed = 0, now
            serving.kill()


def hung(engine: Engine, beats: dict[int, Beat], now: float) -> str:
    """Why the engine hangs: a core's loop does not turn, by its own doing. Empty: it does not.

    `beats` are what was seen before, by core, and are brought up to `now` (monotonic seconds).
    """
    for c in range(engine.blueprint.cores):
        core = engine.core(c)
        count, thread = int(core.heartbeat), int(core.thread)
        beat = beats.get(c)
        if beat is None or beat.count != count:
            beats[c] = Beat(count, now, turns=0 if beat is None else count - beat.count)
            continue
        still = now - beat.since
        # One that sleeps is often seen twice between two turns. What its thread does is dear to ask for.
        if still < (1.2 if int(core.asleep) else 0.4) * STOPPED_SECONDS:
            continue
        spent = processes.spent(engine.pid, thread)
        beat.spent = beat.spent or spent
        if why := judge(still, beat.spent, spent):
            return f"its core {c} {why}"
    return ""


def judge(still: float, before: processes.Spent | None, spent: processes.Spent | None) -> str:
    """What is wrong with a core that has not turned for `still` seconds; empty: nothing yet.

    `before`: what its thread had done when that began; None if nobody can tell.
    """
    if before is None or spent is None or (spent.state == "R" and spent.seconds - before.seconds < BURNT_SECONDS):
        return f"has got no CPU for {still:.2g} s" if still > STARVED_SECONDS else ""
    if spent.state == "R":
        return f"has not come to the end of a turn in {spent.seconds - before.seconds:.2f} s of CPU time"
    if spent.state in "Tt":
        return f"was stopped for {still:.2f} s" if still >= STOPPED_SECONDS else ""
    return f"has waited in the kernel for {still:.2g} s" if still > BLOCKED_SECONDS else ""
