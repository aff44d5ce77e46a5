"""Out-of-range and reversed parameters of the HTTP API."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plugin.operations_api import Api

TOO_LARGE = 2**63  # one more than SQLite's largest row id


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("GET", f"/v1/redeliver/{TOO_LARGE}", None, "number: "),
        ("GET", f"/v1/dead-letters?after={TOO_LARGE}", None, "after: "),
        ("POST", "/v1/dead-letters/replay", f'{{"ids": [{TOO_LARGE}]}}', "ids.0: "),
        ("GET", "/v1/ledger?from=2026-11-22T07:00:00Z&to=2026-11-22T05:00:00Z", None, "from must not be"),
        (
            "POST",
            "/v1/redeliver",
            '{"from": "2026-11-22T07:00:00Z", "to": "2026-11-22T07:00:00Z"}',
            "from must be before to",
        ),
        ("POST", "/v1/dead-letters/replay", "{}", "give exactly one of ids, group and all: true"),
    ],
)
def test_an_invalid_value_is_refused_with_a_message(
    running_api: Api, method: str, path: str, body: str | None, message: str
) -> None:
    answer = running_api.client.request(
        method, path, content=body, headers={"content-type": "application/json"} if body else None
    )
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)


@pytest.mark.parametrize(
    "parameters",
    [
        {"to": "9999-12-31T23:59:59Z"},
        {"from": "0001-01-01T00:00:00+14:00"},
        {"from": "0001-01-01T00:00:00Z", "to": "9999-12-31T23:59:59-14:00"},
    ],
)
def test_a_span_may_reach_from_the_first_year_to_the_last(
    running_api: Api, parameters: dict[str, Any]
) -> None:
    assert running_api.get("/v1/ledger", **parameters) == running_api.get("/v1/ledger")
