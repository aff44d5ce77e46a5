"""Findings of `syncd doctor`."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from openmeter_plugin.config.lua_plugin import LUA_PRIORITY
from openmeter_plugin.config.schema import PRIORITY
from syncd.doctor.checks import Level, Plugin, check_clock, check_empty, check_meters, check_plugins
from syncd.doctor.checkup import Probe
from syncd.metering.base import Meter
from syncd.metering.meters import STANDARD_METERS
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


@pytest.mark.parametrize(
    ("endpoint", "level"),
    [
        ("http://metering:8889", "warning"),  # the port of another server
        ("https://metering:8888", "ok"),
        ("http://metering", "warning"),
        ("http://openmeter.internal:8888", "ok"),  # a name that the gateways have for it
    ],
)
def test_host_and_port_of_the_endpoint_are_compared_as_audit_does(endpoint: str, level: str) -> None:
    findings = list(check_plugins([openmeter(endpoint=endpoint)], "id", HERE, ["openmeter.internal"]))
    assert str(findings[1].level) == level
    assert f"events go to {urlsplit(endpoint).hostname}:" in findings[1].text


@pytest.mark.parametrize(
    "endpoint", [None, "{vault://env/endpoint}", "${{ env 'DECK_URL' }}", "http://x:port"]
)
def test_an_endpoint_that_cannot_be_read_is_said_to_be_unknown(endpoint: str | None) -> None:
    plugin = Plugin("openmeter", True, {"ingest_endpoint": endpoint}, "Kong")
    finding = list(check_plugins([plugin], "id", HERE))[1]
    assert finding.level is Level.WARNING
    assert "where its events go is unknown" in finding.text
    assert "None" not in finding.text


def test_another_metering_plugin_next_to_ours_bills_twice() -> None:
    other = Plugin("metering-and-billing", True, {}, "Kong")
    assert found(openmeter(), other)[-1] == ("double billing", "problem")
    assert found(other)[-1] == ("double billing", "warning")
    assert found(openmeter(), Plugin("moesif", False, {}, "Kong"))[-1] == ("endpoint", "ok")


def receiver(*entities: str, where: str = "Kong", header: str = "X-Metering-Key") -> Plugin:
    return Plugin("http-log", True, {"headers": {header: "secret"}}, where, entities=entities)


def test_two_inputs_that_meter_the_same_requests_are_a_warning() -> None:
    twice = ("double metering", "warning")
    assert found(openmeter(), receiver())[-2:] == [("input", "ok"), twice]
    assert found(openmeter(), receiver("route orders"))[-1] == twice
    assert found(openmeter(), receiver(where="another Kong"))[-1] == ("input", "ok")
    assert found(openmeter(), receiver(header="authorization"))[-1] == ("endpoint", "ok")
    on_route = replace(openmeter(), entities=("route orders",))
    assert found(on_route, receiver("route orders"))[-1] == twice
    assert found(on_route, receiver("consumer alice"))[-1] == twice
    assert found(on_route, receiver("route other"))[-1] == ("input", "ok")


def test_no_plugin_at_all_is_a_warning() -> None:
    assert found() == [("plugin", "warning")]
    assert found(Plugin("openmeter", False, {}, "Kong")) == [("plugin", "warning")]


STANDARD = {meter.key: meter for meter in STANDARD_METERS}


def meters_found(*meters: Meter) -> dict[str, tuple[Level, str]]:
    """The findings about the standard meters, some of them as given, by key."""
    there = STANDARD | {meter.key: meter for meter in meters}
    return {
        finding.text.split()[1].rstrip(":"): (finding.level, finding.text) for finding in check_meters(there)
    }


def test_the_standard_meters_are_ok() -> None:
    assert [finding.level for finding in check_meters(STANDARD)] == [Level.OK] * 3


def test_a_missing_meter_or_one_that_counts_something_else_is_a_problem() -> None:
    first, *_ = check_meters({})
    assert first.level is Level.PROBLEM
    level, text = meters_found(replace(STANDARD["kong_llm_tokens"], aggregation="count"))["kong_llm_tokens"]
    assert level is Level.PROBLEM
    assert "aggregation is 'count', not 'sum'" in text


@pytest.mark.parametrize("key", STANDARD)
def test_a_meter_without_a_dimension_differs_as_for_meters_apply(key: str) -> None:
    wanted = STANDARD[key]
    bare = replace(wanted, dimensions={"service_name": "$.other"})
    level, text = meters_found(bare)[key]
    assert level is Level.WARNING
    assert all(difference in text for difference in wanted.differences(bare))
    assert "dimension route_name is missing" in text


def test_without_a_meter_that_counts_model_calls_doctor_warns_of_a_rough_audit() -> None:
    meters = {key: meter for key, meter in STANDARD.items() if key != "kong_llm_events"}
    last = list(check_meters(meters))[-1]
    assert (last.level, "`syncd audit` compares them only roughly" in last.text) == (Level.WARNING, True)
    # Its key does not matter.
    mine = replace(STANDARD["kong_llm_events"], key="mine", dimensions={})
    assert list(check_meters(meters | {"mine": mine}))[-1].level is Level.OK


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
    document = json.loads(project.call("doctor", "--output=json", *args).stdout)
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


class Sink:
    """A metering API that stores an event when its sink flushes, with or without deduplication.

    As OpenMeter's: doubles within one flush are dropped in either case.
    """

    def __init__(self, flush: float, *, deduplicates: bool) -> None:
        self.flush = flush
        self.deduplicates = deduplicates
        self.waiting: list[tuple[float, dict[str, object]]] = []
        self.stored: list[dict[str, object]] = []
        self.sent = 0

    def __call__(self, asked: Asked) -> Answer:
        self._flush()
        if not asked.path.endswith("/events"):
            empty = {"items": [], "totalCount": 0, "data": [], "meta": {"page": {"total": 0}}}
            return Answer([] if asked.path.endswith(("/v1/meters", "/subjects")) else empty)
        if asked.method == "POST":
            assert isinstance(asked.body, dict)
            self.sent += 1
            self.waiting.append((time.monotonic(), asked.body))
            return Answer({}, 202)
        wanted = asked.query.get("id") or asked.query["filter[id][eq]"]
        # v1 finds parts of ids: another event of an earlier probe must not count.
        found = [{"event": event} for event in (*self.stored, {"id": f"{wanted}-other"})]
        return Answer(found if "id" in asked.query else {"data": found[:-1], "meta": {}})

    def _flush(self) -> None:
        if not self.waiting or time.monotonic() < self.waiting[0][0] + self.flush:
            return
        flushed = {str(event["id"]): event for _, event in self.waiting}
        self.waiting.clear()
        known = {event["id"] for event in self.stored} if self.deduplicates else set()
        self.stored += [event for identity, event in flushed.items() if identity not in known]


@BOTH
@pytest.mark.parametrize("deduplicates", [True, False])
def test_the_probe_is_not_misled_by_a_sink_that_drops_doubles_within_one_flush(
    project: Project, name: str, deduplicates: bool
) -> None:
    sink = Sink(0.5, deduplicates=deduplicates)
    with serving(sink) as fake:
        dialect(project, name, fake.url)
        level = levels(project, "--probe", "--probe-flush", "0.6")["deduplication"]
    assert sink.sent == 2
    assert level == ("ok" if deduplicates else "problem")
    assert len(sink.stored) == (1 if deduplicates else 2)


def test_the_probe_sends_one_event_of_its_own_type(project: Project, server: str) -> None:
    assert levels(project, "--probe", "--probe-flush", "0")["deduplication"] == "ok"
    (event,) = httpx.get(f"{server}/api/v1/events").json()
    assert event["event"]["type"] == "kong-openmeter.doctor"


def test_plugins_are_read_from_a_file_as_the_source_reads_it(project: Project) -> None:
    """YAML takes 2024-02-31 for a date, which there is none of; Kong takes it for a text."""
    path = project.folder / "kong.yml"
    path.write_text(path.read_text().replace("consumers:", "_info: {made: 2024-02-31}\nconsumers:", 1))
    found = levels(project)
    assert (found["source"], found["endpoint"]) == ("ok", "ok")


def test_by_default_the_probe_waits_longer_than_a_sink_collects_events() -> None:
    assert Probe().flush >= 5


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


def test_a_meter_on_a_later_page_is_found_over_v3(project: Project) -> None:
    names = [f"other_{number}" for number in range(5)]
    names += ["kong_api_requests", "kong_llm_tokens", "kong_llm_events"]
    meters = [
        {
            "id": name,
            "key": name,
            "created_at": f"2026-01-0{number + 1}T00:00:00Z",
            "event_type": STANDARD[name].event_type if name in STANDARD else "x",
            "aggregation": STANDARD[name].aggregation if name in STANDARD else "count",
            "value_property": STANDARD[name].value_property if name in STANDARD else None,
            "dimensions": dict(STANDARD[name].dimensions) if name in STANDARD else {},
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
    assert "problem  permissions: the token may not create customers" in result.stdout
    assert "problem  permissions: the token may not change customers" in result.stdout
    assert "lacks permissions" in result.stdout
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
        found = json.loads(project.call("doctor", "--output=json").stdout)
    return [(finding["level"], finding["text"]) for finding in found if finding["check"] == "permissions"]


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


def texts(project: Project, check: str) -> list[tuple[str, str]]:
    found = json.loads(project.call("doctor", "--output=json").stdout)
    return [(finding["level"], finding["text"]) for finding in found if finding["check"] == check]


def test_each_line_about_a_plugin_names_its_instance(project: Project) -> None:
    plugin = f"{{name: openmeter, config: {{ingest_endpoint: '{project.metering}/api/v1/events'}}}}"
    with (project.folder / "kong.yml").open("a") as file:
        routes = f"[{{name: orders, plugins: [{plugin}]}}]"
        file.write(f"services:\n- {{name: shop, plugins: [{plugin}], routes: {routes}}}\n")
    for check in ("subject", "endpoint"):
        places = [text.partition(":")[0] for _, text in texts(project, check)]
        assert places == [
            "kong.yml, global plugin",
            "kong.yml, plugin of service shop",
            "kong.yml, plugin of route orders",
        ]


def test_a_plugin_of_the_admin_api_is_named_by_what_it_is_bound_to(project: Project) -> None:
    config = {"ingest_endpoint": f"{project.metering}/x"}
    bound = {"name": "openmeter", "config": config, "route": {"id": "r-1"}, "consumer": {"id": "c-1"}}

    def kong(asked: Asked) -> Answer:
        return Answer({"data": [bound] if asked.path == "/plugins" else [], "next": None})

    with serving(kong) as server:
        project.settings = f"sources: [{{type: kong-admin, url: '{server.url}'}}]\n"
        project.configure()
        [(_, text)] = texts(project, "endpoint")
    assert text.startswith(f"Kong at {server.url}, plugin of route r-1 and consumer c-1: events go to")


@pytest.mark.parametrize(
    ("priority", "role", "shown"),
    [
        (PRIORITY, "traditional", ["is a plugin server"]),
        (LUA_PRIORITY, "traditional", ["runs in Lua"]),
        (LUA_PRIORITY, "control_plane", []),
        (1, "traditional", []),
        (None, "traditional", []),
    ],
)
def test_doctor_tells_whether_kong_has_loaded_the_plugin_in_lua_or_a_plugin_server(
    project: Project, priority: object, role: str, shown: list[str]
) -> None:
    plugin = {"name": "openmeter", "enabled": True, "config": {"ingest_endpoint": f"{project.metering}/x"}}
    loaded = {"available_on_server": {"openmeter": {"version": "0.1.0", "priority": priority}}}
    node = {"plugins": loaded, "configuration": {"role": role}}

    def kong(asked: Asked) -> Answer:
        if asked.path == "/":
            return Answer(node)
        return Answer({"data": [plugin] if asked.path == "/plugins" else [], "next": None})

    with serving(kong) as server:
        project.settings = f"sources: [{{type: kong-admin, url: '{server.url}'}}]\n"
        project.configure()
        found = texts(project, "input")
    assert [level for level, _ in found] == ["ok"] * len(shown)
    assert all(part in text for part, (_, text) in zip(shown, found, strict=True))


DECK = """
_format_version: "3.0"
_plugin_configs:
  shared: {{ingest_endpoint: '{url}/api/v1/events', subject: {{field: username}}}}
