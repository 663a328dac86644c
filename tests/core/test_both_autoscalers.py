"""Both autoscalers of a stack together, in virtual time: who writes what, and one record of it."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tests.core.test_autoscaling_rounds import BEGIN, BUSY
from tests.core.test_autoscaling_rounds import spec as stack_of
from tests.core.test_vertical_autoscaling import ONE, PERIOD, load, spec

from packetstack_core import resources
from packetstack_core.autoscaling import together
from packetstack_core.autoscaling.metrics import Pod
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.autoscaling.vertical import Seen
from packetstack_core.statuses import AutoscalingStatus, PacketStackStatus

FLOWS = {
    "type": "Engine",
    "engine": {"name": "ActiveFlows", "target": {"type": "AverageValue", "averageValue": "1000"}},
}
QUICK = {"scaleDown": {"stabilizationWindowSeconds": 60}}


class Stack:
    """A stack in virtual time: a size that was written is there at the next look."""

    def __init__(self, wanted: resources.Spec, size: Size = ONE) -> None:
        self.spec, self.size, self.now, self.state = wanted, size, BEGIN, together.State()
        self.shown: AutoscalingStatus | None = None
        self.sizes = [size]
        self.said: list[str] = []

    def seen(self) -> Seen:
        return Seen(self.size, [Pod(f"web-{i}", ready="True") for i in range(self.size.replicas)])

    def look(self, refuse: str = "", **work: float) -> together.Round:
        self.now += PERIOD
        measured = load(self.size, self.now, **work)
        done = together.reconcile(self.spec, self.state, self.seen(), self.size.replicas, measured, self.now)
        if done.write is None:
            done = together.ended(done)
        elif refuse:
            done = together.refused(done, refuse, self.now)
        else:
            size, done = done.write, together.written(done, self.now)
            self.size = size
        self.state, self.shown = done.state, together.show(done, self.shown, self.now)
        self.sizes.append(self.size)
        self.said += [str(e.reason) for e in done.events]
        return done

    def aside(self, what: together.Field, who: str) -> None:
        done = together.step_aside(self.spec, self.state, self.seen(), what, who, self.now)
        self.state, self.shown = done.state, together.show(done, self.shown, self.now)

    def looks(self, count: int, **work: float) -> None:
        for _ in range(count):
            self.look(**work)

    @property
    def reasons(self) -> dict[str, str]:
        return {c.type: c.reason for c in together.conditions(self.state)}


def both(**changes: Any) -> resources.Spec:
    return spec(maxCores=4, more={"metrics": [FLOWS], "behavior": QUICK, **changes})


def test_metrics_decide_the_number_and_triggers_the_cores_one_at_a_time() -> None:
    stack = Stack(both())
    stack.looks(8, busy=3.0, flows=2000)
    steps = [b for a, b in pairwise(stack.sizes) if a != b]
    assert steps == [Size(2, 1), Size(2, 2)], "2,000 flows at once; the hold time begins when both are there"
    for before, after in pairwise(stack.sizes):
        assert before.replicas == after.replicas or before.cores == after.cores
    assert stack.said.count("SuccessfulRescale") == stack.said.count("EnginesResized") == 1


def test_one_status_has_both_decisions_and_is_what_the_definition_takes() -> None:
    stack = Stack(both())
    stack.looks(4, busy=3.0, flows=2000)
    assert stack.shown
    assert stack.shown.vertical
    assert stack.shown.decision.startswith("2 -> 2: engine metric ActiveFlows")
    assert stack.shown.vertical.decision.startswith("2 x 1 core -> 2 x 2 cores: Utilization 100 %")
    assert (stack.shown.desired_replicas, stack.shown.vertical.desired_cores) == (2, 2)
    document = {"autoscaling": stack.shown.document(), "conditions": []}
    assert PacketStackStatus.model_validate(document).autoscaling == stack.shown
    assert set(stack.reasons) == {
        "AbleToScale",
        "ScalingActive",
        "ScalingLimited",
        "VerticalScalingActive",
        "VerticalScalingLimited",
    }
    again = together.resume(stack.shown, together.conditions(stack.state))
    assert together.changed_by_other(stack.spec, again, stack.size) == ()
    assert again.vertical.left == Size(2, 2)


def test_equal_rounds_give_equal_statuses() -> None:
    stack = Stack(both())
    stack.looks(3, busy=0.5, flows=900)
    before = stack.shown
    stack.looks(3, busy=0.5, flows=900)
    assert stack.shown is before


def test_without_metrics_the_record_has_the_size_that_triggers_chose() -> None:
    stack = Stack(spec(decides="CoresAndReplicas", maxCores=2, more={"maxReplicas": 3}))
    stack.looks(9, busy=4.0)
    assert stack.size == Size(3, 2)
    assert stack.shown
    assert stack.shown.record
    assert stack.shown.vertical
    assert (stack.shown.current_replicas, stack.shown.desired_replicas, stack.shown.max_replicas) == (2, 3, 3)
    assert stack.shown.decision == stack.shown.vertical.decision
    assert set(stack.reasons) == {"VerticalScalingActive", "VerticalScalingLimited"}
    resumed = together.resume(stack.shown, together.conditions(stack.state))
    assert together.changed_by_other(stack.spec, resumed, stack.size) == ()


def test_without_vertical_it_is_the_autoscaler_alone() -> None:
    stack = Stack(stack_of(metrics=[BUSY]))
    stack.looks(3, busy=1.0)
    assert stack.size == Size(2, 1)
    assert stack.shown
    assert stack.shown.vertical is None
    assert set(stack.reasons) == {"AbleToScale", "ScalingActive", "ScalingLimited"}


def test_each_steps_aside_for_what_is_its_own_and_the_other_goes_on() -> None:
    stack = Stack(both())
    stack.looks(2, busy=0.5, flows=900)
    stack.size = Size(1, 2)
    assert together.changed_by_other(stack.spec, stack.state, stack.size) == ("cores",)
    stack.aside("cores", "kubectl-edit")
    assert stack.shown
    assert stack.shown.vertical
    assert "kubectl-edit set spec.engine.cores to 2" in stack.shown.vertical.decision
    stack.looks(4, busy=2.0, flows=3000)
    assert stack.size == Size(3, 2)
    assert (stack.reasons["VerticalScalingActive"], stack.reasons["ScalingActive"]) == (
        "ExternallyScaled",
        "ValidMetricFound",
    )
    stack.size = Size(1, 2)
    assert together.changed_by_other(stack.spec, stack.state, stack.size) == ("replicas",)
    stack.aside("replicas", "kubectl")
    assert "kubectl set spec.replicas to 1" in stack.shown.decision
    assert "kubectl-edit set spec.engine.cores to 2" in stack.shown.vertical.decision
    stack.looks(8, busy=2.0, flows=3000)
    assert stack.size == Size(1, 2)
    alone = Stack(spec(decides="CoresAndReplicas"))
    alone.looks(1, busy=0.5)
    alone.size = Size(2, 1)
    assert together.changed_by_other(alone.spec, alone.state, alone.size) == ("replicas",)
    alone.aside("replicas", "packetstack scale")
    alone.looks(8, busy=2.0)
    assert alone.size == Size(2, 1)


def test_a_write_that_fails_is_the_one_that_was_tried() -> None:
    stack = Stack(both())
    stack.look("no", busy=1.0, flows=3000)
    assert (stack.size, stack.reasons["AbleToScale"]) == (ONE, "FailedUpdateScale")
    stack.look(busy=3.0, flows=3000)
    for _ in range(3):
        stack.look("no", busy=3.0, flows=3000)
    assert (stack.size, stack.reasons["VerticalScalingActive"]) == (Size(3, 1), "FailedUpdateCores")
    stack.look(busy=3.0, flows=3000)
    assert stack.size == Size(3, 2)


def test_a_clock_that_was_set_is_the_same_for_both() -> None:
    stack = Stack(both())
    stack.looks(4, busy=3.0, flows=2000)
    later = together.by_the_clock(stack.state, (stack.now, 0.0), (stack.now + 500, 0.0))
    assert [w.at - 500 for w in later.vertical.wishes] == [w.at for w in stack.state.vertical.wishes]
    kept = stack.state.horizontal.memory.recommendations
    assert [r.at - 500 for r in later.horizontal.memory.recommendations] == [r.at for r in kept]


@examples(max_examples=20, deadline=None)
@given(
    busy=st.floats(0.01, 16.0),
    size=st.builds(Size, st.integers(1, 4), st.integers(1, 4)),
    least=st.integers(1, 2),
    target=st.integers(50, 90),
)
def test_row_7_under_a_steady_load_both_come_to_rest(busy: float, size: Size, least: int, target: int) -> None:
    """Even if both go by the same figure."""
    metric = {
        "type": "Engine",
        "engine": {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": target}},
    }
    stack = Stack(both(metrics=[metric], minReplicas=least), size)
    stack.looks(70, busy=busy)
    rest = len(stack.sizes)
    stack.looks(20, busy=busy)
    assert set(stack.sizes[rest:]) == {stack.size}, stack.sizes


def test_what_is_held_for_the_other_is_not_written_even_without_a_free_core() -> None:
    stack = Stack(both(), Size(1, 4))
    stack.looks(2, busy=0.1, flows=100)
    stack.now += PERIOD
    measured = load(stack.size, stack.now, busy=0.1, flows=3000)
    seen = replace(stack.seen(), obstacle="no exclusive CPU is left")
    done = together.reconcile(stack.spec, stack.state, seen, 1, measured, stack.now)
    assert done.write == Size(3, 4)
    assert done.vertical
    assert done.vertical.write is None
