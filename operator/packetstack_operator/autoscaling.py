"""A task for each stack with `spec.autoscaling`: it measures, decides, writes the size, and then its part of the status.

The number of engines alone is written to /scale, as an HPA would; what triggers decide, `spec.engine.cores` and perhaps the
number, in one patch of the stack. It writes as `packetstack-autoscaler`, so that `managedFields` tells its writes from
those of others.
What it has to know after a restart is in the status; windows and rates begin anew, as an HPA's.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import aiohttp
import kopf

from packetstack_core import autoscalers, reading, resources, standing
from packetstack_core.autoscaling import rounds, together, vertical
from packetstack_core.autoscaling.controller import WRITE_ATTEMPTS
from packetstack_core.autoscaling.metrics import MetricError, Pod, Reading
from packetstack_core.autoscaling.together import Field, State
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.backing_off import ANSWER_SECONDS, back_off
from packetstack_core.kinds import Condition
from packetstack_core.load import StackLoad
from packetstack_core.statuses import AutoscalingStatus
from packetstack_operator import observing, pods, writers
from packetstack_operator.loads import Key, LoadError, Loads
from packetstack_operator.metrics import Metrics
from packetstack_operator.observing import Raw, World
from packetstack_operator.ports import APPLY_TYPE, PATHS, Api, Refused
from packetstack_operator.readings import Readings
from packetstack_operator.showing import Shown
from packetstack_operator.writers import MANAGER

ASK_SECONDS = 5.0
"""So soon the agent is asked again while there is an engine whose load is not known, as after its start."""
AGAIN_SECONDS = 1.5
"""After a question without an answer; before that nobody asks an agent again."""
WAIT_SECONDS = 1.0
"""Between two looks for the first engine, which ask nobody."""
METRICS_SECONDS = 10.0
"""How long a metrics API may take to answer."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Scaled:
    """A stack that is scaled."""

    body: kopf.Body
    """For its events."""
    read_world: Callable[[], World | None]
    """What the watches have brought."""
    wanted: Any
    """`spec.autoscaling` as it was seen last."""
    woken: asyncio.Event
    state: State | None = None
    """None before the first round."""
    ours: frozenset[Field] = frozenset()
    """What the autoscaler was the last writer of."""
    decided: float = 0.0
    """When the last decision was made, on the monotonic clock."""
    wall: float = 0.0
    """The same on the wall clock."""
    asks: bool = False
    """A metric is measured by the engines."""
    read: tuple[Any, resources.Spec | None] = (None, None)
    """Generation of the stack that was read last, and its spec."""
    events: Shown = field(default_factory=Shown)


