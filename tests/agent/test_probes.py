"""What probes of backends say, and for whom. Answers and time are played."""

import asyncio
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from tests.model.node import PlayedStack, managed, resource

from packetstack_agent import probes
from packetstack_agent.health import Health, was_unhealthy
from packetstack_agent.journal import Journal
from packetstack_agent.managed import Stacks
from packetstack_agent.node import RunDirectory
from packetstack_agent.probes import Place, Prober, Verdict, Watched
from packetstack_core.resources import HealthCheck

DNS: Place = (ip_address("10.0.0.1"), 53)


def check(down: int = 1, up: int = 1, interval: int = 1) -> HealthCheck:
    return HealthCheck.model_validate({"intervalSeconds": interval, "unhealthyThreshold": down, "healthyThreshold": up})


@pytest.mark.parametrize(
    ("down", "up", "answers", "verdicts"),
    [
        (1, 1, "+-+-", "+-+-"),
        (3, 2, "++++", "++++"),
        (3, 2, "---", "++-"),
        (3, 2, "--+--+--", "++++++++"),  # never three in a row
        (3, 2, "---+-+-+", "++------"),  # never two in a row
        (3, 2, "---++---", "++--+++-"),
        (3, 1, "---+", "++-+"),
        (2, 3, "--++-+++", "+------+"),
        (1, 100, "-" + "+" * 100, "-" * 100 + "+"),
    ],
)
def test_a_verdict_changes_only_after_so_many_answers_in_a_row_that_contradict_it(
    down: int, up: int, answers: str, verdicts: str
) -> None:
    verdict, seen = Verdict(), ""
    for answer in answers:
        was = verdict.healthy
        assert verdict.add(answer == "+", check(down, up)) == (verdict.healthy != was)
        seen += "+" if verdict.healthy else "-"
    assert seen == verdicts


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> set[Place]:
    """Backends that answer no probe; all others do at once."""
    places: set[Place] = set()

    async def connects(place: Place, _seconds: float) -> bool:
        return place not in places

    monkeypatch.setattr(probes, "connects", connects)
    return places


@pytest.mark.looptime
async def test_how_one_stack_has_a_backend_checked_says_nothing_to_another(silent: set[Place]) -> None:
    silent.add(DNS)
    prober = Prober(lambda _watched, _healthy: None)
    slow = check(down=1, up=100, interval=3600)
    prober.watch([("one", DNS, check(down=3)), ("other", DNS, slow)])
    await asyncio.sleep(1.5)
    silent.clear()
    await asyncio.sleep(5)
    assert prober.healthy("one") == {(DNS, check(down=3)): True}, "two failures are not three"
    assert prober.healthy("other") == {(DNS, slow): False}
    prober.close()


def usable(stack: PlayedStack) -> list[bool]:
    return [bool(stack.usable(listener)) for listener in stack.resource.spec.listeners]


def listening(protocol: str, **more: Any) -> dict[str, Any]:
    backends = {"endpoints": [{"address": "10.0.0.1", "port": 53}]}
    name = protocol.lower()
    return {"name": name, "address": "192.0.2.10", "protocol": protocol, "port": 53, "backends": backends, **more}


async def test_a_probe_that_fails_takes_the_backend_only_from_listeners_that_ask_for_it(silent: set[Place]) -> None:
    stack = PlayedStack(resource(listeners=[listening("UDP"), listening("TCP")]))
    unchecked, checked = stack.resource.spec.listeners
    assert (unchecked.health_check.type, checked.health_check.type) == ("None", "TCP")
    stack.healthy = {(DNS, checked.health_check): False}
    assert usable(stack) == [True, False]
    stack.healthy = {(DNS, unchecked.health_check): False}
    assert usable(stack) == [True, True], "whoever asks for no probe is told of none"


@pytest.mark.looptime
async def test_a_backend_that_is_down_stays_so_when_its_check_is_changed_until_it_answers(silent: set[Place]) -> None:
    silent.add(DNS)
    changes: list[tuple[Watched, bool]] = []
    prober = Prober(lambda watched, healthy: changes.append((watched, healthy)))
    prober.watch([("web", DNS, check())])
    await asyncio.sleep(2)
    prober.watch([("web", DNS, check(down=2))])
    assert prober.healthy("web") == {(DNS, check(down=2)): False}
    silent.clear()
    await asyncio.sleep(2)
    assert prober.healthy("web") == {(DNS, check(down=2)): True}
    assert [healthy for _, healthy in changes] == [False, True]
    prober.close()


@pytest.mark.looptime
async def test_the_next_agent_knows_whose_check_had_failed(silent: set[Place], tmp_path: Path) -> None:
    silent.add(DNS)
    stacks = Stacks()
    health = Health(RunDirectory(tmp_path), stacks, Journal())
    fast, slow = check(), check(down=5, up=100)
    for name, wanted in (("one", fast), ("other", slow)):
        checked = wanted.model_dump(mode="json", by_alias=True)
        stacks[name] = managed(PlayedStack(resource(name, listeners=[listening("TCP", healthCheck=checked)])))
    health.watch()
    await asyncio.sleep(2)
    assert stacks["one"].stale
    assert not stacks["other"].stale
    health.close()
    record = RunDirectory(tmp_path).record.unhealthy
    assert was_unhealthy(record, ("one", DNS, fast))
    assert not was_unhealthy(record, ("other", DNS, slow))
    assert not was_unhealthy(record, ("one", DNS, slow))


def test_the_record_of_an_earlier_build_speaks_of_all_stacks() -> None:
    assert was_unhealthy([["10.0.0.1", 53]], ("any", DNS, check()))
    assert not was_unhealthy([["10.0.0.2", 53]], ("any", DNS, check()))
