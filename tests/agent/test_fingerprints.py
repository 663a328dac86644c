"""The digest of a node's network: another one whenever something is other than it was, and for no other reason."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from packetstack_agent.fingerprints import of_node
from packetstack_cli.lab import inside

NAMESPACE = "pkt-fingerprint"
SYSCTL = "net/ipv4/conf/here/rp_filter"


def ip(words: str) -> None:
    subprocess.run(["ip", "-n", NAMESPACE, *words.split()], check=True, timeout=10)


@pytest.fixture
def digest() -> Iterator[Callable[[], bytes]]:
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True, timeout=10)
    try:
        ip("link add here index 7 type veth peer name there index 8")
        for end in ("here", "there"):  # no address that would be tried out for a second
            ip(f"link set {end} addrgenmode none")
        for words in ("here up", "there up", "lo up"):
            ip(f"link set {words}")
        ip("address add 192.0.2.1/24 dev here valid_lft 500 preferred_lft 500")
        ip("route add 198.51.100.0/24 dev here")
        ip("-6 route add 2001:db8:1::/48 dev here expires 500")

        def now() -> bytes:
            with inside(NAMESPACE):
                return of_node(7, [SYSCTL])

        yield now
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True, timeout=10)


def test_packets_that_are_counted_and_seconds_that_pass_change_nothing(digest: Callable[[], bytes]) -> None:
    before = digest()
    send = ["ip", "netns", "exec", NAMESPACE, "ping", "-c1", "-W1", "198.51.100.9"]
    subprocess.run(send, check=False, timeout=10, capture_output=True)  # its second of waiting for an answer counts
    assert digest() == before


@pytest.mark.parametrize(
    "change",
    [
        "link set there down",
        "link set here mtu 1400",
        "link set here alias somebody",
        "link add other type veth",
        "address add 192.0.2.2/24 dev there",
        "route del 198.51.100.0/24 dev here",
        "route add 203.0.113.0/24 dev here",
        "-6 route del 2001:db8:1::/48 dev here",
        "neigh add proxy 192.0.2.9 dev here",
        "neigh add proxy 2001:db8::9 dev here",
    ],
)
def test_each_change_of_the_network_is_seen(digest: Callable[[], bytes], change: str) -> None:
    before = digest()
    ip(change)
    assert digest() != before


def test_a_sysctl_is_seen(digest: Callable[[], bytes]) -> None:
    before = digest()
    write = ["ip", "netns", "exec", NAMESPACE, "sysctl", "-qw", f"{SYSCTL.replace('/', '.')}=2"]
    subprocess.run(write, check=True, timeout=10)
    assert digest() != before
