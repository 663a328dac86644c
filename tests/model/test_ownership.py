"""The ownership state machine under random histories, and the proof that its checks notice a fence with a part missing.

The real thing is checked by the same invariants on real packets; here every order of steps is cheap to try.
"""

import random
from dataclasses import fields, replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tests.model.ownership import Held, Node, Packet, Protections

from packetstack_core.assignment import NOBODY, EngineShare, Owner, assign

cpus = st.integers(0, 1)
slots = st.integers(1, 5)
queues = st.integers(0, 1)


class Ownership(RuleBasedStateMachine):
    """Resizes, moves, deaths, hangs, delays, duplicates and agent restarts in any order."""

    protections = Protections()

    @initialize(shape=st.lists(st.integers(1, 2), min_size=1, max_size=3))
    def start(self, shape):
        self.node = Node(protections=self.protections)
        for count in shape:
            self.node.add_engine(count)
        self.share_out()
        self.node.open_fence()

    def share_out(self, but=None):
        """What a controller would do now: give every engine its share."""
        shares = [EngineShare(s, len(e.queues)) for s, e in self.node.engines.items() if s != but]
        owners = [None if w.owner == NOBODY else w.owner for w in self.node.words]
        for move in assign(owners, shares):
            self.node.store_word(move.bucket, move.to)

    # Traffic and its way: more often than the rest, since a history without packets shows nothing.

    @rule(flows=st.lists(st.integers(0, 7), min_size=1, max_size=6))
    def packets_arrive(self, flows):
        for flow in flows:
            self.node.arrive(flow)

    @rule(cpu=cpus)
    def a_run_ends(self, cpu):
        self.node.flush(cpu)

    @rule(cpu=cpus, slot=slots, count=st.integers(1, 6))
    def frames_are_delivered(self, cpu, slot, count):
        for _ in range(count):
            self.node.deliver(cpu, slot)

    @rule(slot=slots, queue=queues, from_park=st.booleans(), most=st.integers(1, 4))
    def a_batch_begins(self, slot, queue, from_park, most):
        self.node.take(slot, queue, from_park, most)

    @rule(slot=slots, queue=queues)
    def a_batch_ends(self, slot, queue):
        self.node.finish(slot, queue)

    @rule(slot=slots, queue=queues, count=st.integers(1, 4))
    def frames_are_transmitted(self, slot, queue, count):
        for _ in range(count):
            self.node.transmit(slot, queue)

    @rule(cpu=cpus, slot=slots, count=st.integers(1, 4))
    def the_host_side_sends_on(self, cpu, slot, count):
        for _ in range(count):
            self.node.host(cpu, slot)

    @rule(times=st.integers(1, 3))
    def everything_goes_on_a_little(self, times):
        for _ in range(times):
            self.node.step_all()

    # Decisions

    @rule(bucket=st.integers(0, 3), slot=slots, queue=queues)
    def a_bucket_is_moved(self, bucket, slot, queue):
        self.node.store_word(bucket, Owner(slot, queue))

    @rule(bucket=st.integers(0, 3))
    def a_bucket_loses_its_owner(self, bucket):
        self.node.store_word(bucket, NOBODY)

    @rule()
    def the_pool_is_evened_out(self):
        self.share_out()

    @rule(count=st.integers(1, 2))
    def an_engine_comes(self, count):
        if len(self.node.engines) < 4 and self.node.slots_used < 5:
            self.node.add_engine(count)
            self.share_out()

    @rule(slot=slots)
    def an_engine_is_drained(self, slot):
        if len(self.node.engines) > 1:
            self.share_out(but=slot)

    @rule(slot=slots)
    def an_engine_is_removed(self, slot):
        if len(self.node.engines) > 1:
            self.node.remove_engine(slot)

    # The fence: markers may be sent any number of times

    @rule()
    def a_fence_is_opened(self):
        self.node.open_fence()

    @rule(cpu=cpus)
    def markers_are_sent(self, cpu):
        self.node.send_markers(cpu)

    @rule(slot=slots, queue=queues)
    def a_queue_acknowledges(self, slot, queue):
        self.node.acknowledge(slot, queue)

    @rule(cpu=cpus)
    def egress_markers_are_sent(self, cpu):
        self.node.send_egress_markers(cpu)

    @rule(cpu=cpus)
    def a_cpu_is_visited(self, cpu):
        self.node.visit(cpu)

    @rule()
    def a_bucket_is_released(self):
        self.node.release()

    # Faults

    @rule(cpu=cpus, slot=slots)
    def a_marker_is_lost(self, cpu, slot):
        self.node.lose_marker(cpu, slot)

    @rule(slot=slots)
    def a_datapath_dies_or_hangs(self, slot):
        self.node.die(slot)

    @rule(slot=slots)
    def its_queues_are_adopted(self, slot):
        self.node.adopt(slot)

    @rule()
    def the_agent_dies(self):
        self.node.agent_dies()

    @rule()
    def the_agent_comes_back(self):
        self.node.agent_restarts()

    @rule(slot=slots, queue=queues, cpu=cpus)
    def a_queue_goes_to_another_core(self, slot, queue, cpu):
        self.node.change_core(slot, queue, cpu)

    @invariant()
    def invariants_hold(self):
        if hasattr(self, "node"):
            self.node.check()

    def teardown(self):
        """Peace: everything comes to rest, and then every flow whose bucket has an owner gets through."""
        if not hasattr(self, "node"):
            return
        node = self.node
        node.settle()
        before = len(node.wire)
        owned = [f for f in range(node.flows) if node.words[node.bucket_of(f)].owner != NOBODY]
        for flow in owned:
            node.arrive(flow)
        node.settle()
        assert len(node.wire) - before == len(owned), "a flow has no engine that handles its next packet"


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@pytest.mark.slow
def test_invariants_hold_over_long_histories():
    run_state_machine_as_test(Ownership, settings=settings(max_examples=60, stateful_step_count=400, deadline=None))


