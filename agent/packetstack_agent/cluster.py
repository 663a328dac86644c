"""The agent in a cluster: watches flow tables, has the agent follow those of its node, and answers in their status.

One list and watch of FlowTables is all it asks of the API server. While the server cannot be reached, packets and
engines go on by the last tables, and a dead datapath is still followed.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import client, config, watch
from kubernetes.aio.client.exceptions import ApiException
from pyroute2.netlink.exceptions import NetlinkError

from packetstack_agent import deleted_tables
from packetstack_agent.deleted_tables import DeletedTables
from packetstack_agent.errors import AgentError
from packetstack_agent.firewall import Firewall
from packetstack_agent.keeping import News
from packetstack_agent.managed import Managed
from packetstack_agent.natives import constant
from packetstack_agent.node import RunDirectory
from packetstack_agent.standings import firewall_problem, trouble
from packetstack_core import following, kinds, preconditions, shards
from packetstack_core.backing_off import CONNECT_SECONDS, back_off
from packetstack_core.reading import ResourceError
from packetstack_core.reasons import EventReason, Reason
from packetstack_core.wording import timestamp

GROUP, VERSION, PLURAL = "packetstack.io", "v1alpha1", "flowtables"
WATCH_SECONDS = 240
"""The server ends a watch after this time; it is begun again where it ended."""
RESYNC_SECONDS = 5.0
"""Before all tables are looked at again, changed or not."""
FLOWS_SECONDS = 15.0
"""Time between two reports that differ in nothing but numbers of flows, or since when one is silent."""
SILENT_SECONDS = 60
"""To the multiple of which it is rounded down since when a flow is silent: each packet of it changes that."""

Key = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True)
class Wanted:
    """A stack's flow table as the server has it now."""

    namespace: str
    name: str
    generation: int
    """The last one that could be read, or that of `unreadable` if none could."""
    table: kinds.FlowTable | None
    """The table of that generation. None: no generation could be read, and a stack that an earlier agent has left goes on as it was recorded."""
    unreadable: str = ""
    """Why the newest generation cannot be read, empty when it can."""


class Node(Protocol):
    """The agent, as whoever follows flow tables needs it."""

    @property
    def run(self) -> RunDirectory:
        """Its record names the tables that are followed."""

    @property
    def stacks(self) -> Mapping[str, Managed]:
        """The stacks of this node, by namespace and name."""

    @property
    def applying(self) -> asyncio.Lock:
        """Held while a stack is deleted; `follow` takes it."""

    @property
    def news(self) -> News:
        """Stacks for which something was done."""

    @property
    def firewall(self) -> Firewall:
        """The node's packet filter, as last seen."""

    @property
    def foreign(self) -> str:
        """Why the agent stands by; empty while it does not."""

    def event(self, stack: str, reason: Reason, message: str) -> None:
        """Tell a person."""

    async def follow(self, name: str, table: kinds.FlowTable, generation: int) -> None:
        """Make packets see this table. AgentError or ResourceError if that cannot be."""

    async def delete(self, name: str) -> None:
        """End a stack. AgentError if that cannot be."""


