"""Buckets in mirror leave an engine that is gone: real words, shards and pairs, of engines that are played."""

from tests.agent.test_sets import director, opened, run, word  # noqa: F401
from tests.model.node import PlayedEngine, resource

from packetstack_agent.director import Director
from packetstack_agent.natives import constant, ffi, lib
from packetstack_agent.node import RunDirectory
from packetstack_agent.stacks import Stack
from packetstack_core.assignment import Move, Owner

BUCKET, LOOPBACK = 5, 1
KEEPER, LOST, NEXT, HEIR = 1, 2, 3, 4
"""Slots: the first and the last are of set 1, the others of set 2."""


def engine(slot: int) -> PlayedEngine:
    made = PlayedEngine(slot, resource())
    made.blueprint.set = 1 if slot in (KEEPER, HEIR) else 2
    made.ifindex = LOOPBACK
    made.view.queues = 2
    made.fence = ffi.new("struct ps_fence_engine *")
    made.fence.slot, made.fence.ingress, made.fence.egress, made.fence.engine = slot, -1, -1, made.view
    made.fence.wake[0] = -1
    return made


class Mirrored:
    """One bucket that is mirrored to the engines 2 and 1."""

    def __init__(self, run: RunDirectory, director: Director) -> None:  # noqa: F811
        self.stack: Stack = opened(run, director)
        self.stack.add_set(2)
        self.stack.mirror_from(1, 2)
        assert self.stack.mirror is not None
        self.mirror = self.stack.mirror
        self.stack.current, self.stack.set_of = 2, {1: 1, 2: 2, 3: 2, 4: 1}
        self.words = lib().ps_director_words(director.handle)
        self.pairs = lib().ps_director_pair_numbers(director.handle)
        self.kept = lib().ps_arena_shard(self.stack.sets[1].arena, BUCKET)
        self.owned = lib().ps_arena_shard(self.stack.sets[2].arena, BUCKET)

    def is_at(self, kept: int, owned: int) -> None:
        """States of the shards, beside their owners."""
        self.words[BUCKET] = word(2, LOST) | KEEPER << 6
        self.kept.owner, self.owned.owner = word(1, KEEPER) | kept, word(2, LOST) | owned


def test_a_bucket_leaves_the_newer_sets_engine_when_that_does_not_serve_and_its_keeper_stays(
    run: RunDirectory,  # noqa: F811
    director: Director,  # noqa: F811
) -> None:
    one, kept = Mirrored(run, director), constant("PS_KEPT")
    one.is_at(kept, constant("PS_OWNED"))
    lost, rest, move = engine(LOST), [engine(KEEPER), engine(NEXT)], [Move(BUCKET, Owner(NEXT, 1))]
    assert one.stack.transfer([lost, *rest], move).moved == 0, "packets would be lost"
    assert one.words[BUCKET] == word(2, LOST) | KEEPER << 6

    assert one.stack.transfer(rest, move).moved == 1
    assert one.words[BUCKET] == word(3, NEXT, 1) | KEEPER << 6
    assert one.owned.owner == word(3, NEXT, 1)
    assert one.kept.owner == word(1, KEEPER) | kept
    assert one.pairs[BUCKET] == one.mirror.pairs_of(rest, ()).numbers[BUCKET] > 0
    one.stack.close()


def test_one_that_still_waits_is_released_before_it_leaves(
    run: RunDirectory,  # noqa: F811
    director: Director,  # noqa: F811
) -> None:
    one = Mirrored(run, director)
    one.is_at(constant("PS_KEPT"), constant("PS_WAITING"))
    rest, move = [engine(KEEPER), engine(NEXT)], [Move(BUCKET, Owner(NEXT, 1))]
    assert one.stack.transfer(rest, move).moved == 0
    assert one.mirror.unfinished
    assert one.mirror.switch(rest, ()).stalled == 0
    assert one.owned.owner == word(2, LOST)
    assert one.stack.transfer(rest, move).moved == 1
    one.stack.close()


def test_what_a_keeper_had_that_is_gone_in_the_switch_waits_for_its_heir(
    run: RunDirectory,  # noqa: F811
    director: Director,  # noqa: F811
) -> None:
    one, waiting = Mirrored(run, director), constant("PS_WAITING")
    one.is_at(constant("PS_OWNED"), waiting)
    assert one.mirror.switch([engine(LOST)], ()).stalled == 0
    assert one.owned.owner == word(2, LOST) | waiting, "else its connections would be strangers, and the set had no end"
    one.mirror.adopt([engine(LOST), engine(HEIR)], [Move(BUCKET, Owner(HEIR, 0))])
    assert one.kept.owner == word(1, HEIR)
    assert one.words[BUCKET] == word(2, LOST) | HEIR << 6
    assert one.mirror.unfinished, "the heir publishes, with the next call"
    one.stack.close()
