"""A running stack is changed: just that changes, and connections go on."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from tests.lab.node import BACKENDS, VIP, VIP6, Node, ask, listener, stack
from tests.waiting import eventually

from packetstack_cli.errors import CliError
from packetstack_cli.lab import inside

PATIENCE_SECONDS = 20.0
"""For an answer that may have to be sent again: after two seconds without a route TCP tries again only after a few more."""
CHECK = {"type": "TCP", "intervalSeconds": 1, "timeoutSeconds": 1, "unhealthyThreshold": 1, "healthyThreshold": 1}


@pytest.fixture(autouse=True)
def _up(node: Node) -> Iterator[None]:
    """Each test finds and leaves the same stack, whose engines stay from test to test."""
    node.up(stack())
    yield
    for address in {*BACKENDS} - set(node.backends):
        node.start_backend(address)
    node.up(stack())
    eventually(lambda: all(b["healthy"] for b in node.status()["backends"]))


def web(*backends: str, weights: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [listener("web", VIP, backends, CHECK, weights=weights), *stack()["spec"]["listeners"][1:]]


def pids(node: Node) -> list[int]:
    return [e["pid"] for e in node.status()["engines"]]


class Talk:
    """Asks on a connection without pause; `end` tells how often it was answered."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.answers, self.backends = connection, 0, {ask(connection)}
        self.problem: Exception | None = None
        self._go = True
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def _talk(self) -> None:
        try:
            while self._go:
                self.backends.add(ask(self.connection))
                self.answers += 1
                time.sleep(0.002)
        except Exception as e:
            self.problem = e

    def end(self) -> int:
        self._go = False
        self._thread.join(PATIENCE_SECONDS)
        self.connection.close()
        assert self.problem is None
        assert len(self.backends) == 1
        return self.answers


@pytest.fixture
def talks(node: Node) -> Iterator[list[Talk]]:
    """Connections that must live through the test."""
    made = [Talk(node.connect(address, timeout_seconds=PATIENCE_SECONDS)) for address in (VIP, VIP, VIP, VIP, VIP6)]
    yield made
    answers = [talk.end() for talk in made]
    assert all(answers), answers


@pytest.mark.parametrize("how", ["removed", "weight 0"])
def test_a_backend_that_goes_keeps_its_connections_and_gets_no_new_ones(node: Node, how: str) -> None:
    assert node.who() == set(BACKENDS)
    before, engines = node.status(), pids(node)
    with contextlib.ExitStack() as open_ones:
        connections = {}
        while len(connections) < 2:
            connection = open_ones.enter_context(node.connect())
            connections.setdefault(ask(connection), connection)
        left = web(BACKENDS[0]) if how == "removed" else web(*BACKENDS, weights=(1, 0))
        assert "changed" in node.up(stack(listeners=left))
        assert node.who() == {BACKENDS[0]}
        for backend, connection in connections.items():
            assert ask(connection) == backend
        node.up(stack())
        assert node.who() == set(BACKENDS)
        for backend, connection in connections.items():
            assert ask(connection) == backend
    after = node.status()
    assert after["flowTableGeneration"] == before["flowTableGeneration"]
    assert pids(node) == engines


ECHO = "import socket, sys\ns = socket.socket(type=socket.SOCK_DGRAM)\ns.bind((sys.argv[1], 9000))\n" + (
    "while True: s.sendto(sys.argv[1].encode(), s.recvfrom(64)[1])"
)


@pytest.mark.parametrize(("affinity", "first"), [("None", 30000), ("ClientIP", 31000)])
def test_explain_names_the_backend_before_there_is_a_flow(node: Node, affinity: str, first: int) -> None:
    made = {**web(*BACKENDS)[0], "balancing": "Maglev", "sessionAffinity": affinity}
    node.up(stack(listeners=[made]))
    source, named = node.lab.client_addresses[0], set()
    for port in range(first, first + 16):
        flow = {"protocol": "tcp", "source": source, "sport": port, "destination": VIP, "dport": 80}
        said = node.client.call("explain", name="web", **flow)["why"]
        with node.connect(source=(source, port)) as connection:
            backend = ask(connection)
        assert re.search(rf" {re.escape(backend)} port 8080, one of 2$", said), (port, said)
        named.add(backend)
    assert len(named) == (2 if affinity == "None" else 1)


