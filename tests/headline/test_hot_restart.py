"""The datapath build is replaced in place while packets flow at a high rate: not one may be lost."""

import pytest

from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab
from packetstack_cli.traffic import Servers, Traffic

from .test_resize import DEMO, TARGETS, UDP_TARGETS, drops

RESTARTS = 10
PACKETS_PER_SECOND = 50_000
"""Through one engine, requests and answers together."""


@pytest.mark.slow
def test_hot_restarts_under_50000_packets_a_second_lose_none() -> None:
    with Lab("pkl-hot") as lab:
        servers = Servers(lab)
        lab.packetstack("up", str(DEMO), "--uplink", NODE_UPLINK)
        lab.packetstack("scale", "demo", "--replicas", "1")
        client = Client(lab.run_directory)
        slot = client.call("get", name="demo")[0]["status"]["engines"][0]["slot"]
        flows = 1000
        interval_ms = 2000 * flows // PACKETS_PER_SECOND
        traffic = Traffic(
            lab, TARGETS, UDP_TARGETS, connections=200, udp_flows=flows, udp_interval_ms=interval_ms, new_rate=10
        )
        traffic.wait_open()
        before = drops(client, lab)
        rates, pauses = [], []
        for _ in range(RESTARTS):
            at = len(traffic.samples)
            pauses.append(client.call("upgrade", name="demo", slot=slot)["pauseMilliseconds"])
            rates.append(client.call("get", name="demo")[0]["status"]["engines"][0]["packetsPerSecond"])
            while len(traffic.samples) < at + 5:  # half a second
                assert traffic.running
        outcome = traffic.stop()
        after = drops(client, lab, outcome)
        counted = servers.stop()
    dropped = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    print(f"pauses {pauses} ms\npackets/s {rates}\n{outcome}\ndropped {dropped}\nserver {counted}")
    assert max(rates) > 0.9 * PACKETS_PER_SECOND, "the generator did not send what the test is about"
    assert outcome.broken == 0, outcome.what_broke()
    assert outcome.datagrams_reordered == 0
    assert outcome.datagrams_duplicated == 0
    assert outcome.datagrams_lost == 0
