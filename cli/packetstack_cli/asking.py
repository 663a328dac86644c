"""Asks the agent of this host: the verbs of `packetstack_core.verbs`, over HTTP on its unix socket."""

import http.client
import json
import socket
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

from packetstack_cli.errors import CliError, EarlierAgent, NoAgent
from packetstack_core.values import Model
from packetstack_core.verbs import MAX_REQUEST_BYTES, Verb

ANSWER_SECONDS = 60

R = TypeVar("R", bound=Model)
A = TypeVar("A")


class _Connection(http.client.HTTPConnection):
    """To a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class AgentSocket:
    """One connection a question: an agent that was replaced is not noticed."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._path = run_directory / "agent.sock"

    def ask(self, verb: Verb[R, A], request: R) -> A:
        """The answer. CliError with the agent's line if it refuses, NoAgent if there is none."""
        fields, target = request.document(), f"/v1/{verb.name}"
        if verb.changes:
            status, body = self._request("POST", target, json.dumps(fields).encode())
        else:
            status, body = self._request("GET", f"{target}?{urlencode(fields, doseq=True)}", b"")
        try:
            answer = json.loads(body)
            if status != http.HTTPStatus.OK:
                raise CliError(str(answer["error"]["message"]))
        except (ValueError, LookupError, TypeError):
            raise CliError(
                f"{self._path}: what answers with status {status} is no agent; look who has this file"
            ) from None
        result: A = answer
        return result

    def read(self, target: str) -> str:
        """What the agent serves at this path as text, such as `/metrics`. CliError, NoAgent."""
        status, body = self._request("GET", target, b"")
        if status != http.HTTPStatus.OK:
            raise CliError(f"{self._path}: {target}: the agent answers with status {status}")
        return body.decode()

    def left_behind(self) -> list[str]:
        """Stacks that there were when the agent was there last. Their packets go on without it."""
        return sorted(p.name for p in (self._directory / "stacks").glob("*"))

    def _request(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        if len(body) > MAX_REQUEST_BYTES:
            raise CliError(
                f"request of {len(body):,} bytes: an agent reads at most {MAX_REQUEST_BYTES:,}; use smaller files"
            )
        connection = _Connection(self._path)
        try:
            connection.request(method, target, body or None, {"Connection": "close"})
            with connection.getresponse() as answer:
                return answer.status, answer.read()
        except PermissionError:
            raise CliError(f"{self._path}: no permission; run as root") from None
        except TimeoutError:
            raise CliError(
                f"{self._path}: the agent has not answered for {ANSWER_SECONDS} s; see {self._directory / 'agent.log'}"
            ) from None
        except (http.client.RemoteDisconnected, http.client.IncompleteRead):
            raise NoAgent(
                f"{self._path}: the agent ended before it answered, and may have done what it was asked; "
                f"see {self._directory / 'agent.log'}"
            ) from None
        except http.client.BadStatusLine:
            raise EarlierAgent(
                f"{self._path}: the agent is of an earlier build, which this command cannot ask; "
                "let one of this build follow it, no connection breaks: packetstack upgrade --agent"
            ) from None
        except (FileNotFoundError, ConnectionError):
            raise self._nobody() from None
        finally:
            connection.close()

    def _nobody(self) -> NoAgent:
        if left := self.left_behind():
            problem = f"{', '.join(left)} may go on without one; start another with: packetstack upgrade --agent"
            return NoAgent(f"{self._path}: no agent answers, and {problem}")
        return NoAgent(f"{self._path}: no agent answers; start one with: packetstack up FILE (or name its --run-dir)")
