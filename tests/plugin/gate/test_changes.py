"""Numbered changes: complete from any number on, in slices, also after some were forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.gate import accounts
from openmeter_plugin.gate.accounts import Changes


@given(st.lists(st.integers(0, 9), max_size=80), st.integers(0, 80), st.integers(1, 7))
def test_slices_from_any_number_on_name_all_that_changed_since_once_and_in_order(
    names: list[int], since: int, limit: int
) -> None:
    made: Changes[int] = Changes()
    for name in names:
        made.note(name)
    newest = {name: number for number, name in enumerate(names, start=1)}
    expected = sorted((number, name) for name, number in newest.items() if number > since)
    found: list[tuple[int, int]] = []
    while part := made.since(found[-1][0] if found else since, limit):
        assert len(part) <= limit
        found += part
    assert found == expected


def test_many_changes_of_few_names_take_the_room_of_few() -> None:
    made: Changes[str] = Changes()
    for number in range(20_000):
        made.note(f"s{number % 3}")
    assert [name for _, name in made.since(0)] == ["s2", "s0", "s1"]
    assert len(made._log) <= accounts._MAX_OUTDATED + 10


def test_only_what_is_not_live_is_forgotten_and_who_may_have_missed_it_can_tell() -> None:
    made: Changes[str] = Changes()
    for name in ("gone-1", "live", "gone-2", "gone-3"):
        made.note(name)
    made.forget_oldest(2, lambda name: name == "live")
    assert made.since(0) == [(2, "live"), (4, "gone-3")]
    assert made.forgotten_up_to == 3
