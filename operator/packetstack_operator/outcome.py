"""What a decision is made of: requests to the API server, and events."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packetstack_core.reasons import Event
from packetstack_operator.observing import Memory

Kind = Literal["FlowTable", "Pod", "PacketEngine", "PodDisruptionBudget", "PacketStack"]


@dataclass(frozen=True, slots=True)
class Write:
    """One request. `create` refuses what exists, `apply` is a server-side apply, `delete` goes by UID.

    `replace` is for flow tables: a merge patch that names every field, and the version that it was made from. Agents
    follow the whole table, so that nobody else may own a part of it; and a server-side apply that takes the last
    item out of a list may leave `null` there, which the server then refuses (seen with 1.36).
    """

    verb: Literal["create", "apply", "replace", "delete"]
    kind: Kind
    name: str
    body: Mapping[str, Any]
    subresource: Literal["", "status"] = ""

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What it is about, whatever it says."""
        return self.verb, self.kind, self.name, self.subresource


@dataclass(frozen=True, slots=True)
class Decision:
    """Writes in the order in which they must be done; the rest is left if one fails. Nothing at the goal."""

    memory: Memory
    writes: tuple[Write, ...] = ()
    events: tuple[Event, ...] = ()
    wake_at: float | None = None
    """Unix time at which to decide again though nothing has changed."""
    released: bool = False
    """For a stack that is being deleted: its node has nothing of it any more."""
