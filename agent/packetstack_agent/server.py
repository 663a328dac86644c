"""The agent's socket: one JSON object a line in, one out. {"verb": ..., ...} -> {"ok": ...} or {"error": ...}."""

import asyncio
import json
import os
import socket
import struct
from typing import Any

from packetstack_agent.agent import Agent
from packetstack_agent.errors import AgentError
from packetstack_agent.metrics import render
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import EventReason

MAX_REQUEST_BYTES = 8 << 20


class Server:
    """Serves `agent` until `stopped` is set."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.stopped = asyncio.Event()
        self.leaving = False
        """The agent ends without removing anything."""
        self.anew = False
        """After its end it begins again, and ends the flows of another build."""

    def leave(self) -> None:
        """End, and let the stacks go on."""
        self.leaving = True
        self.stopped.set()

    def begin_anew(self) -> None:
        """End, and begin again without what another build has made."""
        self.anew = True
        self.leave()

    async def listen(self) -> asyncio.Server:
        """Open the socket, for root and the agent's own user alone."""
        path = self.agent.run.socket
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, path, limit=MAX_REQUEST_BYTES)
        path.chmod(0o600)
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", credentials)[1] not in (0, os.geteuid()):
                return
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ValueError, ConnectionError):
            return  # an overlong line, or the other side went away
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            verb = request.pop("verb")
            return {"ok": await self._call(verb, request)}
        except ResourceError as e:
            return {"error": "\n".join(e.problems)}
        except AgentError as e:
            return {"error": str(e)}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
            return {"error": f"request: cannot be understood ({type(e).__name__}: {e}); use the packetstack command"}
        except Exception as e:  # a bug, or the system ran out of something: the agent goes on
            self.agent.event("-", EventReason.INTERNAL_ERROR, f"{type(e).__name__}: {e}")
            return {"error": f"internal error: {type(e).__name__}: {e}"}

    async def _call(self, verb: str, r: dict[str, Any]) -> Any:
        agent = self.agent
        if agent.foreign and verb not in ("get", "events", "leave", "end_flows"):
            raise AgentError(agent.foreign)
        match verb:
            case "apply":
                async with agent.applying:
                    if r.get("firewall") is not None:
                        await agent.set_firewall(r["firewall"])
                    return await agent.apply(r["documents"], r.get("uplinks", []))
            case "get":
                return agent.get(r.get("name"))
            case "delete":
                async with agent.applying:
                    return await agent.delete(agent.planned(r["name"]).stack.name)
            case "scale":
                return await agent.scale(r["name"], r["replicas"])
            case "move_buckets":
                return await agent.move_buckets(r["name"], r["buckets"], r["slot"], r.get("queue"))
            case "move_queue":
                return await agent.move_queue(r["name"], r["slot"], r["queue"], r["core"])
            case "explain":
                return agent.explain(r["name"], r["protocol"], r["source"], r["sport"], r["destination"], r["dport"])
            case "events":
                name = r.get("name")
                found = [e for e in agent.events if name in (None, e["stack"])]
                if name is not None and not found:
                    agent.get(name)  # or it is not found; of a stack that has gone there are events for a while
                return found
            case "census":
                return agent.census(r["name"])
            case "metrics":
                return render(agent)
            case "stop":
                async with agent.applying:
                    self.stopped.set()
                return None
            case "leave":
                async with agent.applying:
                    self.leave()
                return None
            case "end_flows":
                if not agent.foreign:
                    return None
                agent.begin_anew()
                return sorted(agent.run.record.documents)
            case "upgrade":
                return await agent.upgrade(r["name"], r["slot"])
            case _:
                raise AgentError(f"verb {verb}: unknown to this agent")
