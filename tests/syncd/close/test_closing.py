"""Closing months: what stands against it, what is kept, and what arrives afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from syncd.close.closing import Decision, Result
from syncd.close.report import Kind, Month
from syncd.core.errors import ApiError, StateError
from syncd.runs.ignored import IgnoredEntry
from tests.syncd.close.worlds import ALICE, BEFORE, CLOSABLE, MONTH, World, world
from tests.syncd.dashboard.gateways import dead_letter, quarantined
from tests.syncd.sandbox.support import create_customer
from tests.syncd.servers import Asked

pytestmark = pytest.mark.slow

IN_MONTH = f"{MONTH}-20T05:49:03.779Z"


@pytest.fixture
def there(tmp_path: Path, sandbox: httpx.Client) -> Iterator[World]:
    """Usage of alice, and everything in order."""
    with world(tmp_path / "world", sandbox, "eu") as found:
        found.serve(ALICE, 5)
        found.spend(ALICE, 120)
        yield found


def close(there: World, month: Month = MONTH, **options: object) -> Result:
    with there.closing() as closing:
        return closing.close(month, **options)  # type: ignore[arg-type]


def against(result: Result) -> list[str]:
    return [one["kind"] for one in result.report.against]


def texts(result: Result) -> str:
    return " ".join(one["text"] for one in result.report.against)


def test_a_month_in_order_is_closed_and_kept(there: World) -> None:
    result = close(there)
    assert (against(result), result.is_closed) == ([], True)
    assert result.kept is not None
    assert result.report.content["totals"] == {"requests": 5, "tokens": 120}
    with there.closing() as closing:
        assert closing.months is not None
        (kept,) = closing.months.all()
        assert (kept.month, kept.revision, kept.sha256) == (MONTH, 1, result.report.sha256)
        assert closing.months.report(kept) == result.report


def test_the_same_month_read_twice_is_the_same_report(there: World) -> None:
    first, second = close(there, keep=False), close(there, keep=False)
    assert first.report == second.report
    assert first.kept is None


def test_other_meters_and_an_estimate_are_part_of_the_report_and_of_its_digest(there: World) -> None:
    plain = close(there, keep=False).report
    meter = {"slug": "kong_calls", "aggregation": "COUNT", "eventType": "kong.llm_request"}
    there.sandbox.post("/api/v1/meters", json=meter).raise_for_status()
    largest = {**meter, "slug": "largest", "aggregation": "MAX", "valueProperty": "$.tokens"}
    there.sandbox.post("/api/v1/meters", json=largest).raise_for_status()
    text = there.project.config.read_text()

    def priced(amount: str) -> Result:
        tokens = "{meter: kong_llm_tokens, amount: 1, per: 1000}"
        rates = f"[{{meter: kong_api_requests, amount: {amount}}}, {tokens}]"
        there.project.config.write_text(
            f"{text}usage: {{meters: {{kong_calls: [], largest: [], gone: []}}}}\n"
            f"prices: {{currency: EUR, rates: {rates}}}\n"
        )
        return close(there, keep=False)

    there.serve("stranger", 2)
    first, again, dearer = priced("0.10"), priced("0.10"), priced("0.20")
    content = first.report.content
    (customer,) = content["customers"]
    assert (customer["meters"], customer["estimate"]) == ({"kong_calls": 1}, "0.62")
    (unbilled,) = content["unbilled"]
    assert (unbilled["meters"], unbilled["estimate"]) == ({"kong_calls": 0}, "0.2")
    assert content["meters"]["kong_calls"] == {"total": 1}
    assert {key for key, one in content["meters"].items() if one.get("problem")} == {"gone", "largest"}
    assert (content["estimate"]["total"], content["estimate"]["unbilled"]) == ("0.82", "0.2")
    requests, tokens = content["estimate"]["prices"]["rates"]
    assert (requests["meter"], requests["amount"], tokens["per"]) == ("kong_api_requests", "0.10", "1000")
    assert first.report == again.report
    assert len({one.sha256 for one in (plain, first.report, dearer.report)}) == 3
    status, out, _ = there.call(str(MONTH), "--dry-run")
    assert "Estimate: 1.52 EUR, of which 0.40 EUR unbilled." in out, status


def test_later_customers_and_usage_of_other_months_change_no_report(there: World) -> None:
    before = close(there, keep=False).report
    create_customer(there.sandbox, "Later", key="later", subjects=["later"])
    there.serve("later", 3, MONTH.until)
    there.serve("later", 3, MONTH.since - timedelta(microseconds=1))
    assert close(there, keep=False).report == before
    there.serve(ALICE, 1, MONTH.until - timedelta(microseconds=1))
    there.serve(ALICE, 1, MONTH.since)
    assert close(there, keep=False).report.content["totals"]["requests"] == 7


@pytest.mark.parametrize(
    "now", [MONTH.since, MONTH.until - timedelta(seconds=1), CLOSABLE - timedelta(seconds=1)]
)
def test_a_month_that_has_not_ended_is_not_closed_and_not_read(there: World, now: datetime) -> None:
    with there.closing(now) as closing:
        result = closing.close(MONTH)
    assert against(result) == ["not-ended"]
    assert result.report.content["totals"] is None
    assert result.kept is None


def test_a_clock_that_is_ahead_of_the_metering_api_closes_no_month_early(there: World) -> None:
    future = Month.parse(f"{datetime.now(UTC) + timedelta(days=40):%Y-%m}")
    with there.closing(future.until + timedelta(days=1)) as closing:
        assert against(closing.close(future)) == ["not-ended"]


def test_unbilled_usage_stands_against_it_until_it_is_ignored_for_the_whole_month(there: World) -> None:
    there.serve("stranger", 2)
    result = close(there)
    assert against(result) == ["unbilled"]
    assert "1 subject without a customer: 2 requests, 0 tokens" in texts(result)
    last = (MONTH.until - timedelta(days=1)).date()
    for until, closed in ((last - timedelta(days=1), False), (last, True), (None, True)):
        noted = (IgnoredEntry(1, "stranger", "our probe", "mia", until, CLOSABLE),)
        with there.closing(noted=noted) as closing:
            assert closing.close(MONTH, keep=False).is_closed is closed, until


def test_what_the_configuration_ignores_is_listed_apart(there: World) -> None:
    there.serve("stranger", 2)
    config = there.project.config
    config.write_text(f"{config.read_text()}ignore: [{{subject: stranger, reason: our probe}}]\n")
    result = close(there)
    assert result.is_closed
    assert result.report.content["unbilled"] == []
    (ignored,) = result.report.content["ignored"]
    assert (ignored["key"], ignored["requests"], ignored["reason"]) == ("stranger", 2, "our probe")
    assert result.report.content["totals"]["requests"] == 7, "the total is that of the meters"


def test_differences_of_the_audit_stand_against_it(there: World) -> None:
    there.serve(ALICE, 1, counted=False)
    there.serve(ALICE, 2, MONTH.since, by=None)
    there.gateways["eu"].lost_events[f"{MONTH}-03T01", "kong.api_request", ALICE] = 4
    result = close(there)
    assert against(result) == ["missing", "lost", "surplus"]
    assert "1 delivered event is not counted" in texts(result)
    assert "2 events counted that no listed gateway has sent" in texts(result)


def test_a_gateway_that_cannot_be_read_stands_against_it_and_the_others_are_reported(
    tmp_path: Path, sandbox: httpx.Client
) -> None:
    with world(tmp_path, sandbox, "eu", "us") as there:
        there.serve(ALICE, 5)
        there.gateways["us"].ready = False
        result = close(there)
        assert against(result) == ["gateway"]
        assert "gateway us" in texts(result)
        assert [one["name"] for one in result.report.content["gateways"]] == ["eu"]
        assert result.report.content["totals"]["requests"] == 5
        decision = Decision(frozenset(Kind), "whatever", "mia")
        assert not close(there, decision=decision).is_closed, "nobody can accept that"


def test_without_gateways_a_month_needs_a_decision(there: World) -> None:
    text = there.project.config.read_text()
    there.project.config.write_text(text[: text.index("gateways:")])
    assert against(close(there)) == ["no-gateways"]
    decision = Decision(frozenset({Kind.NO_GATEWAYS}), "audited elsewhere", "mia")
    assert close(there, decision=decision).is_closed


def test_events_of_the_month_that_wait_stand_against_it(there: World) -> None:
    there.gateways["eu"].waiting[f"{MONTH}-10T07", "kong.api_request", "x"] = 1
    result = close(there)
    assert against(result) == ["open-hours"]
    assert f"from {MONTH}-10 07:00 on could not be compared: events of eu are waiting" in texts(result)


def test_events_of_other_months_that_wait_do_not(there: World) -> None:
    there.gateways["eu"].waiting[f"{MONTH.until:%Y-%m-%dT%H}", "kong.api_request", "x"] = 1
    assert close(there).is_closed


def test_dead_letters_of_the_month_stand_against_it_once(there: World) -> None:
    there.gateways["eu"].dead = [
        dead_letter(1, time=IN_MONTH),
        dead_letter(2, time=IN_MONTH, status=None),
        dead_letter(3, time=f"{BEFORE}-20T05:49:03.779Z"),
    ]
    result = close(there)
    assert against(result) == ["dead-letters"]
    assert "eu has 2 dead letters of the month (HTTP 400 1, too old 1)" in texts(result)


def test_a_refused_event_that_is_no_dead_letter_any_more_stands_against_it(there: World) -> None:
    there.gateways["eu"].discarded[f"{MONTH}-20T05", "kong.api_request", ALICE] = 1
    result = close(there)
    assert against(result) == ["refused"]
    assert "1 refused event is neither counted nor a dead letter" in texts(result)


def test_dead_letters_whose_time_nobody_can_read_are_counted(there: World) -> None:
    there.gateways["eu"].dead = [dead_letter(1, time="yesterday")]
    assert against(close(there)) == ["dead-letters"]


def test_a_quarantine_stands_against_it(there: World) -> None:
    there.gateways["eu"].quarantined = 7
    result = close(there)
    assert against(result) == ["quarantine"]
    assert "eu has 7 requests in quarantine" in texts(result), "they are not listed, so they may be of it"
    edges = (MONTH.since, MONTH.until)
    began = [int(1000 * at.timestamp()) + shift for at in edges for shift in (-1, 0)]
    there.gateways["eu"].kept = [quarantined(n, started_at=ms) for n, ms in enumerate(began, 1)]
    there.gateways["eu"].kept += [quarantined(5, started_at="soon"), quarantined(6), quarantined(7)]
    assert "eu has 3 requests in quarantine" in texts(close(there)), "two of the month, one that says nothing"


def test_a_pruned_ledger_stands_against_it(there: World) -> None:
    there.gateways["eu"].pruned_up_to = f"{BEFORE}-20T05"
    assert close(there, keep=False).is_closed, "only earlier months are pruned"
    there.gateways["eu"].pruned_up_to = f"{MONTH}-01T00"
    assert against(close(there)) == ["pruned"]


def test_lost_requests_stand_against_the_first_month_that_is_closed_with_them(there: World) -> None:
    there.gateways["eu"].lost = {"disk_full": 2}
    assert against(close(there, BEFORE)) == ["requests-lost"]
    decision = Decision(frozenset({Kind.REQUESTS_LOST}), "written off", "mia")
    assert close(there, BEFORE, decision=decision).is_closed
    assert close(there, keep=False).is_closed, "they are accounted for"
    there.gateways["eu"].lost = {"disk_full": 5}
    result = close(there)
    assert against(result) == ["requests-lost"]
    assert "3 requests since the latest closed month" in texts(result)


def test_what_was_accepted_is_part_of_the_report(there: World) -> None:
    there.serve("stranger", 2)
    result = close(there, decision=Decision(frozenset({Kind.UNBILLED}), "trial account", "mia"))
    assert result.is_closed
    (one,) = result.report.against
    assert one["accepted"] == {"reason": "trial account", "by": "mia"}
    assert result.kept is not None
    assert result.kept.by == "mia"


def test_closing_twice_keeps_the_first_report(there: World) -> None:
    first, second = close(there), close(there)
    assert second.is_closed
    assert second.kept == first.kept
    with there.closing() as closing:
        assert closing.months is not None
        assert len(closing.months.all()) == 1


def test_events_that_arrive_for_a_closed_month_are_listed_and_the_report_stays(there: World) -> None:
    closed = close(there)
    there.serve(ALICE, 2)
    there.serve("stranger", 1)
    result = close(there)
    assert result.report == closed.report
    assert not result.is_closed
    assert {one.subject: (one.customer, one.requests) for one in result.late} == {
        ALICE: ("acme", 2),
        "stranger": (None, 1),
    }
    with there.closing() as closing:
        assert closing.months is not None
        (kept,) = closing.months.all()
        assert kept.late == result.late, "for the page and the metrics"
        assert closing.check() == [kept]


def test_events_that_vanish_from_a_closed_month_are_listed_too(there: World) -> None:
    close(there)
    there.sandbox.post("/sandbox/v1/reset").raise_for_status()
    assert [one.requests for one in close(there).late] == [-5]


def test_a_closed_month_can_be_closed_again_and_both_reports_stay(there: World) -> None:
    first = close(there)
    there.serve(ALICE, 2)
    second = close(there, again=True)
    assert second.is_closed
    assert second.kept is not None
    assert (second.kept.revision, second.report.content["totals"]["requests"]) == (2, 7)
    assert close(there).is_closed
    with there.closing() as closing:
        assert closing.months is not None
        assert first.kept is not None
        assert closing.months.report(first.kept) == first.report


def test_late_events_of_an_earlier_month_stand_against_the_next_until_that_is_closed_again(
    there: World,
) -> None:
    close(there, BEFORE)
    there.serve(ALICE, 2, BEFORE.since)
    result = close(there)
    assert against(result) == ["late"]
    assert [one["requests"] for one in result.report.content["late"][str(BEFORE)]] == [2]
    assert close(there, BEFORE, again=True).is_closed
    assert close(there).is_closed


def test_of_two_that_close_at_once_one_keeps_its_report(there: World) -> None:
    def one(_: int) -> object:
        try:
            return close(there).report.sha256
        except StateError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, range(4)))
    closed = {text for text in found if len(str(text)) == 64}
    assert len(closed) == 1
    assert all("another syncd has closed" in str(text) for text in found if text not in closed)
    with there.closing() as closing:
        assert closing.months is not None
        assert [kept.revision for kept in closing.months.all()] == [1]


def test_a_damaged_report_is_named_and_can_be_replaced(there: World) -> None:
    close(there)
    with there.closing() as closing:
        assert closing.months is not None
        from sqlalchemy import text

        with closing.months._state.writing() as connection:
            connection.execute(text("UPDATE closed_months SET sha256 = 'f00'"))
        with pytest.raises(StateError, match="does not have its SHA-256 f00"):
            closing.close(MONTH)
        assert closing.close(MONTH, again=True).is_closed


METERS = ("kong_api_requests", "kong_llm_tokens")
QUERY, TOKENS = (f"/api/v1/meters/{meter}/query" for meter in METERS)


def counting(value: object, subject: str = ALICE) -> dict[str, object]:
    """The answer to a query over the whole month."""
    times = {"windowStart": f"{MONTH}-01T00:00:00Z", "windowEnd": f"{MONTH.until:%Y-%m-%dT%H:%M:%SZ}"}
    return {"data": [{**times, "value": value, "subject": subject, "groupBy": {}}]}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((QUERY, value) for value in (-1, 0.5, "NaN", "Infinity", None, True, 1e300, "1e19")),
        *((TOKENS, value) for value in (-0.5, "NaN", "-Infinity", 1e308, "9" * 400)),
    ],
)
def test_figures_that_no_meter_can_have_are_an_error_and_close_nothing(
    there: World, path: str, value: object
) -> None:
    def nonsense(asked: Asked) -> object | None:
        return counting(value) if asked.path == path and "windowSize" not in asked.query else None

    with there.answering(nonsense), pytest.raises(ApiError):
        close(there)
    with there.closing() as closing:
        assert closing.check() == []


def test_a_metering_api_that_counts_otherwise_by_hour_than_over_the_month_is_not_believed(
    there: World,
) -> None:
    def other(asked: Asked) -> object | None:
        return counting(6) if asked.path == QUERY and "windowSize" not in asked.query else None

    with there.answering(other):
        result = close(there)
    assert against(result) == ["changed"]
    assert "counts 5 events by hour, but 6 over the month" in texts(result)


def test_a_metering_api_that_counts_more_while_it_is_read_is_read_again_later(there: World) -> None:
    asked_before: list[Asked] = []

    def growing(asked: Asked) -> object | None:
        if asked.path != QUERY or "windowSize" in asked.query:
            return None
        asked_before.append(asked)
        return counting(4) if len(asked_before) == 1 else None

    with there.answering(growing):
        result = close(there)
        assert against(result) == ["changed"]
        assert "4 before the audit and 5 after it" in texts(result)
        assert close(there).is_closed


def test_a_metering_api_that_is_away_is_an_error(there: World) -> None:
    there.sandbox.post("/sandbox/v1/faults", json={"status": 503}).raise_for_status()
    with pytest.raises(ApiError):
        close(there)


def test_a_gateway_that_repeats_a_page_of_dead_letters_for_ever_ends_as_unreadable(there: World) -> None:
    there.gateways["eu"].endless = True
    assert against(close(there)) == ["gateway"]
