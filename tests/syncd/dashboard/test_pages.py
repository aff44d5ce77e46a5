"""The pages, over real HTTP from a real daemon, sandbox and gateways."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from html import unescape

import httpx
import pytest

from syncd.config import settings
from syncd.core.changes import Change, Plan
from syncd.runs.options import RunOptions
from syncd.runs.run import Run, RunState, new_run
from tests.syncd.builders import OWNER
from tests.syncd.dashboard.gateways import FakeGateway, configured, dead_letter, gateway
from tests.syncd.dashboard.support import Site, Visitor, consumers, site, text_of
from tests.syncd.processes import Project
from tests.syncd.sandbox.support import event, ok, send
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.states import opened_history
from tests.syncd.targets import by_hand, subscribe

pytestmark = pytest.mark.slow

SCRIPT = "<script>document.title='owned'</script>"


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def looking_at(project: Project, fake: FakeGateway) -> Iterator[Visitor]:
    """An operator of a daemon with this gateway."""
    with (
        gateway(fake) as there,
        site(project, extra=configured(eu=there.url)) as found,
        found.operator() as visitor,
    ):
        yield visitor


def subject_of(sandbox: httpx.Client, name: str) -> str:
    items = ok(sandbox.get("/api/v1/customers", params={"name": name}))["items"]
    (found,) = [item["usageAttribution"]["subjectKeys"][0] for item in items if item["name"] == name]
    return str(found)


def rerun(found: Site, **options: object) -> None:
    """Run once in the daemon and wait for the end."""
    with found.api() as client:
        run = client.post("/v1/syncs", json=options).raise_for_status().json()
        deadline = time.monotonic() + 10
        while client.get(f"/v1/syncs/{run['id']}").json()["state"] in ("queued", "running"):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def row(page: str, name: str) -> str:
    """The table row whose first cell starts with this word."""
    rows = re.findall(r"<tr>\s*(<th scope=\"row\".*?</th>)(.*?)</tr>\s*(?=<tr>|</tbody>)", page, re.DOTALL)
    (found,) = [text_of(head + rest) for head, rest in rows if f"{text_of(head)} ".startswith(f"{name} ")]
    return found


def test_the_overview_shows_when_a_crontab_expression_comes_next(project: Project) -> None:
    with site(project, extra="schedule: {cron: '0 3 * * 0'}\n") as found, found.operator() as visitor:
        page = text_of(visitor.see())
        assert re.search(r"cron 0 3 \* \* 0, UTC: Sun \d\d \w\w\w 03:00, Sun .* 03:00, Sun .* 03:00", page)


def test_the_overview_shows_drift_unbilled_usage_and_the_latest_runs(
    project: Project, sandbox: httpx.Client
) -> None:
    with site(project) as found, found.operator() as visitor:
        assert "Is everything in sync? Yes The customers are as the sources call for" in text_of(
            visitor.see()
        )
        send(sandbox, event("1", subject="stranger"), event("2", subject="stranger"))
        consumers(project, "alice", "bob", "carol", "guest", "dave")
        rerun(found, dry_run=True)
        page = text_of(visitor.see())
        assert re.search(r"Is everything in sync\? No [1-9]\d* changes? to make, says the plan of", page)
        assert "Is everybody billed? No 2 events of 1 subject without a customer" in page
        assert "Does everything run? Yes 2 systems work." in page
        assert re.search(r"Next run in (1 h|59 min)", page)
        assert re.search(r"Last success (just now|\d+ s ago)", page)
        assert "dry run" in page


def test_the_health_of_each_system_is_shown(project: Project, sandbox: httpx.Client) -> None:
    fake = FakeGateway(backlog=3, oldest_seconds=4000, dead=[dead_letter(1)])
    with looking_at(project, fake) as visitor:
        page = visitor.see()
    assert re.search(r"source ok \d+ B, changed (just now|.* ago)", row(page, "declarative-file-0"))
    assert "metering API ok 2 customers" in row(page, "openmeter-v1")
    assert "gateway warning events have been waiting for 1 h 6 min; 1 dead letter" in row(page, "eu")


def test_a_dead_or_silent_system_blocks_no_page(project: Project) -> None:
    with silent() as url, gateway(FakeGateway()) as alive:
        kong = f"- {{type: kong-admin, name: kong, url: '{url}', timeout: 30s}}"
        listed = configured(dead="http://127.0.0.1:9", silent=url, alive=alive.url)
        with site(project, extra=listed) as found, found.operator() as visitor:
            # A run never ends with a silent source, so a reload adds it after the first run.
            text = project.config.read_text().replace("sources: [", f"sources: [{kong[2:]}, ")
            project.config.write_text(text)
            found.running.reload(lambda: settings.load(project.config))
            begun = time.monotonic()
            page = visitor.see()
            took = time.monotonic() - begun
    assert took < 3.5
    assert "cannot be read: no answer within 2 s" in row(page, "kong")
    assert "problem cannot be read" in row(page, "dead")
    assert "gateway ok 0 events waiting" in row(page, "alive")


def test_a_dead_metering_api_blocks_no_page(project: Project) -> None:
    calls: list[str] = []

    def metering(asked: Asked) -> Answer:
        calls.append(asked.path)
        return Answer({"detail": f"maintenance {SCRIPT}"}, 503)

    with serving(metering) as server:
        project.metering = server.url
        with site(project) as found, found.operator() as visitor:
            overview = text_of(visitor.see())
            customers = visitor.see("/dashboard/customers")
            asked = len(calls)
            for _ in range(5):
                visitor.see("/dashboard/customers")
            assert len(calls) == asked, "page views must not hammer the metering API"
    assert "problem cannot be read: metering API at" in overview
    assert "Not working: metering API" in overview
    assert "Does everything run? No metering API openmeter-v1: cannot be read" in overview
    assert "Is everything in sync? No the last run failed" in overview
    assert "HTTP 503 maintenance" in overview
    assert "No run has read the customers yet" in customers
    assert "failed" in overview


def test_a_source_that_the_last_run_could_not_use_is_a_problem(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        (project.folder / "kong.yml").write_text("consumers: 7\n")
        rerun(found)
        assert "problem the last run could not use it: source declarative-file-0:" in row(
            visitor.see(), "declarative-file-0"
        )


def test_unbilled_usage_has_a_reason_for_each_subject(project: Project, sandbox: httpx.Client) -> None:
    with site(project) as found, found.operator() as visitor:
        subscribe(sandbox, "acme")
        consumers(
            project,
            "alice",
            "bob",
            "carol",
            "late",
            "new",
            tags=dict.fromkeys(("alice", "bob", "late"), "acme"),
        )
        rerun(found, dry_run=True)
        with found.api() as client:
            plan = client.get("/v1/plan").json()["plan"]["changes"]
        late = next(c["subject_keys"][0] for c in plan if c["kind"] == "blocked")
        new = next(c["subject_keys"][0] for c in plan if c["kind"] == "create-customer")
        send(sandbox, event("1", subject=late), event("2", subject=new), event("3", subject="stranger"))
        rerun(found, dry_run=True)
        page = visitor.see("/dashboard/unbilled")
        assert f"late {late} acme 1 0" in row(page, "late"), "with the name behind the id"
        assert "blocked by decision subscription" in row(page, "late")
        assert f"{new} consumer-" in row(page, "new")
        assert "1 0 unknown none next run" in row(page, "new")
        assert "none 1 0 unknown none unknown" in row(page, "stranger")
        headings = re.findall(r'<h2 id="cause-\d">(.+?)</h2>', page)
        assert [unescape(heading) for heading in headings] == [
            "Active subscription: the customer's subjects cannot change",
            "No source names the subject",
            "Fixed by the next run",
        ]
        assert page.count("between two subscriptions") == 1, "the cure, once for each cause"
        assert page.count("Preview changes") == 1, "only where a run attributes usage"


def test_the_preview_that_attributes_unbilled_usage_is_one_click_away(
    project: Project, sandbox: httpx.Client
) -> None:
    by_hand(sandbox, name="Acme by hand", key="made-by-hand")
    with site(project) as found, found.operator() as visitor:
        tags = {"alice": "acme", "bob": "acme", "erin": "made-by-hand"}
        consumers(project, "alice", "bob", "carol", "erin", tags=tags)
        rerun(found, dry_run=True)
        with found.api() as client:
            changes = client.get("/v1/plan").json()["plan"]["changes"]
        erin = next(c["subject_keys"][0] for c in changes if c["kind"] == "blocked")
        send(sandbox, event("1", subject=erin))
        rerun(found, dry_run=True)
        page = visitor.see("/dashboard/unbilled")
        (button,) = re.findall(r'<form method="post" action="/dashboard/resync".*?</form>', page, re.DOTALL)
        assert "Preview with: Adopt existing customers whose key matches" in button
        fields = dict(re.findall(r'type="hidden" name="(\w+)" value="(\w+)"', button))
        previewed = visitor.finished(visitor.client.post("/dashboard/resync", data=fields))
        assert "adoptions allowed" in previewed
        visitor.apply(previewed)
        rerun(found, dry_run=True)
        assert "Every subject with usage has a customer" in visitor.see("/dashboard/unbilled")


def test_a_gateway_that_refuses_the_token_says_which_setting_it_is(project: Project) -> None:
    with gateway(FakeGateway()) as there:
        listed = configured(eu=there.url).replace("token-of-the", "another-token-of-the")
        with site(project, extra=listed) as found, found.operator() as visitor:
            page = text_of(visitor.see("/dashboard/gateways"))
    assert "gateways[0].token" in page
    assert "another-token-of-the" not in page


def test_runs_are_listed_and_paged_and_their_plans_outlive_the_daemon(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        (first,) = re.findall(r'href="/dashboard/runs/(\w+)"', visitor.see("/dashboard/runs"))
        with opened_history(found.running.config.daemon.state_dir) as history:
            for _ in range(52):
                history.save(replace(new_run("schedule", RunOptions()), state=RunState.SUCCEEDED).summary())
        page = visitor.see("/dashboard/runs")
        assert len(re.findall(r'href="/dashboard/runs/\w+"', page)) == 50
        older = visitor.see("/dashboard/runs", page="2")
        assert first in older
        assert "No older runs" in visitor.see("/dashboard/runs", page="999")
    with site(project) as found, found.operator() as visitor:
        page = text_of(visitor.see(f"/dashboard/runs/{first}"))
        assert "create-customer acme done" in page
        assert visitor.client.get(f"/dashboard/runs/{first[:8]}").status_code == 404


def test_a_recorded_run_with_a_kind_of_change_that_no_longer_exists_is_shown_without_its_plan(
    project: Project,
) -> None:
    plan = Plan(OWNER, "sync", (Change("retire-customer", "acme", (), "because"),))  # type: ignore[arg-type]
    run = Run("f" * 32, "apply", RunOptions(), datetime.now(UTC), state=RunState.SUCCEEDED, plan=plan)
    with site(project) as found:
        with opened_history(found.running.config.daemon.state_dir) as history:
            history.save(run.summary(), plan)
        with found.operator() as visitor:
            assert "made by another version of syncd" in text_of(visitor.see(f"/dashboard/runs/{run.id}"))


def test_a_run_can_be_looked_at_by_kind_of_change_and_page(project: Project, sandbox: httpx.Client) -> None:
    consumers(project, *(f"c{number:03}" for number in range(130)))
    with site(project) as found, found.operator() as visitor:
        (run,) = re.findall(r'href="/dashboard/runs/(\w+)"', visitor.see("/dashboard/runs"))
        whole = visitor.see(f"/dashboard/runs/{run}")
        assert "all 260" in text_of(whole)
        assert whole.count("<article") == 100
        created = visitor.see(f"/dashboard/runs/{run}", kind="create-customer", page="2")
        assert created.count("<article") == 30
        assert "101 to 130 of 130" in created
        assert visitor.see(f"/dashboard/runs/{run}", kind="nonsense", page="-1").count("<article") == 100


def test_the_page_of_an_unfinished_run_refreshes_unless_stopped(project: Project) -> None:
    gate = threading.Event()

    def kong(asked: Asked) -> Answer:
        gate.wait(10)
        return Answer({"data": [], "next": None})

    with serving(kong) as server, site(project) as found, found.operator() as visitor:
        text = project.config.read_text()
        slow = f"{{type: kong-admin, url: '{server.url}'}}"
        project.config.write_text(text.replace("sources: [", f"sources: [{slow}, "))
        found.running.reload(lambda: settings.load(project.config))
        try:
            redirect = visitor.send("/dashboard/resync", page="/dashboard/runs")
            page = visitor.see(redirect.headers["location"])
            assert '<meta http-equiv="refresh" content="1">' in page
            assert ">Stop</a>" in page
            still = visitor.see(redirect.headers["location"] + "?live=off")
            assert "http-equiv" not in still
            assert "running" in text_of(visitor.see())
        finally:
            gate.set()
        assert "in sync" in visitor.finished(redirect)


def test_a_refused_configuration_is_shown_on_every_page(project: Project) -> None:
    with site(project) as found, found.operator() as visitor:
        project.config.write_text("nonsense: 1\n")
        found.running.reload(lambda: settings.load(project.config))
        for page in ("/dashboard/", "/dashboard/runs"):
            assert "A reloaded configuration was refused" in visitor.see(page)
