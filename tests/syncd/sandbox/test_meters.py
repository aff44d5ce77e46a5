"""/api/v1/meters: the meters themselves."""

from typing import Any

import httpx
import pytest

from tests.syncd.sandbox.support import event, ok, refused, send, tokens, total, usage

METER = {
    "slug": "bytes",
    "aggregation": "SUM",
    "eventType": "kong.api_request",
    "valueProperty": "$.size.out",
}


def test_a_new_database_has_the_standard_meters(api: httpx.Client) -> None:
    requests, llm_events, llm_tokens = ok(api.get("/api/v1/meters"))
    assert (requests["slug"], requests["aggregation"], requests["eventType"]) == (
        "kong_api_requests",
        "COUNT",
        "kong.api_request",
    )
    assert requests["groupBy"]["application_id"] == "$.application_id"
    assert (llm_tokens["slug"], llm_tokens["aggregation"], llm_tokens["eventType"]) == (
        "kong_llm_tokens",
        "SUM",
        "kong.llm_request",
    )
    assert (llm_events["slug"], llm_events["aggregation"], llm_events["eventType"]) == (
        "kong_llm_events",
        "COUNT",
        "kong.llm_request",
    )
    assert llm_tokens["valueProperty"] == "$.tokens"
    assert {"type", "model", "provider", "application_id"} <= llm_tokens["groupBy"].keys()


def test_a_meter_is_created_found_and_deleted_by_slug_or_id(api: httpx.Client) -> None:
    response = api.post("/api/v1/meters", json=METER)
    assert response.status_code == 200
    meter = response.json()
    assert meter.items() >= (METER | {"name": "bytes"}).items()
    assert ok(api.get("/api/v1/meters/bytes")) == ok(api.get(f"/api/v1/meters/{meter['id']}")) == meter
    assert api.delete("/api/v1/meters/bytes").status_code == 204
    assert "meter not found: bytes" in refused(api.get("/api/v1/meters/bytes"), 404)
    refused(api.delete("/api/v1/meters/bytes"), 404)
    refused(api.get("/api/v1/meters/bytes/query"), 404)


def test_a_slug_in_use_is_a_409(api: httpx.Client) -> None:
    assert "already exists" in refused(
        api.post("/api/v1/meters", json=METER | {"slug": "kong_api_requests"}), 409
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slug": "Upper-Case"}, '"/slug"'),
        ({"aggregation": "MEDIAN"}, '"/aggregation"'),
        ({"aggregation": "COUNT"}, "not allowed when the aggregation is count"),
        ({"valueProperty": "tokens"}, "$.a.b"),
        ({"valueProperty": "$..tokens"}, "$.a.b"),
        ({"groupBy": {"a-b": "$.a"}}, "group by key a-b is invalid"),
        ({"groupBy": {"a": "$.x') FROM events --"}}, "$.a.b"),
        ({"eventFrom": "yesterday"}, "RFC 3339"),
    ],
)
def test_an_invalid_meter_is_refused(api: httpx.Client, change: dict[str, Any], reason: str) -> None:
    assert reason in refused(api.post("/api/v1/meters", json=METER | change), 400)


def test_a_meter_other_than_count_needs_a_value(api: httpx.Client) -> None:
    without = {name: value for name, value in METER.items() if name != "valueProperty"}
    assert "value property is required" in refused(api.post("/api/v1/meters", json=without), 400)


@pytest.mark.parametrize(
    ("aggregation", "value"), [("SUM", 10.5), ("AVG", 3.5), ("MIN", 0.5), ("MAX", 8), ("UNIQUE_COUNT", 3)]
)
def test_each_aggregation_computes_its_value(api: httpx.Client, aggregation: str, value: float) -> None:
    ok(api.post("/api/v1/meters", json=METER | {"aggregation": aggregation}))
    sizes: list[float | str] = [2, "8", 0.5]
    send(api, *[event(str(number), data={"size": {"out": size}}) for number, size in enumerate(sizes)])
    assert total(api, "bytes") == [value]


def test_a_meter_counts_events_older_than_itself(api: httpx.Client) -> None:
    send(api, event("a", data={"size": {"out": 5}}))
    ok(api.post("/api/v1/meters", json=METER))
    assert total(api, "bytes") == [5]


def test_a_meter_skips_events_before_its_event_from(api: httpx.Client) -> None:
    ok(api.post("/api/v1/meters", json=METER | {"eventFrom": "2026-01-02T00:00:00+01:00"}))
    data = {"size": {"out": 1}}
    send(
        api,
        event("a", time="2026-01-01T22:59:59Z", data=data),
        event("b", time="2026-01-01T23:00:00Z", data=data),
    )
    assert total(api, "bytes") == [1]
    assert total(api, "bytes", **{"from": "2025-01-01T00:00:00Z"}) == [1]


def test_a_tenth_and_two_tenths_are_three_tenths(api: httpx.Client) -> None:
    send(api, tokens("a", 0.1), tokens("b", 0.2))
    assert total(api, "kong_llm_tokens") == [0.3]


def test_sums_of_large_and_small_are_exact(api: httpx.Client) -> None:
    send(api, *[tokens(str(number), amount) for number, amount in enumerate([0.1, 0.2, "0.3", 1e-7, 10**15])])
    assert total(api, "kong_llm_tokens") == [1000000000000000.6000001]
    send(api, tokens("minus", -(10**15)))
    assert total(api, "kong_llm_tokens") == [0.6000001]


def test_values_that_are_not_numbers_add_nothing_to_a_sum(api: httpx.Client) -> None:
    amounts = [1, "2", True, "many", None, [3], {"a": 4}, "NaN", "1e999", " 5"]
    send(api, *[tokens(str(number), amount) for number, amount in enumerate(amounts)])
    assert total(api, "kong_llm_tokens") == [3]


def test_a_sum_over_nothing_has_no_rows_but_a_count_is_zero(api: httpx.Client) -> None:
    assert usage(api, "kong_llm_tokens") == []
    assert total(api, "kong_api_requests") == [0]
