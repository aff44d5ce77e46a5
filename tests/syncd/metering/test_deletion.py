"""What hangs on a customer, over real HTTP: from the sandbox in both dialects, and by scripted answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.core.model import CustomerDetails
from syncd.http.client import ApiClient, Endpoint
from syncd.http.retry import Retry
from syncd.metering.base import Inspection
from syncd.metering.deletion import ApiInspector
from syncd.metering.meters import Dialect
from tests.syncd.metering.test_contract import specs_of
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import MARKS, by_hand, subscribe


def inspector(client: ApiClient, dialect: Dialect) -> ApiInspector:
    client._client.event_hooks = {"response": [found.check for found in specs_of(dialect)]}
    return ApiInspector(client, dialect)


def opened(url: str) -> ApiClient:
    return ApiClient(Endpoint("metering", url, "metering.token", "read"), Retry(attempts=1))


@pytest.fixture
def inspect(
    sandbox: httpx.Client, dialect: Dialect
) -> Iterator[Callable[[dict[str, object]], Inspection | None]]:
    base = str(sandbox.base_url).rstrip("/") + ("/api/v3" if dialect == "openmeter-v3" else "")
    with opened(base) as client:
        yield lambda customer: inspector(client, dialect).inspect(str(customer["id"]))


Inspect = Callable[[dict[str, object]], Inspection | None]


def test_a_customer_as_syncd_made_it_has_nothing(inspect: Inspect, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME", metadata=MARKS)
    assert inspect(made) == Inspection("ACME", CustomerDetails(metadata=MARKS), (), {}, ())


def test_all_that_people_wrote_into_it_is_seen(inspect: Inspect, sandbox: httpx.Client) -> None:
    made = by_hand(
        sandbox,
        key="acme",
        name="ACME",
        primaryEmail="a@x.example",
        currency="EUR",
        description="Ask Jane",
        billingAddress={"country": "DE", "postalCode": "10115"},
        metadata={"crm": "7"},
    )
    found = inspect(made)
    assert found is not None
    address = {"country": "DE", "postal_code": "10115"}
    assert found.details == CustomerDetails("a@x.example", "EUR", "Ask Jane", address, {"crm": "7"})


def test_entitlements_and_subscriptions_are_seen_ended_ones_too(
    inspect: Inspect, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="ACME")
    sandbox.post("/sandbox/v1/customers/acme/entitlements", json={"feature_key": "gpt"}).raise_for_status()
    subscribe(sandbox, "acme")
    sandbox.delete("/sandbox/v1/customers/acme/subscriptions").raise_for_status()
    subscribe(sandbox, "acme")
    by_hand(sandbox, key="other", name="Other")
    subscribe(sandbox, "other")
    found = inspect(made)
    assert found is not None
    assert found.entitlements == ("gpt",)
    assert sorted((found.subscriptions or {}).values()) == ["active", "inactive"]
    assert len(found.open_subscriptions) == 1


def test_a_customer_that_is_gone_is_none(inspect: Inspect, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME")
    sandbox.delete("/api/v1/customers/acme").raise_for_status()
    assert inspect(made) is None
    assert inspect({"id": "01J0000000000000000000000Z"}) is None


def scripted(dialect: Dialect, **answers: Answer) -> Inspection | None:
    """Ask a server that has a customer C; `answers` by the last part of their path, else 404."""

    def answer(asked: Asked) -> Answer:
        last = asked.path.rpartition("/")[2]
        return Answer({"id": "C", "name": "C"}) if last == "C" else answers.get(last, Answer({}, 404))

    with serving(answer) as server, opened(server.url) as client:
        return ApiInspector(client, dialect).inspect("C")


def test_an_edition_without_billing_has_nothing_that_could_hang_on_a_customer(dialect: Dialect) -> None:
    assert scripted(dialect) == Inspection("C", subscriptions={})


def test_an_account_with_a_payment_app_is_seen() -> None:
    apps = Answer({"items": [{"type": "sandbox"}, {"type": "stripe", "stripeCustomerId": "cus_1"}]})
    found = scripted("openmeter-v1", apps=apps)
    assert found is not None
    assert found.others == ("an account with stripe",)
    billing = Answer({"billing_profile": {"id": "P"}, "app_data": {"stripe": {"customer_id": "cus_1"}}})
    found = scripted("openmeter-v3", billing=billing)
    assert found is not None
    assert found.others == ("an account with stripe",)


def test_a_payment_app_that_does_not_know_the_customer_is_no_account() -> None:
    found = scripted("openmeter-v3", billing=Answer({"detail": "stripe customer data not found"}, 400))
    assert found is not None
    assert found.others == ()


def test_more_subscriptions_than_are_listed_count_as_one_that_runs(dialect: Dialect) -> None:
    ended = [{"id": f"S{number}", "status": "inactive"} for number in range(100)]
    for listed, runs in ((ended[:99], False), (ended, True)):
        found = scripted(dialect, subscriptions=Answer({"items": listed, "data": listed}))
        assert found is not None
        assert bool(found.open_subscriptions) is runs


def test_credits_are_seen() -> None:
    found = scripted("openmeter-v3", grants=Answer({"data": [{"id": "G"}], "meta": {}}))
    assert found is not None
    assert found.others == ("credits",)


@pytest.mark.parametrize("part", ["access", "subscriptions", "apps"])
def test_what_must_not_or_cannot_be_read_is_an_error_and_not_nothing(part: str) -> None:
    for status, error in ((403, UnauthorizedError), (400, RefusedError)):
        with pytest.raises(error):
            scripted("openmeter-v1", **{part: Answer({}, status)})
