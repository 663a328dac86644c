"""The control loop of a stack, in virtual time: when it looks, what it writes, and what refusals and lost answers do."""

import asyncio

import pytest
from tests.operator.memory_api import KEY, operated

from packetstack_operator import keeping, showing
from packetstack_operator.keeping import RECHECK_SECONDS, REST_SECONDS
from packetstack_operator.ports import Refused

pytestmark = pytest.mark.looptime


@pytest.fixture(autouse=True)
def events(monkeypatch):
    """Events of stacks, as they are posted."""
    posted = []
    monkeypatch.setattr(showing.kopf, "event", lambda _body, **event: posted.append(event))
    return posted


async def test_a_stack_gets_its_engines_and_then_rests():
    async with operated(3) as it:
        await it.run(20)
        it.model.check_goal()
        before, turns = len(it.api.asked), it.turns()
        await asyncio.sleep(600)
        assert len(it.api.asked) == before
        assert it.turns() - turns == pytest.approx(600 / REST_SECONDS, abs=1)


async def test_a_change_is_acted_on_after_the_pause_that_gathers_bursts():
    async with operated(1) as it:
        await it.run(20)
        before, began = len(it.api.asked), asyncio.get_running_loop().time()
        it.model.set_spec(replicas=2)
        it.api.bring()
        await asyncio.sleep(0.2)
        times = [t for t, _ in it.api.asked[before:]]
        assert times[0] - began <= keeping.SETTLE_SECONDS


async def test_a_stack_at_rest_is_decided_about_again_only_after_minutes(monkeypatch):
    decided = []
    decide = keeping.deciding.decide
    monkeypatch.setattr(keeping.deciding, "decide", lambda *a: decided.append(1) or decide(*a))
    async with operated(1) as it:
        await it.run(20)
        decided.clear()
        await asyncio.sleep(RECHECK_SECONDS - 90)
        assert decided == []
        await asyncio.sleep(2 * REST_SECONDS)
        assert len(decided) == 1


async def test_a_conflict_is_no_error_and_is_tried_again_soon():
    async with operated(1) as it:
        await it.run(20)
        it.api.lags = True
        it.model.set_spec(replicas=2)
        it.model.change(("FlowTable", "edge"), lambda b: b["metadata"].update(labels={}))
        it.api.lags = False
        it.api.bring()
        await it.run(5)
        it.model.check_goal()
        assert it.errors("Refused") == 0


async def test_a_stack_that_is_deleted_is_let_go_by_its_node_first():
    async with operated(2) as it:
        await it.run(20)
        release = asyncio.create_task(it.delete())
        await it.run(5)
        await release
        assert set(it.model.words) == {0}
        assert it.model.attached == {}
        assert it.model.of("Pod") == []


async def test_a_deletion_does_not_wait_for_ever_for_an_agent(caplog):
    async with operated(1) as it:
        await it.run(20)
        assert await it.delete() == pytest.approx(keeping.RELEASE_SECONDS, abs=0.1)
        assert "has not let its engines go" in caplog.text


async def test_a_deletion_that_leaves_orphans_leaves_the_engines_as_they_are():
    async with operated(1) as it:
        await it.run(20)
        before = len(it.api.asked)
        await it.delete(finalizers=["orphan"])
        assert len(it.api.asked) == before


# ---- refusals ----------------------------------------------------------------------------------------------------


def refusing(verb, kind, status, message):
    """What refuses these writes."""

    def refuse(write):
        if (write.verb, write.kind) == (verb, kind):
            raise Refused(f"{verb} {kind} {write.name}", status, "", message)

    return refuse


