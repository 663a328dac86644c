"""What anybody who reaches the agent's TCP port may read: metrics, load, health."""

import math
import time
from collections.abc import Callable

from aiohttp import web

from packetstack_agent import loading
from packetstack_agent.agent import Agent
from packetstack_agent.errors import AgentError
from packetstack_agent.metrics import render
from packetstack_core.load import to_json

READ_SECONDS = 0.2
"""Time between two readings of the counters of a stack."""


class Reading:
    """`well`: whether the agent still follows the API server, where it has to."""

    def __init__(self, agent: Agent, well: Callable[[], bool]) -> None:
        self._agent = agent
        self._well = well
        self._read: dict[tuple[str, bool], tuple[float, bytes]] = {}
        """Stack, and whether with its buckets -> when its load was read last, and the answer."""

    def routes(self) -> list[web.RouteDef]:
        """The three paths."""
        return [
            web.get("/metrics", self._metrics),
            web.get("/load", self._load),
            web.get("/healthz", self._health),
        ]

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="" if self._agent.foreign else render(self._agent), content_type="text/plain")

    async def _health(self, _: web.Request) -> web.Response:
        if self._well():
            return web.Response(text="ok\n")
        why = "the task that follows the flow tables has ended; changes of stacks do not reach this node any more\n"
        return web.Response(text=why, status=503)

    async def _load(self, request: web.Request) -> web.Response:
        name, buckets = request.query.get("stack", ""), request.query.get("buckets") == "1"
        managed, now = self._agent.stacks.get(name), time.monotonic()
        if managed is None:
            self._read.pop((name, buckets), None)
            return web.Response(text="no such stack\n", status=404)
        # Whoever asks more often gets what there is: reading takes time from what else the agent does.
        if now - self._read.get((name, buckets), (-math.inf, b""))[0] > READ_SECONDS:
            try:
                self._read[name, buckets] = now, to_json(loading.snapshot(managed, with_buckets=buckets))
            except AgentError as e:
                return web.Response(text=f"{e}\n", status=503)
        return web.Response(body=self._read[name, buckets][1], content_type="application/json")
