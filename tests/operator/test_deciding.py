"""What the operator decides, against a cluster in memory in which anything may happen between two writes."""

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.operator.model import BUCKETS, NODE, Model

from packetstack_core.assignment import Move, Owner
from packetstack_core.kinds import encode_owners
from packetstack_operator import deciding, observing
from packetstack_operator.observing import Holder, Memory, Proposal


def settled(replicas=2, **spec):
    model = Model(replicas, **spec)
    model.settle()
    model.check_goal()
    return model


def writes(decision):
    return [(w.verb, w.kind, w.name, w.subresource) for w in decision.writes]


def reasons(model):
    return [e.reason for e in model.events]


def test_an_engine_is_in_the_table_before_its_pod_exists():
    decision = Model(2).operator(most=0)
    order = [(w.verb, w.kind) for w in decision.writes]
    assert order.index(("create", "FlowTable")) < order.index(("create", "Pod"))


def test_the_first_engine_finds_a_node_and_the_others_follow_it():
    model = Model(3)
    model.operator()
    assert [p["metadata"]["name"] for p in model.of("Pod")] == ["edge-1"]
    assert "affinity" not in model.get("Pod", "edge-1")["spec"]
    model.settle()
    model.check_goal()
    terms = model.get("Pod", "edge-3")["spec"]["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]["nodeSelectorTerms"]
    assert terms == [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [NODE]}]}]


def test_at_the_goal_nothing_is_written_whatever_the_time():
    model = settled(3)
    for _ in range(5):
        model.now += 1000
        decision = model.operator()
        assert writes(decision) == []
        assert decision.events == ()


def test_a_restarted_operator_writes_nothing_either():
    model = settled(3)
    model.memory = Memory()
    assert writes(model.operator()) == []


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 3), (2, 0), (0, 2)])
def test_a_resize_ends_with_as_many_engines_and_fair_shares(before, after):
    model = settled(before)
    model.set_spec(replicas=after)
    model.settle()
    model.check_goal()


def test_draining_engines_are_in_neither_replicas_nor_the_selector():
    model = settled(3)
    model.set_spec(replicas=1)
    model.operator()
    assert (model.status["replicas"], model.status["drainingReplicas"]) == (1, 2)
    assert model.status["selector"] == "packetstack.io/stack=edge,packetstack.io/engine-state=Active"
    states = [p["metadata"]["labels"]["packetstack.io/engine-state"] for p in model.of("Pod")]
    assert sorted(states) == ["Active", "Draining", "Draining"]


def test_a_leaving_engine_keeps_its_pod_until_the_agent_has_let_it_go():
    model = settled(2)
    model.set_spec(replicas=1)
    for _ in range(5):
        model.operator()
        model.kubelet()
    assert len(model.of("Pod")) == 2, "the agent has not moved a bucket yet"
    model.settle()
    model.check_goal()


def test_another_image_rolls_and_never_fewer_engines_serve():
    model = settled(3)
    model.set_spec(engine={"image": "localhost/packetstack:2"})
    for _ in range(60):
        model.operator()
        model.kubelet()
        model.agent()
        assert model.status["readyReplicas"] >= 3
        assert 0 not in model.words
        model.now += 1
    model.settle()
    model.check_goal()
    assert {p["spec"]["containers"][0]["image"] for p in model.of("Pod")} == {"localhost/packetstack:2"}


def test_an_operator_of_another_image_rolls_its_engines():
    model = settled(1)
    model.image = "localhost/packetstack:2"
    model.settle()
    model.check_goal()
    assert model.of("Pod")[0]["spec"]["containers"][0]["image"] == "localhost/packetstack:2"


def test_a_deleted_pod_hands_over_to_one_that_is_made_for_it():
    model = settled(1)
    model.delete_pod("edge-1")
    for _ in range(30):
        model.operator()
        model.kubelet()
        model.agent()
        assert 0 not in model.words
        model.now += 1
    model.settle()
    model.check_goal()
    assert model.get("Pod", "edge-1") is None
    assert "EngineLost" not in reasons(model)


def test_a_pod_that_vanishes_is_replaced_under_another_number():
    model = settled(2)
    model.vanish("edge-1")
    model.settle()
    model.check_goal()
    assert "EngineLost" in reasons(model)
    assert {p["metadata"]["name"] for p in model.of("Pod")} == {"edge-2", "edge-3"}


def test_refused_pods_are_never_a_heap_and_the_pauses_grow():
    model = Model(1)
    model.refuse = "UnexpectedAdmissionError"
    most, began = 0, model.now
    while model.now < began + 120:
        model.operator()
        model.kubelet()
        most = max(most, len(model.of("Pod")))
        model.now += 0.5
    assert most == 1
    assert reasons(model).count("EngineCreated") < 10
    capacity = model.condition("CapacityAvailable")
    assert (capacity["status"], capacity["reason"]) == ("False", "DeviceNotReady")
    model.refuse = None
    model.settle()
    model.check_goal()


