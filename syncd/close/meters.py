"""What the meters count in a month: requests, tokens and other configured meters, and what that is worth.

Requests and tokens must be readable; another meter that cannot be added up is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from syncd.close.report import Month
from syncd.config.settings import Config
from syncd.core.errors import MalformedError
from syncd.core.model import ObservedCustomer
from syncd.metering.answers import API
from syncd.metering.base import MeteringApi
from syncd.metering.usage import (
    REQUESTS_METER,
    TOKENS_METER,
    CustomerUsage,
    SubjectUsage,
    Usage,
    attribute,
    owners,
    rfc3339,
    total,
    whole,
)
from syncd.usage.estimates import ADDITIVE, Estimate, plain, prices_of, read_estimate
from syncd.usage.refresh import wanted_meters
from syncd.usage.store import same

STANDARD = (REQUESTS_METER, TOKENS_METER)

Values = Mapping[str, Mapping[str, float]]
"""By meter, the value of each subject that has one."""


@dataclass(frozen=True, slots=True)
class Others:
    """The meters besides the standard ones; `problems` says why one is left out."""

    meters: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)


def others_of(api: MeteringApi, config: Config) -> Others:
    """Return the other meters of the configuration; raises ApiError."""
    wanted = sorted(set(wanted_meters(config)) - set(STANDARD))
    known = api.meters() if wanted else {}
    problems: dict[str, str] = {}
    for key in wanted:
        if (meter := known.get(key)) is None:
            problems[key] = f"the {API} has no such meter"
        elif meter.aggregation not in ADDITIVE:
            problems[key] = f"its aggregation is {meter.aggregation}; only meters that count or sum add up"
    return Others(tuple(key for key in wanted if key not in problems), problems)


def read(api: MeteringApi, month: Month, others: Iterable[str] = ()) -> Values:
    """Return what the meters count in a month; raises ApiError or MeterMissingError."""
    since, until = rfc3339(month.since), rfc3339(month.until)
    return {meter: _counted(api.usage(meter, since, until), meter) for meter in (*STANDARD, *others)}


def _counted(values: Mapping[str, float], meter: str) -> Mapping[str, float]:
    """Return the values; raises MalformedError for one that no count or sum of usage can have."""
    for subject, value in values.items():
        if meter in STANDARD and (value < 0 or (meter == REQUESTS_METER and not float(value).is_integer())):
            raise MalformedError(f"{API}: meter {meter} returned {value} for {subject!r}")
    return {subject: value for subject, value in values.items() if value}


def equal(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Return whether a meter counted the same both times, apart from how a server rounds fractions."""
    return one.keys() == other.keys() and all(same(value, other[subject]) for subject, value in one.items())


def estimate_of(
    api: MeteringApi, config: Config, month: Month, customers: Iterable[ObservedCustomer]
) -> Estimate | None:
    """Return what the usage of a month is worth by the prices of the configuration; None without prices."""
    prices = prices_of(config.prices)
    if prices is None:
        return None
    return read_estimate(api, prices, owners(customers), month.since, month.until)


@dataclass(frozen=True, slots=True)
class MonthUsage:
    """All usage of a month, attributed."""

    usage: Usage
    values: Values
    others: Others
    estimate: Estimate | None
    prices: Mapping[str, Any] | None
    """The prices that the estimate was made with, as in the configuration."""

    def figures(self, ignored: Mapping[str, str]) -> dict[str, Any]:
        """Return the parts of a report that have usage, and what it is worth."""
        unbilled = [self._line(one) for one in self.usage.unbilled]
        for one in unbilled:
            if self.estimate is not None:
                one["estimate"] = plain(self.estimate.of_unbilled(one["key"]))
        return {
            "totals": self.usage.to_json()["totals"],
            "customers": [found for one in self.usage.customers if (found := self._customer(one))],
            "unbilled": [one for one in unbilled if one["key"] not in ignored],
            "ignored": [{**one, "reason": ignored[one["key"]]} for one in unbilled if one["key"] in ignored],
            "meters": {
                **{key: {"total": total(self.values[key].values())} for key in self.others.meters},
                **{key: {"total": None, "problem": text} for key, text in self.others.problems.items()},
            },
            "estimate": {**self.estimate.to_json(), "prices": self.prices} if self.estimate else None,
        }

    def _customer(self, customer: CustomerUsage) -> dict[str, Any] | None:
        """Return a customer with the subjects that have usage: a later subject does not change a month."""
        used = tuple(
            one for one in customer.subjects if any(one.key in found for found in self.values.values())
        )
        if not used:
            return None
        document: dict[str, Any] = replace(customer, subjects=used).to_json()
        document["subjects"] = [self._line(one) for one in used]
        if self.others.meters:
            document["meters"] = {
                key: total(self.values[key].get(one.key, 0) for one in used) for key in self.others.meters
            }
        if self.estimate is not None:
            document["estimate"] = plain(self.estimate.of_customer(customer.id))
        return document

    def _line(self, subject: SubjectUsage) -> dict[str, Any]:
        document: dict[str, Any] = subject.to_json()
        if self.others.meters:
            document["meters"] = {
                key: whole(self.values[key].get(subject.key, 0)) for key in self.others.meters
            }
        return document


def month_usage(
    config: Config,
    customers: Iterable[ObservedCustomer],
    values: Values,
    others: Others,
    estimate: Estimate | None,
    names: Mapping[str, str],
) -> MonthUsage:
    """Attribute the usage of a month as the metering API does."""
    listed: dict[str, float] = {subject: 0 for meter in others.meters for subject in values[meter]}
    usage = attribute(customers, {**listed, **values[REQUESTS_METER]}, values[TOKENS_METER], names)
    prices = config.prices.model_dump(mode="json") if config.prices and estimate else None
    return MonthUsage(usage, values, others, estimate, prices)
