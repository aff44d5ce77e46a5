"""Shared customers: their members, names, details and limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.core.model import CustomerDetails, DesiredState, ObservedCustomer, Principal
from syncd.mapping.desired_state import desired_state
from syncd.mapping.limits import within_limits
from syncd.mapping.rules import Assignment, MappingRules, Templates
from tests.syncd.builders import BY_TAG, OWNER, RULES, consumer, customer, observed, replace, static

TEAM = "team:7"


def application(identity: str, name: str = "app", owner: str | None = TEAM) -> Principal:
    return Principal("application", identity, "portal", name, owner=owner)


def mapped(identity: str, application: str, username: str | None = None) -> Principal:
    return Principal("consumer", identity, "portal", username, application=application)


def shape(desired: DesiredState) -> dict[str, list[str]]:
    return {found.key: [subject.key for subject in found.subjects] for found in desired.customers}


def grouped(by: str, *principals: Principal) -> dict[str, list[str]]:
    return shape(desired_state(principals, MappingRules(OWNER, group_by=by)))  # type: ignore[arg-type]


def reasons(desired: DesiredState) -> str:
    return "\n".join(problem.reason for problem in desired.problems)


def test_consumers_with_the_same_custom_id_share_a_customer() -> None:
    people = [consumer("1", "a", custom_id="crm"), consumer("2", "b", custom_id="crm"), consumer("3", "c")]
    assert grouped("custom_id", *people) == {
        "crm": ["consumer:1", "consumer:2"],
        "consumer-3": ["consumer:3"],
    }


def test_applications_of_the_same_owner_share_a_customer() -> None:
    apps = [application("1"), application("2"), application("3", owner=None)]
    assert grouped("owner", *apps) == {
        TEAM: ["app:1", "app:2"],
        "application-3": ["app:3"],
    }


def test_the_mapping_file_assigns_principals_by_id_or_by_username() -> None:
    rows = (
        Assignment("consumer", "line 2", id="1", customer="acme"),
        Assignment("consumer", "line 3", username="bob", customer="acme"),
        Assignment("application", "line 4", id="1", customer="globex"),
    )
    people = [consumer("1", "alice"), consumer("2", "bob"), consumer("3", "carol"), application("1")]
    assert shape(desired_state(people, MappingRules(OWNER, "file", assignments=rows))) == {
        "acme": ["consumer:1", "consumer:2"],
        "consumer-3": ["consumer:3"],
        "globex": ["app:1"],
    }


def test_an_application_and_the_consumer_it_is_mapped_to_share_a_customer() -> None:
    desired = desired_state([application("A", "Widget"), mapped("1", "A", "alice")], RULES)
    assert shape(desired) == {"app:A": ["app:A", "consumer:1"]}
    assert desired.customers[0].name == "Widget"
    assert desired.customers[0].name_follows_source


def test_the_consumer_takes_the_application_into_its_group() -> None:
    people = [application("A"), mapped("1", "A", "alice"), consumer("1", "alice", "customer:acme")]
    assert shape(desired_state(people, BY_TAG)) == {"acme": ["app:A", "consumer:1"]}


def test_the_application_takes_the_consumer_into_its_owners_customer() -> None:
    assert grouped("owner", application("A"), mapped("1", "A")) == {TEAM: ["app:A", "consumer:1"]}


def test_a_mapped_consumer_that_kong_lists_too_is_no_collision() -> None:
    people = [consumer("1", "alice", "gold"), application("A"), mapped("1", "A", "alice")]
    desired = desired_state(people, RULES)
    assert shape(desired) == {"app:A": ["app:A", "consumer:1"]}
    assert not desired.problems


def test_a_consumer_of_two_applications_is_reported_with_both() -> None:
    desired = desired_state([application("A"), application("B"), mapped("1", "A"), mapped("1", "B")], RULES)
    assert shape(desired) == {"app:A": ["app:A"], "app:B": ["app:B"]}
    assert "application A" in reasons(desired)
    assert "application B" in reasons(desired)


def test_a_mapped_consumer_in_another_group_than_its_application_is_reported_with_both() -> None:
    rows = (
        Assignment("consumer", "line 2", id="1", customer="acme"),
        Assignment("application", "line 3", id="A", customer="globex"),
    )
    desired = desired_state(
        [application("A"), mapped("1", "A")], MappingRules(OWNER, "file", assignments=rows)
    )
    assert "'acme'" in reasons(desired)
    assert "'globex'" in reasons(desired)
    assert shape(desired) == {"globex": ["app:A"]}


def templated(*principals: Principal, by: str = "none", **templates: str) -> DesiredState:
    rules = MappingRules(OWNER, by, templates=Templates(**templates))  # type: ignore[arg-type]
    return desired_state(principals, rules)


def test_keys_and_names_come_from_templates() -> None:
    desired = templated(consumer("1", "alice"), key="kong-{username}", name="Ms {username}")
    (found,) = desired.customers
    assert (found.key, found.name, found.subjects[0].display_name) == ("kong-alice", "Ms alice", "Ms alice")
    assert found.name_follows_source
    grouped = templated(
        consumer("1", "alice", "customer:acme"), by="tag", group_key="g-{group}", group_name="The {group}"
    )
    assert (grouped.customers[0].key, grouped.customers[0].name) == ("g-acme", "The acme")


def test_a_name_template_that_cannot_be_filled_is_replaced_by_the_default_name() -> None:
    desired = templated(consumer("1", None, custom_id="crm"), name="Ms {username}")
    assert desired.customers[0].name == "crm"


def test_a_key_template_that_cannot_be_filled_is_reported() -> None:
    desired = templated(consumer("1", None, custom_id="crm"), key="{username}")
    assert not desired.customers
    assert "has no username, and the template '{username}' of its customer's key needs it" in reasons(desired)


def test_two_principals_that_share_a_key_only_by_a_template_are_reported() -> None:
    desired = templated(
        consumer("1", "alice", custom_id="x"), consumer("2", "bob", custom_id="x"), key="{custom_id}"
    )
    assert not desired.customers
    assert "consumer alice" in reasons(desired)
    assert "consumer bob" in reasons(desired)


def test_a_group_with_the_templated_key_of_a_principal_is_reported_and_not_merged() -> None:
    desired = templated(
        consumer("1", "acme"), consumer("2", "bob", "customer:acme"), by="tag", key="{username}"
    )
    assert not desired.customers
    assert "nothing groups them" in reasons(desired)


DETAILS = Templates(
    email="{username}@acme.example",
    currency="EUR",
    description="Kong {kind} {id}",
    billing_address={"country": "DE"},
    metadata={"externalId": "{custom_id}"},
)


def test_details_are_filled_from_templates() -> None:
    (found,) = desired_state(
        [consumer("1", "alice", custom_id="crm-1")], MappingRules(OWNER, templates=DETAILS)
    ).customers
    assert found.details == CustomerDetails(
        "alice@acme.example", "EUR", "Kong consumer 1", {"country": "DE"}, {"externalId": "crm-1"}
    )


def test_a_row_of_the_mapping_file_takes_precedence_over_the_templates() -> None:
    row = Assignment(
        "consumer", "line 2", id="1", name="Alice Ltd", details=CustomerDetails(email="pay@x.example")
    )
    rules = MappingRules(OWNER, templates=DETAILS, assignments=(row,))
    (found,) = desired_state([consumer("1", "alice", custom_id="c")], rules).customers
    assert (found.name, found.details.email, found.details.currency) == ("Alice Ltd", "pay@x.example", "EUR")
    assert not found.name_follows_source


def test_a_detail_on_which_the_members_of_a_group_differ_is_omitted_with_a_warning() -> None:
    people = [consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme")]
    desired = desired_state(
        people, replace(BY_TAG, templates=Templates(email="{username}@x.example", currency="EUR"))
    )
    assert (desired.customers[0].details.email, desired.customers[0].details.currency) == (None, "EUR")
    (warning,) = desired.warnings
    values = "'alice@x.example', 'bob@x.example'"
    assert warning == f"customer 'acme': email is omitted: its members have different values: {values}"


def test_a_detail_that_the_metering_api_would_refuse_is_omitted_with_a_warning() -> None:
    bad = Templates(email="no address", currency="euro", billing_address={"country": "Germany"})
    desired = desired_state([consumer("1", "alice")], MappingRules(OWNER, templates=bad))
    assert desired.customers[0].details == CustomerDetails()
    assert len(desired.warnings) == 3


@pytest.mark.parametrize("currency", ["ZZZ", "XXX", "XAU", "eur", "DEM"])
def test_a_currency_that_iso_4217_does_not_list_is_omitted_with_a_note(currency: str) -> None:
    rules = MappingRules(OWNER, templates=Templates(currency=currency))
    desired = desired_state([consumer("1", "alice")], rules)
    assert desired.customers[0].details.currency is None
    assert f"currency '{currency}' is omitted" in desired.warnings[0]


@pytest.mark.parametrize("value", ["cid-d-0", "team-a-1"])
def test_metadata_that_a_v3_server_refuses_are_omitted_with_a_note(value: str) -> None:
    templates = Templates(metadata={"externalId": "{custom_id}"})
    rules = MappingRules(OWNER, templates=templates, labels_only=True)
    desired = desired_state([consumer("1", "alice", custom_id=value)], rules)
    assert desired.customers[0].details.metadata == {}
    assert f"externalId {value!r} is omitted" in desired.warnings[0]


def test_metadata_that_break_the_label_rules_are_omitted_if_the_api_accepts_only_labels() -> None:
    rules = MappingRules(
        OWNER, templates=Templates(metadata={"externalId": "a@b", "team": "x"}), labels_only=True
    )
    desired = desired_state([consumer("1", "alice")], rules)
    assert desired.customers[0].details.metadata == {"team": "x"}
    assert "externalId 'a@b' is omitted" in desired.warnings[0]


@given(st.text(min_size=1), st.text(), st.booleans())
def test_no_text_from_a_source_fails_a_run(username: str, custom_id: str, labels_only: bool) -> None:
    rules = MappingRules(OWNER, templates=DETAILS, labels_only=labels_only)
    desired = desired_state([consumer("1", username or None, custom_id=custom_id or None)], rules)
    (found,) = desired.customers
    assert 1 <= len(found.name) <= 256
    assert len(found.details.description or "") <= 1024


LIMITED = MappingRules(OWNER, group_by="tag", max_subjects_per_customer=1)


def limited(
    *usernames: str, rules: MappingRules = LIMITED, there: tuple[ObservedCustomer, ...] = ()
) -> DesiredState:
    people = [consumer(name, name, "customer:acme") for name in usernames]
    return within_limits(desired_state(people, rules), observed(*there), rules)


def test_members_over_the_limit_are_reported_with_the_options() -> None:
    desired = limited("a", "b")
    assert shape(desired) == {"acme": ["consumer:a"]}
    assert "mapping.overflow" in reasons(desired)
    assert desired.problems[0].subject_keys == ("consumer:b",)


def test_a_subject_that_is_on_the_customer_stays_when_others_are_added() -> None:
    there = customer("acme", "consumer:b", owner=OWNER)
    assert shape(limited("a", "b", there=(there,))) == {"acme": ["consumer:b"]}


def test_subjects_that_a_person_attached_count_towards_the_limit() -> None:
    there = customer("acme", "by-hand", owner=OWNER)
    assert shape(limited("a", there=(there,))) == {}


def test_with_overflow_split_the_others_get_customers_that_name_their_group() -> None:
    split = replace(LIMITED, overflow="split")
    desired = limited("a", "b", rules=split)
    assert shape(desired) == {"acme": ["consumer:a"], "consumer-b": ["consumer:b"]}
    own = desired.customers[1]
    assert (own.name, own.ownership["customer-group"]) == ("acme: b", "acme")
    assert not desired.problems


def test_a_split_off_customer_stays_when_the_group_has_room_again() -> None:
    split = replace(LIMITED, overflow="split")
    there = (customer("acme", owner=OWNER), customer("consumer-a", "consumer:a", owner=OWNER))
    assert shape(limited("a", "b", rules=split, there=there)) == {
        "acme": ["consumer:b"],
        "consumer-a": ["consumer:a"],
    }


def test_a_member_that_cannot_be_split_off_is_reported_with_the_user_of_its_key() -> None:
    by_name = Templates(key="{username}")
    split = replace(LIMITED, overflow="split", templates=by_name)
    people = [consumer("1", "zoe", "customer:acme"), consumer("2", "dan", "customer:acme", source="east")]
    people.append(consumer("3", "dan", "customer:acme", source="west"))
    two_of_a_name = within_limits(desired_state(people, split), observed(), split)
    assert sorted(shape(two_of_a_name)) == ["acme", "dan"]
    assert "would have the key 'dan', which is that of consumer dan" in reasons(two_of_a_name)
    # With another principal's subject as the key, that usage would be counted twice.
    crossed = [*people[:2], static("dan", name="batch")]
    desired = within_limits(desired_state(crossed, split), observed(), split)
    assert "dan" not in shape(desired)
    assert "which is the subject 'dan' of static subject batch" in reasons(desired)


def test_a_split_off_customer_never_takes_the_key_of_another() -> None:
    rules = replace(LIMITED, overflow="split", templates=Templates(key="{username}"))
    people = [consumer("1", "zoe", "customer:acme"), consumer("2", "b", "customer:acme")]
    there = customer("acme", "consumer:1", owner=OWNER)
    desired = desired_state([*people, consumer("3", "x", "customer:b")], rules)
    desired = within_limits(desired, observed(there), rules)
    assert shape(desired) == {"acme": ["consumer:1"], "b": ["consumer:3"]}
    assert "does not fit" in reasons(desired)


def test_without_a_limit_nothing_changes() -> None:
    desired = desired_state([consumer("1", "a")], BY_TAG)
    assert within_limits(desired, observed(), BY_TAG) is desired
