"""The operator's own process against a real API server, with the rights of the chart. Node and agent are played."""

import time

import pytest
from tests.operator.operator_process import RULES, USER, OperatorProcess, grant
from tests.operator.place import STACK
from tests.operator.players import ENGINES, PODS, STACKS, TABLES, wait

BUDGETS = "/apis/policy/v1/namespaces/{}/poddisruptionbudgets"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"


def test_a_stack_lives_from_its_creation_to_its_deletion(operator, place):
    place.create()
    place.settle()
    assert set(place.pods()) == {"edge-1", "edge-2"}
    assert place.node.owners("edge") == {1, 2}

    place.change(replicas=4)
    place.settle()
    assert place.node.owners("edge") == {1, 2, 3, 4}

    place.change(replicas=1)
    place.settle()
    (left,) = place.pods()

    place.change(engine={"image": "localhost/packetstack:2"})
    place.settle()
    (pod,) = place.pods().values()
    assert pod["metadata"]["name"] != left
    assert pod["spec"]["containers"][0]["image"] == "localhost/packetstack:2"

    place.server.delete(place.path(PODS, pod["metadata"]["name"]))
    wait(lambda: pod["metadata"]["name"] not in place.pods())
    place.settle()

    place.server.delete(place.path(STACKS))
    wait(lambda: place.stack() is None)
    for kind in (TABLES, PODS, ENGINES):
        wait(lambda kind=kind: place.server.items(kind.format(place.namespace)) == [], 60)


def looks_again(operator, place, times):
    """Woken for nothing, until the operator has looked at the stack so often."""
    for number in range(times):
        before = operator.looks()
        for pod in place.pods():
            place.server.merge(place.path(PODS, pod), {"metadata": {"annotations": {"someone": str(number)}}})
        wait(lambda before=before: operator.looks() > before)


def test_at_rest_nothing_is_written(operator, place):
    place.create()
    place.settle()
    looks_again(operator, place, 1)
    before, seen = operator.writes(), place.stack()["metadata"]["resourceVersion"]
    looks_again(operator, place, 6)
    assert operator.writes() == before
    assert place.stack()["metadata"]["resourceVersion"] == seen
    assert "annotations" not in place.stack()["metadata"], "no copy of the spec is kept"


def test_scale_goes_through_the_subresource_and_its_selector_is_of_active_pods(operator, place, control_plane):
    place.create()
    place.settle()
    control_plane.kubectl("scale", "pkst/edge", "--replicas=3", "-n", place.namespace)
    place.settle()
    scale = place.server.get(place.path(STACKS) + "/scale")
    assert scale["status"]["replicas"] == 3
    assert len(place.server.items(PODS.format(place.namespace), scale["status"]["selector"])) == 3


def test_an_address_stays_with_the_stack_that_had_it_first_until_that_one_gives_it_up(operator, place, another):
    place.create(replicas=1)
    place.settle()
    another.create(replicas=1, snat={"addresses": ["192.0.2.80/28"]})
    wait(lambda: another.condition("Degraded").get("reason") == "AddressConflict")
    assert another.condition("Degraded")["message"] == (
        f"192.0.2.10 belongs to stack {place.namespace}/edge; use another address"
    )
    assert another.table() is None
    assert another.pods() == {}
    listener = {**STACK["spec"]["listeners"][0], "address": "192.0.2.11"}
    place.change(listeners=[listener])
    another.settle(10)  # less than the operator's tick: it is woken
    assert another.condition("Degraded")["status"] == "False"
    place.settle()


def test_an_engine_with_the_mac_of_one_of_another_stack_on_its_node_waits(operator, place, another):
    place.node.macs = another.node.macs = {1: "02:00:00:00:00:aa"}
    place.create(replicas=1)
    place.settle()
    own = {**STACK["spec"]["listeners"][0], "address": "192.0.2.11"}
    another.create(replicas=1, listeners=[own], snat={"addresses": ["192.0.2.80/28"]})
    wait(lambda: another.condition("Degraded").get("reason") == "DuplicateMAC")
    assert f"that of pod {place.namespace}/edge-1;" in another.condition("Degraded")["message"]
    assert another.node.owners("edge") == set()
    another.node.macs = {}
    another.settle()


