"""Loads of stacks, asked of the agents of their nodes. Only those who decide by load wait for an answer."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

import aiohttp

from packetstack_core.backing_off import ANSWER_SECONDS, back_off
from packetstack_core.load import KEEP_SECONDS, History, Snapshot, StackLoad, from_json
from packetstack_operator import observing
from packetstack_operator.metrics import Metrics
from packetstack_operator.observing import World

DEFAULT_PORT = 9470
TIMEOUT_SECONDS = 1.0
MAX_BYTES = 8 << 20
"""Longest answer that is read; that of the largest stack is shorter."""
Key = tuple[str, str]
"""Namespace and name of a stack."""


class LoadError(Exception):
    """Why a load is not known, for people."""


@dataclass(slots=True)
class _Known:
    """What agents said of one stack, with or without its buckets."""

    address: str
    history: History = field(default_factory=History)
    last: Snapshot | None = None
    failures: int = 0
    """In a row."""
    answered: float = -inf
    """When the agent answered last, on the monotonic clock."""
    asked: float = 0.0
    """When somebody wanted to know, on the monotonic clock."""
    ask_after: float = 0.0
    """On the clock that only goes forward."""
    read: float = field(default_factory=time.time)
    """When the agent answered last; at first, when it was asked for the first time."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class Loads:
    """Loads of all stacks that somebody asks for. Close it in the end."""

    def __init__(self, metrics: Metrics, port: int = DEFAULT_PORT) -> None:
        self.metrics, self.port = metrics, port
        self._known: dict[tuple[Key, bool], _Known] = {}
        self._session: aiohttp.ClientSession | None = None
        metrics.loads.ages = self._ages

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()

    def forget(self, key: Key) -> None:
        """Nobody decides by this stack's load any more."""
        for buckets in (False, True):
            self._known.pop((key, buckets), None)

    async def ask(self, key: Key, world: World, *, buckets: bool = False, age: float = 0.0) -> None:
        """Ask the stack's agent once. Raises LoadError.

        `buckets`: for the packets of each bucket, too. `age`: an answer of at most so many seconds ago will do.
        """
        address = address_of(world)
        if address is None:
            raise LoadError("no engine of the stack has a node")
        known = self._known.get((key, buckets))
        if known is None or known.address != address:  # another node has another clock
            known = self._known[key, buckets] = _Known(address)
        known.asked = time.monotonic()
        async with known.asking:  # two who ask at once get their answers in order
            if known.asked < known.answered + age:
                return
            if time.monotonic() < known.ask_after:
                raise LoadError(f"agent {address}:{self.port} did not answer, and is asked again soon")
            try:
                snapshot = await self._get(key, address, buckets)
            except LoadError:
                known.ask_after = time.monotonic() + back_off(known.failures, ANSWER_SECONDS)
                known.failures += 1
                raise
            self._note(known, snapshot, buckets)

    def _note(self, known: _Known, snapshot: Snapshot, buckets: bool) -> None:
        now = time.time()
        if buckets:  # there are thousands: no more than two times are kept, and none of a long time ago
            known.history = History()
            if known.last is not None and snapshot.time - known.last.time <= KEEP_SECONDS:
                known.history.add(known.last, known.read)
        known.history.add(snapshot, now)
        known.last, known.read, known.failures = snapshot, now, 0
        known.answered = time.monotonic()

    def load(self, key: Key, seconds: float, *, buckets: bool = False) -> StackLoad | None:
        """Load of the last `seconds` before the agent's last answer; with `buckets`, since the answer before that one.

        None before two answers. `EngineLoad.name` is the name of the engine's pod, `StackLoad.read` a Unix time.
        """
        known = self._known.get((key, buckets))
        return known.history.load(seconds) if known is not None else None

    def age(self, key: Key) -> float:
        """Seconds since the agent answered last for this stack; infinite if it has not. No wall clock can turn it back."""
        known = self._known.get((key, False))
        return time.monotonic() - known.answered if known is not None else inf

    async def _get(self, key: Key, address: str, buckets: bool) -> Snapshot:
        host = f"[{address}]" if ":" in address else address
        who = f"agent {host}:{self.port}"
        parameters = {"stack": ".".join(key), "buckets": str(int(buckets))}
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=8)
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        reason = "Unreachable"
        try:
            async with self._session.get(f"http://{host}:{self.port}/load", params=parameters) as answer:
                if answer.status != 200:
                    reason = "Refused"
                    text = (await answer.content.read(200)).decode(errors="replace").strip()
                    raise LoadError(f"{who}: {answer.status} {text}")
                reason = "Unreadable"
                data = bytearray()
                async for chunk in answer.content.iter_any():
                    data += chunk
                    if len(data) > MAX_BYTES:
                        raise LoadError(f"{who}: its answer is longer than {MAX_BYTES} bytes")
                return from_json(bytes(data))
        except LoadError:
            self.metrics.load_errors.labels(reason).inc()
            raise
        except TimeoutError:
            self.metrics.load_errors.labels("Unreachable").inc()
            raise LoadError(f"{who}: no answer in {TIMEOUT_SECONDS:g} s; see that it runs and can be reached") from None
        except (aiohttp.ClientError, OSError, ValueError) as e:
            self.metrics.load_errors.labels(reason).inc()
            raise LoadError(f"{who}: {e}") from None

    def _ages(self) -> Iterator[tuple[Key, float]]:
        now, recent = time.time(), time.monotonic() - KEEP_SECONDS
        latest: dict[Key, float] = {}
        for (key, _), known in self._known.items():
            if known.asked < recent:
                continue  # nobody decides by it any more
            latest[key] = max(known.read, latest.get(key, 0.0))
        for key, read in sorted(latest.items()):
            yield key, max(0.0, now - read)


def address_of(world: World) -> str | None:
    """Address of the stack's node, as its pods say; None while none of them is there."""
    node = (world.table or {}).get("spec", {}).get("node")
    for pod in world.pods:
        address = pod.get("status", {}).get("hostIP")
        if node and address and observing.node_of(pod) == node:
            return str(address)
    return None
