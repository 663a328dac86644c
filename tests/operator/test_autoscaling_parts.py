"""Parts of the operator's autoscaler without a server: who wrote replicas, and what metrics APIs answer."""

import pytest
from prometheus_client import generate_latest
from tests.operator.counters import busy

from packetstack_core import autoscalers
from packetstack_core.autoscaling import options, together, vertical
from packetstack_core.autoscaling.metrics import MetricError, Pod, Sample
from packetstack_core.autoscaling.status import Condition, Status
from packetstack_core.autoscaling.together import State
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.autoscaling.vertical import Seen
from packetstack_core.load import EngineLoad, StackLoad
from packetstack_core.reading import parse
from packetstack_core.reasons import ConditionReason
from packetstack_operator.applying import Refused
from packetstack_operator.autoscaling import knows_all, scalable
from packetstack_operator.metrics import Metrics
from packetstack_operator.pods import ENGINE_STATE
from packetstack_operator.readings import Readings, selector_text
from packetstack_operator.writers import MANAGER, other_writer, ours, writers

# ---- when an agent is asked again ---------------------------------------------------------------------------------


def pod(name, state):
    return {"metadata": {"name": name, "labels": {ENGINE_STATE: state}}}


@pytest.mark.parametrize(
    ("there", "since", "knows"),
    [
        ([("edge-1", "Active")], 90.0, True),
        ([("edge-1", "Active"), ("edge-9", "Draining"), ("edge-8", "Pending")], 90.0, True),
        ([("edge-1", "Active"), ("edge-2", "Active")], 90.0, False),
        ([("edge-1", "Active"), ("edge-2", "Starting")], 90.0, False),
        ([("edge-1", "Active")], 101.0, False),
    ],
    ids=["all are known", "who does not serve", "a new one", "a coming one", "the last question had no answer"],
)
def test_a_load_is_enough_if_it_is_of_this_period_and_has_each_engine(there, since, knows):
    one = EngineLoad(1, "edge-1", "Active", True, 15.0, (0.5,), (), 0, 0.0, 1000.0, 0.0, 0.0)
    assert knows_all(StackLoad(100.0, (one,)), [pod(*p) for p in there], since) == knows


# ---- who is scaled -----------------------------------------------------------------------------------------------


def test_a_stack_that_the_operator_refuses_is_scaled_by_no_other_rules():
    assert scalable(raw())
    assert scalable(raw(vertical={"maxCores": 2}))
    other = raw()
    other["spec"]["engine"] = {"mode": "DPDK"}
    assert scalable(other) is None
    wrong = raw()
    del wrong["spec"]["snat"]
    assert scalable(wrong) is None


# ---- the second writer -----------------------------------------------------------------------------------------


def raw(*writers, replicas=3, **autoscaling):
    fields = [
        {"manager": name, "time": time, "fieldsV1": {"f:spec": {"f:replicas": {}}}} if time else
        {"manager": name, "subresource": "scale", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
        for name, time in writers
    ]  # fmt: skip
    fields.append({"manager": "packetstack-operator", "fieldsV1": {"f:status": {"f:replicas": {}}}})
    fields.append({"manager": "kopf", "fieldsV1": {"f:metadata": {"f:finalizers": {}}}})
    listener = {"name": "web", "address": "192.0.2.10", "port": 80, "backends": {"endpoints": []}}
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketStack",
        "metadata": {"name": "edge", "namespace": "shop", "managedFields": fields},
        "spec": {
            "replicas": replicas,
            "listeners": [listener],
            "snat": {"addresses": ["192.0.2.64"]},
            "autoscaling": {"maxReplicas": 8, **autoscaling},
        },
    }


def left(replicas, reason="ValidMetricFound"):
    """The state after a round that left so many."""
    return State(
        options.State(
            status=Status(2, replicas, 1.0, (Condition("ScalingActive", "True", ConditionReason(reason), "", 0.0),))
        )
    )


def who(stack, state, *, ours=True, first=False):
    size = Size(stack["spec"]["replicas"], 1)
    owned = {"replicas"} if ours else ()
    found = other_writer(stack, parse(stack).spec, state, size, owned=owned, first=first)
    assert found is None or found[0] == "replicas"
    return found[1] if found else ""


US, KUBECTL = (MANAGER, ""), ("kubectl", "")


