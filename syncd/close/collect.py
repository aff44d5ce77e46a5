"""Collection of a month's figures from gateways, meters and customers, and of the objections to closing it.

The meters are read before the audit and after it: only figures that are the same both times, and that the
audit has counted hour by hour, are reported without objection. A metering API that cannot be read raises
ApiError; a gateway that cannot be read is an objection, so that the others are still reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from openmeter_plugin.units import plural
from syncd.audit.books import leads_to
from syncd.audit.compare import HOUR, spans
from syncd.audit.run import REQUESTS, Audit, AuditRun, HourlyMeters, Reader, to_json
from syncd.close import meters
from syncd.close.meters import MonthUsage, Values
from syncd.close.report import QUIET, Content, Kind, LateUsage, Month, Objection, Report, late_usage
from syncd.config.settings import Config
from syncd.core.errors import GatewayError
from syncd.gateways.client import Gateway
from syncd.gateways.models import DeadLetter, QuarantinedRequest, Spool
from syncd.metering.base import MeteringApi
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER, Usage, rfc3339, whole

_MAX_CONCURRENCY = 8
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a month; the rest is read.

    `ignored` are the subjects that are meant to be unbilled for the whole month, with the reason of each.
    `lost_before` are the requests that each gateway had lost according to the latest report of an earlier
    month, by gateway. `late` is the usage that has arrived for earlier closed months.
    """

    month: Month
    config: Config
    ignored: Mapping[str, str] = field(default_factory=dict)
    lost_before: Mapping[str, int] = field(default_factory=dict)
    late: Mapping[Month, Sequence[LateUsage]] = field(default_factory=dict)

    @property
    def metering_url(self) -> str:
        """Return where the metering API is."""
        return self.config.metering.url


@dataclass(frozen=True, slots=True)
class Collected:
    """The figures of a month as a part of its report, and the objections to closing it."""

    figures: Content
    objections: tuple[Objection, ...]


EMPTY: Content = {
    "from": None,
    "to": None,
    "metering": None,
    "totals": None,
    "customers": [],
    "unbilled": [],
    "ignored": [],
    "meters": {},
    "estimate": None,
    "gateways": [],
    "audit": None,
    "late": {},
}
"""The figures of a month that was not read."""


def not_ended(month: Month, now: datetime, metering_now: datetime | None) -> Objection | None:
    """Return the objection to a month that has not ended by the clock of either machine, else None."""
    earlier = now if metering_now is None else min(now, metering_now)
    if earlier >= month.until + QUIET:
        return None
    when = f"{month.until + QUIET:%Y-%m-%d %H:%M} UTC"
    return Objection(
        Kind.NOT_ENDED, f"{month} can be closed from {when}; it is {earlier:%Y-%m-%d %H:%M} UTC now"
    )


@dataclass(frozen=True, slots=True)
class GatewayMonth:
    """What a gateway has that belongs to the month, or may."""

    name: str
    spool: Spool
    quarantined: int
    """Requests in quarantine, of the month or perhaps of it."""
    dead_letters: tuple[DeadLetter, ...]
    pruned_up_to: datetime | None

    @property
    def requests_lost(self) -> int:
        """Return the requests that it has lost since its spool was created."""
        return sum(self.spool.total.books.lost.values())

    def to_json(self) -> dict[str, object]:
        """Return it as a part of a report."""
        answers = Counter(_answer(letter) for letter in self.dead_letters)
        return {
            "name": self.name,
            "dead_letters": len(self.dead_letters),
            "dead_letters_by_answer": dict(sorted(answers.items())),
            "quarantined": self.quarantined,
            "requests_lost": self.requests_lost,
        }


def collect(
    asked: Asked,
    api: MeteringApi,
    gateways: Sequence[Gateway],
    *,
    settle: float,
    on_wait: Callable[[int], object] = lambda _missing: None,
    on_part: Callable[[int], object] = lambda _hours: None,
) -> Collected:
    """Read the figures of a month; raises ApiError or MeterMissingError."""
    objections: list[Objection] = []
    read, unread = _read_gateways(asked.month, gateways, asked.metering_url)
    objections += unread
    others = meters.others_of(api, asked.config)
    before = meters.read(api, asked.month, others.meters)
    audit: Audit | None = None
    if gateways and not unread:
        reader = Reader(gateways, HourlyMeters(api), asked.metering_url)
        run = AuditRun(reader, asked.month.since, asked.month.until, settle, on_part=on_part, on_wait=on_wait)
        try:
            audit = run.audit()
        except GatewayError as error:
            objections.append(_unreadable(error))
    if not gateways:
        objections.append(Objection(Kind.NO_GATEWAYS, "no gateway is listed, so no events were compared"))
    observed = api.observe()
    estimate = meters.estimate_of(api, asked.config, asked.month, observed.customers)
    after = meters.read(api, asked.month, others.meters)
    names = {entity.key: entity.display_name for entity in observed.subjects or () if entity.display_name}
    month = meters.month_usage(asked.config, observed.customers, after, others, estimate, names)
    objections += _contradictions(before, after, audit)
    objections += _of_gateways(read, asked)
    if audit is not None:
        objections += _of_audit(audit, read)
    objections += _of_usage(month.usage, asked)
    return Collected(_figures(asked, month, read, audit), tuple(objections))


