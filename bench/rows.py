"""What a benchmark yields."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `goal` is what it should reach, as text; `met` is empty where there is no goal."""

    target: str
    name: str
    value: float | str
    unit: str
    peer: str = ""
    peer_value: float | str = ""
    ratio: float | str = ""
    goal: str = ""
    met: str = ""


class Unavailable(Exception):
    """This benchmark cannot run here; the text says why."""


def yes(condition: bool) -> str:
    """How `Row.met` says it."""
    return "yes" if condition else "no"
