"""T18: round trips in a closed loop and bulk TCP by ordinary sockets, beside nftables, haproxy and a direct route.

The lab's links have all offloads off, for every subject: a packet is a packet. Client, server and what is between
share the machine's CPUs.
"""

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import path
from path import BACKENDS, MESON, NFTABLES, ROUTING, VIP, Subject
from rows import Row, Unavailable, yes

HAPROXY = "haproxy, TCP, one thread"
PROXY = """
global
    nbthread 1
    maxconn 1000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen web
    bind {vip}:80
    balance roundrobin
{servers}
"""
GOALS = {NFTABLES: 1.3, HAPROXY: 0.6, ROUTING: 1.25}


def haproxy(room: ExitStack) -> Subject:
    """A proxy in the node: two connections instead of one."""
    lab = path.quiet_lab(room, "haproxy")
    lab.run("node", "ip", "addr", "add", f"{VIP}/32", "dev", "lo")
    servers = "\n".join(f"    server s{n} 10.71.5.{n}:8080" for n in range(1, BACKENDS + 1))
    file = lab.directory / "haproxy.cfg"
    file.write_text(PROXY.format(vip=VIP, servers=servers))
    process = lab.start("node", "haproxy", "-db", "-f", str(file), stderr=subprocess.DEVNULL)
    lab.wait_for_listener("node", 80, server=process)
    return Subject(lab)


def measured(subject: Subject, words: tuple[str, ...]) -> dict[str, float]:
    """Figures of one run of bench/streams.c in the client."""
    return path.figures(subject.lab.run("client", str(MESON / "bench/bench_streams"), *words).stdout)


def streams(quick: bool) -> Iterator[Row]:
    """One of each in each round: TCP and UDP round trips of 64 bytes, a transfer over one connection and over four."""
    rounds, seconds = (1, "0.3") if quick else (5, "1")
    subprocess.run(["ninja", "--quiet", "-C", str(MESON), "bench/bench_streams"], check=True)
    with path.subjects() as all_, ExitStack() as room:
        if shutil.which("haproxy"):
            all_[HAPROXY] = haproxy(room)
        for subject in all_.values():
            # A plain route leads to the virtual address itself; elsewhere it is nobody's in the server.
            direct = subject is all_[ROUTING]
            if direct:
                subject.lab.run("server", "ip", "addr", "add", f"{VIP}/32", "dev", "lo")
            addresses = [VIP] if direct else [f"10.71.5.{n}" for n in range(1, BACKENDS + 1)]
            ports = ("80", "53") if direct else ("8080", "8081")
            serving = subject.lab.start("server", str(MESON / "bench/bench_streams"), "serve", *ports, *addresses)
            subject.lab.wait_for_listener("server", int(ports[0]), server=serving)
        kinds = {
            "tcp": ("tcp", f"{VIP}:80", seconds),
            "udp": ("udp", f"{VIP}:53", seconds),
            "bulk1": ("bulk", f"{VIP}:80", seconds, "1"),
            "bulk4": ("bulk", f"{VIP}:80", seconds, "4"),
        }
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        for kind, words in kinds.items():
            some = {n: s for n, s in all_.items() if (kind, n) != ("udp", HAPROXY)}
            found[kind] = path.interleaved(some, partial(measured, words=words), rounds)
    yield from rows(found)
    if HAPROXY not in all_:
        raise Unavailable("the rows beside haproxy: it is not installed")


def rows(found: dict[str, dict[str, list[dict[str, float]]]]) -> Iterator[Row]:
    """Of measurement, subject and round: what stands beside what."""

    def values(kind: str, name: str) -> dict[str, list[float]]:
        return {subject: [one[name] for one in each] for subject, each in found[kind].items()}

    for kind in ("tcp", "udp"):
        for peer in (NFTABLES, HAPROXY, ROUTING):
            if peer not in found[kind]:
                continue
            for name in ("p50", "p99"):
                goal = GOALS[peer] if name == "p50" else None
                what = f"{kind.upper()} round trip of 64 bytes in a closed loop, {name}"
                yield path.beside("T18", what, "us", values(kind, f"{name}_us"), "PacketStack", peer, goal, fewer=True)
    for kind, connections in (("bulk1", "one connection"), ("bulk4", "four connections")):
        for peer in (NFTABLES, HAPROXY, ROUTING):
            if peer in found[kind]:
                goal = 0.8 if peer == NFTABLES else None
                what = f"bulk TCP without offloads, {connections}"
                yield path.beside("T18", what, "Gbit/s", values(kind, "gbit_s"), "PacketStack", peer, goal)
    again = values("bulk4", "retransmitted")
    own = statistics.median(again["PacketStack"])
    yield Row("T18", "segments sent again in a bulk transfer, four connections", own, "", NFTABLES,
              statistics.median(again[NFTABLES]), goal="0", met=yes(own == 0))  # fmt: skip
