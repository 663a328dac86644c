"""All that packets need of their node is taken away from a stack that runs, one by one, and given back: told, and healed."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.lab.node import VIP, Node, ask, stack
from tests.lab.node import listener as a_listener
from tests.waiting import eventually

from packetstack_agent.node import RunDirectory
from packetstack_cli.lab import inside
from packetstack_core.preconditions import Precondition

FALSE_ALARMS = {"RoutesFailed", "EngineHung", "Failed", "InternalError", "PathBroken"}


@dataclass(frozen=True)
class Case:
    """Commands for the node's namespace, with the names of things in braces."""

    of: Precondition
    take: str
    told: str
    """The event, and"""
    says: str
    """what is in it."""
    give: str = ""
    """Empty: the agent puts it back itself."""
    place: str = "node"
    """Or `engine`: its namespace; or `machine`."""

    def __str__(self) -> str:
        return self.take


P = Precondition
RESTORED = "PathRestored"
KEPT = [
    Case(P.PAIR, "ip link set ps0 down", RESTORED, "ps0 was down, and is as it was made again"),
    Case(P.PAIR, "ip link set ps1 down", RESTORED, "ps1 was down"),
    Case(P.PAIR, "ip link set ps1 name foo1", RESTORED, "ps1 was called foo1"),
    Case(P.PAIR, "ip link set ps0 name foo0", RESTORED, "ps0 was called foo0"),
    Case(P.PAIR, "ip link set ps0 mtu 1400", RESTORED, "ps0 had an MTU of 1400"),
    Case(P.PAIR, "ip link set ps0 arp on", RESTORED, "ps0 had ARP on"),
    Case(P.PAIR, "ip link del ps0", "DirectorAttached", "ps0, ps1"),
    Case(P.PAIR, "sysctl -qw net.ipv4.conf.ps0.forwarding=0", RESTORED, "net.ipv4.conf.ps0.forwarding was 0"),
    Case(P.PAIR, "sysctl -qw net.ipv6.conf.ps0.disable_ipv6=1", RESTORED, "disable_ipv6 was 1"),
    Case(P.PAIR_OFFLOADS, "ethtool -K ps0 tx on gro on", RESTORED, "ps0 had gro, tx on"),
    Case(P.PAIR_OFFLOADS, "ethtool -K ps1 gro on", RESTORED, "ps1 had gro on"),
    Case(P.DIRECTOR, "tc qdisc del dev ps0 clsact", "DirectorAttached", "on ps0"),
    Case(P.DIRECTOR, "bpftool link detach id {link routed}", "DirectorAttached", "on ps1"),
    Case(P.DIRECTOR, "bpftool link detach id {link uplink_up0}", "DirectorAttached", "on up0"),
    Case(P.ROUTES, "ip route flush proto 112", "RoutesRestored", "were missing and are there again"),
    Case(P.HOST_END, "ip link set {pe} down", RESTORED, "engine {slot}: {pe} was down"),
    Case(P.HOST_END, "ip link set {pe} name foo2", RESTORED, "engine {slot}: {pe} was called foo2"),
    Case(P.HOST_END, "ip link set {pe} mtu 1300", RESTORED, "engine {slot}: {pe} had an MTU of 1300"),
    Case(P.HOST_END, "ip link set {pe} address 02:00:00:00:00:77", RESTORED, "{pe} had the MAC 02:00:00:00:00:77"),
    Case(P.HOST_END, "ethtool -K {pe} gro on", RESTORED, "{pe} had gro on"),
    Case(P.HOST_END, "sh -c 'ip link add bridge7 type bridge; ip link set {pe} master bridge7'", RESTORED, "{pe} was made a port"),
    Case(P.HOST_PROGRAM, "tc qdisc del dev {pe} clsact", RESTORED, "engine {slot}: the program on {pe} (tc filter) was gone"),
    Case(P.HOST_PROGRAM, "tc filter del dev {pe} ingress", RESTORED, "engine {slot}: the program on {pe} (tc filter) was gone"),
    Case(P.ENGINE_END, "ip link set eth0 down", RESTORED, "engine {slot}: eth0 was down", place="engine"),
    Case(P.ENGINE_END, "ip link set eth0 mtu 1300", RESTORED, "engine {slot}: eth0 had an MTU of 1300", place="engine"),
    Case(P.ENGINE_END, "ip link set eth0 name foo3", RESTORED, "engine {slot}: eth0 was called foo3", place="engine"),
    Case(P.ENGINE_END, "bpftool link detach id {link e{slot}}", RESTORED, "engine {slot}: the XDP program on its eth0 was gone"),
    Case(P.ENGINE_LINK, "ip link del {pe}", "EngineLost", "engine {slot}: interface {pe} is gone"),
    Case(P.ENGINE_LINK, "ip link set eth0 netns {node}", "EngineLost", "engine {slot}: its interface eth0 is gone from its namespace", place="engine"),
    Case(P.NAMESPACE, "ip netns delete {namespace}", RESTORED, "engine {slot}: its network namespace had lost its name", place="machine"),
]  # fmt: skip
TOLD = [
    Case(P.FORWARDING, "sysctl -qw net.ipv4.ip_forward=0", "ForwardingOff", "net.ipv4.ip_forward: is 0", "sysctl -qw net.ipv4.ip_forward=1"),
    Case(P.FORWARDING, "sysctl -qw net.ipv6.conf.all.forwarding=0", "ForwardingOff", "net.ipv6.conf.all.forwarding: is 0", "sysctl -qw net.ipv6.conf.all.forwarding=1"),
    Case(P.DEVICE_FORWARDING, "sysctl -qw net.ipv4.conf.dn0.forwarding=0", "ForwardingOff", "net.ipv4.conf.dn0.forwarding: is 0", "sysctl -qw net.ipv4.conf.dn0.forwarding=1"),
    Case(P.ADDRESSES, "ip address add 192.0.2.10/32 dev lo", "AddressTaken", "address 192.0.2.10: is in use by this node on lo", "ip address del 192.0.2.10/32 dev lo"),
    Case(P.ADDRESSES, "ip address add 2001:db8:1::10/128 dev lo", "AddressTaken", "address 2001:db8:1::10: is in use", "ip address del 2001:db8:1::10/128 dev lo"),
    Case(P.HOST_ADDRESSES, "ip address add 198.51.100.7/29 dev up0", "AddressTaken", "address 198.51.100.0: is the network address of 198.51.100.0/29 on up0", "ip address del 198.51.100.7/29 dev up0"),
]  # fmt: skip
ELSEWHERE = {
    P.UPLINK: "below",
    P.FIREWALL: "tests/firewall",
    P.KERNEL: "test_surroundings.py",
}


