"""Models of the plugin's answers, as far as syncd uses them (docs/plugin-operations.md, "The HTTP API").

In this order: status, books and ledger; what a plugin server holds back (dead letters, replays, the
quarantine); whom the gate of a gateway stops (docs/gate.md).

Known fields are checked strictly; additional fields of a newer plugin are ignored.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, RootModel
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


class DeadLetter(Model):
    """An event that the metering API refused; `status` is None if it grew too old instead."""

    id: int
    destination: str
    event_id: str
    type: str
    subject: str
    time: str
    status: int | None
    answer: str
    title: str
    detail: str
    group: str
    died_at: str
    to_be_replayed: bool


class WholeDeadLetter(DeadLetter):
    """GET /v1/dead-letters/{id}: a dead letter with its event."""

    event: dict[str, Any]


class DeadLetters(Model):
    """GET /v1/dead-letters: a page, oldest first; `next` is what to pass as `after` for the next one."""

    dead_letters: tuple[DeadLetter, ...] = Field(strict=False)
    next: int | None


class DeadLetterGroup(Model):
    """Dead letters with answers that mean the same; title and detail are those of the newest answer."""

    id: str
    destination: str
    status: int | None
    title: str
    detail: str
    dead_letters: Count
    to_be_replayed: Count
    first_died_at: str
    last_died_at: str
    newest_id: int

    @property
    def to_replay(self) -> int:
        """Return how many a replay would mark."""
        return self.dead_letters - self.to_be_replayed


class DeadLetterGroups(Model):
    """GET /v1/dead-letters/groups, the largest groups first."""

    groups: tuple[DeadLetterGroup, ...] = Field(strict=False)
    further_groups: Count
    dead_letters: Count
    to_be_replayed: Count
    newest_id: int


class Replay(Model):
    """A replay and what became of its dead letters; without an id there was nothing to mark."""

    id: int | None
    marked: Count
    delivered: Count
    refused: Count
    waiting: Count
    asked_at: str


class Replays(Model):
    """GET /v1/replays, latest first."""

    replays: tuple[Replay, ...] = Field(strict=False)


class QuarantineGroup(Model):
    """Requests in quarantine for one reason."""

    reason: str
    requests: Count
    first_at: str
    last_at: str


class QuarantineGroups(Model):
    """GET /v1/quarantine/groups, the largest groups first."""

    groups: tuple[QuarantineGroup, ...] = Field(strict=False)
    further_groups: Count
    requests: Count


class QuarantinedRequest(Model):
    """A request in quarantine, without headers and query arguments."""

    id: int
    reason: str
    at: str
    destination: str | None
    log: dict[str, Any]
    application: dict[str, Any] | None
    attributes: dict[str, Any]


class Quarantine(Model):
    """GET /v1/quarantine: a page, oldest first."""

    requests: tuple[QuarantinedRequest, ...] = Field(strict=False)
    next: int | None


class GateKong(Model):
    """A Kong that asks for the gate's feed; `heard` is when it last did, in seconds before now."""

    id: str
    lua: str = ""
    """Version of its Lua half; empty if it did not say."""
    heard: float
    passed: Count = 0
    errors: Count = 0
    """Faults in its Lua half, each of which let a request pass."""
    no_memory: Count = 0


class GateFigures(Model):
    """Figures of the gate."""

    model_config = ConfigDict(strict=False)  # strict mode takes no list for a tuple within a tuple

    calls: tuple[tuple[str, str, Count], ...]
    """Calls to the metering API: their kind, the status of the answer, how many since the start."""
    state_age: float
    """Age of the oldest reading of an active subject, in seconds."""
    answer_age: float | None
    """When the metering API last answered, in seconds before now; None if it has not yet."""
    kongs: tuple[GateKong, ...]


class GateKey(Model):
    """A feature of a customer that is stopped (`reason`), or close to its end."""

    account: str
    subjects: tuple[str, ...] = Field(strict=False)
    feature: str
    reason: str | None
    left: float | None
    quota: float | None
    reset: float


class GateStopped(Model):
    """Requests of a subject that were stopped, or would have been (`mode` shadow)."""

    subject: str
    feature: str
    reason: str
    mode: str
    count: Count
    last_at: float


class GateOverride(Model):
    """A subject that is allowed everything until a time."""

    subject: str
    until: float
    why: str
    by: str

    @property
    def ends(self) -> datetime:
        """When it ends."""
        return datetime.fromtimestamp(self.until, UTC)


class Gate(Model):
    """GET /v1/gate; lists are cut after 200 entries, `denied_counts` are of all."""

    model_config = ConfigDict(strict=False)

    version: str
    mode: Literal["off", "shadow", "enforce"]
    features: tuple[str, ...]
    subjects: Count
    denied: tuple[GateKey, ...]
    denied_counts: tuple[tuple[str, str, Count], ...]
    """Feature, reason, and how many customers."""
    close: tuple[GateKey, ...]
    stopped: tuple[GateStopped, ...]
    overrides: tuple[GateOverride, ...]
    figures: GateFigures
    last_error: str


class NoGate(Model):
    """The answer of a plugin server without a gate."""

    detail: str


class MaybeGate(RootModel[Gate | NoGate]):
    """The gate, or the answer that there is none."""


class GateChanged(RootModel[Any]):
    """The answer to a change of an override, of which nothing is read."""
