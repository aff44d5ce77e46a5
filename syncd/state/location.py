"""Location of the state, without opening it: this module imports no database library.

A command that only wants to know whether there is any state does not wait for SQLAlchemy, whose import takes
longer than that of the command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FILE = "state.sqlite3"
OLD_FILE = "history.sqlite3"
"""The history of versions before there was a schema with revisions; none of them was released."""


@dataclass(frozen=True, slots=True)
class StateLocation:
    """Where the state is: a file in a folder, `daemon.state_dir`."""

    folder: Path

    @property
    def file(self) -> Path:
        """Return the SQLite file."""
        return self.folder / FILE

    def exists(self) -> bool:
        """Return whether there may be state to read."""
        return self.file.exists()

    def __str__(self) -> str:
        """Return the location as error messages name it, with the setting."""
        return f"{self.file} (daemon.state_dir)"