# ---- a walk without Hypothesis: faster, for many steps and for the controls -----------------------------------------

WEIGHTS = {
    "arrive": 12, "flush": 6, "deliver": 12, "take": 10, "finish": 10, "transmit": 8, "acknowledge": 8, "host": 8,
    "store_word": 8, "open_fence": 4, "send_markers": 6, "send_egress_markers": 6, "visit": 6, "release": 6,
    "die": 0.3, "adopt": 1, "agent_dies": 0.2, "agent_restarts": 1, "add_engine": 0.2, "remove_engine": 0.5,
    "lose_marker": 0.3, "change_core": 1,
}  # fmt: skip


def walk(seed, protections=None, steps=1000):
    """A random history; from time to time one kind of step is held up on one CPU or engine. Raises AssertionError."""
    r = random.Random(seed)
    node = Node(protections=protections)
    for _ in range(2):
        node.add_engine(r.choice((1, 2)))
    slow = (None, 0, 0)
    for kind in r.choices(list(WEIGHTS), list(WEIGHTS.values()), k=steps):
        cpu, slot, queue = r.randrange(2), r.choice(list(node.engines)), r.randrange(2)
        if r.random() < 0.01:
            slow = (r.choice(list(WEIGHTS)), cpu, slot)
        if slow[0] == kind and (slot == slow[2] if kind in ("take", "finish", "transmit") else cpu == slow[1]):
            continue
        match kind:
            case "arrive":
                node.arrive(r.randrange(node.flows))
            case "take":
                node.take(slot, queue, r.random() < 0.4, r.randrange(1, 5))
            case "store_word":
                to = NOBODY if r.random() < 0.05 else Owner(slot, queue)
                node.store_word(r.randrange(len(node.words)), to)
            case "finish" | "transmit" | "acknowledge":
                getattr(node, kind)(slot, queue)
            case "flush" | "send_markers" | "send_egress_markers" | "visit":
                getattr(node, kind)(cpu)
            case "deliver" | "host" | "lose_marker":
                getattr(node, kind)(cpu, slot)
            case "die" | "adopt":
                getattr(node, kind)(slot)
            case "add_engine":
                if len(node.engines) < 4:
                    node.add_engine(r.choice((1, 2)))
            case "remove_engine":
                if len(node.engines) > 1:
                    node.remove_engine(slot)
            case "change_core":
                node.change_core(slot, queue, cpu)
            case _:
                getattr(node, kind)()
        if node.violations:
            break
    node.check()
    node.settle()
    return node


def test_three_hundred_walks_keep_the_invariants():
    nodes = [walk(seed) for seed in range(300)]
    assert sum(n.next_fence for n in nodes) > 600, "there were fences"
    assert sum(len(n.wire) for n in nodes) > 8000, "there were packets"


@pytest.mark.parametrize("missing", ["markers", "every_cpu", "quiet_core_change"])
def test_random_walks_find_what_goes_wrong_without(missing):
    protections = replace(Protections(), **{missing: False})

    def violated(seed):
        try:
            walk(seed, protections)
        except AssertionError:
            return True
        return False

    assert any(violated(seed) for seed in range(400))


