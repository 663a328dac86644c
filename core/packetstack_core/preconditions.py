"""What packets of stacks need of their node: one list, which `up`, `preflight`, the agent's watch and the conditions read. Pure.

Something of this may be taken away at any time, by a person or by a program that takes care of networks. What the agent has
made itself it puts back, and tells. What belongs to the administrator of the node it tells, until it is as needed again.
"""

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from packetstack_core.reasons import ConditionReason, EventReason, Problem, Reason, fill
from packetstack_core.values import Address, Network

_LEAVE_OURS = "find out who does it: NetworkManager, systemd-networkd, tuned and clean-up scripts can be told to leave `ps*`, `pe*` and `pkst-*` alone"


class Precondition(StrEnum):
    """One thing that packets need; its value is what the table of docs/troubleshoot.md calls it."""

    kept: bool
    """The agent puts it back at once. Else it tells of it until it is as needed again."""
    meanwhile: str
    """What becomes of packets while it is taken away."""
    told: Reason
    """Of the event; for what the agent does not put back, of the condition too."""
    remedy: str

    def __new__(cls, name: str, kept: bool, meanwhile: str, told: Reason, remedy: str) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.kept, member.meanwhile, member.told, member.remedy = kept, meanwhile, told, remedy
        return member

    # fmt: off
    PAIR = (
        "the routed pair: `ps0` and `ps1` are there, up, called so, with an MTU of 1500 or more, ARP off on `ps0`, `forwarding` on for `ps0`", True,
        "packets that come by routes are lost. On an uplink they go on, unless `ps0` does not forward",
        EventReason.PATH_RESTORED, _LEAVE_OURS)
    PAIR_OFFLOADS = (
        "offloads of `ps0` and `ps1` are off (`tx`, `tso`, `gso`, `gro`)", True,
        "clients on the node itself get no answers",
        EventReason.PATH_RESTORED, _LEAVE_OURS)
    DIRECTOR = (
        "the director runs on `ps1` and on the uplinks, and its helpers on `ps0`", True,
        "on `ps1`: packets that come by routes are lost. On an uplink: they come by the routed pair, a little slower",
        EventReason.DIRECTOR_ATTACHED, _LEAVE_OURS)
    ROUTES = (
        "virtual and SNAT addresses are routed to `ps0`, and ARP and neighbour discovery are answered for those in a network of the node", True,
        "packets come by uplinks alone", EventReason.ROUTES_RESTORED, _LEAVE_OURS)
    HOST_END = (
        "the node's end of each engine's interface, `pe<slot>`: up, called so, nobody's port, its MTU and MAC as they were made, offloads off", True,
        "packets of the engine's buckets are lost while it is down; with offloads their order may be", EventReason.PATH_RESTORED, _LEAVE_OURS)
    HOST_PROGRAM = (
        "the program on that end (`clsact`, `tc filter`)", True,
        "packets still find a way through the kernel, but no handover ends: buckets that move wait", EventReason.PATH_RESTORED, _LEAVE_OURS)
    ENGINE_END = (
        "the engine's interface in its own namespace, or in its pod: up, its MTU and MAC as they were made, offloads off, its XDP program on it", True,
        "packets of the engine's buckets are lost", EventReason.PATH_RESTORED, _LEAVE_OURS)
    ENGINE_LINK = (
        "both ends are there", True,
        "packets of the engine's buckets are lost; it is made again with its buckets and flows", EventReason.ENGINE_LOST, "find out who removed it")
    NAMESPACE = (
        "the name of each engine's network namespace, `/run/netns/pkst-*`", True,
        "nothing, as long as the engine's processes live", EventReason.PATH_RESTORED,
        "find out who does it: `ip -all netns delete` in a clean-up script")
    UPLINK = (
        "interfaces of `--uplink`. One that gets another name is followed", False,
        "of one that is gone: they come by the routed pair, if by any way", EventReason.UPLINK_FAILED,
        "`packetstack up FILE --uplink` with the interface that leads there now")
    FORWARDING = (
        "`net.ipv4.ip_forward` is 1, and for IPv6 `net.ipv6.conf.all.forwarding`", False,
        "no packet of that family passes", ConditionReason.FORWARDING_OFF,
        "`sysctl -w` as in the message, and the same in `/etc/sysctl.d`")
    DEVICE_FORWARDING = (
        "`net.ipv4.conf.<interface>.forwarding` is 1 where routes lead out, or where addresses of stacks are, except on uplinks", False,
        "IPv4 packets that come by that interface are lost", ConditionReason.FORWARDING_OFF,
        "`sysctl -w` as in the message; or make the interface an uplink")
    ADDRESSES = (
        "no virtual or SNAT address is an address of the node's own, on any interface (`lo` too: keepalived, kube-vip)", False,
        "the node takes packets to that address itself: connections are reset", ConditionReason.ADDRESS_TAKEN,
        "take it off the interface, as in the message")
    HOST_ADDRESSES = (
        "none is the network or the broadcast address of one of the node's networks", False,
        "what is sent to that address never comes back to an engine", ConditionReason.ADDRESS_TAKEN,
        "leave the address out of the resource")
    FIREWALL = (
        "the node's packet filter lets packets of stacks pass", True,
        "packets that come by routes are lost", EventReason.FIREWALL_RESTORED,
        "see the condition `FirewallOpen`")
    KERNEL = (
        "the kernel is not PREEMPT_RT (`/sys/kernel/realtime`)", False,
        "the agent does not start: handovers would mix up their order", EventReason.FAILED, "use another kernel")
    # fmt: on


