"""Requests to the API server: what was decided is written here, one write after the other."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kubernetes.aio import client, config

from packetstack_operator.observing import Raw
from packetstack_operator.outcome import Write
from packetstack_operator.ports import APPLY_TYPE, PATHS, Refused

MANAGER = "packetstack-operator"
OURS = {"fieldManager": MANAGER}
APPLY = {**OURS, "force": "true"}
CONNECTIONS = 8
"""At once. Each takes some 300 kB, and many stacks write at the same time when the operator starts."""
TIMEOUT_SECONDS = 30.0
TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

log = logging.getLogger(__name__)


class Api:
    """A connection to the API server. Close it in the end."""

    def __init__(self, api: Any) -> None:
        self.client = api

    @classmethod
    async def connect(cls) -> "Api":
        """As the pod's service account, else as $KUBECONFIG says. OSError or a ConfigException if neither works."""
        settings = client.Configuration(connection_pool_maxsize=CONNECTIONS)
        if TOKEN.exists():
            config.load_incluster_config(client_configuration=settings)
        else:
            await config.load_kube_config(
                config_file=os.environ.get("KUBECONFIG"), client_configuration=settings, persist_config=False
            )
        return cls(client.ApiClient(settings))

    async def close(self) -> None:
        """End all connections."""
        await self.client.close()

    async def get(self, path: str) -> Raw:
        """One object. Refused, aiohttp.ClientError, TimeoutError."""
        return await self._request("GET", path, None, "application/json", {})

    async def patch(self, path: str, body: Any, kind: str, manager: str) -> Raw:
        """A patch of this media type. An apply takes what it names from others. Errors as for `get`."""
        force = {"force": "true"} if kind == APPLY_TYPE else {}
        return await self._request("PATCH", path, body, kind, {"fieldManager": manager, **force})

    async def write(self, namespace: str, write: Write) -> Raw | None:
        """Returns the object as it is now; None if it was deleted already. Errors as for `get`."""
        path = PATHS[write.kind].format(namespace)
        named = f"{path}/{write.name}"
        try:
            if write.verb == "create":
                result = await self._request("POST", path, write.body, "application/json", OURS)
            elif write.verb == "delete":
                result = await self._request("DELETE", named, write.body, "application/json", {})
            elif write.verb == "replace":
                result = await self._request("PATCH", named, write.body, "application/merge-patch+json", OURS)
            else:
                place = f"{named}/{write.subresource}".rstrip("/")
                result = await self._request("PATCH", place, write.body, APPLY_TYPE, APPLY)
        except Refused as e:
            # What is gone, or is another object by now, needs no deletion.
            if write.verb == "delete" and e.status in (404, 409):
                return None
            raise
        log.debug("%s %s %s/%s %s", write.verb, write.kind, namespace, write.name, write.subresource)
        return result if result.get("kind") == write.kind else None

    async def _request(self, method: str, path: str, body: Any, kind: str, query: Mapping[str, str]) -> Raw:
        request = await self.client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = await self.client.call_api(*request, _request_timeout=TIMEOUT_SECONDS)
        data = await answer.read()
        try:
            result = json.loads(data)
        except ValueError:
            result = {}
        if not isinstance(result, dict):
            result = {}
        if answer.status >= 300:
            details = result.get("details") or {}
            causes = frozenset(str(c.get("reason")) for c in details.get("causes") or ())
            what = f"{method} {path}"
            raise Refused(what, answer.status, str(result.get("reason")), str(result.get("message") or ""), causes)
        return result
