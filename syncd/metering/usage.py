"""Usage as the metering API counts it: by customer, by subject, and unbilled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from syncd.core.model import ObservedCustomer, ObservedState
from syncd.metering.base import MeteringTarget

REQUESTS_METER = "kong_api_requests"
"""COUNT of events of type kong.api_request."""
TOKENS_METER = "kong_llm_tokens"
"""SUM of $.tokens of events of type kong.llm_request."""
EVENTS_METER = "kong_llm_events"
"""COUNT of events of type kong.llm_request: one for the input, one for the output of a model call. Only for
`syncd audit`; it must not have a price."""


@dataclass(frozen=True, slots=True)
class SubjectUsage:
    """Usage of one subject."""

    key: str
    requests: float
    tokens: float
    name: str | None = None
    """The display name of its subject entity, on servers that have them."""

    def to_json(self) -> dict[str, object]:
        """Return the usage as in ``syncd usage --output json``."""
        return {
            "key": self.key,
            "name": self.name,
            "requests": whole(self.requests),
            "tokens": whole(self.tokens),
        }


@dataclass(frozen=True, slots=True)
class CustomerUsage:
    """Usage of a customer; `subjects` are those it carries and any other key with usage of its own."""

    id: str
    key: str | None
    name: str
    subjects: tuple[SubjectUsage, ...]

    @property
    def requests(self) -> float:
        """Return the requests of all subjects."""
        return math.fsum(subject.requests for subject in self.subjects)

    @property
    def tokens(self) -> float:
        """Return the tokens of all subjects."""
        return math.fsum(subject.tokens for subject in self.subjects)

    def to_json(self) -> dict[str, object]:
        """Return the usage as in ``syncd usage --output json``."""
        return {
            "key": self.key,
            "id": self.id,
            "name": self.name,
            "requests": whole(self.requests),
            "tokens": whole(self.tokens),
            "subjects": [subject.to_json() for subject in self.subjects],
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """All usage of a period; `unbilled` subjects are on no customer."""

    customers: tuple[CustomerUsage, ...]
    unbilled: tuple[SubjectUsage, ...]

    def to_json(self) -> dict[str, object]:
        """Return the usage as ``syncd usage --output json`` prints it."""
        charged = (subject for customer in self.customers for subject in customer.subjects)
        subjects = [*charged, *self.unbilled]
        return {
            "customers": [customer.to_json() for customer in self.customers],
            "unbilled": [subject.to_json() for subject in self.unbilled],
            "totals": {
                "requests": total(subject.requests for subject in subjects),
                "tokens": total(subject.tokens for subject in subjects),
            },
        }


def read_usage(
    target: MeteringTarget, observed: ObservedState, since: str | None = None, until: str | None = None
) -> Usage:
    """Query both meters by subject and attribute as the metering API does; raises MeterMissingError."""
    requests = target.usage(REQUESTS_METER, since, until)
    tokens = target.usage(TOKENS_METER, since, until)
    names = {entity.key: entity.display_name for entity in observed.subjects or () if entity.display_name}
    return attribute(observed.customers, requests, tokens, names)


def attribute(
    customers: Iterable[ObservedCustomer],
    requests: Mapping[str, float],
    tokens: Mapping[str, float],
    names: Mapping[str, str] | None = None,
) -> Usage:
    """Attribute each subject's usage to the customer that `owners` names; `names` are those of subjects."""
    names = names or {}
    customers = tuple(customers)
    owner_of = owners(customers)
    used = {
        customer.id: {key for key in customer.subject_keys if owner_of[key] == customer.id}
        for customer in customers
    }
    unattributed: set[str] = set()
    for subject in requests.keys() | tokens.keys():
        owner = owner_of.get(subject)
        (used[owner] if owner else unattributed).add(subject)

    def lines(keys: set[str]) -> tuple[SubjectUsage, ...]:
        return tuple(
            SubjectUsage(key, requests.get(key, 0), tokens.get(key, 0), names.get(key))
            for key in sorted(keys)
        )

    return Usage(
        tuple(
            CustomerUsage(customer.id, customer.key, customer.name, lines(used[customer.id]))
            for customer in sorted(customers, key=lambda c: (c.key or "", c.id))
        ),
        lines(unattributed),
    )


class Attributed(Protocol):
    """A customer, as far as the attribution of usage asks: observed, or known from an earlier run."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def key(self) -> str | None:
        """Its key."""

    @property
    def subject_keys(self) -> tuple[str, ...]:
        """The keys of its subjects."""


def owners(customers: Iterable[Attributed]) -> dict[str, str]:
    """Return the id of the customer that usage is attributed to, for each key and subject key.

    As a real OpenMeter does: a customer has the usage under its key and its subject keys, not under its id.
    Of a subject that is also another customer's key, the usage is counted once in a query for both, for the
    customer with the key; GET events names it, too. (Asked one by one, as for an invoice, both have it:
    `syncd.planning.carriers` reports such a pair.)
    """
    found: dict[str, str] = {}
    named: dict[str, str] = {}
    for customer in customers:
        found.update(dict.fromkeys(customer.subject_keys, customer.id))
        if customer.key:
            named[customer.key] = customer.id
    return found | named


def whole(value: float) -> int | float:
    """Return an integral number as int, so that it prints without a fraction."""
    return int(value) if float(value).is_integer() else value


def total(values: Iterable[float]) -> int | float:
    """Return the sum, which is the same in any order of the values: equal usage makes equal reports."""
    return whole(math.fsum(values))


def rfc3339(when: datetime) -> str:
    """Return a time in the format of the metering APIs."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
