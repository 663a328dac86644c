"""One director for the tests of a module."""

import os
from collections.abc import Iterator

import pytest
from tests.director.frames import Director


@pytest.fixture(scope="module")
def director() -> Iterator[Director]:
    if os.geteuid() != 0:
        pytest.skip("loading BPF programs needs root")
    d = Director()
    yield d
    d.close()
