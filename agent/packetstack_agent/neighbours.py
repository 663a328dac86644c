"""Addresses of stacks on the links of this node: answered for by ARP and neighbour discovery, and announced.

All functions block and talk netlink, as those of networks.py. Each may be repeated.
"""

import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Interface, ip_address, ip_interface

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from packetstack_agent import devices
from packetstack_agent.networks import DIRECTOR, ROUTED, family, index_of
from packetstack_core.values import Address

_NTF_PROXY = 8


def on_link(addresses: Iterable[Address]) -> dict[str, list[Address]]:
    """Which addresses lie in the prefix of one of the node's own interfaces: nobody would route those to us."""
    wanted = list(addresses)
    found: dict[str, list[Address]] = {}
    with IPRoute() as ip:
        names = {link["index"]: link.get("IFLA_IFNAME") for link in ip.get_links()}
        for message in ip.get_addr():
            name = names.get(message["index"], "lo")
            if name == "lo" or name in (ROUTED, DIRECTOR):
                continue
            interface = ip_interface(f"{message.get('IFA_ADDRESS').partition('%')[0]}/{message['prefixlen']}")
            if isinstance(interface, IPv6Interface) and interface.is_link_local:
                continue
            inside = [a for a in wanted if a.version == interface.version and a in interface.network]
            if inside:
                found.setdefault(name, []).extend(inside)
    return found


def answer_for(device: str, addresses: Iterable[Address], undo: dict[str, str]) -> list[Address]:
    """Answer ARP and neighbour solicitations for the addresses on this device; returns the new ones.

    One entry per address; the `proxy_arp` switch would answer for everything. The sysctls that must change go
    into `undo` with their earlier values.
    """
    new: list[Address] = []
    with IPRoute() as ip:
        index = index_of(device)
        have = {
            ip_address(n.get("NDA_DST"))
            for family in (socket.AF_INET, socket.AF_INET6)
            for n in ip.get_neighbours(family=family, match=lambda m: bool(m["flags"] & _NTF_PROXY))
            if n["ifindex"] == index
        }
        for address in addresses:
            settings = {f"net/ipv{address.version}/neigh/{device}/proxy_delay": "0"}
            if address.version == 6:
                settings[f"net/ipv6/conf/{device}/proxy_ndp"] = "1"
            for name, value in settings.items():
                was = devices.sysctl(name)
                if was not in (None, value):
                    undo.setdefault(name, str(was))
                    devices.set_sysctl(name, value)
            if address not in have:
                ip.neigh("add", dst=str(address), ifindex=index, flags=_NTF_PROXY, family=family(address.version))
                new.append(address)
    for address in new:
        announce(device, address)
    return new


def answer_no_more(device: str, addresses: Iterable[Address]) -> None:
    """Take back `answer_for`; missing entries and devices are fine."""
    with IPRoute() as ip:
        found = ip.link_lookup(ifname=device)
        for address in addresses if found else ():
            with suppress(NetlinkError):
                ip.neigh("del", dst=str(address), ifindex=found[0], flags=_NTF_PROXY, family=family(address.version))


def announce(device: str, address: Address) -> None:
    """Tell the link that the address is here now: gratuitous ARP, or an unsolicited neighbour advertisement."""
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as link:
            link.bind((device, 0))
            mac = link.getsockname()[4]
            if len(mac) == 6:
                link.send(announcement(mac, address))
    except OSError:
        return  # a device that is down announces nothing; neighbours ask when they need the address


def announcement(mac: bytes, address: Address) -> bytes:
    """The Ethernet frame of `announce`. ARP: RFC 5227 section 3; advertisement: RFC 4861 section 4.4, override flag."""
    if isinstance(address, IPv4Address):
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + address.packed + bytes(6) + address.packed
        return b"\xff" * 6 + mac + b"\x08\x06" + body
    assert isinstance(address, IPv6Address)
    everybody = IPv6Address("ff02::1").packed
    message = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + address.packed + b"\x02\x01" + mac
    pseudo = address.packed + everybody + struct.pack("!II", len(message), 58)
    total = sum(struct.unpack(f"!{(len(pseudo) + len(message)) // 2}H", pseudo + message))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    message = message[:2] + struct.pack("!H", ~total & 0xFFFF) + message[4:]
    header = struct.pack("!IHBB", 0x60000000, len(message), 58, 255) + address.packed + everybody
    return b"\x33\x33\x00\x00\x00\x01" + mac + b"\x86\xdd" + header + message
