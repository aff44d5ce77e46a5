"""Usage read back from the metering API: per customer, per subject, and what no customer is charged for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from syncd.model import ObservedCustomer
from syncd.targets import MeteringTarget

REQUESTS_METER = "kong_api_requests"
"""COUNT of events of type kong.api_request."""
TOKENS_METER = "kong_llm_tokens"
"""SUM of $.tokens of events of type kong.llm_request."""


@dataclass(frozen=True, slots=True)
class SubjectUsage:
    """What one subject used."""

    key: str
    requests: float
    tokens: float

    def to_json(self) -> dict[str, object]:
        """Return it as in ``syncd usage --json``."""
        return {"key": self.key, "requests": whole(self.requests), "tokens": whole(self.tokens)}


@dataclass(frozen=True, slots=True)
class CustomerUsage:
    """What a customer used; `subjects` are those it carries and any other key that its usage came under."""

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
        """Return it as in ``syncd usage --json``."""
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
    """All usage of a period; `unattributed` subjects belong to no customer, so nobody pays for them."""

    customers: tuple[CustomerUsage, ...]
    unattributed: tuple[SubjectUsage, ...]

    def to_json(self) -> dict[str, object]:
        """Return it as ``syncd usage --json`` prints it."""
        subjects = [subject for customer in self.customers for subject in customer.subjects]
        subjects += self.unattributed
        return {
            "customers": [customer.to_json() for customer in self.customers],
            "unattributed": [subject.to_json() for subject in self.unattributed],
            "totals": {
                "requests": whole(sum(subject.requests for subject in subjects)),
                "tokens": whole(sum(subject.tokens for subject in subjects)),
            },
        }


def read_usage(target: MeteringTarget, since: str | None = None, until: str | None = None) -> Usage:
    """Query both meters by subject, attribute as the metering API does; raises MeterMissingError."""
    customers = target.observe().customers
    requests = target.usage(REQUESTS_METER, since, until)
    tokens = target.usage(TOKENS_METER, since, until)
    return attribute(customers, requests, tokens)


def attribute(
    customers: tuple[ObservedCustomer, ...], requests: Mapping[str, float], tokens: Mapping[str, float]
) -> Usage:
    """Give each subject's usage to the customer whose id, key or subject key it is."""
    home: dict[str, ObservedCustomer] = {}
    for customer in customers:
        home[customer.id] = customer
        if customer.key:
            home.setdefault(customer.key, customer)
    for customer in customers:
        home.update(dict.fromkeys(customer.subject_keys, customer))
    used: dict[str, set[str]] = {customer.id: set(customer.subject_keys) for customer in customers}
    unattributed: set[str] = set()
    for subject in requests.keys() | tokens.keys():
        if owner := home.get(subject):
            used[owner.id].add(subject)
        else:
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
    """Return a whole number as int, so that it prints without a fraction."""
    return int(value) if float(value).is_integer() else value
