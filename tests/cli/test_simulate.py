"""`packetstack simulate`: a series through the autoscaler, without an agent."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from packetstack_cli import simulate_sizes
from packetstack_cli.main import main
from packetstack_cli.simulate import Series, simulate
from packetstack_core.autoscalers import Autoscaling
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.reading import parse

BUSY = {
    "type": "Engine",
    "engine": {"name": "Utilization", "target": {"type": "Utilization", "averageUtilization": 60}},
}
FLOWS = {
    "type": "Engine",
    "engine": {"name": "NewFlowsPerSecond", "target": {"type": "AverageValue", "averageValue": "20k"}},
}
AUTOSCALING = {
    "minReplicas": 1,
    "maxReplicas": 4,
    "metrics": [BUSY],
    "behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}},
}
RAMP = "seconds,Utilization\n0,0.5\n60,1.1\n120,2.3\n240,1.1\n360,0.5\n600,0.5\n"


def stack(autoscaling):
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketStack",
        "metadata": {"name": "web"},
        "spec": {
            "listeners": [
                {
                    "name": "tcp",
                    "address": "192.0.2.10",
                    "protocol": "TCP",
                    "port": 80,
                    "backends": {"endpoints": [{"address": "10.71.5.1", "port": 8080}]},
                }
            ],
            "snat": {"addresses": ["198.51.100.0/30"]},
        }
        | ({"autoscaling": autoscaling} if autoscaling else {}),
    }


@pytest.fixture
def ask(tmp_path):
    """Runs the command on a stack and a series; returns its exit code and what it said."""

    def asking(*words, autoscaling=AUTOSCALING, series=RAMP):
        (tmp_path / "stack.yaml").write_text(yaml.safe_dump(stack(autoscaling)))
        (tmp_path / "load.csv").write_text(series)
        files = ["-f", str(tmp_path / "stack.yaml"), "--series", str(tmp_path / "load.csv")]
        done = CliRunner().invoke(main, ["simulate", *files, *words])
        return done.exit_code, done.output

    return asking


def test_a_ramp_is_followed_up_and_down_again(ask):
    code, out = ask("-o", "json")
    ticks = json.loads(out)
    assert code == 0
    assert [t["seconds"] for t in ticks] == [15.0 * i for i in range(41)]
    changes = [
        (t["seconds"], t["currentReplicas"], t["replicas"]) for t in ticks if t["currentReplicas"] != t["replicas"]
    ]
    assert changes == [(60.0, 1, 2), (120.0, 2, 4), (285.0, 4, 2), (405.0, 2, 1)]
    assert ticks[5]["activeEngines"] == 2
    assert {c["type"] for c in ticks[0]["conditions"]} == {"AbleToScale", "ScalingActive", "ScalingLimited"}


def test_the_text_has_a_line_for_each_change_and_why(ask):
    code, out = ask()
    assert code == 0
    assert "1 -> 2: engine metric Utilization 100/60 % -> 2" in out
    assert "scale-down window of 60 s -> 4" in out


def test_a_metric_that_does_not_answer_is_seen_and_shrinks_nothing(ask):
    series = "seconds,Utilization,NewFlowsPerSecond\n0,1.8,40000\n60,0.2,\n600,0.2,\n"
    two = AUTOSCALING | {"metrics": [BUSY, FLOWS]}
    code, out = ask("-o", "json", "--replicas", "3", autoscaling=two, series=series)
    last = json.loads(out)[-1]
    assert (code, last["replicas"]) == (0, 3)
    assert {"type": "ScalingActive", "status": "False", "reason": "FailedGetEngineMetric"} in last["conditions"]
    assert "no value at this time" in last["decision"]


def test_the_picture_is_a_png(ask, tmp_path):
    assert ask("--picture", str(tmp_path / "out.png"))[0] == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("series", "says"),
    [
        ("", "has the columns of an empty file; use seconds,Utilization"),
        ("seconds,Busy\n0,1\n", "has the columns seconds,Busy; use seconds,Utilization"),
        ("seconds,Utilization\n", "has no line with values; use at least one"),
        ("seconds,Utilization\n0,1,2\n", "line 2 has 3 cells; use 2"),
        ("seconds,Utilization\n0,1\n0,1\n", "line 3 has seconds '0'; use a number above"),
        ("seconds,Utilization\n,1\n", "line 2 has seconds ''"),
        ("seconds,Utilization\n0,-1\n", "line 2 has '-1'; use a number from 0"),
        ("seconds,Utilization\n0,nan\n", "line 2 has 'nan'"),
        ("seconds,Utilization\n0,much\n", "line 2 has 'much'"),
        ("seconds,Utilization\n0,1\n1e9,1\n", "more than 100000 decisions"),
    ],
)
def test_a_bad_series_is_refused_in_one_line(ask, series, says):
    code, out = ask(series=series)
    assert code == 1
    assert says in out
    assert out.count("\n") == 1


def test_a_stack_without_autoscaling_is_refused(ask):
    assert "stack web: has no spec.autoscaling" in ask(autoscaling=None)[1]


def test_a_schedule_moves_the_limits_while_it_lasts(ask):
    office = {"name": "office", "cron": "1 8 * * 1-5", "durationSeconds": 240, "minReplicas": 3}
    wanted = AUTOSCALING | {"schedules": [office]}
    code, out = ask(
        "-o", "json", "--begin", "2026-11-23T08:00:00", autoscaling=wanted, series="seconds,Utilization\n0,0.1\n600,0\n"
    )
    ticks = json.loads(out)
    assert code == 0
    assert [t["seconds"] for t in ticks if t["minReplicas"] == 3] == [60.0 + 15 * i for i in range(16)]
    assert [t["replicas"] for t in ticks if t["seconds"] in (45, 60, 285, 345)] == [1, 3, 3, 1]
    wrong = AUTOSCALING | {"schedules": [office | {"cron": "61 8 * * *"}]}
    assert 'cron "61 8 * * *" cannot be read' in ask(autoscaling=wrong)[1]


def test_a_paused_stack_keeps_its_size(ask):
    code, out = ask("-o", "json", autoscaling=AUTOSCALING | {"paused": True})
    ticks = json.loads(out)
    assert (code, {t["replicas"] for t in ticks}) == (0, {1})
    assert "paused, else 2" in ticks[10]["decision"]


def test_a_stack_that_the_file_does_not_have_is_refused(ask):
    assert "has no stack other" in ask("other")[1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.integers(0, 9000), min_size=1, max_size=40), st.integers(0, 6))
def test_any_series_stays_inside_the_limits(values, replicas):
    wanted = Autoscaling.model_validate({"minReplicas": 2, "maxReplicas": 6, "metrics": [BUSY]})
    loads = [None if value is None else Decimal(value) / 1000 for value in values]
    series = Series([15.0 * i for i in range(len(loads))], {"Utilization": loads})
    ticks = simulate(wanted, series, replicas, datetime(2026, 1, 5, tzinfo=UTC))
    assert len(ticks) == len(loads)
    assert all(2 <= tick.replicas <= 6 for tick in ticks) or replicas == 0
    assert all(tick.active <= tick.current for tick in ticks)


# ---- with triggers for the cores ---------------------------------------------------------------------------------

VERTICAL = {"maxCores": 4, "triggers": [{"type": "Utilization"}, {"type": "Drops", "above": "0.01"}]}
EACH = {"type": "Engine", "engine": {"name": "ActiveFlows", "target": {"type": "AverageValue", "averageValue": "10k"}}}
BOTH = AUTOSCALING | {"metrics": [EACH], "vertical": VERTICAL, "syncPeriodSeconds": 60}
DAY = "seconds,ActiveFlows,Utilization,DropRatio\n" + "".join(
    f"{hour * 3600},{flows},{busy},0\n"
    for hour, (flows, busy) in enumerate(
        [(6_000, 0.3)] * 7
        + [(14_000, 1.2), (26_000, 3.0)]
        + [(38_000, 6.5)] * 9
        + [(18_000, 2.0), (9_000, 0.6)]
        + [(5_000, 0.2)] * 5
    )
)
"""A day by hours: flows decide the number of engines, the work of a flow the cores of each."""


def test_row_7_a_day_with_both_goes_up_and_down_once_and_never_back_and_forth(ask, tmp_path):
    picture = tmp_path / "day.png"
    code, out = ask("-o", "json", "--picture", str(picture), autoscaling=BOTH, series=DAY)
    ticks = json.loads(out)
    assert (code, len(ticks)) == (0, 24 * 60 + 1)
    sizes = [(t["replicas"], t["cores"]) for t in ticks]
    changes = [b for a, b in pairwise(sizes) if a != b]
    assert len(changes) < 14, changes
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(sizes)), "one of the two at a time"
    noon, night = ticks[12 * 60], ticks[-1]
    assert (noon["replicas"], night["replicas"], night["cores"]) == (4, 1, 1)
    assert noon["busy"] < 0.76
    for part in ("replicas", "cores"):
        values = [t[part] for t in ticks]
        top = values.index(max(values))
        assert values[:top] == sorted(values[:top]), part
        assert values[top:] == sorted(values[top:], reverse=True), part
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_triggers_alone_use_all_cores_before_another_engine_and_say_how(ask):
    wanted = {"maxReplicas": 2, "vertical": VERTICAL}
    code, out = ask(
        autoscaling=wanted, series="seconds,Utilization,DropRatio\n0,0.5,0\n60,4.5,0\n600,,\n900,0.1,0\n1500,0,0\n"
    )
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any("1 x 1 core -> 1 x 2 cores: Utilization 100 % is above 75 %" in line for line in lines), out
    assert any("-> 2 x 4 cores" in line and "engines join or leave" in line for line in lines)
    assert any("-> 1 x 1 core: all triggers allow fewer cores" in line for line in lines)
    assert "maxSurge 1" in out


def test_a_trigger_that_does_not_answer_takes_no_core(ask):
    series = "seconds,Utilization,DropRatio\n0,3,0\n200,0.1,\n900,0.1,\n"
    code, out = ask("-o", "json", autoscaling={"maxReplicas": 1, "vertical": VERTICAL}, series=series)
    last = json.loads(out)[-1]
    assert (code, last["cores"]) == (0, 4)
    assert {"type": "VerticalScalingActive", "status": "False", "reason": "MissingSamples"} in last["conditions"]


def test_a_series_needs_a_column_for_each_trigger(ask):
    assert "use seconds,ActiveFlows,Utilization,DropRatio" in ask(autoscaling=BOTH)[1]
    wrong = {"name": "day", "cron": "61 8 * * *", "durationSeconds": 60, "cores": 2}
    timed = {
        "maxReplicas": 1,
        "vertical": {"maxCores": 2, "triggers": [{"type": "Utilization"}, {"type": "Schedule", "schedule": wrong}]},
    }
    assert 'schedule day: cron "61 8 * * *" cannot be read' in ask(autoscaling=timed)[1]


def test_engines_are_replaced_one_after_the_other_and_with_mirror_at_once():
    series = Series([0.0, 60.0, 90.0], {"Utilization": [Decimal(4)] * 3})
    for strategy, serving in (("Transfer", [4, 5, 6, 7, 8]), ("Mirror", [4, 8])):
        document = stack(
            {"maxReplicas": 4, "minReplicas": 4, "syncPeriodSeconds": 1, "vertical": {"maxCores": 2, "holdSeconds": 0}}
        )
        document["spec"] |= {"handover": {"strategy": strategy}}
        ticks = simulate_sizes.simulate(
            parse(document).spec, series, Size(4, 1), datetime(2026, 1, 5, tzinfo=UTC), 1, 5
        )
        assert list(dict.fromkeys(t.serving for t in ticks)) == serving
