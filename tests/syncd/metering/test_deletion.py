"""Inspection before a deletion, over real HTTP: the sandbox in both dialects, and scripted answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import httpx
import pytest

from syncd.config.settings import Dialect
from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.metering.base import Inspection
from tests.specs import checked
from tests.syncd.metering.test_contract import specs_of
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import OWNERSHIP, by_hand, open_target, subscribe, target_with


@pytest.fixture
def inspect(
    sandbox: httpx.Client, dialect: Dialect
) -> Iterator[Callable[[dict[str, object]], Inspection | None]]:
    with closing(open_target(dialect, str(sandbox.base_url))) as target:
        checked(target._client, specs_of(dialect))
        yield lambda customer: target.inspect(str(customer["id"]))


Inspect = Callable[[dict[str, object]], Inspection | None]


def test_nothing_depends_on_a_customer_that_syncd_created(inspect: Inspect, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME", metadata=OWNERSHIP)
    assert inspect(made) == Inspection()


def test_entitlements_and_subscriptions_that_have_not_ended_are_found(
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
    assert len(found.open_subscriptions) == 1


def test_a_deleted_or_unknown_customer_is_none(inspect: Inspect, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME")
    sandbox.delete("/api/v1/customers/acme").raise_for_status()
    assert inspect(made) is None
    assert inspect({"id": "01J0000000000000000000000Z"}) is None


def scripted(dialect: Dialect, **answers: Answer) -> Inspection | None:
    """Inspect a customer C on a server with `answers` by the last part of their path, else 404."""

    def answer(asked: Asked) -> Answer:
        last = asked.path.rpartition("/")[2]
        return Answer({"id": "C", "name": "C"}) if last == "C" else answers.get(last, Answer({}, 404))

    with serving(answer) as server, closing(target_with(dialect, server.url)) as target:
        return target.inspect("C")


def test_on_a_server_without_billing_nothing_depends_on_a_customer(dialect: Dialect) -> None:
    assert scripted(dialect) == Inspection()


def test_a_full_page_of_subscriptions_counts_as_an_open_one(dialect: Dialect) -> None:
    ended = [{"id": f"S{number}", "status": "inactive"} for number in range(100)]
    for listed, runs in ((ended[:99], False), (ended, True)):
        found = scripted(dialect, subscriptions=Answer({"items": listed, "data": listed}))
        assert found is not None
        assert bool(found.open_subscriptions) is runs


@pytest.mark.parametrize("part", ["access", "subscriptions", "invoices"])
@pytest.mark.parametrize(("status", "error"), [(403, UnauthorizedError), (400, RefusedError)])
def test_a_part_that_cannot_be_read_is_an_error_and_not_nothing(
    part: str, status: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        scripted("openmeter-v1", **{part: Answer({}, status)})


def test_an_invoice_that_is_not_final_is_found_where_the_dialect_shows_it() -> None:
    """As a real OpenMeter answers: only the filter by status lists an invoice that still gathers."""

    def answer(asked: Asked) -> Answer:
        if asked.path == "/api/v1/billing/invoices":
            assert asked.query["customers"] == "C"
            gathering = asked.query.get("statuses") == "gathering"
            return Answer({"items": [{"id": "I", "status": "gathering"}] if gathering else []})
        if asked.path.endswith(("/access", "/subscriptions")):
            return Answer({"items": [], "entitlements": {}})
        return Answer({"id": "C", "name": "ACME"})

    with serving(answer) as server, closing(open_target("openmeter-v1", server.url)) as target:
        found = target.inspect("C")
    assert found is not None
    assert found.open_invoices == ("I",)
