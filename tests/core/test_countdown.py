"""When a set that drains ends: by the pace of the last minute, or not within sight."""

from packetstack_core.countdown import Countdown


def counted(*seen: tuple[float, int | None]) -> float | None:
    it = Countdown()
    for now, left in seen:
        it.note(now, left)
    return it.ends_in()


def test_the_end_is_as_far_as_the_pace_says() -> None:
    assert counted((0, 100), (10, 80)) == 40.0
    assert counted((0, 100), (10, 80), (20, 0)) == 0.0


def test_only_the_last_minute_counts() -> None:
    early = [(float(t), 1000 - 10 * t) for t in range(40)]
    late = [(float(t), 600 - t) for t in range(40, 140)]
    assert counted(*early, *late) == 600 - 139


def test_without_an_end_in_that_minute_there_is_none_within_sight() -> None:
    assert counted() is None
    assert counted((0, 7)) is None
    assert counted((0, 7), (30, 7), (60, 7)) is None
    assert counted((0, 9), (1, 7), (61, 7), (62, 7)) is None


def test_a_transition_is_not_measured_by_the_one_before() -> None:
    assert counted((0, 100), (10, 1), (11, None), (12, 500)) is None
