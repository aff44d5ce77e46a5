from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.core.ownership import is_adoptable, is_managed, label_value, ownership_metadata

SPECIFIED = re.compile(r"[a-z0-9A-Z]([a-z0-9A-Z._-]*[a-z0-9A-Z])?")
"""openmeter-v3.yaml, Labels."""


@given(st.text(max_size=300))
def test_any_text_becomes_a_valid_label_value(text: str) -> None:
    value = label_value(text)
    assert SPECIFIED.fullmatch(value)
    assert len(value) <= 63


@given(st.text(max_size=30), st.text(max_size=30))
def test_two_texts_never_become_the_same_label_value(one: str, other: str) -> None:
    assert (label_value(one) == label_value(other)) == (one == other)


@pytest.mark.parametrize("text", ["b32379d9-3d28-5683-a79c-72139be6e34f", "acme", "0"])
def test_a_uuid_or_a_plain_word_stays_readable(text: str) -> None:
    assert label_value(text) == text


@pytest.mark.parametrize("text", ["a--b", "a_b-c.d", "a@b", "a b", "-a", "a.", ""])
def test_a_text_that_servers_refuse_is_encoded(text: str) -> None:
    assert label_value(text).startswith("sha256-")


def test_the_keys_of_ownership_metadata_have_no_reserved_prefix() -> None:
    reserved = ("kong", "konnect", "mesh", "kic", "kuma", "insomnia", "openmeter", "_")
    assert not any(key.startswith(reserved) for key in ownership_metadata("default", "1"))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"managed-by": "kong-openmeter"},
        {"sync-owner": "default"},
        {"managed-by": "kong-openmeter", "sync-owner": "x"},
    ],
)
def test_a_customer_is_managed_only_with_both_manager_and_owner(metadata: dict[str, str]) -> None:
    assert not is_managed(metadata, "default")
    assert is_managed(ownership_metadata("default", "1"), "default")


@pytest.mark.parametrize("entry", ownership_metadata("someone", "1").items())
def test_a_customer_with_any_metadata_of_an_owner_is_not_adoptable(entry: tuple[str, str]) -> None:
    name, value = entry
    assert is_adoptable({"crm": "7"})
    assert is_adoptable({name: value}) is (name == "source-id")
