"""A node with real packets: the lab's three namespaces, the real command, servers that say who they are."""

import json
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

from tests.waiting import POLL_SECONDS, eventually

from packetstack_agent.node import RunDirectory
from packetstack_cli.backend import not_ready
from packetstack_cli.client import Client
from packetstack_cli.lab import NODE_UPLINK, Lab, LabError, inside
from packetstack_cli.main import main

VIP, VIP6 = "192.0.2.10", "2001:db8:1::10"
BACKENDS = ("10.71.5.1", "10.71.5.2")
BACKENDS6 = ("fd71:5::1",)
ENDING_SECONDS = 1.0
"""Of processes whose end `down` has brought about, on a busy machine."""


def stack(name: str = "web", **changes: Any) -> dict[str, Any]:
    """A small stack; `changes` replace parts of its spec."""
    check = {"type": "TCP", "intervalSeconds": 1, "timeoutSeconds": 1, "unhealthyThreshold": 1, "healthyThreshold": 1}
    spec = {
        "replicas": 2,
        "engine": {"cores": 2, "queuesPerCore": 1, "cpuPolicy": "Shared"},
        "listeners": [listener("web", VIP, BACKENDS, check), listener("web6", VIP6, BACKENDS6, check)],
        "snat": {"addresses": ["198.51.100.0/31", "2001:db8:2::/127"]},
        "flowTable": {"buckets": 256, "maxFlows": 4096},
    }
    meta = {"apiVersion": "packetstack.io/v1alpha1", "kind": "PacketStack", "metadata": {"name": name}}
    return {**meta, "spec": {**spec, **changes}}


def listener(
    name: str,
    address: str,
    backends: tuple[str, ...],
    check: dict[str, Any] | None = None,
    port: int = 80,
    weights: tuple[int, ...] = (),
) -> dict[str, Any]:
    """A TCP listener that deals connections out in turn."""
    endpoints: list[dict[str, Any]] = [{"address": b, "port": 8080} for b in backends]
    for endpoint, weight in zip(endpoints, weights, strict=False):
        endpoint["weight"] = weight
    return {
        "name": name,
        "address": address,
        "protocol": "TCP",
        "port": port,
        "balancing": "RoundRobin",
        "healthCheck": check or {"type": "None"},
        "backends": {"endpoints": endpoints},
    }


