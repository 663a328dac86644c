"""What the words of a flow table, and the owners of its shards, say: 64 bits for each bucket, as they lie in memory.

The agent asks each second, and mostly nothing has changed: so what was read is the key of what it says.
"""

from array import array
from collections.abc import Mapping
from functools import lru_cache

from packetstack_core.assignment import NOBODY, Owner


@lru_cache(maxsize=32)
def owners(words: bytes) -> tuple[Owner | None, ...]:
    """Owner by bucket."""
    return tuple(Owner(w >> 22 & 1023, w >> 16 & 63) if w >> 22 & 1023 else NOBODY for w in array("Q", words))


@lru_cache(maxsize=32)
def open_fences(words: bytes, shards: bytes) -> Mapping[int, int]:
    """Bucket whose word and shard disagree -> slot that its shard names; 0: nobody."""
    pairs = enumerate(zip(array("Q", words), array("Q", shards), strict=True))
    return {b: owner >> 22 & 1023 for b, (word, owner) in pairs if owner != word & ~0xFFFF}


@lru_cache(maxsize=32)
def shard_slots(shards: bytes) -> frozenset[int]:
    """Slots that shards name."""
    return frozenset(owner >> 22 & 1023 for owner in array("Q", shards)) - {0}
