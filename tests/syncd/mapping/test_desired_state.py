from __future__ import annotations

import pytest

from openmeter_plugin.metering.rules import SubjectPrefixes
from syncd.core.model import DesiredState, Principal
from syncd.core.ownership import is_label_value
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import Assignment, MappingRules, Templates
from tests.syncd.builders import BY_TAG, OWNER, RULES, consumer, replace, static

UUID = "b32379d9-3d28-5683-a79c-72139be6e34f"


def shape(desired: DesiredState) -> dict[str, list[str]]:
    return {customer.key: [subject.key for subject in customer.subjects] for customer in desired.customers}


def only_problem(desired: DesiredState) -> str:
    assert len(desired.problems) == 1
    return desired.problems[0].reason


def test_the_key_of_a_consumers_customer_differs_from_its_subject() -> None:
    desired = desired_state([consumer(UUID, "alice")], MappingRules(OWNER))
    assert shape(desired) == {f"consumer-{UUID}": [f"consumer:{UUID}"]}


@pytest.mark.parametrize("customer", ["acme", "batch"])
def test_a_static_subject_joins_the_given_customer_else_gets_one_of_its_own(customer: str) -> None:
    desired = desired_state([static("batch", customer=customer), static("other")], MappingRules(OWNER))
    assert shape(desired) == {customer: ["batch"], "static-other": ["other"]}


@pytest.mark.parametrize(("key", "subject"), [("consumer-1", "consumer:1"), ("application-1", "app:1")])
def test_a_group_may_have_the_key_of_a_principals_own_customer(key: str, subject: str) -> None:
    people = [
        consumer("1", "alice"),
        Principal("application", "1", "portal", "Widget"),
        consumer("2", "bob", f"customer:{key}"),
    ]
    desired = desired_state(people, MappingRules(OWNER, "tag"))
    assert not desired.problems
    assert shape(desired)[key] == [subject, "consumer:2"]


def test_the_prefixes_of_subjects_are_those_of_the_configuration() -> None:
    rules = MappingRules(OWNER, prefixes=SubjectPrefixes("user/", "application:"))
    desired = desired_state(
        [consumer("1", "alice"), Principal("application", "2", "portal", "Widget")], rules
    )
    assert shape(desired) == {"consumer-1": ["user/1"], "application-2": ["application:2"]}
    assert desired.prefixes == ("user/", "application:")


def test_an_application_gets_a_customer_under_its_own_prefix() -> None:
    desired = desired_state([Principal("application", UUID, "portal", "Weather Widget")], RULES)
    assert shape(desired) == {f"app:{UUID}": [f"app:{UUID}"]}
    assert desired.customers[0].name == "Weather Widget"


@pytest.mark.parametrize(
    ("username", "custom_id", "name"),
    [("alice", "crm-1", "alice"), (None, "crm-1", "crm-1"), (None, None, "7")],
)
def test_the_name_is_the_username_else_the_custom_id_else_the_id(
    username: str | None, custom_id: str | None, name: str
) -> None:
    desired = desired_state([consumer("7", username, custom_id=custom_id)], RULES)
    assert desired.customers[0].name == name


@pytest.mark.parametrize(("field", "subject"), [("username", "alice"), ("custom_id", "crm-1")])
def test_the_subject_is_the_bare_value_of_the_configured_field(field: str, subject: str) -> None:
    rules = MappingRules("default", subject_field=field)  # type: ignore[arg-type]
    desired = desired_state([consumer("7", "alice", custom_id="crm-1")], rules)
    assert shape(desired) == {"consumer-7": [subject]}


def test_an_application_keeps_its_default_subject_whatever_the_field() -> None:
    rules = MappingRules("default", subject_field="username")
    desired = desired_state([Principal("application", "9", "portal", "Widget")], rules)
    assert shape(desired) == {"application-9": ["app:9"]}


def test_a_consumer_without_the_configured_field_is_reported_and_not_mapped() -> None:
    rules = MappingRules("default", subject_field="username")
    desired = desired_state([consumer("7", None, custom_id="crm-1")], rules)
    assert not desired.customers
    assert "has no username" in only_problem(desired)


