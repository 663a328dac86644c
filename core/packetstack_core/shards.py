"""Layouts of shards, by the name that agents and operators compare: the numbers of `struct ps_shard_form`, with dots between.

Engines of a set agree on it, and a flow never leaves its set; so builds of two layouts serve one stack as two sets.
"""

FIRST = "1.4.64.256.0.2.4.8.16.52.54.56.58.60.62.0"
"""Layout 1, which all builds had that do not say which one they have."""
PATTERN = r"[1-9][0-9]{0,4}(\.[0-9]{1,5}){15}"
"""What a name looks like."""


def number(name: str) -> str:
    """The layout's number, as people are told it."""
    return name.partition(".")[0]
