"""Plans as diffs."""

from __future__ import annotations

import pytest

from syncd.core.changes import Change, ChangeKind, EntityState, MovedUsage, Outcome, Status
from syncd.core.model import CustomerDetails
from syncd.dashboard.diffs import MAX_LINES, ChangeView, Results, as_read, change_views, kinds, tone
from tests.syncd.builders import consumer, customer, observed, plan_for

NOTHING = Results(())


def view(change: Change, results: Results = NOTHING) -> ChangeView:
    (found,) = change_views([change], results)
    return found


def lines(change: Change) -> list[str]:
    return [f"{line.sign}{line.field} {line.text}" for line in view(change).lines]


def test_a_creation_adds_all_fields_of_the_customer() -> None:
    details = CustomerDetails(email="a@b.example", billing_address={"country": "DE"})
    after = EntityState("Acme", ("s1", "s2"), {"managed-by": "kong-openmeter"}, details)
    assert lines(Change(ChangeKind.CREATE_CUSTOMER, "acme", ("s1", "s2"), "new", after=after)) == [
        "+name Acme",
        "+subject s1",
        "+subject s2",
        "+email a@b.example",
        "+billing_address.country DE",
        "+metadata managed-by = kong-openmeter",
    ]


def test_an_attachment_shows_unchanged_and_added_subjects() -> None:
    before, after = EntityState(subject_keys=("s1",)), EntityState(subject_keys=("s1", "s2"))
    change = Change(ChangeKind.ATTACH_SUBJECTS, "acme", ("s2",), "new", "1", before, after)
    assert lines(change) == [" subject s1", "+subject s2"]


def test_of_many_unchanged_subjects_some_are_shown_and_the_rest_counted() -> None:
    keys = tuple(f"s{number}" for number in range(1200))
    change = Change(
        ChangeKind.ATTACH_SUBJECTS,
        "acme",
        ("new",),
        "new",
        "1",
        EntityState(subject_keys=keys),
        EntityState(subject_keys=(*keys, "new")),
    )
    assert lines(change) == [
        *(f" subject s{number}" for number in range(5)),
        " subject ... and 1,195 more unchanged",
        "+subject new",
    ]


def test_a_move_removes_subjects_and_counts_their_events() -> None:
    change = Change(
        ChangeKind.MOVE_SUBJECTS,
        "old",
        ("s1",),
        "moved",
        "1",
        EntityState(subject_keys=("s1", "s2")),
        EntityState(subject_keys=("s2",)),
        "new",
        MovedUsage(1234, "2026-10-22T00:00:00Z"),
    )
    assert lines(change) == [" subject s2", "-subject s1"]
    assert view(change).usage == "1,234 events since 2026-10-22 move as well"


def test_a_detachment_counts_the_events_that_become_unbilled() -> None:
    before, after = EntityState(subject_keys=("s1", "s2")), EntityState(subject_keys=("s2",))
    usage = MovedUsage(7, "2026-10-22T00:00:00Z")
    change = Change(ChangeKind.DETACH_SUBJECTS, "a", ("s1",), "gone", "1", before, after, usage=usage)
    assert view(change).usage == "7 events since 2026-10-22 become unbilled"


def test_a_rename_replaces_the_old_name() -> None:
    change = Change(
        ChangeKind.RENAME_CUSTOMER, "a", (), "renamed", "1", EntityState("Old"), EntityState("New")
    )
    assert lines(change) == ["-name Old", "+name New"]


def test_metadata_are_merged_so_only_written_entries_change() -> None:
    before = EntityState(metadata={"theirs": "x", "mark": "1", "same": "s"})
    after = EntityState(metadata={"mark": "2", "same": "s", "fresh": "f"})
    change = Change(ChangeKind.ADOPT_CUSTOMER, "a", (), "adopted", "1", before, after)
    assert lines(change) == [
        " metadata theirs = x",
        "-metadata mark = 1",
        "+metadata mark = 2",
        " metadata same = s",
        "+metadata fresh = f",
    ]


def test_a_deletion_removes_everything() -> None:
    before = EntityState("Acme", ("s1",), {"mark": "1"})
    change = Change(ChangeKind.DELETE_CUSTOMER, "acme", ("s1",), "gone", "1", before)
    assert lines(change) == ["-name Acme", "-subject s1", "-metadata mark = 1"]


