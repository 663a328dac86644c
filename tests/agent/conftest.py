"""A stack that is served while something happens to it."""

import socket
from collections.abc import Iterator

import pytest
from tests.lab.node import Node, ask, stack


@pytest.fixture
def served(node: Node) -> Iterator[socket.socket]:
    """A connection through a fresh stack; it must still work in the end."""
    node.up(stack())
    with node.connect() as connection:
        first = ask(connection)
        yield connection
        assert ask(connection) == first
    node.command("down", "--all", "--yes")