class Follower:
    """Keeps `agent` after the tables of `node`. All methods run on the event loop.

    `begin_anew` is called when what another build has made is in nobody's way any more but the agent's.
    """

    def __init__(self, agent: Node, node: str, begin_anew: Callable[[], None]) -> None:
        self._agent = agent
        self._node = node
        self._begin_anew = begin_anew
        self._mine = f"spec.node={node}"
        self._wanted: dict[str, Wanted] = {}
        """Stack -> its table."""
        self._refused: dict[str, str] = {}
        """Stack -> why its table, which can be read, cannot be followed."""
        self._listed = False
        """Whether the server has listed all tables once."""
        self._sent: dict[str, tuple[dict[str, Any], float]] = {}
        """Stack -> the last report that the server took, and when."""
        self._former: dict[str, dict[str, Any]] = {}
        """Stack -> what this node has reported of it before; true while the agent stands by."""
        self._unwanted_since: float | None = None
        """Since when no table asks for an engine that another build has made."""
        self._deleted = DeletedTables(self._touch)
        self._dirty: set[str] = set()
        self._changed = asyncio.Event()
        self._acting: dict[str, asyncio.Task[None]] = {}
        """Stack -> what is being done for it now."""
        self._tasks: list[asyncio.Task[None]] = []
        self._api: client.CustomObjectsApi | None = None

    def start(self) -> None:
        """Begin to watch and to report."""
        for work in (self._watch, self._act, self._hear):
            self._tasks.append(asyncio.create_task(work()))

    async def close(self) -> None:
        """Let the agent be; nothing of it ends."""
        self._deleted.close()
        tasks = [*self._tasks, *self._acting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._api is not None:
            await self._api.api_client.close()

    async def _connect(self) -> client.CustomObjectsApi:
        if self._api is None:
            try:
                config.load_incluster_config()
            except config.ConfigException:
                await config.load_kube_config()
            self._api = client.CustomObjectsApi(client.ApiClient())
        return self._api

    # ---- what the server says --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        failures = 0
        while True:
            try:
                api = await self._connect()
                seen = await self._list(api)
                while True:
                    seen = await self._stream(api, seen)
                    failures = 0
            except ApiException as e:
                problem = f"{e.status} {e.reason}"
            except Exception as e:  # whatever came instead of an answer, also half a line: this task must go on
                problem = f"{type(e).__name__}: {e}"
            if failures == 0 and not problem.startswith("410 "):  # "too long ago" is how watches end
                message = (
                    f"the API server does not answer ({problem}); packets go on by the last flow tables, and nothing is resized "
                    "until it does"
                )
                self._agent.event("-", EventReason.API_SERVER_LOST, message)
            await asyncio.sleep(back_off(failures, CONNECT_SECONDS))
            failures += 1

    async def _list(self, api: client.CustomObjectsApi) -> str:
        listing: Any = await api.list_cluster_custom_object(
            GROUP, VERSION, PLURAL, field_selector=self._mine, _request_timeout=30.0
        )
        there = set()
        for item in listing["items"]:
            there.add(_name(item))
            self._see(item)
        for name in {*self._wanted, *self._agent.run.record.tables} - there:
            self._gone(name)
        self._listed = True
        return str(listing["metadata"]["resourceVersion"])

    async def _stream(self, api: client.CustomObjectsApi, seen: str) -> str:
        """Until the server ends it; returns where to go on."""
        stream = watch.Watch()
        async with stream:
            async for event in stream.stream(
                api.list_cluster_custom_object, GROUP, VERSION, PLURAL, field_selector=self._mine, resource_version=seen,
                allow_watch_bookmarks=True, timeout_seconds=WATCH_SECONDS, _request_timeout=WATCH_SECONDS + 10.0,
            ):  # fmt: skip
                item = event["raw_object"]
                seen = item["metadata"]["resourceVersion"]
                if event["type"] == "DELETED":
                    self._gone(_name(item))
                elif event["type"] != "BOOKMARK":
                    self._see(item)
        return seen

    def _see(self, item: dict[str, Any]) -> None:
        name, meta = _name(item), item["metadata"]
        generation = int(meta.get("generation", 0))
        before = self._wanted.get(name)
        if before is not None and before.generation == generation and not before.unreadable:
            return  # our own report came back
        self._deleted.back(name)
        if self._agent.foreign:
            nodes = (item.get("status") or {}).get("nodes") or ()
            self._former.setdefault(name, next((n for n in nodes if n.get("node") == self._node), {}))
        try:
            table = kinds.read(kinds.FlowTable, item | {"status": {}})
            if problem := following.unsupported(table.spec):
                raise ResourceError([problem])
        except ResourceError as e:
            now = Wanted(meta["namespace"], meta["name"], generation, None)
            if before is not None and before.table is not None:
                now = before  # which stays in force
            now = replace(now, unreadable=f"its FlowTable cannot be read: {e.problems[0]}")
            if now != before:
                self._agent.event(name, EventReason.FLOW_TABLE_REFUSED, now.unreadable)
        else:
            now = Wanted(meta["namespace"], meta["name"], generation, table)
        if now != before:
            self._wanted[name] = now
            self._touch(name)

    def _gone(self, name: str) -> None:
        """The table was deleted; see `deleted_tables`."""
        had = self._wanted.pop(name, None)
        self._sent.pop(name, None)
        self._refused.pop(name, None)
        if name in self._former:  # generations of another table begin anew
            self._former[name] = self._former[name] | {"observedGeneration": 0, "settled": False}
        managed = self._agent.stacks.get(name)
        if managed is None or name in self._deleted:
            return
        ended = had is not None and had.table is not None and not had.table.spec.engines
        if seconds := self._deleted.gone(name, at_once=ended or not managed.engines):
            message = f"its FlowTable is gone; its engines go on for {seconds:g} s"
            self._agent.event(name, EventReason.FLOW_TABLE_LOST, message)

    def _refuse(self, name: str, why: str) -> None:
        if self._refused.get(name) != why:
            self._refused[name] = why
            self._agent.event(name, EventReason.FLOW_TABLE_REFUSED, why)
            self._touch(name)

    def _touch(self, name: str) -> None:
        self._dirty.add(name)
        self._changed.set()

    def _later(self, name: str, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._touch, name)

    async def _hear(self) -> None:
        """Whatever the agent has done for a stack, or could not do, is reported."""
        while True:
            for name in await self._agent.news.next():
                self._touch(name)

    # ---- following and answering -----------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Whether all of it still runs."""
        return not any(task.done() for task in self._tasks)

    async def _act(self) -> None:
        looked = time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            if time.monotonic() - looked > RESYNC_SECONDS:
                # A stack that could not be followed, or that somebody took away: what was in the way may be gone.
                looked = time.monotonic()
                self._dirty.update(self._wanted, self._deleted)
            if self._agent.foreign:
                self._end_what_nobody_wants()
            for name in sorted(self._dirty - self._acting.keys()):  # those that are being acted on come back after that
                self._dirty.discard(name)
                self._acting[name] = asyncio.create_task(self._act_for(name))

    async def _act_for(self, name: str) -> None:
        """Act on one stack, and on no other: whatever takes long for it keeps nobody else's report back."""
        try:
            await self._act_on(name)
        except (ApiException, aiohttp.ClientError, OSError, TimeoutError):
            # `_watch` reports an outage of the API server; here the report is only tried again.
            self._sent.pop(name, None)
            self._later(name, 1.0)
        except Exception as e:  # a bug in one stack is not the others'
            self._agent.event(name, EventReason.INTERNAL_ERROR, f"{type(e).__name__}: {e}")
        finally:
            del self._acting[name]
            if name in self._dirty:
                self._changed.set()

    def _end_what_nobody_wants(self) -> None:
        """Another build's engines are in the way only as long as a table wants one of their stacks."""
        tables = [self._wanted[n].table for n in self._agent.run.record.tables if n in self._wanted]
        if not self._listed or any(t is None or t.spec.engines for t in tables):
            self._unwanted_since = None
            return
        now = time.monotonic()
        if self._unwanted_since is None:
            self._unwanted_since = now
        elif now - self._unwanted_since > deleted_tables.ORPHAN_SECONDS:  # as for any table that is lost
            self._begin_anew()

    async def _act_on(self, name: str) -> None:
        wanted = self._wanted.get(name)
        if wanted is None:
            await self._end_deleted(name)
            return
        if self._agent.foreign:
            stack = f"{wanted.name} --end-flows -n {wanted.namespace}"
            self._refuse(
                name,
                f"{self._agent.foreign}: of all stacks of node {self._node}, by: kubectl packetstack upgrade {stack}; "
                "until then nothing follows an engine that dies",
            )
        elif wanted.table is not None:
            await self._follow(name, wanted.table, wanted.generation)
        await self._report(name, wanted)

    async def _end_deleted(self, name: str) -> None:
        """Remove a stack whose table has been gone for long enough. If that fails, it is tried again."""
        ending = self._deleted.due(name)
        if ending is None:
            return
        async with self._agent.applying:
            if name in self._agent.stacks and name not in self._wanted:
                await self._agent.delete(name)
        self._deleted.ended(ending)

    async def _follow(self, name: str, table: kinds.FlowTable, generation: int) -> None:
        managed = self._agent.stacks.get(name)
        if managed is not None and managed.table == table and managed.generation == generation:
            return
        try:
            await self._agent.follow(name, table, generation)
            self._refused.pop(name, None)
        except ResourceError as e:
            self._refuse(name, e.problems[0])
        except (AgentError, NetlinkError) as e:
            self._refuse(name, str(e))

    async def _report(self, name: str, wanted: Wanted) -> None:
        report = self._node_report(name, wanted)
        last, when = self._sent.get(name, ({}, 0.0))
        now = asyncio.get_running_loop().time()
        if report == last or (_without_flows(report) == _without_flows(last) and now - when < FLOWS_SECONDS):
            return
        api = await self._connect()
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "FlowTable",
            "metadata": {"name": wanted.name, "namespace": wanted.namespace},
            "status": {"nodes": [report]},
        }
        await api.patch_namespaced_custom_object_status(
            GROUP, VERSION, wanted.namespace, PLURAL, wanted.name, body,
            field_manager=f"packetstack-agent-{self._node}"[:128], force=True,
            _content_type="application/apply-patch+yaml", _request_timeout=10.0,
        )  # fmt: skip
        self._sent[name] = (report, now)

    def _node_report(self, name: str, wanted: Wanted) -> dict[str, Any]:
        """What this node says of the stack, as JSON."""
        managed = self._agent.stacks.get(name)
        refused = self._refused.get(name, "")
        message = refused if self._agent.foreign else wanted.unreadable or refused
        if managed is None:
            report: dict[str, Any] = {
                "node": self._node, "observedGeneration": wanted.generation, "message": message,
                "agentVersion": version("packetstack"),
            }  # fmt: skip
            if self._agent.foreign:  # its engines are as they were, and this table is not carried out
                former = {"observedGeneration": 0} | self._former.get(name, {})
                report = former | {"node": self._node, "message": message, "agentVersion": version("packetstack")}
            return kinds.NodeReport.model_validate(report).document()
        said = firewall_report(self._agent.firewall)
        lost = preconditions.problem(managed.lacks, lost=True)
        more = {"firewall": said, "lost": f"{lost[0]}: {lost[1]}"[:1000] if lost is not None else ""}
        full = report_of(managed, self._node, message or managed.problem).model_copy(update=more)
        return full.document()


