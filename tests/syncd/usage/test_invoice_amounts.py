"""Estimates equal the invoices that a real OpenMeter made of the same prices and usage, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import pytest

from syncd.config.prices import PricesConfig
from syncd.usage.estimates import Bill, Prices, digits_of, prices_of, rounded
from tests.syncd.contract.recordings import exchanges


class Invoiced(NamedTuple):
    """A line of an invoice: its price, the customer's usage, and what OpenMeter charges for it."""

    name: str
    currency: str
    price: dict[str, Any]
    usage: Decimal
    amount: Decimal
    details: int
    """How many amounts were rounded and added up for it."""

    def __str__(self) -> str:
        return f"{self.usage}-{self.name}"

    def prices(self) -> Prices:
        """Return the configuration with this price."""
        rate = {"meter": "m", **rate_of(self.price)}
        config = PricesConfig.model_validate({"currency": self.currency, "rates": [rate]})
        found = prices_of(config)
        assert found is not None
        return found

    def bill(self) -> Bill:
        return Bill({0: self.usage})


def rate_of(price: dict[str, Any]) -> dict[str, Any]:
    """Return a price of OpenMeter as a rate of the configuration."""
    match price["type"]:
        case "package":
            return {"price": "package", "amount": price["amount"], "per": price["quantityPerPackage"]}
        case "tiered":
            tiers = [
                {
                    "up_to": tier.get("upToAmount"),
                    "amount": (tier["unitPrice"] or {}).get("amount"),
                    "flat": (tier["flatPrice"] or {}).get("amount"),
                }
                for tier in price["tiers"]
            ]
            return {"price": price["mode"], "tiers": tiers}
        case kind:
            return {"price": kind, "amount": price["amount"]}


def invoiced() -> Iterator[Invoiced]:
    for exchange in exchanges("invoice-amounts"):
        if exchange.method != "GET":
            continue
        # The line of a flat price says nothing about usage.
        usage = Decimal(exchange.name.removeprefix("units-of-"))
        for invoice in exchange.answer["items"]:
            for line in invoice["lines"]:
                assert Decimal(line["quantity"]) == (1 if line["price"]["type"] == "flat" else usage)
                amount, details = Decimal(line["totals"]["total"]), len(line["children"])
                yield Invoiced(line["name"], invoice["currency"], line["price"], usage, amount, details)


LINES = tuple(invoiced())
USED = [line for line in LINES if line.usage]
UNUSED = [line for line in LINES if not line.usage]


def test_every_type_of_price_was_recorded_in_currencies_with_and_without_cents() -> None:
    assert {line.price.get("mode", line.price["type"]) for line in USED} == {
        "unit",
        "package",
        "flat",
        "graduated",
        "volume",
    }
    assert {digits_of(line.currency) for line in USED} == {0, 2, 3}
    assert (len(USED), len(UNUSED)) == (97, 7)


@pytest.mark.parametrize("line", USED, ids=str)
def test_the_estimate_of_a_customer_is_what_openmeter_invoices(line: Invoiced) -> None:
    assert line.prices().invoice(line.bill()) == line.amount


@pytest.mark.parametrize("line", USED, ids=str)
def test_only_the_rounding_of_lines_is_between_the_exact_worth_and_an_invoice(line: Invoiced) -> None:
    off = line.prices().charge(line.bill()) - line.amount
    assert abs(off) <= line.details * Decimal(1).scaleb(-digits_of(line.currency)) / 2


@pytest.mark.parametrize("line", UNUSED, ids=str)
def test_only_an_invoice_charges_a_flat_price_without_usage(line: Invoiced) -> None:
    [rate] = line.prices().rates
    flat = rate.amount if rate.price == "flat" else rate.tiers[0].flat if rate.tiers else Decimal(0)
    assert line.amount == rounded(flat, 2)
    assert line.prices().invoice(line.bill()) == 0
