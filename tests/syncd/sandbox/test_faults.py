"""/sandbox/v1/faults: fault injection."""

import time
from typing import Any

import httpx
import pytest

from tests.syncd.sandbox.support import create_customer, event, ok, refused, send, stored_ids


def add_fault(api: httpx.Client, **fault: Any) -> None:
    assert api.post("/sandbox/v1/faults", json=fault).status_code == 201


def hits(api: httpx.Client) -> list[int]:
    return [fault["hits"] for fault in ok(api.get("/sandbox/v1/faults"))]


def test_a_fault_replaces_the_answer_for_the_given_number_of_times(api: httpx.Client) -> None:
    add_fault(api, path="/api/v1/events", method="POST", status=429, retry_after=2, count=2)
    for _ in range(2):
        response = send(api, event("a"))
        refused(response, 429)
        assert response.headers["retry-after"] == "2"
    assert stored_ids(api) == set()
    assert send(api, event("a")).status_code == 204
    assert hits(api) == [2]


def test_a_fault_without_a_count_lasts_until_it_is_cleared(api: httpx.Client) -> None:
    add_fault(api)
    for _ in range(3):
        refused(api.get("/api/v1/customers"), 503)
    assert api.delete("/sandbox/v1/faults").status_code == 204
    ok(api.get("/api/v1/customers"))


def test_a_fault_matches_only_its_method_and_path(api: httpx.Client) -> None:
    add_fault(api, path="/api/v1/customers", method="POST")
    ok(api.get("/api/v1/customers"))
    ok(api.get("/api/v1/meters"))
    refused(api.post("/api/v1/customers", json={}), 503)


def test_faults_trigger_in_the_order_they_were_added(api: httpx.Client) -> None:
    add_fault(api, status=500, count=1)
    add_fault(api, status=502, count=1)
    assert [api.get("/api/v1/meters").status_code for _ in range(3)] == [500, 502, 200]


def test_a_cut_connection_stores_nothing(api: httpx.Client) -> None:
    add_fault(api, action="cut", count=1)
    with pytest.raises(httpx.TransportError):
        send(api, event("a"))
    assert stored_ids(api) == set()


def test_a_connection_can_be_cut_after_the_events_were_stored(api: httpx.Client) -> None:
    add_fault(api, action="accept_then_cut", count=1)
    with pytest.raises(httpx.TransportError):
        send(api, event("a"))
    assert stored_ids(api) == {"a"}


def send_impatiently(api: httpx.Client) -> None:
    with httpx.Client(base_url=api.base_url, timeout=0.2) as impatient, pytest.raises(httpx.ReadTimeout):
        send(impatient, event("a"))


def test_a_request_can_time_out(api: httpx.Client) -> None:
    add_fault(api, action="timeout", count=1)
    send_impatiently(api)
    assert stored_ids(api) == set()


def test_a_request_can_time_out_after_the_events_were_stored(api: httpx.Client) -> None:
    add_fault(api, action="accept_then_timeout", count=1)
    send_impatiently(api)
    deadline = time.monotonic() + 10
    while stored_ids(api) != {"a"}:
        assert time.monotonic() < deadline


def test_a_poisoned_event_is_refused_alone_or_in_a_batch(api: httpx.Client) -> None:
    add_fault(api, event_id="b", status=422)
    assert "event b is refused" in refused(send(api, event("a"), event("b"), event("c")), 422)
    assert stored_ids(api) == {"a"}
    refused(send(api, event("b")), 422)
    assert send(api, event("c")).status_code == 204
    assert hits(api) == [2]


def test_a_poisoned_event_is_accepted_once_its_count_is_used_up(api: httpx.Client) -> None:
    add_fault(api, event_id="b", status=400, count=1)
    refused(send(api, event("b")), 400)
    assert send(api, event("b")).status_code == 204


@pytest.mark.parametrize("fault", [{"actoin": "cut"}, {"action": "explode"}, {"status": 200}, {"count": 0}])
def test_an_invalid_fault_is_refused(api: httpx.Client, fault: dict[str, Any]) -> None:
    refused(api.post("/sandbox/v1/faults", json=fault), 400)


@pytest.mark.parametrize(
    ("path", "field"), [("/api/v1/customers", "items"), ("/api/v3/openmeter/customers", "data")]
)
def test_lists_that_lag_show_a_new_customer_later_but_by_id_it_is_there(
    api: httpx.Client, path: str, field: str
) -> None:
    assert api.put("/sandbox/v1/lag", json={"seconds": 3600}).status_code == 204
    customer = create_customer(api, "new")
    assert ok(api.get(path))[field] == []
    ok(api.get(f"{path}/{customer['id']}"))
    assert api.delete("/sandbox/v1/faults").status_code == 204
    assert [item["id"] for item in ok(api.get(path))[field]] == [customer["id"]]
