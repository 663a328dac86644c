"""Where packets end in chains of others, and where an accept of ours goes."""

import struct

import pytest

from packetstack_core.firewalls import (
    COMMENT,
    ESTABLISHED,
    FORWARD,
    INVALID,
    NEW,
    RELATED,
    UNTRACKED,
    Chain,
    Change,
    Expression,
    Packet,
    Rule,
    arrange,
    distinct,
    first_drop,
    packets,
)

IN, OUT = Packet("eth0", "ps0", UNTRACKED), Packet("ps0", "", UNTRACKED)


def rule(handle: int, *expressions: Expression, comment: str = "") -> Rule:
    return Rule(handle, expressions, comment)


def verdict(name: str, chain: str = "") -> Expression:
    return Expression("immediate", text=name, chain=chain)


def device(name: str, *, out: bool = False, negated: bool = False) -> tuple[Expression, Expression]:
    load = Expression("meta", key=7 if out else 6, register=1)
    return load, Expression("cmp", key=int(negated), register=1, data=name.encode() + b"\0")


def state(bits: int) -> tuple[Expression, ...]:
    mask, zero = struct.pack("=I", bits), bytes(4)
    load = Expression("ct", key=0, register=1)
    return load, Expression("bitwise", register=1, data=mask), Expression("cmp", key=1, register=1, data=zero)


def conntrack(bits: int, inverted: int = 0) -> Expression:
    """The match of iptables, struct xt_conntrack_mtinfo3."""
    info = bytearray(164)
    struct.pack_into("=HHH", info, 146, 1, inverted, bits)
    return Expression("match", text="conntrack", data=bytes(info))


OTHERS = {"KUBE-FORWARD": (rule(50, conntrack(INVALID), verdict("drop")),), "REJECTS": (rule(60, verdict("reject")),)}
UNKNOWN = Expression("limit")
OURS = (
    rule(90, *device("ps0", out=True), verdict("accept"), comment=COMMENT),
    rule(91, *device("ps0"), verdict("accept"), comment=COMMENT),
)


def chain(*rules: Rule, policy: str = "accept") -> Chain:
    return Chain("ip", "filter", "FORWARD", FORWARD, policy, rules)


def ends(base: Chain, packet: Packet) -> tuple[int, bool] | None:
    """Index and sureness."""
    drop = first_drop(base, packet, lambda _, name: OTHERS.get(name, ()))
    return (drop.index, drop.sure) if drop is not None else None


def tracked(bits: int) -> Packet:
    return Packet("eth0", "ps0", bits)


@pytest.mark.parametrize("packet", [IN, OUT])
def test_a_policy_of_drop_ends_what_no_rule_accepts(packet: Packet) -> None:
    established = rule(1, *state(ESTABLISHED | RELATED), verdict("accept"))
    assert ends(chain(established, policy="drop"), packet) == (1, True)
    assert ends(chain(established), packet) is None
    assert ends(chain(rule(1, verdict("accept")), policy="drop"), packet) is None


def test_rules_for_invalid_packets_end_those_that_are_tracked() -> None:
    for one in (rule(1, *state(INVALID), verdict("drop")), rule(1, conntrack(INVALID), verdict("drop"))):
        assert ends(chain(one), tracked(INVALID)) == (0, True)
        assert ends(chain(one), tracked(NEW)) is None
        assert ends(chain(one), IN) is None
    # "everything but established", in the words of iptables
    rest = rule(1, conntrack(ESTABLISHED | RELATED, inverted=1), verdict("drop"))
    assert ends(chain(rest), tracked(INVALID)) == (0, True)
    assert ends(chain(rest), IN) == (0, True)


def test_a_map_of_states_is_followed() -> None:
    bits = {INVALID: "drop", ESTABLISHED: "accept"}
    verdicts = tuple((struct.pack("=I", bit), name, "") for bit, name in bits.items())
    base = chain(rule(1, Expression("ct", key=0, register=1), Expression("vmap", verdicts=verdicts)))
    assert ends(base, tracked(INVALID)) == (0, True)
    assert ends(base, IN) is None


