"""The report of a range of days: what the usage page shows, from the kept usage and the directory.

A report of 10,000 customers takes seconds to add up, so the latest few are cached. They are made again
when usage was refreshed, a run changed customers, or prices have changed. Those of this and the last month
are made before a visitor asks (`Reports.work`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Final

import structlog

from syncd.config.settings import Config
from syncd.core.errors import StateError
from syncd.customers.directory import Directory
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER, owners
from syncd.runs.clock import Now, utc_now
from syncd.usage.days import Days, chosen, month_before
from syncd.usage.figures import Amount, CustomerFigures, Figures, Payer, Slice, figures, slices
from syncd.usage.prices import Bill, Prices, prices_of
from syncd.usage.store import KeptMeter, LateUsage, UsageStore

_log = structlog.get_logger("syncd.usage")

_LOOK_SECONDS: Final = 20.0
"""A look costs 2 ms with SQLite and 9 ms with PostgreSQL; usage is refreshed every half hour by default."""
_CACHED: Final = 6
"""Reports: one of 10,000 customers takes some 8 MiB."""
_WORDS: Final = {REQUESTS_METER: "requests", TOKENS_METER: "tokens"}
_DIMENSIONS: Final = {"route_name": "route", "service_name": "service", "type": "token type"}

Owners = Mapping[str, Payer]


@dataclass(frozen=True, slots=True)
class MeterUsage:
    """The usage of one meter: by day, and by the values of each of its dimensions."""

    meter: str
    by_day: tuple[float, ...]
    before: tuple[float, ...]
    slices: Mapping[str, tuple[Slice, ...]]

    @property
    def words(self) -> str:
        """Return what it counts, in words."""
        return words_of(self.meter)


@dataclass(frozen=True, slots=True)
class LateLine:
    """Late usage of a subject and a day, with the customer that pays for it now."""

    customer: Payer | None
    usage: LateUsage


@dataclass(frozen=True, slots=True)
class Estimates:
    """What usage is worth by the prices of the configuration; `unpriced` has by meter what no rate fits."""

    currency: str
    total: Decimal
    total_before: Decimal
    unbilled: Decimal
    unpriced: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """The usage of a range of days, compared with the one before it."""

    days: Days
    before: Days
    meters: tuple[MeterUsage, ...]
    figures: Figures
    late: tuple[LateLine, ...]
    new: tuple[CustomerFigures, ...]
    """Customers whose first kept usage of any meter is in the range."""
    estimates: Estimates | None
    kept: tuple[KeptMeter, ...]
    refreshed_at: datetime | None
    """When the oldest of the meters was as the metering API had it; None during the first refresh."""

    @property
    def is_compared(self) -> bool:
        """Return whether usage is known from the start of the period before on."""
        known = [kept.since for kept in self.kept if kept.since]
        return bool(known) and max(known) <= self.before.since


def words_of(meter: str) -> str:
    """Return what a meter counts, in words: ``requests``; its key for one that syncd does not know."""
    return _WORDS.get(meter, meter)


def dimension_words(name: str) -> str:
    """Return a dimension in words: ``route``."""
    return _DIMENSIONS.get(name, name.replace("_", " "))


class Reports:
    """Makes reports and caches the latest; thread-safe."""

    def __init__(self, store: UsageStore, directory: Directory) -> None:
        self._store = store
        self._directory = directory
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, Report] = OrderedDict()

    def work(
        self,
        config: Callable[[], Config],
        stopping: threading.Event,
        now: Now = utc_now,
        every: float = _LOOK_SECONDS,
    ) -> None:
        """Keep the reports of this and the last month up to date until stopped, so that no visitor waits.

        Checks `every` so many seconds whether they are out of date.
        """
        made: Hashable = None
        while not stopping.wait(every):
            today = now().date()
            try:
                key = (today, self._sources(config()))
                if key != made and self._store.meters():
                    for days in (chosen(None, None, None, today), month_before(today)):
                        self.report(days, config())
                    made = key
            except StateError as error:  # the page shows it
                _log.debug("report_not_made", error=str(error))
            except Exception:
                _log.exception("report_crashed")

    def _sources(self, config: Config) -> Hashable:
        """Return what changes whenever reports would."""
        edition = self._directory.edition()
        version = edition.version if edition else 0
        prices = config.prices.model_dump_json() if config.prices else ""
        return (self._store.revision(), version, prices, tuple(config.usage.meters))

    def report(self, days: Days, config: Config) -> Report:
        """Return the report of a range; raises StateError."""
        key = (days, self._sources(config))
        # One at a time: a second visitor waits for the report instead of making it again.
        with self._lock:
            if key not in self._made:
                self._made[key] = _made(self._store, self._directory, days, config)
                while len(self._made) > _CACHED:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]


def owners_in(directory: Directory) -> Owners:
    """Return who pays for each subject, as the metering API attributes usage."""
    customers = directory.customers()
    payers = {customer.id: Payer(customer.id, customer.key, customer.name) for customer in customers}
    return {subject: payers[identity] for subject, identity in owners(customers).items()}


def _made(store: UsageStore, directory: Directory, days: Days, config: Config) -> Report:
    kept = _in_order(store.meters(), config)
    before, owner_of = days.before(), owners_in(directory)
    keys = [meter.meter for meter in kept]
    found = figures(
        keys,
        [store.by_subject(key, days) for key in keys],
        [store.by_subject(key, before) for key in keys],
        owner_of,
    )
    found = _named(found, directory)
    estimates: Estimates | None = None
    if (prices := prices_of(config.prices)) is not None:
        found, estimates = _estimated(store, prices, found, owner_of, days, before)
    refreshed = [meter.refreshed_at for meter in kept if meter.problem is None or meter.refreshed_at]
    return Report(
        days,
        before,
        tuple(_meter_usage(store, meter, days, before) for meter in kept),
        found,
        tuple(LateLine(owner_of.get(late.subject), late) for late in store.late(days)),
        _new(store, found, owner_of, days, keys),
        estimates,
        kept,
        min(at for at in refreshed if at) if refreshed and all(refreshed) else None,
    )


def _in_order(kept: Sequence[KeptMeter], config: Config) -> tuple[KeptMeter, ...]:
    """Return the meters as the configuration lists them: the first one is what is shown first."""
    order = {meter: number for number, meter in enumerate(config.usage.meters)}
    return tuple(sorted(kept, key=lambda one: (order.get(one.meter, len(order)), one.meter)))


def _meter_usage(store: UsageStore, kept: KeptMeter, days: Days, before: Days) -> MeterUsage:
    by_dimension = {
        name: slices(store.by_dimension(kept.meter, days, name), store.by_dimension(kept.meter, before, name))
        for name in kept.dimensions
    }
    now, earlier = store.by_day(kept.meter, days), store.by_day(kept.meter, before)
    return MeterUsage(kept.meter, tuple(now), tuple(earlier), by_dimension)


def _named(found: Figures, directory: Directory) -> Figures:
    """Return the figures with the names behind unbilled subjects."""
    names = directory.names([subject.subject for subject in found.unbilled])
    return replace(
        found,
        unbilled=tuple(
            replace(subject, name=names[subject.subject][0].text) if names.get(subject.subject) else subject
            for subject in found.unbilled
        ),
    )


def _new(
    store: UsageStore, found: Figures, owner_of: Owners, days: Days, meters: Sequence[str]
) -> tuple[CustomerFigures, ...]:
    """Return the customers without any kept usage before the range."""
    appeared = {customer.customer.id: customer for customer in found.appeared()}
    subjects = [subject for subject, payer in owner_of.items() if payer.id in appeared]
    for meter in meters:
        for subject, activity in store.activity(meter, subjects).items():
            if activity.first < days.since:
                appeared.pop(owner_of[subject].id, None)
    return tuple(appeared.values())


def _estimated(
    store: UsageStore, prices: Prices, found: Figures, owner_of: Owners, days: Days, before: Days
) -> tuple[Figures, Estimates]:
    unpriced: dict[str, float] = defaultdict(float)
    now = estimates_by_payer(store, prices, owner_of, days, unpriced)
    earlier = estimates_by_payer(store, prices, owner_of, before)
    nothing = Decimal(0)
    customers = tuple(
        replace(
            customer,
            estimate=now.get((customer.customer.id, True), nothing),
            estimate_before=earlier.get((customer.customer.id, True), nothing),
        )
        for customer in found.customers
    )
    unbilled = tuple(
        replace(subject, estimate=now.get((subject.subject, False), nothing)) for subject in found.unbilled
    )
    without = sum((value for (_, billed), value in now.items() if not billed), nothing)
    return replace(found, customers=customers, unbilled=unbilled), Estimates(
        prices.currency,
        sum(now.values(), nothing),
        sum(earlier.values(), nothing),
        without,
        dict(unpriced),
    )


Purse = tuple[str, bool]
"""Who would pay: the id of a customer and True, or a subject without one and False."""


def estimates_by_payer(
    store: UsageStore,
    prices: Prices,
    owner_of: Owners,
    days: Days,
    unpriced: dict[str, float] | None = None,
) -> dict[Purse, Decimal]:
    """Return the estimate of a range for each payer; adds what has no price to `unpriced`, by meter."""
    found: dict[Purse, Decimal] = defaultdict(Decimal)
    for month in days.by_month():
        bills: dict[Purse, Bill] = defaultdict(Bill)
        for meter in sorted(prices.meters):
            for subject, labels, value in store.by_labels(meter, month):
                rate = prices.rate_of(meter, labels)
                if rate is None:
                    if unpriced is not None:
                        unpriced[meter] = unpriced.get(meter, 0) + value
                    continue
                payer = owner_of.get(subject)
                bills[(payer.id, True) if payer else (subject, False)].add(rate, value)
        for purse, bill in bills.items():
            found[purse] += prices.charge(bill)
    return found


def first_day(kept: Sequence[KeptMeter]) -> date | None:
    """Return the first day from which on all meters are kept."""
    known = [meter.since for meter in kept if meter.since]
    return max(known) if known else None


def total(report: Report, meter: int) -> Amount:
    """Return all usage of a meter in both periods."""
    usage = report.meters[meter]
    return Amount(sum(usage.by_day), sum(usage.before))
