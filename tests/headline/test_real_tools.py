"""curl, wrk and iperf3 through the virtual addresses, while the pool is being resized."""

import hashlib
import json
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab

VIP, VIP6 = "192.0.2.20", "2001:db8:1::20"
FILE_BYTES = 200_000_000
SIZES = (4, 1, 3, 2)

pytestmark = pytest.mark.slow


def stack() -> dict[str, Any]:
    """Both families; nginx behind port 80, iperf3 (one backend: its connections belong together) behind 5201."""
    listeners: list[dict[str, Any]] = []
    for family, vip, backends in (
        ("4", VIP, ("10.71.5.1", "10.71.5.2")),
        ("6", VIP6, ("fd71:5::1", "fd71:5::2")),
    ):
        for name, protocol, port, backend_port, count in (
            ("web", "TCP", 80, 8000, 2),
            ("iperf", "TCP", 5201, 5201, 1),
            ("iperfu", "UDP", 5201, 5201, 1),
        ):
            endpoints = [{"address": address, "port": backend_port} for address in backends[:count]]
            listener: dict[str, Any] = {
                "name": name + family,
                "address": vip,
                "protocol": protocol,
                "port": port,
                "backends": {"endpoints": endpoints},
            }
            if name != "web":
                listener["healthCheck"] = {"type": "None"}  # a probe would take iperf3's only seat
            listeners.append(listener)
    return {
        "apiVersion": "packetstack.io/v1alpha1",
        "kind": "PacketStack",
        "metadata": {"name": "tools"},
        "spec": {
            "replicas": 2,
            "engine": {"cores": 1, "cpuPolicy": "Shared", "queuesPerCore": 2},
            "listeners": listeners,
            "snat": {"addresses": ["198.51.100.16/30", "2001:db8:2::10/126"]},
            "flowTable": {"maxFlows": 65536},
        },
    }


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("pkl-tools") as made:
        web = made.directory / "web"
        web.mkdir()
        (web / "large").write_bytes(random.Random(1).randbytes(FILE_BYTES))
        (web / "small").write_bytes(b"small" * 100)
        addresses = ("10.71.5.1", "10.71.5.2", "[fd71:5::1]", "[fd71:5::2]")
        listens = "\n".join(f"listen {address}:8000 backlog=4096;" for address in addresses)
        configuration = made.directory / "nginx.conf"
        configuration.write_text(
            f"""
            user root;
            daemon off;
            pid {made.directory}/nginx.pid;
            error_log {made.directory}/nginx.log;
            events {{ worker_connections 4096; }}
            http {{ access_log off; server {{ {listens} root {web}; }} }}
            """
        )
        made.start("server", "nginx", "-c", str(configuration), stderr=subprocess.DEVNULL)
        for address in ("10.71.5.1", "fd71:5::1"):  # unbound, it would answer datagrams from another address
            made.start("server", "iperf3", "-s", "-B", address, stderr=subprocess.DEVNULL)
        made.wait_for_listener("server", 8000, 5201)
        definition = made.directory / "tools.yaml"
        definition.write_text(yaml.safe_dump(stack()))
        made.packetstack("up", str(definition), "--uplink", NODE_UPLINK)
        yield made


@contextmanager
def resizing(lab: Lab) -> Iterator[list[int]]:
    """The pool changes its size every 0.8 s meanwhile; yields the sizes it has had."""
    client = Client(lab.run_directory)
    over = threading.Event()
    done: list[int] = []

    def resize() -> None:
        while not over.wait(0.8):
            size = SIZES[len(done) % len(SIZES)]
            client.call("scale", name="tools", replicas=size)
            done.append(size)

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def drops(lab: Lab) -> dict[str, int]:
    """Named drops of stack and lab, and datagrams that full sockets refused."""
    status = Client(lab.run_directory).call("get", name="tools")[0]["status"]
    named = {f"{place}.{reason}": n for place, reasons in status["drops"].items() for reason, n in reasons.items()}
    for room in ("client", "server"):
        shown = lab.run(room, "nstat", "-asz", "UdpRcvbufErrors", "Udp6RcvbufErrors").stdout
        named |= {f"{room}.{line.split()[0]}": int(line.split()[1]) for line in shown.splitlines()[1:]}
    named |= lab.device_drops()
    return {name: n for name, n in named.items() if not name.endswith((".unstamped", ".not_ours"))}


