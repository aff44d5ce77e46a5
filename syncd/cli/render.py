"""Plans, outcomes and usage for people: a table on a terminal, one line each elsewhere."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status, count
from syncd.core.unbilled import UnbilledUsage
from syncd.metering.usage import SubjectUsage, Usage, whole

_CHANGE_STYLES = {
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
            (str(change.kind), _CHANGE_STYLES[change.kind]),
            (change.customer_key or "", ""),
            (_what(change), ""),
            (_why(change), ""),
        )
        for change in plan.changes
    ]
    show(console, ("change", "customer", "what", "why"), rows)
    for note in plan.notes:
        line(console, f"Note: {_printable(note)}.")
    if plan.unbilled and plan.unbilled.subjects:
        line(console, f"Unbilled: {_unbilled(plan.unbilled)}.")
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


def _unbilled(unbilled: UnbilledUsage) -> str:
    text = f"{unbilled.events():,} events of {len(unbilled.subjects)} subjects on no customer"
    if unbilled.since:
        text += f", since {unbilled.since[:10]}"
    if planned := unbilled.count("planned"):
        text += f"; this plan attributes {planned} of them"
    if blocked := unbilled.count("blocked"):
        text += f"; {blocked} are blocked ({unbilled.events('blocked'):,} events)"
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


# MERGED: Progress of long work for people: on stderr, on a terminal only, and gone when the work is done.


class Steps:
    """Work in steps: `begin` names one, with a total where it is known, `advance` counts."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, visible=False)

    def begin(self, what: str, total: int | None = None) -> None:
        """Show a step: a bar up to `total`, a spinner where nobody knows it."""
        self._bar.reset(self._task, total=total, description=what, visible=True)

    def advance(self, done: int = 1) -> None:
        """Count more as done."""
        self._bar.advance(self._task, done)

    def hide(self) -> None:
        """Show nothing until the next step begins."""
        self._bar.update(self._task, visible=False)


@contextmanager
def steps() -> Iterator[Steps]:
    """Show steps for as long as the block runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        redirect_stdout=False,
    )
    with bar:
        yield Steps(bar)


# MERGED: The history for people.

_STATE_STYLES = {"failed": "bold red", "blocked": "bold yellow", "succeeded": "green"}


def show_runs(console: Console, runs: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each run."""
    rows: list[Row] = [
        (
            (run["id"][:12], ""),
            (run["requested_at"][:19], ""),
            (run["trigger"] + (" (dry run)" if run["dry_run"] else ""), ""),
            (run["state"], _STATE_STYLES.get(run["state"], "")),
            (counts(run["outcomes"]), ""),
            (run["error"] or "", ""),
        )
        for run in runs
    ]
    show(console, ("run", "asked for (UTC)", "trigger", "state", "changes", "error"), rows)
    if not rows:
        line(console, "No runs yet.")


def show_recorded_run(console: Console, run: Mapping[str, Any]) -> None:
    """Print one run with each of its changes and the answer to it."""
    show_runs(console, [run])
    rows: list[Row] = [
        (
            (result["at"][:19], ""),
            (result["change"]["kind"], ""),
            (result["change"]["customer_key"] or "", ""),
            (", ".join(result["change"]["subject_keys"]), ""),
            (result["status"], ""),
            (result["detail"], ""),
        )
        for result in run["results"]
    ]
    show(console, ("at (UTC)", "change", "customer", "subjects", "outcome", "answer"), rows)
    line(console, f"Planned: {counts((run['plan'] or {}).get('summary', {}))}. --json has the plan.")


# MERGED: The daemon's state and its runs for people.

_STATE_STYLES = {"failed": "bold red", "blocked": "bold yellow", "succeeded": "green"}

_HEADER = ("", "run", "state", "planned", "done", "error")


def show_status(console: Console, status: Mapping[str, Any]) -> None:
    """Print what goes on, how the last run ended and when the next is due, from GET /v1/status."""
    rows = [
        _status_row(what, status[what])
        for what in ("current", "last")
        if isinstance(status.get(what), Mapping)
    ]
    show(console, _HEADER, rows)
    last = status.get("last")
    if isinstance(last, Mapping):
        _show_unbilled(console, last)
    else:
        line(console, "No run has ended yet.")
    if queued := status["queued"]:
        line(console, f"Waiting runs: {queued}.")
    line(console, f"Last success: {_minute(status.get('last_success')) or 'none'}.")
    line(console, f"Next run: {_minute(status.get('next_run')) or 'none is due'}.")
    if refused := status.get("configuration_refused"):
        line(console, f"The configuration was refused, the one before is in use: {refused}")


def show_run(console: Console, run: Mapping[str, Any]) -> None:
    """Print one run as GET /v1/syncs/{id} tells it."""
    show(console, _HEADER, [_status_row(run["trigger"], run)])
    _show_unbilled(console, run)


def _status_row(what: str, run: Mapping[str, Any]) -> Row:
    when = _minute(run["finished_at"] or run["started_at"] or run["requested_at"])
    state = f"{run['state']}{' (dry run)' if run['dry_run'] else ''}, {when}"
    planned = "in sync" if run["in_sync"] else counts(run["planned"]) if run["planned"] else ""
    done = counts(run["outcomes"]) if any(run["outcomes"].values()) else ""
    cells = (what, run["id"][:12], state, planned, done, run["error"] or "")
    return [(text, _STATE_STYLES.get(run["state"], "") if text == state else "") for text in cells]


def _show_unbilled(console: Console, run: Mapping[str, Any]) -> None:
    unbilled = run.get("unbilled")
    if isinstance(unbilled, Mapping) and unbilled.get("subjects"):
        subjects, events = unbilled["subjects"], unbilled["events"]
        line(console, f"Unbilled: {events:,} events of {subjects} subjects on no customer.")


def _minute(moment: object) -> str:
    """Return a moment up to the second, in UTC as the daemon tells it."""
    return f"{str(moment)[:19].replace('T', ' ')} UTC" if moment else ""
