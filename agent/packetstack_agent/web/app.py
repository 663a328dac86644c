"""The HTTP application and its two sites."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from packetstack_agent.agent import Agent
from packetstack_agent.ending import Ending
from packetstack_agent.errors import AgentError
from packetstack_agent.web.answers import Answered, Answers
from packetstack_agent.web.connections import Newcomer, bound
from packetstack_agent.web.reading import Reading
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import EventReason
from packetstack_core.verbs import MAX_REQUEST_BYTES, TABLE, Code, RequestError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LAST_ANSWERS_SECONDS = 10.0
"""How long requests that are being answered may take when the agent ends."""


class Web:
    """Serves `agent` until it is closed. `well`: whether the agent follows the API server, where it has to."""

    def __init__(self, agent: Agent, ending: Ending, well: Callable[[], bool]) -> None:
        self._agent = agent
        self._answers = Answers(agent, ending).table()
        self._reading = Reading(agent, well)
        self._runners: list[web.AppRunner] = []
        self._listener: asyncio.Server | None = None

    async def listen(self, path: Path) -> None:
        """Serve everything on a unix socket, to root and the agent's own user."""
        application = web.Application(middlewares=[self._refusals], client_max_size=MAX_REQUEST_BYTES)
        application.add_routes(self._reading.routes())
        for answered in self._answers:
            method = "POST" if answered.verb.changes else "GET"
            application.router.add_route(method, f"/v1/{answered.verb.name}", self._handler(answered))
        server = (await self._run(application)).server
        assert server is not None
        self._listener = await asyncio.get_running_loop().create_unix_server(lambda: Newcomer(server), sock=bound(path))

    async def listen_tcp(self, where: str) -> None:
        """Serve what only reads on ADDRESS:PORT. AgentError."""
        application = web.Application()
        application.add_routes(self._reading.routes())
        runner = await self._run(application)
        address, _, port = where.rpartition(":")
        try:
            await web.TCPSite(runner, address.strip("[]"), int(port)).start()
        except (OSError, ValueError) as e:
            raise AgentError(
                f"--metrics-listen {where}: {e}; use an address and a free port, as in 127.0.0.1:9470"
            ) from None

    async def close(self) -> None:
        """Let nobody in any more, and finish what is being answered."""
        if self._listener is not None:
            self._listener.close()
        for runner in self._runners:
            await runner.cleanup()

    async def _run(self, application: web.Application) -> web.AppRunner:
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=LAST_ANSWERS_SECONDS)
        await runner.setup()
        self._runners.append(runner)
        return runner

    def _handler(self, answered: Answered[Any, Any]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            verb = answered.verb
            if self._agent.foreign and not verb.standing_by:
                return refusal(503, Code.STANDING_BY, self._agent.foreign)
            if verb.changes:
                asked = verb.read(await request.read())
            else:
                asked = verb.read_query({key: request.query.getall(key) for key in request.query})
            return web.json_response(await answered.answer(asked))

        return handle

    @web.middleware
    async def _refusals(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever goes wrong is said in one form, and nothing of it ends the agent."""
        name = request.path.removeprefix("/v1/")[:60]
        try:
            return await handler(request)
        except RequestError as e:
            return refusal(400, Code.INVALID_REQUEST, str(e))
        except ResourceError as e:
            return refusal(422, Code.INVALID_RESOURCE, "\n".join(e.problems))
        except AgentError as e:
            return refusal(409, Code.REFUSED, str(e))
        except web.HTTPRequestEntityTooLarge:
            return refusal(413, Code.INVALID_REQUEST, f"request {name}: is longer than {MAX_REQUEST_BYTES:,} bytes")
        except web.HTTPNotFound:
            return refusal(404, Code.UNKNOWN_VERB, f"verb {name}: unknown to this agent; it knows {', '.join(TABLE)}")
        except web.HTTPMethodNotAllowed as e:
            right = ", ".join(sorted(e.allowed_methods - {"HEAD"}))
            return refusal(405, Code.UNKNOWN_VERB, f"verb {name}: {request.method} is not its method; use {right}")
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as e:  # a bug, or the system ran out of something: the agent goes on
            problem = f"{type(e).__name__}: {e}"
            self._agent.event("-", EventReason.INTERNAL_ERROR, problem)
            return refusal(500, Code.INTERNAL_ERROR, f"internal error: {problem}")


def refusal(status: int, code: Code, message: str) -> web.Response:
    """An error as the command reads it."""
    return web.json_response({"error": {"code": code, "message": message}}, status=status)
