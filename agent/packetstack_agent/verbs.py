"""What a person asks of the agent, as the command and the cluster's users do."""

from collections.abc import Sequence

from packetstack_agent import loading, upgrading
from packetstack_agent.counting import census
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.explaining import Flow, explain
from packetstack_agent.journal import Journal
from packetstack_agent.keeping import Keeper
from packetstack_agent.managed import Managed, Stacks
from packetstack_agent.natives import call, ffi, lib
from packetstack_agent.scaling import Autoscalers
from packetstack_agent.status import Status
from packetstack_agent.threads import to_the_end
from packetstack_core.assignment import Move, Owner, State
from packetstack_core.reasons import EventReason
from packetstack_core.verbs import Json
from packetstack_core.wording import counted


class Verbs:
    """Answers are JSON; what cannot be done is an AgentError that says what to do instead."""

    def __init__(
        self, stacks: Stacks, journal: Journal, keeper: Keeper, autoscalers: Autoscalers, status: Status
    ) -> None:
        self._stacks = stacks
        self._journal = journal
        self._keeper = keeper
        self._autoscalers = autoscalers
        self._status = status

    def get(self, name: str | None = None) -> list[Json]:
        """Stacks as they are, with status."""
        chosen = [self._stacks.find(name)] if name is not None else [self._stacks[n] for n in sorted(self._stacks)]
        return [self._status.of(m) for m in chosen]

    def events(self, name: str | None = None) -> list[Json]:
        """What happened lately, oldest first: of a stack, also for a while after it has gone, or of the whole node."""
        found = [e for e in self._journal.events if name in (None, e["stack"])]
        if name is not None and not found:
            self._stacks.find(name)
        return found

    async def scale(self, name: str, replicas: int) -> Json:
        """Set spec.replicas, as the scale subresource does."""
        managed = self._stacks.planned(name)
        was, note = self._keeper.resize(managed, replicas), ""
        if was != replicas:
            self._journal.event(name, EventReason.SCALED, f"from {was} to {counted(replicas, 'engine')}")
            if self._autoscalers.step_aside(managed, "packetstack scale"):
                note = "its autoscaler changes nothing any more; packetstack explain says how to give the size back"
        return {"from": was, "to": replicas, "note": note}

    async def move_buckets(self, name: str, buckets: Sequence[int], slot: int, queue: int | None) -> Json:
        """Give buckets to an engine; they stay there while it does."""
        managed = self._stacks.planned(name)
        engine = _active(managed, slot)
        wrong = [b for b in buckets if type(b) is not int or not 0 <= b < managed.stack.buckets]
        if wrong:
            raise AgentError(f"bucket {wrong[0]}: not there; stack {name} has buckets 0 to {managed.stack.buckets - 1}")
        if queue is not None and (type(queue) is not int or not 0 <= queue < engine.blueprint.queues):
            raise AgentError(f"engine {slot}: has no queue {queue}; use 0 to {engine.blueprint.queues - 1}")
        owners = managed.stack.owners()
        moves = [
            Move(b, Owner(slot, b % engine.blueprint.queues if queue is None else queue))
            for b in buckets
            if queue is not None or (owner := owners[b]) is None or owner.slot != slot
        ]
        self._keeper.pin(managed, managed.pinned | dict.fromkeys(buckets, slot))
        done = await self._keeper.transfer(managed, moves, "by hand")
        managed.disturb()  # the others are evened out around them
        longest = max(done.hold_ns, default=0) / 1e6
        return {"moved": done.moved, "fences": done.fences, "longestMilliseconds": longest, "stalled": done.stalled}

    async def move_queue(self, name: str, slot: int, queue: int, core: int) -> Json:
        """Let another core of the engine serve the queue."""
        managed = self._stacks.find(name)
        engine = _active(managed, slot)
        if not engine.ready:
            raise AgentError(f"engine {slot}: no datapath is attached; wait until it is ready")
        for what, number, there in (("queue", queue, engine.blueprint.queues), ("core", core, engine.blueprint.cores)):
            if type(number) is not int or not 0 <= number < there:
                raise AgentError(f"engine {slot}: has no {what} {number}; use 0 to {there - 1}")
        took = ffi.new("uint64_t *")
        async with managed.busy:  # the engine's memory stays while the thread looks into it
            engine = _active(managed, slot)  # it may have been made again meanwhile, or have gone with its stack
            await to_the_end(call, lib().ps_queue_to_core, engine.fence, queue, core, 2000, took)
        managed.note_move(f"queue {queue} of {loading.name(engine)} to core {core}", "by hand")
        self._journal.event(
            name, EventReason.QUEUE_MOVED, f"queue {queue} of engine {slot} to core {core} in {took[0] / 1000:.0f} us"
        )
        return {"microseconds": took[0] / 1000}

    async def upgrade(self, name: str, slot: int | None = None) -> Json:
        """Let an engine, or all of the stack that take new connections, have the build that is installed now."""
        if slot is None:
            return await upgrading.upgrade_stack(self._stacks.planned(name), self._keeper, self._journal)
        managed = self._stacks.find(name)
        return await upgrading.upgrade_engine(managed, _active(managed, slot), self._journal)

    def census(self, name: str) -> dict[int, dict[str, int]]:
        """Frames that are not in exactly one ring, by slot. Exact while no packets flow."""
        return {e.slot: census(e) for e in self._stacks.find(name).engines.values() if e.view is not None}

    def explain(self, name: str, protocol: str, source: str, sport: int, destination: str, dport: int) -> Json:
        """Where a packet of this flow goes, and why."""
        managed = self._stacks.find(name)
        pods = {e.slot: e.blueprint.pod for e in managed.engines.values() if e.blueprint.pod}
        return explain(managed.stack, pods, Flow.of(protocol, source, sport, destination, dport))


def _active(managed: Managed, slot: int) -> Engine:
    engine = managed.engines.get(slot)
    if engine is None or engine.state is not State.ACTIVE or engine.view is None:
        known = ", ".join(str(s) for s, e in sorted(managed.engines.items()) if e.state is State.ACTIVE) or "none"
        raise AgentError(f"engine {slot}: is not an active engine of stack {managed.stack.name}; active: {known}")
    return engine
