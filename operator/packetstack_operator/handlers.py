"""What wakes the operator: kopf's watches keep what is there, and one task a stack observes, decides and writes."""

import asyncio
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import aiohttp
import kopf

from packetstack_core.reconciling import back_off
from packetstack_operator import deciding, observing, pods
from packetstack_operator.applying import PATHS, Api, Refused
from packetstack_operator.autoscaling import Autoscalers
from packetstack_operator.deciding import Decision
from packetstack_operator.loads import Loads
from packetstack_operator.metrics import Metrics
from packetstack_operator.observing import Block, Claim, Holder, Memory, Raw, Slice, World
from packetstack_operator.rebalancing import Rebalancers
from packetstack_operator.showing import Shown

TICK_SECONDS = 15.0
SETTLE_SECONDS = 0.05
"""Between two looks at a stack: changes come in bursts."""
RELEASE_SECONDS = 30.0
"""So long the deletion of a stack waits for its node's agent."""
REMEMBER_SECONDS = 10.0
"""So long a watch may lag behind our own writes."""
TROUBLE_SECONDS = 5.0
"""So long a pod may be prepared before the kubelet's warnings are read, and the time between two readings."""
RECHECK_SECONDS = 300.0
"""So long a stack at rest, of which nothing changes, is not decided about again."""
GROUP = ("packetstack.io", "v1alpha1")
CHILDREN = {"Pod": "pods", "FlowTable": "flowtables", "PacketEngine": "packetengines", "PodDisruptionBudget": "pdbs"}
CLAIMS = ("wanted", "held")
"""Indexes of addresses by block: of resources and of flow tables."""

MAYBE_TAKEN = ("Pod", "PodDisruptionBudget")
"""Kinds of which others make objects too."""

Key = tuple[str, str]
"""Namespace and name of a stack."""

log = logging.getLogger(__name__)


