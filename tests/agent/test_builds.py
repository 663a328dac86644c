"""Which shard layout a build has, what a set of engines keeps of its build, and how an agent reads flows of another layout."""

import os
import random
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from tests.lab.builds import OTHER

from packetstack_agent import builds
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import call, constant, ffi, lib, packed, text, wire
from packetstack_core import shards

needs_other = pytest.mark.skipif(not OTHER.exists(), reason=f"{OTHER.name} is not built; run make build")


def arena(directory: Path, form: str) -> Any:
    return call(
        lib().ps_arena_create,
        text(directory / "arena"),
        ffi.NULL,
        256,
        4096,
        builds.form_of(form) if form else ffi.NULL,
    )


def test_this_build_has_the_layout_that_builds_had_before_they_said_so() -> None:
    """To be changed with PS_SHARD_LAYOUT: then FIRST is not this build's any more, and stays what it is."""
    assert builds.own() == builds.shard_of(builds.installed()) == shards.FIRST
    assert builds.name_of(ffi.new("struct ps_shard_form *")[0]) == shards.FIRST
    assert shards.number(shards.FIRST) == str(constant("PS_SHARD_LAYOUT"))


@needs_other
def test_another_build_says_another_layout() -> None:
    name = builds.shard_of(OTHER)
    assert shards.number(name) == "1000"
    form = builds.form_of(name)
    assert (form.entry_bytes, form.state) == (128, 63)
    assert builds.name_of(form[0]) == name


def test_a_build_that_does_not_know_the_question_has_the_first_layout(tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.write_text("#!/bin/sh\nexit 2\n")
    build.chmod(0o755)
    assert builds.shard_of(build) == shards.FIRST


@pytest.mark.parametrize("said", ["exit 1", "echo 2.3", "echo nothing", "echo 0" + ".0" * 15])
def test_a_build_that_says_nonsense_is_refused(tmp_path: Path, said: str) -> None:
    build = tmp_path / "build"
    build.write_text(f"#!/bin/sh\n{said}\n")
    build.chmod(0o755)
    with pytest.raises(AgentError, match="cannot be asked for its shard layout"):
        builds.shard_of(build)


@needs_other
def test_a_set_keeps_its_build_whatever_is_installed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = builds.of(tmp_path, shards.FIRST)
    assert kept.parent == tmp_path
    monkeypatch.setattr(builds, "installed", lambda: OTHER)
    assert builds.of(tmp_path, shards.FIRST) == kept
    assert builds.shard_of(kept) == shards.FIRST
    kept.unlink()
    with pytest.raises(
        AgentError, match="no build serves shard layout 1, that of its set: the installed one has layout 1000"
    ):
        builds.of(tmp_path, shards.FIRST)
    assert builds.of(tmp_path, builds.shard_of(OTHER)) == kept


def test_where_nothing_may_be_executed_the_installed_build_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mounted:
        f_flag = os.ST_NOEXEC

    monkeypatch.setattr(os, "statvfs", lambda _: Mounted)
    with pytest.raises(AgentError, match="noexec"):
        builds.keep(tmp_path, builds.installed())
    assert builds.of(tmp_path, shards.FIRST) == builds.installed()
    assert list(tmp_path.iterdir()) == []


@needs_other
@pytest.mark.parametrize("other", [False, True], ids=["own", "other"])
def test_flows_of_either_layout_are_read_by_its_form(tmp_path: Path, other: bool) -> None:
    name = builds.shard_of(OTHER) if other else shards.FIRST
    a, form = arena(tmp_path, name), builds.form_of(name)
    client, vip, snat, backend = (
        packed(ip_address(x)) for x in ("203.0.113.7", "192.0.2.10", "198.51.100.1", "10.71.5.1")
    )
    a.addresses = 3
    ffi.memmove(a.address[2].bytes, snat, 16)
    b = lib().ps_arena_backend(a, backend, wire(8080))
    number = lib().ps_arena_listener(a, vip, wire(80), 6)
    shard = lib().ps_arena_shard(a, 5)
    entry = (
        ffi.cast("char *", shard) + ffi.sizeof("struct ps_shard") + form.index_bytes * a.index_slots + form.entry_bytes
    )
    fields = {
        "client": client,
        "hash": (0xABCD1234).to_bytes(4, "little"),
        "last_seen": (77).to_bytes(4, "little"),
        "client_port": wire(4000).to_bytes(2, "little"),
        "snat_port": wire(5000).to_bytes(2, "little"),
        "snat": (2).to_bytes(2, "little"),
        "backend": b.to_bytes(2, "little"),
        "listener": number.to_bytes(2, "little"),
        "state": bytes([constant("PS_FLOW_ESTABLISHED")]),
    }
    for field, value in fields.items():
        ffi.memmove(entry + getattr(form, field), value, len(value))
    shard.live, shard.high = 1, 2  # the first entry is free
    out = ffi.new("struct ps_flow[]", int(a.entries))
    assert lib().ps_arena_flows(a, 5, out, len(out)) == 1
    flow = out[0]
    assert [bytes(x) for x in (flow.client, flow.vip, flow.snat, flow.backend)] == [client, vip, snat, backend]
    ports = (flow.client_port, flow.vip_port, flow.snat_port, flow.backend_port)
    assert ports == (wire(4000), wire(80), wire(5000), wire(8080))
    assert (flow.hash, flow.last_seen, flow.state) == (0xABCD1234, 77, constant("PS_FLOW_ESTABLISHED"))
    of_snat = ffi.new("uint32_t[]", constant("PS_MAX_ADDRESSES"))
    call(lib().ps_arena_snat_flows, a, of_snat)
    assert of_snat[2] == 1
    lib().ps_unmap(a)


@needs_other
def test_the_inside_of_a_foreign_shard_is_not_judged(tmp_path: Path) -> None:
    a = arena(tmp_path, builds.shard_of(OTHER))
    with pytest.raises(AgentError, match="its shard has another build's form"):
        call(lib().ps_arena_check, a, 0)
    lib().ps_unmap(a)


def test_a_form_that_leads_out_of_its_entries_gets_no_memory(tmp_path: Path) -> None:
    """A form comes from a build that nobody here has read."""
    rng = random.Random(1)
    numbers = [int(n) for n in shards.FIRST.split(".")]
    wrong = {1: [0, 3, 32], 2: [0, 63, 32, 320, 65535], 3: [0, 63, 65535], 15: [1]}  # sizes, and what is not used
    wrong |= {place: [64, 65535] for place in range(4, 15)}
    for place, values in wrong.items():
        for value in values:
            form = ".".join(map(str, [*numbers[:place], value, *numbers[place + 1 :]]))
            with pytest.raises(AgentError, match="its numbers do not fit together"):
                arena(tmp_path, form)
    for _ in range(300):
        form = ".".join(str(rng.choice((1, 2, 4, 16, 62, 64, 100, 128, 256, 4096))) for _ in range(15)) + ".0"
        try:
            a = arena(tmp_path, form)
        except AgentError:
            continue
        for bucket in (0, 255):  # whatever stands there
            shard = lib().ps_arena_shard(a, bucket)
            ffi.memmove(shard, os.urandom(int(a.shard_stride)), int(a.shard_stride))
            out = ffi.new("struct ps_flow[]", int(a.entries))
            lib().ps_arena_flows(a, bucket, out, len(out))
        lib().ps_unmap(a)
        (tmp_path / "arena").unlink()
