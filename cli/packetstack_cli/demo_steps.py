"""The steps of a demo: they are taken one after the other, shown while they are, told of when it is over, and marked in its picture."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from textwrap import fill
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from packetstack_cli.client import Client
from packetstack_cli.errors import CliError
from packetstack_cli.lab import Lab, LabError
from packetstack_cli.traffic import Outcome, Traffic
from packetstack_core.verbs import Json

STACK = "demo"
STATUS_INTERVAL_SECONDS = 0.25
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888"}
"""Of a picture."""


class Kind(Enum):
    """What a step does."""

    RESIZE = "resize"
    MOVE = "move"
    KILL = "kill"
    HANG = "hang"
    AGENT_RESTART = "agent restart"
    UPGRADE = "upgrade"


FAULTS = (Kind.KILL, Kind.HANG, Kind.AGENT_RESTART)


@dataclass
class Step:
    """One planned change."""

    title: str
    act: Callable[[], str | float]
    """Returns what happened; after a fault, for how many milliseconds the engine's flows were not answered."""
    kind: Kind
    began: float = 0.0
    """Seconds since the traffic began; so is `ended`."""
    ended: float = 0.0
    said: str = ""
    outage_ms: float | None = None
    failed: bool = False


@dataclass
class Show:
    """What the picture and the live view are made of."""

    lab: Lab
    client: Client
    traffic: Traffic
    steps: list[Step]
    began: float = field(default_factory=time.monotonic)
    phase: str = "connections open"
    statuses: list[tuple[float, Json]] = field(default_factory=list)
    """Seconds since the traffic began, status of the stack."""

    def now(self) -> float:
        """Seconds since the traffic began."""
        return time.monotonic() - self.began

    def clients(self) -> list[tuple[float, Traffic]]:
        """All traffic, and when it began; the last one goes on until the end."""
        return [(0.0, self.traffic)]

    def count(self, what: str) -> int:
        """What the clients say last of `open` or `broken` connections."""
        return sum(int(traffic.latest.get(what, 0)) for _, traffic in self.clients())

    def longest_wait_ms(self, began: float, ended: float) -> float:
        """The 99th percentile of a tenth of a second or the oldest open request, whichever is longer."""
        return max(
            (
                max(s["rtt_p99_ms"], s["waiting_ms"])
                for since, traffic in self.clients()
                for s in traffic.samples
                if began <= since + s["elapsed"] <= ended
            ),
            default=0.0,
        )

    def observe(self, until: threading.Event) -> None:
        """Keep the stack's status every quarter of a second."""
        while not until.wait(STATUS_INTERVAL_SECONDS):
            try:
                status = self.client.get(STACK)[0]["status"]
            except CliError:
                continue
            self.statuses.append((self.now(), status))


def take(console: Console, show: Show, step: Step) -> None:
    """Take a step, and say how it went."""
    show.phase = step.title
    step.began = show.now()
    try:
        result = step.act()
        if isinstance(result, str):
            step.said = result.strip()
        else:
            step.outage_ms, step.said = result, f"its flows were answered again after {result:.0f} ms"
    except (LabError, CliError, StopIteration, IndexError, ProcessLookupError) as e:
        step.said, step.failed = str(e) or "the pool has no engine for it", True
    step.ended = show.now()
    if not console.is_terminal:
        console.print(
            f"{step.began:5.1f} s  {step.title}: {step.said}"
            f"  [{show.count('open')} connections, {show.count('broken')} broken]",
            markup=False,
            highlight=False,
        )


def named_drops(client: Client, lab: Lab) -> dict[str, int]:
    """Every named drop that is not zero, of stack and lab."""
    status = client.get(STACK)[0]["status"]
    named = {f"{place} {reason}": n for place, reasons in status["drops"].items() for reason, n in reasons.items()}
    return {name: n for name, n in {**named, **lab.device_drops()}.items() if n}


