"""`syncd resync` with options that hold for one run: it shows the plan and applies exactly that one."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.syncd.daemon.test_service import daemon, finished, idle
from tests.syncd.processes import Project, daemon_process, when_logged

pytestmark = pytest.mark.slow

TAGGED = """
_format_version: "3.0"
consumers:
- {username: alice, id: 00000000-0000-4000-8000-000000000001, tags: ["customer:%s"]}
- {username: bob, id: 00000000-0000-4000-8000-000000000002, tags: ["customer:acme"]}
"""
ALICE = "consumer:00000000-0000-4000-8000-000000000001"


@pytest.fixture
def project(tmp_path: Path, sandbox: httpx.Client) -> Project:
    made = Project(tmp_path, str(sandbox.base_url))
    group(made, "acme")
    assert made.call("apply", "--yes").returncode == 0
    return made


def group(project: Project, name: str) -> None:
    (project.folder / "kong.yml").write_text(TAGGED % name)


def subjects(sandbox: httpx.Client, key: str) -> list[str]:
    found: list[str] = sandbox.get(f"/api/v1/customers/{key}").json()["usageAttribution"]["subjectKeys"]
    return found


def test_a_move_allowed_for_one_run_is_shown_before_it_is_made(
    project: Project, sandbox: httpx.Client
) -> None:
    with daemon_process(project) as (process, log):
        when_logged(log, "run_finished", process)
        group(project, "globex")
        dry = project.call("resync", "--dry-run", "--wait")
        assert dry.returncode == 2
        assert "! customer globex" in dry.stdout
        assert "--allow-move" in dry.stdout
        assert project.call("resync", "--wait").returncode == 3
        preview = project.call("resync", "--allow-move", "--dry-run", "--wait")
        assert preview.returncode == 2
        assert "~ customer acme: move alice to globex" in preview.stdout
        assert ALICE in subjects(sandbox, "acme")

        moved = project.call("resync", "--allow-move", "--wait")
        assert moved.returncode == 0
        assert "~ customer acme: move alice to globex" in moved.stdout
        assert subjects(sandbox, "globex") == [ALICE]

        # The option held for that run only.
        group(project, "acme")
        assert project.call("resync", "--wait").returncode == 3
        assert subjects(sandbox, "globex") == [ALICE]


def test_a_customer_is_adopted_when_that_is_allowed_and_json_is_one_document(
    project: Project, sandbox: httpx.Client
) -> None:
    sandbox.post("/api/v1/customers", json={"key": "zulu", "name": "by hand"}).raise_for_status()
    people = TAGGED % "acme" + "- {username: carol, id: '3', tags: ['customer:zulu']}\n"
    (project.folder / "kong.yml").write_text(people)
    with daemon_process(project) as (process, log):
        when_logged(log, "run_finished", process)
        assert "--adopt" in project.call("resync", "--dry-run", "--wait").stdout
        done = json.loads(project.call("resync", "--adopt", "--wait", "--output=json").stdout)
        assert done["state"] == "succeeded"
        assert done["options"]["reviewed"] is True
        assert [result["change"]["kind"] for result in done["results"]] == [
            "adopt-customer",
            "attach-subjects",
            "upsert-subject",
        ]
        assert subjects(sandbox, "zulu") == ["consumer:3"]


def test_a_plan_that_changed_since_it_was_shown_is_refused(project: Project, sandbox: httpx.Client) -> None:
    with daemon(project) as client:
        idle(client)
        group(project, "globex")
        asked = client.post("/v1/syncs", json={"dry_run": True, "allow_move": True}).json()
        assert finished(client, asked["id"])["state"] == "succeeded"
        group(project, "elsewhere")
        run = client.post("/v1/syncs", json={"reviewed": asked["id"]}).json()
        refused = finished(client, run["id"])
        assert refused["state"] == "failed"
        assert "the plan is out of date" in str(refused["error"])
        assert client.get("/readyz").status_code == 200
        assert ALICE in subjects(sandbox, "acme")
        group(project, "globex")
        again = client.post("/v1/syncs", json={"reviewed": asked["id"], "force": True}).json()
        assert finished(client, again["id"])["state"] == "succeeded"
        assert subjects(sandbox, "globex") == [ALICE]


def test_reviewed_needs_a_known_dry_run_and_no_other_option(project: Project) -> None:
    with daemon(project) as client:
        real = str(idle(client)["last"]["id"])  # type: ignore[index]
        for named in (real, "nosuch"):
            refused = client.post("/v1/syncs", json={"reviewed": named})
            assert refused.status_code == 409
            assert "Request a new one" in refused.json()["detail"]
        mixed = client.post("/v1/syncs", json={"reviewed": real, "allow_move": True})
        assert mixed.status_code == 422
        assert "only force" in mixed.text
