"""`packetstack demo --handover mirror`: a second set of engines takes over, and the first leaves when its connections have ended.

Clients of before and clients of after the change are counted apart. Everything is real, as in the other demo.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from packetstack_cli import views
from packetstack_cli.client import Client
from packetstack_cli.demo import TARGETS, UDP_TARGETS, definition
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
from packetstack_cli.traffic import Outcome, Servers, Traffic
from packetstack_core.verbs import Json

# Timers that a person waits for: a flow that has ended, or a datagram's, is forgotten after them.
TIMERS = {"tcpClosedTimeoutSeconds": 5, "udpIdleTimeoutSeconds": 5, "udpUnansweredTimeoutSeconds": 5}
RETIRED_SECONDS = 40.0
COLOURS = ("#4e79a7", "#f28e2b")
"""Of the older set and its clients, of the newer set and its clients."""


@dataclass
class MirrorShow(Show):
    """With clients of after the change."""

    newer: Traffic | None = None
    newer_began: float = 0.0

    def clients(self) -> list[tuple[float, Traffic]]:
        """The older ones, and the newer ones once there are any."""
        return super().clients() + ([(self.newer_began, self.newer)] if self.newer is not None else [])

    def sets(self) -> list[Json]:
        """The sets of engines, as they were seen last."""
        return self.statuses[-1][1].get("sets", []) if self.statuses else []


def run_mirror_demo(build_dir: Path, connections: int = 2000, udp_flows: int = 200, seconds: int = 75) -> int:
    """Run it for about `seconds` seconds; 0 only when no connection broke and the first set has gone.

    Writes `mirror.json` and `mirror.png` into `build_dir`.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 110
    build_dir.mkdir(parents=True, exist_ok=True)
    try:
        with Lab("pkl-demo") as lab:
            console.print("Three namespaces: [b]client[/b] -- [b]node[/b] -- [b]server[/b]")
            Servers(lab)
            file = lab.directory / "mirror.yaml"
            file.write_text(_mirrored(definition().read_text()))
            console.print("handover: {strategy: Mirror}", style="bold")
            console.print(lab.packetstack("up", str(file), "--uplink", NODE_UPLINK).rstrip())
            show, outcomes, drops = _perform(console, lab, connections, udp_flows, seconds)
    except (LabError, CliError, TimeoutError) as e:
        console.print(f"demo: {e}", style="red")
        return 1
    (build_dir / "mirror.json").write_text(json.dumps(_report(show, outcomes, drops), indent=2) + "\n")
    console.print(_summary(show, outcomes, drops))
    if picture := draw(show, outcomes, build_dir / "mirror.png"):
        console.print(f"{picture} and {build_dir / 'mirror.json'} show the run")
    return verdict(console, show.steps, outcomes)


def _mirrored(text: str) -> str:
    """The demo's stack, with another strategy and shorter timers."""
    stack = yaml.safe_load(text)
    stack["spec"]["handover"] = {"strategy": "Mirror"}
    stack["spec"]["flowTable"] |= TIMERS
    return yaml.safe_dump(stack)


def _perform(
    console: Console, lab: Lab, connections: int, udp_flows: int, seconds: int
) -> tuple[MirrorShow, list[Outcome], dict[str, int]]:
    client = Client(lab.run_directory)
    ramp = min(8.0, seconds / 8)
    leave = seconds / 4

    def traffic(name: str) -> Traffic:
        return Traffic(
            lab, TARGETS, UDP_TARGETS, connections=connections // 2, udp_flows=udp_flows // 2,
            request_interval_ms=1000, udp_interval_ms=100, new_rate=25 if name == "newer" else 0, ramp_seconds=ramp / 2,
            leave_seconds=leave if name == "older" else None, seconds=seconds + 200, name=name,
        )  # fmt: skip

    show = MirrorShow(lab, client, traffic("older"), [])
    show.steps = _plan(show, lambda: traffic("newer"))
    with shown(console, show, lambda: _view(show)):
        show.traffic.wait_open(ramp + 60)
        began, rest = show.now(), max(1.0, (seconds - leave - ramp) / (len(show.steps) + 1))
        for number, step in enumerate(show.steps):
            sleep(show, began + rest * (number + 0.5))
            take(console, show, step)
        show.phase = "the newer set is alone"
        sleep(show, show.now() + rest)
        show.phase = "traffic ends"
        drops = named_drops(client, lab)
        outcomes = [traffic.stop() for _, traffic in show.clients()]
    return show, outcomes, drops


