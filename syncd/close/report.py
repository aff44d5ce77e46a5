"""The report of a month: its content, the objections to closing the month, and the digest. Pure.

The content depends on what was read and on nothing else: no time at which it was made, no version. Equal
input gives an equal report, to the byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from syncd.close.month import Month

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