def test_jumps_are_followed_and_the_rule_that_drops_is_named() -> None:
    base = chain(
        rule(1, verdict("jump", "KUBE-FORWARD")), rule(2, verdict("goto", "REJECTS")), rule(3, verdict("accept"))
    )
    invalid = first_drop(base, tracked(INVALID), lambda _, name: OTHERS[name])
    assert invalid is not None
    assert invalid.index == 0
    assert (
        "a rule in chain KUBE-FORWARD of table ip filter drops packets of connections in state INVALID" in invalid.what
    )
    assert ends(base, IN) == (1, True)


def test_a_jump_of_some_packets_decides_for_no_other() -> None:
    base = chain(rule(1, UNKNOWN, verdict("jump", "REJECTS")))
    assert ends(base, IN) is None
    assert ends(chain(rule(1, *device("eth1"), verdict("jump", "REJECTS"))), IN) is None
    assert ends(chain(rule(1, *device("eth0"), verdict("jump", "REJECTS"))), IN) == (0, True)


def test_chains_that_lead_to_each_other_end() -> None:
    round_ = {"A": (rule(1, verdict("jump", "A")), rule(2, verdict("jump", "A")))}
    drop = first_drop(chain(rule(3, verdict("jump", "A")), policy="drop"), IN, lambda _, name: round_[name])
    assert drop is None or not drop.sure


def test_what_may_have_been_accepted_before_makes_a_drop_unsure() -> None:
    assert ends(chain(rule(1, UNKNOWN, verdict("accept")), policy="drop"), IN) == (1, False)
    assert ends(chain(rule(1, *device("eth1"), verdict("accept")), policy="drop"), IN) == (1, True)
    assert ends(chain(rule(1, *device("eth0"), verdict("accept")), policy="drop"), IN) is None
    assert ends(chain(rule(1, *device("eth1", negated=True), verdict("accept")), policy="drop"), IN) is None


def test_a_rule_that_drops_some_is_somebodys_will() -> None:
    assert ends(chain(rule(1, Expression("payload"), UNKNOWN, verdict("drop"))), IN) is None


def test_a_chain_that_some_packets_leave_again_drops_not_all() -> None:
    policy = {"POLICY": (rule(70, UNKNOWN, verdict("return")), rule(71, verdict("drop")))}
    base = chain(rule(1, verdict("jump", "POLICY")), policy="drop")
    drop = first_drop(base, IN, lambda _, name: policy[name])
    assert drop is not None
    assert drop.rule is None, "what came back meets the policy"
    assert first_drop(chain(rule(1, verdict("jump", "POLICY"))), IN, lambda _, name: policy[name]) is None


def test_rules_for_icmp_alone_decide_nothing() -> None:
    load = Expression("meta", key=16, register=1)
    icmp = Expression("cmp", register=1, data=b"\x01")
    assert ends(chain(rule(1, load, icmp, verdict("accept")), policy="drop"), IN) == (1, True)
    either = Expression("lookup", register=1, verdicts=((b"\x01", "", ""), (b"\x3a", "", "")))
    assert ends(chain(rule(1, load, either, verdict("accept")), policy="drop"), IN) == (1, True)
    tcp = Expression("cmp", register=1, data=b"\x06")
    assert ends(chain(rule(1, load, tcp, verdict("accept")), policy="drop"), IN) == (1, False)


def arranged(*rules: Rule, policy: str = "accept") -> Change | None:
    base = chain(*rules, policy=policy)
    found = [first_drop(base, p, lambda _, name: OTHERS.get(name, ())) for p in packets("ps0", "", tracked=False)]
    drop = min((d for d in found if d), key=lambda d: d.index, default=None)
    return arrange(base, drop, len(OURS))


def names(*of: str) -> tuple[tuple[bytes, str, str], ...]:
    return tuple((name.encode().ljust(16, b"\0"), "", "") for name in of)


