"""A stack that is served while something happens to it."""

import socket
from collections.abc import Iterator

import pytest
from tests.lab.node import Node, ask, stack


@pytest.fixture
def served(node: Node) -> Iterator[socket.socket]:
    """A connection through the module's stack; it must still work in the end. Its engines stay from test to test."""
    node.up_again()
    with node.connect() as connection:
        first = ask(connection)
        yield connection
        assert ask(connection) == first


@pytest.fixture
def fresh(node: Node) -> Iterator[socket.socket]:
    """The only connection through a stack that is the test's own."""
    node.command("down", "--all", "--yes")
    node.up(stack())
    with node.connect() as connection:
        ask(connection)
        yield connection
    node.command("down", "--all", "--yes")
