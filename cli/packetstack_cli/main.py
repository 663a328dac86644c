"""`packetstack`: run stacks on this host, look at them, change them."""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from rich.live import Live

from packetstack_cli import preflight as checks
from packetstack_cli import simulate, views
from packetstack_cli.client import DEFAULT_RUN_DIRECTORY, Client, CliError, NoAgent, unreadable
from packetstack_cli.cluster import ClusterClient
from packetstack_cli.demo import run_demo
from packetstack_core import reading
from packetstack_core.autoscaling import rounds
from packetstack_core.autoscaling.spec import spec_of
from packetstack_core.reading import ResourceError
from packetstack_core.resources import PacketStack
from packetstack_core.wording import counted

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Target:
    """Whom a command asks: the agent of this host, or a cluster as soon as an option for one is given."""

    run_directory: Path = DEFAULT_RUN_DIRECTORY
    explicit: bool = False
    """The directory was named on the command line."""
    cluster: bool = False
    kubeconfig: Path | None = None
    context: str | None = None
    namespace: str | None = None

    def client(self) -> Client | ClusterClient:
        """Connects to nobody yet."""
        if self.cluster or self.kubeconfig or self.context or self.namespace:
            if self.explicit:
                raise click.UsageError("--run-dir is for the agent of this host, the other options are for a cluster")
            return ClusterClient(self.kubeconfig, self.context, self.namespace)
        return Client(self.run_directory.absolute())