@pytest.mark.parametrize("strategy", ["Transfer", "Mirror"])
def test_refused_pods_of_another_template_are_never_a_heap_either_and_the_engines_of_before_serve(strategy):
    model = settled(2, handover={"strategy": strategy})
    model.refuse = "UnexpectedAdmissionError"
    model.set_spec(engine={"cores": 2})
    began = model.now
    while model.now < began + 120:
        model.operator()
        model.kubelet()
        model.agent()
        model.now += 0.5
    assert reasons(model).count("EngineFailed") < 20, "two at a time with Mirror"
    assert model.condition("CapacityAvailable")["reason"] == "DeviceNotReady"
    assert set(model.words) == {1, 2}
    assert model.condition("Available")["status"] == "True"
    model.refuse = None
    model.settle()
    model.end_connections()
    model.settle()
    model.check_goal()


@pytest.mark.parametrize(
    ("reason", "shown"),
    [("TopologyAffinityError", "TopologyRejected"), ("OutOfcpu", "NoExclusiveCPU"), ("OutOfmemory", "NoMemory")],
)
def test_the_reason_of_a_refusal_is_told(reason, shown):
    model = Model(1)
    model.refuse = reason
    for _ in range(6):
        model.operator()
        model.kubelet()
    assert model.condition("CapacityAvailable")["reason"] == shown


def test_what_a_nodes_packet_filter_stops_is_told_and_forgotten_when_it_is_open():
    model = settled(2)
    assert model.condition("FirewallOpen")["status"] == "True"
    what = "the policy of chain FORWARD of table ip filter drops what no rule accepts (Docker)"
    for reason, status in (("PacketsDropped", "False"), ("MayDropPackets", "Unknown")):
        model.firewall = f"{reason}: {what}"
        model.settle()
        found = model.condition("FirewallOpen")
        assert (found["status"], found["reason"], found["message"]) == (status, reason, what)
        assert reasons(model)[-1] == reason
        assert model.condition("Available")["status"] == "True", "engines are as they were"
    model.firewall = ""
    model.settle()
    assert model.condition("FirewallOpen")["status"] == "True"
    model.check_goal()


def test_without_room_a_stack_stays_at_its_size_and_says_why():
    model = settled(2)
    model.room = 2
    model.set_spec(replicas=4)
    for _ in range(100):
        model.operator()
        model.kubelet()
        model.agent()
        model.now += 1
    assert model.status["readyReplicas"] == 2
    assert len(model.of("Pod")) == 4
    assert model.condition("CapacityAvailable")["reason"] == "NoExclusiveCPU"
    assert "Insufficient cpu" in model.condition("CapacityAvailable")["message"]
    assert model.table().spec.node == NODE
    model.set_spec(replicas=2)
    model.settle()
    model.check_goal()


def test_what_the_kubelet_says_about_a_pod_that_it_cannot_start_is_told():
    model = Model(1)
    model.operator()
    said = "FailedCreatePodSandBox: cannot find a network-attachment-definition (edge-net) in namespace (shop)"
    model.change(("Pod", "edge-1"), lambda b: b["spec"].update(nodeName=NODE))
    world = replace(model.world(), troubles={"edge-1": said})
    written = {w.kind: w.body for w in deciding.decide(world, model.now).writes if w.subresource}
    capacity = next(c for c in written["PacketStack"]["status"]["conditions"] if c["type"] == "CapacityAvailable")
    assert capacity["reason"] == "NetworkAttachmentDefinitionNotFound"
    assert written["PacketEngine"]["status"]["message"] == f"pod edge-1: {said}"


def test_a_stack_whose_node_is_lost_goes_to_another():
    model = settled(2)
    model.nodes = ["node-1"]
    for pod in ("edge-1", "edge-2"):
        model.vanish(pod)
    model.words = [0] * BUCKETS
    model.attached = {}
    model.settle()
    model.check_goal()
    assert model.table().spec.node == "node-1"
    assert "NodeLost" in reasons(model)


def test_pods_that_hang_on_a_dead_node_do_not_hold_the_stack():
    model = settled(2)
    model.nodes = ["node-1"]
    for pod in ("edge-1", "edge-2"):
        model.delete_pod(pod)
    kubelet, model.kubelet = model.kubelet, lambda: None
    for _ in range(130):
        model.operator()
        model.now += 1
    model.kubelet = kubelet
    model.words, model.attached = [0] * BUCKETS, {}
    model.settle()
    model.check_goal()
    assert model.table().spec.node == "node-1"


def test_a_lost_flow_table_is_made_again_from_the_pods():
    model = settled(3)
    pods = {p["metadata"]["uid"] for p in model.of("Pod")}
    del model.objects["FlowTable", "edge"]
    model.settle()
    model.check_goal()
    assert {p["metadata"]["uid"] for p in model.of("Pod")} == pods
    assert model.table().spec.last_engine == 3


def test_what_was_edited_by_hand_is_put_back():
    model = settled(2)
    before = copy.deepcopy(model.objects)
    model.change(("Pod", "edge-1"), lambda b: b["metadata"]["labels"].update({"packetstack.io/engine-state": "x"}))
    model.change(("PodDisruptionBudget", "edge-engines"), lambda b: b["spec"].update(maxUnavailable=2))
    model.change(("FlowTable", "edge"), lambda b: b["spec"].update(unknownFlow="Reset"))
    model.change(("PacketEngine", "edge-2"), lambda b: b["status"].update(state="Failed"))
    model.settle()
    model.check_goal()
    for at, old in before.items():
        assert model.objects[at].get("spec") == old.get("spec")
        assert model.objects[at]["metadata"].get("labels") == old["metadata"].get("labels")