def test_each_precondition_is_taken_away_by_a_test() -> None:
    assert {case.of for case in KEPT + TOLD} | ELSEWHERE.keys() == set(Precondition)


def fill(node: Node, text: str) -> str:
    """With what the braces stand for."""
    slot = node.status()["engines"][0]["slot"]
    namespace = RunDirectory(node.lab.run_directory).namespace("web", slot)
    text = (
        text.replace("{slot}", str(slot))
        .replace("{pe}", f"pe{slot}")
        .replace("{namespace}", namespace)
        .replace("{node}", node.lab.namespace("node"))
    )
    if "{link " in text:
        pin = text.partition("{link ")[2].partition("}")[0]
        path = node.lab.run_directory / f"bpf/link_{pin}"
        shown = node.lab.run("node", "bpftool", "-j", "link", "show", "pinned", str(path)).stdout
        text = text.replace(f"{{link {pin}}}", str(json.loads(shown)["id"]))
    return text


def run(node: Node, case: Case, command: str) -> None:
    words: list[str] = ["sh", "-c", command]
    if case.place == "engine":
        slot = node.status()["engines"][0]["slot"]
        words = ["nsenter", f"--net=/run/netns/{RunDirectory(node.lab.run_directory).namespace('web', slot)}", *words]
    node.lab.run("node", *words, check=case.place != "engine")  # whoever is in a namespace that ends may be killed


