"""Usage of a plan: looks up unbilled usage, and the events that the changes of a plan concern.

If the metering API lacks these meters, or the token may not read them, the run continues: the figures
are missing, and a note says why.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from syncd.core.changes import REMOVALS, Change, ChangeKind, MovedUsage, Plan
from syncd.core.errors import ApiError, MeterMissingError, UnreliableApiError
from syncd.core.model import ObservedState
from syncd.core.unbilled import (
    WINDOW,
    IgnoredSubject,
    UnbilledSubject,
    UnbilledUsage,
    first_day,
    unbilled_usage,
)
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER, owners, rfc3339, whole

_QUICK_SECONDS = 1.0
_KINDS_WITH_EVENTS = REMOVALS | {ChangeKind.MOVE_SUBJECTS, ChangeKind.BLOCKED}


class UsageReader(Protocol):
    """Reads meters: a metering API that is asked once, with a short limit (`factory.usage_reader_of`)."""

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        """Return the value of a meter for each subject; raises ApiError or MeterMissingError."""


def with_usage(
    plan: Plan,
    target: UsageReader,
    observed: ObservedState,
    now: datetime,
    ignored: Mapping[str, str] = {},
) -> Plan:
    """Return the plan with unbilled usage, and with the usage that its changes move or leave unbilled.

    `ignored` are the subjects that are meant to be unbilled, with the reason of each.
    """
    start = (now - WINDOW).astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    began = time.monotonic()
    try:
        requests = target.usage(REQUESTS_METER, rfc3339(start), None)
        tokens = target.usage(TOKENS_METER, rfc3339(start), None)
        attributed = frozenset(owners(observed.customers))
        known = attributed | ignored.keys()
        unbilled = _unbilled(plan, target, known, requests, tokens, start, began)
        aside = unbilled_usage(requests, tokens, attributed, (), ())
        unbilled = replace(
            unbilled,
            ignored=tuple(
                IgnoredSubject(subject.key, subject.events, subject.tokens, ignored[subject.key])
                for subject in aside
                if subject.key in ignored
            ),
        )
    except UnreliableApiError:
        raise
    except (ApiError, MeterMissingError) as error:
        note = f"unbilled usage is unknown: {error}"
        return replace(plan, notes=(*plan.notes, note))
    changes = tuple(_with_events(change, requests, attributed, rfc3339(start)) for change in plan.changes)
    return replace(plan, changes=changes, unbilled=unbilled)


def _unbilled(
    plan: Plan,
    target: UsageReader,
    attributed: frozenset[str],
    requests: Mapping[str, float],
    tokens: Mapping[str, float],
    start: datetime,
    began: float,
) -> UnbilledUsage:
    planned = (
        key
        for change in (*plan.of(ChangeKind.CREATE_CUSTOMER), *plan.of(ChangeKind.ATTACH_SUBJECTS))
        for key in change.subject_keys
    )
    blocked = plan.of(ChangeKind.BLOCKED)
    open_keys = {key for change in blocked if not change.settled for key in change.subject_keys}
    blocked_keys = {key for change in blocked for key in change.subject_keys}
    subjects = unbilled_usage(requests, tokens, attributed, planned, blocked_keys, blocked_keys - open_keys)
    # The first day takes five more queries: a slow server is not asked for it.
    is_quick = time.monotonic() - began < _QUICK_SECONDS
    since = rfc3339(_since(target, subjects, start)) if subjects and is_quick else None
    return UnbilledUsage(subjects, rfc3339(start), since)


def _since(target: UsageReader, subjects: tuple[UnbilledSubject, ...], start: datetime) -> datetime:
    counted = {subject.key for subject in subjects if subject.events}
    meter = REQUESTS_METER if counted else TOKENS_METER
    counted = counted or {subject.key for subject in subjects}

    def used_until(end: datetime) -> bool:
        return not counted.isdisjoint(target.usage(meter, rfc3339(start), rfc3339(end)))

    return first_day(start, WINDOW // timedelta(days=1) + 1, used_until)


def _with_events(
    change: Change, requests: Mapping[str, float], attributed: frozenset[str], since: str
) -> Change:
    keys: Iterable[str] = change.subject_keys
    if change.kind is ChangeKind.BLOCKED:
        # A subject that a customer carries today is billed to that customer, whatever is blocked.
        keys = [key for key in keys if key not in attributed]
    if change.kind not in _KINDS_WITH_EVENTS or not keys:
        return change
    events = whole(sum(requests.get(key, 0) for key in keys))
    return replace(change, usage=MovedUsage(events, since))