@pytest.mark.parametrize("missing", [["stack"], ["engine"], ["stack", "engine"], ["stack", "engine-state", "revision"]])
def test_labels_that_were_taken_off_a_pod_are_put_back_and_nothing_is_lost(missing):
    model = settled(2)
    before = copy.deepcopy(model.objects)

    def strip(pod):
        for label in missing:
            del pod["metadata"]["labels"][f"packetstack.io/{label}"]

    model.change(("Pod", "edge-1"), strip)
    model.settle()
    model.check_goal()
    assert model.objects["Pod", "edge-1"]["metadata"]["labels"] == before["Pod", "edge-1"]["metadata"]["labels"]
    assert "EngineLost" not in reasons(model)


@pytest.mark.parametrize("label", ["stack", "engine"])
def test_labels_of_another_stack_or_engine_are_put_right(label):
    model = settled(2)
    model.change(("Pod", "edge-1"), lambda b: b["metadata"]["labels"].update({f"packetstack.io/{label}": "9"}))
    model.settle()
    model.check_goal()
    labels = model.get("Pod", "edge-1")["metadata"]["labels"]
    assert (labels["packetstack.io/stack"], labels["packetstack.io/engine"]) == ("edge", "1")
    assert "EngineLost" not in reasons(model)


@pytest.mark.parametrize("looks", range(12))
def test_a_pod_without_labels_is_not_left_behind_wherever_it_is_in_its_life(looks):
    model = Model(1)
    for _ in range(looks):
        model.operator()
        model.kubelet()
        model.agent()
    if looks == 9:
        model.set_spec(replicas=0)
        model.operator()
    for pod in model.of("Pod"):
        model.change(("Pod", pod["metadata"]["name"]), lambda b: b["metadata"].update(labels={}))
    model.settle()
    model.check_goal()


def test_at_rest_nothing_is_read():
    model = settled(3)
    model.reads = 0
    model.operator()
    assert model.reads == 0


def stranger(model, kind, name, **fields):
    """An object that a user has made, with an owner of its own."""
    owners = [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "x", "uid": "x", "controller": True}]
    meta = {"name": name, "namespace": "shop", "labels": {"app": "x"}, "ownerReferences": owners}
    return copy.deepcopy(model.put({"apiVersion": "v1", "kind": kind, "metadata": meta, **fields}))


def test_engines_are_called_otherwise_where_pods_of_others_have_their_names():
    model = Model(2)
    theirs = [
        stranger(model, "Pod", f"edge-{n}", spec={"nodeName": "node-9"}, status={"phase": "Running"}) for n in (1, 2, 4)
    ]
    model.settle()
    assert [model.objects["Pod", p["metadata"]["name"]] for p in theirs] == theirs
    assert sorted(e.name for e in model.table().spec.engines) == ["edge-3", "edge-5"]
    assert reasons(model).count("NameTaken") == 3
    for pod in theirs:
        del model.objects["Pod", pod["metadata"]["name"]]
    model.check_goal()
    model.reads = 0
    assert writes(model.operator()) == []
    assert model.reads == 0


def test_the_disruption_budget_of_somebody_else_is_left_alone_and_the_stack_serves():
    model = Model(2)
    theirs = [
        stranger(model, "PodDisruptionBudget", name, spec={"minAvailable": 1}) for name in ("edge", "edge-engines")
    ]
    model.settle()
    assert [model.get("PodDisruptionBudget", n) for n in ("edge", "edge-engines")] == theirs
    assert model.status["readyReplicas"] == 2
    assert model.condition("Degraded")["reason"] == "NameTaken"
    assert "NameTaken" in reasons(model)
    assert writes(model.operator()) == []
    del model.objects["PodDisruptionBudget", "edge-engines"]
    model.settle()
    model.check_goal()
    assert model.get("PodDisruptionBudget", "edge-engines")["spec"]["maxUnavailable"] == 1


def test_a_budget_that_is_refused_does_not_keep_the_status_from_being_written():
    decision = Model(1).operator(most=0)
    order = [(w.kind, w.subresource) for w in decision.writes]
    assert order.index(("PacketStack", "status")) < order.index(("PodDisruptionBudget", ""))


def test_owners_that_were_edited_by_hand_become_fair_again():
    model = settled(2)
    owners = encode_owners([Owner(1, 0)] * BUCKETS)
    model.change(("FlowTable", "edge"), lambda b: b["spec"].update(owners=owners))
    model.settle()
    model.check_goal()


def test_a_paused_stack_keeps_its_engines_as_they_are():
    model = settled(2)
    model.set_spec(replicas=5, paused=True)
    for _ in range(5):
        model.operator()
        model.kubelet()
        model.agent()
    assert len(model.of("Pod")) == 2
    assert model.condition("Progressing")["reason"] == "Paused"
    model.set_spec(paused=False)
    model.settle()
    model.check_goal()


def test_the_buckets_of_an_evicted_engine_of_a_paused_stack_go_to_the_others():
    model = settled(3)
    model.set_spec(paused=True)
    model.delete_pod("edge-1")
    for _ in range(20):
        model.operator()
        model.kubelet()
        model.agent()
        assert 0 not in model.words
        model.now += 1
    assert set(model.words) == {2, 3}
    assert [p["metadata"]["name"] for p in model.of("Pod")] == ["edge-2", "edge-3"]
    assert "EngineLost" not in reasons(model)
    model.set_spec(paused=False)
    model.settle()
    model.check_goal()


