"""Two sets of engines for one bucket: every order of steps of small settings, random ones of a bigger setting, and the
proof that each rule is needed.

What no model of steps can show, and others have to: [14] who may write which file, and [17] how the kernel counts
copies that a missing device swallowed.
"""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from tests.model import mirror_engines
from tests.model.mirror import Mirror
from tests.model.mirror_ends import NEWCOMER, Setting, Wrong
from tests.model.mirror_engines import Rules
from tests.model.walk import check_openers, settle, walk

ONE_WAY = {"any_cpu": False}  # clients' packets come on CPU 0, backends' on CPU 1
OLD = {"established": (0,)}  # the keeper has the connection at the start
DATAGRAMS = {"udp": (0,), "data": 1}

STORIES = {
    "a connection opens": Setting(again=1),
    "data": Setting(**OLD, data=1, replies=1),
    "both ends close": Setting(**OLD, fins=True, **ONE_WAY),
    "a reset, and the client's port is used again": Setting(**OLD, resets=1, opens=2, **ONE_WAY),
    "the same over two CPUs": Setting(**OLD, resets=1, opens=2),
    "a reset that nobody sent": Setting(**OLD, forged=1, data=1),
    "a quiet connection": Setting(**OLD, expiries=1, data=1),
    "a half open connection idles out": Setting(again=1, expiries=1, **ONE_WAY),
    "datagrams": Setting(udp=(0,), data=2),
    "datagrams of old": Setting(**OLD, **DATAGRAMS),
    "another client": Setting(conns=2, **OLD, resets=1, **ONE_WAY),
    "TCP and UDP between the same two": Setting(udp=(1,), conns=2, **OLD, data=1),
    "a port in TIME-WAIT": Setting(conns=2, ended_before=True),
    "a backend that UDP leaves": Setting(udp=(0, 1), conns=2, **OLD, data=1, leaves=1, **ONE_WAY),
    "rolled back": Setting(**OLD, resets=1, opens=2, backs=1, **ONE_WAY),
    "rolled back with datagrams": Setting(udp=(0,), data=2, backs=1),
    "an engine vanishes": Setting(**OLD, data=2, moves=1, **ONE_WAY),
    "an engine vanishes while a connection opens": Setting(data=1, moves=1, **ONE_WAY),
    "a process dies": Setting(**OLD, resets=1, deaths=1, opens=2, **ONE_WAY),
    "a process dies between datagrams": Setting(**OLD, **DATAGRAMS, deaths=1, **ONE_WAY),
    "handed over": Setting(**OLD, data=1, replies=1, hands=1, **ONE_WAY),
    "handed over, over two CPUs": Setting(**OLD, data=1, hands=1),
    "handed over while it closes": Setting(**OLD, fins=True, hands=1, **ONE_WAY),
    "handed over while it is reset, and opens again": Setting(**OLD, resets=1, opens=2, hands=1, **ONE_WAY),
    "handed over after a reset that nobody sent": Setting(**OLD, forged=1, data=1, hands=1, **ONE_WAY),
    "datagrams handed over": Setting(**OLD, udp=(0,), data=2, expiries=1, hands=1, **ONE_WAY),
    "handed over where a newer one fills the shard": Setting(conns=2, **OLD, hands=1, interrupts=1, room=1, **ONE_WAY),
    "handed over while a process dies": Setting(**OLD, data=1, hands=1, deaths=1, interrupts=1, **ONE_WAY),
    "handed over while an engine vanishes": Setting(**OLD, data=1, hands=1, moves=1, **ONE_WAY),
    "handed over from a backend that UDP leaves": Setting(**OLD, udp=(0,), data=1, hands=1, leaves=1, **ONE_WAY),
    "a copy is lost": Setting(**OLD, data=1, losses=1, **ONE_WAY),
}
LONG = {
    "opens and closes": Setting(again=1, fins=True, **ONE_WAY),
    "closes and opens again": Setting(**OLD, fins=True, opens=2, **ONE_WAY),
    "closes and opens again, with a death": Setting(**OLD, fins=True, opens=2, deaths=1, **ONE_WAY),
    "SYNs twice": Setting(**OLD, resets=1, opens=2, again=1),
    "quiet and reset": Setting(**OLD, resets=1, opens=2, expiries=1, data=1, **ONE_WAY),
    "two deaths": Setting(**OLD, resets=1, opens=2, deaths=2, **ONE_WAY),
    "a death and a roll-back": Setting(**OLD, resets=1, opens=2, deaths=1, backs=1, **ONE_WAY),
    "an engine vanishes, resets": Setting(**OLD, data=1, moves=1, resets=1, opens=2, **ONE_WAY),
    "datagrams, and a death": Setting(udp=(0,), data=3, deaths=1, **ONE_WAY),
    "many datagrams": Setting(udp=(0,), data=3, replies=1),
    "copies are lost": Setting(**OLD, losses=1, resets=1, opens=2),
    "handed over beside a newer one": Setting(conns=2, **OLD, resets=1, hands=1, **ONE_WAY),
    "handed over while it is claimed": Setting(**OLD, resets=1, opens=2, data=1, replies=1, hands=1, **ONE_WAY),
    "handed over while it is claimed, with a death": Setting(
        **OLD, resets=1, opens=2, hands=1, deaths=1, interrupts=1, **ONE_WAY
    ),
    "handed over, SYNs twice": Setting(**OLD, resets=1, opens=2, again=1, hands=1, **ONE_WAY),
    "handed over with resets, over two CPUs": Setting(**OLD, resets=1, opens=2, hands=1),
    "handed over while an engine vanishes, resets": Setting(
        **OLD, data=1, moves=1, resets=1, opens=2, hands=1, **ONE_WAY
    ),
    "handed over, and copies are lost": Setting(**OLD, data=1, resets=1, losses=1, hands=1, **ONE_WAY),
}


