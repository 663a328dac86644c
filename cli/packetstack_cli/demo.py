"""Placeholder until the demo lands."""

from pathlib import Path


def run_demo(build_dir: Path, connections: int = 2000, udp_flows: int = 200, seconds: int = 60) -> int:
    """Not there yet."""
    raise NotImplementedError