def _plan(show: MirrorShow, begin_newer: Any) -> list[Step]:
    lab, client = show.lab, show.client

    def status() -> Json:
        found: Json = client.get(STACK)[0]["status"]
        return found

    def switch() -> str:
        lab.packetstack("scale", STACK, "--replicas", "3")
        old, new = status()["sets"]
        return f"set {new['id']} takes new connections; set {old['id']} keeps {old['connections']:,}"

    def begin() -> str:
        show.newer_began = show.now()
        show.newer = begin_newer()
        show.newer.wait_open(60)
        return f"{show.newer.latest['open']:,} are open"

    def kill(newest: bool) -> str:
        engines = sorted((e for e in status()["engines"] if e["ready"]), key=lambda e: int(e["slot"]))
        engine = engines[-1] if newest else engines[0]
        os.kill(engine["pid"], signal.SIGKILL)
        return f"datapath of engine {engine['slot']}"

    def leave() -> str:
        show.traffic.leave()
        deadline = time.monotonic() + show.traffic.timeout_seconds + RETIRED_SECONDS
        while len(status()["sets"]) > 1:
            if time.monotonic() > deadline:
                raise LabError("the older set has not gone: " + str(status()["sets"][0]))
            time.sleep(0.25)
        return "the older set has gone, with its memory"

    return [
        Step("scale 2 → 3: another set", switch, Kind.RESIZE),
        Step("new clients", begin, Kind.MOVE),
        Step("kill -9 in the older set", lambda: kill(newest=False), Kind.KILL),
        Step("kill -9 in the newer set", lambda: kill(newest=True), Kind.KILL),
        Step("older clients end", leave, Kind.MOVE),
    ]


# ---- what the user sees -------------------------------------------------------------------------------------------


def _view(show: MirrorShow) -> Group:
    broken = show.count("broken")
    head = Text.assemble(
        (f" {show.now():5.1f} s ", "reverse"),
        f"  {show.phase}   ",
        (f"{broken} broken", "bold red" if broken else "bold green"),
        f" of {show.count('open') + show.count('new_connections'):,} connections",
    )
    clients = Table.grid(padding=(0, 3))
    for title, traffic in (("older clients", show.traffic), ("newer clients", show.newer)):
        latest = traffic.latest if traffic is not None else {}
        clients.add_row(
            title,
            f"{latest.get('open', 0):,} connections",
            f"{latest.get('answers_per_second', 0):,.0f} answers/s",
            f"p99 {latest.get('rtt_p99_ms', 0):.1f} ms",
        )
    sets: Any = Text("one set of engines")
    if len(show.sets()) > 1:
        sets = Group(*views.transition({"status": show.statuses[-1][1]}))
    return Group(head, clients, Panel(sets, title="sets", height=9), checklist(show.steps))


def _summary(show: MirrorShow, outcomes: list[Outcome], drops: dict[str, int]) -> Table:
    lines = []
    for title, o in zip(("older clients", "newer clients"), outcomes, strict=False):
        lines += [
            (
                title,
                f"{o.connections:,} connections, {o.requests:,} requests, every answer compared; {o.broken} broken",
            ),
            ("", f"{o.datagrams_sent:,} datagrams, {o.datagrams_lost} lost, {o.datagrams_duplicated} twice"),
        ]
    for one in _last_of_both(show):
        rejected = ", ".join(f"{reason} {n:,}" for reason, n in one["rejected"].items() if n) or "nothing"
        lines.append((f"set {one['id']}", f"{one['mirrored']:,} copies, rejected: {rejected}"))
    lines.append(("named drops", ", ".join(f"{name} {n}" for name, n in drops.items()) or "none"))
    return summary(show, lines)


def _last_of_both(show: MirrorShow) -> list[Json]:
    """Both sets as they were last seen."""
    return next((s["sets"] for _, s in reversed(show.statuses) if len(s.get("sets", ())) > 1), [])


def _report(show: MirrorShow, outcomes: list[Outcome], drops: dict[str, int]) -> Json:
    return {
        "connections": sum(o.connections for o in outcomes),
        "broken": sum(o.broken for o in outcomes),
        "datagrams_sent": sum(o.datagrams_sent for o in outcomes),
        "datagrams_lost": sum(o.datagrams_lost for o in outcomes),
        "datagrams_duplicated": sum(o.datagrams_duplicated for o in outcomes),
        "sets": _last_of_both(show),
        "steps": told(show.steps),
        "drops": drops,
        "traffic": [o.report for o in outcomes],
    }


