"""Formatting of values for people."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from syncd.dashboard.text import ago, clock, duration, moment, size, visible

NOW = datetime(2026, 11, 22, 7, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("alice", "alice"),
        ("Ærøskøbing 雷 🌩", "Ærøskøbing 雷 🌩"),
        ("abc\u202egnp.exe", "abc⟨U+202E⟩gnp.exe"),
        ("a\u200bb\ufeff", "a⟨U+200B⟩b⟨U+FEFF⟩"),
        ("a\x00b\x1b[31m", "a⟨U+0000⟩b⟨U+001B⟩[31m"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\ud800", "⟨U+D800⟩"),
        ("a\u2028b", "a⟨U+2028⟩b"),
    ],
)
def test_invisible_characters_are_written_out(given: str, shown: str) -> None:
    assert visible(given) == shown


def test_markup_and_values_other_than_text_stay() -> None:
    markup = Markup("<b>\u200b</b>")
    assert visible(markup) is markup
    assert visible(3) == 3
    assert visible(None) is None


@given(st.text(st.characters()))
def test_no_text_from_outside_controls_a_page_or_breaks_its_encoding(text: str) -> None:
    shown = visible(text)
    assert isinstance(shown, str)
    shown.encode()
    assert not [
        char for char in shown if unicodedata.category(char) in {"Cc", "Cf", "Cs"} and char not in "\n\t"
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "just now"),
        (0.4, "just now"),
        (3.4, "3 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (514, "8 min ago"),
        (8_070, "2 h 14 min ago"),
        (90_000, "1 d 1 h ago"),
        (-300, "in 5 min"),
    ],
)
def test_a_time_is_shown_relative_to_now(seconds: float, said: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == said


def test_a_missing_time_is_never() -> None:
    assert ago(None, NOW) == "never"
    assert clock(None) == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0213, "21 ms"), (1.26, "1.3 s"), (12.7, "12 s"), (3600, "1 h"), (-1, "0 ms")]
)
def test_a_duration_has_two_units_at_most(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_times_are_shown_in_utc() -> None:
    when = moment("2026-11-22T08:03:11+01:00")
    assert clock(when) == "2026-11-22 07:03:11 UTC"


@pytest.mark.parametrize("text", [None, "", "yesterday", 7])
def test_an_invalid_time_is_none(text: object) -> None:
    assert moment(text) is None


def test_a_time_without_a_zone_is_utc() -> None:
    assert moment("2026-11-22T07:00:00") == NOW
    assert moment("2026-11-22T07:00:00Z") == NOW


def test_sizes() -> None:
    assert size(812) == "812 B"
    assert size(1536) == "1.5 KiB"
    assert size(3 * 1024**4) == "3.0 TiB"