def events(node: Node) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.client.call("events")
    return found


def told(node: Node, reason: str, says: str) -> int:
    """How often."""
    return sum(e["count"] for e in events(node) if e["reason"] == reason and says in e["message"])


def condition(node: Node, kind: str) -> tuple[str, str]:
    one = next(c for c in node.status()["conditions"] if c["type"] == kind)
    return one["status"], one["reason"]


def answers(node: Node, place: Callable[[], socket.socket]) -> bool:
    """Whether a new connection is answered."""
    try:
        with place() as connection:
            return bool(ask(connection))
    except OSError:
        return False


def on_the_node(node: Node) -> socket.socket:
    """A connection of a program of the node's own."""
    with inside(node.lab.namespace("node")):
        return socket.create_connection((VIP, 80), timeout=1)


def passes(node: Node, held: socket.socket) -> bool:
    """Whether all kinds of traffic do: a connection that was there, new ones, of IPv6, and of the node itself."""
    ways: tuple[Callable[[], socket.socket], ...] = (
        lambda: node.connect(timeout_seconds=1), lambda: node.connect("2001:db8:1::10", timeout_seconds=1), lambda: on_the_node(node)
    )  # fmt: skip
    return bool(ask(held)) and all(answers(node, way) for way in ways)


def false_alarms(node: Node) -> list[str]:
    return [e["message"] for e in events(node) if e["reason"] in FALSE_ALARMS]


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_what_the_agent_has_made_is_put_back_and_told(node: Node, served: socket.socket, case: Case) -> None:
    says, take = fill(node, case.says), fill(node, case.take)
    before, pids = told(node, case.told, says), [e["pid"] for e in node.status()["engines"]]
    run(node, case, take)
    eventually(
        lambda: told(node, case.told, says) > before, what=f"{case.told} for {take}; events: {events(node)[-3:]}"
    )
    eventually(lambda: passes(node, served), what=f"traffic after {take}")
    assert not false_alarms(node)
    if case.of is not P.ENGINE_LINK:
        assert [e["pid"] for e in node.status()["engines"]] == pids
    assert condition(node, "Available")[0] == "True"


@pytest.mark.parametrize("case", TOLD, ids=str)
def test_what_is_the_administrators_is_told_until_it_is_as_needed(
    node: Node, served: socket.socket, case: Case
) -> None:
    before, opened = told(node, case.told, case.says), told(node, "PathOpen", "as packets need it again")
    run(node, case, case.take)
    eventually(lambda: told(node, case.told, case.says) > before)
    assert condition(node, "Available") == ("False", case.told)
    assert condition(node, "Degraded") == ("True", case.told)
    run(node, case, case.give)
    eventually(lambda: told(node, "PathOpen", "as packets need it again") > opened)
    eventually(lambda: condition(node, "Available")[0] == "True")
    assert condition(node, "Degraded")[0] == "False"
    eventually(lambda: passes(node, served))
    assert not false_alarms(node)


def uplinks(node: Node) -> list[str]:
    """Of the record."""
    found: list[str] = json.loads((node.lab.run_directory / "state.json").read_text())["uplinks"]
    return found


@pytest.fixture
def wan0(node: Node, served: socket.socket) -> Iterator[None]:
    """The uplink, renamed while packets flow."""
    node.lab.run("node", "ip", "link", "set", "up0", "name", "wan0")
    yield
    node.lab.run("node", "ip", "link", "set", "wan0", "name", "up0")
    eventually(lambda: uplinks(node) == ["up0"])


@pytest.mark.usefixtures("wan0")
def test_an_uplink_that_gets_another_name_is_followed(node: Node, served: socket.socket) -> None:
    node.up(stack(), uplink="wan0")  # at once, whether the agent has seen it or not
    assert told(node, "UplinkRenamed", "uplink up0 is called wan0 now") == 1
    assert uplinks(node) == ["wan0"]
    assert passes(node, served)
    node.packetstack("upgrade", "--agent")
    assert uplinks(node) == ["wan0"]
    assert passes(node, served)
    assert not false_alarms(node)


