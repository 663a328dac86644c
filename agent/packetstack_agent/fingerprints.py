"""What the kernel says of this node's network, as one digest: whether all is as at the last look, without reading it."""

import socket
import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from packetstack_agent import devices
from packetstack_agent.errors import AgentError
from packetstack_agent.nftables import attribute, attributes, messages

# From <linux/netlink.h>, <linux/rtnetlink.h>, <linux/if_link.h>, <linux/neighbour.h>, <linux/if_addr.h>.
_SOL_NETLINK, _STRICT_CHECK = 270, 12
_REQUEST, _DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_GETLINK, _GETADDR, _GETROUTE, _GETNEIGH = 18, 22, 26, 30
_IFLA_EXT_MASK, _SKIP_STATISTICS = 29, 1 << 3
_RTA_OIF = 4
_NTF_PROXY = 8
_COUNTS = {16: (16, {7, 23}), 20: (8, {6}), 24: (12, {12})}
"""Of RTM_NEWLINK, RTM_NEWADDR and RTM_NEWROUTE: bytes before the attributes, and those that count packets
(IFLA_STATS, IFLA_STATS64: there whatever is asked for) or seconds (IFA_CACHEINFO, RTA_CACHEINFO)."""
_LONGEST = 1 << 18
_WAIT_SECONDS = 2.0


def of_node(routed: int, sysctls: Iterable[str]) -> bytes:
    """Of links, addresses, routes into the device with the index `routed`, addresses answered for, and these sysctls.

    Without counters and times: the same digest means the same network. AgentError if the kernel does not answer. Blocks.
    """
    found = blake2b(digest_size=16)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)
        kernel.settimeout(_WAIT_SECONDS)
        for number, (kind, body) in enumerate(_questions(routed), 1):
            for message, answer in _dump(kernel, kind, number, body):
                found.update(_without_counts(message, answer))
    for name in sysctls:
        found.update(f"{name}={devices.sysctl(name)}".encode())
    return found.digest()


def _questions(routed: int) -> Iterator[tuple[int, bytes]]:
    yield _GETLINK, bytes(16) + struct.pack("=HHI", 8, _IFLA_EXT_MASK, _SKIP_STATISTICS)
    yield _GETADDR, bytes(8)
    for family in (socket.AF_INET, socket.AF_INET6):
        yield _GETROUTE, struct.pack("=B11x", family) + struct.pack("=HHI", 8, _RTA_OIF, routed)
        yield _GETNEIGH, struct.pack("=B9xBx", family, _NTF_PROXY)


def _dump(kernel: socket.socket, kind: int, number: int, body: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each answer."""
    kernel.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _DUMP, number, 0) + body)
    while True:
        try:
            data = kernel.recv(_LONGEST)
        except OSError as e:
            raise AgentError(f"netlink: no answer to a look at the node's network: {e}") from None
        for answer, sequence, _, payload in messages(data):
            if sequence != number:
                continue
            if answer == _NLMSG_DONE:
                return
            if answer == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", payload)[0]
                raise AgentError(f"netlink: a look at the node's network was refused, error {code}")
            yield answer, payload


def _without_counts(kind: int, answer: bytes) -> bytes:
    if kind not in _COUNTS:
        return answer
    at, counts = _COUNTS[kind]
    return answer[:at] + b"".join(attribute(k, value) for k, value in attributes(answer[at:]) if k not in counts)
