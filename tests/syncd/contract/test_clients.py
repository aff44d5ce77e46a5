"""Our clients read each recorded answer to the right value, or raise the right error.

Through the methods of `MeteringTarget` only, so that these tests outlive the clients. A stub answers what was
recorded, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from syncd.core.errors import ApiError, BlockedError, RefusedError, UnreliableApiError
from syncd.metering.base import CustomerEdit, SubjectWrite
from tests.syncd.contract.recordings import V1, V3, Exchange, exchanges
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import Target, open_target

CUSTOMERS = {"openmeter-v1": f"{V1}/customers", "openmeter-v3": f"{V3}/customers"}
NO_SUBSCRIPTIONS = Answer({"data": [], "meta": {"page": {"number": 1, "size": 1000, "total": 0}}})


@contextmanager
def answering(dialect: str, *recorded: Exchange) -> Iterator[Target]:
    """Open a target on a server that gives the recorded answers in order, the last one again and again."""
    left = list(recorded)

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/subscriptions"):
            return NO_SUBSCRIPTIONS
        exchange = left.pop(0) if len(left) > 1 else left[0]
        headers = {k: v for k, v in exchange.answer_headers.items() if k.lower() == "content-type"}
        return Answer(exchange.answer, exchange.status, headers)

    with serving(answer) as server:
        target = open_target(dialect, server.url)
        try:
            yield target
        finally:
            target.close()


def found(file: str, name: str) -> Exchange:
    [exchange] = [exchange for exchange in exchanges(file) if exchange.name == name]
    return exchange


def of_kind(dialect: str, method: str, *, one: bool) -> list[Any]:
    """Return the recorded requests of a method to the customers, or to `one` customer, of a dialect."""
    files = {
        "openmeter-v1": ("v1-customers", "v1-conflicts", "v1-deleted", "subscribed", "entitled", "invoices"),
        "openmeter-v3": ("v3-customers", "v3-deleted", "labels"),
    }
    path = CUSTOMERS[dialect]
    return [
        pytest.param(dialect, exchange, id=str(exchange))
        for file in files[dialect]
        for exchange in exchanges(file)
        if exchange.method == method
        and exchange.path.startswith(f"{path}/" if one else path)
        and (exchange.path.partition("?")[0].count("/") == path.count("/") + one)
        # syncd always gives a key.
        and not (exchange.method == "POST" and exchange.status == 201 and "key" not in exchange.answer)
    ]


def create(target: Target, key: str = "k") -> None:
    target.create_customer(key, "name", ["s"], {"sync-owner": "default"})


@pytest.mark.parametrize(
    ("dialect", "exchange"),
    of_kind("openmeter-v1", "POST", one=False) + of_kind("openmeter-v3", "POST", one=False),
)
def test_a_create_succeeds_or_is_refused_with_the_recorded_status(dialect: str, exchange: Exchange) -> None:
    with answering(dialect, exchange) as target:
        if exchange.status == 201:
            create(target, exchange.answer["key"])
        elif exchange.status < 500:
            with pytest.raises(RefusedError) as refused:
                create(target)
            assert refused.value.status == exchange.status
        else:
            with pytest.raises(ApiError):
                create(target)


@pytest.mark.parametrize(("dialect", "exchange"), of_kind("openmeter-v1", "GET", one=True))
def test_a_customer_is_read_as_it_was_recorded(dialect: str, exchange: Exchange) -> None:
    document = exchange.answer if isinstance(exchange.answer, dict) else {}
    with answering(dialect, exchange) as target:
        if exchange.status == 400:
            with pytest.raises(RefusedError):
                target.customer_by_key("k")
            return
        if document.get("key") == "..":
            with pytest.raises(BlockedError):  # libraries fold such a path
                target.customer_by_key("..")
            return
        if exchange.status == 200 and "key" not in document and "deletedAt" not in document:
            with pytest.raises(UnreliableApiError):  # not the customer that was asked for
                target.customer_by_key("k")
            return
        observed = target.customer_by_key(document.get("key", "k"))
    if exchange.status == 404 or "deletedAt" in document or "key" not in document:
        assert observed is None
        return
    assert observed is not None
    assert (observed.id, observed.key, observed.name) == (document["id"], document["key"], document["name"])
    assert list(observed.subject_keys) == document.get("usageAttribution", {}).get("subjectKeys", [])
    assert dict(observed.metadata) == document.get("metadata", {})
    assert observed.active_subscription == document.get("currentSubscriptionId")


@pytest.mark.parametrize("name", ["list-filter-key-eq", "default"])
def test_over_v3_a_customer_is_found_by_its_key(name: str) -> None:
    exchange = found("v3-customers" if name == "list-filter-key-eq" else "v3-paging", name)
    [document] = exchange.answer["data"]
    with answering("openmeter-v3", exchange) as target:
        observed = target.customer_by_key(document["key"])
        with pytest.raises(UnreliableApiError):
            target.customer_by_key(document["key"].upper())
    assert observed is not None
    assert (observed.id, observed.name) == (document["id"], document["name"])
    assert list(observed.subject_keys) == document["usage_attribution"]["subject_keys"]
    assert dict(observed.metadata) == document["labels"]


@pytest.mark.parametrize(
    ("dialect", "current", "change"),
    [
        ("openmeter-v1", "get-by-id", "v1-deleted/put-deleted"),
        ("openmeter-v1", "get-by-id", "v1-customers/put-missing-id"),
        ("openmeter-v3", "get", "v3-deleted/put-deleted"),
        ("openmeter-v3", "get", "v3-customers/put-missing"),
    ],
)
def test_an_edit_of_a_customer_that_went_is_blocked(dialect: str, current: str, change: str) -> None:
    before = found("v1-customers" if dialect == "openmeter-v1" else "v3-customers", current)
    with answering(dialect, before, found(*change.split("/"))) as target, pytest.raises(BlockedError):
        target.edit_customer(before.answer["id"], lambda _: CustomerEdit(name="new"))


@pytest.mark.parametrize(
    ("dialect", "current", "change"),
    [
        ("openmeter-v1", "get-by-id", "v1-conflicts/put-subject-in-use"),
        ("openmeter-v1", "get-by-id", "subscribed/v1-put-attribution-again"),
        ("openmeter-v3", "get", "v3-customers/put-subject-in-use"),
        ("openmeter-v3", "get", "v3-customers/put-reserved-label"),
    ],
)
def test_an_edit_that_the_server_refuses_is_refused(dialect: str, current: str, change: str) -> None:
    before = found("v1-customers" if dialect == "openmeter-v1" else "v3-customers", current)
    after = found(*change.split("/"))
    with answering(dialect, before, after) as target, pytest.raises(RefusedError) as refused:
        target.edit_customer(before.answer["id"], lambda _: CustomerEdit(name="new"))
    assert refused.value.status == after.status


@pytest.mark.parametrize("name", ["list", "list-after"])
def test_the_entities_of_subjects_are_read_as_they_were_recorded(name: str) -> None:
    exchange = found("v1-subjects", name)
    with answering("openmeter-v1", exchange) as target:
        observed = target.subjects()
    assert [(s.key, s.display_name, dict(s.metadata)) for s in observed or ()] == [
        (entity["key"], entity.get("displayName"), entity["metadata"]) for entity in exchange.answer
    ]


@pytest.mark.parametrize("name", ["upsert-empty-list", "upsert-new", "upsert-change"])
def test_an_upsert_that_was_accepted_is_accepted(name: str) -> None:
    exchange = found("v1-subjects", name)
    writes = [SubjectWrite(entry["key"], "alice", {}) for entry in exchange.body]
    with answering("openmeter-v1", exchange) as target:
        target.write_subjects(writes)


@pytest.mark.parametrize("name", ["upsert-empty-key", "upsert-twice-in-list"])
def test_an_upsert_that_was_refused_is_refused(name: str) -> None:
    exchange = found("v1-subjects", name)
    with answering("openmeter-v1", exchange) as target, pytest.raises(RefusedError) as refused:
        target.write_subjects([SubjectWrite("consumer:a1", "alice", {})])
    assert refused.value.status == exchange.status


@pytest.mark.parametrize(
    "name", ["by-subject", "by-subject-from-to", "hourly-by-subject", "tokens-by-subject"]
)
def test_usage_is_read_as_it_was_recorded(name: str) -> None:
    exchange = found("v1-usage", name)
    with answering("openmeter-v1", exchange) as target:
        usage = target.usage("kong_api_requests", None, None)
    assert usage == {row["subject"]: row["value"] for row in exchange.answer["data"]}


@pytest.mark.parametrize("name", ["by-subject", "by-subject-from-to", "from-not-on-minute"])
def test_over_v3_usage_is_read_as_it_was_recorded(name: str) -> None:
    exchange = found("v3-usage", name)
    with answering("openmeter-v3", found("v3-usage", "find-meter"), exchange) as target:
        usage = target.usage("kong_api_requests", None, None)
    assert usage == {row["dimensions"]["subject"]: float(row["value"]) for row in exchange.answer["data"]}


@pytest.mark.parametrize(
    "exchange", [pytest.param(each, id=each.name) for each in exchanges("outages") if each.status >= 500]
)
def test_an_outage_is_an_error_and_never_an_empty_answer(exchange: Exchange) -> None:
    for dialect in CUSTOMERS:
        with answering(dialect, exchange) as target:
            with pytest.raises(ApiError):
                target.observe()
            with pytest.raises(ApiError):
                target.usage("kong_api_requests", None, None)
