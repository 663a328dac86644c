"""`packetstack demo`: a pool is resized, rebalanced, killed and upgraded under live traffic; what breaks is counted.

Everything is real: the command, the agent, engines, packets. Only the network is made of namespaces.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from packetstack_cli.client import Client
from packetstack_cli.demo_steps import (
    STACK,
    STYLE,
    Kind,
    Show,
    Step,
    checklist,
    entitle,
    mark,
    named_drops,
    shown,
    sleep,
    smooth,
    summary,
    take,
    told,
    verdict,
)
from packetstack_cli.errors import CliError
from packetstack_cli.lab import NODE_UPLINK, Lab, LabError
from packetstack_cli.outage import Outage, hang
from packetstack_cli.traffic import Outcome, Servers, Traffic
from packetstack_core.verbs import Json

TARGETS = ("192.0.2.10:80", "[2001:db8:1::10]:80")
UDP_TARGETS = ("192.0.2.10:53", "[2001:db8:1::10]:53")

# Slots of engines are not reused soon, so their colours go round.
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
COLOURS_OF_TERMINAL = ("blue", "dark_orange", "green", "red", "cyan", "yellow", "magenta", "orange4")


def run_demo(build_dir: Path, connections: int = 2000, udp_flows: int = 200, seconds: int = 75) -> int:
    """Run the demo for about `seconds` seconds of traffic; 0 only when no connection broke and every step succeeded.

    Writes `report.json` and `demo.png` into `build_dir`.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 110
    build_dir.mkdir(parents=True, exist_ok=True)
    file = definition()
    try:
        with Lab("pkl-demo") as lab:
            console.print("Three namespaces: [b]client[/b] -- [b]node[/b] -- [b]server[/b]")
            Servers(lab)
            console.print(f"node $ packetstack up {file.name} --uplink {NODE_UPLINK}", style="bold")
            console.print(lab.packetstack("up", str(file), "--uplink", NODE_UPLINK).rstrip())
            show, outcome, drops = _perform(console, lab, connections, udp_flows, seconds)
    except (LabError, CliError, TimeoutError) as e:
        console.print(f"demo: {e}", style="red")
        return 1
    (build_dir / "report.json").write_text(json.dumps(_report(show, outcome, drops), indent=2) + "\n")
    console.print(_summary(show, outcome, drops))
    if picture := draw(show, outcome, build_dir / "demo.png"):
        console.print(f"{picture} and {build_dir / 'report.json'} show the run")
    return verdict(console, show.steps, [outcome])


def definition() -> Path:
    """The stack of the demo: in the source tree, or where the package keeps it."""
    return Path(__file__).parents[2] / "examples/demo.yaml"


def _perform(
    console: Console, lab: Lab, connections: int, udp_flows: int, seconds: int
) -> tuple[Show, Outcome, dict[str, int]]:
    client = Client(lab.run_directory)
    ramp_seconds = min(8.0, seconds / 6)
    traffic = Traffic(
        lab,
        TARGETS,
        UDP_TARGETS,
        connections=connections,
        udp_flows=udp_flows,
        request_interval_ms=1000,
        udp_interval_ms=100,
        new_rate=50,
        ramp_seconds=ramp_seconds,
        seconds=seconds + 120,
    )
    outage = Outage(lab, client, STACK, ("192.0.2.10", 53))
    show = Show(lab, client, traffic, _plan(lab, client, outage))
    try:
        with shown(console, show, lambda: _view(show)):
            traffic.wait_open(ramp_seconds + 60)
            rest = (seconds - show.now()) / (len(show.steps) + 1)
            began = show.now()
            for number, step in enumerate(show.steps):
                sleep(show, began + rest * (number + 0.7))
                take(console, show, step)
            show.phase = "every step is taken"
            sleep(show, seconds)
            show.phase = "traffic ends"
            drops = named_drops(client, lab)
            outcome = traffic.stop()
    finally:
        outage.close()
    return show, outcome, drops


