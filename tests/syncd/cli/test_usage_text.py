"""Usage for people and for spreadsheets: the period, the sums, and no unbilled subject lost."""

from __future__ import annotations

import csv
import io
from contextlib import redirect_stdout
from datetime import UTC, datetime
from decimal import Decimal

import pytest
import typer
from rich.console import Console

from syncd.cli.options import Last, Sort
from syncd.cli.usage_text import Period, period, print_csv, show_usage, sorted_usage, to_json
from syncd.config.prices import PricesConfig
from syncd.metering.usage import Usage, attribute
from syncd.usage.estimates import NOTE, Estimate, prices_of
from tests.syncd.builders import customer

NOW = datetime(2026, 11, 29, 4, 30, tzinfo=UTC)
NOVEMBER = Period(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC))
USAGE = attribute(
    (customer("acme", "a", "b", name="Acme"), customer("big", "c"), customer("idle", "d")),
    {"a": 1_234_567, "b": 3, "c": 2_000_000, "x": 0.5, "=cmd()": 7},
    {"a": 10, "c": 5},
    {"a": "alice"},
)


def shown(
    usage: Usage = USAGE, estimate: Estimate | None = None, *, terminal: bool = False, width: int = 100
) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None)
    show_usage(console, sorted_usage(usage, Sort.REQUESTS), NOVEMBER, estimate)
    return text.getvalue()


def estimated(*, ended: bool = True) -> Estimate:
    """The estimate of `USAGE` at 0.5 EUR per 1,000, and of a meter that is not in it at 1 EUR a month."""
    rates = [
        {"meter": "kong_api_requests", "amount": "0.5", "per": 1000},
        {"meter": "pages", "price": "flat", "amount": 1},
    ]
    prices = prices_of(PricesConfig.model_validate({"currency": "EUR", "rates": rates}))
    assert prices is not None
    found = Estimate(prices, {"a": "id-acme", "b": "id-acme", "c": "id-big", "d": "id-idle"})
    for subject, value in {"a": 1_234_567, "b": 3, "c": 2_000_000, "x": 0.5, "=cmd()": 7}.items():
        found.add("kong_api_requests", subject, (), value)
    found.add("pages", "d", (), 2)
    found.add("pages", "=pages", (), 2)
    if ended:
        found.end_month()
    return found


def test_usage_is_a_table_with_its_period_sums_and_a_total() -> None:
    assert shown().splitlines() == [
        "Usage from 2026-11-01 to 2026-12-01 (UTC)",
        "customer                      requests  tokens",
        "unbilled: on no customer          7.50       0",
        "  =cmd()                             7       0",
        "  x                               0.50       0",
        "big                          2,000,000       5",
        "  c                          2,000,000       5",
        "acme (Acme)                  1,234,570      10",
        "  a (alice)                  1,234,567      10",
        "  b                                  3       0",
        "total                     3,234,577.50      15",
        "1 customer without usage in this period.",
        "Unbilled subjects: 2 (0.0 % of the requests).",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_on_a_terminal_is_longer_than_it_is_wide(width: int) -> None:
    usage = attribute((customer("c" * 90, "s" * 90),), {"s" * 90: 1}, {})
    lines = shown(usage, terminal=True, width=width).splitlines()
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("terminal", [True, False])
def test_names_from_outside_cannot_steer_the_terminal(terminal: bool) -> None:
    name = "[red]eve\x1b[2J\u202e"
    usage = attribute((customer("acme", "a", name=name),), {"a": 1, "x\x1b": 1}, {}, {"a": name})
    text = shown(usage, terminal=terminal)
    assert text.count("[red]eve?[2J?") == 2
    assert "\x1b[2J" not in text
    assert "\x1b" not in text.replace("\x1b[0m", "")


def test_what_is_unbilled_comes_first_on_a_terminal_and_is_never_cut() -> None:
    customers = tuple(customer(f"c{index:03}", f"s{index:03}") for index in range(250))
    amounts = {f"unknown-{index:03}": 1.0 for index in range(220)}
    amounts |= {f"s{index:03}": 5.0 for index in range(250)}
    text = shown(attribute(customers, amounts, {}), terminal=True)
    assert text.count("  unknown-") == 220
    assert text.index("unknown-219") < text.index("c000")
    assert text.count("\nc") == 101, "100 customers and the header"
    assert "... and 150 more customers; --output csv shows all" in text
    assert "total     " in text
    assert "1,470" in text, "the total counts what is cut"


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        (Sort.REQUESTS, ["big", "acme", "idle"]),
        (Sort.TOKENS, ["acme", "big", "idle"]),
        (Sort.NAME, ["acme", "big", "idle"]),
    ],
)
def test_customers_are_sorted_as_asked_for(by: Sort, keys: list[str]) -> None:
    assert [found.key for found in sorted_usage(USAGE, by).customers] == keys


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (Last.DAY, "from 2026-11-28 to 2026-11-29 (UTC)"),
        (Last.WEEK, "from 2026-11-16 to 2026-11-23 (UTC)"),
        (Last.MONTH, "from 2026-10-01 to 2026-11-01 (UTC)"),
    ],
)
def test_the_last_period_is_the_whole_one_before_this(last: Last, says: str) -> None:
    assert period(None, None, last, NOW).describe() == says


