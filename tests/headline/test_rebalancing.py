"""Skewed traffic on two cores: the rebalancer evens their load out while packets flow, and nothing is lost by it."""

import time

import pytest
from tests.lab.costly import COST_NS, DATAPATH, TCP, UDP, becomes_even, costly, lost_around, skewed_traffic

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATAPATH.exists(), reason="packetstack-datapath-inject is not built; run make build"),
]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"replicas": 2, "cores": 1}, "Rebalanced"),
        ({"replicas": 1, "cores": 2, "queues_per_core": 4}, "QueuesRebalanced"),
    ],
    ids=["buckets-between-engines", "queues-between-cores"],
)
def test_two_unevenly_loaded_cores_become_even_and_no_packet_is_lost_or_reordered(
    shape: dict[str, int], reason: str
) -> None:
    with costly("pkl-even", COST_NS, **shape) as stack:
        before = lost_around(stack.lab)
        traffic = skewed_traffic(stack.lab, TCP, UDP, stack.unevenness, cpu=1)
        off = stack.unevenness(6)
        assert off > 1.2, "with Off nothing becomes even"
        assert reason not in stack.reasons()
        began = time.time()
        stack.up("Auto")
        now = becomes_even(stack.unevenness, off, within=25, look=2, stay=5)
        outcome = traffic.stop()
        around = outcome.socket_drops + lost_around(stack.lab) - before
        reasons, drops = stack.reasons(), stack.status()["drops"]
        last = [m["why"] for m in stack.status()["rebalance"]["lastMoves"] if m["time"] > began]
        stack.up("Off")
        owners = stack.status()["owners"]
    print(f"max/mean {off:.2f} -> {now:.2f}; {around} lost around it; {outcome}")
    assert reason in reasons
    assert last
    assert "as planned" not in last, "the planner moves nothing in return"
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_lost <= around, drops
    assert outcome.datagrams_reordered == 0
    assert outcome.datagrams_duplicated == 0
    assert len(set(owners.values())) == 1, "with Off again the numbers of buckets are even"
