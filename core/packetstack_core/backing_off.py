"""How long to wait before something that failed is tried again."""

from collections.abc import Sequence

ENGINE_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Before the next engine is made, after one that could not be: what is missing (a device, room) is given back rarely."""
ANSWER_SECONDS = (1.0, 2.0, 5.0, 15.0)
"""Before somebody who refused or did not answer is asked again."""
CONNECT_SECONDS = (0.2, 0.5, 1.0, 2.0)
"""Before the API server is watched again: after an outage it is found in seconds."""


def back_off(failures: int, pauses: Sequence[float]) -> float:
    """Seconds to wait after a failure that has `failures` before it in a row; the last of `pauses` for all later ones."""
    return pauses[min(failures, len(pauses) - 1)]
