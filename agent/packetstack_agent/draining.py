"""What is shown of a stack's sets of engines: what they have, what was mirrored and rejected, when the older one will end.

Changes nothing.
"""

import time

from packetstack_agent.counting import add_copies
from packetstack_agent.managed import Managed
from packetstack_core import standing
from packetstack_core.standing import Standing
from packetstack_core.transitions import SetState
from packetstack_core.verbs import Json
from packetstack_core.wording import timestamp


def document(managed: Managed, stands: Standing) -> list[Json]:
    """The sets of the stack as its status shows them, oldest first; none if it never had `Mirror`."""
    found, offset = [], time.time() - time.monotonic()
    for one in standing.sets(stands):
        counts = dict(managed.gone_copies.get(one.set.id, {}))
        for engine in managed.engines.values():
            if engine.blueprint.set == one.set.id and engine.view is not None:
                add_copies(engine, counts)
        ends_in = managed.countdown.ends_in() if one.set.state is SetState.DRAINING else None
        found.append(
            {
                "id": one.set.id,
                "state": str(one.set.state),
                "since": timestamp(one.set.since + offset),
                "engines": one.engines,
                "ready": one.ready,
                "buckets": one.buckets,
                "keptBuckets": one.kept,
                "connections": one.connections,
                "silentSince": timestamp(one.oldest + offset) if one.oldest is not None else "",
                "endsInSeconds": round(ends_in, 1) if ends_in is not None else None,
                "mirrored": counts.pop("mirrored", 0),
                "rejected": {reason.removeprefix("rejected_"): n for reason, n in counts.items()},
            }
        )
    return found
