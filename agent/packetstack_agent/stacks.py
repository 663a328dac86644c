"""One stack's shared state on this node: arena, configuration, secret, its entries in the director.

Functions here block briefly; they are called from worker threads or where a few milliseconds do not matter.
"""

import asyncio
import math
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from packetstack_agent import processes, words
from packetstack_agent.directing import Directions, Listening
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.hash_keys import hash_key
from packetstack_agent.natives import PROTOCOLS, call, constant, ffi, lib, packed, text, unpacked, wire
from packetstack_agent.probes import Checked, Place
from packetstack_core import hashing, maglev, slow_start
from packetstack_core.assignment import Move, Owner
from packetstack_core.resources import Listener, PacketStack
from packetstack_core.values import Address, Network

BATCH = 512
"""Buckets of one fence: what arrives for them meanwhile must fit into a quarter of a park ring."""
FENCE_LIMIT_MS = 500


BALANCING = {"Maglev": "PS_MAGLEV", "RoundRobin": "PS_ROUND_ROBIN", "LeastFlows": "PS_LEAST_FLOWS"}

TIMEOUTS = {
    "PS_FLOW_SYN": "tcp_opening_timeout_seconds",
    "PS_FLOW_SYN_ACK": "tcp_opening_timeout_seconds",
    "PS_FLOW_ESTABLISHED": "tcp_idle_timeout_seconds",
    "PS_FLOW_CLOSING": "tcp_half_close_timeout_seconds",
    "PS_FLOW_CLOSED": "tcp_closed_timeout_seconds",
    "PS_FLOW_TIME_WAIT": "tcp_time_wait_timeout_seconds",
    "PS_FLOW_UNANSWERED": "udp_unanswered_timeout_seconds",
    "PS_FLOW_ANSWERED": "udp_idle_timeout_seconds",
    "PS_FLOW_ASSURED": "udp_idle_timeout_seconds",
}
"""Field of spec.flowTable by state of a flow."""


@dataclass
class Report:
    """Outcome of a series of transfers."""

    moved: int = 0
    fences: int = 0
    hold_ns: list[int] = field(default_factory=list)
    stalled: int = 0
    """Slot of an engine that did not answer, 0 = none."""
    acknowledged: bool = False
    """It did, but what came behind its packets on their way out of the node has not."""


