"""What the benchmark of round trips and bulk transfers says of its figures."""

import pytest


@pytest.fixture(scope="module")
def streams(bench_module):
    return bench_module("streams")


def found(streams, *, proxy: bool):
    trip = [{"p50_us": 40.0, "p99_us": 60.0}]
    bulk = [{"gbit_s": 2.0, "retransmitted": 0.0}]
    subjects = ["PacketStack", streams.NFTABLES, streams.ROUTING, *([streams.HAPROXY] if proxy else [])]
    return {kind: dict.fromkeys(subjects, trip) for kind in ("tcp", "udp")} | {
        kind: dict.fromkeys(subjects, bulk) for kind in ("bulk1", "bulk4")
    }


def test_a_round_trip_as_long_as_the_peers_meets_no_limit_below_one(streams):
    rows = {(row.name.split(";")[0], row.peer): row for row in streams.rows(found(streams, proxy=True))}
    median = "TCP round trip of 64 bytes in a closed loop, p50"
    assert [rows[median, peer].met for peer in (streams.NFTABLES, streams.HAPROXY)] == ["yes", "no"]


def test_without_a_proxy_the_rows_beside_the_others_are_there(streams):
    peers = {row.peer for row in streams.rows(found(streams, proxy=False))}
    assert peers == {streams.NFTABLES, streams.ROUTING}