@dataclass(frozen=True, slots=True)
class Lack:
    """A precondition that does not hold now."""

    what: Precondition
    about: str
    """What does not have it: `net.ipv4.ip_forward`, `address 192.0.2.10`, `engine 3`."""
    problem: str
    """What is wrong with it, what that means for packets, and what to do."""
    lost: bool
    """Packets of the stack are lost for it."""

    @property
    def message(self) -> str:
        """One line that says all."""
        return f"{self.about}: {self.problem}"

    @property
    def reason(self) -> ConditionReason:
        """Of the condition."""
        told = self.what.told
        return told if isinstance(told, ConditionReason) else ConditionReason.PATH_BROKEN


def problem(lacks: Iterable[Lack], *, lost: bool) -> Problem | None:
    """Reason and message of the condition that tells of those that lose packets, or of the others; None if there are none."""
    found = [lack for lack in lacks if lack.lost is lost]
    if not found:
        return None
    reason = found[0].reason
    return reason, "; ".join(lack.message for lack in found if lack.reason is reason)


# ---- devices that the agent has made ---------------------------------------------------------------------------

Part = Literal["up", "arp", "name", "mtu", "mac", "master", "offloads"]


@dataclass(frozen=True, slots=True)
class Device:
    """A network device, as far as packets depend on it."""

    name: str
    up: bool
    arp: bool
    mtu: int
    mac: bytes
    master: int = 0
    """Index of the bridge or bond whose port it is; 0: nobody's."""
    offloads: frozenset[str] = frozenset()
    """Those of `tx`, `tso`, `gso`, `gro` that are on."""


MEANWHILE: dict[Part, str] = {
    "up": "packets of its buckets were lost meanwhile",
    "mtu": "large packets of its buckets were lost meanwhile",
    "offloads": "meanwhile packets may have been lost, or have changed their order",
    "arp": "packets went on",
    "mac": "packets went on",
    "master": "packets went on",
    "name": "packets went on",
}
"""What became of packets while that part of an engine's interface was not as it was made; the worst first."""


def differences(seen: Device, made: Device) -> dict[Part, str]:
    """What was changed on a device of ours, and how one says it. An MTU that is larger than it was does no harm."""
    found: dict[Part, str] = {}
    if seen.master != made.master:
        found["master"] = "was made a port of another interface"
    if seen.name != made.name:
        found["name"] = f"was called {seen.name}"
    if seen.mac != made.mac:
        found["mac"] = f"had the MAC {seen.mac.hex(':')}"
    if seen.mtu < made.mtu:
        found["mtu"] = f"had an MTU of {seen.mtu}"
    if seen.offloads - made.offloads:
        found["offloads"] = f"had {', '.join(sorted(seen.offloads - made.offloads))} on"
    if seen.arp and not made.arp:
        found["arp"] = "had ARP on"
    if made.up and not seen.up:
        found["up"] = "was down"
    return found


# ---- what belongs to the administrator -------------------------------------------------------------------------

FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
"""The sysctl that lets the kernel forward packets, by IP version."""


