"""The metrics API server answers as adapters do, through the API server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.control_plane import ControlPlane
from tests.cluster.metrics_api import MetricsApi, Series
from tests.cluster.processes import ClusterError, wait_until

CUSTOM = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/{}/{}"
EXTERNAL = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default/{}"


@pytest.fixture(scope="module")
def metrics(control_plane: ControlPlane) -> Iterator[MetricsApi]:
    with MetricsApi(control_plane) as running:
        yield running


def items(control_plane: ControlPlane, path: str) -> list[Any]:
    return control_plane.api.items(path)


def test_an_external_metric_has_the_series_that_suit_the_selector(
    control_plane: ControlPlane, metrics: MetricsApi
) -> None:
    metrics.external["queue_length"] = [Series("3", {"queue": "a"}), Series("4", {"queue": "b"})]
    all_of_it = items(control_plane, EXTERNAL.format("queue_length"))
    assert [(one["value"], one["metricLabels"]) for one in all_of_it] == [("3", {"queue": "a"}), ("4", {"queue": "b"})]
    [one] = items(control_plane, EXTERNAL.format("queue_length?labelSelector=queue%3Db"))
    assert one["value"] == "4"
    metrics.external["queue_length"] = "30"
    [one] = items(control_plane, EXTERNAL.format("queue_length?labelSelector=queue%3Db"))
    assert one["value"] == "30"
    assert metrics.asked[-1] == EXTERNAL.format("queue_length?labelSelector=queue%3Db")


def test_a_metric_of_pods_has_a_sample_of_each_selected_pod(control_plane: ControlPlane, metrics: MetricsApi) -> None:
    namespace = f"test-{secrets.token_hex(4)}"
    control_plane.create_namespace(namespace)
    for name, label in (("one", "in"), ("two", "in"), ("other", "out")):
        control_plane.kubectl("run", name, "--image=none", f"--labels=set={label}", "-n", namespace)
    path = CUSTOM.format(namespace, "pods/*/busy?labelSelector=set%3Din")
    metrics.pods["busy"] = "900m"
    found = {one["describedObject"]["name"]: one["value"] for one in items(control_plane, path)}
    assert found == {"one": "900m", "two": "900m"}
    metrics.pods["busy"] = {"two": "300m", "other": "1"}
    [one] = items(control_plane, path)
    assert (one["describedObject"]["name"], one["value"]) == ("two", "300m")
    control_plane.delete_namespace(namespace)


def test_a_metric_of_an_object_is_that_objects(control_plane: ControlPlane, metrics: MetricsApi) -> None:
    metrics.objects["packetstacks.packetstack.io/edge", "requests"] = "12"
    [one] = items(control_plane, CUSTOM.format("default", "packetstacks.packetstack.io/edge/requests"))
    assert one["value"] == "12"
    with pytest.raises(ClusterError, match="NotFound"):
        items(control_plane, CUSTOM.format("default", "packetstacks.packetstack.io/other/requests"))


def test_away_nobody_answers_and_then_it_does_again(control_plane: ControlPlane, metrics: MetricsApi) -> None:
    metrics.external["queue_length"] = "30"
    with metrics.away(), pytest.raises(ClusterError, match=r"^503:"):
        items(control_plane, EXTERNAL.format("queue_length"))

    def answered() -> list[Any]:
        try:
            return items(control_plane, EXTERNAL.format("queue_length"))
        except ClusterError:
            return []

    wait_until(answered, "values again")
