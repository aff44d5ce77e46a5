"""`syncd doctor` compares the subjects of the metering API's latest events with those that syncd maps."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from openmeter_plugin.metering.rules import SubjectPrefixes
from syncd.core.model import Principal
from syncd.doctor.subjects import check_arrivals
from syncd.mapping.rules import MappingRules
from syncd.metering.base import ArrivedEvent
from tests.syncd.builders import OWNER, consumer, replace
from tests.syncd.konnect import uid
from tests.syncd.processes import KONG_YML, Project
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

RULES = MappingRules(owner_id=OWNER)
APPLICATIONS = tuple(Principal("application", uid(f"app-{number}"), "portal") for number in range(42))
ALICE = consumer(uid("alice"), "alice")
A, B = (one.id for one in APPLICATIONS[:2])


def event(subject: str, customer: str | None = None, kind: str = "kong.api_request") -> ArrivedEvent:
    return ArrivedEvent(kind, subject, customer)


def found(
    *events: ArrivedEvent,
    principals: tuple[Principal, ...] = (*APPLICATIONS, ALICE),
    rules: MappingRules = RULES,
) -> list[tuple[str, str]]:
    return [(str(one.level), one.text) for one in check_arrivals(events, principals, rules)]


def test_a_mismatch_of_prefixes_is_named_as_such() -> None:
    [(level, text)] = found(*(event(f"application:{one.id}") for one in APPLICATIONS))
    assert level == "problem"
    assert text.startswith("42 subjects arrive as application:..., syncd maps app:... ('application:")
    assert "Make mapping.subject_prefixes agree with the gateways' subject_prefixes" in text


def test_each_mismatch_is_a_finding_of_its_own() -> None:
    texts = [text for _, text in found(event(f"application:{A}"), event(B), event(f"user-{ALICE.id}"))]
    assert [text.partition(" (")[0] for text in texts] == [
        "1 subject arrives as ..., syncd maps app:...",
        "1 subject arrives as application:..., syncd maps app:...",
        "1 subject arrives as user-..., syncd maps consumer:...",
    ]


def test_a_prefix_that_both_sides_changed_is_no_mismatch() -> None:
    rules = replace(RULES, prefixes=SubjectPrefixes(consumer="user-", application="application:"))
    assert [
        level for level, _ in found(event(f"application:{A}"), event(f"user-{ALICE.id}"), rules=rules)
    ] == ["ok"]


def test_another_field_is_not_called_a_mismatch_of_prefixes() -> None:
    [(level, text)] = found(event(f"consumer:{ALICE.id}"), rules=replace(RULES, subject_field="username"))
    assert (level, "arrives as consumer:..., syncd maps another field" in text) == ("problem", True)
    assert "mapping.subject_field" in text


def test_subjects_that_are_mapped_or_on_a_customer_are_fine() -> None:
    [(level, text)] = found(
        event(f"consumer:{ALICE.id}"), event(f"application:{A}", "01H"), event("acme", "01H")
    )
    assert (level, text) == ("ok", "of the latest 3 events, 3 subjects are on a customer or mapped")


def test_subjects_that_nobody_maps_are_a_warning_with_their_names() -> None:
    [(level, text)] = found(
        *(event(f"stranger-{number}") for number in range(5)), event(f"consumer:{ALICE.id}")
    )
    assert level == "warning"
    assert "5 subjects of the latest events are on no customer" in text
    assert "'stranger-0', 'stranger-1', 'stranger-2' and 2 more" in text


def test_events_of_others_are_left_alone() -> None:
    [(level, text)] = found(event(f"application:{A}", kind="kong-openmeter.doctor"), event("x", kind="build"))
    assert (level, "no event of a gateway yet" in text) == ("ok", True)


@pytest.mark.parametrize(("answered", "level"), [(57, "ok"), (1000, "warning"), (250_000, "warning")])
def test_a_kong_that_answers_requests_without_any_event_is_a_warning(answered: int, level: str) -> None:
    [finding] = check_arrivals([], [ALICE], RULES, answered)
    assert (str(finding.level), "has no event of a gateway" in finding.text) == (level, True)
    assert (f"answered {answered:,} requests" in finding.text) == (level == "warning")
    [finding] = check_arrivals([event(f"consumer:{ALICE.id}")], [ALICE], RULES, answered)
    assert str(finding.level) == "ok"


@pytest.fixture
def project(tmp_path: Path, server: str) -> Project:
    httpx.post(f"{server}/sandbox/v1/reset").raise_for_status()
    project = Project(tmp_path, server)
    plugin = f"- {{name: openmeter, config: {{ingest_endpoint: '{server}/api/v1/events'}}}}\n"
    (tmp_path / "kong.yml").write_text(KONG_YML + plugin)
    return project


def arrivals(project: Project) -> list[tuple[str, str]]:
    document = json.loads(project.call("doctor", "--output", "json").stdout)
    return [(one["level"], one["text"]) for one in document if one["check"] == "arrivals"]


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_doctor_reads_the_latest_events_in_both_dialects(project: Project, dialect: str) -> None:
    project.configure(f"metering: {{dialect: {dialect}, url: '{project.metering}', attempts: 1}}\n")
    assert arrivals(project)[0][0] == "ok"
    assert project.call("apply", "--yes").returncode == 0
    mapped = [
        key
        for customer in httpx.get(f"{project.metering}/api/v1/customers").json()["items"]
        for key in customer["usageAttribution"]["subjectKeys"]
    ]
    for number, subject in enumerate([mapped[0], f"user:{mapped[1].removeprefix('consumer:')}"]):
        sent = {"specversion": "1.0", "type": "kong.api_request", "source": "kong", "data": {}}
        body = json.dumps(sent | {"id": f"e{number}", "subject": subject})
        headers = {"content-type": "application/cloudevents+json"}
        httpx.post(f"{project.metering}/api/v1/events", content=body, headers=headers).raise_for_status()
    [(level, text)] = arrivals(project)
    assert level == "problem"
    assert text.startswith("1 subject arrives as user:..., syncd maps consumer:...")


def test_events_that_may_not_be_read_are_a_warning(project: Project) -> None:
    def refusing(asked: Asked) -> Answer:
        if asked.path == "/api/v1/events":
            return Answer({"detail": "forbidden"}, 403)
        answer = httpx.request(
            asked.method, f"{project.metering}{asked.path}", params=asked.query, json=asked.body or None
        )
        return Answer(answer.json() if answer.content else None, answer.status_code)

    with serving(refusing) as server:
        project.configure(f"metering: {{url: '{server.url}', attempts: 1}}\n")
        [(level, text)] = arrivals(project)
    assert (level, "cannot be read, so their subjects are not compared" in text) == ("warning", True)
