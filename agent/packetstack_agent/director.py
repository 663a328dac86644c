"""The node's director as the agent holds it: one handle on its pinned programs and maps."""

from pathlib import Path
from typing import Any

from packetstack_agent.natives import call, lib, text
from packetstack_core import abi


class Director:
    """Opened when the agent starts, closed when nobody uses it any more."""

    def __init__(self) -> None:
        self.handle: Any = None
        """`struct ps_director *`, None while it is not open."""

    def open(self, pins: Path) -> None:
        """Load the programs, or take over those that an earlier agent has pinned. Blocks."""
        self.handle = call(lib().ps_director_open, text(abi.NATIVE), text(pins))

    def close(self) -> None:
        """Let go of it; what is pinned goes on."""
        if self.handle is not None:
            lib().ps_director_close(self.handle)
            self.handle = None
