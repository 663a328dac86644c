"""What the operator asks of the world around it: `applying` and `watching` give it in a cluster, tests in memory."""

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from packetstack_operator.observing import Raw
from packetstack_operator.outcome import Write

Key = tuple[str, str]
"""Namespace and name of a stack."""

PATHS = {
    "Pod": "/api/v1/namespaces/{}/pods",
    "FlowTable": "/apis/packetstack.io/v1alpha1/namespaces/{}/flowtables",
    "PacketEngine": "/apis/packetstack.io/v1alpha1/namespaces/{}/packetengines",
    "PacketStack": "/apis/packetstack.io/v1alpha1/namespaces/{}/packetstacks",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
}
"""Kind -> where the API server has its objects, by namespace."""


APPLY_TYPE = "application/apply-patch+yaml"
"""Media type of a server-side apply."""


class Refused(Exception):
    """The API server said no. `status`: HTTP's; `reason` and `message` are the server's own."""

    def __init__(self, what: str, status: int, reason: str, message: str, causes: frozenset[str] = frozenset()) -> None:
        super().__init__(f"{what}: {message or reason or status}")
        self.status, self.reason, self.message, self.causes = status, reason, message, causes

    @property
    def exists(self) -> bool:
        """Something of this name was there before."""
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def ending(self) -> bool:
        """The namespace is being deleted and takes nothing new."""
        return self.status == 403 and "NamespaceTerminating" in self.causes


class Api(Protocol):
    """A connection to the API server. All methods raise Refused, aiohttp.ClientError, TimeoutError or OSError."""

    async def get(self, path: str) -> Raw:
        """One object, or a list."""

    async def write(self, namespace: str, write: Write) -> Raw | None:
        """The object as it is after the write; None if it was deleted already."""

    async def patch(self, path: str, body: Any, kind: str, manager: str) -> Raw:
        """A patch of this media type. An apply takes what it names from others."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The time: tests give another one."""

    unix: Callable[[], float] = time.time
    """Unix time in seconds. It may jump: for timestamps, and for comparing with those of others."""
    monotonic: Callable[[], float] = time.monotonic
    """Seconds of a clock that only goes forward: for pauses and deadlines."""


K = TypeVar("K", contravariant=True)
V = TypeVar("V", covariant=True)


class Index(Protocol[K, V]):
    """What the watches have brought, by key."""

    def get(self, key: K, default: tuple[()], /) -> Iterable[V]:
        """All that there is of the key."""


class Stopped(Protocol):
    """Set when a stack's loop shall end."""

    def wait(self) -> Awaitable[object]:
        """Returns when it is set."""
