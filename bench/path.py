"""T5b, T14: the whole path - uplink, director, engine, out - beside nftables and plain routing, over the same links.

Each subject has a lab of its own; all are up at once and one at a time carries traffic. A round takes each subject
once, and a ratio is taken inside a round: the machine's speed changes from one second to the next.
"""

import itertools
import json
import os
import socket
import statistics
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from packetstack_cli.backend import not_ready
from packetstack_cli.client import Client
from packetstack_cli.lab import Lab, LabError, inside
from rows import Row, Unavailable, yes

MESON = Path(__file__).resolve().parents[1] / "build" / "meson"
VIP, CLIENTS = "192.0.2.10", "10.128.0.0/9"
SNATS = "198.51.100.0/29"
BACKENDS = 8
FLOWS = {"1k": 1 << 10, "100k": 1 << 17, "1M": 1 << 20}
GENERATOR_CPU, OTHER_CPU = 0, 1
KNOWN_PASSES, KNOWN_SECONDS = 6, 4.5
"""Round trips of a UDP flow, and the time that they must take, until it is known: see PS_UDP_ASSURED_TICKS."""
NFTABLES, ROUTING = "nftables, DNAT by hash, SNAT, conntrack", "plain routing"
CONNTRACK_MAX = Path("/proc/sys/net/netfilter/nf_conntrack_max")
RULES = """
table ip peer {{
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        ip daddr {vip} udp dport 53 dnat to jhash ip saddr . udp sport mod {n} map {{ {places} }}:8081
        ip daddr {vip} tcp dport 80 dnat to jhash ip saddr . tcp sport mod {n} map {{ {places} }}:8080
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        oifname "dn0" snat to 198.51.100.0-198.51.100.7
    }}
}}
"""

S = TypeVar("S")
V = TypeVar("V")


@dataclass
class Subject:
    """What stands between client and server in one lab."""

    lab: Lab
    passes: tuple[str, ...] = ()
    """Devices of the node on which no XDP program is."""
    engine: int = 0
    """Process that moves the packets, if it is one; 0: the kernel does."""
    connections: Iterator[int] = field(default_factory=lambda: itertools.count(0, 1 << 19))
    """Where the next slice's numbers begin, so that no connection comes twice soon."""

    def place(self, one_cpu: bool) -> None:
        """Receiving and the generator are on one CPU; the rest is there, too, or on the other one."""
        cpu = GENERATOR_CPU if one_cpu else OTHER_CPU
        if self.engine:
            for task in Path(f"/proc/{self.engine}/task").iterdir():
                os.sched_setaffinity(int(task.name), {cpu})
            return
        for device in ("up0", "dn0"):
            queue = f"/sys/class/net/{device}/queues/rx-0/rps_cpus"
            mask = "0" if one_cpu else f"{1 << OTHER_CPU:x}"
            words = ["ip", "netns", "exec", self.lab.namespace("node"), "sh", "-c", f"echo {mask} > {queue}"]
            subprocess.run(words, check=True, capture_output=True)  # a mount of /sys that shows this namespace

    def slice(self, *words: str, one_cpu: bool, seconds: float) -> dict[str, float]:
        """Figures of one run of bench/path.c, by name."""
        self.place(one_cpu)
        command = [str(MESON / "bench/bench_path"), "--object", str(MESON / "bench/bench_path.bpf.o")]
        command += ["--prefix", self.lab.prefix, "--cpu", str(GENERATOR_CPU), "--seconds", f"{seconds:g}", *words]
        command += ["--nice", "19" if one_cpu else "0"]
        command += ["--pass", ",".join(self.passes)] if self.passes else []
        return figures(subprocess.run(command, check=True, capture_output=True, text=True, timeout=150).stdout)

    def open(self, flows: int) -> None:
        """Opens flows. Those of an engine become known to it: under load, strangers are shed before known flows."""
        if self.engine:
            words = ["--target", f"{VIP}:53", "--flows", str(flows), "--warm", str(KNOWN_PASSES)]
            self.slice(*words, "--warm-seconds", f"{KNOWN_SECONDS:g}", one_cpu=False, seconds=0.01)

    def forward(self, flows: int, one_cpu: bool, seconds: float) -> float:
        """Thousand datagrams a second of open flows that reach the server, more being sent than can."""
        found = self.slice("--target", f"{VIP}:53", "--flows", str(flows), one_cpu=one_cpu, seconds=seconds)
        if found["answered_percent"] < 98:
            raise Unavailable(f"{self.lab.prefix}: only {found['answered_percent']} % of {flows:,} flows were answered")
        return found["arrived_kpps"]

    def connect(self, seconds: float) -> float:
        """Thousand connections a second, opened and closed, 256 of them under way."""
        words = ["--target", f"{VIP}:80", "--connections", "--first", str(next(self.connections))]
        return self.slice(*words, one_cpu=False, seconds=seconds)["ended_k"]


