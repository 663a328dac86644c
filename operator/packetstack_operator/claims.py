"""Who has which address, and which MAC, where stacks share a cluster and its nodes. Pure."""

from collections.abc import Callable, Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_network

from packetstack_core.limits import MAX_SNAT_ADDRESSES
from packetstack_operator.observing import Block, Claim, Conflict, Holder, Raw


@lru_cache(maxsize=4096)
def _range(text: str) -> tuple[int, int, int] | None:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return None  # not an address: that stack is marked InvalidSpec
    first = int(network.network_address)
    return network.version, first, first + network.num_addresses - 1


def claims(raw: Raw) -> dict[Block, tuple[Claim, ...]]:
    """What a PacketStack or a FlowTable names, by block."""
    meta, spec = raw["metadata"], raw.get("spec") or {}
    since, idle = str(meta.get("creationTimestamp") or ""), not spec.get("owners")
    texts = {str(li.get("address")) for li in spec.get("listeners") or ()}
    texts |= {str(network) for network in (spec.get("snat") or {}).get("addresses") or ()}
    found: dict[Block, tuple[Claim, ...]] = {}
    for text in sorted(texts):
        if (place := _range(text)) is None:
            continue
        version, first, last = place
        claim = Claim(idle, since, meta["namespace"], meta["name"], version, first, last)
        for block in range(first >> 8, (min(last, first + MAX_SNAT_ADDRESSES) >> 8) + 1):
            found[version, block] = (*found.get((version, block), ()), claim)
    return found


def conflict(stack: Raw, table: Raw | None, known: Callable[[Block], Collection[Claim]]) -> Conflict | None:
    """The first address of the resource that another stack's claim comes before. `known`: all claims by block.

    An address belongs to the stack whose flow table brings packets to its engines; where there is none, to the oldest.
    """
    meta = stack["metadata"]
    running = claims(table) if table is not None else {}
    found = []
    for block, wanted in claims(stack).items():
        others = known(block)
        for claim in wanted:
            # Many stacks share a block, and hardly ever an address: this is all that most of them cost.
            near = [c for c in others if c.first <= claim.last and claim.first <= c.last]
            near = [c for c in near if (c.namespace, c.stack) != (meta["namespace"], meta["name"])]
            if not near:
                continue
            held = (c for c in running.get(block, ()) if not c.idle and c.first <= claim.first and claim.last <= c.last)
            mine = next(held, claim)
            found += [(not mine.idle, max(claim.first, c.first), c, claim.version) for c in near if c < mine]
    if not found:
        return None
    running_too, address, other, version = min(found)
    shown = str(IPv4Address(address) if version == 4 else IPv6Address(address))
    return Conflict(shown, f"{other.namespace}/{other.stack}", not running_too)


def holders(table: Raw) -> dict[tuple[str, str], tuple[Holder, ...]]:
    """Node and MAC -> the engines of a flow table that have it there; when their pods were made is not known here."""
    meta, spec = table["metadata"], table.get("spec", {})
    states = {e["id"]: e.get("state") for e in spec.get("engines") or ()}
    found: dict[tuple[str, str], tuple[Holder, ...]] = {}
    for report in table.get("status", {}).get("nodes") or ():
        if report["node"] != spec.get("node"):
            continue
        for engine in report.get("engines") or ():
            if mac := engine.get("mac"):
                number = engine["id"]
                starting = states.get(number) in ("Pending", "Starting")
                held = Holder(starting, "", meta["namespace"], meta["name"], number, engine["name"])
                found[report["node"], mac] = (*found.get((report["node"], mac), ()), held)
    return found
