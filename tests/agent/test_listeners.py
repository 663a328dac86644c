"""What a listener may have, and what becomes of its flows when a backend is lost, is new or is back."""

import contextlib
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from tests.lab.node import BACKENDS, VIP, VIP6, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_cli.lab import inside

CHECK = {"type": "TCP", "intervalSeconds": 1, "timeoutSeconds": 1, "unhealthyThreshold": 1, "healthyThreshold": 1}


def web(**fields: Any) -> dict[str, Any]:
    """The stack, with these fields in its IPv4 listener."""
    first = {**listener("web", VIP, BACKENDS, CHECK), **fields}
    return stack(listeners=[first, *stack()["spec"]["listeners"][1:]])


def refused(node: Node, reason: str) -> int:
    """Drops by this reason."""
    return int(node.status()["drops"]["engine"][reason])


def backends(node: Node) -> list[dict[str, Any]]:
    """The IPv4 listener's, as the agent sees them."""
    found = {b["address"]: b for b in node.status()["backends"] if b["port"] == 8080}
    return [found[address] for address in BACKENDS]


def healthy(node: Node) -> int:
    """How many of them are."""
    return sum(b["healthy"] for b in backends(node))


@pytest.fixture(autouse=True)
def _as_before(node: Node) -> Iterator[None]:
    """Each test finds a stack all of whose backends serve."""
    node.up(web())
    eventually(lambda: healthy(node) == 2)
    yield
    for address in {*BACKENDS} - set(node.backends):
        node.start_backend(address)


@contextlib.contextmanager
def silence(node: Node, address: str) -> Iterator[None]:
    """Nothing reaches this backend, and it answers nothing."""
    rule = f"add rule inet silence input ip daddr {address} drop"
    chain = "add chain inet silence input { type filter hook input priority 0; }"
    node.lab.run("server", "nft", f"add table inet silence; {chain}; {rule}")
    try:
        yield
    finally:
        node.lab.run("server", "nft", "delete table inet silence")


# ---- limits -------------------------------------------------------------------------------------------------------


def test_beyond_max_flows_openers_are_dropped_and_counted_until_a_flow_ends(node: Node) -> None:
    node.up(web(limits={"maxFlows": 3}))
    before = refused(node, "limit_flows")
    with contextlib.ExitStack() as held:
        flows = [held.enter_context(node.connect()) for _ in range(3)]
        served = [ask(flow) for flow in flows]
        with pytest.raises(OSError):
            node.connect(timeout_seconds=0.5)
        assert refused(node, "limit_flows") > before
        assert node.who(VIP6, tries=4), "other listeners are as before"
        assert [ask(flow) for flow in flows] == served
        flows[0].close()
        ask(held.enter_context(node.connect(timeout_seconds=5)))


def test_openers_beyond_the_rate_are_dropped_and_counted_and_get_in_when_they_are_sent_again(node: Node) -> None:
    node.up(web(limits={"newFlowsPerSecond": 4}))
    before = refused(node, "limit_rate")
    with contextlib.ExitStack() as held:
        with inside(node.lab.namespace("client")):
            flows = [held.enter_context(socket.socket()) for _ in range(12)]
        for flow in flows:
            flow.setblocking(False)
            flow.connect_ex((VIP, 80))
        eventually(lambda: refused(node, "limit_rate") > before)
        eventually(lambda: len(select.select([], flows, [], 0)[1]) == len(flows))
        for flow in flows:
            flow.settimeout(3)
            ask(flow)


def test_a_client_with_all_the_flows_that_it_may_have_gets_no_more_and_others_do(node: Node) -> None:
    node.up(web(limits={"maxFlowsPerClient": 2}))
    greedy, modest = node.lab.client_addresses[:2]
    before = refused(node, "limit_client")
    with contextlib.ExitStack() as held:
        flows = [held.enter_context(node.connect(source=(greedy, 0))) for _ in range(2)]
        served = [ask(flow) for flow in flows]
        with pytest.raises(OSError):
            node.connect(source=(greedy, 0), timeout_seconds=0.5)
        assert refused(node, "limit_client") > before
        ask(held.enter_context(node.connect(source=(modest, 0))))
        assert [ask(flow) for flow in flows] == served
        flows[0].close()
        ask(held.enter_context(node.connect(source=(greedy, 0), timeout_seconds=5)))


