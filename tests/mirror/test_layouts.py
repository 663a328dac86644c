"""A stack gets a build whose shards have another layout, and the one before again: its connections see nothing of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.lab.builds import OTHER, Builds
from tests.lab.mirrored import ALL_TCP, ALL_UDP, VIP, Mirrored, Wire, ask, mirrored, resets, strike
from tests.waiting import eventually

from packetstack_cli.traffic import Traffic
from packetstack_core import abi

pytestmark = pytest.mark.skipif(not OTHER.exists(), reason=f"{OTHER.name} is not built; run make build")
TRANSFER = {"strategy": "Transfer"}
STEPS = ("opened:1", "mirrored:40", "release:30", "alone:1")


@pytest.fixture(scope="module")
def made() -> Iterator[Mirrored]:
    with mirrored("pkm-layt") as made:
        yield made


@pytest.fixture
def installed(made: Mirrored) -> Iterator[Builds]:
    """This build is installed, and has made the stack; the next test begins with nothing."""
    found = Builds(made)
    found.start_agent()
    made.make(2, TRANSFER)
    made.wait_ready("demo")
    yield found
    made.down()


def upgrade(lab: Mirrored) -> str:
    """What the command says."""
    return lab.packetstack("upgrade", "demo")


def others(lab: Mirrored) -> set[int]:
    """Slots of the engines whose datapath is of the other build."""
    size = OTHER.stat().st_size
    assert size != abi.native("packetstack-datapath").stat().st_size
    return {e["slot"] for e in lab.engines() if e["pid"] and Path(f"/proc/{e['pid']}/exe").stat().st_size == size}


def test_up_and_back_down_across_shard_layouts_under_load_breaks_nothing(made: Mirrored, installed: Builds) -> None:
    lab = made
    wires = Wire(lab.lab, "client", "c0"), Wire(lab.lab, "server", "s0")
    for round_, other in enumerate((True, False)):
        old = lab.slots()
        traffic = Traffic(
            lab.lab, ALL_TCP, ALL_UDP, connections=2000, udp_flows=200, request_interval_ms=2000, udp_interval_ms=400,
            new_rate=40, ramp_seconds=2, name=f"round-{round_}",
        )  # fmt: skip
        traffic.wait_open()
        installed.install(other=other)
        said = upgrade(lab)
        assert "take new connections" in said, said
        lab.wait_switched()
        new = lab.slots() - old
        assert len(new) == 2
        time.sleep(2.5)  # each connection has its turn once more, and new ones come
        assert lab.live(old) >= 2000
        assert lab.counters(new)["flows_created"] > 0
        outcome = traffic.stop()
        print(said.strip(), outcome)
        assert (outcome.broken, outcome.never_opened) == (0, 0), outcome.what_broke()
        assert outcome.datagrams_duplicated == 0
        lab.retired(round_ + 1, 60)
        lab.settle()
        assert lab.slots() == new
    assert [resets(w.read()) for w in wires] == [[], []]
    drops = lab.status("demo")["drops"]["engine"]
    assert not any(drops.get(name, 0) for name in ("late", "not_owner", "park_full", "no_flow")), drops


def test_what_dies_while_two_layouts_serve_comes_back_with_its_own_build(made: Mirrored, installed: Builds) -> None:
    lab = made
    with ExitStack() as closing:
        held = [closing.enter_context(lab.connect(VIP, 80)) for _ in range(40)]
        for connection in held:
            ask(connection)
        old = lab.slots()
        installed.install(other=True)
        upgrade(lab)
        lab.wait_switched()
        new = lab.slots() - old
        young = [closing.enter_context(lab.connect(VIP, 80)) for _ in range(40)]
        for connection in (*held, *young):
            ask(connection)
        for whole in (False, True):
            for slot in (min(old), min(new)):
                strike(lab, slot, whole)
        installed.kill_agent()
        for connection in (*held, *young):
            ask(connection)
        installed.start_agent()
        lab.wait_ready("demo")
        for connection in (*held, *young):
            ask(connection)
        for slot in (max(old), max(new)):
            strike(lab, slot, whole=True)
        for connection in (*held, *young):
            ask(connection)
        assert others(lab) == new
        flows = lab.status("demo")
        assert sum(e["flows"] for e in flows["engines"] if e["slot"] in old) == 40
        assert sum(e["flows"] for e in flows["engines"] if e["slot"] in new) == 40
        for connection in held:
            connection.close()
        lab.retired(1, 60)
        lab.settle()
        for connection in young:
            ask(connection)


@pytest.mark.parametrize("step", STEPS)
def test_an_agent_that_dies_in_a_step_of_the_switch_is_followed(made: Mirrored, installed: Builds, step: str) -> None:
    lab = made
    with ExitStack() as closing:
        held = [closing.enter_context(lab.connect(VIP, 80)) for _ in range(20)]
        for connection in held:
            ask(connection)
        old = lab.slots()
        lab.client.call("leave")
        eventually(lambda: not lab.client.alive(), 10)
        installed.install(other=True)
        agent = installed.start_agent(die_at=step)
        lab.client.call("upgrade", name="demo")
        agent.wait(20)
        assert agent.returncode == -signal.SIGKILL, f"no switch came to {step}"
        installed.start_agent()
        lab.wait_switched()
        young = [closing.enter_context(lab.connect(VIP, 80)) for _ in range(10)]
        for connection in (*held, *young):
            ask(connection)
        assert others(lab) == lab.slots() - old
        for connection in held:
            connection.close()
        lab.retired(1, 60)
        for connection in young:
            ask(connection)


def test_an_upgrade_that_is_taken_back_at_once_leaves_the_build_of_before(made: Mirrored, installed: Builds) -> None:
    lab = made
    old = lab.slots()
    with lab.connect(VIP, 80) as held:
        ask(held)
        installed.install(other=True)
        said = lab.command("upgrade", str(min(old)))
        assert said.returncode == 1
        assert "a second set takes over with: packetstack upgrade demo" in said.stderr
        lab.client.call("upgrade", name="demo")
        installed.kill_agent()
        installed.install(other=False)
        installed.start_agent()
        lab.client.call("upgrade", name="demo")
        ask(held)
    lab.settle()
    assert others(lab) == set()
