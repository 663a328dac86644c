"""The datapath dies thousands of times; nothing is lost, doubled, changed twice or leaked.

PACKETSTACK_SEED says which deaths: the same ones each time in the suite, others each time in the long tests, of which
PACKETSTACK_DEATHS says how many. The seed is part of each failure.
"""

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from packetstack_agent.natives import constant, ffi

from .bench import (
    CLIENT,
    DATAPATH,
    SERVING,
    UDP,
    UDP_PORT,
    VIP,
    Keeper,
    Packet,
    keeper,
)  # fmt: skip

DEATHS = int(os.environ.get("PACKETSTACK_DEATHS", "2000"))
SEED = int(os.environ.get("PACKETSTACK_SEED", "0"))
FEW = 4 * len(SERVING)
"""Deaths in the suite: four for each point."""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(not DATAPATH.exists(), reason="packetstack-datapath-inject is not built"),
]


def seed_of(request: pytest.FixtureRequest) -> int:
    """Printed when a test fails."""
    seed = SEED or (random.randrange(1, 1 << 30) if request.node.get_closest_marker("soak") else 1)
    print(f"PACKETSTACK_SEED={seed}")
    return seed


@pytest.fixture(scope="module")
def shared() -> Iterator[Keeper]:
    """An engine that serves, and is whole after each test."""
    with keeper("pkcrash", 1) as made:
        yield made


@pytest.fixture
def engine(shared: Keeper, request: pytest.FixtureRequest) -> Keeper:
    """The shared one, with choices of the test's own."""
    shared.begin(seed_of(request))
    return shared


@pytest.fixture
def doomed(request: pytest.FixtureRequest) -> Iterator[Keeper]:
    """An engine of the test's own, which it harms."""
    with keeper("pkcrash-d", seed_of(request)) as made:
        yield made


@pytest.mark.parametrize("deaths", [FEW, pytest.param(DEATHS, marks=pytest.mark.soak)])
def test_deaths_at_every_point_harm_no_packet_no_frame_and_no_flow(engine: Keeper, deaths: int) -> None:
    engine.move_all_the_time()
    engine.deaths_at(SERVING, deaths)
    engine.sweep()
    engine.at_rest()
    engine.move_no_more()
    print(f"{engine.deaths} deaths, {engine.delivered} packets, {engine.moves} buckets moved, {dict(engine.hits)}")
    print(f"{engine.blamed} packets dropped after two deaths in their rewriting")
    assert not engine.faults, engine.examples
    counters = engine.counters()
    assert counters["journals_refused"] == counters["frames_recovered"] == counters["drop_bad_descriptor"] == 0
    # The sweep and what hands queues over come by chance.
    missed = [p for p in SERVING if not engine.hits[p]]
    assert len(missed) < (8 if deaths >= 300 else 16), missed


CONTROLS = {
    "PS_WITHOUT_REDO": [p for p in SERVING if p.startswith(("COMMITTED", "PUBLISHED", "RECYCLE"))],
    "PS_WITHOUT_UNDO": [p for p in SERVING if p.startswith(("REWRITE", "FRAME"))],
    "PS_WITHOUT_REBUILD": [p for p in SERVING if p.startswith(("INSERT", "REMOVE", "STATE"))],
}


@pytest.mark.parametrize("protection", CONTROLS)
def test_the_same_deaths_show_when_a_protection_is_off(doomed: Keeper, protection: str) -> None:
    doomed.engine.view.protection_off = constant(protection)
    for _ in range(60):
        doomed.cycle(doomed.random.choice(CONTROLS[protection]), 1 + doomed.random.randrange(8))
        if doomed.faults:
            return
    doomed.at_rest(2)
    assert doomed.faults


def serves(engine: Keeper, bursts: int = 3) -> None:
    """Everything sent from now on comes, as it must."""
    engine.flows.clear()
    engine.faults.clear()
    deaths = engine.deaths
    for _ in range(bursts):
        engine.known = dict(engine.flows)
        frames = engine.burst()
        engine.known |= engine.flows
        engine.send(frames)
        engine.settle(0.5)
    assert not engine.faults, engine.examples
    assert engine.deaths == deaths, "it goes on dying"