def report_of(managed: Managed, node: str, message: str) -> kinds.NodeReport:
    """What a node's agent says of a stack that it follows."""
    owned: dict[int, int] = {}
    for owner in managed.stack.owners():
        if owner is not None and owner.slot:
            owned[owner.slot] = owned.get(owner.slot, 0) + 1
    flows = managed.stack.flows_by_slot()
    has_sets = managed.table is not None and managed.table.spec.sets is not None
    engines = [
        {
            "id": e.blueprint.id,
            "name": e.blueprint.pod,
            "ready": e.ready and e.probed,
            "buckets": owned.get(e.slot, 0),
            "flows": power_of_two_below(flows.get(e.slot, 0)),
            "interface": e.blueprint.device,
            "mac": e.mac,
            "message": trouble(e),
            "configured": managed.stack.is_configured(e) if has_sets else None,
            "shard": (e.attachments.foreign or None) if e.attachments is not None else None,
        }
        for _, e in sorted(managed.engines.items())
        if not e.removing
    ]
    return kinds.NodeReport.model_validate_json(
        json.dumps(
            {
                "node": node,
                "observedGeneration": managed.generation,
                "settled": managed.converged,
                "owned": sum(owned.values()),
                "engines": engines,
                "agentVersion": version("packetstack"),
                "layout": constant("PS_LAYOUT_VERSION"),
                "shard": managed.stack.shard if managed.stack.shard != shards.FIRST else None,
                "message": message,
                "sets": _sets_of(managed) if has_sets else None,
            }
        )
    )


