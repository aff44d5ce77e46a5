"""POST /api/v1/events."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from syncd.sandbox.cloudevents import is_uri_reference
from syncd.sandbox.testing import running_sandbox
from tests.syncd.sandbox.support import BATCH, SINGLE, event, listed, ok, refused, send, stored_ids, total


def test_a_batch_is_stored_and_answered_with_204(api: httpx.Client) -> None:
    response = send(api, event("a"), event("b"))
    assert (response.status_code, response.content) == (204, b"")
    assert stored_ids(api) == {"a", "b"}


def test_a_single_event_is_stored(api: httpx.Client) -> None:
    response = api.post("/api/v1/events", json=event("a"), headers={"content-type": SINGLE})
    assert response.status_code == 204
    assert stored_ids(api) == {"a"}


@pytest.mark.parametrize("body", [event("a"), [event("a")]])
def test_plain_json_may_be_one_event_or_an_array(api: httpx.Client, body: Any) -> None:
    assert api.post("/api/v1/events", json=body).status_code == 204
    assert stored_ids(api) == {"a"}


def test_plain_json_without_any_event_is_refused_but_an_empty_batch_is_not(api: httpx.Client) -> None:
    assert "no events found" in refused(api.post("/api/v1/events", json=[]), 400)
    assert send(api).status_code == 204


@pytest.mark.parametrize("content_type", [f"{BATCH}; charset=utf-8", BATCH.upper(), "text/plain", ""])
def test_a_content_type_that_is_not_exactly_one_of_the_three_is_refused(
    api: httpx.Client, content_type: str
) -> None:
    assert "content" in refused(send(api, event("a"), content_type=content_type), 400).lower()
    assert stored_ids(api) == set()


@pytest.mark.parametrize("body", [b"{", b"\xff", b"", b"[NaN]"])
def test_malformed_json_is_refused(api: httpx.Client, body: bytes) -> None:
    refused(api.post("/api/v1/events", content=body, headers={"content-type": BATCH}), 400)


def test_a_batch_must_be_an_array(api: httpx.Client) -> None:
    response = api.post("/api/v1/events", json=event("a"), headers={"content-type": BATCH})
    assert "must be an array" in refused(response, 400)


@pytest.mark.parametrize("name", ["id", "source", "specversion", "type", "subject"])
@pytest.mark.parametrize("value", [None, "", 7])
def test_an_event_needs_its_required_attributes(api: httpx.Client, name: str, value: object) -> None:
    assert f'"/0/{name}"' in refused(send(api, event("a", **{name: value})), 400)
    assert stored_ids(api) == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time", "yesterday"),
        ("time", "2026-01-01"),
        ("time", "2026-01-01T00:00:00"),
        ("time", "2026-02-30T00:00:00Z"),
        ("time", 1767225600),
        ("data", [1]),
        ("data", "text"),
        ("datacontenttype", "text/plain"),
    ],
)
def test_an_event_with_a_wrong_attribute_is_refused(api: httpx.Client, name: str, value: object) -> None:
    assert f'"/0/{name}"' in refused(send(api, event("a", **{name: value})), 400)


def test_optional_attributes_may_be_null(api: httpx.Client) -> None:
    nulls = {"time": None, "data": None, "datacontenttype": None, "dataschema": None}
    assert send(api, event("a") | nulls).status_code == 204
    assert "data" not in listed(api)[0]["event"]


@pytest.mark.parametrize("bad", [event("bad", subject=None), event("bad", source="10.0.0.1:8000")])
def test_one_bad_event_refuses_the_whole_batch(api: httpx.Client, bad: dict[str, Any]) -> None:
    refused(send(api, event("a"), event("b"), bad, event("c")), 400)
    assert stored_ids(api) == set()


def test_the_events_of_a_refused_batch_are_counted_as_rejected(api: httpx.Client) -> None:
    refused(send(api, event("a"), event("bad", subject=None)), 400)
    assert ok(api.get("/sandbox/v1/stats"))["events_rejected"] == 2


@pytest.mark.parametrize(
    "source",
    ["kong", "kong:8000", "a b", "https://kong.example/x", "urn:kong:1", "//kong:1/x", "x?%", "/a%20"],
)
def test_a_source_is_a_reference_to_a_uri(source: str) -> None:
    assert is_uri_reference(source)


@pytest.mark.parametrize(
    "source", ["10.0.0.1:8000", "kong%", "a\tb", "[::1]:8000", "not a uri %zz", "http://x:port/", "a\x7f"]
)
def test_a_source_that_go_cannot_parse_is_none(source: str) -> None:
    assert not is_uri_reference(source)


def test_a_flush_stores_an_event_once_even_without_deduplication() -> None:
    with running_sandbox(dedupe=False, flush_seconds=0.2) as url, httpx.Client(base_url=url) as api:
        send(api, event("a"), event("a"))
        assert stored(api, "a", at_least=1) == 1


def test_without_deduplication_an_event_sent_again_after_a_flush_counts_twice() -> None:
    with running_sandbox(dedupe=False, flush_seconds=0.2) as url, httpx.Client(base_url=url) as api:
        send(api, event("a"))
        assert stored(api, "a", at_least=1) == 1
        send(api, event("a"))
        assert stored(api, "a", at_least=2) == 2
        assert ok(api.get("/sandbox/v1/duplicates")) == [{"source": "kong", "id": "a", "received": 2}]
        assert total(api) == [2]


def test_with_deduplication_an_event_sent_again_after_a_flush_counts_once() -> None:
    with running_sandbox(flush_seconds=0.1) as url, httpx.Client(base_url=url) as api:
        send(api, event("a"))
        assert stored(api, "a", at_least=1) == 1
        send(api, event("a"), event("b"))
        assert stored(api, "b", at_least=1) == 1
        assert stored(api, "a", at_least=1) == 1


def test_an_event_is_neither_listed_nor_counted_before_its_flush() -> None:
    with running_sandbox(flush_seconds=3600) as url, httpx.Client(base_url=url) as api:
        assert send(api, event("a")).status_code == 204
        assert listed(api) == []
        assert total(api) == [0]


def stored(api: httpx.Client, event_id: str, *, at_least: int) -> int:
    """Wait until an event is there so many times, and return how often it is."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [item for item in listed(api) if item["event"]["id"] == event_id]
        if len(found) >= at_least:
            return len(found)
        time.sleep(0.02)
    raise AssertionError(f"{event_id} is not stored {at_least} times")


