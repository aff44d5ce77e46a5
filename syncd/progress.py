"""Progress of long work for people: on stderr, on a terminal only, and gone when the work is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn


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