def test_the_latest_writer_is_the_last_and_a_status_is_no_write():
    stack = raw(("helm", "2026-01-01T00:00:00Z"), KUBECTL, ("kubectl-edit", "2026-01-02T00:00:00Z"))
    assert writers(stack, "replicas") == ["helm", "kubectl-edit", "kubectl"]
    assert writers(raw(), "replicas") == writers(stack, "cores") == []
    del stack["metadata"]["managedFields"]
    assert writers(stack, "replicas") == []


@pytest.mark.parametrize(
    ("stack", "state", "flags", "found"),
    [
        (raw(US), left(3), {}, ""),
        (raw(US, replicas=5), left(3), {}, ""),  # written by one that died before its status
        (raw(KUBECTL, replicas=5), left(3), {}, "kubectl"),
        (raw(KUBECTL, replicas=5), left(3), {"first": True}, "kubectl"),  # while no operator ran
        (raw(KUBECTL), left(3), {}, "kubectl"),  # to and fro within one period
        (raw(KUBECTL), left(3), {"ours": False}, ""),  # of the manifest that made it
        (raw(("helm", "2026-01-01T00:00:00Z"), US), left(3), {}, ""),  # agrees
        (raw(replicas=5), left(3), {"ours": False}, "somebody"),
        (raw(replicas=5), left(3), {"ours": False, "first": True}, ""),
        (raw(replicas=5), State(), {"ours": False, "first": True}, ""),
        (raw(KUBECTL, replicas=5, paused=True), left(3), {}, ""),
        (raw(KUBECTL, replicas=5), left(3, "ExternallyScaled"), {}, ""),
        (
            raw(("kube-controller-manager", ""), replicas=5),
            left(3),
            {},
            "kube-controller-manager (a HorizontalPodAutoscaler)",
        ),
    ],
)
def test_who_took_the_replicas_away(stack, state, flags, found):
    assert who(stack, state, **flags) == found


BY_BOTH = {"metrics": [busy(60)], "vertical": {"maxCores": 4}}
BY_TRIGGERS = {"vertical": {"maxCores": 4}}


def sized(cores_by, *, cores=2, replicas=3, replicas_by=MANAGER, autoscaling=BY_TRIGGERS):
    """A stack whose cores and number were written by these."""
    stack = raw((replicas_by, ""), replicas=replicas, **autoscaling)
    stack["spec"]["engine"] = {"cores": cores}
    fields = stack["metadata"]["managedFields"]
    fields.insert(0, {"manager": "helm", "fieldsV1": {"f:spec": {"f:engine": {".": {}, "f:image": {}}}}})
    if cores_by:
        fields.append({"manager": cores_by, "fieldsV1": {"f:spec": {"f:engine": {"f:cores": {}}}}})
    return stack


def left_size(replicas, cores, reason="TriggersKnown"):
    """The state after a round that left this size."""
    condition = Condition(vertical.ACTIVE, "True", ConditionReason(reason), "", 0.0)
    return State(left(replicas).horizontal, vertical.State(left=Size(replicas, cores), conditions=(condition,)))


BOTH_OURS = frozenset(("cores", "replicas"))


@pytest.mark.parametrize(
    ("stack", "state", "flags", "found"),
    [
        (sized(MANAGER), left_size(3, 2), {}, None),
        (sized(MANAGER, cores=4), left_size(3, 2), {}, None),  # written by one that died before its status
        (sized("kubectl", cores=4), left_size(3, 2), {}, ("cores", "kubectl")),
        (sized("kubectl"), left_size(3, 2), {}, ("cores", "kubectl")),  # to and fro within one period
        (sized("kubectl"), left_size(3, 2), {"owned": {"replicas"}}, None),  # of the manifest that made it
        (sized("", cores=4), left_size(3, 2), {"owned": {"replicas"}}, ("cores", "somebody")),
        (sized("", cores=4), left_size(3, 2), {"owned": {"replicas"}, "first": True}, None),
        (sized("kubectl", cores=4), left_size(3, 2, "ExternallyScaled"), {}, None),
        # The number is the triggers' too, or the metrics'.
        (sized(MANAGER, replicas=5, replicas_by="kubectl"), left_size(3, 2), {}, ("replicas", "kubectl")),
        (sized(MANAGER, replicas=5, replicas_by="kubectl"), left_size(3, 2, "ExternallyScaled"), {}, None),
        (
            sized(MANAGER, replicas=5, replicas_by="kubectl", autoscaling=BY_BOTH),
            left_size(3, 2, "ExternallyScaled"),
            {},
            ("replicas", "kubectl"),
        ),
        (sized("kubectl", cores=4, autoscaling=BY_BOTH), left_size(3, 2), {}, ("cores", "kubectl")),
    ],
)
def test_who_took_the_cores_away(stack, state, flags, found):
    size = Size(stack["spec"]["replicas"], stack["spec"]["engine"]["cores"])
    given = {"owned": BOTH_OURS, "first": False, **flags}
    assert other_writer(stack, parse(stack).spec, state, size, **given) == found


