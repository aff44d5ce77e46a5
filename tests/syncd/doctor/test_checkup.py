"""Findings of `syncd doctor`."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from syncd.doctor.checks import Level, Plugin, check_clock, check_empty, check_meters, check_plugins
from syncd.sandbox.testing import running_sandbox
from tests.syncd.konnect import PLANE, Konnect, uid
from tests.syncd.processes import KONG_YML, Project
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HERE = "http://metering:8888"


def openmeter(field: str | None = None, look_up: str = "consumer", endpoint: str = HERE) -> Plugin:
    subject = {"look_up_value_in": look_up} | ({"field": field} if field else {})
    return Plugin(
        "openmeter", True, {"subject": subject, "ingest_endpoint": f"{endpoint}/api/v1/events"}, "Kong"
    )


def found(*plugins: Plugin, field: str = "id") -> list[tuple[str, str]]:
    return [(finding.check, str(finding.level)) for finding in check_plugins(plugins, field, HERE)]


def test_a_plugin_with_another_subject_field_is_a_problem() -> None:
    assert found(openmeter()) == [("subject", "ok"), ("endpoint", "ok")]
    assert found(openmeter("username"))[0] == ("subject", "problem")
    assert found(openmeter("username"), field="username")[0] == ("subject", "ok")
    assert found(openmeter("tag"), field="tag")[0] == ("subject", "ok")
    assert found(openmeter("tag"))[0] == ("subject", "warning")
    assert found(openmeter("id"), field="tag")[0] == ("subject", "problem")
    assert found(openmeter(look_up="header"))[0] == ("subject", "warning")


def test_events_for_another_server_are_a_warning() -> None:
    assert found(openmeter(endpoint="http://other:8888"))[1] == ("endpoint", "warning")


def test_another_metering_plugin_next_to_ours_bills_twice() -> None:
    other = Plugin("metering-and-billing", True, {}, "Kong")
    assert found(openmeter(), other)[-1] == ("double billing", "problem")
    assert found(other)[-1] == ("double billing", "warning")
    assert found(openmeter(), Plugin("moesif", False, {}, "Kong"))[-1] == ("endpoint", "ok")


def test_no_plugin_at_all_is_a_warning() -> None:
    assert found() == [("plugin", "warning")]
    assert found(Plugin("openmeter", False, {}, "Kong")) == [("plugin", "warning")]


def test_a_missing_or_different_meter_is_a_problem() -> None:
    right = {
        "kong_api_requests": ("kong.api_request", "COUNT"),
        "kong_llm_tokens": ("kong.llm_request", "SUM"),
        "kong_llm_events": ("kong.llm_request", "COUNT"),
    }
    assert [finding.level for finding in check_meters(right)] == [Level.OK] * 3
    lower = right | {"kong_llm_tokens": ("kong.llm_request", "sum")}
    assert [finding.level for finding in check_meters(lower)] == [Level.OK] * 3
    wrong = {"kong_llm_tokens": ("kong.llm_request", "COUNT")}
    assert [finding.level for finding in check_meters(wrong)][:2] == [Level.PROBLEM, Level.PROBLEM]


def test_without_a_meter_that_counts_model_calls_doctor_warns_of_a_rough_audit() -> None:
    meters = {
        "kong_api_requests": ("kong.api_request", "COUNT"),
        "kong_llm_tokens": ("kong.llm_request", "SUM"),
    }
    last = list(check_meters(meters))[-1]
    assert (last.level, "`syncd audit` compares them only roughly" in last.text) == (Level.WARNING, True)
    # Its key does not matter.
    assert list(check_meters(meters | {"mine": ("kong.llm_request", "count")}))[-1].level is Level.OK


@pytest.mark.parametrize(("seconds", "level"), [(0, "ok"), (29, "ok"), (-31, "problem"), (3600, "problem")])
def test_a_clock_that_is_off_is_a_problem(seconds: int, level: str) -> None:
    assert str(check_clock(NOW + timedelta(seconds=seconds), NOW).level) == level
    assert check_clock(None, NOW).level is Level.WARNING


def test_an_empty_source_is_a_warning() -> None:
    assert check_empty("kong", 0).level is Level.WARNING


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


def dialect(project: Project, name: str, url: str = "", extra: str = "") -> None:
    """Set the dialect of the project."""
    url = url or project.metering
    project.config.write_text(
        f"{project.settings}{extra}metering: {{dialect: {name}, url: '{url}', attempts: 1}}\n"
    )


BOTH = pytest.mark.parametrize("name", ["openmeter-v1", "openmeter-v3"])


@BOTH
def test_in_a_healthy_system_every_check_is_ok_and_nothing_is_written(
    project: Project, server: str, name: str
) -> None:
    dialect(project, name)
    result = project.call("doctor")
    assert result.returncode == 0
    assert set(levels(project).values()) == {"ok"}
    assert "ok       source: " in result.stdout
    assert httpx.get(f"{server}/api/v1/events").json() == []
    assert httpx.get(f"{server}/api/v1/customers").json()["totalCount"] == 0


def test_the_probe_shows_that_the_server_deduplicates(project: Project, server: str) -> None:
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


def test_the_next_times_of_a_crontab_expression_are_shown(project: Project) -> None:
    project.configure("schedule: {cron: '0 3 * * 0'}\n")
    (line,) = [line for line in project.call("doctor").stdout.splitlines() if "schedule" in line]
    assert line.count("Sun ") == 3
    project.configure()
    assert "schedule" not in project.call("doctor").stdout


def test_an_unreachable_system_is_a_problem_and_the_other_checks_go_on(project: Project) -> None:
    project.metering = "http://127.0.0.1:9"
    project.configure()
    (project.folder / "kong.yml").write_text("")
    result = project.call("doctor")
    assert result.returncode == 1
    said = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("problem")}
    assert {"source:", "metering:"} <= said
    assert "state:" in result.stdout


@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (403, "warning")])
def test_a_token_that_may_not_read_the_status_of_kong_is_a_warning(
    project: Project, status: int, level: str
) -> None:
    def kong(asked: Asked) -> Answer:
        if asked.path == "/team-a/status":
            return Answer({"message": "no"} if status != 200 else {}, status)
        consumer = {"id": "1", "username": "alice"}
        return Answer({"data": [consumer] if asked.path == "/team-a/consumers" else [], "next": None})

    with serving(kong) as server:
        project.settings = f"sources: [{{type: kong-admin, url: '{server.url}', workspace: team-a}}]\n"
        project.configure()
        assert levels(project)["source"] == level


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


def test_over_v3_the_probe_shows_that_the_server_deduplicates(project: Project, server: str) -> None:
    arrived: list[object] = []

    def konnect(asked: Asked) -> Answer:
        if asked.path == "/api/v3/openmeter/events":
            if asked.method == "POST":
                arrived.append(asked.body)
                return Answer({}, 202)
            assert asked.query["filter[id][eq]"] == arrived[0]["id"]  # type: ignore[index]
            return Answer({"data": arrived[:1]})
        return Answer({"data": [], "meta": {"page": {"number": 1, "size": 1000, "total": 0}}})

    with serving(konnect) as fake:
        dialect(project, "openmeter-v3", fake.url)
        assert levels(project, "--probe")["deduplication"] == "ok"
    assert len(arrived) == 2
    assert arrived[0] == arrived[1]


def test_a_meter_on_a_later_page_is_found_over_v3(project: Project) -> None:
    names = [f"other_{number}" for number in range(5)]
    names += ["kong_api_requests", "kong_llm_tokens", "kong_llm_events"]
    types = {
        "kong_llm_events": ("kong.llm_request", "count"),
        "kong_api_requests": ("kong.api_request", "count"),
        "kong_llm_tokens": ("kong.llm_request", "sum"),
    }
    meters = [
        {
            "id": name,
            "key": name,
            "created_at": f"2026-01-0{number + 1}T00:00:00Z",
            "event_type": types.get(name, ("x", "count"))[0],
            "aggregation": types.get(name, ("x", "count"))[1],
        }
        for number, name in enumerate(names)
    ]

    def konnect(asked: Asked) -> Answer:
        listed = meters if asked.path.endswith("/meters") else []
        size, number = (
            min(int(asked.query.get("page[size]", "1")), 2),
            int(asked.query.get("page[number]", "1")),
        )
        shown = listed[(number - 1) * size : number * size]
        return Answer({"data": shown, "meta": {"page": {"total": len(listed)}}})

    with serving(konnect) as fake:
        dialect(project, "openmeter-v3", fake.url)
        assert levels(project)["meter"] == "ok"


class ReadOnly:
    """A metering API that answers 403 to methods that are not in `allowed`."""

    def __init__(self, server: str, *allowed: str) -> None:
        self.server = server
        self.allowed = {"GET", *allowed}
        self.refused: list[str] = []

    def __call__(self, asked: Asked) -> Answer:
        if asked.method not in self.allowed:
            self.refused.append(f"{asked.method} {asked.path}")
            return Answer({"detail": "no permission"}, 403)
        answer = httpx.request(asked.method, self.server + asked.path, params=asked.query, json=asked.body)
        return Answer(answer.content, answer.status_code, {"Content-Type": answer.headers["content-type"]})


@BOTH
def test_a_read_only_token_is_found_before_the_first_run(project: Project, server: str, name: str) -> None:
    with serving(ReadOnly(server)) as fake:
        dialect(project, name, fake.url)
        result = project.call("doctor")
    assert result.returncode == 1
    assert "problem  rights: the token may not create customers" in result.stdout
    assert "problem  rights: the token may not change customers" in result.stdout
    assert "lacks the rights" in result.stdout
    assert httpx.get(f"{server}/api/v1/customers").json()["totalCount"] == 0


@BOTH
def test_the_right_to_delete_is_checked_only_if_syncd_may_delete(
    project: Project, server: str, name: str
) -> None:
    proxy = ReadOnly(server, "POST", "PUT")
    deleting = "policy: sync\npolicy_options: {delete_after: 400d}\n"
    with serving(proxy) as fake:
        dialect(project, name, fake.url)
        assert project.call("doctor").returncode == 0
        assert not proxy.refused
        dialect(project, name, fake.url, deleting)
        assert "the token may not delete customers" in project.call("doctor").stdout
    assert len(proxy.refused) == 1
    dialect(project, name, extra=deleting)
    assert (
        "the token may create customers, change customers, delete customers" in project.call("doctor").stdout
    )


def rights(project: Project, answer: Answer) -> list[tuple[str, str]]:
    """The findings about a server that gives this answer to every write."""

    def metering(asked: Asked) -> Answer:
        if asked.method != "GET":
            return answer
        empty = {"items": [], "totalCount": 0, "data": [], "meta": {"page": {"total": 0}}}
        return Answer([] if asked.path.endswith(("/meters", "/subjects")) else empty)

    with serving(metering) as fake:
        dialect(project, "openmeter-v1", fake.url)
        found = json.loads(project.call("doctor", "--json").stdout)
    return [(finding["level"], finding["text"]) for finding in found if finding["check"] == "rights"]


def test_a_server_without_the_path_or_that_accepts_anything_is_a_problem(project: Project) -> None:
    [(level, text), _] = rights(project, Answer({}, 404))
    assert level == "problem"
    assert "metering.dialect" in text
    accepted = rights(project, Answer({}, 201))
    assert [level for level, _ in accepted] == ["problem", "problem", "ok"]
    assert all("without a name" in text for _, text in accepted[:2])


def test_a_failing_server_is_a_warning(project: Project) -> None:
    assert {level for level, _ in rights(project, Answer({}, 503))} == {"warning"}


def test_a_server_without_subject_entities_needs_no_right_to_write_them(project: Project) -> None:
    with running_sandbox(subjects=False) as url:
        dialect(project, "openmeter-v1", url)
        result = project.call("doctor")
    assert result.returncode == 0
    assert "the token may create customers, change customers\n" in result.stdout


def test_the_plugins_of_a_control_plane_in_konnect_are_read(project: Project) -> None:
    config = {"ingest_endpoint": f"{project.metering}/x", "subject": {"field": "username"}}
    plugins: list[dict[str, object]] = [
        {"id": uid(name), "name": name, "enabled": True, "config": config}
        for name in ("cors", "key-auth", "openmeter")
    ]
    with serving(Konnect(plugins=plugins)) as konnect:
        project.settings = (
            f"sources: [{{type: konnect-consumers, url: '{konnect.url}', control_plane_id: '{PLANE}'}}]\n"
        )
        project.configure()
        assert levels(project)["subject"] == "problem"
