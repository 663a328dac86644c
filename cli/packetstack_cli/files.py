"""PacketStack files as the command reads them."""

import sys
from collections.abc import Iterable
from pathlib import Path

import click

from packetstack_cli.errors import CliError, unreadable
from packetstack_core import reading
from packetstack_core.reading import ResourceError
from packetstack_core.resources import PacketStack


def load_all(files: Iterable[str]) -> list[PacketStack]:
    """The stacks of all files. CliError for two of one name: the second would replace the first."""
    found: dict[tuple[str | None, str], tuple[str, PacketStack]] = {}
    for file in files:
        for stack in load(file):
            first, _ = found.setdefault((stack.metadata.namespace, stack.name), (file, stack))
            if first != file:
                raise CliError(f"{file}: stack {stack.name} is in {first} too; use a name once")
    return [stack for _, stack in found.values()]


def advise(stacks: Iterable[PacketStack]) -> None:
    """What is allowed and will most likely be regretted, to the person and not into a pipe."""
    for stack in stacks:
        for line in stack.advice():
            click.echo(f"stack {stack.name}: note: {line}", err=True)


def load(file: str) -> list[PacketStack]:
    """The stacks of one file; "-" is standard input. CliError with one line for each wrong field."""
    try:
        return list(reading.load(sys.stdin.read() if file == "-" else Path(file).read_text()))
    except (OSError, UnicodeDecodeError) as e:
        raise unreadable(file, e) from None
    except ResourceError as e:
        raise CliError("\n".join(f"{file}: {problem}" for problem in e.problems)) from None
