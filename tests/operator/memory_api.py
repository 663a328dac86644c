"""The API server, the watches and the clock of the operator's loops, in memory, over a `Model`; for virtual time."""

import asyncio
import copy
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar
from urllib.parse import unquote

import kopf
from tests.operator.model import Conflict, Model

from packetstack_operator import claims, pods
from packetstack_operator.keeping import Keepers
from packetstack_operator.loads import Loads
from packetstack_operator.metrics import Metrics
from packetstack_operator.observing import Block, Claim, Holder, Raw, ServicePorts, Slice
from packetstack_operator.outcome import Write
from packetstack_operator.ports import PATHS, Clock, Key, Refused
from packetstack_operator.worlds import Indexes

KEY = ("shop", "edge")
PLURALS = {kind: path.rpartition("/")[2] for kind, path in PATHS.items()}

K = TypeVar("K")
V = TypeVar("V")


class Looked(Generic[K, V]):
    """An index that is made anew at each look."""

    def __init__(self, look: Callable[[], Iterable[tuple[K, V]]]) -> None:
        self._look = look

    def get(self, key: K, default: tuple[()] = (), /) -> Iterable[V]:
        return [value for k, value in self._look() if k == key] or default


class MemoryApi:
    """Carries writes out on the model and says so to the watches at once, but for what `refuse` says.

    `refuse`: called with each write, may raise. `hold`: awaited after each write, before it is answered. `asked`: each
    write, with its time. The watches are `brought`: objects by kind and name, and they lag while `lags`.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.refuse: Callable[[Write], None] = lambda write: None
        self.hold: Callable[[Write], Awaitable[None]] | None = None
        self.lags = False
        self.asked: list[tuple[float, Write]] = []
        self.brought: dict[tuple[str, str], Raw] = {}
        self.keepers: Keepers | None = None
        self.namespace_ends = False
        self.forgets: set[tuple[str, str]] = set()
        """Kind and name of objects whose deletion no watch brings: they stay in the indexes."""
        self.warnings: dict[str, str] = {}
        """UID of a pod -> the kubelet's last warning about it."""

    async def get(self, path: str) -> Raw:
        if path == f"/api/v1/namespaces/{KEY[0]}":
            meta = {"name": KEY[0]} | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if self.namespace_ends else {})
            return {"metadata": meta}
        if found := re.fullmatch(r".*/([a-z]+)\?fieldSelector=metadata\.name=(.*)", unquote(path)):
            kind = next(k for k, plural in PLURALS.items() if plural == found[1])
            raw = self.model.get(kind, found[2])
            return {"items": [raw] if raw else []}
        if found := re.search(r"/events\?fieldSelector=involvedObject\.uid=([^,]*),", unquote(path)):
            warning = self.warnings.get(found[1])
            return {"items": [{"reason": "FailedCreatePodSandBox", "message": warning}] if warning else []}
        return {"items": []}

    async def patch(self, path: str, body: Any, kind: str, manager: str) -> Raw:
        raise NotImplementedError

    async def write(self, namespace: str, write: Write) -> Raw | None:
        self.asked.append((asyncio.get_running_loop().time(), write))
        await asyncio.sleep(0.005)
        self.refuse(write)
        what = f"{write.verb} {write.kind} {write.name}"
        before = self.model.get(write.kind, write.name)
        if write.verb == "apply" and write.subresource and before is None:
            raise Refused(what, 404, "NotFound", f'{PLURALS[write.kind]} "{write.name}" not found')
        try:
            self.model.do(write)
        except Conflict:
            raise Refused(what, 409, "AlreadyExists" if write.verb == "create" else "Conflict", "") from None
        answer = copy.deepcopy(self.model.get(write.kind, write.name) or before)
        self.bring()
        if self.hold is not None:
            await self.hold(write)
        return answer

    def bring(self) -> None:
        """The watches bring what has changed."""
        if self.lags:
            return
        before, now = self.brought, {at: raw for at, raw in self.brought.items() if at in self.forgets}
        for at, raw in list(self.model.objects.items()):
            same = at in before and before[at]["metadata"]["resourceVersion"] == raw["metadata"]["resourceVersion"]
            now[at] = before[at] if same else copy.deepcopy(raw)
        self.brought = now
        for at, raw in now.items():
            if raw is not before.get(at):
                self._say(at[0], "MODIFIED" if at in before else "ADDED", raw)
        for at in set(before) - set(now):
            gone = copy.deepcopy(before[at])
            self.model.version += 1
            gone["metadata"]["resourceVersion"] = str(self.model.version)
            self._say(at[0], "DELETED", gone)

    def _say(self, kind: str, type_: str, raw: Raw) -> None:
        if self.keepers is not None:
            self.keepers.seen(kind, {"type": type_, "object": raw})

    def indexes(self) -> Indexes:
        """What the watches have brought."""

        def of(kind: str) -> Iterator[Raw]:
            return (raw for (k, _), raw in sorted(self.brought.items()) if k == kind)

        def placed(kind: str) -> Looked[Key, Raw]:
            return Looked(lambda: (((r["metadata"]["namespace"], r["metadata"]["name"]), r) for r in of(kind)))

        def labelled(kind: str) -> Looked[Key, Raw]:
            def marked() -> Iterator[Raw]:
                return (r for r in of(kind) if pods.STACK in r["metadata"].get("labels", {}))

            return Looked(
                lambda: (((r["metadata"]["namespace"], r["metadata"]["labels"][pods.STACK]), r) for r in marked())
            )

        services: Looked[Key, ServicePorts] = Looked(lambda: ())
        slices: Looked[Key, Slice] = Looked(lambda: ())
        macs: Looked[tuple[str, str], tuple[Holder, ...]] = Looked(
            lambda: (item for raw in of("FlowTable") for item in claims.holders(raw).items())
        )

        def claimed(kind: str) -> Looked[Block, tuple[Claim, ...]]:
            return Looked(lambda: (item for raw in of(kind) for item in claims.claims(raw).items()))

        return Indexes(
            stacks=placed("PacketStack"),
            tables=placed("FlowTable"),
            engines=labelled("PacketEngine"),
            pods=labelled("Pod"),
            budgets=labelled("PodDisruptionBudget"),
            services=services,
            slices=slices,
            macs=macs,
            wanted=claimed("PacketStack"),
            held=claimed("FlowTable"),
        )


