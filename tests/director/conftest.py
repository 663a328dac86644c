"""One director for the tests of a module."""

from collections.abc import Iterator

import pytest
from tests.director.frames import Director


@pytest.fixture(scope="module")
def director() -> Iterator[Director]:
    d = Director()
    yield d
    d.close()
