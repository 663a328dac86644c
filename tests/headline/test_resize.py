"""The pool is resized under live traffic, again and again before the last resize is done: nothing may break."""

import time
from pathlib import Path
from typing import Any

import pytest

from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_cli.traffic import Outcome, Servers, Traffic

DEMO = Path(__file__).parents[2] / "examples/demo.yaml"
TARGETS = ("192.0.2.10:80", "[2001:db8:1::10]:80")
UDP_TARGETS = ("192.0.2.10:53", "[2001:db8:1::10]:53")

# Sizes 1 to 4: up, down, there and back at once (flapping), one engine in the middle of all.
SIZES = (4, 1, 3, 2, 4, 1, 4, 1, 2, 3, 1, 4, 2, 1, 3, 4, 1, 2, 4, 3)
# How long after one wish the next comes, in tenths of a second: most come while the last is still being carried out.
PAUSES = (8, 2, 1, 0, 3, 2, 0, 5, 0, 1)

# What a handover itself could cause. Never, however the load.
HANDOVER_DROPS = ("park_full", "late", "not_owner")
# Frames that are nobody's datagrams: neighbour discovery on links of the node's own.
NOT_TRAFFIC = ("not_ours", "unstamped")


def drops(client: Client, lab: Lab, outcome: Outcome | None = None) -> dict[str, int]:
    """Every named drop between the generator's sockets and the servers', by place and reason."""
    status = client.call("get", name="demo")[0]["status"]
    named = {f"{place}.{reason}": n for place, reasons in status["drops"].items() for reason, n in reasons.items()}
    named |= lab.device_drops()
    if outcome:
        named["generator.socket_drops"] = outcome.socket_drops
    return {name: n for name, n in named.items() if name.rpartition(".")[2] not in NOT_TRAFFIC}


def resize_again_and_again(client: Client, sizes: tuple[int, ...]) -> int:
    """Ask for one size after another; returns how often the last one was not yet reached."""
    overlaps = 0
    for i, size in enumerate(sizes):
        client.call("scale", name="demo", replicas=size)
        time.sleep(PAUSES[i % len(PAUSES)] / 10)
        overlaps += not client.call("get", name="demo")[0]["status"]["ready"]
    return overlaps


def wait_ready(client: Client, timeout_seconds: float = 30) -> dict[str, Any]:
    """Until the pool is as wanted."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        status: dict[str, Any] = client.call("get", name="demo")[0]["status"]
        if status["ready"]:
            return status
        assert time.monotonic() < deadline, status["conditions"]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "udp_flows", "sizes"),
    [(500, 100, SIZES[:8]), (10_000, 2_000, SIZES)],
    ids=["small", "full"],
)
def test_overlapping_resizes_break_no_connection_and_reorder_no_datagram(
    connections: int, udp_flows: int, sizes: tuple[int, ...]
) -> None:
    with Lab("pkl-resize") as lab:
        servers = Servers(lab)
        lab.packetstack("up", str(DEMO), "--uplink", NODE_UPLINK)
        client = Client(lab.run_directory)
        before = drops(client, lab)
        traffic = Traffic(
            lab,
            TARGETS,
            UDP_TARGETS,
            connections=connections,
            udp_flows=udp_flows,
            request_interval_ms=4000,
            udp_interval_ms=400,
            new_rate=20,
        )
        traffic.wait_open()
        overlaps = resize_again_and_again(client, sizes)
        status = wait_ready(client)
        time.sleep(1)
        outcome = traffic.stop()
        after = drops(client, lab, outcome)
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
