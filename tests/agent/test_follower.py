"""The part of an agent that follows the API server, before a real one. The agent itself is a stand-in that notes what it is told."""

import asyncio
import contextlib
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client
from kubernetes.aio.config import kube_config
from tests.cluster.control_plane import ControlPlane
from tests.cluster.server import Server
from tests.model.node import PlayedEngine, PlayedStack, managed, resource
from tests.operator.players import TABLES

from packetstack_agent import cluster, deleted_tables
from packetstack_agent.cluster import Follower
from packetstack_agent.errors import AgentError
from packetstack_agent.firewall import Firewall, Obstacle
from packetstack_agent.keeping import News
from packetstack_agent.managed import Managed
from packetstack_agent.node import RunDirectory
from packetstack_core import crds
from packetstack_core.backing_off import CONNECT_SECONDS
from packetstack_core.kinds import FlowTable
from packetstack_core.reasons import Reason

ENGINE = {"id": 1, "name": "web-1", "state": "Active", "template": "ab", "queues": 1, "cores": 1}

SET = {
    "id": 1, "state": "Current", "replicas": 1, "template": "ab", "queues": 1, "since": "2026-11-30T12:00:00Z",
}  # fmt: skip


class PlayedAgent:
    """What a Follower sees of an agent."""

    def __init__(self) -> None:
        self.stacks: dict[str, Managed] = {}
        self.run = RunDirectory(Path("/nonexistent"))
        self.applying = asyncio.Lock()
        self.foreign = ""
        self.begun_anew = 0
        self.events: list[tuple[str, str]] = []
        self.told: list[tuple[str, int]] = []
        """Stack and generation, each time that it is asked to follow a table."""
        self.deleted: list[str] = []
        self.refuses = ""
        self.slow: dict[str, asyncio.Event] = {}
        """Stacks whose tables take until then to be followed."""
        self.stays = ""
        """Why a stack cannot be deleted."""
        self.firewall = Firewall()
        self.news = News()

    def event(self, stack: str, reason: Reason, message: str) -> None:
        assert message
        self.events.append((stack, str(reason)))

    def reasons(self) -> list[str]:
        return [reason for _, reason in self.events]

    def begin_anew(self) -> None:
        self.begun_anew += 1

    async def follow(self, name: str, table: FlowTable, generation: int) -> None:
        self.told.append((name, generation))
        if name in self.slow:
            await self.slow[name].wait()
        if self.refuses:
            raise AgentError(self.refuses)
        stack = PlayedStack(table.stack(), owners=(1,))
        stack.flows_of = {1: 900}
        engine = PlayedEngine(1, stack.resource)
        engine.blueprint.id, engine.blueprint.pod, engine.blueprint.interface = 1, "web-1", "net1"
        one = managed(stack, *([engine] if table.spec.engines else []))
        one.stack.name, one.table, one.generation = name, table, generation
        self.stacks[name] = one

    async def delete(self, name: str) -> None:
        if self.stays:
            raise AgentError(self.stays)
        self.deleted.append(name)
        del self.stacks[name]


class Place:
    """A namespace and the name of a node, both of one test's own."""

    def __init__(self, server: Server, namespace: str) -> None:
        self.server, self.namespace, self.node = server, namespace, f"node-{namespace}"
        self.stack = f"{namespace}.web"

    def _body(self, node: str, **spec: Any) -> dict[str, Any]:
        endpoints = {"endpoints": [{"address": "10.1.0.5", "port": 80}]}
        made = {
            "node": node,
            "engines": [ENGINE],
            "listeners": [{"name": "web", "address": "192.0.2.10", "port": 80, "backends": endpoints}],
            "snat": {"addresses": ["192.0.2.64/28"]},
            **spec,
        }
        api = {"apiVersion": "packetstack.io/v1alpha1", "kind": "FlowTable"}
        return {**api, "metadata": {"name": "web"}, "spec": made}

    async def _ask(self, request: Callable[..., Any], *arguments: Any) -> Any:
        def ask() -> Any:
            try:
                return request(*arguments)
            finally:
                self.server.close()  # of this thread

        return await asyncio.to_thread(ask)

    async def create(self, node: str | None = None, **spec: Any) -> None:
        body = self._body(node or self.node, **spec)
        await self._ask(self.server.request, "POST", TABLES.format(self.namespace), body)

    async def change(self, **spec: Any) -> None:
        await self._ask(self.server.merge, f"{TABLES.format(self.namespace)}/web", {"spec": spec})

    async def delete(self) -> None:
        await self._ask(self.server.delete, f"{TABLES.format(self.namespace)}/web")

    async def get(self) -> Any:
        return await self._ask(self.server.get, f"{TABLES.format(self.namespace)}/web")

    async def report(self) -> dict[str, Any]:
        """What this node says in the table's status."""
        nodes: list[dict[str, Any]] = (await self.get()).get("status", {}).get("nodes", [])
        return next((n for n in nodes if n["node"] == self.node), {})


