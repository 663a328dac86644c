"""How the agent is asked: its HTTP application on a unix socket, with the real client. The agent itself is played."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.model.node import PlayedStack, resource

from packetstack_agent.agent import Agent
from packetstack_agent.ending import Ending
from packetstack_agent.errors import AgentError
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.node import RunDirectory
from packetstack_agent.verbs import Verbs
from packetstack_agent.web import app
from packetstack_agent.web.answers import Answers
from packetstack_agent.web.app import Web
from packetstack_cli.asking import AgentSocket
from packetstack_cli.client import Client
from packetstack_cli.errors import CliError, EarlierAgent, NoAgent
from packetstack_core import reading, verbs
from packetstack_core.verbs import Json

ROOT = Path(__file__).parents[2]


class PlayedVerbs(Verbs):
    """Answers for the stack `web`, which is ready when `ready` says so."""

    def __init__(self, journal: Journal) -> None:  # without a node
        self._journal = journal
        self.ready = True
        self.shown = 0
        self.told: list[tuple[Any, ...]] = []
        self.slow = asyncio.Event()

    def get(self, name: str | None = None) -> list[Json]:
        self.shown += 1
        if name not in (None, "web"):
            raise AgentError(f"stack {name}: not found; stacks of this agent: web")
        conditions = [{"type": "Progressing", "message": ""}]
        status = {"ready": self.ready, "readyReplicas": 1, "conditions": conditions}
        return [{"metadata": {"name": "web"}, "spec": {"replicas": 2}, "status": status}]

    def events(self, name: str | None = None) -> list[Json]:
        return [e for e in self._journal.events if name in (None, e["stack"])]

    async def scale(self, name: str, replicas: int) -> Json:
        self.told.append(("scale", name, replicas))
        if replicas == 7:
            await self.slow.wait()
        if replicas == 13:
            raise ZeroDivisionError("a fault")
        return {"from": 1, "to": replicas, "note": ""}


class PlayedAgent(Agent):
    """What is asked through HTTP. `played` answers."""

    def __init__(self, run: Path) -> None:  # without a node
        self.run = RunDirectory(run)
        self.run.record.documents["web"] = {}
        self.managed = Managed(PlayedStack(resource()), converged=True)
        self.stacks = Stacks()
        self.stacks["web"] = self.managed
        self.journal = Journal()
        self.event = self.journal.event
        self.applying = asyncio.Lock()
        self.apply = self._applied
        self.verbs = self.played = PlayedVerbs(self.journal)

    async def _applied(self, documents: Sequence[Json], uplinks: Sequence[str]) -> list[dict[str, str]]:
        for document in documents:
            reading.parse(document)
        self.played.told.append(("apply", len(documents), uplinks))
        return [{"stack": "web", "result": "created"}]

    def step(self, ready: bool) -> None:
        """As its task does after each look at the stack."""
        self.played.ready = self.managed.converged = ready
        self.managed.note_step()


class Served:
    """A played agent behind its HTTP application."""

    def __init__(self, run: Path) -> None:
        self.agent = PlayedAgent(run)
        self.ending = Ending()
        self.web = Web(self.agent, self.ending, lambda: True)
        self.client = Client(run)
        self.path = self.agent.run.socket

    async def ask(self, question: Callable[[], Any]) -> Any:
        """What a client gets that is another process."""
        return await asyncio.to_thread(question)

    async def raw(self, method: str, target: str, body: bytes = b"") -> tuple[int, Any]:
        """Status and body of a request of somebody else's making."""
        connector = aiohttp.UnixConnector(str(self.path))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"http://agent{target}", data=io.BytesIO(body)) as answer,
        ):
            return answer.status, json.loads(await answer.read())

    async def line(self, data: bytes) -> bytes:
        """What comes back for bytes that are no HTTP, until the connection ends."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        answer = b""
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return answer


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path)
    await made.web.listen(made.path)
    yield made
    made.agent.played.slow.set()
    await made.web.close()


async def test_questions_and_answers_are_typed(served: Served) -> None:
    assert await served.ask(lambda: served.client.scale("web", 3)) == {"from": 1, "to": 3, "note": ""}
    assert await served.ask(lambda: served.client.get("web")) == served.agent.verbs.get("web")
    assert await served.ask(lambda: served.client.events(None)) == []
    assert served.agent.played.told == [("scale", "web", 3)]


def test_each_verb_is_answered(tmp_path: Path) -> None:
    assert [a.verb for a in Answers(PlayedAgent(tmp_path), Ending()).table()] == list(verbs.TABLE.values())


def test_each_verb_and_each_code_is_documented() -> None:
    rows = [line for line in (ROOT / "docs/architecture.md").read_text().splitlines() if line.startswith("| `")]
    for verb in verbs.TABLE.values():
        [row] = [r for r in rows if f"`{verb.name}`" in r.split("|")[1] and r.split("|")[2].strip() in ("GET", "POST")]
        assert row.split("|")[2].strip() == ("POST" if verb.changes else "GET")
    for code in verbs.Code:
        assert [r for r in rows if r.startswith(f"| `{code}` | ")], code


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "code", "message"),
    [
        ("POST", "/v1/scale", b'{"name": "web"}', 400, "InvalidRequest", "request scale: replicas: is missing; use a value"),
        ("POST", "/v1/scale", b'{"name": "web", "replicas": "many"}', 400, "InvalidRequest", 'request scale: replicas: "many" is'),
        ("POST", "/v1/scale", b'{"name": "web", "replicas": 1e99}', 400, "InvalidRequest", "request scale: replicas: 1e+99 is"),
        ("POST", "/v1/scale", b'{"name": "web", "replicaz": 1}', 400, "InvalidRequest", "request scale: replicas: is missing"),
        ("POST", "/v1/scale", b"\xff\xfe", 400, "InvalidRequest", "request scale: is not JSON: "),
        ("POST", "/v1/scale", b"[" * 200_000, 400, "InvalidRequest", "request scale: is not JSON: "),
        ("POST", "/v1/scale", b"[]", 400, "InvalidRequest", "request scale: "),
        ("POST", "/v1/apply", b'{"documents": 7}', 400, "InvalidRequest", "request apply: documents: 7 is a number; use a list"),
        ("POST", "/v1/apply", b'{"documents": [7]}', 400, "InvalidRequest", "request apply: documents[0]: 7 is a number"),
        ("POST", "/v1/apply", b'{"documents": [{}]}', 422, "InvalidResource", "apiVersion: is missing"),
        ("POST", "/v1/apply", b'{"documents": [], "firewall": "Off"}', 400, "InvalidRequest", 'request apply: firewall: "Off" is'),
        ("GET", "/v1/get?name=no", b"", 409, "Refused", "stack no: not found; stacks of this agent: web"),
        ("GET", "/v1/get?nam=no", b"", 400, "InvalidRequest", "request get: nam: is an unknown field; did you mean name?"),
        ("GET", "/v1/explain?name=web&protocol=tcp&source=a&sport=65536&destination=b&dport=1", b"", 400, "InvalidRequest", "request explain: sport: 65536 is not a port; use 0 to 65535"),
        ("GET", "/v1/wait?names=web&seconds=nan", b"", 400, "InvalidRequest", "request wait: seconds: "),
        ("GET", "/v1/nosuch", b"", 404, "UnknownVerb", "verb nosuch: unknown to this agent; it knows apply, "),
        ("GET", "/v1/scale", b"", 405, "UnknownVerb", "verb scale: GET is not its method; use POST"),
        ("POST", "/v1/scale", b" " * (verbs.MAX_REQUEST_BYTES + 1), 413, "InvalidRequest", "request scale: is longer than 8,388,608 bytes"),
        ("POST", "/v1/scale", b'{"name": "web", "replicas": 13}', 500, "InternalError", "internal error: ZeroDivisionError: a fault"),
    ],
)  # fmt: skip
async def test_a_refusal_has_a_code_and_names_the_field(
    served: Served, method: str, target: str, body: bytes, status: int, code: str, message: str
) -> None:
    got, answer = await served.raw(method, target, body)
    assert got == status
    assert answer["error"]["code"] == code
    said = answer["error"]["message"]
    assert message in said
    assert len(said) < 500
    assert [e["reason"] for e in served.agent.journal.events] == (["InternalError"] if status == 500 else [])
    assert await served.ask(lambda: served.client.get()), "it goes on"


async def test_the_command_shows_the_agents_own_words(served: Served) -> None:
    with pytest.raises(CliError, match=r"^stack no: not found; stacks of this agent: web$"):
        await served.ask(lambda: served.client.get("no"))


async def test_an_agent_that_stands_by_answers_what_needs_no_stack(served: Served) -> None:
    served.agent.stacks.foreign = "LayoutMismatch: stack web has memory layout 2"
    status, answer = await served.raw("POST", "/v1/scale", b'{"name": "web", "replicas": 3}')
    assert (status, answer["error"]) == (503, {"code": "StandingBy", "message": served.agent.foreign})
    assert await served.ask(lambda: served.client.get())
    assert served.agent.played.told == []


async def test_who_waits_is_answered_as_soon_as_the_stack_is_ready_and_not_by_looking_all_the_time(
    served: Served,
) -> None:
    served.agent.step(ready=False)
    served.agent.played.shown = 0
    waiting = asyncio.create_task(served.ask(lambda: served.client.wait(["web"], 10)))
    for _ in range(4):
        await asyncio.sleep(0.05)
        served.agent.step(ready=False)
    assert not waiting.done()
    assert served.agent.played.shown == 0, "a status of a stack on its way is not made"
    served.agent.step(ready=True)
    assert await asyncio.wait_for(waiting, 8) == [], "before its own time is up"
    assert served.agent.played.shown == 1


async def test_who_waits_in_vain_is_told_what_is_not_ready(served: Served) -> None:
    served.agent.step(ready=False)
    [item] = await served.ask(lambda: served.client.wait(["web"], 0.1))
    assert item["metadata"]["name"] == "web"
    with pytest.raises(CliError, match="stack no: not found"):
        await served.ask(lambda: served.client.wait(["no"], 5))


async def test_an_agent_that_ends_answers_who_waits_and_finishes_what_it_was_told(served: Served) -> None:
    served.agent.step(ready=False)
    waiting = asyncio.create_task(served.raw("GET", "/v1/wait?names=web&seconds=20"))
    told = asyncio.create_task(served.raw("POST", "/v1/scale", b'{"name": "web", "replicas": 7}'))
    while not served.agent.played.told:
        await asyncio.sleep(0.01)
    left = await served.raw("POST", "/v1/leave")
    assert left == (200, None)
    assert served.ending.leaving
    closing = asyncio.create_task(served.web.close())
    status, [item] = await waiting
    assert (status, item["metadata"]["name"]) == (200, "web")
    with pytest.raises(NoAgent):
        await served.ask(lambda: served.client.get())
    assert not told.done()
    served.agent.played.slow.set()
    assert await told == (200, {"from": 1, "to": 7, "note": ""})
    await closing


async def test_a_request_that_never_ends_does_not_keep_the_agent_from_ending(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(app, "LAST_ANSWERS_SECONDS", 0.2)
    other = Served(tmp_path / "other")
    other.path.parent.mkdir()
    await other.web.listen(other.path)
    told = asyncio.create_task(other.ask(lambda: other.client.scale("web", 7)))
    while not other.agent.played.told:
        await asyncio.sleep(0.01)
    await asyncio.wait_for(other.web.close(), 5)
    with pytest.raises(NoAgent, match="the agent ended before it answered"):
        await told


async def test_a_command_of_an_earlier_build_gets_one_line_in_its_own_form(served: Served) -> None:
    line = await served.line(b'{"verb": "get"}\n')
    assert line.endswith(b"\n")
    assert json.loads(line)["error"].startswith("this packetstack command is of an earlier build than the agent")


async def test_bytes_that_are_no_request_do_not_hurt(served: Served) -> None:
    for data in (
        b"\n\n\n\n",
        b"\x00" * 100_000,
        b"GET\n\n",
        b"x" * (1 << 20),
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 9000,
    ):
        await served.line(data + b"\r\n\r\n")
    assert await served.ask(lambda: served.client.get())
    assert not served.agent.journal.events


async def test_an_agent_of_an_earlier_build_is_told_apart(tmp_path: Path) -> None:
    async def earlier(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(
                b'{"error": "request: cannot be understood (JSONDecodeError: ...); use the packetstack command"}\n'
            )
        writer.close()

    server = await asyncio.start_unix_server(earlier, tmp_path / "agent.sock")
    async with server:
        with pytest.raises(EarlierAgent) as caught:
            await asyncio.to_thread(Client(tmp_path).get)
        assert str(caught.value).endswith("no connection breaks: packetstack upgrade --agent")
        assert await asyncio.to_thread(Client(tmp_path).alive)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
async def test_nobody_but_root_and_the_agents_own_user_is_let_in(served: Served, tmp_path: Path) -> None:
    assert served.path.stat().st_mode & 0o777 == 0o600
    served.path.chmod(0o666)  # whoever opens it does not open the agent
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o1 == 0:
            directory.chmod(directory.stat().st_mode | 0o1)
    stranger = (
        "import os, socket, sys; os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3);"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.settimeout(5)\n"
        "try:\n    s.sendall(b'GET /v1/get HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n'); print(s.recv(100))\n"
        "except ConnectionError: print(b'')"
    )
    line = [sys.executable, "-S", "-c", stranger, str(served.path)]
    done = await asyncio.to_thread(subprocess.run, line, capture_output=True, text=True, check=False)
    assert done.stdout == "b''\n", done
    assert served.agent.played.shown == 0


async def test_the_tcp_port_only_reads(served: Served) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    await served.web.listen_tcp(f"127.0.0.1:{port}")

    def asked(method: str, target: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request(method, target)
            return connection.getresponse().status
        finally:
            connection.close()

    assert await asyncio.to_thread(asked, "GET", "/healthz") == 200
    for verb in verbs.TABLE.values():
        for method in ("GET", "POST"):
            assert await asyncio.to_thread(asked, method, f"/v1/{verb.name}") == 404
    assert await served.ask(lambda: AgentSocket(served.path.parent).read("/healthz")) == "ok\n"
    with pytest.raises(AgentError, match="--metrics-listen nonsense: "):
        await served.web.listen_tcp("nonsense")
