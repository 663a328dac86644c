"""Sets of engines of a stack: each has an arena, a configuration and numbers of its own, and comes and goes while others stay."""

import gc
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from tests.model.node import PlayedEngine, PlayedStack, managed, resource
from tests.waiting import eventually

from packetstack_agent import flow_memory, namespaces, words
from packetstack_agent.agent import Agent
from packetstack_agent.attachments import Connections
from packetstack_agent.director import Director
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.flow_memory import FlowMemory, Pairs, Report
from packetstack_agent.managed import Managed
from packetstack_agent.mirroring import Mirror
from packetstack_agent.natives import call, constant, ffi, lib, text
from packetstack_agent.node import RunDirectory
from packetstack_agent.stacks import Stack
from packetstack_agent.takeover import Takeover
from packetstack_core.assignment import Move, Owner
from packetstack_core.resources import PacketStack
from packetstack_core.transitions import EngineSet, Sets, SetState

OLD_SNAT, NEW_SNAT = "198.51.100.0", "198.51.100.8"
SMALL = {"buckets": 256, "maxFlows": 4096}


def word(epoch: int, slot: int, queue: int = 0) -> int:
    return epoch << 32 | slot << 22 | queue << 16


# ---- which set a word belongs to


def test_a_word_belongs_to_the_set_of_its_engine() -> None:
    table = array("Q", [word(3, 1), word(3, 2), word(9, 7), 0])
    shards = {1: bytes(array("Q", [word(3, 1), word(2, 1), word(8, 7), 0])), 2: bytes(array("Q", [0] * 4))}
    belongs = words.sets(bytes(table), shards, {1: 1, 2: 2}, current=2)
    assert list(belongs) == [1, 2, 1, 2], (
        "engine 7 is gone, and named by a shard of set 1; nobody's bucket is the current set's"
    )
    assert list(array("Q", words.picked(shards, belongs))) == [word(3, 1), 0, word(8, 7), 0]
    assert words.open_fences(bytes(table), words.picked(shards, belongs)) == {1: 0, 2: 7}


def test_with_one_set_every_word_is_its_own() -> None:
    table, shards = bytes(array("Q", [word(1, 5), 0])), {4: bytes(array("Q", [word(1, 6), 0]))}
    assert list(words.sets(table, shards, {}, current=4)) == [4, 4]
    assert words.picked(shards, [4, 4]) == shards[4]


def test_tables_that_were_read_share_what_they_name() -> None:
    first, second = (bytes(array("Q", [word(epoch, 5, 3) | 7 << 6 | 1] * 2)) for epoch in (1, 2))
    assert len({id(o) for raw in (first, second) for o in words.owners(raw)}) == 1
    assert len({id(o) for raw in (first, second) for o in words.keepers(raw)}) == 1


# ---- the record


def test_the_record_says_which_sets_a_stack_has(tmp_path: Path) -> None:
    run, one = RunDirectory(tmp_path), managed(PlayedStack(resource(replicas=3)))
    shape = one.stack.resource.spec.engine
    one.sets = Sets(
        (
            EngineSet(1, SetState.DRAINING, 3, shape.template_hash(), 2, 7.5),
            EngineSet(2, SetState.CURRENT, 5, "another", 2, 9.0),
        ),
        2,
    )
    one.shapes = {"another": shape, "of no set": shape}
    one.note(run.record)
    run.save(must=True)
    after = managed(PlayedStack(resource(replicas=3)))
    after.read(RunDirectory(tmp_path).record.sets["web"])
    assert after.sets == one.sets
    assert after.shapes == {"another": shape, shape.template_hash(): shape}


# ---- transfers


class Recorded(FlowMemory):
    """Memory of two buckets that notes what shall be moved in it."""

    def __init__(self, owners: Sequence[int], stalled: int = 0) -> None:
        self.owners, self.stalled = array("Q", owners), stalled
        self.asked: list[tuple[list[int], list[int]]] = []
        """Slots of engines, and buckets."""

    def headers(self) -> tuple[bytes, Sequence[int]]:
        return bytes(self.owners), [1] * len(self.owners)

    def transfer(
        self, table: Any, egress: Any, engines: Sequence[Engine], moves: Sequence[Move], pairs: Pairs | None = None
    ) -> Report:
        self.asked.append(([e.slot for e in engines], [m.bucket for m in moves]))
        return Report(len(moves), 1, [7], self.stalled)


