"""Subjects that people ignore in the dashboard, kept in the state."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from sqlalchemy import text

from syncd.core.unbilled import ignored_on
from syncd.runs.ignored import IgnoredSubjects
from syncd.state.database import State
from syncd.state.location import StateLocation

NOW = datetime(2026, 11, 22, 7, tzinfo=UTC)
TODAY = NOW.date()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with State(StateLocation(tmp_path)) as opened:
        yield opened


def test_what_is_ignored_is_so_until_its_last_day_is_over(state: State) -> None:
    ignored = IgnoredSubjects(state)
    ignored.ignore("probe", "ours", "mia", TODAY, NOW)
    ignored.ignore("ever", "test", "joe", None, NOW)
    assert ignored_on(TODAY, ignored.active()) == {
        "ever": "test, by joe",
        "probe": "ours, by mia, until 2026-11-22",
    }
    assert set(ignored_on(date(2026, 11, 23), ignored.active())) == {"ever"}


def test_the_configuration_wins_over_the_page(state: State) -> None:
    ignored = IgnoredSubjects(state)
    ignored.ignore("probe", "page", "mia", None, NOW)
    other = IgnoredSubjects(state).active()
    assert ignored_on(TODAY, (), other)["probe"] == "page, by mia"
    assert ignored_on(TODAY, ignored.active(), other)["probe"] == "page, by mia"


def test_a_second_decision_replaces_the_first_and_both_are_kept(state: State) -> None:
    ignored = IgnoredSubjects(state)
    ignored.ignore("probe", "ours", "mia", None, NOW)
    ignored.ignore("probe", "theirs", "joe", TODAY, NOW)
    assert [one.reason for one in ignored.active()] == ["theirs"]
    with state.reading() as connection:
        rows = connection.execute(text("SELECT reason, ended_by FROM ignored_subjects ORDER BY number"))
        assert rows.fetchall() == [("ours", "joe"), ("theirs", None)]


def test_ending_it_counts_once(state: State) -> None:
    ignored = IgnoredSubjects(state)
    ignored.ignore("probe", "ours", "mia", None, NOW)
    (one,) = ignored.active()
    ended = ignored.end(one.number, "joe", NOW)
    assert ended is not None
    assert ended.subject == "probe"
    assert ignored.end(one.number, "joe", NOW) is None
    assert ignored.end(99, "joe", NOW) is None
    assert ignored.active() == ()
