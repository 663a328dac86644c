"""Alert rules and dashboard: each rule fires when it must, and nothing asks for what no program exports."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.charts.conftest import CHART, ROOT, Render
from tests.house.exported import of_the_agent, of_the_operator

from packetstack_core import abi
from packetstack_core.assignment import State

ALERTS_FILE = CHART / "files/alerts.yaml"
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(ALERTS_FILE.read_text())["groups"] for rule in group["rules"]}
DASHBOARD = json.loads((CHART / "files/dashboard.json").read_text())
RUNBOOKS = "https://github.com/packetstack/packetstack/blob/main/docs/alerts.md#"


def expressions() -> list[tuple[str, str]]:
    """Each PromQL text with the place that it stands at."""
    found = [(name, rule["expr"]) for name, rule in ALERTS.items()]
    return found + [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


LABELS_OF_THE_TARGET = {"job", "instance", "le"}


@pytest.mark.parametrize(("place", "expression"), expressions(), ids=[place for place, _ in expressions()])
def test_every_metric_and_label_that_is_asked_for_exists(place: str, expression: str) -> None:
    known = of_the_agent() | of_the_operator()
    used = re.findall(r"\b(packetstack_\w+)\{([^}]*)\}", expression)
    assert used or "up{" in expression
    assert len(re.findall(r"\bpacketstack_\w+\{?", expression)) == len(used), "each metric is asked for with its job"
    states = {str(state) for state in State}
    values = {
        "event": {n.removeprefix("PS_C_").lower() for n in abi.enum_names("ps_counter").values()},
        "state": states,
        "reason": {m for e in ("ps_counter", "ps_director_counter") for m in drops(e)},
    }
    for metric, matchers in used:
        assert metric in known, f"{place}: no program exports {metric}"
        assert "job=" in matchers
        for label, text in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"([^\"]*)\"", matchers):
            assert label in known[metric] | LABELS_OF_THE_TARGET, f"{place}: {metric} has no label {label}"
            if label in values:
                assert set(text.split("|")) <= values[label], f"{place}: {metric} has no {label} {text}"


def drops(enum: str) -> set[str]:
    """Reasons of an enum of counters."""
    return {n.split("DROP_", 1)[1].lower() for n in abi.enum_names(enum).values() if "DROP_" in n}


# ---- alerts ----------------------------------------------------------------------------------------------------


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    sections = re.findall(r"^## (PacketStack\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    assert sections == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == RUNBOOKS + name.lower()
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}


def test_every_alert_can_be_left_out(render: Render) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    names = schema["properties"]["monitoring"]["properties"]["alerts"]["properties"]["disabled"]["items"]["enum"]
    assert names == list(ALERTS)
    for without in [[], *([name] for name in names)]:
        objects = render(None, f'monitoring.alerts={{"enabled": true, "disabled": {json.dumps(without)}}}')
        rules = next(o for o in objects if o["kind"] == "PrometheusRule")["spec"]["groups"][0]["rules"]
        assert rules == [rule for name, rule in ALERTS.items() if name not in without]


AGENT = 'job="packetstack-agent", instance="10.0.0.1:9470"'
OPERATOR = 'job="packetstack-operator", instance="10.0.0.9:8080"'
A, B = OPERATOR + ', namespace="x", stack="a"', OPERATOR + ', namespace="x", stack="b"'

# Alert -> series that make it fire, the minute by which it must, its labels, and series (of another stack, or the same
# target in better times) that must not.
FIRING: dict[str, tuple[dict[str, str], int, dict[str, str], dict[str, str]]] = {
    "PacketStackOperatorDown": (
        {'up{job="packetstack-operator", instance="10.0.0.9:8080"}': "0x30"},
        6,
        {},
        {'up{job="packetstack-operator", instance="10.0.0.9:8080"}': "1x30"},
    ),
    "PacketStackAgentDown": (
        {f"up{{{AGENT}}}": "0x30"},
        6,
        {"job": "packetstack-agent", "instance": "10.0.0.1:9470"},
        {f"up{{{AGENT}}}": "1x10 0x3 1x17"},
    ),
    "PacketStackReconcileErrors": (
        {f'packetstack_reconcile_errors_total{{{OPERATOR}, reason="Forbidden"}}': "0+1x30"},
        16,
        {"reason": "Forbidden"},
        {f'packetstack_reconcile_errors_total{{{OPERATOR}, reason="Conflict"}}': "0x10 2x20"},
    ),
    "PacketStackCRDOutdated": (
        {f'packetstack_crd_outdated{{{OPERATOR}, kind="FlowTable"}}': "1x30"},
        11,
        {"kind": "FlowTable"},
        {f'packetstack_crd_outdated{{{OPERATOR}, kind="PacketStack"}}': "0x30"},
    ),
    "PacketStackNoEngine": (
        {
            f"packetstack_desired_engines{{{A}}}": "2x30",
            f'packetstack_engines{{{A}, state="Active"}}': "0x30",
            f'packetstack_engines{{{A}, state="Starting"}}': "2x30",
        },
        2,
        {"namespace": "x", "stack": "a"},
        {f"packetstack_desired_engines{{{B}}}": "0x30", f'packetstack_engines{{{B}, state="Active"}}': "0x30"},
    ),
    "PacketStackEnginesMissing": (
        {f"packetstack_desired_engines{{{A}}}": "3x30", f'packetstack_engines{{{A}, state="Active"}}': "2x30"},
        11,
        {"namespace": "x", "stack": "a"},
        {
            f"packetstack_desired_engines{{{B}}}": "3x30",
            f'packetstack_engines{{{B}, state="Active"}}': "2x5 3x25",
            f'packetstack_engines{{{B}, state="Draining"}}': "1x30",
        },
    ),
    "PacketStackDegraded": (
        {f'packetstack_condition{{{A}, type="Degraded"}}': "1x30"},
        11,
        {"namespace": "x", "stack": "a"},
        {
            f'packetstack_condition{{{B}, type="Degraded"}}': "0x30",
            f'packetstack_condition{{{B}, type="Available"}}': "1x30",
        },
    ),
    "PacketStackAutoscalerBlind": (
        {
            f'packetstack_condition{{{A}, type="ScalingActive"}}': "0x30",
            f"packetstack_desired_engines{{{A}}}": "2x30",
        },
        6,
        {"namespace": "x", "stack": "a"},
        {  # scaled to zero by hand
            f'packetstack_condition{{{B}, type="ScalingActive"}}': "0x30",
            f'packetstack_condition{{{B}, type="ScalingLimited"}}': "0x30",
            f"packetstack_desired_engines{{{B}}}": "0x30",
        },
    ),
    "PacketStackAtMaxReplicas": (
        {
            f'packetstack_autoscaler_decision{{{A}, step="proposed"}}': "9x30",
            f'packetstack_autoscaler_limit{{{A}, limit="max"}}': "8x30",
        },
        16,
        {"namespace": "x", "stack": "a"},
        {  # at the most, and that is enough
            f'packetstack_autoscaler_decision{{{B}, step="proposed"}}': "8x30",
            f'packetstack_autoscaler_limit{{{B}, limit="max"}}': "8x30",
        },
    ),
    "PacketStackFlapping": (
        {
            f'packetstack_node_desired_engines{{{AGENT}, stack="a"}}': "2x60",
            f'packetstack_node_desired_cores{{{AGENT}, stack="a"}}': "1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2x40",
        },
        14,
        {"stack": "a", "instance": "10.0.0.1:9470"},
        {  # up and down once
            f'packetstack_node_desired_engines{{{AGENT}, stack="b"}}': "1 2 3 4x20 3 2 1x30",
            f'packetstack_node_desired_cores{{{AGENT}, stack="b"}}': "1x60",
        },
    ),
    "PacketStackFlapping in a cluster": (
        {
            f"packetstack_desired_engines{{{A}}}": "2x60",
            f"packetstack_desired_cores{{{A}}}": "1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2x40",
        },
        14,
        {"namespace": "x", "stack": "a"},
        {  # up and down once
            f"packetstack_desired_engines{{{B}}}": "1 2 3 4x20 3 2 1x30",
            f"packetstack_desired_cores{{{B}}}": "1x60",
        },
    ),
    "PacketStackDrainStuck": (
        {f'packetstack_engines{{{A}, state="Draining"}}': "1x30"},
        11,
        {"namespace": "x", "stack": "a"},
        {f'packetstack_engines{{{B}, state="Draining"}}': "1x5 0x2 1x5 0x18"},
    ),
    "PacketStackOverloaded": (
        {
            f'packetstack_core_busy_cycles_total{{{AGENT}, stack="a", engine="1", core="0"}}': "0+54x40",
            f'packetstack_core_cycles_total{{{AGENT}, stack="a", engine="1", core="0"}}': "0+60x40",
        },
        22,
        {"stack": "a"},
        {
            f'packetstack_core_busy_cycles_total{{{AGENT}, stack="b", engine="1", core="0"}}': "0+30x40",
            f'packetstack_core_cycles_total{{{AGENT}, stack="b", engine="1", core="0"}}': "0+60x40",
        },
    ),
    "PacketStackDrops": (
        {
            f'packetstack_drops_total{{{AGENT}, stack="a", stage="engine", reason="no_backend"}}': "0+20x40",
            f'packetstack_engine_packets_total{{{AGENT}, stack="a", engine="1", event="received"}}': "0+1000x40",
        },
        17,
        {"stack": "a"},
        {
            f'packetstack_drops_total{{{AGENT}, stack="b", stage="engine", reason="no_flow"}}': "0+500x40",
            f'packetstack_drops_total{{{AGENT}, stack="b", stage="engine", reason="no_backend"}}': "0+5x40",
            f'packetstack_engine_packets_total{{{AGENT}, stack="b", engine="1", event="received"}}': "0+1000x40",
        },
    ),
    "PacketStackPortsExhausted": (
        {f'packetstack_drops_total{{{AGENT}, stack="a", stage="engine", reason="no_port"}}': "0+1x30"},
        12,
        {"stack": "a"},
        {f'packetstack_drops_total{{{AGENT}, stack="b", stage="engine", reason="no_port"}}': "7x30"},
    ),
    "PacketStackFlowTableFull": (
        {f'packetstack_drops_total{{{AGENT}, stack="a", stage="engine", reason="shard_full"}}': "0+1x30"},
        12,
        {"stack": "a"},
        {f'packetstack_drops_total{{{AGENT}, stack="b", stage="engine", reason="no_port"}}': "0+1x30"},
    ),
    "PacketStackBackendUnhealthy": (
        {f'packetstack_backend_flows{{{AGENT}, stack="a", backend="10.1.0.5|80", healthy="false"}}': "0x30"},
        11,
        {"stack": "a", "backend": "10.1.0.5|80"},
        {f'packetstack_backend_flows{{{AGENT}, stack="a", backend="10.1.0.6|80", healthy="true"}}': "3x30"},
    ),
    "PacketStackHandoverSlow": (
        {f'packetstack_handover_hold_seconds{{{AGENT}, stack="a"}}': "0.2x30"},
        6,
        {"stack": "a"},
        {f'packetstack_handover_hold_seconds{{{AGENT}, stack="b"}}': "0.02x30"},
    ),
    "PacketStackTransitionEndless": (
        {
            f'packetstack_draining_seconds{{{AGENT}, stack="a", set="1"}}': "4000+60x30",
            f'packetstack_kept_connections{{{AGENT}, stack="a", set="1"}}': "7x30",
        },
        8,
        {"stack": "a"},
        {
            f'packetstack_draining_seconds{{{AGENT}, stack="b", set="1"}}': "4000+60x30",
            f'packetstack_kept_connections{{{AGENT}, stack="b", set="1"}}': "900-10x30",
        },
    ),
    "PacketStackInvariantBroken": (
        {f'packetstack_drops_total{{{AGENT}, stack="a", stage="engine", reason="not_owner"}}': "0x5 1x25"},
        6,
        {"stack": "a", "reason": "not_owner"},
        {f'packetstack_drops_total{{{AGENT}, stack="b", stage="engine", reason="not_owner"}}': "1x30"},
    ),
}


def promtool(*words: str | Path) -> None:
    """Prometheus' own checks."""
    program = shutil.which("promtool")
    assert program, "promtool: not on PATH; install the Debian package prometheus (make setup does)"
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_the_rules() -> None:
    promtool("check", "rules", ALERTS_FILE)


