"""The node's side of the network: routed pair, engines' veth pairs, routes.

All functions block and talk netlink; call them from a worker thread, never from the event loop. Each may be
repeated: what is there already stays as it is.
"""

import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from packetstack_agent import devices
from packetstack_agent.errors import AgentError
from packetstack_agent.namespaces import run_in
from packetstack_agent.natives import call, ffi, lib
from packetstack_core.preconditions import Device, Part, differences
from packetstack_core.values import Network

ROUTED, DIRECTOR = "ps0", "ps1"
"""The pair that virtual and SNAT addresses are routed into, and the end the director runs on."""

ROUTE_PROTOCOL = 0x70
"""Marks our routes, as `proto 112` in `ip route`."""

ROLES = {"": 3, "clients": 1, "backends": 2}
"""Who may send on an uplink -> its ps_uplink_flags. None named: both."""

PAIR_MTU = 1500
_RTN_LOCAL = 2
_ETHERTYPE_VLAN = 0x8100
_IFF_UP = 1
_EEXIST = 17


@dataclass(frozen=True)
class Pair:
    """The routed pair: interface indexes of both ends, MAC of the routed end."""

    routed: int
    routed_mac: bytes
    director: int


@dataclass(frozen=True)
class Uplink:
    """What frames for this node look like on an interface: its index, its MAC, the VLANs in which the node is there."""

    index: int
    mac: bytes
    vlans: frozenset[int] = frozenset()


@dataclass(frozen=True)
class EngineLink:
    """An engine's veth pair: index and MAC of the host end, index of the other end in its namespace."""

    ifindex: int
    host_mac: bytes
    peer: int


def _mac(link: Any) -> bytes:
    return bytes.fromhex(link.get("IFLA_ADDRESS").replace(":", ""))


def _find(ip: IPRoute, name: str) -> Any:
    found = ip.link_lookup(ifname=name)
    return ip.get_links(found[0])[0] if found else None


def index_of(name: str) -> int:
    """Index of an interface of this namespace; AgentError if there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        names = ", ".join(n for _, n in socket.if_nameindex() if not n.startswith(("pe", "ps")))
        raise AgentError(f"interface {name}: not found; this node has {names}") from None


def uplink_role(uplink: str) -> tuple[str, str]:
    """Interface or network of an `--uplink`, and its role; AgentError for a role that there is not."""
    place, colon, role = uplink.rpartition(":")
    if not colon or "/" in role:  # no role, but perhaps an IPv6 prefix
        return uplink, ""
    if not role or role not in ROLES:
        right = " or ".join(f"{place}:{known}" for known in ROLES if known)
        raise AgentError(f"uplink {uplink}: {role or 'nothing'} is no role; use {right}, or {place} for both")
    return place, role


def uplink_text(name: str, role: str) -> str:
    """What `uplink_role` reads."""
    return f"{name}:{role}" if role else name


def uplinks(names: Iterable[str]) -> dict[str, Uplink]:
    """Those of the interfaces that are there, by name; AgentError for one that has no MAC."""
    wanted = set(names)
    if not wanted:
        return {}
    with IPRoute() as ip:
        links = ip.get_links()
    found = {}
    for link in links:
        name = link.get("IFLA_IFNAME")
        if name not in wanted:
            continue
        mac = bytes.fromhex((link.get("IFLA_ADDRESS") or "").replace(":", ""))
        if len(mac) != 6:
            raise AgentError(f"interface {name}: is no Ethernet device; leave it out of --uplink")
        found[name] = Uplink(link["index"], mac, _vlans(links, link["index"]))
    return found


def direct_uplinks(director: Any, roles: Mapping[str, str]) -> dict[str, int]:
    """Tell the director what frames are for this node, and whose, on each uplink: name -> role. -> name -> index."""
    there = uplinks(roles)
    entries = ffi.new("struct ps_uplink[]", len(there) + 1)
    for entry, (name, uplink) in zip(entries, there.items(), strict=False):
        entry.ifindex, entry.flags = uplink.index, ROLES[roles[name]]
        entry.mac_high = int.from_bytes(uplink.mac[:4], sys.byteorder)
        entry.mac_low = int.from_bytes(uplink.mac[4:], sys.byteorder)
        for vlan in uplink.vlans:
            entry.vlans[vlan // 64] |= 1 << vlan % 64
    call(lib().ps_director_uplinks, director, entries, len(there))
    return {name: uplink.index for name, uplink in there.items()}


def _vlans(links: Iterable[Any], index: int) -> frozenset[int]:
    """The VLANs (802.1Q) that are devices of this node, up and nobody's ports, on the interface."""
    found = set()
    for link in links:
        info = link.get("IFLA_LINKINFO")
        if info is None or info.get("IFLA_INFO_KIND") != "vlan" or link.get("IFLA_LINK") != index:
            continue
        if link.get("IFLA_LINK_NETNSID") is not None or link.get("IFLA_MASTER") or not link["flags"] & _IFF_UP:
            continue
        data = info.get("IFLA_INFO_DATA")
        if data is not None and data.get("IFLA_VLAN_PROTOCOL", _ETHERTYPE_VLAN) == _ETHERTYPE_VLAN:
            found.add(int(data.get("IFLA_VLAN_ID")))
    return frozenset(found)


