"""A stack of a cluster gets a second set of engines (Mirror): what the operator decides, against a cluster in memory."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from tests.operator.model import BUCKETS, Model
from tests.operator.test_deciding import Operating

from packetstack_core.wording import timestamp
from packetstack_operator import deciding
from packetstack_operator.observing import Memory

MIRROR = {"strategy": "Mirror"}


def settled(replicas=2, **handover):
    model = Model(replicas, handover={**MIRROR, **handover})
    model.settle()
    model.check_goal()
    return model


def turn(model, times=1):
    for _ in range(times):
        model.operator()
        model.kubelet()
        model.agent()
        model.now += 1


def sets(model):
    return [(s["id"], s["state"]) for s in model.status["sets"]]


def draining(**handover):
    model = settled(**handover)
    model.set_spec(replicas=3)
    turn(model, 30)
    assert sets(model) == [(1, "Draining"), (2, "Current")]
    return model


def test_a_stack_without_mirror_has_a_table_without_sets():
    model = Model(2)
    model.settle()
    spec = model.get("FlowTable")["spec"]
    assert not {"sets", "lastSet", "previousOwners"} & set(spec)
    assert "sets" not in model.status


def test_a_second_set_is_switched_to_and_the_first_goes_when_its_connections_have_ended():
    model = draining()
    assert set(model.kept) == {1, 2}
    assert set(model.words) == {3, 4, 5}
    first, second = model.status["sets"]
    assert (first["engines"], first["keptBuckets"], first["connections"]) == (2, BUCKETS, BUCKETS)
    assert (first["silentSince"], second["silentSince"]) == (timestamp(model.silent_since), "")
    assert (second["engines"], second["ready"], second["buckets"]) == (3, 3, BUCKETS)
    assert (model.status["replicas"], model.status["readyReplicas"]) == (3, 3)
    model.end_connections(2)
    turn(model, 30)
    assert len(model.of("Pod")) == 5
    assert model.status["sets"][0]["keptBuckets"] == BUCKETS // 2
    model.end_connections()
    model.settle()
    model.check_goal()
    assert sets(model) == [(2, "Current")]
    assert "previousOwners" not in model.get("FlowTable")["spec"]


def test_an_operator_that_is_killed_after_any_write_goes_on_where_it_was():
    model = settled()
    model.set_spec(replicas=3)
    for n in range(200):
        model.operator(most=n % 3)
        model.kubelet()
        model.agent(batch=50)
        model.now += 1
        if n == 120:
            model.end_connections()
    model.settle()
    model.check_goal()
    assert sets(model) == [(2, "Current")]


def test_nothing_of_the_first_set_goes_before_the_agent_has_seen_the_switch():
    model = settled()
    model.set_spec(replicas=3)
    while any(s != (1, "Draining") for s in sets(model)[:1]):
        turn(model)
    for _ in range(10):
        model.operator()
        model.kubelet()
        model.now += 1
    assert {e.id for e in model.table().spec.engines} == {1, 2, 3, 4, 5}
    assert set(model.words) == {1, 2}


def test_a_second_set_that_is_not_wanted_any_more_is_removed():
    model = settled()
    model.room = 2
    model.set_spec(replicas=3)
    turn(model, 5)
    assert sets(model) == [(1, "Current"), (2, "Activating")]
    model.set_spec(replicas=2)
    model.settle()
    model.check_goal()
    assert sets(model) == [(1, "Current")]
    assert set(model.words) == {1, 2}


def test_an_engine_of_a_set_that_drains_is_made_again_from_the_shape_of_its_set():
    model = settled(replicas=1)
    model.set_spec(engine={"image": "localhost/packetstack:2", "cores": 2})
    turn(model, 30)
    assert sets(model) == [(1, "Draining"), (2, "Current")]
    model.vanish("edge-1")
    model.memory = Memory()
    turn(model, 30)
    made = model.get("Pod", "edge-3")
    assert made["spec"]["containers"][0]["image"] == "localhost/packetstack:1"
    entry = next(e for e in model.table().spec.engines if e.id == 3)
    assert (entry.set, entry.cores, entry.queues) == (1, 1, 4)
    assert set(model.kept) == {3}
    model.end_connections()
    model.settle()
    model.check_goal()


def test_what_an_engine_that_is_gone_kept_goes_to_another_of_its_set():
    model = draining()
    model.vanish("edge-1")
    turn(model, 20)
    assert set(model.kept) == {2}
    assert set(model.words) == {3, 4, 5}
    assert {e.id for e in model.table().spec.engines} == {2, 3, 4, 5}


def test_what_is_wanted_while_a_set_drains_waits_and_growth_does_not():
    model = draining()
    model.set_spec(replicas=1)
    turn(model, 10)
    assert model.condition("ScalingHeld")["status"] == "True"
    assert set(model.words) == {3, 4, 5}
    model.set_spec(replicas=4)
    turn(model, 20)
    assert model.condition("ScalingHeld")["status"] == "False"
    assert sum(e.set == 2 for e in model.table().spec.engines) == 4
    model.set_spec(replicas=1)
    model.end_connections()
    for _ in range(6):
        turn(model, 10)
        model.end_connections()
    model.settle()
    model.check_goal()
    assert sets(model) == [(3, "Current")]


def test_connections_end_at_the_deadline_where_that_is_wanted():
    model = draining(onDeadline="Reset", deadlineSeconds=100)
    turn(model, 20)
    assert set(model.kept) == {1, 2}
    model.now += 100
    model.settle()
    model.check_goal()
    assert [e.reason for e in model.events].count("SetEnded") == 1


def test_a_table_that_is_lost_while_a_set_drains_comes_back_with_both_sets():
    model = draining()
    del model.objects["FlowTable", "edge"]
    turn(model, 20)
    assert sets(model) == [(1, "Draining"), (2, "Current")]
    assert set(model.kept) == {1, 2}
    model.end_connections()
    model.settle()
    model.check_goal()


def test_a_stack_that_is_deleted_while_a_set_drains_lets_all_engines_go():
    model = draining()
    model.ends = True
    for _ in range(20):
        decision = deciding.release(model.world(), model.now)
        for write in decision.writes:
            model.do(write)
        model.agent()
        model.kubelet()
        if decision.released:
            break
    assert decision.released
    assert not model.attached


class OperatingSets(Operating):
    """Histories in which sets come and go too, and connections of before end."""

    @rule(strategy=st.sampled_from(["Mirror", "Transfer"]), policy=st.sampled_from(["Hold", "Hurry"]))
    def another_handover(self, strategy, policy):
        rules = {"strategy": strategy, "policy": policy, "onDeadline": "Reset", "deadlineSeconds": 60}
        self.model.set_spec(handover=rules)

    @rule(share=st.integers(1, 3))
    def connections_end(self, share):
        self.model.end_connections(share)


TestOperatingSets = OperatingSets.TestCase
TestOperatingSets.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
