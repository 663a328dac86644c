"""The agent's autoscalers: when they decide, what they write, what the next agent knows. In virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import looptime
import pytest
from tests.model.node import PlayedEngine, PlayedJournal, PlayedStack, flow_table, managed, resource

from packetstack_agent.engines import Engine
from packetstack_agent.managed import Managed
from packetstack_agent.node import RunDirectory
from packetstack_agent.scaling import Autoscaler, Autoscalers
from packetstack_core import reading
from packetstack_core.assignment import State
from packetstack_core.autoscaling.together import Round
from packetstack_core.load import CoreCounters, EngineCounters, Snapshot

BEGIN = 1_000_000_000.0
BUSY = {
    "type": "Engine",
    "engine": {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": 60}},
}
QUEUED = {"type": "External", "external": {"metric": {"name": "q"}, "target": {"type": "Value", "value": "10"}}}


class Noted(Autoscalers):
    """Notes each time that something is decided."""

    def __init__(self, decided: list[float], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.decided = decided

    def _keep(self, managed: Managed, one: Autoscaler, done: Round, now: float) -> None:
        self.decided.append(asyncio.get_running_loop().time())
        super()._keep(managed, one, done, now)


class World:
    """One stack, whose engines are as busy as `work` makes them."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        directory: Path,
        autoscaling: dict[str, Any] | None,
        replicas: int = 1,
    ) -> None:
        self.loop = loop
        self.work = 0.5
        self.run = RunDirectory(directory)
        self.journal = PlayedJournal(loop.time)
        self.sizes: list[tuple[float, int]] = []
        self.cores: list[int] = []
        """Cores of an engine, as they were written."""
        self.cycles: dict[int, dict[int, int]] = {}
        self.stack = PlayedStack(resource(replicas=replicas))
        self.managed = managed(self.stack)
        self.stacks = {"web": self.managed}
        self.become(autoscaling, replicas)
        self._engines(replicas)
        self.decided: list[float] = []
        """When something was decided."""
        self.autoscalers = self.another()
        self.replaces = True
        """Engines of another shape are replaced."""
        self.ahead = 0.0
        """Of the wall clock."""

    def another(self) -> Autoscalers:
        """As the next agent has it."""
        return Noted(self.decided, self.run, self.stacks, self.journal, self, self.clock)

    @property
    def events(self) -> list[tuple[float, str, str]]:
        return self.journal.told

    def clock(self) -> float:
        return BEGIN + self.loop.time() + self.ahead

    def become(self, autoscaling: dict[str, Any] | None, replicas: int | None = None, **changes: Any) -> None:
        replicas = self.stack.resource.spec.replicas if replicas is None else replicas
        parts: dict[str, Any] = {"autoscaling": autoscaling} if autoscaling is not None else {}
        self.stack.resource = resource(replicas=replicas, **parts, **changes)

    def resize(self, managed: Managed, replicas: int, cores: int | None = None) -> int:
        was = managed.stack.resource.spec.replicas
        managed.stack.resource = reading.with_replicas(managed.stack.resource, replicas, cores)
        if was != replicas:
            self.sizes.append((self.loop.time(), replicas))
        if cores is not None:
            self.cores.append(cores)
        return was

    def _engines(self, replicas: int) -> None:
        for slot in range(replicas):
            self.managed.engines.setdefault(slot, PlayedEngine(slot, self.stack.resource))
        for slot in [s for s in self.managed.engines if s >= replicas]:
            del self.managed.engines[slot]

    async def live(self) -> None:
        """Counters each second; engines are there a second after they were asked for."""
        while True:
            await asyncio.sleep(1)
            total = sum(e.blueprint.cores for e in self.managed.engines.values())
            share = min(1.0, self.work / total) if total else 0.0
            now = self.loop.time()
            seen = []
            for slot in self.managed.engines:
                own = self.managed.engines[slot].blueprint.cores
                busy = self.cycles.setdefault(slot, {}).get(own, 0) + round(1000 * share)
                self.cycles[slot] = {own: busy}  # another shape begins anew
                cores = (CoreCounters(busy, round(1000 * now)),) * own
                state = str(self.managed.engines[slot].state)
                seen.append(EngineCounters(slot, f"web-{slot}", state, True, cores, (), 0, 0, 0, 0, 0))
            self.managed.history.add(Snapshot(now, tuple(seen)), self.clock())
            self._engines(self.managed.stack.resource.spec.replicas)
            for slot, engine in self.managed.engines.items():
                if engine.blueprint.cores != self.stack.resource.spec.engine.cores and self.replaces:
                    self.managed.engines[slot] = PlayedEngine(slot, self.stack.resource)
                    break  # one after the other

    def reasons(self) -> list[str]:
        return self.journal.reasons()

    def shown(self) -> dict[str, Any]:
        one = self.autoscalers.of(self.managed)
        assert one is not None
        return one.document()

    def active(self) -> tuple[str, str]:
        """Status and reason of ScalingActive."""
        return next((c["status"], c["reason"]) for c in self.shown()["conditions"] if c["type"] == "ScalingActive")


