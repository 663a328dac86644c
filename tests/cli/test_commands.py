"""What the commands print about a running stack, and how they refuse."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from packetstack_cli import preflight_host, views
from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_cli.traffic import Servers, Traffic

ROOT = Path(__file__).parents[2]
STACK = {
    "apiVersion": "packetstack.io/v1alpha1",
    "kind": "PacketStack",
    "metadata": {"name": "web"},
    "spec": {
        "replicas": 2,
        "engine": {"cores": 2, "queuesPerCore": 1, "cpuPolicy": "Shared"},
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
        "flowTable": {"buckets": 256, "maxFlows": 4096},
    },
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A stack under a little traffic."""
    with Lab("a6-cli", client_addresses=1) as made:
        Servers(made)
        file = made.directory / "stack.json"
        file.write_text(json.dumps(STACK))
        made.packetstack("up", str(file), "--uplink", NODE_UPLINK)
        traffic = Traffic(made, ["192.0.2.10:80"], connections=20, request_interval_ms=50, seconds=120)
        traffic.wait_open()
        yield made
        assert traffic.stop().broken == 0


def said(lab: Lab, *words: str) -> tuple[int, str]:
    """Exit code and standard error of a command that refuses."""
    done = lab.run("node", *lab.command(*words), check=False)
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("get",), list), (("get", "web"), dict), (("describe", "web"), dict), (("top",), list), (("events",), list),
        (("explain", "web", "tcp", "10.0.0.1:1", "192.0.2.10:80"), dict), (("top", "web", "--once"), list),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_data_is_the_same_as_json_and_as_yaml(lab: Lab, command: tuple[str, ...], kind: type) -> None:
    as_json = json.loads(lab.packetstack(*command, "-o", "json"))
    as_yaml = yaml.safe_load(lab.packetstack(*command, "-o", "yaml"))
    assert isinstance(as_json, kind)
    assert shape(as_json) == shape(as_yaml)
    assert lab.packetstack(*command).strip()


def shape(value: Any) -> Any:
    """Structure without the numbers, which change under traffic."""
    if isinstance(value, dict):
        varying = ("holdsMilliseconds", "lastMoves", "maxOverMean")
        return {k: None if k in varying else shape(v) for k, v in value.items()}
    return [shape(v) for v in value] if isinstance(value, list) else type(value)


def test_the_document_that_get_shows_can_be_applied_again(lab: Lab) -> None:
    shown = json.loads(lab.packetstack("get", "web", "-o", "json"))
    del shown["status"]
    file = lab.directory / "again.json"
    file.write_text(json.dumps(shown))
    assert "unchanged" in lab.packetstack("up", str(file))


def test_explain_names_bucket_owner_flow_and_backend_of_a_live_connection(lab: Lab) -> None:
    line = lab.run("client", "ss", "-Htn", "state", "established", "dst", "192.0.2.10").stdout.splitlines()[0]
    source = line.split()[2]
    found = json.loads(lab.packetstack("explain", "web", "tcp", source, "192.0.2.10:80", "-o", "json"))
    assert found["flow"]["backend"] == "10.71.5.1 port 8080"
    assert found["flow"]["state"] == "established"
    port = int(found["flow"]["snat"].split()[-1])
    assert port % 256 == found["bucket"], "the SNAT port carries the bucket"
    status = json.loads(lab.packetstack("get", "web", "-o", "json"))["status"]
    assert str(found["owner"]["slot"]) in status["owners"]
    text = lab.packetstack("explain", "web", f"tcp {source} 192.0.2.10:80")
    assert f"bucket {found['bucket']} -> engine {found['owner']['slot']}, which keeps this flow" in text


def test_explain_tells_what_a_new_flow_and_a_foreign_one_would_meet(lab: Lab) -> None:
    assert "no such flow yet" in lab.packetstack("explain", "web", "tcp", "10.9.9.9:9", "192.0.2.10:80")
    assert "not our traffic" in lab.packetstack("explain", "web", "udp", "10.9.9.9:9", "192.0.2.10:80")


def test_top_shows_engines_cores_and_queues(lab: Lab) -> None:
    shown = lab.packetstack("top", "--once")
    for word in ("ENGINE", "CORE", "QUEUE", "BUSY", "FLOWS", "PACKETS/S", "2/2 engines"):
        assert word in shown
    assert re.search(r"^MOVED +WHAT +WHY *\n.* +\d+ buckets +as planned *$", shown, re.MULTILINE)


