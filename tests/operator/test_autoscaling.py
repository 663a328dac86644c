"""Stacks with spec.autoscaling: the operator reads the load of engines and metrics APIs, and writes /scale.

Engines are played: their counters rise as busy as a test says.
"""

import json
import time

import pytest
from tests.cluster.metrics_api import MetricsApi, Series
from tests.cluster.processes import ClusterError
from tests.operator.counters import busy
from tests.operator.place import STACK
from tests.operator.players import STACKS, wait

SYNC = 1


BUSY = busy(60)
AT_ONCE = {"scaleDown": {"stabilizationWindowSeconds": 0}}


class Scaled:
    """A stack that is scaled between 1 and 8 engines, by their utilisation unless the metrics say something else."""

    def __init__(self, place, counters, **autoscaling):
        self.place, self.counters, self.name = place, counters, f"{place.namespace}.edge"
        self.autoscaling = {"minReplicas": 1, "maxReplicas": 8, "metrics": [BUSY], "behavior": AT_ONCE}
        self.autoscaling |= {"syncPeriodSeconds": SYNC, **autoscaling}

    def create(self, load, **spec):
        """With a load of so many fully busy engines."""
        self.counters.set_load(self.name, load)
        self.place.create(autoscaling=self.autoscaling, **spec)
        return self

    def load(self, load):
        self.counters.set_load(self.name, load)

    @property
    def replicas(self):
        return self.place.stack()["spec"]["replicas"]

    @property
    def status(self):
        return self.place.stack().get("status", {}).get("autoscaling", {})

    def condition(self, kind="ScalingActive"):
        found = self.place.condition(kind)
        return found["status"], found.get("reason", "")

    def rests_at(self, replicas, seconds=20):
        wait(lambda: self.replicas == replicas and self.condition() == ("True", "ValidMetricFound"), seconds)
        self.place.settle()
        wait(lambda: (self.status["currentReplicas"], self.status["desiredReplicas"]) == (replicas, replicas))

    def stays(self, replicas, rounds=3):
        for _ in range(10 * rounds):
            assert self.replicas == replicas
            time.sleep(SYNC / 10)

    def events(self, reason):
        path = f"/api/v1/namespaces/{self.place.namespace}/events"
        return [e for e in self.place.server.items(path) if e["reason"] == reason]

    def writers(self):
        fields = self.place.stack()["metadata"]["managedFields"]
        return {m["manager"] for m in fields if "f:replicas" in m["fieldsV1"].get("f:spec", {})}


@pytest.fixture
def scaled(operator, place, counters):
    def make(**autoscaling):
        return Scaled(place, counters, **autoscaling)

    yield make
    counters.away = False
    counters.silent.clear()


def test_a_step_of_load_is_answered_by_the_first_decision_that_sees_it(scaled, place):
    stack = scaled(syncPeriodSeconds=3).create(0.6, replicas=1)
    stack.rests_at(1)
    stack.load(2.4)

    def scaled_up():
        raw = place.stack()
        replicas, record = raw["spec"]["replicas"], raw["status"]["autoscaling"]["record"]
        assert replicas > 1 or record["proposed"] == 1, "a decision for more was not carried out"
        return replicas > 1

    wait(scaled_up, every=0.02)
    stack.rests_at(4, 40)
    rescaled = stack.events("SuccessfulRescale")
    assert any(e["message"].endswith("reason: engine metric Utilization above target") for e in rescaled)
    assert {e["involvedObject"]["kind"] for e in rescaled} == {"PacketStack"}
    assert stack.status["lastScaleTime"]
    assert stack.status["record"]["winner"] == "engine metric Utilization"


def test_it_gives_engines_back_when_the_load_goes(scaled, operator):
    stack = scaled().create(2.4, replicas=4)
    stack.rests_at(4)
    labels = f'namespace="{stack.place.namespace}",stack="edge"'
    exported = [line for line in operator.metrics().splitlines() if labels in line]
    assert f'packetstack_autoscaler_decision{{{labels},step="desired"}} 4.0' in exported
    assert f'packetstack_autoscaler_limit{{limit="max",{labels}}} 8.0' in exported
    assert any(line.startswith("packetstack_autoscaler_usage_ratio{") for line in exported)
    assert any(line.startswith("packetstack_load_age_seconds{") for line in exported)
    stack.load(0.6)
    stack.rests_at(1)
    stack.load(0)
    wait(lambda: stack.condition("ScalingLimited") == ("True", "TooFewReplicas"))
    stack.stays(1)