@pytest.mark.parametrize("out", [False, True], ids=["iifname", "oifname"])
def test_sets_of_interfaces_are_looked_into(out: bool) -> None:
    load = Expression("meta", key=7 if out else 6, register=1)
    name = "ps0" if out else "eth0"
    for among, negated, drops in ((True, 0, True), (True, 1, False), (False, 0, False), (False, 1, True)):
        there = names("lan0", name) if among else names("lan0", "lan1")
        looked = Expression("lookup", key=negated, register=1, verdicts=there)
        assert ends(chain(rule(1, load, looked, verdict("drop"))), IN) == ((0, True) if drops else None)
    # What is in the set is not known, or which interface: some packets may end.
    unread = Expression("lookup", key=1, register=1)
    assert ends(chain(rule(1, load, unread, verdict("drop"))), IN) is None
    anywhere = Packet("", "", UNTRACKED)
    looked = Expression("lookup", key=1, register=1, verdicts=names("lan0"))
    assert ends(chain(rule(1, load, looked, verdict("drop"))), anywhere) is None


def test_a_map_of_interfaces_is_followed() -> None:
    to = tuple((key, "jump", "REJECTS") for key, _, _ in names("eth0"))
    zones = Expression("lookup", register=1, to_verdict=True, verdicts=to)
    base = chain(rule(1, Expression("meta", key=6, register=1), zones))
    assert ends(base, IN) == (0, True)
    assert ends(base, OUT) is None
    unread = Expression("lookup", register=1, to_verdict=True)
    assert ends(chain(rule(1, Expression("meta", key=6, register=1), unread), policy="drop"), IN) == (1, False)


def test_rules_for_one_family_end_packets_of_it_alone() -> None:
    for data, family in ((b"\x02", 4), (b"\x0a", 6)):
        one = rule(1, Expression("meta", key=15, register=1), Expression("cmp", register=1, data=data), verdict("drop"))
        base = Chain("inet", "filter", "forward", FORWARD, "accept", (one,))
        for packet in (4, 6):
            assert ends(base, Packet("eth0", "ps0", UNTRACKED, packet)) == ((0, True) if packet == family else None)
        assert ends(base, IN) is None


def test_what_ends_packets_although_ours_is_there_is_found() -> None:
    base = chain(rule(1, *device("eth0"), verdict("drop")), *OURS, policy="drop")
    for packet, index in ((IN, 0), (Packet("eth1", "ps0", UNTRACKED), None), (OUT, None)):
        drop = first_drop(base, packet, lambda _, name: (), ours=True)
        assert (drop.index if drop else None) == index


def test_ours_stand_right_before_what_ends_everything() -> None:
    some, rest = rule(1, UNKNOWN, verdict("drop")), rule(2, verdict("reject"))
    assert arranged(some, rest) == Change(insert=True, before=2)
    assert arranged(some, policy="drop") == Change(insert=True, before=None)
    assert arranged(some) is None
    assert arranged(some, *OURS, rest) is None
    assert arranged(some, *OURS, policy="drop") is None


def test_ours_are_moved_when_others_came_before_or_behind() -> None:
    some, rest = rule(1, UNKNOWN, verdict("drop")), rule(2, verdict("reject"))
    assert arranged(*OURS, some, rest) == Change(remove=(90, 91), insert=True, before=2)
    assert arranged(rest, *OURS) == Change(remove=(90, 91), insert=True, before=2)
    assert arranged(OURS[0], rest) == Change(remove=(90,), insert=True, before=2)


def test_ours_go_when_nothing_ends_everything_any_more() -> None:
    assert arranged(*OURS) == Change(remove=(90, 91))
    assert arranged(*OURS, rule(1, UNKNOWN, verdict("drop"))) == Change(remove=(90, 91))


def test_one_place_is_told_once() -> None:
    base = chain(policy="drop")
    found = [first_drop(base, p, lambda *_: ()) for p in packets("ps0", "eth0", tracked=True)]
    assert len([d for d in found if d]) == 4
    assert len(distinct(d for d in found if d)) == 1
