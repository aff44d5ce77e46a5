"""Unbilled usage as a work list: what each subject is worth, and ignoring and assigning it."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from syncd.config import settings
from syncd.config.prices import PricesConfig
from syncd.dashboard.assigning import instruction
from syncd.dashboard.unbilled import Insight, insights
from syncd.metering.base import GroupedValue
from syncd.metering.usage import REQUESTS_METER
from syncd.state.database import State
from syncd.state.location import StateLocation
from syncd.usage.estimates import prices_of
from syncd.usage.store import UsageStore
from tests.syncd.dashboard.support import Site, Visitor, consumers, site, text_of
from tests.syncd.dashboard.test_pages import rerun, row
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, send
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow

YESTERDAY = (datetime.now(UTC) - timedelta(days=1)).date()


def metrics(found: Site) -> str:
    with found.api() as client:
        return client.get("/metrics").text


def planned_without_it(found: Site) -> bool:
    """Whether the run that a decision starts has ended."""
    return 'syncd_unbilled_events{status="unknown"} 0.0' in metrics(found)


def ignore(visitor: Visitor, key: str, **fields: str) -> httpx.Response:
    given = {"key": key, "reason": "our probe", "by": "mia", "until": "", **fields}
    return visitor.send("/dashboard/unbilled/ignore", "/dashboard/unbilled/subject?key=" + key, **given)


def test_a_subject_that_is_ignored_on_the_page_leaves_figures_metrics_and_exit_statuses_alone(
    project: Project, sandbox: httpx.Client
) -> None:
    send(sandbox, event("1", subject="probe"))
    with site(project) as found, found.operator() as visitor:
        assert "1 0" in row(visitor.see("/dashboard/unbilled"), "probe")
        answer = ignore(visitor, "probe")
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/unbilled")
        page = visitor.see("/dashboard/unbilled")
        assert "Every subject with usage has a customer" in page, "at once, before the next run"
        assert "our probe, by mia" in row(page, "probe"), "it stays visible"
        eventually(lambda: planned_without_it(found), what="the run that it starts")
        assert 'syncd_unbilled_events{status="ignored"} 1.0' in metrics(found)
        shown = project.call("plan")
        assert "Ignored: 1 event of probe (our probe, by mia)" in shown.stdout, "the command reads the state"
        assert shown.returncode == 0

        number = re.search(r'name="number" value="(\d+)"', page)
        assert number
        visitor.send("/dashboard/unbilled/stop-ignoring", "/dashboard/unbilled", number=number[1])
        eventually(lambda: not planned_without_it(found), what="the run that it starts")
        assert "unknown" in row(visitor.see("/dashboard/unbilled"), "probe")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"reason": " "}, "Say why"),
        ({"by": ""}, "Say why"),
        ({"by": "x" * 257}, "at most 256"),
        ({"until": "soon"}, "must be a day"),
        ({"until": str(YESTERDAY)}, "is over"),
    ],
)
def test_an_incomplete_decision_is_refused_with_the_fields_kept(
    project: Project, sandbox: httpx.Client, fields: dict[str, str], problem: str
) -> None:
    send(sandbox, event("1", subject="probe"))
    with site(project) as found, found.operator() as visitor:
        answer = ignore(visitor, "probe", **fields)
        assert answer.status_code == 400
        assert problem in text_of(answer.text)
        assert 'value="mia"' in answer.text or "by" in fields
        assert "unknown" in row(visitor.see("/dashboard/unbilled"), "probe")


def test_a_subject_that_is_not_unbilled_has_no_page_and_cannot_be_ignored(
    project: Project, sandbox: httpx.Client
) -> None:
    with site(project) as found, found.operator() as visitor:
        assert visitor.client.get("/dashboard/unbilled/subject", params={"key": "x"}).status_code == 404


def test_a_subject_of_nobody_is_assigned_by_a_static_source(project: Project, sandbox: httpx.Client) -> None:
    send(sandbox, event("1", subject="probe: x"))
    with site(project) as found, found.operator() as visitor:
        page = visitor.see("/dashboard/unbilled/subject", key="probe: x", customer="acme")
        assert "No source names this subject" in page
        assert "has this key" in page
        other = visitor.see("/dashboard/unbilled/subject", key="probe: x", customer="typo")
        assert "No customer has this key; the next run creates one." in other
        pasted = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)
        assert pasted
        text = project.config.read_text()
        entry = pasted[1].replace("&#39;", "'")
        source = "sources:\n- {type: declarative-file, path: kong.yml}\n" + entry
        project.config.write_text(re.sub(r"^sources:.*\n", lambda _: source, text, flags=re.MULTILINE))
        found.running.reload(lambda: settings.load(project.config))
        rerun(found, dry_run=False)
        rerun(found, dry_run=True)
        assert "Every subject with usage has a customer" in visitor.see("/dashboard/unbilled")


def test_the_row_of_a_mapping_file_is_written_where_that_is_allowed(
    project: Project, sandbox: httpx.Client
) -> None:
    file = project.folder / "map.csv"
    file.write_text("kind,id,username,customer\n,,alice,acme\n")
    mapping = "mapping: {group_by: file, file: map.csv, edit_file: %s}\n"
    with site(project, extra=mapping % "false") as found, found.operator() as visitor:
        consumers(project, "alice", "zoe")
        rerun(found, dry_run=True)
        with found.api() as client:
            changes = client.get("/v1/plan").json()["plan"]["changes"]
        zoe = next(c["subject_keys"][0] for c in changes if c["kind"] == "create-customer")
        send(sandbox, event("1", subject=zoe))
        rerun(found, dry_run=True)
        place = f"/dashboard/unbilled/subject?key={zoe}&customer=acme"
        page = visitor.see("/dashboard/unbilled/subject", key=zoe, customer="acme")
        assert f"consumer,{zoe.removeprefix('consumer:')},,acme" in page, "to paste"
        assert "Write this row" not in page
        refused = visitor.send("/dashboard/unbilled/assign", place, key=zoe, customer="acme")
        assert refused.status_code == 409
        assert file.read_text().count("\n") == 2

        project.config.write_text(project.config.read_text().replace("edit_file: false", "edit_file: true"))
        found.running.reload(lambda: settings.load(project.config))
        assert "Write this row" in visitor.see("/dashboard/unbilled/subject", key=zoe, customer="acme")
        answer = visitor.send("/dashboard/unbilled/assign", place, key=zoe, customer="acme")
        previewed = visitor.finished(answer)
        assert file.read_text().endswith(f"consumer,{zoe.removeprefix('consumer:')},,acme\n")
        visitor.apply(previewed)
        owner = sandbox.get("/api/v1/customers", params={"key": "acme"}).json()["items"]
        assert any(zoe in one["usageAttribution"]["subjectKeys"] for one in owner)


@pytest.mark.parametrize(
    ("group_by", "said"),
    [("tag", "customer:acme"), ("custom_id", "custom_id: acme"), ("none", "no single principal")],
)
def test_each_mapping_has_its_own_way(project: Project, group_by: str, said: str) -> None:
    project.configure(f"mapping: {{group_by: {group_by}}}\n")
    how = instruction(settings.load(project.config), "consumer:1", "acme", known=True)
    assert said in f"{how.text} {how.snippet}"
    assert how.row is None


def test_each_subject_says_when_it_was_seen_last_its_trend_and_what_it_is_worth(tmp_path: Path) -> None:
    today = date(2026, 11, 22)
    rates = [{"meter": REQUESTS_METER, "amount": 0.5}]
    prices = prices_of(PricesConfig.model_validate({"currency": "EUR", "rates": rates}))
    with State(StateLocation(tmp_path)) as state:
        store = UsageStore(state)
        store.keep_meter(REQUESTS_METER, ())
        for ago, value in ((0, 3.0), (9, 2.0), (40, 100.0)):
            day, rows = today - timedelta(days=ago), [GroupedValue("probe", (), value)]
            at = datetime.combine(day, datetime.min.time(), UTC)
            store.replace_day(REQUESTS_METER, day, rows, value, at, late=False)
        found = insights(store, prices, {"probe", "silent"}, today)
        assert found.of_subject("probe") == Insight(today, 3, 2, Decimal("2.5")), "of the last 31 days"
        assert (found.of_subject("probe").trend, found.of_subject("silent").trend) == ("+50 %", "")
        assert (found.estimate({"probe", "silent"}), found.estimate({"silent"})) == (Decimal("2.5"), None)
        assert insights(store, None, {"probe"}, today).of_subject("probe").estimate is None
