"""When a request to stop ends the requests of a run."""

from __future__ import annotations

from syncd.runs.reconciler import Stop


def test_reading_stops_at_once_and_changes_have_a_moment_to_end_whole() -> None:
    requested, now = False, 100.0
    stop = Stop(lambda: requested, lambda: now)
    assert not stop()
    requested = True
    assert stop()
    stop.applying = True
    assert not stop()
    now += 2.9
    assert not stop()
    now += 0.2
    assert stop()
