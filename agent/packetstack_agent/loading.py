"""Reads the counters of a stack's engines, for whoever decides by load. Changes nothing."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Managed
from packetstack_core.load import CoreCounters, EngineCounters, QueueCounters, Snapshot

MEASURE_SECONDS = 1.0


async def measure(stacks: Mapping[str, Managed], journal: Journal) -> None:
    """Keep what the counters of each stack's engines say, once a second, until cancelled."""
    while True:
        for managed in stacks.values():
            with journal.going_on(managed.stack.name, "load"), suppress(AgentError):  # an engine is going
                managed.history.add(snapshot(managed), time.time())
                mirror = managed.stack.mirror
                managed.countdown.note(time.monotonic(), mirror.left().connections if mirror is not None else None)
        await asyncio.sleep(MEASURE_SECONDS)


def name(engine: Engine) -> str:
    """What an engine is called where its load is spoken of: in a cluster as its pod."""
    return engine.blueprint.pod or engine.blueprint.name


def snapshot(managed: Managed, with_buckets: bool = False) -> Snapshot:
    """All counters of the stack's engines now; those of an engine that is being made or removed cannot be read."""
    flows = managed.stack.flows_by_slot()
    readable = [e for e in managed.engines.values() if e.view is not None and e.fds is not None and not e.removing]
    return Snapshot(
        time.monotonic(),
        tuple(_counters(e, flows.get(e.slot, 0)) for e in readable),
        tuple(managed.stack.bucket_packets()) if with_buckets else (),
    )


def _counters(engine: Engine, flows: int) -> EngineCounters:
    b = engine.blueprint
    counters = engine.counters()
    # What a listener's own limits refuse is no lack of engines. Of the two copies of a packet one is rejected, and not counted.
    dropped = sum(n for c, n in counters.items() if c.startswith("drop_") and not c.startswith("drop_limit_"))
    cores = [engine.core(c) for c in range(b.cores)]
    queues = [(engine.served_by(q), engine.queue(q)) for q in range(b.queues)]
    return EngineCounters(
        id=b.id or b.slot,
        name=name(engine),
        state=str(engine.state),
        ready=engine.ready,
        cores=tuple(CoreCounters(int(c.busy_cycles), int(c.total_cycles)) for c in cores),
        queues=tuple(
            QueueCounters(core, int(q.cycles), int(q.received), int(q.depth), engine.missed(i))
            for i, (core, q) in enumerate(queues)
        ),
        packets=counters["received"] - sum(n for c, n in counters.items() if c.startswith("rejected_")),
        bytes=counters["received_bytes"] - counters["copied_bytes"],
        flows_created=counters["flows_created"],
        dropped=dropped,
        flows=flows,
        missed=sum(engine.ring_drops().values()),
    )
