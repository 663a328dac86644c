"""Backend health: TCP connections from the node's own address, damped. One prober for all engines of a node."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from packetstack_core.resources import HealthCheck
from packetstack_core.values import Address

Place = tuple[Address, int]
"""Address and port of a backend."""
Checked = tuple[Place, HealthCheck]
"""A backend, and how a listener has it checked: another listener may ask otherwise, or not at all."""
Watched = tuple[str, Place, HealthCheck]
"""The same of a stack. What one stack asks and learns is no other's."""


@dataclass
class Verdict:
    """What the probes of a backend say: healthy until `unhealthy_threshold` failed in a row, and back."""

    healthy: bool = True
    row: int = 0
    """Probes in a row that contradict `healthy`."""

    def add(self, answered: bool, check: HealthCheck) -> bool:
        """One more probe; returns whether the verdict changed."""
        if answered == self.healthy:
            self.row = 0
            return False
        self.row += 1
        if self.row < (check.healthy_threshold if answered else check.unhealthy_threshold):
            return False
        self.healthy, self.row = answered, 0
        return True


class Prober:
    """Probes a changing set of backends; `changed` is called when a verdict does."""

    def __init__(self, changed: Callable[[Watched, bool], None]) -> None:
        self.verdicts: dict[Watched, Verdict] = {}
        self._changed = changed
        self._tasks: dict[Watched, asyncio.Task[None]] = {}

    def watch(self, backends: Iterable[Watched]) -> None:
        """Probe exactly these from now on. A backend that is new counts as healthy until proven otherwise.

        One that is only checked in another way than before is what it was.
        """
        wanted = {w: None for w in backends if w[2].type == "TCP"}
        left: dict[tuple[str, Place], list[bool]] = {}
        for watched in [w for w in self.verdicts if w not in wanted]:
            left.setdefault(watched[:2], []).append(self.verdicts.pop(watched).healthy)
        for watched in [w for w in self._tasks if w not in wanted]:
            self._tasks.pop(watched).cancel()
        for watched in wanted:
            if watched not in self._tasks:
                was = left.get(watched[:2])
                self.verdicts.setdefault(watched, Verdict(healthy=was is None or any(was)))
                self._tasks[watched] = asyncio.create_task(self._probe(watched))

    def expect_unhealthy(self, watched: Watched) -> None:
        """It was when it was last known: it has to prove that it is healthy again."""
        self.verdicts[watched] = Verdict(healthy=False)

    def healthy(self, stack: str) -> dict[Checked, bool]:
        """Verdicts of one stack's backends."""
        return {watched[1:]: v.healthy for watched, v in self.verdicts.items() if watched[0] == stack}

    def unhealthy(self) -> list[Watched]:
        """All that are not."""
        return [watched for watched, v in self.verdicts.items() if not v.healthy]

    def close(self) -> None:
        """Stop probing."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    async def _probe(self, watched: Watched) -> None:
        _, place, check = watched
        while True:
            answered = await connects(place, check.timeout_seconds)
            verdict = self.verdicts.get(watched)
            if verdict is not None and verdict.add(answered, check):
                self._changed(watched, answered)
            await asyncio.sleep(check.interval_seconds)


async def connects(place: Place, timeout_seconds: float) -> bool:
    """Whether a TCP connection to the backend opens in time."""
    try:
        async with asyncio.timeout(timeout_seconds):
            _, writer = await asyncio.open_connection(str(place[0]), place[1])
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
