"""Subjects that are meant to be unbilled: those of the setting `ignore`, and those of the dashboard's page.

The page's are kept in the state with all that ever were: who ignored what, from when until when, and who
ended it. (Apart from `syncd.runs.unbilled`, so that a plan without a state imports no database library.)
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import Row, insert, select, update

from syncd.core.errors import StateError
from syncd.state.database import State
from syncd.state.tables import ignored_subjects as table


@dataclass(frozen=True, slots=True)
class IgnoredEntry:
    """A subject that somebody ignores in the dashboard."""

    number: int
    subject: str
    reason: str
    by: str
    until: date | None
    since: datetime
    ended_at: datetime | None = None

    @property
    def words(self) -> str:
        """Return the decision in words."""
        return f"{self.reason}, by {self.by}{f', until {self.until}' if self.until else ''}"


class IgnoredSubjects:
    """The ignored subjects of one state; all methods raise StateError."""

    def __init__(self, state: State) -> None:
        self._state = state

    def active(self) -> tuple[IgnoredEntry, ...]:
        """Return those that nobody has ended, the latest first; the last day of some may be over."""
        query = select(table).where(table.c.ended_at.is_(None)).order_by(table.c.number.desc())
        with self._state.reading() as connection:
            return tuple(_entry(row) for row in connection.execute(query))

    def ignore(self, subject: str, reason: str, by: str, until: date | None, now: datetime) -> None:
        """Ignore a subject; replaces what is active for it."""
        at = now.astimezone(UTC).isoformat()
        row = {
            "subject": subject,
            "reason": reason,
            "ignored_by": by,
            "until": until.isoformat() if until else None,
            "since": at,
        }
        open_ones = (table.c.subject == subject) & table.c.ended_at.is_(None)
        with self._state.writing() as connection:
            connection.execute(update(table).where(open_ones).values(ended_at=at, ended_by=by))
            connection.execute(insert(table).values(row))

    def end(self, number: int, by: str, now: datetime) -> IgnoredEntry | None:
        """End one of them and return it; None if it has ended already, or never was."""
        this = (table.c.number == number) & table.c.ended_at.is_(None)
        with self._state.writing() as connection:
            row = connection.execute(select(table).where(this)).first()
            connection.execute(
                update(table).where(this).values(ended_at=now.astimezone(UTC).isoformat(), ended_by=by)
            )
        return _entry(row) if row is not None else None


def _entry(row: Row[Any]) -> IgnoredEntry:
    try:
        return IgnoredEntry(
            row.number,
            row.subject,
            row.reason,
            row.ignored_by,
            date.fromisoformat(row.until) if row.until else None,
            datetime.fromisoformat(row.since),
            datetime.fromisoformat(row.ended_at) if row.ended_at else None,
        )
    except ValueError as error:
        raise StateError(f"the state has an ignored subject that cannot be read: {error}") from None
