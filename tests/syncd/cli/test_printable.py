"""Texts of others on their way to a terminal."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from syncd.cli.options import printable

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
