"""A node's stacks and engines as the agent sees them, without kernel, memory or processes.

`PlayedStack` has words and shards as lists; `PlayedEngine` serves when it is told to. The agent takes both for real
ones, so whatever is tested with them is the agent's own code.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from packetstack_agent.blueprints import FIRST_SET, Blueprint
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.flow_memory import FlowMemory, Report
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed
from packetstack_agent.natives import ffi
from packetstack_agent.stacks import Stack
from packetstack_agent.structs import Core, Queue
from packetstack_core import reading, shards
from packetstack_core.assignment import NOBODY, Move, Owner, State
from packetstack_core.kinds import FlowTable
from packetstack_core.reasons import Reason
from packetstack_core.resources import PacketStack

BUCKETS = 16


def listener(
    name: str = "web", port: int = 80, protocol: str = "TCP", backends: Sequence[str] = ("10.0.0.1",)
) -> dict[str, Any]:
    """A listener of the one address that there is."""
    endpoints = [{"address": b, "port": 8080} for b in backends]
    return {
        "name": name,
        "address": "192.0.2.10",
        "protocol": protocol,
        "port": port,
        "backends": {"endpoints": endpoints},
    }


def resource(name: str = "web", backends: Sequence[str] = ("10.0.0.1",), **spec: Any) -> PacketStack:
    """A stack of one listener; `spec` replaces parts of it."""
    return reading.parse(
        {
            "apiVersion": "packetstack.io/v1alpha1",
            "kind": "PacketStack",
            "metadata": {"name": name},
            "spec": {
                "replicas": 2,
                "engine": {"cores": 1, "queuesPerCore": 1, "cpuPolicy": "Shared"},
                "listeners": [listener(backends=backends)],
                "snat": {"addresses": ["198.51.100.0/31"]},
                **spec,
            },
        }
    )


def flow_table(stack: PacketStack) -> FlowTable:
    """What an operator would have the stack follow: no engines yet."""
    spec = stack.spec.model_dump(mode="json", by_alias=True, include={"listeners", "snat"})
    return FlowTable.model_validate(
        {
            "apiVersion": "packetstack.io/v1alpha1",
            "kind": "FlowTable",
            "metadata": {"name": stack.name, "namespace": "default"},
            "spec": {"node": "n1", "engines": [], **spec},
        }
    )


class PlayedMemory(FlowMemory):
    """Memory of a set that there is not."""

    def __init__(self) -> None:
        self.arena = self.config = None
        self.arena_path = self.config_path = self.pin = Path("/nonexistent")
        self.shard = shards.FIRST


class PlayedStack(Stack):
    """Buckets with an owner by the flow table, and one by their shard; these differ while a fence is open."""

    def __init__(self, wanted: PacketStack, owners: Sequence[int] = (), buckets: int = BUCKETS) -> None:
        """`owners`: slots that own the buckets, in turn; nobody without any."""
        self.name, self.index = wanted.name, 0
        self.resource = wanted
        self.healthy = {}
        self.due = math.inf
        self.leaving = {}
        self.current, self.sets, self.set_of = FIRST_SET, {FIRST_SET: PlayedMemory()}, {}
        self.mirror = self.connections = None
        self.table = [Owner(owners[b % len(owners)], 0) if owners else NOBODY for b in range(buckets)]
        self.shards = list(self.table)
        self.flows_of: dict[int, int] = {}
        """Live flows by slot."""
        self.mute: set[int] = set()
        """Slots of engines that do not answer their fences."""
        self.tries = 0
        """Fences that were asked for."""
        self.busy = False
        """Its engines take no configuration."""
        self.configured: list[dict[Any, bool]] = []
        """What was known of the backends at each configuration."""

    @property
    def buckets(self) -> int:
        return len(self.table)

    def is_configured(self, engine: Engine) -> bool:
        return not self.busy

    @property
    def unsettled(self) -> bool:
        return False

    def owners(self) -> list[Owner | None]:
        return list(self.table)

    def belongs(self) -> Sequence[int]:
        return [self.set_of.get(owner.slot, self.current) for owner in self.table]

    def open_fences(self) -> frozenset[int]:
        return frozenset(
            b for b, (word, shard) in enumerate(zip(self.table, self.shards, strict=True)) if word != shard
        )

    def shard_slots(self) -> set[int]:
        return {owner.slot for owner in self.shards} - {0}

    def held(self) -> Counter[int]:
        return Counter(self.shards[b].slot for b in self.open_fences() if self.shards[b].slot)

    def flows_by_slot(self) -> dict[int, int]:
        return dict(self.flows_of)

    def live(self) -> int:
        return 0

    def transfer(self, engines: Sequence[Engine], moves: Sequence[Move]) -> Report:
        """Words change at once, shards when the engine that they name answers."""
        self.tries += 1
        report = Report(fences=1)
        for move in moves:
            if move.bucket not in self.open_fences() and self.table[move.bucket] != move.to:
                self.table[move.bucket] = move.to
                report.moved += 1
        there = {e.slot for e in engines if e.ready and e.slot not in self.mute}
        for bucket in self.open_fences():
            source = self.shards[bucket].slot
            if source in there or source not in {e.slot for e in engines}:
                self.shards[bucket] = self.table[bucket]
            else:
                report.stalled = source
        return report

    def direct(self) -> None:
        """There is no director."""

    async def configure(self, engines: Sequence[Engine]) -> int:
        if self.busy:
            raise AgentError(f"stack {self.name}: an engine does not take the configuration")
        self.configured.append(dict(self.healthy))
        return len(self.configured)

    def close(self) -> None:
        """There is no memory."""


class PlayedEngine(Engine):
    """An engine with the cores and queues that the stack's resource says."""

    def __init__(self, slot: int, stack: PacketStack, state: State = State.ACTIVE) -> None:
        shape = stack.spec.engine
        nowhere = Path("/nonexistent")
        super().__init__(
            Blueprint(
                stack.name, slot, shape.template_hash(), shape.queues, shape.cores, shape.cpu_policy, (), 0, "", "",
                nowhere, nowhere, nowhere, nowhere, nowhere, shards.FIRST,
            )
        )  # fmt: skip
        self.state = state
        self.serves = True
        self.view = ffi.new("struct ps_engine *")
        self.probed = True
        self.cores: list[Core] = [ffi.new("struct ps_core *", {"thread": 1}) for _ in range(shape.cores)]
        """They turn when their heartbeats grow."""
        self.queues: list[Queue] = [
            ffi.new("struct ps_queue *", {"cur": q % shape.cores + 1}) for q in range(shape.queues)
        ]
        self.process = slot

    @property
    def ready(self) -> bool:
        return self.serves

    @property
    def pid(self) -> int:
        return self.process if self.serves else 0

    def core(self, index: int) -> Core:
        return self.cores[index]

    def queue(self, index: int) -> Queue:
        return self.queues[index]

    def counters(self) -> dict[str, int]:
        return {}

    def kernel_drops(self) -> dict[str, int]:
        return {}


class PlayedJournal(Journal):
    """Tells each event each time, and when."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self.told: list[tuple[float, str, str]] = []
        """Time, reason, message."""

    def event(self, stack: str, reason: Reason, message: str) -> None:
        self.told.append((self._clock(), str(reason), message))

    def reasons(self) -> list[str]:
        return [reason for _, reason, _ in self.told]


def managed(stack: PlayedStack, *engines: PlayedEngine) -> Managed:
    """The stack with these engines."""
    return Managed(stack, {e.slot: e for e in engines})


async def turns(count: int = 20) -> None:
    """Let other tasks go on."""
    for _ in range(count):
        await asyncio.sleep(0)