def figures(text: str) -> dict[str, float]:
    """Lines of NAME VALUE."""
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def interleaved(
    subjects: dict[str, S], measure: Callable[[S], V], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[V]]:
    """Each subject once in each round, in an order that turns, so that none always follows the same one."""
    found: dict[str, list[V]] = {name: [] for name in subjects}
    names = list(subjects)
    for turn in range(rounds):
        for at in range(len(names)):
            name = names[(turn + at) % len(names)]
            found[name].append(measure(subjects[name]))
            between()
    return found


def beside(
    target: str,
    name: str,
    unit: str,
    found: dict[str, list[float]],
    own: str,
    peer: str,
    goal: float | None = None,
    *,
    fewer: bool = False,
) -> Row:
    """One figure beside a peer's of the same rounds. The ratio is the median of the rounds', its range in the name.

    `goal`: what the ratio should be at least, or at most where `fewer` is better.
    """
    ratios = [a / b for a, b in zip(found[own], found[peer], strict=True)]
    ratio = statistics.median(ratios)
    n = len(ratios)
    what = f"{name}; {n} round{'s' * (n > 1)}, ratio in a round {min(ratios):.2f}..{max(ratios):.2f}"
    wished = "" if goal is None else f"{'<=' if fewer else '>='} {goal:g}x"
    met = "" if goal is None else yes(ratio <= goal if fewer else ratio >= goal)
    value, other = (round(statistics.median(found[subject]), 2) for subject in (own, peer))
    return Row(target, what, value, unit, peer, other, round(ratio, 2), wished, met)


def stack() -> dict[str, object]:
    """One engine of one core and four queues; a UDP and a TCP listener."""

    def listener(name: str, protocol: str, port: int, to: int) -> dict[str, object]:
        endpoints = [{"address": f"10.71.5.{n}", "port": to} for n in range(1, BACKENDS + 1)]
        return {"name": name, "address": VIP, "protocol": protocol, "port": port, "healthCheck": {"type": "None"},
                "backends": {"endpoints": endpoints}}  # fmt: skip

    spec = {
        "replicas": 1,
        "engine": {"cores": 1, "queuesPerCore": 4, "cpuPolicy": "Shared"},
        "rebalance": {"mode": "Off"},
        "listeners": [listener("udp", "UDP", 53, 8081), listener("tcp", "TCP", 80, 8080)],
        "snat": {"addresses": [SNATS]},
        "flowTable": {"maxFlows": 2 << 20},
    }
    return {
        "apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "metadata": {"name": "path"}, "spec": spec,
    }  # fmt: skip


def quiet_lab(room: ExitStack, name: str) -> Lab:
    """A lab whose kernels send nothing by themselves: one such frame on another CPU takes a link's polling there."""
    lab = room.enter_context(Lab(f"pkb-path-{name}", server_addresses=BACKENDS))
    lab.run("node", "ip", "route", "replace", CLIENTS, "via", "10.71.1.2")
    for place in ("client", "server"):
        lab.sysctl(place, {"net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.default.disable_ipv6": "1"})
    return lab


def packetstack(room: ExitStack) -> Subject:
    """The real product, director on both links."""
    lab = quiet_lab(room, "own")
    file = lab.directory / "path.yaml"
    file.write_text(json.dumps(stack()))
    lab.packetstack("up", str(file), "--uplink", "up0", "--uplink", "dn0")
    room.callback(lab.packetstack, "down", "--yes", check=False)
    client = Client(lab.run_directory)
    for item in client.wait(["path"], 30):
        raise Unavailable(not_ready(item, 30))
    return Subject(lab, engine=client.get("path")[0]["status"]["engines"][0]["pid"])


