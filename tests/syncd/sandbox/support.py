"""Helpers for common sandbox requests."""

from typing import Any

import httpx

BATCH = "application/cloudevents-batch+json"
SINGLE = "application/cloudevents+json"


def event(event_id: str, **changes: Any) -> dict[str, Any]:
    """Return a valid event of an API request; None in `changes` leaves a property out."""
    made = {
        "specversion": "1.0",
        "id": event_id,
        "source": "kong",
        "type": "kong.api_request",
        "subject": "alice",
        "data": {"status": 200, "route_name": "search"},
    }
    return {name: value for name, value in (made | changes).items() if value is not None}


def tokens(event_id: str, amount: Any, **changes: Any) -> dict[str, Any]:
    """Return a valid event of an LLM request."""
    data = {"tokens": amount, "model": "tiny", "type": "total"}
    return event(event_id, **({"type": "kong.llm_request", "data": data} | changes))


def send(api: httpx.Client, *events: Any, content_type: str = BATCH) -> httpx.Response:
    return api.post("/api/v1/events", json=list(events), headers={"content-type": content_type})


def stored_ids(api: httpx.Client) -> set[str]:
    return {item["event"]["id"] for item in listed(api)}


def listed(api: httpx.Client, **filters: Any) -> list[dict[str, Any]]:
    items = ok(api.get("/api/v1/events", params=filters))
    assert isinstance(items, list)
    return items


def create_customer(api: httpx.Client, name: str = "Alice", **properties: Any) -> dict[str, Any]:
    """Create a customer; without `key` and `subjects` it gets its name as a key."""
    subjects = properties.pop("subjects", None)
    if subjects is not None:
        properties["usageAttribution"] = {"subjectKeys": subjects}
    elif "key" not in properties:
        properties["key"] = name
    customer = ok(api.post("/api/v1/customers", json={"name": name} | properties))
    assert isinstance(customer, dict)
    return customer


def usage(api: httpx.Client, meter: str = "kong_api_requests", **parameters: Any) -> list[dict[str, Any]]:
    data = ok(api.get(f"/api/v1/meters/{meter}/query", params=parameters))["data"]
    assert isinstance(data, list)
    return data


def total(api: httpx.Client, meter: str = "kong_api_requests", **parameters: Any) -> Any:
    return [row["value"] for row in usage(api, meter, **parameters)]


def ok(response: httpx.Response) -> Any:
    assert response.is_success, response.text
    return response.json()


def refused(response: httpx.Response, status: int) -> str:
    """Check that the answer is a problem document with this status, and return its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["title"]
    detail = problem.get("detail", "")
    assert isinstance(detail, str)
    return detail
