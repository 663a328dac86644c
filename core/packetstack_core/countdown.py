"""When a set of engines that drains will have no connection any more, by the pace at which they end."""

from collections import deque

PACE_SECONDS = 60.0
"""Over which the pace is taken at which connections end."""


class Countdown:
    """How many connections the set that drains had left, over the last minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, now: float, left: int | None) -> None:
        """It has so many left now; None: no set drains. `now`: seconds on a clock that only goes on."""
        if left is None:
            self._seen.clear()
            return
        self._seen.append((now, left))
        while len(self._seen) > 2 and self._seen[1][0] <= now - PACE_SECONDS:
            self._seen.popleft()

    def ends_in(self) -> float | None:
        """Seconds until none is left, if they go on ending as they did; None if none ended, or nobody has looked twice."""
        if len(self._seen) < 2:
            return None
        (began, before), (last, left) = self._seen[0], self._seen[-1]
        if before <= left:
            return None
        return left * (last - began) / (before - left)
