"""Who shares a customer, what it is called, and what it is created with."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from syncd.core.model import CustomerDetails, DesiredState, ObservedCustomer, Principal
from syncd.mapping.desired_state import desired_state
from syncd.mapping.limits import within_limits
from syncd.mapping.rules import Assignment, MappingRules, Templates
from tests.syncd.builders import BY_TAG, OWNER, RULES, consumer, customer, observed, static

TEAM = "team:7"


def application(identity: str, name: str = "app", owner: str | None = TEAM) -> Principal:
    return Principal("application", identity, "portal", name, owner=owner)


def mapped(identity: str, of: str, username: str | None = None) -> Principal:
    return Principal("consumer", identity, "portal", username, application=of)


def shape(world: DesiredState) -> dict[str, list[str]]:
    return {found.key: [subject.key for subject in found.subjects] for found in world.customers}


def grouped(by: str, *principals: Principal) -> dict[str, list[str]]:
    return shape(desired_state(principals, MappingRules(OWNER, group_by=by)))  # type: ignore[arg-type]


def reasons(world: DesiredState) -> str:
    return "\n".join(problem.reason for problem in world.problems)


def test_consumers_with_the_same_custom_id_share_a_customer() -> None:
    people = [consumer("1", "a", custom_id="crm"), consumer("2", "b", custom_id="crm"), consumer("3", "c")]
    assert grouped("custom_id", *people) == {
        "crm": ["consumer:1", "consumer:2"],
        "consumer-3": ["consumer:3"],
    }


def test_applications_of_the_same_owner_share_a_customer() -> None:
    apps = [application("1"), application("2"), application("3", owner=None)]
    assert grouped("owner", *apps) == {
        TEAM: ["application:1", "application:2"],
        "application-3": ["application:3"],
    }


def test_the_mapping_file_says_who_belongs_where_by_id_or_by_username() -> None:
    rows = (
        Assignment("consumer", "line 2", id="1", customer="acme"),
        Assignment("consumer", "line 3", username="bob", customer="acme"),
        Assignment("application", "line 4", id="1", customer="globex"),
    )
    people = [consumer("1", "alice"), consumer("2", "bob"), consumer("3", "carol"), application("1")]
    assert shape(desired_state(people, MappingRules(OWNER, "file", assignments=rows))) == {
        "acme": ["consumer:1", "consumer:2"],
        "consumer-3": ["consumer:3"],
        "globex": ["application:1"],
    }


def test_an_application_and_the_consumer_it_is_mapped_to_are_one_customer() -> None:
    world = desired_state([application("A", "Widget"), mapped("1", "A", "alice")], RULES)
    assert shape(world) == {"application:A": ["application:A", "consumer:1"]}
    assert world.customers[0].name == "Widget"
    assert world.customers[0].name_follows_source


def test_the_consumer_takes_the_application_into_its_group() -> None:
    people = [application("A"), mapped("1", "A", "alice"), consumer("1", "alice", "customer:acme")]
    assert shape(desired_state(people, BY_TAG)) == {"acme": ["application:A", "consumer:1"]}


def test_the_application_takes_the_consumer_into_its_owners_customer() -> None:
    assert grouped("owner", application("A"), mapped("1", "A")) == {TEAM: ["application:A", "consumer:1"]}


def test_a_mapped_consumer_that_kong_names_too_is_one_and_not_a_collision() -> None:
    people = [consumer("1", "alice", "gold"), application("A"), mapped("1", "A", "alice")]
    world = desired_state(people, RULES)
    assert shape(world) == {"application:A": ["application:A", "consumer:1"]}
    assert not world.problems


def test_a_consumer_of_two_applications_is_reported_with_both() -> None:
    world = desired_state([application("A"), application("B"), mapped("1", "A"), mapped("1", "B")], RULES)
    assert shape(world) == {"application:A": ["application:A"], "application:B": ["application:B"]}
    assert "application A" in reasons(world)
    assert "application B" in reasons(world)


def test_a_mapped_consumer_whose_group_is_another_than_its_applications_is_reported_with_both() -> None:
    rows = (
        Assignment("consumer", "line 2", id="1", customer="acme"),
        Assignment("application", "line 3", id="A", customer="globex"),
    )
    world = desired_state([application("A"), mapped("1", "A")], MappingRules(OWNER, "file", assignments=rows))
    assert "'acme'" in reasons(world)
    assert "'globex'" in reasons(world)
    assert shape(world) == {"globex": ["application:A"]}


def templated(*principals: Principal, by: str = "none", **templates: str) -> DesiredState:
    rules = MappingRules(OWNER, by, templates=Templates(**templates))  # type: ignore[arg-type]
    return desired_state(principals, rules)


def test_keys_and_names_come_from_templates() -> None:
    world = templated(consumer("1", "alice"), key="kong-{username}", name="Ms {username}")
    (found,) = world.customers
    assert (found.key, found.name, found.subjects[0].display_name) == ("kong-alice", "Ms alice", "Ms alice")
    assert found.name_follows_source
    grouped = templated(
        consumer("1", "alice", "customer:acme"), by="tag", group_key="g-{group}", group_name="The {group}"
    )
    assert (grouped.customers[0].key, grouped.customers[0].name) == ("g-acme", "The acme")


def test_a_name_template_that_cannot_be_filled_gives_way_to_the_usual_name() -> None:
    world = templated(consumer("1", None, custom_id="crm"), name="Ms {username}")
    assert world.customers[0].name == "crm"


def test_a_key_template_that_cannot_be_filled_is_reported() -> None:
    world = templated(consumer("1", None, custom_id="crm"), key="{username}")
    assert not world.customers
    assert "has no username, and the template '{username}' of its customer's key needs it" in reasons(world)


def test_two_that_share_a_key_by_a_template_alone_are_reported_with_both() -> None:
    world = templated(
        consumer("1", "alice", custom_id="x"), consumer("2", "bob", custom_id="x"), key="{custom_id}"
    )
    assert not world.customers
    assert "consumer alice" in reasons(world)
    assert "consumer bob" in reasons(world)


def test_a_group_named_as_somebodys_templated_key_is_reported_and_not_merged_by_chance() -> None:
    world = templated(
        consumer("1", "acme"), consumer("2", "bob", "customer:acme"), by="tag", key="{username}"
    )
    assert not world.customers
    assert "nothing groups them" in reasons(world)


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


def test_a_row_of_the_mapping_file_wins_over_the_templates() -> None:
    row = Assignment(
        "consumer", "line 2", id="1", name="Alice Ltd", details=CustomerDetails(email="pay@x.example")
    )
    rules = MappingRules(OWNER, templates=DETAILS, assignments=(row,))
    (found,) = desired_state([consumer("1", "alice", custom_id="c")], rules).customers
    assert (found.name, found.details.email, found.details.currency) == ("Alice Ltd", "pay@x.example", "EUR")
    assert not found.name_follows_source


def test_what_the_members_of_a_group_do_not_agree_on_is_left_out_with_a_warning() -> None:
    people = [consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme")]
    world = desired_state(
        people, replace(BY_TAG, templates=Templates(email="{username}@x.example", currency="EUR"))
    )
    assert (world.customers[0].details.email, world.customers[0].details.currency) == (None, "EUR")
    assert world.warnings == (
        "customer 'acme': email is left out: its members give 'alice@x.example', 'bob@x.example'",
    )


def test_what_the_metering_api_would_refuse_is_left_out_with_a_warning() -> None:
    bad = Templates(email="no address", currency="euro", billing_address={"country": "Germany"})
    world = desired_state([consumer("1", "alice")], MappingRules(OWNER, templates=bad))
    assert world.customers[0].details == CustomerDetails()
    assert len(world.warnings) == 3


def test_metadata_that_break_the_label_rules_are_left_out_where_only_labels_are_kept() -> None:
    rules = MappingRules(
        OWNER, templates=Templates(metadata={"externalId": "a@b", "team": "x"}), labels_only=True
    )
    world = desired_state([consumer("1", "alice")], rules)
    assert world.customers[0].details.metadata == {"team": "x"}
    assert "externalId 'a@b' is left out" in world.warnings[0]


@given(st.text(min_size=1), st.text(), st.booleans())
def test_no_text_of_a_source_ever_fails_a_run(username: str, custom_id: str, labels_only: bool) -> None:
    rules = MappingRules(OWNER, templates=DETAILS, labels_only=labels_only)
    world = desired_state([consumer("1", username or None, custom_id=custom_id or None)], rules)
    (found,) = world.customers
    assert 1 <= len(found.name) <= 256
    assert len(found.details.description or "") <= 1024


LIMITED = MappingRules(OWNER, group_by="tag", max_subjects_per_customer=1)


def limited(
    *usernames: str, rules: MappingRules = LIMITED, there: tuple[ObservedCustomer, ...] = ()
) -> DesiredState:
    people = [consumer(name, name, "customer:acme") for name in usernames]
    return within_limits(desired_state(people, rules), observed(*there), rules)


def test_further_members_than_a_customer_may_have_are_reported_with_the_choices() -> None:
    world = limited("a", "b")
    assert shape(world) == {"acme": ["consumer:a"]}
    assert "mapping.overflow" in reasons(world)
    assert world.problems[0].subject_keys == ("consumer:b",)


def test_who_is_on_the_customer_already_stays_whoever_else_comes() -> None:
    there = customer("acme", "consumer:b", owner=OWNER)
    assert shape(limited("a", "b", there=(there,))) == {"acme": ["consumer:b"]}


def test_keys_that_people_attached_take_up_room_too() -> None:
    there = customer("acme", "by-hand", owner=OWNER)
    assert shape(limited("a", there=(there,))) == {}


def test_with_overflow_split_the_rest_get_customers_that_name_their_group() -> None:
    split = replace(LIMITED, overflow="split")
    world = limited("a", "b", rules=split)
    assert shape(world) == {"acme": ["consumer:a"], "consumer-b": ["consumer:b"]}
    own = world.customers[1]
    assert (own.name, own.ownership["customer-group"]) == ("acme: b", "acme")
    assert not world.problems


def test_one_that_was_split_off_stays_so_when_the_group_has_room_again() -> None:
    split = replace(LIMITED, overflow="split")
    there = (customer("acme", owner=OWNER), customer("consumer-a", "consumer:a", owner=OWNER))
    assert shape(limited("a", "b", rules=split, there=there)) == {
        "acme": ["consumer:b"],
        "consumer-a": ["consumer:a"],
    }


def test_one_that_cannot_be_split_off_is_told_with_whose_key_it_would_have() -> None:
    by_name = Templates(key="{username}")
    split = replace(LIMITED, overflow="split", templates=by_name)
    people = [consumer("1", "zoe", "customer:acme"), consumer("2", "dan", "customer:acme", source="east")]
    people.append(consumer("3", "dan", "customer:acme", source="west"))
    two_of_a_name = within_limits(desired_state(people, split), observed(), split)
    assert sorted(shape(two_of_a_name)) == ["acme", "dan"]
    assert "would have the key 'dan', and that is that of consumer dan" in reasons(two_of_a_name)
    # A key that is somebody else's subject would have that one's usage counted twice.
    crossed = [*people[:2], static("dan", name="batch")]
    world = within_limits(desired_state(crossed, split), observed(), split)
    assert "dan" not in shape(world)
    assert "and that is the subject 'dan' of static subject batch" in reasons(world)


def test_a_customer_that_would_be_split_off_under_the_key_of_another_is_reported_instead() -> None:
    rules = replace(LIMITED, overflow="split", templates=Templates(key="{username}"))
    people = [consumer("1", "zoe", "customer:acme"), consumer("2", "b", "customer:acme")]
    there = customer("acme", "consumer:1", owner=OWNER)
    world = desired_state([*people, consumer("3", "x", "customer:b")], rules)
    world = within_limits(world, observed(there), rules)
    assert shape(world) == {"acme": ["consumer:1"], "b": ["consumer:3"]}
    assert "does not fit" in reasons(world)


def test_without_a_limit_nothing_changes() -> None:
    world = desired_state([consumer("1", "a")], BY_TAG)
    assert within_limits(world, observed(), BY_TAG) is world
