"""Metrics of an autoscaler that others measure, from the metrics APIs of the cluster, as an HPA asks them."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp

from packetstack_core import autoscalers
from packetstack_core.autoscaling.metrics import MetricError, Reading, Sample
from packetstack_core.autoscaling.numbers import milli
from packetstack_operator import observing
from packetstack_operator.ports import Api, Refused

CUSTOM = ("/apis/custom.metrics.k8s.io/v1beta2", "/apis/custom.metrics.k8s.io/v1beta1")
"""The first one that is there."""
EXTERNAL = "/apis/external.metrics.k8s.io/v1beta1"
WINDOW_SECONDS = 60.0
"""Window of a sample that names none."""
NO_CPU = (
    "engines poll: they use all of their CPU at no packets, and their memory is taken when they start; "
    'use a metric of type "Engine", as in Utilization'
)


class Readings:
    """Asks through one connection."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._places: dict[tuple[str, str], str] = {}
        """API version and kind -> the resource's name as in `packetstacks.packetstack.io`."""

    async def read(self, namespace: str, selector: str, metric: autoscalers.Metric, now: float) -> Reading:
        """What the source of a metric says; a MetricError if it does not. `selector`: of the active engines' pods."""
        try:
            if metric.pods is not None:
                return await self._of_pods(namespace, selector, metric.pods.metric, now)
            if metric.object is not None:
                return await self._of_object(namespace, metric.object)
            if metric.external is not None:
                return await self._external(namespace, metric.external.metric)
        except Refused as e:
            which = "external" if metric.external is not None else "custom"
            return MetricError("api_error", f"unable to fetch metrics from {which} metrics API: {e.message or e}")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return MetricError("api_error", f"API server: {type(e).__name__}: {e}")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            return MetricError("api_error", f"the answer of the metrics API cannot be read: {type(e).__name__}: {e}")
        except MetricError as e:
            return e
        return MetricError("invalid_target", NO_CPU)

    async def _of_pods(
        self, namespace: str, selector: str, metric: autoscalers.MetricIdentifier, now: float
    ) -> dict[str, Sample]:
        query = {"labelSelector": selector, **_selecting("metricLabelSelector", metric.selector)}
        items = await self._custom(namespace, f"pods/*/{_segment(metric.name)}", query)
        return {str(i["describedObject"]["name"]): _sample(i, now) for i in items}

    async def _of_object(self, namespace: str, metric: autoscalers.ObjectMetric) -> int:
        described, name = metric.described_object, _segment(metric.metric.name)
        query = _selecting("metricLabelSelector", metric.metric.selector)
        what = _segment(described.name)
        if described.kind == "Namespace" and described.api_version in (None, "v1"):
            # The stack's own, whatever the name says: nobody shall look into another one through the operator.
            items = await self._custom(namespace, f"metrics/{name}", query)
        else:
            place = await self._place(described.api_version or "v1", described.kind)
            items = await self._custom(namespace, f"{place}/{what}/{name}", query)
        return milli(str(items[0]["value"]))

    async def _external(self, namespace: str, metric: autoscalers.MetricIdentifier) -> list[int]:
        query = _selecting("labelSelector", metric.selector)
        path = f"{EXTERNAL}/namespaces/{namespace}/{_segment(metric.name)}"
        items = (await self._api.get(_with(path, query))).get("items") or ()
        if not items:
            raise MetricError("api_empty", "no metrics returned from external metrics API")
        return [milli(str(i["value"])) for i in items]

    async def _custom(self, namespace: str, what: str, query: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
        first: Refused | None = None
        for version in CUSTOM:
            try:
                found = await self._api.get(_with(f"{version}/namespaces/{namespace}/{what}", query))
            except Refused as e:
                if e.status != 404:
                    raise first or e from None
                first = first or e
                continue
            if not found.get("items"):
                raise MetricError("api_empty", "no metrics returned from custom metrics API")
            return list(found["items"])
        assert first is not None
        raise first

    async def _place(self, version: str, kind: str) -> str:
        if (version, kind) not in self._places:
            group = "/".join(map(_segment, version.split("/")[:-1]))
            last = _segment(version.rpartition("/")[2])
            root = f"/apis/{group}/{last}" if group else f"/api/{last}"
            listed = (await self._api.get(root)).get("resources") or ()
            name = next((r["name"] for r in listed if r.get("kind") == kind and "/" not in r["name"]), None)
            if name is None:
                raise MetricError("api_error", f"{version} has no kind {kind}; see describedObject")
            self._places[version, kind] = f"{name}.{group}" if group else str(name)
        return self._places[version, kind]


def _sample(item: Mapping[str, Any], now: float) -> Sample:
    at = observing.seconds(str(item["timestamp"])) if item.get("timestamp") else now
    return Sample(milli(str(item["value"])), at, float(item.get("windowSeconds") or WINDOW_SECONDS))


def _segment(name: str) -> str:
    """One segment of a path. ValueError for what would lead elsewhere: the operator may read more than its users."""
    if {".", ".."} & set(name.split("/")):
        raise ValueError(f'"{name}" cannot be a part of a path')
    return quote(name, safe="")


def _with(path: str, query: Mapping[str, str]) -> str:
    return f"{path}?{urlencode(query, quote_via=quote)}" if query else path


def _selecting(name: str, selector: autoscalers.LabelSelector | None) -> dict[str, str]:
    text = selector_text(selector)
    return {name: text} if text else {}


def selector_text(selector: autoscalers.LabelSelector | None) -> str:
    """A label selector as in a query. ValueError for an operator that there is not."""
    if selector is None:
        return ""
    terms = [f"{key}={value}" for key, value in sorted(selector.match_labels.items())]
    for expression in selector.match_expressions:
        key, operator = expression["key"], expression["operator"]
        values = ",".join(sorted(map(str, expression.get("values") or ())))
        match operator:
            case "In" | "NotIn":
                terms.append(f"{key} {operator.lower()} ({values})")
            case "Exists":
                terms.append(str(key))
            case "DoesNotExist":
                terms.append(f"!{key}")
            case _:
                raise ValueError(f"matchExpressions has operator {operator}; use In, NotIn, Exists or DoesNotExist")
    return ",".join(terms)
