"""The customers table and the page of a customer, of a real daemon with a real metering API."""

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

from syncd.customers.directory import Directory
from syncd.http.client import request_counts
from syncd.state.database import State
from tests.syncd.dashboard.gateways import FakeGateway, configured, gateway
from tests.syncd.dashboard.support import Site, Visitor, consumers, elements, refresh_usage, site, text_of
from tests.syncd.dashboard.test_gate import DENIED, gate
from tests.syncd.dashboard.test_pages import rerun, row
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, ok, send, tokens
from tests.syncd.servers import Answer, serving
from tests.syncd.targets import by_hand, subscribe

pytestmark = pytest.mark.slow

TODAY = datetime.now(UTC).date()
WHO = ("alice", "bob", "carol")
TAGS = {"alice": "acme", "bob": "acme"}


@contextmanager
def world(project: Project, sandbox: httpx.Client, extra: str = "") -> Iterator[tuple[Site, Visitor]]:
    """Acme with alice and bob, carol on her own, and Initech that finance made; all have been observed."""
    by_hand(sandbox, name="Initech", key="initech")
    consumers(project, *WHO, tags=TAGS)
    with site(project, extra=extra) as found, found.operator() as visitor:
        rerun(found)
        yield found, visitor


def subject(found: Site, name: str) -> str:
    """The subject of a consumer, as the directory knows it."""
    with State(found.running.config.daemon.state) as state:
        directory = Directory(state)
        keys = [key for one in directory.customers() for key in one.subject_keys]
        return next(key for key, who in directory.names(keys).items() if who[0].username == name)


def sent(found: Site, sandbox: httpx.Client) -> dict[str, str]:
    """Send usage of today: alice 3 requests on two routes and 40 tokens, bob 1, carol 5, the key acme 1."""
    who = {name: subject(found, name) for name in WHO}
    send(
        sandbox,
        *(event(f"a{n}", subject=who["alice"]) for n in range(2)),
        event("a2", subject=who["alice"], data={"status": 200, "route_name": "checkout"}),
        tokens("at", 40, subject=who["alice"]),
        event("b", subject=who["bob"]),
        *(event(f"c{n}", subject=who["carol"]) for n in range(5)),
        event("k", subject="acme"),
        event("nobody", subject="stranger"),
    )
    refresh_usage(found)
    return who


def names_of(page: str) -> list[str]:
    """The customers of a page, in its order."""
    return re.findall(r'<th scope="row"><a href="[^"]+"><bdi>(.*?)</bdi>', page)


def rows_of(text: str) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in csv.DictReader(io.StringIO(text))}


def test_customers_are_sorted_by_usage_with_totals(project: Project, sandbox: httpx.Client) -> None:
    with world(project, sandbox) as (found, visitor):
        sent(found, sandbox)
        page = visitor.see("/dashboard/customers")
        assert names_of(page) == ["acme", "carol", "Initech"]
        assert "syncd 2 5 40 0" in row(page, "acme")
        assert "Finance (not managed) 0 0 0 0" in row(page, "Initech")
        assert "Total of 3 customers 10 40 0" in text_of(page), "without the stranger"
        assert names_of(visitor.see("/dashboard/customers", sort="name")) == ["acme", "carol", "Initech"]
        unused = visitor.see("/dashboard/customers", usage="unused")
        assert names_of(unused) == ["Initech"]
        assert "1 customer of 3" in text_of(unused)
        assert names_of(visitor.see("/dashboard/customers", managed="finance")) == ["Initech"]


@pytest.mark.parametrize("text", ["ALICE", "customer:acme", "acme"])
def test_a_customer_is_found_by_the_name_and_tag_of_its_consumers(
    project: Project, sandbox: httpx.Client, text: str
) -> None:
    with world(project, sandbox) as (_, visitor):
        page = visitor.see("/dashboard/customers", q=text)
        assert "No usage has been read yet" in page
        assert names_of(page) == ["acme"]
        assert f'value="{text}"' in page
        assert "No customers match" in visitor.see("/dashboard/customers", q="nobody-at-all")


