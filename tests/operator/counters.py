"""A stand-in for the agents' GET /load: counters of engines that do not run, which rise as busy as a test says."""

import http.server
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

from packetstack_core.load import CoreCounters, EngineCounters, QueueCounters, Snapshot, to_json

CYCLES = 1_000_000_000
"""A second."""
BUCKETS = 1024


def busy(percent: int) -> dict[str, Any]:
    """The metric of `spec.autoscaling` that these counters answer."""
    target = {"type": "Utilization", "averageUtilization": percent}
    return {"type": "Engine", "engine": {"name": "Utilization", "target": target}}


class Server(http.server.ThreadingHTTPServer):
    """Says nothing about clients that are killed."""

    def handle_error(self, *_: object) -> None:
        pass


class PlayedCounters:
    """One address for the agents of all nodes. Inside a `with` it answers at 127.0.0.1:`port`.

    A stack is `namespace.name`. Its load is spread evenly over the cores of its active engines, of which none does more than
    it can.
    """

    def __init__(self) -> None:
        self.engines: dict[str, dict[str, str]] = {}
        """Stack -> name of each engine that is attached, and its state."""
        self.cores: dict[tuple[str, str], int] = {}
        """Stack and engine -> its cores, if it has not one."""
        self.load: dict[str, float] = {}
        """Stack -> fully busy cores that its load would take."""
        self.drains: dict[str, float] = {}
        """Stack -> busy share of each engine that is not active."""
        self.silent: set[str] = set()
        """Engines whose counters cannot be read."""
        self.away = False
        """No agent answers in time."""
        self.asked: list[str] = []
        """Path and query of each request."""
        self._counted: dict[tuple[str, str], tuple[float, float]] = {}
        """Stack and engine -> busy seconds, and all seconds, since it was first asked for."""
        self._at = time.monotonic()
        self._lock = threading.Lock()
        played = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                played.asked.append(self.path)
                status, body = played.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(ConnectionError):  # whoever asked has gone
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self) -> "PlayedCounters":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def turn(self) -> None:
        """Time passes: the counters rise as the load is now. Call before the load is changed."""
        with self._lock:
            now = time.monotonic()
            seconds, self._at = now - self._at, now
            for stack, engines in list(self.engines.items()):
                active = sum(self.cores.get((stack, name), 1) for name, state in engines.items() if state == "Active")
                for name, state in engines.items():
                    share = self.drains.get(stack, 0.0)
                    if state == "Active":
                        share = min(1.0, self.load.get(stack, 0.0) / active)
                    busy, total = self._counted.get((stack, name), (0.0, 0.0))
                    self._counted[stack, name] = (busy + share * seconds, total + seconds)

    def attach(self, stack: str, engines: dict[str, str], cores: dict[str, int] | None = None) -> None:
        """From now on these, with their states. `cores`: of those that are told."""
        self.cores |= {(stack, name): count for name, count in (cores or {}).items()}
        if self.engines.get(stack) != engines:
            self.turn()
            self.engines[stack] = engines

    def set_load(self, stack: str, engines: float) -> None:
        """From now on."""
        self.turn()
        self.load[stack] = engines

    def answer(self, path: str) -> tuple[int, bytes]:
        query = parse_qs(urlsplit(path).query)
        stack = query["stack"][0]
        if self.away:
            time.sleep(1.5)
            return 503, b"away\n"
        if stack not in self.engines:
            return 404, b"no such stack\n"
        self.turn()
        found = []
        for name, state in self.engines[stack].items():
            if name in self.silent:
                continue
            busy, total = (int(CYCLES * s) for s in self._counted.get((stack, name), (0.0, 0.0)))
            cores = self.cores.get((stack, name), 1)
            packets = cores * busy // 1000
            found.append(
                EngineCounters(
                    int(name.rpartition("-")[2]), name, state, True,
                    (CoreCounters(busy, total),) * cores, (QueueCounters(0, busy, packets, 0),),
                    packets, 64 * packets, packets // 100, 0, packets // 1000,
                )
            )  # fmt: skip
        buckets = (0,) * BUCKETS if query.get("buckets") == ["1"] else ()
        return 200, to_json(Snapshot(self._at, tuple(found), buckets))
