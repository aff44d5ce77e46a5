"""Usage as the metering API counts it: by customer, by subject, and unbilled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from syncd.core.model import ObservedCustomer
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

    def to_json(self) -> dict[str, object]:
        """Return the usage as in ``syncd usage --json``."""
        return {"key": self.key, "requests": whole(self.requests), "tokens": whole(self.tokens)}


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
        return sum(subject.requests for subject in self.subjects)

    @property
    def tokens(self) -> float:
        """Return the tokens of all subjects."""
        return sum(subject.tokens for subject in self.subjects)

    def to_json(self) -> dict[str, object]:
        """Return the usage as in ``syncd usage --json``."""
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
        """Return the usage as ``syncd usage --json`` prints it."""
        # By key: usage that is counted for two customers happened once.
        charged = {subject.key: subject for customer in self.customers for subject in customer.subjects}
        subjects = [*charged.values(), *self.unbilled]
        return {
            "customers": [customer.to_json() for customer in self.customers],
            "unbilled": [subject.to_json() for subject in self.unbilled],
            "totals": {
                "requests": whole(sum(subject.requests for subject in subjects)),
                "tokens": whole(sum(subject.tokens for subject in subjects)),
            },
        }


def read_usage(target: MeteringTarget, since: str | None = None, until: str | None = None) -> Usage:
    """Query both meters by subject and attribute as the metering API does; raises MeterMissingError."""
    customers = target.observe().customers
    requests = target.usage(REQUESTS_METER, since, until)
    tokens = target.usage(TOKENS_METER, since, until)
    return attribute(customers, requests, tokens)


def attribute(
    customers: tuple[ObservedCustomer, ...], requests: Mapping[str, float], tokens: Mapping[str, float]
) -> Usage:
    """Attribute each subject's usage to the customer whose id, key or subject key it is.

    A subject that is the key of one customer and a subject key of another counts for both, as in the
    metering API (`syncd.planning.customer_index`).
    """
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for customer in customers:
        for name in (customer.id, customer.key, *customer.subject_keys):
            if name:
                homes[name].add(customer.id)
    used: dict[str, set[str]] = {customer.id: set(customer.subject_keys) for customer in customers}
    unattributed: set[str] = set()
    for subject in requests.keys() | tokens.keys():
        for owner in homes.get(subject, ()):
            used[owner].add(subject)
        if subject not in homes:
            unattributed.add(subject)

    def lines(keys: set[str]) -> tuple[SubjectUsage, ...]:
        return tuple(SubjectUsage(key, requests.get(key, 0), tokens.get(key, 0)) for key in sorted(keys))

    return Usage(
        tuple(
            CustomerUsage(customer.id, customer.key, customer.name, lines(used[customer.id]))
            for customer in sorted(customers, key=lambda c: (c.key or "", c.id))
        ),
        lines(unattributed),
    )


def whole(value: float) -> int | float:
    """Return an integral number as int, so that it prints without a fraction."""
    return int(value) if float(value).is_integer() else value
