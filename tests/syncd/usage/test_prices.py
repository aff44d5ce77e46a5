"""Estimates: every kind of price, in exact decimals."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.config.prices import PricesConfig
from syncd.usage.estimates import Prices, prices_of

TIERS = [{"up_to": 1000, "amount": 0}, {"up_to": 5000, "amount": "0.01", "flat": 5}, {"amount": "0.005"}]


def prices(*rates: dict[str, Any]) -> Prices:
    found = prices_of(PricesConfig.model_validate({"currency": "EUR", "rates": rates}))
    assert found is not None
    return found


def cost(quantity: float, **rate: Any) -> Decimal:
    return prices({"meter": "m", **rate}).estimate([("m", (), quantity)])[0]


@pytest.mark.parametrize(
    ("quantity", "rate", "expected"),
    [
        (1_000_000, {"amount": 0.1}, "100000"),
        (3, {"amount": "0.1"}, "0.3"),
        (1500, {"amount": "2.50", "per": 1_000_000}, "0.00375"),
        (1000, {"price": "package", "amount": 5, "per": 1000}, "5"),
        (1001, {"price": "package", "amount": 5, "per": 1000}, "10"),
        (7, {"price": "flat", "amount": 49}, "49"),
        (0, {"price": "flat", "amount": 49}, "0"),
        (1000, {"price": "graduated", "tiers": TIERS}, "0"),
        (1001, {"price": "graduated", "tiers": TIERS}, "5.01"),
        (5000, {"price": "graduated", "tiers": TIERS}, "45"),
        (7000, {"price": "graduated", "tiers": TIERS}, "55"),
        (1000, {"price": "volume", "tiers": TIERS}, "0"),
        (5000, {"price": "volume", "tiers": TIERS}, "55"),
        (5001, {"price": "volume", "tiers": TIERS}, "25.005"),
        (10, {"price": "graduated", "per": 10, "tiers": [{"amount": 1}]}, "1"),
    ],
)
def test_each_kind_of_price_charges_as_openmeters_does(
    quantity: float, rate: dict[str, Any], expected: str
) -> None:
    assert cost(quantity, **rate) == Decimal(expected)


def test_fractions_that_were_added_up_make_no_package_more() -> None:
    package = {"price": "package", "amount": 1, "per": 1}
    assert sum([0.1] * 30) > 3
    assert cost(sum([0.1] * 30), **package) == 3
    assert cost(3.001, **package) == 4
    assert cost(9_007_199_254_740_991, amount=1) == 9_007_199_254_740_991


def test_usage_is_charged_by_the_first_rate_that_fits_its_dimensions() -> None:
    found = prices(
        {"meter": "t", "where": {"model": "gpt-4o", "type": ["input", "cache_read"]}, "amount": 1},
        {"meter": "t", "where": {"model": "gpt-4o"}, "amount": 2},
        {"meter": "t", "where": {"model": ""}, "amount": 3},
        {"meter": "r", "amount": 4},
    )
    usage = [
        ("t", (("model", "gpt-4o"), ("type", "input")), 1.0),
        ("t", (("model", "gpt-4o"), ("type", "output")), 10.0),
        ("t", (("type", "output"),), 100.0),
        ("t", (("model", "other"), ("type", "output")), 1000.0),
        ("r", (), 10_000.0),
        ("unpriced", (), 5.0),
    ]
    assert found.estimate(usage) == (Decimal(1 + 20 + 300 + 40_000), {"t": 1000.0})
    assert found.dimensions("t") == {"model", "type"}
    assert found.dimensions("r") == frozenset()


def test_a_tier_sees_all_usage_of_the_rate_together() -> None:
    found = prices({"meter": "m", "price": "graduated", "tiers": TIERS})
    halves = [("m", (("route", "a"),), 600.0), ("m", (("route", "b"),), 401.0)]
    assert found.estimate(halves)[0] == Decimal("5.01")


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.sampled_from(["graduated", "unit", "package"]))
def test_more_usage_never_costs_less(one: int, other: int, price: str) -> None:
    rate: dict[str, Any] = {"price": price}
    rate |= {"tiers": TIERS} if price == "graduated" else {"amount": "0.0003", "per": 7}
    less, more = sorted((one, other))
    assert cost(less, **rate) <= cost(more, **rate)


@given(st.lists(st.integers(0, 10**12), max_size=50))
def test_unit_prices_lose_nothing_to_rounding(quantities: list[int]) -> None:
    found = prices({"meter": "m", "amount": "0.0001"})
    usage = [("m", (("route", str(number)),), float(value)) for number, value in enumerate(quantities)]
    assert found.estimate(usage)[0] == sum(quantities) * Decimal("0.0001")


def test_without_prices_there_is_no_estimate() -> None:
    assert prices_of(None) is None
