"""Traffic of which one crowd follows the other, so that the connections of each end by themselves."""

from dataclasses import dataclass

from tests.lab.mirrored import ALL_TCP, ALL_UDP

from packetstack_cli.lab import Lab
from packetstack_cli.traffic import Outcome, Traffic


@dataclass(frozen=True)
class Crowd:
    """Clients that come and leave together."""

    connections: int
    flows: int
    """Of UDP."""
    ramp_seconds: float
    """In which they come."""
    leave_seconds: float
    """In which they leave, each at its next turn."""
    request_interval_ms: int


class Crowds:
    """One after the other, each as large; the first is there."""

    def __init__(self, lab: Lab, crowd: Crowd) -> None:
        self._lab, self._crowd, self._count = lab, crowd, 0
        self.here = self._come()
        self.here.wait_open()

    def _come(self) -> Traffic:
        """The next one, which begins to open its connections."""
        self._count += 1
        crowd = self._crowd
        return Traffic(
            self._lab, ALL_TCP, ALL_UDP, connections=crowd.connections, udp_flows=crowd.flows, new_rate=20,
            request_interval_ms=crowd.request_interval_ms, udp_interval_ms=800, answer_bytes="64-1024",
            ramp_seconds=crowd.ramp_seconds, leave_seconds=crowd.leave_seconds, name=f"crowd{self._count % 2}",
        )  # fmt: skip

    def change(self) -> Outcome:
        """One comes while the one that is here leaves; what became of that one."""
        before, self.here = self.here, self._come()
        outcome = before.stop()
        self.here.wait_open()
        return outcome