def syn(source: str, port: int) -> bytes:
    """An IPv4 packet that opens a connection to the listener."""
    ends = ip_address(source).packed + ip_address(VIP).packed
    tcp = struct.pack("!HHIIBBHHH", port, 80, 1, 0, 5 << 4, 2, 64240, 0, 0)
    words = struct.unpack("!18H", tcp[:20] + ends + struct.pack("!HHHH", 0, 6, 20, 0))
    total = sum(words)
    total = (total >> 16) + (total & 0xFFFF)
    check = ~((total >> 16) + total) & 0xFFFF
    # The kernel fills in length and checksum of the IP header.
    return struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + ends + tcp[:16] + struct.pack("!HH", check, 0)


def test_openers_with_a_clients_address_forged_do_not_use_up_what_it_may_have(node: Node) -> None:
    node.up(web(limits={"maxFlows": 2, "maxFlowsPerClient": 2}))
    victim = "10.71.4.200"
    created = sum(b["flowsTotal"] for b in node.status()["backends"])
    with inside(node.lab.namespace("client")):
        forger = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with forger:
        for port in range(20000, 20008):
            forger.sendto(syn(victim, port), (VIP, 0))
    eventually(lambda: sum(b["flowsTotal"] for b in node.status()["backends"]) >= created + 8)
    node.lab.run("client", "ip", "addr", "add", f"{victim}/32", "dev", "lo")
    try:
        with node.connect(source=(victim, 0)) as one, node.connect(source=(victim, 0)) as other:
            assert {ask(one), ask(other)} <= set(BACKENDS)
    finally:
        node.lab.run("client", "ip", "addr", "del", f"{victim}/32", "dev", "lo")


# ---- backends that are lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["Keep", "Reset"])
def test_flows_of_a_backend_that_is_down_are_kept_or_reset_as_chosen(node: Node, choice: str) -> None:
    node.up(web(onBackendDown=choice))
    flows: dict[str, socket.socket] = {}
    with contextlib.ExitStack() as held:
        while len(flows) < 2:
            flow = held.enter_context(node.connect())
            flows.setdefault(ask(flow), flow)
        dead = flows[BACKENDS[1]]
        with silence(node, BACKENDS[1]):
            eventually(lambda: healthy(node) == 1)
            dead.settimeout(5 if choice == "Reset" else 1)
            with pytest.raises(ConnectionResetError if choice == "Reset" else TimeoutError):
                ask(dead)
            assert ask(flows[BACKENDS[0]]) == BACKENDS[0], "others' flows go on"
        eventually(lambda: healthy(node) == 2)
        if choice == "Keep":
            dead.settimeout(10)
            assert ask(dead) == BACKENDS[1], "it was only out of reach"


BOTH = """import socket, sys
door = socket.create_server((sys.argv[1], 9000))
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind((sys.argv[1], 9000))
while True: s.sendto(sys.argv[1].encode(), s.recvfrom(64)[1])
"""
"""Answers by UDP; its health is asked for by TCP."""


def test_a_udp_flow_gets_another_backend_when_its_own_is_down(node: Node) -> None:
    servers = {b: node.lab.start("server", sys.executable, "-S", "-c", BOTH, b) for b in BACKENDS}
    try:
        node.lab.wait_for_listener("server", 9000)
        ends = {"endpoints": [{"address": b, "port": 9000} for b in BACKENDS]}
        udp = {"protocol": "UDP", "port": 90, "backends": ends, "onBackendDown": "Reset"}
        node.up(stack(listeners=[{**listener("echo", VIP, BACKENDS, CHECK), **udp}]))
        with inside(node.lab.namespace("client")):
            flow = socket.socket(type=socket.SOCK_DGRAM)
        with flow:
            flow.settimeout(0.5)
            flow.connect((VIP, 90))

            def who() -> str:
                flow.send(b"who?")
                try:
                    return flow.recv(64).decode()
                except OSError:
                    return ""

            first = eventually(who)
            servers[first].kill()
            assert eventually(lambda: (w := who()) != first and w) in set(BACKENDS) - {first}
    finally:
        for server in servers.values():
            server.kill()
            server.wait()


