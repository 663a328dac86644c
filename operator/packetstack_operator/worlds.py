"""One stack's `World`: read from the indexes of the watches, our own latest writes, and a few questions to the API server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from packetstack_operator import claims, observing, pods
from packetstack_operator.observing import Block, Claim, Holder, Raw, ServicePorts, Slice, World
from packetstack_operator.overlay import Overlay
from packetstack_operator.ports import PATHS, Api, Index, Key, Refused

TROUBLE_SECONDS = 5.0
"""How long a pod may be prepared before the kubelet's warnings are read, and the time between two readings."""


@dataclass(frozen=True, slots=True)
class Indexes:
    """What the watches have brought of all stacks."""

    stacks: Index[Key, Raw]
    tables: Index[Key, Raw]
    engines: Index[Key, Raw]
    """PacketEngines, by stack."""
    pods: Index[Key, Raw]
    """By stack."""
    budgets: Index[Key, Raw]
    """PodDisruptionBudgets, by stack."""
    services: Index[Key, ServicePorts]
    slices: Index[Key, Slice]
    """EndpointSlices, by service."""
    macs: Index[tuple[str, str], tuple[Holder, ...]]
    """By node and MAC."""
    wanted: Index[Block, tuple[Claim, ...]]
    """Addresses that resources name."""
    held: Index[Block, tuple[Claim, ...]]
    """Addresses that flow tables name."""

    def claims(self, block: Block) -> list[Claim]:
        """All that name an address of the block."""
        return [claim for index in (self.wanted, self.held) for claims in index.get(block, ()) for claim in claims]


def services_of(stack: Raw) -> set[str]:
    """Names of the Services that the stack's listeners have as backends."""
    return {
        li["backends"]["service"]["name"]
        for li in stack["spec"].get("listeners") or ()
        if (li.get("backends") or {}).get("service")
    }


def read_world(key: Key, indexes: Indexes, overlay: Overlay, image: str, outdated: str) -> World | None:
    """The stack and what belongs to it, without what is between stacks; None if there is no such stack."""
    stacks = overlay.latest("PacketStack", key, indexes.stacks.get(key, ()))
    if not stacks:
        return None
    stack = stacks[0]
    uid = str(stack["metadata"]["uid"])
    tables = overlay.latest("FlowTable", key, indexes.tables.get(key, ()))
    services = services_of(stack)
    listed = {name: list(indexes.services.get((key[0], name), ())) for name in services}
    budget = pods.budget_name(key[1])
    budgets = overlay.latest("PodDisruptionBudget", key, indexes.budgets.get(key, ()))
    return World(
        stack=stack,
        image=image,
        table=next(iter(tables), None),
        pods=_owned(overlay.latest("Pod", key, indexes.pods.get(key, ())), uid),
        engines=_owned(overlay.latest("PacketEngine", key, indexes.engines.get(key, ())), uid),
        budget=next((b for b in _owned(budgets, uid) if b["metadata"]["name"] == budget), None),
        services={name: ports[0] for name, ports in listed.items() if ports},
        slices={name: tuple(indexes.slices.get((key[0], name), ())) for name in services},
        outdated=outdated,
    )


def _owned(found: Sequence[Raw], uid: str) -> tuple[Raw, ...]:
    return tuple(o for o in found if observing.owned_by(o, uid))


def with_others(key: Key, world: World, indexes: Indexes) -> World:
    """With what is between this stack and others: addresses that two of them name, and MACs that two engines have."""
    return replace(
        world,
        neighbours=_neighbours(key, world.table, indexes),
        conflict=claims.conflict(world.stack, world.table, indexes.claims),
    )


def _neighbours(key: Key, table: Raw | None, indexes: Indexes) -> dict[str, list[Holder]]:
    """MAC -> engines of other stacks on the node of this one's that have it, as this one's have. Hardly ever any."""
    found: dict[str, list[Holder]] = {}
    for node, mac in claims.holders(table) if table is not None else ():
        for other in [h for held in indexes.macs.get((node, mac), ()) for h in held]:
            if (other.namespace, other.stack) != key:
                listed = indexes.pods.get((other.namespace, other.stack), ())
                pod: Raw = next((p["metadata"] for p in listed if p["metadata"]["name"] == other.pod), {})
                found.setdefault(mac, []).append(replace(other, since=str(pod.get("creationTimestamp") or "")))
    return found


def objects(world: World, kind: str) -> Sequence[Raw]:
    """The stack's objects of this kind."""
    one = {"PacketStack": world.stack, "FlowTable": world.table, "PodDisruptionBudget": world.budget}
    if kind in one:
        found = one[kind]
        return () if found is None else (found,)
    return world.pods if kind == "Pod" else world.engines


async def with_looked_up(key: Key, world: World, api: Api) -> World:
    """With what may be there though no watch brings it. Errors as for `Api.get`."""
    found: dict[observing.Named, Raw] = {}
    for kind, name in sorted(observing.names_to_verify(world)):
        # A list, since that is a right that the watches have already.
        listed = await api.get(f"{PATHS[kind].format(key[0])}?fieldSelector=metadata.name%3D{name}")
        for raw in listed.get("items") or ():
            found[kind, name] = raw
    return observing.with_looked_up(world, found)


Troubles = dict[str, tuple[str, float]]
"""UID of a pod -> the kubelet's last warning, and when it was read, on the clock that only goes forward."""


async def with_troubles(key: Key, world: World, known: Troubles, now: float, api: Api) -> World:
    """With the kubelet's warnings about pods that are being prepared; `known` is brought up to date."""
    found = {}
    waiting = {str(p["metadata"]["uid"]): str(p["metadata"]["name"]) for p in world.pods if observing.prepares(p)}
    for uid in [u for u in known if u not in waiting]:
        del known[uid]
    for uid, name in waiting.items():
        message, read = known.setdefault(uid, ("", now))
        if now >= read + TROUBLE_SECONDS:
            message = await _last_warning(key[0], uid, api)
            known[uid] = (message, now)
        if message:
            found[name] = message
    return replace(world, troubles=found)


async def _last_warning(namespace: str, uid: str, api: Api) -> str:
    selector = f"?fieldSelector=involvedObject.uid%3D{uid},type%3DWarning,source%3Dkubelet"
    try:
        listed = (await api.get(f"/api/v1/namespaces/{namespace}/events{selector}")).get("items") or ()
    except Refused:
        return ""  # no right to read events
    last: Mapping[str, Any] | None = max(
        listed, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""), default=None
    )
    return f"{last['reason']}: {last.get('message') or ''}"[:1000] if last else ""
