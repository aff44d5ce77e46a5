from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.core.ownership import (
    is_adoptable,
    is_label,
    is_label_value,
    is_managed,
    label_value,
    ownership_metadata,
)

SPECIFIED = re.compile(r"[a-z0-9A-Z]([a-z0-9A-Z._-]*[a-z0-9A-Z])?")
"""openmeter-v3.yaml, Labels."""
SERVER = re.compile(r"^(?:[a-zA-Z0-9](?:[a-zA-Z0-9._-]?[a-zA-Z0-9])?){1,63}$")
"""OpenMeter, api/v3/labels/validate.go. Slow for long texts that do not match: Python backtracks."""
ANSWERED = {
    "a-b": 201,
    "a-b-c": 400,
    "team-a-1": 400,
    "ab-cd-ef": 201,
    "1-2-3": 400,
    "eu-a-1": 400,
    "ab-c-de": 400,
    "a.b-c": 400,
    "a_b": 201,
    "2026-11-28": 201,
    "20261128T185857Z": 201,
    "b32379d9-3d28-5683-a79c-72139be6e34f": 201,
    "a-bc-d": 201,
    "x.y.z": 400,
    "ab.cd": 201,
    "managed-by": 201,
    "orphaned-at-1": 201,
    "x_y": 201,
}
"""Values and keys of labels, and what OpenMeter 1.0.0-beta.232 answered to a customer with them."""


@given(st.text(max_size=300))
def test_any_text_becomes_a_label_value_as_specified(text: str) -> None:
    value = label_value(text)
    assert SPECIFIED.fullmatch(value)
    assert len(value) <= 63


@given(st.from_regex(r"[aZ0]{1,4}(-[aZ0]{1,4}){0,4}", fullmatch=True) | st.text("aZ09-._ ä", max_size=24))
def test_the_server_takes_whatever_a_text_becomes(text: str) -> None:
    assert SERVER.match(label_value(text))


def test_the_server_takes_each_short_text_that_is_called_valid_and_no_other_with_dashes_only() -> None:
    for length in range(9):
        for letters in itertools.product("a-", repeat=length):
            text = "".join(letters)
            assert is_label_value(text) is bool(SERVER.match(text)), text


@pytest.mark.parametrize(("text", "status"), ANSWERED.items())
def test_what_a_real_server_refused_is_never_called_valid(text: str, status: int) -> None:
    assert not (is_label_value(text) and status == 400)
    assert SERVER.match(label_value(text))
    assert bool(SERVER.match(text)) is (status == 201)


@pytest.mark.parametrize("key", ["kongid", "mesh", "a-b-c"])
def test_a_key_that_a_real_server_refused_is_no_label(key: str) -> None:
    assert not is_label(key, "v")
    assert is_label("Kong-id", "v")


@pytest.mark.parametrize("owner", ["eu-a-1", "default"])
def test_a_customer_is_managed_whichever_form_its_owner_was_written_in(owner: str) -> None:
    as_earlier_versions = {"managed-by": "kong-openmeter", "sync-owner": owner, "source-id": "team-a-1"}
    assert is_managed(as_earlier_versions, owner)
    assert is_managed(ownership_metadata(owner, "team-a-1"), owner)
    assert all(SERVER.match(value) for value in ownership_metadata(owner, "team-a-1").values())
    assert not is_managed(as_earlier_versions, "eu-a-2")
    assert not is_managed(ownership_metadata(owner, "team-a-1"), "eu-a-2")


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