def test_engines_that_drain_are_in_no_average(scaled, place, counters):
    stack = scaled().create(2.4, replicas=4)
    counters.drains[stack.name] = 1.0
    stack.rests_at(4)
    place.node.batch = 0  # nobody takes the buckets of those that leave
    stack.load(1.2)
    wait(lambda: stack.replicas == 2)
    wait(lambda: place.stack()["status"]["drainingReplicas"] == 2)
    states = {p["metadata"]["labels"]["packetstack.io/engine-state"] for p in place.pods().values()}
    assert states == {"Active", "Draining"}

    def average():
        return stack.status["record"]["proposals"][0]["value"]["averageUtilization"]

    wait(lambda: average() in range(58, 63))  # at one of the next decisions, of the two that stay
    stack.stays(2)
    assert average() in range(58, 63)
    place.node.batch = 150
    stack.rests_at(2)


def test_engines_that_start_are_in_no_average(scaled, place, counters):
    stack = scaled().create(0.6, replicas=1)
    stack.rests_at(1)
    place.node.stuck = {2, 3}
    stack.load(1.0)
    wait(lambda: stack.replicas == 2)
    wait(lambda: len(place.pods()) == 2)
    stack.stays(2)
    assert stack.status["record"]["proposals"][0]["missing"] == 0
    place.node.stuck = set()
    stack.rests_at(2)


def test_without_an_answer_of_the_agent_no_engine_is_taken_away(scaled, operator, counters):
    stack = scaled().create(2.4, replicas=4)
    stack.rests_at(4)
    counters.away = True
    stack.load(0.1)
    wait(lambda: stack.condition() == ("False", "FailedGetEngineMetric"), 40)
    stack.stays(4)
    text = operator.metrics()
    assert f'packetstack_condition{{namespace="{stack.place.namespace}",stack="edge",type="ScalingActive"}} 0.0' in text
    assert 'packetstack_load_errors_total{reason="Unreachable"}' in text
    assert len(stack.events("FailedGetEngineMetric")) == 1
    counters.away = False
    stack.load(2.4)
    stack.rests_at(4, 40)


def test_with_half_of_the_samples_engines_are_added_and_none_is_taken_away(scaled, place, counters):
    stack = scaled(metrics=[busy(40)]).create(1.6, replicas=4)
    stack.rests_at(4)
    one, other = sorted(place.pods())[:2]
    counters.silent |= {one, other}
    stack.load(0.2)
    wait(lambda: "5/40 %, 2 without a sample -> 4" in stack.status["decision"])
    stack.stays(4)
    counters.silent -= {other}
    wait(lambda: stack.condition() == ("False", "FailedGetEngineMetric"))
    assert "1 of 4 engines have no recent sample" in place.condition("ScalingActive")["message"]
    stack.stays(4)
    counters.silent |= {other}
    stack.load(8)
    wait(lambda: stack.replicas > 4)


def test_an_operator_that_starts_anew_goes_on_and_takes_no_engine_at_once(scaled, operator, place):
    window = {"scaleDown": {"stabilizationWindowSeconds": 5}}
    stack = scaled(behavior=window).create(2.4, replicas=2)
    stack.rests_at(4, 40)
    before = stack.status["lastScaleTime"]
    operator.kill()
    stack.load(0.3)
    operator.start()
    began = time.monotonic()
    wait(lambda: stack.status["record"]["proposed"] == 1)
    assert (stack.replicas, stack.status["lastScaleTime"]) == (4, before)
    wait(lambda: stack.replicas < 4)
    assert time.monotonic() - began > 5
    stack.rests_at(1, 40)


def test_an_operator_that_dies_between_its_write_and_its_status_knows_its_write(scaled, operator, place, control_plane):
    stack = scaled().create(1.2, replicas=2)
    stack.rests_at(2)
    operator.kill()
    replicas = [{"op": "replace", "path": "/spec/replicas", "value": 3}]
    path = f"{place.path(STACKS)}/scale?fieldManager=packetstack-autoscaler"
    place.server.request("PATCH", path, replicas, "application/json-patch+json")
    operator.start()
    stack.rests_at(2, 40)
    assert stack.events("ExternallyScaled") == []


def test_at_rest_only_changes_are_written(scaled, place):
    stack = scaled().create(1.2, replicas=2)
    stack.rests_at(2)
    time.sleep(2 * SYNC)
    versions = set()
    for _ in range(40):
        raw = place.stack()
        versions.add(raw["metadata"]["resourceVersion"])
        assert raw["status"]["autoscaling"]["currentReplicas"] == 2
        time.sleep(SYNC / 10)
    assert len(versions) <= 6, "at most once a sync period, when a figure has changed"


