"""What the words of a flow table, and the owners of its shards, say: 64 bits for each bucket, as they lie in memory.

The agent asks each second, and mostly nothing has changed: so what was read is the key of what it says.
"""

from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache

from packetstack_core.assignment import NOBODY, Owner


@lru_cache(maxsize=4096)
def _owner(slot: int, queue: int) -> Owner:
    """One for all buckets that it has: what is kept of 32 tables would else be an object for each bucket of each."""
    return Owner(slot, queue)


@lru_cache(maxsize=32)
def owners(words: bytes) -> tuple[Owner | None, ...]:
    """Owner by bucket."""
    return tuple(_owner(w >> 22 & 1023, w >> 16 & 63) if w >> 22 & 1023 else NOBODY for w in array("Q", words))


@lru_cache(maxsize=32)
def keepers(words: bytes) -> tuple[Owner | None, ...]:
    """Previous owner by bucket, which gets a copy of its packets; None: its traffic is not mirrored."""
    return tuple(_owner(w >> 6 & 1023, w & 63) if w >> 6 & 1023 else None for w in array("Q", words))


@lru_cache(maxsize=32)
def open_fences(words: bytes, shards: bytes) -> Mapping[int, int]:
    """Bucket whose word and shard disagree -> slot that its shard names; 0: nobody."""
    pairs = enumerate(zip(array("Q", words), array("Q", shards), strict=True))
    return {b: owner >> 22 & 1023 for b, (word, owner) in pairs if owner != word & ~0xFFFF}


@lru_cache(maxsize=32)
def shard_slots(shards: bytes) -> frozenset[int]:
    """Slots that shards name."""
    return frozenset(owner >> 22 & 1023 for owner in array("Q", shards)) - {0}


def sets(words: bytes, shards: Mapping[int, bytes], known: Mapping[int, int], current: int) -> Sequence[int]:
    """Set of engines that each bucket's word belongs to: that of the engine it names, or `current` if it names nobody.

    `shards`: owners of the shards, by set. `known`: set by slot. An engine that is not known any more is of the set whose
    shards name it.
    """
    if len(shards) == 1:
        return [*shards] * (len(words) // 8)
    by_slot = {slot: number for number, owners in shards.items() for slot in shard_slots(owners)} | dict(known)
    return [by_slot.get(word >> 22 & 1023, current) for word in array("Q", words)]


def picked(shards: Mapping[int, bytes], sets: Sequence[int]) -> bytes:
    """Owner of each bucket's shard in the set that is given for it."""
    if len(shards) == 1:
        return next(iter(shards.values()))
    read = {number: array("Q", owners) for number, owners in shards.items()}
    return bytes(array("Q", (read[number][bucket] for bucket, number in enumerate(sets))))