def late_of(api: MeteringApi, report: Report) -> tuple[LateUsage, ...]:
    """Return what the meters of a closed month count now and did not then; raises ApiError."""
    found = meters.read(api, report.month)
    return late_usage(report.content, found[REQUESTS_METER], found[TOKENS_METER])


def _read_gateways(
    month: Month, gateways: Sequence[Gateway], metering_url: str
) -> tuple[list[GatewayMonth], list[Objection]]:
    """Read all gateways concurrently; the second list is of those that cannot be read."""

    def read(gateway: Gateway) -> GatewayMonth | Objection:
        try:
            return _read_gateway(month, gateway, metering_url)
        except GatewayError as error:
            return _unreadable(error)

    with ThreadPoolExecutor(max_workers=max(1, min(_MAX_CONCURRENCY, len(gateways)))) as pool:
        found = sorted(
            pool.map(read, gateways), key=lambda one: one.text if isinstance(one, Objection) else one.name
        )
    return (
        [one for one in found if isinstance(one, GatewayMonth)],
        [one for one in found if isinstance(one, Objection)],
    )


def _unreadable(error: GatewayError) -> Objection:
    return Objection(Kind.GATEWAY, str(error))


def _read_gateway(month: Month, gateway: Gateway, metering_url: str) -> GatewayMonth:
    spool = gateway.spool()
    elsewhere = {
        part.id
        for part in spool.destinations
        if part.endpoint and not leads_to(part.endpoint, metering_url, gateway.config.metering_hosts)
    }
    letters = tuple(
        letter
        for letter in _dead_letters(gateway)
        if letter.destination not in elsewhere and _may_be_of(letter.time, month)
    )
    # The last hour alone: what is asked for here is only how far the ledger was pruned.
    ledger = gateway.ledger(month.until - HOUR, month.until)
    quarantined = _quarantined(month, gateway, spool)
    return GatewayMonth(gateway.name, spool, quarantined, letters, ledger.pruned_up_to)


def _quarantined(month: Month, gateway: Gateway, spool: Spool) -> int:
    """Count the requests in quarantine that are of the month, or may be: those that are not listed, too."""
    listed = found = 0
    groups = gateway.quarantine_groups()
    for group in groups.groups if spool.quarantined else ():
        after: int | None = 0
        while after is not None:
            page = gateway.quarantine(group.reason, after, _PAGE)
            listed += len(page.requests)
            found += sum(_is_quarantined_of(one, month) for one in page.requests)
            after = _next(gateway, after, page.next, "quarantine")
    return found + max(0, spool.quarantined - listed)


def _is_quarantined_of(request: QuarantinedRequest, month: Month) -> bool:
    """Return whether a request began in the month; one that does not say may have."""
    began = request.log.get("started_at")
    if not isinstance(began, int | float) or isinstance(began, bool):
        return True
    return month.since.timestamp() <= began / 1000 < month.until.timestamp()


def _dead_letters(gateway: Gateway) -> Iterator[DeadLetter]:
    after: int | None = 0
    while after is not None:
        page = gateway.dead_letters(after, _PAGE)
        yield from page.dead_letters
        after = _next(gateway, after, page.next, "dead-letters")


def _next(gateway: Gateway, after: int, following: int | None, path: str) -> int | None:
    if following is not None and following <= after:
        raise GatewayError(gateway.name, f"GET /v1/{path} named a page that it had returned before")
    return following


def _may_be_of(time: str, month: Month) -> bool:
    """Return whether an event's time is in the month; one that cannot be read may be."""
    try:
        found = datetime.fromisoformat(time)
    except ValueError:
        return True
    return found.tzinfo is None or month.since <= found < month.until


def _answer(letter: DeadLetter) -> str:
    return "too old" if letter.status is None else f"HTTP {letter.status}"


def _contradictions(before: Values, after: Values, audit: Audit | None) -> Iterator[Objection]:
    for meter, first in before.items():
        last = after[meter]
        if not meters.equal(first, last):
            counts = f"{whole(sum(first.values()))} before the audit and {whole(sum(last.values()))} after it"
            yield Objection(Kind.CHANGED, f"meter {meter} counted {counts}, or counted by other subjects")
    used = next((one for one in audit.yardsticks if one.type == REQUESTS), None) if audit else None
    if audit is None or used is None or used.meter != REQUESTS_METER or used.since is not None:
        return
    if audit.comparison.left_out or REQUESTS not in audit.comparison.totals:
        return
    by_hour, by_subject = audit.comparison.totals[REQUESTS].counted, sum(after[REQUESTS_METER].values())
    if by_hour != by_subject:
        yield Objection(
            Kind.CHANGED,
            f"meter {REQUESTS_METER} counts {plural(by_hour, 'event')} by hour, but {whole(by_subject)}"
            " over the month",
        )


