"""What engines and devices have counted, and what engines keep of packets that ended them. Changes nothing."""

import time
from collections.abc import Sequence

from packetstack_agent import devices, networks
from packetstack_agent.engines import Engine
from packetstack_agent.natives import call, constant, ffi, lib
from packetstack_core.verbs import Json


def captures(engine: Engine) -> list[Json]:
    """The last packets that were dropped because the process died twice while it handled them, newest last."""
    view, most = engine.view, constant("PS_CAPTURES")
    kept = ffi.cast("struct ps_capture *", ffi.cast("char *", view) + view.captures_offset)
    began = time.time() - time.monotonic()
    found = []
    for n in range(max(0, view.captured - most), view.captured):
        c = kept[n % most]
        found.append(
            {
                "time": began + c.time_ns / 1e9,
                "bucket": int(c.bucket),
                "queue": int(c.queue),
                "length": int(c.length),
                "bytes": bytes(c.bytes)[: c.length].hex(),
            }
        )
    return found


def census(engine: Engine) -> dict[str, int]:
    """Frames in no ring, in two rings, and slots that name none. Exact while no packets flow."""
    out = ffi.new("struct ps_census *")
    call(lib().ps_queues_census, engine.view, engine.fds, out)
    return {"missing": int(out.missing), "twice": int(out.twice), "bad": int(out.bad)}


def add_drops(engine: Engine, by_engine: dict[str, int], by_kernel: dict[str, int]) -> None:
    """Add what this engine, and the kernel in front of it, have dropped."""
    for name, count in engine.counters().items():
        if name.startswith("drop_") or name == "late":
            name = name.removeprefix("drop_")
            by_engine[name] = by_engine.get(name, 0) + count
    for name, count in engine.kernel_drops().items():
        by_kernel[name] = by_kernel.get(name, 0) + count
    for name, count in link_drops([engine.device]).items():
        by_kernel[name] = by_kernel.get(name, 0) + count


def add_copies(engine: Engine, counts: dict[str, int]) -> None:
    """Add what this engine got of mirrored traffic: `mirrored`, and `rejected_*` of it, which the other set handles."""
    for name, count in engine.counters().items():
        if name == "mirrored" or name.startswith("rejected_"):
            counts[name] = counts.get(name, 0) + count


def link_drops(names: Sequence[str]) -> dict[str, int]:
    """Frames lost on the way through these devices: full veth rings and backlogs."""
    total = {"xdp_xmit_errors": 0, "link_dropped": 0}
    dropped = networks.drops()
    for name in names:
        for counter, count in devices.statistics(name).items():
            if counter.endswith("xdp_xmit_errors"):
                total["xdp_xmit_errors"] += count
        if name in dropped:
            total["link_dropped"] += sum(dropped[name])
    return total
