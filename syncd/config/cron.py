"""Crontab expressions, with the meaning that cron gives them (cronsim, which follows Debian's cron).

Sunday is 0 and 7. If day of month and day of week are both restricted, a day fits by either. APScheduler
counts weekdays from Monday and asks for both, so its own trigger is not used.
"""

from __future__ import annotations

from datetime import datetime
from itertools import islice

from cronsim import CronSim, CronSimError

_NAMED = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
"""As in crontab(5)."""
_FIELDS = 5


def next_times(expression: str, after: datetime, count: int) -> list[datetime]:
    """Return the next times; raises ValueError, also if the expression has no time at all (30 February)."""
    fields = _NAMED.get(expression.strip().lower(), expression).split()
    if len(fields) != _FIELDS:
        raise ValueError("must be five crontab fields, such as '*/10 * * * *', or a name such as @daily")
    try:
        found = list(islice(CronSim(" ".join(fields), after), count))
    except CronSimError as error:
        fault = str(error)
        raise ValueError(
            f"must be five crontab fields, such as '*/10 * * * *': {fault[:1].lower()}{fault[1:]}"
        ) from None
    if not found:
        raise ValueError("names no date that ever comes")
    return found