def test_a_udp_flow_leaves_a_backend_that_goes(node: Node) -> None:
    echo = {"name": "echo", "address": VIP, "protocol": "UDP", "port": 90}
    servers = [node.lab.start("server", sys.executable, "-S", "-c", ECHO, b) for b in BACKENDS]

    def asking(backends: tuple[str, ...]) -> dict[str, Any]:
        ends = {"endpoints": [{"address": b, "port": 9000} for b in backends]}
        return stack(listeners=[*web(*BACKENDS), {**echo, "backends": ends}])

    try:
        node.up(asking(BACKENDS))
        with inside(node.lab.namespace("client")):
            flow = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with flow:
            flow.settimeout(1)
            flow.connect((VIP, 90))

            def who() -> str:
                flow.send(b"who?")
                try:
                    return flow.recv(64).decode()
                except OSError:  # a server that is only starting
                    return ""

            first = eventually(who)
            assert {who() for _ in range(5)} == {first}
            node.up(asking(tuple(b for b in BACKENDS if b != first)))
            assert {who() for _ in range(5)} == set(BACKENDS) - {first}
    finally:
        for server in servers:
            server.kill()
            server.wait()
        node.up(stack())


def test_a_listener_comes_and_goes(node: Node, talks: list[Talk]) -> None:
    more = [*web(*BACKENDS), listener("more", VIP, (BACKENDS[1],), port=81), listener("x", "192.0.2.11", BACKENDS)]
    node.up(stack(listeners=more))
    assert node.who(VIP, 81) == {BACKENDS[1]}
    assert node.who("192.0.2.11") == set(BACKENDS)
    with node.connect(VIP, 81) as ending:
        ask(ending)
        done = node.command("up", "-o", "x")
        assert done.returncode == 2, "wrong usage"
        node.up(stack())
        with pytest.raises(OSError):
            node.connect(VIP, 81, timeout_seconds=0.5)
        with pytest.raises(OSError):
            node.connect("192.0.2.11", timeout_seconds=0.5)
    assert node.who() == set(BACKENDS)


def test_replicas_in_the_file_resize_the_pool(node: Node, talks: list[Talk]) -> None:
    node.up(stack(replicas=3))
    assert node.status()["readyReplicas"] == 3
    node.up(stack(replicas=1))
    assert set(node.status()["owners"].values()) == {256}


def test_sizes_wished_faster_than_they_can_be_had_converge(node: Node, talks: list[Talk]) -> None:
    for replicas in (4, 1, 3, 1, 4, 2, 3):
        node.client.call("scale", name="web", replicas=replicas)
        time.sleep(0.05)
    status = node.wait_ready()
    assert status["readyReplicas"] == 3
    assert sorted(status["owners"].values()) == [85, 85, 86]
    eventually(lambda: len(node.status()["engines"]) == 3)


def test_a_connection_outlives_a_pool_of_none(node: Node) -> None:
    with node.connect(timeout_seconds=20) as connection:
        backend = ask(connection)
        node.packetstack("scale", "web", "--replicas", "0")
        assert node.status()["owners"] == {}
        eventually(lambda: node.status()["engines"] == [])
        node.packetstack("scale", "web", "--replicas", "2")
        assert ask(connection) == backend


