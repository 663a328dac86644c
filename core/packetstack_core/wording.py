"""How values and numbers are written in messages."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime


def show(value: object, limit: int = 60) -> str:
    """A value as a user would write it, on one line, at most `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def counted(number: int, what: str) -> str:
    """A number of things: "1 engine", "2 engines"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def at_least(number: int, what: str) -> str:
    """A number of things that changes often, in words that do not: "at least 64 flows"; exact below 2."""
    known = 1 << max(0, number.bit_length() - 1) if number else 0
    return counted(known, what) if number < 2 else f"at least {counted(known, what)}"


def kind_of(value: object) -> str:
    """The kind of a YAML value, as in "a mapping"; for None "empty"."""
    if value is None:
        return "empty"
    names = {bool: "a boolean", int: "a number", float: "a decimal number", str: "a string", list: "a list"}
    return names.get(type(value), "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def one_line(text: str | None) -> str:
    """Text of another library on one line, at most 200 characters."""
    return " ".join((text or "cannot be read").split())[:200]


def timestamp(at: float) -> str:
    """RFC 3339 in UTC, as Kubernetes writes it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
