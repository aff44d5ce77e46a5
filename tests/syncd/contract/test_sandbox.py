"""The sandbox answers the recorded requests as the real OpenMeter did: status, shape, values and rules."""

from collections.abc import Callable, Iterator
from functools import cache

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.syncd.contract.recordings import FOLDER, V1, Exchange, exchanges
from tests.syncd.contract.replay import Replay

# Files that share state, in the order in which they were recorded. The first group began on an empty server.
GROUPS = (
    (
        "v1-customers",
        "v1-conflicts",
        "v1-deleted",
        "v1-paging",
        "v1-subjects",
        "v1-meters",
        "v3-customers",
        "v3-paging",
        "v3-deleted",
        "what-a-customer-has",
        "v3-meters",
    ),
    ("attribution", "v3-events-paging"),
    ("v1-events", "v3-events", "v1-events-read", "v3-events-read", "v1-usage", "v3-usage"),
    ("labels",),
    ("subscribed", "invoices"),
    ("entitled",),
    ("entitlement-access",),
)
FILES = [file for group in GROUPS for file in group]

NOT_REPLAYED = {
    "invoice-amounts": "the sandbox computes no invoices",
    "outages": "needs a server whose ClickHouse or PostgreSQL is down",
    "as-sent-by-syncd-v1": "excerpts: the requests between them are missing",
    "as-sent-by-syncd-v3": "excerpts: the requests between them are missing",
    "as-sent-by-plugin-v1": "excerpts: the requests between them are missing",
    "as-sent-by-plugin-v3": "excerpts: the requests between them are missing",
}

DIFFERS = {
    "subscribed/v1-create-plan": "the sandbox has no plans",
    "subscribed/v1-publish-plan": "the sandbox has no plans",
    "subscribed/v1-cancel-immediately": "the sandbox has no transitions of subscriptions",
    "invoices/v1-gathering-of-customer": "the sandbox shows of an invoice what tells that it is open",
    "invoices/v3-get-gathering-invoice": "the sandbox lists invoices only",
    "v3-customers/create-label-empty": "the sandbox names the first broken rule of a value, not all",
}
"""What the sandbox answers otherwise than the real server, and why it may. These requests are not sent."""

ANY_ORDER = {
    "v1-paging/order-name-desc": "customers of one name",
    "v1-events-read/by-subject-known": "events of one second",
    "v3-events-paging/page-1": "events of one second",
    "v3-events-paging/page-2": "events of one second",
    "v3-events-paging/page-3": "events of one second",
    "v3-events-paging/sort-time-asc": "events of one second",
    "v3-events-paging/filter-time": "events of one second",
}
"""Pages of items between which the real server has no order."""


def test_every_recording_is_replayed_or_has_a_reason_why_not() -> None:
    recorded = {path.stem for path in FOLDER.glob("*.jsonl")}
    assert recorded == set(FILES) | NOT_REPLAYED.keys()
    names = {str(exchange) for file in FILES for exchange in exchanges(file)}
    assert DIFFERS.keys() | ANY_ORDER.keys() <= names


@pytest.mark.parametrize("file", FILES)
def test_the_sandbox_answers_as_the_real_server_did(file: str) -> None:
    [group] = [group for group in GROUPS if file in group]
    assert _differences(group)[file] == {}


@cache
def _differences(group: tuple[str, ...]) -> dict[str, dict[str, list[str]]]:
    """Replay a group of files on a new sandbox, and say per file which answers differed, and how."""
    with running_sandbox() as url, httpx.Client(base_url=url) as client:
        if group is GROUPS[0]:
            for meter in client.get(f"{V1}/meters").json():
                assert client.delete(f"{V1}/meters/{meter['id']}").is_success
        replay = Replay(client)
        return {file: dict(_differing(replay, file)) for file in group}


def _differing(replay: Replay, file: str) -> Iterator[tuple[str, list[str]]]:
    for exchange in exchanges(file):
        if str(exchange) in DIFFERS:
            continue
        if _set_up_otherwise(replay, exchange):
            continue
        if prepare := UNRECORDED.get(str(exchange)):
            prepare(replay)
        found = replay.differences(exchange, replay.send(exchange), any_order=str(exchange) in ANY_ORDER)
        if found:
            yield exchange.name, found


