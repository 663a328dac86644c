"""The generator must see what goes wrong: a test that cannot fail proves nothing."""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packetstack_cli.lab import Lab
from packetstack_cli.traffic import Servers, Traffic
from packetstack_core.abi import native

PORTS = itertools.count(7000)
WRONG_SERVER = Path(__file__).with_name("wrong_server.py")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("pkl-traffic") as made:
        yield made


@pytest.fixture
def servers(lab: Lab) -> Iterator[Servers]:
    running = Servers(lab)
    yield running
    running.stop()


@pytest.fixture
def rules(lab: Lab) -> Iterator[Any]:
    """A function that loads nftables rules into the node; they go with the test."""

    def load(*lines: str) -> None:
        lab.run("node", "nft", "add table inet t; " + "; ".join(lines))

    yield load
    lab.run("node", "nft", "flush ruleset")


def run_against(lab: Lab, how: str, **options: Any) -> Any:
    """A second of traffic to a server that misbehaves."""
    udp = how in ("swap", "twice", "other-flow")
    port = next(PORTS)
    server = lab.start("server", sys.executable, str(WRONG_SERVER), how, "10.71.5.1", str(port))
    if udp:
        deadline = time.monotonic() + 10
        while f":{port}" not in lab.run("server", "ss", "-Hlun").stdout:
            assert time.monotonic() < deadline
    else:
        lab.wait_for_listener("server", port, server=server)
    targets = [f"10.71.5.1:{port}"]
    wanted: dict[str, Any] = {"connections": 0, "udp_flows": 10, "udp_interval_ms": 50} if udp else {"connections": 10}
    traffic = Traffic(
        lab,
        [] if udp else targets,
        targets if udp else [],
        **{"request_interval_ms": 50, "ramp_seconds": 0.1, "timeout_seconds": 1, **wanted, **options},
    )
    wait_for_requests(traffic, 0.8)
    outcome = traffic.stop()
    server.terminate()
    server.wait()
    return outcome


def wait_for_requests(traffic: Traffic, seconds: float) -> None:
    """Until the generator has run for that long by its own clock."""
    while traffic.latest.get("elapsed", 0) < seconds:
        assert traffic.running
        time.sleep(0.02)


def test_good_servers_break_nothing_by_either_family(lab: Lab, servers: Servers) -> None:
    targets = ["10.71.5.1:8080", "[fd71:5::2]:8080"]
    udp_targets = ["10.71.5.3:8081", "[fd71:5::4]:8081"]
    traffic = Traffic(
        lab,
        targets,
        udp_targets,
        connections=400,
        udp_flows=100,
        request_interval_ms=200,
        new_rate=100,
        ramp_seconds=0.3,
    )
    traffic.wait_open()
    assert traffic.latest["open"] == 400
    wait_for_requests(traffic, 1.5)
    outcome = traffic.stop()
    assert outcome.broken == 0
    assert outcome.never_opened == 0
    assert outcome.connections > 500
    assert outcome.report["requests"] == outcome.report["answers"] > 1500
    assert sum(n for s in traffic.samples for _, n in s["rtt_counts"]) == outcome.report["answers"]
    assert max(s["gap_ms"] for s in traffic.samples) == outcome.longest_gap_ms
    assert outcome.report["datagrams"]["at_server"] == outcome.datagrams_sent > 1000
    assert outcome.datagrams_lost == outcome.datagrams_reordered == outcome.datagrams_duplicated == 0


def test_large_answers_are_compared_too(lab: Lab, servers: Servers) -> None:
    traffic = Traffic(
        lab, ["10.71.5.1:8080"], connections=5, request_interval_ms=100, answer_bytes="500000-1000000", ramp_seconds=0.1
    )
    wait_for_requests(traffic, 1)
    outcome = traffic.stop()
    assert outcome.broken == 0
    assert outcome.report["answer_bytes"] > 10_000_000


@pytest.mark.parametrize(("how", "kind"), [("corrupt", "wrong"), ("hang-up", "closed"), ("silent", "timeout")])
def test_a_misbehaving_server_breaks_every_connection(lab: Lab, how: str, kind: str) -> None:
    outcome = run_against(lab, how)
    assert outcome.report["broken_by"][kind] == outcome.broken == 10
    assert outcome.report["breakages"][0]["how"] == kind


def test_a_killed_server_breaks_every_connection(lab: Lab) -> None:
    servers = Servers(lab)
    traffic = Traffic(lab, ["10.71.5.1:8080"], connections=50, request_interval_ms=50, ramp_seconds=0.1)
    traffic.wait_open()
    servers.stop()
    while traffic.latest["broken"] < 50:
        assert traffic.running
        time.sleep(0.02)
    outcome = traffic.stop()
    assert outcome.broken == 50
    assert "first:" in outcome.what_broke()


