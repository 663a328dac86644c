"""Agent, datapaths and engines of either set are killed while one set takes over from another: no connection breaks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from tests.lab.mirrored import ALL_TCP, ALL_UDP, VIP, Mirrored, Wire, ask, mirrored, resets, strike
from tests.waiting import eventually

from packetstack_cli.traffic import Traffic


@pytest.fixture(scope="module")
def made() -> Iterator[Mirrored]:
    with mirrored("pkm-dead") as made:
        made.make(2)
        yield made


def kill_agent(lab: Mirrored) -> None:
    """It is gone."""
    agent = lab.client.agent_pid()
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{agent}/fd/0").exists())


def start_agent(lab: Mirrored) -> None:
    """Another one takes over."""
    lab.packetstack("upgrade", "--agent")


def has_left(lab: Mirrored, slots: set[int], connections: int) -> bool:
    """Do these engines have as many?"""
    return lab.live(slots) == connections


def test_row_32_an_agent_killed_while_a_set_drains_goes_on_where_it_was(lab: Mirrored) -> None:
    with ExitStack() as closing:
        held = [closing.enter_context(lab.connect(VIP, 80)) for _ in range(60)]
        old, new = lab.switch(3)
        retired = lab.count("SetRetired")
        young = []
        for n in range(2):
            kill_agent(lab)
            young += [closing.enter_context(lab.connect(VIP, 80)) for _ in range(10)]
            for connection in held[30 * n :] + young:
                ask(connection)
            for connection in held[30 * n : 30 * n + 30]:
                connection.close()
            left = 60 - 30 * (n + 1)
            start_agent(lab)
            assert lab.slots() == old | new if left else lab.slots() >= new
            for connection in held[30 * n + 30 :] + young:
                ask(connection)
            eventually(partial(has_left, lab, old, left), 15)
        lab.retired(retired + 1)
        lab.settle()
        assert lab.slots() == new
        for connection in young:
            ask(connection)


def test_row_32_datapaths_and_engines_killed_before_and_after_the_switch_break_nothing(lab: Mirrored) -> None:
    wires = Wire(lab.lab, "client", "c0"), Wire(lab.lab, "server", "s0")
    retired = lab.count("SetRetired")
    before = Traffic(
        lab.lab, ALL_TCP, ALL_UDP, connections=300, udp_flows=60, request_interval_ms=500, udp_interval_ms=200,
        new_rate=20, ramp_seconds=0.5, name="before",
    )  # fmt: skip
    before.wait_open()
    old = lab.slots()
    lab.scale(2)
    first = eventually(lambda: next((e for e in lab.engines() if e["slot"] not in old and e["initPid"]), None), 10)
    assert first is not None
    os.killpg(first["initPid"], signal.SIGKILL)
    assert not lab.switched()
    lab.wait_switched()
    new = lab.slots() - old
    assert len(new) == 2
    for slots in (new, old):
        for whole in (False, True):
            strike(lab, min(slots), whole)
    time.sleep(1)  # each connection has its turn once more
    outcome = before.stop()
    print(outcome)
    lab.retired(retired + 1)
    lab.settle()
    assert outcome.never_opened == 0
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_duplicated == 0
    assert [resets(w.read()) for w in wires] == [[], []]