@dataclass(frozen=True, slots=True)
class Own:
    """An address of the node's own, in the network that it shares with others there."""

    address: Address
    network: Network
    device: str
    broadcast: Address | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What of the node belongs to its administrator, as far as packets depend on it."""

    forwards: Mapping[int, bool]
    """By IP version; one that is missing is not known."""
    own: Collection[Own]
    deaf: Collection[str]
    """Interfaces that do not forward IPv4, though the node does, by which packets may come: routes lead out there, or an
    address of a stack is in a network of theirs. Without uplinks."""


def lacking(around: Surroundings, stack: Iterable[Network]) -> list[Lack]:
    """What a stack with these virtual and SNAT addresses has not: what is the administrator's to change."""
    prefixes = sorted(stack, key=str)
    versions = sorted({prefix.version for prefix in prefixes})
    found = [off for version in versions if (off := forwarding(version, around.forwards.get(version, True)))]
    if 4 in versions and not any(lack.about == FORWARDING[4] for lack in found):
        found += map(_deaf, around.deaf)
    for own in around.own:
        found += _taken(own, prefixes)
    return found


def forwarding(version: int, on: bool) -> Lack | None:
    """What is wrong when the node does not forward packets of this version."""
    if on:
        return None
    name = FORWARDING[version]
    said = f"is 0, so this node forwards no packets, and none of IPv{version} reach a stack; set it with: sysctl -w {name}=1"
    return Lack(Precondition.FORWARDING, name, said, lost=True)


def _deaf(device: str) -> Lack:
    name = f"net.ipv4.conf.{device}.forwarding"
    said = f"is 0, so IPv4 packets of stacks that come by {device} are lost; set it with: sysctl -w {name}=1"
    return Lack(Precondition.DEVICE_FORWARDING, name, said, lost=True)


def _taken(own: Own, prefixes: Iterable[Network]) -> Iterable[Lack]:
    address, device = own.address, own.device
    unusable = unusable_addresses(own)
    for prefix in prefixes:
        if prefix.version != address.version:
            continue
        if address in prefix:
            said = (
                f"is in use by this node on {device}, which takes packets to it; a stack's addresses must be nobody's own: "
                f"use another, or: ip address del {address}/{own.network.prefixlen} dev {device}"
            )
            yield Lack(Precondition.ADDRESSES, f"address {address}", said, lost=True)
        for other, kind in unusable.items():
            if other in prefix and other != address:
                said = (
                    f"is the {kind} address of {own.network} on {device}, which no host can have: packets to it are lost; "
                    f"{'leave it out' if prefix.num_addresses > 1 else 'use another'}"
                )
                yield Lack(Precondition.HOST_ADDRESSES, f"address {other}", said, lost=True)


def unusable_addresses(own: Own) -> dict[Address, str]:
    """Addresses of the network that mean more than one host, and what they are called."""
    network, found = own.network, dict[Address, str]()
    if network.version == 4 and network.prefixlen < 31:
        found = {network.network_address: "network", network.broadcast_address: "broadcast"}
    elif network.version == 6 and network.prefixlen < 127:
        found = {network.network_address: "anycast (RFC 4291, all routers)"}
    if own.broadcast is not None:
        found[own.broadcast] = "broadcast"
    return found


# ---- table of docs/troubleshoot.md -----------------------------------------------------------------------------


def table() -> str:
    """All of them, in Markdown."""
    lines = ["| what packets need | meanwhile | what is seen | what to do |", "|---|---|---|---|"]
    for it in Precondition:
        lines.append(f"| {it} | {it.meanwhile} | {_seen(it)} | {it.remedy} |")
    return "\n".join(lines)


def _seen(it: Precondition) -> str:
    if it is Precondition.KERNEL:
        return "`preflight`, `packetstack up` and the agent say so"
    if it.kept:
        return (
            f"it is put back at once: event `{it.told}`. If it cannot be: `Available` and `Degraded` say `PathBroken`"
        )
    if isinstance(it.told, EventReason):
        return f"event `{it.told}`"
    refused = ", and `up` refuses the stack" if it is not Precondition.DEVICE_FORWARDING else ""
    return f"event and conditions `Available` (false), `Degraded`: `{it.told}`, until it is as needed: event `PathOpen`{refused}"


MODULE = "packetstack_core.preconditions"


def filled(document: str) -> str:
    """The document with the present table between its markers. LookupError if it has not got it once."""
    return fill(document, {"preconditions": table()}, MODULE)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(filled(path.read_text()))
