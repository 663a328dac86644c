"""The answer to each verb of `packetstack_core.verbs`."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from packetstack_agent.agent import Agent
from packetstack_agent.ending import Ending
from packetstack_agent.managed import Managed
from packetstack_core import verbs
from packetstack_core.values import Model
from packetstack_core.verbs import Json, Verb

R = TypeVar("R", bound=Model)
A = TypeVar("A")


class Answered(Generic[R, A]):
    """A verb, and who answers it."""

    def __init__(self, verb: Verb[R, A], answer: Callable[[R], Awaitable[A]]) -> None:
        self.verb, self.answer = verb, answer


class Answers:
    """What the agent does and says when it is asked. AgentError or ResourceError when it refuses."""

    def __init__(self, agent: Agent, ending: Ending) -> None:
        self._agent = agent
        self._ending = ending

    def table(self) -> list[Answered[Any, Any]]:
        """Every verb with its handler, in the order of `verbs.TABLE`."""
        return [
            Answered(verbs.APPLY, self._apply),
            Answered(verbs.GET, self._get),
            Answered(verbs.WAIT, self._wait),
            Answered(verbs.DELETE, self._delete),
            Answered(verbs.SCALE, self._scale),
            Answered(verbs.MOVE_BUCKETS, self._move_buckets),
            Answered(verbs.MOVE_QUEUE, self._move_queue),
            Answered(verbs.UPGRADE, self._upgrade),
            Answered(verbs.EXPLAIN, self._explain),
            Answered(verbs.EVENTS, self._events),
            Answered(verbs.CENSUS, self._census),
            Answered(verbs.STOP, self._stop),
            Answered(verbs.LEAVE, self._leave),
            Answered(verbs.END_FLOWS, self._end_flows),
        ]

    async def _apply(self, r: verbs.Apply) -> list[Json]:
        async with self._agent.applying:
            if r.firewall is not None:
                await self._agent.set_firewall(r.firewall)
            return [dict(done) for done in await self._agent.apply(r.documents, r.uplinks)]

    async def _get(self, r: verbs.OneOrAll) -> list[Json]:
        return self._agent.verbs.get(r.name)

    async def _wait(self, r: verbs.Wait) -> list[Json]:
        loop = asyncio.get_running_loop()
        until = loop.time() + min(r.seconds, verbs.LONGEST_WAIT_SECONDS)
        while True:
            found = [self._agent.stacks.get(name) for name in r.names]
            # A status costs time, and of a stack that is on its way it is known what it would say.
            moving = next((m for m in found if m is not None and not m.converged), None)
            over = loop.time() >= until or self._ending.said.is_set()
            if moving is None or over:
                waiting = [
                    item for name in r.names for item in self._agent.verbs.get(name) if not item["status"]["ready"]
                ]
                if not waiting or over:
                    return waiting
                moving = self._agent.stacks[waiting[0]["metadata"]["name"]]
            await self._next_step(moving, until - loop.time())

    async def _next_step(self, managed: Managed, seconds: float) -> None:
        """Until the stack has been looked after once more, the agent ends, or the time is over."""
        tasks = [asyncio.create_task(event.wait()) for event in (managed.stepped, self._ending.said)]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _delete(self, r: verbs.Named) -> None:
        async with self._agent.applying:
            await self._agent.delete(self._agent.planned(r.name).stack.name)

    async def _scale(self, r: verbs.Scale) -> Json:
        return await self._agent.verbs.scale(r.name, r.replicas)

    async def _move_buckets(self, r: verbs.MoveBuckets) -> Json:
        return await self._agent.verbs.move_buckets(r.name, r.buckets, r.slot, r.queue)

    async def _move_queue(self, r: verbs.MoveQueue) -> Json:
        return await self._agent.verbs.move_queue(r.name, r.slot, r.queue, r.core)

    async def _upgrade(self, r: verbs.Upgrade) -> Json:
        return await self._agent.verbs.upgrade(r.name, r.slot)

    async def _explain(self, r: verbs.Explain) -> Json:
        return self._agent.verbs.explain(r.name, r.protocol, r.source, r.sport, r.destination, r.dport)

    async def _events(self, r: verbs.OneOrAll) -> list[Json]:
        return self._agent.verbs.events(r.name)

    async def _census(self, r: verbs.Named) -> Json:
        return {str(slot): counts for slot, counts in self._agent.verbs.census(r.name).items()}

    async def _stop(self, _: verbs.Nothing) -> None:
        async with self._agent.applying:
            self._ending.stop()

    async def _leave(self, _: verbs.Nothing) -> None:
        async with self._agent.applying:
            self._ending.leave()

    async def _end_flows(self, _: verbs.Nothing) -> list[str] | None:
        if not self._agent.foreign:
            return None
        self._ending.begin_anew()
        return sorted(self._agent.run.record.documents)
