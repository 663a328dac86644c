"""Both autoscalers of a stack in one round, as operator and local runtime run them: who writes what, and one record.

| `spec.autoscaling` | `spec.replicas` | `spec.engine.cores` |
|---|---|---|
| without `vertical` | by `metrics` (`rounds`) | nobody here |
| `metrics` and `vertical` | by `metrics` | by triggers (`vertical`) |
| `vertical` alone | by triggers | by triggers |

A round changes the number of engines or their cores, never both: where both are asked for the number goes first, since it
touches no engine that stays, and the triggers begin their hold time anew. A caller writes `Round.write` at once, as one change of
the spec, and calls `written` or `refused`; without one it calls `ended`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from packetstack_core import kinds, resources
from packetstack_core.autoscaling import options, rounds, vertical_status
from packetstack_core.autoscaling import vertical as sizing
from packetstack_core.autoscaling.calculator import Scale
from packetstack_core.autoscaling.metrics import MetricError, Reading
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.autoscaling.vertical import Seen
from packetstack_core.load import StackLoad
from packetstack_core.reasons import AUTOSCALER, VERTICAL, Event
from packetstack_core.statuses import AutoscalingStatus

CONDITIONS = AUTOSCALER + VERTICAL
"""Types of both."""


@dataclass(frozen=True, slots=True)
class State:
    """What both remember."""

    horizontal: options.State = field(default_factory=options.State)
    vertical: sizing.State = field(default_factory=sizing.State)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of both."""

    spec: resources.Spec
    size: Size
    """The present one."""
    horizontal: rounds.Round | None
    """None where the triggers decide the number of engines."""
    vertical: sizing.Round | None
    """None without `spec.autoscaling.vertical`."""
    kept: State = field(default_factory=State)
    """What one remembers that is not in this round."""

    @property
    def by_metrics(self) -> rounds.Round | None:
        """The round of metrics, if what is written is its number of engines; None if triggers decided it, or nothing is."""
        return self.horizontal if self.horizontal is not None and self.horizontal.decision.write is not None else None

    @property
    def write(self) -> Size | None:
        """What `spec.replicas` and `spec.engine.cores` shall be; None: what they are."""
        if self.horizontal is not None and self.horizontal.decision.write is not None:
            return Size(self.horizontal.decision.write, self.size.cores)
        return self.vertical.write if self.vertical is not None else None

    @property
    def events(self) -> tuple[Event, ...]:
        """Of both."""
        first = self.horizontal.decision.events if self.horizontal is not None else ()
        return (*first, *(self.vertical.events if self.vertical is not None else ()))

    @property
    def state(self) -> State:
        """For the next round, once this one has ended."""
        return State(
            self.horizontal.state if self.horizontal is not None else self.kept.horizontal,
            self.vertical.state if self.vertical is not None else self.kept.vertical,
        )


def reconcile(
    stack: resources.Spec,
    state: State,
    seen: Seen,
    there: int,
    measured: StackLoad | MetricError,
    now: float,
    answers: Mapping[int, Reading] | None = None,
) -> Round:
    """One round of a stack that has `spec.autoscaling`. `there`: engines that there are, `status.replicas`; see
    `rounds.reconcile` and `vertical.reconcile`."""
    wanted = stack.autoscaling
    first = second = None
    if wanted is None or not wanted.vertical_decides_replicas:
        scale = Scale(seen.size.replicas, there)
        first = rounds.reconcile(stack, state.horizontal, scale, seen.active, measured, now, answers)
        if first.decision.write is not None:
            seen = replace(seen, held=f"the number of engines becomes {first.decision.write}", obstacle="")
    if wanted is not None and wanted.vertical is not None:
        second = sizing.reconcile(stack, state.vertical, seen, measured, now)
    return Round(stack, seen.size, first, second)


def ended(done: Round) -> Round:
    """A round that writes nothing."""
    return replace(done, vertical=sizing.ended(done.vertical) if done.vertical is not None else None)


def written(done: Round, now: float) -> Round:
    """The round after its size was written."""
    if (first := done.by_metrics) is not None:
        return replace(ended(done), horizontal=rounds.written(first, now))
    return replace(done, vertical=done.vertical and sizing.written(done.vertical, now))


