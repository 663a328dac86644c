"""The vertical autoscaler of a stack: it decides how many cores each engine has, and perhaps how many engines there are.

One round: `reconcile` with what is measured. If it has `write`, the caller writes that size, `spec.engine.cores` and where the
ladder has several numbers of engines `spec.replicas`, and calls `written`, or `refused` if it could not. `vertical_status` shows
it and gets the state of one that starts anew from what was shown. Hold times begin anew then; the cool-down does not.

More if any trigger fires, fewer only if all allow it on the cores that would be left; each look within the hold time must ask
for another size in the same direction, and the change is to the one nearest to the present size that was asked for. So a change
and the one back need loads that differ by the proportion of the thresholds: noise that is smaller causes none.

Engines of another shape never come about in place: queues and their rings are made for the cores of an engine. `Transfer`
replaces engines one after the other, `Mirror` by a second set; both keep each connection. Until the engines are those that were
asked for nothing is decided: the load of a change is no measure.

Two writers would undo each other, see `rounds`: this one steps aside for another. Nothing here reads a clock.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from packetstack_core import autoscalers, resources
from packetstack_core.autoscaling.metrics import MetricError, Pod
from packetstack_core.autoscaling.options import with_schedule
from packetstack_core.autoscaling.rounds import clock_jump, settings_of
from packetstack_core.autoscaling.spec import spec_of
from packetstack_core.autoscaling.status import Conditions, set_condition
from packetstack_core.autoscaling.triggers import Ladder, Look, Size, ladder, least_cores, look, measure
from packetstack_core.load import StackLoad
from packetstack_core.reasons import ConditionReason, Event, EventReason
from packetstack_core.vertical_autoscalers import CONGESTION, Vertical
from packetstack_core.wording import counted

ACTIVE, LIMITED = "VerticalScalingActive", "VerticalScalingLimited"
SLACK_SECONDS = 1.0
"""Looks come a little early or late."""
CONGESTION_SECONDS = 3600.0
"""How long a congestion keeps fewer cores away: so often it may be tried again."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What one look asked for."""

    at: float
    size: Size


@dataclass(frozen=True, slots=True)
class Congestion:
    """A size was too small. It comes all at once, so its value says nothing of fewer cores, but this rate does."""

    at: float
    packets_per_second: float
    """Of a core."""


@dataclass(frozen=True, slots=True)
class State:
    """All that is remembered between two rounds."""

    wishes: tuple[Wish, ...] = ()
    """Of the hold time and the one before, the latest last."""
    left: Size | None = None
    """What the last round left in the spec; None before the first."""
    changed_at: float | None = None
    """When the size was changed last."""
    congested: Mapping[str, Congestion] = field(default_factory=dict)
    """By type of trigger, when it asked for more last."""
    conditions: Conditions = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """What is there."""

    size: Size
    """`spec.replicas` and `spec.engine.cores`."""
    active: Sequence[Pod]
    """Active engines, by the names that they have in the load."""
    obstacle: str = ""
    """Message of `CapacityAvailable` where that is False: no engine can be made."""
    held: str = ""
    """Why another size must wait: that of `ScalingHeld`, or that the number of engines is being changed."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round, and all that is shown of it."""

    state: State
    """For the next one."""
    size: Size
    """The present one."""
    limits: Ladder
    look: Look | None = None
    """None where nothing was decided."""
    write: Size | None = None
    """To be written; the round is not at its end before `written` or `refused`."""
    why: str = ""
    """Why it changes, or stays."""
    schedule: str = ""
    """Name of the schedule that gives the fewest cores."""
    how: str = ""
    """How the change comes about."""
    refusal: ConditionReason | None = None
    """What stood against another size that was asked for."""
    events: tuple[Event, ...] = ()

    def __str__(self) -> str:
        """The decision in one line."""
        return f"{self.size} -> {self.write or self.size}" + (f": {self.why}" if self.why else "")


def held_by(sets: Iterable[tuple[int, str]]) -> str:
    """`Seen.held` for these sets of engines, number and state; "" unless there are two."""
    shown = [f"{number} is {state}" for number, state in sets]
    return "there is another set of engines: " + ", ".join(shown) if len(shown) > 1 else ""


# ---- one round -------------------------------------------------------------------------------------------------


