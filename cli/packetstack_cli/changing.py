"""Commands that change what runs: up, down, scale, move, upgrade, check."""

import sys
from collections.abc import Sequence

import click
import yaml

from packetstack_cli.backend import Backend, Wishes, not_ready
from packetstack_cli.errors import CliError
from packetstack_cli.files import advise, load_all
from packetstack_cli.target import output_option, show, with_backend
from packetstack_core.verbs import Json
from packetstack_core.wording import counted


def _wait_ready(backend: Backend, names: Sequence[str], seconds: float) -> None:
    """Until all stacks are as their resources say. CliError with what is missing."""
    if waiting := backend.wait(names, seconds):
        raise CliError(not_ready(waiting[0], seconds))


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--uplink",
    "uplinks",
    multiple=True,
    metavar="INTERFACE[:clients|:backends]",
    help="Run the director on it as native XDP too; with a role, for packets of that side alone.",
)
@click.option(
    "--firewall",
    type=click.Choice(["Manage", "Report"]),
    help="Let the agent open this host's packet filter for stacks (at first it does), or only say what stops them.",
)
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait until the stacks are ready.")
@click.option("--metrics-listen", metavar="ADDRESS:PORT", help="Serve Prometheus metrics over HTTP (first start only).")
@click.option("--force-conflicts", "force", is_flag=True, help="In a cluster: take over fields that others have set.")
@with_backend
def up(
    backend: Backend,
    files: tuple[str, ...],
    uplinks: tuple[str, ...],
    firewall: str | None,
    timeout: float,
    metrics_listen: str | None,
    force: bool,
) -> None:
    """Make the stacks of FILES run; start the agent if there is none. Repeating it changes nothing."""
    wanted = load_all(files)
    advise(wanted)
    started = backend.begin(metrics_listen)
    names = []
    try:
        for result in backend.apply(wanted, Wishes(uplinks, firewall, force)):
            names.append(result["stack"])
            click.echo(f"stack {result['stack']}: {result['result']}")
            if result.get("note"):
                click.echo(f"stack {result['stack']}: note: {result['note']}", err=True)
        _wait_ready(backend, names, timeout)
    except CliError:
        if started:
            backend.abandon()
        raise
    for name in names:
        for item in backend.get(name):
            click.echo(f"stack {name}: {counted(item['status']['readyReplicas'], 'engine')} ready")


@click.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All stacks and the agent.")
@click.option("--yes", is_flag=True, help="Do not ask, even when live flows will end.")
@with_backend
def down(backend: Backend, name: str | None, everything: bool, yes: bool) -> None:
    """End a stack. Without NAME, when it is the only one, or with --all, the agent goes too and nothing is left.

    In a cluster NAME or --all is needed; --all means all stacks of the namespace.
    """
    removal = backend.removal(name, everything)
    if removal.warning:
        _ask(removal.warning, yes)
    for line in removal.carry_out():
        click.echo(line)


def _ask(warning: str, yes: bool) -> None:
    """Say what will be, and ask a person who has not said `--yes`; click.Abort if it shall not be."""
    click.echo(warning, err=True)
    if not yes and sys.stdin.isatty():
        click.confirm("Go on?", abort=True)


@click.command()
@click.argument("name")
@click.option("--replicas", type=click.IntRange(0, 1000), required=True)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the pool has this size.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait.")
@with_backend
def scale(backend: Backend, name: str, replicas: int, wait: bool, timeout: float) -> None:
    """Set the number of engines."""
    result = backend.scale(name, replicas)
    if result.get("note"):
        click.echo(f"stack {name}: note: {result['note']}", err=True)
    if wait:
        _wait_ready(backend, [name], timeout)
    click.echo(f"stack {name}: from {result['from']} to {counted(result['to'], 'engine')}")