def with_address_in(network: Network) -> str:
    """Name of the interface that has an address in this network; AgentError if none has."""
    with IPRoute() as ip:
        for message in ip.get_addr():
            address = ip_address(message.get("IFA_ADDRESS").partition("%")[0])
            if address.version == network.version and address in network:
                return socket.if_indextoname(message["index"])
    raise AgentError(f"network {network}: no interface of this node has an address in it; name the interface instead")


def name_of(index: int) -> str:
    """Name of the interface with this index; empty if this namespace has none."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


def is_there(index: int) -> bool:
    """Whether this namespace has an interface with this index."""
    return bool(name_of(index))


def engine_device(slot: int) -> str:
    """Name of the host end of an engine's veth pair."""
    return f"pe{slot}"


# ---- the routed pair --------------------------------------------------------------------------------------------


def ensure_pair(owner: str, known: int = 0) -> tuple[Pair, list[str]]:
    """Make ps0 and ps1 if they are missing, and put back what was changed on them; returns a line for each of that.

    `owner` marks them as ours (kept as the interface's alias). `known`: index of ps0 by which it is found if it is called
    otherwise now.
    """
    with IPRoute() as ip, devices.control() as control:
        link, done = _find_routed(ip, owner, known), []
        if link is not None and link.get("IFLA_LINK_NETNSID") is not None:
            ip.link("del", index=link["index"])  # the other end is in another namespace: it goes with it
            link = None
        fresh = link is None
        if link is None:
            ip.link("add", ifname=ROUTED, kind="veth", peer={"ifname": DIRECTOR})
            link = _find(ip, ROUTED)
            ip.link("set", index=link["index"], ifalias=owner)
        peer = ip.get_links(link.get("IFLA_LINK"))[0]
        for device, name in ((peer, DIRECTOR), (link, ROUTED)):
            changed = _keep_end(ip, control, device, name)
            if changed and not fresh:
                done.append(f"{name} {', '.join(changed.values())}, and is as it was made again; {_harm(changed)}")
        if link.get("IFLA_QDISC") != "pfifo":
            with suppress(NetlinkError):
                # A full veth ring pushes back on a queueing discipline instead of dropping (Linux 6.16 and newer).
                ip.tc("replace", "pfifo", index=link["index"], limit=4096)
        done += _keep_sysctls()
        return Pair(link["index"], _mac(link), peer["index"]), [] if fresh else done


def _find_routed(ip: IPRoute, owner: str, known: int) -> Any:
    link = _find(ip, ROUTED)
    if link is None and known:
        with suppress(NetlinkError):
            renamed = ip.get_links(known)[0]
            return renamed if renamed.get("IFLA_IFALIAS") == owner else None
    if link is not None and link.get("IFLA_IFALIAS") != owner:
        whose = link.get("IFLA_IFALIAS") or "somebody else"
        raise AgentError(
            f"interface {ROUTED}: exists already and belongs to {whose}; one agent a node, so bring that one down first"
        )
    return link