@pytest.fixture(scope="module")
def server(control_plane: ControlPlane) -> Iterator[Server]:
    control_plane.define(*crds.definitions())
    server = Server(control_plane.kubeconfig)
    yield server
    server.close()


@pytest.fixture
def place(server: Server, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    namespace = f"test-{secrets.token_hex(4)}"
    control_plane.create_namespace(namespace)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(control_plane.kubeconfig))
    yield Place(server, namespace)
    server.delete(f"/api/v1/namespaces/{namespace}")


@pytest.fixture(autouse=True)
async def connections_end() -> AsyncIterator[None]:
    """Before the loop does: that of a cancelled watch is there until the server has answered the end of TLS."""
    yield
    selector = vars(asyncio.get_running_loop())["_selector"]
    with contextlib.suppress(AssertionError):
        await until(lambda: len(selector.get_map()) <= 1, 5)  # the loop's own


class Observed(Follower):
    """Notes when it has asked for all tables and how many watches it has begun; does `then` after the first list."""

    def __init__(self, agent: PlayedAgent, node: str, then: Callable[[str], Awaitable[str]] | None = None) -> None:
        super().__init__(agent, node, agent.begin_anew)
        self.asked: list[float] = []
        self.watches = 0
        self._then = then

    async def _list(self, api: client.CustomObjectsApi) -> str:
        self.asked.append(time.monotonic())
        seen = await super()._list(api)
        return await self._then(seen) if self._then and len(self.asked) == 1 else seen

    async def _stream(self, api: client.CustomObjectsApi, seen: str) -> str:
        self.watches += 1
        return await super()._stream(api, seen)


@contextlib.asynccontextmanager
async def following(node: str, agent: PlayedAgent | None = None) -> AsyncIterator[tuple[PlayedAgent, Observed]]:
    """A Follower at work."""
    agent = agent or PlayedAgent()
    follower = Observed(agent, node)
    follower.start()
    try:
        yield agent, follower
        assert follower.healthy()
        assert "InternalError" not in agent.reasons()
    finally:
        await follower.close()


