"""The memory of one set of engines of a stack: their arena, with the flows, and their configuration.

Functions here block briefly; they are called from worker threads or where a few milliseconds do not matter.
"""

import shutil
import threading
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packetstack_agent import builds, processes, words
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import PROTOCOLS, call, constant, ffi, lib, packed, text, unpacked, wire
from packetstack_agent.probes import Place
from packetstack_core.assignment import Move
from packetstack_core.resources import Listener, PacketStack
from packetstack_core.values import Address

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


@dataclass(frozen=True)
class Dealt:
    """A listener, and who gets its flows."""

    listener: Listener
    shares: Sequence[tuple[Place, int]]
    """Backends that may get new flows, and how many of them, in proportion."""
    down: Sequence[tuple[Place, int]]
    """Backends that have failed their health check, with their weights."""
    lookup: Sequence[int]
    """Whose turn it is, as indexes into `shares`."""


@dataclass(frozen=True)
class Configuration:
    """What all engines of a stack shall know, in whatever set they are."""

    resource: PacketStack
    key: tuple[int, int]
    """The stack's secret."""
    listeners: Sequence[Dealt]


@dataclass(frozen=True)
class Pairs:
    """What a newcomer's set needs so that buckets in mirror leave an engine that does not serve any more."""

    numbers: Any
    """`uint16_t *`, the numbers of the pairs that the stack's buckets are mirrored to."""
    wanted: Mapping[int, int]
    """Bucket -> number of the pair of its next owner and its keeper; one without it is not moved while it is mirrored."""


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

    def add(self, other: "Report") -> None:
        """What happened in another set too. Of two engines that did not answer the first is told."""
        self.moved += other.moved
        self.fences += other.fences
        self.hold_ns += other.hold_ns
        if not self.stalled:
            self.stalled, self.acknowledged = other.stalled, other.acknowledged


