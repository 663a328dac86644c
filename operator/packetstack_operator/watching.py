"""What kopf watches for the operator: indexes, events that wake stacks, one daemon a stack, and its release.

Nothing depends on seeing each change: a stack's loop reads the indexes as they are.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import kopf

from packetstack_operator import claims, observing, pods
from packetstack_operator.keeping import Keepers
from packetstack_operator.observing import Raw, Slice
from packetstack_operator.ports import Key
from packetstack_operator.worlds import Indexes

GROUP = ("packetstack.io", "v1alpha1")
PLURALS = {
    "PacketStack": (*GROUP, "packetstacks"),
    "FlowTable": (*GROUP, "flowtables"),
    "PacketEngine": (*GROUP, "packetengines"),
    "Pod": ("", "v1", "pods"),
    "PodDisruptionBudget": ("policy", "v1", "poddisruptionbudgets"),
}
"""Kinds of which each event wakes a stack -> group, version and plural."""
SERVICES = ("", "v1", "services")
SLICES = ("discovery.k8s.io", "v1", "endpointslices")

T = TypeVar("T")


def register(registry: kopf.OperatorRegistry, keepers: Keepers) -> None:
    """Have kopf watch everything that stacks are made of, and wake and release them."""
    _index(registry)
    _wake(registry, keepers)
    _keep(registry, keepers)


# ---- indexes -------------------------------------------------------------------------------------------------------


def _index(registry: kopf.OperatorRegistry) -> None:
    def index(place: tuple[str, str, str], name: str, entry: Callable[[kopf.Body], Mapping[Any, Any]]) -> None:
        def indexed(body: kopf.Body, **_: Any) -> Mapping[Any, Any]:
            return entry(body)

        kopf.index(*place, id=name, registry=registry)(indexed)

    index(PLURALS["PacketStack"], "stacks", lambda body: {_place(body): _lean(body)})
    index(PLURALS["FlowTable"], "tables", lambda body: {_place(body): _lean(body)})
    index(PLURALS["PacketEngine"], "engines", lambda body: {_stack_of(body): _lean(body)})
    index(PLURALS["Pod"], "pods", lambda body: {_stack_of(body): _lean_pod(body)})
    index(PLURALS["PodDisruptionBudget"], "budgets", lambda body: {_stack_of(body): _lean(body)})
    index(SERVICES, "services", lambda body: {_place(body): observing.service_ports(body)})
    index(SLICES, "slices", lambda body: {_service_of(body): Slice.of(body)})
    index(PLURALS["FlowTable"], "macs", claims.holders)
    index(PLURALS["PacketStack"], "wanted", claims.claims)
    index(PLURALS["FlowTable"], "held", claims.claims)


def _indexes(found: Mapping[str, Any]) -> Indexes:
    """From the arguments that kopf gives a handler."""
    return Indexes(**{name: found[name] for name in Indexes.__dataclass_fields__})


def _place(body: kopf.Body) -> Key:
    return str(body["metadata"]["namespace"]), str(body["metadata"]["name"])


def _stack_of(body: kopf.Body) -> Key:
    return str(body["metadata"]["namespace"]), str(body["metadata"].get("labels", {}).get(pods.STACK, ""))


def _service_of(body: kopf.Body) -> Key:
    labels = body["metadata"].get("labels", {})
    return str(body["metadata"]["namespace"]), str(labels.get("kubernetes.io/service-name", ""))


def _lean(body: kopf.Body) -> Raw:
    raw: dict[str, Any] = _shared(body)
    raw["metadata"].pop("managedFields", None)
    return raw


def _lean_pod(body: kopf.Body) -> Raw:
    raw = dict(_lean(body))
    raw["spec"] = {k: v for k, v in raw["spec"].items() if k in ("nodeName", "resourceClaims")}
    return raw


def _shared(value: Any) -> Any:
    """A copy in which equal texts are one object: thousands of pods have the same keys, and most of their values."""
    if isinstance(value, Mapping):
        return {sys.intern(k): _shared(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shared(v) for v in value]
    return sys.intern(value) if type(value) is str else value


# ---- events and daemons --------------------------------------------------------------------------------------------


def _wake(registry: kopf.OperatorRegistry, keepers: Keepers) -> None:
    def watch(place: tuple[str, str, str], seen: Callable[[kopf.RawEvent], None]) -> None:
        async def brought(event: kopf.RawEvent, **_: Any) -> None:
            seen(event)

        kopf.on.event(*place, id=f"{place[2]}-seen", registry=registry)(brought)

    def of_kind(kind: str) -> Callable[[kopf.RawEvent], None]:
        return lambda event: keepers.seen(kind, event)

    for kind, place in PLURALS.items():
        watch(place, of_kind(kind))
    watch(SERVICES, lambda event: keepers.backends_changed(*_place(kopf.Body(event["object"]))))
    watch(SLICES, lambda event: keepers.backends_changed(*_service_of(kopf.Body(event["object"]))))


def _keep(registry: kopf.OperatorRegistry, keepers: Keepers) -> None:
    async def keep(body: kopf.Body, stopped: kopf.DaemonStopped, **kwargs: Any) -> None:
        await keepers.keep(_place(body), stopped, body, _indexes(kwargs))

    # Not at the end of the daemon: an operator that was away when the stack was deleted has none for it.
    async def release(body: kopf.Body, **kwargs: Any) -> None:
        await keepers.release(_place(body), body, _indexes(kwargs))

    kopf.daemon(*PLURALS["PacketStack"], id="keep", cancellation_polling=0.5, registry=registry)(keep)
    kopf.on.delete(*PLURALS["PacketStack"], id="release", registry=registry)(release)


class Forgetful(kopf.DiffBaseStorage):
    """Keeps no copy of what was handled last: nothing here asks what has changed, only what is."""

    def fetch(self, *, body: kopf.Body) -> None:
        """Nothing was handled before."""

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing is written."""