def test_the_buckets_of_a_lost_engine_of_a_paused_stack_go_to_the_others():
    model = settled(3)
    model.set_spec(paused=True)
    model.vanish("edge-1")
    model.settle()
    assert set(model.words) == {2, 3}
    assert len(model.of("Pod")) == 2


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"engine": {"mode": "DPDK"}}, "spec.engine.mode"),
        ({"handover": {"strategy": "Mirror", "onDeadline": "Transfer"}}, "spec.handover"),
    ],
)
def test_what_is_not_supported_is_said_and_nothing_is_made(spec, field):
    model = Model(2, **spec)
    model.operator()
    assert {kind for kind, _ in model.objects} == {"PacketStack"}
    degraded = model.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "NotSupported")
    assert degraded["message"].startswith(field)
    assert writes(model.operator()) == []


def test_an_invalid_stack_goes_on_as_it_is():
    model = settled(2)
    table = copy.deepcopy(model.get("FlowTable"))
    model.set_spec(replicas=3, snat={"addresses": []})
    model.operator()
    assert model.condition("Degraded")["reason"] == "InvalidSpec"
    assert model.condition("Available")["status"] == "True"
    assert model.get("FlowTable") == table


def test_the_agents_word_becomes_a_condition():
    model = settled(1)
    text = "AddressConflict: 192.0.2.10 belongs to stack default/web"
    model.change(("FlowTable", "edge"), lambda b: b["status"]["nodes"][0].update(message=text))
    model.operator()
    degraded = model.condition("Degraded")
    assert (degraded["reason"], degraded["message"]) == ("AddressConflict", "192.0.2.10 belongs to stack default/web")


def test_while_an_agent_stands_by_the_engines_of_the_build_before_stay_and_the_condition_has_the_command():
    model = settled(2)
    text = (
        "LayoutMismatch: stack shop.edge has memory layout 2; by: kubectl packetstack upgrade edge --end-flows -n shop"
    )
    model.change(("FlowTable", "edge"), lambda b: b["status"]["nodes"][0].update(message=text))
    words, pods = list(model.words), [p["metadata"]["uid"] for p in model.of("Pod")]
    model.image = "localhost/packetstack:2"
    for _ in range(20):
        model.operator()
        model.kubelet()
        model.now += 10
    degraded = model.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "LayoutMismatch")
    assert degraded["message"].endswith("kubectl packetstack upgrade edge --end-flows -n shop")
    assert model.words == words
    assert set(pods) <= {p["metadata"]["uid"] for p in model.of("Pod")}
    assert [e.state for e in model.table().spec.engines][:2] == ["Active", "Active"]
    assert model.condition("Available")["status"] == "True"
    model.settle()  # it has been told to end the flows
    model.check_goal()


def test_an_engine_whose_image_is_of_another_build_than_the_agent_is_named():
    model = settled(1)
    said = {"ready": False, "message": "LayoutMismatch: datapath has layout 3, agent 2"}
    model.change(("FlowTable", "edge"), lambda b: b["status"]["nodes"][0]["engines"][0].update(said))
    model.operator()
    degraded = model.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "LayoutMismatch")
    assert degraded["message"].startswith("edge-1: datapath has layout 3, agent 2; the pod's image is of another build")


def test_a_node_without_an_agent_is_named():
    model = Model(1)
    for _ in range(15):
        model.operator()
        model.kubelet()
        model.now += 1
    degraded = model.condition("Degraded")
    assert degraded["reason"] == "NoAgent"
    assert degraded["message"].startswith(f"the agent on {NODE} has not reported on this flow table for 10 s")
    model.settle()
    model.check_goal()


def test_an_engine_that_does_not_serve_is_named_with_the_buckets_that_wait_for_it():
    model = settled(2)
    model.change(("FlowTable", "edge"), lambda b: b["status"]["nodes"][0]["engines"][0].update(ready=False, message=""))
    model.operator()
    degraded = model.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "EngineNotReady")
    assert degraded["message"] == "edge-1: no datapath is attached; 128 of 256 buckets get no service until one is"


def test_the_time_of_a_condition_moves_only_with_its_status():
    model = settled(1)
    before = model.condition("Available")["lastTransitionTime"]
    model.now += 100
    model.set_spec(replicas=2)
    model.settle()
    assert model.condition("Available")["lastTransitionTime"] == before
    assert model.condition("Available")["observedGeneration"] == 2
    assert model.condition("Progressing")["lastTransitionTime"] > before


def test_a_deleted_stack_is_released_before_its_pods_go():
    model = settled(2)
    model.ends = True
    for _ in range(50):
        decision = deciding.release(model.world(), model.now)
        for write in decision.writes:
            model.do(write)
        if decision.released:
            break
        model.kubelet()
        model.agent()
    assert decision.released
    model.kubelet()
    assert model.of("Pod") == []
    assert set(model.words) == {0}


def test_numbers_are_not_used_again_soon():
    model = settled(1)
    for _ in range(4):
        model.vanish(model.of("Pod")[0]["metadata"]["name"])
        model.settle()
    assert [e.id for e in model.table().spec.engines] == [5]