def autoscaling(**changes: Any) -> dict[str, Any]:
    quick = {"scaleDown": {"stabilizationWindowSeconds": 10}}
    return {"minReplicas": 1, "maxReplicas": 4, "metrics": [BUSY], "syncPeriodSeconds": 5, "behavior": quick, **changes}


def run(wanted: dict[str, Any] | None, story: Callable[[World], Awaitable[None]], replicas: int = 1) -> World:
    """Let time pass in a world as `story` says."""
    loop = looptime.new_event_loop()
    loop.set_exception_handler(lambda _, context: pytest.fail(str(context)))
    directory = TemporaryDirectory()
    world = World(loop, Path(directory.name), wanted, replicas)

    async def main() -> None:
        tasks = [asyncio.create_task(world.live()), asyncio.create_task(world.autoscalers.run())]
        try:
            await story(world)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
        directory.cleanup()
    return world


def test_engines_come_and_go_with_the_load() -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(30)
        assert not world.sizes
        world.work = 2.0
        await asyncio.sleep(30)
        world.work = 0.3
        await asyncio.sleep(60)

    world = run(autoscaling(), story)
    assert [size for _, size in world.sizes] == [2, 4, 1]
    assert world.sizes[0][0] <= 36, "a step of load is answered within a sync period"
    assert 70 <= world.sizes[2][0] <= 80, "after the window of ten seconds"
    assert world.reasons() == ["SuccessfulRescale"] * 3
    assert world.events[0][2] == "New size: 2; reason: engine metric Utilization above target"


SIZED = {"maxCores": 4, "holdSeconds": 10, "coolDownSeconds": 10}


def test_cores_come_and_go_with_the_load_and_the_next_agent_goes_on() -> None:
    async def story(world: World) -> None:
        world.work = 2.2
        await asyncio.sleep(60)
        assert world.stack.resource.spec.engine.cores == 4
        world.autoscalers = world.another()
        assert world.autoscalers.of(world.managed)
        vertical = world.shown()["autoscaling"]["vertical"]
        assert (vertical["desiredCores"], vertical["decides"]) == (4, "CoresAndReplicas")
        world.work = 0.1
        await asyncio.sleep(60)

    world = run({"maxReplicas": 1, "syncPeriodSeconds": 5, "vertical": SIZED}, story)
    assert world.cores == [2, 4, 1]
    assert world.reasons().count("EnginesResized") == 3
    assert not world.sizes


