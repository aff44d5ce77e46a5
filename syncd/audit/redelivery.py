"""Having the gateways send the missing events again: what to ask for, asking, and what came of it.

A redelivery sends everything that the gateway retains of a span of event time, of one subject or of all: also
what is counted already, which a metering API that deduplicates counts no second time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from syncd.audit.compare import Comparison, Difference, spans
from syncd.core.errors import GatewayError
from syncd.gateways.client import Gateway
from syncd.runs.unbilled import rfc3339

MOST_REQUESTS = 200
"""To one gateway: each makes it look through its spool, so beyond that whole hours are asked for."""
_FIRST_PAUSE, _MAX_PAUSE = 0.2, 2.0


class RedeliveryState(StrEnum):
    """How far a redelivery is."""

    PLANNED = "planned"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Redelivery:
    """Asked of one gateway: a span, `subject` None for all, and the events that are missing of it.

    `expected` are all events that the gateway delivered of the span; those that were not `sent` again are
    no longer retained there.
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
        """Return how many events cannot be sent again."""
        return max(0, self.expected - self.sent) if self.expected is not None else 0

    def to_json(self) -> dict[str, object]:
        """Return it as in ``syncd audit --json``."""
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


def why_not(comparison: Comparison) -> str | None:
    """Say why sending again could count events twice; None where nothing hints at that."""
    doubled = [one for one in comparison.differences if one.surplus and not one.is_unlisted]
    if not doubled:
        return None
    return (
        f"on {len(doubled)} lines more is counted than the gateways have sent. If the metering API does not"
        " deduplicate, sending again bills twice: `syncd doctor --probe` tells. --force asks nevertheless"
    )


def plan_redeliveries(differences: Iterable[Difference], most: int = MOST_REQUESTS) -> tuple[Redelivery, ...]:
    """Return what to ask for, of each gateway that delivered such events: by subject, adjoining hours merged.

    Of a gateway with more than `most` of them, whole hours are asked for, of all subjects.
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
        planned += found if len(found) <= most else _of_gateway(gateway, {None: _summed(subjects.values())})
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


def ask(planned: Iterable[Redelivery], gateways: Sequence[Gateway]) -> tuple[Redelivery, ...]:
    """Ask for each; one that fails holds up no other."""
    by_name = {gateway.name: gateway for gateway in gateways}
    return tuple(_asked(one, by_name[one.gateway]) for one in planned)


def _asked(planned: Redelivery, gateway: Gateway) -> Redelivery:
    try:
        answer = gateway.redeliver(planned.since, planned.until, planned.subject)
    except GatewayError as error:
        return replace(planned, state=RedeliveryState.FAILED, error=str(error))
    return replace(planned, state=RedeliveryState(answer.state), id=answer.id, sent=answer.sent)


def wait(
    asked: Iterable[Redelivery],
    gateways: Sequence[Gateway],
    timeout: float,
    *,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Redelivery, ...]:
    """Return them once each is done or has failed, or after `timeout` seconds as they are then."""
    by_name = {gateway.name: gateway for gateway in gateways}
    found, deadline, pause = list(asked), clock() + timeout, _FIRST_PAUSE
    while True:
        found = [
            _seen(one, by_name[one.gateway]) if one.state is RedeliveryState.WAITING else one for one in found
        ]
        left = deadline - clock()
        if left <= 0 or all(one.state is not RedeliveryState.WAITING for one in found):
            return tuple(_counted(one, by_name[one.gateway]) for one in found)
        sleep(min(pause, left))
        pause = min(2 * pause, _MAX_PAUSE)


def _seen(waiting: Redelivery, gateway: Gateway) -> Redelivery:
    try:
        answer = gateway.redelivery(waiting.id or 0)
    except GatewayError as error:
        return replace(waiting, state=RedeliveryState.FAILED, error=str(error))
    return replace(waiting, state=RedeliveryState(answer.state), sent=answer.sent)


def _counted(done: Redelivery, gateway: Gateway) -> Redelivery:
    """Return what was done with how many events the gateway had delivered of it, of all types."""
    if done.state is not RedeliveryState.DONE:
        return done
    try:
        lines = gateway.ledger(done.since, done.until, done.subject).lines
    except GatewayError as error:
        return replace(done, error=str(error))
    return replace(done, expected=sum(line.delivered for line in lines))
