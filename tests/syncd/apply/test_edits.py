"""Edits: what a change writes to a customer as it is now, and what stops it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from syncd.apply import edits
from syncd.core.changes import Change, ChangeKind, EntityState
from syncd.core.errors import BlockedError
from syncd.core.model import ObservedCustomer
from syncd.core.ownership import ownership_metadata
from syncd.metering.base import CustomerEdit, Decide
from tests.syncd.builders import OWNER, customer, replace

SINCE = {"orphaned-at": "20260101T000000Z"}
MANAGED = customer("acme", "consumer:1", "consumer:2", owner=OWNER)
MARKED = replace(MANAGED, metadata={**MANAGED.metadata, **SINCE})
OTHER_OWNER = replace(MANAGED, metadata=ownership_metadata("someone", "acme"))
SUBSCRIBED = replace(MANAGED, active_subscription="SUB")
ORPHANED = ("consumer:2",)

MARK = Change(
    ChangeKind.MARK_ORPHANED,
    "acme",
    (),
    "",
    MANAGED.id,
    EntityState(metadata={}),
    EntityState(metadata=SINCE),
)
UNMARK = replace(
    MARK,
    kind=ChangeKind.UNMARK_ORPHANED,
    before=EntityState(metadata=SINCE),
    after=EntityState(metadata={"orphaned-at": "none"}),
)
MOVE = Change(
    ChangeKind.MOVE_SUBJECTS,
    "acme",
    ORPHANED,
    "",
    MANAGED.id,
    EntityState(subject_keys=MANAGED.subject_keys),
    EntityState(subject_keys=("consumer:1",)),
    "globex",
)
DETACH = replace(
    MOVE,
    kind=ChangeKind.DETACH_SUBJECTS,
    to_customer_key=None,
    before=EntityState(None, MANAGED.subject_keys, SINCE),
    after=EntityState(None, ("consumer:1",), {}),
)
DELETE = replace(
    DETACH,
    kind=ChangeKind.DELETE_CUSTOMER,
    subject_keys=MANAGED.subject_keys,
    before=EntityState("acme", MANAGED.subject_keys, SINCE),
    after=None,
)
RENAME = replace(MARK, kind=ChangeKind.RENAME_CUSTOMER, after=EntityState(name="ACME"))
ADOPT = replace(
    MARK, kind=ChangeKind.ADOPT_CUSTOMER, after=EntityState(metadata=ownership_metadata(OWNER, "acme"))
)

EVERY: dict[str, Callable[[str], Decide]] = {
    "mark": lambda owner: edits.marking(MARK, owner),
    "unmark": lambda owner: edits.marking(UNMARK, owner),
    "move": lambda owner: edits.detaching(MOVE, owner),
    "detach": lambda owner: edits.detaching(DETACH, owner),
    "delete": lambda owner: edits.deleting(DELETE, owner),
    "attach": lambda owner: edits.adding(("consumer:3",), owner),
    "rename": lambda owner: edits.renaming(RENAME, owner),
}


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_written_to_a_customer_that_got_another_owner(name: str) -> None:
    for there in (
        OTHER_OWNER,
        replace(MANAGED, metadata={}),
        replace(OTHER_OWNER, metadata={**OTHER_OWNER.metadata, **SINCE}),
    ):
        with pytest.raises(BlockedError, match="now belongs to"):
            EVERY[name](OWNER)(there)


@pytest.mark.parametrize("name", ["move", "detach", "delete", "attach"])
def test_a_customer_with_a_new_subscription_keeps_its_subjects(name: str) -> None:
    for there in (SUBSCRIBED, replace(MARKED, active_subscription="SUB")):
        with pytest.raises(BlockedError, match=r"active subscription \(SUB\)"):
            EVERY[name](OWNER)(there)


@pytest.mark.parametrize("name", ["detach", "delete", "unmark"])
def test_a_removed_or_renewed_mark_blocks_the_change(name: str) -> None:
    """Another syncd has seen the principal come back, or disappear again."""
    for mark in ({}, {"orphaned-at": "none!"}, {"orphaned-at": "20260301T000000Z"}):
        there = replace(MANAGED, metadata={**MANAGED.metadata, **mark})
        with pytest.raises(BlockedError, match="marks have changed"):
            EVERY[name](OWNER)(there)


def test_an_existing_mark_is_never_replaced() -> None:
    assert edits.marking(MARK, OWNER)(MANAGED) == CustomerEdit(metadata=SINCE)
    assert edits.marking(MARK, OWNER)(MARKED) is None
    earlier = replace(MANAGED, metadata={**MANAGED.metadata, "orphaned-at": "20250101T000000Z"})
    with pytest.raises(BlockedError, match="marks have changed"):
        edits.marking(MARK, OWNER)(earlier)


def test_adoption_never_takes_a_customer_of_another_owner() -> None:
    by_hand = replace(MANAGED, metadata={"crm": "7"})
    assert edits.adopting(ADOPT)(by_hand) == CustomerEdit(metadata=ownership_metadata(OWNER, "acme"))
    assert edits.adopting(ADOPT)(MANAGED) is None
    for metadata in (
        ownership_metadata("someone", "acme"),
        {"managed-by": "terraform"},
        {"sync-owner": "someone"},
    ):
        with pytest.raises(BlockedError, match="now belongs to"):
            edits.adopting(ADOPT)(replace(MANAGED, metadata=metadata))


def test_a_customer_that_got_further_subjects_is_not_deleted() -> None:
    assert edits.deleting(DELETE, OWNER)(MARKED) is None
    assert edits.deleting(DELETE, OWNER)(replace(MARKED, subject_keys=("consumer:1",))) is None
    more = replace(MARKED, subject_keys=(*MARKED.subject_keys, "by-hand"))
    with pytest.raises(BlockedError, match="further subjects"):
        edits.deleting(DELETE, OWNER)(more)


@pytest.mark.parametrize("change", [MOVE, DETACH])
def test_only_the_named_subjects_come_off_and_the_others_keep_their_order(change: Change) -> None:
    there = replace(MARKED, subject_keys=("z", "consumer:2", "a"))
    edit = edits.detaching(change, OWNER)(there)
    assert edit is not None
    assert edit.subject_keys == ("z", "a")
    assert edit.metadata is None


def test_already_detached_subjects_need_no_write_except_for_their_mark() -> None:
    slot = {"orphaned-at-1": "20260101T000000Z-0123456789abcdef"}
    change = replace(
        DETACH, before=EntityState(metadata=slot), after=EntityState(metadata={"orphaned-at-1": "none"})
    )
    off = replace(MANAGED, subject_keys=("consumer:1",), metadata={**MANAGED.metadata, **slot})
    assert edits.detaching(change, OWNER)(off) == CustomerEdit(
        subject_keys=("consumer:1",), metadata={"orphaned-at-1": "none"}
    )
    freed = replace(off, metadata={**off.metadata, "orphaned-at-1": "none"})
    assert edits.detaching(change, OWNER)(freed) is None


def test_subjects_are_appended_and_only_those_that_are_missing() -> None:
    adding = edits.adding(("consumer:1", "consumer:3", "acme"), OWNER)
    there = replace(MANAGED, subject_keys=("z", "consumer:1"))
    assert adding(there) == CustomerEdit(subject_keys=("z", "consumer:1", "consumer:3"))
    assert edits.adding(("consumer:2",), OWNER)(SUBSCRIBED) is None


def test_a_name_is_written_only_where_it_differs() -> None:
    assert edits.renaming(RENAME, OWNER)(MANAGED) == CustomerEdit(name="ACME")
    assert edits.renaming(RENAME, OWNER)(replace(MANAGED, name="ACME")) is None


@pytest.mark.parametrize(
    ("there", "said"), [(OTHER_OWNER, "now belongs to"), (SUBSCRIBED, "active subscription")]
)
def test_a_customer_that_cannot_get_a_subject_is_blocked(there: ObservedCustomer, said: str) -> None:
    edits.require_accepts_subjects(MANAGED, OWNER)
    with pytest.raises(BlockedError, match=said):
        edits.require_accepts_subjects(there, OWNER)
