"""Response models of a spool: shared by `spool ... -o json` and the HTTP API, whose schema describes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """Base of the response models."""

    model_config = ConfigDict(frozen=True)


class BooksNumbers(Model):
    """Counts since the spool was created; requests and events each add up.

    requests = metered + skipped + quarantined + resent;
    events = delivered + dead_lettered + waiting + lost_events.
    """

    requests: Annotated[int, Field(description="requests that Kong handed over")]
    metered: Annotated[int, Field(description="requests that became events")]
    skipped: Annotated[dict[str, int], Field(description="requests without an event, by reason")]
    quarantined: Annotated[int, Field(description="requests in quarantine, less those replayed")]
    resent: Annotated[
        int, Field(description="requests that Kong handed over a second time; not billed again")
    ]
    events: Annotated[int, Field(description="events that were accepted for delivery")]
    delivered: Annotated[int, Field(description="events that were delivered to the metering API")]
    dead_lettered: Annotated[
        int,
        Field(description="events that it refused or that grew too old, less those delivered by a replay"),
    ]
    waiting: Annotated[int, Field(description="events in the books that are not delivered yet")]
    lost_events: Annotated[
        dict[str, int],
        Field(description="events whose bytes were damaged or gone before they were delivered, by reason"),
    ]
    lost: Annotated[
        dict[str, int],
        Field(description="requests that could not be written to the spool or a Kong segment, by reason"),
    ]
    ai_usage_gaps: Annotated[
        dict[str, int],
        Field(description="requests whose AI usage Kong estimated or did not log, by reason"),
    ]
    damaged_bytes: Annotated[int, Field(description="bytes of the spool that could not be read")]
    unreadable_segments: Annotated[int, Field(description="segment files that could not be read at all")]
    redelivered: Annotated[int, Field(description="events that were redelivered on request")]
    violations: Annotated[
        int, Field(description="how often an equation of the books stopped holding; 0 unless there is a bug")
    ]


class NotAccounted(Model):
    """Records that are written but not in the books yet; some may turn out to be resent."""

    requests: int
    events: int
    lost: int


class OldestWaiting(Model):
    """The event that has waited longest."""

    time: Annotated[str, Field(description="its CloudEvents time")]
    age_seconds: float


class PrunedLedger(Model):
    """Lines removed from the ledger because they were settled and old; the counts still include them."""

    up_to: Annotated[
        str, Field(description="last hour of which a line was pruned; UTC, such as 2026-11-22T07")
    ]
    lines: int
    events: Annotated[int, Field(description="accepted and delivered")]


class DestinationStatus(Model):
    """One queue of the spool: the events for one endpoint and credential, or the quarantine."""

    id: str
    endpoint: Annotated[
        str | None, Field(description="None for the quarantine, and if the queue has no description")
    ]
    books: BooksNumbers
    not_accounted: NotAccounted
    backlog: Annotated[
        int, Field(description="accepted events that are not delivered yet, in the books or not")
    ]
    oldest_waiting: OldestWaiting | None
    segments: int
    unreadable: Annotated[
        int, Field(description="segments that cannot be read now; their events are not counted here")
    ]
    bytes: Annotated[int, Field(description="size of its segment files, including retained ones")]
    pruned: Annotated[PrunedLedger | None, Field(description="lines pruned from the ledger, if any")]


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
    """The books of a spool, and the state of its files."""

    delivery_running: Annotated[bool, Field(description="whether a delivery process holds the spool's lock")]
    total: SpoolTotal
    destinations: list[DestinationStatus]
    dead_letters: Annotated[int, Field(description="dead letters that can be replayed")]
    quarantined: Annotated[int, Field(description="requests in the quarantine that can be replayed")]


class LedgerLine(Model):
    """Counts of events of one destination, hour of event time, type and subject."""

    destination: str
    hour: Annotated[str, Field(description="UTC, such as 2026-11-22T07")]
    type: str
    subject: str
    accepted: int
    delivered: int
    dead_lettered: int
    lost: Annotated[int, Field(description="their bytes were damaged or gone before they were delivered")]
    waiting: Annotated[int, Field(description="accepted, but neither delivered, dead-lettered nor lost")]


class Ledger(Model):
    """A span of the ledger."""

    lines: list[LedgerLine]
    hours_with_waiting_events: Annotated[
        list[str],
        Field(description="hours of the span with events, of any subject, that are not delivered yet"),
    ]
    pruned_up_to: Annotated[
        str | None,
        Field(description="settled lines up to this hour may have been pruned; None: none was"),
    ]
    next: Annotated[str | None, Field(description="`after` of the next page; None on the last")]


class DeadLetterEntry(Model):
    """An event that the metering API refused, or that grew too old."""

    id: int
    destination: str
    event_id: str
    type: str
    subject: str
    time: str
    status: Annotated[int | None, Field(description="HTTP status; None if the event grew too old")]
    answer: Annotated[str, Field(description="the metering API's answer")]
    title: Annotated[str, Field(description="of the answer; empty if it is no problem document")]
    detail: Annotated[str, Field(description="of the answer, or all of it")]
    group: Annotated[str, Field(description="the id of the group of dead letters with such an answer")]
    died_at: Annotated[str, Field(description="when it became a dead letter, RFC 3339")]
    to_be_replayed: bool


class DeadLetter(DeadLetterEntry):
    """A dead letter with its event."""

    event: Annotated[dict[str, Any], Field(description="the whole CloudEvent")]


class DeadLetters(Model):
    """A page of dead letters, oldest first."""

    dead_letters: list[DeadLetterEntry]
    next: Annotated[int | None, Field(description="`after` of the next page; None on the last")]


class DeadLetterGroup(Model):
    """Dead letters of one destination with answers of one status, title and detail, whatever the numbers."""

    id: str
    destination: str
    status: Annotated[int | None, Field(description="HTTP status; None if the events grew too old")]
    title: Annotated[str, Field(description="of the newest answer; empty if it is no problem document")]
    detail: Annotated[str, Field(description="of the newest answer")]
    dead_letters: int
    to_be_replayed: Annotated[int, Field(description="how many of them wait for a replay")]
    first_died_at: str
    last_died_at: str
    newest_id: Annotated[int, Field(description="id of its newest dead letter")]


class DeadLetterGroups(Model):
    """All dead letters by their answer, the largest groups first."""

    groups: list[DeadLetterGroup]
    further_groups: Annotated[int, Field(description="groups that are left out, after the largest 200")]
    dead_letters: int
    to_be_replayed: int
    newest_id: Annotated[int, Field(description="id of the newest dead letter; 0 if there is none")]


class ReplayStatus(Model):
    """A replay: dead letters that were marked together, and what became of them."""

    id: Annotated[int | None, Field(description="None if there was nothing to mark")]
    marked: int
    delivered: int
    refused: Annotated[int, Field(description="refused again; they are dead letters with the new answer")]
    waiting: Annotated[int, Field(description="not sent yet, or sent and not answered yet")]
    asked_at: str


class Replays(Model):
    """The latest replays, latest first."""

    replays: list[ReplayStatus]


class QuarantineGroup(Model):
    """Requests in quarantine with one reason."""

    reason: Annotated[str, Field(description="a skip reason, or what is wrong with the configuration")]
    requests: int
    first_at: Annotated[str, Field(description="when the first of them was counted, RFC 3339")]
    last_at: str


class QuarantineGroups(Model):
    """The quarantine by reason, the largest groups first."""

    groups: list[QuarantineGroup]
    further_groups: Annotated[int, Field(description="groups that are left out, after the largest 200")]
    requests: int


class QuarantineEntry(Model):
    """A request in quarantine: ids, names and figures, without headers and query arguments."""

    id: int
    reason: str
    at: str
    destination: Annotated[
        str | None, Field(description="where its events would go; None if the configuration is invalid")
    ]
    log: dict[str, Any]
    application: dict[str, Any] | None
    attributes: dict[str, Any]


class Quarantine(Model):
    """A page of the quarantine, oldest first."""

    requests: list[QuarantineEntry]
    next: Annotated[int | None, Field(description="`after` of the next page; None on the last")]


class RedeliveryStatus(Model):
    """A redelivery of retained events of a span of event time."""

    id: int
    since: str
    until: str
    subject: str | None
    state: Annotated[str, Field(description="waiting or done")]
    sent: Annotated[int, Field(description="events redelivered so far")]
    asked_at: str


class Verification(Model):
    """Whether the books are consistent and agree with the segments."""

    ok: bool
    differences: list[str]
    segments: int
    records: int
    events: Annotated[int, Field(description="in the segments, including retained ones")]
    waiting: int
    not_accounted: NotAccounted
    bytes: int
    damaged_bytes: Annotated[int, Field(description="in the segments that still exist")]
    ledger_lines: int
    pruned_events: Annotated[int, Field(description="in lines that were pruned from the ledger")]