def refused(done: Round, message: str, now: float) -> Round:
    """The round after its size could not be written, for the reason `message`."""
    if (first := done.by_metrics) is not None:
        return replace(ended(done), horizontal=rounds.refused(first, message, now))
    return replace(done, vertical=done.vertical and sizing.refused(done.vertical, message, now))


Field = Literal["replicas", "cores"]
"""What has one writer."""


def changed_by_other(stack: resources.Spec, state: State, size: Size) -> tuple[Field, ...]:
    """What is not as the last round left it; see `rounds.is_changed_by_other`."""
    wanted = stack.autoscaling
    found: list[Field] = []
    if wanted is None:
        return ()
    if wanted.vertical is not None and sizing.is_changed_by_other(stack, state.vertical, size):
        left = state.vertical.left
        found.append("cores" if left is None or left.cores != size.cores else "replicas")
    if not wanted.vertical_decides_replicas and rounds.is_changed_by_other(
        stack, state.horizontal, Scale(size.replicas, size.replicas)
    ):
        found.append("replicas")
    return tuple(found)


def step_aside(stack: resources.Spec, state: State, seen: Seen, what: Field, who: str, now: float) -> Round:
    """The round in which whoever decides this field leaves it to `who`; the other one goes on as it was."""
    wanted = stack.autoscaling
    if wanted is not None and wanted.vertical is not None and (what == "cores" or wanted.vertical_decides_replicas):
        aside = sizing.step_aside(stack, state.vertical, seen, who, now)
        return Round(stack, seen.size, None, aside, state)
    scale = Scale(seen.size.replicas, seen.size.replicas)
    return Round(stack, seen.size, rounds.step_aside(stack, state.horizontal, scale, who, now), None, state)


def by_the_clock(state: State, before: tuple[float, float], now: tuple[float, float]) -> State:
    """The state by a wall clock that may have been set; see `rounds.by_the_clock`."""
    return State(rounds.by_the_clock(state.horizontal, before, now), sizing.by_the_clock(state.vertical, before, now))


# ---- what is shown, and read again -----------------------------------------------------------------------------


def show(done: Round, before: AutoscalingStatus | None, now: float) -> AutoscalingStatus:
    """`status.autoscaling` after this round has ended: one record of both."""
    wanted, second = done.spec.autoscaling, None
    if wanted is not None and done.vertical is not None:
        second = vertical_status.show(wanted, done.vertical)
    if done.horizontal is not None:
        if second is None and wanted is not None and wanted.vertical is not None and before is not None:
            second = before.vertical  # as it was
        return rounds.show(done.horizontal, before, now, second)
    if wanted is not None and not wanted.vertical_decides_replicas and before is not None:
        fresh = before.model_copy(update={"vertical": second, "decision_time": ""})
        return rounds.stamped(fresh, before, now)
    if second is None or done.vertical is None:
        raise TypeError("nothing was decided; call only for a stack that has spec.autoscaling")
    sizes = done.vertical.limits.sizes
    document = {
        "desiredReplicas": second.desired_replicas,
        "currentReplicas": second.current_replicas,
        "lastScaleTime": second.last_scale_time,
        "minReplicas": sizes[0].replicas,
        "maxReplicas": sizes[-1].replicas,
        "decision": second.decision,
        "record": {
            "current": second.current_replicas,
            "desired": second.desired_replicas,
            "why": "the triggers of spec.autoscaling.vertical decide the number of engines",
        },
        "vertical": second,
    }
    return rounds.stamped(AutoscalingStatus.model_validate(document), before, now)


def conditions(state: State, generation: int = 0) -> tuple[kinds.Condition, ...]:
    """The conditions of both. `generation`: of the stack."""
    first = rounds.conditions(state.horizontal, generation)
    return (*first, *vertical_status.conditions(state.vertical, generation))


def resume(shown: AutoscalingStatus | None, known: Iterable[kinds.Condition]) -> State:
    """The state of autoscalers that start anew; `known`: the stack's conditions."""
    every = tuple(known)
    second = vertical_status.resume(shown.vertical if shown is not None else None, every)
    return State(rounds.resume(shown, every), second)
