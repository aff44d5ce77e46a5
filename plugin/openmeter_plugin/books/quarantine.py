"""Queries of the quarantine: its requests by reason, and in pages. `replay` takes requests out of it.

A record has been redacted before it was written: it holds ids, names and figures, no header and no query
argument (`metering.quarantine`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.models import Quarantine, QuarantineEntry, QuarantineGroup, QuarantineGroups
from openmeter_plugin.books.read_models import reading, timestamp

MAX_GROUPS: Final = 200


def read_groups(spool: Path, *, limit: int = MAX_GROUPS) -> QuarantineGroups:
    """Return the requests in quarantine by reason, the largest groups first; raises SpoolError."""
    with reading(spool) as db:
        rows = db.execute(
            "SELECT reason, count(*) AS number, min(at), max(at) FROM quarantine"
            " GROUP BY reason ORDER BY number DESC, reason"
        ).fetchall()
    return QuarantineGroups(
        groups=[
            QuarantineGroup(
                reason=reason, requests=number, first_at=timestamp(first), last_at=timestamp(last)
            )
            for reason, number, first, last in rows[:limit]
        ],
        further_groups=max(0, len(rows) - limit),
        requests=sum(number for _, number, *_ in rows),
    )


def read_quarantine(
    spool: Path, *, after: int = 0, limit: int = 100, reason: str | None = None
) -> Quarantine:
    """Return a page of the quarantine after an id, of all or of one reason; raises SpoolError."""
    with reading(spool) as db:
        rows = db.execute(
            "SELECT id, reason, record, at FROM quarantine WHERE id > ? AND (? IS NULL OR reason = ?)"
            " ORDER BY id LIMIT ?",
            (after, reason, reason, limit + 1),
        ).fetchall()
    entries = [_entry(*row) for row in rows[:limit]]
    return Quarantine(requests=entries, next=entries[-1].id if len(rows) > limit else None)


def _entry(number: int, reason: str, raw: bytes, at: float) -> QuarantineEntry:
    record: dict[str, Any] = orjson.loads(raw)
    return QuarantineEntry(
        id=number,
        reason=reason,
        at=timestamp(at),
        destination=record.get("destination"),
        log=record.get("log") or {},
        application=record.get("application"),
        attributes=record.get("attributes") or {},
    )
