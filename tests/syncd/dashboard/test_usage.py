"""The usage page: its figures are those of the metering API and of `syncd usage`, to the event."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tests.syncd.dashboard.support import Site, Visitor, elements, site, text_of
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, send, tokens
from tests.syncd.targets import by_hand

pytestmark = pytest.mark.slow

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
PRICES = """
prices:
  currency: EUR
  rates:
    - {meter: kong_api_requests, amount: 0.10}
    - {meter: kong_llm_tokens, where: {type: input}, amount: 2, per: 1000}
"""


def at(days_ago: int) -> str:
    return (TODAY - timedelta(days=days_ago)).strftime("%Y-%m-%dT00:30:00Z")


def day(days_ago: int) -> str:
    return at(days_ago)[:10]


def requests(sandbox: httpx.Client, subject: str, days_ago: int, count: int, route: str = "orders") -> None:
    several = (
        event(
            f"{subject}-{days_ago}-{route}-{number}",
            subject=subject,
            time=at(days_ago),
            data={"route_name": route},
        )
        for number in range(count)
    )
    send(sandbox, *several).raise_for_status()


def model_tokens(sandbox: httpx.Client, subject: str, days_ago: int, amount: int, kind: str) -> None:
    data = {"tokens": amount, "model": "tiny", "type": kind}
    made = tokens(f"{subject}-{days_ago}-{kind}", amount, subject=subject, time=at(days_ago), data=data)
    send(sandbox, made).raise_for_status()


def world(sandbox: httpx.Client) -> None:
    """Customers of each kind over the last ten days, compared with the ten before them."""
    used = {"grown": (9, 3), "shrunk": (2, 6), "steady": (5, 4), "silent": (0, 7), "fresh": (4, 0)}
    for key, (now, before) in used.items():
        by_hand(sandbox, name=f"{key} <GmbH>", key=key, usageAttribution={"subjectKeys": [f"s-{key}"]})
        requests(sandbox, f"s-{key}", 3, now)
        requests(sandbox, f"s-{key}", 14, before)
    requests(sandbox, "nobody", 2, 6, "search")
    model_tokens(sandbox, "s-grown", 3, 3000, "input")
    model_tokens(sandbox, "s-grown", 3, 500, "output")
    requests(sandbox, "s-steady", 60, 1)


RANGE = {"from": day(9), "through": day(0)}


@contextmanager
def opened(project: Project, extra: str = "") -> Iterator[tuple[Site, Visitor]]:
    with site(project, extra=extra) as found, found.operator() as visitor:
        done = found.running.usage.refresh()
        assert done.problem is None
        yield found, visitor


def section(page: str, heading: str) -> str:
    """The text of the section with this heading."""
    found = re.search(rf"<h2 id=\"{heading}\".*?</section>", page, re.DOTALL)
    assert found, f"no {heading} in {text_of(page)}"
    return text_of(found[0])


def test_the_page_the_command_and_the_api_have_the_same_figures(
    project: Project, sandbox: httpx.Client
) -> None:
    world(sandbox)
    with opened(project, PRICES) as (_, visitor):
        page = visitor.see("/dashboard/usage", **RANGE)
        downloaded = visitor.see("/dashboard/usage", csv="customers", **RANGE)
        days = visitor.see("/dashboard/usage", csv="days", **RANGE)
    end = (TODAY + timedelta(days=1)).strftime("%Y-%m-%d")
    printed = json.loads(project.run("usage", "--from", day(9), "--to", end, "--output", "json").stdout)
    query = {"from": f"{day(9)}T00:00:00Z", "to": f"{end}T00:00:00Z", "groupBy": "subject"}
    rows = sandbox.get("/api/v1/meters/kong_api_requests/query", params=query).json()["data"]

    by_subject = {row["subject"]: row["value"] for row in rows}
    lines = list(csv.DictReader(io.StringIO(downloaded)))
    shown = {line["customer_key"] or line["subject"]: line for line in lines}
    of_command = {
        customer["key"]: customer["requests"] for customer in printed["customers"] if customer["requests"]
    }
    of_command |= {subject["key"]: subject["requests"] for subject in printed["unbilled"]}
    of_page = {
        key: int(line["kong_api_requests"]) for key, line in shown.items() if int(line["kong_api_requests"])
    }
    of_api = {subject.removeprefix("s-"): value for subject, value in by_subject.items()}
    assert of_page == of_command == of_api
    assert sum(of_page.values()) == printed["totals"]["requests"] == 26
    assert {line["kong_llm_tokens"] for line in lines if line["customer_key"] == "grown"} == {"3500"}
    assert sum(int(line["kong_api_requests"]) for line in csv.DictReader(io.StringIO(days))) == 26
    assert "Requests 26 +30.0 % against 20" in text_of(page)


def test_movers_new_and_silent_customers_are_named(project: Project, sandbox: httpx.Client) -> None:
    world(sandbox)
    with opened(project) as (_, visitor):
        page = visitor.see("/dashboard/usage", **RANGE)
    elements(page)
    assert re.search(r"grown <GmbH>.*9 34\.6 % \+200\.0 %", section(page, "top"))
    assert "+200.0 %" in section(page, "risers")
    assert "grown" in section(page, "risers")
    assert "steady" not in section(page, "risers")
    assert "shrunk <GmbH>" in section(page, "fallers")
    assert "-66.7 %" in section(page, "fallers")
    assert "fresh" in section(page, "new")
    assert "silent" in section(page, "silent")
    assert re.search(r"orders 20 .*search 6 ", section(page, "by-1"))
    assert "EUR" not in page, "without prices there is no money"
    assert "<script" not in page
    assert "style=" not in page


def test_a_customer_that_was_silent_for_a_while_is_not_new(project: Project, sandbox: httpx.Client) -> None:
    by_hand(sandbox, name="Back", key="back", usageAttribution={"subjectKeys": ["s-back"]})
    requests(sandbox, "s-back", 3, 4)
    requests(sandbox, "s-back", 70, 1)
    with opened(project) as (_, visitor):
        assert "Back" not in section(visitor.see("/dashboard/usage", **RANGE), "new")


def test_usage_is_estimated_and_what_has_no_price_is_named(project: Project, sandbox: httpx.Client) -> None:
    world(sandbox)
    with opened(project, PRICES) as (_, visitor):
        page = text_of(visitor.see("/dashboard/usage", **RANGE))
        lines = list(csv.DictReader(io.StringIO(visitor.see("/dashboard/usage", csv="customers", **RANGE))))
    assert "Estimate 8.60 EUR" in page, "26 requests and 3,000 tokens"
    assert "estimate 0.60 EUR" in page, "of the six unbilled requests"
    assert "No price fits 500 of kong_llm_tokens" in page
    assert {line["estimate"] for line in lines if line["customer_key"] == "grown"} == {"6.900"}


def test_late_events_are_listed_with_their_customer(project: Project, sandbox: httpx.Client) -> None:
    world(sandbox)
    with opened(project) as (found, visitor):
        assert "None since the daemon began to keep usage." in visitor.see("/dashboard/usage", **RANGE)
        requests(sandbox, "s-grown", 5, 2, "late")
        assert found.running.usage.refresh().days == 1
        late = section(visitor.see("/dashboard/usage", **RANGE), "late")
    assert re.search(rf"{day(5)} grown <GmbH>.*s-grown kong_api_requests \+2", late)


def test_names_from_outside_are_shown_as_text_and_run_by_no_spreadsheet(
    project: Project, sandbox: httpx.Client
) -> None:
    by_hand(sandbox, name="=cmd()<script>x</script>", key="evil", usageAttribution={"subjectKeys": ["s"]})
    requests(sandbox, "s", 3, 1)
    with opened(project) as (_, visitor):
        assert "<script" not in visitor.see("/dashboard/usage", **RANGE)
        assert "'=cmd()" in visitor.see("/dashboard/usage", csv="customers", **RANGE)


def test_before_the_first_refresh_the_page_says_when_there_will_be_figures(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        assert "No usage has been fetched yet." in text_of(visitor.see("/dashboard/usage"))


@pytest.mark.parametrize(
    "query",
    [
        {"month": "2026-13"},
        {"from": "yesterday"},
        {"from": "2026-05-05", "through": "2026-05-01"},
        {"meter": "x"},
    ],
)
def test_a_wrong_period_is_named_and_this_month_is_shown(project: Project, query: dict[str, str]) -> None:
    with site(project) as found, found.operator() as visitor:
        page = text_of(visitor.see("/dashboard/usage", **query))
    assert ("This period cannot be shown" in page) is ("meter" not in query)


def test_pages_ask_the_metering_api_for_nothing(project: Project, sandbox: httpx.Client) -> None:
    world(sandbox)
    with opened(project) as (_, visitor):
        sandbox.post("/sandbox/v1/faults", json={"status": 500}).raise_for_status()
        begun = datetime.now(UTC)
        assert "Requests 26" in text_of(visitor.see("/dashboard/usage", **RANGE))
        assert datetime.now(UTC) - begun < timedelta(seconds=2)
