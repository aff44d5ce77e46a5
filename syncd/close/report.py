"""The report of a month: its content, objections to closing the month, its digest; what arrived later. Pure.

The content depends on what was read and on nothing else: no time at which it was made, no version. Equal
input gives an equal report, to the byte.

Late usage is what a closed month's meters count now, and did not when it was closed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from syncd.metering.usage import whole

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


FORMAT = 1
"""Version of the content's shape."""


class Kind(StrEnum):
    """The kinds of objections to closing a month."""

    NOT_ENDED = "not-ended"
    NO_GATEWAYS = "no-gateways"
    GATEWAY = "gateway"
    """A gateway cannot be read."""
    OPEN_HOURS = "open-hours"
    CHANGED = "changed"
    """The metering API contradicts itself, or counted more while it was read."""
    PRUNED = "pruned"
    NOT_COMPARED = "not-compared"
    MISSING = "missing"
    REFUSED = "refused"
    LOST = "lost"
    SURPLUS = "surplus"
    DEAD_LETTERS = "dead-letters"
    QUARANTINE = "quarantine"
    REQUESTS_LOST = "requests-lost"
    UNBILLED = "unbilled"
    LATE = "late"
    """Events have arrived for an earlier closed month."""


NEVER_ACCEPTED = frozenset({Kind.NOT_ENDED, Kind.GATEWAY, Kind.CHANGED})
"""What nobody can decide to accept: with these the figures themselves are unknown or may still change."""

CURES: Mapping[Kind, str] = {
    Kind.NOT_ENDED: "Try again an hour after the end of the month, in UTC.",
    Kind.NO_GATEWAYS: "List all gateways under `gateways`: without their ledgers nothing shows whether the"
    " meters have every event.",
    Kind.GATEWAY: "Make its plugin's API reachable (`syncd doctor`). If the gateway is gone, run"
    " `openmeter-plugin deliver --api` on its spool, and list that.",
    Kind.OPEN_HOURS: "Wait until the gateways have delivered all events of the month (`openmeter-plugin spool"
    " status`), then try again.",
    Kind.CHANGED: "Try again. If it stays, look for a cache, proxy or replica between syncd and the metering"
    " API.",
    Kind.PRUNED: "Close months before the ledger is pruned (`--ledger-days`). If the month was audited in"
    " time, accept it.",
    Kind.NOT_COMPARED: "`syncd meters apply` creates meters that count all events that are billed. Accept it"
    " if these are not billed.",
    Kind.MISSING: "`syncd audit --from ... --to ... --redeliver --wait` asks the gateways to redeliver them.",
    Kind.REFUSED: "They are no dead letters any more, so nothing can replay them. Bill them by hand, or"
    " accept that they are not billed.",
    Kind.LOST: "`openmeter-plugin spool status` there shows why; a segment that was set aside can come"
    " back. Bill them by hand, or accept that they are not billed.",
    Kind.SURPLUS: "Look for an event that was counted twice (`syncd doctor --probe`), a gateway that is not"
    " listed, or another sender. Accept it if these events are wanted.",
    Kind.DEAD_LETTERS: "See the metering API's answers, fix the cause, and replay them (`openmeter-plugin"
    " spool replay`).",
    Kind.QUARANTINE: "Replay them (`openmeter-plugin spool replay --quarantine`), or accept that they are not"
    " billed.",
    Kind.REQUESTS_LOST: "Nothing says whose they were, nor of which month. Look for the cause"
    ' (docs/runbook.md, "Usage is lost"), then accept that they are not billed.',
    Kind.UNBILLED: "Give each subject a customer (`syncd plan`, the dashboard's page of unbilled usage), or"
    " ignore it, with a reason.",
    Kind.LATE: "Bill or credit them, then close that month again: `syncd close MONTH --again`.",
}


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A decision to close despite objections of a kind."""

    reason: str
    by: str

    def to_json(self) -> dict[str, str]:
        """Return it as a part of the content."""
        return {"reason": self.reason, "by": self.by}


@dataclass(frozen=True, slots=True)
class Objection:
    """A reason not to close a month."""

    kind: Kind
    text: str
    accepted: Acceptance | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as a part of the content."""
        return {
            "kind": str(self.kind),
            "text": self.text,
            "cure": CURES[self.kind],
            "accepted": self.accepted.to_json() if self.accepted else None,
        }