def test_an_uplink_that_is_gone_is_told_and_used_again_when_it_is_there(node: Node, served: socket.socket) -> None:
    for command in ("link add spare0 type veth peer name spare1", "link set spare0 up"):
        node.lab.run("node", "ip", *command.split())
    node.up(stack(), uplink="spare0")
    node.lab.run("node", "ip", "link", "del", "spare0")
    eventually(lambda: told(node, "UplinkFailed", "uplink spare0: is gone"))
    assert passes(node, served)
    again = told(node, "DirectorAttached", "on spare0")
    node.lab.run("node", "ip", "link", "add", "spare0", "type", "veth", "peer", "name", "spare1")
    eventually(lambda: told(node, "DirectorAttached", "on spare0") > again)
    node.lab.run("node", "ip", "link", "del", "spare0")


def test_an_engine_whose_namespace_lost_its_name_is_started_again_and_upgraded(
    node: Node, served: socket.socket
) -> None:
    engine = node.status()["engines"][0]
    node.lab.run(
        "node", "sh", "-c", f"ip netns delete {engine['namespace']}; kill -9 {engine['initPid']} {engine['pid']}"
    )
    eventually(lambda: node.status()["engines"][0]["pid"] not in (0, engine["pid"]))
    node.packetstack("upgrade", f"web-{engine['slot']}")
    assert passes(node, served)
    assert not false_alarms(node)


def test_an_agent_that_starts_finds_what_was_taken_away_while_there_was_none(node: Node, served: socket.socket) -> None:
    slot, namespace = (node.status()["engines"][0][field] for field in ("slot", "namespace"))
    pid = int((node.lab.run_directory / "agent.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    for command in (
        f"ip netns delete {namespace}",
        f"ip link set pe{slot} down",
        "ip link set ps1 name foo1",
        "ip link set ps0 name foo0",
    ):
        node.lab.run("node", "sh", "-c", command)
    node.packetstack("upgrade", "--agent")
    eventually(lambda: passes(node, served))
    assert node.status()["engines"][0]["slot"] == slot
    assert {"EngineLost", "RoutesFailed"}.isdisjoint(node.reasons())
    for said in ("ps1 was called foo1", "ps0 was called foo0", f"engine {slot}: pe{slot} was down"):
        assert told(node, RESTORED, said) == 1, said


def test_a_stack_that_lacks_something_may_still_be_changed(node: Node, served: socket.socket) -> None:
    node.lab.run("node", "ip", "address", "add", "198.51.100.7/29", "dev", "up0")
    try:
        eventually(lambda: condition(node, "Available") == ("False", "AddressTaken"))
        node.up(stack(snat={"addresses": ["198.51.100.0/31", "198.51.100.16/31", "2001:db8:2::/127"]}))
        wanted = stack(snat={"addresses": ["198.51.100.0/31", "198.51.100.7/32", "2001:db8:2::/127"]})
        (node.lab.directory / "other.yaml").write_text(json.dumps(wanted))
        assert "198.51.100.7: is in use" in node.refused("up", str(node.lab.directory / "other.yaml"))
    finally:
        node.lab.run("node", "ip", "address", "del", "198.51.100.7/29", "dev", "up0")


@pytest.mark.parametrize(
    ("listener", "snat", "address"),
    [("10.71.1.255", "198.51.100.8/31", "10.71.1.255: is the broadcast address of 10.71.1.0/24 on up0"),
     ("10.71.1.0", "198.51.100.8/31", "10.71.1.0: is the network address"),
     ("192.0.2.11", "10.71.1.252/30", "10.71.1.255: is the broadcast address")],
)  # fmt: skip
def test_addresses_that_no_host_can_have_are_refused(node: Node, listener: str, snat: str, address: str) -> None:
    wanted = stack("other", snat={"addresses": [snat]}, listeners=[a_listener("a", listener, ("10.71.5.1",))])
    file = node.lab.directory / "other.yaml"
    file.write_text(json.dumps(wanted))
    assert node.refused("up", str(file)).startswith(f"address {address}")
