"""Findings of `preflight`."""

import re
from dataclasses import asdict, dataclass
from typing import Literal

OLDEST_KERNEL = (6, 1)

Result = Literal["ok", "warning", "missing", "unknown"]


@dataclass(frozen=True)
class Check:
    """One finding. `missing`: stacks cannot run. `warning`: some cannot, or not as well. `unknown`: we may not look."""

    result: Result
    where: str
    """"cluster", "node NAME", "namespace NAME", "stack NAMESPACE/NAME" or "host"."""
    message: str
    remedy: str = ""

    def document(self) -> dict[str, str]:
        """The finding as JSON or YAML would hold it."""
        return asdict(self)


def kernel(where: str, release: str) -> Check:
    """Whether it is new enough."""
    oldest = ".".join(map(str, OLDEST_KERNEL))
    if version_of(release) >= OLDEST_KERNEL:
        return Check("ok", where, f"kernel {release}")
    return Check("missing", where, f"kernel {release}", f"use {oldest} or newer")


def version_of(text: str) -> tuple[int, int]:
    """The first two numbers, as of "v1.36.2" or "6.12.8-arch1"; (0, 0) if there are none."""
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