def test_while_engines_cannot_be_made_the_stack_stays_and_says_so() -> None:
    async def story(world: World) -> None:
        world.replaces = False
        world.work = 1.0
        await asyncio.sleep(16)
        assert world.cores == [2]
        world.managed.problem = "NoExclusiveCPU: no CPU is left for an engine"
        await asyncio.sleep(30)
        vertical = world.shown()["autoscaling"]["vertical"]
        assert vertical["refused"] == "NoFreeCore"
        assert "engines with 1 core are not replaced yet: no CPU is left for an engine" in vertical["decision"]
        assert world.cores == [2]
        world.work = 0.1
        await asyncio.sleep(30)

    assert run({"maxReplicas": 1, "syncPeriodSeconds": 5, "vertical": SIZED}, story).cores == [2, 1]


def test_whoever_scales_by_hand_takes_the_size_from_the_triggers() -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(11)
        world.become({"maxReplicas": 4, "syncPeriodSeconds": 5, "vertical": SIZED}, 2)
        assert world.autoscalers.step_aside(world.managed, "packetstack scale")
        world.work = 2.0
        await asyncio.sleep(40)
        assert not world.cores
        assert "ExternallyScaled" in [c["reason"] for c in world.shown()["conditions"]]

    run({"maxReplicas": 4, "syncPeriodSeconds": 5, "vertical": SIZED}, story)


def test_it_decides_once_a_sync_period() -> None:
    async def story(world: World) -> None:
        decided = world.decided
        await asyncio.sleep(31)
        assert len(decided) == 6
        world.become(autoscaling(syncPeriodSeconds=1))
        await asyncio.sleep(10)
        assert 15 <= len(decided) <= 17

    run(autoscaling(), story)


def test_a_step_that_took_long_is_not_made_up_for() -> None:
    async def story(world: World) -> None:
        decided = world.decided
        await asyncio.sleep(6)
        one = world.autoscalers.of(world.managed)
        assert one is not None
        one.due = 1.0  # as if nobody had looked for a long time
        await asyncio.sleep(4)
        assert len(decided) == 2

    run(autoscaling(syncPeriodSeconds=5), story)


@pytest.mark.parametrize("paused", ["autoscaling", "stack"])
def test_while_paused_nothing_is_written(paused: str) -> None:
    async def story(world: World) -> None:
        world.become(autoscaling(paused=paused == "autoscaling"), paused=paused == "stack")
        world.work = 3.0
        await asyncio.sleep(20)
        assert not world.sizes
        assert "AutoscalingPaused" in world.reasons()
        world.become(autoscaling())
        await asyncio.sleep(6)
        assert world.sizes

    run(autoscaling(), story)


def test_whoever_scales_by_hand_takes_the_replicas_over_until_it_was_paused() -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(11)
        world.become(autoscaling(), 3)
        world.autoscalers.step_aside(world.managed, "packetstack scale")
        assert world.active() == ("False", "ExternallyScaled")
        await asyncio.sleep(60)
        assert not world.sizes
        assert world.active() == ("False", "ExternallyScaled")
        assert world.reasons().count("ExternallyScaled") == 1
        world.become(autoscaling(paused=True))
        await asyncio.sleep(6)
        world.become(autoscaling())
        await asyncio.sleep(30)
        assert [size for _, size in world.sizes] == [1]

    run(autoscaling(), story)


def test_by_hand_while_it_is_paused_is_not_a_second_writer() -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(11)
        world.become(autoscaling(paused=True), 3)
        world.autoscalers.step_aside(world.managed, "packetstack scale")
        assert world.active() == ("True", "ValidMetricFound")

    run(autoscaling(), story)


def test_autoscaling_that_was_removed_and_put_back_takes_over() -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(11)
        world.become(autoscaling(), 3)
        world.autoscalers.step_aside(world.managed, "packetstack scale")
        world.become(None)
        await asyncio.sleep(1)
        assert world.autoscalers.of(world.managed) is None
        assert not world.run.record.autoscaling
        world.become(autoscaling())
        await asyncio.sleep(30)
        assert [size for _, size in world.sizes] == [1]

    run(autoscaling(), story)