def test_a_packet_that_kills_twice_is_dropped_and_kept_and_the_others_go_on(engine: Keeper) -> None:
    view = engine.engine.view
    captured = view.captured
    for _ in range(5):
        engine.known = dict(engine.flows)
        frames = engine.burst()
        engine.known |= engine.flows
        poison = Packet(UDP, (CLIENT, 999), (VIP, UDP_PORT), b"poison!!" + b"x" * 300).frame(engine.macs["client"])
        frames.insert(engine.random.randrange(len(frames)), ("client", poison))
        before, died = engine.counters()["drop_poison"], engine.deaths
        engine.send(frames)
        engine.settle(0.5)
        while engine.counters()["drop_poison"] == before:
            engine.settle(0.02)
        assert engine.deaths == died + 2
        assert engine.counters()["drop_poison"] == before + 1
    assert not engine.faults, engine.examples
    assert view.captured == captured + 5
    first = ffi.cast("struct ps_capture *", ffi.cast("char *", view) + view.captures_offset)
    assert bytes(first.bytes) == poison[:256]
    assert (first.length, first.bucket < 256) == (len(poison), True)
    assert abs(first.time_ns - time.monotonic_ns()) < 60e9
    serves(engine)
    engine.at_rest()
    assert not engine.faults, engine.examples


def remains(engine: Keeper, what: str) -> list[Any]:
    """Memory of what a process may leave behind as rubbish: buffers."""
    queues = [engine.engine.queue(q) for q in range(2)]
    view = engine.engine.view

    def slots(queue: Any, offset: int, size: int) -> Any:
        return ffi.buffer(ffi.cast("char *", queue + 1) + offset, size)

    park_bytes = view.park_slots * 16
    if what == "journal":
        return [ffi.buffer(ffi.addressof(q.journal), 64) for q in queues]
    if what == "progress":
        return [ffi.buffer(ffi.addressof(q.journal.progress), ffi.sizeof(q.journal.progress)) for q in queues]
    if what == "recycle":
        return [ffi.buffer(ffi.addressof(view.recycle))]
    if what == "free ring":
        return [ffi.buffer(ffi.addressof(q.free)) for q in queues] + [
            slots(q, park_bytes, view.free_slots * 8) for q in queues
        ]
    if what == "park ring":
        return [ffi.buffer(ffi.addressof(q.park)) for q in queues] + [slots(q, 0, park_bytes) for q in queues]
    arena = engine.memory.arena
    shards = [ffi.cast("char *", arena) + arena.shards_offset + b * arena.shard_stride for b in range(256)]
    header = ffi.sizeof("struct ps_shard")
    if what == "shard header":  # its owner is the agent's
        return [ffi.buffer(s + 8, header - 8) for s in shards]
    return [ffi.buffer(s + header, arena.shard_stride - header) for s in shards]


@pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.soak)])
@pytest.mark.parametrize("what", ["journal", "progress", "recycle", "free ring", "park ring", "shard header", "shard"])
def test_rubbish_left_behind_is_not_trusted_and_the_next_process_serves(engine: Keeper, what: str, rounds: int) -> None:
    engine.flows_may_be_rubbish = what == "shard"
    for _ in range(rounds):
        engine.known = dict(engine.flows)
        frames = engine.burst()
        engine.known |= engine.flows
        engine.order_death(engine.random.choice(["COMMITTED", "PUBLISHED_TX", "FRAME_DONE", "RECYCLE_FILL"]), 2)
        engine.send(frames)
        if not engine.died(0.2):
            engine.engine.view.die_at = 0
            engine.kill()
        chosen = engine.random.sample(found := remains(engine, what), 1 + engine.random.randrange(len(found)))
        for memory in chosen:
            for _ in range(1 + engine.random.randrange(40)):
                memory[engine.random.randrange(len(memory))] = bytes([engine.random.randrange(256)])
        engine.adopt()
        engine.settle(0.1)
        serves(engine)
        engine.at_rest(counters=what != "shard")  # rubbish in a flow may name another backend
        assert not engine.faults, engine.examples
    assert engine.refused <= max(1, rounds // 4), "openers without room"
    counters = engine.counters()
    assert counters["shards_rebuilt" if "shard" in what else "journals_refused"], counters