def _sets_of(managed: Managed) -> list[dict[str, int | str]]:
    stack = managed.stack
    left = stack.mirror.left() if stack.mirror is not None else None
    shown = []
    for number in stack.sets:
        one: dict[str, int | str] = {"id": number}
        if left is not None and number != stack.current:
            one |= {
                "keptBuckets": power_of_two_below(left.buckets),
                "connections": power_of_two_below(left.connections),
            }
            if left.connections:
                seen = time.time() - time.monotonic() + left.oldest_ticks / constant("PS_TICKS_PER_SECOND")
                one["silentSince"] = timestamp(seen - seen % SILENT_SECONDS)
        shown.append(one)
    return shown


def firewall_report(firewall: Firewall) -> str:
    """Reason and message of the condition FirewallOpen; empty when nothing is in the way."""
    reason, message = firewall_problem(firewall)
    return f"{reason}: {message}"[:1000] if message else ""


def power_of_two_below(n: int) -> int:
    """The largest power of two that is not above n; 0 for 0."""
    return 1 << (n.bit_length() - 1) if n > 0 else 0


def _without_flows(report: dict[str, Any]) -> dict[str, Any]:
    engines = [{k: v for k, v in e.items() if k != "flows"} for e in report.get("engines", [])]
    sets = [{k: v for k, v in s.items() if k not in ("connections", "silentSince")} for s in report.get("sets", [])]
    return report | {"engines": engines, "sets": sets}


def _name(item: dict[str, Any]) -> str:
    """What the agent calls a table's stack."""
    meta = item["metadata"]
    return f"{meta['namespace']}.{meta['name']}"
