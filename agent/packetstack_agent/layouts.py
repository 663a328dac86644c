"""What another build has made: found without touching it, and ended when somebody says so.

Shared memory and the director's maps have a layout. A build that meets another one leaves all of it alone: engines,
routes and the director go on without it.
"""

import os
import shutil
import signal
import struct
from contextlib import suppress
from pathlib import Path

from packetstack_agent import node, processes
from packetstack_agent.errors import AgentError
from packetstack_agent.natives import call, constant, lib, text
from packetstack_agent.node import RunDirectory
from packetstack_core import abi
from packetstack_core.kinds import pod_directory


class LayoutMismatch(AgentError):
    """What is there was made by another build. Nothing of it was touched."""


def check(run: RunDirectory) -> None:
    """LayoutMismatch if this build cannot take over what the run directory has. Only reads. Blocks."""
    stacks = [f"stack {name} has memory layout {layout}" for name, layout in _stacks(run).items()]
    if stacks:
        problem = f"{', '.join(stacks)}; this build has {constant('PS_LAYOUT_VERSION')}"
    else:
        problem = _before_sets(run) or _pins(run)
    if problem:
        raise LayoutMismatch(
            f"LayoutMismatch: {problem}. The build that made it keeps serving, nothing was changed; with this one all flows end"
        )


def _stacks(run: RunDirectory) -> dict[str, int]:
    """Stack -> layout of its files, when that is not ours. A file that makes no sense says nothing here."""
    found: dict[str, int] = {}
    for name in run.record.documents:
        for directory in (run.stack(name), *run.stack(name).glob("sets/*")):
            for file in ("arena", "config"):
                found |= _other(directory / file, name)
    for slot, engine in run.record.engines.items():
        if isinstance(engine, dict):
            pod = engine.get("pod")
            stack = str(engine.get("stack"))
            directory = run.engine(pod_directory(stack.partition(".")[0], pod) if pod else slot)
            found |= _other(directory / "queues", stack)
    return dict(sorted(found.items()))


def _other(path: Path, stack: str) -> dict[str, int]:
    magics = {constant(f"PS_{kind}_MAGIC") for kind in ("ARENA", "CONFIG", "ENGINE")}
    try:
        with path.open("rb") as file:
            magic, layout = struct.unpack("II", file.read(8))
    except (OSError, struct.error):
        return {}
    return {stack: layout} if magic in magics and layout != constant("PS_LAYOUT_VERSION") else {}


def _before_sets(run: RunDirectory) -> str:
    """Which stacks have their memory where builds had it that knew no sets of engines; empty when none has."""
    found = sorted(name for name in run.record.documents if (run.stack(name) / "arena").exists())
    return (
        f"stack {', '.join(found)} has one memory for all of its engines; this build has one for each set"
        if found
        else ""
    )


def _pins(run: RunDirectory) -> str:
    """Which pinned map is not of this build's form; empty when all are."""
    try:
        for file, prefix in (
            ("director.bpf.o", ""),
            ("host.bpf.o", ""),
            *(("engine.bpf.o", f"e{slot}_") for slot in run.record.engines),
        ):
            call(lib().ps_pins_check, text(abi.NATIVE), text(file), text(f"{run.pins}/{prefix}"))
    except AgentError as e:
        return str(e)
    return ""


def end(run: RunDirectory) -> list[str]:
    """End all flows of another build: its engines, programs, maps and files go; which stacks there are stays.

    What begins next makes them anew. Returns the stacks. May be repeated. Blocks.
    """
    record = run.record
    for engine in record.engines.values():
        if uid := engine.get("pod_uid"):
            record.leaving[pod_directory(engine["stack"].partition(".")[0], engine["pod"])] = uid
            _end_datapath(uid)
    node.detach(run)
    node.clear_engines(run)
    shutil.rmtree(run.path / "stacks", ignore_errors=True)
    for gone in (record.engines, record.sets, record.proxied, record.sysctls, record.pinned, record.rebalanced):
        gone.clear()
    run.save(must=True)
    return sorted(record.documents)


def _end_datapath(uid: str) -> None:
    """In a pod the kubelet starts processes and init starts datapaths: the next one finds that it is not let in."""
    for pid in processes.of_pod(uid):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("packetstack-dat"):
                os.kill(pid, signal.SIGKILL)
