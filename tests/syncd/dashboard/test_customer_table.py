"""The rows of the customers table: attribution, totals, order, filters, CSV."""

from __future__ import annotations

import csv
import io

import pytest
from starlette.responses import Response

from syncd.customers.known import UNSEEN, Concern, KnownCustomer
from syncd.dashboard.customer_table import CustomerRow, reference, rows, table, totals

METERS = (("requests", "Requests"), ("tokens", "Tokens"))


def one(key: str | None, *subjects: str, **more: object) -> KnownCustomer:
    given = {"name": (key or "none").title(), "keeper": "syncd", **more}
    return KnownCustomer(str(given.pop("id", f"id-{key}")), key, subject_keys=subjects, **given)  # type: ignore[arg-type]


ACME = one("acme", "alice", "bob", subscription="sub-1")
BETA = one("beta", "carol", keeper="finance")
IDLE = one("idle", keeper="other", owner="terraform")
WORLD = (ACME, BETA, IDLE)
REQUESTS = {"alice": 2.0, "bob": 1.0, "acme": 4.0, "carol": 30.0, "nobody": 9.0}
TOKENS = {"alice": 100.0, "idle-not": 5.0}
CONCERNS = (
    Concern("acme", "dave", True, "a subscription", 6, 0),
    Concern("acme", "eve", True, "a subscription"),
    Concern("beta", "frank", False, "new", 3, 0),
    Concern("not-there", "x", True, "", 50, 0),
)


def csv_of(answer: Response) -> str:
    return bytes(answer.body).decode()


@pytest.fixture
def world() -> tuple[CustomerRow, ...]:
    return rows(WORLD, (REQUESTS, TOKENS), CONCERNS)


def shown(world: tuple[CustomerRow, ...], **query: str) -> list[str]:
    return [row.customer.name for row in table(METERS, "", ()).view(world, query).rows]


def test_usage_is_that_of_all_subjects_and_of_the_key(world: tuple[CustomerRow, ...]) -> None:
    assert [(row.customer.key, row.values) for row in world] == [
        ("acme", (7, 100)),
        ("beta", (30, 0)),
        ("idle", (0, 0)),
    ]
    assert totals(world, 2) == (37, 100, 9), "without what belongs to no customer"


def test_what_stands_against_a_customer_is_counted(world: tuple[CustomerRow, ...]) -> None:
    assert [(row.blocked, row.unbilled) for row in world] == [(2, 6), (0, 3), (0, 0)]


def test_the_most_usage_comes_first_and_each_column_can_be_the_order(world: tuple[CustomerRow, ...]) -> None:
    assert shown(world) == ["Beta", "Acme", "Idle"]
    assert shown(world, sort="-tokens")[0] == "Acme"
    assert shown(world, sort="name") == ["Acme", "Beta", "Idle"]
    assert shown(world, sort="-subjects")[0] == "Acme"
    assert shown(world, sort="-unbilled") == ["Acme", "Beta", "Idle"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({"usage": "used"}, ["Beta", "Acme"]),
        ({"usage": "unused"}, ["Idle"]),
        ({"managed": "syncd"}, ["Acme"]),
        ({"managed": "finance"}, ["Beta"]),
        ({"managed": "other"}, ["Idle"]),
        ({"subscription": "active"}, ["Acme"]),
        ({"subscription": "none"}, ["Beta", "Idle"]),
        ({"state": "blocked"}, ["Acme"]),
        ({"state": "unbilled"}, ["Beta", "Acme"]),
        ({"state": "unbilled", "managed": "finance"}, ["Beta"]),
        ({"usage": "nonsense"}, ["Beta", "Acme", "Idle"]),
    ],
)
def test_filters_leave_the_customers_that_fit(
    world: tuple[CustomerRow, ...], query: dict[str, str], names: list[str]
) -> None:
    assert shown(world, **query) == names


def test_a_search_shows_what_the_directory_found(world: tuple[CustomerRow, ...]) -> None:
    view = table(METERS, "bob", {"id-acme"}).view(world, {"q": "bob"})
    assert [row.customer.key for row in view.rows] == ["acme"]
    assert (view.total, view.search) == (3, "bob")
    assert table(METERS, "zoe", ()).view(world, {"q": "zoe"}).rows == []


def test_the_csv_has_what_the_table_has_and_more(world: tuple[CustomerRow, ...]) -> None:
    full = table(METERS, "", ())
    view = full.view(world, {"usage": "used"})
    found = list(csv.DictReader(io.StringIO(csv_of(full.csv(view, "customers")))))
    assert found[1] == {
        "name": "Acme",
        "key": "acme",
        "id": "id-acme",
        "managed_by": "syncd",
        "subscription": "sub-1",
        "subjects": "2",
        "requests": "7",
        "tokens": "100",
        "blocked": "2",
        "unbilled": "6",
    }
    assert len(found) == 2


def test_a_name_is_no_formula_in_a_spreadsheet() -> None:
    evil = one("evil", name='=HYPERLINK("http://evil","x")')
    full = table(METERS, "", ())
    text = csv_of(full.csv(full.view(rows([evil], ({}, {}), ()), {}), "customers"))
    assert "'=HYPERLINK" in text


@pytest.mark.parametrize("key", ["acme", "a b/c?d#e", "consumer:1", "100%", "ä"])
def test_a_page_is_addressed_by_the_key(key: str) -> None:
    assert reference(one(key)) == key


@pytest.mark.parametrize("key", [".", "..", "a/../b", "a//b", "/a", "a\\..\\b"])
def test_a_key_that_browsers_would_resolve_is_replaced_by_the_id(key: str) -> None:
    assert reference(one(key, id="01M8")) == "01M8"


def test_a_customer_that_no_run_has_observed_shows_no_id() -> None:
    full = table(METERS, "", ())
    text = csv_of(full.csv(full.view(rows([one("new", id=f"{UNSEEN}new")], ({}, {}), ()), {}), "customers"))
    assert UNSEEN not in text