def test_top_lists_the_hottest_queues_first_and_what_no_move_helps() -> None:
    def queue(number: int, busy: float) -> dict[str, Any]:
        return {"queue": number, "busy": busy, "packetsPerSecond": 1e4 * busy, "depth": 10 * number, "parked": 0}

    cores = [
        {"core": c, "cpu": c, "busy": 0.5, "queues": [queue(2 * c, 0.1 * c), queue(2 * c + 1, 0.4)]} for c in (0, 1)
    ]
    engine = {
        "slot": 3,
        "state": "Active",
        "ready": True,
        "buckets": 1,
        "flows": 0,
        "packetsPerSecond": 9e3,
        "busy": 0.5,
    }
    status = {
        "engines": [engine | {"pid": 1, "cores": cores}],
        "readyReplicas": 1,
        "flows": 0,
        "rebalance": {"lastMoves": [], "elephants": [{"bucket": 7, "engine": 3, "load": 0.9}]},
    }
    item = {"metadata": {"name": "web"}, "spec": {"replicas": 1}, "status": status}
    with views.console.capture() as caught:
        views.console.print(views.top([item]))
    shown = caught.get()
    hot = [line.split() for line in shown.partition("HOT QUEUE")[2].splitlines()[1:4]]
    assert hot == [["1", "3", "0", "40%", "4,000", "10"], ["3", "3", "1", "40%", "4,000", "30"],
                   ["2", "3", "1", "10%", "1,000", "20"]]  # fmt: skip
    assert "elephant: bucket 7 of engine 3 takes 90% of a core" in shown


def test_describe_shows_listeners_backends_capacity_and_conditions(lab: Lab) -> None:
    shown = lab.packetstack("describe", "web")
    for word in ("2 ready of 2", "capacity", "TCP 192.0.2.10 port 80", "10.71.5.1 port 8080", "CapacityAvailable"):
        assert word in shown
    assert re.search(r"flows +20 live", shown)


def test_events_and_logs_tell_what_happened(lab: Lab) -> None:
    assert "EngineReady" in lab.packetstack("events", "web")
    assert "EngineReady" in lab.packetstack("logs")
    slot = json.loads(lab.packetstack("get", "web", "-o", "json"))["status"]["engines"][0]["slot"]
    (lab.run_directory / f"engines/{slot}/log").write_text("")
    silent = lab.run("node", *lab.command("logs", str(slot)))
    assert (silent.stdout, silent.stderr) == ("", f"engine {slot}: has written nothing yet\n")


def test_every_metric_is_documented_and_every_documented_one_is_there(lab: Lab) -> None:
    shown = set(re.findall(r"^# TYPE (packetstack_\w+)", lab.packetstack("metrics"), re.MULTILINE))
    agents = (ROOT / "docs/metrics.md").read_text().partition("\n## The operator")[0]
    written = set(re.findall(r"^\| `(packetstack_\w+)`", agents, re.MULTILINE))
    assert {name for name in written if not name.startswith("packetstack_engine_core_")} == shown
    assert 'packetstack_flows{engine="' in lab.packetstack("metrics")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("get", "no"), "stack no: not found; stacks of this agent: web"),
        (("describe", "no"), "stack no: not found; stacks of this agent: web"),
        (("down", "no"), "stack no: not found; stacks of this agent: web"),
        (("scale", "no", "--replicas", "1"), "stack no: not found; stacks of this agent: web"),
        (("events", "no"), "stack no: not found; stacks of this agent: web"),
        (("explain", "web", "tcp", "[2001:db8::2]:1", "192.0.2.10:80"), 'flow "tcp 2001:db8::2 192.0.2.10": is of two'),
        (("logs", "999"), "engine 999: has no log; engines: "),
        (("move", "web", "--buckets", "0-9", "--engine", "999"), "engine 999: is not an active engine of stack web"),
        (("move", "web", "--queue", "999:0", "--core", "0"), "engine 999: is not an active engine of stack web"),
        (("explain", "web", "sctp", "10.0.0.1:1", "192.0.2.10:80"), 'flow "sctp 10.0.0.1 192.0.2.10": not a flow'),
        (("explain", "web", "tcp", "here:1", "192.0.2.10:80"), 'flow "tcp here 192.0.2.10": not a flow'),
        (("up", "/dev/null"), "/dev/null: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_there_is_named_in_one_line(lab: Lab, command: tuple[str, ...], line: str) -> None:
    code, text = said(lab, *command)
    assert code == 1
    assert text.startswith(line)
    assert "\n" not in text


def test_a_wrong_queue_core_or_bucket_is_named(lab: Lab) -> None:
    slot = json.loads(lab.packetstack("get", "web", "-o", "json"))["status"]["engines"][0]["slot"]
    for words, right in (
        (("--queue", f"{slot}:9", "--core", "0"), "0 to 1"),
        (("--queue", f"{slot}:0", "--core", "9"), "0 to 1"),
        (("--queue", f"{slot}:0", "--core", "-1"), "0 to 1"),
        (("--buckets", "0-256", "--engine", str(slot)), "buckets 0 to 255"),
        (("--buckets", "0", "--engine", str(slot), "--to-queue", "2"), "0 to 1"),
    ):
        code, text = said(lab, "move", "web", *words)
        assert code == 1, words
        assert right in text
        assert "\n" not in text


def test_without_an_agent_it_says_how_to_start_one(lab: Lab, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "packetstack_cli.main", "--run-dir", str(tmp_path / "none")]
    for words in (["get"], ["down"], ["events"], ["scale", "web", "--replicas", "1"]):
        done = lab.run("node", *line, *words, check=False)
        assert done.returncode == 1
        assert "start one with: packetstack up FILE" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["up", "check"])