def test_buckets_that_were_moved_stay_where_they_are(node: Node, talks: list[Talk]) -> None:
    first, second = (e["slot"] for e in node.status()["engines"])
    for slot, other in ((first, second), (second, first)):
        done = node.command("move", "web", "--buckets", "0-199", "--engine", str(slot))
        assert "buckets to engine" in done.stdout
        time.sleep(1.2)  # longer than the agent takes to look again
        owners = node.status()["owners"]
        assert owners[str(slot)] >= 200
        assert owners[str(slot)] + owners.get(str(other), 0) == 256


def test_a_queue_that_was_moved_stays_where_it_is(node: Node, talks: list[Talk]) -> None:
    slot = node.status()["engines"][0]["slot"]

    def queues() -> list[list[int]]:
        cores = next(e for e in node.status()["engines"] if e["slot"] == slot)["cores"]
        return [[q["queue"] for q in core["queues"]] for core in cores]

    assert queues() == [[0], [1]]
    assert "core 1 after" in node.packetstack("move", "web", "--queue", f"{slot}:0", "--core", "1")
    assert queues() == [[], [0, 1]]
    time.sleep(1.2)
    assert queues() == [[], [0, 1]]
    node.packetstack("move", "web", "--queue", f"{slot}:0", "--core", "0")
    assert queues() == [[0], [1]]


def test_a_backend_that_dies_gets_no_new_flows_until_it_is_back(node: Node) -> None:
    node.stop_backend(BACKENDS[1])
    eventually(lambda: any(not b["healthy"] for b in node.status()["backends"]), timeout_seconds=3)
    assert node.who() == {BACKENDS[0]}
    node.start_backend(BACKENDS[1])
    eventually(lambda: all(b["healthy"] for b in node.status()["backends"]), timeout_seconds=4)
    assert node.who() == set(BACKENDS)


def test_without_any_backend_openers_are_dropped_and_counted(node: Node) -> None:
    for address in BACKENDS:
        node.stop_backend(address)
    eventually(lambda: sum(not b["healthy"] for b in node.status()["backends"]) == 2)
    before = node.status()["drops"]["engine"]["no_backend"]
    with pytest.raises(OSError):
        node.connect(timeout_seconds=0.5)
    assert node.status()["drops"]["engine"]["no_backend"] > before
    assert node.connect(VIP6).close() is None, "other listeners are as before"
    for address in BACKENDS:
        node.start_backend(address)
    eventually(lambda: all(b["healthy"] for b in node.status()["backends"]))
    assert node.who() == set(BACKENDS)


def test_an_engine_that_cannot_be_made_is_a_condition_and_tried_again(node: Node, talks: list[Talk]) -> None:
    taken = [node.status()["engines"][-1]["namespace"].rpartition("-")[0] + f"-{n}" for n in range(1, 60)]
    free = [name for name in taken if name not in {e["namespace"] for e in node.status()["engines"]}]
    node.lab.run("node", "sh", "-c", "; ".join(f"touch /run/netns/{name}" for name in free))
    try:
        node.client.call("scale", name="web", replicas=3)
        condition = eventually(
            lambda: next(
                (c for c in node.status()["conditions"] if (c["type"], c["status"]) == ("CapacityAvailable", "False")),
                None,
            )
        )
        assert condition["reason"] == "EngineFailed"
        assert "exists already and is not ours" in condition["message"]
        assert node.status()["readyReplicas"] == 2
        tries = [e for e in node.client.call("events", name="web") if e["reason"] == "EngineFailed"]
        assert len(tries) <= 2, "with pauses"
    finally:
        node.lab.run("node", "sh", "-c", "; ".join(f"rm -f /run/netns/{name}" for name in free))
    status = node.wait_ready()
    assert status["readyReplicas"] == 3
    assert all(c["status"] == "True" for c in status["conditions"] if c["type"] == "CapacityAvailable")


