"""POST and GET /api/v3/openmeter/events."""

from typing import Any

import httpx
import pytest

from tests.syncd.sandbox.support import BATCH, create_customer, event, ok, refused

EVENTS = "/api/v3/openmeter/events"


def send_v3(api: httpx.Client, *events: Any, content_type: str = BATCH) -> httpx.Response:
    return api.post(EVENTS, json=list(events), headers={"content-type": content_type})


def pages(api: httpx.Client, **parameters: Any) -> list[list[str]]:
    """Follow the cursors to the end and return the ids on each page."""
    found: list[list[str]] = []
    cursor: str | None = None
    while True:
        after: dict[str, Any] = {} if cursor is None else {"page[after]": cursor}
        answer = ok(api.get(EVENTS, params=parameters | after))
        found.append([item["event"]["id"] for item in answer["data"]])
        cursor = answer["meta"]["page"]["next"]
        if cursor is None:
            return found


def test_a_batch_is_answered_with_202_and_stored(api: httpx.Client) -> None:
    response = send_v3(api, event("a"), event("b"), content_type=f"{BATCH}; charset=utf-8")
    assert (response.status_code, response.content) == (202, b"")
    assert pages(api) == [["b", "a"]]


def test_the_pages_together_hold_every_event_once(api: httpx.Client) -> None:
    send_v3(api, *[event(f"e{number}") for number in range(7)])
    found = pages(api, **{"page[size]": 3})
    assert [len(page) for page in found] == [3, 3, 1]
    assert sorted(id_ for page in found for id_ in page) == [f"e{number}" for number in range(7)]


def test_a_full_last_page_is_followed_by_an_empty_one(api: httpx.Client) -> None:
    send_v3(api, event("a"), event("b"))
    assert [len(page) for page in pages(api, **{"page[size]": 2})] == [2, 0]


def test_an_id_matches_only_whole_here(api: httpx.Client) -> None:
    send_v3(api, event("r1"), event("r12"))
    assert pages(api, **{"filter[id][eq]": "r1"}) == [["r1"]]


def test_an_event_names_its_customer_or_why_it_has_none(api: httpx.Client) -> None:
    customer = create_customer(api, "alice")
    send_v3(api, event("a"), event("b", subject=customer["id"]))
    stranger, hers = ok(api.get(EVENTS))["data"]
    assert hers["customer"] == {"id": customer["id"]}
    [error] = stranger["validation_errors"]
    assert error["message"] == f"no customer found for event subject: {customer['id']}"
    assert "customer" not in stranger


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (event("bad", subject=None), "1.subject"),
        (event("bad", traceid="x"), "1"),
        (event("bad", data="text"), "1.data"),
    ],
)
def test_one_bad_event_refuses_the_whole_batch_and_is_named(
    api: httpx.Client, bad: dict[str, Any], field: str
) -> None:
    response = send_v3(api, event("a"), bad)
    refused(response, 400)
    [parameter] = response.json()["invalid_parameters"]
    assert parameter["field"] == field
    assert pages(api) == [[]]


@pytest.mark.parametrize(
    "parameters", [{"page[size]": 0}, {"page[size]": 101}, {"page[after]": "xyz"}, {"filter[color][eq]": "x"}]
)
def test_an_invalid_query_is_refused(api: httpx.Client, parameters: dict[str, Any]) -> None:
    refused(api.get(EVENTS, params=parameters), 400)
