"""Late events: what a closed month's meters count now, and did not when it was closed. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from syncd.close.report import Content
from syncd.metering.usage import whole


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


def total(late: Iterable[LateUsage]) -> tuple[int | float, int | float]:
    """Return the requests and tokens by which the meters differ, more and fewer added up without sign.

    5 more and 5 fewer do not cancel out: both are wrong on an invoice.
    """
    several = list(late)
    return sum(abs(one.requests) for one in several), sum(abs(one.tokens) for one in several)