def test_an_address_on_the_clients_own_link_is_answered_for(node: Node) -> None:
    near = [listener("near", "10.71.1.99", BACKENDS), listener("near6", "fd71:1::99", ("fd71:5::1",))]
    node.up(stack(listeners=[*web(*BACKENDS), *near]))
    assert node.who("10.71.1.99") == set(BACKENDS)
    assert node.who("fd71:1::99") == {"fd71:5::1"}
    for address in ("10.71.1.99", "fd71:1::99"):
        said = node.lab.run("client", "ping", "-c2", "-i0.05", "-W1", address).stdout
        assert said.count("bytes from") == 2
        assert "DUP" not in said
    neighbours = node.lab.run("client", "ip", "neigh").stdout
    assert "10.71.1.98" not in neighbours
    node.up(stack())
    assert node.lab.run("node", "ip", "neigh", "show", "proxy").stdout.strip() == ""


# ---- faults -----------------------------------------------------------------------------------------------------


def test_a_datapath_that_is_killed_comes_back_and_breaks_nothing(node: Node, talks: list[Talk]) -> None:
    for _ in range(3):
        engine = node.status()["engines"][0]
        node.lab.run("node", "kill", "-9", str(engine["pid"]))
        eventually(lambda old=engine["pid"]: (e := node.status()["engines"][0])["ready"] and e["pid"] not in (0, old))
    assert node.who() == set(BACKENDS)
    reasons = [e["reason"] for e in node.client.call("events", name="web")]
    assert "DatapathDied" in reasons


def test_the_supervisor_shows_health_and_counters_and_nobody_needs_it(node: Node, talks: list[Talk]) -> None:
    engine = node.status()["engines"][0]
    path = node.lab.run_directory / "engines" / str(engine["slot"]) / "supervisor.sock"

    def fetch(what: str) -> str:
        command = ["curl", "-sS", "--max-time", "2", "--unix-socket", str(path), f"http://engine/{what}"]
        return node.lab.run("node", *command, check=False).stdout

    eventually(lambda: fetch("healthz") == "ok\n")
    assert 'packetstack_engine_core_packets_total{engine="' in fetch("metrics")
    found = node.lab.run(
        "node", "pgrep", "-f", f"^[^ ]*python[^ ]* .*packetstack_engine.main --directory {path.parent}"
    ).stdout.split()
    assert len(found) == 1
    assert "Uid:\t65534" in node.lab.run("node", "cat", f"/proc/{found[0]}/status").stdout
    node.lab.run("node", "kill", "-9", found[0])
    eventually(lambda: fetch("healthz") == "ok\n")
    after = node.status()["engines"][0]
    assert (after["pid"], after["ready"]) == (engine["pid"], True)


def test_an_uplink_whose_program_is_detached_breaks_nothing(node: Node, talks: list[Talk]) -> None:
    def program() -> Any:
        return json.loads(node.lab.run("node", "ip", "-j", "link", "show", "up0").stdout)[0].get("xdp")

    assert program()
    pin = node.lab.run_directory / "bpf/link_uplink_up0"
    node.lab.run("node", "bpftool", "link", "detach", "pinned", str(pin))
    assert not program()
    answers = [talk.answers for talk in talks]
    time.sleep(1)
    assert all(talk.answers > n for talk, n in zip(talks, answers, strict=True)), "the kernel's way serves as well"
    assert node.who() == set(BACKENDS)
    eventually(program)


def test_routes_and_the_pair_itself_come_back(node: Node, talks: list[Talk]) -> None:
    for words in ("set ps0 down", "set ps0 up", "set ps1 down", "set ps0 down"):
        node.lab.run("node", "ip", "link", *words.split())
        time.sleep(0.1)
    eventually(lambda: VIP in node.lab.run("node", "ip", "route", "show", "dev", "ps0").stdout)
    node.lab.run("node", "ip", "link", "del", "ps0")
    eventually(lambda: VIP in node.lab.run("node", "ip", "route", "show", "dev", "ps0", check=False).stdout)
    assert node.who() == set(BACKENDS)


