"""A stack's hash key: made once, kept in a file, never replaced while flows live."""

import os
import secrets
from pathlib import Path

from packetstack_agent.errors import AgentError
from packetstack_core.wording import counted

SECRET_BYTES = 16


def hash_key(path: Path, flows: int) -> tuple[int, int]:
    """The stack's hash key, made once: another one would move every flow, so with `flows` it is not made anew."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if len(data) != SECRET_BYTES:
        if flows:
            raise AgentError(
                f"{path}: has {len(data)} bytes instead of {SECRET_BYTES}, and {counted(flows, 'live flow')} of the stack "
                "cannot be found with another secret; put the file back, or end the stack with packetstack down"
            )
        data = secrets.token_bytes(SECRET_BYTES)
        _write_whole(path, data)
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")


def _write_whole(path: Path, data: bytes) -> None:
    """The file has this content or is as it was, whatever happens meanwhile. For root alone to read."""
    fresh = path.with_suffix(".new")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as e:
        fresh.unlink(missing_ok=True)
        raise AgentError(f"{path}: cannot be written: {e.strerror}") from None