def sleep(show: Show, until: float) -> None:
    """Until so many seconds after the traffic began."""
    while (left := until - show.now()) > 0:
        if not show.clients()[-1][1].running:
            raise LabError("the traffic generator ended before the demo did")
        time.sleep(min(left, 0.25))


@contextmanager
def shown(console: Console, show: Show, view: Callable[[], RenderableType]) -> Iterator[None]:
    """Meanwhile the stack's status is kept, and a person at a terminal sees the view."""
    over = threading.Event()
    observer = threading.Thread(target=show.observe, args=(over,), daemon=True)
    observer.start()
    try:
        live = Live(console=console, refresh_per_second=4, get_renderable=view)
        with live if console.is_terminal else nullcontext():
            yield
    finally:
        over.set()
        observer.join(5)


# ---- what the user sees -------------------------------------------------------------------------------------------


def checklist(steps: Sequence[Step]) -> Table:
    """Of the live view: what is done, under way, and to come."""
    table = Table.grid(padding=(0, 2))
    for step in steps:
        mark = "[red]✗" if step.failed else "[green]✓" if step.ended else "[yellow]…" if step.began else " "
        table.add_row(mark, step.title, f"{step.began:.1f} s" if step.began else "", Text(step.said, style="dim"))
    return table


def summary(show: Show, outcomes: Sequence[tuple[str, str]]) -> Table:
    """How each step went, then these lines: title and text."""
    table = Table(title="What happened", title_justify="left")
    for title in ("step", "at", "took", "longest wait", "result"):
        table.add_column(title, justify="left" if title in ("step", "result") else "right")
    for step in show.steps:
        table.add_row(
            step.title,
            f"{step.began:.1f} s",
            f"{step.ended - step.began:.2f} s",
            f"{show.longest_wait_ms(step.began, step.ended + 1):.1f} ms",
            Text("failed" if step.failed else "ok", style="red" if step.failed else "green"),
        )
    table.add_section()
    for title, text in outcomes:
        table.add_row(title, "", "", "", text)
    return table


def told(steps: Sequence[Step]) -> list[Json]:
    """Of the report."""
    return [
        {
            "title": step.title,
            "at_seconds": round(step.began, 3),
            "took_seconds": round(step.ended - step.began, 3),
            "ok": not step.failed and step.ended > 0,
            "said": step.said,
        }
        for step in steps
    ]


def mark(steps: Sequence[Step], panels: Sequence[Any], *, width: int) -> None:
    """A line in each panel of the picture where a step began, its title at the top of the first, `width` letters a line."""
    for step in steps:
        fault = step.kind in FAULTS
        for axes in panels:
            axes.axvline(
                step.began,
                color="#d62728" if fault else "#333333",
                linewidth=1.2 if fault else 0.9,
                linestyle=(0, (4, 3)),
            )
        panels[0].annotate(
            fill(step.title, width),
            (step.began, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="#d62728" if fault else "#000000",
        )


def entitle(figure: Any, text: str) -> None:
    """The line above the picture."""
    figure.suptitle(text, fontsize=14, fontweight="bold", x=0.01, ha="left")


def smooth(values: list[float], span: int = 5) -> list[float]:
    """Mean over `span` samples."""
    return [sum(values[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(values))]


def verdict(console: Console, steps: Sequence[Step], outcomes: Sequence[Outcome]) -> int:
    """Say what went wrong, and how many connections broke. -> exit code: 0 only if nothing did."""
    failed = [step for step in steps if step.failed or not step.ended]
    for step in failed:
        console.print(f"failed: {step.title}: {step.said or 'was not reached'}", style="red")
    for outcome in outcomes:
        if outcome.broken:
            console.print(f"broken: {outcome.what_broke()}", style="red")
    broken, never = sum(o.broken for o in outcomes), sum(o.never_opened for o in outcomes)
    if never:
        console.print(f"{never} connections were never opened", style="red")
    good = not (failed or broken or never)
    console.print(
        f"verdict: {broken} broken of {sum(o.connections for o in outcomes)} connections",
        style="bold green" if good else "bold red",
        highlight=False,
    )
    return 0 if good else 1
