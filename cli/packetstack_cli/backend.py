"""Whom a command asks: the agent of this host (`client.py`) or a cluster (`cluster.py`). Both answer in the same shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from packetstack_cli.checks import Check
from packetstack_core import verbs
from packetstack_core.resources import PacketStack
from packetstack_core.verbs import Json


@dataclass(frozen=True)
class Wishes:
    """What `up` was told beside the files."""

    uplinks: Sequence[str] = ()
    firewall: str | None = None
    """None: as it was."""
    force_conflicts: bool = False
    """Take over fields that others have set; on one host nobody else has."""


@dataclass(frozen=True)
class Live:
    """Stacks with the numbers of this moment."""

    items: list[Json]
    without: Sequence[str] = ()
    """Why some have none."""


@dataclass(frozen=True)
class Removal:
    """What `down` is about to end."""

    warning: str
    """What users of the stacks will notice; empty if nothing."""
    carry_out: Callable[[], list[str]]
    """Does it, and returns what is gone, in lines. CliError."""


class Backend(Protocol):
    """Every method raises CliError for what cannot be done, with one line that says why and what to do."""

    def close(self) -> None:
        """End connections that are open."""

    def begin(self, metrics_listen: str | None) -> bool:
        """Start an agent if there is none. Whether it is ours to end should what follows fail."""

    def abandon(self) -> None:
        """End the agent that `begin` has started."""

    def apply(self, stacks: Sequence[PacketStack], wishes: Wishes) -> list[Json]:
        """Make the stacks what they say: for each its name as `stack`, the `result`, and perhaps a `note`."""

    def check(self, stacks: Sequence[PacketStack]) -> None:
        """What reading them has not found."""

    def get(self, name: str | None = None) -> list[Json]:
        """One stack or all, as resources with their status."""

    def live(self, name: str | None) -> Live:
        """Stacks as `get` gives them, with the numbers of this moment."""

    def wait(self, names: Sequence[str], seconds: float) -> list[Json]:
        """Until all these stacks are as their resources say, or the time is over: those that are not."""

    def removal(self, name: str | None, everything: bool) -> Removal:
        """What ending this stack, the only one, or all of them means, and how to do it."""

    def scale(self, name: str, replicas: int) -> Json:
        """Engines `from` and `to`, perhaps a `note`."""

    def move_buckets(self, name: str, buckets: Sequence[int], slot: int, queue: int | None) -> Json:
        """How many were `moved`, and `longestMilliseconds`."""

    def move_queue(self, name: str, slot: int, queue: int, core: int) -> Json:
        """`microseconds` until the other core served it."""

    def upgrade(self, name: str) -> Json:
        """The `engine` of this name, process ids `from` and `to`, and `pauseMilliseconds`. Of a `stack` a list of these as
        `engines`; or shard layouts `from` and `to`, when a second set of engines has taken over."""

    def restart_agent(self, end_flows: bool) -> int:
        """Let another agent take over; its process id. `end_flows`: of what another build has made."""

    def end_flows(self, name: str) -> Json:
        """On the `node` of this stack."""

    def explain(self, question: verbs.Explain) -> Json:
        """Where a flow goes, and `why`."""

    def events(self, name: str | None) -> list[Json]:
        """Oldest first."""

    def metrics(self) -> str:
        """Metrics of the agents, as Prometheus reads them."""

    def log(self, engine: str | None) -> str:
        """What an engine, or the agent, has written."""

    def preflight(self) -> list[Check]:
        """What is there and what is lacking."""


def not_ready(item: Json, seconds: float) -> str:
    """What a stack lacks after so long."""
    status = item["status"]
    trouble = next((c["message"] for c in status["conditions"] if c["message"]), "see packetstack describe")
    return (
        f"stack {item['metadata']['name']}: {status['readyReplicas']} of {item['spec']['replicas']} engines are ready "
        f"after {seconds:g} s; {trouble}"
    )