def test_an_autoscaler_that_is_taken_away_leaves_no_trace_in_the_status(scaled, place):
    stack = scaled().create(1.2, replicas=2)
    stack.rests_at(2)
    place.change(autoscaling=None)
    wait(lambda: "autoscaling" not in place.stack()["status"])
    types = {c["type"] for c in place.stack()["status"]["conditions"]}
    assert types == {"Available", "CapacityAvailable", "Degraded", "FirewallOpen", "Progressing"}
    stack.load(4)
    stack.stays(2)
    place.change(autoscaling=stack.autoscaling)
    wait(lambda: stack.replicas > 2)


def test_the_operator_owns_nothing_of_the_autoscaler_s_status(scaled, place):
    stack = scaled().create(1.2, replicas=2)
    stack.rests_at(2)
    place.change(engine={"image": "localhost/packetstack:2"})
    place.settle()
    owned = {m["manager"]: m["fieldsV1"] for m in place.stack()["metadata"]["managedFields"]}
    theirs = owned["packetstack-autoscaler"]["f:status"]
    assert set(theirs) == {"f:autoscaling", "f:conditions"}
    operators = owned["packetstack-operator"]["f:status"]
    assert "f:autoscaling" not in operators
    assert not set(theirs["f:conditions"]) & set(operators["f:conditions"])


def test_while_it_is_paused_it_decides_and_changes_nothing(scaled, place):
    stack = scaled(paused=True).create(2.4, replicas=1)
    wait(lambda: "paused, else" in stack.status.get("decision", ""))
    stack.stays(1)
    place.change(autoscaling={"paused": False})
    stack.rests_at(4, 40)


def test_while_no_engine_is_active_nobody_is_asked(scaled, place):
    place.node.stuck = {1, 2}
    stack = scaled().create(0.6, replicas=2)
    wait(lambda: len(place.pods()) == 2 and place.stack().get("status"))
    time.sleep(3 * SYNC)
    assert not [path for path in stack.counters.asked if f"stack={stack.name}&buckets=0" in path]
    assert (stack.condition(), stack.events("FailedGetEngineMetric")) == (("", ""), [])
    place.node.stuck = set()
    stack.rests_at(1)


def test_cpu_is_refused_with_the_reason(scaled, place):
    cpu = {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 60}}}
    stack = scaled(metrics=[cpu]).create(0.6, replicas=2)
    wait(lambda: stack.condition() == ("False", "FailedGetResourceMetric"))
    assert "engines poll" in place.condition("ScalingActive")["message"]
    stack.stays(2)


# ---- a second writer -------------------------------------------------------------------------------------------


def manifest(stack, **spec):
    given = {name: value for name, value in STACK["spec"].items() if name != "replicas"}
    meta = {"name": "edge", "namespace": stack.place.namespace}
    return {**STACK, "metadata": meta, "spec": {**given, "autoscaling": stack.autoscaling, **spec}}


def aside(stack, who):
    wait(lambda: stack.condition() == ("False", "ExternallyScaled"))
    message = stack.place.condition("ScalingActive")["message"]
    assert message.startswith(f"{who} set spec.replicas to ")
    assert "spec.autoscaling.paused" in message
    number = stack.replicas
    stack.load(4)
    stack.stays(number)
    assert len(stack.events("ExternallyScaled")) == 1


def test_kubectl_scale_stops_it_until_it_was_paused(scaled, operator, place, control_plane):
    stack = scaled().create(1.8, replicas=1)
    stack.rests_at(3, 40)
    assert stack.writers() == {"packetstack-autoscaler"}
    control_plane.kubectl("scale", "pkst/edge", "--replicas=5", "-n", place.namespace)
    aside(stack, "kubectl")
    assert stack.replicas == 5
    operator.kill()
    operator.start()
    time.sleep(3 * SYNC)
    stack.stays(5)
    assert stack.condition() == ("False", "ExternallyScaled")
    place.change(autoscaling={"paused": True})
    wait(lambda: stack.condition() != ("False", "ExternallyScaled"))
    place.change(autoscaling={"paused": False})
    wait(lambda: stack.replicas > 5)
    wait(lambda: stack.condition() == ("True", "ValidMetricFound"))


def test_a_second_writer_whom_nobody_names_stops_it_too(scaled, place, control_plane):
    """A stack that a server-side apply made without replicas: no scale leaves its name."""
    stack = scaled()
    stack.counters.set_load(stack.name, 1.2)
    control_plane.apply(manifest(stack))
    stack.rests_at(2, 40)
    assert stack.writers() == set()
    control_plane.kubectl("scale", "pkst/edge", "--replicas=3", "-n", place.namespace)
    aside(stack, "somebody")


def test_a_manifest_with_replicas_that_is_applied_again_stops_it(scaled, place, control_plane):
    stack = scaled()
    stack.counters.set_load(stack.name, 1.8)
    body = manifest(stack, replicas=2)

    def apply():
        control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))

    apply()
    stack.rests_at(3, 40)  # the first apply was no second writer
    apply()
    aside(stack, "kubectl-client-side-apply")
    assert stack.replicas == 2
    place.change(autoscaling=None)
    wait(lambda: "autoscaling" not in place.stack()["status"])
    place.change(autoscaling=stack.autoscaling)
    wait(lambda: stack.replicas > 2)


