"""Waiting for what others do: one way, whose error says what was awaited and what was seen last."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TypeVar

POLL_SECONDS = 0.05
SHOWN = 500
"""Characters of the value seen last."""

T = TypeVar("T")


def eventually(
    look: Callable[[], T], timeout_seconds: float = 10, what: str = "", *, every_seconds: float = POLL_SECONDS
) -> T:
    """The first true value of `look()`.

    AssertionError after `timeout_seconds`: names `what`, or else the source line of `look`, and the value seen last.
    What `look` raises is not caught.
    """
    deadline = time.monotonic() + timeout_seconds
    while not (seen := look()):
        if time.monotonic() > deadline:
            shown = repr(seen)
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
            raise AssertionError(f"not within {timeout_seconds:g} s: {what or _source(look)}; last seen: {shown}")
        time.sleep(every_seconds)
    return seen


def _source(look: Callable[[], object]) -> str:
    """The line where it was written, or its name."""
    try:
        lines, _ = inspect.getsourcelines(look)
    except (OSError, TypeError):
        return getattr(look, "__qualname__", repr(look))
    return " ".join(line.strip() for line in lines[:3])