def test_a_syn_that_is_sent_again_to_a_backend_known_dead_gets_another_one(node: Node) -> None:
    with silence(node, BACKENDS[1]), contextlib.ExitStack() as held:
        with inside(node.lab.namespace("client")):
            flows = [held.enter_context(socket.socket()) for _ in range(8)]
        for flow in flows:
            flow.setblocking(False)
            flow.connect_ex((VIP, 80))
        eventually(lambda: select.select([], flows, [], 0)[1])
        assert len(select.select([], flows, [], 0)[1]) < len(flows), "none went to the dead one"
        eventually(lambda: len(select.select([], flows, [], 0)[1]) == len(flows), timeout_seconds=15)
        for flow in flows:
            flow.settimeout(3)
            assert ask(flow) == BACKENDS[0]


@pytest.mark.parametrize("choice", ["Drop", "Reset"])
def test_a_syn_that_finds_no_backend_is_dropped_or_reset_as_chosen(node: Node, choice: str) -> None:
    node.up(web(onNoBackend=choice))
    for address in BACKENDS:
        node.stop_backend(address)
    eventually(lambda: healthy(node) == 0)

    def connect() -> OSError | None:
        try:
            node.connect(timeout_seconds=0.5).close()
        except OSError as e:
            return e
        return None

    # Refused, by whom? A backend that is known to be gone is asked no more.
    eventually(lambda: isinstance(connect(), ConnectionRefusedError if choice == "Reset" else TimeoutError))
    before = refused(node, "no_backend")
    for _ in range(3):
        assert isinstance(connect(), ConnectionRefusedError if choice == "Reset" else TimeoutError)
    assert (refused(node, "no_backend") == before) == (choice == "Reset"), "what is answered is not dropped"


# ---- slow start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("balancing", "port"), [("Maglev", 81), ("RoundRobin", 82), ("LeastFlows", 83)])
def test_a_backend_that_is_back_gets_few_flows_at_first_and_its_share_in_the_end(
    node: Node, balancing: str, port: int
) -> None:
    def share() -> float:
        return float(backends(node)[1]["share"])

    def dealt(held: contextlib.ExitStack) -> Counter[str]:
        return Counter(ask(held.enter_context(node.connect(port=port))) for _ in range(40))

    # A new listener: its backends have been there from the beginning.
    node.up(web(port=port, balancing=balancing, slowStartSeconds=600))
    node.stop_backend(BACKENDS[1])
    eventually(lambda: healthy(node) == 1)
    with contextlib.ExitStack() as held:
        kept = held.enter_context(node.connect(port=port))
        assert ask(kept) == BACKENDS[0]
        node.start_backend(BACKENDS[1])
        eventually(lambda: healthy(node) == 2)
        eventually(lambda: share() < 1)
        assert share() == pytest.approx(1 / 11, abs=0.001)
        assert "(9% by now)" in node.command("describe", "web").stdout
        assert dealt(held)[BACKENDS[1]] <= 10
        node.up(web(port=port, balancing=balancing, slowStartSeconds=1))
        eventually(lambda: share() == 1)
        assert dealt(held)[BACKENDS[1]] >= 10
        assert ask(kept) == BACKENDS[0], "live flows are not touched"


def test_a_backend_rises_by_itself_and_a_stack_at_rest_writes_nothing(node: Node) -> None:
    few = {"endpoints": [{"address": BACKENDS[0], "port": 8080}]}
    node.up(web(slowStartSeconds=3, backends=few))
    node.up(web(slowStartSeconds=3))
    first, added = backends(node)
    assert first["share"] == 1
    assert added["share"] < 1, "one that was added rises"
    eventually(lambda: backends(node)[1]["share"] == 1)
    generation = node.status()["configurationGeneration"]
    assert generation >= 3
    time.sleep(2.5)  # the agent looks once a second
    assert node.status()["configurationGeneration"] == generation
