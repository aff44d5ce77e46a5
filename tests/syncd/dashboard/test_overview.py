"""The three answers of the overview."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from syncd.core.unbilled import Fate
from syncd.dashboard.health import GatewayState
from syncd.dashboard.overview import billed, down, in_sync, works
from syncd.dashboard.queries import Answer, Health
from syncd.dashboard.unbilled_view import UnbilledRow, UnbilledView
from syncd.dashboard.views import Drift
from syncd.gateways.models import Readiness, Spool
from syncd.runs.options import RunOptions
from syncd.runs.run import RunState, new_run
from tests.syncd.dashboard.gateways import FakeGateway, dead_letter

NOW = datetime(2026, 11, 29, 8, tzinfo=UTC)
METERING = Health("metering API", "openmeter-v1", "", "ok", "2 customers", Answer("2 customers"))
SOURCE = Health("source", "kong", "", "ok", "3 consumers", Answer("3 consumers"))


def unbilled(**events: int) -> UnbilledView:
    """Usage of one subject for each status."""
    statuses: dict[str, Fate] = {"blocked": "blocked", "unknown": "unknown", "planned": "planned"}
    statuses["settled"] = "settled"
    rows = [UnbilledRow(name, count, 0, statuses[name], "", "") for name, count in events.items()]
    return UnbilledView("r1", NOW, None, NOW - timedelta(days=31), tuple(rows))


def gateway(fake: FakeGateway) -> Health:
    state = GatewayState(Readiness(ready=fake.ready), Spool.model_validate(fake.spool()))
    return Health("gateway", "eu", "", state.level, state.summary, Answer(state))


UNREADABLE = Health("gateway", "us", "", "problem", "cannot be read: refused", Answer(None, "refused"))


def test_everybody_is_billed_if_all_usage_has_a_customer_and_no_gateway_keeps_anything_back() -> None:
    verdict = billed(unbilled(), [METERING, gateway(FakeGateway(backlog=3))])
    assert (verdict.level, verdict.answer, verdict.facts) == ("ok", "Yes", ())
    assert verdict.yes == "All usage since 2026-10-29 has a customer."


@pytest.mark.parametrize(
    ("view", "items", "level", "answer", "said"),
    [
        (unbilled(blocked=5, unknown=2), [], "warning", "No", "7 events of 2 subjects without a customer"),
        (unbilled(planned=5), [], "busy", "Yes", "5 events of 1 subject: the next run gives them a customer"),
        (unbilled(settled=1), [], "ok", "Yes", "1 event of 1 subject: unbilled by decision"),
        (unbilled(), [gateway(FakeGateway(dead=[dead_letter(1)]))], "warning", "No", "1 dead letter on eu"),
        (unbilled(), [gateway(FakeGateway(quarantined=2))], "warning", "No", "2 quarantined requests on eu"),
        (
            unbilled(),
            [gateway(FakeGateway(lost={"disk": 1}))],
            "warning",
            "No",
            "1 lost request on eu",
        ),
        (unbilled(), [UNREADABLE], "warning", "No", "what us keeps back is unknown"),
        (None, [], "none", "Unknown", "No plan since the daemon started, or the meters could not be read."),
        (None, [gateway(FakeGateway(quarantined=1))], "warning", "No", "1 quarantined request on eu"),
    ],
)
def test_what_is_not_billed_is_said(
    view: UnbilledView | None, items: list[Health], level: str, answer: str, said: str
) -> None:
    verdict = billed(view, items)
    assert (verdict.level, verdict.answer) == (level, answer)
    assert said in [fact.text for fact in verdict.facts]


def test_what_is_not_in_sync_is_said() -> None:
    drift = Drift("r1", NOW - timedelta(minutes=5), 0, 0, applying=False)
    run = new_run("schedule", RunOptions())
    succeeded = replace(run, state=RunState.SUCCEEDED)
    failed = replace(run, state=RunState.FAILED, error="no")
    assert in_sync(drift, succeeded, NOW).yes.endswith("says the plan of 5 min ago.")
    found = {
        "ok": in_sync(drift, succeeded, NOW),
        "drift": in_sync(replace(drift, to_do=3, blocked=1), succeeded, NOW),
        "applying": in_sync(replace(drift, to_do=3, applying=True), succeeded, NOW),
        "failed": in_sync(drift, failed, NOW),
        "unknown": in_sync(None, None, NOW),
    }
    assert {name: (one.level, one.answer) for name, one in found.items()} == {
        "ok": ("ok", "Yes"),
        "drift": ("warning", "No"),
        "applying": ("busy", "Yes"),
        "failed": ("problem", "No"),
        "unknown": ("none", "Unknown"),
    }
    assert [fact.text for fact in found["drift"].facts] == [
        "3 changes to make, says the plan of 5 min ago",
        "1 change blocked",
    ]


def test_a_part_that_is_down_is_a_problem_and_named() -> None:
    lagging = gateway(FakeGateway(oldest_seconds=4000))
    verdict = works([SOURCE, METERING, lagging, UNREADABLE])
    assert (verdict.level, verdict.answer) == ("problem", "No")
    assert [fact.text for fact in verdict.facts] == [
        "gateway us: cannot be read: refused",
        "gateway eu: events have been waiting for 1 h 6 min",
    ]
    assert down([SOURCE, replace(METERING, level="problem"), UNREADABLE]) == "metering API, gateway us"
    assert works([SOURCE, lagging]).level == "warning"
    fine = works([SOURCE, METERING, gateway(FakeGateway(dead=[dead_letter(1)]))])
    assert (fine.level, fine.answer, fine.yes) == ("ok", "Yes", "3 systems work.")
    assert down([SOURCE, METERING]) == ""


def test_changes_that_people_have_decided_on_are_no_drift() -> None:
    from syncd.core.changes import Change, ChangeKind, Plan
    from syncd.dashboard.views import drift

    changes = (
        Change(ChangeKind.BLOCKED, "acme", ("a",), "subscription", settled=True),
        Change(ChangeKind.BLOCKED, "acme", ("b",), "other"),
    )
    run = replace(
        new_run("schedule", RunOptions()),
        state=RunState.BLOCKED,
        plan=Plan("default", "upsert-only", changes),
    )
    found = drift(run)
    assert found
    assert (found.to_do, found.blocked) == (0, 1)
