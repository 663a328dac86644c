"""`packetstack-agent`: the background process of a node. Usually started by `packetstack up`."""

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from packetstack_agent import devices, layouts
from packetstack_agent.ending import Ending
from packetstack_agent.errors import AgentError
from packetstack_agent.firewall import Mode, examine
from packetstack_agent.node import DEFAULT_RUN_DIRECTORY, RunDirectory, clean
from packetstack_core.abi import NativeError as NotBuilt

if TYPE_CHECKING:
    from packetstack_agent.agent import Agent
    from packetstack_agent.cluster import Follower

LONGEST_PATH = 80
"""Bytes of the run directory's path: a unix socket's has 107 at most."""


def main() -> None:
    """Parse arguments, run until told to stop."""
    parser = argparse.ArgumentParser(prog="packetstack-agent", description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIRECTORY)
    parser.add_argument("--metrics-listen", metavar="ADDRESS:PORT", help="serve Prometheus metrics over HTTP")
    parser.add_argument("--node", help="follow the FlowTables of this Kubernetes node")
    parser.add_argument(
        "--uplink", action="append", default=[], metavar="INTERFACE|NETWORK[:clients|:backends]",
        help="with --node: run the director on it as native XDP too; a network means the interface with an address in it; "
        "with a role, for packets of that side alone",
    )  # fmt: skip
    parser.add_argument(
        "--bpf-dir", type=Path, help="directory of a BPF file system for programs and maps; default: one of its own"
    )
    parser.add_argument(
        "--firewall", choices=list(Mode), help="who changes the node's packet filter where it stops packets of stacks"
    )
    parser.add_argument(
        "--examine-firewall", action="store_true", help="say as JSON what in it would stop them, and exit"
    )
    parser.add_argument("--clean", action="store_true", help="remove what a dead agent left, and exit")
    parser.add_argument(
        "--check", action="store_true", help="say whether this build can take over what runs, change nothing, and exit"
    )
    parser.add_argument(
        "--end-flows", action="store_true", help="end what another build has made with another memory layout, and go on"
    )
    arguments = parser.parse_args()
    try:
        run = RunDirectory(arguments.run_dir, arguments.bpf_dir)
        if os.geteuid() != 0:
            raise AgentError("packetstack-agent: needs root: it loads BPF programs and makes network namespaces")
        if len(os.fsencode(run.path)) > LONGEST_PATH:
            raise AgentError(f"--run-dir {run.path}: is too long for sockets in it; use at most {LONGEST_PATH} bytes")
        if arguments.check:
            devices.check_preemption()
            _meet(run, end_flows=False, stand_by=False)
            return
        if arguments.examine_firewall:
            print(json.dumps(examine(Mode(arguments.firewall or run.record.firewall), run.record.uplinks)))
            return
        alone = _alone(run)
        if arguments.clean:
            for line in clean(run):
                print(f"removed {line}")
            return
        devices.check_preemption()
        foreign = _meet(run, arguments.end_flows, arguments.node is not None)
        alone.write_text(str(os.getpid()))
        run.record.firewall = arguments.firewall or run.record.firewall
        run.record.metrics_listen = arguments.metrics_listen or run.record.metrics_listen
        if asyncio.run(_serve(run, arguments.node, arguments.uplink, foreign)):
            # The same process again, since its container ends with it.
            os.execv(
                sys.executable, [sys.executable, "-P", "-m", "packetstack_agent.main", *sys.argv[1:], "--end-flows"]
            )
    except (AgentError, NotBuilt) as e:
        sys.exit(str(e))
    except OSError as e:
        sys.exit(f"{e.filename or arguments.run_dir}: {e.strerror}; the agent needs to write there")


def _alone(run: RunDirectory) -> Path:
    """Take the file that says who is the agent of this directory; it is held until the process ends."""
    run.path.mkdir(parents=True, exist_ok=True)
    path = run.path / "agent.pid"
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AgentError(
            f"{run.path}: its agent runs already (process {path.read_text() or '?'}); use that one"
        ) from None
    return path


def _meet(run: RunDirectory, end_flows: bool, stand_by: bool) -> str:
    """Look for stacks that another build has made. Returns why the agent has to stand by; empty if it need not.

    LayoutMismatch if it may neither stand by nor end flows.
    """
    try:
        layouts.check(run)
    except layouts.LayoutMismatch as e:
        if stand_by and not end_flows and run.record.documents:
            return str(e)
        if not (stand_by or end_flows):
            raise layouts.LayoutMismatch(f"{e}, by: packetstack upgrade --agent --end-flows") from None
        ended = layouts.end(run)
        print(
            f"{e}: ended; all flows of {', '.join(ended)}" if ended else f"{e}: removed; there was no stack", flush=True
        )
    return ""


async def _serve(run: RunDirectory, node: str | None, uplinks: list[str], foreign: str) -> bool:
    """Run the agent until it is told to end. Returns whether it shall begin again and end the flows of another build."""
    # Half of the time of a start; `up`, `upgrade` and `down` also start agents that only look, or only remove.
    from packetstack_agent.agent import Agent
    from packetstack_agent.natives import lib
    from packetstack_agent.web.app import Web

    lib().ps_heap_share()
    first = not run.record.documents
    agent = Agent(run, foreign)
    ending = Ending()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        # Whatever ends the agent, it does not end the stacks: `packetstack down` does.
        loop.add_signal_handler(sig, ending.leave)
    try:
        await agent.start()
        follower = await _follow(agent, node, uplinks, ending) if node else None
        web = Web(agent, ending, follower.healthy if follower else lambda: True)
        if run.record.metrics_listen:
            await web.listen_tcp(run.record.metrics_listen)
        await web.listen(run.socket)
    except BaseException:
        await (agent.stop() if first else agent.leave())
        raise
    await ending.said.wait()
    await web.close()
    if follower is not None:
        await follower.close()
    await (agent.leave() if ending.leaving else agent.stop())
    return ending.anew


async def _follow(agent: "Agent", node: str, uplinks: list[str], ending: Ending) -> "Follower":
    # Heavy, and of no use without a cluster.
    from packetstack_agent.cluster import Follower

    if not agent.foreign:
        await agent.set_uplinks(uplinks)
    follower = Follower(agent, node, ending.begin_anew)
    follower.start()
    return follower


if __name__ == "__main__":
    main()
