"""When the serving thread writes by itself: while writes are quick, and not for a while after a slow one."""

from __future__ import annotations

from openmeter_plugin.spool.writer import SLOW_WRITE, DiskSpeed


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def seconds_without_trust(pace: DiskSpeed, clock: Clock) -> float:
    start = clock.now
    while not pace.trusted:
        clock.now += 1
    return clock.now - start


def test_a_disk_is_trusted_until_a_write_was_slow() -> None:
    pace = DiskSpeed(Clock())
    for _ in range(1000):
        pace.observe(SLOW_WRITE / 2)
    assert pace.trusted
    pace.observe(SLOW_WRITE)
    assert not pace.trusted


def test_a_disk_that_was_slow_once_is_trusted_again_after_a_pause() -> None:
    clock = Clock()
    pace = DiskSpeed(clock)
    pace.observe(1)
    assert seconds_without_trust(pace, clock) == 10


def test_the_pause_doubles_while_the_disk_is_slow_again_soon_after_up_to_a_bound() -> None:
    clock = Clock()
    pace = DiskSpeed(clock)
    pauses = []
    for _ in range(8):
        pace.observe(1)
        pauses.append(seconds_without_trust(pace, clock))
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]


def test_after_a_long_good_time_the_pause_is_short_again() -> None:
    clock = Clock()
    pace = DiskSpeed(clock)
    for _ in range(3):
        pace.observe(1)
        seconds_without_trust(pace, clock)
    clock.now += 1000
    pace.observe(1)
    assert seconds_without_trust(pace, clock) == 10


def test_a_slow_write_during_the_pause_begins_it_anew_without_doubling_it() -> None:
    clock = Clock()
    pace = DiskSpeed(clock)
    pace.observe(1)
    clock.now += 9
    pace.observe(1)
    assert seconds_without_trust(pace, clock) == 10