def test_after_the_last_number_comes_the_first_that_is_free():
    model = settled(1)
    model.change(("FlowTable", "edge"), lambda b: b["spec"].update(lastEngine=1023))
    model.set_spec(replicas=2)
    model.settle()
    assert [e.id for e in model.table().spec.engines] == [1, 2]


def test_a_pod_that_the_server_does_not_take_is_tried_again_later():
    model = Model(1)
    model.memory = Memory(1, model.now + 5, ("PodRefused", "no such priority class"))
    decision = model.operator()
    model.memory = decision.memory
    # Another shape has not failed yet.
    assert ("create", "Pod", "edge-1", "") in writes(decision)


@pytest.mark.parametrize(
    ("interface", "annotation"),
    [
        ({"attachment": {"networkAttachmentDefinition": "edge-net"}}, "shop/edge-net"),
        ({"attachment": {"networkAttachmentDefinition": "other/net"}}, "other/net"),
    ],
)
def test_an_engine_with_an_attachment_waits_for_the_name_of_its_interface(interface, annotation):
    model = Model(1, engine={"interface": interface})
    for _ in range(4):
        model.operator()
        model.kubelet()
    assert model.table().spec.engines[0].state == "Pending"
    status = [{"name": "cluster", "interface": "eth0"}, {"name": annotation, "interface": "net1"}]
    text = json.dumps(status)
    model.change(
        ("Pod", "edge-1"),
        lambda b: b["metadata"]["annotations"].update({"k8s.v1.cni.cncf.io/network-status": text}),
    )
    model.operator()
    engine = model.table().spec.engines[0]
    assert (engine.state, engine.interface) == ("Starting", "net1")


def steps(model, count, seconds=1.0):
    for _ in range(count):
        model.operator()
        model.kubelet()
        model.agent()
        model.now += seconds


def test_an_engine_with_the_mac_of_an_older_one_never_becomes_active():
    model = settled(1)
    model.macs = {1: "02:00:00:00:00:aa", 2: "02:00:00:00:00:aa"}
    model.set_spec(replicas=2)
    steps(model, 20)
    assert [e.state for e in model.table().spec.engines] == ["Active", "Starting"]
    assert set(model.words) == {1}
    degraded = model.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "DuplicateMAC")
    assert "pod edge-2:" in degraded["message"]
    assert "that of pod edge-1;" in degraded["message"]
    assert reasons(model).count("DuplicateMAC") == 1
    assert model.get("PacketEngine", "edge-2")["status"]["message"] == degraded["message"]
    ready = next(c for c in model.get("Pod", "edge-2")["status"]["conditions"] if c["type"].endswith("DataPath"))
    assert (ready["status"], ready["message"]) == ("False", degraded["message"])
    model.now += 1000
    assert writes(model.operator()) == []
    model.macs = {}
    model.settle()
    model.check_goal()


def test_of_two_engines_that_start_with_one_mac_the_older_pod_becomes_active():
    model = Model(2)
    model.macs = {1: "02:00:00:00:00:aa", 2: "02:00:00:00:00:aa"}
    model.stuck = {1, 2}
    steps(model, 10)
    for name, made in (("edge-1", "2030-01-01T00:00:02Z"), ("edge-2", "2030-01-01T00:00:01Z")):
        model.change(("Pod", name), lambda b, made=made: b["metadata"].update(creationTimestamp=made))
    model.stuck = set()
    steps(model, 10)
    assert [e.state for e in model.table().spec.engines] == ["Starting", "Active"]


def test_when_the_older_engine_has_gone_the_younger_one_becomes_active():
    model = settled(1)
    model.macs = {1: "02:00:00:00:00:aa", 2: "02:00:00:00:00:aa"}
    model.set_spec(replicas=2)
    steps(model, 10)
    model.vanish("edge-1")
    model.settle()
    model.check_goal()


def test_an_engine_with_the_mac_of_another_stacks_engine_on_its_node_never_becomes_active():
    model = Model(1)
    model.macs = {1: "02:00:00:00:00:aa"}
    model.neighbours = {"02:00:00:00:00:aa": [Holder(False, "", "other", "web", 7, "web-7")]}
    steps(model, 20)
    assert [e.state for e in model.table().spec.engines] == ["Starting"]
    assert model.condition("Degraded")["reason"] == "DuplicateMAC"
    assert "that of pod other/web-7;" in model.condition("Degraded")["message"]
    assert model.condition("Available")["status"] == "False"
    model.neighbours = {}
    model.settle()
    model.check_goal()


def test_an_engine_that_serves_goes_on_when_another_one_comes_with_its_mac():
    model = settled(2)
    model.neighbours = {"02:00:00:00:00:02": [Holder(False, "", "other", "web", 7, "web-7")]}
    model.operator()
    assert model.status["readyReplicas"] == 2
    assert {e.state for e in model.table().spec.engines} == {"Active"}


DEVICES = {
    "device plugin": {"devicePlugin": {"resourceName": "example.com/vf", "networkAttachmentDefinition": "net"}},
    "resource claim": {"resourceClaim": {"resourceClaimTemplateName": "vf"}},
}


def networked(model):
    """What the CNI plugins say of each pod that has a node."""
    said = json.dumps([{"name": "shop/net", "interface": "net1"}])
    for pod in model.of("Pod"):
        if pod["spec"].get("nodeName") and "k8s.v1.cni.cncf.io/networks" in pod["metadata"]["annotations"]:
            key = "k8s.v1.cni.cncf.io/network-status"
            model.change(
                ("Pod", pod["metadata"]["name"]), lambda b, key=key: b["metadata"]["annotations"].update({key: said})
            )


