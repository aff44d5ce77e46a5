"""GET /api/v1/meters/{idOrSlug}/query."""

from typing import Any

import httpx
import pytest

from tests.syncd.sandbox.support import create_customer, event, ok, refused, send, tokens, total, usage


def at(*times: str) -> list[dict[str, Any]]:
    return [event(time, time=time) for time in times]


def windows(rows: list[dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(row["windowStart"], row["windowEnd"], row["value"]) for row in rows]


def by_customer(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["customerId"]: row["value"] for row in rows}


def test_the_answer_repeats_what_was_asked(api: httpx.Client) -> None:
    asked = {"from": "2026-01-01T00:00:00.000Z", "to": "2026-01-02T01:00:00+01:00", "windowSize": "HOUR"}
    assert ok(api.get("/api/v1/meters/kong_api_requests/query", params=asked)) == asked | {"data": []}


def test_a_row_has_all_its_fields(api: httpx.Client) -> None:
    send(api, *at("2026-01-01T10:20:30Z", "2026-01-01T11:20:59.999Z"))
    assert usage(api) == [
        {
            "value": 2,
            "windowStart": "2026-01-01T10:20:00Z",
            "windowEnd": "2026-01-01T11:21:00Z",
            "subject": None,
            "groupBy": {},
        }
    ]


def test_without_windows_the_row_spans_the_period_asked_for(api: httpx.Client) -> None:
    send(api, *at("2026-01-01T10:20:30Z"))
    period = {"from": "2026-01-01T00:00:00Z", "to": "2026-02-01T00:00:00Z"}
    assert windows(usage(api, **period)) == [(period["from"], period["to"], 1)]


def test_from_is_inclusive_and_to_exclusive(api: httpx.Client) -> None:
    send(api, *at("2026-01-01T10:00:00Z", "2026-01-01T11:00:00Z", "2026-01-01T12:00:00Z"))
    assert total(api, **{"from": "2026-01-01T10:00:00Z", "to": "2026-01-01T12:00:00Z"}) == [2]
    assert total(api, **{"from": "2026-01-01T13:00:00+02:00"}) == [2]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("MINUTE", [("10:59:00", "11:00:00", 1), ("11:00:00", "11:01:00", 2)]),
        ("HOUR", [("10:00:00", "11:00:00", 1), ("11:00:00", "12:00:00", 2)]),
    ],
)
def test_short_windows_hold_their_events(
    api: httpx.Client, size: str, expected: list[tuple[str, str, int]]
) -> None:
    send(api, *at("2026-01-01T10:59:59Z", "2026-01-01T11:00:00Z", "2026-01-01T11:00:59Z"))
    assert windows(usage(api, windowSize=size)) == [
        (f"2026-01-01T{start}Z", f"2026-01-01T{end}Z", count) for start, end, count in expected
    ]


def test_days_begin_at_midnight_of_the_time_zone_whatever_their_length(api: httpx.Client) -> None:
    # Paris left winter time on 29 March 2026: that day has 23 hours.
    send(
        api,
        *at("2026-03-28T22:59:59Z", "2026-03-28T23:00:00Z", "2026-03-29T21:59:59Z", "2026-03-29T22:00:00Z"),
    )
    assert windows(usage(api, windowSize="DAY", windowTimeZone="Europe/Paris")) == [
        ("2026-03-27T23:00:00Z", "2026-03-28T23:00:00Z", 1),
        ("2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z", 2),
        ("2026-03-29T22:00:00Z", "2026-03-30T22:00:00Z", 1),
    ]


def test_months_follow_the_calendar(api: httpx.Client) -> None:
    send(api, *at("2026-01-31T23:59:59Z", "2026-02-01T00:00:00Z", "2026-12-31T12:00:00Z"))
    assert windows(usage(api, windowSize="MONTH")) == [
        ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z", 1),
        ("2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z", 1),
        ("2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z", 1),
    ]


def test_hours_of_a_half_hour_zone_begin_at_half_past(api: httpx.Client) -> None:
    send(api, *at("2026-01-01T10:29:59Z", "2026-01-01T10:30:00Z"))
    assert windows(usage(api, windowSize="HOUR", windowTimeZone="Asia/Kolkata")) == [
        ("2026-01-01T09:30:00Z", "2026-01-01T10:30:00Z", 1),
        ("2026-01-01T10:30:00Z", "2026-01-01T11:30:00Z", 1),
    ]


def test_a_customer_is_reached_by_its_key_and_its_subjects_but_not_by_its_id(api: httpx.Client) -> None:
    customer = create_customer(api, key="the-key", subjects=["s1", "s2"])
    for number, subject in enumerate([customer["id"], "the-key", "s1", "s2", "stranger"]):
        send(api, event(str(number), subject=subject))
    assert by_customer(usage(api, filterCustomerId=customer["id"])) == {customer["id"]: 3}


def test_a_subject_that_is_also_the_key_counts_once(api: httpx.Client) -> None:
    customer = create_customer(api, key="alice", subjects=["alice"])
    send(api, event("a", subject="alice"))
    assert total(api, filterCustomerId=customer["id"]) == [1]