def draw(show: MirrorShow, outcomes: list[Outcome], path: Path) -> Path | None:
    """The picture: answers by clients, copies by who handled them, connections by set. None without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    if len(show.statuses) < 2:
        return None
    with plt.rc_context(STYLE):
        figure, (served, copies, kept) = plt.subplots(
            3, 1, sharex=True, figsize=(14, 9.5), height_ratios=(1.7, 2.2, 2), layout="constrained"
        )
        _draw_clients(served, show)
        _draw_copies(copies, show)
        _draw_connections(kept, show)
        kept.set_xlabel("seconds")
        mark(show.steps, (served, copies, kept), width=12)
        entitle(
            figure,
            f"Mirror: {sum(o.broken for o in outcomes)} of {sum(o.connections for o in outcomes):,} connections broken,"
            f" {sum(o.datagrams_lost for o in outcomes)} of {sum(o.datagrams_sent for o in outcomes):,} datagrams lost",
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path


def _draw_clients(axes: Any, show: MirrorShow) -> None:
    most = 1.0
    for title, traffic, since, colour in (
        ("to clients of before", show.traffic, 0.0, COLOURS[0]),
        ("to clients of after the switch", show.newer, show.newer_began, COLOURS[1]),
    ):
        samples = [s for s in traffic.samples if not s["stopping"]] if traffic is not None else []
        answers = smooth([s["answers_per_second"] for s in samples])
        axes.plot([since + s["elapsed"] for s in samples], answers, color=colour, label=title)
        most = max(most, *answers, 1.0)
    axes.set_ylim(0, most * 1.5)
    axes.set_ylabel("answers a second")
    _legend(axes)


def _draw_copies(axes: Any, show: MirrorShow) -> None:
    """Copies a second that each set got, and which of them it rejected; the older set's downwards."""
    known = [(t, {s["id"]: s for s in status.get("sets", ())}) for t, status in show.statuses]
    numbers = sorted({number for _, sets in known for number in sets})
    if len(numbers) < 2:
        return
    for number, sign, colour, name in ((numbers[1], 1, COLOURS[1], "newer"), (numbers[0], -1, COLOURS[0], "older")):
        seen = [(t, sets[number]) for t, sets in known if number in sets]
        times, handled, rejected = [], [], []
        for (before, was), (at, now) in pairwise(seen):
            span = max(at - before, 0.01)
            refused = sum(now["rejected"].values()) - sum(was["rejected"].values())
            times.append(at)
            rejected.append(sign * refused / span)
            handled.append(sign * (now["mirrored"] - was["mirrored"] - refused) / span)
        handled, rejected = smooth(handled), smooth(rejected)
        both = [h + r for h, r in zip(handled, rejected, strict=True)]
        axes.fill_between(times, handled, color=colour, alpha=0.85, linewidth=0, label=f"{name} set: handled")
        axes.fill_between(
            times, handled, both, color=colour, alpha=0.25, linewidth=0, hatch="////", edgecolor=colour,
            label=f"{name} set: rejected, the other set handles it",
        )  # fmt: skip
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_ylabel("mirrored packets a second\nolder set | newer set")
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    _legend(axes)


def _draw_connections(axes: Any, show: MirrorShow) -> None:
    """What each set has, and how many engines it has."""
    times = [t for t, _ in show.statuses]
    have = [_connections(status) for _, status in show.statuses]
    axes.stackplot(
        times,
        [older for older, _ in have],
        [newer for _, newer in have],
        colors=COLOURS,
        alpha=0.85,
        labels=["connections and flows of the older set", "of the newer set"],
        step="post",
    )
    axes.set_ylabel("connections and flows")
    axes.margins(x=0, y=0)
    axes.set_ylim(0, max(a + b for a, b in have) * 1.2)
    count = axes.twinx()
    for state, line, label in (
        ("Current", "-", "engines of the set that takes new connections"),
        ("Draining", ":", "engines of the set that drains"),
    ):
        engines = [
            sum(s["engines"] for s in status.get("sets", ()) if s["state"] == state) for _, status in show.statuses
        ]
        shown_ = [n or float("nan") for n in engines]
        count.step(times, shown_, where="post", color="black", linestyle=line, linewidth=1.8)
        axes.plot([], [], color="black", linestyle=line, linewidth=1.8, label=label)
    count.set_ylim(0, 5)
    count.set_ylabel("engines")
    count.spines["right"].set_visible(True)
    _legend(axes, -0.2)


def _legend(axes: Any, below: float = -0.02) -> None:
    """Under the panel, where no mark crosses it."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), frameon=False, ncols=4, fontsize=9)


def _connections(status: Json) -> tuple[int, int]:
    """Of the older set and of the newer one."""
    sets = status.get("sets", ())
    if len(sets) < 2:
        alone = sum(e["flows"] for e in status["engines"])
        return (0, alone) if sets and sets[0]["id"] > 1 else (alone, 0)
    flows = [sum(e["flows"] for e in status["engines"] if e["set"] == s["id"]) for s in sets]
    older = sets[0]["connections"] if sets[0]["state"] == "Draining" and not sets[0]["buckets"] else flows[0]
    return max(flows[0], older), flows[1]
