"""Models of what a plugin server holds back: dead letters, replays and the quarantine."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from syncd.gateways.models import Count, Model


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
