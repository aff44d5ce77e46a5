"""What became of each change of a plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from syncd.changes import Change


class Status(StrEnum):
    """What became of one change."""

    DONE = "done"
    UNCHANGED = "unchanged"
    """It was so already when we came to write it."""
    BLOCKED = "blocked"
    SKIPPED = "skipped"
    """It depends on a change that was blocked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A change, what became of it, and (unless done) why."""

    change: Change
    status: Status
    detail: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the outcome as it stands in ``syncd apply --json``."""
        return {"status": str(self.status), "detail": self.detail, "change": self.change.to_json()}


def count(outcomes: tuple[Outcome, ...]) -> dict[str, int]:
    """Return the number of outcomes of each status, zero included."""
    counts = Counter(outcome.status for outcome in outcomes)
    return {str(status): counts[status] for status in Status}
