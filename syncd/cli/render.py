"""Output for people: history, daemon status and progress.

Rows are a table on a terminal and plain lines elsewhere. Progress goes to stderr, only on a terminal, and
disappears when the work is done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from openmeter_plugin.units import plural
from syncd.cli.options import printable

_MAX_TABLE_ROWS = 200
_TABLE_WIDTH = 100
"""Columns of a terminal below which tables break words apart."""

Row = Sequence[tuple[str, str]]
"""Text and style of each cell."""


def counts(numbers: Mapping[str, int]) -> str:
    """Return the counts above zero with their names: ``2 blocked, 1 skipped``."""
    return ", ".join(f"{number} {name}" for name, number in numbers.items() if number) or "nothing"


def show_rows(console: Console, header: Sequence[str], rows: Sequence[Row]) -> None:
    """Print rows: a table on a wide terminal, field by field on a narrow one, one line each elsewhere.

    More rows than a table can hold well are lines too: none is cut, since any may be a problem.
    """
    if not console.is_terminal or len(rows) > _MAX_TABLE_ROWS:
        # Without Rich, which takes seconds for 20,000 lines.
        lines = ("  ".join([printable(text) for text, _ in row if text]) + "\n" for row in rows)
        console.file.writelines(lines)
    elif console.width < _TABLE_WIDTH:
        for row in rows:
            _show_fields(console, header, row)
    elif rows:
        table = Table(*header)
        for row in rows:
            table.add_row(*_cells(row))
        console.print(table)


def _show_fields(console: Console, header: Sequence[str], row: Row) -> None:
    """Print the fields of a row, a line each; the first one begins it."""
    indent = ""
    for name, (text, style) in zip(header, row, strict=True):
        if text:
            label = f"{name}: " if name and indent else ""
            console.print(Text(f"{indent}{label}{printable(text)}", style=style), soft_wrap=True)
            indent = "  "


def _cells(row: Row) -> Iterable[Text]:
    # Text, not markup: a consumer may be named "[red]".
    return (Text(printable(text), style=style, overflow="fold") for text, style in row)


def line(console: Console, text: str) -> None:
    """Print a line without wrapping or markup, and without anything that could steer a terminal."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def styled_line(console: Console, head: str, style: str, rest: str) -> None:
    """Print a line whose head has a colour, where there are colours."""
    console.print(Text.assemble((printable(head), style), printable(rest)), highlight=False, soft_wrap=True)


# Progress


class Steps:
    """Progress of work in steps: `begin` starts a step, with a total if known; `advance` counts."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, visible=False)

    def begin(self, what: str, total: int | None = None) -> None:
        """Show a step: a bar up to `total`, or a spinner if the total is unknown."""
        self._bar.reset(self._task, total=total, description=what, visible=True)

    def advance(self, done: int = 1) -> None:
        """Count work as done."""
        self._bar.advance(self._task, done)

    def hide(self) -> None:
        """Hide the progress until the next step begins."""
        self._bar.update(self._task, visible=False)


@contextmanager
def steps() -> Iterator[Steps]:
    """Show progress while the block runs."""
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


# History

_STATE_STYLES = {"failed": "bold red", "blocked": "bold yellow", "succeeded": "green"}


def show_runs(console: Console, runs: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per run."""
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
    show_rows(console, ("run", "requested (UTC)", "trigger", "state", "changes", "error"), rows)
    if not rows:
        line(console, "No runs yet.")


def show_recorded_run(console: Console, run: Mapping[str, Any]) -> None:
    """Print one run with each change and its outcome."""
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
    show_rows(console, ("time (UTC)", "change", "customer", "subjects", "outcome", "detail"), rows)
    line(console, f"Planned: {counts((run['plan'] or {}).get('summary', {}))}. --output json shows the plan.")


# The daemon

_STATUS_HEADER = ("", "run", "state", "planned", "done", "error")


def show_status(console: Console, status: Mapping[str, Any]) -> None:
    """Print the current run, the last run and the time of the next, from GET /v1/status."""
    rows = [
        _status_row(what, status[what])
        for what in ("current", "last")
        if isinstance(status.get(what), Mapping)
    ]
    show_rows(console, _STATUS_HEADER, rows)
    last = status.get("last")
    if isinstance(last, Mapping):
        _show_unbilled(console, last)
    else:
        line(console, "No run has finished yet.")
    if queued := status["queued"]:
        line(console, f"Queued runs: {queued}.")
    line(console, f"Last success: {_second(status.get('last_success')) or 'none'}.")
    if "leads" in status:
        line(console, _leader(status))
    if status.get("leads", True):
        line(console, f"Next run: {_second(status.get('next_run')) or 'none scheduled'}.")
    if refused := status.get("configuration_refused"):
        line(console, f"The reloaded configuration was refused, the previous one is still in use: {refused}")


def _leader(status: Mapping[str, Any]) -> str:
    if status["leads"]:
        return "Leader: this syncd does the runs."
    leader = status["leader"]
    if not isinstance(leader, Mapping):
        return "Leader: none at the moment; another syncd takes over within 15 seconds."
    return f"Leader: {leader['host']} (process {leader['pid']}, since {leader['since']}) does the runs."


def show_run(console: Console, run: Mapping[str, Any]) -> None:
    """Print one run, from GET /v1/syncs/{id}."""
    show_rows(console, _STATUS_HEADER, [_status_row(run["trigger"], run)])
    _show_unbilled(console, run)


def _status_row(what: str, run: Mapping[str, Any]) -> Row:
    when = _second(run["finished_at"] or run["started_at"] or run["requested_at"])
    state = f"{run['state']}{' (dry run)' if run['dry_run'] else ''}, {when}"
    planned = "in sync" if run["in_sync"] else counts(run["planned"]) if run["planned"] else ""
    done = counts(run["outcomes"]) if any(run["outcomes"].values()) else ""
    cells = (what, run["id"][:12], state, planned, done, run["error"] or "")
    return [(text, _STATE_STYLES.get(run["state"], "") if text == state else "") for text in cells]


def _show_unbilled(console: Console, run: Mapping[str, Any]) -> None:
    unbilled = run.get("unbilled")
    if isinstance(unbilled, Mapping) and unbilled.get("subjects"):
        subjects, events = unbilled["subjects"], unbilled["events"]
        text = f"Unbilled: {plural(events, 'event')} of {plural(subjects, 'subject')} without a customer"
        if settled := unbilled.get("settled_subjects"):
            text += f"; {settled} {'is' if settled == 1 else 'are'} blocked by decision"
        if unknown := unbilled.get("unknown_subjects"):
            text += f"; no source knows {unknown} ({plural(unbilled['unknown_events'], 'event')})"
        line(console, f"{text}.")


def _second(moment: object) -> str:
    """Return a time, which the daemon sends in UTC, to the second."""
    return f"{str(moment)[:19].replace('T', ' ')} UTC" if moment else ""