class Operator:
    """All stacks. One for the life of the process."""

    def __init__(self, api: Api, metrics: Metrics, image: str, loads: Loads) -> None:
        self.api, self.metrics, self.image, self.loads = api, metrics, image, loads
        self.autoscalers = Autoscalers(api, loads, metrics)
        self.rebalancers = Rebalancers(loads, metrics, self.wake)
        self.outdated = ""
        self._wakers: dict[Key, asyncio.Event] = {}
        self._followers: dict[Key, set[Key]] = {}
        """Service -> stacks that have it as backends."""
        self._contending: set[Key] = set()
        """Stacks of which another one has an address."""
        self._recent: dict[tuple[str, str, str], tuple[Raw, float]] = {}
        """Kind, namespace, name -> what we wrote last, and when: the watch may not have brought it yet."""

    # ---- what is there ---------------------------------------------------------------------------------------

    def seen(self, kind: str, event: Mapping[str, Any]) -> None:
        """A watch has brought something: wake its stack."""
        body, type_ = event["object"], event["type"]
        meta = body["metadata"]
        at = (kind, meta["namespace"], meta["name"])
        known = self._recent.get(at)
        if known is not None and (type_ == "DELETED" or _version(body) >= _version(known[0])):
            del self._recent[at]
        if kind in ("FlowTable", "PacketStack"):
            for key in self._contending:  # the address may be free by now
                self.wake(key)
        stack = meta["name"] if kind in ("FlowTable", "PacketStack") else meta.get("labels", {}).get(pods.STACK)
        self.wake((meta["namespace"], str(stack)))
        for owner in meta.get("ownerReferences") or ():  # its labels may say another one
            if owner["name"] != stack:
                self.wake((meta["namespace"], str(owner["name"])))

    def backends_changed(self, namespace: str, service: str) -> None:
        """Of a Service: wake the stacks that follow it."""
        for key in self._followers.get((namespace, service), ()):
            self.wake(key)

    def wake(self, key: Key) -> None:
        """Look at the stack soon."""
        if key in self._wakers:
            self._wakers[key].set()

    def _latest(self, kind: str, key: Key, found: Iterable[Raw]) -> list[Raw]:
        """What the watch has brought, or our own later write."""
        objects = {str(o["metadata"]["name"]): o for o in found}
        for at, (written, when) in list(self._recent.items()):
            if time.monotonic() > when + REMEMBER_SECONDS:
                del self._recent[at]
            elif at[:2] == (kind, key[0]) and _stack_of(written) == key[1]:
                present = objects.get(at[2])
                if present is None or _version(written) > _version(present):
                    objects[at[2]] = written
        return [o for _, o in sorted(objects.items())]

    def _world(self, key: Key, indices: Mapping[str, kopf.Index[Key, Any]], memory: Memory) -> World | None:
        """All that a decision takes into account."""
        world = self._seen(key, indices)
        if world is None:
            return None
        conflict = observing.conflict(world.stack, world.table, lambda block: _claims(block, indices))
        (self._contending.add if conflict is not None else self._contending.discard)(key)
        return replace(
            world,
            neighbours=_neighbours(key, world.table, indices),
            conflict=conflict,
            proposal=self.rebalancers.proposal(key),
            loads=self.rebalancers.engine_loads(key),
            memory=memory,
        )

    def _seen(self, key: Key, indices: Mapping[str, kopf.Index[Key, Any]]) -> World | None:
        """The stack and what belongs to it: enough for those who measure."""
        stacks = self._latest("PacketStack", key, indices["packetstacks"].get(key, ()))
        if not stacks:
            return None
        stack = stacks[0]
        uid = str(stack["metadata"]["uid"])
        found = {kind: self._latest(kind, key, indices[name].get(key, ())) for kind, name in CHILDREN.items()}
        services = {
            li["backends"]["service"]["name"]
            for li in stack["spec"].get("listeners") or ()
            if (li.get("backends") or {}).get("service")
        }
        self._follow(key, services)
        table = next(iter(found["FlowTable"]), None)
        listed = {name: list(indices["services"].get((key[0], name), ())) for name in services}
        return World(
            stack=stack,
            image=self.image,
            table=table,
            pods=tuple(p for p in found["Pod"] if observing.mine(p, uid)),
            engines=tuple(e for e in found["PacketEngine"] if observing.mine(e, uid)),
            budget=next(
                (
                    b
                    for b in found["PodDisruptionBudget"]
                    if b["metadata"]["name"] == pods.budget_name(key[1]) and observing.mine(b, uid)
                ),
                None,
            ),
            services={name: ports[0] for name, ports in listed.items() if ports},
            slices={name: tuple(indices["endpointslices"].get((key[0], name), ())) for name in services},
            outdated=self.outdated,
        )

    async def _with_doubtful(self, key: Key, world: World) -> World:
        found = {}
        for kind, name in sorted(observing.doubtful(world)):
            # A list, since that is a right that the watches have already.
            listed = await self.api.get(f"{PATHS[kind].format(key[0])}?fieldSelector=metadata.name%3D{name}")
            for raw in listed.get("items") or ():
                found[kind, name] = raw
        return observing.looked_up(world, found)

    async def _with_troubles(self, key: Key, world: World, known: dict[str, tuple[str, float]]) -> World:
        """`known`: UID of a pod -> the kubelet's last warning, and when it was read."""
        found = {}
        now = time.monotonic()
        waiting = {str(p["metadata"]["uid"]): str(p["metadata"]["name"]) for p in world.pods if observing.prepares(p)}
        for uid in [u for u in known if u not in waiting]:
            del known[uid]
        for uid, name in waiting.items():
            message, read = known.setdefault(uid, ("", now))
            if now >= read + TROUBLE_SECONDS:
                message = await self._last_warning(key[0], uid)
                known[uid] = (message, now)
            if message:
                found[name] = message
        return replace(world, troubles=found)

    async def _last_warning(self, namespace: str, uid: str) -> str:
        selector = f"?fieldSelector=involvedObject.uid%3D{uid},type%3DWarning,source%3Dkubelet"
        try:
            listed = (await self.api.get(f"/api/v1/namespaces/{namespace}/events{selector}")).get("items") or ()
        except Refused:
            return ""  # no right to look
        last = max(listed, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""), default=None)
        return f"{last['reason']}: {last.get('message') or ''}"[:1000] if last else ""

    def _follow(self, key: Key, services: Iterable[str]) -> None:
        wanted = {(key[0], name) for name in services}
        for service, followers in list(self._followers.items()):
            if service not in wanted:
                followers.discard(key)
                if not followers:
                    del self._followers[service]
        for service in wanted:
            self._followers.setdefault(service, set()).add(key)

    # ---- one stack -------------------------------------------------------------------------------------------

    async def keep(
        self, key: Key, stopped: kopf.DaemonStopped, body: kopf.Body, indices: Mapping[str, kopf.Index[Key, Any]]
    ) -> None:
        """Until the stack is deleted, or the operator ends."""
        woken = self._wakers[key] = asyncio.Event()
        ending = asyncio.ensure_future(_until(stopped))
        shown = Shown()
        memory, failures, ending_namespace = Memory(), 0, False
        troubles: dict[str, tuple[str, float]] = {}
        look = partial(self._seen, key, indices)
        rested: tuple[World, float] | None = None
        """What was there when there was nothing to do, and until when that is believed."""
        try:
            while not stopped:
                woken.clear()
                pause, outcome = TICK_SECONDS, "error"
                began = time.monotonic()
                try:
                    world = self._world(key, indices, memory)
                    if world is not None and (rested is None or world != rested[0] or began > rested[1]):
                        brought = world
                        self.autoscalers.follow(key, world.stack, body, look)
                        self.rebalancers.follow(key, world.stack, body, look)
                        world = await self._with_doubtful(key, world)
                        world = await self._with_troubles(key, world, troubles)
                        if world.troubles or any(map(observing.prepares, world.pods)):
                            pause = TROUBLE_SECONDS
                        # Pods are deleted first with a namespace, and none can be made for them: let them go at once.
                        decide = deciding.release if ending_namespace else deciding.decide
                        decision = decide(world, time.time())
                        memory = decision.memory
                        rested = (brought, began + RECHECK_SECONDS) if _rests(world, decision) else None
                        memory = await self._carry_out(key, decision, memory, woken)
                        shown.show(body, decision.events)
                        self.metrics.stacks.known[key] = (world.stack, world.engines)
                        if decision.wake_at is not None:
                            pause = min(pause, max(0.0, decision.wake_at - time.time()))
                    outcome = "ok"
                except Refused as e:
                    pause = self._refused(key, e, failures)
                    ending_namespace |= e.ending
                    if e.status == 409:
                        outcome = "conflict"
                except (aiohttp.ClientError, TimeoutError, OSError) as e:
                    self.metrics.errors.labels("Unreachable").inc()
                    log.warning("stack %s/%s: API server: %s: %s", *key, type(e).__name__, e)
                    pause = _back_off(failures)
                except Exception:  # a bug: the next look may do better, other stacks go on
                    self.metrics.errors.labels("InternalError").inc()
                    log.exception("stack %s/%s: internal error", *key)
                    pause = _back_off(failures)
                failed = outcome != "ok"
                failures = failures + 1 if failed else 0
                self.metrics.duration.labels(outcome).observe(time.monotonic() - began)
                await _first(ending, asyncio.sleep(pause if failed else min(SETTLE_SECONDS, pause)))
                if not failed and not stopped:
                    await _first(ending, woken.wait(), timeout=pause)
            if stopped.reason is not None and kopf.DaemonStoppingReason.RESOURCE_DELETED in stopped.reason:
                await self._release(key, body, woken, indices)
        finally:
            ending.cancel()
            self._contending.discard(key)
            if self._wakers.get(key) is woken:
                del self._wakers[key]
            self._follow(key, ())
            self.metrics.stacks.known.pop(key, None)
            self.autoscalers.forget(key)
            self.rebalancers.forget(key)
            self.loads.forget(key)

    async def _carry_out(self, key: Key, decision: Decision, memory: Memory, woken: asyncio.Event) -> Memory:
        for write in decision.writes:
            try:
                self.metrics.writes.labels(write.verb, write.kind).inc()
                written = await self.api.write(key[0], write)
            except Refused as e:
                if write.verb == "create" and write.kind in MAYBE_TAKEN and e.exists:
                    # Ours, and the watch has not brought it, or somebody else's: the next look finds out.
                    woken.set()
                    return replace(memory, taken=memory.taken | {(write.kind, write.name)})
                if (write.verb, write.kind) != ("create", "Pod") or e.status not in (400, 403, 422, 500) or e.ending:
                    raise
                # The API server does not take pods of this shape, or no more of them. Say so, and try less often.
                log.warning("stack %s/%s: %s", *key, e)
                self.metrics.errors.labels("PodRefused").inc()
                reason = "QuotaExceeded" if "exceeded quota" in e.message else "PodRefused"
                pause = back_off(memory.failures)
                woken.set()
                return replace(
                    memory,
                    failures=memory.failures + 1,
                    create_after=time.time() + pause,
                    problem=(reason, f"pod {write.name}: {e.message}"),
                )
            at = (write.kind, key[0], write.name)
            if written is not None:
                self._recent[at] = (written, time.monotonic())
            if write.kind == "Pod" and write.verb != "apply":
                self.metrics.scaled.labels("up" if write.verb == "create" else "down").inc()
        return memory

    def _refused(self, key: Key, error: Refused, failures: int) -> float:
        """What to do about a refused request: the pause before the next look, in seconds."""
        if error.status == 409:
            # Decided from something that is older than what is there: the watch brings it. That is no error.
            return 0.1 * (1 << min(failures, 3))
        if error.ending or error.status == 404:
            return 0.1  # namespace or stack is being deleted
        self.metrics.errors.labels("Refused").inc()
        log.warning("stack %s/%s: %s", *key, error)
        return _back_off(failures)

    async def _release(
        self, key: Key, body: kopf.Body, woken: asyncio.Event, indices: Mapping[str, kopf.Index[Key, Any]]
    ) -> None:
        """Give back what the node holds, in order. Whatever happens, the deletion goes on after `RELEASE_SECONDS`."""
        if "orphan" in (body["metadata"].get("finalizers") or ()):
            return  # kubectl delete --cascade=orphan: the engines stay, and may be taken over by another stack
        uid = body["metadata"]["uid"]
        deadline = time.monotonic() + RELEASE_SECONDS
        while time.monotonic() < deadline:
            woken.clear()
            try:
                world = self._world(key, indices, Memory())
                if world is None or world.uid != uid or await self._namespace_ends(key[0]):
                    return
                decision = deciding.release(world, time.time())
                await self._carry_out(key, decision, decision.memory, woken)
                if decision.released:
                    return
            except Refused as e:
                if e.status != 409:
                    log.warning("stack %s/%s: release: %s", *key, e)
                await asyncio.sleep(0.2)
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                log.warning("stack %s/%s: release: API server: %s", *key, e)
                await asyncio.sleep(1.0)
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await woken.wait()
        log.warning("stack %s/%s: its node has not answered in %g s; it is deleted all the same", *key, RELEASE_SECONDS)

    async def _namespace_ends(self, namespace: str) -> bool:
        """A namespace that is being deleted takes everything with it, in its own order."""
        try:
            found = await self.api.get(f"/api/v1/namespaces/{namespace}")
        except Refused:
            return False  # no right to look, in an operator for named namespaces
        return bool(found["metadata"].get("deletionTimestamp"))


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """All that kopf has to watch. Only indexes, events and one daemon: nothing depends on seeing each change."""

    def lean(body: kopf.Body) -> dict[str, Any]:
        raw: dict[str, Any] = _shared(body)
        raw["metadata"].pop("managedFields", None)
        return raw

    def lean_pod(body: kopf.Body) -> dict[str, Any]:
        raw = lean(body)
        raw["spec"] = {k: v for k, v in raw["spec"].items() if k in ("nodeName", "resourceClaims")}
        return raw

    def by_name(name: str, namespace: str, body: kopf.Body, **_: Any) -> dict[Key, Raw]:
        return {(namespace, name): lean(body)}

    def by_stack(namespace: str, body: kopf.Body, **_: Any) -> dict[Key, Raw]:
        return {(namespace, body["metadata"].get("labels", {}).get(pods.STACK, "")): lean(body)}

    def pod_by_stack(namespace: str, body: kopf.Body, **_: Any) -> dict[Key, Raw]:
        return {(namespace, body["metadata"].get("labels", {}).get(pods.STACK, "")): lean_pod(body)}

    def by_mac(body: kopf.Body, **_: Any) -> dict[tuple[str, str], tuple[Holder, ...]]:
        return observing.holders(body)

    def by_block(body: kopf.Body, **_: Any) -> dict[Block, tuple[Claim, ...]]:
        return observing.claims(body)

    def by_service(namespace: str, body: kopf.Body, **_: Any) -> dict[Key, Slice]:
        return {(namespace, _service_of(body)): Slice.of(body)}

    def ports(name: str, namespace: str, body: kopf.Body, **_: Any) -> dict[Key, observing.ServicePorts]:
        return {(namespace, name): observing.service_ports(body)}

    index: Any = kopf.index
    index(*GROUP, "packetstacks", id="packetstacks", registry=registry)(by_name)
    index(*GROUP, "flowtables", id="flowtables", registry=registry)(by_name)
    index(*GROUP, "flowtables", id="macs", registry=registry)(by_mac)
    index(*GROUP, "packetstacks", id="wanted", registry=registry)(by_block)
    index(*GROUP, "flowtables", id="held", registry=registry)(by_block)
    index(*GROUP, "packetengines", id="packetengines", registry=registry)(by_stack)
    index("", "v1", "pods", id="pods", registry=registry)(pod_by_stack)
    index("policy", "v1", "poddisruptionbudgets", id="pdbs", registry=registry)(by_stack)
    index("", "v1", "services", id="services", registry=registry)(ports)
    index("discovery.k8s.io", "v1", "endpointslices", id="endpointslices", registry=registry)(by_service)

    def watch(group: str, version: str, plural: str, kind: str) -> None:
        async def seen(event: Mapping[str, Any], **_: Any) -> None:
            operator.seen(kind, event)

        decorate: Any = kopf.on.event(group, version, plural, id=f"{plural}-seen", registry=registry)
        decorate(seen)

    watch(*GROUP, "packetstacks", "PacketStack")
    watch(*GROUP, "flowtables", "FlowTable")
    watch(*GROUP, "packetengines", "PacketEngine")
    watch("", "v1", "pods", "Pod")
    watch("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")

    async def service_changed(namespace: str, name: str, **_: Any) -> None:
        operator.backends_changed(namespace, name)

    async def slice_changed(namespace: str, body: kopf.Body, **_: Any) -> None:
        operator.backends_changed(namespace, _service_of(body))

    on_event: Any = kopf.on.event
    on_event("", "v1", "services", id="service-changed", registry=registry)(service_changed)
    on_event("discovery.k8s.io", "v1", "endpointslices", id="slice-changed", registry=registry)(slice_changed)

    names = {"packetstacks", "macs", *CLAIMS, "services", "endpointslices", *CHILDREN.values()}

    async def keep(name: str, namespace: str, body: kopf.Body, stopped: kopf.DaemonStopped, **kwargs: Any) -> None:
        await operator.keep((namespace, name), stopped, body, {i: kwargs[i] for i in names})

    daemon: Any = kopf.daemon(*GROUP, "packetstacks", id="keep", cancellation_polling=0.5, registry=registry)
    daemon(keep)


