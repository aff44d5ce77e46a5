"""A page of customers, read from both dialects of the metering API."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from syncd.config.settings import Config, load
from syncd.core.errors import MalformedError, UnreachableError
from syncd.dashboard.customers import PAGE_SIZE, Page, read_page, spans
from syncd.http.client import request_counts
from tests.syncd.sandbox.support import create_customer, event, send, tokens
from tests.syncd.servers import Answer, Asked, Server, serving

pytestmark = pytest.mark.slow

NOW = datetime.now(UTC)
MONTH = spans(NOW)[0]


@pytest.fixture(params=["openmeter-v1", "openmeter-v3"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(tmp_path: Path, sandbox: httpx.Client, dialect: str) -> Config:
    return configured(tmp_path, str(sandbox.base_url).rstrip("/"), dialect)


def configured(folder: Path, url: str, dialect: str = "openmeter-v1") -> Config:
    path = folder / "syncd.yaml"
    path.write_text(
        "sources: [{type: static, subjects: []}]\n"
        f"metering: {{url: '{url}', dialect: {dialect}, timeout: 20s}}\n"
    )
    return load(path)


def names(page: Page) -> list[str]:
    return [customer.name for customer in page.customers]


def used(page: Page, name: str) -> dict[str, tuple[float, float]]:
    (customer,) = [customer for customer in page.customers if customer.name == name]
    requests, used_tokens = page.requests.get(customer.id, {}), page.tokens.get(customer.id, {})
    return {
        key: (requests.get(key, 0), used_tokens.get(key, 0)) for key in requests.keys() | used_tokens.keys()
    }


def test_customers_come_with_the_usage_of_each_subject(config: Config, sandbox: httpx.Client) -> None:
    create_customer(sandbox, "Acme", key="acme", subjects=["alice", "bob"])
    create_customer(sandbox, "Carol", key="carol-key", subjects=["carol"])
    send(sandbox, event("1"), event("2"), event("3", subject="bob"), tokens("4", 30, subject="bob"))
    send(sandbox, event("5", subject="acme"), event("6", subject="nobody"))
    page = read_page(config, "name", "", 1, MONTH)
    assert names(page) == ["Acme", "Carol"]
    assert used(page, "Acme") == {"alice": (2, 0), "bob": (1, 30), "acme": (1, 0)}
    assert used(page, "Carol") == {}
    assert (page.total, page.usage_problem) == (2, None)
    assert (page.customers[0].key, page.customers[0].subject_keys) == ("acme", ("alice", "bob"))


@pytest.mark.parametrize(
    ("field", "text", "found"),
    [
        ("name", "CME", ["Acme"]),
        ("key", "key-o", ["Other"]),
        ("subject", "consumer:2", ["Other"]),
        ("name", "nobody", []),
    ],
)
def test_customers_are_searched_by_the_metering_api(
    config: Config, sandbox: httpx.Client, field: str, text: str, found: list[str]
) -> None:
    create_customer(sandbox, "Acme", key="key-acme", subjects=["consumer:1"])
    create_customer(sandbox, "Other", key="key-other", subjects=["consumer:2"])
    page = read_page(config, field, text, 1, MONTH)  # type: ignore[arg-type]
    assert names(page) == found
    assert page.total == len(found)


def test_customers_are_paged_by_the_metering_api(config: Config, sandbox: httpx.Client) -> None:
    for number in range(PAGE_SIZE + 2):
        create_customer(sandbox, f"c{number:03}")
    first, second = (read_page(config, "name", "", number, MONTH) for number in (1, 2))
    assert (len(first.customers), names(second)) == (PAGE_SIZE, ["c025", "c026"])
    assert first.total == second.total == PAGE_SIZE + 2
    assert read_page(config, "name", "", 3, MONTH).customers == ()


def test_only_usage_of_the_span_counts(config: Config, sandbox: httpx.Client) -> None:
    create_customer(sandbox, "Acme", subjects=["alice"])
    by_name = {span.name: span for span in spans(NOW)}
    today = by_name["today"].since
    for number, when in enumerate(
        (today, today - timedelta(seconds=1), by_name["7d"].since, by_name["31d"].since)
    ):
        send(sandbox, event(str(number), time=when.isoformat()))

    def requests(name: str) -> float:
        found = used(read_page(config, "name", "", 1, by_name[name]), "Acme")
        return found.get("alice", (0, 0))[0]

    assert (requests("today"), requests("7d"), requests("31d")) == (1, 3, 4)


def test_the_last_month_ends_where_this_one_begins() -> None:
    by_name = {span.name: span for span in spans(datetime(2026, 3, 1, 0, 30, tzinfo=UTC))}
    assert by_name["month"].since == datetime(2026, 3, 1, tzinfo=UTC)
    last = by_name["last-month"]
    assert (last.since, last.until) == (datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC))
    assert last.title == "February 2026"


def test_a_missing_meter_leaves_the_customers_and_says_what_to_do(
    config: Config, sandbox: httpx.Client
) -> None:
    create_customer(sandbox, "Acme", subjects=["alice"])
    for meter in sandbox.get("/api/v1/meters").json():
        sandbox.delete(f"/api/v1/meters/{meter['id']}").raise_for_status()
    page = read_page(config, "name", "", 1, MONTH)
    assert names(page) == ["Acme"]
    assert page.requests == {}
    assert "syncd meters apply" in (page.usage_problem or "")


def test_a_page_takes_at_most_five_requests(config: Config, sandbox: httpx.Client) -> None:
    for number in range(40):
        create_customer(sandbox, f"c{number}")

    before = sum(request_counts().values())
    page = read_page(config, "name", "", 1, MONTH)
    assert len(page.customers) == PAGE_SIZE
    assert sum(request_counts().values()) - before <= 5


@pytest.fixture
def odd() -> Iterator[tuple[Server, dict[str, object]]]:
    """A v1 server with answers set by the test, which does not filter usage by customer."""
    answers: dict[str, object] = {}

    def answer(asked: Asked) -> Answer:
        if asked.path in answers:
            return Answer(answers[asked.path])
        rows = [
            {"subject": "alice", "value": 2},
            {"subject": "stranger", "value": 9},
            {"subject": "a", "value": 1},
        ]
        return Answer({"data": rows})

    with serving(answer) as server:
        yield server, answers


def test_a_server_that_sends_the_usage_of_all_customers_is_understood(
    tmp_path: Path, odd: tuple[Server, dict[str, object]]
) -> None:
    server, answers = odd
    answers["/api/v1/customers"] = {
        "items": [{"id": "1", "key": "a", "name": "A", "usageAttribution": {"subjectKeys": ["alice"]}}]
    }
    page = read_page(configured(tmp_path, server.url), "name", "", 1, MONTH)
    assert used(page, "A") == {"alice": (2, 2), "a": (1, 1)}
    assert page.total is None


@pytest.mark.parametrize(
    "document",
    [[], {"items": 1}, {"items": [{"id": "1"}]}, {"items": [{"id": 1, "name": "x"}]}, {"items": [7]}],
)
def test_malformed_customers_are_an_error(
    tmp_path: Path, odd: tuple[Server, dict[str, object]], document: object
) -> None:
    server, answers = odd
    answers["/api/v1/customers"] = document
    with pytest.raises(MalformedError):
        read_page(configured(tmp_path, server.url), "name", "", 1, MONTH)


def test_a_dead_server_is_tried_once(tmp_path: Path) -> None:
    with serving(lambda _asked: Answer(status=503)) as server:
        with pytest.raises(UnreachableError):
            read_page(configured(tmp_path, server.url), "name", "", 1, MONTH)
        assert len(server.asked) == 1