class Operated:
    """A model whose operator is the control loop itself. Time is the loop's."""

    def __init__(self, replicas: int = 2, **spec: Any) -> None:
        self.model = Model(replicas, **spec)
        self.api = MemoryApi(self.model)
        self.metrics = Metrics()
        self.stopped = asyncio.Event()
        self.kubelet = self.agent = True
        """Whether they work."""
        self._began = self.model.now
        self.turned_back = 0.0
        """Seconds by which the wall clock was set back."""
        loop = asyncio.get_running_loop()
        clock = Clock(unix=lambda: self._began + loop.time() - self.turned_back, monotonic=loop.time)
        self.keepers = Keepers(self.api, self.metrics, self.model.image, Loads(self.metrics), clock)
        self.api.keepers = self.keepers
        self.body = kopf.Body(self.model.stack)

    def play(self) -> None:
        """Kubelet and agent do a step of their work, and the watches bring it."""
        self.model.now = self._began + asyncio.get_running_loop().time()
        if self.kubelet:
            self.model.kubelet()
        if self.agent:
            self.model.agent()
        self.api.bring()

    async def run(self, seconds: float) -> None:
        """The node works each 100 ms."""
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            self.play()
            await asyncio.sleep(0.1)

    async def delete(self, **metadata: Any) -> float:
        """kubectl delete, without a node that works. Returns the seconds until the deletion goes on."""
        began = asyncio.get_running_loop().time()
        self.model.ends = True
        self.stopped.set()
        stack = copy.deepcopy(self.model.stack)
        stack["metadata"] |= metadata
        await self.keepers.release(KEY, kopf.Body(stack), self.api.indexes())
        return asyncio.get_running_loop().time() - began

    def turns(self, outcome: str = "ok") -> float:
        """Turns of the loop that ended so."""
        return (
            self.metrics.registry.get_sample_value("packetstack_reconcile_duration_seconds_count", {"outcome": outcome})
            or 0.0
        )

    def errors(self, reason: str) -> float:
        """Failed turns that were counted under this reason."""
        return self.metrics.registry.get_sample_value("packetstack_reconcile_errors_total", {"reason": reason}) or 0.0

    def writes(self, since: int = 0) -> list[tuple[str, str, str, str]]:
        """Verb, kind, name and subresource of each write after the first `since`."""
        return [(w.verb, w.kind, w.name, w.subresource) for _, w in self.api.asked[since:]]


@asynccontextmanager
async def operated(replicas: int = 2, **spec: Any) -> AsyncIterator[Operated]:
    """A stack and its loop, which ends with it."""
    made = Operated(replicas, **spec)
    made.api.bring()
    task = asyncio.create_task(made.keepers.keep(KEY, made.stopped, made.body, made.api.indexes()))
    try:
        yield made
    finally:
        made.stopped.set()
        await task