def _keep_end(ip: IPRoute, control: socket.socket, link: Any, name: str) -> dict[Part, str]:
    """One end of the routed pair as it has to be; returns what was not."""
    index = link["index"]
    seen = devices.look(control, index)
    if seen is None:
        raise AgentError(f"interface {name}: is gone")
    seen = replace(seen, master=link.get("IFLA_MASTER") or 0)
    made = Device(name, up=True, arp=name != ROUTED, mtu=PAIR_MTU, mac=seen.mac)
    changed = differences(seen, made)
    if "master" in changed:
        ip.link("set", index=index, master=0)
    try:
        devices.put_back(control, seen, made, [part for part in changed if part != "up"])
    except OSError as e:
        raise AgentError(
            f"interface {name}: {', '.join(changed.values())}, and cannot be put back: {e.strerror}"
        ) from None
    # No address on the pair: deleting the last one of a device silently flushes its routes.
    devices.set_sysctl(f"net/ipv6/conf/{name}/addr_gen_mode", "1")
    if "up" in changed:
        ip.link("set", index=index, state="up")
    return changed


def _harm(changed: Mapping[Part, str]) -> str:
    if "up" in changed:
        return "packets that come by routes were lost meanwhile"
    if "offloads" in changed:
        return "clients on the node itself got no answers meanwhile"
    return "large packets that come by routes were lost meanwhile" if "mtu" in changed else "packets went on"


_FOLLOWED = (
    ("net/ipv4/ip_forward", f"net/ipv4/conf/{ROUTED}/forwarding", "1"),
    ("net/ipv6/conf/all/forwarding", f"net/ipv6/conf/{ROUTED}/forwarding", "1"),
    ("net/ipv6/conf/all/disable_ipv6", f"net/ipv6/conf/{ROUTED}/disable_ipv6", "0"),
)
KEPT_SYSCTLS = (
    *(name for everywhere, here, _ in _FOLLOWED for name in (everywhere, here)),
    *(f"net/ipv6/conf/{end}/addr_gen_mode" for end in (ROUTED, DIRECTOR)),
)
"""What `ensure_pair` reads, by path below /proc/sys."""


def _keep_sysctls() -> list[str]:
    """The routed end forwards whenever the node does, and has IPv6 whenever the node has. Returns what was put back."""
    done = []
    for everywhere, here, right in _FOLLOWED:
        was = devices.sysctl(here)
        if devices.sysctl(everywhere) == right and was not in (None, right):
            devices.set_sysctl(here, right)
            done.append(
                f"{here.replace('/', '.')} was {was}, and is {right} again; packets of that family were lost meanwhile"
            )
    return done


def remove_pair(owner: str) -> bool:
    """Remove ps0 and ps1, and with them our routes; False for a pair that is another agent's, which stays."""
    with IPRoute() as ip:
        link = _find(ip, ROUTED)
        if link is not None and link.get("IFLA_IFALIAS") != owner:
            return False
        if link is not None:
            ip.link("del", index=link["index"])
    return True


# ---- engines ----------------------------------------------------------------------------------------------------


def make_engine_link(slot: int, namespace: int, inside: str, owner: str) -> EngineLink:
    """A veth pair: pe<slot> here, `inside` in the namespace (a descriptor). One receive queue, so that order is kept."""
    name = engine_device(slot)
    one = {"num_tx_queues": 1, "num_rx_queues": 1}
    with IPRoute() as ip:
        try:
            ip.link("add", ifname=name, kind="veth", **one, peer={"ifname": inside, "net_ns_fd": namespace, **one})
        except NetlinkError as e:
            if e.code == _EEXIST:
                raise AgentError(f"interface {name}: exists already and is not ours; remove it first") from None
            raise AgentError(f"interface {name}: cannot be made: {e}") from None
        link = _find(ip, name)
        ip.link("set", index=link["index"], ifalias=owner)
        return _set_up_host_end(ip, link)


def _set_up_host_end(ip: IPRoute, link: Any) -> EngineLink:
    name = link.get("IFLA_IFNAME")
    devices.set_sysctl(f"net/ipv6/conf/{name}/addr_gen_mode", "1")
    # GRO may hold segments back while a marker passes; partial checksums cannot be updated incrementally.
    devices.switch(name, False, "tx", "tso", "gso", "gro")
    _make_room(ip, link)
    ip.link("set", index=link["index"], state="up")
    return EngineLink(link["index"], _mac(link), link.get("IFLA_LINK"))


