"""Numbers for clusters, so that several on one machine share no name, address or directory."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.cluster.processes import ClusterError

STATE = Path(__file__).resolve().parents[2] / "build" / "cluster"
KEPT = 0  # the one of `make cluster`; tests take the others
LAST = 15


class Slot:
    """A number that no other process of this machine holds until `release()`; the lowest free one when not given.

    Raises `ClusterError` when it, or every number, is held.
    """

    def __init__(self, number: int | None = None) -> None:
        self._held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for candidate in range(KEPT + 1, LAST + 1) if number is None else (number,):
            try:
                # An abstract socket: a killed process lets go of it, and nothing is left in a file system.
                self._held.bind(f"\0packetstack-cluster-{candidate}")
            except OSError:
                continue
            self.number = candidate
            self.directory = STATE / str(candidate)
            return
        self._held.close()
        wanted = f"cluster {number}" if number is not None else "every cluster number"
        raise ClusterError(f"{wanted}: another process is using it; end that, or `make cluster-down`")

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it; what lies in its directory (logs of a failed start) stays until they do."""
        with suppress(OSError):
            self.directory.rmdir()
        self._held.close()
