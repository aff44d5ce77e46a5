"""What the plugin's API answers, as far as syncd needs it (docs/plugin-operations.md, "The HTTP API").

What is needed is checked strictly; what a newer plugin answers besides is left alone.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic.dataclasses import dataclass

_HOUR = "%Y-%m-%dT%H"


def parse_hour(value: object) -> datetime:
    """Return the hour written as 2026-11-22T07, in UTC; raises ValueError."""
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str):
        raise ValueError("must be an hour such as 2026-11-22T07")  # noqa: TRY004 - pydantic wants ValueError
    return _hour(value)


@lru_cache(maxsize=1024)  # ledgers have many lines of few hours
def _hour(text: str) -> datetime:
    return datetime.strptime(text, _HOUR).replace(tzinfo=UTC)


def hour_text(hour: datetime) -> str:
    """Write an hour as the ledger does: 2026-11-22T07, in UTC."""
    return hour.astimezone(UTC).strftime(_HOUR)


Hour = Annotated[datetime, BeforeValidator(parse_hour), PlainSerializer(hour_text)]
Count = Annotated[int, Field(ge=0, strict=True)]


class Model(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True, strict=True)


class Readiness(Model):
    """Whether the plugin's delivery can do its work, and what keeps it from it."""

    ready: bool
    problems: tuple[str, ...] = Field(default=(), strict=False)


class Books(Model):
    """Counts since the spool was made.

    requests = metered + skipped + quarantined + resent; events = delivered + dead_lettered + waiting.
    """

    requests: Count
    metered: Count
    skipped: dict[str, Count]
    quarantined: Count
    resent: Count
    events: Count
    delivered: Count
    dead_lettered: Count
    waiting: Count
    lost: dict[str, Count]
    redelivered: Count = 0


class NotAccounted(Model):
    """What was written and is not in the books yet."""

    requests: Count
    events: Count


class OldestWaiting(Model):
    """The event that waits longest."""

    time: str
    age_seconds: float


class SpoolPart(Model):
    """The books of one destination, or of all together; `backlog` counts events that wait."""

    books: Books
    not_accounted: NotAccounted
    backlog: Count
    oldest_waiting: OldestWaiting | None
    bytes: Count


class Destination(SpoolPart):
    """One queue of the spool; `endpoint` is None for the quarantine and where nobody has said."""

    id: str
    endpoint: str | None


class Spool(Model):
    """GET /v1/spool."""

    delivery_running: bool
    total: SpoolPart
    destinations: tuple[Destination, ...] = Field(strict=False)
    dead_letters: Count
    """Dead letters that can be replayed."""
    quarantined: Count
    """Requests in the quarantine that can be replayed."""


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """Events of one destination, hour of event time (its beginning, UTC), type and subject.

    Not a model: there may be hundreds of thousands of them, and this takes far less memory.
    """

    destination: str
    hour: Hour
    type: str
    subject: str
    accepted: Count
    delivered: Count
    dead_lettered: Count
    waiting: Count


class LedgerPage(Model):
    """GET /v1/ledger."""

    model_config = ConfigDict(strict=False)  # else lines, which are no models, are refused

    lines: tuple[LedgerLine, ...]
    hours_with_waiting_events: tuple[Hour, ...]
    next: str | None


class Ledger(Model):
    """A span of the ledger, all of its pages."""

    lines: tuple[LedgerLine, ...]
    hours_with_waiting_events: frozenset[datetime]
    """Hours that the metering API does not have completely, of all subjects and destinations."""


class DeadLetter(Model):
    """An event that the metering API will not take; `status` is None where it grew too old instead."""

    id: int
    destination: str
    event_id: str
    type: str
    subject: str
    time: str
    status: int | None
    answer: str
    died_at: str
    to_be_replayed: bool


class DeadLetters(Model):
    """A page of dead letters, oldest first; `next` is what to pass as `after` for the next one."""

    dead_letters: tuple[DeadLetter, ...] = Field(strict=False)
    next: int | None


class Redelivery(Model):
    """Retained events of a span of event time, sent again; `sent` is how many so far."""

    id: int
    since: str
    until: str
    subject: str | None
    state: Literal["waiting", "done"]
    sent: Count
