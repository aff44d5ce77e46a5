"""The daemon's state and its runs for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from syncd.render import Row, counts, line, show

_STYLES = {"failed": "bold red", "blocked": "bold yellow", "succeeded": "green"}

_HEADER = ("", "run", "state", "planned", "done", "error")


def show_status(console: Console, status: Mapping[str, Any]) -> None:
    """Print what goes on, how the last run ended and when the next is due, from GET /v1/status."""
    rows = [_row(what, status[what]) for what in ("current", "last") if isinstance(status.get(what), Mapping)]
    show(console, _HEADER, rows)
    last = status.get("last")
    if isinstance(last, Mapping):
        _tell_unbilled(console, last)
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
    show(console, _HEADER, [_row(run["trigger"], run)])
    _tell_unbilled(console, run)


def _row(what: str, run: Mapping[str, Any]) -> Row:
    when = _minute(run["finished_at"] or run["started_at"] or run["requested_at"])
    state = f"{run['state']}{' (dry run)' if run['dry_run'] else ''}, {when}"
    planned = "in sync" if run["in_sync"] else counts(run["planned"]) if run["planned"] else ""
    done = counts(run["outcomes"]) if any(run["outcomes"].values()) else ""
    cells = (what, run["id"][:12], state, planned, done, run["error"] or "")
    return [(text, _STYLES.get(run["state"], "") if text == state else "") for text in cells]


def _tell_unbilled(console: Console, run: Mapping[str, Any]) -> None:
    unbilled = run.get("unbilled")
    if isinstance(unbilled, Mapping) and unbilled.get("subjects"):
        subjects, events = unbilled["subjects"], unbilled["events"]
        line(console, f"Unbilled: {events:,} events of {subjects} subjects on no customer.")


def _minute(moment: object) -> str:
    """Return a moment up to the second, in UTC as the daemon tells it."""
    return f"{str(moment)[:19].replace('T', ' ')} UTC" if moment else ""
