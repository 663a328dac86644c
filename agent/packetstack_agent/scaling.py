"""Autoscalers of the stacks that the agent plans for: they read the engines' load and write spec.replicas, and spec.engine.cores."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from packetstack_agent import loading
from packetstack_agent.errors import AgentError
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed
from packetstack_agent.node import RunDirectory
from packetstack_core import kinds
from packetstack_core.assignment import State as EngineState
from packetstack_core.autoscaling import together
from packetstack_core.autoscaling.metrics import MetricError, Pod
from packetstack_core.autoscaling.together import State
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.autoscaling.vertical import Seen, held_by
from packetstack_core.reasons import ConditionReason, Event, split
from packetstack_core.statuses import AutoscalingStatus
from packetstack_core.verbs import Json

LOOK_SECONDS = 0.5
"""How often it is looked for stacks whose time has come."""
NO_METRICS_API = MetricError("api_error", "the local runtime has no metrics API; use a metric of type Engine")
NOT_MEASURED = MetricError("api_empty", "no load has been measured yet")


@dataclass
class Autoscaler:
    """One stack's autoscaler: its state and what is shown of it."""

    state: State = field(default_factory=State)
    shown: AutoscalingStatus | None = None
    """As the stack's status shows it; None before the first decision."""
    conditions: tuple[kinds.Condition, ...] = ()
    due: float = 0.0
    """When it decides next, by the event loop's clock."""
    clocks: tuple[float, float] | None = None
    """Wall clock and event loop's, as they were at the last decision."""

    def document(self) -> Json:
        """Its part of the stack's status; what the next agent resumes from."""
        shown = self.shown or AutoscalingStatus()
        return {
            "autoscaling": shown.document(),
            "conditions": [c.document() for c in self.conditions],
        }

    @staticmethod
    def resume(document: Json | None) -> "Autoscaler":
        """One that goes on from what `document` gave. What cannot be read is begun anew."""
        try:
            shown = AutoscalingStatus.model_validate((document or {})["autoscaling"])
            known = tuple(kinds.Condition.model_validate(c) for c in (document or {})["conditions"])
        except (KeyError, TypeError, ValueError):
            return Autoscaler()
        return Autoscaler(together.resume(shown, known), shown, known)


class Resizer(Protocol):
    """Who writes spec.replicas and spec.engine.cores."""

    def resize(self, managed: Managed, replicas: int, cores: int | None = None) -> int:
        """Make it this number, with so many cores; returns what the number was. AgentError if it cannot be."""


class Autoscalers:
    """One for each stack that has `spec.autoscaling` and follows no flow table."""

    def __init__(
        self,
        run: RunDirectory,
        stacks: Mapping[str, Managed],
        journal: Journal,
        resizer: Resizer,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: that of the samples' times."""
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._resizer = resizer
        self._clock = clock
        self._known: dict[str, Autoscaler] = {}

    async def run(self) -> None:
        """Decide each time that it is due, until cancelled."""
        while True:
            now = asyncio.get_running_loop().time()
            for managed in list(self._stacks.values()):
                with self._journal.going_on(managed.stack.name, "autoscaler"):
                    self._decide_if_due(managed, now)
            await asyncio.sleep(LOOK_SECONDS)

    def of(self, managed: Managed) -> Autoscaler | None:
        """A stack's autoscaler, if it has one. One that was not seen before is resumed from the agent's record."""
        name, record = managed.stack.name, self._run.record.autoscaling
        if managed.table is not None or managed.stack.resource.spec.autoscaling is None:
            self.forget(name)
            return None
        if name not in self._known:
            self._known[name] = Autoscaler.resume(record.get(name))
        return self._known[name]

    def forget(self, name: str) -> None:
        """The stack has none any more; should it get one again, that begins anew."""
        self._known.pop(name, None)
        self._run.record.autoscaling.pop(name, None)

    def step_aside(self, managed: Managed, who: str) -> bool:
        """`who` wrote spec.replicas: the stack's autoscaler does it no more. False without one, or if it is paused."""
        one, spec = self.of(managed), managed.stack.resource.spec
        if one is None or spec.autoscaling is None or spec.autoscaling.paused:
            return False
        now = self._clock()
        self._keep(managed, one, together.step_aside(spec, one.state, _seen(managed), "replicas", who, now), now)
        return True

    def _decide_if_due(self, managed: Managed, now: float) -> None:
        one, wanted = self.of(managed), managed.stack.resource.spec.autoscaling
        if one is None or wanted is None:
            return
        period = float(wanted.sync_period_seconds)
        if not one.due or one.due > now + period:
            one.due = now + period
        if now < one.due:
            return
        one.due = max(one.due, now - LOOK_SECONDS) + period
        self._decide(managed, one)

    def _decide(self, managed: Managed, one: Autoscaler) -> None:
        spec, now = managed.stack.resource.spec, self._clock()
        wanted = spec.autoscaling
        assert wanted is not None
        clocks = now, asyncio.get_running_loop().time()
        one.state = together.by_the_clock(one.state, one.clocks or clocks, clocks)
        one.clocks = clocks
        measured = managed.history.load(wanted.sync_period_seconds) or NOT_MEASURED
        answers = {i: NO_METRICS_API for i, metric in enumerate(wanted.metrics) if metric.type != "Engine"}
        there = (EngineState.PENDING, EngineState.STARTING, EngineState.ACTIVE)
        count = sum(e.state in there for e in managed.engines.values())
        done = together.reconcile(spec, one.state, _seen(managed), count, measured, now, answers)
        goal = done.write
        if goal is None:
            done = together.ended(done)
        else:
            try:
                self._resizer.resize(managed, goal.replicas, goal.cores)
            except AgentError as e:
                done = together.refused(done, str(e), now)
            else:
                done = together.written(done, now)
        self._keep(managed, one, done, now)

    def _keep(self, managed: Managed, one: Autoscaler, done: together.Round, now: float) -> None:
        one.state = done.state
        one.shown, one.conditions = together.show(done, one.shown, now), together.conditions(done.state)
        self._report(managed.stack.name, done.events)
        self._run.record.autoscaling[managed.stack.name] = one.document()
        self._run.save()

    def _report(self, name: str, events: Iterable[Event]) -> None:
        for event in events:
            self._journal.event(name, event.reason, event.message)


def _seen(managed: Managed) -> Seen:
    spec = managed.stack.resource.spec
    active = [
        Pod(loading.name(e), ready="True")
        for e in managed.engines.values()
        if e.state is EngineState.ACTIVE and not e.removing
    ]
    held = held_by((s.id, s.state) for s in managed.sets.known)
    obstacle = split(managed.problem, ConditionReason.ENGINE_FAILED)[1] if managed.problem else ""
    return Seen(Size(spec.replicas, spec.engine.cores), active, obstacle, held)
