"""CSV for spreadsheets: texts that others wrote are never run as formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from decimal import Decimal

Cell = str | int | float | Decimal | date | datetime | None
"""A cell; None is empty."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""The first characters by which spreadsheets recognize formulas (OWASP, CSV Injection)."""


def cell(value: Cell) -> str | int | float | Decimal:
    """Return a cell that no spreadsheet runs: customers and consumers name themselves.

    Numbers stay numbers, also negative ones. A text that looks like a formula begins with an apostrophe.
    """
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}" if value.startswith(_FORMULA) else value
        case datetime() | date():
            return value.isoformat()
        case float() if value.is_integer():
            return int(value)
        case Decimal():
            return format(value, "f")
        case _:
            return value


def document(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table as CSV with a line of heads."""
    text = io.StringIO()
    # As RFC 4180 has it; with "\n" alone, the module would not quote a cell with "\r".
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(map(cell, heads))
    writer.writerows([cell(value) for value in row] for row in rows)
    return text.getvalue()