def test_last_month_in_january_is_december() -> None:
    found = period(None, None, Last.MONTH, datetime(2026, 1, 31, tzinfo=UTC))
    assert found.describe() == "from 2025-12-01 to 2026-01-01 (UTC)"


def test_open_periods_are_named_as_such() -> None:
    assert Period().describe() == "of all time"
    assert Period(since=NOW).describe() == "from 2026-11-29T04:30:00Z until now (UTC)"
    assert Period(until=NOW).describe() == "to 2026-11-29T04:30:00Z (UTC)"


def test_a_period_that_cannot_be_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="--from must be before --to"):
        period(NOW, NOW, None, NOW)
    with pytest.raises(typer.BadParameter, match="--last cannot be combined"):
        period(NOW, None, Last.DAY, NOW)


def test_csv_has_a_line_for_each_subject_and_runs_no_formula() -> None:
    text = io.StringIO()
    with redirect_stdout(text):
        print_csv(sorted_usage(USAGE, Sort.NAME), NOVEMBER)
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert [(row["customer_key"], row["subject"], row["requests"]) for row in rows] == [
        ("acme", "a", "1234567"),
        ("acme", "b", "3"),
        ("big", "c", "2000000"),
        ("idle", "d", "0"),
        ("", "'=cmd()", "7"),
        ("", "x", "0.5"),
    ]
    assert {(row["from"], row["to"]) for row in rows} == {("2026-11-01", "2026-12-01")}


def test_with_prices_a_column_has_the_estimates_and_the_last_line_says_what_they_are() -> None:
    assert shown(estimate=estimated()).splitlines() == [
        "Usage from 2026-11-01 to 2026-12-01 (UTC)",
        "customer                      requests  tokens      estimate",
        "unbilled: on no customer          7.50       0      1.00 EUR",
        "  =cmd()                             7       0   0.00350 EUR",
        "  x                               0.50       0  0.000250 EUR",
        "  =pages                             0       0      1.00 EUR",
        "big                          2,000,000       5  1,000.00 EUR",
        "  c                          2,000,000       5",
        "acme (Acme)                  1,234,570      10    617.29 EUR",
        "  a (alice)                  1,234,567      10",
        "  b                                  3       0",
        "idle                                 0       0      1.00 EUR",
        "  d                                  0       0",
        "total                     3,234,577.50      15  1,619.29 EUR",
        "Unbilled subjects: 3 (0.0 % of the requests).",
        NOTE,
    ]


def test_without_a_beginning_no_estimate_is_shown_and_the_reason_is() -> None:
    unknown = estimated(ended=False)
    unknown.gaps.append("a period without a beginning is not estimated")
    text = shown(estimate=unknown)
    assert "EUR" not in text
    assert "The estimate is incomplete: a period without a beginning is not estimated." in text
    document = to_json(USAGE, unknown)
    assert document["estimate"] == {
        "currency": "EUR",
        "total": None,
        "unbilled": None,
        "unpriced": {},
        "gaps": unknown.gaps,
    }


def test_the_estimates_of_a_spreadsheet_add_up_to_the_total() -> None:
    text = io.StringIO()
    with redirect_stdout(text):
        print_csv(sorted_usage(USAGE, Sort.NAME), NOVEMBER, estimated())
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert [(row["subject"], row["estimate"], row["currency"]) for row in rows] == [
        ("a", "617.29", "EUR"),
        ("b", "", ""),
        ("c", "1000", "EUR"),
        ("d", "1", "EUR"),
        ("'=cmd()", "0.0035", "EUR"),
        ("x", "0.00025", "EUR"),
        ("'=pages", "1", "EUR"),
    ]
    assert sum(Decimal(row["estimate"] or 0) for row in rows) == estimated().total
