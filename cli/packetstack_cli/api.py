"""A Kubernetes API server as the CLI uses it: requests in JSON, and commands in containers.

Objects are plain documents. The client library is imported only here and only when a cluster is asked: it is heavy.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packetstack_cli.errors import CliError
from packetstack_core.verbs import Json

ANSWER_SECONDS = 30.0
COMMAND_SECONDS = 60.0
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Refused(CliError):
    """The API server said no. `status` is HTTP's; `causes` are those of its Status object."""

    def __init__(self, status: int, message: str, causes: Sequence[Mapping[str, Any]], known: bool) -> None:
        super().__init__(message)
        self.status, self.causes = status, causes
        self.known = known
        """The server knows this kind of object (a 404 is then about one object)."""


class NotAnswered(CliError):
    """A command could not be run in a container."""


class CommandFailed(CliError):
    """A command in a container has ended with an error, whose last line this is; `output` is what it printed."""

    def __init__(self, said: str, output: str) -> None:
        super().__init__(said)
        self.output = output


class Api:
    """Connects at the first request. `kubeconfig`, `context`: as for kubectl; None is its default."""

    def __init__(self, kubeconfig: Path | None, context: str | None) -> None:
        from kubernetes import client, config

        # Explicitly given files must be there; without any, a pod's own account will do.
        settings = client.Configuration()
        file = str(kubeconfig) if kubeconfig is not None else None
        try:
            config.load_kube_config(file, context, client_configuration=settings, persist_config=False)
            contexts, active = config.list_kube_config_contexts(file)
            chosen = next((c for c in contexts if c["name"] == context), active)
            self.namespace = str(chosen["context"].get("namespace") or "default")
        except (config.ConfigException, OSError, KeyError, TypeError, ValueError) as e:
            if kubeconfig is not None or context is not None or not OWN_NAMESPACE.exists():
                raise CliError(
                    f"kubeconfig: {_line(e).removeprefix('Invalid kube-config file. ').rstrip('.')}; use --kubeconfig FILE, or set KUBECONFIG"
                ) from None
            config.load_incluster_config(client_configuration=settings)
            self.namespace = OWN_NAMESPACE.read_text().strip()
        settings.retries = False
        self._settings = settings
        self._client = client.ApiClient(settings)

    def close(self) -> None:
        """Hang up."""
        self._client.rest_client.close()

    def get(self, path: str, **query: str) -> Json:
        """An object, or a list with `items`. CliError."""
        return self.request("GET", path, query)

    def items(self, path: str, **query: str) -> list[Json]:
        """The objects of a list. CliError."""
        return list(self.get(path, **query).get("items") or ())

    def find(self, path: str, **query: str) -> Json | None:
        """An object, or None where there is none of this name. CliError."""
        try:
            return self.get(path, **query)
        except Refused as e:
            if e.status == 404:
                return None
            raise

    def request(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None, kind: str = "json"
    ) -> Json:
        """The answer as JSON. `kind`: of the body, as in application/KIND. Refused, CliError."""
        status, text = self._ask(method, path, query or {}, body, f"application/{kind}")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {}
        if not isinstance(answer, dict):
            answer = {}
        if status >= 300:
            details = answer.get("details") or {}
            message = str(answer.get("message") or f"{method} {path}: the API server answers {status}")
            raise Refused(status, " ".join(message.split()), details.get("causes") or (), "name" in details)
        return answer

    def text(self, path: str, **query: str) -> str:
        """An answer that is not JSON, such as a log. Refused, CliError."""
        status, text = self._ask("GET", path, query, None, "application/json")
        if status >= 300:
            self.request("GET", path, query)  # raises with the server's message
        return text

    def _ask(self, method: str, path: str, query: Mapping[str, str], body: Any, kind: str) -> tuple[int, str]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            method, url, headers, content, _ = self._serialized(method, path, list(query.items()), kind, body)
            answer = self._client.call_api(method, url, headers, content, _request_timeout=ANSWER_SECONDS)
            return int(answer.status), bytes(answer.read() or b"").decode(errors="replace")
        except (HTTPError, ApiException, OSError) as e:
            host = self._settings.host
            raise CliError(f"API server {host}: cannot be reached: {_line(e)}; check kubeconfig and context") from None

    def _serialized(self, method: str, path: str, query: list[tuple[str, str]], kind: str, body: Any = None) -> Any:
        headers = {"Accept": "application/json", "Content-Type": kind}
        return self._client.param_serialize(
            method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
        )

    def execute(self, namespace: str, pod: str, container: str, command: Sequence[str]) -> str:
        """What the command printed. NotAnswered if it cannot be run, CommandFailed."""
        from kubernetes.client import ApiException
        from kubernetes.stream.ws_client import ERROR_CHANNEL, STDERR_CHANNEL, STDOUT_CHANNEL, websocket_call
        from websocket import WebSocketException

        query = [("command", word) for word in command]
        query += [("container", container), ("stdout", "true"), ("stderr", "true")]
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/exec"
        method, url, headers, *_ = self._serialized("GET", path, query, "application/json")
        parts: dict[int, bytes] = {STDOUT_CHANNEL: b"", STDERR_CHANNEL: b"", ERROR_CHANNEL: b""}
        deadline = time.monotonic() + COMMAND_SECONDS
        try:
            stream = websocket_call(
                self._settings, method, url, headers=headers, _preload_content=False, capture_all=False, binary=True
            )
            try:
                while stream.is_open() and time.monotonic() < deadline:
                    stream.update(timeout=1)
                    for channel in parts:
                        parts[channel] += stream.read_channel(channel)
            finally:
                stream.close()
                stream.sock.shutdown()  # close() leaves it open when the server was first
        except (ApiException, WebSocketException, OSError) as e:
            raise NotAnswered(f"pod {namespace}/{pod}: no command can be run in it: {_line(e)}") from None
        try:
            ended = json.loads(parts[ERROR_CHANNEL])
        except ValueError:
            raise NotAnswered(f"pod {namespace}/{pod}: {' '.join(command)} was cut off") from None
        output, said = (parts[c].decode(errors="replace") for c in (STDOUT_CHANNEL, STDERR_CHANNEL))
        if ended.get("status") != "Success":
            lines = said.strip().splitlines() or [str(ended.get("message") or "the command failed")]
            raise CommandFailed(lines[-1], output)
        return output


def _line(error: BaseException) -> str:
    """The end of what nested errors say."""
    text = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
    if "Handshake status " in text:  # HTTP's status and reason, then all headers
        text = text.split("Handshake status ", 1)[1].split(" -+-+-", 1)[0]
    return text.rpartition(": ")[2] if "object at 0x" in text else text[:300]
