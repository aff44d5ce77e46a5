"""Subjects that the configuration ignores: visible, and in no figure, exit status or metric."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from syncd.config.settings import load
from syncd.core.errors import ConfigError
from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project

ALICE = "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"
IGNORE = "ignore: [{{subject: '{subject}', reason: our monitoring, by: finance{until}}}]\n"


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[httpx.Client]:
    with running_sandbox(tmp_path / "db") as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def project(tmp_path: Path, sandbox: httpx.Client) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    made = Project(folder, str(sandbox.base_url).rstrip("/"))
    for number, subject in enumerate(("healthcheck", "stranger", ALICE)):
        event = {"specversion": "1.0", "id": str(number), "source": "kong", "type": "kong.api_request"}
        headers = {"Content-Type": "application/cloudevents+json"}
        document = {**event, "subject": subject, "time": datetime.now(UTC).isoformat(), "data": {}}
        sandbox.post("/api/v1/events", json=document, headers=headers).raise_for_status()
    return made


def ignoring(subject: str, days: int | None = None) -> str:
    until = f", until: {datetime.now(UTC).date() + timedelta(days=days)}" if days is not None else ""
    return IGNORE.format(subject=subject, until=until)


def unbilled(project: Project) -> dict[str, object]:
    found: dict[str, object] = json.loads(project.call("plan", "-ojson").stdout)["unbilled"]
    return found


@pytest.mark.parametrize("days", [None, 0, 30])
def test_an_ignored_subject_is_shown_apart_and_in_no_figure(project: Project, days: int | None) -> None:
    assert unbilled(project)["unknown_events"] == 2
    project.configure(ignoring("healthcheck", days))
    found = unbilled(project)
    assert (found["unknown_subjects"], found["unknown_events"]) == (1, 1)
    assert [entry["key"] for entry in found["ignored"]] == ["healthcheck"]  # type: ignore[attr-defined]
    assert (found["ignored_subjects"], found["ignored_events"]) == (1, 1)
    shown = project.call("plan").stdout
    assert "Ignored: 1 event of healthcheck (our monitoring, by finance" in shown
    assert "no source knows 1 (1 event)" in shown
    assert "healthcheck" in project.call("usage").stdout, "usage stays complete"


def test_after_its_last_day_a_subject_counts_again(project: Project) -> None:
    project.configure(ignoring("healthcheck", -1))
    found = unbilled(project)
    assert found["unknown_events"] == 2
    assert found["ignored"] == []


def test_what_is_blocked_for_an_ignored_subject_alone_is_no_drift(
    project: Project, sandbox: httpx.Client
) -> None:
    """alice is in another customer that syncd manages: blocked, and drift, until somebody decides."""
    assert project.call("apply", "--yes").returncode == 0
    kong = project.folder / "kong.yml"
    kong.write_text(
        kong.read_text().replace('alice, tags: ["customer:acme"]', 'alice, tags: ["customer:new"]')
    )
    assert project.call("apply", "--yes").returncode == 3
    assert project.call("plan").returncode == 2
    project.configure(ignoring(ALICE))
    assert project.call("plan").returncode == 0
    result = project.call("apply", "--yes")
    assert result.returncode == 0
    assert "Blocked by decision: Another customer has the subject" in result.stdout


def test_an_ignored_subject_needs_a_reason_and_a_day(project: Project) -> None:
    project.configure("ignore: [{subject: x, until: soon}]\n")
    with pytest.raises(ConfigError) as caught:
        load(project.config)
    assert "ignore[0].reason: is required" in str(caught.value)
    assert "ignore[0].until: must be a day, such as 2026-12-31" in str(caught.value)
