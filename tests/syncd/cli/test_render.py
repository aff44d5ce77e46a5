"""What the command line prints for people."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from syncd.cli.render import show_outcomes, show_plan, show_usage
from syncd.core.changes import Change, ChangeKind, MovedUsage, Outcome, Plan, Status
from syncd.metering.usage import attribute
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, observed, plan_for

WORLD = observed(
    customer("acme", metadata={"x": "y"}), customer("consumer:3", "consumer:3", name="old", owner=OWNER)
)
PRINCIPALS = [consumer("1", "[red]eve\x1b[2J"), consumer("2", "bob", "customer:acme"), consumer("3", "new")]
PLAN = plan_for(PRINCIPALS, WORLD, rules=BY_TAG)


def shown(*, terminal: bool, width: int = 200) -> str:
    text = io.StringIO()
    show_plan(Console(file=text, force_terminal=terminal, width=width, color_system=None), PLAN)
    return text.getvalue()


def test_without_a_terminal_each_change_is_one_line_however_narrow() -> None:
    lines = shown(terminal=False, width=20).splitlines()
    assert (
        lines[0] == "create-customer  consumer:1  '[red]eve [2J' with consumer:1  new: consumer [red]eve?[2J"
    )
    assert lines[1] == "rename-customer  consumer:3  'old' -> 'new'  the name changed at the source"
    assert lines[2].startswith("blocked  acme  consumer:2  customer 'acme' (acme) belongs to someone else")
    assert lines[3] == "Plan: 1 create-customer, 1 rename-customer, 1 blocked."


def test_a_terminal_gets_a_table() -> None:
    text = shown(terminal=True)
    assert "┃ change" in text
    assert "create-customer" in text


def test_a_name_from_outside_can_neither_style_nor_control_the_terminal() -> None:
    text = shown(terminal=True)
    assert "[red]eve" in text
    assert "\x1b[2J" not in text


def test_usage_that_loses_its_customer_is_shown_as_unbilled_not_moved() -> None:
    marked = Change(
        ChangeKind.MARK_ORPHANED,
        "acme",
        ("consumer:1",),
        "gone",
        usage=MovedUsage(1234, "2026-01-02T00:00:00Z"),
    )
    entity = replace(marked, kind=ChangeKind.DELETE_SUBJECT)
    text = io.StringIO()
    show_plan(Console(file=text, width=200), Plan(OWNER, "sync", (marked, entity)))
    first, second = text.getvalue().splitlines()[:2]
    assert first.endswith("gone (1,234 events since 2026-01-02, unbilled afterwards unless already invoiced)")
    assert second.endswith("gone (1,234 events since 2026-01-02)")


def test_an_empty_plan_says_so() -> None:
    text = io.StringIO()
    show_plan(Console(file=text), plan_for([], observed()))
    assert text.getvalue() == "Plan: nothing to do, nothing to report.\n"


def test_outcomes_show_blocked_and_skipped_changes() -> None:
    text = io.StringIO()
    outcomes = (
        Outcome(PLAN.changes[0], Status.BLOCKED, "in conflict"),
        Outcome(PLAN.changes[1], Status.DONE),
        Outcome(PLAN.changes[2], Status.BLOCKED, "was in the plan already"),
    )
    show_outcomes(Console(file=text, width=200), outcomes)
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("blocked  consumer:1")
    assert lines[0].endswith("in conflict")
    assert lines[1] == "Applied: 1 done, 2 blocked."


def test_usage_is_one_line_per_subject_with_thousands_separators() -> None:
    text = io.StringIO()
    show_usage(
        Console(file=text, width=200), attribute((customer("acme", "a", "b"),), {"a": 1234567, "x": 0.5}, {})
    )
    assert text.getvalue().splitlines() == [
        "acme (acme)  a  1,234,567  0",
        "b  0  0",
        "unbilled  x  0.5  0",
        "Unbilled subjects: 1.",
    ]


def keys_on_a_terminal(show: Callable[[Console], None]) -> list[str]:
    """The first two cells of each row of a table, and the lines below it."""
    text = io.StringIO()
    show(Console(file=text, force_terminal=True, width=200, color_system=None))
    rows = [line.split("│") for line in text.getvalue().splitlines()]
    return [f"{row[1].strip()} {row[2].strip()}" if len(row) > 2 else row[0] for row in rows]


def test_a_long_plan_on_a_terminal_shows_every_problem_first_and_cuts_creations() -> None:
    def of(kind: ChangeKind, number: int) -> tuple[Change, ...]:
        return tuple(Change(kind, f"{kind}-{index}", ("x",), "why") for index in range(number))

    created, blocked = of(ChangeKind.CREATE_CUSTOMER, 400), of(ChangeKind.BLOCKED, 250)
    plan = Plan(OWNER, "sync", (*created, *of(ChangeKind.MOVE_SUBJECTS, 1), *blocked))
    seen = keys_on_a_terminal(lambda console: show_plan(console, plan))
    assert [key for key in seen if key.startswith("blocked")] == [f"blocked blocked-{n}" for n in range(250)]
    assert not [key for key in seen if key.startswith("create-customer")]
    assert "... and 401 more; --json shows all" in seen

    plan = Plan(OWNER, "sync", (*created, *of(ChangeKind.MOVE_SUBJECTS, 1), *blocked[:2]))
    seen = keys_on_a_terminal(lambda console: show_plan(console, plan))
    rows = [key for key in seen if "-" in key and "..." not in key and "Plan" not in key]
    assert rows[:4] == [
        "blocked blocked-0",
        "blocked blocked-1",
        "move-subjects move-subjects-0",
        "create-customer create-customer-0",
    ]
    assert len(rows) == 200
    assert "... and 203 more; --json shows all" in seen


def test_usage_without_a_customer_comes_first_on_a_terminal_and_is_never_cut() -> None:
    subjects = {f"unknown-{index:03}": 1.0 for index in range(220)} | {"a": 5.0}
    usage = attribute((customer("acme", "a", "b"),), subjects, {})
    seen = keys_on_a_terminal(lambda console: show_usage(console, usage))
    assert [key for key in seen if key.startswith("unbilled")] == [
        f"unbilled unknown-{index:03}" for index in range(220)
    ]
    assert "... and 2 more; --json shows all" in seen


def test_changes_that_were_blocked_while_applying_are_never_cut() -> None:
    blocked = tuple(replace(PLAN.changes[0], customer_key=f"acme-{number}") for number in range(250))
    outcomes = tuple(Outcome(change, Status.BLOCKED, "in conflict") for change in blocked)
    seen = keys_on_a_terminal(lambda console: show_outcomes(console, outcomes))
    assert len([key for key in seen if key.startswith("blocked acme-")]) == 250