def _make_room(ip: IPRoute, link: Any) -> None:
    """A CNI plugin's interface may be made for shorter packets; those that the routed pair takes would be lost on it."""
    if link.get("IFLA_MTU") < PAIR_MTU:
        ip.link("set", index=link["index"], mtu=PAIR_MTU)


def find_engine_link(namespace: Path, inside: str) -> EngineLink:
    """The host end of a veth pair that a CNI plugin has made, found from its end in the pod; AgentError if it is none."""

    def look() -> tuple[int, int | None, str, int]:
        with IPRoute() as ip:
            link = _find(ip, inside)
            if link is None:
                names = ", ".join(i.get("IFLA_IFNAME") for i in ip.get_links())
                raise AgentError(
                    f"interface {inside}: not found in the pod, which has {names}; see its networks annotation"
                )
            info = link.get("IFLA_LINKINFO")
            kind = info.get("IFLA_INFO_KIND") if info else "a physical device"
            return link["index"], link.get("IFLA_LINK"), kind, devices.receive_queues(inside)

    index, peer, kind, queues = run_in(namespace, look)
    if queues > 1:
        raise AgentError(f"interface {inside}: has {queues} receive queues; use one, so that order is kept")
    with namespace.open("rb") as descriptor, IPRoute() as ip:
        link = None
        if kind == "veth" and peer and (found := ip.get_links(peer)):
            there = ip.get_netnsid(fd=descriptor.fileno())["nsid"]
            ends = (found[0].get("IFLA_LINK"), found[0].get("IFLA_LINK_NETNSID"))
            link = found[0] if ends == (index, there) else None
        if link is None:
            raise AgentError(
                f"interface {inside}: is {kind} without an end on this node; use an attachment that makes a veth pair"
            )
        return _set_up_host_end(ip, link)


def engine_link(slot: int, owner: str) -> EngineLink:
    """A pair that `make_engine_link` has made; AgentError if it is gone."""
    with IPRoute() as ip:
        link = _find(ip, engine_device(slot))
    if link is None or link.get("IFLA_IFALIAS") != owner:
        raise AgentError(f"interface {engine_device(slot)}: is gone")
    return EngineLink(link["index"], _mac(link), link.get("IFLA_LINK"))


def set_up_engine_end(name: str) -> bytes:
    """Run inside the engine's namespace: bring its interface up, silent and without offloads. Returns its MAC."""
    devices.set_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
    devices.switch(name, False, "tx", "tso", "gso", "gro")
    with IPRoute() as ip:
        link = _find(ip, name)
        ip.link("set", index=link["index"], arp=False)
        _make_room(ip, link)
        ip.link("set", index=link["index"], state="up")
        return _mac(link)


def device(index: int) -> Device:
    """A device of this namespace, with whose port it is; AgentError if it is gone."""
    with IPRoute() as ip, devices.control() as control:
        seen = devices.look(control, index)
        if seen is None:
            raise AgentError(f"interface {index}: is gone")
        return replace(seen, master=ip.get_links(index)[0].get("IFLA_MASTER") or 0)


def masters() -> dict[int, int]:
    """Index of each device of this namespace that is a port -> index of the bridge or bond whose port it is."""
    with IPRoute() as ip:
        return {link["index"]: master for link in ip.get_links() if (master := link.get("IFLA_MASTER"))}


def release(index: int) -> None:
    """Make the device nobody's port."""
    with IPRoute() as ip:
        ip.link("set", index=index, master=0)


def remove_engine_link(slot: int, owner: str) -> None:
    """Remove an engine's veth pair; does nothing when it is gone or not ours."""
    with IPRoute() as ip:
        link = _find(ip, engine_device(slot))
        if link is None:
            return
        # A crash may have come before the mark; then the other end in another namespace tells it is an engine's.
        unmarked = link.get("IFLA_IFALIAS") is None and link.get("IFLA_LINK_NETNSID") is not None
        if unmarked or link.get("IFLA_IFALIAS") == owner:
            with suppress(NetlinkError):
                ip.link("del", index=link["index"])


