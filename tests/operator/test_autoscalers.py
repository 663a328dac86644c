"""Autoscalers of Kubernetes on a stack's /scale: the HPA controller itself, with metrics that a test sets."""

import time

import pytest
import yaml
from tests.cluster.metrics_api import MetricsApi, Series
from tests.operator.operator_process import ROOT
from tests.operator.players import PODS, STACKS, wait

HPAS = "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers"
EXAMPLE = yaml.safe_load((ROOT / "examples/kubernetes/hpa.yaml").read_text())
LOAD = EXAMPLE["spec"]["metrics"][0]["external"]["metric"]["name"]
OF_EDGE = EXAMPLE["spec"]["metrics"][0]["external"]["metric"]["selector"]["matchLabels"]
KINDS_SECONDS = 60
"""The controller manager looks each 30 s which kinds there are, and ours may be new to it."""
KEDA = "s0-prometheus"
"""The name that KEDA gives to the metric of a ScaledObject's first trigger."""


@pytest.fixture(scope="module")
def api(control_plane):
    with MetricsApi(control_plane) as running:
        yield running


@pytest.fixture
def metrics(api):
    yield api
    for values in (api.external, api.pods, api.objects, api.asked):
        values.clear()


def external(metrics, load):
    """Of 100 the engines shall have 60, as in the example."""
    metrics.external[LOAD] = [Series(str(60 * load), OF_EDGE), Series("1000", {"stack": "default.other"})]


def of_pods(metrics, load):
    metrics.pods["busy"] = f"{600 * load:.0f}m"


def of_the_stack(metrics, load):
    metrics.objects["packetstacks.packetstack.io/edge", "busy"] = f"{600 * load:.0f}m"


OF_PODS = {"metric": {"name": "busy"}, "target": {"type": "AverageValue", "averageValue": "600m"}}
OF_THE_STACK = {
    "describedObject": {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "name": "edge"},
    "metric": {"name": "busy"},
    "target": {"type": "Value", "value": "600m"},
}
LOADS = [
    (external, EXAMPLE["spec"]["metrics"][0]),
    (of_pods, {"type": "Pods", "pods": OF_PODS}),
    (of_the_stack, {"type": "Object", "object": OF_THE_STACK}),
]


class Hpa:
    """The HPA of the examples in a place, with other limits, which gives engines back at once."""

    def __init__(self, place, **spec):
        self.place = place
        behavior = {"scaleDown": {"stabilizationWindowSeconds": 0}}
        body = {**EXAMPLE, "spec": {**EXAMPLE["spec"], "minReplicas": 1, "behavior": behavior, **spec}}
        place.server.request("POST", HPAS.format(place.namespace), body)

    def status(self):
        return self.place.server.get(self.place.path(HPAS)).get("status", {})

    def condition(self, kind):
        found = (c for c in self.status().get("conditions", ()) if c["type"] == kind)
        return next(((c["status"], c["reason"]) for c in found), ("", ""))

    def rests_at(self, replicas):
        """It asks for that many, the operator has made them, and both say so."""
        self.place.settle()

        def rests():
            status = self.status()
            return status.get("currentReplicas") == status.get("desiredReplicas") == replicas

        wait(rests, KINDS_SECONDS)
        assert self.place.stack()["spec"]["replicas"] == replicas
        assert self.condition("AbleToScale")[0] == "True"
        assert self.condition("ScalingActive") == ("True", "ValidMetricFound")


def replicas(place):
    return place.stack()["spec"]["replicas"]


def stays(place, metrics, number):
    """The replicas, while the HPA controller looks three times."""
    seen = len(metrics.asked)

    def looked():
        assert replicas(place) == number
        return len(metrics.asked) >= seen + 3

    wait(looked)


@pytest.mark.parametrize(("set_load", "metric"), LOADS, ids=["External", "Pods", "Object"])
def test_an_hpa_scales_a_stack_up_and_down_by_a_metric(operator, place, metrics, set_load, metric):
    set_load(metrics, 1)
    place.create(replicas=1)
    place.settle()
    hpa = Hpa(place, metrics=[metric])
    hpa.rests_at(1)
    set_load(metrics, 4)
    wait(lambda: replicas(place) == 4)
    set_load(metrics, 1)
    hpa.rests_at(4)
    set_load(metrics, 1 / 4)
    wait(lambda: replicas(place) == 1)
    set_load(metrics, 1)
    hpa.rests_at(1)


