"""What the tests of a transition have in common."""

import pytest
from tests.lab.mirrored import Mirrored


@pytest.fixture
def lab(made: Mirrored) -> Mirrored:
    """The module's lab, with one set."""
    made.settle()
    return made
