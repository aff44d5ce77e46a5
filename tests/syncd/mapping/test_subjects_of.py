"""The principals behind subjects, whatever becomes of them in the desired state."""

from __future__ import annotations

import pytest

from syncd.core.model import Principal
from syncd.mapping.claims import subjects_of
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules
from tests.syncd.builders import BY_TAG, RULES, consumer, replace, static


def named(principals: list[Principal], rules: MappingRules = RULES) -> list[tuple[str, str | None]]:
    return [(subject, principal.username) for subject, principal in subjects_of(principals, rules)]


def test_each_kind_of_principal_is_found_under_the_subject_of_its_events() -> None:
    app = Principal("application", "7", "portal", "Shop")
    found = named([consumer("1", "alice"), app, static("batch", name="Nightly")])
    assert found == [("consumer:1", "alice"), ("app:7", "Shop"), ("batch", "Nightly")]


@pytest.mark.parametrize(("field", "subject"), [("username", "alice"), ("custom_id", "crm-1")])
def test_the_subject_is_the_field_that_the_configuration_names(field: str, subject: str) -> None:
    rules = replace(RULES, subject_field=field)
    assert named([consumer("1", "alice", custom_id="crm-1")], rules) == [(subject, "alice")]


def test_members_of_a_group_that_sends_one_subject_are_all_behind_it() -> None:
    rules = replace(BY_TAG, subject_field="tag")
    members = [consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme")]
    assert named([*members, consumer("3", "carol")], rules) == [
        ("acme", "alice"),
        ("acme", "bob"),
        ("consumer:3", "carol"),
    ]


def test_principals_without_a_customer_have_names_too() -> None:
    """An anonymous consumer, two that contradict each other, and one in two groups: all are unbilled."""
    anonymous = replace(consumer("1", "guest"), anonymous=True)
    twins = [static("same", name="one"), static("same", name="two")]
    torn = consumer("4", "torn", "customer:a", "customer:b")
    principals = [anonymous, *twins, torn]
    assert desired_state(principals, BY_TAG).customers == ()
    assert {name for _, name in named(principals, BY_TAG)} == {"guest", "one", "two", "torn"}


def test_a_principal_without_a_subject_is_left_out() -> None:
    rules = replace(RULES, subject_field="custom_id")
    assert named([consumer("1", "alice"), consumer("", None)], rules) == []
