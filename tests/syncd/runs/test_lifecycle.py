"""The life of an orphan over real HTTP in both dialects: marked, detached, deleted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from syncd.config import settings
from syncd.core.changes import ChangeKind
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import Run, new_run
from tests.syncd.builders import lines
from tests.syncd.processes import Project
from tests.syncd.targets import subscribe

pytestmark = pytest.mark.slow

SETTINGS = """
sources: [{{type: declarative-file, path: kong.yml}}]
metering: {{dialect: {dialect}, url: "{url}", attempts: 1}}
policy: sync
policy_options: {{detach_after: 40d, delete_after: 100d}}
guards: {{max_clock_skew: null}}
daemon: {{state_dir: state}}
"""
START = datetime(2026, 1, 1, tzinfo=UTC)
ALICE = '{id: a, username: alice, tags: ["customer:acme"]}'
BOB = '{id: b, username: bob, tags: ["customer:acme"]}'
CAROL = "{id: c, username: carol}"
SUBJECT_ENTITIES = {ChangeKind.UPSERT_SUBJECT, ChangeKind.DELETE_SUBJECT}


class Scenario:
    """A Kong and a metering API, and a syncd that runs on any day."""

    def __init__(self, project: Project, dialect: str) -> None:
        self.project = project
        project.config.write_text(SETTINGS.format(dialect=dialect, url=project.metering))

    def sync(self, day: int, *consumers: str) -> list[str]:
        """Run twice; return the changes of the first run, and require that the second has none."""
        (self.project.folder / "kong.yml").write_text(
            f"_format_version: '3.0'\nconsumers: [{', '.join(consumers)}]\n"
        )
        result = self._run(day)
        assert not self._run(day).made_plan.actionable
        return [
            line
            for line, change in zip(lines(result.made_plan), result.made_plan.changes, strict=True)
            if change.kind not in SUBJECT_ENTITIES
        ]

    def _run(self, day: int) -> Run:
        config = settings.load(self.project.config)
        reconciler = Reconciler(config, now=lambda: START + timedelta(days=day))
        return reconciler.reconcile(new_run("test", RunOptions()))


@pytest.fixture(params=["openmeter-v1", "openmeter-v3"])
def scenario(tmp_path: Path, sandbox: httpx.Client, request: pytest.FixtureRequest) -> Scenario:
    return Scenario(Project(tmp_path, str(sandbox.base_url)), str(request.param))


def test_an_orphan_is_marked_then_detached_then_deleted(scenario: Scenario, sandbox: httpx.Client) -> None:
    scenario.sync(0, ALICE, BOB, CAROL)
    assert scenario.sync(1, ALICE) == [
        "mark-orphaned acme consumer:b",
        "mark-orphaned consumer-c consumer:c",
    ]
    assert scenario.sync(40, ALICE) == ["orphaned acme consumer:b", "orphaned consumer-c consumer:c"]
    assert scenario.sync(41, ALICE) == [
        "detach-subjects acme consumer:b",
        "detach-subjects consumer-c consumer:c",
    ]
    acme = sandbox.get("/api/v1/customers/acme").json()
    assert acme["usageAttribution"]["subjectKeys"] == ["consumer:a"]
    assert scenario.sync(100, ALICE) == ["orphaned consumer-c"]
    assert scenario.sync(101, ALICE) == ["delete-customer consumer-c"]
    assert sandbox.get("/api/v1/customers/consumer-c").status_code == 404


def test_one_run_opens_one_client_of_the_metering_api_and_one_for_figures_that_are_a_note(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both share one pace, so that a 429 to any request slows all of them."""
    scenario.sync(0, ALICE, CAROL)
    scenario.sync(1, ALICE)
    scenario.sync(41, ALICE)
    opened: list[str] = []
    original = ApiClient.__init__

    def counting(self: ApiClient, endpoint: Endpoint, retry: Retry) -> None:
        opened.append(endpoint.api)
        original(self, endpoint, retry)

    monkeypatch.setattr(ApiClient, "__init__", counting)
    assert scenario.sync(101, ALICE) == ["delete-customer consumer-c"]
    assert opened.count("metering") == 4, "two for each of the two runs"


def test_a_principal_that_comes_back_loses_the_mark_and_gets_the_same_customer(
    scenario: Scenario, sandbox: httpx.Client
) -> None:
    scenario.sync(0, ALICE, CAROL)
    before = sandbox.get("/api/v1/customers/consumer-c").json()
    scenario.sync(1, ALICE)
    scenario.sync(41, ALICE)
    assert scenario.sync(50, ALICE, CAROL) == [
        "unmark-orphaned consumer-c",
        "attach-subjects consumer-c consumer:c",
    ]
    after = sandbox.get("/api/v1/customers/consumer-c").json()
    assert (after["id"], after["usageAttribution"]) == (before["id"], before["usageAttribution"])
    assert scenario.sync(60, ALICE) == ["mark-orphaned consumer-c consumer:c"]
    assert scenario.sync(90, ALICE) == ["orphaned consumer-c consumer:c"]


def test_an_orphaned_customer_is_blocked_until_its_subscription_ends(
    scenario: Scenario, sandbox: httpx.Client
) -> None:
    scenario.sync(0, ALICE, CAROL)
    subscribe(sandbox, "consumer-c")
    scenario.sync(1, ALICE)
    assert scenario.sync(41, ALICE) == ["blocked consumer-c consumer:c"]
    assert scenario.sync(101, ALICE) == ["blocked consumer-c consumer:c"]
    sandbox.delete("/sandbox/v1/customers/consumer-c/subscriptions").raise_for_status()
    assert scenario.sync(102, ALICE) == ["delete-customer consumer-c consumer:c"]


def test_subjects_and_metadata_of_people_survive(scenario: Scenario, sandbox: httpx.Client) -> None:
    scenario.sync(0, ALICE, CAROL)
    carol = sandbox.get("/api/v1/customers/consumer-c").json()
    body = {name: carol[name] for name in ("key", "name")} | {"description": "Ask Jane"}
    body["metadata"] = {**carol["metadata"], "crm": "7"}
    body["usageAttribution"] = {"subjectKeys": ["consumer:c", "by-hand"]}
    sandbox.put(f"/api/v1/customers/{carol['id']}", json=body).raise_for_status()
    scenario.sync(1, ALICE)
    assert scenario.sync(41, ALICE) == ["detach-subjects consumer-c consumer:c"]
    assert scenario.sync(400, ALICE) == ["orphaned consumer-c by-hand"]
    after = sandbox.get("/api/v1/customers/consumer-c").json()
    assert (after["description"], after["metadata"]["crm"]) == ("Ask Jane", "7")
    assert after["usageAttribution"]["subjectKeys"] == ["by-hand"]