def test_backends_follow_the_endpoint_slices_of_their_service(operator, place):
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"ports": [{"name": "http", "port": 8080, "targetPort": 80}]},
    }
    listener = {**STACK["spec"]["listeners"][0], "backends": {"service": {"name": "web", "port": 8080}}}
    place.create(listeners=[listener], replicas=1)

    def endpoints():
        table = place.table()
        return (
            [(e["address"], e["port"], e["weight"]) for e in table["spec"]["listeners"][0]["backends"]["endpoints"]]
            if table
            else None
        )

    wait(lambda: place.condition("Degraded").get("reason") == "BackendNotFound")
    place.server.request("POST", f"/api/v1/namespaces/{place.namespace}/services", service)
    found = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 80}],
        "endpoints": [{"addresses": ["10.0.0.3"]}, {"addresses": ["10.0.0.4"], "conditions": {"ready": False}}],
    }
    place.server.request("POST", SLICES.format(place.namespace), found)
    wait(lambda: endpoints() == [("10.0.0.3", 80, 1)])
    place.settle()
    leaving = {"ready": False, "serving": True, "terminating": True}
    place.server.merge(
        place.path(SLICES, "web-1"),
        {"endpoints": [{"addresses": ["10.0.0.3"], "conditions": leaving}, {"addresses": ["10.0.0.4"]}]},
    )
    wait(lambda: endpoints() == [("10.0.0.3", 80, 0), ("10.0.0.4", 80, 1)])
    place.server.delete(place.path(SLICES, "web-1"))
    wait(lambda: endpoints() == [])


def test_pods_that_the_server_does_not_take_are_a_condition_and_not_a_storm(operator, place):
    baseline = {"pod-security.kubernetes.io/enforce": "baseline"}
    place.server.merge(f"/api/v1/namespaces/{place.namespace}", {"metadata": {"labels": baseline}})
    place.create(replicas=1)
    wait(lambda: place.condition("CapacityAvailable")["status"] == "False")
    refused = place.condition("CapacityAvailable")
    assert refused["reason"] == "PodRefused"
    assert "hostPath" in refused["message"]
    before = operator.writes()
    time.sleep(2)
    assert operator.writes() - before < 8
    place.server.merge(
        f"/api/v1/namespaces/{place.namespace}",
        {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}},
    )
    place.settle(60)
    assert place.condition("CapacityAvailable")["status"] == "True"


def test_what_keeps_a_pod_from_starting_is_told(operator, place):
    place.node.holds = True
    place.create(replicas=1)
    pod = wait(lambda: next((p for p in place.pods().values() if p["spec"].get("nodeName")), None))
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "edge-1.1"},
        "involvedObject": {
            "kind": "Pod",
            "namespace": place.namespace,
            "name": pod["metadata"]["name"],
            "uid": pod["metadata"]["uid"],
        },
        "type": "Warning",
        "reason": "FailedCreatePodSandBox",
        "message": 'network-attachment-definitions.k8s.cni.cncf.io "edge-net" not found',
        "source": {"component": "kubelet"},
    }
    place.server.request("POST", f"/api/v1/namespaces/{place.namespace}/events", event)
    wait(lambda: place.condition("CapacityAvailable").get("reason") == "NetworkAttachmentDefinitionNotFound")
    place.node.holds = False
    place.settle()
    assert place.condition("CapacityAvailable")["status"] == "True"


def test_pods_that_the_kubelet_refuses_are_not_a_heap(operator, place):
    place.node.refuse = ("UnexpectedAdmissionError", "Allocate failed: no devices")
    place.create(replicas=1)

    def told():
        assert len(place.pods()) <= 1
        return place.condition("CapacityAvailable").get("reason") == "DeviceNotReady"

    wait(told)
    place.node.refuse = None
    place.settle(60)


