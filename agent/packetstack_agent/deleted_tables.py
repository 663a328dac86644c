"""Stacks of this node whose FlowTable was deleted.

Their engines go on for a while: a table may come again, connections not. `cluster.Follower` says what is deleted and
ends the stack when its time is over.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ORPHAN_SECONDS = 60.0
"""How long engines go on: time for the operator to write the table anew."""


@dataclass(frozen=True)
class Ending:
    """A stack whose time is over."""

    name: str
    timer: asyncio.TimerHandle


class DeletedTables:
    """Which stacks they are, by namespace and name, and when each ends. Runs on the event loop."""

    def __init__(self, due: Callable[[str], None]) -> None:
        """`due` is called with the stack's name when its time is over."""
        self._due = due
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._timers

    def __iter__(self) -> Iterator[str]:
        return iter(self._timers)

    def gone(self, name: str, at_once: bool) -> float:
        """The stack's table was deleted; `at_once` where no engine serves it. Returns for how many seconds it goes on."""
        seconds = 0.0 if at_once else ORPHAN_SECONDS
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, self._due, name)
        return seconds

    def back(self, name: str) -> None:
        """The stack has a table again, or still."""
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def due(self, name: str) -> Ending | None:
        """The stack, if it is to end now."""
        timer = self._timers.get(name)
        if timer is None or asyncio.get_running_loop().time() < timer.when():
            return None
        return Ending(name, timer)

    def ended(self, ending: Ending) -> None:
        """The stack is gone. One whose table came, and was deleted once more meanwhile, has its own time."""
        if self._timers.get(ending.name) is ending.timer:
            del self._timers[ending.name]

    def close(self) -> None:
        """Forget all of them; nothing ends."""
        for timer in self._timers.values():
            timer.cancel()