class FlowMemory:
    """Memory of one set. Numbers of addresses, backends and listeners are its own: another set has others for them."""

    def __init__(self, stack: str, directory: Path, pin: Path, buckets: int, max_flows: int, shard: str = "") -> None:
        """Opens what is there, and makes what is not. `pin`: where the map is pinned, or shall be, that engines write.
        `shard`: layout of shards that are made, see `packetstack_core.shards`; empty: that of this agent's build."""
        self._stack = stack
        self.directory = directory
        self._settled = 0
        """Generation of the configuration that every core has been seen to use."""
        self._reading = threading.Lock()
        """Held while a worker thread reads flows without the stack's `busy`: the memory stays meanwhile."""
        self._closed = False
        self.ending = False
        """The connections that it keeps have no more time: its configurations say so."""
        directory.mkdir(parents=True, exist_ok=True)
        self.arena_path, self.config_path, self.pin = directory / "arena", directory / "config", pin
        form = builds.form_of(shard) if shard else ffi.NULL
        if self.arena_path.exists():
            self.arena = call(lib().ps_arena_open, text(self.arena_path), text(pin))
        else:
            self.arena = call(lib().ps_arena_create, text(self.arena_path), text(pin), buckets, max_flows, form)
        try:
            if self.config_path.exists():
                self.config = call(lib().ps_config_open, text(self.config_path), 0)
            else:
                self.config = call(lib().ps_config_create, text(self.config_path))
        except BaseException:
            lib().ps_unmap(self.arena)
            raise
        self.shard = builds.name_of(lib().ps_arena_form(self.arena))
        """Layout of its shards: engines whose build has another one cannot use it."""

    @property
    def buckets(self) -> int:
        """How many shards it has."""
        return int(self.arena.buckets)

    def close(self) -> None:
        """Let the shared memory go. Files stay."""
        with self._reading:
            self._closed = True
            lib().ps_unmap(self.arena)
            lib().ps_unmap(self.config)

    def remove(self) -> None:
        """Let it go for good, with its files and the map."""
        self.close()
        remove_files(self.directory, self.pin)

    # ---- configuration ------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Of the present configuration; 0: there was none yet."""
        return int(self.config.generation)

    def is_used_by(self, engine: Engine) -> bool:
        """Whether all running cores of the engine, which is of this set, have taken the present configuration."""
        cores = [engine.core(c) for c in range(engine.blueprint.cores)]
        return all(not core.thread or core.config_seen >= self.generation for core in cores)

    def prepare(self, wanted: Configuration) -> None:
        """Write it where no core reads, which is so when the present one `is_used_by` all. AgentError if it does not fit."""
        self._write(self.config.buffer[(self.generation + 1) & 1], self.generation + 1, wanted)

    def publish(self) -> None:
        """What was prepared is the present configuration from now on. Cores that sleep do not see it yet."""
        self.config.generation = self.generation + 1

    def _write(self, c: Any, generation: int, wanted: Configuration) -> None:
        spec = wanted.resource.spec
        c.generation = generation
        c.key0, c.key1 = wanted.key
        c.mask = self.buckets - 1
        c.unknown_flow_reset = spec.unknown_flow == "Reset"
        c.mtu = 1500
        c.kept_reset = self.ending
        ticks = constant("PS_TICKS_PER_SECOND")
        for state, name in TIMEOUTS.items():
            c.timeout[constant(state)] = getattr(spec.flow_table, name) * ticks
        for i, address in enumerate(wanted.resource.snat_addresses()):
            c.snat[i].id = self._address(address)
            c.snat[i].family = address.version
            ffi.memmove(c.snat[i].address, packed(address), 16)
        c.snats = len(wanted.resource.snat_addresses())
        backends = lookup = 0
        # The engine searches by bytes: address, port, protocol.
        order = sorted(
            wanted.listeners,
            key=lambda d: (
                packed(d.listener.address)
                + d.listener.port.to_bytes(2, "big")
                + bytes([PROTOCOLS[d.listener.protocol]])
            ),
        )
        for i, dealt in enumerate(order):
            entry, listener = c.listener[i], dealt.listener
            ffi.memmove(entry.address, packed(listener.address), 16)
            entry.port = wire(listener.port)
            entry.protocol = PROTOCOLS[listener.protocol]
            entry.balancing = constant(BALANCING[listener.balancing])
            entry.flags = _flags(listener)
            entry.number = self._number(listener)
            entry.max_flows = listener.limits.max_flows or 0
            entry.new_flows_per_second = listener.limits.new_flows_per_second or 0
            entry.max_flows_per_client = listener.limits.max_flows_per_client or 0
            entry.first_backend, entry.backends, entry.down = backends, len(dealt.shares), len(dealt.down)
            for (address, port), weight in (*dealt.shares, *dealt.down):
                backend = c.backend[backends]
                ffi.memmove(backend.address, packed(address), 16)
                backend.port = wire(port)
                backend.id = self._backend(address, port)
                backend.weight = weight
                backends += 1
            if lookup + len(dealt.lookup) > constant("PS_MAX_LOOKUP"):
                raise AgentError(
                    f"stack {self._stack}: too many backends and listeners for the lookup tables; use fewer"
                )
            entry.lookup, entry.lookup_size = lookup, len(dealt.lookup)
            ffi.memmove(c.lookup + lookup, array("H", dealt.lookup).tobytes(), 2 * len(dealt.lookup))
            lookup += len(dealt.lookup)
        c.listeners, c.backends = len(order), backends

    @property
    def unsettled(self) -> bool:
        """Whether `settle` has something to look for."""
        return self._settled != self.generation

    def settle(self, engines: Iterable[Engine]) -> bool:
        """Whether every core uses the present configuration; then the arena forgets what only those before named.

        `engines`: all of the set.
        """
        if self.unsettled:
            if not all(e.ready and self.is_used_by(e) for e in engines):
                return False
            self._settled = self.generation
            lib().ps_arena_used(self.arena, ffi.addressof(self.config.buffer[self._settled & 1]))
        return True

    # ---- numbers --------------------------------------------------------------------------------------------------

    def _address(self, address: Address) -> int:
        index = lib().ps_arena_address(self.arena, self.config, packed(address))
        if index < 0:
            raise AgentError(
                f"stack {self._stack}: {constant('PS_MAX_ADDRESSES')} SNAT addresses have flows; wait until those of removed "
                "addresses have ended, or use the same addresses again"
            )
        return int(index)

    def _backend(self, address: Address, port: int) -> int:
        index = lib().ps_arena_backend(self.arena, packed(address), wire(port))
        if index < 0:
            raise AgentError(
                f"stack {self._stack}: its table of backends is full ({constant('PS_MAX_BACKENDS')}); recreate it"
            )
        return int(index)

    def _number(self, listener: Listener) -> int:
        index = lib().ps_arena_listener(
            self.arena, packed(listener.address), wire(listener.port), PROTOCOLS[listener.protocol]
        )
        if index < 0:
            raise AgentError(
                f"stack {self._stack}: listener {listener.name}: {constant('PS_MAX_NUMBERS')} listeners have live flows; "
                "wait until those of removed listeners have timed out, or recreate the stack"
            )
        return int(index)

    # ---- flows ----------------------------------------------------------------------------------------------------

    def configured_snat(self) -> list[Address]:
        """SNAT addresses of the configuration that cores use: new flows may get them."""
        now = self.config.buffer[self.generation & 1]
        return [unpacked(bytes(ffi.buffer(now.snat[i].address))) for i in range(now.snats)]

    def snat_flows(self) -> dict[Address, int]:
        """Flows by SNAT address, also those whose end is not long ago; none of a set that has gone. Reads all. Blocks."""
        out = ffi.new("uint32_t[]", constant("PS_MAX_ADDRESSES"))
        with self._reading:
            if self._closed:
                return {}
            call(lib().ps_arena_snat_flows, self.arena, out)
            return {
                unpacked(bytes(ffi.buffer(self.arena.address[i].bytes))): int(out[i])
                for i in range(self.arena.addresses)
                if out[i]
            }

    def backend_flows(self) -> dict[Place, tuple[int, int]]:
        """Of each backend that flows were dealt to: those that live, and all that were."""
        found = {}
        for i in range(self.arena.backends):
            entry, count = self.arena.backend[i], self.arena.backend_count[i]
            place = (unpacked(bytes(ffi.buffer(entry.address))), wire(entry.port))
            found[place] = max(0, int(count.live)), int(count.created)
        return found

    def live(self) -> int:
        """Flows in the arena."""
        return int(lib().ps_arena_live(self.arena))

    def flows(self, bucket: int) -> list[Any]:
        """Copies of a bucket's live flows."""
        out = ffi.new("struct ps_flow[]", int(self.arena.entries))
        found = range(lib().ps_arena_flows(self.arena, bucket, out, len(out)))
        return [ffi.new("struct ps_flow *", out[i]) for i in found]  # an element does not keep its array

    def packets(self) -> list[int]:
        """Packets that engines have handled by bucket, since the set began."""
        out = ffi.new("uint64_t[]", self.buckets)
        lib().ps_arena_packets(self.arena, out)
        return list(out)

    # ---- shards ---------------------------------------------------------------------------------------------------

    def headers(self) -> tuple[bytes, Sequence[int]]:
        """Owner, as 64-bit words, and live flows of each shard."""
        owners, live = ffi.new("uint64_t[]", self.buckets), ffi.new("uint16_t[]", self.buckets)
        lib().ps_arena_headers(self.arena, owners, live)
        return bytes(ffi.buffer(owners)), array("H", bytes(ffi.buffer(live)))

    def parties(self, engines: Collection[Engine]) -> tuple[Any, int]:
        """`struct ps_fence_engine[]` of all that a fence may have to visit, and how many: those engines, and slots that
        shards name and none of them has, which are gone."""
        present = [e for e in engines if e.view is not None]
        gone = words.shard_slots(self.headers()[0]) - {e.slot for e in engines}
        fence = ffi.new("struct ps_fence_engine[]", len(present) + len(gone) + 1)
        for i, engine in enumerate(present):
            fence[i] = engine.fence[0]
        for i, slot in enumerate(gone, len(present)):
            fence[i].slot = slot
        return fence, len(present) + len(gone)

    def transfer(
        self, table: Any, egress: Any, engines: Sequence[Engine], moves: Sequence[Move], pairs: Pairs | None = None
    ) -> Report:
        """Move buckets between engines of the set, in batches of one fence each. Stops at an engine that does not answer.

        With no moves it finishes what an interrupted call left open. `table`: the stack's words. `egress`: what the
        director has counted of egress markers. `engines`: all of the set; one that a shard names and that is not among
        them is gone for good. `pairs`: of a newcomer; in other sets buckets in mirror stay. Blocks.
        """
        numbers, number_of = (pairs.numbers, pairs.wanted) if pairs is not None else (ffi.NULL, {})
        report = Report()
        fence, parties = self.parties(engines)
        out = ffi.new("struct ps_transfer_report *")
        batches = [list(moves[i : i + BATCH]) for i in range(0, len(moves), BATCH)] or [[]]
        with processes.way_to_all_cpus() as cpus:
            for batch in batches:
                moved = 1
                # A queue never gives and gets in one fence, so some moves may have to wait for a second one.
                while moved and not report.stalled:
                    wanted = [(m.bucket, m.to.slot, m.to.queue, number_of.get(m.bucket, 0)) for m in batch]
                    call(
                        lib().ps_transfer, self.arena, table, numbers, 0, egress, fence, parties,
                        ffi.new("struct ps_move[]", wanted or 1), len(batch), FENCE_LIMIT_MS, cpus, out,
                    )  # fmt: skip
                    moved = int(out.moved)
                    report.moved += moved
                    report.stalled, report.acknowledged = int(out.stalled_slot), bool(out.stalled_egress)
                    if moved or not batch:
                        report.fences += 1
                        report.hold_ns.append(int(out.total_ns))
                    owners = words.owners(bytes(ffi.buffer(table, self.buckets * 8)))
                    batch = [m for m in batch if owners[m.bucket] != m.to]
                    if not batch:
                        break
                if report.stalled:
                    break
        return report


def wake(engines: Iterable[Engine]) -> None:
    """Cores that sleep look at their shared memory. Never waits, whatever an engine does."""
    for engine in engines:
        if engine.fds is not None:
            for c in range(engine.blueprint.cores):
                lib().ps_wake(engine.fds.wake[c])


def remove_files(directory: Path, pin: Path) -> None:
    """The memory of a set goes as soon as nobody has it mapped. What is missing is fine."""
    pin.unlink(missing_ok=True)  # before the directory, by which it would be found
    shutil.rmtree(directory, ignore_errors=True)


def _flags(listener: Listener) -> int:
    chosen = {
        "PS_LISTENER_CLIENT_IP": listener.session_affinity == "ClientIP",
        "PS_LISTENER_REFUSE": listener.on_no_backend == "Reset",
        "PS_LISTENER_RESET_BACKEND_DOWN": listener.on_backend_down == "Reset",
    }
    return sum(constant(name) for name, given in chosen.items() if given)
