"""One stack's shared state on this node: arena, configuration, secret, its entries in the director.

Functions here block briefly; they are called from worker threads or where a few milliseconds do not matter.
"""

import asyncio
import math
import os
import secrets
import time
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from packetstack_agent import processes
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import PROTOCOLS, call, constant, ffi, lib, packed, text, unpacked, wire
from packetstack_core import hashing, maglev
from packetstack_core.kinds import FlowTable
from packetstack_core.load import History
from packetstack_core.planning import NOBODY, Move, Owner
from packetstack_core.resources import Address, Listener, Network, PacketStack

BATCH = 512
"""Buckets of one fence: what arrives for them meanwhile must fit into a quarter of a park ring."""
FENCE_LIMIT_MS = 500

Place = tuple[Address, int]
"""Address and port of a backend."""
Listening = tuple[Address, int, str]
"""Address, port and protocol of a listener."""

BALANCING = {"Maglev": "PS_MAGLEV", "RoundRobin": "PS_ROUND_ROBIN", "LeastFlows": "PS_LEAST_FLOWS"}

# Seconds by ps_flow_state; the idle limits of established TCP and assured UDP are the resource's.
TIMEOUTS = {
    "PS_FLOW_SYN": 60,
    "PS_FLOW_SYN_ACK": 60,
    "PS_FLOW_CLOSING": 240,
    "PS_FLOW_CLOSED": 240,
    "PS_FLOW_TIME_WAIT": 60,
    "PS_FLOW_UNANSWERED": 120,
}


@dataclass
class Report:
    """Outcome of a series of transfers."""

    moved: int = 0
    fences: int = 0
    hold_ns: list[int] = field(default_factory=list)
    stalled: int = 0
    """Slot of an engine that did not answer, 0 = none."""


