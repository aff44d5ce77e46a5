"""Disk speed: the serving thread writes while writes are quick, and pauses after a slow one."""

from __future__ import annotations

from openmeter_plugin.spool.writer import SLOW_WRITE, DiskSpeed


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def seconds_without_trust(speed: DiskSpeed, clock: Clock) -> float:
    start = clock.now
    while not speed.trusted:
        clock.now += 1
    return clock.now - start


def test_a_disk_is_trusted_until_a_write_is_slow() -> None:
    speed = DiskSpeed(Clock())
    for _ in range(1000):
        speed.observe(SLOW_WRITE / 2)
    assert speed.trusted
    speed.observe(SLOW_WRITE)
    assert not speed.trusted


def test_a_disk_that_was_slow_once_is_trusted_again_after_a_pause() -> None:
    clock = Clock()
    speed = DiskSpeed(clock)
    speed.observe(1)
    assert seconds_without_trust(speed, clock) == 10


def test_the_pause_doubles_up_to_a_bound_while_the_disk_keeps_being_slow() -> None:
    clock = Clock()
    speed = DiskSpeed(clock)
    pauses = []
    for _ in range(8):
        speed.observe(1)
        pauses.append(seconds_without_trust(speed, clock))
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]


def test_after_a_long_quick_period_the_pause_is_short_again() -> None:
    clock = Clock()
    speed = DiskSpeed(clock)
    for _ in range(3):
        speed.observe(1)
        seconds_without_trust(speed, clock)
    clock.now += 1000
    speed.observe(1)
    assert seconds_without_trust(speed, clock) == 10


def test_a_slow_write_during_the_pause_restarts_it_without_doubling_it() -> None:
    clock = Clock()
    speed = DiskSpeed(clock)
    speed.observe(1)
    clock.now += 9
    speed.observe(1)
    assert seconds_without_trust(speed, clock) == 10
