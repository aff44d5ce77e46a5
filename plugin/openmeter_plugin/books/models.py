"""What is told about a spool: the same to `spool ... --json` and to the HTTP API, which describes it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True)


class BooksNumbers(Model):
    """Counts since the spool was made; requests and events each add up.

    requests = metered + skipped + quarantined + resent;
    events = delivered + dead_lettered + waiting.
    """

    requests: Annotated[int, Field(description="requests that Kong handed over")]
    metered: Annotated[int, Field(description="requests that became events")]
    skipped: Annotated[dict[str, int], Field(description="requests without an event, by reason")]
    quarantined: Annotated[int, Field(description="requests that were set aside, less those replayed")]
    resent: Annotated[int, Field(description="requests that Kong handed over a second time: not sent again")]
    events: Annotated[int, Field(description="events that were accepted for delivery")]
    delivered: Annotated[int, Field(description="events that the metering API has taken")]
    dead_lettered: Annotated[
        int, Field(description="events that it refused or that grew too old, less those replayed")
    ]
    waiting: Annotated[int, Field(description="events that are accounted for and not delivered yet")]
    lost: Annotated[dict[str, int], Field(description="requests that could not be written, by reason")]
    damaged_bytes: Annotated[int, Field(description="bytes of the spool that could not be read")]
    unreadable_segments: Annotated[int, Field(description="segment files that could not be read at all")]
    redelivered: Annotated[int, Field(description="events that were sent again because somebody asked")]


class NotAccounted(Model):
    """What was written and is not in the books yet; some of it may turn out to be resent."""

    requests: int
    events: int
    lost: int


class OldestWaiting(Model):
    """The event that waits longest."""

    time: Annotated[str, Field(description="its CloudEvents time")]
    age_seconds: float


class PrunedLedger(Model):
    """What is no longer in the ledger, since its lines were settled and old; the counts still have it."""

    up_to: Annotated[str, Field(description="no line of a later hour was pruned; UTC, as 2026-11-22T07")]
    lines: int
    events: Annotated[int, Field(description="accepted and delivered")]


class DestinationStatus(Model):
    """One queue of the spool: the events for one endpoint and credential, or the quarantine."""

    id: str
    endpoint: Annotated[str | None, Field(description="None for the quarantine, and where nobody has said")]
    books: BooksNumbers
    not_accounted: NotAccounted
    backlog: Annotated[int, Field(description="events that wait: accounted for or not")]
    oldest_waiting: OldestWaiting | None
    segments: int
    unreadable: Annotated[int, Field(description="segments that cannot be read now: not told of")]
    bytes: Annotated[int, Field(description="of its segment files, delivered ones that are retained too")]
    pruned: Annotated[PrunedLedger | None, Field(description="from the ledger; None where nothing was")]


class SpoolTotal(Model):
    """All destinations together."""

    books: BooksNumbers
    not_accounted: NotAccounted
    backlog: int
    oldest_waiting: OldestWaiting | None
    segments: int
    unreadable: int
    bytes: int
    pruned: PrunedLedger | None


class SpoolStatus(Model):
    """The books of a spool, and what the disk says beside them."""

    delivery_running: Annotated[bool, Field(description="whether a delivery holds the spool's lock")]
    total: SpoolTotal
    destinations: list[DestinationStatus]
    dead_letters: Annotated[int, Field(description="dead letters that can be replayed")]
    quarantined: Annotated[int, Field(description="requests in the quarantine that can be replayed")]


class LedgerLine(Model):
    """Events of one destination, hour of event time, type and subject."""

    destination: str
    hour: Annotated[str, Field(description="UTC, as 2026-11-22T07")]
    type: str
    subject: str
    accepted: int
    delivered: int
    dead_lettered: int
    waiting: Annotated[int, Field(description="accepted, neither delivered nor dead-lettered")]


class Ledger(Model):
    """A span of the ledger."""

    lines: list[LedgerLine]
    hours_with_waiting_events: Annotated[
        list[str],
        Field(description="hours of the span that the metering API does not have completely, all subjects"),
    ]
    pruned_up_to: Annotated[
        str | None,
        Field(description="of this hour and those before, settled lines may be gone; None: all are there"),
    ]
    next: Annotated[str | None, Field(description="`after` of the next page; None on the last")]


class DeadLetterEntry(Model):
    """An event that the metering API will not take."""

    id: int
    destination: str
    event_id: str
    type: str
    subject: str
    time: str
    status: Annotated[int | None, Field(description="HTTP status; None where it grew too old instead")]
    answer: Annotated[str, Field(description="what the metering API said")]
    died_at: Annotated[str, Field(description="when, RFC 3339")]
    to_be_replayed: bool


class DeadLetters(Model):
    """A page of dead letters, oldest first."""

    dead_letters: list[DeadLetterEntry]
    next: Annotated[int | None, Field(description="`after` of the next page; None on the last")]


class RedeliveryStatus(Model):
    """Retained events of a span of event time, sent again."""

    id: int
    since: str
    until: str
    subject: str | None
    state: Annotated[str, Field(description="waiting or done")]
    sent: Annotated[int, Field(description="events sent again so far")]
    asked_at: str


class Verification(Model):
    """Whether the books agree with each other and with the segments."""

    ok: bool
    differences: list[str]
    segments: int
    records: int
    events: Annotated[int, Field(description="in the segments, delivered ones that are retained too")]
    waiting: int
    not_accounted: NotAccounted
    bytes: int
    damaged_bytes: Annotated[int, Field(description="in the segments that are still there")]
    ledger_lines: int
    pruned_events: Annotated[int, Field(description="in lines that were pruned from the ledger")]