def test_blocked_and_unbilled_customers_can_be_listed(project: Project, sandbox: httpx.Client) -> None:
    with world(project, sandbox) as (found, visitor):
        subscribe(sandbox, "acme")
        consumers(project, *WHO, "late", tags={**TAGS, "late": "acme"})
        rerun(found)
        with State(found.running.config.daemon.state) as state:
            (late,) = Directory(state).concerns("acme")
        send(sandbox, event("1", subject=late.subject), event("2", subject=late.subject))
        rerun(found)
        for state_of in ("blocked", "unbilled"):
            assert names_of(visitor.see("/dashboard/customers", state=state_of)) == ["acme"]
        page = visitor.see("/dashboard/customers", subscription="active")
        assert "syncd subscription blocked 2 2" in row(page, "acme")
        one = visitor.see("/dashboard/customers/acme")
        assert f"late {late.subject} blocked 2 0" in row(one, "late")


def test_the_csv_is_the_table_with_all_pages(project: Project, sandbox: httpx.Client) -> None:
    with world(project, sandbox) as (found, visitor):
        for number in range(60):
            by_hand(sandbox, name=f"many {number:02}", key=f"m-{number}")
        sent(found, sandbox)
        rerun(found)
        page = visitor.see("/dashboard/customers", q="many", sort="name")
        assert "1 to 50 of 60" in page
        following = re.search(r'href="([^"]+)" rel="next"', page)
        assert following
        second = visitor.see(following[1].replace("&amp;", "&"))
        assert names_of(second)[-1] == "many 59", "the next page keeps search and order"
        answer = visitor.client.get("/dashboard/customers", params={"csv": "1", "q": "many"})
        assert len(rows_of(answer.text)) == 60
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        everybody = rows_of(visitor.client.get("/dashboard/customers?csv=1").text)
        assert (everybody["acme"]["requests"], everybody["acme"]["tokens"]) == ("5", "40")


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_figures_equal_syncd_usage_and_the_metering_api_to_the_event(
    project: Project, sandbox: httpx.Client, dialect: str
) -> None:
    url = str(sandbox.base_url)
    metering = f"metering: {{url: '{url}', dialect: {dialect}, attempts: 1}}\n"
    with world(project, sandbox, metering) as (found, visitor):
        who = sent(found, sandbox)
        yesterday = datetime.now(UTC) - timedelta(days=1)
        send(sandbox, event("y", subject=who["bob"], time=yesterday.isoformat()))
        refresh_usage(found)
        since, days = yesterday.date(), {"from": str(yesterday.date()), "through": str(TODAY)}
        listed = rows_of(visitor.client.get("/dashboard/customers", params={"csv": "1", **days}).text)
        told = json.loads(project.call("usage", "--from", str(since), "--output", "json").stdout)
        assert {one["name"]: (one["requests"], one["tokens"]) for one in told["customers"]} == {
            name: (int(one["requests"]), int(one["tokens"])) for name, one in listed.items()
        }
        assert listed["acme"]["requests"] == "6"
        subjects = visitor.client.get("/dashboard/customers/acme", params={"csv": "1", **days}).text
        (acme,) = (one for one in told["customers"] if one["key"] == "acme")
        assert {one["key"]: one["requests"] for one in acme["subjects"]} == {
            one["subject"]: int(one["requests"]) for one in csv.DictReader(io.StringIO(subjects))
        }
        period = {"from": f"{since}T00:00:00Z"}
        answer = ok(
            sandbox.get("/api/v1/meters/kong_api_requests/query", params={"groupBy": "subject", **period})
        )
        by_api = {line["subject"]: line["value"] for line in answer["data"]}
        assert sum(by_api.get(key, 0) for key in (who["alice"], who["bob"], "acme")) == 6


def test_a_customer_has_a_page_with_the_names_behind_its_subjects(
    project: Project, sandbox: httpx.Client
) -> None:
    with world(project, sandbox) as (found, visitor):
        who = sent(found, sandbox)
        page = visitor.see("/dashboard/customers/acme")
        assert f"alice {who['alice']} consumer, declarative-file-0 none customer:acme 3 40" in row(
            page, "alice"
        )
        assert "acme the customer's key none none 1 0" in row(page, "acme")
        assert "search 4" in row(page, "search"), "by route"
        assert "checkout 1" in row(page, "checkout")
        assert "tiny 40" in row(page, "tiny"), "by model"
        assert "create-customer new: consumer alice, consumer bob" in text_of(page)
        assert TODAY.isoformat() in page, "a day of the chart's table"
        assert elements(page).of("script") == []
        id_ = sandbox.get("/api/v1/customers/acme").json()["id"]
        assert f'<bdi class="key">{id_}</bdi>' in page
        assert visitor.see(f"/dashboard/customers/{id_}").count("<h1>") == 1, "by id as well"
        assert visitor.client.get("/dashboard/customers/nobody").status_code == 404