async def until(check: Callable[[], Any], seconds: float = 15) -> None:
    """Until `check()`, or what it gives when awaited, is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, f"not in {seconds:g} s"
        await asyncio.sleep(0.02)


async def answered(place: Place, generation: int) -> None:
    async def seen() -> bool:
        return bool((await place.report()).get("observedGeneration") == generation)

    await until(seen)


async def test_tables_of_the_node_are_followed_and_answered_and_no_others(place: Place) -> None:
    await place.create()
    async with following(place.node) as (agent, _), following("node-elsewhere") as (stranger, _):
        await answered(place, 1)
        await place.change(unknownFlow="Reset")
        await answered(place, 2)
        assert agent.told == [(place.stack, 1), (place.stack, 2)]
        assert stranger.told == []
        owners = {f["manager"]: f for f in (await place.get())["metadata"]["managedFields"]}
        mine = owners[f"packetstack-agent-{place.node}"[:128]]
        assert (mine["operation"], mine["subresource"]) == ("Apply", "status")


async def test_a_report_is_written_only_when_it_says_something_new(place: Place) -> None:
    await place.create()
    async with following(place.node) as (agent, _):
        await answered(place, 1)
        written = (await place.get())["metadata"]["resourceVersion"]
        one = agent.stacks[place.stack]
        assert isinstance(one.stack, PlayedStack)
        for flows in range(1000, 1020):  # the same power of two, and then another one: both may wait
            one.stack.flows_of = {1: flows}
            agent.news.tell(place.stack)
            await asyncio.sleep(0.01)
        one.stack.flows_of = {1: 5000}
        agent.news.tell(place.stack)
        await asyncio.sleep(0.5)
        assert (await place.get())["metadata"]["resourceVersion"] == written
        one.converged = True
        agent.news.tell(place.stack)

        async def settled() -> bool:
            return bool((await place.report()).get("settled"))

        await until(settled)
        assert (await place.report())["engines"][0]["flows"] == 4096
        assert len(agent.told) == 1, "its own report came back by the watch"


async def test_a_report_says_what_the_nodes_packet_filter_stops(place: Place) -> None:
    agent = PlayedAgent()
    agent.firewall.obstacles = (Obstacle("a rule in chain FORWARD drops all", "let it accept"),)
    await place.create()
    async with following(place.node, agent):
        await answered(place, 1)
        assert (await place.report())["firewall"] == "PacketsDropped: a rule in chain FORWARD drops all"


async def test_a_table_that_the_agent_cannot_follow_is_refused_once_and_followed_when_it_can(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RESYNC_SECONDS", 0.2)
    agent = PlayedAgent()
    agent.refuses = "AddressConflict: 192.0.2.10 belongs to stack shop.web"
    await place.create()
    async with following(place.node, agent):

        async def told() -> bool:
            return bool((await place.report()).get("message") == agent.refuses)

        await until(told)
        await until(lambda: len(agent.told) > 2)
        assert agent.reasons().count("FlowTableRefused") == 1
        agent.refuses = ""

        async def forgotten() -> bool:
            return not (await place.report()).get("message")

        await until(forgotten)


def item(generation: int, **spec: Any) -> dict[str, Any]:
    """A flow table as the server shows it to an agent."""
    endpoints = {"endpoints": [{"address": "10.1.0.5", "port": 80}]}
    made = {
        "node": "n1",
        "engines": [ENGINE],
        "listeners": [{"name": "web", "address": "192.0.2.10", "port": 80, "backends": endpoints}],
        "snat": {"addresses": ["192.0.2.64/28"]},
        **spec,
    }
    meta = {"namespace": "shop", "name": "web", "generation": generation, "resourceVersion": "1"}
    return {"apiVersion": "packetstack.io/v1alpha1", "kind": "FlowTable", "metadata": meta, "spec": made}


class Writing(client.CustomObjectsApi):
    """An API client that keeps what is written, and asks nobody."""

    def __init__(self) -> None:  # without a connection
        self.reports: list[dict[str, Any]] = []

    async def patch_namespaced_custom_object_status(self, *path: Any, **options: Any) -> None:
        del options
        self.reports.append(path[5]["status"]["nodes"][0])


async def heard(agent: PlayedAgent, *items: dict[str, Any]) -> list[dict[str, Any]]:
    """What a node writes into the status of these tables, which come one after the other."""
    follower, api = Follower(agent, "n1", agent.begin_anew), Writing()
    follower._api = api
    for one in items:
        follower._see(one)
        await follower._act_on("shop.web")
    return api.reports


async def test_a_table_of_a_later_version_is_answered_with_what_cannot_be_read() -> None:
    agent = PlayedAgent()
    [report] = await heard(agent, item(1, tunnels=[{"peer": "n2"}]))
    assert (report["node"], report["observedGeneration"]) == ("n1", 1)
    assert report["message"].startswith("its FlowTable cannot be read: ")
    assert "tunnels" in report["message"]
    assert agent.events == [("shop.web", "FlowTableRefused")]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"sets": [SET | {"state": "Draining"}]}, "spec.sets: none of them is Current"),
        ({"nodes": [{"name": "n1"}, {"name": "n2"}]}, "spec.nodes: this agent knows"),
    ],
)
async def test_a_table_that_asks_for_what_no_agent_can_do_is_answered_with_that(
    spec: dict[str, Any], said: str
) -> None:
    agent = PlayedAgent()
    [report] = await heard(agent, item(1, **spec))
    assert report["message"].startswith(f"its FlowTable cannot be read: {said}")
    assert agent.events == [("shop.web", "FlowTableRefused")]


async def test_an_agent_that_took_a_stack_over_answers_a_table_that_it_cannot_read() -> None:
    agent = PlayedAgent()
    await agent.follow("shop.web", FlowTable.model_validate(item(3)), 3)
    [report] = await heard(agent, item(4, tunnels=[{"peer": "n2"}]))
    assert report["observedGeneration"] == 3, "packets go on by the last one that could be read"
    assert report["engines"][0]["name"] == "web-1"
    assert "tunnels" in report["message"]


async def test_a_table_that_cannot_be_read_stays_told_until_one_can() -> None:
    agent = PlayedAgent()
    agent.refuses = "AddressConflict: 192.0.2.10 belongs to stack shop.other"
    follower, api = Follower(agent, "n1", agent.begin_anew), Writing()
    follower._api = api
    for table in (item(1), item(2, tunnels=[]), item(3, pairs=[])):
        follower._see(table)
        await follower._act_on("shop.web")
    agent.refuses = ""  # what the first table met is out of the way
    await follower._act_on("shop.web")
    assert [m.partition(":")[0] for m in (r["message"] for r in api.reports)] == ["AddressConflict"] + [
        "its FlowTable cannot be read"
    ] * 3
    assert agent.told[-1] == ("shop.web", 1), "the last one that could be read is followed meanwhile"
    follower._see(item(4))
    await follower._act_on("shop.web")
    assert (api.reports[-1]["message"], api.reports[-1]["observedGeneration"]) == ("", 4)


async def test_an_agent_that_stands_by_does_not_end_the_flows_of_a_table_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deleted_tables, "ORPHAN_SECONDS", 0.0)
    agent = PlayedAgent()
    agent.foreign = "LayoutMismatch: another build"
    agent.run.record.tables["shop.web"] = {}
    follower = Follower(agent, "n1", agent.begin_anew)
    follower._listed = True
    follower._see(item(1, tunnels=[]))
    for _ in range(2):
        follower._end_what_nobody_wants()
    assert not agent.begun_anew
    follower._gone("shop.web")
    for _ in range(3):
        follower._end_what_nobody_wants()
        await asyncio.sleep(0.001)
    assert agent.begun_anew


async def test_a_stack_that_cannot_be_removed_with_its_table_is_removed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deleted_tables, "ORPHAN_SECONDS", 0.0)
    agent = PlayedAgent()
    await heard(agent, item(1))
    agent.run.record.tables["shop.web"] = {}
    follower = Follower(agent, "n1", agent.begin_anew)
    agent.stays = "an engine does not end"
    follower._gone("shop.web")
    await asyncio.sleep(0.01)
    with pytest.raises(AgentError):
        await follower._act_on("shop.web")
    agent.stays = ""
    await follower._act_on("shop.web")
    assert agent.deleted == ["shop.web"]


async def test_a_stack_whose_table_takes_long_to_follow_keeps_no_other_from_its_report() -> None:
    agent, api = PlayedAgent(), Writing()
    follower = Follower(agent, "n1", agent.begin_anew)
    follower._api = api
    agent.slow["shop.web"] = asyncio.Event()
    other = item(1)
    other["metadata"] |= {"name": "zoo"}
    acting = asyncio.create_task(follower._act())
    try:
        follower._see(item(1))
        follower._see(other)
        await until(lambda: api.reports, 2)
        assert agent.told == [("shop.web", 1), ("shop.zoo", 1)]
        follower._see(item(2))  # while the first one is still being followed
        await asyncio.sleep(0.02)
        assert agent.told[2:] == [], "one after the other of the same stack"
        agent.slow["shop.web"].set()
        await until(lambda: ("shop.web", 2) in agent.told, 2)
        assert not agent.reasons()
    finally:
        acting.cancel()
        follower._api = None
        await follower.close()


async def test_a_watch_that_is_too_old_is_begun_anew_by_a_list_and_misses_nothing(place: Place) -> None:
    await place.create()

    async def outdated(seen: str) -> str:
        del seen
        await place.change(unknownFlow="Reset")
        return "1"  # the server has forgotten what came after it, and says so by 410

    agent = PlayedAgent()
    follower = Observed(agent, place.node, outdated)
    follower.start()
    try:
        await answered(place, 2)
        assert len(follower.asked) == 2
        assert "ApiServerLost" not in agent.reasons()
        await place.change(unknownFlow="Drop")
        await answered(place, 3)
        assert len(follower.asked) == 2, "the watch goes on"
    finally:
        await follower.close()


async def test_a_watch_that_the_server_ends_goes_on_without_a_list(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "WATCH_SECONDS", 1)
    await place.create()
    async with following(place.node) as (agent, follower):
        await answered(place, 1)
        await until(lambda: follower.watches > 2)
        await place.change(unknownFlow="Reset")
        await answered(place, 2)
        assert len(follower.asked) == 1
        assert agent.reasons() == []


async def test_a_server_that_cannot_be_reached_is_told_once_and_asked_ever_less_often(
    tmp_path: Path, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(control_plane.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"  # nobody listens there
    nowhere = tmp_path / "nowhere.conf"
    nowhere.write_text(json.dumps(config))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(nowhere))
    agent = PlayedAgent()
    follower = Observed(agent, "node-0")
    asked = follower.asked
    follower.start()
    try:
        await until(lambda: len(asked) == 4)
        pauses = [then - now for now, then in itertools.pairwise(asked)]
        assert all(p >= wanted for p, wanted in zip(pauses, CONNECT_SECONDS, strict=False)), pauses
        assert agent.events == [("-", "ApiServerLost")]
        assert follower.healthy()
    finally:
        await follower.close()


async def test_engines_go_on_while_their_table_is_gone_and_end_only_after_a_while(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deleted_tables.ORPHAN_SECONDS == 60
    monkeypatch.setattr(deleted_tables, "ORPHAN_SECONDS", 1.5)
    await place.create()
    async with following(place.node) as (agent, _):
        await answered(place, 1)
        await place.delete()
        await until(lambda: "FlowTableLost" in agent.reasons())
        await asyncio.sleep(0.5)
        await place.create()  # the operator has written it anew
        await answered(place, 1)
        await asyncio.sleep(1.5)
        assert agent.deleted == []
        await place.delete()
        await until(lambda: agent.reasons().count("FlowTableLost") == 2)
        lost = time.monotonic()
        await until(lambda: agent.deleted == [place.stack])
        assert time.monotonic() - lost > 1.2


async def test_a_stack_whose_engines_had_been_let_go_ends_with_its_table(place: Place) -> None:
    await place.create(engines=[])
    async with following(place.node) as (agent, _):
        await answered(place, 1)
        await place.delete()
        await until(lambda: agent.deleted == [place.stack], 5)
        assert "FlowTableLost" not in agent.reasons()


async def test_a_table_that_went_while_there_was_no_agent_is_missed_by_the_next_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deleted_tables, "ORPHAN_SECONDS", 0.5)
    agent = PlayedAgent()
    agent.run.record.tables[place.stack] = {}
    wanted = resource()
    agent.stacks[place.stack] = managed(PlayedStack(wanted), PlayedEngine(1, wanted))
    async with following(place.node, agent):
        await until(lambda: agent.deleted == [place.stack])
        assert agent.reasons() == ["FlowTableLost"]


async def test_an_agent_that_stands_by_repeats_what_was_reported_and_says_how_to_go_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RESYNC_SECONDS", 0.1)
    monkeypatch.setattr(deleted_tables, "ORPHAN_SECONDS", 1.0)
    await place.create()
    async with following(place.node):
        await answered(place, 1)
    before = await place.report()
    agent = PlayedAgent()
    agent.foreign = f"LayoutMismatch: stack {place.stack} has memory layout 2"
    agent.run.record.tables[place.stack] = {}

    async def told() -> bool:
        return bool((await place.report()).get("message", "").startswith(agent.foreign))

    async with following(place.node, agent):
        await until(told)
        await place.change(unknownFlow="Reset")
        await until(lambda: agent.reasons().count("FlowTableRefused") == 1)
        await asyncio.sleep(1.5)
        after = await place.report()
        assert f"kubectl packetstack upgrade web --end-flows -n {place.namespace}" in after["message"]
        same = set(before) - {"message", "agentVersion"}
        assert {k: after.get(k) for k in same} == {k: before[k] for k in same}, "the table of now is not carried out"
        assert agent.told == []
        assert not agent.begun_anew
        await place.delete()
        await until(lambda: agent.begun_anew)


async def test_an_agent_that_stands_by_waits_for_a_table_that_is_written_anew(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RESYNC_SECONDS", 0.1)
    monkeypatch.setattr(deleted_tables, "ORPHAN_SECONDS", 1.0)
    agent = PlayedAgent()
    agent.foreign = "LayoutMismatch: another build"
    agent.run.record.tables[place.stack] = {}
    async with following(place.node, agent):
        await asyncio.sleep(0.5)
        await place.create()
        await asyncio.sleep(1.5)
        assert not agent.begun_anew
