"""An image whose build has another shard layout: the stack gets a second set of engines of it, whatever its strategy."""

import pytest
from tests.operator.model import BUCKETS, Model
from tests.operator.test_sets import sets, turn

from packetstack_core import shards
from packetstack_operator.observing import Memory

OTHER = shards.FIRST.replace("1.4.64", "2.4.128", 1)
NEW, OLD = "localhost/packetstack:2", "localhost/packetstack:1"


def stack(strategy="Transfer", **spec):
    model = Model(2, handover={"strategy": strategy}, **spec)
    model.layouts = {NEW: OTHER}
    model.settle()
    model.check_goal()
    return model


def images(model):
    return {p["spec"]["containers"][0]["image"] for p in model.of("Pod")}


@pytest.mark.parametrize("strategy", ["Transfer", "Mirror"])
def test_an_image_of_another_shard_layout_takes_over_as_a_second_set_and_the_one_of_before_again(strategy):
    model = stack(strategy)
    first = model.words[:]
    for round_, image in enumerate((NEW, OLD)):
        before = set(model.words)
        model.image = image
        turn(model, 60)
        *_, draining, current = model.status["sets"]
        assert (draining["state"], current["state"]) == ("Draining", "Current")
        assert set(model.kept) == before, "no connection has moved"
        assert not set(model.words) & before
        assert model.condition("Available")["status"] == "True"
        assert model.table().spec.sets[-1].shard == (OTHER if image == NEW else None)
        model.end_connections()
        model.settle()
        model.check_goal()
        assert images(model) == {image}
        assert len(sets(model)) == 1, round_
    assert first != model.words


def test_while_a_second_set_comes_up_for_another_layout_the_first_serves_on_with_all_its_engines():
    model = stack()
    model.image = NEW
    for _ in range(60):
        turn(model)
        serving = [e for e in model.table().spec.engines if e.id in (1, 2)]
        assert [e.state for e in serving] == ["Active", "Active"]
        assert model.condition("Degraded")["reason"] != "LayoutMismatch"
        if model.kept[0]:
            break
    assert len(model.kept) == BUCKETS


def test_an_operator_that_is_killed_after_any_write_goes_on_with_the_layout():
    model = stack("Mirror")
    model.image = NEW
    for n in range(300):
        model.operator(most=n % 3)
        model.kubelet()
        model.agent(batch=50)
        model.now += 1
    turn(model, 60)
    model.end_connections()
    model.settle()
    model.check_goal()
    assert images(model) == {NEW}


def test_an_image_that_is_taken_back_before_it_serves_leaves_the_first_set_as_it_is():
    model = stack()
    words = model.words[:]
    model.room = 3  # for one more pod
    model.image = NEW
    turn(model, 15)
    assert sets(model) == [(1, "Current"), (2, "Activating")]
    model.image = OLD
    model.memory = Memory()
    model.settle()
    model.check_goal()
    assert model.words == words
    assert images(model) == {OLD}


def test_an_engine_of_the_first_set_that_dies_while_it_drains_gets_the_image_of_before():
    model = stack()
    model.image = NEW
    turn(model, 60)
    model.vanish("edge-1")
    turn(model, 20)
    assert set(model.kept) == {2}
    model.vanish("edge-2")
    turn(model, 30)
    [made] = {i for i in model.kept if i} - {1, 2} or {0}
    assert model.get("Pod", f"edge-{made}")["spec"]["containers"][0]["image"] == OLD
    model.end_connections()
    model.settle()
    model.check_goal()
