"""T20: a listener is flooded from a million sources, at half and at twice what an engine can; who is served meanwhile."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rows import Row, Unavailable, yes

if TYPE_CHECKING:
    from tests.lab.flooded import Attack, Established

    from packetstack_cli.lab import Lab

ROOT = Path(__file__).resolve().parents[1]
FACTORS = (0.5, 2.0)
CONNTRACK = "nftables, conntrack"


def floods(quick: bool) -> Iterator[Row]:
    """The engine is of the test build: its packets take a set time, so that twice as many as it can handle can be sent."""
    sys.path.insert(0, str(ROOT))  # the engines are those of the tests
    from tests.lab.costly import DATAPATH
    from tests.lab.flooded import ASSURED_SECONDS, COST_NS, FLOOD, KINDS, established, flooded, translated

    for needed in (DATAPATH, FLOOD):
        if not needed.exists():
            raise Unavailable(f"{needed}: not built; run make build")
    kinds = ("syn", "udp", "ack") if quick else KINDS
    seconds = 2.0 if quick else 4.0
    found: dict[tuple[float, str], Attack] = {}
    peer: dict[tuple[float, str], Attack] = {}
    ends: dict[float, tuple[int, int, int]] = {}
    peer_ends: dict[float, tuple[int, int, int]] = {}
    with flooded("pkb-floods") as stack:
        before = stack.arena_bytes()
        capacity = {kind: stack.capacity(kind, seconds=0.7 if quick else 1.5) for kind in kinds}
        for factor in FACTORS:
            flows = established(stack.lab)
            time.sleep(ASSURED_SECONDS)
            found |= _attacks(stack.lab, factor, capacity, seconds, flows)
            ends[factor] = _end(flows)
        gaps = stack.unaccounted()
        after, entries, events = stack.arena_bytes(), stack.status()["flows"], [e["reason"] for e in stack.events()]
    with translated("pkb-floods") as lab:
        for factor in FACTORS:
            flows = established(lab)
            peer |= _attacks(lab, factor, capacity, seconds, flows)
            peer_ends[factor] = _end(flows)
        tracked = int(lab.run("node", "cat", "/proc/sys/net/netfilter/nf_conntrack_count").stdout)

    engine = f"an engine of {1e9 / COST_NS:,.0f} packets/s (set by the test build)"
    for factor in FACTORS:
        for kind in kinds:
            what = f"{kind} flood, {found[factor, kind].rate:,.0f}/s, {factor:g}x of {engine}"
            yield from _rows(what, found[factor, kind], peer[factor, kind], factor)
        broken, lost, sent = ends[factor]
        what = f"{factor:g}x, all {len(kinds)} kinds one after the other, established"
        yield Row("T20", f"{what}, broken", broken, "", CONNTRACK, peer_ends[factor][0], goal="0", met=yes(broken == 0))
        exact = factor < 1
        yield Row("T20", f"{what}, datagrams lost of {sent:,}", lost, "", CONNTRACK, peer_ends[factor][1],
                  goal="0" if exact else "", met=yes(lost == 0) if exact else "")  # fmt: skip
    missing = sum(abs(n) for n in gaps.values())
    yield Row(
        "T20", "packets without a counter that says what became of them", missing, "", goal="0", met=yes(not missing)
    )
    yield Row("T20", "flow entries after all floods", entries, "", CONNTRACK, tracked)
    yield Row("T20", "memory of flows after all floods", round(after / 2**20, 1), "MB", goal="as before the first packet",
              met=yes(after == before > 0))  # fmt: skip
    told = events.count("FloodShed")
    yield Row("T20", "floods that an event told of", told, "", goal=">= 1", met=yes(told >= 1))


def _attacks(
    lab: "Lab", factor: float, capacity: dict[str, float], seconds: float, flows: "list[Established]"
) -> "dict[tuple[float, str], Attack]":
    from tests.lab.flooded import attack

    return {(factor, k): attack(lab, k, factor * most, seconds, flows) for k, most in capacity.items()}


def _end(flows: "list[Established]") -> tuple[int, int, int]:
    """Broken, datagrams lost, datagrams sent."""
    outcomes = [one.stop() for one in flows]
    return (
        sum(o.broken for o in outcomes),
        sum(o.datagrams_lost for o in outcomes),
        sum(o.datagrams_sent for o in outcomes),
    )


def _rows(what: str, one: "Attack", peer: "Attack", factor: float) -> Iterator[Row]:
    share, beside = one.served(one.other), peer.served(peer.other)
    least = 100.0 if factor < 1 else 99.0
    yield Row("T20", f"{what}: openers of other listeners served", round(share, 1), "%", CONNTRACK, round(beside, 1),
              round(share / beside, 3) if beside else "", f">= {least:g}", yes(share >= least))  # fmt: skip
    share, beside = one.served(one.flooded), peer.served(peer.flooded)
    goal, met = (">= 100", yes(share >= 100)) if factor < 1 else ("", "")
    yield Row("T20", f"{what}: openers of the flooded one served", round(share, 1), "%", CONNTRACK, round(beside, 1),
              round(share / beside, 3) if beside else "", goal, met)  # fmt: skip
    yield Row("T20", f"{what}: datagrams of established flows lost", one.lost, "", CONNTRACK, peer.lost)
