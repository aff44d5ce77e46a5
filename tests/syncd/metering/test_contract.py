"""Contract of a metering target, for both dialects over real HTTP against the sandbox.

If the specifications are available (tests/specs.py), each request and answer is checked against them.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import httpx
import pytest

from syncd.core.errors import (
    BlockedError,
    MeterMissingError,
    RefusedError,
    UnauthorizedError,
    UnreachableError,
)
from syncd.core.model import CustomerDetails, ObservedCustomer
from syncd.metering.base import ArrivedEvent, CustomerEdit
from syncd.metering.usage import REQUESTS_METER
from syncd.sandbox.testing import running_sandbox
from tests.specs import Spec, checked, spec
from tests.syncd.sandbox.support import event, send
from tests.syncd.targets import OWNERSHIP, Target, by_hand, fault, open_target, subscribe

pytestmark = pytest.mark.slow


def specs_of(dialect: str) -> list[Spec]:
    if dialect == "openmeter-v1":
        found = [spec("openmeter-v1")]
    else:
        # The sandbox acts as a self-hosted server, whose answers have more fields than Konnect's.
        konnect = spec("konnect-metering-and-billing-v3", "/api/v3", answers=False)
        found = [spec("openmeter-v3", "/api/v3"), konnect]
    return [document for document in found if document]


@pytest.fixture
def target(sandbox: httpx.Client, dialect: str) -> Iterator[Target]:
    target = open_target(dialect, str(sandbox.base_url))
    checked(target._client, specs_of(dialect))
    yield target
    target.close()


def test_a_created_customer_is_observed_as_it_was_created(target: Target) -> None:
    target.create_customer("acme", "ACME", ["consumer:1", "consumer:2"], OWNERSHIP)
    (found,) = target.observe().customers
    assert (found.key, found.name, found.subject_keys) == ("acme", "ACME", ("consumer:1", "consumer:2"))
    assert found.metadata == OWNERSHIP
    assert found.active_subscription is None


def test_details_are_given_at_creation(target: Target, sandbox: httpx.Client) -> None:
    details = CustomerDetails(
        "pay@acme.example", "EUR", "Ask Jane", {"country": "DE", "postal_code": "10115"}
    )
    target.create_customer("acme", "ACME", ["consumer:1"], OWNERSHIP, details)
    there = sandbox.get("/api/v1/customers/acme").json()
    assert (there["primaryEmail"], there["currency"], there["description"]) == (
        "pay@acme.example",
        "EUR",
        "Ask Jane",
    )
    assert there["billingAddress"] == {"country": "DE", "postalCode": "10115"}


def test_a_customer_created_through_one_dialect_is_the_same_through_the_other(
    target: Target, sandbox: httpx.Client, dialect: str
) -> None:
    target.create_customer("consumer:1/ä", "Ä", ["consumer:1/ä", "日本"], OWNERSHIP)
    other = {"openmeter-v1": "openmeter-v3", "openmeter-v3": "openmeter-v1"}[dialect]
    reader = open_target(other, str(sandbox.base_url))
    assert reader.observe().customers == target.observe().customers
    reader.close()


def test_an_active_subscription_is_observed(target: Target, sandbox: httpx.Client) -> None:
    target.create_customer("acme", "ACME", ["consumer:1"], OWNERSHIP)
    target.create_customer("free", "Free", ["consumer:2"], OWNERSHIP)
    subscribe(sandbox, "acme")
    paying = {customer.key: bool(customer.active_subscription) for customer in target.observe().customers}
    assert paying == {"acme": True, "free": False}


def test_every_read_of_one_customer_includes_its_subscription(target: Target, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME")
    subscribe(sandbox, "acme")
    by_key = target.customer_by_key("acme")
    assert by_key is not None
    assert by_key.active_subscription
    seen: list[ObservedCustomer] = []
    target.edit_customer(str(made["id"]), seen.append)
    assert seen[0].active_subscription == by_key.active_subscription


def test_an_edit_keeps_every_field_that_it_does_not_name(target: Target, sandbox: httpx.Client) -> None:
    before = by_hand(
        sandbox,
        key="acme",
        name="ACME",
        description="Ask Jane",
        primaryEmail="pay@acme.example",
        currency="EUR",
        metadata={**OWNERSHIP, "externalId": "crm-7"},
        billingAddress={"country": "DE", "city": "Berlin"},
        usageAttribution={"subjectKeys": ["z", "a"]},
    )
    assert target.edit_customer(
        str(before["id"]), lambda c: CustomerEdit(subject_keys=(*c.subject_keys, "m"))
    )
    after = sandbox.get(f"/api/v1/customers/{before['id']}").json()
    assert sorted(after["usageAttribution"]["subjectKeys"]) == ["a", "m", "z"]
    unchanged = before.keys() - {"usageAttribution", "updatedAt"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}


def test_a_customer_with_a_subscription_can_be_renamed_since_its_subjects_are_sent_back_unchanged(
    target: Target, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="ACME", usageAttribution={"subjectKeys": ["z", "a", "m"]})
    subscribe(sandbox, "acme")
    assert target.edit_customer(str(made["id"]), lambda _: CustomerEdit(name="ACME Ltd"))
    after = sandbox.get("/api/v1/customers/acme").json()
    assert (after["name"], after["usageAttribution"]) == ("ACME Ltd", made["usageAttribution"])


def test_metadata_are_merged(target: Target, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME", metadata={"externalId": "crm-7"})
    assert target.edit_customer(str(made["id"]), lambda _: CustomerEdit(metadata=OWNERSHIP))
    assert sandbox.get("/api/v1/customers/acme").json()["metadata"] == {"externalId": "crm-7", **OWNERSHIP}


def test_an_edit_that_changes_nothing_writes_nothing(target: Target, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME")
    fault(sandbox, method="PUT", status=400)
    assert not target.edit_customer(str(made["id"]), lambda _: CustomerEdit(name="ACME"))
    assert not target.edit_customer(str(made["id"]), lambda _: None)


def test_an_edit_whose_answer_was_lost_reads_again_before_it_writes_again(
    target: Target, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="old")
    fault(sandbox, method="PUT", action="accept_then_cut", count=1)
    seen: list[str] = []

    def rename(there: ObservedCustomer) -> CustomerEdit | None:
        seen.append(there.name)
        return None if there.name == "new" else CustomerEdit(name="new")

    target.edit_customer(str(made["id"]), rename)
    assert seen == ["old", "new"]


def test_a_deletion_that_failed_reads_and_checks_again_before_it_deletes_again(
    target: Target, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="ACME")
    fault(sandbox, method="DELETE", status=503, count=1)
    checked: list[str] = []

    def only_once(there: ObservedCustomer) -> None:
        if checked:
            raise BlockedError("a person wants to keep it by now")
        checked.append(there.id)

    with pytest.raises(BlockedError):
        target.delete_customer(str(made["id"]), only_once)
    assert target.customer_by_key("acme") is not None


def test_an_edit_gives_up_after_its_attempts(target: Target, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="old")
    fault(sandbox, method="PUT", status=503)
    with pytest.raises(UnreachableError, match="tried 3 times"):
        target.edit_customer(str(made["id"]), lambda _: CustomerEdit(name="new"))


def test_an_edit_of_a_customer_that_was_deleted_before_is_blocked(
    target: Target, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="old")
    sandbox.delete(f"/api/v1/customers/{made['id']}").raise_for_status()
    with pytest.raises(BlockedError, match="deleted"):
        target.edit_customer(str(made["id"]), lambda _: CustomerEdit(name="new"))


def test_an_edit_of_a_customer_that_is_deleted_between_reading_and_writing_is_blocked(
    target: Target, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="old")

    def too_late(_: ObservedCustomer) -> CustomerEdit:
        sandbox.delete(f"/api/v1/customers/{made['id']}").raise_for_status()
        return CustomerEdit(name="new")

    with pytest.raises(BlockedError, match="deleted"):
        target.edit_customer(str(made["id"]), too_late)


def test_a_refused_edit_carries_the_servers_explanation(target: Target, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME", usageAttribution={"subjectKeys": ["a"]})
    subscribe(sandbox, "acme")
    with pytest.raises(RefusedError) as caught:
        target.edit_customer(str(made["id"]), lambda _: CustomerEdit(subject_keys=("a", "b")))
    assert caught.value.status == 400
    assert "active subscriptions" in caught.value.detail


def test_a_customer_is_found_by_its_exact_key_only(target: Target, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="consumer:1/ä", name="x")
    by_hand(sandbox, key="consumer:1/ä and more", name="y")
    found = target.customer_by_key("consumer:1/ä")
    assert found is not None
    assert found.id == made["id"]
    assert target.customer_by_key(str(made["id"])) is None
    assert target.customer_by_key("nobody") is None


def test_a_key_or_subject_in_use_is_refused_with_409(target: Target) -> None:
    target.create_customer("acme", "ACME", ["consumer:1"], OWNERSHIP)
    for key, subject in (("acme", "consumer:2"), ("other", "consumer:1"), ("consumer:1", "consumer:3")):
        with pytest.raises(RefusedError) as caught:
            target.create_customer(key, "ACME", [subject], OWNERSHIP)
        assert caught.value.status == 409


def test_a_creation_whose_answer_was_lost_is_repeated_and_refused_as_in_use(
    target: Target, sandbox: httpx.Client
) -> None:
    fault(sandbox, method="POST", action="accept_then_cut", count=1)
    with pytest.raises(RefusedError) as caught:
        target.create_customer("acme", "ACME", ["consumer:1"], OWNERSHIP)
    assert caught.value.status == 409
    there = target.customer_by_key("acme")
    assert there is not None
    assert there.metadata == OWNERSHIP


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_missing_or_wrong_token_is_an_authentication_problem(dialect: str, token: str | None) -> None:
    with running_sandbox(token="right") as url:
        target = open_target(dialect, url, token=token)
        with pytest.raises(UnauthorizedError, match=r"metering\.token"):
            target.observe()
        target.close()


def test_usage_is_read_by_subject(target: Target, sandbox: httpx.Client) -> None:
    for number, subject in enumerate(["a", "a", "b"]):
        event = {"specversion": "1.0", "id": str(number), "source": "kong", "type": "kong.api_request"}
        answer = sandbox.post(
            "/api/v1/events",
            json={**event, "subject": subject, "time": f"2026-01-0{number + 1}T00:00:00Z", "data": {}},
            headers={"Content-Type": "application/cloudevents+json"},
        )
        answer.raise_for_status()
    assert target.usage("kong_api_requests", None, None) == {"a": 2, "b": 1}
    assert target.usage("kong_api_requests", "2026-01-02T00:00:00Z", None) == {"a": 1, "b": 1}


def test_the_latest_events_are_listed_by_their_time_with_their_customer(
    target: Target, sandbox: httpx.Client
) -> None:
    target.create_customer("acme", "ACME", ["consumer:1"], OWNERSHIP)
    now = datetime.now(UTC)
    for number, subject in enumerate([*(f"s-{number}" for number in range(100)), "consumer:1", "nobody"]):
        event = {"specversion": "1.0", "id": str(number), "source": "kong", "type": "kong.api_request"}
        time = (now - timedelta(hours=1) + timedelta(seconds=number)).isoformat()
        answer = sandbox.post(
            "/api/v1/events",
            json={**event, "subject": subject, "time": time, "data": {}},
            headers={"Content-Type": "application/cloudevents+json"},
        )
        answer.raise_for_status()
    (acme,) = target.observe().customers
    latest = target.latest_events()
    assert len(latest) == 100
    assert list(latest[:2]) == [
        ArrivedEvent("kong.api_request", "nobody", None),
        ArrivedEvent("kong.api_request", "consumer:1", acme.id),
    ]


def test_a_missing_meter_is_named(target: Target) -> None:
    with pytest.raises(MeterMissingError, match="no_such_meter"):
        target.usage("no_such_meter", None, None)


def test_usage_is_known_by_day_and_by_subject_and_dimension(target: Target, sandbox: httpx.Client) -> None:
    meter = target.meters()[REQUESTS_METER]
    late, early = "2026-11-03T23:59:59Z", "2026-11-04T00:00:00Z"
    send(
        sandbox,
        event("a", subject="consumer:1", time=late, data={"route_name": "orders"}),
        event("b", subject="consumer:1", time=late, data={"route_name": "orders"}),
        event("c", subject="consumer:1", time=late, data={}),
        event("d", subject="consumer:2", time=early, data={"route_name": "orders", "status": "200"}),
    ).raise_for_status()
    since, until = "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"
    assert target.daily_totals(meter, since, until) == {date(2026, 11, 3): 3, date(2026, 11, 4): 1}
    assert sorted(target.grouped_usage(meter, ["route_name", "status"], since, until)) == [
        ("consumer:1", ("", ""), 1),
        ("consumer:1", ("orders", ""), 2),
        ("consumer:2", ("orders", "200"), 1),
    ]
    day = target.grouped_usage(meter, [], "2026-11-03T00:00:00Z", "2026-11-04T00:00:00Z")
    assert day == [("consumer:1", (), 3)]
    assert target.grouped_usage(meter, [], "2026-11-05T00:00:00Z", "2026-11-06T00:00:00Z") == []
