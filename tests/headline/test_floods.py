"""A listener is flooded from a million sources. Nothing established is lost, and others are served. Counts alone."""

import time

import pytest
from tests.lab.costly import DATAPATH
from tests.lab.flooded import (
    ASSURED_SECONDS,
    FLOOD,
    OTHER_TCP,
    OTHER_UDP,
    Attack,
    Flooded,
    Openers,
    attack,
    established,
    flood,
    flooded,
)

from packetstack_cli.traffic import Outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATAPATH.exists() or not FLOOD.exists(), reason="not built; run make build"),
]

KINDS = ("syn", "udp", "ack", "fragment", "echo", "unreachable")


def attacked(stack: Flooded, factor: float, seconds: float) -> tuple[list[Attack], list[Outcome]]:
    """All kinds, one after the other, at so many times what the engine can."""
    capacity = {kind: stack.capacity(kind, seconds=0.7) for kind in KINDS}
    flows = established(stack.lab)
    time.sleep(ASSURED_SECONDS)
    attacks = [attack(stack.lab, kind, factor * most, seconds, flows) for kind, most in capacity.items()]
    outcomes = [one.stop() for one in flows]
    print(*attacks, *outcomes, stack.status()["drops"], sep="\n")
    return attacks, outcomes


def test_at_half_of_what_an_engine_can_nothing_is_lost_and_all_new_flows_are_served() -> None:
    with flooded("pkl-half") as stack:
        attacks, outcomes = attacked(stack, 0.5, 2.0)
        gaps, events = stack.unaccounted(), [e["reason"] for e in stack.events()]
        drops = stack.status()["drops"]
    for one in attacks:
        assert one.other[0] == one.other[1], one
        assert one.flooded[0] == one.flooded[1], one
    for outcome in outcomes:
        assert outcome.broken == 0, outcome.what_broke()
        assert outcome.datagrams_lost == 0, drops
    assert drops["director"]["shed"] == 0
    assert "FloodShed" not in events
    assert gaps == dict.fromkeys(gaps, 0)


def test_at_twice_of_what_an_engine_can_established_flows_live_and_other_listeners_are_served() -> None:
    with flooded("pkl-twice") as stack:
        before = stack.arena_bytes()
        attacks, outcomes = attacked(stack, 2.0, 3.0)
        gaps, told = stack.unaccounted(), [e["message"] for e in stack.events() if e["reason"] == "FloodShed"]
        status, metrics = stack.status(), stack.metrics()
        after = stack.arena_bytes()
        described = stack.lab.packetstack("describe", "web").partition("SHED LISTENER")[2]
    for one in attacks:
        assert one.served(one.other) >= 99, one
    for outcome in outcomes:
        assert outcome.broken == 0, outcome.what_broke()
        assert outcome.datagrams_lost < 0.1 * outcome.datagrams_sent, "until it is known who floods, rings are full"
    assert gaps == dict.fromkeys(gaps, 0), "each loss has a counter"
    assert status["drops"]["director"]["shed"] == sum(s["dropped"] for s in status["shedding"]) > 0
    assert {(s["listener"], s["kind"]) for s in status["shedding"]} <= {
        ("web", "openers"), ("web", "strays"), ("dns", "openers"), ("dns", "strays")
    }  # fmt: skip
    assert "openers" in described
    assert "strays" in described
    assert any("listener web " in message for message in told)
    assert any("listener dns " in message for message in told)
    assert metrics["packetstack_shed_packets_total.openers.web"] > 0
    assert after == before, "memory is what it was before the first packet"


def test_the_rates_stay_while_there_is_no_agent_and_the_next_one_finds_its_own() -> None:
    with flooded("pkl-agentless") as stack:
        running = flood(stack.lab, "syn", 2 * stack.capacity("syn"), 60)
        until_shed(stack)
        stack.leave()
        others = Openers(stack.lab, "others", OTHER_TCP, OTHER_UDP, 20)
        time.sleep(3)
        served, opened = others.stop()
        stack.start()
        until_shed(stack)
        running.stop()
        deadline = time.monotonic() + 20
        while any(s["active"] for s in stack.status()["shedding"]):
            assert time.monotonic() < deadline, stack.status()["shedding"]
            time.sleep(0.1)
        assert "FloodEnded" in [e["reason"] for e in stack.events()]
    assert served >= 0.99 * opened


def until_shed(stack: Flooded) -> None:
    """Waits until packets are dropped ahead of the engine."""
    deadline = time.monotonic() + 20
    while not any(s["active"] and s["dropped"] for s in stack.status()["shedding"]):
        assert time.monotonic() < deadline, stack.status()["engines"]
        time.sleep(0.1)
