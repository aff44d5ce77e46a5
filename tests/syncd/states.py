"""The state of a folder, opened for a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncd.runs.history import History
from syncd.state.database import State
from syncd.state.location import StateLocation


@contextmanager
def opened_history(folder: Path) -> Iterator[History]:
    """Open the history of a state directory."""
    with State(StateLocation(folder)) as state:
        yield History(state)
