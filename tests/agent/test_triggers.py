"""Triggers of `spec.autoscaling.vertical` of a real agent: real packets make each of them fire, and no other with it."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.lab.node import BACKENDS, VIP, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_cli.lab import inside

QUIET = {
    "Utilization": "98",
    "FlowMemory": "98",
    "BitsPerSecond": "10G",
    "PacketsPerSecond": "10M",
    "ActiveFlows": "4k",
    "NewFlowsPerSecond": "1M",
    "QueueDepth": "100k",
    "Drops": "0.9",
}
"""Thresholds that nothing here comes near."""
NOBODY = 81
"""Port of the listener without a backend."""


def sized(loud: str = "", above: str = "", schedule: dict[str, Any] | None = None) -> dict[str, Any]:
    """A stack of one engine with all triggers, one of which has this threshold."""
    triggers: list[dict[str, Any]] = [
        {"type": kind, "above": above if kind == loud else quiet} for kind, quiet in QUIET.items()
    ]
    if schedule:
        triggers.append({"type": "Schedule", "schedule": schedule})
    vertical = {"maxCores": 2, "triggers": triggers, "holdSeconds": 0, "coolDownSeconds": 0}
    return stack(
        replicas=1,
        engine={"cores": 1, "queuesPerCore": 1},
        listeners=[
            listener("web", VIP, BACKENDS),
            {**listener("nobody", VIP, (), port=NOBODY), "protocol": "UDP"},
        ],
        snat={"addresses": ["198.51.100.0/31"]},
        flowTable={"buckets": 256, "maxFlows": 4096, "tcpTimeWaitTimeoutSeconds": 1, "tcpClosedTimeoutSeconds": 1},
        autoscaling={"maxReplicas": 1, "syncPeriodSeconds": 1, "vertical": vertical},
    )


@contextmanager
def repeated(once: Callable[[], Any]) -> Iterator[None]:
    """Over and over in a thread, until the end."""
    ended, failed = threading.Event(), []

    def run() -> None:
        try:
            while not ended.is_set():
                once()
        except OSError as e:
            failed.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join(10)
    assert not failed


@contextmanager
def held(node: Node) -> Iterator[None]:
    """Eight connections without a packet."""
    with ExitStack() as every:
        for _ in range(8):
            ask(every.enter_context(node.connect()))
        yield


@contextmanager
def asked(node: Node) -> Iterator[None]:
    """Questions on one connection."""
    with node.connect() as connection, repeated(lambda: ask(connection)):
        yield


@contextmanager
def opened(node: Node) -> Iterator[None]:
    """One connection after the other."""
    with repeated(lambda: node.who(tries=1)):
        yield


@contextmanager
def lost(node: Node) -> Iterator[None]:
    """Datagrams to a listener without a backend."""
    with inside(node.lab.namespace("client")):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((VIP, NOBODY))
    with sender, repeated(lambda: sender.send(bytes(100))):
        yield


CASES: dict[str, tuple[Callable[[Node], AbstractContextManager[None]], str]] = {
    "FlowMemory": (held, "0.2"),
    "ActiveFlows": (held, "5"),
    "BitsPerSecond": (asked, "50k"),
    "PacketsPerSecond": (asked, "200"),
    "Utilization": (asked, "1"),
    "NewFlowsPerSecond": (opened, "10"),
    "Drops": (lost, "0.5"),
}
"""Trigger -> what makes it fire, above which threshold. One connection that is silent keeps fewer cores from none."""


@contextmanager
def seen(node: Node) -> Iterator[Callable[[], list[str]]]:
    """What happens to the stack and one connection through it, which must still work in the end -> changes of size."""
    with node.connect() as witness:
        first, before = ask(witness), len(node.client.call("events", name="web"))
        yield lambda: [
            e["message"] for e in node.client.call("events", name="web")[before:] if e["reason"] == "EnginesResized"
        ]
        assert ask(witness) == first, "no connection broke"


def has(node: Node, cores: int) -> bool:
    """Whether this is what is wanted, and what the one engine has."""
    item = node.client.call("get", name="web")[0]
    there = [len(e["cores"]) for e in item["status"]["engines"]]
    return bool(item["spec"]["engine"]["cores"] == cores and there == [cores] and item["status"]["ready"])


def resized_once(changes: list[str], up: str) -> None:
    """One change up for this reason alone, and the one back."""
    assert len(changes) == 2, changes
    assert changes[0].startswith(f"1 x 1 core -> 1 x 2 cores: {up}"), changes
    assert not [kind for kind in QUIET if kind in changes[0].removeprefix(f"1 x 1 core -> 1 x 2 cores: {up}")], changes
    assert changes[1].startswith("1 x 2 cores -> 1 x 1 core: all triggers allow fewer cores"), changes


@pytest.mark.slow
@pytest.mark.parametrize("trigger", CASES)
def test_row_6_each_trigger_fires_alone_by_packets_and_allows_fewer_cores_without(node: Node, trigger: str) -> None:
    traffic, above = CASES[trigger]
    node.up(sized(trigger, above))
    with seen(node) as changes:
        with traffic(node):
            eventually(lambda: has(node, 2), 20)
        eventually(lambda: has(node, 1), 20)
        resized_once(changes(), f"{trigger} ")


@pytest.mark.slow
def test_row_6_a_schedule_alone_gives_engines_more_cores_until_it_ends(node: Node) -> None:
    now = datetime.now(UTC)
    hours = {"cron": f"{now.minute} {now.hour} * * *", "durationSeconds": now.second + 6, "cores": 2}
    node.up(sized(schedule={"name": "noon", **hours}))
    with seen(node) as changes:
        eventually(lambda: len(changes()) == 2 and has(node, 1), 30)
        resized_once(changes(), "the limits are 1 x 2 cores to 1 x 2 cores, by schedule noon")
