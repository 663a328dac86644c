"""What happened on this node lately, for a person to read: `packetstack events` shows it, the agent's log too."""

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from packetstack_agent.errors import AgentError
from packetstack_core.reasons import EventReason, Reason
from packetstack_core.verbs import Json

KEPT = 1000
"""Events; older ones are in the log alone."""
ALIKE = 8
"""Events at the end, among which one that says the same is counted instead of told again."""


class Journal:
    """Keeps the last events. Used on the event loop alone."""

    def __init__(self) -> None:
        self.events: deque[Json] = deque(maxlen=KEPT)
        """As the API shows them, oldest first."""

    def event(self, stack: str, reason: Reason, message: str) -> None:
        """Something a person may want to read later. `stack`: its name, or "-" for the node as a whole."""
        what = {"stack": stack, "type": reason.kind, "reason": str(reason), "message": message}
        for last in islice(reversed(self.events), ALIKE):
            if what.items() <= last.items():
                self.events.remove(last)
                self.events.append(last | {"time": time.time(), "count": last["count"] + 1})
                return
        self.events.append({"time": time.time(), **what, "count": 1})
        with suppress(OSError):  # the log's file system is full
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {reason.kind} {stack} {reason}: {message}", flush=True)

    @contextmanager
    def going_on(self, stack: str, what: str = "") -> Iterator[None]:
        """Report an error inside and go on: the next round may do better, and other stacks are not concerned.

        An AgentError or OSError is reported as Failed; any other exception is a bug, reported as InternalError. `what`: who failed.
        """
        who = f"{what}: " if what else ""
        try:
            yield
        except (AgentError, OSError) as e:
            self.event(stack, EventReason.FAILED, f"{who}{e}")
        except Exception as e:
            self.event(stack, EventReason.INTERNAL_ERROR, f"{who}{type(e).__name__}: {e}")


class Background:
    """Tasks that nobody waits for. Their errors are reported as events."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, stack: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let it run to its end, or to that of the agent."""
        task = asyncio.create_task(self._run(stack, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, stack: str, work: Coroutine[Any, Any, None]) -> None:
        with self._journal.going_on(stack):
            await work

    async def ended(self) -> None:
        """Wait until all of them, and those that they begin, have ended."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