def _cluster_options() -> list[click.Option]:
    """Taken before the verb and after it, as people know it from kubectl."""

    def remember(ctx: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None and option.name is not None:
            setattr(ctx.find_root().ensure_object(Target), option.name, value)

    def option(*names: str, **more: Any) -> click.Option:
        return click.Option(names, expose_value=False, callback=remember, **more)

    file = click.Path(path_type=Path, dir_okay=False)
    return [
        option("--kubeconfig", type=file, help="Ask the cluster of this file."),
        option("--context", metavar="NAME", help="Ask the cluster of this context."),
        option("-n", "--namespace", metavar="NAME", help="Ask the cluster for stacks of this namespace."),
    ]


class Group(click.Group):
    """Errors are one line on standard error and exit code 1; wrong usage is exit code 2."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        if cmd.name not in ("demo", "simulate"):
            cmd.params += _cluster_options()
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ResourceError as e:
            sys.exit("\n".join(e.problems))
        except CliError as e:
            sys.exit(str(e))


def _with_client(command: F) -> F:
    @click.pass_context
    @functools.wraps(command)
    def asking(ctx: click.Context, /, *arguments: Any, **options: Any) -> Any:
        client = ctx.find_root().ensure_object(Target).client()
        ctx.call_on_close(client.close)
        return command(client, *arguments, **options)

    return asking  # type: ignore[return-value]


def _output(command: F) -> F:
    option = click.option("-o", "--output", type=click.Choice(["json", "yaml"]), help="Print data instead of text.")
    return option(command)


def _show(value: Any, output: str | None, view: Callable[[], Any]) -> None:
    if output:
        click.echo(views.data(value, output))
    else:
        views.console.print(view())


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_RUN_DIRECTORY,
    envvar="PACKETSTACK_RUN_DIR",
    show_default=True,
    help="Directory of this host's agent.",
)
@click.version_option(package_name="packetstack")
@click.pass_context
def main(ctx: click.Context, run_dir: Path) -> None:
    """An elastic pool of user-space packet engines behind a virtual address.

    Commands are for the agent of this host, or with -n, --context or --kubeconfig, and as `kubectl packetstack`, for a
    cluster.
    """
    target = ctx.ensure_object(Target)
    target.run_directory = run_dir
    target.explicit = ctx.get_parameter_source("run_dir") is click.core.ParameterSource.COMMANDLINE


main.params += _cluster_options()


def kubectl() -> None:
    """`kubectl packetstack`: the same verbs, always for a cluster."""
    main(prog_name="kubectl packetstack", obj=Target(cluster=True))


def _wait_ready(client: Client | ClusterClient, names: list[str], timeout_seconds: float) -> None:
    """Until all stacks are as their resources say. CliError with what is missing."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        waiting = [s for name in names for s in client.call("get", name=name) if not s["status"]["ready"]]
        if not waiting:
            return
        if time.monotonic() > deadline:
            item = waiting[0]
            status = item["status"]
            trouble = next((c["message"] for c in status["conditions"] if c["message"]), "see packetstack describe")
            raise CliError(
                f"stack {item['metadata']['name']}: {status['readyReplicas']} of {item['spec']['replicas']} engines are ready "
                f"after {timeout_seconds:g} s; {trouble}"
            )
        time.sleep(client.poll_seconds)


@main.command()
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
@_with_client
def up(
    client: Client | ClusterClient,
    files: tuple[str, ...],
    uplinks: tuple[str, ...],
    firewall: str | None,
    timeout: float,
    metrics_listen: str | None,
    force: bool,
) -> None:
    """Make the stacks of FILES run; start the agent if there is none. Repeating it changes nothing."""
    wanted = _load_all(files)
    _advise(wanted)
    started = client.begin(metrics_listen)
    names = []
    try:
        for result in client.apply(wanted, uplinks, force, firewall):
            names.append(result["stack"])
            click.echo(f"stack {result['stack']}: {result['result']}")
            if result.get("note"):
                click.echo(f"stack {result['stack']}: note: {result['note']}", err=True)
        _wait_ready(client, names, timeout)
    except CliError:
        if started:
            client.abandon()
        raise
    for name in names:
        for item in client.call("get", name=name):
            click.echo(f"stack {name}: {counted(item['status']['readyReplicas'], 'engine')} ready")


def _load_all(files: Iterable[str]) -> list[PacketStack]:
    """The stacks of all files. CliError for two of one name: the second would replace the first."""
    found: dict[tuple[str | None, str], tuple[str, PacketStack]] = {}
    for file in files:
        for stack in _load(file):
            first, _ = found.setdefault((stack.metadata.namespace, stack.name), (file, stack))
            if first != file:
                raise CliError(f"{file}: stack {stack.name} is in {first} too; use a name once")
    return [stack for _, stack in found.values()]


def _advise(stacks: Iterable[PacketStack]) -> None:
    """What is allowed and will most likely be regretted, to the person and not into a pipe."""
    for stack in stacks:
        for line in stack.advice():
            click.echo(f"stack {stack.name}: note: {line}", err=True)


def _load(file: str) -> list[PacketStack]:
    try:
        return list(reading.load(sys.stdin.read() if file == "-" else Path(file).read_text()))
    except (OSError, UnicodeDecodeError) as e:
        raise unreadable(file, e) from None
    except ResourceError as e:
        raise CliError("\n".join(f"{file}: {problem}" for problem in e.problems)) from None


@main.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All stacks and the agent.")
@click.option("--yes", is_flag=True, help="Do not ask, even when live flows will end.")
@_with_client
def down(client: Client | ClusterClient, name: str | None, everything: bool, yes: bool) -> None:
    """End a stack. Without NAME, when it is the only one, or with --all, the agent goes too and nothing is left.

    In a cluster NAME or --all is needed; --all means all stacks of the namespace.
    """
    try:
        stacks = client.call("get")
    except NoAgent:
        if not isinstance(client, Client):
            raise
        if not client.run_directory.exists():
            if not everything:
                raise
            click.echo("no stacks, and nothing left of any")
            return
        left = client.left_behind()
        if len(client.chosen(left, name, everything)) < len(left):
            raise CliError(
                f"stack {name}: no agent answers, and without one only all stacks can be ended; "
                "start another agent with packetstack upgrade --agent, or use down --all"
            ) from None
        if left:
            _ask(f"no agent answers; all flows of {', '.join(left)} will end", yes)
        click.echo(client.clean(), nl=False)
        return
    chosen = client.chosen([s["metadata"]["name"] for s in stacks], name, everything)
    # By its name, which may be of another namespace than those that were listed.
    flows = sum(s["status"]["flows"] for s in (client.call("get", name=name) if name else stacks))
    if flows:
        _ask(f"{flows:,} live flows will end", yes)
    client.remove(chosen, last=len(chosen) == len(stacks))
    for one in chosen:
        click.echo(f"stack {one}: removed")


def _ask(warning: str, yes: bool) -> None:
    """Say what will be, and ask a person who has not said `--yes`; click.Abort if it shall not be."""
    click.echo(warning, err=True)
    if not yes and sys.stdin.isatty():
        click.confirm("Go on?", abort=True)


@main.command()
@click.argument("name", required=False)
@_output
@_with_client
def get(client: Client | ClusterClient, name: str | None, output: str | None) -> None:
    """List stacks, or show one."""
    items = client.call("get", name=name)
    _show(items[0] if name else items, output, lambda: views.stacks(items))


@main.command()
@click.argument("name")
@_output
@_with_client
def describe(client: Client | ClusterClient, name: str, output: str | None) -> None:
    """Everything about a stack: engines, listeners, backends, capacity, conditions, drops, events."""
    item = client.live(name, must=False)[0]
    happened = client.call("events", name=name)
    _show({**item, "events": happened}, output, lambda: views.describe(item, happened))


@main.command()
@click.argument("name")
@click.option("--replicas", type=click.IntRange(0, 1000), required=True)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the pool has this size.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait.")
@_with_client
def scale(client: Client | ClusterClient, name: str, replicas: int, wait: bool, timeout: float) -> None:
    """Set the number of engines."""
    result = client.call("scale", name=name, replicas=replicas)
    if result.get("note"):
        click.echo(f"stack {name}: note: {result['note']}", err=True)
    if wait:
        _wait_ready(client, [name], timeout)
    click.echo(f"stack {name}: from {result['from']} to {counted(result['to'], 'engine')}")


@main.command()
@click.argument("name", required=False)
@click.option("--once", is_flag=True, help="Print once instead of every second.")
@_output
@_with_client
def top(client: Client | ClusterClient, name: str | None, once: bool, output: str | None) -> None:
    """Engines, cores and queues with their load; live on a terminal."""
    items = client.live(name)
    if once or output or not sys.stdout.isatty():
        _show(items, output, lambda: views.top(items))
        return
    with Live(views.top(items), console=views.console, screen=True) as live:
        try:
            while True:
                time.sleep(1)
                live.update(views.top(client.live(name)))
        except KeyboardInterrupt:
            return


@main.command()
@click.argument("name")
@click.option("--queue", metavar="SLOT:QUEUE", help="Give this queue to --core.")
@click.option("--core", type=int, help="Core of the same engine.")
@click.option("--buckets", metavar="FIRST-LAST", help="Give these buckets to --engine.")
@click.option("--engine", type=int, metavar="SLOT", help="The engine that gets the buckets.")
@click.option("--to-queue", type=int, help="Its queue; default: spread over all.")
@_output
@_with_client
def move(
    client: Client | ClusterClient,
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
        result = client.call("move_queue", name=name, slot=slot, queue=number, core=core)
        text = f"queue {number} of engine {slot}: core {core} after {result['microseconds']:.0f} us"
    elif buckets is not None and engine is not None and queue is None and core is None:
        first, last = _numbers(
            buckets if "-" in buckets else f"{buckets}-{buckets}", "-", "--buckets", "FIRST-LAST, as in 0-99"
        )
        if first > last:
            raise click.BadParameter(f'"{buckets}" is not a range; use {last}-{first}', param_hint="--buckets")
        result = client.call(
            "move_buckets", name=name, buckets=list(range(first, last + 1)), slot=engine, queue=to_queue
        )
        text = f"{counted(result['moved'], 'bucket')} to engine {engine} in {result['longestMilliseconds']:.2f} ms"
    else:
        raise click.UsageError("use --queue SLOT:QUEUE --core CORE, or --buckets FIRST-LAST --engine SLOT")
    _show(result, output, lambda: text)


@main.command()
@click.argument("engine", required=False)
@click.option("--agent", is_flag=True, help="Restart the agent; engines go on meanwhile.")
@click.option(
    "--end-flows", is_flag=True,
    help="With --agent: when another build has made the stacks with another memory layout, end all their flows and make "
    "them anew. In a cluster with the name of a stack instead: for all stacks of its node.",
)  # fmt: skip
@_output
@_with_client
def upgrade(
    client: Client | ClusterClient, engine: str | None, agent: bool, end_flows: bool, output: str | None
) -> None:
    """Replace a running part by the build that is installed now: ENGINE's datapath (as in web-1), or the agent.

    A build with another memory layout is refused, and what runs goes on.
    """
    if agent == (engine is not None):
        raise click.UsageError("use ENGINE, as `packetstack top` shows it, or --agent")
    result: dict[str, Any]
    if agent:
        stood_by = client.restart_agent(end_flows)
        if end_flows and not stood_by:
            _wait_ready(client, [s["metadata"]["name"] for s in client.call("get")], 30)
        result = {"agent": client.agent_pid()}
        text = f"agent: process {result['agent']} has taken over"
    elif end_flows:
        result = client.end_flows(engine or "")
        text = f"node {result['node']}: all flows have ended; its agent makes its stacks anew"
    else:
        engines = [e | {"stack": s["metadata"]["name"]} for s in client.call("get") for e in s["status"]["engines"]]
        found = next((e for e in engines if engine in (e["name"], str(e["slot"]))), None)
        if found is None:
            raise CliError(f"engine {engine}: not found; there are {', '.join(e['name'] for e in engines) or 'none'}")
        client.check_build()
        result = client.call("upgrade", name=found["stack"], slot=found["slot"])
        text = f"engine {found['name']}: process {result['to']} serves after a pause of {result['pauseMilliseconds']:.2f} ms"
    _show(result, output, lambda: text)


def _numbers(value: str, separator: str, option: str, right: str) -> tuple[int, int]:
    first, _, second = value.partition(separator)
    if not (first.isdecimal() and second.isdecimal()):
        raise click.BadParameter(f'"{value}" is not understood; use {right}', param_hint=option)
    return int(first), int(second)


@main.command()
@click.argument("name")
@click.argument("flow", nargs=-1)
@_output
@_with_client
def explain(client: Client | ClusterClient, name: str, flow: tuple[str, ...], output: str | None) -> None:
    """Why a stack has as many engines as it has; with FLOW, where that goes and why.

    FLOW: PROTOCOL SOURCE:PORT DESTINATION:PORT, IPv6 addresses in brackets.
    """
    if not flow:
        item = client.call("get", name=name)[0]
        decided = _decided(item)
        _show(decided, output, lambda: views.autoscaling(item, decided))
        return
    parts = " ".join(flow).split()
    if len(parts) != 3:
        raise click.UsageError("use PROTOCOL SOURCE:PORT DESTINATION:PORT, as in: tcp 10.0.0.1:40000 192.0.2.10:80")
    source, destination = _endpoint(parts[1]), _endpoint(parts[2])
    result = client.call(
        "explain",
        name=name,
        protocol=parts[0],
        source=source[0],
        sport=source[1],
        destination=destination[0],
        dport=destination[1],
    )
    _show(result, output, lambda: "\n".join(_lines(result)))


def _decided(item: Mapping[str, Any]) -> dict[str, Any]:
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
    known = [c for c in item["status"]["conditions"] if c["type"] in rounds.CONDITIONS]
    return {"stack": name, "autoscaling": shown, "conditions": known}


def _endpoint(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f'"{text}" is not an address with a port; use 10.0.0.1:40000 or [fd00::1]:40000')
    return address.strip("[]"), int(port)


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [str(result["why"])]
    for key in ("listener", "bucket", "owner", "flow"):
        value = result.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if value is not None:
            lines.append(f"  {key:9} {value}")
    return lines


@main.command()
@click.argument("name", required=False)
@_output
@_with_client
def events(client: Client | ClusterClient, name: str | None, output: str | None) -> None:
    """What happened, oldest first."""
    items = client.call("events", name=name)
    _show(items, output, lambda: views.events(items))


@main.command()
@click.argument("engine", required=False)
@_with_client
def logs(client: Client | ClusterClient, engine: str | None) -> None:
    """The agent's log, or that of ENGINE, as in web-1."""
    text = client.log(engine)
    click.echo(text, nl=False)
    if not text:
        click.echo(f"{f'engine {engine}' if engine else 'agent'}: has written nothing yet", err=True)


@main.command()
@_with_client
def metrics(client: Client | ClusterClient) -> None:
    """The agent's Prometheus metrics."""
    click.echo(client.call("metrics"), nl=False)


@main.command()
@_output
@_with_client
def preflight(client: Client | ClusterClient, output: str | None) -> None:
    """What this host, or the cluster, lacks for stacks, and what to do. Exit code 1 if they cannot run."""
    found = checks.host(client.examine_firewall()) if isinstance(client, Client) else client.preflight()
    if output:
        click.echo(views.data([c.document() for c in found], output))
    else:
        for line in views.checks(found):
            views.console.print(line, soft_wrap=True)
    if any(c.result == "missing" for c in found):
        sys.exit(1)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@_with_client
def check(client: Client | ClusterClient, files: tuple[str, ...]) -> None:
    """Read FILES as `up` would, and change nothing. For a cluster its API server reads them too."""
    stacks = _load_all(files)
    client.check(stacks)
    _advise(stacks)
    for stack in stacks:
        click.echo(yaml.safe_dump(stack.document(), sort_keys=False).rstrip())


@main.command("simulate")
@click.argument("name", required=False)
@click.option("-f", "--file", required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--series", required=True, type=click.Path(path_type=Path), help="Load over time, as CSV.")
@click.option("--replicas", type=click.IntRange(0, 1000), help="Engines at the beginning; default: as in the file.")
@click.option("--interval", type=float, help="Seconds between two decisions; default: syncPeriodSeconds of the stack.")
@click.option("--start", "start_seconds", default=5.0, show_default=True, help="Seconds until a new engine serves.")
@click.option("--begin", type=click.DateTime(), default="2026-01-05", help="UTC of the first line, for schedules.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw load and replicas into this file.")
@_output
def simulate_(
    name: str | None,
    file: str,
    series: Path,
    replicas: int | None,
    interval: float | None,
    start_seconds: float,
    begin: datetime,
    picture: Path | None,
    output: str | None,
) -> None:
    """Show what the autoscaler of a stack in a file would do under a load.

    The series is CSV: a column `seconds` and one for each metric, with what the whole stack gets. Utilization counts
    fully busy engines.
    """
    if (interval is not None and not 1 <= interval <= 3600) or not 0 <= start_seconds <= 3600:
        raise click.UsageError("--interval takes 1 to 3600 seconds, --start 0 to 3600")
    stacks = [stack for stack in _load(file) if name in (None, stack.metadata.name)]
    if len(stacks) != 1:
        names = "no" if not stacks else ", ".join(stack.metadata.name for stack in stacks)
        raise CliError(f"{file}: has {names} {f'stack {name}' if name else 'stacks'}; name one that it has")
    wanted = simulate.autoscaling_of(stacks[0])
    metrics = spec_of(wanted).metrics
    load = simulate.read_series(series, metrics)
    first = stacks[0].spec.replicas if replicas is None else replicas
    ticks = simulate.simulate(wanted, load, first, begin.replace(tzinfo=UTC), interval, start_seconds)
    if picture:
        simulate.draw(metrics, ticks, f"stack {stacks[0].metadata.name} under {series.name}", picture)
    _show([tick.document() for tick in ticks], output, lambda: views.decisions(ticks))


@main.command()
@click.option("--connections", default=2000, show_default=True)
@click.option("--udp-flows", default=200, show_default=True)
@click.option("--seconds", default=75, show_default=True)
@click.option("--build-dir", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
def demo(connections: int, udp_flows: int, seconds: int, build_dir: Path) -> None:
    """Resize, kill and upgrade a pool under live traffic in network namespaces of its own, and count what breaks."""
    sys.exit(run_demo(build_dir, connections, udp_flows, seconds))


if __name__ == "__main__":
    main()