def test_two_files_with_a_stack_of_one_name_are_refused(lab: Lab, verb: str) -> None:
    files = [str(ROOT / "examples" / name) for name in ("web.yaml", "autoscaled.yaml")]
    assert said(lab, verb, *files) == (1, f"{files[1]}: stack web is in {files[0]} too; use a name once")


def test_check_reads_a_file_and_changes_nothing(lab: Lab) -> None:
    shown = yaml.safe_load(lab.packetstack("check", str(ROOT / "examples/demo.yaml")))
    assert shown["spec"]["replicas"] == 2
    assert lab.packetstack("get").count("web") == 1


def test_check_tells_of_timers_below_what_rfcs_want_and_leaves_its_output_to_be_read(lab: Lab, tmp_path: Path) -> None:
    stack = yaml.safe_load((ROOT / "examples/web.yaml").read_text())
    stack["spec"]["flowTable"] = {"udpIdleTimeoutSeconds": 30}
    (tmp_path / "web.yaml").write_text(yaml.safe_dump(stack))
    done = lab.run("node", *lab.command("check", str(tmp_path / "web.yaml")))
    assert yaml.safe_load(done.stdout)["spec"]["flowTable"]["udpIdleTimeoutSeconds"] == 30
    said = "stack web: note: spec.flowTable.udpIdleTimeoutSeconds: 30 is below the 120 of RFC 4787 (REQ-5); "
    assert done.stderr == f"{said}flows end that are only silent\n"


def test_preflight_finds_a_host_that_forwards_fit_and_one_that_does_not_unfit(lab: Lab) -> None:
    assert "net.ipv4.ip_forward=1" in lab.packetstack("preflight")
    line = [sys.executable, "-m", "packetstack_cli.main", "preflight"]
    done = lab.run("client", *line, check=False)
    assert done.returncode == 1
    [missing] = [text for text in done.stdout.splitlines() if text.startswith("missing")]
    assert missing.split("  ")[-1] == "net.ipv4.ip_forward=0; sysctl -w net.ipv4.ip_forward=1"


def test_preflight_names_a_kernel_whose_packet_handlers_can_be_interrupted(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/realtime").write_text("1\n")
    assert [c.result for c in preflight_host.examine(root=tmp_path) if "PREEMPT_RT" in c.message] == ["missing"]
    (tmp_path / "sys/kernel/realtime").unlink()
    assert [c.result for c in preflight_host.examine(root=tmp_path) if "PREEMPT_RT" in c.message] == ["ok"]


def test_logs_take_an_engine_by_its_name_too(lab: Lab) -> None:
    engine = json.loads(lab.packetstack("get", "web", "-o", "json"))["status"]["engines"][0]
    assert lab.packetstack("logs", engine["name"]) == lab.packetstack("logs", str(engine["slot"]))


def test_events_are_not_cut_on_a_narrow_terminal() -> None:
    happened = {"time": 0.0, "type": "Warning", "stack": "web", "reason": "SuccessfulRescale", "message": "word " * 40}
    console = Console(width=80)
    with console.capture() as caught:
        console.print(views.events([happened]))
    shown = caught.get()
    assert "…" not in shown
    assert shown.count("word") == 40
