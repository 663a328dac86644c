"""Events of stacks, as `kubectl describe` shows them."""

import logging
import time
from collections.abc import Iterable

import kopf

from packetstack_core.reasons import Event, EventReason

REPEAT_SECONDS = 600.0
"""The same event is shown again only after this."""
ALWAYS = EventReason.SUCCESSFUL_RESCALE
"""The reason of events that are never the same."""

log = logging.getLogger(__name__)


class Shown:
    """The events of one stack that were shown lately, so that none is repeated."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str], float] = {}

    def show(self, body: kopf.Body, events: Iterable[Event]) -> None:
        """Post the events that were not posted within `REPEAT_SECONDS`. Failures are the same whatever their message says."""
        now = time.monotonic()
        for event in events:
            what: tuple[str, str] = (event.reason, "" if event.reason.startswith("Failed") else event.message)
            if event.reason != ALWAYS and now < self._at.get(what, -REPEAT_SECONDS) + REPEAT_SECONDS:
                continue
            self._at[what] = now
            meta = body["metadata"]
            log.info("stack %s/%s: %s: %s", meta["namespace"], meta["name"], event.reason, event.message)
            kopf.event(body, type=event.kind, reason=str(event.reason), message=event.message[:1000])
        for what in [w for w, when in self._at.items() if now > when + REPEAT_SECONDS]:
            del self._at[what]
