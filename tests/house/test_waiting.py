"""How tests wait: for the first true value, and with an error that says what did not come."""

import pytest
from tests.waiting import eventually


def test_the_first_true_value_is_given() -> None:
    seen = iter([0, "", None, "here", "later"])
    assert eventually(lambda: next(seen), every_seconds=0) == "here"


def test_the_error_says_what_was_awaited_and_what_was_seen_last() -> None:
    with pytest.raises(AssertionError, match=r"^not within 0 s: three engines; last seen: \[\]$"):
        eventually(list, 0, "three engines")


def test_without_words_the_error_shows_the_line() -> None:
    engines: list[int] = []
    with pytest.raises(AssertionError, match=r"eventually\(lambda: len\(engines\) == 3, 0\); last seen: False"):
        eventually(lambda: len(engines) == 3, 0)


def test_what_the_look_raises_is_not_waited_for() -> None:
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0)
