"""Closed months in the state: each report as it was, and what has arrived since.

A report is never changed: closing a month again adds a revision, and the older ones stay.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select, update

from syncd.close.report import LateUsage, Month, Report, canonical, late_total
from syncd.core.errors import StateError
from syncd.state.database import State, upserting
from syncd.state.tables import closed_months as table


@dataclass(frozen=True, slots=True)
class ClosedMonth:
    """A closed month; `late` is what has arrived for it according to the latest check."""

    month: Month
    revision: int
    sha256: str
    closed_at: datetime
    by: str | None
    checked_at: datetime | None = None
    late: tuple[LateUsage, ...] = ()

    @property
    def late_requests(self) -> int | float:
        """Return the requests by which the meters differ from the report."""
        return late_total(self.late)[0]

    @property
    def late_tokens(self) -> int | float:
        """Return the tokens by which the meters differ from the report."""
        return late_total(self.late)[1]

    def to_json(self) -> dict[str, object]:
        """Return it as ``syncd close --output json`` prints it."""
        return {
            "month": str(self.month),
            "revision": self.revision,
            "sha256": self.sha256,
            "closed_at": self.closed_at.isoformat(),
            "by": self.by,
            "checked_at": self.checked_at.isoformat() if self.checked_at else None,
            "late": [one.to_json() for one in self.late],
        }


_FACTS = (
    table.c.month,
    table.c.revision,
    table.c.sha256,
    table.c.closed_at,
    table.c.closed_by,
    table.c.checked_at,
    table.c.late,
)


class ClosedMonths:
    """The closed months of one state; all methods raise StateError."""

    def __init__(self, state: State) -> None:
        self._state = state

    def all(self) -> list[ClosedMonth]:
        """Return the latest revision of each closed month, the newest month first."""
        newest = select(table.c.month, func.max(table.c.revision).label("revision")).group_by(table.c.month)
        latest = newest.subquery()
        query = (
            select(*_FACTS)
            .join(latest, (latest.c.month == table.c.month) & (latest.c.revision == table.c.revision))
            .order_by(table.c.month.desc())
        )
        with self._state.reading() as connection:
            return [_closed(row) for row in connection.execute(query)]

    def report(self, kept: ClosedMonth) -> Report:
        """Return the report of a closed month as it was kept; raises StateError if it is damaged."""
        same = (table.c.month == str(kept.month)) & (table.c.revision == kept.revision)
        with self._state.reading() as connection:
            document = connection.execute(select(table.c.document).where(same)).scalar()
        report = _report(document)
        if report is None or report.sha256 != kept.sha256:
            raise StateError(
                f"the report of {kept.month} in the state does not have its SHA-256 {kept.sha256}: it was"
                " damaged or changed by hand. Restore the state from a backup, or close the month again"
                f" (syncd close {kept.month} --again)"
            )
        return report

    def keep(self, report: Report, after: int, now: datetime, by: str | None) -> ClosedMonth:
        """Keep a report as the revision after `after` (0: the first); raises StateError if there is one.

        Of two processes that close the same month at once, one keeps its report.
        """
        at = now.astimezone(UTC)
        kept = ClosedMonth(report.month, after + 1, report.sha256, at, by, checked_at=at)
        row = {
            "month": str(kept.month),
            "revision": kept.revision,
            "sha256": kept.sha256,
            "closed_at": at.isoformat(),
            "closed_by": by,
            "checked_at": at.isoformat(),
            "late": "[]",
            "document": zlib.compress(canonical(report.content)),
        }
        with self._state.writing() as connection:
            statement = upserting(connection, table).values(row).on_conflict_do_nothing()
            added = connection.execute(statement).rowcount
        if not added:
            raise StateError(
                f"another syncd has closed {report.month} in the meantime; run this again to compare"
            )
        return kept

    def note_late(self, kept: ClosedMonth, late: Sequence[LateUsage], now: datetime) -> None:
        """Keep what has arrived for this revision of a month until now."""
        values = {
            "late": json.dumps([one.to_json() for one in late]),
            "checked_at": now.astimezone(UTC).isoformat(),
        }
        same = (table.c.month == str(kept.month)) & (table.c.revision == kept.revision)
        with self._state.writing() as connection:
            connection.execute(update(table).where(same).values(values))


def _closed(row: Any) -> ClosedMonth:
    return ClosedMonth(
        Month.parse(row.month),
        row.revision,
        row.sha256,
        datetime.fromisoformat(row.closed_at),
        row.closed_by,
        datetime.fromisoformat(row.checked_at) if row.checked_at else None,
        tuple(LateUsage.from_json(one) for one in json.loads(row.late)),
    )


def _report(document: bytes | None) -> Report | None:
    try:
        return Report(json.loads(zlib.decompress(document or b"")))
    except (ValueError, zlib.error):
        return None
