"""`syncd doctor` compares the subject of each consumer in the plugin with the one in syncd."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from syncd.core.model import Principal
from syncd.doctor.checks import Plugin
from syncd.doctor.subjects import Kong, check_subjects, mapped_subjects
from syncd.mapping.rules import MappingRules
from tests.syncd.builders import OWNER, consumer, replace
from tests.syncd.konnect import PLANE, PORTAL, Konnect, application, registration, uid
from tests.syncd.konnect import consumer as konnect_consumer
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving

BY_TAG = MappingRules(owner_id=OWNER, group_by="tag", subject_field="tag")
BY_ID = replace(BY_TAG, subject_field="id")
ALICE = consumer("1", "alice", "customer:acme")
BOB = consumer("2", "bob")
CAROL = consumer("3", "carol")
ALL = (ALICE, BOB, CAROL)

Fields = Mapping[str, object]
BY_ID_TOO: Fields = {"field": "tag", "fallbacks": [{"look_up_value_in": "consumer"}]}


def openmeter(**subject: object) -> Plugin:
    return Plugin("openmeter", True, {"subject": subject}, "Kong")


def found(
    *plugins: Plugin,
    consumers: Sequence[Principal] | None = ALL,
    rules: MappingRules = BY_TAG,
    others: Mapping[str, Sequence[Principal]] | None = None,
) -> list[tuple[str, str]]:
    """Levels and texts of findings."""
    everybody = [*(consumers or ()), *(one for named in (others or {}).values() for one in named)]
    kong = Kong("kong-admin-0", plugins, consumers)
    findings = check_subjects([kong], others or {}, mapped_subjects(everybody, rules))
    return [(str(finding.level), finding.text) for finding in findings]


def test_consumers_without_the_tag_agree_if_the_plugin_falls_back_to_their_id() -> None:
    assert found(openmeter(**BY_ID_TOO)) == [
        ("ok", "Kong, global plugin: 3 consumers are sent under the subjects that syncd maps")
    ]


def test_consumers_without_the_tag_that_no_fallback_finds_are_a_problem_with_their_names() -> None:
    # The plugin's default, which only looks for an application.
    for fields in ({"field": "tag"}, {"field": "tag", "fallbacks": [{"look_up_value_in": "application"}]}):
        [(level, text)] = found(openmeter(**fields))
        assert level == "problem"
        assert "the plugin's lookups do not find 2 of 3 consumers (bob, carol)" in text
        assert "their requests are not billed, unless the application identifies someone" in text
        assert "Add `look_up_value_in: consumer` to subject.fallbacks" in text
    [(_, text)] = found(openmeter(field="tag", fallbacks={}))
    assert "are not billed; syncd maps them" in text


def test_the_finding_says_what_happens_to_requests_of_consumers_not_found() -> None:
    [(_, text)] = found(openmeter(field="tag", fallbacks=[], missing="fallback", fallback_subject="rest"))
    assert "are billed to 'rest'" in text
    [(_, text)] = found(openmeter(field="tag", fallbacks=[], missing="quarantine"))
    assert "go to the quarantine" in text


def test_consumers_sent_under_another_subject_are_a_problem_with_an_example() -> None:
    fields = {"field": "tag", "fallbacks": [{"look_up_value_in": "consumer", "field": "username"}]}
    [(level, text)] = found(openmeter(**fields))
    assert level == "problem"
    assert "2 of 3 consumers (bob, carol) are sent under another subject than syncd maps" in text
    assert "consumer bob as 'bob' and not as 'consumer:2'" in text
    # A tag that only the plugin uses affects only consumers with that tag.
    [(level, text)] = found(openmeter(**BY_ID_TOO), rules=BY_ID)
    assert (level, "1 of 3 consumers (alice)" in text) == ("problem", True)
    [(level, _)] = found(openmeter(**BY_ID_TOO), rules=BY_ID, consumers=(BOB, CAROL))
    assert level == "ok"


def test_consumers_that_syncd_maps_to_nothing_but_the_plugin_sends_are_a_warning() -> None:
    torn = consumer("4", "dave", "customer:acme", "customer:globex")
    [(level, text)] = found(openmeter(**BY_ID_TOO), consumers=(*ALL, torn))
    assert level == "warning"
    assert "1 of 4 consumers (dave) are sent, consumer dave as 'consumer:4'" in text
    # If neither finds a subject, they agree.
    assert found(openmeter(field="tag", fallbacks=[]), consumers=(ALICE, torn))[0][0] == "ok"


def test_the_first_few_are_named_and_the_others_counted() -> None:
    many = tuple(consumer(str(number), f"user-{number}") for number in range(9))
    [(_, text)] = found(openmeter(field="tag"), consumers=many)
    assert "9 of 9 consumers (user-0, user-1, user-2 and 6 more)" in text


def test_an_anonymous_consumer_that_syncd_leaves_out_is_not_compared() -> None:
    guest = replace(consumer("5", "guest"), anonymous=True)
    assert found(openmeter(field="tag"), consumers=(ALICE, guest))[0][0] == "ok"
    included = replace(BY_TAG, include_anonymous=True)
    assert found(openmeter(field="tag"), consumers=(ALICE, guest), rules=included)[0][0] == "problem"


def test_nulls_of_the_admin_api_are_unset_settings() -> None:
    nulls = {"require_consumer": None, "missing": None, "fallback_subject": None, "look_up_value_in": None}
    last = [{"look_up_value_in": "consumer", "field": None}]
    assert found(openmeter(field="tag", fallbacks=last, **nulls))[0][0] == "ok"


def test_an_invalid_subject_is_a_problem_with_the_reason() -> None:
    [(level, text)] = found(openmeter(field="email"))
    assert level == "problem"
    assert "the plugin's subject is invalid" in text
    assert "a consumer has the fields id, username" in text


def test_a_plugin_that_looks_for_no_consumer_is_not_compared_and_doctor_says_so() -> None:
    [(level, text)] = found(openmeter(look_up_value_in="header", field="x-customer"))
    assert (level, "looks for no consumer" in text) == ("warning", True)


def test_a_plugin_of_one_consumer_is_compared_with_that_one_only() -> None:
    everybody = openmeter(field="tag")
    for name in ("2", "bob"):
        own = replace(openmeter(field="id"), consumer=name, entities=(f"consumer {name}",))
        levels = [(level, text) for level, text in found(everybody, own)]
        assert [level for level, _ in levels] == ["problem", "ok"]
        assert "1 of 2 consumers (carol)" in levels[0][1]
        assert levels[1][1].startswith(f"Kong, plugin of consumer {name}: 1 consumer")
        # A plugin of one route leaves the other routes to the global plugin.
        partial = found(everybody, replace(own, is_partial=True))
        assert "2 of 3 consumers (bob, carol)" in partial[0][1]


def test_consumers_that_cannot_be_compared_are_reported() -> None:
    group = replace(openmeter(), is_of_a_group=True)
    [(level, text)] = found(group)
    assert (level, "one consumer group" in text) == ("warning", True)
    [(level, text)] = found(openmeter(), consumers=None)
    assert (level, "could not be read" in text) == ("warning", True)
    bare = Kong("kong-admin-1", (Plugin("cors", True, {}, "Kong"),), ALL)
    there = Kong("kong-admin-0", (openmeter(**BY_ID_TOO),), ())
    [finding] = check_subjects([there, bare], {}, mapped_subjects(ALL, BY_TAG))
    assert str(finding.level) == "warning"
    assert "kong-admin-1 shows no plugin openmeter" in finding.text
    # Without any plugin, one warning is enough.
    assert list(check_subjects([bare], {}, mapped_subjects(ALL, BY_TAG))) == []


def test_consumers_of_gateways_with_unreadable_plugins_are_counted() -> None:
    away = consumer("9", "zoe", source="portal")
    [_, (level, text)] = found(openmeter(**BY_ID_TOO), others={"portal": (away, BOB)})
    assert level == "warning"
    assert "portal names 1 consumer of gateways whose plugins syncd cannot read" in text


def test_applications_are_compared_with_every_plugin() -> None:
    apps = tuple(Principal("application", name, "portal", username=name) for name in ("a", "b"))

    def said(*plugins: Plugin) -> tuple[str, str]:
        return found(*plugins, others={"portal": apps})[-1]

    assert said(openmeter(fallbacks=[]), openmeter()) == (
        "ok",
        "Kong, global plugin: 2 applications of portal are sent as syncd maps them",
    )
    for plugin in (
        openmeter(fallbacks=[]),
        openmeter(fallbacks=[{"look_up_value_in": "application", "field": "developer_id"}]),
        replace(openmeter(), config={"application_context": "never"}),
    ):
        level, text = said(plugin)
        assert level == "warning"
        assert "sends 2 applications of portal by their id" in text


@pytest.fixture
def project(tmp_path: Path, server: str) -> Project:
    httpx.post(f"{server}/sandbox/v1/reset").raise_for_status()
    project = Project(tmp_path, server)
    project.settings = project.settings.replace("{group_by: tag}", "{group_by: tag, subject_field: tag}")
    project.configure()
    return project


def said(project: Project) -> list[tuple[str, str]]:
    result = project.call("doctor", "--output=json")
    named = ("consumers", "applications", "mapping")
    return [(one["level"], one["text"]) for one in json.loads(result.stdout) if one["check"] in named]


def test_plugins_of_a_file_are_distinguished_by_their_entity(project: Project) -> None:
    fallback = "fallbacks: [{look_up_value_in: consumer}]"
    endpoint = f"ingest_endpoint: '{project.metering}/api/v1/events'"
    plugin = f"{{name: openmeter, config: {{{endpoint}, subject: {{field: tag}}}}}}"
    better = plugin.replace("{field: tag}", f"{{field: tag, {fallback}}}")
    grouped = plugin.replace("name: openmeter", "name: openmeter, consumer_group: gold")
    text = (project.folder / "kong.yml").read_text()
    whole = f"{text}- {better}\n- {grouped}\nservices: [{{name: echo, routes: [{{plugins: [{plugin}]}}]}}]\n"
    (project.folder / "kong.yml").write_text(
        whole.replace("{username: bob, ", f"{{username: bob, plugins: [{plugin}], ")
    )
    levels = [level for level, _ in said(project)]
    assert sorted(levels) == ["ok", "ok", "problem", "warning"]
    texts = " ".join(text for _, text in said(project))
    # bob has the tag and a plugin of his own, guest is anonymous.
    assert "kong.yml, plugin of consumer bob: 1 consumer is sent under" in texts
    assert "kong.yml, global plugin: 2 consumers are sent under" in texts
    assert "kong.yml, plugin of route without a name: the plugin's lookups do not find 1 of 2" in texts
    assert "kong.yml, plugin of consumer group gold: a plugin is for one consumer group" in texts


def test_the_plugins_of_a_running_kong_are_compared_with_its_consumers(project: Project) -> None:
    def kong(asked: Asked) -> Answer:
        if asked.path == "/plugins":
            config = {
                "ingest_endpoint": f"{project.metering}/x",
                "subject": {"field": "tag", "missing": None},
            }
            whole = {"name": "openmeter", "enabled": True, "config": config}
            return Answer({"data": [whole, {**whole, "consumer": {"id": "1"}, "route": None}], "next": None})
        if asked.path == "/consumers":
            listed = [
                {"id": "1", "username": "alice", "tags": ["customer:acme"]},
                {"id": "2", "username": "bob"},
            ]
            return Answer({"data": listed, "next": None})
        return Answer({})

    with serving(kong) as server:
        project.settings = project.settings.replace(
            "{type: declarative-file, path: kong.yml}", f"{{type: kong-admin, url: '{server.url}'}}"
        )
        project.configure()
        [(level, text), (own, _)] = said(project)
    assert (level, own) == ("problem", "ok")
    assert "1 of 1 consumer (bob)" in text


def test_a_portal_and_a_control_plane_are_compared_if_possible(project: Project) -> None:
    config = {"ingest_endpoint": f"{project.metering}/x", "subject": {"field": "tag"}}
    konnect = Konnect(
        plugins=[{"id": uid("openmeter"), "name": "openmeter", "enabled": True, "config": config}],
        consumers=[konnect_consumer("alice", tags=["customer:acme"])],
        applications=[application(1)],
        registrations=[registration(1, "app-1", "zoe")],
    )
    with serving(konnect) as server:
        project.settings = project.settings.replace(
            "{type: declarative-file, path: kong.yml}",
            f"{{type: konnect-consumers, url: '{server.url}', control_plane_id: '{PLANE}'}},"
            f" {{type: konnect-applications, url: '{server.url}', portal_id: '{PORTAL}'}}",
        )
        project.configure()
        levels = said(project)
    assert [level for level, _ in levels] == ["ok", "ok", "warning"]
    assert "konnect-applications-1 names 1 consumer of gateways" in levels[2][1]


def test_consumers_that_could_not_be_read_are_reported_as_not_compared(project: Project) -> None:
    def kong(asked: Asked) -> Answer:
        if asked.path == "/consumers":
            return Answer({}, 500)
        config = {"ingest_endpoint": f"{project.metering}/x"}
        return Answer({"data": [{"name": "openmeter", "config": config}]} if asked.path == "/plugins" else {})

    with serving(kong) as server:
        project.settings = project.settings.replace(
            "{type: declarative-file, path: kong.yml}", f"{{type: kong-admin, url: '{server.url}'}}"
        )
        project.configure()
        [(level, text)] = said(project)
    assert (level, "kong-admin-0: its consumers could not be read" in text) == ("warning", True)
