"""What the director refuses and answers, with real packets through a stack: on an uplink, and on the routed pair."""

import contextlib
import json
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.director.frames import ICMP, TCP, UDP, Director, checksum, ip, options_header, transport
from tests.lab.node import BACKENDS, BACKENDS6, VIP, VIP6, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_cli.lab import NODE_UPLINK, inside

ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 5399))
print("ready", flush=True)
for n in range(200):
    data, peer = s.recvfrom(4096)
    print(peer[0], peer[1], flush=True)
    s.sendto(data, peer)
"""
ONE_WAY = pytest.mark.parametrize("uplink", ["up0", ""], ids=["uplink", "routed"])


def udp(name: str, address: str, port: int, backend: str) -> dict[str, Any]:
    return {
        "name": name, "address": address, "protocol": "UDP", "port": port,
        "backends": {"endpoints": [{"address": backend, "port": 5399}]},
    }  # fmt: skip


def up(node: Node, definition: dict[str, Any], *uplinks: str) -> None:
    file = node.lab.directory / "guards.yaml"
    file.write_text(json.dumps(definition))
    words = [word for uplink in uplinks for word in ("--uplink", uplink)]
    node.packetstack("up", str(file), *words)


@pytest.fixture(autouse=True)
def end(node: Node) -> Iterator[None]:
    """No stack afterwards."""
    yield
    node.command("down", "--all", "--yes")


def line(echo: Any) -> str:
    """What the server says next."""
    assert select.select([echo.stdout], [], [], 10)[0], "nothing in time"
    said: str = echo.stdout.readline()
    return said


def drops(node: Node) -> dict[str, int]:
    found: dict[str, int] = node.status()["drops"]["director"]
    return found


def counted(node: Node, result: str, where: str = "director") -> int:
    """How many packets got this result, from the director or on the `host`."""
    mark = f'packetstack_{where}_packets_total{{result="{result}"}} '
    lines = node.command("metrics").stdout.splitlines()
    return next(int(float(line.removeprefix(mark))) for line in lines if line.startswith(mark))


def mac(node: Node, room: Any, device: str) -> bytes:
    [link] = json.loads(node.lab.run(room, "ip", "-j", "link", "show", device).stdout)
    return bytes.fromhex(link["address"].replace(":", ""))


def send(node: Node, *packets: bytes) -> None:
    """As frames from the client to the node, whatever is in them."""
    to, by = mac(node, "node", NODE_UPLINK), mac(node, "client", "c0")
    with inside(node.lab.namespace("client")), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("c0", 0))
        for packet in packets:
            wire.send(to + by + (b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd") + packet)


def refused(node: Node, source: str) -> bool:
    """Whether a client with this address gets no connection, and no reset either."""
    try:
        node.connect(source=(source, 0), timeout_seconds=0.7).close()
    except TimeoutError:
        return True
    return False


@ONE_WAY
def test_only_allowed_sources_reach_a_listener_and_who_loses_the_right_is_cut_off(node: Node, uplink: str) -> None:
    def allowing(*sources: str) -> dict[str, Any]:
        more = {"allowedSources": list(sources)} if sources else {}
        return stack(listeners=[listener("web", VIP, BACKENDS) | more])

    uplinks = [uplink] if uplink else []
    up(node, allowing("10.71.1.2", "203.0.113.0/24"), *uplinks)
    with node.connect(source=("10.71.1.2", 0)) as lives:
        ask(lives)
        assert refused(node, "10.71.4.1")
        eventually(lambda: drops(node)["not_allowed"] > 0)
        said = node.packetstack("explain", "web", "tcp", "10.71.4.1:40000", f"{VIP}:80")
        assert "10.71.4.1 is not in allowedSources of listener web: dropped as not_allowed" in said
        node.packetstack("upgrade", "--agent")  # who restarts forgets nothing
        assert refused(node, "10.71.4.1")
        ask(lives)
        up(node, allowing("10.71.4.1"), *uplinks)
        lives.settimeout(0.7)
        with pytest.raises(TimeoutError):
            ask(lives)
    assert refused(node, "10.71.1.2")
    node.connect(source=("10.71.4.1", 0)).close()
    up(node, allowing(), *uplinks)
    for source in ("10.71.1.2", "10.71.4.1"):
        node.connect(source=(source, 0)).close()
    up(node, allowing("10.71.4.1"), *uplinks)
    assert refused(node, "10.71.1.2")


@ONE_WAY
def test_two_listeners_never_answer_each_other(node: Node, uplink: str) -> None:
    echoes = {a: node.lab.start("server", sys.executable, "-c", ECHO, a, stdout=subprocess.PIPE) for a in BACKENDS}
    try:
        for echo in echoes.values():
            assert line(echo) == "ready\n"
        # The kernel lets it through to the pair.
        node.lab.run("node", "sh", "-c", "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done")
        definition = stack(
            listeners=[udp("a", VIP, 53, BACKENDS[0]), udp("b", "192.0.2.11", 54, BACKENDS[1])],
            snat={"addresses": ["198.51.100.0/31"]},
        )
        up(node, definition, *([uplink] if uplink else []))
        forged = (
            ip(VIP, "192.0.2.11", UDP, transport(UDP, 53, 54)), ip(VIP, VIP, UDP, transport(UDP, 53, 53)),
            ip("198.51.100.0", VIP, UDP, transport(UDP, 999, 53)),
        )  # fmt: skip
        send(node, *forged)
        eventually(lambda: drops(node)["own_source"] == len(forged))
        with inside(node.lab.namespace("client")):
            asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with asking:
            asking.settimeout(3)
            for place in ((VIP, 53), ("192.0.2.11", 54)):
                asking.sendto(b"hello", place)
                assert asking.recv(100) == b"hello"
        for echo in echoes.values():
            assert line(echo).startswith("198.51.100."), "the only datagram it ever got is the honest one"
        assert counted(node, "drop_own_source") == len(forged)
    finally:
        for echo in echoes.values():
            echo.kill()
            echo.wait()


def test_ipv6_fragments_behind_further_extension_headers_reach_the_backend(node: Node) -> None:
    client, backend = "fd71:1::2", BACKENDS6[0]
    echo = node.lab.start("server", sys.executable, "-c", ECHO, backend, stdout=subprocess.PIPE)
    try:
        assert line(echo) == "ready\n"
        definition = stack(listeners=[udp("a", VIP6, 53, backend)], snat={"addresses": ["2001:db8:2::/127"]})
        up(node, definition, NODE_UPLINK)
        datagram = bytes([UDP, 0]) + options_header()[2:] + checked(client, VIP6, 999, 53, bytes(200))
        send(
            node,
            ip(client, VIP6, 60, datagram[:104], ident=77, fragment=1),
            ip(client, VIP6, 60, datagram[104:], ident=77, fragment=13 << 3),
        )
        assert line(echo).startswith("2001:db8:2::")
    finally:
        echo.kill()
        echo.wait()


def checked(source: str, destination: str, sport: int, dport: int, payload: bytes) -> bytes:
    """A UDP datagram of IPv6 with its checksum."""
    body = transport(UDP, sport, dport, payload)
    pseudo = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    total = checksum(pseudo + struct.pack(">IxxxB", len(body), UDP) + body)
    return body[:6] + struct.pack(">H", total) + body[8:]


@ONE_WAY
def test_a_virtual_address_answers_as_a_host_where_nobody_listens(node: Node, uplink: str) -> None:
    up(node, stack(), *([uplink] if uplink else []))
    for address in (VIP, VIP6):
        with pytest.raises(ConnectionRefusedError):
            node.connect(address, 81)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(node.lab.namespace("client")):
            asking = socket.socket(family, socket.SOCK_DGRAM)
        with asking:
            asking.settimeout(3)
            asking.connect((address, 33434))
            asking.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                asking.recv(100)
        for size in ("56", "2000", "5000"):
            node.lab.run("client", "ping", "-n", "-c", "1", "-W", "3", "-s", size, address)
    assert node.who() == set(BACKENDS)


@ONE_WAY
def test_each_hop_to_a_listener_shows_in_a_trace(node: Node, uplink: str) -> None:
    up(node, stack(listeners=[udp("a", VIP, 53, BACKENDS[0])], snat={"addresses": ["198.51.100.0/31"]}),
       *([uplink] if uplink else []))  # fmt: skip
    with inside(node.lab.namespace("client")):
        errors = socket.socket(socket.AF_INET, socket.SOCK_RAW, ICMP)
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with errors, asking:
        errors.settimeout(3)
        for ttl, hop in ((1, "10.71.1.1"),) if uplink else ((1, "10.71.1.1"), (2, VIP)):
            asking.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            with contextlib.suppress(OSError):  # what was said about the one before
                asking.sendto(b"x", (VIP, 53))
            said, (by, _) = errors.recvfrom(1000)
            assert (by, said[20], said[21]) == (hop, 11, 0)
    assert drops(node)["ttl"] == 0


def test_where_the_driver_leaves_no_room_for_the_stamp_traffic_takes_the_routed_pair(node: Node) -> None:
    up(node, stack(), NODE_UPLINK)
    director = Director(Path(node.lab.run_directory) / "bpf", live=True)
    try:
        before = counted(node, "passed_metadata")
        set_flags(director, 7)
        with node.connect() as connection:
            ask(connection)
        assert counted(node, "passed_metadata") > before
        node.lab.run("node", "ip", "link", "set", NODE_UPLINK, "txqueuelen", "999")  # the agent looks again
        assert node.who() == set(BACKENDS)
        assert flags(director) == 7
        set_flags(director, 3)
        before = counted(node, "passed_metadata")
        assert node.who() == set(BACKENDS)
        assert counted(node, "passed_metadata") == before
    finally:
        director.close()


def place(director: Director) -> int:
    """Where the only uplink stands."""
    return next(i for i in range(64) if struct.unpack_from("<I", director.get("uplinks", i, 528))[0])


def flags(director: Director) -> int:
    return int(struct.unpack_from("<I", director.get("uplinks", place(director), 528), 4)[0])


def set_flags(director: Director, value: int) -> None:
    entry = bytearray(director.get("uplinks", place(director), 528))
    entry[4:8] = struct.pack("<I", value)
    director.put("uplinks", struct.pack("<I", place(director)), bytes(entry))


def test_an_uplink_whose_mac_changes_is_known_by_the_new_one(node: Node) -> None:
    up(node, stack(), NODE_UPLINK)
    was = mac(node, "node", NODE_UPLINK)
    director = Director(Path(node.lab.run_directory) / "bpf", live=True)
    try:
        assert director.get("uplinks", place(director), 528)[8:14] == was
        node.lab.run("node", "ip", "link", "set", NODE_UPLINK, "address", "02:00:5e:10:20:30")
        eventually(lambda: director.get("uplinks", place(director), 528)[8:14] == bytes.fromhex("02005e102030"))
        node.lab.run("client", "ip", "neigh", "flush", "all")
        assert node.who() == set(BACKENDS)
        before = counted(node, "drop_martian")
        send(node, ip("127.0.0.1", VIP, TCP, transport(TCP, 5, 80)))
        eventually(lambda: counted(node, "drop_martian") == before + 1)
    finally:
        director.close()
        node.lab.run("node", "ip", "link", "set", NODE_UPLINK, "address", was.hex(":"))
        node.lab.run("client", "ip", "neigh", "flush", "all")


def test_nobody_on_the_clients_side_answers_for_a_backend(node: Node) -> None:
    up(node, stack(), f"{NODE_UPLINK}:clients", "dn0:backends")
    assert node.who() == set(BACKENDS)
    send(node, ip(BACKENDS[0], "198.51.100.0", TCP, transport(TCP, 8080, 5000)))
    eventually(lambda: drops(node)["wrong_uplink"] == 1)
    assert node.refused("up", str(node.lab.directory / "guards.yaml"), "--uplink", "up0:client") == (
        "uplink up0:client: client is no role; use up0:clients or up0:backends, or up0 for both"
    )
    up(node, stack(), NODE_UPLINK)  # both again
    send(node, ip(BACKENDS[0], "198.51.100.0", TCP, transport(TCP, 8080, 5000)))
    eventually(lambda: counted(node, "drop_wrong_uplink") == 1 and node.who() == set(BACKENDS))


def test_an_address_of_the_node_is_a_client_of_its_own_stack_but_none_on_the_wire(node: Node) -> None:
    up(node, stack(), NODE_UPLINK)
    assert node.lab.run("node", "curl", "-sS", "--max-time", "5", f"http://{VIP}/").stdout
    send(node, ip("10.71.1.1", VIP, TCP, transport(TCP, 5, 80)))
    eventually(lambda: drops(node)["own_source"] == 1)
    send(node, ip("10.71.9.1", VIP, TCP, transport(TCP, 5, 80)))
    node.lab.run("node", "ip", "addr", "add", "10.71.9.1/32", "dev", "lo")

    def known() -> bool:
        send(node, ip("10.71.9.1", VIP, TCP, transport(TCP, 5, 80)))
        return drops(node)["own_source"] > 1

    eventually(known)
    node.lab.run("node", "ip", "addr", "del", "10.71.9.1/32", "dev", "lo")
