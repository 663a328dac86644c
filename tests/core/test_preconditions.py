"""What packets need of their node: what is found lacking, how it is said, and the document's table."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from packetstack_core import preconditions
from packetstack_core.preconditions import (
    MEANWHILE,
    Device,
    Lack,
    Own,
    Precondition,
    Surroundings,
    differences,
    lacking,
)
from packetstack_core.reasons import ConditionReason

TROUBLESHOOT = Path(__file__).resolve().parents[2] / "docs/troubleshoot.md"
MADE = Device("pe1", up=True, arp=True, mtu=1500, mac=b"\2\0\0\0\0\1")


def own(address: str, network: str, device: str = "eth0", broadcast: str = "") -> Own:
    return Own(ip_address(address), ip_network(network), device, ip_address(broadcast) if broadcast else None)


def around(*addresses: Own, deaf: tuple[str, ...] = (), v4: bool = True, v6: bool = True) -> Surroundings:
    return Surroundings({4: v4, 6: v6}, addresses, deaf)


def messages(seen: Surroundings, *prefixes: str) -> list[str]:
    return [lack.message for lack in lacking(seen, map(ip_network, prefixes))]


def test_the_table_of_the_document_is_that_of_the_list() -> None:
    text = TROUBLESHOOT.read_text()
    assert preconditions.filled(text) == text, "run: python -m packetstack_core.preconditions docs/troubleshoot.md"


def test_what_is_not_kept_says_what_to_do() -> None:
    assert all(it.meanwhile and it.remedy for it in Precondition)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (replace(MADE, name="foo"), "was called foo"), (replace(MADE, up=False), "was down"),
        (replace(MADE, mtu=1400), "had an MTU of 1400"), (replace(MADE, mac=b"\2\0\0\0\0\7"), "had the MAC 02:00:00:00:00:07"),
        (replace(MADE, master=3), "was made a port of another interface"),
        (replace(MADE, offloads=frozenset({"tx", "gro"})), "had gro, tx on"),
    ],
)  # fmt: skip
def test_a_device_that_was_changed_is_told_by_what_was_changed(seen: Device, said: str) -> None:
    changed = differences(seen, MADE)
    assert list(changed.values()) == [said]
    assert changed.keys() <= MEANWHILE.keys()
    assert not differences(MADE, MADE)


def test_a_larger_mtu_and_what_the_device_never_had_are_no_harm() -> None:
    assert not differences(replace(MADE, mtu=9000, arp=False), MADE)
    assert differences(MADE, replace(MADE, arp=False)) == {"arp": "had ARP on"}


def test_a_node_that_does_not_forward_loses_the_packets_of_that_version_alone() -> None:
    four, six = "192.0.2.10/32", "2001:db8::1/128"
    assert messages(around(v4=False), six) == messages(around(v6=False), four) == []
    (said,) = messages(around(v4=False), four, six)
    assert said.startswith("net.ipv4.ip_forward: is 0, so this node forwards no packets")
    assert said.endswith("sysctl -w net.ipv4.ip_forward=1")
    assert len(messages(around(v4=False, v6=False), four, six)) == 2


def test_an_interface_that_does_not_forward_is_named_unless_the_whole_node_does_not() -> None:
    assert messages(around(deaf=("eth1",)), "192.0.2.10/32") == [
        "net.ipv4.conf.eth1.forwarding: is 0, so IPv4 packets of stacks that come by eth1 are lost; "
        "set it with: sysctl -w net.ipv4.conf.eth1.forwarding=1"
    ]
    assert not messages(around(deaf=("eth1",)), "2001:db8::1/128")
    assert len(messages(around(deaf=("eth1",), v4=False), "192.0.2.10/32")) == 1


def test_an_address_of_the_nodes_own_is_named_with_its_device() -> None:
    (said,) = messages(around(own("192.0.2.10", "192.0.2.10/32", "lo")), "192.0.2.10/32", "2001:db8::1/128")
    assert said.startswith("address 192.0.2.10: is in use by this node on lo")
    assert said.endswith("ip address del 192.0.2.10/32 dev lo")
    assert not messages(around(own("192.0.2.11", "192.0.2.0/24")), "192.0.2.10/32")


@pytest.mark.parametrize(
    ("node", "stack", "said"),
    [
        (own("10.0.0.1", "10.0.0.0/24"), "10.0.0.255/32", "10.0.0.255: is the broadcast address of 10.0.0.0/24 on eth0"),
        (own("10.0.0.1", "10.0.0.0/24"), "10.0.0.252/30", "10.0.0.255: is the broadcast address"),
        (own("10.0.0.1", "10.0.0.0/24"), "10.0.0.0/32", "10.0.0.0: is the network address"),
        (own("10.0.0.1", "10.0.0.0/24", broadcast="10.0.0.99"), "10.0.0.99/32", "10.0.0.99: is the broadcast address"),
        (own("fd00::5", "fd00::/64"), "fd00::/127", "fd00::: is the anycast (RFC 4291, all routers) address"),
    ],
)  # fmt: skip
def test_an_address_that_no_host_can_have_is_named(node: Own, stack: str, said: str) -> None:
    (found,) = lacking(around(node), [ip_network(stack)])
    assert found.message.startswith(f"address {said}")
    assert (found.what, found.lost) == (Precondition.HOST_ADDRESSES, True)


@pytest.mark.parametrize(
    ("node", "stack"),
    [
        (own("10.0.0.1", "10.0.0.0/24"), "10.0.0.248/30"), (own("10.0.0.0", "10.0.0.0/31"), "10.0.0.1/32"),
        (own("10.0.0.1", "10.0.0.1/32"), "10.0.0.2/31"), (own("fd00::1", "fd00::/64"), "fd00::ffff/128"),
        (own("10.0.0.1", "10.0.0.0/24"), "fd00::/64"),
    ],
)  # fmt: skip
def test_all_other_addresses_of_the_nodes_networks_may_be_used(node: Own, stack: str) -> None:
    assert not lacking(around(node), [ip_network(stack)])


def test_conditions_tell_of_what_loses_packets_apart_from_the_rest() -> None:
    off = preconditions.forwarding(4, on=False)
    assert off is not None
    nameless = Lack(Precondition.NAMESPACE, "engine 1", "the name belongs to another", lost=False)
    broken = Lack(Precondition.HOST_END, "engine 1", "no permission", lost=True)
    assert preconditions.problem([nameless, off], lost=True) == (ConditionReason.FORWARDING_OFF, off.message)
    assert preconditions.problem([broken, off], lost=True) == (ConditionReason.PATH_BROKEN, "engine 1: no permission")
    assert preconditions.problem([nameless, off], lost=False) == (ConditionReason.PATH_BROKEN, nameless.message)
    assert preconditions.problem([], lost=True) is None
