"""The stacks of this node: each with its engines, and what its parts must know of each other."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.node import Record
from packetstack_agent.probes import Watched
from packetstack_agent.stacks import Stack
from packetstack_core.countdown import Countdown
from packetstack_core.engines import Engine as Shape
from packetstack_core.kinds import FlowTable
from packetstack_core.load import History
from packetstack_core.planning import GivenUp
from packetstack_core.preconditions import Lack
from packetstack_core.transitions import EngineSet, Sets, SetState
from packetstack_core.verbs import Json

LAST_MOVES = 20


@dataclass
class Managed:
    """A stack with its engines and its task."""

    stack: Stack
    engines: dict[int, Engine] = field(default_factory=dict)
    """Engines by slot. EngineLife puts them in and takes them out."""
    sets: Sets = field(default_factory=Sets)
    """The sets of engines that the planner knows; each has a memory in the stack. None: there is one memory, of all."""
    shard: str = ""
    """Shard layout of the build that somebody has said its engines shall have; empty: they keep that of the present set."""
    shapes: dict[str, Shape] = field(default_factory=dict)
    """What engines of a set are made from, by the hash of it: another than the resource's as long as it stays."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Its task shall look now."""
    stepped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and another put in its place, when its task has looked once more."""
    task: asyncio.Task[None] | None = None
    """Task of the keeper, from when the stack is whole."""
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the flow table or the configuration is being changed, and while an engine's memory goes."""
    failures: int = 0
    """Engines in a row that could not be made."""
    create_after: float = 0.0
    """No engine is made before, by the monotonic clock."""
    given_up: GivenUp = field(default_factory=GivenUp)
    """Engines that did not serve for too long, by the monotonic clock."""
    ending: float = 0.0
    """Since when the connections that a set kept have no more time, by the monotonic clock."""
    problem: str = ""
    """Why the last engine could not be made; empty when it could, and when no more are wanted."""
    pinned: dict[int, int] = field(default_factory=dict)
    """Bucket -> slot, where a person put it; kept while that engine stays."""
    converged: bool = False
    """Its task has found nothing left to do since it was disturbed last."""
    stale: bool = False
    """More is known, of its resource or its backends, than its configuration says: its task writes it, until that is done."""
    gone: dict[str, dict[str, int]] = field(default_factory=lambda: {"engine": {}, "kernel": {}})
    """Drops counted by engines that have left."""
    gone_copies: dict[int, dict[str, int]] = field(default_factory=dict)
    """By set: what its engines that have left got of mirrored traffic."""
    countdown: Countdown = field(default_factory=Countdown)
    """Connections of the set that drains."""
    holds_ns: deque[int] = field(default_factory=lambda: deque(maxlen=1000))
    """How long each of the last fences took."""
    moved: int = 0
    """Buckets, since the agent began."""
    last_moves: deque[Json] = field(default_factory=lambda: deque(maxlen=LAST_MOVES))
    """Last moves of buckets and queues, whoever wanted them, as the status shows them."""
    history: History = field(default_factory=History)
    """What its engines' counters said, once a second."""
    lacks: tuple[Lack, ...] = ()
    """What its packets need of the node and have not, as it was last seen."""
    table: FlowTable | None = None
    """What the stack follows in a cluster. None: the agent plans for it."""
    generation: int = 0
    """Generation of the table."""

    def note(self, record: Record) -> None:
        """Write resource and sets into the record, for the caller to save."""
        name, shape = self.stack.name, self.stack.resource.spec.engine
        self.shapes = {s.template: self.shapes[s.template] for s in self.sets.known if s.template in self.shapes}
        self.shapes.setdefault(shape.template_hash(), shape)
        record.documents[name] = self.stack.resource.document()
        record.sets[name] = {
            "known": [asdict(s) for s in self.sets.known],
            "last": self.sets.last,
            "shard": self.shard,
            "shapes": {t: one.model_dump(mode="json", by_alias=True) for t, one in self.shapes.items()},
        }

    def read(self, noted: Json) -> None:
        """Sets as `note` has written them. Any error if something is missing or has another form."""
        known = (EngineSet(**one | {"state": SetState(one["state"])}) for one in noted.get("known", ()))
        self.sets = Sets(tuple(known), int(noted.get("last", 0)))
        self.shard = str(noted.get("shard", ""))
        self.shapes = {t: Shape.model_validate(one) for t, one in noted.get("shapes", {}).items()}

    def add(self, engine: Engine) -> None:
        """There is this engine from now on."""
        self.engines[engine.slot] = engine
        self.stack.set_of[engine.slot] = engine.blueprint.set

    def disturb(self) -> None:
        """Something else is wanted: it has not converged until its task has looked again, which it does at once."""
        self.converged = False
        self.changed.set()

    def lacks_nothing(self) -> None:
        """Nothing stands against an engine any more: one was made, or none is wanted."""
        self.failures, self.problem = 0, ""

    def note_step(self) -> None:
        """Its task has looked once more: whoever waits for that goes on."""
        stepped, self.stepped = self.stepped, asyncio.Event()
        stepped.set()

    def note_move(self, what: str, why: str) -> None:
        """Buckets or queues were moved."""
        self.last_moves.append({"time": time.time(), "what": what, "why": why})


class Stacks(dict[str, Managed]):
    """The stacks by name. Read and changed on the event loop alone: a thread gets copies of what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.unread: dict[str, str] = {}
        """Stacks of the record that cannot be read, and why. Their engines serve; nothing of them is touched."""
        self.foreign = ""
        """Why the agent stands by: another build made what is there, and nothing of it is touched."""

    def find(self, name: str) -> Managed:
        """The stack of this name; AgentError that says which there are."""
        try:
            return self[name]
        except KeyError:
            if self.foreign:
                raise AgentError(self.foreign) from None
            self.check_read(name)
            known = ", ".join(sorted(self)) or "none"
            raise AgentError(f"stack {name}: not found; stacks of this agent: {known}") from None

    def check_read(self, name: str) -> None:
        """AgentError for a stack that cannot be read."""
        if name in self.unread:
            raise AgentError(f"stack {name}: cannot be changed, its engines serve: {self.unread[name]}")

    def check_there(self, managed: Managed) -> None:
        """AgentError for a stack that has been removed: its memory is gone. Asked again by whoever waited for `busy`."""
        name = managed.stack.name
        if self.get(name) is not managed:
            raise AgentError(f"stack {name}: has been removed")

    def planned(self, name: str) -> Managed:
        """A stack that the agent plans for; AgentError for one that follows a table."""
        managed = self.find(name)
        if managed.table is not None:
            raise AgentError(
                f"stack {name}: follows its FlowTable; change the PacketStack resource, as with kubectl scale"
            )
        return managed

    def backends(self) -> Iterator[Watched]:
        """All backends, and how listeners want them to be checked."""
        for name, managed in self.items():
            for listener in managed.stack.resource.spec.listeners:
                for endpoint in listener.backends.endpoints or ():
                    yield name, (endpoint.address, endpoint.port), listener.health_check
