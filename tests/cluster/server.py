"""Plain requests to an API server: a process of kubectl takes half a second, and tests ask many times a second."""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from tests.cluster.processes import POLL_SECONDS, ClusterError

JSON = dict[str, Any]
DISCOVERY = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
KNOWN_SECONDS = 10.0
"""Of a kind whose definition was just made: the server tells of it a moment later."""
MANAGER = "kubectl"
"""Whose fields are those that `apply` writes: as with `kubectl apply --server-side`."""


class ServerError(ClusterError):
    """The API server's answer to a request that it did not carry out."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:300]}")
        self.status = status


@dataclass(frozen=True)
class Resource:
    """Where objects of a kind are: `base` is the path of group and version."""

    base: str
    plural: str
    namespaced: bool

    def path(self, namespace: str, name: str = "") -> str:
        """Of one object, or without a name of all in the namespace."""
        within = f"/namespaces/{namespace}" if self.namespaced else ""
        return f"{self.base}{within}/{self.plural}" + (f"/{name}" if name else "")


class Server:
    """With the client certificate of a kubeconfig; a connection for each thread."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.address = urlsplit(cluster["server"]).netloc
        self.context = ssl.create_default_context(
            cadata=base64.b64decode(cluster["certificate-authority-data"]).decode()
        )
        with tempfile.TemporaryDirectory() as directory:
            for name in ("certificate", "key"):
                (Path(directory) / name).write_bytes(base64.b64decode(user[f"client-{name}-data"]))
            self.context.load_cert_chain(f"{directory}/certificate", f"{directory}/key")
        self._local = threading.local()
        self._connections: list[http.client.HTTPSConnection] = []
        self._resources: dict[str, Resource] = {}

    # ---- by path

    def request(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """The answer, parsed. Raises `ServerError`, and OSError when the server is away."""
        headers = {"Content-Type": kind}
        return json.loads(self._ask(method, path, json.dumps(body) if body is not None else None, headers))

    def text(self, path: str, accept: str = "*/*") -> str:
        """The answer to a GET as it is, such as that of `/readyz`."""
        return self._ask("GET", path, None, {"Accept": accept})

    def _ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> str:
        for attempt in (0, 1):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = http.client.HTTPSConnection(
                    self.address, context=self.context, timeout=30
                )
                self._connections.append(connection)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                text = answer.read().decode()
                break
            except (http.client.HTTPException, OSError):
                self.close()
                if attempt:
                    raise
        if answer.status >= 300:
            raise ServerError(answer.status, text)
        return str(text)

    def close(self) -> None:
        """The connection of this thread."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._connections.remove(connection)
            self._local.connection = None

    def close_all(self) -> None:
        """Those of all threads, which ask no more."""
        for connection in self._connections:
            connection.close()

    def get(self, path: str) -> Any:
        """None if it is not there."""
        try:
            return self.request("GET", path)
        except ServerError as e:
            if e.status == 404:
                return None
            raise

    def items(self, path: str, selector: str = "") -> list[JSON]:
        return list(self.request("GET", path + (f"?labelSelector={quote(selector)}" if selector else ""))["items"])

    def merge(self, path: str, body: JSON) -> Any:
        return self.request("PATCH", path, body, "application/merge-patch+json")

    def apply(self, path: str, body: JSON, manager: str) -> Any:
        query = f"?fieldManager={manager}&force=true"
        return self.request("PATCH", path + query, body, "application/apply-patch+yaml")

    def delete(self, path: str, **options: Any) -> None:
        try:
            self.request("DELETE", path, options)
        except ServerError as e:
            if e.status not in (404, 409):
                raise

    # ---- by kind, as kubectl does

    def find(self, *words: str) -> JSON:
        """What `kubectl get WORDS -o json` prints, of one kind: an object, or a list with `items`."""
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("kind")
        parser.add_argument("name", nargs="?", default="")
        parser.add_argument("-n", "--namespace", default="default")
        parser.add_argument("-l", "--selector", default="")
        parser.add_argument("--field-selector", default="")
        parser.add_argument("--show-managed-fields", action="store_true")
        asked = parser.parse_args(words)
        selectors = {"labelSelector": asked.selector, "fieldSelector": asked.field_selector}
        query = urlencode({key: value for key, value in selectors.items() if value})
        path = self.path(asked.kind, asked.namespace, asked.name)
        found: JSON = self.request("GET", f"{path}?{query}")
        if not asked.show_managed_fields:
            for one in found.get("items", [found]):
                one["metadata"].pop("managedFields", None)
        return found

    def write(self, manifest: JSON) -> None:
        """What `kubectl apply --server-side` does with it."""
        meta = manifest["metadata"]
        resource = self._resource(f"{manifest['apiVersion']}/{manifest['kind']}")
        path = resource.path(meta.get("namespace", "default"), meta["name"])
        query = urlencode({"fieldManager": MANAGER, "fieldValidation": "Strict"})
        self.request("PATCH", f"{path}?{query}", manifest, "application/apply-patch+yaml")

    def path(self, kind: str, namespace: str, name: str = "") -> str:
        """Of one object, or without a name of all in the namespace; `kind` as in `find`."""
        return self._resource(kind).path(namespace, name)

    def _resource(self, name: str) -> Resource:
        """Of a kind's name in any of its forms, or of GROUP/VERSION/KIND. Raises `ClusterError` if there is none."""
        deadline = time.monotonic() + KNOWN_SECONDS
        while name not in self._resources:
            self._resources = self._discover()
            if name not in self._resources:
                if time.monotonic() > deadline:
                    raise ClusterError(f"{name}: the server knows no such kind")
                time.sleep(POLL_SECONDS)
        return self._resources[name]

    def _discover(self) -> dict[str, Resource]:
        """The first group that has a name has it, as for kubectl; those of the core come first."""
        found: dict[str, Resource] = {}
        for root in ("/api", "/apis"):
            for group in json.loads(self.text(root, DISCOVERY))["items"]:
                for version in group["versions"]:
                    within = "/".join(filter(None, (group["metadata"].get("name"), version["version"])))
                    for one in version["resources"]:
                        made = Resource(f"{root}/{within}", one["resource"], one["scope"] == "Namespaced")
                        names = [one["resource"], one.get("singularResource"), *one.get("shortNames", ())]
                        if kind := one.get("responseKind", {}).get("kind"):
                            names.append(f"{within}/{kind}")
                        for name in filter(None, names):
                            found.setdefault(name, made)
        return found