class Stack:
    """A stack on this node. `index` (0..63) says where its flow table begins."""

    def __init__(self, name: str, resource: PacketStack, index: int, directory: Path, director: Any) -> None:
        self.name = name
        """Unique on the node: the resource's name, in a cluster with its namespace before it."""
        self.resource = resource
        self.index = index
        self.directory = directory
        self.director = director
        self.healthy: Mapping[Place, bool] = {}
        self._listeners: set[Listening] = set()
        self._snat: set[Address] = set()
        self._allowed: dict[Listening, frozenset[Network]] = {}
        """Sources of listeners that take packets of these alone."""
        self._offset = index * constant("PS_MAX_BUCKETS")
        directory.mkdir(parents=True, exist_ok=True)
        self.key = _secret(directory / "secret")
        self.arena_path, self.config_path = directory / "arena", directory / "config"
        table = resource.spec.flow_table
        if self.arena_path.exists():
            self.arena = call(lib().ps_arena_open, text(self.arena_path), 0)
        else:
            self.arena = call(lib().ps_arena_create, text(self.arena_path), table.buckets, table.max_flows)
        if self.config_path.exists():
            self.config = call(lib().ps_config_open, text(self.config_path), 0)
        else:
            self.config = call(lib().ps_config_create, text(self.config_path))
        self._words = lib().ps_director_words(director)
        self._egress = lib().ps_director_egress(director)

    @property
    def buckets(self) -> int:
        """Size of the flow table."""
        return int(self.arena.buckets)

    # ---- director and configuration ---------------------------------------------------------------------------

    def direct(self) -> None:
        """Make the director's listeners and SNAT addresses those of the resource."""
        target = ffi.new(
            "struct ps_target *",
            {
                "key0": self.key[0],
                "key1": self.key[1],
                "offset": self._offset,
                "mask": self.buckets - 1,
                "stack": self.index,
            },
        )
        listeners = self.resource.listening()
        snat = set(self.resource.snat_addresses())
        allowed: dict[Listening, frozenset[Network]] = {
            (li.address, li.port, li.protocol): frozenset(li.allowed_sources)
            for li in self.resource.spec.listeners
            if li.allowed_sources
        }
        for address in snat - self._snat:
            call(lib().ps_director_snat, self.director, packed(address), target)
        left = self._sources() if allowed.keys() - self._allowed.keys() else {}  # by an earlier agent
        for place in listeners:
            if place not in self._listeners or self._allowed.get(place) != allowed.get(place):
                had = self._allowed.pop(place, None) or left.get(place, frozenset())
                self._direct(place, target, had, allowed.get(place, frozenset()))
        self._withdraw(self._listeners - listeners, self._snat - snat)
        self._listeners, self._snat = listeners, snat

    def _direct(self, place: Listening, target: Any, had: frozenset[Network], allowed: frozenset[Network]) -> None:
        """Who may send before and after may always: sources come before their listener asks for them, and go after."""
        for source in allowed - had:
            self._allow(place, source, True)
        target.flags = constant("PS_TARGET_ALLOWED") if allowed else 0
        self._listen(place, target)
        for source in had - allowed:
            self._allow(place, source, False)
        if allowed:
            self._allowed[place] = allowed

    def _listen(self, place: Listening, target: Any) -> None:
        address, port, protocol = place
        call(lib().ps_director_listener, self.director, packed(address), wire(port), PROTOCOLS[protocol], target)

    def _allow(self, place: Listening, source: Network, allow: bool) -> None:
        entry = ffi.new("struct ps_allowed *", {"port": wire(place[1]), "protocol": PROTOCOLS[place[2]]})
        ffi.memmove(entry.address, packed(place[0]), 16)
        ffi.memmove(entry.source, packed(source.network_address), 16)
        entry.prefix = source.prefixlen
        call(lib().ps_director_allow, self.director, entry, allow)

    def _sources(self) -> dict[Listening, frozenset[Network]]:
        """Allowed sources by listener, as the director has them: of all stacks."""
        entries = ffi.new("struct ps_allowed[]", 1 << 16)
        names = {number: name for name, number in PROTOCOLS.items()}
        found: dict[Listening, set[Network]] = {}
        for i in range(lib().ps_director_allowed(self.director, entries, len(entries))):
            entry = entries[i]
            place = (unpacked(bytes(entry.address)), wire(entry.port), names[entry.protocol])
            source = ip_network(f"{unpacked(bytes(entry.source))}/{entry.prefix}")
            found.setdefault(place, set()).add(source)
        return {place: frozenset(sources) for place, sources in found.items()}

    def _withdraw(self, listeners: Iterable[Listening], snat: Iterable[Address]) -> None:
        for place in listeners:
            self._listen(place, ffi.NULL)
            for source in self._allowed.pop(place, frozenset()):
                self._allow(place, source, False)
        for address in snat:
            call(lib().ps_director_snat, self.director, packed(address), ffi.NULL)

    async def configure(self, engines: Sequence[Engine]) -> int:
        """Write the resource and the backends' health as a new configuration; returns its generation.

        Waits until every running core has left the buffer that is written to.
        """
        generation = int(self.config.generation)
        deadline = time.monotonic() + 2
        while any(
            e.ready and e.core(c).thread and e.core(c).config_seen < generation
            for e in engines
            for c in range(e.blueprint.cores)
        ):
            wake(engines)
            if time.monotonic() > deadline:
                raise AgentError(
                    f"stack {self.name}: an engine does not take the configuration; see packetstack describe"
                )
            await asyncio.sleep(0.002)
        self._write(self.config.buffer[(generation + 1) & 1], generation + 1)
        self.config.generation = generation + 1
        wake(engines)
        return generation + 1

    def _write(self, c: Any, generation: int) -> None:
        spec = self.resource.spec
        c.generation = generation
        c.key0, c.key1 = self.key
        c.mask = self.buckets - 1
        c.unknown_flow_reset = spec.unknown_flow == "Reset"
        c.mtu = 1500
        ticks = constant("PS_TICKS_PER_SECOND")
        idle = {
            "PS_FLOW_ESTABLISHED": spec.flow_table.tcp_idle_timeout_seconds,
            "PS_FLOW_ANSWERED": spec.flow_table.udp_idle_timeout_seconds,
            "PS_FLOW_ASSURED": spec.flow_table.udp_idle_timeout_seconds,
        }
        for state, seconds in (TIMEOUTS | idle).items():
            c.timeout[constant(state)] = seconds * ticks
        for i, address in enumerate(self.resource.snat_addresses()):
            c.snat[i].id = self._address(address)
            c.snat[i].family = address.version
            ffi.memmove(c.snat[i].address, packed(address), 16)
        c.snats = len(self.resource.snat_addresses())
        backends = lookup = 0
        # The engine searches by bytes: address, port, protocol.
        order = sorted(
            spec.listeners,
            key=lambda li: packed(li.address) + li.port.to_bytes(2, "big") + bytes([PROTOCOLS[li.protocol]]),
        )
        for i, listener in enumerate(order):
            entry = c.listener[i]
            usable = self.usable(listener)
            ffi.memmove(entry.address, packed(listener.address), 16)
            entry.port = wire(listener.port)
            entry.protocol = PROTOCOLS[listener.protocol]
            entry.balancing = constant(BALANCING[listener.balancing])
            entry.flags = constant("PS_LISTENER_CLIENT_IP") if listener.session_affinity == "ClientIP" else 0
            entry.number = self._number(listener)
            entry.down = 0
            entry.first_backend, entry.backends = backends, len(usable)
            for (address, port), weight in usable:
                backend = c.backend[backends]
                ffi.memmove(backend.address, packed(address), 16)
                backend.port = wire(port)
                backend.id = self._backend(address, port)
                backend.weight = weight
                backends += 1
            entries = choices(usable, listener.balancing if listener.session_affinity == "None" else "Maglev")
            if lookup + len(entries) > constant("PS_MAX_LOOKUP"):
                raise AgentError(f"stack {self.name}: too many backends and listeners for the lookup tables; use fewer")
            entry.lookup, entry.lookup_size = lookup, len(entries)
            ffi.memmove(c.lookup + lookup, array("H", entries).tobytes(), 2 * len(entries))
            lookup += len(entries)
        c.listeners, c.backends = len(order), backends

    def usable(self, listener: Listener) -> list[tuple[Place, int]]:
        """Backends that may get new flows, with their weights."""
        found = [((e.address, e.port), e.weight) for e in listener.backends.endpoints or () if e.weight > 0]
        return [(place, weight) for place, weight in found if self.healthy.get(place, True)]

    def choice(self, listener: Listener, flow_hash: int, client: Address) -> Place | None:
        """The backend that a new flow is dealt. None without any, and where turns or live flows decide."""
        usable = self.usable(listener)
        affinity = listener.session_affinity == "ClientIP"
        if not usable or not (affinity or listener.balancing == "Maglev"):
            return None
        table = choices(usable, "Maglev")
        if affinity:
            entry = hashing.choice_by_client(*self.key, client, len(table))
        else:
            entry = hashing.choice(flow_hash, len(table))
        return usable[table[entry]][0]

    def _address(self, address: Address) -> int:
        index = lib().ps_arena_address(self.arena, packed(address))
        if index < 0:
            raise AgentError(
                f"stack {self.name}: its table of addresses is full ({constant('PS_MAX_ADDRESSES')}); recreate it"
            )
        return int(index)

    def _backend(self, address: Address, port: int) -> int:
        index = lib().ps_arena_backend(self.arena, packed(address), wire(port))
        if index < 0:
            raise AgentError(
                f"stack {self.name}: its table of backends is full ({constant('PS_MAX_BACKENDS')}); recreate it"
            )
        return int(index)

    def _number(self, listener: Listener) -> int:
        index = lib().ps_arena_listener(
            self.arena, packed(listener.address), wire(listener.port), PROTOCOLS[listener.protocol]
        )
        if index < 0:
            raise AgentError(
                f"stack {self.name}: listener {listener.name}: {constant('PS_MAX_NUMBERS')} listeners have live flows; "
                "wait until those of removed listeners have timed out, or recreate the stack"
            )
        return int(index)

    # ---- flow table ---------------------------------------------------------------------------------------------

    def words(self) -> "array[int]":
        """The flow-table words, as directors read them now."""
        return array("Q", bytes(ffi.buffer(self._words + self._offset, self.buckets * 8)))

    def owners(self) -> list[Owner | None]:
        """Owner by bucket; NOBODY where there is none."""
        return [Owner(w >> 22 & 1023, w >> 16 & 63) if w >> 22 & 1023 else NOBODY for w in self.words()]

    def epochs(self) -> int:
        """Sum of all epochs: how many changes of owner there have been."""
        return sum(w >> 32 for w in self.words())

    def open_fences(self) -> frozenset[int]:
        """Buckets whose word and shard disagree: their handover is not finished."""
        words = self.words()
        return frozenset(b for b, owner in enumerate(self._shard_owners()) if owner != words[b] & ~0xFFFF)

    def shard_slots(self) -> set[int]:
        """Slots that shards name: those engines may be handling packets of them still."""
        return {owner >> 22 & 1023 for owner in self._shard_owners()} - {0}

    def _shard_owners(self) -> list[int]:
        return self._headers()[0]

    def _headers(self) -> tuple[list[int], list[int]]:
        """Owner and live flows of each shard."""
        owners, live = ffi.new("uint64_t[]", self.buckets), ffi.new("uint16_t[]", self.buckets)
        lib().ps_arena_headers(self.arena, owners, live)
        return list(owners), list(live)

    def transfer(self, engines: Sequence[Engine], moves: Sequence[Move]) -> Report:
        """Move buckets, in batches of one fence each. Stops at an engine that does not answer. Blocks.

        With no moves it finishes what an interrupted call left open. `engines`: all of the stack; one that a shard
        names and that is not among them is gone for good.
        """
        report = Report()
        present = [e for e in engines if e.view is not None]
        gone = self.shard_slots() - {e.slot for e in engines}
        fence = ffi.new("struct ps_fence_engine[]", len(present) + len(gone) + 1)
        for i, engine in enumerate(present):
            fence[i] = engine.fence[0]
        for i, slot in enumerate(gone, len(present)):
            fence[i].slot = slot
        out = ffi.new("struct ps_transfer_report *")
        batches = [list(moves[i : i + BATCH]) for i in range(0, len(moves), BATCH)] or [[]]
        with processes.way_to_all_cpus() as cpus:
            for batch in batches:
                moved = 1
                # A queue never gives and gets in one fence, so some moves may have to wait for a second one.
                while moved and not report.stalled:
                    wanted = ffi.new("struct ps_move[]", [(m.bucket, m.to.slot, m.to.queue) for m in batch] or 1)
                    call(
                        lib().ps_transfer, self.arena, self._words, self._offset, self._egress, fence, len(present) + len(gone),
                        wanted, len(batch), FENCE_LIMIT_MS, cpus, out,
                    )  # fmt: skip
                    moved = int(out.moved)
                    report.moved += moved
                    report.stalled = int(out.stalled_slot)
                    if moved or not batch:
                        report.fences += 1
                        report.hold_ns.append(int(out.total_ns))
                    owners = self.owners()
                    batch = [m for m in batch if owners[m.bucket] != m.to]
                    if not batch:
                        break
                if report.stalled:
                    break
        return report

    def live(self) -> int:
        """Flows in the arena."""
        return int(lib().ps_arena_live(self.arena))

    def flows_by_slot(self) -> dict[int, int]:
        """Live flows by the slot that owns their bucket."""
        total: dict[int, int] = {}
        for word, live in zip(self.words(), self._headers()[1], strict=True):
            if live and (slot := word >> 22 & 1023):
                total[slot] = total.get(slot, 0) + live
        return total

    def flows(self, bucket: int) -> list[Any]:
        """Copies of a bucket's live flows."""
        out = ffi.new("struct ps_flow[]", int(self.arena.entries))
        return [out[i] for i in range(lib().ps_arena_flows(self.arena, bucket, out, len(out)))]

    def bucket_packets(self) -> list[int]:
        """Packets that directors have sent by bucket, since the stack began."""
        out = ffi.new("uint64_t[]", self.buckets)
        call(lib().ps_director_bucket_packets, self.director, self._offset, self.buckets, out)
        return list(out)

    def close(self) -> None:
        """Withdraw from the director and let the shared memory go. Files stay."""
        with suppress(AgentError):
            self._withdraw(self._listeners, self._snat)
        self._listeners, self._snat = set(), set()
        for b in range(self.buckets):
            self._words[self._offset + b] = 0
        lib().ps_unmap(self.arena)
        lib().ps_unmap(self.config)