def test_engines_that_drain_count_nothing_for_an_hpa(operator, place, metrics):
    of_pods(metrics, 1)
    metrics.external["flows"] = "400"
    place.create(replicas=4)
    place.settle()
    flows = {"metric": {"name": "flows"}, "target": {"type": "AverageValue", "averageValue": "100"}}
    hpa = Hpa(place, metrics=[{"type": "Pods", "pods": OF_PODS}, {"type": "External", "external": flows}])
    hpa.rests_at(4)
    place.node.agent = False  # nobody takes their buckets
    of_pods(metrics, 1 / 2)
    metrics.external["flows"] = "200"
    wait(lambda: replicas(place) == 2)
    of_pods(metrics, 1)
    wait(lambda: place.stack()["status"]["drainingReplicas"] == 2)
    scale = place.server.get(place.path(STACKS) + "/scale")
    assert scale["status"]["replicas"] == 2
    active = {
        p["metadata"]["name"] for p in place.server.items(PODS.format(place.namespace), scale["status"]["selector"])
    }
    assert len(active) == 2
    metrics.pods["busy"] = {name: "600m" if name in active else "10" for name in place.pods()}
    assert len(metrics.pods["busy"]) == 4
    stays(place, metrics, 2)

    def averages():
        shown = [metric.get("pods", metric.get("external")) for metric in hpa.status()["currentMetrics"]]
        return [one["current"]["averageValue"] for one in shown]

    wait(lambda: averages() == ["600m", "100"])


def test_what_keda_makes_scales_a_stack_from_zero_and_back(operator, place, metrics):
    """An HPA with the metric of a trigger, and writes to /scale where an HPA does nothing: at 0."""

    def write(number):
        path = place.path(STACKS) + "/scale"
        scale = place.server.get(path)
        place.server.request("PUT", path, {**scale, "spec": {"replicas": number}})

    owner = {"scaledobject.keda.sh/name": "edge"}
    trigger = {"name": KEDA, "selector": {"matchLabels": owner}}
    target = {"type": "AverageValue", "averageValue": "10"}
    metrics.external[KEDA] = [Series("0", owner), Series("1000", {"scaledobject.keda.sh/name": "other"})]
    place.create(replicas=0)
    place.settle()
    hpa = Hpa(place, metrics=[{"type": "External", "external": {"metric": trigger, "target": target}}])
    wait(lambda: hpa.condition("ScalingActive") == ("False", "ScalingDisabled"), KINDS_SECONDS)
    metrics.external[KEDA] = [Series("40", owner)]
    time.sleep(2.5)
    assert replicas(place) == 0
    write(1)
    wait(lambda: replicas(place) == 4)
    hpa.rests_at(4)
    metrics.external[KEDA] = [Series("0", owner)]
    wait(lambda: replicas(place) == 1)
    hpa.rests_at(1)
    write(0)
    place.settle()
    wait(lambda: hpa.condition("ScalingActive") == ("False", "ScalingDisabled"))
    assert place.pods() == {}


def test_without_a_metrics_api_the_replicas_stay(operator, place, metrics):
    external(metrics, 1)
    place.create(replicas=3)
    place.settle()
    hpa = Hpa(place)
    hpa.rests_at(3)
    with metrics.away():
        external(metrics, 2)
        wait(lambda: hpa.condition("ScalingActive") == ("False", "FailedGetExternalMetric"))
        time.sleep(2.5)
        assert replicas(place) == 3
    wait(lambda: replicas(place) == 6)
    external(metrics, 1)
    hpa.rests_at(6)


def test_an_hpa_takes_back_what_kubectl_scales(operator, place, metrics, control_plane):
    external(metrics, 1 / 2)
    place.create(replicas=1)
    place.settle()
    hpa = Hpa(place)
    hpa.rests_at(1)
    control_plane.kubectl("scale", "pkst/edge", "--replicas=2", "-n", place.namespace)
    wait(lambda: hpa.condition("AbleToScale")[1] == "SucceededRescale")
    hpa.rests_at(1)