class Node:
    """The lab's node, and what its clients see."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.client = Client(lab.run_directory)
        self.backends: dict[str, Popen[str]] = {}

    def up(self, *stacks: dict[str, Any], uplink: str = NODE_UPLINK) -> str:
        """`packetstack up` with these stacks in one file."""
        file = self.lab.directory / "stack.yaml"
        file.write_text("\n---\n".join(json.dumps(s) for s in stacks))
        return self.packetstack("up", str(file), "--uplink", uplink)

    def up_again(self) -> None:
        """The stack `stack()` and no other, whatever the test before has left of it; its engines stay where they can."""
        try:
            self.up(stack())
        except LabError:
            self.command("down", "--all", "--yes")
            self.up(stack())

    def refused(self, *words: str) -> str:
        """The one line with which the command refuses."""
        done = self.command(*words)
        assert done.returncode == 1, done
        said = done.stderr.strip()
        assert said
        assert "\n" not in said, said
        return said

    def command(self, *words: str) -> CompletedProcess[str]:
        """`packetstack WORDS`, whatever comes of it.

        In this process, which spares the start of an interpreter; as a process of its own where it starts an agent, whose
        parent must not be a test.
        """
        starts = "--agent" in words or (words[0] == "up" and not self.client.alive())
        if starts:
            return self.lab.run("node", *self.lab.command(*words), check=False)
        out, err, code = StringIO(), StringIO(), 0
        arguments = ["--run-dir", str(self.lab.run_directory), *words]
        with inside(self.lab.namespace("node")), redirect_stdout(out), redirect_stderr(err):
            try:
                main(arguments, prog_name="packetstack")
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
                if isinstance(e.code, str):
                    err.write(f"{e.code}\n")
        return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    def packetstack(self, *words: str) -> str:
        """What `packetstack WORDS` printed; `LabError` with its last line if it fails."""
        done = self.command(*words)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise LabError(f"packetstack {' '.join(words)}: {said[-1] if said else f'exit code {done.returncode}'}")
        return done.stdout

    def status(self, name: str = "web") -> dict[str, Any]:
        """Of a stack."""
        status: dict[str, Any] = self.client.call("get", name=name)[0]["status"]
        return status

    def reasons(self) -> list[str]:
        """Of all events, oldest first."""
        return [e["reason"] for e in self.client.call("events")]

    def wait_ready(self, name: str = "web", timeout_seconds: float = 10) -> dict[str, Any]:
        """Until the stack is as its resource says; its status."""
        for item in self.client.wait([name], timeout_seconds):
            raise AssertionError(not_ready(item, timeout_seconds))
        return self.status(name)

    def start_backend(self, address: str) -> None:
        """A server that answers with its address."""
        server = str(Path(__file__).with_name("backend.py"))
        self.backends[address] = self.lab.start("server", sys.executable, "-S", server, address, "8080")

    def stop_backend(self, address: str) -> None:
        """It is gone, connections and all."""
        server = self.backends.pop(address)
        server.kill()
        server.wait()

    def connect(
        self, address: str = VIP, port: int = 80, timeout_seconds: float = 3, source: tuple[str, int] | None = None
    ) -> socket.socket:
        """A connection from the client's namespace."""
        with inside(self.lab.namespace("client")):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(timeout_seconds)
        try:
            if source:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                connection.bind(source)
            connection.connect((address, port))
        except OSError:
            connection.close()
            raise
        return connection

    def who(self, address: str = VIP, port: int = 80, tries: int = 8) -> set[str]:
        """Which backends answer new connections."""
        found = set()
        for _ in range(tries):
            with self.connect(address, port) as connection:
                found.add(ask(connection))
        return found

    def curl(self, address: str = VIP) -> str:
        """What curl prints."""
        host = f"[{address}]" if ":" in address else address
        return self.lab.run("client", "curl", "-sS", "--max-time", "5", f"http://{host}/").stdout

    def _processes(self) -> list[str]:
        """Command lines of those that name the run directory."""
        run, found = self.lab.run_directory, []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if f"{run}/" in f"{line}/" and "pytest" not in line and state not in "ZX":
                    found.append(line)
        return found

    def traces(self) -> dict[str, Any]:
        """All that a stack may leave on the machine."""
        run = self.lab.run_directory
        mark = RunDirectory(run).namespace("x", 0).removesuffix("x-0")
        found: dict[str, Any] = {"directory": run.exists(), "namespaces": [], "cgroups": []}
        found["namespaces"] = [p.name for p in Path("/run/netns").iterdir() if p.name.startswith(mark)]
        found["cgroups"] = [str(p) for p in Path("/sys/fs/cgroup").glob(f"*/packetstack/{mark}*")]
        found["cgroups"] += [str(p) for p in Path("/sys/fs/cgroup").glob(f"packetstack/{mark}*")]
        found["mounts"] = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(run) in line]
        found["processes"] = self._processes()
        deadline = time.monotonic() + ENDING_SECONDS
        while found["processes"] and not found["directory"] and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)  # told to end, and the directory is gone: some are still about to
            found["processes"] = self._processes()
        for words in (
            "-j link show", "-4 route show table all", "-6 route show table all", "neigh show proxy",
            "-6 neigh show proxy", "rule show",
        ):  # fmt: skip
            found[words] = shown = self.lab.run("node", "ip", *words.split()).stdout
            if words.startswith("-j"):
                found[words] = sorted((i["ifname"], i["mtu"], i.get("xdp"), i["qdisc"]) for i in json.loads(shown))
        found["rules"] = self.lab.run("node", "nft", "list", "ruleset").stdout
        with inside(self.lab.namespace("node")):
            for path in sorted(Path("/proc/sys/net").glob("ipv[46]/*/[ud]*0/*")):
                try:
                    found[str(path)] = path.read_text()
                except OSError:
                    continue
        return found


def ask(connection: socket.socket) -> str:
    """Which backend serves this connection; it must still work."""
    connection.sendall(b"who?\n")
    answer = connection.recv(4096)
    assert answer, "the connection was closed"
    return answer.split()[0].decode()


def metric(client: Client, name: str, label: str) -> Counter[str]:
    """Sums of a metric by one of its labels."""
    found: Counter[str] = Counter()
    for line in client.metrics().splitlines():
        if line.startswith(name + "{") and (value := re.search(rf'{label}="([^"]*)"', line)):
            found[value[1]] += int(float(line.split()[-1]))
    return found


@contextmanager
def serving_node(prefix: str) -> Iterator[Node]:
    """A node without a stack, in a lab of its own whose server has all backends."""
    with Lab(prefix) as lab:
        made = Node(lab)
        for address in (*BACKENDS, *BACKENDS6):
            made.start_backend(address)
        lab.wait_for_listener("server", 8080)
        listening = len(BACKENDS) + len(BACKENDS6)
        eventually(lambda: lab.run("server", "ss", "-Hltn").stdout.count(":8080") == listening)
        yield made
