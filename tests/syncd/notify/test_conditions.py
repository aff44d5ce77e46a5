"""What is sent, and that it is sent once."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from syncd.config.sections import NotifyConfig
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.unbilled import Fate, UnbilledSubject, UnbilledUsage
from syncd.gateways.models import Readiness, Spool
from syncd.notify import conditions
from syncd.notify.conditions import Condition, Key, Observed
from syncd.runs.options import RunOptions
from syncd.runs.run import Run, RunState, new_run
from syncd.usage.days import Days
from syncd.usage.figures import Figures
from syncd.usage.report import Estimates, MeterUsage, Report
from syncd.usage.store import KeptMeter
from tests.syncd.dashboard.gateways import FakeGateway, dead_letter

SETTINGS = NotifyConfig()
LAG = timedelta(minutes=15)
URL = "https://syncd.example.com"


def blocked(*names: str, **fields: object) -> tuple[Change, ...]:
    return tuple(
        Change(ChangeKind.BLOCKED, name, (f"subject-{name}",), "has a subscription", **fields)  # type: ignore[arg-type]
        for name in names
    )


def planned(*changes: Change, outcomes: tuple[Outcome, ...] = (), **events: int) -> Run:
    """A run whose plan has these changes, and unbilled usage of these fates."""
    fates: dict[str, Fate] = {"blocked": "blocked", "unknown": "unknown", "planned": "planned"}
    fates["settled"] = "settled"
    subjects = tuple(UnbilledSubject(name, number, 0, fates[name]) for name, number in events.items())
    unbilled = UnbilledUsage(subjects, "2026-10-29T00:00:00Z", None)
    plan = Plan("default", "upsert-only", changes, unbilled=unbilled)
    return replace(new_run("schedule", RunOptions()), state=RunState.SUCCEEDED, plan=plan, outcomes=outcomes)


def observed(last: Run | None = None, run: Run | None = None, settings: NotifyConfig = SETTINGS) -> Observed:
    found = Observed()
    conditions.of_runs(found, last, run, settings)
    return found


def texts(found: Observed, topic: str) -> list[str]:
    return [one.text for one in found.conditions if one.topic == topic]


def titles(
    found: Observed, sent: dict[Key, int] | None = None, settings: NotifyConfig = SETTINGS
) -> list[str]:
    return [message.title for message in conditions.messages(found, sent or {}, settings, "eu", None)]


def sent_of(found: Observed) -> dict[Key, int]:
    return {(one.topic, one.key): one.figure for one in found.conditions}


def test_a_failed_run_is_a_condition_until_one_succeeds() -> None:
    failed = replace(new_run("schedule", RunOptions()), state=RunState.FAILED, error="source kong: no")
    found = observed(failed)
    assert texts(found, "failed-runs") == ["source kong: no"]
    assert titles(found) == ["syncd eu: the last run failed"]
    assert titles(found, sent_of(found)) == [], "once, not after every run"
    assert conditions.over(found, sent_of(found)) == []
    assert conditions.over(observed(planned()), sent_of(found)) == [("failed-runs", "runs")]


def test_only_new_blocked_changes_are_sent() -> None:
    before = observed(None, planned(*blocked("acme", "globex")))
    after = observed(None, planned(*blocked("acme", "globex", "initech")))
    (message,) = conditions.messages(after, sent_of(before), SETTINGS, "eu", URL)
    assert message.body == f"initech (subject-initech): has a subscription\n{URL}/dashboard/"
    gone = observed(None, planned(*blocked("acme")))
    assert len(conditions.over(gone, sent_of(after))) == 2


def test_a_blocked_change_is_the_same_whatever_figures_its_reason_has() -> None:
    one = observed(None, planned(Change(ChangeKind.BLOCKED, "acme", ("a",), "132 events wait")))
    other = observed(None, planned(Change(ChangeKind.BLOCKED, "acme", ("a",), "140 events wait")))
    assert titles(other, sent_of(one)) == []


def test_what_people_have_decided_on_is_not_sent_and_what_failed_is() -> None:
    change = Change(ChangeKind.ATTACH_SUBJECTS, "umbrella", ("u",), "tagged")
    outcome = Outcome(change, Status.BLOCKED, "conflict")
    found = observed(None, planned(*blocked("acme", settled=True), change, outcomes=(outcome,)))
    assert texts(found, "blocked") == ["umbrella (u): tagged"]


def test_a_long_list_is_cut() -> None:
    found = observed(None, planned(*blocked(*(f"c{n}" for n in range(25)))))
    (message,) = conditions.messages(found, {}, SETTINGS, "eu", None)
    assert len(message.body.splitlines()) == 11
    assert message.body.endswith("and 15 more")
    assert len(message.conditions) == 25, "all are noted as sent"


def test_unbilled_usage_is_sent_over_the_threshold_and_each_time_it_has_doubled() -> None:
    settings = SETTINGS.model_copy(update={"unbilled_events": 100})
    assert titles(observed(None, planned(blocked=60, unknown=39), settings), settings=settings) == []
    assert titles(observed(None, planned(planned=500, settled=500), settings), settings=settings) == []
    first = observed(None, planned(blocked=60, unknown=40), settings)
    assert texts(first, "unbilled") == [
        "100 events of 2 subjects without a customer: 60 blocked, 40 of subjects that no source names"
    ]
    sent = sent_of(first)
    assert titles(observed(None, planned(blocked=199), settings), sent) == []
    assert titles(observed(None, planned(blocked=200), settings), sent) == ["syncd eu: usage is unbilled"]
    assert conditions.over(observed(None, planned(blocked=99), settings), sent) == [("unbilled", "unbilled")]


def gateway(fake: FakeGateway) -> Observed:
    found = Observed()
    readiness = Readiness(ready=fake.ready, problems=tuple(fake.problems))
    conditions.of_gateway(found, "eu", readiness, Spool.model_validate(fake.spool()), LAG)
    return found


@pytest.mark.parametrize(
    ("fake", "topic", "text"),
    [
        (FakeGateway(dead=[dead_letter(1)]), "dead-letters", "eu: 1 dead letter"),
        (
            FakeGateway(backlog=7, oldest_seconds=1000),
            "gateways",
            "eu: 7 events waiting, the oldest for 16 minutes",
        ),
        (FakeGateway(ready=False, problems=["the spool is full"]), "gateways", "eu: the spool is full"),
        (FakeGateway(delivery_running=False), "gateways", "eu: no delivery process is running on its spool"),
    ],
)
def test_a_gateway_that_needs_attention_is_sent(fake: FakeGateway, topic: str, text: str) -> None:
    assert texts(gateway(fake), topic) == [text]
    fine = gateway(FakeGateway(backlog=7, oldest_seconds=800))
    assert fine.conditions == []
    assert conditions.over(fine, sent_of(gateway(fake))) == [(topic, "eu")]


def test_more_dead_letters_are_sent_when_they_have_doubled_since() -> None:
    def letters(number: int) -> Observed:
        return gateway(FakeGateway(dead=[dead_letter(n) for n in range(1, number + 1)]))

    sent = sent_of(letters(10))
    assert titles(letters(19), sent) == []
    assert titles(letters(20), sent) == ["syncd eu: the metering API refused events"]
    assert [one.figure for one in conditions.fallen(letters(3), sent)] == [3]
    assert conditions.fallen(letters(11), sent) == []


def test_a_silent_gateway_is_sent_once_it_has_lasted_and_its_dead_letters_are_not_forgotten() -> None:
    brief, long = Observed(), Observed()
    conditions.of_silent_gateway(brief, "eu", "gateway eu: refused", timedelta(minutes=14), LAG)
    conditions.of_silent_gateway(long, "eu", "gateway eu: refused", timedelta(minutes=15), LAG)
    assert brief.conditions == []
    assert texts(long, "gateways") == ["gateway eu: refused"]
    sent: dict[Key, int] = {("dead-letters", "eu"): 3, ("gateways", "eu"): 1}
    assert conditions.over(brief, sent) == [], "nothing is known of it"
    assert conditions.over(long, sent) == []


def test_nothing_is_over_before_the_first_run_after_a_start() -> None:
    sent: dict[Key, int] = {("blocked", "x"): 1, ("failed-runs", "runs"): 1, ("unbilled", "unbilled"): 9}
    assert conditions.over(observed(), sent) == []


def test_only_the_topics_of_the_settings_are_sent() -> None:
    settings = SETTINGS.model_copy(update={"topics": ("unbilled",)})
    assert titles(observed(None, planned(*blocked("acme"), blocked=5)), settings=settings) == [
        "syncd eu: usage is unbilled"
    ]


def test_the_summary_counts_the_week() -> None:
    runs = [
        {"state": "succeeded", "dry_run": False, "outcomes": {"done": 2}},
        {"state": "failed", "dry_run": False, "outcomes": None},
        {"state": "succeeded", "dry_run": True, "outcomes": {}},
        {"state": "running", "dry_run": False, "outcomes": {}},
    ]
    found = observed(None, planned(*blocked("acme"), unknown=5))
    found.conditions.append(Condition("dead-letters", "eu", "eu: 4 dead letters", 4))
    message = conditions.summary(runs, found, "eu", datetime(2026, 11, 29, tzinfo=UTC), URL)
    assert message.body.splitlines() == [
        "The seven days to 2026-11-29:",
        "- 2 runs, 1 failed; 2 changes made",
        "- unbilled: 5 events of 1 subject without a customer: 0 blocked, 5 of subjects that no source names",
        "- blocked: 1 change",
        "- dead letters: eu: 4 dead letters",
        "- gateways: nothing",
        f"{URL}/dashboard/",
    ]
    assert (
        "unbilled usage is unknown" in conditions.summary([], Observed(), "eu", datetime.now(UTC), None).body
    )


def test_the_summary_compares_the_weeks_usage_with_the_week_before() -> None:
    today = date(2026, 11, 29)
    week, before = Days(date(2026, 11, 22), today), Days(date(2026, 11, 15), date(2026, 11, 22))
    kept = KeptMeter("kong_api_requests", (), date(2026, 11, 1), datetime(2026, 11, 28, 23, tzinfo=UTC))
    usage = Report(
        week,
        before,
        (
            MeterUsage("kong_api_requests", (1000, 500), (1000, 0), {}),
            MeterUsage("kong_llm_tokens", (7,), (), {}),
            MeterUsage("pages", (), (), {}),
        ),
        Figures((), (), ()),
        (),
        (),
        Estimates("EUR", Decimal(90), Decimal(100), Decimal(0), {}),
        (kept,),
        kept.refreshed_at,
    )

    def lines(report: Report) -> list[str]:
        until = datetime(2026, 11, 29, tzinfo=UTC)
        return conditions.summary([], Observed(), "eu", until, None, report).body.splitlines()[2:]

    assert lines(usage)[:5] == [
        "- requests: 1,500 (+50.0 % against the week before)",
        "- tokens: 7 (none the week before)",
        "- pages: 0",
        "- estimate: 90.00 EUR (-10.0 % against the week before)",
        "- usage as the metering API had it at 2026-11-28 23:00 UTC",
    ]
    short = replace(usage, kept=(replace(kept, since=date(2026, 11, 16)),), refreshed_at=None)
    assert lines(short)[:5] == [
        "- requests: 1,500",
        "- tokens: 7",
        "- pages: 0",
        "- estimate: 90.00 EUR",
        "- usage has not been read completely yet",
    ]
    assert lines(replace(usage, meters=()))[0] == "- unbilled usage is unknown"


def test_a_figure_that_no_database_can_hold_is_sent_once() -> None:
    enormous = observed(None, planned(unknown=10**30, blocked=10**30))
    assert titles(enormous) == ["syncd eu: usage is unbilled"]
    assert titles(enormous, sent_of(enormous)) == []
    assert all(0 < figure < 2**63 for figure in sent_of(enormous).values())