def test_a_connection_that_is_refused_is_broken(lab: Lab) -> None:
    traffic = Traffic(lab, ["10.71.5.1:9"], connections=3, ramp_seconds=0.1, seconds=0.5)
    outcome = traffic.stop()
    assert outcome.report["broken_by"]["refused"] + outcome.never_opened == 3


def test_pairs_out_of_order_are_counted(lab: Lab) -> None:
    outcome = run_against(lab, "swap")
    assert outcome.report["datagrams"]["reordered_back"] * 2 >= outcome.report["datagrams"]["received"] > 100
    assert outcome.broken == 0


def test_duplicates_are_counted_and_not_taken_for_received(lab: Lab) -> None:
    outcome = run_against(lab, "twice")
    assert outcome.datagrams_duplicated == outcome.datagrams_sent
    assert outcome.report["datagrams"]["received"] == outcome.datagrams_sent


def test_an_echo_on_the_wrong_flow_is_an_error(lab: Lab) -> None:
    outcome = run_against(lab, "other-flow")
    assert outcome.broken == outcome.report["datagrams"]["wrong"] > 100
    assert outcome.report["datagrams"]["received"] == 0


def test_loss_is_counted_exactly_and_by_direction(lab: Lab, servers: Servers, rules: Any) -> None:
    rules(
        "add chain inet t f { type filter hook forward priority 0; }",
        "add counter inet t there",
        "add counter inet t back",
        "add rule inet t f udp dport 8081 udp length 208 numgen inc mod 10 == 0 counter name there drop",
        "add rule inet t f udp sport 8081 udp length 208 numgen inc mod 7 == 0 counter name back drop",
    )
    traffic = Traffic(lab, [], ["10.71.5.1:8081"], connections=0, udp_flows=20, udp_interval_ms=20)
    wait_for_requests(traffic, 1)
    outcome = traffic.stop()
    listed = json.loads(lab.run("node", "nft", "-j", "list", "counters").stdout)["nftables"]
    dropped = {entry["counter"]["name"]: entry["counter"]["packets"] for entry in listed if "counter" in entry}
    # The questions for the server's counters, and the answers, are dropped as well: at most six a flow.
    assert 0 <= dropped["there"] - outcome.datagrams_lost_forward <= 20 * 6
    assert 0 <= dropped["back"] - outcome.datagrams_lost_back <= 20 * 6
    assert outcome.datagrams_lost == outcome.datagrams_lost_forward + outcome.datagrams_lost_back
    assert outcome.datagrams_lost > 150
    assert outcome.datagrams_reordered == 0
    assert outcome.report["datagrams"]["flows_without_summary"] == 0


def test_a_balancer_that_keeps_its_connections_breaks_none(lab: Lab, servers: Servers, rules: Any) -> None:
    rules(
        "add chain inet t p { type nat hook prerouting priority dstnat; }",
        "add chain inet t o { type nat hook postrouting priority srcnat; }",
        "add rule inet t p ip daddr 192.0.2.10 tcp dport 80 dnat ip to 10.71.5.1:8080",
        "add rule inet t p ip daddr 192.0.2.10 udp dport 53 dnat ip to 10.71.5.2:8081",
        "add rule inet t o oifname dn0 masquerade",
    )
    traffic = Traffic(
        lab,
        ["192.0.2.10:80"],
        ["192.0.2.10:53"],
        connections=300,
        udp_flows=50,
        request_interval_ms=200,
        new_rate=50,
        ramp_seconds=0.2,
    )
    wait_for_requests(traffic, 1)
    outcome = traffic.stop()
    assert outcome.broken == 0
    assert outcome.datagrams_lost == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--target", "192.0.2.1"], "192.0.2.1: has no port; use ADDRESS:PORT or [ADDRESS]:PORT"),
        (["--target", "192.0.2.1:0"], "192.0.2.1:0: 0 is not a port; use 1 to 65535"),
        (["--target", "nonsense:80"], "nonsense: is not an IPv4 or IPv6 address"),
        (["--connections", "5"], "--target: is missing; where shall 5 connections go?"),
        (["--connections", "-5"], "--connections: -5 is not a number from 0 to 1000000"),
        (["--duration", "soon"], "--duration: soon is not a number of seconds from 0 to 86400"),
    ],
)
def test_bad_options_are_one_clear_line(lab: Lab, words: list[str], line: str) -> None:
    done = lab.run("client", str(native("packetstack-traffic")), "run", *words, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == f"packetstack-traffic: {line}"


def test_a_skewed_rate_is_sent_whole_and_its_latency_is_told(lab: Lab, servers: Servers) -> None:
    traffic = Traffic(
        lab, [], ["10.71.5.1:8081"], connections=0, udp_flows=10, udp_rate=1000, udp_skew=1.0, warm_up_seconds=0.5
    )
    wait_for_requests(traffic, 2.0)
    outcome = traffic.stop()
    assert outcome.datagrams_sent == pytest.approx(2000, rel=0.2)
    assert outcome.datagrams_lost == 0
    latency = outcome.report["datagrams"]["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["longest"]