consumers: [{{username: alice}}]
plugins: [{{name: openmeter, _config: shared, {own}}}]
"""


def test_a_configuration_that_decks_plugins_share_is_read(project: Project) -> None:
    (project.folder / "kong.yml").write_text(DECK.format(url=project.metering, own=""))
    [(level, text)] = texts(project, "subject")
    assert (level, "sends subject.field 'username'" in text) == ("problem", True)
    assert [level for level, _ in texts(project, "endpoint")] == ["ok"]
    # The fields of the plugin itself come first.
    own = "config: {subject: {field: id}}"
    (project.folder / "kong.yml").write_text(DECK.format(url=project.metering, own=own))
    assert [level for level, _ in texts(project, "subject")] == ["ok"]
    assert [level for level, _ in texts(project, "endpoint")] == ["ok"]


def test_a_shared_configuration_in_another_file_is_named_as_unread(project: Project) -> None:
    deck = DECK.format(url=project.metering, own="").replace("_config: shared", "_config: elsewhere")
    (project.folder / "kong.yml").write_text(deck)
    [(level, text)] = texts(project, "plugin")
    assert (level, "its configuration is 'elsewhere', which this file does not contain" in text) == (
        "warning",
        True,
    )
    assert not texts(project, "subject") + texts(project, "endpoint") + texts(project, "consumers")


def spool(project: Project, **changes: object) -> dict[str, object]:
    """What a gateway answers: nothing is held back, except `changes`."""
    books: dict[str, object] = dict.fromkeys(
        ("requests", "metered", "quarantined", "resent", "events", "delivered"), 0
    )
    books |= {"dead_lettered": 0, "waiting": 0, "skipped": {}, "lost": {}}
    part = {
        "books": books,
        "not_accounted": {"requests": 0, "events": 0},
        "backlog": changes.pop("backlog", 0),
        "oldest_waiting": changes.pop("oldest_waiting", None),
        "bytes": 0,
    }
    here = {**part, "id": "1", "endpoint": f"{project.metering}/api/v1/events"}
    total = {"delivery_running": True, "total": part, "destinations": [here]}
    return {**total, "dead_letters": 0, "quarantined": 0, **changes}


def gateway(project: Project, answer: dict[str, object]) -> list[tuple[str, str]]:
    def plugin(asked: Asked) -> Answer:
        return Answer({"ready": True, "problems": []} if asked.path == "/readyz" else answer)

    with serving(plugin) as server:
        project.configure(f"gateways: [{{name: eu, url: '{server.url}', token: token-of-the-plugin}}]\n")
        return texts(project, "gateway")


def test_quarantined_requests_and_events_that_wait_for_long_are_warnings(project: Project) -> None:
    [(level, text)] = gateway(project, spool(project, quarantined=700))
    assert (level, text.startswith("eu: 700 requests are in quarantine")) == ("warning", True)
    assert "`openmeter-plugin spool replay --quarantine`" in text
    waiting = {"time": "2026-01-01T00:00:00Z", "age_seconds": 4000.4}
    [(level, text)] = gateway(project, spool(project, backlog=1234, oldest_waiting=waiting))
    assert level == "warning"
    assert text.startswith("eu: 1,234 events wait for their delivery, the oldest for 1:06:40")
    both = gateway(project, spool(project, quarantined=700, dead_letters=9))
    assert [level for level, _ in both] == ["warning"] * 2


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("ai_statistics_off", "Set logging.log_statistics: true"),
        ("ai_output_unknown", "Update Kong to 3.13 or later"),
        ("ai_usage_estimated", "Update Kong to 3.13 or later"),
        ("ai_of_a_later_version", "Kong could not tell their AI usage"),
    ],
)
def test_ai_usage_that_a_gateway_s_kong_could_not_tell_is_a_warning(
    project: Project, reason: str, remedy: str
) -> None:
    answer = spool(project)
    answer["total"]["books"]["ai_usage_gaps"] = {reason: 42}  # type: ignore[index]
    [(level, text)] = gateway(project, answer)
    assert (level, remedy in text) == ("warning", True)
    assert text.startswith(f"eu: 42 requests since its spool was created ({reason}): ")


def test_events_that_were_just_sent_are_told_and_no_warning(project: Project) -> None:
    waiting = {"time": "2026-01-01T00:00:00Z", "age_seconds": 1.0}
    assert gateway(project, spool(project, backlog=3, oldest_waiting=waiting)) == [
        ("ok", "eu: ready, and the token is valid; 3 events wait for their delivery, the oldest for 0:00:01")
    ]
    assert gateway(project, spool(project)) == [
        ("ok", "eu: ready, and the token is valid; no event waits for its delivery")
    ]


def test_the_last_line_counts_problems_and_warnings(project: Project) -> None:
    assert re.fullmatch(r"All \d+ checks are ok\.", project.call("doctor").stdout.splitlines()[-1])
    (project.folder / "kong.yml").write_text('_format_version: "3.0"')
    last = project.call("doctor").stdout.splitlines()[-1]
    assert re.fullmatch(r"0 problems, 2 warnings, \d+ ok\.", last)


def test_each_api_says_which_proxy_it_uses_and_that_loopback_passes_none(project: Project) -> None:
    project.settings = (
        "sources:\n"
        "- {type: kong-admin, url: 'http://kong.invalid:8001', timeout: 1s}\n"
        "- {type: kong-admin, url: 'http://exempt.invalid:8001', timeout: 1s}\n"
        "- {type: kong-admin, url: 'http://127.0.0.1:1', timeout: 1s}\n"
        "gateways: [{name: eu, url: 'unix:/nowhere'}]\n"
    )
    project.configure()
    variables = {"HTTP_PROXY": "http://user:secret@127.0.0.1:1", "NO_PROXY": "exempt.invalid"}
    findings = json.loads(project.run("doctor", "--output=json", **variables).stdout)
    assert [finding["text"] for finding in findings if finding["check"] == "proxy"] == [
        "kong-admin-0: requests go through the proxy http://127.0.0.1:1 (environment variable HTTP_PROXY)",
        "kong-admin-1: requests go directly: no setting and no variable names a proxy for it",
        "kong-admin-2: requests go directly: loopback and link-local addresses never pass a proxy",
        "metering API: requests go directly: loopback and link-local addresses never pass a proxy",
        "gateway eu: requests go directly, by a Unix socket",
    ]
