"""One control loop a stack: read its world, decide, carry out, wait until something changes.

Level-based: the loop remembers only what may be lost (`observing.Memory`), any write may fail, and the next turn goes
on from what is there.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import aiohttp
import kopf

from packetstack_core.backing_off import ANSWER_SECONDS, ENGINE_SECONDS, back_off
from packetstack_core.reasons import ConditionReason
from packetstack_operator import deciding, observing, pods, worlds
from packetstack_operator.autoscaling import Autoscalers
from packetstack_operator.loads import Loads
from packetstack_operator.metrics import Metrics
from packetstack_operator.observing import Memory, Refusal, World
from packetstack_operator.outcome import Decision, Write
from packetstack_operator.overlay import Overlay
from packetstack_operator.ports import Api, Clock, Key, Refused, Stopped
from packetstack_operator.rebalancing import Rebalancers
from packetstack_operator.showing import Shown
from packetstack_operator.worlds import TROUBLE_SECONDS, Indexes, Troubles

TICK_SECONDS = 15.0
"""Between two turns of a stack that nothing wakes."""
REST_SECONDS = 60.0
"""Between two turns of a stack at rest that nothing wakes."""
SETTLE_SECONDS = 0.05
"""Between two turns of a stack: changes come in bursts."""
RELEASE_SECONDS = 30.0
"""How long the deletion of a stack waits for its node's agent."""
RECHECK_SECONDS = 300.0
"""Time between two decisions about a stack at rest, of which nothing changes."""

MAYBE_TAKEN = ("Pod", "PodDisruptionBudget")
"""Kinds of which others make objects too."""

log = logging.getLogger(__name__)


