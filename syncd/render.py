"""Plans, outcomes and usage for people: a table on a terminal, one line each elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncd.changes import Change, ChangeKind, Plan
from syncd.outcome import Outcome, Status, count
from syncd.usage import SubjectUsage, Usage, whole

_STYLES = {
    ChangeKind.CREATE_CUSTOMER: "green",
    ChangeKind.ATTACH_SUBJECTS: "green",
    ChangeKind.RENAME_CUSTOMER: "yellow",
    ChangeKind.UPSERT_SUBJECT: "green",
    ChangeKind.BLOCKED: "bold red",
    ChangeKind.UNMANAGED: "dim",
    ChangeKind.ORPHANED: "dim",
}
_ROWS_ON_TERMINAL = 200

Row = Sequence[tuple[str, str]]
"""Cells of a row: text and style."""


def show_plan(console: Console, plan: Plan) -> None:
    """Print what applying this plan does, what it cannot do, and what it leaves alone."""
    rows = [
        (
            (str(change.kind), _STYLES[change.kind]),
            (change.customer_key or "", ""),
            (_what(change), ""),
            (change.reason, ""),
        )
        for change in plan.changes
    ]
    _show(console, ("change", "customer", "what", "why"), rows)
    _line(
        console,
        f"Plan: {_counts(plan.summary())}." if plan.changes else "Plan: nothing to do, nothing to report.",
    )


def show_outcomes(console: Console, outcomes: tuple[Outcome, ...]) -> None:
    """Print what went otherwise than planned, and how many went well."""
    rows = [
        (
            (str(outcome.status), "bold red"),
            (outcome.change.customer_key or "", ""),
            (_what(outcome.change), ""),
            (outcome.detail, ""),
        )
        for outcome in outcomes
        if outcome.status in {Status.BLOCKED, Status.SKIPPED}
        and outcome.change.kind is not ChangeKind.BLOCKED
    ]
    _show(console, ("outcome", "customer", "what", "why"), rows)
    _line(console, f"Applied: {_counts(count(outcomes))}.")


def show_usage(console: Console, usage: Usage) -> None:
    """Print requests and tokens for each customer and subject, and those of nobody."""
    rows: list[Row] = []
    for customer in usage.customers:
        names = itertools.chain([f"{customer.name} ({customer.key or customer.id})"], itertools.repeat(""))
        lines = zip(names, customer.subjects, strict=False)
        rows += [_usage_row((name, ""), subject) for name, subject in lines]
    rows += [_usage_row(("unattributed", "bold red"), subject) for subject in usage.unattributed]
    _show(console, ("customer", "subject", "requests", "tokens"), rows)
    _line(console, f"Unattributed subjects: {len(usage.unattributed)}.")


def _usage_row(customer: tuple[str, str], subject: SubjectUsage) -> Row:
    numbers = (f"{whole(value):,}" for value in (subject.requests, subject.tokens))
    return (customer, (subject.key, ""), *((number, "") for number in numbers))


def _what(change: Change) -> str:
    """Say what changes: the name before and after, or the subjects."""
    before, after = change.before, change.after
    if change.kind is ChangeKind.RENAME_CUSTOMER and before and after:
        return f"{before.name!r} -> {after.name!r}"
    subjects = ", ".join(change.subject_keys)
    if change.kind is ChangeKind.CREATE_CUSTOMER and after:
        return f"{after.name!r} with {subjects}"
    return subjects


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "nothing"


def _show(console: Console, header: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows:
        return
    if not console.is_terminal:
        for row in rows:
            _line(console, "  ".join(_printable(text) for text, _ in row if text))
        return
    table = Table(*header)
    for row in rows[:_ROWS_ON_TERMINAL]:
        table.add_row(*_cells(row))
    console.print(table)
    if len(rows) > _ROWS_ON_TERMINAL:
        _line(console, f"... and {len(rows) - _ROWS_ON_TERMINAL} more; --json has them all")


def _cells(row: Row) -> Iterable[Text]:
    # Text, not markup: a consumer may be called "[red]".
    return (Text(_printable(text), style=style, overflow="fold") for text, style in row)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Take out what could steer a terminal: names come from outside."""
    return "".join(char if char.isprintable() else "?" for char in text)
