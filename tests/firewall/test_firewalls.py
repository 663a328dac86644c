"""Real packets through a node that has the packet filter of another program; the stacks have no uplink."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab.node import BACKENDS, BACKENDS6, VIP, VIP6, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_cli.backend import Wishes
from packetstack_cli.lab import Lab, inside
from packetstack_core import reading

RULES = Path(__file__).with_name("rules")
LOADERS = {".ip": "iptables-restore", ".ip6": "ip6tables-restore", ".nft": "nft -f -"}
NAMES = sorted({path.stem for path in RULES.iterdir()})
OPEN = {"kube-proxy-nftables"}
"""Rule sets that let packets pass anyway."""
SECOND = "192.0.2.20"
ECHO = """
import select, socket
sockets = [socket.socket(f, socket.SOCK_DGRAM) for f in (socket.AF_INET, socket.AF_INET6)]
sockets[1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
for s, address in zip(sockets, ({four!r}, {six!r})):
    s.bind((address, 8081))
while True:
    for s in select.select(sockets, [], [])[0]:
        data, peer = s.recvfrom(2048)
        s.sendto(data, peer)
"""


class Filtered(Node):
    """A node whose rules are somebody's."""

    def nft(self, *words: str) -> str:
        """What `nft` prints."""
        return self.lab.run("node", "nft", *words).stdout

    def load(self, name: str, kinds: tuple[str, ...] = tuple(LOADERS)) -> None:
        """What that program installs."""
        for kind in kinds:
            file = RULES / f"{name}{kind}"
            if file.exists():
                self.restore(LOADERS[kind], file.read_text().replace("WORKLOAD", "dn0"))

    def restore(self, loader: str, text: str) -> None:
        enter = ["nsenter", f"--net={self.lab.netns_path('node')}", "--"]
        subprocess.run([*enter, *loader.split()], input=text, text=True, check=True, capture_output=True)

    def ruleset(self) -> str:
        """Of both kinds of iptables and of nft, without counters."""
        legacy = [self.lab.run("node", f"{name}-legacy-save").stdout for name in ("iptables", "ip6tables")]
        kept = [line.partition(" [")[0] for text in legacy for line in text.splitlines() if not line.startswith("#")]
        return self.nft("-s", "list", "ruleset") + "\n".join(kept)

    def clear(self) -> None:
        """No rule is left, nor a stack; the agent stays."""
        if self.client.alive():
            self.stop()
        self.nft("flush", "ruleset")

    def start(self, *stacks: dict[str, Any], firewall: str = "Manage") -> None:
        """`packetstack up` without an uplink."""
        if self.client.alive():
            self.client.apply([reading.parse(s) for s in stacks], Wishes(firewall=firewall))
        else:
            file = self.lab.directory / "stack.yaml"
            file.write_text("\n---\n".join(json.dumps(s) for s in stacks))
            self.lab.packetstack("up", str(file), "--firewall", firewall)
        eventually(lambda: all(s["status"]["ready"] for s in self.client.call("get")))

    def stop(self) -> None:
        """All stacks end, as by `packetstack down NAME`."""
        for found in self.client.call("get"):
            self.client.call("delete", name=found["metadata"]["name"])

    def tcp(self, address: str = VIP, room: str = "client", timeout_seconds: float = 3) -> bool:
        """Whether a connection is answered."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(self.lab.prefix + "-" + room):
            connection = socket.socket(family, socket.SOCK_STREAM)
        with connection:
            connection.settimeout(timeout_seconds)
            try:
                connection.connect((address, 80))
                return bool(ask(connection))
            except OSError:
                return False

    def udp(self, address: str = VIP, timeout_seconds: float = 3) -> bool:
        """Whether a datagram is answered."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(self.lab.namespace("client")):
            sender = socket.socket(family, socket.SOCK_DGRAM)
        with sender:
            sender.settimeout(timeout_seconds)
            sender.connect((address, 53))
            sender.send(b"who?")
            try:
                return sender.recv(2048) == b"who?"
            except OSError:
                return False

    def passes(self) -> dict[str, bool]:
        """Each of the ways of a client's packets and their answers."""
        return {
            "TCP": self.tcp(VIP),
            "UDP": self.udp(VIP),
            "TCP over IPv6": self.tcp(VIP6),
            "UDP over IPv6": self.udp(VIP6),
        }

    def open(self) -> dict[str, str]:
        """The condition."""
        found: dict[str, str] = next(c for c in self.status()["conditions"] if c["type"] == "FirewallOpen")
        return found

    def preflight(self) -> list[dict[str, str]]:
        """What it says of the packet filter."""
        done = self.command("preflight", "-o", "json")
        return [c for c in json.loads(done.stdout) if "FORWARD" in c["message"] or "packet filter" in c["message"]]


ALL = {"TCP": True, "UDP": True, "TCP over IPv6": True, "UDP over IPv6": True}


def web(name: str = "web", vip: str = VIP, snat: str = "198.51.100.0/31") -> dict[str, Any]:
    """TCP and UDP, over IPv4 and IPv6."""
    listeners = [listener("tcp", vip, BACKENDS[:1])]
    snats = [snat]
    if vip == VIP:
        for number, (address, backend) in enumerate(((VIP, BACKENDS[0]), (VIP6, BACKENDS6[0]))):
            udp = listener(f"udp{number}", address, (backend,), port=53)
            udp["protocol"] = "UDP"
            udp["backends"]["endpoints"][0]["port"] = 8081
            listeners.append(udp)
        listeners.append(listener("tcp6", VIP6, BACKENDS6))
        snats.append("2001:db8:2::/127")
    engine = {"cores": 1, "queuesPerCore": 1, "cpuPolicy": "Shared"}
    return stack(name, replicas=1, listeners=listeners, snat={"addresses": snats}, engine=engine)


@pytest.fixture(scope="module")
def made() -> Iterator[Filtered]:
    with Lab("pkfire") as lab:
        node = Filtered(lab)
        for address in (*BACKENDS, *BACKENDS6):
            node.start_backend(address)
        echo = lab.start("server", sys.executable, "-c", ECHO.format(four=BACKENDS[0], six=BACKENDS6[0]))
        eventually(lambda: lab.run("server", "ss", "-Hltn").stdout.count(":8080") == 3)
        eventually(lambda: lab.run("server", "ss", "-Hlun").stdout.count(":8081") == 2 or echo.poll() is not None)
        yield node


@pytest.fixture
def node(made: Filtered) -> Iterator[Filtered]:
    made.clear()
    yield made
    made.clear()


@pytest.mark.parametrize("name", NAMES)
def test_packets_pass_what_others_install_and_nothing_of_ours_stays(node: Filtered, name: str) -> None:
    node.load(name)
    before = node.ruleset()
    node.start(web())
    assert node.passes() == ALL
    assert node.open()["status"] == "True"
    assert node.ruleset() != before

    # The control: without our rules these do stop packets, and it is said.
    node.start(web(), firewall="Report")
    assert node.ruleset() == before
    stopped = not node.tcp(timeout_seconds=0.5)
    assert stopped == (name not in OPEN)
    # flannel lets pass what comes from pods, so it is not sure for all.
    assert node.open()["status"] == ("True" if not stopped else "Unknown" if name == "flannel" else "False")
    assert bool(node.open()["message"]) == stopped

    node.start(web(), firewall="Manage")
    assert node.tcp()
    node.stop()
    assert node.ruleset() == before


@pytest.mark.parametrize("name", ["docker", "kube-proxy-iptables", "ufw"])
def test_the_same_with_legacy_iptables(node: Filtered, name: str) -> None:
    legacy = {".ip": "iptables-legacy-restore", ".ip6": "ip6tables-legacy-restore"}
    try:
        for kind, loader in legacy.items():
            node.restore(loader, (RULES / f"{name}{kind}").read_text())
        before = node.ruleset()
        node.start(web(), firewall="Report")
        assert not node.tcp(timeout_seconds=0.5)
        assert node.open()["status"] == "False"
        assert "(legacy)" in node.open()["message"]
        node.start(web(), firewall="Manage")
        assert node.passes() == ALL
        assert node.open()["status"] == "True"
        node.stop()
        assert node.ruleset() == before
    finally:
        for loader in legacy.values():
            for table in ("filter", "nat", "raw", "mangle"):
                node.restore(loader, f"*{table}\nCOMMIT\n")
            node.restore(loader, "*filter\n:FORWARD ACCEPT\n:INPUT ACCEPT\nCOMMIT\n")


def test_a_report_names_the_rule_its_owner_the_interface_and_what_helps(node: Filtered) -> None:
    node.load("kube-proxy-iptables")
    node.start(web(), firewall="Report")
    eventually(lambda: node.open()["status"] == "False")
    said = node.open()["message"]
    assert "a rule in chain KUBE-FORWARD of table ip filter drops packets of connections in state INVALID" in said
    assert "(kube-proxy)" in said
    assert "it stops packets that come by dn0, up0" in said
    [four, six] = node.preflight()
    assert four["remedy"].startswith("iptables -I FORWARD -o ps0 -j ACCEPT")
    assert six["remedy"].startswith("ip6tables -I FORWARD -o ps0 -j ACCEPT")
    events = [e["message"] for e in node.client.call("events") if e["reason"] == "FirewallInTheWay"]
    assert any("KUBE-FORWARD" in message for message in events[-2:])
    # Whoever does that has helped.
    for program in ("iptables", "ip6tables"):
        for way in ("-o", "-i"):
            node.lab.run("node", program, "-I", "FORWARD", way, "ps0", "-j", "ACCEPT")
    eventually(lambda: node.open()["status"] == "True")
    assert node.tcp()
    assert "FirewallOpen" in node.reasons()


def test_what_others_flush_is_put_back_and_told(node: Filtered) -> None:
    node.load("docker")
    node.start(web())
    before = node.reasons().count("FirewallRestored")
    with node.connect() as connection:
        first = ask(connection)
        node.nft("flush", "ruleset")
        node.load("docker")
        eventually(lambda: node.reasons().count("FirewallRestored") > before)
        assert ask(connection) == first
    eventually(lambda: node.passes() == ALL)
    before = node.reasons().count("FirewallRestored")
    node.load("firewalld")  # new chains are no theft
    eventually(lambda: node.passes() == ALL)
    assert node.reasons().count("FirewallRestored") == before


def test_rules_that_look_closer_keep_their_say(node: Filtered) -> None:
    node.load("docker")
    node.start(web())
    node.lab.run("node", "iptables", "-A", "FORWARD", "-s", "10.71.1.2", "-p", "tcp", "-j", "REJECT")
    eventually(lambda: not node.tcp(timeout_seconds=0.5))
    assert node.udp()
    listed = node.lab.run("node", "iptables", "-S", "FORWARD").stdout.splitlines()
    assert [line.split()[-1] for line in listed[-3:]] == ["icmp-port-unreachable", "ACCEPT", "ACCEPT"]


ZONES = """
table inet zones {
  chain forward {
    type filter hook forward priority 0; policy drop;
    iifname vmap { "up0" : jump world, "dn0" : jump servers };
  }
  chain world { drop; }
  chain servers { oifname "up0" accept; }
}
"""


def test_what_is_not_opened_since_it_stops_one_interface_is_named(node: Filtered) -> None:
    node.restore("nft -f -", ZONES)
    node.start(web())
    eventually(lambda: node.open()["status"] == "False")
    message = node.open()["message"]
    assert "a rule in chain world of table inet zones drops" in message
    assert "it stops packets that come by up0" in message
    assert not node.tcp(timeout_seconds=0.5)
    node.nft("flush", "chain", "inet", "zones", "world")
    eventually(lambda: node.open()["status"] == "True")
    assert node.passes() == ALL


def test_each_stacks_addresses_leave_with_it(node: Filtered) -> None:
    node.load("docker")
    node.start(web(), web("second", SECOND, "198.51.100.8/31"))

    def addresses() -> str:
        return node.nft("list", "set", "inet", "packetstack", "addresses4")

    assert SECOND in addresses()
    assert node.tcp(SECOND)
    node.client.call("delete", name="second")
    assert SECOND not in addresses()
    assert "198.51.100.8" not in addresses()
    assert "198.51.100.0/31" in addresses()
    assert node.passes() == ALL
    node.start(web("second", SECOND, "198.51.100.8/31"))
    node.client.call("delete", name="web")
    assert node.tcp(SECOND)
    assert "packetstack" in node.lab.run("node", "iptables", "-S", "FORWARD").stdout
    assert "packetstack" not in node.lab.run("node", "ip6tables", "-S", "FORWARD").stdout


def test_another_agent_finds_the_rules_and_a_dead_ones_are_removed(node: Filtered) -> None:
    node.load("docker")
    before = node.ruleset()
    node.start(web())
    assert [c["result"] for c in node.preflight()] == ["ok"]
    ours = node.ruleset()
    node.packetstack("upgrade", "--agent")
    assert node.ruleset() == ours
    assert "FirewallRestored" not in node.reasons()
    assert node.passes() == ALL
    node.start(web(), firewall="Report")
    node.packetstack("upgrade", "--agent")
    assert node.ruleset() == before
    node.start(web(), firewall="Manage")
    pid = node.client.agent_pid()
    subprocess.run(["kill", "-9", str(pid)], check=True)
    node.packetstack("down", "--all", "--yes")
    assert node.ruleset() == before


def test_the_node_itself_is_answered_where_only_established_packets_may_come_in(node: Filtered) -> None:
    node.load("firewalld")
    node.start(web())
    assert node.tcp(VIP, room="node")
    assert node.tcp(VIP6, room="node")


def test_clients_that_the_node_masquerades_are_answered(node: Filtered) -> None:
    for program, clients in (("iptables", "10.71.1.0/24"), ("ip6tables", "fd71:1::/64")):
        node.lab.run("node", program, "-t", "nat", "-A", "POSTROUTING", "-s", clients, "-j", "MASQUERADE")
    for mode in ("Manage", "Report"):
        node.start(web(), firewall=mode)
        assert (mode, node.passes()) == (mode, ALL)


def test_a_table_that_lets_nobody_in_is_named(node: Filtered) -> None:
    enter = ["nsenter", f"--net={node.lab.netns_path('node')}", "--"]
    with subprocess.Popen(
        [*enter, "nft", "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as owner:
        assert owner.stdin
        text = (RULES / "firewalld.nft").read_text().replace("firewalld {", "firewalld {\nflags owner;", 1)
        file = node.lab.directory / "owned.nft"
        file.write_text(text)
        owner.stdin.write(f'include "{file}"\n')
        owner.stdin.flush()
        eventually(lambda: "filter_FWDO_public" in node.nft("list", "ruleset"))
        node.start(web())
        condition = node.open()
        assert condition["status"] == "False"
        assert "table inet firewalld" in condition["message"]
        assert "belongs to a process that lets nobody else add a rule" in condition["message"]
        assert "firewall-cmd" in node.preflight()[0]["remedy"]
        owner.stdin.close()
        owner.wait(10)
    eventually(lambda: node.open()["status"] == "True")
    assert node.tcp()
