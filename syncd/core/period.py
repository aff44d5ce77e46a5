"""Times on the command line: RFC 3339, or a day, which begins at midnight UTC.

A period includes its start and excludes its end, so ``--from 2026-11-01 --to 2026-12-01`` is November.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def parse_moment(text: str) -> datetime:
    """Return the moment; raises ValueError, whose text says what is expected."""
    try:
        if _DAY.fullmatch(text):
            return datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("must be a time such as 2026-11-22T07:00:00Z, or a day (UTC)") from None
    if moment.tzinfo is None:
        raise ValueError("needs a time zone, as in 2026-11-22T07:00:00Z")
    return moment


def rfc3339(moment: datetime) -> str:
    """Return the moment as APIs take it: in UTC, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
