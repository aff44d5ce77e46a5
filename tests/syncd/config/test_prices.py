"""Prices of the configuration: decimals as they were written, and faults that name the field."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from tests.syncd.config.test_faults import MINIMAL, faults, loaded


def with_rate(rate: str) -> str:
    return f"{MINIMAL}prices:\n  currency: EUR\n  rates:\n    - {{meter: kong_api_requests, {rate}}}\n"


@pytest.mark.parametrize(
    ("written", "amount"), [("0.1", "0.1"), ("'0.0002'", "0.0002"), ("3", "3"), ("1e-7", "1E-7")]
)
def test_an_amount_is_the_decimal_that_was_written(tmp_path: Path, written: str, amount: str) -> None:
    prices = loaded(tmp_path, with_rate(f"amount: {written}")).prices
    assert prices is not None
    assert prices.rates[0].amount == Decimal(amount)


@pytest.mark.parametrize(
    ("rate", "says"),
    [
        ("amount: -1", "prices.rates[0].amount: must not be negative"),
        ("amount: cheap", "prices.rates[0].amount: must be a number, such as 0.0002"),
        ("amount: nan", "prices.rates[0].amount: must be a finite number"),
        ("amount: yes", "prices.rates[0].amount: must be a number, such as 0.0002"),
        ("amount: 1, per: 0", "prices.rates[0].per: must be greater than 0"),
        ("amount: 1, price: tiered", "prices.rates[0].price: must be 'unit', 'package', 'flat', 'graduated'"),
        ("amuont: 1", "prices.rates[0].amuont: there is no such setting; did you mean `amount`?"),
        ("price: flat", "prices.rates[0]: amount is required for a flat price"),
        ("price: volume", "prices.rates[0]: tiers are required for a volume price"),
        ("amount: 1, price: volume", "prices.rates[0]: amount belongs into the tiers of a volume price"),
        ("amount: 1, tiers: [{amount: 1}]", "prices.rates[0]: tiers belong to graduated and volume prices"),
        ("price: volume, tiers: [{up_to: 5}]", "prices.rates[0].tiers[0]: needs amount, flat or both"),
        (
            "price: volume, tiers: [{up_to: 5, amount: 1}]",
            "prices.rates[0]: tiers: all but the last one need",
        ),
        (
            "price: volume, tiers: [{up_to: 5, amount: 1}, {up_to: 5, amount: 1}, {amount: 2}]",
            "prices.rates[0]: tiers: each up_to must be greater than the one before",
        ),
        ("amount: 1, where: {model: []}", "prices.rates[0].where: names no value of model"),
        ("amount: 1, where: {model: {a: b}}", "prices.rates[0].where.model: must be a list"),
    ],
)
def test_a_wrong_rate_is_named_with_its_field(tmp_path: Path, rate: str, says: str) -> None:
    found = faults(tmp_path, with_rate(rate))
    assert any(says in line for line in found), found


def test_a_rate_that_can_never_apply_is_refused(tmp_path: Path) -> None:
    text = with_rate("amount: 1") + "    - {meter: kong_api_requests, amount: 2}\n"
    assert "prices.rates: rate 1 never applies: rate 0 already fits all usage" in faults(tmp_path, text)[0]


def test_a_currency_is_three_capitals(tmp_path: Path) -> None:
    text = with_rate("amount: 1").replace("EUR", "euro")
    (fault,) = faults(tmp_path, text)
    assert "prices.currency: must be a currency code of three capitals, such as EUR" in fault


@pytest.mark.parametrize(
    ("usage", "says"),
    [
        ("interval: 10s", "usage.interval: must be at least 1m"),
        ("keep: 1d", "usage.keep: must be from 2d to 800d"),
        ("meters: {m: route}", "usage.meters: m must have a list of dimensions"),
        ("meters: {m: [a, b, c, d, e, f, g]}", "usage.meters: m has more than 6 dimensions"),
    ],
)
def test_wrong_settings_of_usage_are_named(tmp_path: Path, usage: str, says: str) -> None:
    found = faults(tmp_path, f"{MINIMAL}usage: {{{usage}}}\n")
    assert any(says in line for line in found), found
