"""A plan for people: nothing about a problem is lost, however long the plan and narrow the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from syncd.cli.plan_text import markdown, show_outcomes, show_plan
from syncd.core.changes import Change, ChangeKind, MovedUsage, Outcome, Plan, Status
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, observed, plan_for

ROOT = Path(__file__).parents[3]
WORLD = observed(
    customer("paying", "consumer:0", owner=OWNER, subscription="sub-1"),
    customer("busy", "consumer:00", owner=OWNER, subscription="sub-2"),
    customer("finance", metadata={"x": "y"}),
    customer("old", "consumer:3", "consumer:moved", name="old", owner=OWNER),
    customer("consumer:4", "consumer:4", name="before", owner=OWNER),
    subjects=(),
)
PRINCIPALS = [
    consumer("1", "[red]eve\x1b[2J"),
    consumer("2", "bob", "customer:finance"),
    consumer("3", "carol", "customer:old"),
    consumer("moved", "dave", "customer:new"),
    consumer("4", "after"),
    consumer("5", "erin", "customer:paying"),
    consumer("6", "frank", "customer:paying"),
    consumer("7", "grace", "customer:busy"),
    consumer("8", "alice", "customer:acme"),
    consumer("9", "bert", "customer:acme"),
]
PLAN = plan_for(PRINCIPALS, WORLD, rules=BY_TAG)


def printed(show: Callable[[Console], None], *, terminal: bool = False, width: int = 200) -> str:
    text = io.StringIO()
    show(Console(file=text, force_terminal=terminal, width=width, color_system=None))
    return text.getvalue()


def shown(plan: Plan = PLAN, *, terminal: bool = False, width: int = 200) -> str:
    return printed(lambda console: show_plan(console, plan), terminal=terminal, width=width)


def test_a_plan_is_a_list_as_terraform_prints_it() -> None:
    lines = shown().splitlines()
    assert "  + customer acme (alice, bert)" in lines
    assert "  ~ customer consumer:4: rename 'before' to 'after'; write the subject entities of after" in lines
    assert "  ! customer finance (bob)" in lines
    assert lines[-1] == "Plan: 2 to create, 2 to change, 4 blocked, 2 left alone."


def test_subject_entities_of_new_subjects_are_part_of_their_customer() -> None:
    assert sum(change.kind is ChangeKind.UPSERT_SUBJECT for change in PLAN.changes) > 3
    assert "upsert" not in shown()
    assert shown().count("write the subject entities") == 2, "of customers that have their subjects already"


def test_blocked_changes_come_first_by_cause_with_one_cure_for_each() -> None:
    text = shown()
    cure = "> Attach the subject by hand between two subscriptions"
    assert text.count(cure) == 1
    assert text.index("subscription sub-1") < text.index(cure)
    assert text.index("subscription sub-2") < text.index(cure)
    assert text.index(cure) < text.index("+ customer acme")
    assert "! customer paying (erin, frank)" in text


def test_what_a_person_has_to_resolve_comes_before_what_people_have_decided() -> None:
    text = shown()
    assert text.index("Another customer has the subject") < text.index("Blocked by decision")


def test_removals_come_before_changes_and_say_what_becomes_of_the_usage() -> None:
    marked = Change(
        ChangeKind.MARK_ORPHANED,
        "acme",
        ("consumer:1",),
        "gone",
        usage=MovedUsage(1234, "2026-01-02T00:00:00Z"),
    )
    entity = replace(marked, kind=ChangeKind.DELETE_SUBJECT)
    text = shown(Plan(OWNER, "sync", (*PLAN.changes, marked, entity)))
    assert "1,234 events since 2026-01-02, unbilled afterwards unless already invoiced" in text
    assert "      1,234 events since 2026-01-02\n" in text
    assert text.index("Removals and moves:") < text.index("\nChanges:") < text.index("\nNew:")


def test_the_events_of_all_blocked_subjects_of_a_customer_are_added_up() -> None:
    since = "2026-01-02T00:00:00Z"
    changes = tuple(
        replace(change, usage=MovedUsage(5, since)) if change.kind is ChangeKind.BLOCKED else change
        for change in PLAN.changes
    )
    # Two changes: a customer's missing subjects are one change with one figure.
    taken = replace(
        next(c for c in changes if c.customer_key == "finance"), subject_keys=("consumer:x",), names=()
    )
    text = shown(Plan(OWNER, "sync", (*changes, taken)))
    assert (
        "! customer finance (bob, consumer:x)\n      10 events since 2026-01-02, unbilled until then" in text
    )


@pytest.mark.parametrize("width", [80, 200])
def test_no_line_on_a_terminal_is_longer_than_it_is_wide(width: int) -> None:
    lines = shown(terminal=True, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert "  + customer acme (alice, bert)" in lines


def test_elsewhere_no_line_is_cut_or_wrapped() -> None:
    assert shown(width=20) == shown(width=200)


def test_a_name_from_outside_can_neither_style_nor_control_the_terminal() -> None:
    text = shown(terminal=True)
    assert "[red]eve" in text
    assert "\x1b[2J" not in text


def test_a_reason_that_many_customers_share_is_said_once() -> None:
    theirs = [customer(f"theirs-{n}", f"consumer:{n}", metadata={"x": "y"}) for n in range(277)]
    nameless = customer(None, "consumer:nameless", identity="01K8", metadata={"managed-by": "their-tool"})
    people = [*(consumer(str(n), f"c{n}") for n in range(277)), consumer("nameless", "kim")]
    plan = plan_for(people, observed(*theirs, nameless))
    lines = shown(plan).splitlines()
    assert lines[0].startswith("Left alone: already attributed to a customer that belongs to someone else")
    assert lines[1] == "  = customer theirs-0 (c0)"
    assert lines[-4:-2] == [
        "  = customer 01K8 (kim)",
        "      already attributed to a customer that belongs to 'their-tool'",
    ]
    assert len(lines) < 277 + 10


def test_a_customer_without_subjects_is_marked_by_its_own_name() -> None:
    marked = Change(ChangeKind.MARK_ORPHANED, "acme", (), "gone")
    assert "  ~ customer acme: mark it as orphaned\n" in shown(Plan(OWNER, "sync", (marked,)))


def test_an_empty_plan_says_so() -> None:
    assert shown(plan_for([], observed())) == "Plan: nothing to do, nothing to report.\n"


def test_a_long_plan_on_a_terminal_cuts_new_customers_but_no_problem() -> None:
    def of(kind: ChangeKind, number: int) -> tuple[Change, ...]:
        return tuple(Change(kind, f"{kind}-{index}", ("x",), f"why {index}") for index in range(number))

    changes = (
        *of(ChangeKind.CREATE_CUSTOMER, 400),
        *of(ChangeKind.BLOCKED, 250),
        *of(ChangeKind.MARK_ORPHANED, 250),
    )
    plan = Plan(OWNER, "sync", changes)
    text = shown(plan, terminal=True)
    for number in range(250):
        assert f"customer blocked-{number} (x)" in text
        assert f"customer mark-orphaned-{number}: mark" in text
    assert text.count("+ customer create-customer-") == 100
    assert "... and 300 more; --output json shows all" in text
    assert shown(plan).count("+ customer create-customer-") == 400, "in a pipe"
    assert markdown(plan).count("customer blocked-") == 250


def test_a_new_customer_with_thousands_of_subjects_is_one_short_line_on_a_terminal() -> None:
    many = [consumer(str(number), f"c{number}", "customer:big") for number in range(3000)]
    text = shown(plan_for(many, observed(), rules=BY_TAG), terminal=True)
    assert "and 2,980 more)" in text
    assert len(text) < 1000


def test_markdown_shows_names_of_others_as_text() -> None:
    plan = plan_for([consumer("1", "<b>@org/team [x](http://evil) `a`|\n# b")], observed())
    text = markdown(plan)
    assert "&lt;b&gt;@<!-- -->org" in text
    assert "<b>" not in text
    assert "[x](" not in text
    assert "http://" not in text
    assert "\n# b" not in text


def test_markdown_folds_what_is_new_and_shows_what_is_blocked() -> None:
    text = markdown(PLAN)
    assert text.startswith("### syncd plan\n\n2 to create, 2 to change, 4 blocked, 2 left alone.\n")
    assert "<details><summary>New (2)</summary>" in text
    assert text.index("#### Blocked") < text.index("<details>")


def test_outcomes_show_blocked_and_skipped_changes_and_are_never_cut() -> None:
    new = PLAN.of(ChangeKind.CREATE_CUSTOMER)[0]
    outcomes = (
        *(Outcome(replace(new, customer_key=f"acme-{n}"), Status.BLOCKED, "in conflict") for n in range(250)),
        Outcome(new, Status.DONE),
        Outcome(PLAN.of(ChangeKind.BLOCKED)[0], Status.BLOCKED, "was in the plan already"),
    )
    text = printed(lambda console: show_outcomes(console, outcomes), terminal=True)
    assert text.count("blocked: in conflict") == 250
    assert "was in the plan" not in text
    assert text.endswith("Applied: 1 done, 251 blocked.\n")


def test_the_page_shows_what_is_printed() -> None:
    world = observed(customer("umbrella", owner=OWNER, subscription="01JD8QXJ"))
    people = [
        *(consumer(name, name, "customer:umbrella") for name in ("erin", "frank")),
        *(consumer(name, name, "customer:acme") for name in ("alice", "bob")),
    ]
    plan = plan_for(people, world, rules=BY_TAG)
    usage = MovedUsage(4644, "2026-10-29T00:00:00Z")
    changes = (replace(c, usage=usage) if c.kind is ChangeKind.BLOCKED else c for c in plan.changes)
    text = shown(Plan(OWNER, "upsert-only", tuple(changes)))
    assert f"```text\n{text}```" in (ROOT / "docs" / "syncd.md").read_text()