def reconcile(stack: resources.Spec, state: State, seen: Seen, measured: StackLoad | MetricError, now: float) -> Round:
    """One round of a stack that has `spec.autoscaling.vertical`. O(engines + triggers x sizes).

    `measured`: the load of the last sync period, or why it is not known.
    """
    wanted, vertical = _wanted(stack)
    # What is remembered for later than now would hold the size until then.
    state = _map_times(state, lambda at: min(at, now))
    paused = wanted.paused or stack.paused
    if is_external(state) and not wanted.paused:
        why = next(c.message for c in state.conditions if c.type == ACTIVE)
        return Round(
            replace(state, wishes=(), left=seen.size), seen.size, _ladder(wanted, vertical, seen.size), why=why
        )
    try:
        least, schedule = least_cores(vertical, datetime.fromtimestamp(now, UTC))
        rungs = _ladder(wanted, vertical, seen.size, least, now)
    except ValueError as e:
        return _stopped(
            state, seen, _ladder(wanted, vertical, seen.size), ConditionReason.INVALID_SCHEDULE, str(e), now
        )
    if not seen.size.replicas:
        return _stopped(state, seen, rungs, ConditionReason.SCALING_DISABLED, "spec.replicas is 0", now)
    largest = vertical.max_cores * (wanted.max_replicas if wanted.vertical_decides_replicas else seen.size.replicas)
    oldest = settings_of(wanted).sample_max_age_seconds
    found = measure(measured, seen.active, seen.size.cores, stack.flow_table.max_flows / largest, oldest, now)
    congested = {k: c for k, c in state.congested.items() if now - c.at < CONGESTION_SECONDS}
    rates = {k: c.packets_per_second for k, c in congested.items()}
    looked = look(vertical, seen.size, rungs, found, rates)
    under_way = _under_way(seen, found.sizes)
    # What was asked for with another number of engines is no wish for this one.
    wishes = state.wishes if state.left in (None, seen.size) else ()
    state = replace(state, congested=congested, wishes=wishes)
    known = found.missing or found.problem
    reason = ConditionReason.MISSING_SAMPLES if known else ConditionReason.TRIGGERS_KNOWN
    missing = found.problem or f"{', '.join(found.missing[:5])} without a recent sample"
    message = f"{missing}: no core is taken away" if known else "the load of all active engines is known"
    conditions = set_condition(state.conditions, ACTIVE, "False" if known else "True", reason, message, now)
    done = Round(replace(state, conditions=conditions), seen.size, rungs, looked, schedule=schedule)
    return _decided(done, stack, seen, under_way, paused, now)


def _decided(done: Round, stack: resources.Spec, seen: Seen, under_way: str, paused: bool, now: float) -> Round:
    """With what comes of the look: a size to write, or what stands against it."""
    _, vertical = _wanted(stack)
    state, look_, size = done.state, done.look, done.size
    assert look_ is not None, "only what was looked at can be decided"
    if under_way and not seen.obstacle:
        # What the engines show until then is the load of the change.
        done = replace(done, state=replace(state, wishes=()))
        asks = look_.wish if size in done.limits else done.limits.nearest(size)
        return _refused_for(done, ConditionReason.CHANGE_UNDER_WAY, under_way, now, asks != size, asks)
    wishes = _kept((*state.wishes, Wish(now, look_.wish)), vertical.hold_seconds, now)
    done = replace(done, state=replace(state, wishes=wishes))
    why = look_.why or "all triggers allow fewer cores"
    goal = look_.wish
    if size not in done.limits:
        goal = done.limits.nearest(size)
        by = f", by schedule {done.schedule}" if done.schedule else ""
        why = f"the limits are {done.limits.sizes[0]} to {done.limits.sizes[-1]}{by}"
    elif goal != size:
        held = _held(wishes, size, vertical.hold_seconds, now)
        if held is None:
            says = f"for less than {vertical.hold_seconds} s: {why}"
            return _refused_for(done, ConditionReason.HOLD_TIME, says, now, True, goal)
        goal = held
    if goal == size:
        if look_.capped:
            says = f"{counted(look_.capped, 'core')} wanted, {done.limits.sizes[-1]} at most: {why}"
            done = _congested(done, now)
            return _refused_for(done, ConditionReason.MAX_CORES, says, now, True, size)
        if under_way:
            says = f"{size} cannot be had, {under_way}: {seen.obstacle}"
            return _refused_for(done, ConditionReason.NO_FREE_CORE, says, now, True, size)
        return _limited(replace(done, why="no trigger asks for another size"), None, "nothing is asked for", now)
    if goal.total > size.total and seen.obstacle:
        return _refused_for(done, ConditionReason.NO_FREE_CORE, seen.obstacle, now, True, goal)
    if state.changed_at is not None and now - state.changed_at < vertical.cool_down_seconds:
        left = vertical.cool_down_seconds - (now - state.changed_at)
        return _refused_for(done, ConditionReason.COOL_DOWN, f"for {left:.0f} s more: {why}", now, True, goal)
    if paused:
        says = f"paused, else {goal}: {why}"
        event = Event(EventReason.AUTOSCALING_PAUSED, f"{size} stays; {says}")
        return replace(_limited(replace(done, why=says), None, says, now), events=(event,))
    if look_.capped and goal == done.limits.sizes[-1]:
        says = f"{counted(look_.capped, 'core')} wanted, {goal} at most"
        done = _limited(done, ConditionReason.MAX_CORES, says, now)
    else:
        done = _limited(done, None, f"{goal} is asked for", now)
    return replace(done, write=goal, why=why, how=way(stack, size, goal))


