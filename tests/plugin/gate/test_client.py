"""The access client: every dialect says the same about the same customers, whatever calls it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import pytest

from openmeter_plugin.gate.accounts import Reading, Reason
from openmeter_plugin.gate.client import Access, AccessClient, ApiError
from openmeter_plugin.gate.settings import Settings
from syncd.sandbox.testing import running_sandbox

_QUERY = "/api/v3/openmeter/entitlement-access/query"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_sandbox() as url, httpx.Client(base_url=url) as api:
        for key, allowance in (("some", 7), ("spent", 0), ("endless", None), ("bare", False)):
            body = {"key": key, "name": key, "usageAttribution": {"subjectKeys": [f"{key}-1", f"{key}-2"]}}
            assert api.post("/api/v1/customers", json=body).is_success
            if allowance is not False:
                wanted = {"feature_key": "api", "allowance": allowance}
                assert api.post(f"/sandbox/v1/customers/{key}/entitlements", json=wanted).is_success
        yield url


@pytest.fixture(params=["openmeter-v1", "openmeter-v3", "without the query"])
def dialect(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    if request.param != "without the query":
        yield request.param
        return
    fault = {"path": _QUERY, "action": "answer", "status": 404}
    assert httpx.post(f"{url}/sandbox/v1/faults", json=fault).is_success
    yield "openmeter-v3"
    httpx.delete(f"{url}/sandbox/v1/faults")


class Asked:
    """What an access client answered, and how many requests it made and noted."""

    def __init__(self, url: str, dialect: str, *subjects: str) -> None:
        metering = {"url": url, "dialect": dialect}
        self.settings = Settings.model_validate({"metering": metering, "features": [{"key": "api"}]})
        self.noted = 0
        self.access: dict[str, Access] = {}
        self.exact: dict[str, Reading] = {}
        self.requests = asyncio.run(self._run(subjects))

    def _note(self) -> None:
        self.noted += 1

    async def _run(self, subjects: Sequence[str]) -> int:
        client = AccessClient(self.settings, self._note)
        try:
            answers = await client.access(subjects)
            if answers is None:
                answers = [each for subject in subjects for each in await client.access([subject]) or ()]
            self.access = {answer.subject: answer for answer in answers}
            for subject, answer in self.access.items():
                if answer.account is not None:
                    balances = await client.balances(answer.account)
                    assert balances is not None
                    if "api" in balances:
                        self.exact[subject] = balances["api"]
            return sum(client.calls.values())
        finally:
            await client.close()


def reasons(access: Mapping[str, Access]) -> dict[str, Reason | None]:
    return {subject: answer.readings["api"].reason for subject, answer in access.items()}


def test_every_dialect_says_who_has_access_and_how_much_is_left(url: str, dialect: str) -> None:
    found = Asked(url, dialect, "some-1", "some-2", "spent-1", "endless-1", "bare-2", "nobody")
    assert reasons(found.access) == {
        "some-1": None,
        "some-2": None,
        "spent-1": Reason.USAGE_LIMIT_REACHED,
        "endless-1": None,
        "bare-2": Reason.FEATURE_UNAVAILABLE,
        "nobody": Reason.CUSTOMER_NOT_FOUND,
    }
    accounts = {subject: answer.account for subject, answer in found.access.items()}
    assert accounts["some-1"] == accounts["some-2"]
    assert accounts["nobody"] is None
    assert len(set(accounts.values())) == 5
    left = {subject: (reading.balance, reading.quota) for subject, reading in found.exact.items()}
    assert [left[subject] for subject in ("some-2", "endless-1")] == [(7, 7), (None, None)]
    assert found.exact["spent-1"].reason is Reason.USAGE_LIMIT_REACHED
    assert all(reading.exact for reading in found.exact.values())


def test_every_request_is_noted(url: str, dialect: str) -> None:
    found = Asked(url, dialect, "some-1", "nobody")
    assert found.noted == found.requests >= 2


def test_a_customers_own_key_is_its_subject_too(url: str, dialect: str) -> None:
    found = Asked(url, dialect, "some", "some-1")
    assert found.access["some"].account == found.access["some-1"].account


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "token_refused"), (429, "too_many_requests"), (500, "failed")]
)
@pytest.mark.parametrize("name", ["openmeter-v1", "openmeter-v3"])
def test_a_refusal_is_never_an_answer_about_access(url: str, name: str, status: int, kind: str) -> None:
    fault: dict[str, Any] = {"status": status, "retry_after": 7}
    assert httpx.post(f"{url}/sandbox/v1/faults", json=fault).is_success
    try:
        with pytest.raises(ApiError) as caught:
            Asked(url, name, "some-1")
    finally:
        httpx.delete(f"{url}/sandbox/v1/faults")
    assert caught.value.kind == kind
    assert caught.value.retry_after == (7 if status == 429 else 1)
