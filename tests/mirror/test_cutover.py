"""Openers by the thousand, while all buckets are switched to another set of engines."""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.lab.flooded import flood, source_route
from tests.lab.mirrored import ACK, FLOW_TABLE, SYN, Mirrored, Wire, mirrored

SECONDS = 60.0
"""At most: the openers end a second after the last bucket was switched."""


@pytest.fixture
def node() -> Iterator[Mirrored]:
    """The server's SYN-ACKs are never sent again, and the clients have no kernel that could answer."""
    with mirrored("pkm-cut") as made:
        source_route(made.lab)
        yield made


@pytest.mark.parametrize("rate", [2_000, pytest.param(20_000, marks=pytest.mark.soak)])
def test_row_15_each_opener_over_the_switch_gets_one_answer_with_one_number(node: Mirrored, rate: int) -> None:
    node.make(2, flowTable={**FLOW_TABLE, "maxFlows": 1 << 20})
    node.settle()
    wire = Wire(node.lab, "client", "c0")
    openers = flood(node.lab, "syn", rate, SECONDS, seed=15)
    old, new = node.switch(3)
    time.sleep(1)  # of openers that only the second set takes
    assert openers.running
    report = openers.stop()
    taken = node.live(old), node.live(new)
    answers: dict[tuple[str, int, int], list[int]] = {}
    for s in wire.read():
        if not s.outgoing and s.flags & (SYN | ACK) == SYN | ACK:
            answers.setdefault((s.destination, s.dport, struct.unpack("!I", s.same[8:12])[0]), []).append(s.number)
    again = Counter(len(numbers) for numbers in answers.values())
    print(f"{report}; taken by each set: {taken}; {len(answers)} answered; by the number of answers: {again}")
    named = {name: n for reasons in node.status("demo")["drops"].values() for name, n in reasons.items() if n}
    print({**named, **{name: n for name, n in node.lab.device_drops().items() if n}})
    assert min(taken) > rate / 2, "both sets took openers"
    assert set(again) == {1}, "nobody was answered twice"
    assert len(answers) == report["sent"]
