"""Errors of the command: one line for the user."""

from pathlib import Path


class CliError(Exception):
    """What is wrong, and what to do about it; one line."""


class NoAgent(CliError):
    """Nobody answers."""


class EarlierAgent(CliError):
    """The agent is of a build whose protocol this command does not speak."""


def unreadable(file: Path | str, e: Exception) -> CliError:
    """For a file that was not there, or is not what it should be."""
    return CliError(f"{file}: cannot be read: {getattr(e, 'strerror', None) or e}")
