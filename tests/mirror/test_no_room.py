"""What a second set of engines needs is not there: the first one serves on as if nobody had asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.lab.disk import fill, own_disk
from tests.lab.mirrored import VIP, Mirrored, ask, mirrored
from tests.waiting import eventually

CPUS = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def lab() -> Iterator[Mirrored]:
    with mirrored("pkm-room") as made:
        yield made


def untouched(lab: Mirrored) -> tuple[Any, ...]:
    """What nothing may have done to the first set while another cannot be made."""
    status = lab.status("demo")
    first = next(s["id"] for s in status["sets"] if s["state"] == "Current")
    engines = [(e["slot"], e["pid"], e["buckets"]) for e in status["engines"] if e["set"] == int(first)]
    return first, engines


@contextmanager
def asked_in_vain(
    lab: Mirrored, replicas: int, reason: str, message: str, remains: dict[str, int] | None = None
) -> Iterator[None]:
    """Another size is asked for and cannot be had; the block takes the wish back. `remains`: of one set alone."""
    before, remains = untouched(lab), remains or lab.remains()
    with ExitStack() as closing:
        held = [closing.enter_context(lab.connect(VIP, 80)) for _ in range(8)]
        lab.scale(replicas)
        found = eventually(lambda: no_room(lab), 15, "CapacityAvailable=False")
        assert found is not None
        assert (found["reason"], message in found["message"]) == (reason, True), found
        assert lab.condition("Progressing")["status"] == "True"
        check(held)
        with lab.connect(VIP, 80) as young:
            ask(young)
        assert untouched(lab) == before
        assert lab.mirrored() == 0
        yield
        check(held)
        lab.settle()
        eventually(lambda: lab.condition("CapacityAvailable")["status"] == "True", 5)
        check(held)
        assert untouched(lab) == before
    eventually(lambda: lab.remains() == remains, 5)
    assert lab.count("SetCurrent") == 0


def no_room(lab: Mirrored) -> dict[str, str] | None:
    """The condition, if it says so."""
    found = lab.condition("CapacityAvailable")
    return found if found["status"] == "False" else None


def check(held: Sequence[Any]) -> None:
    """All still work."""
    for connection in held:
        ask(connection)


def test_row_9_without_cpus_for_the_second_set_the_first_serves_on_and_the_wish_can_be_taken_back(
    lab: Mirrored,
) -> None:
    lab.make(1, engine={"cores": 1, "queuesPerCore": 2, "cpuPolicy": "Exclusive"})
    lab.settle()
    with asked_in_vain(lab, CPUS, "NoExclusiveCPU", "CPUs are free"):
        lab.scale(1)
    lab.down()


def test_row_9_without_memory_for_the_second_set_the_first_serves_on(lab: Mirrored) -> None:
    with own_disk(lab) as run:
        lab.make(2)
        lab.settle()
        remains = lab.remains()
        filler = fill(run)
        with asked_in_vain(lab, 3, "EngineFailed", "No space left on device", remains):
            lab.scale(2)
            filler.unlink()


def test_row_9_without_a_device_for_the_second_set_the_first_serves_on(lab: Mirrored) -> None:
    lab.make(2)
    lab.settle()
    mark = lab.engines()[0]["namespace"].rpartition("-")[0]
    here = {e["namespace"] for e in lab.engines()}
    taken = [p for n in range(1, 60) if (p := Path(f"/run/netns/{mark}-{n}")).name not in here]
    try:
        for path in taken:
            path.touch(exist_ok=False)
        with asked_in_vain(lab, 3, "EngineFailed", "exists already and is not ours"):
            lab.scale(2)
    finally:
        for path in taken:
            path.unlink(missing_ok=True)
    lab.down()
