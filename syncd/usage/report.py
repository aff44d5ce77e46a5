"""The report of a range of days: what the usage page shows, from the kept usage and the directory.

A report of 10,000 customers takes seconds to add up, so the latest few are cached. They are made again
when usage was refreshed, a run changed customers, or prices have changed. Those of this and the last month
are made before a visitor asks (`Reports.work`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Final

import structlog

from syncd.config.settings import Config
from syncd.core.errors import StateError
from syncd.customers.directory import Directory
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER, owners
from syncd.runs.clock import Now, utc_now
from syncd.usage.days import Days, chosen, month_before
from syncd.usage.estimates import Estimate, Labels, prices_of
from syncd.usage.figures import CustomerFigures, Figures, Payer, Slice, figures, slices
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

    def report(self, days: Days, config: Config, before: Days | None = None) -> Report:
        """Return the report of a range, compared with `before` or what precedes it; raises StateError."""
        before = before or days.before()
        key = (days, before, self._sources(config))
        # One at a time: a second visitor waits for the report instead of making it again.
        with self._lock:
            if key not in self._made:
                self._made[key] = _made(self._store, self._directory, days, before, config)
                while len(self._made) > _CACHED:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]


def owners_in(directory: Directory) -> Owners:
    """Return who pays for each subject, as the metering API attributes usage."""
    customers = directory.customers()
    payers = {customer.id: Payer(customer.id, customer.key, customer.name) for customer in customers}
    return {subject: payers[identity] for subject, identity in owners(customers).items()}


@dataclass(slots=True)
class _Sums:
    """What the usage of a range adds up to: by meter and subject, by meter and dimensions, and in money."""

    estimate: Estimate | None
    by_subject: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    by_labels: dict[str, dict[Labels, float]] = field(default_factory=lambda: defaultdict(dict))

    def by_dimension(self, meter: str, name: str) -> dict[str, float]:
        """Return the usage of a meter by the values of a dimension; an empty text is its absence."""
        found: dict[str, float] = defaultdict(float)
        for labels, value in self.by_labels[meter].items():
            found[dict(labels).get(name, "")] += value
        return found


def _sums(store: UsageStore, meters: Sequence[str], days: Days, estimate: Estimate | None) -> _Sums:
    """Add up a range; each of its hundred thousands of rows is read once."""
    found = _Sums(estimate)
    for month in days.by_month():
        for meter in meters:
            subjects, combinations = found.by_subject[meter], found.by_labels[meter]
            priced = estimate if estimate is not None and meter in estimate.prices.meters else None
            for subject, labels, value in store.by_labels(meter, month):
                subjects[subject] = subjects.get(subject, 0.0) + value
                combinations[labels] = combinations.get(labels, 0.0) + value
                if priced is not None:
                    priced.add(meter, subject, labels, value)
        if estimate is not None:
            estimate.end_month()
    return found


def _made(store: UsageStore, directory: Directory, days: Days, range_before: Days, config: Config) -> Report:
    kept = _in_order(store.meters(), config)
    owner_of, prices = owners_in(directory), prices_of(config.prices)
    keys = [meter.meter for meter in kept]
    payer_ids = {subject: payer.id for subject, payer in owner_of.items()}
    now, before = (
        _sums(store, keys, part, Estimate(prices, payer_ids) if prices is not None else None)
        for part in (days, range_before)
    )
    found = figures(
        keys, [now.by_subject[key] for key in keys], [before.by_subject[key] for key in keys], owner_of
    )
    found = _named(found, directory)
    if now.estimate is not None and before.estimate is not None:
        found = _estimated(found, now.estimate, before.estimate)
    refreshed = [meter.refreshed_at for meter in kept if meter.problem is None or meter.refreshed_at]
    return Report(
        days,
        range_before,
        tuple(
            MeterUsage(
                meter.meter,
                tuple(store.by_day(meter.meter, days)),
                tuple(store.by_day(meter.meter, range_before)),
                {
                    name: slices(now.by_dimension(meter.meter, name), before.by_dimension(meter.meter, name))
                    for name in meter.dimensions
                },
            )
            for meter in kept
        ),
        found,
        tuple(LateLine(owner_of.get(late.subject), late) for late in store.late(days)),
        _new(store, found, owner_of, days, keys),
        _estimates(now.estimate, before.estimate) if now.estimate and before.estimate else None,
        kept,
        min(at for at in refreshed if at) if refreshed and all(refreshed) else None,
    )


def _in_order(kept: Sequence[KeptMeter], config: Config) -> tuple[KeptMeter, ...]:
    """Return the meters as the configuration lists them: the first one is what is shown first."""
    order = {meter: number for number, meter in enumerate(config.usage.meters)}
    return tuple(sorted(kept, key=lambda one: (order.get(one.meter, len(order)), one.meter)))


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
        for subject in store.used_before(meter, days.since, subjects):
            appeared.pop(owner_of[subject].id, None)
    return tuple(appeared.values())


def _estimated(found: Figures, now: Estimate, before: Estimate) -> Figures:
    """Return the figures with the estimates of customers and unbilled subjects."""
    nothing = Decimal(0)
    return replace(
        found,
        customers=tuple(
            replace(
                customer,
                estimate=now.customers.get(customer.customer.id, nothing),
                estimate_before=before.customers.get(customer.customer.id, nothing),
            )
            for customer in found.customers
        ),
        unbilled=tuple(
            replace(subject, estimate=now.unbilled.get(subject.subject, nothing))
            for subject in found.unbilled
        ),
    )


def _estimates(now: Estimate, before: Estimate) -> Estimates:
    return Estimates(now.prices.currency, now.total, before.total, now.unbilled_total, now.unpriced)
