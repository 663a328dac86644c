"""Stacks with spec.autoscaling.vertical: the operator writes spec.engine.cores, and the number of engines with it.

Engines are played: their counters rise as busy as a test says.
"""

import pytest
from tests.operator.counters import busy
from tests.operator.players import STACKS, wait
from tests.operator.test_autoscaling import Scaled

SOON = {"holdSeconds": 1, "coolDownSeconds": 1}
ACTIVE = "VerticalScalingActive"


class Sized(Scaled):
    """A stack whose engines have 1 to 4 cores, by their utilisation: more above 75 %, fewer below 35 %."""

    def __init__(self, place, counters, vertical=(), **autoscaling):
        super().__init__(place, counters)
        sized = {"maxCores": 4, **SOON, **dict(vertical)}
        self.autoscaling = {"maxReplicas": 1, "syncPeriodSeconds": 1, "vertical": sized, **autoscaling}

    @property
    def size(self):
        spec = self.place.stack()["spec"]
        return spec["replicas"], spec["engine"]["cores"]

    @property
    def sized(self):
        return self.status.get("vertical", {})

    def rests(self, replicas, cores, seconds=40):
        """This is wanted, and each engine that serves is so."""
        wait(lambda: self.size == (replicas, cores), seconds)
        self.place.settle()
        there = {(name, self.counters.cores.get((self.name, name))) for name in self.place.pods()}
        assert [c for _, c in there] == [cores] * replicas
        wait(lambda: self.condition(ACTIVE) == ("True", "TriggersKnown"))
        wait(lambda: (self.sized["currentReplicas"], self.sized["currentCores"]) == (replicas, cores))

    def owners(self):
        """Who wrote the cores."""
        fields = self.place.stack()["metadata"]["managedFields"]
        return {m["manager"] for m in fields if "f:cores" in m["fieldsV1"].get("f:spec", {}).get("f:engine", {})}

    def aside(self, message):
        wait(lambda: self.condition(ACTIVE) == ("False", "ExternallyScaled"))
        assert self.place.condition(ACTIVE)["message"].startswith(message)
        assert len(self.events("ExternallyScaled")) == 1


@pytest.fixture
def sized(operator, place, counters):
    def make(*args, **changes):
        return Sized(place, counters, *args, **changes)

    return make


def test_engines_get_more_cores_by_a_trigger_and_give_them_back(sized, operator):
    stack = sized().create(0.5, replicas=1)
    stack.rests(1, 1)
    stack.load(1.2)
    stack.rests(1, 2)
    assert stack.owners() == {"packetstack-autoscaler"}
    [event] = stack.events("EnginesResized")
    assert event["message"].startswith(
        "1 x 1 core -> 1 x 2 cores: Utilization 100 % is above 75 % -> 2 cores. Engines are"
    )
    assert event["involvedObject"]["kind"] == "PacketStack"
    labels = f'namespace="{stack.place.namespace}",stack="edge"'
    assert f"packetstack_desired_cores{{{labels}}} 2.0" in operator.metrics()
    operator.kill()
    operator.start()
    stack.load(0.2)
    stack.rests(1, 1)
    assert stack.events("ExternallyScaled") == []
    stack.place.change(autoscaling=None)
    wait(lambda: "autoscaling" not in stack.place.stack()["status"])
    types = {c["type"] for c in stack.place.stack()["status"]["conditions"]}
    assert types == {"Available", "CapacityAvailable", "Degraded", "FirewallOpen", "Progressing"}


def test_cores_come_first_then_engines_and_one_patch_writes_both(sized, place):
    stack = sized({"maxCores": 2}, maxReplicas=2).create(0.5, replicas=1)
    stack.rests(1, 1)
    stack.load(3.0)  # one look sees a full core, the next one two
    stack.rests(2, 2, 60)
    place.change(autoscaling={"paused": True})
    stack.load(0.1)
    wait(lambda: "paused, else 1 x 1 core" in stack.sized["decision"])
    place.change(autoscaling={"paused": False})
    stack.rests(1, 1, 60)
    changes = {e["message"].partition(":")[0] for e in stack.events("EnginesResized")}
    assert {"1 x 1 core -> 1 x 2 cores", "1 x 2 cores -> 2 x 2 cores", "2 x 2 cores -> 1 x 1 core"} <= changes


def test_an_operator_that_dies_between_its_write_of_cores_and_its_status_knows_its_write(sized, operator, place):
    stack = sized().create(0.5, replicas=1)
    stack.rests(1, 1)
    operator.kill()
    stack.load(1.2)
    cores = [{"op": "replace", "path": "/spec/engine/cores", "value": 2}]
    path = f"{place.path(STACKS)}?fieldManager=packetstack-autoscaler"
    place.server.request("PATCH", path, cores, "application/json-patch+json")
    operator.start()
    stack.rests(1, 2)
    assert (stack.events("ExternallyScaled"), stack.events("EnginesResized")) == ([], [])


def test_cores_written_by_a_person_stop_it_until_it_was_paused(sized, operator, place, control_plane):
    stack = sized().create(0.5, replicas=1)
    stack.rests(1, 1)
    control_plane.kubectl(
        "patch", "pkst/edge", "--type=merge", "-p", '{"spec": {"engine": {"cores": 3}}}', "-n", place.namespace
    )
    stack.aside("kubectl-patch set spec.engine.cores to 3, so the vertical autoscaler")
    operator.kill()
    operator.start()
    stack.load(0.1)
    stack.stays(1)
    assert (stack.size, stack.condition(ACTIVE)) == ((1, 3), ("False", "ExternallyScaled"))
    place.change(autoscaling={"paused": True})
    wait(lambda: stack.condition(ACTIVE)[1] != "ExternallyScaled")
    place.change(autoscaling={"paused": False})
    stack.rests(1, 1)


def test_who_takes_the_number_of_engines_leaves_the_cores_to_the_triggers(sized, place, control_plane):
    stack = sized(maxReplicas=4, metrics=[busy(90)]).create(1.0, replicas=2)
    stack.rests(2, 1)
    stack.load(2.4)
    wait(lambda: stack.writers() == {"packetstack-autoscaler"})
    stack.load(0.9)
    control_plane.kubectl("scale", "pkst/edge", "--replicas=2", "-n", place.namespace)
    wait(lambda: stack.condition() == ("False", "ExternallyScaled"))
    stack.load(1.8)
    stack.rests(2, 2)
    assert stack.condition() == ("False", "ExternallyScaled")