@pytest.mark.parametrize("interface", DEVICES.values(), ids=DEVICES)
def test_a_device_is_not_given_to_the_next_pod_before_its_last_one_has_been_gone_for_a_while(interface):
    model = Model(1, engine={"interface": interface})
    for _ in range(12):
        steps(model, 1)
        networked(model)
    assert model.status["readyReplicas"] == 1
    model.vanish("edge-1")
    decision = model.operator()
    assert model.of("Pod") == []
    assert decision.wake_at == model.now + deciding.REUSE_SECONDS
    gone, model.now = model.now, model.now + 1.9
    assert model.operator().wake_at == gone + deciding.REUSE_SECONDS
    assert model.of("Pod") == []
    model.now = gone + 2
    model.operator()
    assert [p["metadata"]["name"] for p in model.of("Pod")] == ["edge-2"]
    assert model.operator().wake_at is None


def test_a_pod_whose_interface_is_made_for_it_is_replaced_at_once():
    model = settled(1)
    model.vanish("edge-1")
    model.operator()
    assert [p["metadata"]["name"] for p in model.of("Pod")] == ["edge-2"]


def test_a_pod_that_never_had_a_device_is_not_waited_for():
    model = Model(1, engine={"interface": DEVICES["resource claim"]})
    model.room = 0
    steps(model, 3)
    model.vanish("edge-1")
    model.operator()
    assert [p["metadata"]["name"] for p in model.of("Pod")] == ["edge-1"]


def test_no_pod_is_ever_deleted_by_force():
    model = settled(2)
    model.set_spec(replicas=0)
    seen = []
    for _ in range(30):
        seen += [w for w in model.operator().writes if w.verb == "delete" and w.kind == "Pod"]
        model.kubelet()
        model.agent()
        model.now += 1
    model.refuse, model.stuck = "UnexpectedAdmissionError", set()
    model.set_spec(replicas=1)
    for _ in range(10):
        seen += [w for w in model.operator().writes if w.verb == "delete" and w.kind == "Pod"]
        model.kubelet()
        model.now += 1
    assert len(seen) > 2
    assert all(set(w.body) == {"preconditions"} for w in seen), "no gracePeriodSeconds"


def other_stack(name="web", namespace="other", made="2020-01-01T00:00:00Z", address="192.0.2.10", owners=""):
    meta = {"name": name, "namespace": namespace, "creationTimestamp": made}
    spec = {"listeners": [{"address": address}], "snat": {"addresses": ["203.0.113.0/28"]}}
    return {"metadata": meta, "spec": spec | ({"owners": owners} if owners else {})}


def at(model, made):
    model.change(("PacketStack", "edge"), lambda b: b["metadata"].update(creationTimestamp=made))


@pytest.mark.parametrize(
    ("address", "named"), [("192.0.2.10", "192.0.2.10"), ("192.0.2.70", "192.0.2.70"), ("192.0.2.64", "192.0.2.64")]
)
def test_a_stack_with_an_address_of_an_older_one_is_told_so_and_nothing_is_made(address, named):
    model = Model(2)
    at(model, "2026-01-01T00:00:00Z")
    model.others = [other_stack(address=address)]
    model.operator()
    assert {kind for kind, _ in model.objects} == {"PacketStack"}
    degraded = model.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "AddressConflict")
    assert degraded["message"] == f"{named} belongs to stack other/web; use another address"
    assert "AddressConflict" in reasons(model)
    assert writes(model.operator()) == []
    model.others = []
    model.settle()
    model.check_goal()


@pytest.mark.parametrize(
    ("made", "namespace", "first"),
    [
        ("2026-01-01T00:00:01Z", "other", True),
        ("2025-12-31T23:59:59Z", "other", False),
        ("2026-01-01T00:00:00Z", "zoo", True),
        ("2026-01-01T00:00:00Z", "other", False),
    ],
)
def test_of_two_new_stacks_the_older_one_gets_the_address_then_the_first_by_name(made, namespace, first):
    model = Model(1)
    at(model, "2026-01-01T00:00:00Z")
    model.others = [other_stack(namespace=namespace, made=made)]
    model.operator()
    assert (model.table() is not None) is first


def test_an_address_that_packets_flow_to_is_not_taken_away_by_an_older_stack():
    model = settled(2)
    model.others = [other_stack()]
    decision = model.operator()
    assert writes(decision) == []
    model.set_spec(replicas=3)
    model.settle()
    model.check_goal()


def test_an_older_stack_does_not_get_an_address_that_packets_flow_to_for_a_younger_one():
    model = settled(2)
    before = copy.deepcopy(model.get("FlowTable"))
    model.others = [other_stack(made="2099-01-01T00:00:00Z", address="192.0.2.20", owners="x")]
    listeners = copy.deepcopy(model.stack["spec"]["listeners"])
    model.set_spec(listeners=[*listeners, {**listeners[0], "name": "more", "address": "192.0.2.20"}])
    model.operator()
    assert model.condition("Degraded")["message"] == "192.0.2.20 belongs to stack other/web; use another address"
    assert model.condition("Available")["status"] == "True"
    assert model.get("FlowTable") == before
    model.set_spec(listeners=listeners)
    model.settle()
    model.check_goal()


