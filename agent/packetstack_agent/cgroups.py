"""Memory limits of engines that the agent starts itself: cgroups, v1 or v2."""

from contextlib import suppress
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def limited(name: str, memory_bytes: int) -> Path | None:
    """A memory cgroup for the engine, v1 or v2; None where there is none. The shared rings are the agent's, not counted."""
    if (_V1 / "memory.limit_in_bytes").exists():
        group, limit = _V1 / "packetstack" / name, "memory.limit_in_bytes"
    elif "memory" in _read(_V2 / "cgroup.controllers").split():
        group, limit = _V2 / "packetstack" / name, "memory.max"
        with suppress(OSError):
            group.parent.mkdir(exist_ok=True)
            (_V2 / "cgroup.subtree_control").write_text("+memory")
            (group.parent / "cgroup.subtree_control").write_text("+memory")
    else:
        return None
    try:
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(str(memory_bytes))
    except OSError:
        return None
    return group


def remove(name: str) -> None:
    """Remove an engine's cgroup, and the parent when it is the last."""
    for root in (_V1, _V2):
        for group in (root / "packetstack" / name, root / "packetstack"):
            with suppress(OSError):
                group.rmdir()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