class TwoSets(Stack):
    """Bucket 0 is engine 1's, of set 1; bucket 1 is engine 2's, of set 2."""

    def __init__(self, first: Recorded, second: Recorded) -> None:
        self.current, self.set_of, self.mirror = 2, {1: 1, 2: 2, 3: 2}, None
        self.sets = {1: first, 2: second}
        self._words = self._egress = None
        self.table = array("Q", [word(1, 1), word(2, 2)])

    def _raw_words(self) -> bytes:
        return bytes(self.table)


def engines() -> list[Engine]:
    found = [PlayedEngine(slot, resource()) for slot in (1, 2, 3)]
    for engine in found[1:]:
        engine.blueprint.set = 2
    return list(found)


def test_buckets_move_among_the_engines_of_their_set_alone() -> None:
    first, second = Recorded([word(1, 1), word(1, 1)]), Recorded([0, word(2, 2)], stalled=2)
    report = TwoSets(first, second).transfer(engines(), [Move(1, Owner(3, 0))])
    assert (first.asked, second.asked) == ([], [([2, 3], [1])])
    assert (report.moved, report.fences, report.hold_ns, report.stalled) == (1, 1, [7], 2)


def test_a_handover_that_was_begun_is_finished_in_the_set_that_has_it() -> None:
    first, second = Recorded([word(1, 1), word(1, 1)]), Recorded([0, word(1, 3)])
    stack = TwoSets(first, second)
    assert stack.open_fences() == {1}
    assert stack.held() == {3: 1}
    assert stack.shard_slots() == {1, 3}
    stack.transfer(engines(), ())
    assert (first.asked, second.asked) == ([], [([2, 3], [])])


def test_flows_that_an_older_set_keeps_count_for_the_engine_that_has_them() -> None:
    stack = TwoSets(Recorded([word(1, 1), word(1, 1)]), Recorded([0, word(2, 2)]))
    assert stack.flows_by_slot() == {1: 2, 2: 1}, "bucket 0 has a flow that nobody owns in set 2"


# ---- a real arena


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    if os.geteuid() != 0:
        pytest.skip("loading BPF programs needs root")
    made = RunDirectory(tmp_path)
    made.record.documents, made.record.indexes = {"web": wanted().document()}, {"web": 0}
    yield made
    namespaces.unmount(made.pins)


@pytest.fixture
def director(run: RunDirectory) -> Iterator[Director]:
    made = Director()
    made.open(run.pins)
    yield made
    made.close()


def wanted(snat: str = OLD_SNAT) -> PacketStack:
    return resource(flowTable=SMALL, snat={"addresses": [f"{snat}/32"]})


def opened(run: RunDirectory, director: Director, sets: Sequence[int] = (1,), current: int = 1) -> Stack:
    return Stack("web", wanted(), 0, run.stack("web"), run.memory, director.handle, sets, current)


def add_flows(memory: FlowMemory, bucket: int, count: int) -> None:
    """Flows of the first SNAT address, backend and listener that the set has."""
    shard = lib().ps_arena_shard(memory.arena, bucket)
    first = ffi.cast("char *", shard) + ffi.sizeof("struct ps_shard") + 4 * memory.arena.index_slots
    entries = ffi.cast("struct ps_entry *", first)
    for i in range(count):
        entries[i].state = constant("PS_FLOW_ESTABLISHED")
    shard.live = shard.high = count
    memory.arena.backend_count[0].live += count
    memory.arena.backend_count[0].created += count


def map_id(pin: Path) -> str:
    fd = call(lib().ps_map_open, text(pin), 1)
    try:
        said = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    return next(line.split()[1] for line in said.splitlines() if line.startswith("map_id:"))


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def there_are(run: RunDirectory) -> tuple[list[str], list[str]]:
    """Pins and directories of the stack's sets."""
    pins = sorted(p.name for p in run.pins.glob("arena_*"))
    return pins, sorted(str(p.relative_to(run.path)) for p in run.path.glob("stacks/*/sets/*"))