def _of_gateways(read: Iterable[GatewayMonth], asked: Asked) -> Iterator[Objection]:
    for one in read:
        if one.pruned_up_to is not None and one.pruned_up_to >= asked.month.since:
            text = f"the ledger of {one.name} is pruned up to {one.pruned_up_to:%Y-%m-%d %H:00} UTC"
            yield Objection(Kind.PRUNED, f"{text}, so it does not cover the month")
        if one.dead_letters:
            answers = Counter(map(_answer, one.dead_letters))
            listed = ", ".join(f"{answer} {count}" for answer, count in sorted(answers.items()))
            text = f"{one.name} has {plural(len(one.dead_letters), 'dead letter')} of the month ({listed})"
            yield Objection(Kind.DEAD_LETTERS, text)
        if one.quarantined:
            text = f"{one.name} has {plural(one.quarantined, 'request')} in quarantine"
            yield Objection(Kind.QUARANTINE, f"{text}, of the month or perhaps of it")
        if (lost := one.requests_lost - asked.lost_before.get(one.name, 0)) > 0:
            since = "the latest closed month" if one.name in asked.lost_before else "its spool was created"
            yield Objection(
                Kind.REQUESTS_LOST, f"{one.name} has lost {plural(lost, 'request')} since {since}"
            )


def _of_audit(audit: Audit, read: Iterable[GatewayMonth]) -> Iterator[Objection]:
    comparison = audit.comparison
    by_reason: dict[str, list[datetime]] = {}
    for hour, reasons in comparison.left_out.items():
        for why in reasons:
            by_reason.setdefault(why, []).append(hour)
    for why, hours in sorted(by_reason.items()):
        first, _ = spans(hours)[0]
        text = f"{plural(len(hours), 'hour')} from {first:%Y-%m-%d %H:00} on could not be compared: {why}"
        yield Objection(Kind.OPEN_HOURS, text)
    for kind, number in sorted(comparison.not_compared.items()):
        yield Objection(
            Kind.NOT_COMPARED,
            f"{plural(number, f'event of type {kind}', f'events of type {kind}')}"
            " could not be compared: no meter counts that, or only later ones",
        )
    for used in audit.yardsticks:
        if not used.exact:
            yield Objection(
                Kind.NOT_COMPARED,
                f"events of type {used.type} were compared only roughly: meter {used.meter} does not count",
            )
    if (why_not := audit.incomparable_reason) is not None and not comparison.left_out:
        yield Objection(Kind.NOT_COMPARED, why_not)
    sums = {
        name: sum(getattr(one, name) for one in comparison.differences)
        for name in ("missing", "refused", "lost", "surplus")
    }
    if sums["missing"]:
        text = f"{plural(sums['missing'], 'delivered event is', 'delivered events are')} not counted"
        yield Objection(Kind.MISSING, text)
    gone = sums["refused"] - sum(len(one.dead_letters) for one in read)
    if gone > 0:
        text = f"{plural(gone, 'refused event is', 'refused events are')} neither counted nor a dead letter"
        yield Objection(Kind.REFUSED, text)
    if sums["lost"]:
        text = f"{plural(sums['lost'], 'event')} damaged or gone on a gateway before delivery"
        yield Objection(Kind.LOST, text)
    if sums["surplus"]:
        text = f"{plural(sums['surplus'], 'event')} counted that no listed gateway has sent"
        yield Objection(Kind.SURPLUS, text)


def _of_usage(usage: Usage, asked: Asked) -> Iterator[Objection]:
    open_subjects = [one for one in usage.unbilled if one.key not in asked.ignored]
    if open_subjects:
        requests = whole(sum(one.requests for one in open_subjects))
        tokens = whole(sum(one.tokens for one in open_subjects))
        text = f"{plural(len(open_subjects), 'subject')} without a customer"
        yield Objection(Kind.UNBILLED, f"{text}: {plural(requests, 'request')}, {plural(tokens, 'token')}")
    for month, late in sorted(asked.late.items()):
        if late:
            subjects = plural(len(late), "subject")
            yield Objection(
                Kind.LATE, f"{month} was closed, and the meters count differently now: {subjects}"
            )


def _figures(
    asked: Asked, month: MonthUsage, read: Iterable[GatewayMonth], audit: Audit | None
) -> dict[str, Any]:
    return {
        "from": rfc3339(asked.month.since),
        "to": rfc3339(asked.month.until),
        "metering": asked.metering_url,
        **month.figures(asked.ignored),
        "gateways": [one.to_json() for one in read],
        "audit": _audit_figures(audit) if audit else None,
        "late": {str(one): [line.to_json() for line in late] for one, late in asked.late.items() if late},
    }


def _audit_figures(audit: Audit) -> dict[str, object]:
    document = to_json(audit)
    for name in ("redeliveries", "redelivered_without_effect", "from", "to", "requests_lost"):
        del document[name]
    return document