def test_two_stacks_that_serve_one_address_go_on_and_the_later_one_says_so():
    model = settled(2)
    model.change(("FlowTable", "edge"), lambda b: b["metadata"].update(creationTimestamp="2026-01-01T00:00:00Z"))
    model.others = [other_stack(owners="x")]
    model.set_spec(replicas=3)
    model.settle()
    assert model.status["readyReplicas"] == 3
    assert model.condition("Degraded")["reason"] == "AddressConflict"
    assert model.table().spec.listeners[0].address.compressed == "192.0.2.10"
    model.others = [other_stack(owners="x", made="2027-01-01T00:00:00Z")]
    model.settle()
    model.check_goal()


class Operating(RuleBasedStateMachine):
    """Anything, in any order, with an operator killed between any two writes; then peace, and the goal must come."""

    @initialize(replicas=st.integers(0, 3))
    def start(self, replicas):
        self.model = Model(replicas)

    @rule(replicas=st.integers(0, 4))
    def scale(self, replicas):
        self.model.set_spec(replicas=replicas)

    @rule(image=st.sampled_from("ab"), limits=st.sampled_from([(1, 0), (0, 1), (2, 1)]))
    def roll(self, image, limits):
        self.model.set_spec(
            engine={"image": image}, updateStrategy={"maxSurge": limits[0], "maxUnavailable": limits[1]}
        )

    @rule(times=st.integers(1, 4))
    def work(self, times):
        for _ in range(times):
            self.model.operator()
            self.model.kubelet()
            self.model.agent()
            self.model.now += 1

    @rule(most=st.integers(0, 8))
    def operator_is_killed(self, most):
        self.model.operator(most)

    @rule()
    def kubelet(self):
        self.model.kubelet()

    @rule(batch=st.integers(1, BUCKETS))
    def agent(self, batch):
        self.model.agent(batch)

    @rule(seconds=st.sampled_from([1, 20, 100]))
    def time_passes(self, seconds):
        self.model.now += seconds

    @precondition(lambda self: self.model.of("Pod"))
    @rule(data=st.data(), how=st.sampled_from(["delete", "vanish", "stuck", "relabel", "strip"]))
    def something_happens_to_a_pod(self, data, how):
        name = data.draw(st.sampled_from([p["metadata"]["name"] for p in self.model.of("Pod")]))
        if how == "delete":
            self.model.delete_pod(name)
        elif how == "vanish":
            self.model.vanish(name)
        elif how == "stuck":
            self.model.stuck ^= {int(name.split("-")[1])}
        elif how == "strip" and self.model.get("PacketEngine", name):
            self.model.change(("Pod", name), lambda b: b["metadata"].update(labels={}))
        elif how == "relabel":
            state = data.draw(st.sampled_from(["Active", "Draining", "nonsense"]))
            self.model.change(
                ("Pod", name), lambda b: b["metadata"]["labels"].update({"packetstack.io/engine-state": state})
            )

    @rule(reason=st.sampled_from([None, "UnexpectedAdmissionError"]), room=st.sampled_from([1, 3, 100]))
    def the_node_changes(self, reason, room):
        self.model.refuse, self.model.room = reason, room

    @precondition(lambda self: self.model.get("FlowTable"))
    @rule()
    def the_table_is_deleted(self):
        del self.model.objects["FlowTable", "edge"]

    def teardown(self):
        if hasattr(self, "model"):
            self.model.refuse, self.model.room, self.model.stuck = None, 100, set()
            self.model.settle()
            self.model.check_goal()
            assert writes(self.model.operator()) == []


TestOperating = Operating.TestCase
TestOperating.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# ---- moves by load -----------------------------------------------------------------------------------------------


def proposed(model, buckets=10, to=1, queue=0):
    """As a rebalancer would, of the flow table that is there."""
    table = model.get("FlowTable")
    giving = [b for b, o in enumerate(model.table().spec.owner_ids()) if o.slot != to][:buckets]
    moves = tuple(Move(b, Owner(to, queue)) for b in giving)
    model.proposal = Proposal(table["metadata"]["generation"], moves, "busiest core 1.60 -> 1.10", ())
    return giving


def test_moves_by_load_are_written_with_their_mark_once_and_are_not_undone():
    model = settled(2)
    giving = proposed(model)
    decision = model.operator()
    assert ("replace", "FlowTable", "edge", "") in writes(decision)
    owners = model.table().spec.owner_ids()
    assert all(owners[b] == Owner(1, 0) for b in giving)
    assert model.table().spec.rebalanced
    model.settle()
    assert model.table().spec.owner_ids() == owners
    assert [e.message for e in model.events if e.reason == "Rebalanced"] == ["10 buckets: busiest core 1.60 -> 1.10"]
    assert model.status["rebalance"]["buckets"] == 10
    assert model.condition("Progressing")["status"] == "False", "the numbers need not be even"
    assert writes(model.operator()) == []


def test_a_new_engine_gets_its_share_of_what_was_moved_by_load():
    model = settled(2)
    proposed(model, 60)
    model.operator()
    model.settle()
    model.set_spec(replicas=3)
    model.settle()
    counts = Counter(o.slot for o in model.table().spec.owner_ids())
    assert sorted(counts.values()) == [45, 85, 126], "188 and 68 gave a third each"


