"""The report: equal content, equal digest; what can be accepted and what cannot."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import subprocess
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from markupsafe import escape

from syncd.close.documents import as_csv, as_json
from syncd.close.report import (
    CURES,
    NEVER_ACCEPTED,
    Acceptance,
    Kind,
    Month,
    Objection,
    accepting,
    late_usage,
    make,
)
from syncd.dashboard.close import as_html
from syncd.usage.estimates import NOTE

MONTH = Month(2026, 10)
DECISION = Acceptance("agreed with sales", "mia")


def subject(key: str, requests: float, tokens: float = 0) -> dict[str, object]:
    return {"key": key, "name": None, "requests": requests, "tokens": tokens}


def figures(**changes: object) -> dict[str, object]:
    customer = {"key": "acme", "id": "01A", "name": "=Acme", "requests": 5, "tokens": 7}
    made: dict[str, object] = {
        "from": "2026-10-01T00:00:00Z",
        "to": "2026-11-01T00:00:00Z",
        "metering": "https://meter.example",
        "totals": {"requests": 8, "tokens": 7},
        "customers": [{**customer, "subjects": [subject("a\u202e", 2, 7), subject("b", 3)]}],
        "unbilled": [subject("stranger", 2)],
        "ignored": [{**subject("healthcheck", 1), "reason": "ours"}],
        "gateways": [],
        "audit": None,
        "late": {},
    }
    return made | changes


def test_equal_figures_make_equal_reports_to_the_byte_whatever_the_order_of_their_fields() -> None:
    one, two = make(MONTH, figures(), []), make(MONTH, dict(reversed(figures().items())), [])
    assert one.sha256 == two.sha256
    for write in (as_json, as_csv, as_html):
        assert write(one) == write(two)


def test_every_figure_and_every_decision_is_part_of_the_digest() -> None:
    against = [Objection(Kind.UNBILLED, "1 subject")]
    digests = {
        make(MONTH, figures(), []).sha256,
        make(Month(2026, 9), figures(), []).sha256,
        make(MONTH, figures(totals={"requests": 9, "tokens": 7}), []).sha256,
        make(MONTH, figures(), against).sha256,
        make(MONTH, figures(), accepting(against, {Kind.UNBILLED}, DECISION)).sha256,
    }
    assert len(digests) == 5


def test_a_report_is_closed_only_without_open_objections() -> None:
    against = [Objection(Kind.UNBILLED, "1 subject"), Objection(Kind.LOST, "2 events")]
    assert make(MONTH, figures(), []).closed
    assert not make(MONTH, figures(), against).closed
    assert not make(MONTH, figures(), accepting(against, {Kind.LOST}, DECISION)).closed
    closed = make(MONTH, figures(), accepting(against, {Kind.LOST, Kind.UNBILLED}, DECISION))
    assert closed.closed
    assert [one["accepted"]["by"] for one in closed.against] == ["mia", "mia"]


@pytest.mark.parametrize("kind", sorted(NEVER_ACCEPTED))
def test_nobody_can_accept_figures_that_are_not_final(kind: Kind) -> None:
    assert not make(MONTH, figures(), accepting([Objection(kind, "x")], set(Kind), DECISION)).closed


def test_each_kind_has_a_cure() -> None:
    assert set(CURES) == set(Kind)


def test_the_digest_can_be_computed_from_the_file() -> None:
    report = make(MONTH, figures(), [Objection(Kind.UNBILLED, 'é "quoted" \u202e / \\ \u007f')])
    found = json.loads(as_json(report))
    assert found["sha256"] == report.sha256
    text = json.dumps(found["report"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.replace("\x7f", "\\u007f").encode()).hexdigest() == report.sha256
    if jq := shutil.which("jq"):
        printed = subprocess.run([jq, "-cjS", ".report"], input=as_json(report).encode(), capture_output=True)
        assert hashlib.sha256(printed.stdout).hexdigest() == report.sha256


def test_the_csv_has_a_line_for_each_subject_and_runs_no_formula() -> None:
    lines = as_csv(make(MONTH, figures(), [])).splitlines()
    assert [line.partition(",")[0] for line in lines[1:]] == [
        *("report", "total", "customer", "customer", "unbilled", "ignored")
    ]
    assert "customer,acme,01A,'=Acme,b,,3,0," in lines
    assert "unbilled,,,,stranger,,2,0," in lines
    assert "ignored,,,,healthcheck,,1,0,ours" in lines


def test_other_meters_and_the_estimate_are_shown_in_each_format_and_a_report_from_before_them_too() -> None:
    made = figures()
    customer: dict[str, Any] = next(iter(cast("list[dict[str, Any]]", made["customers"])))
    first, second = customer["subjects"]
    worth = {"currency": "EUR", "total": "1240.5", "unbilled": "0.5", "unpriced": {"pages": 2}, "gaps": ["x"]}
    more = figures(
        customers=[
            {
                **customer,
                "subjects": [{**first, "meters": {"pages": 3}}, {**second, "meters": {"pages": 4}}],
                "meters": {"pages": 7},
                "estimate": "1240",
            }
        ],
        unbilled=[{**subject("stranger", 2), "meters": {"pages": 1}, "estimate": "0.5"}],
        ignored=[{**subject("healthcheck", 1), "meters": {"pages": 0}, "estimate": "0", "reason": "ours"}],
        meters={"pages": {"total": 8}, "seats": {"total": None, "problem": "it is a maximum"}},
        estimate={**worth, "prices": {"currency": "EUR", "rates": []}},
    )
    report = make(MONTH, more, [])
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [(row["section"], row["pages"], row["estimate"]) for row in rows[:7]] == [
        ("report", "", ""),
        ("total", "8", "1240.5"),
        ("customer", "3", "1240"),
        ("customer", "4", ""),
        ("unbilled", "1", "0.5"),
        ("ignored", "0", "0"),
        ("note", "", ""),
    ]
    page = as_html(report)
    for shown in (
        "Estimate: 1,240.50 EUR",
        "1,240.00 EUR",
        str(escape(NOTE)),
        "Meter seats is left out: it is a maximum.",
    ):
        assert shown in page
    assert "No price fits 2 of pages" in page
    assert "estimate" not in (as_html(make(MONTH, made, [])) + as_csv(make(MONTH, made, []))).lower()
    other = {**worth, "prices": {"currency": "EUR", "rates": ["other"]}}
    assert make(MONTH, {**more, "estimate": other}, []).sha256 != report.sha256


def test_the_html_shows_figures_and_no_text_that_steers() -> None:
    hostile = [Objection(Kind.UNBILLED, "<script>alert(1)</script>\u202e")]
    page = as_html(make(MONTH, figures(), hostile))
    assert "not closed" in page
    assert "stranger" in page
    assert "<script" not in page
    assert "\u202e" not in page


def test_late_usage_is_what_differs_from_the_report_to_the_event() -> None:
    closed = make(MONTH, figures(), []).content
    same = ({"a\u202e": 2, "b": 3, "stranger": 2, "healthcheck": 1}, {"a\u202e": 7})
    assert late_usage(closed, *same) == ()
    found = late_usage(closed, same[0] | {"b": 4, "new": 1, "stranger": 0}, {"a\u202e": 9})
    assert [(one.subject, one.customer, one.requests, one.tokens) for one in found] == [
        ("a\u202e", "acme", 0, 2),
        ("b", "acme", 1, 0),
        ("new", None, 1, 0),
        ("stranger", None, -2, 0),
    ]


def test_fractions_that_a_server_adds_up_in_another_order_are_not_late() -> None:
    closed = make(MONTH, figures(unbilled=[subject("x", 0, 0.1 + 0.2)]), []).content
    base = ({"a\u202e": 2, "b": 3, "healthcheck": 1}, {"a\u202e": 7})
    assert late_usage(closed, base[0], base[1] | {"x": 0.3}) == ()
    assert len(late_usage(closed, base[0], base[1] | {"x": 0.4})) == 1


@pytest.mark.parametrize(
    ("text", "until"),
    [("2026-10", (2026, 11)), ("2026-12", (2027, 1)), ("2027-02", (2027, 3)), ("2028-01", (2028, 2))],
)
def test_a_month_ends_where_the_next_begins(text: str, until: tuple[int, int]) -> None:
    month = Month.parse(text)
    assert str(month) == text
    assert month.since == datetime(month.year, month.number, 1, tzinfo=UTC)
    assert month.until == datetime(*until, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    ["", "2026", "2026-13", "2026-00", "2026-1", "26-10", "2026-10-01", "0000-01", "9999-12", "\uff12026-10"],
)
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 2026-10"):
        Month.parse(text)


def test_months_sort_by_time() -> None:
    assert Month(2026, 12) < Month(2027, 1) < Month(2027, 2)