def test_what_is_the_autoscalers_own_is_told_field_by_field():
    assert ours(sized(MANAGER)) == BOTH_OURS
    assert ours(sized("kubectl")) == {"replicas"}
    assert ours(sized(MANAGER, replicas_by="kubectl")) == {"cores"}


# ---- metrics APIs ----------------------------------------------------------------------------------------------


class Answers:
    """An API that has these answers, by a part of the path, and no others."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    async def get(self, path):
        self.asked.append(path)
        for part, answer in self.answers.items():
            if part in path:
                if isinstance(answer, Exception):
                    raise answer
                return answer
        raise Refused(f"GET {path}", 404, "NotFound", "the server could not find the requested resource", frozenset())


def metric(**source):
    (kind,) = source
    target = {"type": "AverageValue", "averageValue": "1"}
    return autoscalers.Metric.model_validate(
        {"type": kind[0].upper() + kind[1:], kind: {**source[kind], "target": target}}
    )


BUSY = metric(pods={"metric": {"name": "busy"}})
QUEUE = metric(external={"metric": {"name": "queue/length", "selector": {"matchLabels": {"a": "b"}}}})


async def test_the_older_custom_metrics_api_is_asked_when_the_newer_is_not_there():
    item = {"describedObject": {"name": "edge-1"}, "timestamp": "2026-01-01T00:00:00Z", "value": "1500m"}
    api = Answers(v1beta1={"items": [item]})
    found = await Readings(api).read("shop", "a=b", BUSY, 0.0)
    assert found == {"edge-1": Sample(1500, 1767225600.0, 60.0)}
    assert api.asked == [
        f"/apis/custom.metrics.k8s.io/{v}/namespaces/shop/pods/*/busy?labelSelector=a%3Db"
        for v in ("v1beta2", "v1beta1")
    ]


async def test_a_metric_s_name_and_selector_stay_in_their_place_of_the_path():
    api = Answers(external={"items": [{"value": "2"}, {"value": "3"}]})
    assert await Readings(api).read("shop", "", QUEUE, 0.0) == [2000, 3000]
    path = "/apis/external.metrics.k8s.io/v1beta1/namespaces/shop/queue%2Flength?labelSelector=a%3Db"
    assert api.asked == [path]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"items": []},
        {"items": [{}]},
        {"items": [{"value": "many"}]},
        {"items": ["x"]},
        {"items": 7},
        OSError("gone"),
        TimeoutError(),
        Refused("GET", 503, "", "no endpoints", frozenset()),
    ],
)
@pytest.mark.parametrize("wanted", [BUSY, QUEUE], ids=["Pods", "External"])
async def test_what_a_metrics_api_says_wrongly_is_a_metric_that_failed(answer, wanted):
    assert isinstance(await Readings(Answers(metrics=answer)).read("shop", "", wanted, 0.0), MetricError)


async def test_an_object_of_an_unknown_kind_is_named():
    described = {"apiVersion": "example.com/v1", "kind": "Thing", "name": "x"}
    wanted = metric(object={"describedObject": described, "metric": {"name": "busy"}})
    found = await Readings(Answers(example={"resources": []})).read("shop", "", wanted, 0.0)
    assert str(found) == "example.com/v1 has no kind Thing; see describedObject"


def test_selectors_are_as_kubernetes_writes_them():
    expressions = [
        {"key": "c", "operator": "In", "values": ["y", "x"]},
        {"key": "d", "operator": "NotIn", "values": ["z"]},
        {"key": "e", "operator": "Exists"},
        {"key": "f", "operator": "DoesNotExist"},
    ]
    selector = autoscalers.LabelSelector.model_validate({"matchLabels": {"b": "2"}, "matchExpressions": expressions})
    assert selector_text(selector) == "b=2,c in (x,y),d notin (z),e,!f"
    assert selector_text(None) == ""
    wrong = autoscalers.LabelSelector.model_validate({"matchExpressions": [{"key": "a", "operator": "Near"}]})
    with pytest.raises(ValueError, match="use In, NotIn, Exists or DoesNotExist"):
        selector_text(wrong)


@pytest.mark.parametrize(
    "source",
    [
        {"external": {"metric": {"name": ".."}}},
        {"external": {"metric": {"name": "../../other/depth"}}},
        {"pods": {"metric": {"name": ".."}}},
        {"object": {"describedObject": {"kind": "Pod", "name": ".."}, "metric": {"name": "busy"}}},
        {"object": {"describedObject": {"kind": "Pod", "name": "x/../../../other/pods/x"}, "metric": {"name": "busy"}}},
        {
            "object": {
                "describedObject": {"apiVersion": "x/../../apis/apps/v1", "kind": "Deployment", "name": "x"},
                "metric": {"name": "busy"},
            }
        },
    ],
)
async def test_no_name_of_a_metric_leads_out_of_the_path(source):
    api = Answers(**{"/": {"items": [{"value": "1"}], "resources": [{"name": "deployments", "kind": "Deployment"}]}})
    found = await Readings(api).read("shop", "", metric(**source), 0.0)
    assert isinstance(found, MetricError)
    assert "cannot be a part of a path" in str(found)
    assert not [path for path in api.asked if ".." in path]


@pytest.mark.parametrize("name", ["other", "../../../../api/v1/namespaces/other"])
async def test_a_metric_of_a_namespace_is_that_of_the_stacks_own(name):
    api = Answers(metrics={"items": [{"value": "1"}]})
    described = {"kind": "Namespace", "name": name}
    await Readings(api).read("shop", "", metric(object={"describedObject": described, "metric": {"name": "busy"}}), 0.0)
    assert {path.rpartition("/namespaces/")[2] for path in api.asked} <= {"shop/metrics/busy"}


# ---- metrics ---------------------------------------------------------------------------------------------------


def test_metrics_of_one_name_are_one_series_and_no_name_is_endless():
    busy = {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": 50}}
    queue = {"metric": {"name": "q" * 1024}, "target": {"type": "AverageValue", "averageValue": "1"}}
    twice = [{"type": "Engine", "engine": busy}, {"type": "Engine", "engine": busy}]
    spec = parse(raw(metrics=[*twice, {"type": "External", "external": queue}])).spec
    load = StackLoad(1.0, (EngineLoad(1, "edge-1", "Active", True, 5.0, (0.9,), (), 0, 0.0, 0.0, 0.0, 0.0),))
    ready = [Pod("edge-1", ready="True")]
    metrics = Metrics()
    seen = Seen(Size(3, 1), ready)
    metrics.autoscalers.known["shop", "edge"] = together.reconcile(spec, State(), seen, 3, load, 1.0, {2: [1]})
    found = [
        line for line in generate_latest(metrics.registry).decode().splitlines() if line.startswith("packetstack_autos")
    ]
    series = [line.rpartition(" ")[0] for line in found if "usage_ratio" in line]
    assert len(series) == len(set(series)) == 2
    assert max(map(len, series)) < 400


def test_the_size_that_triggers_decide_is_exported_as_that_of_metrics_is():
    spec = parse(sized(MANAGER)).spec
    load = StackLoad(1.0, (EngineLoad(1, "edge-1", "Active", True, 5.0, (0.9, 0.9), (), 0, 0.0, 0.0, 0.0, 0.0),))
    metrics = Metrics()
    seen = Seen(Size(1, 2), [Pod("edge-1", ready="True")])
    metrics.autoscalers.known["shop", "edge"] = together.reconcile(spec, State(), seen, 1, load, 1.0)
    metrics.stacks.known["shop", "edge"] = sized(MANAGER), ()
    text = generate_latest(metrics.registry).decode()
    labels = 'namespace="shop",stack="edge"'
    assert f"packetstack_desired_cores{{{labels}}} 2.0" in text
    assert f'packetstack_autoscaler_decision{{{labels},step="desired"}} 1.0' in text
    assert f'packetstack_autoscaler_limit{{limit="max",{labels}}} 8.0' in text
