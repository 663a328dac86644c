"""Slow start: a backend that becomes usable gets its share in steps, so that it is not flooded while it is cold.

Pure: times are given, in seconds of any clock that only goes forward. What a caller has to remember is `Since`.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

STEPS = 10
"""Steps of a rise; fewer where they would be shorter than a second, since each is a new configuration."""

B = TypeVar("B", bound=Hashable)
Since = Mapping[B, float]
"""Backend -> since when it may get new flows; -inf for one that had its whole share from the beginning."""


def since(before: Since[B] | None, usable: Iterable[B], now: float) -> dict[B, float]:
    """`Since` for the backends that may get new flows now. `before`: that of the last look, None at the first one.

    A backend that is not among those before, because it was added, was unhealthy or had no weight, begins to rise now.
    At the first look, which is that of a new listener or a new agent, nobody does.
    """
    return {b: -math.inf if before is None else before.get(b, now) for b in usable}


def parts(backends: Sequence[B], known: Since[B], seconds: int, now: float) -> list[int]:
    """What each backend has of its share, by the largest of the numbers: that one has all. 1 each when nobody rises.

    A rise of n steps begins with 1 / (n + 1) and goes up by as much with each; after `seconds` it is at its end. Where
    all rise nobody can spare them, and they are compared with the one that began first. One that is not known has all.
    """
    found = [_part(now - known.get(b, -math.inf), seconds) for b in backends]
    return [1] * len(found) if len(set(found)) == 1 else found


def next_step(known: Since[B], seconds: int, now: float) -> float:
    """When `parts` change next; inf when nothing rises."""
    steps = _steps(seconds)
    found = [(at, _part(now - at, seconds)) for at in known.values()]
    return min((at + part * seconds / steps for at, part in found if part <= steps), default=math.inf)


def _steps(seconds: int) -> int:
    return max(1, min(STEPS, seconds))


def _part(age: float, seconds: int) -> int:
    steps = _steps(seconds)
    return steps + 1 if age >= seconds else 1 + int(max(age, 0.0) * steps / seconds)