async def test_a_set_comes_and_goes_while_the_other_stays(run: RunDirectory, director: Director) -> None:
    stack = opened(run, director)
    await stack.configure([])
    stack.resource = wanted(NEW_SNAT)
    await stack.configure([])
    stack.add_set(2)
    assert there_are(run) == (["arena_web_1", "arena_web_2"], ["stacks/web/sets/1", "stacks/web/sets/2"])
    first, second = stack.sets[1], stack.sets[2]
    pin, at = map_id(second.pin), second.arena_path
    assert map_id(first.pin) != pin
    assert is_mapped(at)
    # The same number is another address in each set.
    numbers = [m.config.buffer[m.generation & 1].snat[0].id for m in (first, second)]
    assert numbers == [1, 0]
    assert first.configured_snat() == second.configured_snat() == [ip_address(NEW_SNAT)]

    add_flows(first, 5, 3)
    add_flows(second, 5, 4)
    add_flows(second, 9, 1)
    assert stack.live() == 8
    assert stack.snat_flows() == {ip_address(OLD_SNAT): 3, ip_address(NEW_SNAT): 5}
    assert [len(flows) for flows in stack.flows(5)] == [7, 0]
    held = first.flows(5)
    said = [bytes(ffi.buffer(flow)) for flow in held]
    assert len(second.flows(5)) == 4
    assert [bytes(ffi.buffer(flow)) for flow in held] == said, "copies stay what they are"
    assert stack.backend_flows() == {(ip_address("10.0.0.1"), 8080): (8, 8)}
    assert sum(stack.bucket_packets()) == 0

    stack.remove_set(2)
    assert (stack.live(), second.snat_flows()) == (3, {}), "also for whoever still has it"
    assert there_are(run) == (["arena_web_1"], ["stacks/web/sets/1"])
    assert not is_mapped(at)
    assert is_mapped(first.arena_path)
    shown = f"/proc/{os.getpid()}/fdinfo"
    assert not [p for p in Path(shown).iterdir() if p.exists() and f"map_id:\t{pin}\n" in p.read_text()]
    eventually(lambda: not lib().ps_map_bytes(text(second.pin)))
    stack.close()


def test_a_stack_that_goes_while_its_traffic_is_mirrored_leaves_no_list_and_no_pair_taken(
    run: RunDirectory, director: Director
) -> None:
    stack = opened(run, director)
    stack.add_set(2)
    stack.mirror_from(1, 2)
    assert stack.mirror
    assert stack.connections
    pairs, at = lib().ps_director_pair_numbers(director.handle), stack.index * constant("PS_MAX_BUCKETS") + 5
    lib().ps_director_words(director.handle)[at] = word(3, 2) | 1 << 6
    pairs[at] = 7
    pairs[at + 1] = 8  # of a bucket that has ended, whose shard somebody has written
    shared, mirror = stack.connections.fd, stack.mirror
    stack.close()
    assert (pairs[at], pairs[at + 1]) == (0, 0)
    assert "arena_web_1+connections" not in there_are(run)[0]
    assert not mirror._list
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(shared)


async def test_a_set_that_has_come_and_gone_leaves_nothing_in_the_agent(run: RunDirectory, director: Director) -> None:
    stack = opened(run, director)
    await stack.configure([])

    async def transition() -> Counter[str]:
        """The set before goes; afterwards, what this process has: descriptors, mappings, memories and lists."""
        before, new = stack.current, stack.current + 1
        stack.add_set(new)
        stack.mirror_from(before, new)
        assert stack.mirror
        stack.mirror.share()
        assert stack.mirror.left().buckets == 0
        await stack.configure([])
        stack.current = new
        stack.mirror_no_more()
        stack.remove_set(before)
        gc.collect()
        has = Counter({t.__name__: 0 for t in (FlowMemory, Mirror, Connections)})
        has.update(type(o).__name__ for o in gc.get_objects() if isinstance(o, FlowMemory | Mirror | Connections))
        has["descriptors"] = sum(1 for _ in Path("/proc/self/fd").iterdir())
        maps = Path("/proc/self/maps").read_text()
        has["mappings"] = maps.count(str(run.path)) + maps.count("bpf-map")
        return has

    first = await transition()
    for _ in range(5):
        last = await transition()
    assert last == first
    stack.close()


