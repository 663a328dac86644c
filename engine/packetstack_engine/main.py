"""`packetstack-engine`: the supervisor. Shows the engine's health and counters from shared memory; no packet needs it.

Serves GET /metrics (Prometheus text) and /healthz on the unix socket DIRECTORY/supervisor.sock, or at --listen. It is
light on purpose: standard library and cffi alone.

With --pod it is the first program of an engine's container: it becomes packetstack-init, which starts datapath and
supervisor. The agent makes the engine's file when it has found the pod.
"""

import argparse
import os
import socket
import socketserver
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NoReturn

from packetstack_core import abi

NOBODY = 65534
ANSWER_SECONDS = 1.0
"""What the agent has for an answer."""
HANG_SECONDS = 2.0
"""A core that is not asleep and whose loop does not turn for so long hangs. A sleeping one turns every 0.1 s."""


class View:
    """An engine's memory, read only."""

    def __init__(self, file: int, memory: int) -> None:
        """`file`, `memory`: descriptors from the agent, closed here."""
        self.inode = os.fstat(file).st_ino
        error = abi.ffi.new("struct ps_error *")
        self.engine: Any = abi.lib().ps_engine_view(file, memory, error)
        os.close(file)
        os.close(memory)
        if self.engine == abi.ffi.NULL:
            raise OSError(abi.ffi.string(error.text).decode())
        self._beats: dict[int, tuple[int, float]] = {}
        self._names = abi.enum_names("ps_counter")

    def core(self, index: int) -> Any:
        """`struct ps_core *`"""
        at = abi.ffi.cast("char *", self.engine) + self.engine.cores_offset
        return abi.ffi.cast("struct ps_core *", at) + index

    def unhealthy(self, now: float) -> str:
        """Why the engine is not healthy; empty when it is."""
        if self.engine.ready != self.engine.generation:
            return "no datapath serves the queues"
        for c in range(self.engine.cores):
            beat = int(self.core(c).heartbeat)
            last, since = self._beats.get(c, (-1, now))
            if beat != last:
                self._beats[c] = (beat, now)
            elif now - since > HANG_SECONDS:
                return f"core {c} hangs"
        return ""

    def metrics(self) -> str:
        """Counters of all cores as Prometheus text."""
        slot = int(self.engine.slot)
        lines = ["# TYPE packetstack_engine_core_packets_total counter"]
        for c in range(self.engine.cores):
            core = self.core(c)
            for value, name in self._names.items():
                event = name.removeprefix("PS_C_").lower()
                if name != "PS_COUNTERS":
                    labels = f'engine="{slot}",core="{c}",event="{event}"'
                    lines.append(f"packetstack_engine_core_packets_total{{{labels}}} {int(core.counters[value])}")
        for metric in ("busy_cycles", "total_cycles", "wakeups"):
            lines.append(f"# TYPE packetstack_engine_core_{metric}_total counter")
            for c in range(self.engine.cores):
                count = int(getattr(self.core(c), metric))
                lines.append(f'packetstack_engine_core_{metric}_total{{engine="{slot}",core="{c}"}} {count}')
        return "\n".join(lines) + "\n"


def ask_agent() -> View:
    """What may be read, from the agent at `engine.sock` of the present directory. OSError if it does not answer."""
    ffi, lib = abi.ffi, abi.lib()
    message = ffi.new("struct ps_message *", {"kind": lib.PS_MSG_LOOK, "layout": lib.PS_LAYOUT_VERSION})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.settimeout(ANSWER_SECONDS)
        agent.connect("engine.sock")
        agent.send(bytes(ffi.buffer(message)))
        data, fds, _, _ = socket.recv_fds(agent, ffi.sizeof("struct ps_message"), 2)
    if len(fds) == 2:
        return View(*fds)
    for fd in fds:
        os.close(fd)
    raise OSError("the agent gave nothing to read" if data else "the agent hung up")


class Handler(BaseHTTPRequestHandler):
    """GET /metrics, /healthz."""

    timeout = 5
    """Seconds: who connects and says nothing keeps nobody waiting for longer."""

    view: View | None = None

    def do_GET(self) -> None:
        """Answer from shared memory."""
        view = self.current()
        if self.path == "/metrics":
            self._answer(200, view.metrics() if view else "")
        elif self.path == "/healthz":
            why = view.unhealthy(time.monotonic()) if view else "the agent has not attached this engine yet"
            self._answer(503 if why else 200, (why or "ok") + "\n")
        else:
            self._answer(404, "use /metrics or /healthz\n")

    @classmethod
    def current(cls) -> View | None:
        """In a pod the file comes after this process, and may be made again."""
        try:
            if cls.view is None or cls.view.inode != Path("queues").stat().st_ino:
                cls.view = ask_agent()
        except OSError:
            pass  # gone for now, or the agent is: what was there last is shown
        return cls.view

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        with suppress(ConnectionError):  # whoever asked did not wait
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not worth a line each."""

    def address_string(self) -> str:
        """A unix socket has no client address."""
        return "local"


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(prog="packetstack-engine", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="the engine's directory, shared with the agent")
    parser.add_argument("--listen", metavar="ADDRESS:PORT", help="serve there instead of on a unix socket")
    parser.add_argument("--pod", action="store_true", help="start all of an engine in its container")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    if arguments.pod:
        start(directory, arguments.listen)
    # From here the agent is reached later too: without privileges the way to this directory is closed.
    os.chdir(directory)
    with _server(arguments.listen) as server:
        abi.lib(), abi.enum_names("ps_counter")  # read now: without privileges they may be out of reach
        give_up_privileges()
        Handler.current()
        server.serve_forever()


def start(directory: Path, listen: str | None) -> NoReturn:
    """Become the container's init."""
    init = str(abi.native("packetstack-init"))
    command = [init, "--linger", str(directory / "engine.sock")]
    command += ["--datapath", str(abi.native("packetstack-datapath")), "--socket", str(directory / "engine.sock")]
    command += ["--supervisor", sys.executable, "-P", "-m", "packetstack_engine.main", "--directory", str(directory)]
    os.execv(init, [*command, *(["--listen", listen] if listen else [])])


def _server(listen: str | None) -> socketserver.BaseServer:
    if listen:
        address, _, port = listen.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            raise SystemExit(f"--listen {listen}: is not an address with a port; use :9471 or 127.0.0.1:9471")
        family = socket.AF_INET if "." in address else socket.AF_INET6
        return Tcp((address.strip("[]") or "::", int(port)), family)
    path = Path("supervisor.sock")
    path.unlink(missing_ok=True)
    server = socketserver.UnixStreamServer(str(path), Handler)
    path.chmod(0o600)
    return server


class Tcp(socketserver.ThreadingTCPServer):
    """For the kubelet and Prometheus."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily) -> None:
        self.address_family = family
        super().__init__(address, Handler)


def give_up_privileges() -> None:
    """File and socket are open: nothing more is needed."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


if __name__ == "__main__":
    main()
