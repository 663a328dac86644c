"""Backend health: TCP connections from the node's own address, damped. One prober for all engines of a node."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from packetstack_core.resources import Address, HealthCheck

Place = tuple[Address, int]


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

    def __init__(self, changed: Callable[[Place, bool], None]) -> None:
        self.verdicts: dict[Place, Verdict] = {}
        self._changed = changed
        self._tasks: dict[Place, tuple[HealthCheck, asyncio.Task[None]]] = {}

    def watch(self, backends: Iterable[tuple[Place, HealthCheck]]) -> None:
        """Probe exactly these from now on. A backend that is new counts as healthy until proven otherwise."""
        wanted = {place: check for place, check in backends if check.type == "TCP"}
        for place in [p for p, (check, _) in self._tasks.items() if wanted.get(p) != check]:
            self._tasks.pop(place)[1].cancel()
        for place in [p for p in self.verdicts if p not in wanted]:
            del self.verdicts[place]
        for place, check in wanted.items():
            if place not in self._tasks:
                self.verdicts.setdefault(place, Verdict())
                self._tasks[place] = (check, asyncio.create_task(self._probe(place, check)))

    def expect_unhealthy(self, place: Place) -> None:
        """It was when it was last known: it has to prove that it is healthy again."""
        self.verdicts[place] = Verdict(healthy=False)

    def healthy(self) -> dict[Place, bool]:
        """Verdict by backend."""
        return {place: v.healthy for place, v in self.verdicts.items()}

    def close(self) -> None:
        """Stop probing."""
        for _, task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    async def _probe(self, place: Place, check: HealthCheck) -> None:
        while True:
            answered = await connects(place, check.timeout_seconds)
            verdict = self.verdicts.get(place)
            if verdict is not None and verdict.add(answered, check):
                self._changed(place, answered)
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
