"""One stack's state on this node: memory of each set of its engines, secret, words, its entries in the director.

Functions here block briefly; they are called from worker threads or where a few milliseconds do not matter.
"""

import asyncio
import math
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from packetstack_agent import flow_memory, words
from packetstack_agent.attachments import Connections
from packetstack_agent.blueprints import FIRST_SET
from packetstack_agent.directing import Directions, Listening
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.flow_memory import Configuration, Dealt, FlowMemory, Report, wake
from packetstack_agent.hash_keys import hash_key
from packetstack_agent.mirroring import Mirror
from packetstack_agent.natives import constant, ffi, lib, packed
from packetstack_agent.probes import Checked, Place
from packetstack_core import hashing, maglev, slow_start
from packetstack_core.assignment import Move, Owner
from packetstack_core.resources import Listener, PacketStack
from packetstack_core.values import Address, Network


class Stack:
    """A stack on this node. `index` (0..63) says where its flow table begins."""

    def __init__(
        self,
        name: str,
        resource: PacketStack,
        index: int,
        directory: Path,
        pin: Callable[[Path], Path],
        director: Any,
        sets: Collection[int] = (FIRST_SET,),
        current: int = FIRST_SET,
        shard: str = "",
    ) -> None:
        """`pin`: where the map of the set with this directory is pinned, or shall be. `sets`: all that it has. `shard`:
        layout of the shards of what is not there yet; empty: that of this agent's build.

        What an earlier agent has left of other sets is removed.
        """
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
        self._configured: Configuration | None = None
        self.due = math.inf
        """When the weights that it has are no longer right, because backends start slowly."""
        self.leaving: dict[Address, int] = {}
        """SNAT addresses that are not the resource's any more, and how many flows had each at the last look."""
        self.current = current
        """The set that gets new flows."""
        self.set_of: dict[int, int] = {}
        """Slot -> set, of the engines that there are, and were since the agent began. EngineLife writes it."""
        self._offset = index * constant("PS_MAX_BUCKETS")
        self._pin = pin
        self.mirror: Mirror | None = None
        """While there are two sets: what the older one keeps."""
        self.connections: Connections | None = None
        """The list of that, as engines of both get it."""
        for left in {*(directory / "sets").glob("*")} - {directory / "sets" / str(number) for number in sets}:
            flow_memory.remove_files(left, pin(left))
        self.sets: dict[int, FlowMemory] = {}
        """Memory of each set of engines. Another dict when one comes or goes."""
        table = resource.spec.flow_table
        for number in sets:
            self.sets[number] = self._memory(number, table.buckets, table.max_flows, shard)
        self.key = hash_key(directory / "secret", self.live())
        flows = self.snat_flows()
        self._begin_to_leave({*flows, *(a for memory in self.sets.values() for a in memory.configured_snat())})
        self.leaving = {a: flows.get(a, 0) for a in self.leaving}
        self._directions = Directions(director, self.key, self._offset, self.buckets, index)
        self._words = lib().ps_director_words(director) + self._offset
        self._egress = lib().ps_director_egress(director)

    def _memory(self, number: int, buckets: int, max_flows: int, shard: str) -> FlowMemory:
        directory = self.directory / "sets" / str(number)
        return FlowMemory(self.name, directory, self._pin(directory), buckets, max_flows, shard)

    @property
    def shard(self) -> str:
        """Layout of the current set's shards."""
        return self.sets[self.current].shard

    def add_set(self, number: int, shard: str = "") -> None:
        """Make the memory of one more set, with the others' configuration. The stack's `busy` is held. Blocks."""
        left = self.directory / "sets" / str(number)
        flow_memory.remove_files(left, self._pin(left))
        try:
            memory = self._memory(number, self.buckets, self.resource.spec.flow_table.max_flows, shard)
            if self._configured is not None:
                memory.prepare(self._configured)
                memory.publish()
        except BaseException:
            flow_memory.remove_files(left, self._pin(left))  # it may never be tried again
            raise
        self.sets = self.sets | {number: memory}

    def remove_set(self, number: int) -> None:
        """Let the memory of a set go, with its flows. It has no engine any more, and is not the current one.

        On the event loop, where nobody is reading it, with the stack's `busy` held.
        """
        assert number != self.current
        memory = self.sets[number]
        self.sets = {n: m for n, m in self.sets.items() if n != number}
        self.set_of = {slot: n for slot, n in self.set_of.items() if n != number}
        memory.remove()

    def is_configured(self, engine: Engine) -> bool:
        """Whether it has the present configuration of its set, and knows of the other set's connections."""
        memory, attachments = self.sets[engine.blueprint.set], engine.attachments
        known = engine.view is not None and bool(memory.generation) and memory.is_used_by(engine)
        return known and attachments is not None and attachments.connected

    def mirror_from(self, keeper: int, newcomer: int) -> None:
        """These two sets are, or shall be, mirrored. AgentError if there is no memory for what they must know. Blocks."""
        pin = self._pin(self.directory / "sets" / str(keeper)).with_suffix(".connections")
        pin = pin.with_name(pin.name.replace(".", "+"))
        self.mirror = Mirror(self.director, self._offset, self.sets[keeper], self.sets[newcomer], pin)
        self.connections = self.mirror.connections()

    def mirror_no_more(self) -> None:
        """The list goes. Engines may have it mapped still."""
        if self.mirror is not None and self.connections is not None:
            self.mirror.remove()
            os.close(self.connections.fd)
        self.mirror = self.connections = None

    def keepers(self) -> list[Owner | None]:
        """By bucket, who keeps connections that are older than its owner; empty: nobody keeps any."""
        return self.mirror.keepers() if self.mirror is not None else []

    @property
    def buckets(self) -> int:
        """Size of the flow table."""
        return self.sets[self.current].buckets

    @property
    def generation(self) -> int:
        """Of the configuration of the current set."""
        return self.sets[self.current].generation

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

    def snat_flows(self) -> dict[Address, int]:
        """Flows by SNAT address, also those whose end is not long ago. Reads all of them. Blocks."""
        total: Counter[Address] = Counter()
        for memory in self.sets.values():
            total.update(memory.snat_flows())
        return dict(total)

    def count_leaving(self) -> None:
        """Look how many flows have the SNAT addresses that leave. Blocks."""
        if self.leaving:
            flows = self.snat_flows()
            self.leaving = {a: flows.get(a, 0) for a in self.leaving}

    @property
    def unsettled(self) -> bool:
        """Whether `settle` has something to look for."""
        return bool(self.leaving) or any(memory.unsettled for memory in self.sets.values())

    def settle(self, engines: Sequence[Engine]) -> list[Address]:
        """When every core uses the present configuration, let go of what only those before named. Blocks.

        Returns the SNAT addresses that were withdrawn. By an older configuration new flows still get them.
        """
        settled = [memory.settle(_of(number, engines)) for number, memory in self.sets.items()]
        if not all(settled):
            return []
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
        deadline = time.monotonic() + 2
        while late := [e.slot for e in engines if e.ready and not self.sets[e.blueprint.set].is_used_by(e)]:
            wake(engines)
            if time.monotonic() > deadline:
                raise AgentError(
                    f"engine {late[0]}: has not taken the last configuration for 2 s, so all engines of stack {self.name} keep "
                    f"theirs (listeners, backends); see packetstack logs {late[0]}"
                )
            await asyncio.sleep(0.002)
        self._configured = self._wanted(time.monotonic())
        for memory in self.sets.values():
            memory.prepare(self._configured)
        for memory in self.sets.values():
            memory.publish()
        wake(engines)
        return self.generation

    def _wanted(self, now: float) -> Configuration:
        self._note_usable(now)
        return Configuration(self.resource, self.key, [self._dealt(li) for li in self.resource.spec.listeners])

    def _dealt(self, listener: Listener) -> Dealt:
        usable, parts = self.usable(listener), self.parts(listener)
        shares = [(place, weight * part) for (place, weight), part in zip(usable, parts, strict=True)]
        return Dealt(listener, shares, self._down(listener), choices(usable, _balancing(listener), parts))

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

    # ---- flow table ---------------------------------------------------------------------------------------------

    def words(self) -> "array[int]":
        """The flow-table words, as directors read them now."""
        return array("Q", self._raw_words())

    def _raw_words(self) -> bytes:
        return bytes(ffi.buffer(self._words, self.buckets * 8))

    def owners(self) -> list[Owner | None]:
        """Owner by bucket; NOBODY where there is none."""
        return list(words.owners(self._raw_words()))

    def epochs(self) -> int:
        """Sum of all epochs: how many changes of owner there have been."""
        return sum(w >> 32 for w in self.words())

    def open_fences(self) -> frozenset[int]:
        """Buckets whose word and shard disagree: their handover is not finished."""
        return frozenset(self._disagreeing())

    def shard_slots(self) -> set[int]:
        """Slots that shards of any set name: those engines may be handling packets of them still."""
        return {slot for memory in self.sets.values() for slot in words.shard_slots(memory.headers()[0])}

    def held(self) -> Counter[int]:
        """Slot -> how many buckets it still has to hand over: their shards name it, and their words another."""
        return Counter(slot for slot in self._disagreeing().values() if slot)

    def belongs(self) -> Sequence[int]:
        """By bucket, the set of its owner."""
        return self._compared()[2]

    def _disagreeing(self) -> Mapping[int, int]:
        """Bucket whose word and shard disagree -> slot that its shard names, in the set that the word belongs to."""
        raw, headers, belongs = self._compared()
        return words.open_fences(raw, words.picked({n: owners for n, (owners, _) in headers.items()}, belongs))

    def _compared(self) -> tuple[bytes, dict[int, tuple[bytes, Sequence[int]]], Sequence[int]]:
        """The words; by set owners and live flows of the shards; the set that each bucket's word belongs to."""
        raw, headers = self._raw_words(), {n: memory.headers() for n, memory in self.sets.items()}
        shards = {n: owners for n, (owners, _) in headers.items()}
        return raw, headers, words.sets(raw, shards, self.set_of, self.current)

    def transfer(self, engines: Sequence[Engine], moves: Sequence[Move]) -> Report:
        """Move buckets, each inside its set, in batches of one fence each; a set stops at an engine that does not answer.

        With no moves it finishes what an interrupted call left open. `engines`: all of the stack; one that a shard
        names and that is not among them is gone for good. Blocks.
        """
        report, alone = Report(), len(self.sets) == 1
        belongs = self._compared()[2]
        begun = {belongs[b] for b in self.open_fences()} if not moves else set()
        for number, memory in self.sets.items():
            own = [m for m in moves if alone or belongs[m.bucket] == number]
            if alone or own or number in begun:
                mirror = self.mirror if self.mirror is not None and self.mirror.newcomer is memory else None
                pairs = mirror.pairs_of(engines, own) if mirror is not None else None
                report.add(memory.transfer(self._words, self._egress, _of(number, engines), own, pairs))
        return report

    def live(self) -> int:
        """Flows in all sets."""
        return sum(memory.live() for memory in self.sets.values())

    def flows_by_slot(self) -> dict[int, int]:
        """Live flows by the slot that owns their bucket, or did before a newer set."""
        raw, headers, belongs = self._compared()
        total: dict[int, int] = {}
        for number, (shards, flows) in headers.items():
            for word, shard, live, at in zip(array("Q", raw), array("Q", shards), flows, belongs, strict=True):
                if live and (slot := (word if at == number else shard) >> 22 & 1023):
                    total[slot] = total.get(slot, 0) + live
        return total

    def flows(self, bucket: int) -> tuple[list[Any], list[Any]]:
        """Copies of a bucket's live flows: those of its owner, and those that its keeper has."""
        if self.mirror is None or self.mirror.keepers()[bucket] is None:
            return [flow for memory in self.sets.values() for flow in memory.flows(bucket)], []
        return self.mirror.newcomer.flows(bucket), self.mirror.keeper.flows(bucket)

    def backend_flows(self) -> dict[Place, tuple[int, int]]:
        """Of each backend that flows were dealt to: those that live, and all that there were."""
        total: dict[Place, tuple[int, int]] = {}
        for memory in self.sets.values():
            for place, (live, created) in memory.backend_flows().items():
                before = total.get(place, (0, 0))
                total[place] = before[0] + live, before[1] + created
        return total

    def bucket_packets(self) -> list[int]:
        """Packets that engines have handled by bucket, since the sets that there are began."""
        return [sum(counts) for counts in zip(*(memory.packets() for memory in self.sets.values()), strict=True)]

    def close(self) -> None:
        """Withdraw from the director and let the shared memory go. Files stay, but for a connection list."""
        with suppress(AgentError):
            self._directions.withdraw()
        for b in range(self.buckets):
            self._words[b] = 0
        self.mirror_no_more()
        for memory in self.sets.values():
            memory.close()


def _of(number: int, engines: Iterable[Engine]) -> list[Engine]:
    return [e for e in engines if e.blueprint.set == number]


def _listening(listener: Listener) -> Listening:
    return listener.address, listener.port, listener.protocol


def _balancing(listener: Listener) -> str:
    return listener.balancing if listener.session_affinity == "None" else "Maglev"


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
