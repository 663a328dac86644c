"""`packetstack-agent`: the background process of a node. Usually started by `packetstack up`."""

import argparse
import asyncio
import fcntl
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from packetstack_agent import loading
from packetstack_agent.agent import Agent
from packetstack_agent.errors import AgentError
from packetstack_agent.metrics import render
from packetstack_agent.node import DEFAULT_RUN_DIRECTORY, RunDirectory, clean
from packetstack_agent.server import Server
from packetstack_core.abi import NativeError as NotBuilt
from packetstack_core.load import to_json

READ_SECONDS = 0.2
"""Between two looks at the counters of a stack for those who ask over HTTP."""
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
    parser.add_argument("--clean", action="store_true", help="remove what a dead agent left, and exit")
    arguments = parser.parse_args()
    try:
        run = RunDirectory(arguments.run_dir, arguments.bpf_dir)
        if os.geteuid() != 0:
            raise AgentError("packetstack-agent: needs root: it loads BPF programs and makes network namespaces")
        if len(os.fsencode(run.path)) > LONGEST_PATH:
            raise AgentError(f"--run-dir {run.path}: is too long for sockets in it; use at most {LONGEST_PATH} bytes")
        alone = _alone(run)
        if arguments.clean:
            for line in clean(run):
                print(f"removed {line}")
            return
        alone.write_text(str(os.getpid()))
        run.record.metrics_listen = arguments.metrics_listen or run.record.metrics_listen
        asyncio.run(_serve(run, arguments.node, arguments.uplink))
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


async def _serve(run: RunDirectory, node: str | None, uplinks: list[str]) -> None:
    first = not run.record.documents
    agent = Agent(run)
    server = Server(agent)
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        # Whatever ends the agent, it does not end the stacks: `packetstack down` does.
        loop.add_signal_handler(sig, server.leave)
    try:
        await agent.start()
        follower = await _follow(agent, node, uplinks) if node else None
        listen = run.record.metrics_listen
        http = await _metrics(agent, listen, follower.healthy if follower else lambda: True) if listen else None
        listener = await server.listen()
    except BaseException:
        await (agent.stop() if first else agent.leave())
        raise
    await server.stopped.wait()
    listener.close()
    if follower is not None:
        await follower.close()
    if http is not None:
        await http.cleanup()
    await (agent.leave() if server.leaving else agent.stop())


async def _follow(agent: Agent, node: str, uplinks: list[str]) -> Any:
    # Heavy, and of no use without a cluster.
    from packetstack_agent.cluster import Follower

    await agent.set_uplinks(uplinks)
    follower = Follower(agent, node)
    follower.start()
    return follower


async def _metrics(agent: Agent, listen: str, well: Callable[[], bool]) -> web.AppRunner:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=render(agent), content_type="text/plain")

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if well() else web.Response(text="it follows no table\n", status=503)

    read: dict[tuple[str, bool], tuple[float, bytes]] = {}
    """Stack, and whether with its buckets -> when its load was read last, and the answer."""

    async def load(request: web.Request) -> web.Response:
        name, buckets = request.query.get("stack", ""), request.query.get("buckets") == "1"
        managed, now = agent.stacks.get(name), time.monotonic()
        if managed is None:
            read.pop((name, buckets), None)
            return web.Response(text="no such stack\n", status=404)
        # Whoever asks more often gets what there is: reading takes time from what else the agent does.
        if now - read.get((name, buckets), (-math.inf, b""))[0] > READ_SECONDS:
            try:
                read[name, buckets] = now, to_json(loading.snapshot(managed, with_buckets=buckets))
            except AgentError as e:
                return web.Response(text=f"{e}\n", status=503)
        return web.Response(body=read[name, buckets][1], content_type="application/json")

    address, _, port = listen.rpartition(":")
    application = web.Application()
    application.router.add_get("/metrics", answer)
    application.router.add_get("/load", load)
    application.router.add_get("/healthz", healthy)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, address.strip("[]"), int(port)).start()
    except (OSError, ValueError) as e:
        raise AgentError(
            f"--metrics-listen {listen}: {e}; use an address and a free port, as in 127.0.0.1:9470"
        ) from None
    return runner


if __name__ == "__main__":
    main()
