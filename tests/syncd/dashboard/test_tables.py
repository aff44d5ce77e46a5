"""Tables that visitors sort, search, filter, leaf through and download."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from decimal import Decimal

import pytest

from syncd.core.text_csv import cell, document
from syncd.dashboard.tables import Choice, Column, Table


@dataclass(frozen=True)
class Row:
    name: str
    requests: int | None
    hidden: str = ""


ROWS = [Row("beta", 5), Row("Acme", 30), Row("gamma", None), Row("delta", 5, "secret")]
TABLE: Table[Row] = Table(
    columns=(
        Column("name", "Customer", lambda row: row.name),
        Column("requests", "Requests", lambda row: row.requests, number=True),
        Column("hidden", "Hidden", lambda row: row.hidden, sortable=False, shown=False),
    ),
    order="-requests",
    choices=(
        Choice(
            "used",
            "Usage",
            {"all": "all", "yes": "used", "no": "not used"},
            lambda row, value: bool(row.requests) == (value == "yes"),
        ),
    ),
    searched=lambda row: (row.name, row.hidden),
    size=3,
)


def names(**query: str) -> list[str]:
    return [row.name for row in TABLE.view(ROWS, query).rows]


def test_the_default_order_is_the_tables_and_equal_rows_keep_theirs() -> None:
    assert names() == ["Acme", "beta", "delta"]
    assert names(page="2") == ["gamma"], "without a value: last"
    assert names(sort="requests") == ["beta", "delta", "Acme"]


def test_names_are_sorted_without_regard_to_capitals() -> None:
    assert names(sort="name") == ["Acme", "beta", "delta"]
    assert names(sort="-name") == ["gamma", "delta", "beta"]


def test_search_finds_parts_in_any_case_also_in_what_is_not_shown() -> None:
    assert names(q="ACM") == ["Acme"]
    assert names(q="secret") == ["delta"]
    assert names(q="nobody") == []


def test_a_filter_leaves_what_fits() -> None:
    assert names(used="no") == ["gamma"]
    assert names(used="yes") == ["Acme", "beta", "delta"]


@pytest.mark.parametrize(
    "query",
    [
        {"sort": "hidden"},
        {"sort": "--name"},
        {"used": "x"},
        {"page": "-1"},
        {"page": "9" * 30},
        {"page": "²"},
    ],
)
def test_wrong_parameters_mean_the_default(query: dict[str, str]) -> None:
    assert names(**query) == names()


def test_a_page_beyond_the_end_is_the_last_one() -> None:
    assert names(page="7") == ["gamma"]


def test_a_head_links_to_the_other_direction_and_says_how_it_is_sorted() -> None:
    heads = TABLE.view(ROWS, {}).heads
    assert [(h.title, h.link, h.sorted) for h in heads] == [
        ("Customer", "name", None),
        ("Requests", "requests", "descending"),
    ]
    assert TABLE.view(ROWS, {"sort": "name"}).heads[0].link == "-name"


def test_links_keep_search_filter_and_order_and_start_at_the_first_page() -> None:
    view = TABLE.view(ROWS, {"q": "a", "used": "yes", "sort": "name", "page": "1"})
    assert view.with_query(sort="-name") == {"q": "a", "used": "yes", "sort": "-name"}
    assert TABLE.view(ROWS, {"used": "all", "sort": "-requests"}).query == {}, "defaults are left out"


def test_the_csv_has_all_pages_and_all_columns_of_what_was_searched() -> None:
    view = TABLE.view(ROWS, {"q": "a", "sort": "name"})
    answer = TABLE.csv(view, "customers-2026-11")
    assert answer.headers["content-disposition"] == 'attachment; filename="customers-2026-11.csv"'
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    lines = list(csv.reader(io.StringIO(bytes(answer.body).decode())))
    assert lines == [
        ["name", "requests", "hidden"],
        ["Acme", "30", ""],
        ["beta", "5", ""],
        ["delta", "5", "secret"],
        ["gamma", "", ""],
    ]


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_spreadsheet_runs_no_name_as_a_formula(first: str) -> None:
    name = f"{first}cmd|' /C calc'!A0"
    assert cell(name) == f"'{name}"
    written = document(["name"], [[name]])
    assert list(csv.reader(io.StringIO(written, newline=""))) == [["name"], [f"'{name}"]]


def test_numbers_stay_numbers() -> None:
    assert [cell(value) for value in (-5, 3.0, 0.25, None, Decimal("-1E-7"))] == [
        -5,
        3,
        0.25,
        "",
        "-0.0000001",
    ]
