"""Comparison of ledgers with meters: lines compared, lines left out, and kinds of differences."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.audit.compare import (
    HOUR,
    Difference,
    GatewayBooks,
    Line,
    Sent,
    Totals,
    Yardstick,
    compare,
    joined,
    spans,
    whole_hours,
)
from syncd.audit.redelivery import Redelivery, double_billing_risk, plan_redeliveries

pytestmark = pytest.mark.slow

START = datetime(2026, 11, 22, 7, tzinfo=UTC)
HOURS = [START + n * HOUR for n in range(4)]
END = START + 4 * HOUR
REQUEST, TOKENS = "kong.api_request", "kong.llm_request"
EXACT = {REQUEST: Yardstick(REQUEST, "requests"), TOKENS: Yardstick(TOKENS, "events")}

lines = st.builds(
    Line, st.sampled_from(HOURS), st.sampled_from([REQUEST, TOKENS]), st.sampled_from(["alice", "bob"])
)
numbers = st.integers(0, 5)
books = st.dictionaries(lines, st.builds(Sent, numbers, numbers, numbers), max_size=6)
gateways = st.lists(books, min_size=1, max_size=3).map(
    lambda found: [GatewayBooks(f"gateway-{n}", one) for n, one in enumerate(found)]
)
meters = st.dictionaries(lines, st.integers(0, 30), max_size=6)


def line(subject: str = "alice", hour: int = 0, kind: str = REQUEST) -> Line:
    return Line(HOURS[hour], kind, subject)


def one(sent: Sent, counted: int, *, exact: bool = True) -> Difference | None:
    """The difference on a line of one gateway."""
    used = {REQUEST: Yardstick(REQUEST, "requests", exact)}
    found = compare(START, END, [GatewayBooks("east", {line(): sent})], {line(): counted}, used)
    return found.differences[0] if found.differences else None


def summed(found: list[GatewayBooks]) -> dict[Line, Sent]:
    sums: dict[Line, Sent] = {}
    for gateway in found:
        for key, sent in gateway.lines.items():
            sums[key] = sums.get(key, Sent()).plus(sent)
    return sums


@given(gateways, st.data())
def test_lost_and_added_events_are_found_exactly(found: list[GatewayBooks], data: st.DataObject) -> None:
    sent = summed(found)
    lost = {key: data.draw(st.integers(0, sent[key].delivered)) for key in sent}
    added = {key: data.draw(numbers) if not lost.get(key) else 0 for key in sent | dict.fromkeys([line()])}
    counted = {
        key: sent.get(key, Sent()).delivered - lost.get(key, 0) + added.get(key, 0) for key in sent | added
    }
    result = {found.line: found for found in compare(START, END, found, counted, EXACT).differences}
    for key in sent | added:
        _, dead, gone = sent.get(key, Sent())
        rest = max(0, added[key] - dead)
        expected = (lost.get(key, 0), max(0, dead - added[key]), max(0, gone - rest), max(0, rest - gone))
        item = result.get(key)
        seen = (item.missing, item.refused, item.lost, item.surplus) if item else (0, 0, 0, 0)
        assert seen == expected, key


@given(gateways, meters)
def test_every_difference_accounts_for_every_event(
    found: list[GatewayBooks], counted: dict[Line, int]
) -> None:
    result = compare(START, END, found, counted, EXACT)
    items: list[Difference | Totals] = [*result.differences, *result.totals.values()]
    for item in items:
        sent = item.delivered + item.dead_lettered + item.gone
        assert item.counted == sent - item.missing - item.refused - item.lost + item.surplus
    assert sum(total.counted for total in result.totals.values()) == sum(counted.values())
    assert sum(total.delivered for total in result.totals.values()) == sum(
        sent.delivered for sent in summed(found).values()
    )


@given(gateways, meters)
def test_the_split_of_events_over_gateways_changes_nothing_but_their_names(
    found: list[GatewayBooks], counted: dict[Line, int]
) -> None:
    spread = compare(START, END, found, counted, EXACT)
    alone = compare(START, END, [GatewayBooks("all", summed(found))], counted, EXACT)
    backwards = compare(START, END, found[::-1], counted, EXACT)
    assert spread.totals == alone.totals == backwards.totals
    assert [item.line for item in spread.differences] == [item.line for item in alone.differences]
    for item in spread.differences:
        own = {gateway.gateway: gateway.lines.get(item.line, Sent()) for gateway in found}
        assert dict(item.gateways) == {name: sent for name, sent in own.items() if any(sent)}


@given(gateways, meters, st.sets(st.sampled_from(HOURS)))
def test_hour_by_hour_is_the_same_as_all_at_once(
    found: list[GatewayBooks], counted: dict[Line, int], open_hours: set[datetime]
) -> None:
    found = [GatewayBooks("open", {}, dict.fromkeys(open_hours, "events wait")), *found]
    whole = compare(START, END, found, counted, EXACT)
    assert joined(compare(hour, hour + HOUR, found, counted, EXACT) for hour in HOURS) == whole


@given(gateways, meters, st.sets(st.sampled_from(HOURS)))
def test_an_open_hour_of_any_gateway_is_left_out_and_no_other(
    found: list[GatewayBooks], counted: dict[Line, int], open_hours: set[datetime]
) -> None:
    closed = compare(START, END, found, counted, EXACT)
    opened = GatewayBooks("open", {}, dict.fromkeys(open_hours, "events wait"))
    result = compare(START, END, [*found, opened], counted, EXACT)
    assert set(result.left_out) == open_hours
    assert result.hours_compared == 4 - len(open_hours)
    assert list(result.differences) == [
        item for item in closed.differences if item.line.hour not in open_hours
    ]


def test_a_refused_event_that_is_counted_is_no_difference() -> None:
    assert one(Sent(5, 2), 7) is None
    assert one(Sent(5, 2), 5) == Difference(line(), 5, 2, 0, 5, 0, 2, 0, 0, (("east", Sent(5, 2)),))


def test_events_that_were_never_sent_differ_from_events_counted_twice() -> None:
    twice, strange = one(Sent(5), 6), one(Sent(), 6)
    assert twice is not None
    assert strange is not None
    assert (twice.is_unlisted, strange.is_unlisted) == (False, True)


def test_a_meter_that_does_not_count_events_only_shows_whether_there_are_any() -> None:
    assert one(Sent(5), 1, exact=False) is None
    assert one(Sent(5), 900, exact=False) is None
    nothing, unlisted = one(Sent(5), 0, exact=False), one(Sent(), 900, exact=False)
    assert nothing is not None
    assert unlisted is not None
    assert (nothing.missing, unlisted.surplus) == (5, 1)


def test_events_that_no_meter_counts_are_reported_with_their_number() -> None:
    found = [
        GatewayBooks("east", {line(kind="other"): Sent(3, 1), line(hour=1): Sent(2), line(hour=2): Sent(4)})
    ]
    used = {REQUEST: Yardstick(REQUEST, "requests", since=HOURS[2])}
    result = compare(START, END, found, {line(hour=2): 4}, used)
    assert result.not_compared == {"other": 4, REQUEST: 2}
    assert result.differences == ()
    assert result.totals == {REQUEST: Totals(delivered=4, counted=4)}


# The span


def test_a_span_is_widened_to_whole_hours_and_ends_before_the_current_one() -> None:
    now = START + timedelta(minutes=59)
    day = timedelta(days=1)
    assert whole_hours(None, None, now, day) == (START - day, START)
    assert whole_hours(START - timedelta(minutes=61), None, now, day) == (START - 2 * HOUR, START)
    assert whole_hours(None, START - timedelta(minutes=61), now, day) == (START - HOUR - day, START - HOUR)
    assert whole_hours(None, START + 9 * HOUR, now, day)[1] == START
    elsewhere = timezone(timedelta(hours=5, minutes=30))
    assert whole_hours((START - 3 * HOUR).astimezone(elsewhere), None, now, day)[0] == START - 3 * HOUR


@given(st.sets(st.sampled_from(range(12))))
def test_hours_are_merged_into_spans_that_do_not_touch(numbers: set[int]) -> None:
    found = spans(START + n * HOUR for n in numbers)
    covered = {start + n * HOUR for start, end in found for n in range((end - start) // HOUR)}
    assert covered == {START + n * HOUR for n in numbers}
    assert all(end < start for (_, end), (start, _) in pairwise(found))


# Redeliveries


def covers(planned: Redelivery, key: Line) -> bool:
    return planned.since <= key.hour < planned.until and planned.subject in (None, key.subject)


@given(gateways, meters, st.integers(0, 4))
def test_exactly_the_missing_events_are_requested_once_from_each_gateway_that_delivered_them(
    found: list[GatewayBooks], counted: dict[Line, int], most: int
) -> None:
    differences = compare(START, END, found, counted, EXACT).differences
    planned = plan_redeliveries(differences, most)
    missing = [item for item in differences if item.missing]
    for item in missing:
        for gateway, sent in item.gateways:
            fitting = [one for one in planned if one.gateway == gateway and covers(one, item.line)]
            assert len(fitting) == 1 or (not sent.delivered and fitting == [])
    for one in planned:
        hours = [one.since + n * HOUR for n in range((one.until - one.since) // HOUR)]
        for hour in hours:
            wanted = [
                item
                for item in missing
                if item.line.hour == hour
                and covers(one, item.line)
                and any(name == one.gateway and sent.delivered for name, sent in item.gateways)
            ]
            assert wanted, (one, hour)
    for gateway, number in Counter(one.gateway for one in planned).items():
        if number > most:
            assert {one.subject for one in planned if one.gateway == gateway} == {None}


def test_adjoining_hours_of_a_subject_are_one_request() -> None:
    found = [GatewayBooks("east", {line(hour=n): Sent(2) for n in (0, 1, 3)} | {line("bob", 1): Sent(1)})]
    planned = plan_redeliveries(compare(START, END, found, {}, EXACT).differences)
    assert [(one.subject, one.since, one.until, one.missing) for one in planned] == [
        ("alice", HOURS[0], HOURS[2], 4),
        ("alice", HOURS[3], END, 2),
        ("bob", HOURS[1], HOURS[2], 1),
    ]


def test_a_gateway_that_delivered_none_of_the_missing_events_gets_no_request() -> None:
    found = [GatewayBooks("east", {line(): Sent(0, 2)}), GatewayBooks("west", {line(): Sent(1)})]
    planned = plan_redeliveries(compare(START, END, found, {}, EXACT).differences)
    assert [one.gateway for one in planned] == ["west"]


@pytest.mark.parametrize(("counted", "is_safe"), [(1, True), (2, True), (3, False)])
def test_a_surplus_stops_redeliveries(counted: int, is_safe: bool) -> None:
    found = [GatewayBooks("east", {line(): Sent(2), line("bob"): Sent(1)})]
    values = {line(): counted, line("stranger"): 5}
    assert (double_billing_risk(compare(START, END, found, values, EXACT)) is None) == is_safe