def test_without_a_fence_hypothesis_finds_a_violation():
    class Unfenced(Ownership):
        protections = Protections(markers=False, egress=False, second_visit=False)

    only_find = settings(
        max_examples=2000,
        stateful_step_count=60,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
    )
    with pytest.raises(AssertionError, match=r"came to its engine when|left after number|is changed by|never handled"):
        run_state_machine_as_test(Unfenced, settings=only_find)


# ---- short histories, one for each part of the fence ----------------------------------------------------------------

A, B = Owner(1, 1), Owner(2, 0)  # the source on CPU 1, the target on CPU 0
FLOW = 0  # arrives on CPU 0, bucket 0


class Story:
    """Two engines; bucket 0 belongs to A, whose core has handled the flow's first packet."""

    def __init__(self, **missing):
        self.node = Node(protections=replace(Protections(), **missing))
        self.node.add_engine(2)
        self.node.add_engine(1)
        self.node.store_word(0, A)
        self.node.open_fence()
        self.packet_reaches(A)

    def packet_reaches(self, owner, handled=True):
        self.node.arrive(FLOW)
        self.node.flush(0)
        self.node.deliver(0, owner.slot)
        if handled:
            self.core(owner)

    def core(self, owner, from_park=False):
        self.node.take(owner.slot, owner.queue, from_park)
        self.node.finish(owner.slot, owner.queue)

    def ingress_side(self):
        self.node.store_word(0, B)
        self.node.open_fence()
        for cpu in (0, 1):
            self.node.send_markers(cpu)
            self.node.deliver(cpu, A.slot)
        self.core(A)
        return self.node.acknowledge(A.slot, A.queue)

    def egress_side(self):
        for cpu in (0, 1):
            self.node.send_egress_markers(cpu)
            self.node.host(cpu, A.slot)

    def released(self):
        for cpu in (0, 1):
            self.node.visit(cpu)
        return self.node.release()

    def next_packet_overtakes(self):
        self.packet_reaches(B)
        self.node.transmit(B.slot, B.queue)
        self.node.host(0, B.slot)
        self.node.flush(0)

    def ends_in_disorder(self):
        self.node.transmit(A.slot, A.queue)
        self.node.host(1, A.slot)
        self.node.flush(1)
        return any("left after number" in v for v in self.node.violations)


def test_a_whole_fence_keeps_the_order():
    story = Story()
    assert not story.ingress_side(), "the transmit ring is not empty yet"
    story.node.transmit(A.slot, A.queue)
    assert story.node.acknowledge(A.slot, A.queue)
    story.egress_side()
    assert not story.released(), "the egress marker of CPU 1 is behind the packet"
    story.node.host(1, A.slot)
    assert not story.released(), "the host side on CPU 1 is still sending the packet on"
    story.node.flush(1)
    assert story.released()
    story.next_packet_overtakes()
    assert not story.ends_in_disorder()
    assert [p.number for p in story.node.wire] == [1, 2]
    assert story.node.headers[0] == Held(2, B)


def test_an_acknowledgement_with_frames_to_transmit_breaks_the_order():
    story = Story(empty_transmit_ring=False)
    assert story.ingress_side()
    story.egress_side()
    assert story.released()
    story.next_packet_overtakes()
    assert story.ends_in_disorder()


def test_a_release_without_egress_markers_breaks_the_order():
    story = Story(egress=False)
    story.ingress_side()
    story.node.transmit(A.slot, A.queue)
    assert story.node.acknowledge(A.slot, A.queue)
    assert story.released()
    story.next_packet_overtakes()
    assert story.ends_in_disorder()


def test_a_release_without_the_second_visit_breaks_the_order():
    story = Story(second_visit=False)
    story.ingress_side()
    story.node.transmit(A.slot, A.queue)
    assert story.node.acknowledge(A.slot, A.queue)
    story.egress_side()
    story.node.host(1, A.slot)
    assert story.released()
    story.next_packet_overtakes()
    assert story.ends_in_disorder()


@pytest.mark.parametrize("waits", [True, False])
def test_parked_packets_are_handled_before_their_bucket_is_given_away(waits):
    story = Story(parked_first=waits)
    node = story.node
    node.words[1] = node.headers[1] = Held(1, B)
    node.store_word(1, A)  # A parks bucket 1 until B has released it
    node.arrive(2)
    node.flush(0)
    node.deliver(0, A.slot)
    story.core(A)
    assert [p.bucket for p in node.engines[1].queues[1].park] == [1]
    node.headers[1] = node.words[1]  # released, but A has not looked yet
    node.store_word(1, B)
    node.open_fence()
    node.transmit(A.slot, A.queue)
    for cpu in (0, 1):
        node.send_markers(cpu)
        node.deliver(cpu, A.slot)
    story.core(A)
    assert node.acknowledge(A.slot, A.queue) is not waits
    story.core(A, from_park=True)
    assert bool(node.violations) is not waits


