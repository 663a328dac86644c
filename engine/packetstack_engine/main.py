"""`packetstack-engine`: the supervisor. Shows the engine's health and counters from shared memory; no packet needs it.

Serves GET /metrics (Prometheus text) and /healthz on the unix socket DIRECTORY/supervisor.sock. It is light on
purpose: standard library and cffi alone.
"""

import argparse
import os
import socketserver
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from packetstack_core import abi

NOBODY = 65534
HANG_SECONDS = 2.0
"""A core that is not asleep and whose loop does not turn for so long hangs. A sleeping one turns every 0.1 s."""


class View:
    """An engine file, read only."""

    def __init__(self, path: Path) -> None:
        error = abi.ffi.new("struct ps_error *")
        self.engine: Any = abi.lib().ps_engine_open(os.fsencode(path), 1, error)
        if self.engine == abi.ffi.NULL:
            raise SystemExit(abi.ffi.string(error.text).decode())
        self._beats: dict[int, tuple[int, float]] = {}
        # Read now: without privileges the declarations may be out of reach.
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


class Handler(BaseHTTPRequestHandler):
    """GET /metrics, /healthz."""

    view: View

    def do_GET(self) -> None:
        """Answer from shared memory."""
        if self.path == "/metrics":
            self._answer(200, self.view.metrics())
        elif self.path == "/healthz":
            why = self.view.unhealthy(time.monotonic())
            self._answer(503 if why else 200, (why or "ok") + "\n")
        else:
            self._answer(404, "use /metrics or /healthz\n")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
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
    parser.add_argument("--directory", type=Path, required=True, help="the engine's directory, made by the agent")
    directory: Path = parser.parse_args().directory
    Handler.view = View(directory / "queues")
    path = directory / "supervisor.sock"
    path.unlink(missing_ok=True)
    with socketserver.UnixStreamServer(str(path), Handler) as server:
        path.chmod(0o600)
        give_up_privileges()
        server.serve_forever()


def give_up_privileges() -> None:
    """File and socket are open: nothing more is needed."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


if __name__ == "__main__":
    main()
