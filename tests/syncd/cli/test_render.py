"""Rows for people: a table where there is room, and no row lost anywhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from syncd.cli.render import Row, show_rows

HEADER = ("run", "state", "error")


def shown(rows: list[Row], *, terminal: bool, width: int) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None)
    show_rows(console, HEADER, rows)
    return text.getvalue()


def row(name: str, error: str = "") -> Row:
    return [(name, ""), ("failed", "red"), (error, "")]


def test_a_wide_terminal_gets_a_table() -> None:
    assert "┃ run" in shown([row("a")], terminal=True, width=100)


def test_a_narrow_terminal_gets_field_by_field_and_breaks_no_word() -> None:
    text = shown([row("a", "one two three"), row("b")], terminal=True, width=60)
    assert text == "a\n  state: failed\n  error: one two three\nb\n  state: failed\n"


def test_elsewhere_a_row_is_a_line_however_narrow() -> None:
    assert shown([row("a", "x")], terminal=False, width=20) == "a  failed  x\n"


@pytest.mark.parametrize("width", [60, 200])
def test_no_row_is_cut_on_a_terminal(width: int) -> None:
    text = shown([row(f"run-{number}") for number in range(450)], terminal=True, width=width)
    assert all(f"run-{number} " in text for number in range(450))


def test_a_name_from_outside_cannot_style_or_steer_the_terminal() -> None:
    for width in (60, 200):
        text = shown([row("[red]eve\x1b[2J")], terminal=True, width=width)
        assert "[red]eve" in text
        assert "\x1b[2J" not in text