def test_a_page_says_what_a_customer_has_and_what_remains(project: Project, sandbox: httpx.Client) -> None:
    with world(project, sandbox) as (found, visitor):
        who = sent(found, sandbox)
        ok(
            sandbox.post(
                "/sandbox/v1/customers/acme/entitlements", json={"feature_key": "api", "allowance": 9}
            )
        )
        ok(sandbox.post("/sandbox/v1/customers/acme/subscriptions", json={"plan_key": "gold"}))
        send(sandbox, event("z", subject=who["bob"]))
        page = visitor.see("/dashboard/customers/acme")
        assert "api yes 3 9 6" in row(page, "api"), "one more than the usage that is kept"
        assert "Gold gold version 1 active" in row(page, "Gold")
        assert "No entitlements" in visitor.see("/dashboard/customers/initech")


def test_a_metering_api_that_is_away_leaves_the_rest_of_the_page(
    project: Project, sandbox: httpx.Client
) -> None:
    with world(project, sandbox) as (found, visitor):
        sent(found, sandbox)
        config = found.running.config
        with serving(lambda _asked: Answer(status=503)) as away:
            metering = config.metering.model_copy(update={"url": away.url})
            found.running.config = config.model_copy(update={"metering": metering})
            page = visitor.see("/dashboard/customers/acme")
        assert "Cannot be read" in text_of(page)
        assert row(page, "alice").endswith("3 40")


def test_what_the_gate_of_a_gateway_says_of_a_customer_is_shown(
    project: Project, sandbox: httpx.Client
) -> None:
    fake = FakeGateway(gate=gate("enforce"))
    with gateway(fake) as there, world(project, sandbox, configured(eu=there.url)) as (found, visitor):
        alice = subject(found, "alice")
        override = {"subject": alice, "until": 1_800_000_000.0, "why": "trial", "by": "ann"}
        fake.gate = gate("enforce") | {"denied": [DENIED | {"subjects": [alice]}], "overrides": [override]}
        page = visitor.see("/dashboard/customers/acme")
        assert "eu api stopped USAGE_LIMIT_REACHED" in row(page, "eu")
        assert f"{alice} may pass until 2027-01-15" in text_of(page)
        assert "USAGE_LIMIT_REACHED" not in visitor.see("/dashboard/customers/initech")


def test_the_link_leads_to_the_customers_page_in_the_metering_service(
    project: Project, sandbox: httpx.Client
) -> None:
    with world(project, sandbox) as (found, visitor):
        assert "Open in the metering service" not in visitor.see("/dashboard/customers/acme")
        config = found.running.config
        template = "https://billing.example.com/{id}?k={key}"
        metering = config.metering.model_copy(update={"customer_url": template})
        found.running.config = config.model_copy(update={"metering": metering})
        id_ = sandbox.get("/api/v1/customers/acme").json()["id"]
        assert f'href="https://billing.example.com/{id_}?k=acme"' in visitor.see("/dashboard/customers/acme")


@pytest.mark.parametrize("key", ["a b/c?d#e&f", "100%", "ä:1", "x" * 200])
def test_a_page_is_reached_by_the_link_of_the_table_whatever_the_key_is(
    project: Project, sandbox: httpx.Client, key: str
) -> None:
    by_hand(sandbox, name="Odd", key=key)
    with site(project) as found, found.operator() as visitor:
        page = visitor.see("/dashboard/customers", q="Odd")
        link = re.search(r'<th scope="row"><a href="([^"]+)"', page)
        assert link
        assert "<h1><bdi>Odd</bdi></h1>" in visitor.see(link[1].replace("&amp;", "&"))


def test_no_view_of_the_table_asks_the_metering_api(project: Project, sandbox: httpx.Client) -> None:
    with world(project, sandbox) as (found, visitor):
        sent(found, sandbox)
        before = dict(request_counts())
        for query in ({}, {"q": "acme"}, {"sort": "-tokens"}, {"csv": "1"}):
            assert visitor.client.get("/dashboard/customers", params=query).status_code == 200
        assert dict(request_counts()) == before


def test_a_wrong_period_is_named_and_this_month_is_shown(project: Project, sandbox: httpx.Client) -> None:
    with world(project, sandbox) as (_, visitor):
        for query in (
            {"month": "2026-13"},
            {"from": "yesterday"},
            {"from": "2026-02-02", "through": "2026-01-01"},
        ):
            page = visitor.see("/dashboard/customers", **query)
            assert 'class="notice warning"' in page
            assert f"{TODAY:%B %Y}" in text_of(page)
