"""The history for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from syncd.render import Row, counts, line, show

_STYLES = {"failed": "bold red", "blocked": "bold yellow", "succeeded": "green"}


def show_runs(console: Console, runs: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each run."""
    rows: list[Row] = [
        (
            (run["id"][:12], ""),
            (run["requested_at"][:19], ""),
            (run["trigger"] + (" (dry run)" if run["dry_run"] else ""), ""),
            (run["state"], _STYLES.get(run["state"], "")),
            (counts(run["outcomes"]), ""),
            (run["error"] or "", ""),
        )
        for run in runs
    ]
    show(console, ("run", "asked for (UTC)", "trigger", "state", "changes", "error"), rows)
    if not rows:
        line(console, "No runs yet.")


def show_run(console: Console, run: Mapping[str, Any]) -> None:
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