def way(stack: resources.Spec, size: Size, goal: Size) -> str:
    """How the change comes about, and why not in place."""
    if goal.cores == size.cores:
        return "engines join or leave, those that stay are not touched"
    if stack.handover.strategy == "Mirror":
        return "a second set of engines takes new connections, the present one keeps those that it has"
    surge = stack.update_strategy.surge(goal.replicas)
    return (
        f"engines are replaced one after the other (maxSurge {surge}) and their connections handed over; not in place, as "
        "an engine's queues are made for its cores"
    )


def _ladder(
    wanted: autoscalers.Autoscaling, vertical: Vertical, size: Size, least: int | None = None, now: float | None = None
) -> Ladder:
    few = most = size.replicas
    if wanted.vertical_decides_replicas:
        few, most = wanted.min_replicas, wanted.max_replicas
        if now is not None:
            limits, _ = with_schedule(spec_of(wanted), wanted.schedules, datetime.fromtimestamp(now, UTC))
            few, most = limits.minimum, limits.maximum
    return ladder(vertical, vertical.min_cores if least is None else least, (few, most))


def _under_way(seen: Seen, sizes: frozenset[int]) -> str:
    """Why the engines are not yet what was asked for; "" if they are."""
    if seen.held:
        return seen.held
    if len(seen.active) != seen.size.replicas:
        return f"{len(seen.active)} of {counted(seen.size.replicas, 'engine')} are active"
    others = sorted(sizes - {seen.size.cores})
    return f"engines with {counted(others[0], 'core')} are not replaced yet" if others else ""


def _kept(wishes: Sequence[Wish], hold: float, now: float) -> tuple[Wish, ...]:
    """Those of the hold time, and the latest one before it."""
    begin = now - hold
    older = [w for w in wishes if w.at <= begin]
    return (*older[-1:], *(w for w in wishes if w.at > begin))


def _held(wishes: Sequence[Wish], size: Size, hold: float, now: float) -> Size | None:
    """The size nearest to the present one that was asked for in the hold time; None if it was not always asked for more,
    or always for less, or not for so long."""
    if wishes[0].at > now - hold + min(SLACK_SECONDS, hold):
        return None
    totals = [w.size.total for w in wishes]
    if min(totals) > size.total:
        return min((w.size for w in wishes), key=lambda s: s.total)
    if max(totals) < size.total:
        return max((w.size for w in wishes), key=lambda s: s.total)
    return None


def _limited(done: Round, reason: ConditionReason | None, message: str, now: float) -> Round:
    """With its condition."""
    state = done.state
    conditions = set_condition(
        state.conditions,
        LIMITED,
        "True" if reason else "False",
        reason or ConditionReason.WITHIN_LIMITS,
        message,
        now,
    )
    return replace(done, state=replace(state, conditions=conditions), refusal=reason)


def _refused_for(done: Round, reason: ConditionReason, says: str, now: float, asked: bool, goal: Size | None) -> Round:
    """The size stays for this reason. Only what was `asked` for is refused, and said once while it lasts."""
    before = next((c for c in done.state.conditions if c.type == LIMITED), None)
    if not asked:
        return _limited(replace(done, why=says), None, "nothing is asked for", now)
    text = f"{goal} is asked for, but {says}" if goal != done.size else says
    fresh = before is None or before.reason is not reason
    events = (Event(EventReason.RESIZE_REFUSED, f"{done.size} stays ({reason}): {text}"),) if fresh else ()
    return replace(_limited(done, reason, text, now), why=text, events=events)


def _congested(done: Round, now: float) -> Round:
    """With what is to be remembered of congestion that asked for more."""
    if done.look is None:
        return done
    fired = {a.trigger for a in done.look.asked if a.fires and a.trigger in CONGESTION}
    fresh = {t: Congestion(now, done.look.packets_per_second) for t in fired if done.look.packets_per_second}
    return replace(done, state=replace(done.state, congested={**done.state.congested, **fresh}))


