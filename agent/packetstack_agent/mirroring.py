"""Traffic of a stack that is mirrored to two sets of its engines: the switch, what the keeper has left, the end.

The *keeper* is the set that had the buckets, and keeps its connections; the *newcomer* takes new ones. They agree by the
connection list (include/packetstack/connections.h). Functions here block briefly; they are called from worker threads.
"""

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packetstack_agent import processes, words
from packetstack_agent.attachments import Connections
from packetstack_agent.engines import Engine
from packetstack_agent.errors import AgentError
from packetstack_agent.flow_memory import BATCH, FENCE_LIMIT_MS, FlowMemory, Pairs, Report
from packetstack_agent.natives import call, constant, ffi, lib, text
from packetstack_core.assignment import Move, Owner

MOST_CONNECTIONS = 8192
"""Of the buckets of one switch: their packets wait while the keeper writes its connections down."""
UNPUBLISHED = 0xFFFFFFFF


@dataclass(frozen=True)
class Left:
    """What a keeper has left."""

    buckets: int
    """Those whose traffic is mirrored."""
    connections: int
    oldest_ticks: int
    """When the one of them was seen last that is silent for the longest time, on CLOCK_MONOTONIC; 0 without any."""
    over: tuple[int, ...]
    """Mirrored buckets of which it has no connection any more."""


