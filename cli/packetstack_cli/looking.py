"""Commands that show what runs and change nothing: get, describe, top, transitions, explain, events, logs, metrics, preflight."""

import sys
import time
from collections.abc import Mapping

import click
from rich.live import Live

from packetstack_cli import views
from packetstack_cli.backend import Backend
from packetstack_cli.errors import CliError
from packetstack_cli.target import output_option, show, with_backend
from packetstack_core import verbs
from packetstack_core.autoscaling import together
from packetstack_core.verbs import Json


@click.command()
@click.argument("name", required=False)
@output_option
@with_backend
def get(backend: Backend, name: str | None, output: str | None) -> None:
    """List stacks, or show one."""
    items = backend.get(name)
    show(items[0] if name else items, output, lambda: views.stacks(items))


@click.command()
@click.argument("name")
@output_option
@with_backend
def describe(backend: Backend, name: str, output: str | None) -> None:
    """Everything about a stack: engines, listeners, backends, capacity, conditions, drops, events."""
    found = backend.live(name)
    for why in found.without:
        click.echo(f"without live numbers: {why}", err=True)
    item, happened = found.items[0], backend.events(name)
    show({**item, "events": happened}, output, lambda: views.describe(item, happened))


@click.command()
@click.argument("name", required=False)
@click.option("--once", is_flag=True, help="Print once instead of every second.")
@output_option
@with_backend
def top(backend: Backend, name: str | None, once: bool, output: str | None) -> None:
    """Engines, cores and queues with their load; live on a terminal."""
    items = _live(backend, name)
    if once or output or not sys.stdout.isatty():
        show(items, output, lambda: views.top(items))
        return
    with Live(views.top(items), console=views.console, screen=True) as live:
        try:
            while True:
                time.sleep(1)
                live.update(views.top(_live(backend, name)))
        except KeyboardInterrupt:
            return


@click.command()
@click.argument("name", required=False)
@output_option
@with_backend
def transitions(backend: Backend, name: str | None, output: str | None) -> None:
    """Stacks between two sets of engines: what was switched, what is left of the older set, when it ends."""
    found = backend.live(name)
    for why in found.without:
        click.echo(f"without live numbers: {why}", err=True)
    items = found.items if name else [item for item in found.items if views.two_sets(item)]
    shown = [{"stack": i["metadata"]["name"], "sets": i["status"].get("sets") or []} for i in items]
    nothing = "no stack is between two sets of engines"
    show(shown[0] if name else shown, output, lambda: views.transitions(items) if items else nothing)


def _live(backend: Backend, name: str | None) -> list[Json]:
    """Stacks with all numbers of this moment. CliError if an agent does not say its own."""
    found = backend.live(name)
    if found.without:
        raise CliError(found.without[0])
    return found.items


@click.command()
@click.argument("name")
@click.argument("flow", nargs=-1)
@output_option
@with_backend
def explain(backend: Backend, name: str, flow: tuple[str, ...], output: str | None) -> None:
    """Why a stack has as many engines as it has; with FLOW, where that goes and why.

    FLOW: PROTOCOL SOURCE:PORT DESTINATION:PORT, IPv6 addresses in brackets.
    """
    if not flow:
        item = backend.get(name)[0]
        decided = _decided(item)
        show(decided, output, lambda: views.autoscaling(item, decided))
        return
    parts = " ".join(flow).split()
    if len(parts) != 3:
        raise click.UsageError("use PROTOCOL SOURCE:PORT DESTINATION:PORT, as in: tcp 10.0.0.1:40000 192.0.2.10:80")
    source, destination = _endpoint(parts[1]), _endpoint(parts[2])
    asked = verbs.Explain(
        name=name,
        protocol=parts[0],
        source=source[0],
        sport=source[1],
        destination=destination[0],
        dport=destination[1],
    )
    result = backend.explain(asked)
    show(result, output, lambda: "\n".join(_lines(result)))


def _decided(item: Json) -> Json:
    """What the autoscaler of a stack decided last, with its conditions. CliError without one."""
    name, wanted, shown = item["metadata"]["name"], item["spec"].get("autoscaling"), item["status"].get("autoscaling")
    if wanted is None:
        raise CliError(
            f"stack {name}: has no spec.autoscaling, so its size is what somebody wrote; to explain a flow, name it, as in: "
            "tcp 10.0.0.1:40000 192.0.2.10:80"
        )
    if shown is None:
        period = wanted.get("syncPeriodSeconds", 15)
        raise CliError(f"stack {name}: its autoscaler has not decided yet; it does every {period} s")
    known = [c for c in item["status"]["conditions"] if c["type"] in together.CONDITIONS]
    return {"stack": name, "autoscaling": shown, "conditions": known}


def _endpoint(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f'"{text}" is not an address with a port; use 10.0.0.1:40000 or [fd00::1]:40000')
    return address.strip("[]"), int(port)


def _lines(result: Json) -> list[str]:
    lines = [str(result["why"])]
    for key in ("listener", "bucket", "owner", "keeper", "flow"):
        value = result.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if value is not None:
            lines.append(f"  {key:9} {value}")
    return lines


@click.command()
@click.argument("name", required=False)
@output_option
@with_backend
def events(backend: Backend, name: str | None, output: str | None) -> None:
    """What happened, oldest first."""
    items = backend.events(name)
    show(items, output, lambda: views.events(items))


@click.command()
@click.argument("engine", required=False)
@with_backend
def logs(backend: Backend, engine: str | None) -> None:
    """The agent's log, or that of ENGINE, as in web-1."""
    text = backend.log(engine)
    click.echo(text, nl=False)
    if not text:
        click.echo(f"{f'engine {engine}' if engine else 'agent'}: has written nothing yet", err=True)


@click.command()
@with_backend
def metrics(backend: Backend) -> None:
    """The agent's Prometheus metrics."""
    text = backend.metrics()
    click.echo(text, nl=False)
    if not text:
        click.echo("the agent stands by and measures nothing; packetstack events says why", err=True)


@click.command()
@output_option
@with_backend
def preflight(backend: Backend, output: str | None) -> None:
    """What this host, or the cluster, lacks for stacks, and what to do. Exit code 1 if they cannot run."""
    found = backend.preflight()
    if output:
        click.echo(views.data([c.document() for c in found], output))
    else:
        for line in views.checks(found):
            views.console.print(line, soft_wrap=True)
    if any(c.result == "missing" for c in found):
        sys.exit(1)