HOSTILE = [
    ("nosuch", {}), ("../get", {}), ("scale", None), ("scale", []), ("scale", {}), ("delete", {"name": "../.."}),
    ("scale", {"name": "web", "replicas": "many"}), ("scale", {"name": "web", "replicas": -1}),
    ("scale", {"name": "web", "replicas": 1e99}), ("scale", {"name": "web", "replicas": None}),
    ("scale", {"name": "web", "replicas": 10**30}), ("scale", {"name": {}, "replicas": 2}),
    ("apply", {"documents": 7}), ("apply", {"documents": [7]}), ("apply", {}), ("apply", {"documents": [{}]}),
    ("apply", {"documents": [], "uplinks": [1]}), ("apply", {"documents": [], "uplinks": ["../../etc"]}),
    ("move_buckets", {"name": "web", "buckets": "all", "slot": 1}),
    ("move_buckets", {"name": "web", "buckets": [1.5, True], "slot": 1}),
    ("move_buckets", {"name": "web", "buckets": [10**30], "slot": 1}),
    ("move_queue", {"name": "web", "slot": 1, "queue": -1, "core": 99999999999}),
    ("move_queue", {"name": "web", "slot": 10**30, "queue": 0, "core": 0}), ("upgrade", {"name": "web", "slot": -1}),
]  # fmt: skip
HOSTILE_QUERIES = [
    "explain?name=web&protocol=6&source=&sport=1&destination=0&dport=0", "explain?name=web", "get?name=", "census?name=no",
    "explain?name=web&protocol=tcp&source=10.0.0.1&sport=-1&destination=192.0.2.10&dport=80", "wait?names=web&seconds=x",
]  # fmt: skip


def test_hostile_requests_do_not_hurt_the_agent(node: Node, talks: list[Talk]) -> None:
    """Those that no command makes; bytes that are no HTTP are in test_web.py."""
    before = node.status()
    asked = [("POST", f"/v1/{verb}", json.dumps(body).encode()) for verb, body in HOSTILE]
    for method, target, body in (*asked, *(("GET", f"/v1/{query}", b"") for query in HOSTILE_QUERIES)):
        status, answer = request(node, method, target, body)
        assert 400 <= status < 500, (target, body, answer)
        assert 0 < len(json.loads(answer)["error"]["message"]) < 500
    after = node.status()
    assert (after["flowTableGeneration"], pids(node)) == (
        before["flowTableGeneration"], [e["pid"] for e in before["engines"]],
    )  # fmt: skip
    assert not [e for e in node.client.call("events") if e["reason"] == "InternalError"]
    with pytest.raises(CliError, match="stack nosuch: not found; stacks of this agent: web"):
        node.client.call("get", name="nosuch")


def request(node: Node, method: str, target: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of what the agent's socket answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(node.lab.run_directory / "agent.sock"))
        http = HTTPConnection("agent")
        http.sock = connection
        http.request(method, target, body or None, {"Connection": "close"})
        answer = http.getresponse()
        return answer.status, answer.read()


def test_an_engine_in_a_slot_of_before_has_answered_no_fence(node: Node) -> None:
    """Its slot's last engine may have been of a stack that had seen more fences."""
    slot, most = json.loads((node.lab.run_directory / "state.json").read_text())["last_slot"] % 1023 + 1, 256
    pin = node.lab.run_directory / "bpf/egress"

    def bpftool(verb: str, *words: str) -> str:
        key = map(str, (slot * most).to_bytes(4, "little"))
        line = ["bpftool", "map", verb, "pinned", str(pin), "key", *key, *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout

    bpftool("update", "value", *map(str, (1 << 48).to_bytes(8, "little")))
    assert json.loads(bpftool("lookup"))["value"] == 1 << 48
    node.packetstack("scale", "web", "--replicas", "3")
    assert max(e["slot"] for e in node.status()["engines"]) == slot
    assert json.loads(bpftool("lookup"))["value"] < 1 << 48
    node.packetstack("scale", "web", "--replicas", "2")
    assert node.who() == set(BACKENDS)
