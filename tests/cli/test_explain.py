"""`packetstack explain NAME`: the last decision of a stack's autoscaler, from the resource as agents and clusters show it."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from packetstack_cli import main as command
from packetstack_cli import shapes
from packetstack_cli.client import Client
from packetstack_core import reading
from packetstack_core.autoscaling import rounds, together
from packetstack_core.autoscaling.calculator import Scale
from packetstack_core.autoscaling.metrics import MetricError, Pod
from packetstack_core.autoscaling.options import State
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.autoscaling.vertical import Seen
from packetstack_core.load import EngineLoad, StackLoad

BUSY = {
    "type": "Engine",
    "engine": {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": 60}},
}
PACKETS = {
    "type": "Engine",
    "engine": {"name": "PacketsPerSecond", "target": {"type": "AverageValue", "averageValue": "1k"}},
}
QUEUED = {"type": "External", "external": {"metric": {"name": "q"}, "target": {"type": "Value", "value": "10"}}}
NOW = 1_790_000_000.0


def document(**changes: Any) -> dict[str, Any]:
    """A stack as its file says."""
    end = [{"address": "10.1.0.5", "port": 80}]
    autoscaling = {"minReplicas": 1, "maxReplicas": 3, "metrics": [BUSY, PACKETS], **changes}
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketStack",
        "metadata": {"name": "web"},
        "spec": {
            "replicas": 2,
            "listeners": [{"name": "http", "address": "192.0.2.10", "port": 80, "backends": {"endpoints": end}}],
            "snat": {"addresses": ["192.0.2.64/28"]},
            "autoscaling": autoscaling,
        },
    }


def decided(busy: float, packets: float, **changes: Any) -> dict[str, Any]:
    """The stack with the status after one decision over two engines."""
    made = document(**changes)
    names = ("web-1", "web-2")
    load = StackLoad(
        NOW,
        tuple(EngineLoad(i, n, "Active", True, 15.0, (busy,), (), 0, 0, packets, 0, 0) for i, n in enumerate(names, 1)),
    )
    spec, pods = reading.parse(made).spec, [Pod(n, ready="True") for n in names]
    answers = {2: MetricError("api_error", "nobody answers")}
    done = rounds.reconcile(spec, State(), Scale(2, 2), pods, load, NOW, answers)
    if done.decision.write is not None:
        done = rounds.written(done, NOW)
    shown = rounds.show(done, None, NOW).model_dump(mode="json", by_alias=True, exclude_none=True)
    known = [c.model_dump(mode="json", by_alias=True) for c in rounds.conditions(done.state)]
    other = {"type": "Available", "status": "True", "reason": "MinimumEnginesAvailable", "message": ""}
    return made | {"status": {"autoscaling": shown, "conditions": [other, *known]}}


@pytest.fixture
def explain(monkeypatch):
    """The command about a stack that an agent shows so."""

    def asking(item: dict[str, Any], *words: str) -> tuple[int, str]:
        def get(_client: Client, name: str) -> Any:
            assert name == "web"
            return [item]

        monkeypatch.setattr(Client, "get", get)
        done = CliRunner().invoke(command.main, ["explain", "web", *words])
        return done.exit_code, done.output if done.exit_code == 0 else str(done.exception.code)

    return asking


def test_it_says_what_each_metric_asked_for_and_what_cut_it(explain):
    code, text = explain(decided(0.6, 4000.0))
    assert code == 0
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "decided from 2 to 3 engines, by these figures since 2026-09-21T14:13:20Z" in lines
    assert "limits 1 to 3 engines" in lines
    assert "scaled 2026-09-21T14:13:20Z" in lines
    assert "engine metric Utilization 60 % 60 % 2 engines" in lines
    assert "engine metric PacketsPerSecond 4,000 1,000 8 engines asks for most" in lines
    assert "limit maxReplicas: 3 engines" in lines
    assert any(line.startswith("AbleToScale True SucceededRescale") for line in lines)
    assert any(line.startswith("ScalingLimited True TooManyReplicas") for line in lines)
    assert "MinimumEnginesAvailable" not in text, "that is not the autoscaler's"


def test_it_says_what_each_trigger_of_the_cores_said_and_what_stood_against_it(explain):
    triggers = [{"type": "Utilization"}, {"type": "PacketsPerSecond", "above": "100k"}]
    made = document(vertical={"maxCores": 4, "triggers": triggers})
    names = ("web-1", "web-2")
    load = StackLoad(
        NOW,
        tuple(EngineLoad(i, n, "Active", True, 15.0, (0.9,), (), 0, 0, 900.0, 0, 0) for i, n in enumerate(names, 1)),
    )
    seen = Seen(Size(2, 1), [Pod(n, ready="True") for n in names])
    done = together.written(together.reconcile(reading.parse(made).spec, together.State(), seen, 2, load, NOW), NOW)
    shown = together.show(done, None, NOW).model_dump(mode="json", by_alias=True, exclude_none=True)
    known = [c.model_dump(mode="json", by_alias=True) for c in together.conditions(done.state)]
    _, text = explain(made | {"status": {"autoscaling": shown, "conditions": known}})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(
        line.startswith("cores 2 x 1 core -> 2 x 1 core: 2 x 2 cores is asked for, but the number") for line in lines
    )
    assert "limits 1 to 4 cores; it writes spec.engine.cores" in lines
    assert "refused ChangeUnderWay" in lines
    assert "Utilization 90 75 35 3 asks for more" in lines
    assert "PacketsPerSecond 900 100,000 46,667 2 would do" in lines
    assert any(line.startswith("VerticalScalingLimited True ChangeUnderWay") for line in lines)


def test_it_says_why_a_metric_does_not_count(explain):
    _, text = explain(decided(0.1, 10.0, metrics=[BUSY, PACKETS, QUEUED]))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "decided stays at 2 engines, by these figures since 2026-09-21T14:13:20Z" in lines
    assert "scaled never by the autoscaler" in lines
    assert "engine metric Utilization 10 % 60 % 1 engine asks for most" in lines
    assert any("- 10 - nobody answers" in line for line in lines)
    assert any(line.startswith("why not scaled: invalid metrics (1 invalid out of 3)") for line in lines)


def test_it_names_the_schedule_and_the_window(explain):
    always = {"name": "day", "cron": "0 0 * * *", "durationSeconds": 86400, "minReplicas": 2, "maxReplicas": 5}
    _, text = explain(decided(0.1, 0.0, schedules=[always]))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "limits 2 to 5 engines, by schedule day" in lines
    assert "window scale-down window of 300 s: 2 engines" in lines


def test_it_says_that_it_is_paused(explain):
    _, text = explain(decided(1.0, 0.0, paused=True))
    assert "stays at 2 engines, paused, by these figures since" in text
    assert "paused, else" in text


def test_the_data_is_that_of_the_status(explain):
    item = decided(0.6, 4000.0)
    code, text = explain(item, "-o", "json")
    found = json.loads(text)
    assert code == 0
    assert found["autoscaling"] == item["status"]["autoscaling"]
    assert {c["type"] for c in found["conditions"]} == {"AbleToScale", "ScalingActive", "ScalingLimited"}


def test_of_a_cluster_it_says_the_same(explain):
    item = decided(0.6, 4000.0)
    assert explain(shapes.shown(item, None, [])) == explain(item)


def test_without_a_decision_it_says_so_in_one_line(explain):
    code, text = explain(document() | {"status": {"conditions": []}})
    assert (code, text) == (1, "stack web: its autoscaler has not decided yet; it does every 15 s")
    plain = document()
    del plain["spec"]["autoscaling"]
    code, text = explain(plain | {"status": {"conditions": []}})
    assert code == 1
    assert text.startswith("stack web: has no spec.autoscaling, so its size is what somebody wrote; to explain a flow")
    assert "\n" not in text
