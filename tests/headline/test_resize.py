"""The pool is resized under live traffic, again and again before the last resize is done: nothing may break."""

import time

import pytest
from tests.lab.pool import SIZES, TARGETS, UDP_TARGETS, Pool, pool

from packetstack_cli.traffic import Servers, Traffic

# How long after one wish the next comes, in tenths of a second: most come while the last is still being carried out.
PAUSES = (8, 2, 1, 0, 3, 2, 0, 5, 0, 1)

# What a handover itself could cause. Never, however the load.
HANDOVER_DROPS = ("park_full", "late", "not_owner")


def resize_again_and_again(pool: Pool, sizes: tuple[int, ...]) -> int:
    """Ask for one size after another; returns how often the last one was not yet reached."""
    overlaps = 0
    for i, size in enumerate(sizes):
        pool.client.call("scale", name="demo", replicas=size)
        time.sleep(PAUSES[i % len(PAUSES)] / 10)
        overlaps += not pool.status()["ready"]
    return overlaps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "udp_flows", "sizes"),
    [
        pytest.param(500, 100, SIZES[:8], id="small"),
        pytest.param(10_000, 2_000, SIZES, id="full", marks=pytest.mark.soak),
    ],
)
def test_overlapping_resizes_break_no_connection_and_reorder_no_datagram(
    connections: int, udp_flows: int, sizes: tuple[int, ...]
) -> None:
    with pool("pkl-resize") as resized:
        servers = Servers(resized.lab)
        before = resized.drops()
        traffic = Traffic(
            resized.lab,
            TARGETS,
            UDP_TARGETS,
            connections=connections,
            udp_flows=udp_flows,
            request_interval_ms=4000,
            udp_interval_ms=400,
            new_rate=20,
        )
        traffic.wait_open()
        overlaps = resize_again_and_again(resized, sizes)
        status = resized.settle()
        time.sleep(1)
        outcome = traffic.stop()
        after = resized.drops(outcome)
        counted = servers.stop()
    dropped = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    print(f"{outcome}\ndropped: {dropped}\noverlaps: {overlaps}\nserver: {counted}\nhandover: {status['handover']}")
    at_once = sum(PAUSES[i % len(PAUSES)] == 0 for i in range(len(sizes)))
    assert overlaps >= at_once > 0, "the resizes were to overlap"
    assert outcome.never_opened == 0
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_reordered == 0
    assert outcome.datagrams_duplicated == 0
    for reason in HANDOVER_DROPS:
        assert dropped.get(f"engine.{reason}", 0) == 0
    assert outcome.datagrams_lost <= sum(dropped.values()) + counted["socket_drops"], "a datagram was lost silently"