class Mirror:
    """One transition of a stack from the keeper to the newcomer."""

    def __init__(self, director: Any, offset: int, keeper: FlowMemory, newcomer: FlowMemory, pin: Path) -> None:
        """`pin`: where the list is pinned, or shall be. AgentError if there is no memory for it."""
        self._director = director
        self._words, self._offset = lib().ps_director_words(director), offset
        self._numbers = lib().ps_director_pair_numbers(director)
        self.keeper, self.newcomer = keeper, newcomer
        self._pin = pin
        self._list = call(lib().ps_connections_open, text(pin), keeper.arena, not pin.exists())
        self._pairs: dict[tuple[int, int], int] = {}
        """(owner's slot, keeper's slot) -> number of the pair."""
        self._made: dict[int, tuple[int, int]] = {}
        """Number -> interfaces that it sends to."""
        for bucket, (owner, kept_by) in enumerate(zip(words.owners(self._read()), self.keepers(), strict=True)):
            if owner is not None and kept_by is not None:
                self._pairs[owner.slot, kept_by.slot] = self._numbers[offset + bucket]

    def _read(self) -> bytes:
        return bytes(ffi.buffer(self._words + self._offset, 8 * self.keeper.buckets))

    def connections(self) -> Connections:
        """The list, as engines get it; its descriptor is the caller's to close."""
        out = ffi.new("uint32_t[4]")
        lib().ps_connections_numbers(self._list, out)
        return Connections(call(lib().ps_map_open, text(self._pin), 0), (out[0], out[1], out[2], out[3]))

    def close(self) -> None:
        """Let the list go. It stays for the next agent."""
        lib().ps_connections_close(self._list)
        self._list = ffi.NULL

    def remove(self) -> None:
        """Let it go for good: nothing is mirrored any more, so that the numbers of all pairs are free, whatever shards say."""
        lib().ps_mirror_share_no_more(self.newcomer.arena)
        for bucket, kept_by in enumerate(self.keepers()):
            if kept_by is None:
                self._numbers[self._offset + bucket] = 0
        self.close()
        self._pin.unlink(missing_ok=True)

    # ---- what there is ------------------------------------------------------------------------------------------

    def keepers(self) -> list[Owner | None]:
        """By bucket, the engine's queue that keeps connections of it; None: its traffic is not mirrored."""
        return list(words.keepers(self._read()))

    def left(self) -> Left:
        """What the keeper has left."""
        n = self.keeper.buckets
        left, oldest = ffi.new("uint32_t[]", n), ffi.new("uint32_t[]", n)
        lib().ps_connections_left(self._list, left, oldest)
        mirrored = [b for b, kept_by in enumerate(self.keepers()) if kept_by is not None]
        live = self.keeper.headers()[1]
        some = [b for b in mirrored if 0 < left[b] < UNPUBLISHED]
        return Left(
            buckets=len(mirrored),
            connections=sum(left[b] for b in some),
            oldest_ticks=min((oldest[b] for b in some), default=0),
            # The newcomer can write the list, so it is not believed that nothing is left.
            over=tuple(b for b in mirrored if not left[b] and not live[b]),
        )

    def share(self) -> None:
        """Let what the keeper has left now count for the newcomer's limits, and for the load of backends. Blocks."""
        sets = ffi.new("struct ps_sets *", {"keeper": self.keeper.arena, "newcomer": self.newcomer.arena})
        lib().ps_mirror_share(sets, self._list)

    # ---- changes ------------------------------------------------------------------------------------------------

    def switch(self, engines: Collection[Engine], moves: Sequence[Move]) -> Report:
        """Give buckets to the newcomer, in batches of one fence each; stops at an engine that does not answer.

        Without moves it finishes what an interrupted call left open. `engines`: all of both sets.
        """
        owners = words.owners(self._read())
        known = [(m, owner) for m in moves if (owner := owners[m.bucket]) is not None]
        self._make_pairs(engines, {(m.to.slot, owner.slot) for m, owner in known})
        wanted = [(m.bucket, m.to.slot, m.to.queue, self._pairs[m.to.slot, owner.slot]) for m, owner in known]
        self.share()
        return self._run(engines, lib().ps_mirror_switch, "struct ps_switch[]", self._batches(wanted))

    def end(self, engines: Collection[Engine], buckets: Sequence[int]) -> Report:
        """These buckets are the newcomer's alone. Without any it finishes what an interrupted call left open."""
        batches = [list(buckets[i : i + BATCH]) for i in range(0, len(buckets), BATCH)] or [[]]
        return self._run(engines, lib().ps_mirror_end, "uint32_t[]", batches)

    def adopt(self, engines: Collection[Engine], moves: Sequence[Move]) -> None:
        """Give what engines that are gone kept to others of their set."""
        owners = words.owners(self._read())
        pairs = [(m, owner) for m in moves if (owner := owners[m.bucket]) is not None]
        self._make_pairs(engines, {(owner.slot, m.to.slot) for m, owner in pairs})
        wanted = [(m.bucket, m.to.slot, m.to.queue, self._pairs[owner.slot, m.to.slot]) for m, owner in pairs]
        sets, kept_alive = self._sets(engines)
        call(lib().ps_mirror_adopt, sets, ffi.new("struct ps_switch[]", wanted or 1), len(wanted))
        del kept_alive

    def pairs_of(self, engines: Collection[Engine], moves: Sequence[Move]) -> Pairs:
        """What a move inside the newcomer's set needs: only away from engines that do not serve. A packet would be lost else."""
        raw, serving = self._read(), {e.slot for e in engines if e.ready}
        owners, keepers, wanted = words.owners(raw), words.keepers(raw), {}
        for bucket, to in ((m.bucket, m.to) for m in moves):
            owner, keeper = owners[bucket], keepers[bucket]
            if keeper is not None and to.slot and owner is not None and owner.slot not in serving:
                wanted[bucket] = to.slot, keeper.slot
        self._make_pairs(engines, wanted.values())
        return Pairs(self._numbers + self._offset, {bucket: self._pairs[pair] for bucket, pair in wanted.items()})

    def look_at_devices(self, engines: Collection[Engine]) -> None:
        """An engine that was made again has another interface: its pairs send there."""
        self._make_pairs(engines, ())

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted call has left something open."""
        raw, waiting = self._read(), constant("PS_WAITING")
        shards = (array("Q", memory.headers()[0]) for memory in (self.keeper, self.newcomer))
        for word, kept_by, kept, owner in zip(array("Q", raw), words.keepers(raw), *shards, strict=True):
            own = word & ~0xFFFF
            if owner == own | waiting if kept_by is not None else kept and owner == own:
                return True
        return False

    def _batches(self, moves: Sequence[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
        live = self.keeper.headers()[1]
        batches: list[list[tuple[int, int, int, int]]] = [[]]
        connections = 0
        for move in moves:
            connections += live[move[0]]
            if len(batches[-1]) >= BATCH or (batches[-1] and connections > MOST_CONNECTIONS):
                batches.append([])
                connections = live[move[0]]
            batches[-1].append(move)
        return batches

    def _run(self, engines: Collection[Engine], work: Any, kind: str, batches: Iterable[Sequence[Any]]) -> Report:
        report, out = Report(), ffi.new("struct ps_transfer_report *")
        sets, kept_alive = self._sets(engines)
        with processes.way_to_all_cpus() as cpus:
            sets.all_cpus = cpus
            for batch in batches:
                call(work, sets, ffi.new(kind, list(batch) or 1), len(batch), out)
                report.moved += int(out.moved)
                report.stalled = int(out.stalled_slot)
                if out.moved or not batch:
                    report.fences += 1
                    report.hold_ns.append(int(out.total_ns))
                if report.stalled:
                    break
        del kept_alive
        return report

    def _sets(self, engines: Collection[Engine]) -> tuple[Any, Any]:
        """`struct ps_sets *`, and the array that it points to."""
        fence, parties = self.keeper.parties(engines)
        sets = ffi.new("struct ps_sets *")
        sets.keeper, sets.newcomer = self.keeper.arena, self.newcomer.arena
        sets.words, sets.offset, sets.pairs = self._words, self._offset, self._numbers
        sets.engines, sets.n_engines = fence, parties
        sets.limit_ms = FENCE_LIMIT_MS
        return sets, fence

    def _make_pairs(self, engines: Collection[Engine], wanted: Iterable[tuple[int, int]]) -> None:
        """Pairs that are wanted, and those that there are, send to the interfaces that the engines have now."""
        new = set(wanted) - self._pairs.keys()
        for pair in sorted(new):
            self._pairs[pair] = self._free_number()
        devices: Mapping[int, int] = {e.slot: e.ifindex for e in engines if e.ifindex}
        fresh = {
            number: (devices.get(owner, 0), devices.get(keeper, 0))
            for (owner, keeper), number in self._pairs.items()
            if (owner in devices and keeper in devices) or (owner, keeper) in new
        }
        changed = [(number, pair) for number, pair in sorted(fresh.items()) if self._made.get(number) != pair]
        if changed:
            call(lib().ps_director_pairs, self._director, ffi.new("struct ps_pair[]", changed), len(changed))
            self._made.update(changed)

    def _free_number(self) -> int:
        """A pair that no bucket of the node names."""
        used = set(array("H", bytes(ffi.buffer(self._numbers, 2 * constant("PS_TABLE_WORDS")))))
        used.update(self._pairs.values())
        for number in range(1, constant("PS_MAX_PAIRS")):
            if number not in used:
                return number
        raise AgentError(
            f"{constant('PS_MAX_PAIRS') - 1} pairs of engines get mirrored traffic: wait until a set has drained"
        )
