"""What else is wanted while a stack has two sets of engines: both obey a changed resource, another size waits."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from tests.lab.mirrored import FLOW_TABLE, VIP, Mirrored, dropped, mirrored
from tests.lab.node import ask, listener
from tests.waiting import eventually

from packetstack_cli.lab import Lab

BACKENDS = tuple(f"10.71.5.{n}" for n in range(1, 5))


@pytest.fixture(scope="module")
def made() -> Iterator[Mirrored]:
    with mirrored("pkm-chng", servers=False, clients=200) as made:
        for address in BACKENDS:
            made.start_backend(address)
            made.lab.wait_for_listener("server", 8080)
        made.make(2)
        yield made


def listeners(backends: Sequence[str] = BACKENDS, check: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """One on port 80 with these backends, and one on port 81 that keeps clients at their backends."""
    pinned = listener("pinned", VIP, BACKENDS, port=81) | {"balancing": "Maglev", "sessionAffinity": "ClientIP"}
    return {"listeners": [listener("web", VIP, tuple(backends), check) | more, pinned]}


def backends_of(lab: Lab, made: Mirrored) -> list[str]:
    """Of each client, by one connection of its own."""
    found = []
    for address in lab.client_addresses:
        with made.connect(VIP, 81, source=(address, 0)) as connection:
            found.append(ask(connection))
    return found


def is_cut_off(connection: socket.socket) -> bool:
    """Is a request on it not answered?"""
    connection.settimeout(0.3)
    try:
        ask(connection)
    except TimeoutError:
        return True
    return False


def test_row_21_a_client_keeps_its_backend_before_during_and_after_a_transition(lab: Mirrored) -> None:
    lab.make(2, **listeners())
    before = backends_of(lab.lab, lab)
    assert set(before) == set(BACKENDS)
    with ExitStack() as closing:
        held = [closing.enter_context(lab.connect(VIP, 81, source=(a, 0))) for a in lab.lab.client_addresses[:60]]
        retired = lab.count("SetRetired")
        old, _ = lab.switch()
        assert lab.live(old) >= len(held)
        assert backends_of(lab.lab, lab) == before
        assert [ask(c) for c in held] == before[:60]
    lab.retired(retired + 1)
    assert backends_of(lab.lab, lab) == before


def test_row_23_a_backend_that_is_added_and_sources_that_lose_their_right_concern_both_sets(lab: Mirrored) -> None:
    check = {"type": "TCP", "intervalSeconds": 1, "timeoutSeconds": 1, "unhealthyThreshold": 1, "healthyThreshold": 1}
    lab.make(2, **listeners(BACKENDS[:2], check, onBackendDown="Reset"))
    lab.settle()
    allowed, other = lab.lab.client_addresses[:2]
    with ExitStack() as closing:

        def connect(source: str) -> socket.socket:
            return closing.enter_context(lab.connect(source=(source, 0)))

        old, old_of_other = [connect(allowed) for _ in range(12)], connect(other)
        served = [ask(c) for c in (*old, old_of_other)]
        _, second = lab.switch()
        young, young_of_other = [connect(allowed) for _ in range(12)], connect(other)
        served += [ask(c) for c in (*young, young_of_other)]
        lab.make(
            len(second),
            **listeners(BACKENDS[:3], check, onBackendDown="Reset", allowedSources=[allowed]),
        )
        eventually(lambda: ask(connect(allowed)) == BACKENDS[2], 5, "a new connection at the added backend")
        assert is_cut_off(old_of_other)
        assert is_cut_off(young_of_other)
        assert [ask(c) for c in (*old, *young)] == served[:12] + served[13:25]
        with dropped(lab, "server", f"ip daddr {BACKENDS[0]}"):
            for connections, by in ((old, served[:12]), (young, served[13:25])):
                down = [c for c, backend in zip(connections, by, strict=True) if backend == BACKENDS[0]]
                assert 0 < len(down) < len(connections)
                for connection in down:
                    eventually(partial(is_reset, connection), 10)
                for connection in set(connections) - set(down):
                    assert ask(connection) == BACKENDS[1]
        lab.make(len(second), **listeners())  # who is not allowed cannot say either that it has ended


def is_reset(connection: socket.socket) -> bool:
    """Was it ended by a reset, at a request?"""
    try:
        connection.settimeout(0.2)
        ask(connection)
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def test_row_27_with_keep_a_connection_goes_on_beyond_the_deadline(lab: Mirrored) -> None:
    deadline = 1
    lab.make(2, {"deadlineSeconds": deadline, "onDeadline": "Keep"}, **listeners())
    lab.settle()
    with lab.connect() as old:
        ask(old)
        lab.switch()
        over = time.monotonic() + deadline
        eventually(lambda: time.monotonic() > over and ask(old))
        assert lab.kept() == 1
    assert lab.count("SetEnded") == 0


def test_row_26_and_31_another_size_waits_until_the_first_set_is_idle(lab: Mirrored) -> None:
    lab.make(2, flowTable=FLOW_TABLE | {"tcpIdleTimeoutSeconds": 3}, **listeners())
    lab.settle()
    silent = [lab.connect() for _ in range(20)]
    for connection in silent:
        ask(connection)
    retired = lab.count("SetRetired")
    old, second = lab.switch(4)
    lab.scale(1)
    eventually(lambda: lab.condition("ScalingHeld").get("status") == "True", 5)
    sets = []

    def gone(many: int) -> bool:
        """Have so many sets gone? Notes how many there are."""
        sets.append(len(lab.status("demo")["sets"]))
        return lab.count("SetRetired") == retired + many

    with lab.connect() as young:
        eventually(lambda: ask(young) and gone(1), 15, "the first set has gone")
        eventually(lambda: ask(young) and lab.switched(), 15, "the size that was held is acted on")
        assert len(lab.slots() - old - second) == 1
        ask(young)
    eventually(lambda: gone(2), 15, "the second set has gone")
    assert max(sets) == 2
    lab.settle()
    assert len(lab.slots() - old - second) == len(lab.slots()) == 1
    for connection in silent:
        connection.close()
