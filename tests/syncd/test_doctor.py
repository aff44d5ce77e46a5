"""What `syncd doctor` finds, and what it says about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from syncd.doctor_checks import (
    Level,
    Plugin,
    check_clock,
    check_empty,
    check_meters,
    check_plugins,
)
from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import KONG_YML, Project
from tests.syncd.servers import Answer, Asked, serving

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HERE = "http://metering:8888"


def ours(field: str | None = None, look_up: str = "consumer", endpoint: str = HERE) -> Plugin:
    subject = {"look_up_value_in": look_up} | ({"field": field} if field else {})
    return Plugin(
        "openmeter", True, {"subject": subject, "ingest_endpoint": f"{endpoint}/api/v1/events"}, "Kong"
    )


def found(*plugins: Plugin, field: str = "id") -> list[tuple[str, str]]:
    return [(finding.check, str(finding.level)) for finding in check_plugins(plugins, field, HERE)]


def test_a_plugin_that_names_subjects_otherwise_is_a_problem() -> None:
    assert found(ours()) == [("subject", "ok"), ("endpoint", "ok")]
    assert found(ours("username"))[0] == ("subject", "problem")
    assert found(ours("username"), field="username")[0] == ("subject", "ok")
    assert found(ours("tag"))[0] == ("subject", "ok")
    assert found(ours(look_up="header"))[0] == ("subject", "warning")


def test_events_that_go_elsewhere_are_a_warning() -> None:
    assert found(ours(endpoint="http://other:8888"))[1] == ("endpoint", "warning")


def test_another_metering_plugin_beside_ours_bills_twice() -> None:
    other = Plugin("metering-and-billing", True, {}, "Kong")
    assert found(ours(), other)[-1] == ("double billing", "problem")
    assert found(other)[-1] == ("double billing", "warning")
    assert found(ours(), Plugin("moesif", False, {}, "Kong"))[-1] == ("endpoint", "ok")


def test_no_plugin_at_all_is_a_warning() -> None:
    assert found() == [("plugin", "warning")]
    assert found(Plugin("openmeter", False, {}, "Kong")) == [("plugin", "warning")]


def test_a_meter_that_is_missing_or_counts_otherwise_is_a_problem() -> None:
    right = {
        "kong_api_requests": ("kong.api_request", "COUNT"),
        "kong_llm_tokens": ("kong.llm_request", "SUM"),
    }
    assert [finding.level for finding in check_meters(right)] == [Level.OK, Level.OK]
    lower = right | {"kong_llm_tokens": ("kong.llm_request", "sum")}
    assert [finding.level for finding in check_meters(lower)] == [Level.OK, Level.OK]
    wrong = {"kong_llm_tokens": ("kong.llm_request", "COUNT")}
    assert [finding.level for finding in check_meters(wrong)] == [Level.PROBLEM, Level.PROBLEM]


@pytest.mark.parametrize(("seconds", "level"), [(0, "ok"), (29, "ok"), (-31, "problem"), (3600, "problem")])
def test_a_clock_that_is_off_is_a_problem(seconds: int, level: str) -> None:
    assert str(check_clock(NOW + timedelta(seconds=seconds), NOW).level) == level
    assert check_clock(None, NOW).level is Level.WARNING


def test_an_empty_source_is_a_warning() -> None:
    assert check_empty("kong", 0).level is Level.WARNING


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_sandbox() as url:
        yield url


@pytest.fixture
def project(tmp_path: Path, server: str) -> Project:
    httpx.post(f"{server}/sandbox/v1/reset").raise_for_status()
    project = Project(tmp_path, server)
    plugin = f"- {{name: openmeter, config: {{ingest_endpoint: '{server}/api/v1/events'}}}}\n"
    (tmp_path / "kong.yml").write_text(KONG_YML + plugin)
    return project


def levels(project: Project, *args: str) -> dict[str, str]:
    document = json.loads(project.call("doctor", "--json", *args).stdout)
    return {finding["check"]: finding["level"] for finding in document}


def test_where_all_is_well_every_check_is_ok_and_nothing_is_written(project: Project, server: str) -> None:
    result = project.call("doctor")
    assert result.returncode == 0
    assert set(levels(project).values()) == {"ok"}
    assert "ok       source: " in result.stdout
    assert httpx.get(f"{server}/api/v1/events").json() == []


def test_the_probe_tells_that_the_server_deduplicates(project: Project, server: str) -> None:
    assert levels(project, "--probe")["deduplication"] == "ok"
    (event,) = httpx.get(f"{server}/api/v1/events").json()
    assert event["event"]["type"] == "kong-openmeter.doctor"


def test_a_server_that_does_not_deduplicate_is_a_problem(project: Project) -> None:
    def metering(asked: Asked) -> Answer:
        if asked.path == "/api/v1/events" and asked.method == "GET":
            return Answer([{"event": {}}, {"event": {}}])
        if asked.path == "/api/v1/customers":
            return Answer({"items": [], "totalCount": 0})
        return Answer([] if asked.method == "GET" else {})

    with serving(metering) as fake:
        project.metering = fake.url
        project.configure()
        assert levels(project, "--probe")["deduplication"] == "problem"


def test_what_cannot_be_reached_is_a_problem_and_the_other_checks_go_on(project: Project) -> None:
    project.metering = "http://127.0.0.1:9"
    project.configure()
    (project.folder / "kong.yml").write_text("")
    result = project.call("doctor")
    assert result.returncode == 1
    said = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("problem")}
    assert {"source:", "metering:"} <= said
    assert "state:" in result.stdout


def test_the_plugins_of_a_running_kong_are_read_to_the_last_page(project: Project) -> None:
    def kong(asked: Asked) -> Answer:
        if asked.path == "/plugins" and "offset" not in asked.query:
            return Answer({"data": [{"name": "cors", "config": {}}], "offset": "more", "next": "/plugins"})
        if asked.path == "/plugins":
            config = {"ingest_endpoint": f"{project.metering}/x", "subject": {"field": "username"}}
            return Answer({"data": [{"name": "openmeter", "enabled": True, "config": config}], "next": None})
        return Answer({"data": []} if asked.path == "/consumers" else {})

    with serving(kong) as server:
        project.settings = f"sources: [{{type: kong-admin, url: '{server.url}'}}]\n"
        project.configure()
        assert levels(project)["subject"] == "problem"
