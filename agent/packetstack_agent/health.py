"""Which backends answer: has them probed, reports changes, and records them for the next agent."""

from collections.abc import Sequence
from typing import Any

from packetstack_agent.journal import Journal
from packetstack_agent.managed import Stacks
from packetstack_agent.node import RunDirectory
from packetstack_agent.probes import Checked, Prober, Watched
from packetstack_core.reasons import EventReason


class Health:
    """The verdicts for all stacks of the node."""

    def __init__(self, run: RunDirectory, stacks: Stacks, journal: Journal) -> None:
        self._run = run
        self._stacks = stacks
        self._journal = journal
        self._prober = Prober(self._changed)

    def of(self, stack: str) -> dict[Checked, bool]:
        """Verdicts of a stack's backends; a backend that is not named counts as healthy."""
        return self._prober.healthy(stack)

    def watch(self) -> None:
        """Probe the backends of the stacks that are there now."""
        self._prober.watch(self._stacks.backends())

    def resume(self) -> None:
        """Doubt the backends that an earlier agent had found unhealthy, and begin to probe."""
        for watched in self._stacks.backends():
            if was_unhealthy(self._run.record.unhealthy, watched):
                self._prober.expect_unhealthy(watched)
        self.watch()

    def close(self) -> None:
        """Stop probing."""
        self._prober.close()

    def _changed(self, watched: Watched, healthy: bool) -> None:
        name, place, check = watched
        managed = self._stacks.get(name)
        if managed is None:
            return
        listeners = [
            li.name
            for li in managed.stack.resource.spec.listeners
            if li.health_check == check and place in {(e.address, e.port) for e in li.backends.endpoints or ()}
        ]
        said = "answers the probes" if healthy else "does not answer the probes and gets no new flows"
        reason = EventReason.BACKEND_HEALTHY if healthy else EventReason.BACKEND_UNHEALTHY
        self._journal.event(name, reason, f"{place[0]} port {place[1]} {said} of listener {', '.join(listeners)}")
        managed.stale = True
        managed.changed.set()
        self._run.record.unhealthy = [
            [str(place[0]), place[1], name, check.model_dump(mode="json", by_alias=True)]
            for name, place, check in self._prober.unhealthy()
        ]
        self._run.save()


def was_unhealthy(record: Sequence[Sequence[Any]], watched: Watched) -> bool:
    """Whether the record of an earlier agent says so of this backend; that of an earlier build says it of all stacks."""
    name, (address, port), check = watched
    wanted = [str(address), port, name, check.model_dump(mode="json", by_alias=True)]
    return any(list(entry) == wanted[: len(entry)] for entry in record if len(entry) in (2, 4))
