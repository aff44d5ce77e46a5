"""Audit runs part by part, and their patience with late events."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from syncd.audit.books import OtherDestination
from syncd.audit.compare import HOUR, GatewayBooks, Line, Sent, Yardstick, compare
from syncd.audit.run import MANY_LINES, Audit, AuditRun, Reader, Reading

START = datetime(2026, 11, 20, 5, tzinfo=UTC)
DAY = timedelta(days=1)
KIND = "kong.api_request"
USED = Yardstick(KIND, "requests")


@dataclass
class Late:
    """One event in the first hour of each part, counted after that part has been read `late` times."""

    late: dict[datetime, int] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)
    read_spans: list[tuple[datetime, datetime]] = field(default_factory=list)
    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def read(self, since: datetime, until: datetime) -> Reading:
        before = sum(span[0] == since for span in self.read_spans)
        self.read_spans.append((since, until))
        line = Line(since, KIND, "alice")
        counted = {line: 1} if before >= self.late.get(since, 0) else {}
        books = [GatewayBooks("east", {line: Sent(1)})]
        comparison = compare(since, until, books, counted, {KIND: USED})
        lines = self.lines.pop(0) if self.lines else 1
        return Reading(comparison, (OtherDestination("east", "d", "http://other", 2),), (USED,), lines)

    def parts(self) -> list[int]:
        """The number of hours of each part, in order."""
        return [(until - since) // HOUR for since, until in self.read_spans]

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def run(self, until: datetime, settle: float) -> AuditRun:
        reader = cast("Reader", self)
        return AuditRun(reader, START, until, settle, sleep=self.sleep, clock=lambda: self.now)


def test_parts_grow_up_to_a_day_if_ledgers_are_short() -> None:
    world = Late()
    world.run(START + 4 * DAY, settle=0).audit()
    assert world.parts() == [1, 2, 4, 8, 16, 24, 24, 17]
    assert [until for _, until in world.read_spans[:-1]] == [since for since, _ in world.read_spans[1:]]


def test_parts_shrink_down_to_an_hour_if_ledgers_are_long() -> None:
    much = [1, 1, MANY_LINES + 1, MANY_LINES, MANY_LINES + 1, MANY_LINES + 1]
    world = Late(lines=much)
    world.run(START + 14 * HOUR, settle=0).audit()
    assert world.parts() == [1, 2, 4, 2, 2, 1, 1, 1]


def test_only_parts_with_missing_events_are_read_again_until_none_is_missing() -> None:
    world = Late({START + HOUR: 2})
    audit = world.run(START + 7 * HOUR, settle=60).audit()
    assert audit.is_equal
    assert world.parts() == [1, 2, 4, 2, 2]
    assert audit.comparison.totals[KIND].counted == 3
    assert audit.other_destinations == (OtherDestination("east", "d", "http://other", 6),)


@pytest.mark.parametrize("settle", [0.0, 3.0, 30.0])
def test_events_that_do_not_arrive_in_time_are_missing(settle: float) -> None:
    world = Late({START: 10**6})
    audit = world.run(START + HOUR, settle).audit()
    assert audit.comparison.missing == 1
    assert sum(world.pauses) == settle


def test_again_reads_at_least_once_however_short_the_time() -> None:
    world = Late({START: 1})
    run = world.run(START + 3 * HOUR, settle=0)
    assert not run.audit().is_equal
    assert run.again().is_equal
    assert len(world.read_spans) == 3


def test_a_span_of_which_no_hour_could_be_compared_is_not_called_equal() -> None:
    until = START + 2 * HOUR
    hours = [START, START + HOUR]
    for waiting in (hours, hours[:1]):
        books = [GatewayBooks("east", {}, dict.fromkeys(waiting, "events wait"))]
        audit = Audit(compare(START, until, books, {}, {KIND: USED}), (), (USED,))
        assert audit.is_equal
        assert ("no hour of the span" in (audit.incomparable_reason or "")) is (waiting == hours)
