"""Looks at what of the node belongs to its administrator, as far as packets depend on it. Changes nothing."""

import socket
from collections.abc import Collection, Iterable
from ipaddress import ip_address, ip_network

from pyroute2 import IPRoute

from packetstack_agent import devices, networks
from packetstack_core.preconditions import FORWARDING, Own, Surroundings
from packetstack_core.values import Address, Network

_MAIN_TABLE, _LOCAL_TABLE = 254, 255
_RTN_BROADCAST = 3


def survey(prefixes: Iterable[Network], uplinks: Collection[str]) -> Surroundings:
    """The node as it is. `prefixes`: virtual and SNAT addresses of stacks; `uplinks`: names. Blocks."""
    forwards = {v: devices.sysctl(name.replace(".", "/")) == "1" for v, name in FORWARDING.items()}
    forwards = {
        v: on for v, on in forwards.items() if on or devices.sysctl(FORWARDING[v].replace(".", "/")) is not None
    }
    with IPRoute() as ip:
        names = {link["index"]: link.get("IFLA_IFNAME") for link in ip.get_links()}
        own = [
            _own(message, name)
            for message in ip.get_addr()
            if (name := names.get(message["index"])) not in (None, networks.ROUTED, networks.DIRECTOR)
        ]
        deaf = _deaf({o.device for o in own} - {"lo", *uplinks}) if forwards.get(4) else set()
        if deaf:
            deaf &= _leading_out(ip, names) | {o.device for o in own if any(_lies_in(p, o.network) for p in prefixes)}
    return Surroundings(forwards, own, sorted(deaf))


def own_addresses() -> tuple[frozenset[Address], frozenset[Address]]:
    """The node's own addresses, and the broadcast addresses of its networks."""
    own, broadcast = set(), set()
    with IPRoute() as ip:
        for message in ip.get_addr():
            text = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
            own.add(ip_address(text.partition("%")[0]))
        for route in ip.get_routes(family=socket.AF_INET, table=_LOCAL_TABLE):
            if route["type"] == _RTN_BROADCAST and route["dst_len"] == 32:
                broadcast.add(ip_address(route.get("RTA_DST")))
    return frozenset(own), frozenset(broadcast) - frozenset(own)


def _own(message: dict[str, object], device: str) -> Own:
    def text(name: str) -> str:
        return str(message.get(name) or "").partition("%")[0]

    peer = text("IFA_ADDRESS")
    network = ip_network(f"{peer}/{message['prefixlen']}", strict=False)
    broadcast = text("IFA_BROADCAST")
    return Own(ip_address(text("IFA_LOCAL") or peer), network, device, ip_address(broadcast) if broadcast else None)


def _deaf(names: Iterable[str]) -> set[str]:
    return {name for name in names if devices.sysctl(f"net/ipv4/conf/{name}/forwarding") == "0"}


def _leading_out(ip: IPRoute, names: dict[int, str]) -> set[str]:
    """Devices behind which there are other networks."""
    routes = ip.get_routes(family=socket.AF_INET, table=_MAIN_TABLE)
    return {names.get(route.get("RTA_OIF"), "") for route in routes if route.get("RTA_GATEWAY") or route.get("RTA_VIA")}


def _lies_in(prefix: Network, network: Network) -> bool:
    return prefix.version == network.version and prefix.network_address in network
