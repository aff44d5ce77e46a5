"""Models of the plugin's answers, as far as syncd uses them (docs/plugin-operations.md, "The HTTP API").

Known fields are checked strictly; additional fields of a newer plugin are ignored.
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


@lru_cache(maxsize=1024)  # a ledger has many lines for few hours
def _hour(text: str) -> datetime:
    return datetime.strptime(text, _HOUR).replace(tzinfo=UTC)


def hour_text(hour: datetime) -> str:
    """Write an hour as the ledger does: 2026-11-22T07, in UTC."""
    return hour.astimezone(UTC).strftime(_HOUR)


Hour = Annotated[datetime, BeforeValidator(parse_hour), PlainSerializer(hour_text)]
Count = Annotated[int, Field(ge=0, strict=True)]


class Model(BaseModel):
    """Base class of an answer."""

    model_config = ConfigDict(frozen=True, strict=True)


class Readiness(Model):
    """GET /readyz: whether the delivery process works, else its problems."""

    ready: bool
    problems: tuple[str, ...] = Field(default=(), strict=False)


class Books(Model):
    """Counts since the spool was created.

    requests = metered + skipped + quarantined + resent;
    events = delivered + dead_lettered + waiting + lost_events.
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
    """Requests that could not be written, by reason."""
    lost_events: dict[str, Count] = Field(default_factory=dict)
    """Events whose bytes were damaged or gone before they were delivered, by reason."""
    redelivered: Count = 0
    ai_usage_gaps: dict[str, Count] = Field(default_factory=dict)
    """Requests whose AI usage Kong estimated or did not log, by reason."""


class NotAccounted(Model):
    """Records in the spool that are not in the books yet."""

    requests: Count
    events: Count


class OldestWaiting(Model):
    """The event that has waited longest."""

    time: str
    age_seconds: float


class SpoolPart(Model):
    """The books of one destination or of all; `backlog` is the number of waiting events."""

    books: Books
    not_accounted: NotAccounted
    backlog: Count
    oldest_waiting: OldestWaiting | None
    bytes: Count


class Destination(SpoolPart):
    """One queue of the spool; `endpoint` is None for the quarantine and where it is not known yet."""

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
    """Events of one destination, hour of event time (its start, UTC), type and subject.

    A dataclass, not a model: there may be hundreds of thousands, and it takes far less memory.
    """

    destination: str
    hour: Hour
    type: str
    subject: str
    accepted: Count
    delivered: Count
    dead_lettered: Count
    waiting: Count
    lost: Count = 0
    """Their bytes were damaged or gone before they were delivered."""


class LedgerPage(Model):
    """GET /v1/ledger."""

    model_config = ConfigDict(strict=False)  # strict mode refuses lines, which are no models

    lines: tuple[LedgerLine, ...]
    hours_with_waiting_events: tuple[Hour, ...]
    pruned_up_to: Hour | None = None
    next: str | None


class Ledger(Model):
    """All pages of a span of the ledger."""

    lines: tuple[LedgerLine, ...]
    hours_with_waiting_events: frozenset[datetime]
    """Hours that are not complete in the metering API, for any subject or destination."""
    pruned_up_to: datetime | None = None
    """The last hour of which settled lines may have been deleted; None if none was."""


class Redelivery(Model):
    """Redelivery of the retained events of a span of event time; `sent` is their number so far."""

    id: int
    since: str
    until: str
    subject: str | None
    state: Literal["waiting", "done"]
    sent: Count
