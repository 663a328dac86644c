"""`packetstack`: run stacks on this host, look at them, change them."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from packetstack_cli import changing, files, looking, simulate, simulate_sizes, views
from packetstack_cli.client import DEFAULT_RUN_DIRECTORY
from packetstack_cli.errors import CliError
from packetstack_cli.target import Group, Target, cluster_options, output_option, show
from packetstack_core.autoscaling.spec import spec_of
from packetstack_core.autoscaling.triggers import Size
from packetstack_core.resources import PacketStack


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


main.params += cluster_options()


def kubectl() -> None:
    """`kubectl packetstack`: the same verbs, always for a cluster."""
    main(prog_name="kubectl packetstack", obj=Target(cluster=True))


for _command in (
    changing.up, changing.down, looking.get, looking.describe, changing.scale, looking.top, looking.transitions,
    changing.move,
    changing.upgrade, looking.explain, looking.events, looking.logs, looking.metrics, looking.preflight, changing.check,
):  # fmt: skip
    main.add_command(_command)


@main.command("simulate")
@click.argument("name", required=False)
@click.option("-f", "--file", required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--series", required=True, type=click.Path(path_type=Path), help="Load over time, as CSV.")
@click.option("--replicas", type=click.IntRange(0, 1000), help="Engines at the beginning; default: as in the file.")
@click.option("--interval", type=float, help="Seconds between two decisions; default: syncPeriodSeconds of the stack.")
@click.option("--start", "start_seconds", default=5.0, show_default=True, help="Seconds until a new engine serves.")
@click.option("--begin", type=click.DateTime(), default="2026-01-05", help="UTC of the first line, for schedules.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw load and replicas into this file.")
@output_option
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
    fully busy engines; with spec.autoscaling.vertical fully busy cores, and there is a column for each trigger.
    """
    if (interval is not None and not 1 <= interval <= 3600) or not 0 <= start_seconds <= 3600:
        raise click.UsageError("--interval takes 1 to 3600 seconds, --start 0 to 3600")
    stacks = [stack for stack in files.load(file) if name in (None, stack.metadata.name)]
    if len(stacks) != 1:
        names = "no" if not stacks else ", ".join(stack.metadata.name for stack in stacks)
        raise CliError(f"{file}: has {names} {f'stack {name}' if name else 'stacks'}; name one that it has")
    wanted = simulate.autoscaling_of(stacks[0])
    if wanted.vertical is not None:
        _simulate_sizes(stacks[0], series, replicas, interval, start_seconds, begin, picture, output)
        return
    metrics = spec_of(wanted).metrics
    load = simulate.read_series(series, metrics)
    first = stacks[0].spec.replicas if replicas is None else replicas
    ticks = simulate.simulate(wanted, load, first, begin.replace(tzinfo=UTC), interval, start_seconds)
    if picture:
        simulate.draw(metrics, ticks, f"stack {stacks[0].metadata.name} under {series.name}", picture)
    show([tick.document() for tick in ticks], output, lambda: views.decisions(ticks))


def _simulate_sizes(
    stack: PacketStack,
    series: Path,
    replicas: int | None,
    interval: float | None,
    start_seconds: float,
    begin: datetime,
    picture: Path | None,
    output: str | None,
) -> None:
    load = simulate.read_columns(series, simulate_sizes.columns_of(stack.spec))
    size = Size(stack.spec.replicas if replicas is None else replicas, stack.spec.engine.cores)
    ticks = simulate_sizes.simulate(stack.spec, load, size, begin.replace(tzinfo=UTC), interval, start_seconds)
    if picture:
        simulate_sizes.draw(ticks, f"stack {stack.metadata.name} under {series.name}", picture)
    show([tick.document() for tick in ticks], output, lambda: views.sizes(ticks))


@main.command()
@click.option("--connections", default=2000, show_default=True)
@click.option("--udp-flows", default=200, show_default=True)
@click.option("--seconds", default=75, show_default=True)
@click.option("--handover", type=click.Choice(["transfer", "mirror"]), default="transfer", show_default=True)
@click.option("--build-dir", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
def demo(connections: int, udp_flows: int, seconds: int, handover: str, build_dir: Path) -> None:
    """Resize, kill and upgrade a pool under live traffic in network namespaces of its own, and count what breaks.

    With --handover mirror a second set of engines takes over, and the first leaves when its connections have ended.
    """
    if handover == "mirror":  # only here: each command would import them
        from packetstack_cli.demo_mirror import run_mirror_demo as run
    else:
        from packetstack_cli.demo import run_demo as run
    sys.exit(run(build_dir, connections, udp_flows, seconds))


if __name__ == "__main__":
    main(prog_name="packetstack")
