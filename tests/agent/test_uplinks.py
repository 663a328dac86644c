"""What `--uplink` may say, and which VLANs an interface is taken to be in."""

from typing import Any

import pytest

from packetstack_agent import networks
from packetstack_agent.errors import AgentError


@pytest.mark.parametrize(
    ("written", "place", "role"),
    [
        ("eth1", "eth1", ""), ("eth1.77:clients", "eth1.77", "clients"), ("bond0:backends", "bond0", "backends"),
        ("192.0.2.0/24", "192.0.2.0/24", ""), ("192.0.2.0/24:clients", "192.0.2.0/24", "clients"),
        ("2001:db8::/64", "2001:db8::/64", ""), ("2001:db8::/64:backends", "2001:db8::/64", "backends"),
    ],
)  # fmt: skip
def test_an_uplink_is_an_interface_or_a_network_and_perhaps_a_role(written: str, place: str, role: str) -> None:
    assert networks.uplink_role(written) == (place, role)
    assert networks.uplink_text(place, role) == written


@pytest.mark.parametrize("written", ["eth1:client", "eth1:", "eth1:both", "2001:db8::/64:Clients"])
def test_a_role_that_there_is_not_is_refused_with_those_that_there_are(written: str) -> None:
    place = written.rpartition(":")[0]
    with pytest.raises(AgentError, match=f"use {place}:clients or {place}:backends, or {place} for both"):
        networks.uplink_role(written)


class Message(dict[str, Any]):
    """As pyroute2's: attributes by get, header fields by index."""


def vlan(number: int, below: int = 7, *, is_up: bool = True, protocol: int = 0x8100, **more: Any) -> Message:
    data = {"IFLA_VLAN_ID": number, "IFLA_VLAN_PROTOCOL": protocol}
    info = {"IFLA_INFO_KIND": "vlan", "IFLA_INFO_DATA": data}
    return Message({"IFLA_LINK": below, "IFLA_LINKINFO": info, "flags": int(is_up), **more})


def test_the_node_is_in_a_vlan_that_is_a_device_of_its_own_on_the_interface() -> None:
    links = [
        vlan(77), vlan(4094), vlan(5, below=8), vlan(6, is_up=False), vlan(9, protocol=0x88A8), vlan(10, IFLA_MASTER=3),
        vlan(11, IFLA_LINK_NETNSID=0), Message({"flags": 1, "IFLA_LINK": 7}),
        Message({"flags": 1, "IFLA_LINK": 7, "IFLA_LINKINFO": {"IFLA_INFO_KIND": "macvlan"}}),
    ]  # fmt: skip
    assert networks._vlans(links, 7) == {77, 4094}