def test_a_report_names_its_subjects() -> None:
    assert lines(Change(ChangeKind.UNMANAGED, "a", ("s1",), "theirs")) == [" subject s1"]


def test_a_change_of_very_many_lines_is_cut_and_counted() -> None:
    keys = tuple(f"s{number}" for number in range(500))
    change = Change(ChangeKind.CREATE_CUSTOMER, "a", keys, "new", after=EntityState("A", keys))
    assert (len(view(change).lines), view(change).more_lines) == (MAX_LINES, 501 - MAX_LINES)


@pytest.mark.parametrize(
    ("kind", "tones"),
    [
        (ChangeKind.CREATE_CUSTOMER, "add"),
        (ChangeKind.RENAME_CUSTOMER, "change"),
        (ChangeKind.DETACH_SUBJECTS, "remove"),
        (ChangeKind.BLOCKED, "blocked"),
        (ChangeKind.ORPHANED, "report"),
    ],
)
def test_each_kind_has_a_tone(kind: ChangeKind, tones: str) -> None:
    assert tone(kind) == tones


def test_a_blocked_change_says_what_stays_unbilled_and_which_option_allows_it() -> None:
    reason = "it is left there: allow it with --allow-move, or move it by hand"
    usage = MovedUsage(7, "2026-10-22T00:00:00Z")
    found = view(Change(ChangeKind.BLOCKED, "acme", ("s1",), reason, "1", usage=usage))
    assert found.usage == "7 events since 2026-10-22 remain unbilled until then"
    assert (
        found.advice
        == "To allow it, preview again with “Move subjects between managed customers” under Options."
    )


def test_the_result_of_a_change_is_found() -> None:
    first = Change(ChangeKind.CREATE_CUSTOMER, "a", ("s1",), "new", after=EntityState("A", ("s1",)))
    second = Change(ChangeKind.CREATE_CUSTOMER, "b", ("s2",), "new", after=EntityState("B", ("s2",)))
    outcomes = [Outcome(second, Status.BLOCKED, "refused"), Outcome(first, Status.DONE)]
    for results in (
        Results.of_outcomes(outcomes),
        Results.of_history([{"at": "", **outcome.to_json()} for outcome in outcomes]),
    ):
        assert [(v.status, v.detail) for v in change_views([first, second], results)] == [
            ("done", ""),
            ("blocked", "refused"),
        ]


def test_a_change_that_was_tried_with_fewer_subjects_is_found_by_its_customer() -> None:
    planned = Change(ChangeKind.ATTACH_SUBJECTS, "a", ("s1", "s2"), "new", "1")
    tried = Change(ChangeKind.ATTACH_SUBJECTS, "a", ("s2",), "new", "1")
    assert view(planned, Results.of_outcomes([Outcome(tried, Status.DONE)])).status == "done"


def test_the_entities_of_one_customer_are_not_confused() -> None:
    first = Change(ChangeKind.UPSERT_SUBJECT, "a", ("s1",), "new", "1", None, EntityState("x"))
    second = Change(ChangeKind.UPSERT_SUBJECT, "a", ("s2",), "new", "1", None, EntityState("x"))
    assert view(second, Results.of_outcomes([Outcome(first, Status.DONE)])).status is None


def test_the_kinds_that_occur_in_a_plan_are_counted() -> None:
    plan = plan_for([consumer("1", "alice"), consumer("2", "bob")], observed(customer("x", owner="default")))
    assert [(str(kind), count) for kind, count, _ in kinds(plan)] == [("create-customer", 2), ("orphaned", 1)]


def test_what_needs_attention_comes_first() -> None:
    changes = [
        Change(ChangeKind.CREATE_CUSTOMER, "new", (), "new"),
        Change(ChangeKind.DETACH_SUBJECTS, "gone", ("s1",), "orphaned", "1"),
        Change(ChangeKind.CREATE_CUSTOMER, "newer", (), "new"),
        Change(ChangeKind.BLOCKED, "paying", ("s2",), "active subscription", "2", settled=True),
        Change(ChangeKind.BLOCKED, "taken", ("s3",), "another customer has it"),
    ]
    assert [change.customer_key for change in as_read(changes)] == ["taken", "paying", "gone", "new", "newer"]