class Keepers:
    """The loops of all stacks, and what wakes them. One for the life of the process."""

    def __init__(self, api: Api, metrics: Metrics, image: str, loads: Loads, clock: Clock | None = None) -> None:
        self.api, self.metrics, self.image, self.loads = api, metrics, image, loads
        self.clock = clock or Clock()
        self.autoscalers = Autoscalers(api, loads, metrics)
        self.rebalancers = Rebalancers(loads, metrics, self.wake)
        self.outdated = ""
        self.overlay = Overlay(self.clock.monotonic)
        self._wakers: dict[Key, asyncio.Event] = {}
        self._ended: dict[Key, asyncio.Event] = {}
        """Set when the loop of the stack has ended."""
        self._followers: dict[Key, set[Key]] = {}
        """Service -> stacks that have it as backends."""
        self._contending: set[Key] = set()
        """Stacks of which another one has an address."""

    # ---- what wakes a stack ----------------------------------------------------------------------------------

    def seen(self, kind: str, event: Mapping[str, Any]) -> None:
        """A watch has brought an event of this kind: wake the stacks that it concerns."""
        body = event["object"]
        meta = body["metadata"]
        self.overlay.saw((kind, meta["namespace"], meta["name"]), event["type"], body)
        if kind in ("FlowTable", "PacketStack"):
            for key in self._contending:  # the address may be free by now
                self.wake(key)
        stack = meta["name"] if kind in ("FlowTable", "PacketStack") else meta.get("labels", {}).get(pods.STACK)
        self.wake((meta["namespace"], str(stack)))
        for owner in meta.get("ownerReferences") or ():  # its labels may say another one
            if owner["name"] != stack:
                self.wake((meta["namespace"], str(owner["name"])))

    def backends_changed(self, namespace: str, service: str) -> None:
        """A Service or its endpoints have changed: wake the stacks that follow it."""
        for key in self._followers.get((namespace, service), ()):
            self.wake(key)

    def wake(self, key: Key) -> None:
        """Decide about the stack soon."""
        if key in self._wakers:
            self._wakers[key].set()

    def _follow(self, key: Key, services: Iterable[str]) -> None:
        wanted = {(key[0], name) for name in services}
        for service, followers in list(self._followers.items()):
            if service not in wanted:
                followers.discard(key)
                if not followers:
                    del self._followers[service]
        for service in wanted:
            self._followers.setdefault(service, set()).add(key)

    # ---- one stack's world -----------------------------------------------------------------------------------

    def read(self, key: Key, indexes: Indexes) -> World | None:
        """The stack and what belongs to it: enough for those who measure. None if there is no such stack."""
        world = worlds.read_world(key, indexes, self.overlay, self.image, self.outdated)
        if world is not None:
            self._follow(key, worlds.services_of(world.stack))
        return world

    def read_all(self, key: Key, indexes: Indexes, memory: Memory) -> World | None:
        """All that a decision takes into account, but for what only the API server knows."""
        world = self.read(key, indexes)
        if world is None:
            return None
        world = worlds.with_others(key, world, indexes)
        (self._contending.add if world.conflict is not None else self._contending.discard)(key)
        return replace(
            world,
            proposal=self.rebalancers.proposal(key),
            loads=self.rebalancers.engine_loads(key),
            memory=memory,
        )

    # ---- the life of a stack ---------------------------------------------------------------------------------

    async def keep(self, key: Key, stopped: Stopped, body: kopf.Body, indexes: Indexes) -> None:
        """Run the stack's loop until `stopped` is set."""
        woken = self._wakers[key] = asyncio.Event()
        ended = self._ended[key] = asyncio.Event()
        try:
            await Keeper(self, key, body, indexes, woken).run(stopped)
        finally:
            ended.set()
            if self._ended.get(key) is ended:
                del self._ended[key]
            self._contending.discard(key)
            if self._wakers.get(key) is woken:
                del self._wakers[key]
            self._follow(key, ())
            self.metrics.stacks.known.pop(key, None)
            self.autoscalers.forget(key)
            self.rebalancers.forget(key)
            self.loads.forget(key)

    async def release(self, key: Key, body: kopf.Body, indexes: Indexes) -> None:
        """Before a deleted stack is gone: give back what its node holds, in order.

        Whatever happens, the deletion goes on after `RELEASE_SECONDS`.
        """
        if "orphan" in (body["metadata"].get("finalizers") or ()):
            return  # kubectl delete --cascade=orphan: the engines stay, and may be taken over by another stack
        woken = asyncio.Event()
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                if key in self._ended:  # its last writes would undo what is done here
                    await self._ended[key].wait()
                self._wakers[key] = woken
                await self._release(key, str(body["metadata"]["uid"]), woken, indexes)
        except TimeoutError:
            log.warning(
                "stack %s/%s: the agent of its node has not let its engines go within %g s; the stack is deleted all the "
                "same, and the node answers for its addresses for up to a minute more",
                *key,
                RELEASE_SECONDS,
            )
        finally:
            if self._wakers.get(key) is woken:
                del self._wakers[key]

    async def _release(self, key: Key, uid: str, woken: asyncio.Event, indexes: Indexes) -> None:
        while True:
            woken.clear()
            try:
                world = self.read_all(key, indexes, Memory())
                if world is None or world.uid != uid or await self._namespace_ends(key[0]):
                    return
                decision = deciding.release(world, self.clock.unix())
                for write in decision.writes:
                    await self.write(key, write)
                if decision.released:
                    return
            except Refused as e:
                if e.status != 409:
                    log.warning(
                        "stack %s/%s: is being deleted, and its engines cannot be let go yet: %s; tried again", *key, e
                    )
                await asyncio.sleep(0.2)
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                log.warning(
                    "stack %s/%s: is being deleted, and the API server does not answer (%s: %s); tried again",
                    *key,
                    type(e).__name__,
                    e,
                )
                await asyncio.sleep(1.0)
            except Exception:  # a bug: the deletion goes on in the end
                self.metrics.errors.labels("InternalError").inc()
                log.exception("stack %s/%s: release: internal error", *key)
                await asyncio.sleep(1.0)
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await woken.wait()

    async def _namespace_ends(self, namespace: str) -> bool:
        """A namespace that is being deleted takes everything with it, in its own order."""
        try:
            found = await self.api.get(f"/api/v1/namespaces/{namespace}")
        except Refused:
            return False  # no right to look, in an operator for named namespaces
        return bool(found["metadata"].get("deletionTimestamp"))

    async def write(self, key: Key, write: Write) -> None:
        """Send one write of the stack, count it, and remember the answer. Errors as for `Api.write`."""
        self.metrics.writes.labels(write.verb, write.kind).inc()
        written = await self.api.write(key[0], write)
        at = (write.kind, key[0], write.name)
        if written is not None:
            self.overlay.wrote(at, written)
        elif write.verb == "delete":
            # Gone before. After a watch was interrupted for long, no event ever says so.
            self.overlay.missed(at, str(write.body["preconditions"]["uid"]))
        if write.kind == "Pod" and write.verb != "apply":
            self.metrics.scaled.labels("up" if write.verb == "create" else "down").inc()


