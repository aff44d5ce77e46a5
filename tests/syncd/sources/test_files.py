from __future__ import annotations

import json
from pathlib import Path

import pytest

from syncd.core.errors import SourceError
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules, Templates
from syncd.sources.files import ApplicationsFile, DeclarativeFile, Static, StaticSubject

DECLARATIVE = Path(__file__).parents[2] / "data" / "declarative"
WIRE = Path(__file__).parents[2] / "data" / "kong-wire"
EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


def kong_yml(folder: Path, text: str) -> DeclarativeFile:
    path = folder / "kong.yml"
    path.write_text('_format_version: "3.0"\n' + text)
    return DeclarativeFile(path)


def test_consumers_get_the_ids_that_a_real_kong_assigned(tmp_path: Path) -> None:
    recorded = json.loads((WIRE / "admin-consumers-all.json").read_text())["data"]
    usernames = [consumer["username"] for consumer in recorded]
    source = kong_yml(tmp_path, f"consumers: {json.dumps([{'username': name} for name in usernames])}")
    assert {p.username: p.id for p in source.read()} == {c["username"]: c["id"] for c in recorded}


def test_an_id_in_the_file_is_used(tmp_path: Path) -> None:
    source = kong_yml(tmp_path, "consumers: [{username: alice, id: my-id, custom_id: crm, tags: [a, b]}]")
    (alice,) = source.read()
    assert (alice.id, alice.custom_id, alice.tags) == ("my-id", "crm", ("a", "b"))


def test_a_consumer_with_only_a_custom_id_has_no_stable_id(tmp_path: Path) -> None:
    (nobody,) = kong_yml(tmp_path, "consumers: [{custom_id: crm}]").read()
    assert (nobody.id, nobody.custom_id) == ("", "crm")


def declarative(name: str) -> DeclarativeFile:
    return DeclarativeFile(DECLARATIVE / name)


def test_dates_are_the_text_that_kong_sees() -> None:
    alice, bob = declarative("datetag.yml").read()
    assert alice.tags == ("gold", "2024-01-15")
    assert bob.custom_id == "2024-02-01"


def test_a_file_with_an_impossible_date_is_read() -> None:
    assert [consumer.username for consumer in declarative("baddate.yml").read()] == ["alice"]


def test_a_json_file_with_surrogate_pairs_is_read() -> None:
    (alice,) = declarative("emoji.json").read()
    assert alice.tags == ("team:\U0001f680",)


def test_a_file_with_two_documents_is_refused_with_the_line() -> None:
    with pytest.raises(SourceError, match="line 4, column 1: a second document begins here"):
        declarative("multi.yml").read()


@pytest.mark.parametrize(
    "text", ["a: !!timestamp 2023-02-30", "a: !!int x", "a: &x [*x]", "{" * 3000, "a: \x00", "a: [*x]"]
)
def test_an_odd_file_is_an_error_and_never_a_traceback(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"kong\.yml"):
        kong_yml(tmp_path, text).read()


def test_the_ids_of_a_deck_file_are_not_computed() -> None:
    one, two = declarative("deck.yml").read()
    assert (one.id, two.id) == ("", "")
    assert one.username == "partner-one"
    assert one.tags == ("customer:acme", "team-a")
    assert two.tags == ("team-a",)
    problems = desired_state([one, two], MappingRules("default")).problems
    assert all("comes from a decK file without an id" in problem.reason for problem in problems)
    by_name = MappingRules("default", subject_field="username", templates=Templates(key="{username}"))
    assert [customer.key for customer in desired_state([one, two], by_name).customers] == [
        "partner-one",
        "partner-two",
    ]


def test_the_variables_of_a_deck_file_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECK_PARTNER_NAME", "partner-one")
    monkeypatch.setenv("DECK_PARTNER_ID", "crm-1")
    monkeypatch.delenv("DECK_PARTNER_KEY", raising=False)  # a credential, of which syncd needs nothing
    (partner,) = declarative("env.yml").read()
    assert (partner.id, partner.username, partner.custom_id) == ("", "partner-one", "crm-1")


def test_a_variable_of_a_deck_file_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECK_PARTNER", raising=False)
    with pytest.raises(SourceError, match=r"consumers\[1\]: username .* set .* DECK_PARTNER for syncd"):
        declarative("combo.yml").read()


def test_a_number_where_kong_needs_a_text_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECK_NUMBER", "9")
    template = '${{ env "DECK_NUMBER" }}'
    with pytest.raises(SourceError, match=r"custom_id is int, not a string\. Put its value, .* in quotes"):
        kong_yml(tmp_path, f"consumers: [{{custom_id: {template}}}]").read()
    (one,) = kong_yml(tmp_path, f'consumers: [{{custom_id: "{template}"}}]').read()
    assert one.custom_id == "9"


def test_only_variables_for_deck_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCD_METERING__TOKEN", "hunter2")
    source = kong_yml(tmp_path, """consumers: [{username: '${{ env "SYNCD_METERING__TOKEN" }}'}]""")
    with pytest.raises(SourceError, match="only variables that begin with DECK_") as caught:
        source.read()
    assert "hunter2" not in str(caught.value)


