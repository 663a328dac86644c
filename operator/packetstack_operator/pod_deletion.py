"""When the pod of an engine may be deleted. Pure.

Its engine is no part of the plan any more, and one of three holds:
- The node's agent has let it go: the flow table that the agent follows names it no more, and the agent reports no
  engine of its number. So no bucket is on its way from it, and no queue of it is served.
- It has never started.
- It is dead: it has ended, or its node is gone.
"""

from packetstack_operator import observing
from packetstack_operator.facts import Facts, Plan
from packetstack_operator.observing import Raw


def may_go(found: Facts, plan: Plan, name: str, pod: Raw) -> bool:
    """Whether the pod `name` may be deleted now; False too if it is being deleted already."""
    if name in {e.name for e in plan.entries.values()} or observing.terminating(pod):
        return False
    named = {e.name for e in found.table.spec.engines} if found.table is not None else set()
    let_go = found.current and name not in named and observing.number_of(pod) not in found.reported
    never = observing.phase(pod) == "Pending" and not observing.started(pod)
    return never or let_go or observing.dead(pod, found.now)
