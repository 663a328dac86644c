"""The vertical autoscaler of a stack in virtual time: from load to cores, with what stands against it."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tests.core.test_autoscaling_rounds import BEGIN, BUSY
from tests.core.test_autoscaling_rounds import spec as stack_of

from packetstack_core import resources
from packetstack_core.autoscaling import vertical, vertical_status
from packetstack_core.autoscaling.metrics import MetricError, Pod
from packetstack_core.autoscaling.triggers import Size, ladder
from packetstack_core.autoscaling.vertical import Seen, State
from packetstack_core.load import EngineLoad, QueueLoad, StackLoad
from packetstack_core.reasons import EventReason
from packetstack_core.statuses import VerticalStatus

FLOWS = 100_000
"""`flowTable.maxFlows` of the stacks here."""
PERIOD = 15.0
ONE = Size(1, 1)


def spec(*triggers: dict[str, Any], **changes: Any) -> resources.Spec:
    """Of a stack whose engines may have 1 to 8 cores. `more`: other fields of spec.autoscaling, `stack`: of the spec."""
    more, stack = changes.pop("more", {}), changes.pop("stack", {})
    wanted = {"maxCores": 8, "decides": "Cores", "triggers": list(triggers), **changes}
    fields: dict[str, Any] = {"maxReplicas": 4, "syncPeriodSeconds": int(PERIOD), "vertical": wanted, **more}
    if wanted["decides"] == "Cores":
        fields.setdefault("metrics", [BUSY])
    else:
        fields["metrics"] = []
    return stack_of(**fields, stack={"flowTable": {"maxFlows": FLOWS}, **stack})


def load(size: Size, now: float, **work: float) -> StackLoad:
    """What all engines of this size have to do together, shared evenly. `busy` is in cores."""
    n = size.replicas
    busy = min(1.0, work.get("busy", 0.0) / size.total)
    queue = QueueLoad(0, 0.0, 0.0, int(work.get("depth", 0) / n))
    one = EngineLoad(
        0,
        "",
        "Active",
        True,
        PERIOD,
        (busy,) * size.cores,
        (queue,),
        int(work.get("flows", 0) / n),
        work.get("new", 0.0) / n,
        work.get("packets", 0.0) / n,
        work.get("bits", 0.0) / n,
        work.get("drops", 0.0),
    )
    return StackLoad(now, tuple(replace(one, id=i, name=f"web-{i}") for i in range(n)))


def of(size: Size, **work: float) -> Callable[[StackLoad], StackLoad]:
    """What is measured is the load of engines of this size."""
    return lambda it: load(size, it.read, **work)


class Pool:
    """A stack in virtual time: a size that was written is there at the next look."""

    def __init__(self, wanted: resources.Spec, size: Size = ONE, state: State | None = None) -> None:
        self.spec, self.size, self.state, self.now = wanted, size, state or State(), BEGIN
        self.sizes = [size]
        self.events: list[str] = []

    def seen(self, **more: Any) -> Seen:
        return Seen(self.size, [Pod(f"web-{i}", ready="True") for i in range(self.size.replicas)], **more)

    def look(
        self, change: Callable[[StackLoad], StackLoad | MetricError] = lambda it: it, seen: Any = None, **work: float
    ) -> vertical.Round:
        """One sync period with this load. `change`: what becomes of its figures on their way."""
        self.now += PERIOD
        return self.decide(change(load(self.size, self.now, **work)), **(seen or {}))

    def decide(self, measured: StackLoad | MetricError, **seen: Any) -> vertical.Round:
        done = vertical.reconcile(self.spec, self.state, self.seen(**seen), measured, self.now)
        if done.write is None:
            done = vertical.ended(done)
        else:
            self.size = done.write
            done = vertical.written(done, self.now)
        self.state = done.state
        self.sizes.append(self.size)
        self.events += [str(e.reason) for e in done.events]
        return done

    def looks(self, count: int, **work: float) -> "list[vertical.Round]":
        return [self.look(**work) for _ in range(count)]

    def condition(self, kind: str) -> tuple[str, str]:
        found = next(c for c in self.state.conditions if c.type == kind)
        return found.status, str(found.reason)

    @property
    def turns(self) -> int:
        """How often it went the other way."""
        totals = [s.total for s in self.sizes]
        steps = [b - a for a, b in pairwise(totals) if a != b]
        return sum(a * b < 0 for a, b in pairwise(steps))


# ---- what fires ------------------------------------------------------------------------------------------------

EACH: list[tuple[str, dict[str, Any], str, float, float]] = [
    ("Utilization", {}, "busy", 0.8, 0.7),
    ("FlowMemory", {}, "flows", 0.8 * FLOWS / 8, 0.7 * FLOWS / 8),
    ("BitsPerSecond", {"above": "1M"}, "bits", 1.1e6, 0.9e6),
    ("PacketsPerSecond", {"above": "10k"}, "packets", 11_000, 9_000),
    ("ActiveFlows", {"above": 1000}, "flows", 1100, 900),
    ("NewFlowsPerSecond", {"above": 500}, "new", 550, 450),
    ("QueueDepth", {"above": 64}, "depth", 65, 60),
    ("Drops", {"above": "0.01"}, "drops", 0.02, 0.009),
]
"""Trigger, its thresholds, what it is made of, and values of one core that fire and do not."""
EVERY = [{"type": kind, **thresholds} for kind, thresholds, *_ in EACH]


@pytest.mark.parametrize(("kind", "thresholds", "what", "fires", "rests"), EACH)
def test_row_6_each_trigger_alone_asks_for_more_cores(
    kind: str, thresholds: dict[str, Any], what: str, fires: float, rests: float
) -> None:
    others = [
        t for t in EVERY if t["type"] == kind or what != "flows" or t["type"] not in ("FlowMemory", "ActiveFlows")
    ]
    pool = Pool(spec(*others))  # those two are of the same figure
    pool.looks(10, **{what: rests})
    assert pool.sizes == [Size(1, 1)] * 11
    done = pool.looks(3, **{what: fires})[-1]
    assert pool.size == Size(1, 2)
    assert [a.trigger for a in done.look.asked if a.fires] == [kind]  # type: ignore[union-attr]
    assert done.why.startswith(f"{kind} ")
    assert pool.events == [EventReason.RESIZE_REFUSED, EventReason.ENGINES_RESIZED], "the hold time, then the change"


def test_row_6_a_schedule_asks_for_its_cores_at_once_and_load_decides_when_it_is_over() -> None:
    hour = {"name": "noon", "cron": "50 1 * * *", "durationSeconds": 600, "cores": 4}  # BEGIN is 01:46:40
    pool = Pool(spec({"type": "Utilization"}, {"type": "Schedule", "schedule": hour}))
    assert [pool.look(busy=0.1).write for _ in range(13)] == [None] * 13
    done = pool.look(busy=0.1)
    assert (pool.size, done.schedule) == (Size(1, 4), "noon")
    assert "by schedule noon" in done.why
    pool.looks(39, busy=0.1)
    assert pool.size == Size(1, 4)
    pool.looks(4, busy=0.1)
    assert pool.size == Size(1, 1)


def test_the_new_size_is_the_smallest_that_has_the_load_at_the_target() -> None:
    for before, busy, after in ((1, 0.76, 2), (1, 1.0, 2), (2, 1.6, 3), (2, 2.0, 4), (4, 3.9, 7), (7, 6.0, 8)):
        pool = Pool(spec(), Size(1, before))
        pool.looks(3, busy=busy)
        assert pool.size == Size(1, after), busy


def test_it_goes_no_further_than_each_look_of_the_hold_time_asked_for() -> None:
    pool = Pool(spec(), Size(1, 4))
    for busy in (4.0, 3.2, 4.0):
        pool.look(busy=busy)
    assert pool.size == Size(1, 6)
    for busy in (0.1, 1.0, 0.1):
        pool.look(busy=busy)
    assert pool.size == Size(1, 3)


def test_the_option_of_one_step_takes_one_core_at_a_time_both_ways() -> None:
    pool = Pool(spec(step="One", coolDownSeconds=0, holdSeconds=0))
    pool.look(busy=1.0)
    pool.look(busy=2.0)
    assert [s.cores for s in pool.sizes] == [1, 2, 3]
    pool.looks(3, busy=0.1)
    assert [s.cores for s in pool.sizes[3:]] == [2, 1, 1]


def test_fewer_only_if_all_allow_it_on_the_cores_that_would_be_left() -> None:
    two = spec({"type": "Utilization"}, {"type": "PacketsPerSecond", "above": "10k"})
    pool = Pool(two, Size(1, 4))
    pool.looks(10, busy=0.2, packets=20_000)
    assert pool.size.cores == 4, "20,000 packets of three cores are 6,667 each, and less than 4,667 are wanted"
    pool.looks(3, busy=0.2, packets=9_000)
    assert pool.size.cores == 2, "of two cores 4,500 each"
    pool.looks(10, busy=0.2, packets=5_000)
    assert pool.size.cores == 2, "one core would have 5,000"


def test_engines_come_when_cores_are_all_used_and_leave_before_cores_do() -> None:
    wanted = spec(decides="CoresAndReplicas", maxCores=2, more={"maxReplicas": 3}, coolDownSeconds=0)
    assert ladder(wanted.autoscaling.vertical, 1, (1, 3)).sizes == (Size(1, 1), Size(1, 2), Size(2, 2), Size(3, 2))  # type: ignore[union-attr, arg-type]
    pool = Pool(wanted)
    pool.looks(12, busy=5.0)
    pool.looks(12, busy=0.1)
    steps = [a for a, b in pairwise(pool.sizes) if a != b]
    assert steps == [Size(1, 1), Size(1, 2), Size(2, 2), Size(3, 2)]
    assert pool.size == Size(1, 1)


def test_the_number_of_engines_stays_that_of_the_metrics() -> None:
    pool = Pool(spec(), Size(3, 1))
    pool.looks(3, busy=2.9)
    assert pool.size == Size(3, 2)


def test_engines_of_another_size_than_the_limits_are_brought_back_at_once() -> None:
    pool = Pool(spec(minCores=2, maxCores=4), Size(1, 1))
    assert pool.look(busy=0.1).write == Size(1, 2)
    pool = Pool(spec(maxCores=4), Size(1, 8))
    assert pool.look(busy=7.9).write == Size(1, 4)


# ---- no flapping -----------------------------------------------------------------------------------------------


def test_row_7_square_waves_near_the_thresholds_change_nothing_for_ten_minutes() -> None:
    for first, second in ((0.72, 0.78), (0.20, 0.90), (0.74, 0.76)):
        pool = Pool(spec())
        for i in range(40):
            pool.look(busy=first if i % 2 else second)
        assert pool.turns == 0
        assert set(pool.sizes) == {Size(1, 1)}, "no hold time is above the threshold throughout"


def test_row_7_slow_square_waves_between_the_thresholds_go_up_once_and_stay() -> None:
    pool = Pool(spec())
    for i in range(160):
        pool.look(busy=0.8 if i // 8 % 2 else 0.4)
    assert pool.turns == 0
    assert pool.size == Size(1, 2), "0.4 cores of one would be 40 %, and less than 35 are wanted"


@pytest.mark.parametrize("seed", range(5))
def test_row_7_ten_minutes_of_noise_around_each_threshold_never_turn_it(seed: int) -> None:
    chance = random.Random(seed)
    for level in (0.35, 0.6, 0.75, 1.2, 2.4):
        pool = Pool(spec(holdSeconds=0, coolDownSeconds=0), Size(1, 4))
        for _ in range(40):
            pool.look(busy=level * min(1.25, max(0.75, chance.gauss(1.0, 0.1))))
        assert pool.turns == 0, (level, pool.sizes)


@examples(max_examples=60, deadline=None)
@given(
    level=st.floats(0.01, 12.0),
    noise=st.lists(st.floats(0.78, 1.28), min_size=40, max_size=40),
    size=st.builds(Size, st.integers(1, 4), st.integers(1, 8)),
    decides=st.sampled_from(["Cores", "CoresAndReplicas"]),
    step=st.sampled_from(["Target", "One"]),
    hold=st.sampled_from([0, 30]),
)
def test_row_7_noise_below_the_proportion_of_the_thresholds_never_turns_it(
    level: float, noise: list[float], size: Size, decides: str, step: str, hold: int
) -> None:
    pool = Pool(spec(decides=decides, step=step, holdSeconds=hold, coolDownSeconds=0), size)
    for factor in noise:
        pool.look(busy=level * factor)
    assert pool.turns == 0, pool.sizes


@pytest.mark.parametrize(("kind", "above", "what"), [("Drops", "0.01", "drops"), ("QueueDepth", 64, "depth")])
def test_congestion_that_comes_at_a_rate_of_packets_is_not_provoked_again(kind: str, above: Any, what: str) -> None:
    """A core takes 10,000 packets a second, and none is lost below; the other trigger alone would give cores back."""
    wanted = spec({"type": kind, "above": above}, {"type": "PacketsPerSecond", "above": "100k"})
    pool = Pool(wanted)
    for _ in range(40):
        pool.look(packets=15_000, **{what: 100.0 if what == "depth" else 0.3} if pool.size.cores < 2 else {})
    assert (pool.size, pool.turns) == (Size(1, 2), 0)
    pool.looks(4, packets=6_000)
    assert pool.size == Size(1, 1), "less than 7/15 of the rate at which it came"


def test_congestion_is_forgotten_after_an_hour() -> None:
    pool = Pool(spec({"type": "Drops", "above": "0.01"}, {"type": "PacketsPerSecond", "above": "100k"}))
    pool.looks(3, packets=15_000, drops=0.3)
    pool.looks(239, packets=15_000)
    assert pool.size == Size(1, 2)
    pool.looks(3, packets=15_000)
    assert pool.size == Size(1, 1)


# ---- what stands against it -----------------------------------------------------------------------------------


def test_row_7_hold_time_and_cool_down_are_kept_and_said() -> None:
    pool = Pool(spec(coolDownSeconds=120))
    assert [str(r.refusal) for r in pool.looks(2, busy=1.0)] == ["HoldTime"] * 2
    assert pool.look(busy=1.0).refusal is None
    assert pool.size == Size(1, 2)
    said = [r.refusal and str(r.refusal) for r in pool.looks(8, busy=2.0)]
    assert said == ["HoldTime"] * 2 + ["CoolDown"] * 5 + [None]
    assert pool.size == Size(1, 4)
    assert pool.events.count("ResizeRefused") == 3, "each reason once while it lasts"


def test_row_7_a_cap_is_said_with_what_was_asked_for() -> None:
    pool = Pool(spec(maxCores=2))
    pool.looks(3, busy=1.0)
    done = pool.looks(3, busy=2.0)[-1]
    assert (done.write, str(done.refusal)) == (None, "MaxCores")
    assert done.why.startswith("4 cores wanted, 1 x 2 cores at most: Utilization 100 % is above 75 %")
    assert pool.condition("VerticalScalingLimited") == ("True", "MaxCores")


def test_without_a_free_core_the_stack_stays_and_less_load_takes_the_wish_back() -> None:
    pool = Pool(spec())
    pool.looks(3, busy=1.0)
    assert pool.size == Size(1, 2)
    small, lacking = Size(1, 1), {"obstacle": "the node of the stack has no exclusive CPU left"}
    done = [pool.look(of(small, busy=1.0), lacking) for _ in range(6)][-1]
    assert (pool.size, str(done.refusal)) == (Size(1, 2), "NoFreeCore")
    assert done.why.startswith(
        "1 x 2 cores cannot be had, engines with 1 core are not replaced yet: the node of the stack"
    )
    done = [pool.look(of(Size(1, 2), busy=2.0), lacking) for _ in range(4)][-1]
    assert done.why.startswith("1 x 4 cores is asked for, but the node of the stack"), "nor is more asked for"
    for _ in range(4):
        pool.look(of(small, busy=0.1), lacking)
    assert pool.size == small


def test_the_load_of_a_change_decides_nothing() -> None:
    pool = Pool(spec({"type": "PacketsPerSecond", "above": "10k"}))
    pool.looks(3, packets=12_000)
    assert pool.size == Size(1, 2)

    for packets in (12_000.0, 50_000.0):
        done = [pool.look(of(Size(1, 1), packets=packets)) for _ in range(10)][-1]
        assert done.write is None
        assert "engines with 1 core are not replaced yet" in done.why
    assert str(done.refusal) == "ChangeUnderWay", "12,000 have been answered already, 50,000 not"
    done = pool.look(packets=50_000)
    assert str(done.refusal) == "HoldTime", "it begins when the engines are there"
    done = pool.look(packets=50_000, seen={"held": "connections of set 1 have not ended"})
    assert "connections of set 1 have not ended" in done.why


def test_partial_samples_never_take_a_core_and_count_as_idle() -> None:
    pool = Pool(spec(), Size(4, 2))
    for _ in range(20):
        pool.look(lambda it: StackLoad(it.read, it.engines[1:]), busy=0.1)
    assert pool.size == Size(4, 2)
    assert pool.condition("VerticalScalingActive") == ("False", "MissingSamples")
    for _ in range(20):
        pool.look(lambda it: StackLoad(it.read, it.engines[2:]), busy=8.0)
    assert pool.size == Size(4, 2), "two of four at 100 % may be 50 % of all"
    for _ in range(3):
        pool.look(lambda it: StackLoad(it.read, it.engines[:-1]), busy=7.8)
    assert pool.size == Size(4, 2), "73 % of all"
    pool.looks(3, busy=7.8)
    assert pool.size == Size(4, 4)


@pytest.mark.parametrize(
    "lost",
    [
        lambda it: MetricError("api_error", "the node's agent does not answer"),
        lambda it: StackLoad(it.read - 100, it.engines),
        lambda it: StackLoad(it.read + 100, it.engines),
        lambda it: StackLoad(it.read, ()),
    ],
)
def test_without_data_nothing_changes(lost: Callable[[StackLoad], StackLoad | MetricError]) -> None:
    pool = Pool(spec(), Size(2, 4))
    for busy in (0.1, 8.0):
        for _ in range(10):
            pool.look(lost, busy=busy)
    assert set(pool.sizes) == {Size(2, 4)}
    assert pool.condition("VerticalScalingActive") == ("False", "MissingSamples")


def test_one_missing_sample_begins_the_hold_time_of_less_anew() -> None:
    pool = Pool(spec(), Size(1, 4))
    pool.looks(2, busy=0.1)
    pool.look(lambda it: StackLoad(it.read, ()), busy=0.1)
    pool.looks(2, busy=0.1)
    assert pool.size == Size(1, 4)
    pool.look(busy=0.1)
    assert pool.size == Size(1, 1)


def test_triggers_that_contradict_each_other_mean_more_cores() -> None:
    pool = Pool(spec({"type": "Utilization"}, {"type": "ActiveFlows", "above": 1000}), Size(1, 4))
    done = pool.looks(3, busy=0.1, flows=6000)[-1]
    assert pool.size == Size(1, 8)
    assert done.why == "ActiveFlows 1,500 is above 1,000 -> 8 cores"


def test_a_schedule_that_cannot_be_read_stops_it_and_is_said_once() -> None:
    wrong = {"name": "day", "cron": "61 8 * * *", "durationSeconds": 60, "cores": 2}
    pool = Pool(spec({"type": "Utilization"}, {"type": "Schedule", "schedule": wrong}))
    pool.looks(5, busy=1.0)
    assert (pool.size, pool.events) == (Size(1, 1), ["InvalidSchedule"])
    assert pool.condition("VerticalScalingActive") == ("False", "InvalidSchedule")


def test_a_stack_of_no_engines_is_left_alone() -> None:
    pool = Pool(spec(), Size(0, 1))
    pool.decide(StackLoad(BEGIN, ()))
    assert pool.condition("VerticalScalingActive") == ("False", "ScalingDisabled")


def test_paused_it_says_what_it_would_do() -> None:
    for pool in (Pool(spec(more={"paused": True})), Pool(spec(stack={"paused": True}))):
        done = pool.looks(3, busy=1.0)[-1]
        assert (pool.size, done.write) == (Size(1, 1), None)
        assert done.why == "paused, else 1 x 2 cores: Utilization 100 % is above 75 % -> 2 cores"


# ---- clocks, other writers, restarts --------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-86_400.0, -40.0, 40.0, 86_400.0])
def test_a_clock_that_was_set_shortens_no_time_and_lengthens_none(jump: float) -> None:
    pool = Pool(spec(coolDownSeconds=120))
    pool.looks(3, busy=1.0)
    assert pool.size == Size(1, 2)
    before = (pool.now, 500.0)
    pool.now += jump
    pool.state = vertical.by_the_clock(pool.state, before, (pool.now, 500.0))
    pool.looks(7, busy=2.0)
    assert pool.size == Size(1, 2), "120 s are not over"
    pool.look(busy=2.0)
    assert pool.size == Size(1, 4)


def test_what_is_remembered_for_later_than_now_holds_nothing_for_long() -> None:
    pool = Pool(spec(), state=State(changed_at=BEGIN + 1e6))
    pool.looks(3, busy=1.0)
    assert pool.size == Size(1, 2)


def test_it_steps_aside_for_another_writer_until_it_is_given_the_size_back() -> None:
    pool = Pool(spec())
    pool.looks(2, busy=0.5)
    assert not vertical.is_changed_by_other(pool.spec, pool.state, pool.size)
    pool.size = Size(1, 3)
    assert vertical.is_changed_by_other(pool.spec, pool.state, pool.size)
    done = vertical.step_aside(pool.spec, pool.state, pool.seen(), "kubectl-edit", pool.now)
    assert "kubectl-edit set spec.engine.cores to 3" in done.why
    pool.state = done.state
    pool.looks(10, busy=3.0)
    pool.size = Size(1, 1)
    pool.looks(10, busy=1.0)
    assert pool.size == Size(1, 1)
    assert not vertical.is_changed_by_other(pool.spec, pool.state, Size(1, 2)), "it is known"
    assert pool.condition("VerticalScalingActive") == ("False", "ExternallyScaled")
    pool.spec = spec(more={"paused": True})
    pool.looks(4, busy=1.0)
    pool.spec = spec()
    pool.looks(1, busy=1.0)
    assert pool.size == Size(1, 2)


def test_only_what_it_decides_is_its_own() -> None:
    pool = Pool(spec())
    pool.looks(1, busy=0.5)
    assert not vertical.is_changed_by_other(pool.spec, pool.state, Size(3, 1)), "metrics decide the number"
    both = Pool(spec(decides="CoresAndReplicas"))
    both.looks(1, busy=0.5)
    assert vertical.is_changed_by_other(both.spec, both.state, Size(3, 1))
    both.size = Size(3, 1)
    done = vertical.step_aside(both.spec, both.state, both.seen(), "packetstack scale", both.now)
    assert done.why.startswith("packetstack scale set spec.replicas to 3, so")


def test_another_number_of_engines_begins_the_hold_time_anew() -> None:
    pool = Pool(spec(), Size(4, 1))
    pool.looks(2, busy=4.0)
    pool.size = Size(3, 1)
    assert [r.write for r in pool.looks(3, busy=3.0)] == [None, None, Size(3, 2)]


def again(pool: Pool, done: vertical.Round | None = None) -> Pool:
    """What another process makes of the status. `done`: the round that was shown last."""
    wanted = pool.spec.autoscaling
    assert wanted
    text = "" if done is None else vertical_status.show(wanted, done).model_dump_json(by_alias=True)
    shown = VerticalStatus.model_validate_json(text) if text else None
    state = vertical_status.resume(shown, vertical_status.conditions(done.state) if done else ())
    other = Pool(pool.spec, pool.size, state)
    other.now = pool.now
    return other


def test_killed_at_any_step_it_goes_on_without_a_second_change_or_a_false_alarm() -> None:
    pool = Pool(spec(coolDownSeconds=300))
    seen = pool.look(busy=1.0)
    pool.look(busy=1.0)
    before = again(pool, seen)  # before the write: nothing happened, the hold time begins anew
    assert not vertical.is_changed_by_other(before.spec, before.state, before.size)
    assert [r.write for r in before.looks(3, busy=1.0)] == [None, None, Size(1, 2)]
    shown = pool.look(busy=1.0)
    after = again(pool, shown)  # after the status: the cool-down goes on
    assert not vertical.is_changed_by_other(after.spec, after.state, after.size)
    after.looks(10, busy=2.0)
    assert after.size == Size(1, 2)
    between = again(pool, seen)  # after the write and before the status: the writer knows that it was its own
    assert vertical.is_changed_by_other(between.spec, between.state, between.size)
    between.looks(2, busy=0.7)
    assert not vertical.is_changed_by_other(between.spec, between.state, between.size)
    fresh = again(pool)  # without a status at all
    assert not vertical.is_changed_by_other(fresh.spec, fresh.state, fresh.size)


def test_what_another_process_reads_is_what_was_remembered() -> None:
    pool = Pool(spec({"type": "Drops", "above": "0.01"}, {"type": "PacketsPerSecond", "above": "100k"}))
    done = pool.looks(3, packets=15_000, drops=0.3)[-1]
    state = again(pool, done).state
    assert state == replace(done.state, wishes=())
    aside = vertical.step_aside(pool.spec, pool.state, pool.seen(), "somebody", pool.now)
    assert vertical.is_external(again(pool, aside).state)
    assert vertical_status.resume(None, ()) == State()


def test_a_write_that_is_refused_is_said_and_tried_again() -> None:
    pool = Pool(spec())
    pool.looks(2, busy=1.0)
    pool.now += PERIOD
    done = vertical.reconcile(pool.spec, pool.state, pool.seen(), load(pool.size, pool.now, busy=1.0), pool.now)
    failed = vertical.refused(done, "the API server says no", pool.now)
    assert failed.write is None
    pool.state = failed.state
    assert pool.condition("VerticalScalingActive") == ("False", "FailedUpdateCores")
    assert "so 1 x 1 core stays instead of 1 x 2 cores: the API server says no" in failed.why
    assert pool.look(busy=1.0).write == Size(1, 2)
    assert pool.condition("VerticalScalingActive") == ("True", "TriggersKnown")
    with pytest.raises(ValueError, match="writes nothing"):
        vertical.written(failed, pool.now)


# ---- what is shown ---------------------------------------------------------------------------------------------


def test_it_is_said_how_the_change_comes_about() -> None:
    for handover, says in (
        ({}, "Engines are replaced one after the other (maxSurge 1) and their connections handed over; not in place"),
        ({"handover": {"strategy": "Mirror"}}, "A second set of engines takes new connections"),
    ):
        pool = Pool(spec(stack=handover))
        done = pool.looks(3, busy=1.0)[-1]
        [event] = [e for e in done.events if e.reason is EventReason.ENGINES_RESIZED]
        assert event.message.startswith("1 x 1 core -> 1 x 2 cores: Utilization 100 % is above 75 % -> 2 cores. ")
        assert says in event.message
    more = Pool(spec(decides="CoresAndReplicas", maxCores=1))
    assert more.looks(3, busy=1.0)[-1].how.startswith("engines join or leave")


def test_the_status_has_what_each_trigger_said() -> None:
    pool = Pool(spec({"type": "Utilization"}, {"type": "PacketsPerSecond", "above": "10k"}))
    done = pool.looks(3, busy=0.5, packets=12_000)[-1]
    assert pool.spec.autoscaling
    shown = vertical_status.show(pool.spec.autoscaling, done)
    assert shown.decision == "1 x 1 core -> 1 x 2 cores: PacketsPerSecond 12,000 is above 10,000 -> 2 cores"
    assert [(t.trigger, t.value, t.fires, t.cores) for t in shown.triggers] == [
        ("Utilization", "50", False, 1),
        ("PacketsPerSecond", "12,000", True, 2),
    ]
    assert (shown.current_cores, shown.desired_cores, shown.min_cores, shown.max_cores) == (1, 2, 1, 8)
