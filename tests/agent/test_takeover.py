"""An agent, a datapath or a whole engine ends, and another one goes on with what is there."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.lab.node import BACKENDS, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_agent.attachments import STOP_SECONDS
from packetstack_cli.outage import hang
from packetstack_core import abi


def agent_pid(node: Node) -> int:
    return int((node.lab.run_directory / "agent.pid").read_text())


def kill_agent(node: Node) -> None:
    pid = agent_pid(node)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not node.client.alive())


def same(node: Node) -> dict[str, Any]:
    """What a restart of the agent must not change."""
    status = node.status()
    found = {key: status[key] for key in ("owners", "flowTableGeneration", "replicas", "readyReplicas")}
    return found | {"processes": [(e["slot"], e["state"], e["pid"], e["initPid"]) for e in status["engines"]]}


def again(node: Node) -> str:
    """`packetstack up` with the same file."""
    return node.packetstack("up", str(node.lab.directory / "stack.yaml"))


def kill_engine(engine: dict[str, Any]) -> None:
    """Init and all it has started."""
    os.killpg(engine["initPid"], signal.SIGKILL)


def test_a_restarted_agent_goes_on_with_engines_and_table(node: Node, served: Any) -> None:
    before = same(node)
    kill_agent(node)
    ask(served)
    assert "unchanged" in again(node)
    assert same(node) == before


def test_an_agent_that_is_terminated_leaves_everything_running(node: Node, served: Any) -> None:
    before, pid = same(node), agent_pid(node)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not Path(f"/proc/{pid}/fd").exists() or not node.client.alive())
    ask(served)
    again(node)
    assert same(node) == before


def test_what_a_person_moved_stays_where_it_is_after_a_restart(node: Node, served: Any) -> None:
    slot = node.status()["engines"][0]["slot"]
    node.packetstack("move", "web", "--buckets", "0-199", "--engine", str(slot))
    node.wait_ready()
    before = same(node)
    kill_agent(node)
    again(node)
    assert same(node) == before


def test_a_restarted_agent_moves_buckets_and_queues_and_resizes(node: Node, served: Any) -> None:
    kill_agent(node)
    again(node)
    slot = node.status()["engines"][0]["slot"]
    node.packetstack("move", "web", "--buckets", "0-15", "--engine", str(slot))
    node.packetstack("move", "web", "--queue", f"{slot}:0", "--core", "1")
    node.packetstack("scale", "web", "--replicas", "3")
    ask(served)
    node.packetstack("scale", "web", "--replicas", "1")
    assert node.curl() in BACKENDS


def test_a_backend_that_was_down_gets_no_flow_after_a_restart(node: Node, served: Any) -> None:
    down = next(b for b in BACKENDS if b != ask(served))
    node.stop_backend(down)
    try:
        eventually(lambda: any(not b["healthy"] for b in node.status()["backends"]))
        kill_agent(node)
        again(node)
        assert down not in node.who()
    finally:
        node.start_backend(down)
        eventually(lambda: all(b["healthy"] for b in node.status()["backends"]))


def test_a_datapath_that_died_while_there_was_no_agent_is_followed(node: Node, served: Any) -> None:
    victim = node.status()["engines"][0]
    kill_agent(node)
    os.kill(victim["pid"], signal.SIGKILL)
    again(node)
    assert ask(served) in BACKENDS


def test_agent_and_all_engines_killed_together_come_back_with_their_flows(node: Node, served: Any) -> None:
    before = node.status()
    for engine in before["engines"]:
        kill_engine(engine)
    kill_agent(node)
    again(node)
    after = node.status()
    assert ask(served) in BACKENDS
    assert after["owners"] == before["owners"]
    assert 0 < after["flows"] <= before["flows"], "of earlier tests some may just have been forgotten"


@pytest.mark.parametrize("victims", [1, 2], ids=["one of two", "all"])
def test_a_killed_engine_is_started_again_in_place(node: Node, served: Any, victims: int) -> None:
    before = node.status()
    for engine in before["engines"][:victims]:
        kill_engine(engine)
    assert ask(served) in BACKENDS
    eventually(lambda: all(e["ready"] for e in node.status()["engines"]))
    after = node.status()
    assert after["owners"] == before["owners"]
    assert [e["slot"] for e in after["engines"]] == [e["slot"] for e in before["engines"]]


def test_init_alone_killed_loses_nothing_and_leaves_no_orphan(node: Node, served: Any) -> None:
    engine = node.status()["engines"][0]
    os.kill(engine["initPid"], signal.SIGKILL)

    def renewed() -> bool:
        new = node.status()["engines"][0]
        return new["initPid"] != engine["initPid"] and new["pid"] not in (0, engine["pid"])

    eventually(renewed)
    ask(served)
    mark = f"{node.lab.run_directory}/engines/{engine['slot']}"
    eventually(lambda: sum(f"{mark} " in f"{p} " or f"{mark}/" in p for p in node.traces()["processes"]) == 3)


@pytest.mark.parametrize("hung", ["all", "during a resize"])
def test_a_hung_datapath_is_killed_and_followed(node: Node, fresh: Any, hung: str) -> None:
    def hangs() -> int:
        return sum(e["count"] for e in node.client.call("events", name="web") if e["reason"] == "EngineHung")

    engines, before = node.status()["engines"], hangs()
    if hung == "all":
        for engine in engines:
            hang(engine["pid"])
    else:
        hang(engines[0]["pid"])
        node.packetstack("scale", "web", "--replicas", "3")
    assert ask(fresh) in BACKENDS
    eventually(lambda: hangs() > before)
    eventually(lambda: all(e["ready"] for e in node.status()["engines"]))


def test_an_engine_whose_interface_is_deleted_is_made_again_in_its_slot(node: Node, fresh: Any) -> None:
    before = node.status()
    slot = before["engines"][0]["slot"]
    node.lab.run("node", "ip", "link", "del", f"pe{slot}")
    eventually(lambda: any(e["reason"] == "EngineLost" for e in node.client.call("events", name="web")))
    eventually(lambda: all(e["ready"] for e in node.status()["engines"]))
    assert ask(fresh) in BACKENDS
    assert node.status()["owners"] == before["owners"]


def test_an_engine_that_cannot_be_made_again_gives_its_buckets_to_the_others(node: Node, fresh: Any) -> None:
    slot = node.status()["engines"][0]["slot"]
    # Something else takes the place of its interface.
    node.lab.run("node", "ip", "link", "del", f"pe{slot}")
    node.lab.run("node", "ip", "link", "add", f"pe{slot}", "type", "bridge")
    try:
        eventually(lambda: str(slot) not in node.status()["owners"])
        assert ask(fresh) in BACKENDS
        node.wait_ready()
        assert sum(node.status()["owners"].values()) == 256
    finally:
        node.lab.run("node", "ip", "link", "del", f"pe{slot}", check=False)


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"layout": 1})])
def test_a_record_that_is_not_understood_is_left_alone(node: Node, fresh: Any, content: str) -> None:
    kill_agent(node)
    record = node.lab.run_directory / "state.json"
    good = record.read_text()
    record.write_text(content)
    try:
        assert node.refused("up", str(node.lab.directory / "stack.yaml")).startswith(f"LayoutMismatch: {record}:")
        assert ask(fresh) in BACKENDS
    finally:
        record.write_text(good)
    again(node)


def test_a_pinned_map_of_another_build_is_not_taken_over(node: Node, fresh: Any) -> None:
    kill_agent(node)
    pins = node.lab.run_directory / "bpf"
    pin, kept = pins / "snat6", pins / "kept"
    pin.rename(kept)
    made = ["type", "hash", "key", "16", "value", "8", "entries", "64", "name", "snat6"]
    subprocess.run(["bpftool", "map", "create", str(pin), *made], check=True)
    before = sorted((p.name, p.stat().st_ino) for p in pins.iterdir())
    try:
        for words in (("up", str(node.lab.directory / "stack.yaml")), ("upgrade", "--agent")):
            assert node.refused(*words).startswith(f"LayoutMismatch: {pin}: is a map of another build.")
        assert sorted((p.name, p.stat().st_ino) for p in pins.iterdir()) == before
        assert ask(fresh) in BACKENDS
    finally:
        pin.unlink()
        kept.rename(pin)
    again(node)
    assert ask(fresh) in BACKENDS


DAMAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "resource": lambda record: record["documents"]["web"]["spec"].update(listeners=[]),
    "engine": lambda record: record["engines"][min(record["engines"])].update(state="Resting"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_stack_whose_record_cannot_be_read_is_left_alone_and_the_others_go_on(
    node: Node, fresh: Any, damage: Callable[[dict[str, Any]], None]
) -> None:
    listeners = [listener("other", "192.0.2.11", BACKENDS)]
    other = stack("other", replicas=1, listeners=listeners, snat={"addresses": ["198.51.100.8/31"]})
    node.up(stack(), other)
    before = same(node)
    kill_agent(node)
    file = node.lab.run_directory / "state.json"
    good = json.loads(file.read_text())
    bad = json.loads(file.read_text())
    damage(bad)
    file.write_text(json.dumps(bad))
    assert "unchanged" in node.up(other)
    assert [e["stack"] for e in node.client.call("events") if e["reason"] == "RecordUnreadable"] == ["web"]
    assert [s["metadata"]["name"] for s in node.client.call("get")] == ["other"]
    node.packetstack("scale", "other", "--replicas", "2")
    assert node.who("192.0.2.11") == set(BACKENDS)
    ask(fresh)
    assert node.who() == set(BACKENDS)
    file_of_web = node.lab.directory / "web.yaml"
    file_of_web.write_text(json.dumps(stack()))
    assert "its entry in state.json cannot be read" in node.refused("up", str(file_of_web))
    node.packetstack("down", "--all", "--yes")
    assert node.who() == set(BACKENDS)
    record = json.loads(file.read_text())
    assert set(record["documents"]) == {"web"}
    for part in ("documents", "indexes", "engines"):
        record[part] = {name: value for name, value in good[part].items() if name in record[part] or name == "web"}
    file.write_text(json.dumps(record))
    node.up(stack())
    assert same(node) == before


def test_an_agent_in_another_network_namespace_is_refused(node: Node, fresh: Any) -> None:
    before = same(node)
    kill_agent(node)
    file = str(node.lab.directory / "stack.yaml")
    done = node.lab.run("client", *node.lab.command("up", file), check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "its stacks are in another network namespace" in done.stderr
    again(node)
    assert same(node) == before


def test_a_bad_file_after_a_restart_ends_nothing(node: Node, fresh: Any) -> None:
    kill_agent(node)
    other = node.lab.directory / "other.yaml"
    other.write_text(json.dumps(stack(name="other", snat={"addresses": ["198.51.100.0/31", "2001:db8:2::/127"]})))
    assert "AddressConflict" in node.refused("up", str(other))
    assert ask(fresh) in BACKENDS
    assert node.status()["ready"]


def test_a_hot_restart_changes_the_process_and_nothing_else(node: Node, fresh: Any) -> None:
    before = same(node)
    first, second = node.status()["engines"]
    for name in (first["name"], second["name"], str(first["slot"])):
        said = json.loads(node.packetstack("upgrade", name, "-o", "json"))
        assert said["from"] != said["to"]
        assert said["pauseMilliseconds"] < 1000 * STOP_SECONDS, "the old process had to be killed"
    after = same(node)
    assert after["owners"] == before["owners"]
    assert after["flowTableGeneration"] == before["flowTableGeneration"]
    assert not {p[2] for p in after["processes"]} & {p[2] for p in before["processes"]}
    node.packetstack("upgrade", "--agent")
    assert same(node) == after


def test_a_datapath_of_another_layout_is_refused_and_the_one_that_serves_goes_on(node: Node, fresh: Any) -> None:
    engine = node.status()["engines"][0]
    hello = abi.ffi.new("struct ps_message *", {"kind": abi.lib().PS_MSG_HELLO, "layout": 999})
    answer = abi.ffi.new("struct ps_message *")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        connection.connect(str(node.lab.run_directory / f"engines/{engine['slot']}/engine.sock"))
        connection.send(bytes(abi.ffi.buffer(hello)))
        abi.ffi.memmove(answer, connection.recv(1024), abi.ffi.sizeof("struct ps_message"))
    assert answer.kind == abi.lib().PS_MSG_REFUSED
    assert abi.ffi.string(answer.text).startswith(b"LayoutMismatch: datapath has layout 999, agent ")
    assert node.status()["engines"][0]["pid"] == engine["pid"]


@pytest.mark.parametrize("what", ["nothing", "rubbish", "another kind", "a generation that does not serve", "many"])
def test_strangers_on_an_engines_socket_change_nothing(node: Node, fresh: Any, what: str) -> None:
    engine = node.status()["engines"][0]
    lib, size = abi.lib(), abi.ffi.sizeof("struct ps_message")
    message = abi.ffi.new("struct ps_message *", {"kind": lib.PS_MSG_HELLO, "layout": lib.PS_LAYOUT_VERSION})
    if what == "another kind":
        message.kind = lib.PS_MSG_READY
    message.generation = 77 if what == "a generation that does not serve" else 0
    sent = {"nothing": b"", "rubbish": os.urandom(size)}.get(what, bytes(abi.ffi.buffer(message)))
    for _ in range(40 if what == "many" else 1):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, suppress(BlockingIOError):
            connection.settimeout(5)
            connection.connect(str(node.lab.run_directory / f"engines/{engine['slot']}/engine.sock"))
            connection.send(sent)
    ask(fresh)
    eventually(lambda: node.status()["engines"][0]["ready"])
    assert node.status()["engines"][0]["pid"] == engine["pid"]
