"""Parts of an engine's shared memory, by the names that `include/packetstack/abi.h` gives them.

What cffi gives is of no type that mypy knows; these protocols say which fields the agent reads and writes. A test compares
them with the header.
"""

from collections.abc import Sequence
from typing import Protocol


class Core(Protocol):
    """`struct ps_core`: a worker thread, which writes it; counts are since the engine was made."""

    heartbeat: int
    """Turns of its loop."""
    busy_cycles: int
    """TSC cycles spent in turns that handled frames."""
    total_cycles: int
    config_seen: int
    """Generation of the configuration that it uses."""
    thread: int
    """Its number where it runs; 0: it does not run."""
    cpu: int
    """Where it was seen last."""
    asleep: int
    """1 while it waits for something to do."""
    counters: Sequence[int]
    """By ps_counter."""


class Ring(Protocol):
    """`struct ps_ring`: indexes that only grow, modulo 2^32."""

    producer: int
    consumer: int


class Queue(Protocol):
    """`struct ps_queue`: a receive queue; counts are since the engine was made, without markers."""

    cur: int
    """Core that serves it: generation << 8 | core + 1; 0: none."""
    received: int
    forwarded: int
    depth: int
    """Frames that waited in it when it was last looked at."""
    holds: int
    """Handovers for which it parked frames."""
    hold_ns: int
    """Nanoseconds from the first parked frame to the release, summed."""
    hold_max_ns: int
    cycles: int
    """Busy TSC cycles spent on it."""
    park: Ring
