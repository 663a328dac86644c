"""Files of the agent that are damaged, or were being written when somebody ended it."""

import json
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.lab.node import BACKENDS, Node, ask, stack
from tests.waiting import eventually

from packetstack_agent import layouts
from packetstack_agent.layouts import LayoutMismatch
from packetstack_agent.natives import constant
from packetstack_agent.node import RunDirectory, clean


@pytest.fixture
def left(node: Node) -> Any:
    """The directory of a stack that an agent began to make."""
    directory = node.lab.run_directory / "stacks/web"
    directory.mkdir(parents=True)
    yield directory
    node.command("down", "--all", "--yes")


def kill_agent(node: Node) -> None:
    os.kill(node.client.agent_pid(), signal.SIGKILL)
    eventually(lambda: not node.client.alive())


@pytest.mark.parametrize("content", [b"", b"only half"])
def test_a_secret_that_is_not_whole_is_made_anew_when_there_are_no_flows(
    node: Node, left: Path, content: bytes
) -> None:
    (left / "secret").write_bytes(content)
    node.up(stack())
    assert len((left / "secret").read_bytes()) == 16
    assert (left / "secret").stat().st_mode & 0o777 == 0o600
    assert not (left / "secret.new").exists()
    assert node.curl() in BACKENDS


@pytest.mark.parametrize("name", ["arena", "config"])
def test_a_file_that_was_being_made_when_the_agent_was_killed_is_made_again(node: Node, left: Path, name: str) -> None:
    (left / "sets/1").mkdir(parents=True)
    (left / "sets/1" / name).write_bytes(bytes(1 << 20))
    node.up(stack())
    assert node.curl() in BACKENDS


@pytest.mark.parametrize("content", [None, b"", b"only half"])
def test_a_lost_secret_is_not_replaced_while_flows_live(node: Node, fresh: Any, content: bytes | None) -> None:
    secret = node.lab.run_directory / "stacks/web/secret"
    good = secret.read_bytes()
    kill_agent(node)
    if content is None:
        secret.unlink()
    else:
        secret.write_bytes(content)
    said = node.refused("up", str(node.lab.directory / "stack.yaml"))
    assert f"{secret}: has {len(content or b'')} bytes instead of 16, and 1 live flow of the stack" in said
    assert ask(fresh) in BACKENDS
    kill_agent(node)
    secret.write_bytes(good)
    node.packetstack("up", str(node.lab.directory / "stack.yaml"))
    assert node.curl() in BACKENDS


ARENA, ENGINE = (constant(f"PS_{kind}_MAGIC") for kind in ("ARENA", "ENGINE"))


@pytest.mark.parametrize(
    ("file", "magic"),
    [
        ("stacks/web/sets/1/arena", ARENA),
        ("stacks/web/sets/7/arena", ARENA),
        ("engines/3/queues", ENGINE),
        ("engines/shop_web-1/queues", ENGINE),
    ],
    ids=["arena", "arena of another set", "engine", "engine of a pod"],
)
def test_any_file_of_another_layout_is_found_and_not_changed(tmp_path: Path, file: str, magic: int) -> None:
    run = RunDirectory(tmp_path)
    run.record.documents = {"web": {}, "shop.web": {}}
    run.record.engines = {"3": {"stack": "web"}, "4": {"stack": "shop.web", "pod": "web-1", "pod_uid": "0-0"}}
    layouts.check(run)  # nothing is there
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    for content in (b"", b"short", bytes(64), struct.pack("II", magic, constant("PS_LAYOUT_VERSION"))):
        path.write_bytes(content)
        layouts.check(run)
    path.write_bytes(struct.pack("II", magic, 99))

    def there() -> list[tuple[Path, int, int]]:
        return sorted((p, p.lstat().st_ino, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))

    before = there()
    name = "shop.web" if "shop" in file else "web"
    with pytest.raises(LayoutMismatch, match=f"^LayoutMismatch: stack {name} has memory layout 99; this build has "):
        layouts.check(run)
    assert there() == before


def test_a_stack_of_a_build_without_sets_of_engines_is_found(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.record.documents = {"web": {}}
    run.save(must=True)
    record = json.loads((tmp_path / "state.json").read_text())
    del record["sets"]
    (tmp_path / "state.json").write_text(json.dumps(record | {"layout": 2}))
    arena = run.stack("web") / "arena"
    arena.parent.mkdir(parents=True)
    arena.write_bytes(struct.pack("II", ARENA, constant("PS_LAYOUT_VERSION")))
    with pytest.raises(
        LayoutMismatch, match=r"^LayoutMismatch: stack web has one memory for all of its engines; this build "
    ):
        layouts.check(RunDirectory(tmp_path))
    layouts.end(RunDirectory(tmp_path))
    run = RunDirectory(tmp_path)
    layouts.check(run)
    assert list(run.record.documents) == ["web"]


def test_an_agent_that_removes_everything_is_seen_until_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`packetstack down` waits for the lock on agent.pid; an agent that starts meanwhile must not lose its files."""
    run = RunDirectory(tmp_path / "run")
    for directory in ("stacks/web", "bpf", "engines/1"):
        (run.path / directory).mkdir(parents=True)
        (run.path / directory / "file").touch()
    (run.path / "agent.pid").touch()
    left: list[list[str]] = []
    unlink = Path.unlink

    def noted(path: Path, missing_ok: bool = False) -> None:
        if path.name == "agent.pid":
            left.append(sorted(p.name for p in run.path.iterdir()))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr("packetstack_agent.node.detach", lambda run: [])
    monkeypatch.setattr(Path, "unlink", noted)
    clean(run)
    assert left == [["agent.pid"]]
    assert not run.path.exists()