class Stack:
    """A stack on this node. `index` (0..63) says where its flow table begins."""

    def __init__(
        self, name: str, resource: PacketStack, index: int, directory: Path, memory: Path, director: Any
    ) -> None:
        """`memory`: where the map is pinned, or shall be, that engines keep the flows in."""
        self.name = name
        """Unique on the node: the resource's name, in a cluster with its namespace before it."""
        self.resource = resource
        self.index = index
        self.directory = directory
        self.director = director
        self.healthy: Mapping[Checked, bool] = {}
        """Verdicts of health checks; a backend that is not named counts as healthy."""
        self._since: dict[Listening, dict[Place, float]] = {}
        """Since when each usable backend of a listener is that, as of the last configuration."""
        self._written = 0.0
        """When that was."""
        self.due = math.inf
        """When the weights that it has are no longer right, because backends start slowly."""
        self.leaving: dict[Address, int] = {}
        """SNAT addresses that are not the resource's any more, and how many flows had each at the last look."""
        self._settled = 0
        """Generation of the configuration that every core has been seen to use."""
        self._offset = index * constant("PS_MAX_BUCKETS")
        directory.mkdir(parents=True, exist_ok=True)
        self.arena_path, self.config_path, self.memory = directory / "arena", directory / "config", memory
        table = resource.spec.flow_table
        if self.arena_path.exists():
            self.arena = call(lib().ps_arena_open, text(self.arena_path), text(memory))
        else:
            self.arena = call(
                lib().ps_arena_create, text(self.arena_path), text(memory), table.buckets, table.max_flows
            )
        self.key = hash_key(directory / "secret", self.live())
        if self.config_path.exists():
            self.config = call(lib().ps_config_open, text(self.config_path), 0)
        else:
            self.config = call(lib().ps_config_create, text(self.config_path))
        flows = self.snat_flows()
        self._begin_to_leave({*flows, *self._configured_snat()})
        self.leaving = {a: flows.get(a, 0) for a in self.leaving}
        self._directions = Directions(director, self.key, self._offset, self.buckets, index)
        self._words = lib().ps_director_words(director)
        self._egress = lib().ps_director_egress(director)

    @property
    def buckets(self) -> int:
        """Size of the flow table."""
        return int(self.arena.buckets)

    # ---- director and configuration ---------------------------------------------------------------------------

    def direct(self) -> None:
        """Make the director's listeners and SNAT addresses those of the resource; addresses that leave stay for now."""
        self._begin_to_leave(self._directions.snat)
        self._directions.become(self.resource, {*self.resource.snat_addresses(), *self.leaving})

    def addresses(self) -> set[Address]:
        """All that packets must reach the stack by: the resource's, and SNAT addresses that leave."""
        return {*self.resource.virtual_addresses(), *self.resource.snat_addresses(), *self.leaving}

    def prefixes(self) -> set[Network]:
        """What to route here: the resource's prefixes, and SNAT addresses that leave and lie in none of them."""
        own = set(self.resource.prefixes())
        return own | {ip_network(a) for a in self.leaving if not any(a in prefix for prefix in own)}

    def _begin_to_leave(self, had: Iterable[Address]) -> None:
        wanted = set(self.resource.snat_addresses())
        kept = {a: n for a, n in self.leaving.items() if a not in wanted}
        self.leaving = dict.fromkeys(set(had) - wanted, 0) | kept

    def _configured_snat(self) -> list[Address]:
        """SNAT addresses of the configuration that cores use: new flows may get them."""
        now = self.config.buffer[self.config.generation & 1]
        return [unpacked(bytes(ffi.buffer(now.snat[i].address))) for i in range(now.snats)]

    def snat_flows(self) -> dict[Address, int]:
        """Flows by SNAT address, also those whose end is not long ago. Reads all of them. Blocks."""
        out = ffi.new("uint32_t[]", constant("PS_MAX_ADDRESSES"))
        call(lib().ps_arena_snat_flows, self.arena, out)
        return {
            unpacked(bytes(ffi.buffer(self.arena.address[i].bytes))): int(out[i])
            for i in range(self.arena.addresses)
            if out[i]
        }

    def count_leaving(self) -> None:
        """Look how many flows have the SNAT addresses that leave. Blocks."""
        if self.leaving:
            flows = self.snat_flows()
            self.leaving = {a: flows.get(a, 0) for a in self.leaving}

    @property
    def unsettled(self) -> bool:
        """Whether `settle` has something to look for."""
        return bool(self.leaving) or self._settled != self.config.generation

    def settle(self, engines: Sequence[Engine]) -> list[Address]:
        """When every core uses the present configuration, let go of what only those before named. Blocks.

        Returns the SNAT addresses that were withdrawn. By an older configuration new flows still get them.
        """
        generation = int(self.config.generation)
        if self._settled != generation:
            if not all(e.ready and _uses(e, generation) for e in engines):
                return []
            self._settled = generation
            lib().ps_arena_used(self.arena, ffi.addressof(self.config.buffer[generation & 1]))
        self.count_leaving()
        gone = sorted((a for a, n in self.leaving.items() if not n), key=packed)
        self._directions.let_go(gone)
        for address in gone:
            del self.leaving[address]
        return gone

    async def configure(self, engines: Sequence[Engine]) -> int:
        """Write the resource and the backends' health as a new configuration; returns its generation.

        Waits until every running core has left the buffer that is written to.
        """
        generation = int(self.config.generation)
        deadline = time.monotonic() + 2
        while late := [e.slot for e in engines if e.ready and not _uses(e, generation)]:
            wake(engines)
            if time.monotonic() > deadline:
                raise AgentError(
                    f"engine {late[0]}: has not taken the last configuration for 2 s, so all engines of stack {self.name} keep "
                    f"theirs (listeners, backends); see packetstack logs {late[0]}"
                )
            await asyncio.sleep(0.002)
        self._write(self.config.buffer[(generation + 1) & 1], generation + 1, time.monotonic())
        self.config.generation = generation + 1
        wake(engines)
        return generation + 1

    def _write(self, c: Any, generation: int, now: float) -> None:
        spec = self.resource.spec
        c.generation = generation
        c.key0, c.key1 = self.key
        c.mask = self.buckets - 1
        c.unknown_flow_reset = spec.unknown_flow == "Reset"
        c.mtu = 1500
        ticks = constant("PS_TICKS_PER_SECOND")
        for state, name in TIMEOUTS.items():
            c.timeout[constant(state)] = getattr(spec.flow_table, name) * ticks
        for i, address in enumerate(self.resource.snat_addresses()):
            c.snat[i].id = self._address(address)
            c.snat[i].family = address.version
            ffi.memmove(c.snat[i].address, packed(address), 16)
        c.snats = len(self.resource.snat_addresses())
        self._note_usable(now)
        backends = lookup = 0
        # The engine searches by bytes: address, port, protocol.
        order = sorted(
            spec.listeners,
            key=lambda li: packed(li.address) + li.port.to_bytes(2, "big") + bytes([PROTOCOLS[li.protocol]]),
        )
        for i, listener in enumerate(order):
            entry = c.listener[i]
            usable, parts = self.usable(listener), self.parts(listener)
            down = self._down(listener)
            ffi.memmove(entry.address, packed(listener.address), 16)
            entry.port = wire(listener.port)
            entry.protocol = PROTOCOLS[listener.protocol]
            entry.balancing = constant(BALANCING[listener.balancing])
            entry.flags = _flags(listener)
            entry.number = self._number(listener)
            entry.max_flows = listener.limits.max_flows or 0
            entry.new_flows_per_second = listener.limits.new_flows_per_second or 0
            entry.max_flows_per_client = listener.limits.max_flows_per_client or 0
            entry.first_backend, entry.backends, entry.down = backends, len(usable), len(down)
            shares = [(place, weight * part) for (place, weight), part in zip(usable, parts, strict=True)]
            for (address, port), weight in (*shares, *down):
                backend = c.backend[backends]
                ffi.memmove(backend.address, packed(address), 16)
                backend.port = wire(port)
                backend.id = self._backend(address, port)
                backend.weight = weight
                backends += 1
            entries = choices(usable, _balancing(listener), parts)
            if lookup + len(entries) > constant("PS_MAX_LOOKUP"):
                raise AgentError(f"stack {self.name}: too many backends and listeners for the lookup tables; use fewer")
            entry.lookup, entry.lookup_size = lookup, len(entries)
            ffi.memmove(c.lookup + lookup, array("H", entries).tobytes(), 2 * len(entries))
            lookup += len(entries)
        c.listeners, c.backends = len(order), backends

    def _note_usable(self, now: float) -> None:
        """Which backends start slowly, and until when the shares hold that they have now."""
        known: dict[Listening, dict[Place, float]] = {}
        self.due = math.inf
        for listener in self.resource.spec.listeners:
            key, seconds = _listening(listener), listener.slow_start_seconds
            known[key] = slow_start.since(self._since.get(key), (place for place, _ in self.usable(listener)), now)
            self.due = min(self.due, slow_start.next_step(known[key], seconds, now))
        self._since, self._written = known, now

    def parts(self, listener: Listener) -> list[int]:
        """What each usable backend has of its share, by the largest of the numbers, as of the last configuration."""
        usable = [place for place, _ in self.usable(listener)]
        known = self._since.get(_listening(listener), {})
        return slow_start.parts(usable, known, listener.slow_start_seconds, self._written)

    def rising(self) -> dict[Place, float]:
        """What the backends that start slowly have of their shares, below 1. Of several listeners the least."""
        found: dict[Place, float] = {}
        for listener in self.resource.spec.listeners:
            parts = self.parts(listener)
            for (place, _), part in zip(self.usable(listener), parts, strict=True):
                if part < max(parts):
                    found[place] = min(found.get(place, 1.0), part / max(parts))
        return found

    def usable(self, listener: Listener) -> list[tuple[Place, int]]:
        """Backends that may get new flows, with their weights."""
        found = [((e.address, e.port), e.weight) for e in listener.backends.endpoints or () if e.weight > 0]
        return [(place, weight) for place, weight in found if self._well(listener, place)]

    def _well(self, listener: Listener, place: Place) -> bool:
        check = listener.health_check
        return check.type == "None" or self.healthy.get((place, check), True)

    def _down(self, listener: Listener) -> list[tuple[Place, int]]:
        """Backends that have failed their health check, with their weights."""
        found = [((e.address, e.port), e.weight) for e in listener.backends.endpoints or ()]
        return [(place, weight) for place, weight in found if not self._well(listener, place)]

    def choice(self, listener: Listener, flow_hash: int, client: Address) -> Place | None:
        """The backend that a new flow is dealt. None without any, and where turns or live flows decide."""
        usable = self.usable(listener)
        if not usable or _balancing(listener) != "Maglev":
            return None
        table = choices(usable, "Maglev", self.parts(listener))
        if listener.session_affinity == "ClientIP":
            entry = hashing.choice_by_client(*self.key, client, len(table))
        else:
            entry = hashing.choice(flow_hash, len(table))
        return usable[table[entry]][0]

    def _address(self, address: Address) -> int:
        index = lib().ps_arena_address(self.arena, self.config, packed(address))
        if index < 0:
            raise AgentError(
                f"stack {self.name}: {constant('PS_MAX_ADDRESSES')} SNAT addresses have flows; wait until those of removed "
                "addresses have ended, or use the same addresses again"
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
        return array("Q", self._raw_words())

    def _raw_words(self) -> bytes:
        return bytes(ffi.buffer(self._words + self._offset, self.buckets * 8))

    def owners(self) -> list[Owner | None]:
        """Owner by bucket; NOBODY where there is none."""
        return list(words.owners(self._raw_words()))

    def epochs(self) -> int:
        """Sum of all epochs: how many changes of owner there have been."""
        return sum(w >> 32 for w in self.words())

    def open_fences(self) -> frozenset[int]:
        """Buckets whose word and shard disagree: their handover is not finished."""
        return frozenset(words.open_fences(self._raw_words(), self._headers()[0]))

    def shard_slots(self) -> set[int]:
        """Slots that shards name: those engines may be handling packets of them still."""
        return set(words.shard_slots(self._headers()[0]))

    def held(self) -> Counter[int]:
        """Slot -> how many buckets it still has to hand over: their shards name it, and their words another."""
        slots = words.open_fences(self._raw_words(), self._headers()[0]).values()
        return Counter(slot for slot in slots if slot)

    def _headers(self) -> tuple[bytes, Sequence[int]]:
        """Owner, as 64-bit words, and live flows of each shard."""
        owners, live = ffi.new("uint64_t[]", self.buckets), ffi.new("uint16_t[]", self.buckets)
        lib().ps_arena_headers(self.arena, owners, live)
        return bytes(ffi.buffer(owners)), array("H", bytes(ffi.buffer(live)))

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
                    report.stalled, report.acknowledged = int(out.stalled_slot), bool(out.stalled_egress)
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
        """Packets that engines have handled by bucket, since the stack began."""
        out = ffi.new("uint64_t[]", self.buckets)
        lib().ps_arena_packets(self.arena, out)
        return list(out)

    def close(self) -> None:
        """Withdraw from the director and let the shared memory go. Files stay."""
        with suppress(AgentError):
            self._directions.withdraw()
        for b in range(self.buckets):
            self._words[self._offset + b] = 0
        lib().ps_unmap(self.arena)
        lib().ps_unmap(self.config)


def _uses(engine: Engine, generation: int) -> bool:
    """Whether all running cores of the engine have taken this configuration."""
    cores = [engine.core(c) for c in range(engine.blueprint.cores)]
    return all(not core.thread or core.config_seen >= generation for core in cores)


def wake(engines: Iterable[Engine]) -> None:
    """Cores that sleep look at their shared memory. Never waits, whatever an engine does."""
    for engine in engines:
        if engine.fds is not None:
            for c in range(engine.blueprint.cores):
                lib().ps_wake(engine.fds.wake[c])


def _listening(listener: Listener) -> Listening:
    return listener.address, listener.port, listener.protocol


def _balancing(listener: Listener) -> str:
    return listener.balancing if listener.session_affinity == "None" else "Maglev"


def _flags(listener: Listener) -> int:
    chosen = {
        "PS_LISTENER_CLIENT_IP": listener.session_affinity == "ClientIP",
        "PS_LISTENER_REFUSE": listener.on_no_backend == "Reset",
        "PS_LISTENER_RESET_BACKEND_DOWN": listener.on_backend_down == "Reset",
    }
    return sum(constant(name) for name, given in chosen.items() if given)


def choices(usable: Sequence[tuple[Place, int]], balancing: str, parts: Sequence[int]) -> list[int]:
    """The lookup table of a listener: Maglev's, or for RoundRobin the order of turns. Empty without backends.

    `parts`: what each backend has of its share, by the largest of them.
    """
    named = [(f"{place[0]}|{place[1]}", weight) for place, weight in usable]
    if len(set(parts)) < 2:
        return list(_choices(tuple(named), balancing))
    if balancing == "RoundRobin":
        return list(_choices(tuple((n, w * part) for (n, w), part in zip(named, parts, strict=True)), balancing))
    most = max(parts)
    steady = tuple((n, w if part == most else 0) for (n, w), part in zip(named, parts, strict=True))
    return maglev.rising(_choices(tuple(named), balancing), _choices(steady, balancing), parts)


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
