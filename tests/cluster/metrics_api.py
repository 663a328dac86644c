"""A metrics API server for tests: what an HPA asks for Pods, Object and External metrics, with values that a test sets.

    with MetricsApi(control_plane) as metrics:
        metrics.external["queue_length"] = "30"
        metrics.pods["engine_busy"] = {"edge-1": "900m", "edge-2": "300m"}
        metrics.objects["services/web", "requests_per_second"] = "1200"

It serves `custom.metrics.k8s.io/v1beta2` and `external.metrics.k8s.io/v1beta1`, aggregated by the API server, from a
thread of this process. Values are quantities as in a manifest. A metric that was not set is not found.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from tests.cluster.control_plane import ControlPlane, free_ports
from tests.cluster.processes import ClusterError, wait_until

SERVICE, NAMESPACE = "metrics-api", "kube-system"
CUSTOM, EXTERNAL = ("custom.metrics.k8s.io", "v1beta2"), ("external.metrics.k8s.io", "v1beta1")
PREFIX = "/apis/{}/{}"
SETTLING_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Series:
    """One of the time series of an external metric."""

    value: str
    labels: Mapping[str, str] = field(default_factory=dict)


class MetricsApi:
    """A context manager; inside, both API groups are there for every client of the control plane.

    A control plane has room for one at a time. To be registered takes it a second; the HPA controller asks it in the next.
    """

    def __init__(self, control_plane: ControlPlane) -> None:
        self.external: dict[str, str | Sequence[Series]] = {}
        """By name: the series; those are answered whose labels suit the selector. Plain text suits every selector."""
        self.pods: dict[str, str | Mapping[str, str]] = {}
        """By name: the sample of each pod, by the pod's name. Plain text is that of every pod that is asked for."""
        self.objects: dict[tuple[str, str], str] = {}
        """By object and name: `"services/web"`, or `"packetstacks.packetstack.io/edge"`, in every namespace."""
        self.asked: list[str] = []
        """Path and query of each request for values, in their order."""
        self._control_plane = control_plane
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self._pod_lists: ClientSession | None = None

    def __enter__(self) -> MetricsApi:
        self._thread.start()
        try:
            [self._port] = free_ports(self._control_plane.address, 1)
            self._in_thread(self._listen())
            self._register()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for group, version in (CUSTOM, EXTERNAL):
                self._control_plane.api.delete(f"/apis/apiregistration.k8s.io/v1/apiservices/{version}.{group}")
            self._control_plane.api.delete(f"/api/v1/namespaces/{NAMESPACE}/services/{SERVICE}")
        finally:
            self._end()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens at its address; afterwards it does again, and is found again within seconds."""
        self._in_thread(self._close())
        try:
            yield
        finally:
            self._in_thread(self._listen())

    # ---- life

    def _in_thread(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        application = web.Application()
        for path, answer in self._routes().items():
            application.router.add_get(path, answer)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._control_plane.address, self._port, ssl_context=self._server_tls()).start()

    async def _close(self) -> None:
        if self._runner is None or self._runner.server is None:
            return
        for site in list(self._runner.sites):
            await site.stop()
        await asyncio.sleep(SETTLING_SECONDS)  # what was accepted gets through its handshake
        open_ = [connection.transport for connection in self._runner.server.connections]
        await self._runner.cleanup()
        for transport in filter(None, open_):
            transport.abort()  # the API server keeps its connections, and would not say goodbye
        await asyncio.sleep(SETTLING_SECONDS)
        self._runner = None

    async def _close_all(self) -> None:
        await self._close()
        if self._pod_lists is not None:
            await self._pod_lists.close()

    def _end(self) -> None:
        self._in_thread(self._close_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _server_tls(self) -> ssl.SSLContext:
        """It is the service that it says, and talks to nobody but the API server."""
        pki = self._control_plane.pki
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(pki.directory / "front-proxy-ca.crt"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(*pki.issue(SERVICE, SERVICE, names=[f"{SERVICE}.{NAMESPACE}.svc"]))
        return context

    def _register(self) -> None:
        control_plane = self._control_plane
        service = {"type": "ExternalName", "externalName": control_plane.address}
        control_plane.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": SERVICE, "namespace": NAMESPACE},
                "spec": service,
            },
            *(self._api_service(group, version) for group, version in (CUSTOM, EXTERNAL)),
        )

        def found() -> bool:
            try:
                return all(control_plane.api.get(f"/apis/{group}/{version}") for group, version in (CUSTOM, EXTERNAL))
            except ClusterError:  # one of the two does not answer yet
                return False

        wait_until(found, "metrics API in discovery")

    def _api_service(self, group: str, version: str) -> dict[str, Any]:
        authority = (self._control_plane.pki.directory / "ca.crt").read_bytes()
        return {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"{version}.{group}"},
            "spec": {
                "group": group,
                "version": version,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "caBundle": base64.b64encode(authority).decode(),
                "service": {"name": SERVICE, "namespace": NAMESPACE, "port": self._port},
            },
        }

    # ---- answers

    def _routes(self) -> dict[str, Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]]:
        """Everything else is 404: the API server asks for optional documents, and takes no other answer for `no`."""
        custom, external = PREFIX.format(*CUSTOM), PREFIX.format(*EXTERNAL)
        return {
            custom: self._custom_resources,
            external: self._external_resources,
            custom + "/namespaces/{namespace}/pods/*/{metric}": self._of_pods,
            custom + "/namespaces/{namespace}/{resource}/{name}/{metric}": self._of_object,
            external + "/namespaces/{namespace}/{metric}": self._of_nothing,
        }

    async def _custom_resources(self, _: web.Request) -> web.Response:
        return _resources(*CUSTOM, "*/*", "MetricValueList")

    async def _external_resources(self, _: web.Request) -> web.Response:
        return _resources(*EXTERNAL, "externalmetrics", "ExternalMetricValueList")

    async def _of_pods(self, request: web.Request) -> web.Response:
        self.asked.append(request.path_qs)
        namespace, metric = request.match_info["namespace"], request.match_info["metric"]
        if metric not in self.pods:
            return _not_found(f"pods: no metric {metric}")
        samples = self.pods[metric]
        names = await self._pods_of(namespace, request.query.get("labelSelector", ""))
        values = {name: samples if isinstance(samples, str) else samples.get(name) for name in names}
        return _custom_values(metric, namespace, "Pod", {n: v for n, v in values.items() if v is not None})

    async def _of_object(self, request: web.Request) -> web.Response:
        self.asked.append(request.path_qs)
        known = request.match_info
        what = f"{known['resource']}/{known['name']}"
        if (what, known["metric"]) not in self.objects:
            return _not_found(f"{what}: no metric {known['metric']}")
        value = self.objects[what, known["metric"]]
        return _custom_values(known["metric"], known["namespace"], known["resource"], {known["name"]: value})

    async def _of_nothing(self, request: web.Request) -> web.Response:
        self.asked.append(request.path_qs)
        metric = request.match_info["metric"]
        if metric not in self.external:
            return _not_found(f"external: no metric {metric}")
        series = self.external[metric]
        if isinstance(series, str):
            series = [Series(series)]
        else:
            wanted = _equalities(request.query.get("labelSelector", ""))
            series = [one for one in series if wanted.items() <= one.labels.items()]
        items = [
            {"metricName": metric, "metricLabels": dict(one.labels), "timestamp": _now(), "value": one.value}
            for one in series
        ]
        return _list("ExternalMetricValueList", EXTERNAL, items)

    async def _pods_of(self, namespace: str, selector: str) -> list[str]:
        control_plane = self._control_plane
        if self._pod_lists is None:
            pki = control_plane.pki.directory
            context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
            context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
            self._pod_lists = ClientSession(control_plane.server, connector=TCPConnector(ssl=context))
        parameters = {"labelSelector": selector}
        async with self._pod_lists.get(f"/api/v1/namespaces/{namespace}/pods", params=parameters) as answer:
            answer.raise_for_status()
            return [pod["metadata"]["name"] for pod in (await answer.json())["items"]]


def _resources(group: str, version: str, name: str, kind: str) -> web.Response:
    resource = {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get"]}
    return web.json_response(
        {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": f"{group}/{version}",
            "resources": [resource],
        }
    )


def _custom_values(metric: str, namespace: str, kind: str, values: Mapping[str, str]) -> web.Response:
    items = [
        {
            "describedObject": {"kind": kind, "namespace": namespace, "name": name},
            "metric": {"name": metric},
            "timestamp": _now(),
            "value": value,
        }
        for name, value in values.items()
    ]
    return _list("MetricValueList", CUSTOM, items)


def _list(kind: str, api: tuple[str, str], items: list[dict[str, Any]]) -> web.Response:
    return web.json_response({"kind": kind, "apiVersion": "/".join(api), "metadata": {}, "items": items})


def _not_found(message: str) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
    return web.json_response({**status, "message": message}, status=404)


def _equalities(selector: str) -> dict[str, str]:
    """`a=b,c=d`: all that `matchLabels` can say."""
    wanted = {}
    for term in filter(None, selector.split(",")):
        key, equals, value = term.partition("=")
        if not equals or "!" in key:
            raise web.HTTPBadRequest(text=f"selector {selector}: only equalities are served")
        wanted[key] = value
    return wanted


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