def test_a_queue_that_gives_and_gets_in_one_fence_would_wait_for_itself():
    """Parking is one ring, handled in order: what waits for B would hold up what must be handled for the fence."""
    node = Node(protections=Protections(apart=False))
    node.add_engine(2)
    node.add_engine(1)
    node.words = [Held(1, A), Held(1, B), Held(0, NOBODY), Held(0, NOBODY)]
    node.headers = [Held(0, B), Held(1, B), Held(0, NOBODY), Held(0, NOBODY)]
    node.arrive(0)
    node.flush(0)
    node.deliver(0, A.slot)
    node.take(A.slot, A.queue, False)
    node.finish(A.slot, A.queue)  # bucket 0 is parked at A
    node.headers[0] = node.words[0]  # and released to it
    for _ in range(2):
        node.store_word(1, A)  # A gets bucket 1
        node.arrive(2)
        node.flush(0)
        node.deliver(0, A.slot)
        node.arrive(0)
        node.flush(0)
        node.deliver(0, A.slot)
        node.take(A.slot, A.queue, False)
        node.finish(A.slot, A.queue)
    node.store_word(0, B)  # and gives bucket 0
    with pytest.raises(AssertionError, match="never released"):
        node.settle()


def test_with_the_queues_kept_apart_the_second_wish_waits():
    node = Node()
    node.add_engine(2)
    node.add_engine(1)
    node.words = [Held(1, A), Held(1, B), Held(0, NOBODY), Held(0, NOBODY)]
    node.headers = list(node.words)
    assert node.store_word(1, A)
    assert not node.store_word(0, B), "A gets a bucket in this fence"
    assert not node.store_word(1, B), "a bucket has at most one open fence"
    node.settle()
    assert node.store_word(0, B)


def test_a_restarted_agent_takes_up_an_open_fence():
    story = Story()
    story.ingress_side()
    story.node.agent_dies()
    assert not story.node.store_word(0, A), "nobody decides meanwhile"
    story.packet_reaches(B)
    assert [p.number for p in story.node.engines[2].queues[0].park] == [2], "parked, not lost"
    story.node.settle()
    assert [p.number for p in story.node.wire] == [1, 2]
    assert not story.node.drops


def test_a_source_that_died_is_fenced_after_its_adoption():
    story = Story()
    story.node.die(1)
    assert not story.ingress_side()
    assert not story.released(), "never by a timer"
    story.node.settle()
    assert story.node.headers[0] == Held(2, B)
    assert [p.number for p in story.node.wire] == [1]


def test_parking_is_bounded_and_drops_the_newest():
    story = Story()
    story.node.store_word(0, B)
    for _ in range(10):
        story.packet_reaches(B)
        story.core(B)
    assert [p.number for p in story.node.engines[2].queues[0].park] == [2, 3, 4, 5, 6, 7]
    assert story.node.drops == {"park_full": 4}


def test_an_engine_with_a_bucket_is_not_removed():
    story = Story()
    assert not story.node.remove_engine(1)
    story.node.store_word(0, B)
    assert not story.node.remove_engine(1), "its header still names it"
    story.node.settle()
    assert story.node.remove_engine(1)
    story.node.check()


def test_a_packet_without_an_owner_is_counted():
    node = Node()
    node.arrive(0)
    node.check()
    assert node.drops == {"no_owner": 1}


def test_the_checks_notice_a_lost_and_a_repeated_packet():
    story = Story()
    queue = story.node.engines[1].queues[1]
    packet = queue.transmit.pop()
    with pytest.raises(AssertionError, match="1 packets seen, 0 accounted for"):
        story.node.check()
    queue.transmit.extend([packet, packet])
    with pytest.raises(AssertionError, match="twice inside"):
        story.node.check()


def test_the_checks_notice_two_owners():
    story = Story()
    packet = Packet(FLOW, 9, 0, 1, A)
    for slot, index in ((1, 1), (2, 0)):
        story.node.engines[slot].queues[index].batch = [(packet, "handle")]
    story.node._check_one_owner()
    assert "bucket 0 is changed by" in story.node.violations[0]


def test_every_protection_has_a_control():
    shown = {
        "markers", "every_cpu", "quiet_core_change", "empty_transmit_ring", "egress", "second_visit", "parked_first",
        "apart",
    }  # fmt: skip
    assert {f.name for f in fields(Protections)} == shown