def test_files_of_200_megabytes_arrive_intact_by_both_families(lab: Lab, tmp_path: Path) -> None:
    expected = hashlib.sha256((lab.directory / "web/large").read_bytes()).hexdigest()
    with resizing(lab) as sizes:
        downloads = {}
        for url in (f"http://{VIP}/large", f"http://[{VIP6}]/large"):
            path = tmp_path / ("six" if "[" in url else "four")
            downloads[path] = lab.start(
                "client", "curl", "-sSf", "--limit-rate", "40M", "-o", str(path), url, stderr=subprocess.PIPE
            )
        for path, curl in downloads.items():
            said = curl.communicate(timeout=120)[1]
            assert curl.returncode == 0, said
            assert hashlib.sha256(path.read_bytes()).hexdigest() == expected
            path.unlink()
    assert len(sizes) >= 4


def by_both_families(lab: Lab, *words: str) -> list[str]:
    """What the client's command printed, run at once with each virtual address in place of `HOST`, in URLs too."""
    running = []
    for host in (VIP, VIP6 if "HOST" in words else f"[{VIP6}]"):
        command = [word.replace("HOST", host) for word in words]
        running.append(lab.start("client", *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [one.communicate(timeout=60)[0] for one in running]
    for one, text in zip(running, said, strict=True):
        assert one.returncode == 0, text
    return said


def test_wrk_sees_no_error_by_both_families(lab: Lab) -> None:
    with resizing(lab) as sizes:
        both = by_both_families(lab, "wrk", "-t1", "-c50", "-d4s", "--timeout", "10s", "http://HOST:80/small")
    assert len(sizes) >= 2
    for said in both:
        print(said)
        assert "Socket errors" not in said
        assert "Non-2xx" not in said
        found = re.search(r"(\d+) requests in", said)
        assert found
        assert int(found[1]) > 1000


@pytest.mark.parametrize("direction", ["up", "down"])
def test_iperf3_streams_over_tcp_by_both_families(lab: Lab, direction: str) -> None:
    reverse = ["-R"] if direction == "down" else []
    with resizing(lab) as sizes:
        both = by_both_families(lab, "iperf3", "-c", "HOST", "-t", "3", "-P", "4", "-J", *reverse)
    assert len(sizes) >= 2
    for said in both:
        end = json.loads(said)["end"]
        rate, sent = end["sum_received"]["bits_per_second"], end["sum_sent"]
        print(f"{rate / 1e9:.2f} Gbit/s, {sent.get('retransmits')} retransmits")
        assert end["sum_received"]["bytes"] > 10_000_000
        assert len(end["streams"]) == 4


@pytest.mark.alone
@pytest.mark.parametrize("host", [VIP, VIP6])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_iperf3_datagrams_stay_in_order_and_none_is_lost_silently(lab: Lab, host: str, direction: str) -> None:
    reverse = ["-R"] if direction == "down" else []
    before = drops(lab)
    # On one CPU each: what the kernel reorders when a sender changes its CPU in a burst is not the pool's doing.
    stream = ("-u", "-b", "20M", "-l", "1200", "-t", "3", "-A", "1,0", "-J")
    with resizing(lab) as sizes:
        said = lab.run("client", "iperf3", "-c", host, *stream, *reverse).stdout
    after = drops(lab)
    dropped = {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
    end = json.loads(said)["end"]
    print(end["sum"], dropped)
    assert len(sizes) >= 3
    assert end["streams"][0]["udp"]["out_of_order"] == 0
    assert end["sum"]["packets"] > 5000
    assert end["sum"]["lost_packets"] <= sum(dropped.values())
