"""What is shown of the vertical autoscaler, and read again by one that starts anew."""

from collections.abc import Iterable

from packetstack_core import autoscalers, kinds
from packetstack_core.autoscaling.rounds import condition, cut, known_conditions, seconds
from packetstack_core.autoscaling.triggers import Asked, Size, shown
from packetstack_core.autoscaling.vertical import Congestion, Round, State
from packetstack_core.reasons import VERTICAL
from packetstack_core.statuses import VerticalStatus
from packetstack_core.verbs import Json
from packetstack_core.wording import timestamp


def show(wanted: autoscalers.Autoscaling, done: Round) -> VerticalStatus:
    """`status.autoscaling.vertical` after a round that has ended. Equal rounds give equal statuses."""
    goal, changed = done.write or done.size, done.state.changed_at
    return VerticalStatus.model_validate(
        {
            "currentCores": done.size.cores,
            "desiredCores": goal.cores,
            "currentReplicas": done.size.replicas,
            "desiredReplicas": goal.replicas,
            "minCores": done.limits.sizes[0].cores,
            "maxCores": done.limits.sizes[-1].cores,
            "decides": "CoresAndReplicas" if wanted.vertical_decides_replicas else "Cores",
            "schedule": done.schedule,
            "lastScaleTime": None if changed is None else timestamp(changed),
            "decision": cut(str(done)),
            "how": done.how,
            "refused": str(done.refusal or ""),
            "triggers": [_reading(asked) for asked in (done.look.asked if done.look else ())],
            "congested": [
                {"trigger": t, "time": timestamp(c.at), "packetsPerSecond": round(c.packets_per_second, 3)}
                for t, c in sorted(done.state.congested.items())
            ],
        }
    )


def conditions(state: State, generation: int = 0) -> tuple[kinds.Condition, ...]:
    """Its conditions. `generation`: of the stack."""
    return tuple(condition(c, generation) for c in state.conditions)


def resume(status: VerticalStatus | None, known: Iterable[kinds.Condition]) -> State:
    """The state of one that starts anew; `known`: the stack's conditions. Hold times begin anew."""
    if status is None:
        return State()
    return State(
        left=Size(status.desired_replicas, status.desired_cores),
        changed_at=None if status.last_scale_time is None else seconds(status.last_scale_time),
        congested={c.trigger: Congestion(seconds(c.time), c.packets_per_second) for c in status.congested},
        conditions=known_conditions(known, VERTICAL),
    )


def _reading(asked: Asked) -> Json:
    return {
        "trigger": asked.trigger,
        "value": "" if asked.value is None else shown(asked.value),
        "above": shown(asked.above),
        "below": shown(asked.below),
        "fires": asked.fires,
        "cores": asked.cores,
        "note": cut(asked.note),
    }