def _set_up_otherwise(replay: Replay, exchange: Exchange) -> bool:
    """Do under /sandbox/v1 what OpenMeter does with plans and features; return whether it was that."""
    body = exchange.body or {}
    match exchange.method, exchange.path.split("/")[3:]:
        case "POST", ["subscriptions"]:
            _subscribe(replay, exchange)
        case "POST", ["subscriptions", _, "cancel"]:
            month = 31 * 24 * 3600
            customer = replay.ids[exchange.answer["customerId"]]
            ends_in = 0 if body["timing"] == "immediate" else month
            _control(replay, "DELETE", f"{customer}/subscriptions?ends_in={ends_in}")
        case _:
            return False
    return True


def _subscribe(replay: Replay, exchange: Exchange) -> None:
    key = exchange.body["customerKey"]
    starts_in = 10 * 24 * 3600 if "timing" in exchange.body else 0
    wanted = {"plan_key": exchange.body["plan"]["key"], "starts_in": starts_in}
    made = _control(replay, "POST", f"{key}/subscriptions", wanted)
    replay.ids[exchange.answer["id"]] = made["id"]
    # The plan bills in advance, so OpenMeter begins an invoice at once.
    _control(replay, "POST", f"{key}/invoices")


def _control(replay: Replay, method: str, path: str, body: object = None) -> dict[str, str]:
    response = replay.client.request(method, f"/sandbox/v1/customers/{path}", json=body)
    assert response.is_success, response.text
    made: dict[str, str] = response.json() if response.content else {}
    return made


def _seven_customers(replay: Replay) -> None:
    for number in range(7):
        key = f"page-{number}"
        subjects = {"subjectKeys": [f"page:{number}"]}
        _post(replay, "customers", {"key": key, "name": "page", "usageAttribution": subjects})


def _customer_of_the_events(replay: Replay) -> None:
    _post(replay, "customers", {"name": "a1", "usageAttribution": {"subjectKeys": ["consumer:a1"]}})


def _feature_of_a_meter(replay: Replay) -> None:
    _post(replay, "features", {"key": "of_a_meter", "name": "f", "meterSlug": "kong_api_requests"})


def _meter_without_events(replay: Replay) -> None:
    body = {"slug": "empty_one", "aggregation": "COUNT", "eventType": "nobody.sends.this"}
    replay.ids["01M8HSWBS8A7TCFBG16W69XGWQ"] = _post(replay, "meters", body)["id"]


def _no_meter_without_events(replay: Replay) -> None:
    assert replay.client.delete(f"{V1}/meters/empty_one").is_success


def _post(replay: Replay, what: str, body: object) -> dict[str, str]:
    response = replay.client.post(f"{V1}/{what}", json=body)
    assert response.is_success, response.text
    made: dict[str, str] = response.json()
    return made


def _requests_of(subject: str, *numbers: int) -> Callable[[Replay], None]:
    def send(replay: Replay) -> None:
        events = [
            {"specversion": "1.0", "id": f"{subject}-{number}", "source": "k", "type": "kong.api_request"}
            | {"subject": subject, "data": {}}
            for number in numbers
        ]
        content_type = {"content-type": "application/cloudevents-batch+json"}
        assert replay.client.post(f"{V1}/events", json=events, headers=content_type).is_success

    return send


def _more_requests(replay: Replay) -> None:
    _requests_of("acme-app", *range(4, 9))(replay)
    _requests_of("beta-app", 0, 1, 2)(replay)


UNRECORDED: dict[str, Callable[[Replay], None]] = {
    "v1-paging/page-1-of-3": _seven_customers,
    "v1-meters/delete-that-a-feature-uses": _feature_of_a_meter,
    "v1-meters/query-empty": _meter_without_events,
    "v3-customers/list-default": _no_meter_without_events,
    "v3-meters/query-empty": _meter_without_events,
    "entitlement-access/v1-access-used-2": _requests_of("acme-app", 0, 1),
    "entitlement-access/v1-access-used-4": _requests_of("acme-app", 2, 3),
    "entitlement-access/v1-access-beta": _more_requests,
    "v1-events/single": _customer_of_the_events,
}
"""Requests that were sent before some of the recorded ones, and not recorded."""