@click.command()
@click.argument("name")
@click.option("--queue", metavar="SLOT:QUEUE", help="Give this queue to --core.")
@click.option("--core", type=int, help="Core of the same engine.")
@click.option("--buckets", metavar="FIRST-LAST", help="Give these buckets to --engine.")
@click.option("--engine", type=int, metavar="SLOT", help="The engine that gets the buckets.")
@click.option("--to-queue", type=int, help="Its queue; default: spread over all.")
@output_option
@with_backend
def move(
    backend: Backend,
    name: str,
    queue: str | None,
    core: int | None,
    buckets: str | None,
    engine: int | None,
    to_queue: int | None,
    output: str | None,
) -> None:
    """Move a queue to another core, or buckets to another engine, while packets flow."""
    if queue is not None and core is not None and buckets is None and engine is None:
        slot, number = _numbers(queue, ":", "--queue", "SLOT:QUEUE, as in 1:3")
        result = backend.move_queue(name, slot, number, core)
        text = f"queue {number} of engine {slot}: core {core} after {result['microseconds']:.0f} us"
    elif buckets is not None and engine is not None and queue is None and core is None:
        first, last = _numbers(
            buckets if "-" in buckets else f"{buckets}-{buckets}", "-", "--buckets", "FIRST-LAST, as in 0-99"
        )
        if first > last:
            raise click.BadParameter(f'"{buckets}" is not a range; use {last}-{first}', param_hint="--buckets")
        result = backend.move_buckets(name, range(first, last + 1), engine, to_queue)
        text = f"{counted(result['moved'], 'bucket')} to engine {engine} in {result['longestMilliseconds']:.2f} ms"
    else:
        raise click.UsageError("use --queue SLOT:QUEUE --core CORE, or --buckets FIRST-LAST --engine SLOT")
    show(result, output, lambda: text)


@click.command()
@click.argument("name", required=False)
@click.option("--agent", is_flag=True, help="Restart the agent; engines go on meanwhile.")
@click.option(
    "--end-flows", is_flag=True,
    help="With --agent: when another build has made the stacks with another memory layout, end all their flows and make "
    "them anew. In a cluster with the name of a stack instead: for all stacks of its node.",
)  # fmt: skip
@output_option
@with_backend
def upgrade(backend: Backend, name: str | None, agent: bool, end_flows: bool, output: str | None) -> None:
    """Replace a running part by the build that is installed now: all engines of a stack, NAME, the datapath of one engine,
    NAME as in web-1, or the agent.

    A stack gets a second set of engines for a build with another layout of shards: it takes new connections, and the present
    one keeps its own until they have ended. A build whose other memory has another layout is refused, and what runs goes on.
    """
    if agent == (name is not None):
        raise click.UsageError("use the NAME of a stack or engine, as `packetstack top` shows it, or --agent")
    if name is None:
        result: Json = {"agent": backend.restart_agent(end_flows)}
        text = f"agent: process {result['agent']} has taken over"
    elif end_flows:
        result = backend.end_flows(name)
        text = f"node {result['node']}: all flows have ended; its agent makes its stacks anew"
    else:
        result = backend.upgrade(name)
        text = _upgraded(result)
    show(result, output, lambda: text)


def _upgraded(result: Json) -> str:
    if "engine" in result:
        return f"engine {result['engine']}: process {result['to']} serves after a pause of {result['pauseMilliseconds']:.2f} ms"
    if (engines := result.get("engines")) is not None:
        longest = max((e["pauseMilliseconds"] for e in engines), default=0.0)
        return f"stack {result['stack']}: {counted(len(engines), 'engine')} upgraded, the longest pause was {longest:.2f} ms"
    return (
        f"stack {result['stack']}: engines with shard layout {result['to']} take new connections; those with {result['from']} keep "
        f"theirs until they have ended: packetstack transitions {result['stack']}"
    )


def _numbers(value: str, separator: str, option: str, right: str) -> tuple[int, int]:
    first, _, second = value.partition(separator)
    if not (first.isdecimal() and second.isdecimal()):
        raise click.BadParameter(f'"{value}" is not understood; use {right}', param_hint=option)
    return int(first), int(second)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@with_backend
def check(backend: Backend, files: tuple[str, ...]) -> None:
    """Read FILES as `up` would, and change nothing. For a cluster its API server reads them too."""
    stacks = load_all(files)
    backend.check(stacks)
    advise(stacks)
    for stack in stacks:
        click.echo(yaml.safe_dump(stack.document(), sort_keys=False).rstrip())
