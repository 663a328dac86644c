"""Whom a command asks, and what all commands share: options for a cluster, data as output, errors in one line."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from packetstack_cli import views
from packetstack_cli.backend import Backend
from packetstack_cli.client import DEFAULT_RUN_DIRECTORY, Client
from packetstack_cli.cluster import ClusterClient
from packetstack_cli.errors import CliError
from packetstack_core.reading import ResourceError

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

    def backend(self) -> Backend:
        """Connects to nobody yet."""
        if self.cluster or self.kubeconfig or self.context or self.namespace:
            if self.explicit:
                raise click.UsageError("--run-dir is for the agent of this host, the other options are for a cluster")
            return ClusterClient(self.kubeconfig, self.context, self.namespace)
        return Client(self.run_directory.absolute())


def cluster_options() -> list[click.Option]:
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
            cmd.params += cluster_options()
        super().add_command(cmd, name)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as e:
            raise in_one_line(e) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ResourceError as e:
            sys.exit("\n".join(e.problems))
        except CliError as e:
            sys.exit(str(e))
        except click.UsageError as e:
            raise in_one_line(e) from None


class WrongUsage(click.UsageError):
    """One line, where click would print three."""

    def show(self, file: Any = None) -> None:
        where = self.ctx.command_path if self.ctx is not None else "packetstack"
        click.echo(f"{where}: {self.format_message().rstrip('.')}; see {where} --help", file, err=file is None)


def in_one_line(error: click.UsageError) -> click.UsageError:
    """The error, to be shown in one line; a command without any words shows its help as before."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    return WrongUsage(error.format_message(), error.ctx)


def with_backend(command: F) -> F:
    @click.pass_context
    @functools.wraps(command)
    def asking(ctx: click.Context, /, *arguments: Any, **options: Any) -> Any:
        backend = ctx.find_root().ensure_object(Target).backend()
        ctx.call_on_close(backend.close)
        return command(backend, *arguments, **options)

    return asking  # type: ignore[return-value]


def output_option(command: F) -> F:
    option = click.option("-o", "--output", type=click.Choice(["json", "yaml"]), help="Print data instead of text.")
    return option(command)


def show(value: Any, output: str | None, view: Callable[[], Any]) -> None:
    if output:
        click.echo(views.data(value, output))
    else:
        views.console.print(view())