@pytest.mark.parametrize("story", STORIES)
def test_in_every_order_of_steps_each_packet_has_one_set(story):
    assert walk(STORIES[story]) > 50


@pytest.mark.soak
@pytest.mark.parametrize("story", LONG)
def test_in_every_order_of_many_steps_each_packet_has_one_set(story):
    assert walk(LONG[story]) > 1000


NEEDS = {
    "stays": ("a reset that nobody sent", "answers .* of a connection that it does not have"),
    "reads_entry": ("datagrams of old", "taken by both"),
    "asked": ("a reset, and the client's port is used again", "taken by none"),
    "revives_by_swap": ("datagrams of old", "taken by both"),
    "drained": ("datagrams of old", "taken by none"),
    "udp_leaves": ("a backend that UDP leaves", "both have port"),
    "ports_reserved": ("another client", "uses the port of"),
    "cursor": ("a port in TIME-WAIT", "keeps it in TIME-WAIT"),
    "parks_unknown": ("datagrams", "taken by none"),
    "every_marker": ("a connection opens", "taken by none"),
    "scan_spares": ("data", "answers .* of a connection that it does not have"),
    "fences_changes": ("rolled back", "its epoch was over"),
    "any_epoch": ("an engine vanishes", "parked for ever"),
    "ends_by_markers": ("a connection opens", "the list was unmapped"),
    "crash_rule": ("a process dies between datagrams", "it does not end"),
    "by_slot": ("data", "taken by none"),
    "sweeps_kept": ("both ends close", "it does not end"),
    "whole_key": ("TCP and UDP between the same two", "taken by none"),
    "asks_for_any": ("a half open connection idles out", "taken by both"),
    "publishes_once": ("a process dies between datagrams", "both have connection"),
    "waits_first": ("handed over where a newer one fills the shard", "has no room"),
    "room_first": ("handed over where a newer one fills the shard", "has no room"),
    "given_by_markers": ("handed over", "which has given all"),
    "copies_all": ("handed over", "answers .* of a connection that it does not have"),
    "leaves_claimed": ("handed over from a backend that UDP leaves", "takes the place of"),
    "handed_are_kept": ("handed over", "taken by both"),
    "takes_left": ("handed over while it is reset, and opens again", "taken by none"),
}
"""Rule -> a story that goes wrong without it, and how"""


@pytest.mark.parametrize("name", NEEDS)
def test_the_walk_finds_what_a_rule_is_for(name):
    story, how = NEEDS[name]
    without = {name: False}
    if name == "ports_reserved":
        without["cursor"] = False  # which else begins beyond those ports
    with pytest.raises(Wrong, match=how):
        walk(STORIES[story], replace(Rules(), **without))