def _stopped(state: State, seen: Seen, rungs: Ladder, reason: ConditionReason, says: str, now: float) -> Round:
    """Nothing can be decided."""
    known = any(c.reason is reason for c in state.conditions)
    conditions = set_condition(state.conditions, ACTIVE, "False", reason, says, now)
    state = replace(state, conditions=tuple(c for c in conditions if c.type == ACTIVE), wishes=(), left=seen.size)
    return Round(state, seen.size, rungs, why=says, events=() if known else (Event(reason, says),))


def _wanted(stack: resources.Spec) -> tuple[autoscalers.Autoscaling, Vertical]:
    if stack.autoscaling is None or stack.autoscaling.vertical is None:
        raise TypeError("the stack has no spec.autoscaling.vertical; call only for one that has")
    return stack.autoscaling, stack.autoscaling.vertical


# ---- its end ---------------------------------------------------------------------------------------------------


def ended(done: Round) -> Round:
    """A round that writes nothing. For each round one of `ended`, `written`, `refused`."""
    return replace(done, state=replace(done.state, left=done.size))


def written(done: Round, now: float) -> Round:
    """The round after its size was written."""
    goal = _to_write(done)
    event = Event(
        EventReason.ENGINES_RESIZED, f"{done.size} -> {goal}: {done.why}. {done.how[:1].upper()}{done.how[1:]}"
    )
    state = replace(_congested(done, now).state, wishes=(), left=goal, changed_at=now)
    return replace(done, state=state, events=(*done.events, event))


def refused(done: Round, message: str, now: float) -> Round:
    """The round after its size could not be written, for the reason `message`."""
    goal = _to_write(done)
    text = f"spec.engine.cores cannot be written, so {done.size} stays instead of {goal}: {message}"
    conditions = set_condition(done.state.conditions, ACTIVE, "False", ConditionReason.FAILED_UPDATE_CORES, text, now)
    state = replace(done.state, conditions=conditions, left=done.size)
    return replace(
        done, state=state, write=None, why=text, events=(*done.events, Event(ConditionReason.FAILED_UPDATE_CORES, text))
    )


def _to_write(done: Round) -> Size:
    if done.write is None:
        raise ValueError("the round writes nothing; call written or refused only when it has write")
    return done.write


# ---- the second writer, and clocks -----------------------------------------------------------------------------


def is_external(state: State) -> bool:
    """Whether it has stepped aside."""
    return any(c.type == ACTIVE and c.reason is ConditionReason.EXTERNALLY_SCALED for c in state.conditions)


def is_changed_by_other(stack: resources.Spec, state: State, size: Size) -> bool:
    """Whether the size is not what the last round left: the cores, and the engines where they are decided here.

    A caller that dies between its write and its status sees that as well: it must know its own write.
    """
    wanted, _ = _wanted(stack)
    if state.left is None or is_external(state) or wanted.paused:
        return False  # nothing to compare with, known already, or allowed
    replicas = wanted.vertical_decides_replicas and state.left.replicas != size.replicas
    return replicas or state.left.cores != size.cores


def step_aside(stack: resources.Spec, state: State, seen: Seen, who: str, now: float) -> Round:
    """The round in which it was seen that somebody else, `who`, wrote the size."""
    wanted, vertical = _wanted(stack)
    what = f"spec.engine.cores to {seen.size.cores}"
    if wanted.vertical_decides_replicas and (state.left is None or state.left.cores == seen.size.cores):
        what = f"spec.replicas to {seen.size.replicas}"
    message = (
        f"{who} set {what}, so the vertical autoscaler changes the size no more; to give it back, set "
        "spec.autoscaling.paused to true and then to false"
    )
    conditions = set_condition(state.conditions, ACTIVE, "False", ConditionReason.EXTERNALLY_SCALED, message, now)
    kept = State(
        left=seen.size,
        changed_at=state.changed_at,
        congested=state.congested,
        # What limits one that decides nothing is not known.
        conditions=tuple(c for c in conditions if c.type == ACTIVE),
    )
    event = Event(ConditionReason.EXTERNALLY_SCALED, message)
    return Round(kept, seen.size, _ladder(wanted, vertical, seen.size), why=message, events=(event,))


def by_the_clock(state: State, before: tuple[float, float], now: tuple[float, float]) -> State:
    """As `rounds.by_the_clock`: hold time and cool-down last as long as they would have if nobody had set the clock."""
    jump = clock_jump(before, now)
    return _map_times(state, lambda at: at + jump) if jump else state


def _map_times(state: State, other: Callable[[float], float]) -> State:
    return replace(
        state,
        wishes=tuple(replace(w, at=other(w.at)) for w in state.wishes),
        changed_at=None if state.changed_at is None else other(state.changed_at),
        congested={k: replace(c, at=other(c.at)) for k, c in state.congested.items()},
    )