# ---- addresses --------------------------------------------------------------------------------------------------


def check_not_routed(prefixes: Iterable[Network]) -> None:
    """None of our addresses may be routed elsewhere by a rule as narrow."""
    wanted = list(prefixes)
    with IPRoute() as ip:
        ours = ip.link_lookup(ifname=ROUTED)
        names = {link["index"]: link.get("IFLA_IFNAME") for link in ip.get_links()}
        for route in [*ip.get_routes(family=socket.AF_INET), *ip.get_routes(family=socket.AF_INET6)]:
            target = route.get("RTA_DST")
            if not target or route.get("RTA_OIF") in ours or route["table"] == 255:
                continue
            network = ip_network(f"{target}/{route['dst_len']}", strict=False)
            if network in wanted:
                device = names.get(route.get("RTA_OIF"), "elsewhere")
                raise AgentError(
                    f"prefix {network}: is routed to {device} already; remove that route or use another prefix"
                )


def ensure_routes(prefixes: Iterable[Network], keep: bool = False) -> list[Network]:
    """Route exactly these prefixes into the pair, or with `keep` these too; returns what had to be added."""
    wanted = set(prefixes)
    with IPRoute() as ip:
        found = ip.link_lookup(ifname=ROUTED)
        if not found:
            raise AgentError(f"interface {ROUTED}: is gone")
        index = found[0]
        have = _routed(ip, index)
        # New ones first: an address that only changes its prefix is never without a route.
        added = sorted(wanted - have, key=str)
        for prefix in added:
            ip.route("replace", dst=str(prefix), oif=index, proto=ROUTE_PROTOCOL, family=family(prefix.version))
        for prefix in () if keep else have - wanted:
            ip.route("del", dst=str(prefix), oif=index, proto=ROUTE_PROTOCOL, family=family(prefix.version))
        return added


def _routed(ip: IPRoute, index: int) -> set[Network]:
    have: set[Network] = set()
    for family, full in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
        for route in ip.get_routes(family=family, oif=index):
            if route.get("RTA_DST") and route["proto"] == ROUTE_PROTOCOL:
                have.add(ip_network(f"{route.get('RTA_DST')}/{min(route['dst_len'], full)}"))
    return have


def routed() -> set[Network]:
    """The prefixes that are routed into the pair now, also for stacks that cannot be read."""
    with IPRoute() as ip:
        found = ip.link_lookup(ifname=ROUTED)
        return _routed(ip, found[0]) if found else set()


def with_addresses() -> list[str]:
    """Interfaces with an address that others can reach, by name; not the routed pair."""
    with IPRoute() as ip:
        there = {
            message["index"]
            for message in ip.get_addr()
            if not (address := ip_address(message.get("IFA_ADDRESS").partition("%")[0])).is_loopback
            and not address.is_link_local
        }
        names = [link.get("IFLA_IFNAME") for link in ip.get_links() if link["index"] in there]
    return sorted(name for name in names if name not in (ROUTED, DIRECTOR))


def family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


# ---- counters ---------------------------------------------------------------------------------------------------


def drops(path: str = "/proc/self/net/dev") -> dict[str, tuple[int, int]]:
    """Dropped frames (received, sent) per interface. Another process's file shows that process's namespace."""
    result: dict[str, tuple[int, int]] = {}
    try:
        with open(path) as file:  # noqa: PTH123 - a file of /proc, read as a whole
            lines = file.readlines()[2:]
    except OSError:
        return result
    for line in lines:
        name, _, numbers = line.partition(":")
        fields = numbers.split()
        result[name.strip()] = (int(fields[3]), int(fields[11]))
    return result


def change_socket() -> socket.socket:
    """A netlink socket that becomes readable when something of this namespace changes that packets depend on: links and
    their offloads, queueing disciplines and filters on them, addresses, routes, whether the node forwards."""
    groups = (
        0x1 | 0x8 | 0x10 | 0x40 | 0x100 | 0x400
    )  # RTMGRP_LINK, TC, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
    groups |= 1 << 23 | 1 << 24  # RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF
    watcher = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    watcher.bind((0, groups))
    return watcher