def test_every_rule_has_a_story_that_needs_it():
    assert {f.name for f in fields(Rules)} == set(NEEDS)
    source = Path(mirror_engines.__file__).read_text()
    marks = {int(n) for n in re.findall(r'"""\[(\d+)\]', source)}
    assert marks == set(range(1, 18)) - {14, 17}, "see above"


PEACE = Setting(
    conns=5, udp=(3, 4), established=(0, 3), opens=3, again=2, data=4, replies=3, fins=True, resets=2, expiries=2,
    leaves=1, hands=1, ports=7,
)  # fmt: skip
FAULTS = PEACE._replace(again=0, deaths=2, moves=2, backs=1, losses=2, hands=2, interrupts=1)
FULL = FAULTS._replace(room=3)


class Sets(RuleBasedStateMachine):
    """Several connections, ports, both protocols and all faults in any order."""

    @initialize(setting=st.sampled_from([PEACE, FAULTS, FULL]))
    def start(self, setting):
        self.model = Mirror(setting)

    def some(self, number, *names):
        labels = [label for label in self.model.enabled() if label[0] in names]
        if labels:
            self.model.do(labels[number % len(labels)])

    numbers = st.integers(0, 1000)

    @rule(choices=st.lists(numbers, min_size=1, max_size=3))
    def packets_are_sent(self, choices):
        for number in choices:
            self.some(number, "send")

    @rule(choices=st.lists(numbers, min_size=1, max_size=8))
    def cores_work(self, choices):
        for number in choices:
            self.some(number, "take", "take parked", "go on", "adopt", "mark")

    @rule(number=numbers)
    def a_timer_runs_out(self, number):
        self.some(number, "expire", "sweep")

    @rule(number=numbers)
    def the_agent_goes_on(self, number):
        self.some(number, "switch", "publish", "release", "end", "unmap", "rolled", "mark")

    @rule(number=numbers)
    def what_is_left_is_handed_over(self, number):
        self.some(number, "wait", "hand", "hand back", "given", "copy", "release handed")

    @rule(number=numbers)
    def something_breaks(self, number):
        self.some(number, "die", "move", "lose", "leave", "interrupted")

    @rule(number=numbers)
    def the_agent_changes_its_mind(self, number):
        if number < 100:
            self.some(number, "back")

    @rule(number=numbers)
    def all_comes_to_rest(self, number):
        if number < 100:
            settle(self.model)

    def teardown(self):
        """All ends give up: what was mirrored ends."""
        if not hasattr(self, "model"):
            return
        model = self.model
        settle(model)
        check_openers(model)
        model.clients = tuple(c._replace(state="C") for c in model.clients)
        settle(model)
        assert model.unmapped
        assert not model.flows[0]
        assert model.newcomer_epoch == model.epoch


TestSets = Sets.TestCase
TestSets.settings = settings(max_examples=25, stateful_step_count=50, deadline=None)


@pytest.mark.soak
def test_many_random_orders():
    class Longer(Sets):
        pass

    case = Longer.TestCase
    case.settings = settings(max_examples=5000, stateful_step_count=120, deadline=None)
    case("runTest").runTest()


def at_the_deadline(room):
    """Two connections of old, one of new, after the deadline."""
    model = Mirror(Setting(conns=3, established=(0, 1), ports=3, hands=1, room=room, **ONE_WAY))
    settle(model)
    model.do(("send", "S", 2, 0))
    settle(model)
    model.do(("wait",))
    settle(model)
    return model


def test_at_the_deadline_the_newcomer_gets_all_connections_where_they_were():
    model = at_the_deadline(room=3)
    assert model.unmapped
    assert {c: (f.state, f.place) for c, f in model.flows[NEWCOMER].items()} == {0: ("E", 0), 1: ("E", 1), 2: ("E", 2)}


def test_without_room_for_all_each_connection_stays_where_it_is():
    model = at_the_deadline(room=2)
    assert (model.word, model.kept_on) == ("both", True)
    assert [set(flows) for flows in model.flows] == [{0, 1}, {2}]


def test_the_newcomer_takes_new_connections_while_the_keeper_has_old_ones():
    model = Mirror(Setting(conns=2, established=(0,), **ONE_WAY))
    settle(model)
    model.do(("send", "S", 1, 0))
    settle(model)
    assert model.flows[NEWCOMER][1].state == "E"
    assert set(model.flows[0]) == {0}
    assert model.flows[NEWCOMER][1].place != model.flows[0][0].place