def test_consumers_with_the_same_tag_share_a_customer_named_after_it() -> None:
    desired = desired_state(
        [consumer("1", "alice", "gold", "customer:acme"), consumer("2", "bob", "customer:acme")], BY_TAG
    )
    assert shape(desired) == {"acme": ["consumer:1", "consumer:2"]}
    assert (desired.customers[0].name, desired.customers[0].name_follows_source) == ("acme", False)


def test_tags_group_only_with_group_by_tag() -> None:
    desired = desired_state([consumer("1", "alice", "customer:acme")], RULES)
    assert shape(desired) == {"consumer:1": ["consumer:1"]}


@pytest.mark.parametrize("tags", [("customer:acme", "customer:globex"), ("customer:",), ("customer: ",)])
def test_a_consumer_whose_tags_do_not_name_exactly_one_customer_is_reported(tags: tuple[str, ...]) -> None:
    desired = desired_state([consumer("1", "alice", *tags), consumer("2", "bob")], BY_TAG)
    assert shape(desired) == {"consumer:2": ["consumer:2"]}
    assert "must carry one tag" in only_problem(desired)


def test_a_static_subject_joins_the_customer_it_names() -> None:
    desired = desired_state(
        [consumer("1", "alice", "customer:acme"), static("batch", customer="acme", team="data")], BY_TAG
    )
    assert shape(desired) == {"acme": ["batch", "consumer:1"]}
    assert desired.customers[0].subjects[0].metadata["team"] == "data"


def test_a_static_subject_without_a_customer_gets_its_own() -> None:
    desired = desired_state([static("batch", name="Batch export")], RULES)
    assert shape(desired) == {"batch": ["batch"]}
    assert desired.customers[0].name == "Batch export"


def test_an_anonymous_consumer_gets_no_customer() -> None:
    anonymous = replace(consumer("1", "guest"), anonymous=True)
    assert not desired_state([anonymous], RULES).customers
    assert desired_state([anonymous], MappingRules("default", include_anonymous=True)).customers


@pytest.mark.parametrize("name", ["1", "guest"])
def test_a_consumer_configured_as_anonymous_gets_no_customer(name: str) -> None:
    rules = MappingRules("default", anonymous_consumers=frozenset({name}))
    desired = desired_state([consumer("1", "guest"), consumer("2", "alice")], rules)
    assert shape(desired) == {"consumer-2": ["consumer:2"]}


def test_a_consumer_read_from_two_sources_is_one_consumer() -> None:
    twice = [consumer("1", "alice", "a", "b", source="x"), consumer("1", "alice", "b", "a", source="y")]
    desired = desired_state(twice, RULES)
    assert shape(desired) == {"consumer:1": ["consumer:1"]}
    assert not desired.problems


def test_a_consumer_that_is_anonymous_in_one_of_two_sources_is_anonymous() -> None:
    one = consumer("1", "guest", source="x")
    assert not desired_state([one, replace(one, source="y", anonymous=True)], RULES).customers


def test_two_sources_that_disagree_about_a_consumer_block_it_and_name_both() -> None:
    desired = desired_state([consumer("1", "alice", source="x"), consumer("1", "bob", source="y")], RULES)
    assert not desired.customers
    reason = only_problem(desired)
    assert "consumer alice (id 1, from x)" in reason
    assert "consumer bob (id 1, from y)" in reason


@pytest.mark.parametrize(
    "other",
    [
        consumer("1", "alice", "customer:globex", source="y"),
        consumer("1", "alice", source="y"),
        consumer("1", "alice", "customer:acme", custom_id="crm", source="y"),
    ],
    ids=["tag", "no tag", "custom_id"],
)
def test_two_sources_that_group_a_consumer_differently_block_it(other: Principal) -> None:
    desired = desired_state([consumer("1", "alice", "customer:acme", source="x"), other], BY_TAG)
    assert not desired.customers
    assert "have the same subject 'consumer:1'" in only_problem(desired)


def test_two_static_subjects_with_one_key_block_each_other_and_nothing_else() -> None:
    desired = desired_state([static("s", name="one"), static("s", name="two"), static("t")], RULES)
    assert shape(desired) == {"t": ["t"]}
    assert "static subject one" in only_problem(desired)
    assert "static subject two" in only_problem(desired)
    assert desired.problems[0].subject_keys == ("s",)