def _plan(lab: Lab, client: Client, outage: Outage) -> list[Step]:
    def scale(replicas: int) -> Callable[[], str]:
        return lambda: lab.packetstack("scale", STACK, "--replicas", str(replicas))

    def engines() -> list[Json]:
        status = client.get(STACK)[0]["status"]
        return [engine for engine in status["engines"] if engine["state"] == "Active"]

    def move_queue() -> str:
        engine = engines()[0]
        core = next(core for core in engine["cores"] if core["queues"])
        queue = core["queues"][0]["queue"]
        other = next(c["core"] for c in engine["cores"] if c["core"] != core["core"])
        return lab.packetstack("move", STACK, "--queue", f"{engine['slot']}:{queue}", "--core", str(other))

    def move_buckets() -> str:
        slot = engines()[-1]["slot"]
        return lab.packetstack("move", STACK, "--buckets", "0-1023", "--engine", str(slot))

    def kill_datapath() -> float:
        engine = engines()[0]
        return outage.after(engine["slot"], lambda: os.kill(engine["pid"], signal.SIGKILL))

    def kill_engine() -> float:
        engine = engines()[-1]
        return outage.after(engine["slot"], lambda: os.killpg(engine["initPid"], signal.SIGKILL))

    def hang_datapath() -> float:
        engine = engines()[0]
        return outage.after(engine["slot"], lambda: hang(engine["pid"]))

    def restart_agent() -> str:
        agent = client.agent_pid()
        os.kill(agent, signal.SIGKILL)
        time.sleep(2)  # engines serve without an agent
        return lab.packetstack("upgrade", "--agent")

    return [
        Step("scale 2 → 4", scale(4), Kind.RESIZE),
        Step("queue to another core", move_queue, Kind.MOVE),
        Step("1,024 buckets to one engine", move_buckets, Kind.MOVE),
        Step("scale 4 → 1", scale(1), Kind.RESIZE),
        Step("scale 1 → 3", scale(3), Kind.RESIZE),
        Step("kill -9 a datapath", kill_datapath, Kind.KILL),
        Step("kill -9 a whole engine", kill_engine, Kind.KILL),
        Step("hang a datapath", hang_datapath, Kind.HANG),
        Step("kill -9 the agent, restart", restart_agent, Kind.AGENT_RESTART),
        Step("upgrade a datapath", lambda: lab.packetstack("upgrade", engines()[0]["name"]), Kind.UPGRADE),
    ]


# ---- what the user sees -------------------------------------------------------------------------------------------