def test_past_usage_moves_with_the_subject(api: httpx.Client) -> None:
    old = create_customer(api, "old", key="old", subjects=["s"])
    new = create_customer(api, "new", key="new")
    send(api, event("a", subject="s"))
    both: dict[str, Any] = {"filterCustomerId": [old["id"], new["id"]]}
    assert by_customer(usage(api, **both)) == {old["id"]: 1}
    ok(api.put("/api/v1/customers/old", json={"name": "old", "key": "old"}))
    assert usage(api, **both) == []
    body = {"name": "new", "key": "new", "usageAttribution": {"subjectKeys": ["s"]}}
    ok(api.put("/api/v1/customers/new", json=body))
    assert by_customer(usage(api, **both)) == {new["id"]: 1}


def test_each_window_is_split_by_customer(api: httpx.Client) -> None:
    first, second = create_customer(api, "a"), create_customer(api, "b")
    send(api, event("1", subject="a"), event("2", subject="b"), event("3", subject="b"))
    rows = usage(api, filterCustomerId=[first["id"], second["id"]], windowSize="DAY")
    assert by_customer(rows) == {first["id"]: 1, second["id"]: 2}


def test_grouping_by_customer_needs_customers_to_filter_by(api: httpx.Client) -> None:
    response = api.get("/api/v1/meters/kong_api_requests/query", params={"groupBy": "customer_id"})
    assert "customer filter is required with customer_id group by" in refused(response, 400)


def test_an_unknown_or_deleted_customer_is_a_404(api: httpx.Client) -> None:
    customer = create_customer(api, "a")
    api.delete("/api/v1/customers/a")
    for customer_id in (customer["id"], "01G65Z755AFWAKHE12NY0CQ9FH"):
        response = api.get("/api/v1/meters/kong_api_requests/query", params={"filterCustomerId": customer_id})
        assert f"customer with id {customer_id} not found" in refused(response, 404)


def test_subjects_filter_and_group(api: httpx.Client) -> None:
    send(api, event("1", subject="a"), event("2", subject="b"), event("3", subject="c"))
    assert [(row["subject"], row["value"]) for row in usage(api, subject=["a", "c"])] == [("a", 1), ("c", 1)]


def test_a_customer_and_a_subject_are_both_required_to_match(api: httpx.Client) -> None:
    customer = create_customer(api, key="k", subjects=["a", "b"])
    send(api, event("1", subject="a"), event("2", subject="b"))
    [row] = usage(api, filterCustomerId=customer["id"], subject="a")
    assert (row["subject"], row["customerId"], row["value"]) == ("a", customer["id"], 1)


def test_groups_are_text_whatever_they_were_in_the_event(api: httpx.Client) -> None:
    values = [200, "200", True, 1.5, None, {"a": 1}]
    send(api, event("none", data={}), *[event(str(n), data={"status": v}) for n, v in enumerate(values)])
    rows = {row["groupBy"]["status"]: row["value"] for row in usage(api, groupBy="status")}
    assert rows == {"200": 2, "true": 1, "1.5": 1, "null": 1, "": 2}


def test_several_groups_are_combined(api: httpx.Client) -> None:
    data = [
        {"model": "m", "type": "input"},
        {"model": "m", "type": "output"},
        {"model": "n", "type": "input"},
    ]
    send(
        api, *[tokens(str(number), 0, data=groups | {"tokens": number}) for number, groups in enumerate(data)]
    )
    rows = usage(api, "kong_llm_tokens", groupBy=["model", "type", "subject"])
    assert [(row["groupBy"], row["value"], row["subject"]) for row in rows] == [
        ({"model": "m", "type": "input"}, 0, "alice"),
        ({"model": "m", "type": "output"}, 1, "alice"),
        ({"model": "n", "type": "input"}, 2, "alice"),
    ]


def test_groups_can_be_filtered_by_without_being_shown(api: httpx.Client) -> None:
    for number, (status, route) in enumerate([(200, "r"), (200, "r"), (500, "r"), (200, "other")]):
        send(api, event(str(number), data={"status": status, "route_name": route}))
    [row] = usage(api, **{"filterGroupBy[status]": "200", "filterGroupBy[route_name]": "r"})
    assert (row["value"], row["groupBy"]) == (2, {})


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"groupBy": "colour"}, "invalid group by: colour"),
        ({"filterGroupBy[colour]": "red"}, "invalid group by filter: colour"),
        ({"windowSize": "YEAR"}, '"windowSize" in query'),
        ({"windowTimeZone": "Mars/Olympus"}, "invalid time zone"),
        ({"windowTimeZone": "../etc/passwd"}, "invalid time zone"),
        ({"from": "2026-01-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, "cannot be equal"),
        ({"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, "from must be before to"),
        ({"from": "today"}, '"from" in query'),
        ({"advancedMeterGroupByFilters": "{}"}, "advancedMeterGroupByFilters"),
    ],
)
def test_an_invalid_query_is_refused(api: httpx.Client, parameters: dict[str, str], reason: str) -> None:
    assert reason in refused(api.get("/api/v1/meters/kong_api_requests/query", params=parameters), 400)