def test_what_another_writer_added_to_a_flow_table_is_taken_out(operator, place):
    place.create(replicas=1)
    place.settle()
    engines = place.table()["spec"]["engines"]
    stranger = {"id": 900, "name": "x", "state": "Active", "template": "ab", "queues": 1, "cores": 1, "podUid": "1"}
    body = {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "FlowTable",
        "metadata": {"name": "edge"},
        "spec": {"engines": [stranger]},
    }
    place.server.apply(place.path(TABLES), body, "somebody")
    wait(lambda: place.table()["spec"]["engines"] == engines)
    place.settle()


def test_names_that_others_have_taken_are_left_to_them_and_the_stack_serves(operator, place):
    container = {"name": "web", "image": "localhost/web"}
    taken = {"kind": "Pod", "metadata": {"name": "edge-1"}, "spec": {"containers": [container]}}
    theirs = place.server.request("POST", PODS.format(place.namespace), taken)
    selector = {"matchLabels": {"app": "edge"}}
    for name in ("edge", "edge-engines"):
        body = {"metadata": {"name": name}, "spec": {"minAvailable": 1, "selector": selector}}
        place.server.request("POST", BUDGETS.format(place.namespace), body)

    def budgets():  # without what Kubernetes itself writes
        listed = place.server.items(BUDGETS.format(place.namespace))
        ours = ("uid", "generation", "labels", "ownerReferences")
        return [([b["metadata"].get(k) for k in ours], b["spec"]) for b in listed]

    made = budgets()
    place.create(replicas=1)
    wait(lambda: place.condition("Degraded").get("reason") == "NameTaken")
    wait(lambda: place.stack()["status"]["readyReplicas"] == 1 and place.condition("Progressing")["status"] == "False")
    assert set(place.pods()) == {"edge-1", "edge-2"}
    now = place.pods()["edge-1"]
    assert [now["metadata"].get(k) for k in ("uid", "labels", "ownerReferences", "deletionTimestamp")] == [
        theirs["metadata"]["uid"],
        None,
        None,
        None,
    ]
    before = operator.writes()
    looks_again(operator, place, 3)
    assert operator.writes() == before
    assert budgets() == made
    events = place.server.items(f"/api/v1/namespaces/{place.namespace}/events")
    assert any(e["reason"] == "NameTaken" and "edge-1" in e["message"] for e in events)
    place.server.delete(place.path(PODS, "edge-1"), gracePeriodSeconds=0)
    place.server.delete(place.path(BUDGETS, "edge-engines"))
    place.change(replicas=2)
    place.settle()
    assert place.server.get(place.path(BUDGETS, "edge-engines"))["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize("labels", [None, {"packetstack.io/stack": None}, {"packetstack.io/stack": "other"}])
def test_labels_of_a_pod_are_put_back_and_it_stays_the_same_pod(operator, place, labels):
    place.create()
    place.settle()
    before = {n: p["metadata"]["uid"] for n, p in place.pods().items()}
    kept = place.pods()["edge-1"]["metadata"]["labels"]
    place.server.merge(place.path(PODS, "edge-1"), {"metadata": {"labels": labels}})
    wait(lambda: place.pods()["edge-1"]["metadata"].get("labels") == kept)
    place.settle()
    assert {n: p["metadata"]["uid"] for n, p in place.pods().items()} == before


def test_a_deleted_flow_table_comes_back_and_no_pod_is_lost(operator, place):
    place.create(replicas=3)
    place.settle()
    pods = {p["metadata"]["uid"] for p in place.pods().values()}
    place.server.delete(place.path(TABLES))
    wait(lambda: place.table() is not None and place.settled())
    assert {p["metadata"]["uid"] for p in place.pods().values()} == pods


def test_engines_that_were_orphaned_serve_the_next_stack_of_that_name(operator, place):
    place.create()
    place.settle()
    pods = {p["metadata"]["uid"] for p in place.pods().values()}
    place.server.delete(place.path(STACKS), propagationPolicy="Orphan")
    wait(lambda: place.stack() is None)
    place.create()
    wait(lambda: place.stack().get("status"))
    place.settle()
    assert {p["metadata"]["uid"] for p in place.pods().values()} == pods


def test_a_namespace_is_deleted_with_its_stacks(operator, place):
    place.create()
    place.settle()
    place.server.delete(f"/api/v1/namespaces/{place.namespace}")
    wait(lambda: not place.pods(), 20)  # less than their grace period
    wait(lambda: place.stack() is None, 20)


def test_without_the_agents_answer_nothing_is_taken_away(operator, place):
    place.create()
    place.settle()
    place.node.agent = False
    place.change(replicas=1)
    wait(lambda: place.stack()["status"]["drainingReplicas"] == 1)
    looks_again(operator, place, 3)
    assert len(place.pods()) == 2
    place.node.agent = True
    place.settle()


def test_a_stack_that_was_deleted_while_no_operator_ran_is_let_go_by_its_node(operator, place):
    place.create()
    place.settle()
    operator.kill()
    place.server.delete(place.path(STACKS))
    operator.start()
    wait(lambda: place.stack() is None)
    assert place.node.owners("edge") == set()


@pytest.mark.slow
def test_a_stack_without_an_agent_can_be_deleted(operator, place):
    place.create()
    place.settle()
    place.node.agent = False
    place.server.delete(place.path(STACKS))
    wait(lambda: place.stack() is None, 60)
    assert "has not let its engines go" in operator.said()
    wait(lambda: not place.pods() or all(p["metadata"].get("deletionTimestamp") for p in place.pods().values()), 60)


@pytest.mark.slow
def test_operators_that_are_killed_after_every_few_writes_get_there(operator, place):
    operator.kill()
    place.create(replicas=1)
    deaths = 0
    for change in ({"replicas": 2}, {"replicas": 1, "engine": {"image": "localhost/packetstack:2"}}):
        place.change(**change)
        while not place.settled():
            if not operator.running():
                operator.kill()
                operator.start(dies_after=2 + deaths % 5)
                deaths += 1
            assert deaths < 100
            time.sleep(0.02)
    operator.kill()
    operator.start()
    assert deaths > 5
    assert place.node.broken == []
    place.settle()


def test_an_operator_with_rights_in_one_namespace_serves_that_one_only(operator, place, control_plane, tmp_path):
    operator.kill()
    grant(control_plane, place.namespace)
    user = "single"
    rights = {"kind": "Role", "name": USER, "apiGroup": "rbac.authorization.k8s.io"}
    control_plane.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": user, "namespace": place.namespace},
            "roleRef": rights,
            "subjects": [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}],
        }
    )
    kubeconfig = control_plane.kubeconfig_for(user)
    with OperatorProcess(kubeconfig, tmp_path / "log", "--namespace", place.namespace) as single:
        place.create()
        place.settle()
        place.server.delete(place.path(STACKS))
        wait(lambda: place.stack() is None)
        assert single.stop() == 0
        assert "Traceback" not in single.said()
    operator.start()


@pytest.mark.slow
def test_a_second_operator_takes_over_when_the_holder_of_the_lease_is_killed(operator, place, control_plane, tmp_path):
    operator.kill()
    lease = f"{place.namespace}/packetstack-operator"
    control_plane.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": "lease", "namespace": place.namespace},
            "rules": RULES["operatorLease"],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "lease", "namespace": place.namespace},
            "roleRef": {"kind": "Role", "name": "lease", "apiGroup": "rbac.authorization.k8s.io"},
            "subjects": [{"kind": "User", "name": USER, "apiGroup": "rbac.authorization.k8s.io"}],
        },
    )
    first = OperatorProcess(operator.kubeconfig, tmp_path / "first", "--lease", lease)
    second = OperatorProcess(operator.kubeconfig, tmp_path / "second", "--lease", lease)
    with first, second:
        place.create(replicas=1)
        place.settle()
        leader, other = (first, second) if "packetstack_leader 1.0" in first.metrics() else (second, first)
        assert "packetstack_leader 0.0" in other.metrics()
        leader.kill()
        place.change(replicas=2)
        place.settle(60)
        assert "packetstack_leader 1.0" in other.metrics()
    operator.start()