def test_a_duplicate_event_is_stored_once_and_counted(api: httpx.Client) -> None:
    send(api, event("a"), event("b"), event("a"))
    send(api, event("a", data={"status": 500}))
    assert sorted(item["event"]["id"] for item in listed(api)) == ["a", "b"]
    assert ok(api.get("/sandbox/v1/duplicates")) == [{"source": "kong", "id": "a", "received": 3}]
    stats = ok(api.get("/sandbox/v1/stats"))
    assert (stats["events_received"], stats["events_stored"], stats["duplicates_received"]) == (4, 2, 2)


def test_the_first_of_two_events_with_the_same_id_wins(api: httpx.Client) -> None:
    send(api, event("a", subject="first"))
    send(api, event("a", subject="second"))
    assert [item["event"]["subject"] for item in listed(api)] == ["first"]


def test_the_same_id_from_another_source_is_another_event(api: httpx.Client) -> None:
    send(api, event("a", source="kong-1"), event("a", source="kong-2"))
    assert len(listed(api)) == 2
    assert ok(api.get("/sandbox/v1/duplicates")) == []


def test_the_same_events_sent_at_once_by_many_clients_are_stored_once(api: httpx.Client) -> None:
    batch = [event(f"e{number}") for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: send(api, *batch).status_code, range(16)))
    assert statuses == [204] * 16
    stats = ok(api.get("/sandbox/v1/stats"))
    assert (stats["events_stored"], stats["duplicates_received"]) == (100, 1500)
