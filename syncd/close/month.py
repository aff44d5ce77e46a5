"""A month, in UTC. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

_MONTH = re.compile(r"(\d{4})-(0[1-9]|1[0-2])")
QUIET = timedelta(hours=1)
"""How long after its end a month can be closed at the earliest: requests that began in it still end, and
metering APIs count an event some seconds or minutes after they accept it."""


@dataclass(frozen=True, slots=True, order=True)
class Month:
    """A month; its days are those of UTC."""

    year: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Month:
        """Return the month written as ``2026-10``; raises ValueError."""
        found = _MONTH.fullmatch(text) if text.isascii() else None
        if found is None or found[1] == "0000" or text == "9999-12":
            raise ValueError("must be a month, such as 2026-10")
        return cls(int(found[1]), int(found[2]))

    @property
    def since(self) -> datetime:
        """Return its start."""
        return datetime(self.year, self.number, 1, tzinfo=UTC)

    @property
    def until(self) -> datetime:
        """Return its end, which is the start of the next month."""
        return (self.since + timedelta(days=31)).replace(day=1)

    def __str__(self) -> str:
        """Return it as ``2026-10``."""
        return f"{self.year:04}-{self.number:02}"