def test_a_customer_key_that_is_the_subject_of_another_customer_blocks_both() -> None:
    principals = [
        consumer("1", "alice", "customer:consumer:2"),
        consumer("2", "bob", "customer:acme"),
        consumer("3", "carol"),
    ]
    desired = desired_state(principals, BY_TAG)
    assert shape(desired) == {"consumer:3": ["consumer:3"]}
    reason = only_problem(desired)
    assert "consumer alice" in reason
    assert "consumer bob" in reason


def test_a_tag_may_put_a_consumer_into_the_customer_of_another() -> None:
    desired = desired_state([consumer("1", "alice", "customer:consumer:2"), consumer("2", "bob")], BY_TAG)
    assert shape(desired) == {"consumer:2": ["consumer:1", "consumer:2"]}
    assert desired.customers[0].name == "bob"


def test_a_consumer_without_a_stable_id_is_reported() -> None:
    desired = desired_state([consumer("", None, custom_id="crm-1")], RULES)
    assert not desired.customers
    assert "Give it an id" in only_problem(desired)


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("x" * 257, "257 characters"),
        (" ", "is empty"),
        ("\ud800", "not valid Unicode"),
        ("a\0b", "control character U+0000"),
        ("a\nb", "control character U+000A"),
        ("ä\x85b", "control character U+0085"),
    ],
)
def test_a_key_that_the_metering_api_does_not_accept_is_reported(key: str, fault: str) -> None:
    desired = desired_state([static(key), static("fine")], RULES)
    assert shape(desired) == {"fine": ["fine"]}
    assert fault in only_problem(desired)


def test_a_consumer_with_nul_in_its_username_is_blocked_by_name_and_the_others_go_on() -> None:
    rules = MappingRules("default", subject_field="username", templates=Templates(key="{username}"))
    desired = desired_state([consumer("1", "a\0b"), consumer("2", "bob")], rules)
    assert shape(desired) == {"bob": ["bob"]}
    assert "(id 1, from" in only_problem(desired)
    assert "control character U+0000; change it at the source" in only_problem(desired)


def test_a_row_of_the_mapping_file_that_names_nobody_is_told_with_its_line() -> None:
    rows = (
        Assignment("consumer", "customers.csv line 2", username="alice", customer="acme"),
        Assignment("consumer", "customers.csv line 3", username="alcie", customer="acme"),
        Assignment("application", "customers.csv line 4", id="1", customer="acme"),
    )
    rules = MappingRules("default", group_by="file", assignments=rows)
    first, second = desired_state([consumer("1", "alice")], rules).warnings
    assert first.startswith("customers.csv line 3: no source has consumer 'alcie'")
    assert second.startswith("customers.csv line 4: no source has application '1'")


def test_a_name_is_one_line_of_at_most_256_characters() -> None:
    desired = desired_state([consumer("1", " al\nice\x1b[31m" + "e" * 300)], RULES)
    name = desired.customers[0].name
    assert name.startswith("al ice [31me")
    assert len(name) == 256


def test_a_blank_name_is_replaced_by_the_id() -> None:
    assert desired_state([consumer("1", "\t")], RULES).customers[0].name == "1"


@pytest.mark.parametrize(
    "tag", ["customer:acme", "customer:Größe & Söhne", "customer:a--b", "customer:" + "x" * 200]
)
def test_ownership_metadata_are_valid_labels_for_every_key(tag: str) -> None:
    desired = desired_state([consumer("1", "alice", tag)], BY_TAG)
    ownership = desired.customers[0].ownership
    assert all(is_label_value(value) for value in ownership.values())
    assert ownership["sync-owner"] == "default"
    assert ownership["managed-by"] == "kong-openmeter"


def test_the_source_id_of_a_consumer_is_its_id() -> None:
    assert desired_state([consumer(UUID, "alice")], RULES).customers[0].ownership["source-id"] == UUID


def test_a_subject_of_a_group_has_no_display_name_that_a_server_could_copy_onto_the_customer() -> None:
    desired = desired_state(
        [consumer("1", "alice", "customer:acme"), static("s", customer="acme", name="S")], BY_TAG
    )
    names = {subject.key: subject.display_name for subject in desired.customers[0].subjects}
    assert names == {"consumer:1": None, "s": "S"}


def test_a_subject_carries_the_ownership_metadata_of_its_customer() -> None:
    customer = desired_state([consumer("1", "alice", "customer:acme")], BY_TAG).customers[0]
    assert customer.subjects[0].metadata == customer.ownership