@dataclass(frozen=True, slots=True)
class _Turn:
    """How a turn of the loop ended."""

    outcome: str
    """ok, conflict or error."""
    pause: float
    """Seconds until the next one; when all went well, at most so many."""


class Keeper:
    """The loop of one stack, and what it remembers from one turn to the next."""

    def __init__(self, all_: Keepers, key: Key, body: kopf.Body, indexes: Indexes, woken: asyncio.Event) -> None:
        self._all, self._key, self._body, self._indexes, self._woken = all_, key, body, indexes, woken
        self._shown = Shown()
        self._memory = Memory()
        self._failures = 0
        """Turns in a row that failed."""
        self._ending = False
        """The namespace is being deleted."""
        self._troubles: Troubles = {}
        self._rested: tuple[World, float] | None = None
        """The world in which there was nothing to do, and until when that is believed, on the monotonic clock."""

    async def run(self, stopped: Stopped) -> None:
        """Until `stopped` is set."""
        ending = asyncio.ensure_future(_until(stopped))
        try:
            while not ending.done():
                self._woken.clear()
                began = self._all.clock.monotonic()
                turn = await self._guarded(began)
                failed = turn.outcome != "ok"
                self._failures = self._failures + 1 if failed else 0
                self._all.metrics.duration.labels(turn.outcome).observe(self._all.clock.monotonic() - began)
                await _wait_for_either(ending, asyncio.sleep(turn.pause if failed else min(SETTLE_SECONDS, turn.pause)))
                if not failed and not ending.done():
                    await _wait_for_either(ending, self._woken.wait(), timeout=turn.pause)
        finally:
            ending.cancel()

    async def _guarded(self, began: float) -> _Turn:
        """One turn, whatever comes of it."""
        try:
            return _Turn("ok", await self._turn(began))
        except Refused as e:
            self._ending |= e.ending
            return _Turn("conflict" if e.status == 409 else "error", self._refused(e))
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            self._all.metrics.errors.labels("Unreachable").inc()
            log.warning(
                "stack %s/%s: the API server does not answer (%s: %s); packets go by the last flow table, tried again",
                *self._key,
                type(e).__name__,
                e,
            )
        except Exception:  # a bug: the next turn may do better, other stacks go on
            self._all.metrics.errors.labels("InternalError").inc()
            log.exception("stack %s/%s: internal error", *self._key)
        return _Turn("error", back_off(self._failures, ANSWER_SECONDS))

    async def _turn(self, began: float) -> float:
        """Read, decide, carry out. Returns seconds after which to decide again though nothing wakes the stack."""
        keepers, key = self._all, self._key
        world = keepers.read_all(key, self._indexes, self._memory)
        if world is None or (self._rested is not None and world == self._rested[0] and began <= self._rested[1]):
            return TICK_SECONDS if world is None else REST_SECONDS
        brought = world
        read_world = partial(keepers.read, key, self._indexes)
        keepers.autoscalers.follow(key, world.stack, self._body, read_world)
        keepers.rebalancers.follow(key, world.stack, self._body, read_world)
        world = await worlds.with_looked_up(key, world, keepers.api)
        world = await worlds.with_troubles(key, world, self._troubles, keepers.clock.monotonic(), keepers.api)
        pause = TROUBLE_SECONDS if world.troubles or any(map(observing.prepares, world.pods)) else TICK_SECONDS
        # Pods are deleted first with a namespace, and none can be made for them: let them go at once.
        decide = deciding.release if self._ending else deciding.decide
        decision = decide(world, keepers.clock.unix())
        self._memory = decision.memory
        self._rested = (brought, began + RECHECK_SECONDS) if _rests(world, decision) else None
        await self._carry_out(world, decision)
        self._shown.show(self._body, decision.events)
        keepers.metrics.stacks.known[key] = (world.stack, world.engines)
        if self._rested is not None:
            return REST_SECONDS
        if decision.wake_at is not None:
            pause = min(pause, max(0.0, decision.wake_at - keepers.clock.unix()))
        return pause

    async def _carry_out(self, world: World, decision: Decision) -> None:
        for write in decision.writes:
            try:
                await self._all.write(self._key, write)
            except Refused as e:
                if self._remember(write, e) or self._miss(world, write, e):
                    self._woken.set()
                    return
                if self._is_told(write, e):
                    await self._report_refusal(world, write, e)
                raise
            if self._memory.refused is not None and self._memory.refused.write == write.identity:
                self._memory = replace(self._memory, refused=None)
                self._woken.set()

    def _miss(self, world: World, write: Write, error: Refused) -> bool:
        """Whether the write was for an object that only the watches have.

        One that vanished while a watch was interrupted for so long that it had to list anew stays in kopf's indexes, and
        no event ever says that it is gone.
        """
        present = next((o for o in worlds.objects(world, write.kind) if o["metadata"]["name"] == write.name), None)
        if error.status != 404 or write.verb == "create" or present is None:
            return False
        self._all.overlay.missed((write.kind, self._key[0], write.name), str(present["metadata"]["uid"]))
        return True

    def _is_told(self, write: Write, error: Refused) -> bool:
        """Whether a refusal belongs into the stack's status: it is not that of a moment, nor of a stack's end."""
        of_the_moment = error.status in (409, 429, 503, 504) or (error.status == 404 and not self._failures)
        return not of_the_moment and not error.ending and write.kind != "PacketStack"

    async def _report_refusal(self, world: World, write: Write, error: Refused) -> None:
        """Write what was refused into the status: else it would go on saying what was true before."""
        why = error.message or f"HTTP status {error.status}"
        if error.status == 404 and not error.message:
            why = "the API server has no such kind; apply the CRDs of this operator's version"
        message = f"{write.kind} {write.name}: {why}; until then packets go by the flow table as it is"
        refusal = Refusal(write.identity, _reason(error, ConditionReason.WRITE_REFUSED), message[:1000])
        self._memory = replace(self._memory, refused=refusal)
        decision = deciding.blocked(replace(world, memory=self._memory), self._all.clock.unix())
        for status in decision.writes:
            await self._all.write(self._key, status)
        self._shown.show(self._body, decision.events)

    def _remember(self, write: Write, error: Refused) -> bool:
        """Whether the refusal says what to do next, so that it is no error of the turn."""
        memory = self._memory
        if write.verb == "create" and write.kind in MAYBE_TAKEN and error.exists:
            # Ours, and the watch has not brought it, or somebody else's: the next turn finds out.
            self._memory = replace(memory, taken=memory.taken | {(write.kind, write.name)})
            return True
        if (write.verb, write.kind) != ("create", "Pod") or error.status not in (400, 403, 422, 500) or error.ending:
            return False
        # The API server does not take pods of this shape, or no more of them. Say so, and try less often.
        log.warning("stack %s/%s: %s", *self._key, error)
        self._all.metrics.errors.labels("PodRefused").inc()
        self._memory = replace(
            memory,
            failures=memory.failures + 1,
            create_after=self._all.clock.unix() + back_off(memory.failures, ENGINE_SECONDS),
            problem=(_reason(error, ConditionReason.POD_REFUSED), f"pod {write.name}: {error.message}"),
        )
        return True

    def _refused(self, error: Refused) -> float:
        """What to do about a refused request: the pause before the next turn, in seconds."""
        if error.status == 409:
            # Decided from something that is older than what is there: the watch brings it. That is no error.
            return 0.1 * (1 << min(self._failures, 3))
        if error.ending or (error.status == 404 and not self._failures):
            return 0.1 * (1 << min(self._failures, 6))  # namespace or stack is being deleted
        self._all.metrics.errors.labels("Refused").inc()
        log.warning("stack %s/%s: refused: %s; packets go by the last flow table, tried again", *self._key, error)
        return back_off(self._failures, ANSWER_SECONDS)


def _reason(error: Refused, other: ConditionReason) -> ConditionReason:
    return ConditionReason.QUOTA_EXCEEDED if "exceeded quota" in error.message else other


def _rests(world: World, decision: Decision) -> bool:
    """Whether the same decision would be made of the same world at any later time."""
    conditions = (world.stack.get("status") or {}).get("conditions") or ()
    return (
        not decision.writes
        and decision.wake_at is None
        and decision.memory == world.memory
        and not world.troubles
        and not any(map(observing.prepares, world.pods))
        and not any(map(observing.terminating, world.pods))
        and any(c["type"] == "Progressing" and c["status"] == "False" for c in conditions)
    )


async def _until(stopped: Stopped) -> None:
    await stopped.wait()


async def _wait_for_either(
    ending: "asyncio.Future[None]", other: Coroutine[Any, Any, object], timeout: float | None = None
) -> None:
    """Until one of the two is done, or `timeout` seconds have passed."""
    task: asyncio.Future[Any] = asyncio.ensure_future(other)
    try:
        await asyncio.wait({ending, task}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
