"""The operator's own process against a real API server, with the rights of the chart. Node and agent are played."""

import time

import pytest
from tests.operator.operator_process import RULES, USER, OperatorProcess, grant
from tests.operator.place import STACK
from tests.operator.players import ENGINES, PODS, STACKS, TABLES, wait

BUDGETS = "/apis/policy/v1/namespaces/{}/poddisruptionbudgets"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"


def test_a_stack_lives_from_its_creation_to_its_deletion(operator, place, control_plane):
    place.create()
    place.settle()
    assert set(place.pods()) == {"edge-1", "edge-2"}
    assert place.node.owners("edge") == {1, 2}

    place.change(replicas=4)
    place.settle()
    assert place.node.owners("edge") == {1, 2, 3, 4}

    control_plane.kubectl("scale", "pkst/edge", "--replicas=1", "-n", place.namespace)
    place.settle()
    (left,) = place.pods()
    scale = place.server.get(place.path(STACKS) + "/scale")
    assert scale["status"]["replicas"] == 1
    assert len(place.server.items(PODS.format(place.namespace), scale["status"]["selector"])) == 1

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


def test_labels_of_a_pod_are_put_back_and_it_stays_the_same_pod(operator, place):
    place.create()
    place.settle()
    before = {n: p["metadata"]["uid"] for n, p in place.pods().items()}
    kept = place.pods()["edge-1"]["metadata"]["labels"]
    place.server.merge(place.path(PODS, "edge-1"), {"metadata": {"labels": {"packetstack.io/stack": "other"}}})
    wait(lambda: place.pods()["edge-1"]["metadata"].get("labels") == kept)
    place.settle()
    assert {n: p["metadata"]["uid"] for n, p in place.pods().items()} == before


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


def test_a_stack_that_was_deleted_while_no_operator_ran_is_let_go_by_its_node(operator, place):
    place.create()
    place.settle()
    operator.kill()
    place.server.delete(place.path(STACKS))
    operator.start()
    wait(lambda: place.stack() is None)
    assert place.node.owners("edge") == set()


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