async def test_a_kind_that_the_server_does_not_have_is_told_and_asked_for_ever_more_seldom(caplog):
    async with operated(1) as it:
        it.api.refuse = refusing("create", "FlowTable", 404, "")
        await it.run(60)
        assert it.writes().count(("create", "FlowTable", "edge", "")) < 12
        assert it.errors("Refused") > 2
        assert "FlowTable" in caplog.text
        degraded = it.model.condition("Degraded")
        assert (degraded["status"], degraded["reason"]) == ("True", "WriteRefused")
        assert "the API server has no such kind; apply the CRDs of this operator's version" in degraded["message"]
        it.api.refuse = lambda write: None
        await it.run(40)
        it.model.check_goal()


async def test_a_stack_that_is_gone_when_its_status_is_written_is_no_error():
    async with operated(1) as it:
        await it.run(20)
        del it.model.objects["PacketStack", "edge"]
        it.keepers.wake(KEY)
        await asyncio.sleep(0.05)
        it.api.bring()
        await asyncio.sleep(30)
        assert it.errors("Refused") == 0


@pytest.mark.parametrize(
    ("verb", "kind", "status", "message", "reason"),
    [
        ("apply", "PacketEngine", 403, "exceeded quota: engines, requested: 1, used: 2", "QuotaExceeded"),
        ("replace", "FlowTable", 400, 'admission webhook "tables.example.com" denied the request', "WriteRefused"),
        ("replace", "FlowTable", 500, 'failed calling webhook "tables.example.com"', "WriteRefused"),
        ("create", "PodDisruptionBudget", 403, "exceeded quota: budgets", "QuotaExceeded"),
        ("apply", "Pod", 403, "pods is forbidden", "WriteRefused"),
    ],
)
async def test_a_refused_write_is_told_in_the_status_and_stops_nothing_else(
    verb, kind, status, message, reason, events
):
    async with operated(1) as it:
        if kind != "PodDisruptionBudget":
            await it.run(20)
            it.model.set_spec(replicas=2)
        it.api.refuse = refusing(verb, kind, status, message)
        await it.run(30)
        before = len(it.api.asked)
        await it.run(60)
        assert ("apply", "PacketStack", "edge", "status") not in it.writes(before), "nothing goes to and fro"
        degraded = it.model.condition("Degraded")
        assert (degraded["status"], degraded["reason"]) == ("True", reason)
        assert message in degraded["message"]
        assert it.model.condition("Progressing")["observedGeneration"] == it.model.stack["metadata"]["generation"]
        assert it.model.condition("Available")["status"] == "True"
        assert [e["reason"] for e in events].count(reason) == 1
        it.api.refuse = lambda write: None
        await it.run(60)
        it.model.check_goal()


async def test_a_stack_whose_flow_table_is_refused_is_shown_as_it_is_and_not_as_it_was_to_be():
    async with operated(1) as it:
        await it.run(20)
        it.api.refuse = refusing("replace", "FlowTable", 400, "denied")
        it.model.vanish("edge-1")
        await it.run(30)
        assert it.model.condition("Available")["status"] == "False"
        assert it.model.status["readyReplicas"] == 0
        assert it.model.condition("Progressing")["status"] == "True"


async def test_a_server_that_is_overloaded_is_not_told_in_the_status():
    async with operated(1) as it:
        await it.run(20)
        it.model.set_spec(replicas=2)
        it.api.refuse = refusing("replace", "FlowTable", 429, "too many requests")
        await it.run(20)
        assert it.model.condition("Degraded")["status"] == "False"


async def test_the_answer_to_a_deletion_that_comes_after_the_watch_saw_it_brings_nothing_back():
    async with operated(2) as it:
        await it.run(20)

        async def until_the_pod_is_gone(write):
            if (write.verb, write.kind) == ("delete", "Pod"):
                it.model.vanish(write.name)
                it.api.bring()

        it.api.hold = until_the_pod_is_gone
        it.model.set_spec(replicas=1)
        it.api.bring()
        await it.run(3)
        assert len(it.model.of("Pod")) == 1
        assert it.model.status["drainingReplicas"] == 0