class Autoscalers:
    """The autoscalers of all stacks, each in a task of its own."""

    def __init__(self, api: Api, loads: Loads, metrics: Metrics) -> None:
        self._api, self._loads, self._metrics = api, loads, metrics
        self._readings = Readings(api)
        self._stacks: dict[Key, tuple[_Scaled, asyncio.Task[None]]] = {}

    def follow(self, key: Key, stack: Raw, body: kopf.Body, read_world: Callable[[], World | None]) -> None:
        """A stack was seen: it gets a task if it needs one. One that has a task is woken when its autoscaling changed."""
        wanted = stack["spec"].get("autoscaling")
        if key in self._stacks:
            scaled, _ = self._stacks[key]
            if scaled.wanted != wanted:
                scaled.wanted = wanted
                scaled.woken.set()
        elif wanted is not None or _shown(stack)[0] is not None:
            scaled = _Scaled(body, read_world, wanted, asyncio.Event())
            self._stacks[key] = scaled, asyncio.create_task(self._run(key, scaled))

    def forget(self, key: Key) -> None:
        """End the task of a stack that is gone."""
        if key in self._stacks:
            self._stacks.pop(key)[1].cancel()
        self._metrics.autoscalers.known.pop(key, None)

    async def _run(self, key: Key, scaled: _Scaled) -> None:
        failures, began = 0, time.monotonic()
        period: float | None = 0.0
        while True:
            try:
                # The next decision is a whole period after this one, whatever the first look at the engines took.
                await self._pause(key, scaled, period, max(began, scaled.decided))
                scaled.woken.clear()
                began = time.monotonic()
                period = await self._round(key, scaled)
                failures = 0
                continue
            except Refused as e:
                if e.status != 404 or failures:  # the stack is being deleted
                    self._metrics.errors.labels("Refused").inc()
                    log.warning("stack %s/%s: not scaled, the API server refuses: %s; tried again", *key, e)
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                self._metrics.errors.labels("Unreachable").inc()
                log.warning(
                    "stack %s/%s: not scaled, the API server does not answer (%s: %s); tried again",
                    *key,
                    type(e).__name__,
                    e,
                )
            except Exception:  # a bug: the next round may do better, other stacks go on
                self._metrics.errors.labels("InternalError").inc()
                log.exception("stack %s/%s: internal error", *key)
            period, began = back_off(failures, ANSWER_SECONDS), time.monotonic()
            failures += 1

    async def _pause(self, key: Key, scaled: _Scaled, period: float | None, began: float) -> None:
        """Until the period is over, or the stack's autoscaling was changed. None: only that."""
        step = min(ASK_SECONDS, max(1.0, (period or 0.0) / 3))
        while period is None or (left := began + period - time.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(None if period is None else min(step, left)):
                    await scaled.woken.wait()
                    return
            if scaled.asks and left > step:
                world, load = scaled.read_world(), self._loads.load(key, step)
                if world is None or load is None or not knows_all(load, world.pods, time.time() - (period or 0.0)):
                    await self._ask(key, world)

    # ---- one round -------------------------------------------------------------------------------------------

    async def _round(self, key: Key, scaled: _Scaled) -> float | None:
        """Seconds from its beginning to the next one; None when there is nothing to do for the autoscaler."""
        world = scaled.read_world()
        spec = _parsed(scaled, world.stack) if world is not None else None
        measured: StackLoad | MetricError = MetricError("api_empty", "nobody has asked for it")
        scaled.asks = False
        if world is not None and spec is not None and spec.autoscaling is not None and _asks(spec, scaled.state):
            begins = scaled.state is None and not _shown(world.stack)[1]
            if begins and spec.replicas and not any(map(_active, world.pods)):
                return WAIT_SECONDS  # there is nothing to measure yet
            scaled.asks = True
            measured = await self._measure(key, scaled, spec.autoscaling.sync_period_seconds)
        raw = await self._api.get(_path(key))
        spec = _parsed(scaled, raw)
        if spec is None or raw["metadata"].get("deletionTimestamp"):
            return ASK_SECONDS
        if spec.autoscaling is None:
            await self._clear(key, raw)
            scaled.state, scaled.ours, scaled.asks = None, frozenset(), False
            self._metrics.autoscalers.known.pop(key, None)
            return None
        period = float(spec.autoscaling.sync_period_seconds)
        world, now, before = scaled.read_world(), time.time(), (scaled.wall, scaled.decided)
        scaled.wall, scaled.decided = now, time.monotonic()
        active = [_pod(p) for p in world.pods if _active(p)] if world is not None else []
        there = int((raw.get("status") or {}).get("replicas") or 0)
        shown, conditions = _shown(raw)
        first, seen = scaled.state is None, _seen(raw, spec, active)
        state = scaled.state or _resume(shown, conditions, seen.size)
        if not first:
            # Kept whatever becomes of this round: the next one sees no jump.
            state = scaled.state = together.by_the_clock(state, before, (now, scaled.decided))
        owned = writers.ours(raw)
        if taken := writers.other_writer(raw, spec, state, seen.size, owned=scaled.ours, first=first):
            done = together.step_aside(spec, state, seen, *taken, now)
            owned |= scaled.ours - {taken[0]}  # of the other one the next round has to know
        else:
            answers = await self._answers(key, spec.autoscaling, state)
            done = together.reconcile(spec, state, seen, there, measured, now, answers)
            if done.write is not None:
                done, wrote = await self._write(key, done, done.write, now)
                owned |= wrote
            else:
                done = together.ended(done)
        scaled.state, scaled.ours = done.state, owned
        self._metrics.autoscalers.known[key] = done
        scaled.events.show(scaled.body, done.events)
        fresh = together.show(done, shown, now), together.conditions(done.state, observing.generation(raw))
        if fresh[0] != shown or {c.type: c for c in fresh[1]} != {c.type: c for c in conditions}:
            await self._apply(key, {"autoscaling": fresh[0].document(), "conditions": [c.document() for c in fresh[1]]})
        return period

    async def _ask(self, key: Key, world: World | None) -> str:
        """Why there is no answer; "" if there is."""
        try:
            if world is None:
                raise LoadError("the stack is not there")
            await self._loads.ask(key, world)
        except LoadError as e:
            return str(e)
        return ""

    async def _measure(self, key: Key, scaled: _Scaled, period: float) -> StackLoad | MetricError:
        problem = await self._ask(key, scaled.read_world())
        if problem:  # one lost question is no reason to decide by an old load
            await asyncio.sleep(min(period, AGAIN_SECONDS))
            problem = await self._ask(key, scaled.read_world())
        if not problem and self._loads.load(key, period) is None:
            await asyncio.sleep(min(period, ASK_SECONDS))
            problem = await self._ask(key, scaled.read_world())
        found = self._loads.load(key, period)
        # An earlier load is used until its samples are too old.
        return found if found is not None else MetricError("api_error", problem)

    async def _answers(self, key: Key, wanted: autoscalers.Autoscaling, state: State) -> dict[int, Reading]:
        others = {i: metric for i, metric in enumerate(wanted.metrics) if metric.engine is None}
        if not others or (rounds.is_external(state.horizontal) and not wanted.paused):
            return {}
        found: dict[int, Reading] = {}
        now = time.time()

        async def read(i: int, metric: autoscalers.Metric) -> None:
            try:
                async with asyncio.timeout(METRICS_SECONDS):
                    found[i] = await self._readings.read(key[0], pods.selector(key[1]), metric, now)
            except TimeoutError:
                found[i] = MetricError("api_error", f"the metrics API has not answered in {METRICS_SECONDS:g} s")

        await asyncio.gather(*(read(i, metric) for i, metric in others.items()))
        return found

    # ---- writes ----------------------------------------------------------------------------------------------

    async def _write(
        self, key: Key, done: together.Round, goal: Size, now: float
    ) -> tuple[together.Round, frozenset[Field]]:
        """This size, if the present one is still that which was decided about. -> what was written"""
        size = done.size
        path, kind, change = f"{_path(key)}/scale", "Scale", _change("/spec/replicas", size.replicas, goal.replicas)
        by_triggers = done.by_metrics is None
        if by_triggers:
            path, kind = _path(key), resources.KIND
            change += _change("/spec/engine/cores", size.cores, goal.cores)
        change.sort(key=lambda one: one["op"] != "test")
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            self._metrics.writes.labels("patch", kind).inc()
            try:
                await self._api.patch(path, change, "application/json-patch+json", MANAGER)
            except Refused as e:
                if e.status == 409 and attempt < WRITE_ATTEMPTS:
                    continue
                was = f"the stack is not {size}" if by_triggers else f"spec.replicas is not {size.replicas}"
                return together.refused(done, f"{was} any more" if e.status == 422 else str(e), now), frozenset()
            break
        wrote: set[Field] = set()
        if goal.replicas != size.replicas:
            wrote.add("replicas")
        if goal.cores != size.cores:
            wrote.add("cores")
        return together.written(done, now), frozenset(wrote)

    async def _apply(self, key: Key, status: Mapping[str, Any]) -> None:
        meta = {"namespace": key[0], "name": key[1]}
        body = {"apiVersion": resources.API_VERSION, "kind": resources.KIND, "metadata": meta, "status": status}
        self._metrics.writes.labels("apply", "PacketStack").inc()
        await self._api.patch(f"{_path(key)}/status", body, APPLY_TYPE, MANAGER)

    async def _clear(self, key: Key, raw: Raw) -> None:
        shown, conditions = _shown(raw)
        if shown is not None or conditions:
            await self._apply(key, {})


# ---- parts -----------------------------------------------------------------------------------------------------


def knows_all(load: StackLoad, engine_pods: Iterable[Raw], since: float) -> bool:
    """Whether this load was read after `since` and has each engine that serves or is about to: it need not be read again."""
    known = {e.name for e in load.engines}
    return load.read > since and all(
        pod["metadata"]["name"] in known for pod in engine_pods if _state(pod) in ("Active", "Starting")
    )


def _change(path: str, value: int, goal: int) -> list[dict[str, Any]]:
    """A part of a JSON patch: it must be this value, and becomes that one."""
    test = {"op": "test", "path": path, "value": value}
    return [test] if value == goal else [test, {"op": "replace", "path": path, "value": goal}]


def _seen(stack: Raw, spec: resources.Spec, active: list[Pod]) -> vertical.Seen:
    """What there is, and what stands against another size, as the stack's status says."""
    status = stack.get("status") or {}
    held = vertical.held_by((s.get("id"), s.get("state")) for s in status.get("sets") or ())
    room: Raw = next((c for c in status.get("conditions") or () if c.get("type") == "CapacityAvailable"), {})
    obstacle = str(room.get("message") or room.get("reason")) if room.get("status") == "False" else ""
    return vertical.Seen(Size(spec.replicas, spec.engine.cores), active, obstacle, held)


def _resume(shown: AutoscalingStatus | None, conditions: Iterable[Condition], size: Size) -> State:
    state = together.resume(shown, conditions)
    first, second = state.horizontal, state.vertical
    # What there is now is not somebody else's change, even if the first round fails.
    if not first.status.conditions:
        first = replace(first, status=replace(first.status, desired_replicas=size.replicas))
    return State(first, second if second.left is not None else replace(second, left=size))


def _path(key: Key) -> str:
    return f"{PATHS[resources.KIND].format(key[0])}/{key[1]}"


def scalable(stack: Raw) -> resources.Spec | None:
    """Its spec; None for a stack that is refused, which the operator says: it is scaled by no other rules than its own."""
    try:
        spec = reading.parse(stack).spec
    except reading.ResourceError:
        return None
    return None if standing.unsupported(spec, kubernetes=True) else spec


def _parsed(scaled: _Scaled, stack: Raw) -> resources.Spec | None:
    generation = stack["metadata"].get("uid"), stack["metadata"].get("generation")
    if scaled.read[0] != generation or generation[1] is None:
        scaled.read = generation, scalable(stack)
    return scaled.read[1]


def _asks(spec: resources.Spec, state: State | None) -> bool:
    """Whether the engines' load is needed for the next decision."""
    wanted, known = spec.autoscaling, state or State()
    if wanted is None:
        return False
    if wanted.vertical is not None and (wanted.paused or not vertical.is_external(known.vertical)):
        return True
    if wanted.vertical_decides_replicas or (rounds.is_external(known.horizontal) and not wanted.paused):
        return False
    return not wanted.metrics or any(metric.engine is not None for metric in wanted.metrics)


def _shown(stack: Raw) -> tuple[AutoscalingStatus | None, tuple[Condition, ...]]:
    """The autoscaler's part of the status; what cannot be read is not there."""
    status = stack.get("status") or {}
    shown = None
    with suppress(ValueError):
        if status.get("autoscaling") is not None:
            shown = AutoscalingStatus.model_validate(status["autoscaling"])
    conditions = []
    for raw in status.get("conditions") or ():
        if raw.get("type") in together.CONDITIONS:
            with suppress(ValueError):
                conditions.append(Condition.model_validate(raw))
    return shown, tuple(conditions)


def _state(pod: Raw) -> str:
    return str(pod["metadata"].get("labels", {}).get(pods.ENGINE_STATE))


def _active(pod: Raw) -> bool:
    return _state(pod) == "Active"


def _pod(raw: Raw) -> Pod:
    status = raw.get("status", {})
    ready: Raw = next((c for c in status.get("conditions") or () if c["type"] == "Ready"), {})
    changed, started = ready.get("lastTransitionTime"), status.get("startTime")
    return Pod(
        str(raw["metadata"]["name"]),
        observing.phase(raw),
        observing.terminating(raw),
        observing.seconds(started) if started else None,
        ready.get("status"),
        observing.seconds(changed) if changed else -inf,
    )
