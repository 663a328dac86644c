"""Traffic that knows whether it was served: the generator `packetstack-traffic` and what it reports."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from packetstack_cli.lab import Lab
from packetstack_core.abi import native
from packetstack_core.verbs import Json


@dataclass(frozen=True)
class Outcome:
    """What became of a run, once everything under way has arrived or is given up."""

    connections: int
    """Opened, short ones included."""
    broken: int
    """Reset, refused, closed by the other side, without an answer in time, or wrongly answered."""
    never_opened: int
    """Long-lived connections that the run was too short to open."""
    requests: int
    datagrams_sent: int
    datagrams_lost: int
    datagrams_lost_forward: int
    datagrams_lost_back: int
    datagrams_reordered: int
    datagrams_duplicated: int
    socket_drops: int
    """Datagrams lost because the generator's own sockets were full."""
    longest_gap_ms: float
    """Longest time from a request's turn to its answer."""
    report: Json
    """The outcome as the generator wrote it."""

    @staticmethod
    def of(report: Json) -> Outcome:
        """Read the generator's report."""
        long, short, datagrams = report["connections"], report["short_connections"], report["datagrams"]
        return Outcome(
            connections=long["opened"] + short["opened"],
            broken=report["broken"] + datagrams["wrong"],
            never_opened=max(0, long["wanted"] - long["opened"] - long["broken"]),
            requests=report["requests"],
            datagrams_sent=datagrams["sent"],
            datagrams_lost=datagrams["lost"],
            datagrams_lost_forward=datagrams["lost_forward"],
            datagrams_lost_back=datagrams["lost_back"],
            datagrams_reordered=datagrams["reordered"],
            datagrams_duplicated=datagrams["duplicates"],
            socket_drops=datagrams["socket_drops"],
            longest_gap_ms=report["longest_gap_ms"],
            report=report,
        )

    def what_broke(self) -> str:
        """One line: kinds of breakage and the first ones."""
        kinds = ", ".join(f"{n} {how}" for how, n in self.report["broken_by"].items() if n) or "none"
        return f"{kinds}; first: {self.report['breakages'][:5]}"


class Servers:
    """Answers requests (TCP `port`) and sends datagrams back (UDP `udp_port`) on all addresses of the lab's server."""

    def __init__(self, lab: Lab, *, port: int = 8080, udp_port: int = 8081, cpu: int | None = None) -> None:
        self._report = lab.directory / "server.json"
        arguments: list[str] = []
        for address in (*lab.server_addresses, *(f"[{a}]" for a in lab.server_addresses6)):
            arguments += ["--bind", f"{address}:{port}", "--udp", f"{address}:{udp_port}"]
        if cpu is not None:
            arguments += ["--cpu", str(cpu)]
        self._process = lab.start(
            "server", str(native("packetstack-traffic")), "serve", *arguments, "--report", str(self._report)
        )
        lab.wait_for_listener("server", port, server=self._process)

    def stop(self) -> Json:
        """End the servers; returns their own counts."""
        self._process.terminate()
        self._process.wait(10)
        counts: Json = json.loads(self._report.read_text())
        return counts


class Traffic:
    """A running generator in the lab's client. `samples` grows by one a tenth of a second.

    Targets are `address:port`, IPv6 addresses in brackets. `seconds` bounds the run; `stop()` ends it before.
    """

    def __init__(
        self,
        lab: Lab,
        targets: Sequence[str],
        udp_targets: Sequence[str] = (),
        *,
        connections: int = 1000,
        udp_flows: int = 0,
        request_interval_ms: int = 2000,
        udp_interval_ms: int = 100,
        udp_rate: int | None = None,
        udp_skew: float | None = None,
        warm_up_seconds: float | None = None,
        new_rate: int = 0,
        answer_bytes: str = "64-2048",
        ramp_seconds: float | None = None,
        leave_seconds: float | None = None,
        timeout_seconds: float = 10,
        seconds: float = 600,
        cpu: int | None = None,
        name: str = "traffic",
    ) -> None:
        """`leave_seconds`: in which connections and flows end, one after the other, once it is to stop; None: at once.
        `name`: another one for each that runs at the same time in a lab."""
        self.samples: list[Json] = []
        self._report = lab.directory / f"{name}.json"
        self._report.unlink(missing_ok=True)
        self.timeout_seconds = timeout_seconds + (leave_seconds or 0)
        """How long it may take to end."""
        arguments = [word for target in targets for word in ("--target", target)]
        arguments += [word for target in udp_targets for word in ("--udp-target", target)]
        for option, value in {
            "connections": connections,
            "udp-flows": udp_flows,
            "request-interval-ms": request_interval_ms,
            "udp-interval-ms": udp_interval_ms,
            "udp-rate": udp_rate,
            "udp-skew": udp_skew,
            "warm-up-s": warm_up_seconds,
            "new-rate": new_rate,
            "answer-bytes": answer_bytes,
            "timeout-s": timeout_seconds,
            "duration": seconds,
            "ramp-s": ramp_seconds,
            "leave-s": leave_seconds,
            "cpu": cpu,
            "sources": ",".join(lab.client_addresses + lab.client_addresses6),
            "report": self._report,
        }.items():
            if value is not None:
                arguments += [f"--{option}", str(value)]
        self._process = lab.start(
            "client", str(native("packetstack-traffic")), "run", *arguments, stdout=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.samples.append(json.loads(line))

    @property
    def latest(self) -> Json:
        """The newest sample; empty before the first."""
        return self.samples[-1] if self.samples else {}

    @property
    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def wait_open(self, timeout_seconds: float = 120) -> None:
        """Until every long-lived connection is open or broken."""
        deadline = time.monotonic() + timeout_seconds
        while not self.latest.get("ready"):
            if not self.running or time.monotonic() > deadline:
                raise TimeoutError(f"connections open after {timeout_seconds:g} s: {self.latest.get('open', 0)}")
            time.sleep(0.05)

    def leave(self) -> None:
        """Begin to end, as `leave_seconds` says; `stop` waits for it."""
        while self.running and not self.samples:
            time.sleep(0.01)  # it does not listen to signals yet
        self._process.terminate()

    def stop(self) -> Outcome:
        """No more requests; wait for what is under way, close all connections."""
        self.leave()
        self._process.wait(self.timeout_seconds + 60)
        self._reader.join(5)
        return Outcome.of(json.loads(self._report.read_text()))
