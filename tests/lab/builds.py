"""Builds of the datapath that differ in the layout of their shards, and an agent for which either is installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.lab.node import Node
from tests.waiting import eventually

from packetstack_core import abi

OTHER = Path(__file__).parents[2] / "build/meson/engine/packetstack-datapath-other-layout"
INJECTED = Path(__file__).parents[2] / "build/meson/agent/libpacketstack-inject.so"

# The agent as it is, but for which datapath is installed, and perhaps with steps to die at.
AGENT = """
import os, sys
from packetstack_core import abi
paths = {"packetstack-datapath": abi.Path(sys.argv.pop(1))}
if os.environ.get("PACKETSTACK_DIE_AT"):
    paths["libpacketstack.so"] = abi.Path(sys.argv.pop(1))
installed = abi.native
abi.native = lambda name: paths.get(name) or installed(name)
from packetstack_agent.main import main
main()
"""


class Builds:
    """What is installed on a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._installed = node.lab.directory / "installed-datapath"
        self.install(other=False)

    def install(self, *, other: bool) -> None:
        """A build with this project's shard layout, or the other one."""
        fresh = self._installed.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(OTHER if other else abi.native("packetstack-datapath"))
        fresh.replace(self._installed)

    def start_agent(self, die_at: str = "") -> subprocess.Popen[str]:
        """One that takes over what there is."""
        library = [str(INJECTED)] if die_at else []
        agent = self._node.lab.start(
            "node", sys.executable, "-c", AGENT, str(self._installed), *library,
            "--run-dir", str(self._node.lab.run_directory),
            env={"PACKETSTACK_DIE_AT": die_at} if die_at else {}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        eventually(self._node.client.alive, 30)
        return agent

    def kill_agent(self) -> None:
        """It is gone."""
        agent = self._node.client.agent_pid()
        os.kill(agent, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{agent}/fd/0").exists())
