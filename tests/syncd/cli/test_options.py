"""Options of the command line: times; and texts of others on their way to a terminal."""

from __future__ import annotations

import sys
import unicodedata
from datetime import UTC, datetime

import pytest
import typer

from syncd.cli.options import moment, printable
from syncd.metering.usage import rfc3339


def test_a_day_is_its_first_moment_in_utc() -> None:
    assert moment("2026-11-01") == datetime(2026, 11, 1, tzinfo=UTC)
    assert rfc3339(moment("2026-11-01")) == "2026-11-01T00:00:00Z"


def test_a_time_of_another_zone_is_sent_in_utc() -> None:
    assert rfc3339(moment("2026-11-01T00:30:00.9+01:00")) == "2026-10-31T23:30:00Z"


@pytest.mark.parametrize("text", ["2026-11", "2026-02-30", "2026-11-01T07:00:00", "yesterday", "1"])
def test_a_text_that_could_mean_several_times_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"must be a time|needs a time zone"):
        moment(text)


STEERING = "\x1b[2J\x07\x7f\x9b31m\u202e\u2066\u200b\u2028\ud800\ue000\r\n\t"


def test_nothing_that_steers_a_terminal_or_the_order_of_text_is_left() -> None:
    clean = printable(f"a{STEERING}b")
    assert clean == "a?[2J???31m" + "?" * 9 + "b"
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {unicodedata.category(char) for char in printable(everything)}
    assert left.isdisjoint({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


@pytest.mark.parametrize("name", ["", "alice", "Zoë", "日本語", "مرحبا", "🦍 & co", "[red]"])
def test_names_of_people_stay_as_they_are(name: str) -> None:
    assert printable(name) == name


def test_line_breaks_stay_where_they_are_kept() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb?"