def test_the_anonymous_consumer_of_a_shared_plugin_configuration_is_found(tmp_path: Path) -> None:
    source = kong_yml(
        tmp_path,
        "_plugin_configs: {auth: {anonymous: guest}}\n"
        "plugins: [{name: key-auth, _config: auth}]\n"
        "consumers: [{username: guest}, {username: alice}]\n",
    )
    assert {p.username: p.anonymous for p in source.read()} == {"guest": True, "alice": False}


def test_a_plugins_own_anonymous_replaces_that_of_a_shared_configuration(tmp_path: Path) -> None:
    source = kong_yml(
        tmp_path,
        "_plugin_configs: {auth: {anonymous: alice}}\n"
        "plugins:\n"
        "- {name: key-auth, _config: auth, config: {anonymous: null}}\n"
        "- {name: basic-auth, _config: elsewhere, config: {anonymous: guest}}\n"
        "consumers: [{username: guest}, {username: alice}]\n",
    )
    assert {p.username: p.anonymous for p in source.read()} == {"guest": True, "alice": False}


@pytest.mark.parametrize(
    "plugins",
    [
        "plugins: [{name: key-auth, config: {anonymous: guest}}]",
        "services: [{name: s, plugins: [{name: key-auth, config: {anonymous: guest}}]}]",
        "services: [{name: s, routes: [{name: r, plugins: [{name: key-auth, config: {anonymous: guest}}]}]}]",
        "routes: [{name: r, plugins: [{name: key-auth, enabled: false, config: {anonymous: guest}}]}]",
        "plugins: [{name: key-auth, config: {anonymous: guest-id}}]",
    ],
)
def test_the_anonymous_consumer_is_found_wherever_a_plugin_names_it(tmp_path: Path, plugins: str) -> None:
    consumers = "consumers: [{username: guest, id: guest-id}, {username: alice}]\n"
    source = kong_yml(tmp_path, consumers + plugins)
    assert {p.username: p.anonymous for p in source.read()} == {"guest": True, "alice": False}


def test_a_plugin_without_configuration_names_no_anonymous_consumer(tmp_path: Path) -> None:
    source = kong_yml(
        tmp_path,
        "consumers: [{username: alice}]\nplugins: [{name: cors}, {name: x, config: {anonymous: null}}]",
    )
    assert not source.read()[0].anonymous


def test_a_file_without_consumers_has_none(tmp_path: Path) -> None:
    assert kong_yml(tmp_path, "services: []").read() == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no _format_version"),
        ("consumers: []", "no _format_version"),
        ("_format_version: '3.0'\nconsumers: {alice: {}}", "not a list"),
        ("_format_version: '3.0'\nconsumers: [alice]", r"consumers\[0\]"),
        ("_format_version: '3.0'\nconsumers: [{tags: [x]}]", "neither username nor custom_id"),
        ("_format_version: '3.0'\nconsumers: [{username: 7}]", "username is int"),
        ("_format_version: '3.0'\nconsumers: [{username: a, tags: x}]", "tags"),
        ("_format_version: [", "not YAML"),
    ],
)
def test_a_file_that_is_not_a_declarative_configuration_is_an_error_and_not_an_empty_list(
    tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "kong.yml"
    path.write_text(content)
    with pytest.raises(SourceError, match=says):
        DeclarativeFile(path).read()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        DeclarativeFile(tmp_path / "kong.yml").read()


def test_the_example_applications_are_read() -> None:
    (widget,) = ApplicationsFile(EXAMPLES / "applications.json").read()
    assert (widget.kind, widget.id) == ("application", "b15e2460-ba40-431d-9df0-4957fcffacda")
    assert widget.username == "Weather Widget"


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"data": [{"id": "a", "name": "A"}], "meta": {"page": {"total": 2}}}, "1 of 2 applications"),
        ({"data": [{"id": "a"}, {"id": "a"}], "meta": {"page": {"total": 2}}}, "1 of 2 applications"),
        ({"applications": []}, "no list `data`"),
        ({"data": [{"name": "A"}]}, "no id"),
        ({"data": ["a"]}, "not an object"),
        ([], "not a JSON object"),
    ],
)
def test_an_applications_file_without_a_complete_list_is_an_error(
    tmp_path: Path, document: object, says: str
) -> None:
    path = tmp_path / "applications.json"
    path.write_text(json.dumps(document))
    with pytest.raises(SourceError, match=says):
        ApplicationsFile(path).read()


def test_a_truncated_applications_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "applications.json"
    path.write_text('{"data": [')
    with pytest.raises(SourceError, match="not JSON"):
        ApplicationsFile(path).read()


def test_static_subjects_are_principals_by_their_own_key() -> None:
    (batch,) = Static((StaticSubject("batch", "Batch", {"team": "data"}, "acme"),)).read()
    assert (batch.kind, batch.id, batch.username, batch.customer) == ("static", "batch", "Batch", "acme")
    assert batch.metadata == {"team": "data"}