def test_the_next_agent_goes_on_and_takes_no_engine_at_once() -> None:
    async def story(world: World) -> None:
        world.work = 2.0
        await asyncio.sleep(21)
        assert [size for _, size in world.sizes] == [2, 4]
        before = world.shown()
        world.work = 0.3
        tasks = world.run.record.autoscaling
        fresh = world.another()
        one = fresh.of(world.managed)
        assert one is not None
        assert one.document() == before == tasks["web"]
        for _ in range(3):
            world.autoscalers._known.clear()
            await asyncio.sleep(6)  # another agent each time, before it knows enough
        assert [size for _, size in world.sizes] == [2, 4]
        await asyncio.sleep(20)
        assert [size for _, size in world.sizes] == [2, 4, 1]
        assert world.shown()["autoscaling"]["lastScaleTime"] > before["autoscaling"]["lastScaleTime"]

    run(autoscaling(), story)


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_clock_that_is_set_makes_no_window_longer_or_shorter(jump: float) -> None:
    async def story(world: World) -> None:
        world.work = 2.0
        await asyncio.sleep(21)
        world.work = 0.3
        await asyncio.sleep(5)
        world.ahead = jump
        await asyncio.sleep(18)
        assert [size for _, size in world.sizes] == [2, 4], "it has been 30 s only in 6 s"
        await asyncio.sleep(12)
        assert world.sizes[-1][1] == 1

    run(autoscaling(behavior={"scaleDown": {"stabilizationWindowSeconds": 30}}), story)


def test_a_record_that_cannot_be_read_is_begun_anew() -> None:
    async def story(world: World) -> None:
        world.run.record.autoscaling["web"] = {"autoscaling": {"desiredReplicas": "many"}, "conditions": 3}
        await asyncio.sleep(11)
        assert world.active() == ("True", "ValidMetricFound")

    run(autoscaling(), story)


def test_metrics_of_kubernetes_are_refused_and_take_no_engine() -> None:
    async def story(world: World) -> None:
        world.work = 0.0
        await asyncio.sleep(60)
        assert not world.sizes, "half of what was asked for is not known"
        assert world.active() == ("False", "FailedGetExternalMetric")
        message = next(m for _, r, m in world.events if r == "FailedGetExternalMetric")
        assert "the local runtime has no metrics API; use a metric of type Engine" in message
        world.work = 2.0
        await asyncio.sleep(10)
        assert world.sizes

    run(autoscaling(metrics=[BUSY, QUEUED]), story, replicas=2)


def test_a_stack_that_follows_a_flow_table_is_left_alone() -> None:
    async def story(world: World) -> None:
        world.managed.table = flow_table(world.stack.resource)
        world.work = 3.0
        await asyncio.sleep(30)
        assert not world.sizes
        assert world.autoscalers.of(world.managed) is None

    run(autoscaling(), story)


def test_an_engine_that_starts_or_leaves_is_not_counted() -> None:
    async def story(world: World) -> None:
        world.managed.engines[1].state = State.DRAINING
        await asyncio.sleep(6)
        proposals = world.shown()["autoscaling"]["record"]["proposals"]
        assert proposals[0]["missing"] == 0

    run(autoscaling(), story, replicas=2)


class Broken(Managed):
    """A stack whose engines cannot be looked at."""

    @property
    def engines(self) -> dict[int, Engine]:
        raise LookupError("no engine")

    @engines.setter
    def engines(self, _: dict[int, Engine]) -> None:
        """They are none."""


def test_a_bug_in_one_autoscaler_does_not_end_the_others() -> None:
    async def story(world: World) -> None:
        broken = Broken(PlayedStack(resource("broken", autoscaling=autoscaling())))
        world.stacks |= {"broken": broken, "web": world.stacks.pop("web")}
        world.work = 2.0
        await asyncio.sleep(11)
        assert "InternalError" in world.reasons()
        assert world.sizes

    run(autoscaling(), story)
