"""What the command line prints for people."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

from syncd.cli.render import show_usage
from syncd.metering.usage import attribute
from tests.syncd.builders import customer


def test_usage_is_one_line_per_subject_with_thousands_separators() -> None:
    text = io.StringIO()
    show_usage(
        Console(file=text, width=200), attribute((customer("acme", "a", "b"),), {"a": 1234567, "x": 0.5}, {})
    )
    assert text.getvalue().splitlines() == [
        "acme (acme)  a  1,234,567  0",
        "b  0  0",
        "unbilled  x  0.5  0",
        "Unbilled subjects: 1.",
    ]


def keys_on_a_terminal(show: Callable[[Console], None]) -> list[str]:
    """The first two cells of each row of a table, and the lines below it."""
    text = io.StringIO()
    show(Console(file=text, force_terminal=True, width=200, color_system=None))
    rows = [line.split("│") for line in text.getvalue().splitlines()]
    return [f"{row[1].strip()} {row[2].strip()}" if len(row) > 2 else row[0] for row in rows]


def test_usage_without_a_customer_comes_first_on_a_terminal_and_is_never_cut() -> None:
    subjects = {f"unknown-{index:03}": 1.0 for index in range(220)} | {"a": 5.0}
    usage = attribute((customer("acme", "a", "b"),), subjects, {})
    seen = keys_on_a_terminal(lambda console: show_usage(console, usage))
    assert [key for key in seen if key.startswith("unbilled")] == [
        f"unbilled unknown-{index:03}" for index in range(220)
    ]
    assert "... and 2 more; --output json shows all" in seen
