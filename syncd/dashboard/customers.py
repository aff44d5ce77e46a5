"""One page of customers with their usage, read from the metering API.

The metering API itself searches, paginates and attributes usage to customers, so a page takes at most five
requests, however many customers there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, get_args

from syncd.config.settings import Config
from syncd.core.errors import ApiError, MeterMissingError
from syncd.core.model import ObservedCustomer
from syncd.dashboard.probes import TIMEOUT
from syncd.http.retry import Pace
from syncd.metering.base import CustomerField, CustomerValue
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER, owners, rfc3339
from syncd.runs.factory import quick_target_of

PAGE_SIZE: Final = 25
MAX_SUBJECTS: Final = 100
"""Subjects shown of one customer; its totals include all of them."""

Field = CustomerField
FIELDS: Final[tuple[Field, ...]] = get_args(Field)

UsageByCustomer = Mapping[str, Mapping[str, float]]
"""Customer id -> subject -> value of a meter."""


@dataclass(frozen=True, slots=True)
class Span:
    """A span of event time; `until` None means now. Both ends are midnight UTC."""

    name: str
    title: str
    since: datetime
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of customers. `total` counts all pages; it is None if the API does not send it.

    If usage cannot be read, it is empty and `usage_problem` has the reason.
    """

    customers: tuple[ObservedCustomer, ...]
    total: int | None
    requests: UsageByCustomer
    tokens: UsageByCustomer
    usage_problem: str | None = None


def spans(now: datetime) -> tuple[Span, ...]:
    """Return the selectable spans, the default first."""
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = today.replace(day=1)
    last_month = (month - timedelta(days=1)).replace(day=1)
    return (
        Span("31d", "last 31 days", today - timedelta(days=31)),
        Span("7d", "last 7 days", today - timedelta(days=7)),
        Span("today", "today", today),
        Span("month", f"{month:%B %Y}", month),
        Span("last-month", f"{last_month:%B %Y}", last_month, month),
    )


def read_page(config: Config, field: Field, text: str, number: int, span: Span) -> Page:
    """Return a page of the customers whose `field` contains `text`; raises ApiError."""
    with closing(quick_target_of(config, TIMEOUT, pace=Pace())) as api:
        found = api.find_customers(field, text, number, PAGE_SIZE)
        customers, total = found.customers, found.total
        if not customers:
            return Page((), total, {}, {})
        ids = [customer.id for customer in customers]
        since, until = rfc3339(span.since), rfc3339(span.until) if span.until else None
        try:
            requests, tokens = (
                _by_customer(customers, api.customer_usage(meter, ids, since, until))
                for meter in (REQUESTS_METER, TOKENS_METER)
            )
        except (ApiError, MeterMissingError) as error:
            return Page(customers, total, {}, {}, str(error))
        return Page(customers, total, requests, tokens)


def _by_customer(customers: Sequence[ObservedCustomer], rows: Iterable[CustomerValue]) -> UsageByCustomer:
    """Add up rows by customer; leaves out other customers, which some servers do not filter out."""
    owner_of = owners(customers)
    used: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        owner = row.customer_id or owner_of.get(row.subject)
        if owner is not None:
            used[owner][row.subject] += row.value
    return used
