"""A stack comes and goes: what it leaves, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab.node import BACKENDS, BACKENDS6, VIP, VIP6, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_cli.lab import NODE_UPLINK


@pytest.fixture
def clean(node: Node) -> Iterator[dict[str, Any]]:
    """Traces before the test; whatever the test does, nothing may be left after `down`."""
    before = node.traces()
    yield before
    node.command("down", "--all", "--yes")
    assert node.traces() == before


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: (a[k], b[k]) for k in a if a[k] != b.get(k)}


def test_up_serves_and_down_leaves_nothing(node: Node, clean: dict[str, Any]) -> None:
    node.up(stack())
    assert node.curl() in BACKENDS
    assert node.curl(VIP6) in BACKENDS6
    assert node.lab.run("client", "ping", "-c3", "-i0.05", "-W1", VIP).stdout.count("bytes from") == 3
    pings = node.lab.run("client", "ping", "-c3", "-i0.05", "-W1", VIP6).stdout
    assert pings.count("bytes from") == 3
    assert "DUP" not in pings
    said = node.packetstack("down")
    assert said == "stack web: removed\n"
    assert not differences(clean, node.traces())


@pytest.mark.parametrize("victims", [("agent",), ("engine",), ("agent", "engine")], ids="+".join)
def test_down_leaves_nothing_after_a_crash(node: Node, clean: dict[str, Any], victims: tuple[str, ...]) -> None:
    node.up(stack())
    engines = node.status()["engines"]
    if "agent" in victims:
        agent = int((node.lab.run_directory / "agent.pid").read_text())
        os.kill(agent, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{agent}/exe").exists() or not node.client.alive())
    if "engine" in victims:
        os.kill(engines[0]["pid"], signal.SIGKILL)
    if victims != ("agent", "engine"):
        assert node.curl() in BACKENDS, "engines serve without their agent, and come back with it"
    node.packetstack("down")
    assert not differences(clean, node.traces())


@pytest.mark.parametrize("pause_seconds", [0.0, 0.06, 0.12, 0.2])
@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "killed"])
def test_down_leaves_nothing_of_engines_that_are_being_made(
    node: Node, clean: dict[str, Any], pause_seconds: float, crash: bool
) -> None:
    node.up(stack(replicas=1))
    node.client.call("scale", name="web", replicas=4)
    time.sleep(pause_seconds)
    if crash:
        os.kill(int((node.lab.run_directory / "agent.pid").read_text()), signal.SIGKILL)
    node.packetstack("down", "--yes")
    assert not differences(clean, node.traces())


def test_down_leaves_nothing_of_an_agent_that_died_while_it_wrote_its_record(node: Node, clean: dict[str, Any]) -> None:
    node.up(stack())
    os.kill(int((node.lab.run_directory / "agent.pid").read_text()), signal.SIGKILL)
    (node.lab.run_directory / "state.new").write_text("{")
    node.packetstack("down", "--yes")
    assert not differences(clean, node.traces())


def test_two_ups_at_once_start_one_agent(node: Node, clean: dict[str, Any]) -> None:
    file = node.lab.directory / "stack.yaml"
    file.write_text(json.dumps(stack()))
    line = node.lab.command("up", str(file))
    both = [node.lab.start("node", *line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for command in both:
        out, error = command.communicate(timeout=30)
        assert (command.returncode, error) == (0, ""), out
    assert node.curl() in BACKENDS


def test_up_again_changes_nothing(node: Node, clean: dict[str, Any]) -> None:
    node.up(stack())
    before = node.status()
    assert "unchanged" in node.up(stack())
    after = node.status()
    for same in ("flowTableGeneration", "configurationGeneration", "owners"):
        assert after[same] == before[same]
    assert [e["pid"] for e in after["engines"]] == [e["pid"] for e in before["engines"]]


def test_down_tells_how_many_flows_end(node: Node, clean: dict[str, Any]) -> None:
    node.up(stack())
    with node.connect() as one, node.connect() as two:
        assert {ask(one), ask(two)} <= set(BACKENDS)
        done = node.command("down")
    assert done.returncode == 0
    assert done.stderr == "2 live flows will end\n"


def test_removing_one_of_two_stacks_leaves_the_other_alone(node: Node, clean: dict[str, Any]) -> None:
    other = stack(
        "other", replicas=1, listeners=[listener("a", "192.0.2.20", BACKENDS)], snat={"addresses": ["198.51.100.8/31"]}
    )
    node.up(stack(), other)
    with node.connect() as connection, node.connect("192.0.2.20") as doomed:
        backend = ask(connection)
        ask(doomed)
        before = node.status()
        assert node.command("down", "other").returncode == 0
        assert ask(connection) == backend
        after = node.status()
        assert after["owners"] == before["owners"]
        assert after["flowTableGeneration"] == before["flowTableGeneration"]
        conflicting = stack("third", listeners=[listener("a", VIP, BACKENDS)], snat={"addresses": ["198.51.100.8/31"]})
        file = node.lab.directory / "third.yaml"
        file.write_text(json.dumps(conflicting))
        assert f"AddressConflict: {VIP} belongs to stack web" in node.refused("up", str(file))
        assert ask(connection) == backend
    assert [s["metadata"]["name"] for s in node.client.call("get")] == ["web"]


# ---- refusals: one line, exit code 1, nothing half-made ---------------------------------------------------------


def refuse(node: Node, clean: dict[str, Any], document: dict[str, Any] | None = None, *options: str) -> str:
    file = node.lab.directory / "bad.yaml"
    file.write_text(json.dumps(document or stack()))
    said = node.refused("up", str(file), *options)
    assert not differences(clean, node.traces())
    return said


def test_a_missing_interface_is_refused(node: Node, clean: dict[str, Any]) -> None:
    said = refuse(node, clean, None, "--uplink", "nosuch0")
    assert said == "interface nosuch0: not found; this node has lo, up0, dn0"


def test_an_uplink_with_another_program_is_refused(node: Node, clean: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text(
        '__attribute__((section("xdp"), used)) int other(void *c) { return 2; }\n'
        '__attribute__((section("license"), used)) char l[] = "GPL";\n'
    )
    program = tmp_path / "other.o"
    subprocess.run(["clang", "-O2", "-target", "bpf", "-c", source, "-o", program], check=True)
    node.lab.run("node", "ip", "link", "set", "dev", NODE_UPLINK, "xdpdrv", "obj", str(program), "sec", "xdp")
    try:
        said = refuse(node, node.traces(), None, "--uplink", NODE_UPLINK)
        assert f"{NODE_UPLINK}:" in said
        assert "XDP program" in said
    finally:
        node.lab.run("node", "ip", "link", "set", "dev", NODE_UPLINK, "xdpdrv", "off")


def test_nobody_may_neither_start_nor_ask(node: Node, clean: dict[str, Any]) -> None:
    # Imported first: nobody may not be allowed to read where the package lies.
    as_nobody = (
        "import os, packetstack_cli.main as cli; os.setgroups([]); os.setresgid(*[65534] * 3);"
        " os.setresuid(*[65534] * 3); cli.main(prog_name='packetstack')"
    )
    nobody = [sys.executable, "-c", as_nobody, "--run-dir", str(node.lab.run_directory)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write((Path(__file__).parents[2] / "examples/demo.yaml").read_text())
        file.flush()
        Path(file.name).chmod(0o644)
        done = node.lab.run("node", *nobody, "up", file.name, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "needs root" in done.stderr
    node.up(stack())
    done = node.lab.run("node", *nobody, "get", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no permission; run as root" in done.stderr


def test_a_local_address_is_refused(node: Node, clean: dict[str, Any]) -> None:
    said = refuse(node, clean, stack(listeners=[listener("a", "10.71.2.1", BACKENDS)]))
    assert said.startswith("address 10.71.2.1: is in use by this node on dn0")


def test_a_prefix_routed_elsewhere_is_refused(node: Node, clean: dict[str, Any]) -> None:
    node.lab.run("node", "ip", "route", "add", f"{VIP}/32", "via", "10.71.2.2")
    try:
        assert refuse(node, node.traces()).startswith(f"prefix {VIP}/32: is routed to dn0 already")
    finally:
        node.lab.run("node", "ip", "route", "del", f"{VIP}/32")


def test_a_node_that_does_not_forward_is_refused(node: Node, clean: dict[str, Any]) -> None:
    node.lab.sysctl("node", {"net.ipv4.ip_forward": "0"})
    try:
        assert "sysctl -w net.ipv4.ip_forward=1" in refuse(node, node.traces())
    finally:
        node.lab.sysctl("node", {"net.ipv4.ip_forward": "1"})


def test_a_second_agent_on_the_node_is_refused(node: Node, clean: dict[str, Any]) -> None:
    node.up(stack())
    before = node.traces()
    second = Path(f"{node.lab.run_directory}-second")
    file = str(node.lab.directory / "stack.yaml")
    line = [sys.executable, "-m", "packetstack_cli.main", "--run-dir", str(second), "up", file]
    done = node.lab.run("node", *line, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("interface ps0: exists already and belongs to")
    assert not second.exists()
    assert not differences(before, node.traces())
    assert node.curl() in BACKENDS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1"),
        ("- 1\n", ""),
        (json.dumps(stack(replicas=-1)), "spec.replicas"),
        (json.dumps(stack() | {"spek": 1}), "spek"),
        ("\x00", ""),
    ],
    ids=["unfinished", "list", "negative", "unknown field", "binary"],
)
def test_a_bad_file_is_refused(node: Node, clean: dict[str, Any], text: str, said: str) -> None:
    file = node.lab.directory / "bad.yaml"
    file.write_text(text)
    assert said in node.refused("up", str(file))
    assert not differences(clean, node.traces())