@dataclass
class Managed:
    """A stack with its engines and its task."""

    stack: Stack
    engines: dict[int, Engine] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    failures: int = 0
    create_after: float = 0.0
    problem: str = ""
    """Why the last engine could not be made, empty when it could."""
    pinned: dict[int, int] = field(default_factory=dict)
    """Bucket -> slot, where a person put it; kept while that engine stays."""
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the flow table or the configuration is being changed."""
    settled: bool = False
    gone: dict[str, dict[str, int]] = field(default_factory=lambda: {"engine": {}, "kernel": {}})
    """Drops counted by engines that have left."""
    holds_ns: deque[int] = field(default_factory=lambda: deque(maxlen=1000))
    moved: int = 0
    history: History = field(default_factory=History)
    """What its engines' counters said, once a second."""
    table: FlowTable | None = None
    """What the stack follows in a cluster. None: the agent plans for it."""
    generation: int = 0
    """Of the table."""


def wake(engines: Iterable[Engine]) -> None:
    """Cores that sleep look at their shared memory."""

    for engine in engines:
        if engine.fds is not None:
            for c in range(engine.blueprint.cores):
                with suppress(BlockingIOError):
                    os.eventfd_write(engine.fds.events[c], 1)


def _secret(path: Path) -> tuple[int, int]:
    """The stack's hash key, made once: losing it would move every flow."""
    if not path.exists():
        path.touch(0o600)
        path.write_bytes(secrets.token_bytes(16))
    data = path.read_bytes()
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")


def choices(usable: Sequence[tuple[Place, int]], balancing: str) -> list[int]:
    """The lookup table of a listener: Maglev's, or for RoundRobin the order of turns. Empty without backends."""
    return list(_choices(tuple((f"{place[0]}|{place[1]}", weight) for place, weight in usable), balancing))


@lru_cache(maxsize=1024)
def _choices(backends: tuple[tuple[str, int], ...], balancing: str) -> tuple[int, ...]:
    if not backends:
        return ()
    if balancing == "RoundRobin":
        # Turns spread evenly: each backend's k-th turn lies at (k + 1/2) / weight.
        divisor = math.gcd(*(w for _, w in backends))
        most = sum(w for _, w in backends) // divisor
        scale = divisor if most <= 4093 else sum(w for _, w in backends) / 4093
        turns = [((k + 0.5) / w, i) for i, (_, w) in enumerate(backends) for k in range(max(1, round(w / scale)))]
        return tuple(i for _, i in sorted(turns))
    return tuple(maglev.table(backends, maglev.size_for(len(backends))))
