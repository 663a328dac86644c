"""What the agent of a node can be asked: one table, served by the agent over HTTP on its unix socket, used by the command.

A verb that changes nothing is `GET /v1/NAME?FIELD=VALUE`, one that changes something `POST /v1/NAME` with the request
as JSON. The answer is JSON. A refusal is a body `{"error": {"code": ..., "message": ...}}`; `Code` lists the codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar, get_origin

from pydantic import Field, ValidationError

from packetstack_core.reading import describe
from packetstack_core.values import Model, Whole

Json = dict[str, Any]

R = TypeVar("R", bound=Model)
A = TypeVar("A")

MAX_REQUEST_BYTES = 8 << 20
LONGEST_WAIT_SECONDS = 20.0
"""The longest that one `wait` takes; whoever waits longer asks again."""

Port = Annotated[int, Whole(0, 65535, "a port")]


class Code(StrEnum):
    """Why a request was refused. Codes stay what they are from version to version; messages do not."""

    INVALID_REQUEST = "InvalidRequest"
    """The request is not what the verb takes: status 400, or 413 when it is too long. The message names the field."""
    UNKNOWN_VERB = "UnknownVerb"
    """This agent has no such verb, or it is another method's: 404 or 405."""
    INVALID_RESOURCE = "InvalidResource"
    """A PacketStack in the request is wrong: 422. One line a problem, each naming the field."""
    REFUSED = "Refused"
    """The agent cannot do this now: 409."""
    STANDING_BY = "StandingBy"
    """Another build has made what runs, and the agent leaves it alone: 503."""
    INTERNAL_ERROR = "InternalError"
    """A fault of the agent, or the system ran out of something: 500. The agent goes on."""


class RequestError(Exception):
    """A request that its verb does not take. The message names verb and field."""


@dataclass(frozen=True)
class Verb(Generic[R, A]):
    """One thing that the agent can be asked. `A` is what the answer is made of."""

    name: str
    request: type[R]
    changes: bool
    """Whether it changes anything: stacks, engines, or the agent itself."""
    standing_by: bool = False
    """Whether an agent answers it while it stands by."""

    def read(self, body: bytes) -> R:
        """A request from JSON. RequestError."""
        try:
            return self.request.model_validate_json(body or b"{}")
        except ValidationError as e:
            raise RequestError(self._problems(e)) from None

    def read_query(self, query: Mapping[str, Sequence[str]]) -> R:
        """A request from the fields of a query, each with all its values. RequestError."""
        lists = {n for n, f in self.request.model_fields.items() if get_origin(f.annotation) is tuple}
        given = {name: list(values) if name in lists else values[-1] for name, values in query.items()}
        try:
            return self.request.model_validate(given, strict=False)
        except ValidationError as e:
            raise RequestError(self._problems(e)) from None

    def _problems(self, error: ValidationError) -> str:
        details = error.errors(include_url=False)
        if details[0]["type"] == "json_invalid":
            return f"request {self.name}: is not JSON: {str(details[0]['ctx']['error'])[:100]}"
        lines = [line for detail in details for line in describe(detail, self.request)]
        return f"request {self.name}: {lines[0].removeprefix('document: ')}"


class Nothing(Model):
    """A request that says nothing but its verb."""


class OneOrAll(Model):
    """`name`: of a stack; None means all."""

    name: str | None = None


class Named(Model):
    """`name`: of a stack."""

    name: str


class Apply(Model):
    """PacketStacks as in their files, and what the director runs on."""

    documents: tuple[Json, ...]
    uplinks: tuple[str, ...] = ()
    firewall: Literal["Manage", "Report"] | None = None
    """None: as it was."""


class Scale(Model):
    """The number of engines that a stack shall have."""

    name: str
    replicas: int


class MoveBuckets(Model):
    """Buckets for an engine. `queue` None: spread over all of its queues."""

    name: str
    buckets: tuple[int, ...]
    slot: int
    queue: int | None = None


class MoveQueue(Model):
    """A queue of an engine, and the core of the same engine that shall serve it."""

    name: str
    slot: int
    queue: int
    core: int


class Upgrade(Model):
    """The engine whose datapath a fresh process shall follow; without a slot all of the stack."""

    name: str
    slot: int | None = None


class Explain(Model):
    """A flow of a client."""

    name: str
    protocol: str
    source: str
    sport: Port
    destination: str
    dport: Port


class Wait(Model):
    """Stacks, and for how long to wait until all of them are ready, at most `LONGEST_WAIT_SECONDS`."""

    names: tuple[str, ...]
    seconds: Annotated[float, Field(allow_inf_nan=False)]


APPLY: Verb[Apply, list[Json]] = Verb("apply", Apply, changes=True)
"""For each stack its name as `stack`, the `result` (created, changed, unchanged), perhaps a `note`."""
GET: Verb[OneOrAll, list[Json]] = Verb("get", OneOrAll, changes=False, standing_by=True)
"""Stacks as resources with their `status`."""
WAIT: Verb[Wait, list[Json]] = Verb("wait", Wait, changes=False)
"""Answered as soon as all are ready, or after the time, with those that are not, in the form of `GET`."""
DELETE: Verb[Named, None] = Verb("delete", Named, changes=True)
SCALE: Verb[Scale, Json] = Verb("scale", Scale, changes=True)
"""Engines `from` and `to`, perhaps a `note`."""
MOVE_BUCKETS: Verb[MoveBuckets, Json] = Verb("move_buckets", MoveBuckets, changes=True)
"""How many were `moved`, and `longestMilliseconds`, the longest fence."""
MOVE_QUEUE: Verb[MoveQueue, Json] = Verb("move_queue", MoveQueue, changes=True)
"""`microseconds` until the other core served it."""
UPGRADE: Verb[Upgrade, Json] = Verb("upgrade", Upgrade, changes=True)
"""Process ids `from` and `to`, and `pauseMilliseconds` in which nobody served. Of a whole stack a list of these as `engines`,
each with its `slot`; or, where the build has another shard layout, both layouts as `from` and `to` and no `engines`."""
EXPLAIN: Verb[Explain, Json] = Verb("explain", Explain, changes=False)
"""`why`; for a listener's traffic also `bucket`, `owner`, `flow`."""
EVENTS: Verb[OneOrAll, list[Json]] = Verb("events", OneOrAll, changes=False, standing_by=True)
"""Oldest first: `time`, `stack`, `type`, `reason`, `message`, `count`."""
CENSUS: Verb[Named, Json] = Verb("census", Named, changes=False)
"""By slot: frames that are not in exactly one ring. Exact while no packets flow."""
STOP: Verb[Nothing, None] = Verb("stop", Nothing, changes=True)
"""Remove all stacks, and end."""
LEAVE: Verb[Nothing, None] = Verb("leave", Nothing, changes=True, standing_by=True)
"""End, and leave all stacks as they are."""
END_FLOWS: Verb[Nothing, list[str] | None] = Verb("end_flows", Nothing, changes=True, standing_by=True)
"""End what another build has made, and begin anew: names of its stacks. None from an agent that does not stand by."""

TABLE: dict[str, Verb[Any, Any]] = {
    verb.name: verb
    for verb in (
        APPLY, GET, WAIT, DELETE, SCALE, MOVE_BUCKETS, MOVE_QUEUE, UPGRADE, EXPLAIN, EVENTS, CENSUS, STOP, LEAVE, END_FLOWS
    )
}  # fmt: skip
"""Name -> verb."""