@pytest.mark.parametrize("mode", ["Advice", "Off"])
def test_with_another_mode_nothing_is_moved_by_load(mode):
    model = settled(2, rebalance={"mode": mode})
    proposed(model)
    assert writes(model.operator()) == []


def test_off_takes_the_mark_away_and_evens_the_numbers_out():
    model = settled(2)
    proposed(model)
    model.operator()
    model.settle()
    model.set_spec(rebalance={"mode": "Off"})
    model.proposal = None
    model.settle()
    model.check_goal()
    assert not model.table().spec.rebalanced
    assert model.table().spec.rebalance.mode == "Off"
    assert model.table().stack().spec.rebalance.mode == "Off", "the agent too moves no queues"


def test_moves_of_another_flow_table_or_before_packets_follow_it_are_left():
    model = settled(2)
    proposed(model)
    model.proposal = replace(model.proposal, generation=model.proposal.generation - 1)
    assert writes(model.operator()) == []
    proposed(model)
    report = copy.deepcopy(model.get("FlowTable")["status"])
    report["nodes"][0]["settled"] = False
    model.change(("FlowTable", "edge"), lambda b: b.update(status=report))
    model.operator()
    assert not model.table().spec.rebalanced


def test_nothing_is_moved_by_load_where_the_server_would_drop_the_mark():
    model = settled(2)
    proposed(model)
    outdated = replace(model.world(), outdated="FlowTable, PacketStack")
    assert not [w for w in deciding.decide(outdated, model.now).writes if w.kind == "FlowTable"]
    assert [w for w in deciding.decide(model.world(), model.now).writes if w.kind == "FlowTable"]


def test_moves_to_an_engine_that_leaves_are_left_out():
    model = settled(2)
    giving = proposed(model)
    model.delete_pod("edge-1")
    model.operator()
    owners = model.table().spec.owner_ids()
    assert not model.table().spec.rebalanced
    assert [b for b in giving if owners[b] == Owner(1, 0)] == []


def test_elephants_are_in_the_status_while_there_are_any():
    model = settled(2)
    model.proposal = Proposal(1, (), "", (7,))
    model.operator()
    assert model.status["rebalance"]["elephants"] == [7]
    model.proposal = None
    model.operator()
    assert model.status["rebalance"]["elephants"] == []
    assert writes(model.operator()) == []


def test_the_engine_with_the_least_load_goes_and_the_load_alone_is_no_reason_to_decide():
    model = settled(3)
    model.loads = {1: 0.8, 2: 0.1, 3: 0.7}
    before = model.world()
    model.loads = {1: 0.9, 2: 0.2, 3: 0.7}
    assert model.world() == before
    model.set_spec(replicas=2)
    model.operator()
    assert [e.id for e in model.table().spec.engines if e.state == "Draining"] == [2]


# ---- engines that do not serve any more --------------------------------------------------------------------------


def pass_seconds(model, seconds):
    for _ in range(seconds):
        model.operator()
        model.kubelet()
        model.agent()
        model.now += 1


@pytest.mark.parametrize("replicas", [1, 3])
def test_an_active_engine_whose_datapath_does_not_come_back_is_replaced(replicas):
    model = settled(replicas)
    model.stuck = {1}
    pass_seconds(model, 55)
    assert len(model.of("Pod")) == replicas
    assert model.condition("Degraded")["reason"] == "EngineNotReady"
    pass_seconds(model, 30)
    assert 1 not in model.words
    assert model.get("Pod", "edge-1") is None
    assert reasons(model).count("EngineLost") == 1
    model.settle()
    model.check_goal()


def test_an_operator_at_rest_wakes_when_an_engine_is_to_be_given_up():
    model = settled(2)
    model.stuck = {1}
    model.agent()
    began = model.now
    decision = model.operator()
    assert decision.wake_at == began + 60


def test_an_engine_that_comes_back_in_time_keeps_its_buckets():
    model = settled(3)
    before = list(model.words)
    for _ in range(3):
        model.stuck = {1}
        pass_seconds(model, 50)
        model.stuck = set()
        pass_seconds(model, 5)
    assert model.words == before
    assert len(model.of("Pod")) == 3


def test_replace_after_0_leaves_an_engine_that_does_not_serve_to_a_person():
    model = settled(3, repair={"replaceAfterSeconds": 0})
    model.stuck = {1}
    for _ in range(60):
        pass_seconds(model, 1)
        model.now += 59
    assert 1 in model.words
    assert len(model.of("Pod")) == 3


def test_an_agent_that_does_not_answer_is_no_reason_to_replace_an_engine():
    model = settled(3)
    model.stuck = {1}
    model.agent()
    model.operator()
    model.set_spec(unknownFlow="Reset")  # another generation of the table, which nobody answers
    for _ in range(300):
        model.operator()
        model.kubelet()
        model.now += 1
    assert len(model.of("Pod")) == 3


def test_engines_that_fail_again_and_again_are_replaced_ever_more_seldom():
    model = settled(1)
    last = 0
    for _ in range(900):
        model.stuck = set(model.attached) if 1 in {len(model.attached)} and model.words[0] in model.attached else set()
        pass_seconds(model, 1)
        model.now += 3
        last = max([last, *(observing.number_of(p) for p in model.of("Pod"))])
    assert 3 <= last <= 8