async def test_a_wall_clock_that_is_set_back_stops_no_engine_from_being_made():
    async with operated(1) as it:
        await it.run(20)
        it.api.refuse = refusing("create", "Pod", 403, "exceeded quota: pods")
        it.model.set_spec(replicas=2)
        await it.run(3)
        it.turned_back = 3600.0
        it.api.refuse = lambda write: None
        await it.run(30)
        it.model.check_goal()


async def test_pods_that_the_server_does_not_take_are_a_condition_and_not_a_storm():
    async with operated(1) as it:
        it.api.refuse = refusing("create", "Pod", 403, 'violates PodSecurity "baseline:latest": hostPath volumes')
        await it.run(30)
        refused = it.model.condition("CapacityAvailable")
        assert (refused["status"], refused["reason"]) == ("False", "PodRefused")
        assert "hostPath" in refused["message"]
        assert [w[:2] for w in it.writes()].count(("create", "Pod")) < 6
        it.api.refuse = lambda write: None
        await it.run(60)
        it.model.check_goal()


# ---- what the watches do not bring -------------------------------------------------------------------------------


async def test_what_keeps_a_pod_from_starting_is_told():
    async with operated(1) as it:
        await asyncio.sleep(0.2)
        it.model.kubelet()  # it has a node now
        it.api.bring()
        (pod,) = it.model.of("Pod")
        it.kubelet = False
        it.api.warnings[pod["metadata"]["uid"]] = 'network-attachment-definitions "edge-net" not found'
        await it.run(15)
        assert it.model.condition("CapacityAvailable")["reason"] == "NetworkAttachmentDefinitionNotFound"
        it.kubelet = True
        await it.run(20)
        it.model.check_goal()


async def test_names_that_others_have_taken_are_left_to_them_and_the_stack_serves(events):
    async with operated(1) as it:
        meta = {
            "namespace": "shop",
            "uid": "theirs",
            "ownerReferences": [{"name": "x", "uid": "x", "controller": True}],
        }
        theirs = {"kind": "Pod", "metadata": {**meta, "name": "edge-1"}, "spec": {}, "status": {"phase": "Running"}}
        it.model.put(theirs)
        it.model.put({"kind": "PodDisruptionBudget", "metadata": {**meta, "name": "edge-engines"}, "spec": {}})
        await it.run(30)
        now = it.model.get("Pod", "edge-1")["metadata"]
        assert now["uid"] == "theirs"
        assert not {"labels", "deletionTimestamp"} & set(now)
        assert it.model.status["readyReplicas"] == 1
        assert it.model.get("Pod", "edge-2") is not None
        assert it.model.condition("Degraded")["reason"] == "NameTaken"
        assert any(e["reason"] == "NameTaken" and "edge-1" in e["message"] for e in events)
        before = len(it.api.asked)
        await it.run(60)
        assert len(it.api.asked) == before


async def test_a_deleted_flow_table_comes_back_and_no_pod_is_lost():
    async with operated(3) as it:
        await it.run(20)
        uids = {p["metadata"]["uid"] for p in it.model.of("Pod")}
        del it.model.objects["FlowTable", "edge"]
        await it.run(20)
        it.model.check_goal()
        assert {p["metadata"]["uid"] for p in it.model.of("Pod")} == uids


async def test_without_the_agents_answer_nothing_is_taken_away():
    async with operated(2) as it:
        await it.run(20)
        it.agent = False
        it.model.set_spec(replicas=1)
        await it.run(120)
        assert it.model.status["drainingReplicas"] == 1
        assert len(it.model.of("Pod")) == 2
        it.agent = True
        await it.run(20)
        it.model.check_goal()


async def test_a_pod_whose_deletion_no_watch_brought_is_missed_in_the_end():
    async with operated(2) as it:
        await it.run(20)
        it.api.forgets = {("Pod", "edge-1")}  # the watch had to list anew, and kopf says nothing of what is not listed
        it.model.vanish("edge-1")
        await it.run(100)
        it.model.check_goal()