async def test_a_configuration_is_written_for_all_sets(run: RunDirectory, director: Director) -> None:
    stack = opened(run, director)
    stack.add_set(2)
    assert [m.generation for m in stack.sets.values()] == [0, 0]
    assert await stack.configure([]) == 1
    stack.add_set(3)
    assert [m.generation for m in stack.sets.values()] == [1, 1, 1]
    assert stack.unsettled
    assert stack.settle([]) == []
    assert not stack.unsettled
    stack.close()


async def test_an_address_stays_until_no_set_has_flows_of_it(run: RunDirectory, director: Director) -> None:
    stack = opened(run, director)
    await stack.configure([])
    stack.direct()
    stack.add_set(2)
    add_flows(stack.sets[1], 0, 2)
    stack.resource, stack.current = wanted(NEW_SNAT), 2
    await stack.configure([])
    stack.direct()
    assert stack.settle([]) == []
    assert stack.leaving == {ip_address(OLD_SNAT): 2}
    stack.remove_set(1)
    assert stack.settle([]) == [ip_address(OLD_SNAT)]
    stack.close()


def test_what_cannot_be_made_leaves_no_set(
    run: RunDirectory, director: Director, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = opened(run, director)

    def full(*_: Any) -> None:
        raise AgentError("full")

    made = flow_memory.call
    monkeypatch.setattr(flow_memory, "call", lambda f, *a: (full if f == lib().ps_config_create else made)(f, *a))
    with pytest.raises(AgentError, match="full"):
        stack.add_set(2)
    monkeypatch.undo()
    assert list(stack.sets) == [1]
    assert not is_mapped(run.flow_memory("web", 2) / "arena")
    stack.add_set(2)  # what is left of the first try is no obstacle
    stack.close()


def test_another_agent_takes_over_the_sets_of_the_record_and_removes_others(
    run: RunDirectory, director: Director
) -> None:
    before = Managed(opened(run, director))
    for number in (2, 3):
        before.stack.add_set(number)
    before.sets = Sets(
        (EngineSet(1, SetState.DRAINING, 2, "", 1, 0.0), EngineSet(2, SetState.CURRENT, 2, "", 1, 0.0)), last=2
    )
    before.stack.current = 2
    add_flows(before.stack.sets[1], 0, 2)
    before.note(run.record)
    run.save(must=True)
    for memory in before.stack.sets.values():
        memory.close()

    agent = Agent(RunDirectory(run.path))
    agent.director.handle = director.handle
    takeover = Takeover(agent.run, agent.stacks, agent.journal, agent.director, agent.life, agent.keeper)
    after = takeover._read("web")
    assert after.sets == before.sets
    assert (list(after.stack.sets), after.stack.current, after.stack.live()) == ([1, 2], 2, 2)
    assert after.stack.mirror is not None, "the older of two sets may keep connections"
    assert there_are(run) == (
        ["arena_web_1", "arena_web_1+connections", "arena_web_2"], ["stacks/web/sets/1", "stacks/web/sets/2"],
    )  # fmt: skip
    known = {
        "stack": "web", "slot": 7, "template": "", "queues": 1, "cores": 1, "cpu_policy": "Shared", "cpus": (),
        "memory_bytes": 0, "namespace": "n", "set": 1,
    }  # fmt: skip
    b = agent.life.blueprint(after.stack, known)
    assert (b.arena, b.config, b.flows) == (
        run.path / "stacks/web/sets/1/arena", run.path / "stacks/web/sets/1/config", run.pins / "arena_web_1",
    )  # fmt: skip
    assert b.record()["set"] == 1
    after.stack.close()
    run.remove_stack("web")
    assert there_are(run) == ([], [])
