"""GET /api/v1/events."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tests.syncd.sandbox.support import create_customer, event, listed, refused, send, tokens

NOW = datetime.now(UTC).replace(microsecond=0)


def ago(**distance: int) -> str:
    return (NOW - timedelta(**distance)).isoformat().replace("+00:00", "Z")


def ids(api: httpx.Client, **filters: str | int | list[str]) -> list[str]:
    return [item["event"]["id"] for item in listed(api, **filters)]


def test_an_event_is_listed_as_received_with_its_time_in_whole_seconds(api: httpx.Client) -> None:
    moment = NOW - timedelta(hours=1)
    local = moment.astimezone().isoformat(timespec="milliseconds")
    send(api, event("a", time=local.replace(".000", ".789"), data={"a": {"b": [1, 2.5, None]}}))
    [item] = listed(api)
    assert item["event"] == {
        "specversion": "1.0",
        "id": "a",
        "source": "kong",
        "type": "kong.api_request",
        "subject": "alice",
        "time": moment.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {"a": {"b": [1, 2.5, None]}},
    }


def test_an_event_without_a_time_gets_the_time_of_ingestion(api: httpx.Client) -> None:
    send(api, event("a"))
    [item] = listed(api)
    assert item["event"]["time"] == item["ingestedAt"] == item["storedAt"]
    assert abs(datetime.fromisoformat(item["ingestedAt"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_events_come_latest_first_up_to_the_limit(api: httpx.Client) -> None:
    send(api, *[event(f"{minutes:02}", time=ago(minutes=minutes)) for minutes in (3, 1, 2)])
    assert ids(api) == ["01", "02", "03"]
    assert ids(api, limit=2) == ["01", "02"]


@pytest.mark.parametrize("limit", [0, 101, -1, "many"])
def test_a_limit_outside_1_to_100_is_refused(api: httpx.Client, limit: object) -> None:
    assert '"limit" in query' in refused(api.get("/api/v1/events", params={"limit": str(limit)}), 400)


def test_from_is_inclusive_and_to_exclusive(api: httpx.Client) -> None:
    send(api, *[event(f"{minutes:02}", time=ago(minutes=minutes)) for minutes in (10, 20, 30)])
    assert ids(api, **{"from": ago(minutes=20)}) == ["10", "20"]
    assert ids(api, to=ago(minutes=20)) == ["30"]
    assert ids(api, **{"from": ago(minutes=30), "to": ago(minutes=10)}) == ["20", "30"]


def test_events_can_be_found_by_when_they_were_ingested(api: httpx.Client) -> None:
    send(api, event("a", time=ago(days=2)))
    assert ids(api, ingestedAtFrom=ago(minutes=5)) == ["a"]
    assert ids(api, ingestedAtTo=ago(minutes=5)) == []


def test_events_can_be_found_by_a_part_of_their_id(api: httpx.Client) -> None:
    send(api, event("request-1"), event("request-2"), event("100%"))
    assert ids(api, id="est-1") == ["request-1"]
    assert ids(api, id="%") == ["100%"]


def test_events_can_be_found_by_the_whole_subject_only(api: httpx.Client) -> None:
    send(api, event("a", subject="consumer:1"), event("b", subject="consumer:12"))
    assert ids(api, subject="consumer:1") == ["a"]


def test_events_older_than_32_days_are_not_listed_and_cannot_be_requested(api: httpx.Client) -> None:
    send(api, event("old", time=ago(days=33)), event("new", time=ago(days=31)))
    assert ids(api) == ["new"]
    assert "too old" in refused(api.get("/api/v1/events", params={"from": ago(days=33)}), 400)


def test_a_period_that_ends_before_it_begins_is_refused(api: httpx.Client) -> None:
    period = {"from": ago(minutes=1), "to": ago(minutes=2)}
    assert "to date is before from date" in refused(api.get("/api/v1/events", params=period), 400)


def test_an_invalid_time_is_refused(api: httpx.Client) -> None:
    assert '"from" in query' in refused(api.get("/api/v1/events", params={"from": "today"}), 400)


def test_an_event_without_a_customer_says_so_until_there_is_one(api: httpx.Client) -> None:
    send(api, event("a"))
    [before] = listed(api)
    assert before["validationError"] == "no customer found for event subject: alice"
    assert "customerId" not in before
    customer = create_customer(api, subjects=["alice"])
    [after] = listed(api)
    assert after["customerId"] == customer["id"]
    assert "validationError" not in after


def test_events_can_be_found_by_customer(api: httpx.Client) -> None:
    send(api, event("a", subject="a"), event("b", subject="b"), event("c", subject="c"))
    first, second = create_customer(api, "a"), create_customer(api, "b")
    assert ids(api, customerId=first["id"]) == ["a"]
    assert sorted(ids(api, customerId=[first["id"], second["id"]])) == ["a", "b"]


def test_an_unknown_customer_is_refused(api: httpx.Client) -> None:
    response = api.get("/api/v1/events", params={"customerId": "01G65Z755AFWAKHE12NY0CQ9FH"})
    assert "customers not found in namespace default: 01G65Z755AFWAKHE12NY0CQ9FH" in refused(response, 400)


def test_an_event_of_a_type_without_a_meter_says_so(api: httpx.Client) -> None:
    create_customer(api, subjects=["alice"])
    send(api, event("a", type="other"))
    assert listed(api)[0]["validationError"] == "no meter found for event type: other"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, 'missing value property: "$.tokens"'),
        ({"tokens": None}, "value cannot be null"),
        ({"tokens": "many"}, "value cannot be parsed as float64: many"),
        ({"tokens": True}, "unsupported value property type: bool"),
        (None, "null and missing value property"),
    ],
)
def test_an_event_that_its_meter_cannot_count_says_why(
    api: httpx.Client, data: dict[str, object] | None, reason: str
) -> None:
    create_customer(api, subjects=["alice"])
    send(api, tokens("a", 1, data=data))
    assert listed(api)[0]["validationError"] == f"invalid event: {reason}"


def test_all_errors_of_an_event_are_listed_line_by_line(api: httpx.Client) -> None:
    send(api, tokens("a", "x"))
    assert listed(api)[0]["validationError"].splitlines() == [
        "invalid event: value cannot be parsed as float64: x",
        "no customer found for event subject: alice",
    ]
