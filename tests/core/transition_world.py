"""A world of sets for the tests of their planner: it carries out actions as a runtime would, and refuses what breaks a connection."""

from collections import Counter
from dataclasses import replace

from packetstack_core import planning, shards
from packetstack_core.assignment import NOBODY, State
from packetstack_core.kinds import MAX_SET_ID
from packetstack_core.planning import (
    ActivateEngine,
    AssignBuckets,
    CreateEngine,
    Desired,
    DrainEngine,
    Engine,
    GivenUp,
    RemoveEngine,
)
from packetstack_core.resources import Handover
from packetstack_core.transitions import (
    AdoptKept,
    ChangeSet,
    EndSet,
    MakeSet,
    Observed,
    PromoteSet,
    RetireSet,
    Sets,
    SetState,
    SwitchBuckets,
    plan,
)

BUCKETS = 64
MIRROR = Handover(strategy="Mirror")


def mirror(on_deadline="Keep", policy=None, strategy="Mirror"):
    return Handover(strategy=strategy, policy=policy, deadlineSeconds=100, onDeadline=on_deadline)


class World:
    """Carries out actions as a runtime would. Refuses what may never be asked for."""

    def __init__(self, buckets=BUCKETS):
        self.engines = {}
        self.members = {}
        self.configured = set()
        self.owners = [None] * buckets
        self.keepers = [None] * buckets
        self.open = Counter()  # (set, bucket) -> connections
        self.sets = Sets()
        self.next_slot = 1
        self.now = 0.0
        self.given_up = GivenUp()
        self.create_after = 0.0
        self.ended = []
        self.switched = 0
        self.made = []
        self.shard = shards.FIRST
        """Layout of the memory that there is while no set is known."""

    def observed(self, moving=(), pinned=()):
        pool = planning.Observed(
            tuple(self.engines.values()),
            tuple(self.owners),
            frozenset(moving),
            create_after=self.create_after,
            rebalanced=False,
            given_up=self.given_up,
        )
        return Observed(
            pool,
            frozenset(pinned),
            self.sets,
            dict(self.members),
            frozenset(self.configured),
            tuple(self.keepers),
            self.shard,
        )

    def plan(self, want, handover=MIRROR):
        return plan(want, handover, self.observed(), self.now)

    def state_of(self, slot):
        return next(s.state for s in self.sets.known if s.id == self.members[slot])

    def of(self, id_):
        return [e for e in self.engines.values() if self.members[e.slot] == id_]

    def gone(self, owner):
        engine = self.engines.get(owner.slot)
        return engine is None or engine.leaving or engine.state is State.FAILED or engine.down_since is not None

    def set_in(self, state):
        return self.sets.one(state)

    # ---- actions

    def do(self, action):
        match action:
            case MakeSet() | ChangeSet() | PromoteSet() | RetireSet():
                self.change_sets(action)
            case SwitchBuckets(moves):
                for move in moves:
                    self.switch(move)
            case AdoptKept(moves):
                for move in moves:
                    old = self.keepers[move.bucket]
                    assert self.gone(old), "moved without need"
                    assert self.members[move.to.slot] == self.set_in(SetState.DRAINING).id
                    self.check_target(move.to)
                    self.keepers[move.bucket] = move.to
            case EndSet(id_, rule):
                self.ended.append((id_, rule))
                assert self.set_in(SetState.DRAINING).id == id_
                for bucket, keeper in enumerate(self.keepers):
                    if keeper:
                        self.close(id_, bucket)
            case CreateEngine(template, queues, id_):
                known = [s for s in self.sets.known if s.template == template]
                assert any(s.id == id_ for s in known) or (id_ is None and not self.sets.known)
                slot = self.next_slot
                self.next_slot += 1
                self.engines[slot] = Engine(
                    slot,
                    State.PENDING,
                    False,
                    template,
                    queues,
                    flows=0,
                    leaving=False,
                    holds=0,
                    load=0.0,
                    down_since=None,
                )
                self.members[slot] = id_
                self.made.append(id_)
            case ActivateEngine(slot):
                assert self.engines[slot].state in (State.STARTING, State.DRAINING)
                self.change(slot, state=State.ACTIVE)
            case DrainEngine(slot):
                self.change(slot, state=State.DRAINING)
            case RemoveEngine(slot):
                assert all(not o or o.slot != slot for o in self.owners), "never removes an owner"
                mute = self.engines[slot].down_since is not None
                assert mute or all(not k or k.slot != slot for k in self.keepers), "never removes a keeper that answers"
                assert mute or not self.engines[slot].holds, "never removes an engine that still holds a bucket"
                del self.engines[slot], self.members[slot]
                self.configured.discard(slot)
            case AssignBuckets(moves):
                for move in moves:
                    self.assign(move)

    def change_sets(self, action):
        match action:
            case MakeSet(new):
                assert new.id != self.sets.last, "never twice in a row"
                assert new.id not in {s.id for s in self.sets.known}
                assert 1 <= new.id <= MAX_SET_ID
            case PromoteSet(id_):
                able = [e for e in self.of(id_) if e.ready and e.slot in self.configured and e.state is State.ACTIVE]
                (wanted,) = (s.replicas for s in self.sets.known if s.id == id_)
                assert wanted == len(able) == len([e for e in self.of(id_) if e.state is State.ACTIVE])
            case RetireSet(id_):
                assert not self.of(id_)
                assert not sum(n for (s, _), n in self.open.items() if s == id_), "no connection is lost"
        self.sets = self.sets.after(action, self.now)

    def check_target(self, to):
        engine = self.engines[to.slot]
        assert engine.ready, "never gives a bucket to an engine that is not ready"
        assert engine.state is State.ACTIVE
        assert to.queue < engine.queues

    def switch(self, move):
        old = self.owners[move.bucket]
        current, draining = self.set_in(SetState.CURRENT).id, self.set_in(SetState.DRAINING).id
        assert self.members[old.slot] == draining
        assert self.engines[old.slot].ready, "a keeper has to answer"
        assert self.members[move.to.slot] == current
        assert move.to.slot in self.configured
        assert self.keepers[move.bucket] is None
        self.check_target(move.to)
        self.owners[move.bucket] = move.to
        self.keepers[move.bucket] = old
        self.switched += 1
        self.let_go()

    def assign(self, move):
        old = self.owners[move.bucket]
        assert move.to != old
        if move.to == NOBODY:
            assert old not in (None, NOBODY)
        else:
            self.check_target(move.to)
            if old not in (None, NOBODY) and old.slot in self.engines:
                assert self.members[old.slot] == self.members[move.to.slot], "only a switch leads to another set"
            assert self.keepers[move.bucket] is None or self.gone(old), "a bucket in mirror stays"
        self.owners[move.bucket] = move.to

    # ---- what happens

    def change(self, slot, **fields):
        self.engines[slot] = replace(self.engines[slot], **fields)

    def connect(self, bucket, count=1):
        owner = self.owners[bucket]
        if owner not in (None, NOBODY) and owner.slot in self.engines:
            self.open[self.members[owner.slot], bucket] += count

    def connect_all(self):
        for bucket in range(len(self.owners)):
            self.connect(bucket)

    def close(self, id_, bucket):
        self.open.pop((id_, bucket), None)
        self.let_go()

    def close_all(self, *, of=None):
        for id_, bucket in list(self.open):
            if of in (None, id_):
                self.open.pop((id_, bucket))
        self.let_go()

    def let_go(self):
        """Mirroring of a bucket ends when its keeper has nothing."""
        draining = self.set_in(SetState.DRAINING)
        for bucket, keeper in enumerate(self.keepers):
            if keeper and not self.open[draining.id, bucket] and not self.gone(keeper):
                self.keepers[bucket] = None

    def come_up(self):
        for slot, engine in list(self.engines.items()):
            if engine.state is State.PENDING:
                self.change(slot, state=State.STARTING)
            elif engine.state is not State.FAILED:
                self.change(slot, ready=True, down_since=None)
                self.configured.add(slot)

    def turn(self, want, handover=MIRROR):
        """Plans once and does it all. -> what was done"""
        actions = self.plan(want, handover)
        for action in actions:
            self.do(action)
            self.check()
        return actions

    def settle(self, want, handover=MIRROR, most=400):
        """Plans and acts until nothing is left to do."""
        for _ in range(most):
            for slot in list(self.engines):
                self.change(slot, holds=0)
            self.let_go()
            actions = self.turn(want, handover)
            if not actions and all(e.ready for e in self.engines.values()):
                return
            self.come_up()
        raise AssertionError(f"no rest after {most} rounds: {self.sets} {self.engines} {self.plan(want, handover)}")

    def check(self):
        assert len(self.sets.known) <= 2
        assert sum(s.state is SetState.CURRENT for s in self.sets.known) <= 1
        for bucket, owner in enumerate(self.owners):
            keeper = self.keepers[bucket]
            assert not keeper or self.set_in(SetState.DRAINING), "what is kept is kept by a set that drains"
            assert owner in (None, NOBODY) or owner.slot in self.engines

    def check_goal(self, want):
        (one,) = self.sets.known
        assert (one.state, one.replicas, one.template) == (SetState.CURRENT, want.replicas, want.template)
        assert len(self.engines) == want.replicas
        assert all(e.state is State.ACTIVE and e.template == want.template for e in self.engines.values())
        assert set(self.keepers) == {None}
        owned = Counter(o.slot if o else 0 for o in self.owners)
        assert set(owned) == (set(self.engines) or {0})
        assert max(owned.values()) - min(owned.values()) <= 1


def desired(replicas, template="a", queues=2, **limits):
    return Desired(replicas, template, queues, **limits)


def started(replicas=2, template="a"):
    """A stack with a connection in each bucket."""
    world = World()
    world.settle(desired(replicas, template))
    world.connect_all()
    world.made.clear()
    return world


def switching(want, before=2):
    """A stack that may switch its buckets now."""
    world = started(before)
    while not world.set_in(SetState.DRAINING):
        world.turn(want)
        world.come_up()
    return world


def draining(before=2, want=None):
    """A stack whose first set keeps a connection in each bucket."""
    world = started(before)
    world.settle(want or desired(before, "b"))
    assert [s.state for s in world.sets.known] == [SetState.DRAINING, SetState.CURRENT]
    return world


def kinds(actions):
    return Counter(type(a).__name__ for a in actions)