def test_a_manifest_with_replicas_is_refused_by_the_server_once_the_stack_was_scaled(scaled, control_plane):
    stack = scaled()
    stack.counters.set_load(stack.name, 1.8)
    control_plane.apply(manifest(stack, replicas=2))
    stack.rests_at(3, 40)
    with pytest.raises(ClusterError, match="conflict"):
        control_plane.apply(manifest(stack, replicas=2))
    stack.stays(3)
    body = json.dumps(manifest(stack, replicas=2))
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=body)
    aside(stack, "kubectl")
    assert stack.replicas == 2


def test_a_stock_hpa_beside_it_stops_it(scaled, place, api):
    api.external["queue"] = "30"
    stack = scaled().create(1.8, replicas=1)
    stack.rests_at(3, 40)
    external = {"metric": {"name": "queue"}, "target": {"type": "AverageValue", "averageValue": "5"}}
    body = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "edge"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "name": "edge"},
            "minReplicas": 1,
            "maxReplicas": 8,
            "metrics": [{"type": "External", "external": external}],
        },
    }
    hpas = f"/apis/autoscaling/v2/namespaces/{place.namespace}/horizontalpodautoscalers"
    place.server.request("POST", hpas, body)
    try:
        wait(lambda: stack.replicas == 6)
        aside(stack, "kube-controller-manager (a HorizontalPodAutoscaler)")
        assert stack.replicas == 6
    finally:
        place.server.delete(f"{hpas}/edge")


# ---- metrics of others -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics_server(control_plane):
    with MetricsApi(control_plane) as running:
        yield running


@pytest.fixture
def api(metrics_server):
    yield metrics_server
    for values in (metrics_server.external, metrics_server.pods, metrics_server.objects, metrics_server.asked):
        values.clear()


def of_nothing(api, load):
    api.external["queue"] = [Series(str(10 * load), {"of": "edge"}), Series("1000", {"of": "other"})]


def of_pods(api, load):
    api.pods["busy"] = f"{600 * load:.0f}m"


def of_the_stack(api, load):
    api.objects["packetstacks.packetstack.io/edge", "busy"] = f"{600 * load:.0f}m"


def of_a_service(api, load):
    api.objects["services/web", "busy"] = f"{600 * load:.0f}m"


THIS = {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "name": "edge"}
WEB = {"apiVersion": "v1", "kind": "Service", "name": "web"}
VALUE = {"type": "Value", "value": "600m"}
OTHERS = {
    "External": (
        of_nothing,
        {
            "external": {
                "metric": {"name": "queue", "selector": {"matchLabels": {"of": "edge"}}},
                "target": {"type": "Value", "value": "10"},
            }
        },
    ),
    "Pods": (
        of_pods,
        {"pods": {"metric": {"name": "busy"}, "target": {"type": "AverageValue", "averageValue": "600m"}}},
    ),
    "Object": (of_the_stack, {"object": {"describedObject": THIS, "metric": {"name": "busy"}, "target": VALUE}}),
    "Object of the core": (
        of_a_service,
        {"object": {"describedObject": WEB, "metric": {"name": "busy"}, "target": VALUE}},
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_it_scales_by_metrics_of_others(scaled, place, api, kind):
    set_load, metric = OTHERS[kind]
    set_load(api, 1)
    # Else its rebalancer asks, after 15 s.
    stack = scaled(metrics=[{"type": kind.split()[0], **metric}]).create(0, replicas=1, rebalance={"mode": "Off"})
    stack.rests_at(1)
    set_load(api, 4)
    wait(lambda: stack.replicas == 4)
    set_load(api, 1)
    stack.rests_at(4)
    set_load(api, 1 / 4)
    wait(lambda: stack.replicas == 1)
    assert not [asked for asked in stack.counters.asked if f"stack={stack.name}&buckets=0" in asked]


def test_without_a_metrics_api_the_replicas_stay(scaled, place, api):
    of_nothing(api, 1)
    both = [BUSY, {"type": "External", **OTHERS["External"][1]}]
    stack = scaled(metrics=both).create(1.8, replicas=3)
    stack.rests_at(3)
    stack.load(0.3)
    api.external.clear()
    wait(lambda: stack.condition() == ("False", "FailedGetExternalMetric"))
    stack.stays(3)
    with api.away():
        stack.stays(3)
    assert stack.events("FailedGetExternalMetric")
    of_nothing(api, 1 / 4)
    wait(lambda: stack.replicas == 1)