def nftables(room: ExitStack) -> Subject:
    """The same translation by the kernel."""
    lab = quiet_lab(room, "nft")
    places = ", ".join(f"{i} : 10.71.5.{i + 1}" for i in range(BACKENDS))
    file = lab.directory / "peer.nft"
    file.write_text(RULES.format(vip=VIP, n=BACKENDS, places=places))
    lab.run("node", "nft", "-f", str(file))
    timeouts = {"udp_timeout": 600, "udp_timeout_stream": 600, "tcp_timeout_time_wait": 1, "tcp_timeout_last_ack": 1}
    lab.sysctl("node", {f"net.netfilter.nf_conntrack_{name}": str(value) for name, value in timeouts.items()})
    return Subject(lab, passes=("up0", "dn0"))


def routing(room: ExitStack) -> Subject:
    """The virtual address is the server's: forwarding and nothing else."""
    lab = quiet_lab(room, "route")
    lab.run("node", "ip", "route", "replace", f"{VIP}/32", "via", "10.71.2.2")
    return Subject(lab, passes=("up0", "dn0"))


def forget_connections(subject: Subject) -> None:
    """Empties the connection tracking table of a lab's node: what a slice has left must not fill the next one's."""
    with inside(subject.lab.namespace("node")), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        # struct nlmsghdr of IPCTNL_MSG_CT_DELETE with NLM_F_REQUEST | NLM_F_ACK, struct nfgenmsg for both families
        netlink.send(struct.pack("=IHHII", 20, 1 << 8 | 2, 1 | 4, 1, 0) + bytes(4))
        if error := struct.unpack_from("=i", netlink.recv(4096), 16)[0]:
            raise LabError(f"connection tracking: cannot be emptied: {os.strerror(-error)}")


@contextmanager
def subjects() -> Iterator[dict[str, Subject]]:
    """All of them, each in its lab."""
    if os.geteuid():
        raise Unavailable("needs root: it makes network namespaces")
    if (os.cpu_count() or 1) < 2:
        raise Unavailable("needs two CPUs")
    for target in ("bench/bench_path", "bench/bench_path.bpf.o"):
        subprocess.run(["ninja", "--quiet", "-C", str(MESON), target], check=True)
    with ExitStack() as room:
        made = {"PacketStack": packetstack(room), NFTABLES: nftables(room), ROUTING: routing(room)}
        try:
            yield made
        except subprocess.CalledProcessError as e:
            raise Unavailable(f"{e.cmd[0]}: {e.stderr.strip() or e.returncode}") from e


def path(quick: bool) -> Iterator[Row]:
    """T5b: datagrams of flows that are open, client to server, more of them than any subject can forward."""
    rounds, seconds = (1, 0.5) if quick else (5, 1.0)
    tracked = int(CONNTRACK_MAX.read_text()) if CONNTRACK_MAX.exists() else 0
    goals = {("1k", False): 1.6, ("100k", False): 1.7, ("1M", False): 3.0, ("1k", True): 0.8}
    with subjects() as all_:
        for (size, one_cpu), least in goals.items():
            flows = FLOWS[size]
            some = {n: s for n, s in all_.items() if n != NFTABLES or flows < tracked}
            for subject in some.values():
                subject.open(flows)
            measure = partial(Subject.forward, flows=flows, one_cpu=one_cpu, seconds=seconds)
            found = interleaved(some, measure, rounds)
            forget_connections(all_[NFTABLES])
            name = f"whole path, {size} flows, {'all on one CPU' if one_cpu else 'two CPUs'}"
            if NFTABLES in some:
                yield beside("T5b", name, "kpps", found, "PacketStack", NFTABLES, least)
            else:
                print(f"T5b {size}: nftables: not measured: nf_conntrack_max of this machine is {tracked:,}")
            yield beside("T5b", name, "kpps", found, "PacketStack", ROUTING)


def connections(quick: bool) -> Iterator[Row]:
    """T14: TCP connections opened and closed, 256 at a time."""
    rounds, seconds = (1, 0.5) if quick else (5, 1.0)
    with subjects() as all_:
        found = interleaved(
            all_, lambda s: s.connect(seconds), rounds, between=lambda: forget_connections(all_[NFTABLES])
        )
        name = "new connections, two CPUs"
        yield beside("T14", name, "thousand/s", found, "PacketStack", NFTABLES, 1.2)
        yield beside("T14", name, "thousand/s", found, "PacketStack", ROUTING)