Content = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """The report of a month; `content` is what JSON can hold."""

    content: Content = field(repr=False)

    @property
    def month(self) -> Month:
        """Return the month."""
        return Month.parse(self.content["month"])

    @property
    def closed(self) -> bool:
        """Return whether every objection to closing the month was accepted."""
        return self.content["closed"] is True

    @property
    def against(self) -> Sequence[Content]:
        """Return the objections, the accepted ones too."""
        found: Sequence[Content] = self.content["against"]
        return found

    @property
    def sha256(self) -> str:
        """Return the digest of the content."""
        return hashlib.sha256(canonical(self.content)).hexdigest()


def make(month: Month, figures: Mapping[str, object], objections: Sequence[Objection]) -> Report:
    """Return the report of these figures."""
    content = {
        "format": FORMAT,
        "month": str(month),
        **figures,
        "against": [one.to_json() for one in objections],
        "closed": all(one.accepted for one in objections),
    }
    # As it comes back from the state store, so that a kept report and a new one are compared alike.
    return Report(json.loads(canonical(content)))


def accepting(
    objections: Sequence[Objection], kinds: Collection[Kind], decision: Acceptance
) -> tuple[Objection, ...]:
    """Return the objections with those of these kinds accepted, except what nobody can accept."""
    accepted = frozenset(kinds) - NEVER_ACCEPTED
    return tuple(replace(one, accepted=decision) if one.kind in accepted else one for one in objections)


def canonical(content: Content) -> bytes:
    """Return the bytes that the digest covers: JSON in UTF-8, keys sorted, without spaces.

    ``jq -cjS .report`` prints the same for what a report holds.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # As jq writes DEL.
    return text.replace("\x7f", "\\u007f").encode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class LateUsage:
    """Usage of one subject that differs from the closed report; negative if the meters count less now.

    `customer` is the one that the report names, None if the report has the subject as unbilled or not at all.
    """

    subject: str
    customer: str | None
    requests: int | float
    tokens: int | float

    def to_json(self) -> dict[str, object]:
        """Return it as a part of a report or of the state."""
        return {
            "subject": self.subject,
            "customer": self.customer,
            "requests": self.requests,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LateUsage:
        """Return it from `to_json`."""
        return cls(document["subject"], document["customer"], document["requests"], document["tokens"])


def late_usage(
    closed: Content, requests: Mapping[str, float], tokens: Mapping[str, float]
) -> tuple[LateUsage, ...]:
    """Return the subjects whose usage differs from that of a closed report, sorted by subject."""
    kept = {line.key: line for line in subject_lines(closed)}
    found = []
    for subject in sorted(kept.keys() | requests.keys() | tokens.keys()):
        before = kept.get(subject, Line(subject, None, 0, 0))
        more = _difference(requests.get(subject, 0), before.requests)
        more_tokens = _difference(tokens.get(subject, 0), before.tokens)
        if more or more_tokens:
            found.append(LateUsage(subject, before.customer, whole(more), whole(more_tokens)))
    return tuple(found)


def _difference(now: float, before: float) -> float:
    """Return the difference; none where only the order differs in which a server added up fractions."""
    fractions = not (float(now).is_integer() and float(before).is_integer())
    return 0 if fractions and math.isclose(now, before, rel_tol=1e-9) else now - before


class Line(NamedTuple):
    """Usage of one subject in a report; `customer` is the key of its customer, or the id if it has no key."""

    key: str
    customer: str | None
    requests: float
    tokens: float


def subject_lines(content: Content) -> Iterator[Line]:
    """Yield the usage of each subject of a report."""
    for customer in content["customers"]:
        name = customer["key"] or customer["id"]
        for one in customer["subjects"]:
            yield Line(one["key"], name, one["requests"], one["tokens"])
    for one in (*content["unbilled"], *content["ignored"]):
        yield Line(one["key"], None, one["requests"], one["tokens"])


def late_total(late: Iterable[LateUsage]) -> tuple[int | float, int | float]:
    """Return the requests and tokens by which the meters differ, more and fewer added up without sign.

    5 more and 5 fewer do not cancel out: both are wrong on an invoice.
    """
    several = list(late)
    return sum(abs(one.requests) for one in several), sum(abs(one.tokens) for one in several)
