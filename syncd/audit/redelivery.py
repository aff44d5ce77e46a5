"""Redelivery of missing events: plans what to request from each gateway, requests it, and waits.

A redelivery sends everything that the gateway retains of a span of event time, for one subject or all. That
includes events that are already counted, which a metering API that deduplicates does not count again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from openmeter_plugin.units import plural
from syncd.audit.compare import Comparison, Difference, hour_of, spans
from syncd.core.errors import GatewayError
from syncd.gateways.client import Gateway
from syncd.metering.usage import rfc3339

MAX_REQUESTS = 200
"""To one gateway. Each request makes it scan its spool, so beyond this number, whole hours are requested."""
_FIRST_PAUSE, _MAX_PAUSE = 0.2, 2.0


class RedeliveryState(StrEnum):
    """State of a redelivery."""

    PLANNED = "planned"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Redelivery:
    """A request to one gateway: a span, a subject (None for all), and the number of missing events.

    `expected` is the number of events that the gateway delivered in the span; those that were not `sent`
    again are no longer retained there.
    """

    gateway: str
    since: datetime
    until: datetime
    subject: str | None
    missing: int
    state: RedeliveryState = RedeliveryState.PLANNED
    id: int | None = None
    sent: int = 0
    expected: int | None = None
    error: str | None = None

    @property
    def gone(self) -> int:
        """Return how many events cannot be redelivered."""
        return max(0, self.expected - self.sent) if self.expected is not None else 0

    def to_json(self) -> dict[str, object]:
        """Return it as in ``syncd audit --output json``."""
        return {
            "gateway": self.gateway,
            "from": rfc3339(self.since),
            "to": rfc3339(self.until),
            "subject": self.subject,
            "missing": self.missing,
            "state": str(self.state),
            "id": self.id,
            "sent": self.sent,
            "no_longer_retained": self.gone if self.expected is not None else None,
            "error": self.error,
        }


_MARGIN = timedelta(hours=1)
"""Of the memory of a deduplication: a redelivery takes its time."""


def remembered_since(now: datetime, memory: timedelta) -> datetime:
    """Return the first whole hour whose events a deduplication with this memory still recognises.

    It learned each id after the event, so it forgets the events of an hour no sooner than that hour is old.
    """
    return hour_of(now - memory + _MARGIN, up=True)


def forgotten(differences: Iterable[Difference], since: datetime) -> int:
    """Return how many missing events are of hours that the deduplication has forgotten."""
    return sum(one.missing for one in differences if one.line.hour < since)


def double_billing_risk(comparison: Comparison) -> str | None:
    """Return why a redelivery could bill events twice; None if nothing suggests that."""
    doubled = [one for one in comparison.differences if one.surplus and not one.is_unlisted]
    if not doubled:
        return None
    return (
        f"on {plural(len(doubled), 'line')} the meters count more than the gateways sent. If the"
        " metering API does not deduplicate, a redelivery bills events twice: check with"
        " `syncd doctor --probe`. --force redelivers anyway"
    )


def plan_redeliveries(
    differences: Iterable[Difference], max_requests: int = MAX_REQUESTS
) -> tuple[Redelivery, ...]:
    """Return the redeliveries of each gateway that delivered missing events: by subject, in merged hours.

    For a gateway with more than `max_requests` of them, request whole hours of all subjects instead.
    """
    wanted: defaultdict[str, defaultdict[str | None, dict[datetime, int]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for one in differences:
        for gateway, sent in one.gateways if one.missing else ():
            if sent.delivered:
                hours = wanted[gateway][one.line.subject]
                hours[one.line.hour] = hours.get(one.line.hour, 0) + one.missing
    planned: list[Redelivery] = []
    for gateway, subjects in sorted(wanted.items()):
        found = _of_gateway(gateway, subjects)
        planned += (
            found if len(found) <= max_requests else _of_gateway(gateway, {None: _summed(subjects.values())})
        )
    return tuple(planned)


def _of_gateway(gateway: str, subjects: Mapping[str | None, Mapping[datetime, int]]) -> list[Redelivery]:
    return [
        Redelivery(
            gateway, since, until, subject, sum(n for hour, n in hours.items() if since <= hour < until)
        )
        for subject, hours in sorted(subjects.items(), key=lambda item: item[0] or "")
        for since, until in spans(hours)
    ]


def _summed(found: Iterable[Mapping[datetime, int]]) -> dict[datetime, int]:
    sums: dict[datetime, int] = {}
    for hours in found:
        for hour, number in hours.items():
            sums[hour] = sums.get(hour, 0) + number
    return sums


def request(planned: Iterable[Redelivery], gateways: Sequence[Gateway]) -> tuple[Redelivery, ...]:
    """Request each redelivery; one that fails does not stop the others."""
    by_name = {gateway.name: gateway for gateway in gateways}
    return tuple(_request_one(one, by_name[one.gateway]) for one in planned)


def _request_one(planned: Redelivery, gateway: Gateway) -> Redelivery:
    try:
        answer = gateway.redeliver(planned.since, planned.until, planned.subject)
    except GatewayError as error:
        return replace(planned, state=RedeliveryState.FAILED, error=str(error))
    return replace(planned, state=RedeliveryState(answer.state), id=answer.id, sent=answer.sent)


def wait(
    requested: Iterable[Redelivery],
    gateways: Sequence[Gateway],
    timeout: float,
    *,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Redelivery, ...]:
    """Wait at most `timeout` seconds until each redelivery is done or has failed; return the last states."""
    by_name = {gateway.name: gateway for gateway in gateways}
    found, deadline, pause = list(requested), clock() + timeout, _FIRST_PAUSE
    while True:
        found = [
            _poll(one, by_name[one.gateway]) if one.state is RedeliveryState.WAITING else one for one in found
        ]
        left = deadline - clock()
        if left <= 0 or all(one.state is not RedeliveryState.WAITING for one in found):
            return tuple(_with_expected(one, by_name[one.gateway]) for one in found)
        sleep(min(pause, left))
        pause = min(2 * pause, _MAX_PAUSE)


def _poll(waiting: Redelivery, gateway: Gateway) -> Redelivery:
    try:
        answer = gateway.redelivery(waiting.id or 0)
    except GatewayError as error:
        return replace(waiting, state=RedeliveryState.FAILED, error=str(error))
    return replace(waiting, state=RedeliveryState(answer.state), sent=answer.sent)


def _with_expected(done: Redelivery, gateway: Gateway) -> Redelivery:
    """Return a finished redelivery with the number of events that the gateway delivered in its span."""
    if done.state is not RedeliveryState.DONE:
        return done
    try:
        lines = gateway.ledger(done.since, done.until, done.subject).lines
    except GatewayError as error:
        return replace(done, error=str(error))
    return replace(done, expected=sum(line.delivered for line in lines))


def without_effect(done: Iterable[Redelivery], differences: Iterable[Difference]) -> int:
    """Return how many events are still missing although they were sent again; `differences` are later ones.

    Events that a gateway no longer retains were not sent, so they are not among them.
    """
    ended = [one for one in done if one.state is RedeliveryState.DONE and one.sent]
    missing = sum(
        difference.missing for difference in differences if any(_covers(one, difference) for one in ended)
    )
    return max(0, missing - sum(one.gone for one in ended))


def _covers(one: Redelivery, difference: Difference) -> bool:
    line = difference.line
    gateways = {name for name, _ in difference.gateways}
    within = one.since <= line.hour < one.until and one.subject in (None, line.subject)
    return within and one.gateway in gateways
