"""Plans, outcomes and usage for people: a table on a terminal, one line each elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncd.changes import Change, ChangeKind, Plan
from syncd.exposure import Exposure
from syncd.outcome import Outcome, Status, count
from syncd.usage import SubjectUsage, Usage, whole

_STYLES = {
    ChangeKind.ADOPT_CUSTOMER: "yellow",
    ChangeKind.UNMARK_ORPHANED: "green",
    ChangeKind.MOVE_SUBJECTS: "bold yellow",
    ChangeKind.RETIRE_CUSTOMER: "bold red",
    ChangeKind.DETACH_SUBJECTS: "bold yellow",
    ChangeKind.MARK_ORPHANED: "yellow",
    ChangeKind.DELETE_CUSTOMER: "bold red",
    ChangeKind.DELETE_SUBJECT: "yellow",
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
            (_why(change), ""),
        )
        for change in plan.changes
    ]
    show(console, ("change", "customer", "what", "why"), rows)
    for note in plan.notes:
        line(console, f"Note: {_printable(note)}.")
    if plan.exposure and plan.exposure.subjects:
        line(console, f"Unbilled: {_exposure(plan.exposure)}.")
    line(
        console,
        f"Plan: {counts(plan.summary())}." if plan.changes else "Plan: nothing to do, nothing to report.",
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
    show(console, ("outcome", "customer", "what", "why"), rows)
    line(console, f"Applied: {counts(count(outcomes))}.")


def show_usage(console: Console, usage: Usage) -> None:
    """Print requests and tokens for each customer and subject, and those of nobody."""
    rows: list[Row] = []
    for customer in usage.customers:
        names = itertools.chain([f"{customer.name} ({customer.key or customer.id})"], itertools.repeat(""))
        lines = zip(names, customer.subjects, strict=False)
        rows += [_usage_row((name, ""), subject) for name, subject in lines]
    rows += [_usage_row(("unattributed", "bold red"), subject) for subject in usage.unattributed]
    show(console, ("customer", "subject", "requests", "tokens"), rows)
    line(console, f"Unattributed subjects: {len(usage.unattributed)}.")


def _usage_row(customer: tuple[str, str], subject: SubjectUsage) -> Row:
    numbers = (f"{whole(value):,}" for value in (subject.requests, subject.tokens))
    return (customer, (subject.key, ""), *((number, "") for number in numbers))


def _what(change: Change) -> str:
    """Say what changes: the name before and after, or the subjects."""
    before, after = change.before, change.after
    if change.kind is ChangeKind.RENAME_CUSTOMER and before and after:
        return f"{before.name!r} -> {after.name!r}"
    subjects = ", ".join(change.subject_keys)
    if change.to_customer_key is not None:
        return f"{subjects} -> {change.to_customer_key}"
    if change.kind is ChangeKind.CREATE_CUSTOMER and after:
        return f"{after.name!r} with {subjects}"
    return subjects


def _why(change: Change) -> str:
    """Give the reason, with the usage that is at stake."""
    if change.usage is None:
        return change.reason
    events = f"{change.usage.events:,} events since {change.usage.since[:10]}"
    match change.kind:
        case ChangeKind.BLOCKED:
            return f"{change.reason} ({events})"
        case ChangeKind.MOVE_SUBJECTS | ChangeKind.RETIRE_CUSTOMER:
            return f"{change.reason} ({events}, the last 31 days: without a subscription no period is open)"
        case ChangeKind.DELETE_SUBJECT:
            return f"{change.reason} ({events})"
        case _:
            return f"{change.reason} ({events}, unbilled after that unless they are invoiced)"


def _exposure(exposure: Exposure) -> str:
    text = f"{exposure.events():,} events of {len(exposure.subjects)} subjects on no customer"
    if exposure.since:
        text += f", since {exposure.since[:10]}"
    if planned := exposure.count("planned"):
        text += f"; this plan attributes {planned} of them"
    if blocked := exposure.count("blocked"):
        text += f"; {blocked} are blocked ({exposure.events('blocked'):,} events)"
    return text


def counts(numbers: Mapping[str, int]) -> str:
    """Say how many of what, without those that are none."""
    return ", ".join(f"{number} {name}" for name, number in numbers.items() if number) or "nothing"


def show(console: Console, header: Sequence[str], rows: Sequence[Row]) -> None:
    """Print rows: a table on a terminal, one line each elsewhere."""
    if not rows:
        return
    if not console.is_terminal:
        # Past Rich, which would take seconds for 20,000 lines.
        lines = ("  ".join([_printable(text) for text, _ in row if text]) + "\n" for row in rows)
        console.file.writelines(lines)
        return
    table = Table(*header)
    for row in rows[:_ROWS_ON_TERMINAL]:
        table.add_row(*_cells(row))
    console.print(table)
    if len(rows) > _ROWS_ON_TERMINAL:
        line(console, f"... and {len(rows) - _ROWS_ON_TERMINAL} more; --json has them all")


def _cells(row: Row) -> Iterable[Text]:
    # Text, not markup: a consumer may be called "[red]".
    return (Text(_printable(text), style=style, overflow="fold") for text, style in row)


def line(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Take out what could steer a terminal: names come from outside."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)