def test_every_alert_is_tried() -> None:
    assert list(dict.fromkeys(which.split()[0] for which in FIRING)) == list(ALERTS)


@pytest.mark.parametrize("which", FIRING)
def test_an_alert_fires_when_it_must_and_only_then(which: str, tmp_path: Path) -> None:
    series, minute, labels, quiet = FIRING[which]
    name = which.split()[0]
    rule = ALERTS[name]
    text = rule["annotations"]["summary"] + rule["annotations"]["description"]
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= set(labels)

    def firing(minute: int, *expected: dict[str, str]) -> dict[str, Any]:
        shown = [", ".join(f'{k}="{v}"' for k, v in {**one, **rule["labels"]}.items()) for one in expected]
        samples = [{"labels": f'ALERTS{{alertname="{name}", alertstate="firing", {s}}}', "value": 1} for s in shown]
        expr = f'ALERTS{{alertname="{name}", alertstate="firing"}}'
        return {"expr": expr, "eval_time": f"{minute}m", "exp_samples": samples}

    def case(series: dict[str, str], *expected: dict[str, Any]) -> dict[str, Any]:
        given = [{"series": s, "values": v} for s, v in series.items()]
        return {"interval": "1m", "input_series": given, "promql_expr_test": list(expected)}

    both = quiet if set(quiet) & set(series) else {**series, **quiet}
    cases = [case(series, firing(minute, labels))]
    cases += [case(both, *([firing(29)] if both is quiet else [firing(minute, labels)]))]
    if "for" in rule:
        cases += [case(series, firing(0))]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS_FILE)], "evaluation_interval": "1m", "tests": cases}))
    promtool("test", "rules", file)


# ---- dashboard -------------------------------------------------------------------------------------------------


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) > 8
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]}
    assert len(places) == len(ids)
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"]
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "stack"]


def test_the_dashboard_reaches_grafana_unchanged(render: Render) -> None:
    objects = render(None, "monitoring.dashboard.enabled=true")
    [config] = [o for o in objects if o["kind"] == "ConfigMap"]
    assert json.loads(config["data"]["packetstack.json"]) == DASHBOARD


def test_prometheus_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    queries = [e.replace("$__rate_interval", "5m").replace("$stack", ".*") for _, e in expressions()]
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", file)