def _view(show: Show) -> Group:
    latest = show.traffic.latest
    head = Text.assemble(
        (f" {show.now():5.1f} s ", "reverse"),
        f"  {show.phase}   ",
        (f"{latest.get('broken', 0)} broken", "bold red" if latest.get("broken") else "bold green"),
        f" of {latest.get('open', 0) + latest.get('new_connections', 0):,} connections",
    )
    traffic = Table.grid(padding=(0, 3))
    traffic.add_row(
        f"{latest.get('answers_per_second', 0):,.0f} answers/s",
        f"{latest.get('echoes_per_second', 0):,.0f} datagrams/s",
        f"{latest.get('datagrams_sent', 0) - latest.get('datagrams_received', 0):,} datagrams under way or lost",
        f"p50 {latest.get('rtt_p50_ms', 0):.1f} ms, p99 {latest.get('rtt_p99_ms', 0):.1f} ms",
        f"longest gap {latest.get('longest_gap_ms', 0):.0f} ms",
    )
    engines = Table(box=None, header_style="dim")
    for title in ("engine", "state", "buckets", "", "flows", "packets/s", "busy"):
        engines.add_column(title, justify="left" if title in ("state", "") else "right")
    for engine in show.statuses[-1][1]["engines"] if show.statuses else ():
        colour = COLOURS_OF_TERMINAL[engine["slot"] % len(COLOURS_OF_TERMINAL)]
        engines.add_row(
            Text(str(engine["slot"]), style=colour),
            engine["state"],
            f"{engine['buckets']:,}",
            Text("█" * (engine["buckets"] // 100), style=colour),
            f"{engine['flows']:,}",
            f"{engine['packetsPerSecond']:,.0f}",
            f"{engine['busy']:.0%}",
        )
    return Group(head, traffic, Panel(engines, title="pool", height=9), checklist(show.steps))


def _summary(show: Show, outcome: Outcome, drops: dict[str, int]) -> Table:
    lines = (
        ("connections", f"{outcome.connections:,}, {outcome.requests:,} requests, every answer compared"),
        (
            "datagrams",
            f"{outcome.datagrams_sent:,}, {outcome.datagrams_lost} lost, {outcome.datagrams_reordered} reordered",
        ),
        ("longest gap", f"{outcome.longest_gap_ms:.1f} ms"),
        ("named drops", ", ".join(f"{name} {n}" for name, n in drops.items()) or "none"),
    )
    return summary(show, lines)


def _done(show: Show, kind: Kind) -> int:
    return sum(step.kind is kind and not step.failed and step.ended > 0 for step in show.steps)


def _outage(show: Show, kind: Kind) -> float | None:
    """Median over the steps of this kind, in milliseconds; None if there was none."""
    found = [step.outage_ms for step in show.steps if step.kind is kind and step.outage_ms is not None]
    return round(statistics.median(found), 1) if found else None


def _report(show: Show, outcome: Outcome, drops: dict[str, int]) -> Json:
    return {
        "connections": outcome.connections,
        "broken": outcome.broken,
        "resizes": _done(show, Kind.RESIZE),
        "kills": _done(show, Kind.KILL),
        "hangs": _done(show, Kind.HANG),
        "agent_restarts": _done(show, Kind.AGENT_RESTART),
        "hot_restarts": _done(show, Kind.UPGRADE),
        "datagrams_sent": outcome.datagrams_sent,
        "datagrams_lost": outcome.datagrams_lost,
        "datagrams_reordered": outcome.datagrams_reordered,
        "longest_gap_ms": outcome.longest_gap_ms,
        "served_again_ms": _outage(show, Kind.KILL),
        "served_again_after_hang_ms": _outage(show, Kind.HANG),
        "steps": told(show.steps),
        "drops": drops,
        "traffic": outcome.report,
    }


def draw(show: Show, outcome: Outcome, path: Path) -> Path | None:
    """The picture: what the clients got, how long they waited, who owned the buckets. None without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    samples = [s for s in show.traffic.samples if not s["stopping"]]
    statuses = [(t, s) for t, s in show.statuses if not samples or t <= samples[-1]["elapsed"] + 0.3]
    if len(samples) < 2 or len(statuses) < 2:
        return None
    with plt.rc_context(STYLE):
        figure, (served, waits, pool) = plt.subplots(
            3, 1, sharex=True, figsize=(14, 8.5), height_ratios=(2.2, 1.5, 2.6), layout="constrained"
        )
        at = [s["elapsed"] for s in samples]
        answers = smooth([s["answers_per_second"] for s in samples])
        served.fill_between(at, answers, color="#4e79a7", alpha=0.25, linewidth=0)
        served.plot(at, answers, color="#4e79a7", label="TCP answers, each compared byte for byte")
        echoes = smooth([s["echoes_per_second"] for s in samples])
        served.plot(at, echoes, color="#f28e2b", label="UDP datagrams echoed")
        served.set_ylabel("per second")
        served.set_ylim(0, max(1.0, *answers, *echoes) * 1.45)
        served.set_xlim(0, max(at[-1], statuses[-1][0]))
        served.legend(loc="lower right", frameon=False, ncols=2)

        waits.plot(at, [max(s["rtt_p50_ms"], 0.01) for s in samples], color="#9c9c9c", label="median")
        waits.plot(at, [max(s["rtt_p99_ms"], 0.01) for s in samples], color="#e15759", label="99th percentile")
        waits.set_yscale("log")
        waits.set_ylabel("answer after, ms")
        waits.legend(loc="upper right", frameon=False, ncols=2)

        times = [t for t, _ in statuses]
        slots = sorted({int(slot) for _, s in statuses for slot in s["owners"]})
        pool.stackplot(
            times,
            [[s["owners"].get(str(slot), 0) for _, s in statuses] for slot in slots],
            colors=[COLOURS[slot % len(COLOURS)] for slot in slots],
            labels=[f"engine {slot}" for slot in slots],
            step="post",
            edgecolor="white",
            linewidth=0.4,
        )
        pool.set_ylabel("buckets by owner")
        pool.set_xlabel("seconds")
        pool.margins(x=0, y=0)
        pool.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, ncols=max(1, len(slots) + 1))
        count = pool.twinx()
        count.step(times, [s["readyReplicas"] for _, s in statuses], where="post", color="black", linewidth=2)
        count.set_ylim(0, 5)
        count.set_ylabel("engines (black line)")
        count.spines["right"].set_visible(True)
        mark(show.steps, (served, waits, pool), width=11)
        entitle(
            figure,
            f"{outcome.broken} of {outcome.connections:,} connections broken, {outcome.datagrams_lost} of"
            f" {outcome.datagrams_sent:,} datagrams lost, {outcome.datagrams_reordered} reordered",
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path