def _shared(value: Any) -> Any:
    """A copy in which equal texts are one object: thousands of pods have the same keys, and most of their values."""
    if isinstance(value, Mapping):
        return {sys.intern(k): _shared(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shared(v) for v in value]
    return sys.intern(value) if type(value) is str else value


def _rests(world: World, decision: Decision) -> bool:
    """Whether the same decision would be made of the same world at any later time."""
    conditions = (world.stack.get("status") or {}).get("conditions") or ()
    return (
        not decision.writes
        and decision.wake_at is None
        and decision.memory == world.memory
        and not world.troubles
        and not any(map(observing.prepares, world.pods))
        and not any(map(observing.terminating, world.pods))
        and any(c["type"] == "Progressing" and c["status"] == "False" for c in conditions)
    )


def _claims(block: Block, indices: Mapping[str, kopf.Index[Any, Any]]) -> list[Claim]:
    return [claim for name in CLAIMS for claims in indices[name].get(block, ()) for claim in claims]


def _neighbours(key: Key, table: Raw | None, indices: Mapping[str, kopf.Index[Any, Any]]) -> dict[str, list[Holder]]:
    """MAC -> engines of other stacks on the node of this one's that have it, as this one's have. Hardly ever any."""
    found: dict[str, list[Holder]] = {}
    for node, mac in observing.holders(table) if table is not None else ():
        for other in [h for held in indices["macs"].get((node, mac), ()) for h in held]:
            if (other.namespace, other.stack) != key:
                listed = indices["pods"].get((other.namespace, other.stack), ())
                pod: Raw = next((p["metadata"] for p in listed if p["metadata"]["name"] == other.pod), {})
                found.setdefault(mac, []).append(replace(other, since=str(pod.get("creationTimestamp") or "")))
    return found


def _version(raw: Raw) -> int:
    text = str(raw["metadata"].get("resourceVersion") or "0")
    return int(text) if text.isdigit() else 0


def _stack_of(raw: Raw) -> str:
    if raw.get("kind") in ("FlowTable", "PacketStack"):
        return str(raw["metadata"]["name"])
    return str(raw["metadata"].get("labels", {}).get(pods.STACK, ""))


def _service_of(raw: Raw) -> str:
    return str(raw["metadata"].get("labels", {}).get("kubernetes.io/service-name", ""))


def _back_off(failures: int) -> float:
    return back_off(min(failures, 3))


async def _until(stopped: Any) -> None:
    await stopped.wait()


async def _first(ending: "asyncio.Future[None]", other: Any, timeout: float | None = None) -> None:
    """Until one of the two is done, or `timeout` seconds have passed."""
    task = asyncio.ensure_future(other)
    try:
        await asyncio.wait([ending, task], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
