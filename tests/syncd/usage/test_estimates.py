"""Estimates by payer, read from a metering API."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import permutations
from typing import cast

import pytest

from syncd.config.prices import PricesConfig
from syncd.metering.base import GroupedValue, Meter, MeteringApi
from syncd.usage.estimates import Estimate, money, plain, prices_of, read_estimate

SINCE, UNTIL = datetime(2026, 10, 20, 12, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
TIERED = {
    "meter": "calls",
    "price": "graduated",
    "tiers": [{"up_to": 10, "amount": 0}, {"amount": 1}],
}
BY_MODEL = {"meter": "tokens", "where": {"model": "large"}, "amount": "0.1"}


class Api:
    """Eight calls a month of each of two subjects, and tokens of two models."""

    def __init__(
        self, *left_out: str, aggregation: str = "sum", dimensions: Sequence[str] = ("model",)
    ) -> None:
        self.asked: list[tuple[str, tuple[str, ...], str, str]] = []
        named = {name: f"$.{name}" for name in dimensions}
        found = (
            Meter("calls", "", "", "count", "t"),
            Meter("tokens", "", "", aggregation, "t", "$.n", named),
        )
        self._meters = {meter.key: meter for meter in found if meter.key not in left_out}

    def meters(self) -> dict[str, Meter]:
        return self._meters

    def grouped_usage(
        self, meter: Meter, dimensions: Sequence[str], since: str, until: str
    ) -> list[GroupedValue]:
        self.asked.append((meter.key, tuple(dimensions), since, until))
        if meter.key == "calls":
            return [GroupedValue(subject, (), 8) for subject in ("a", "b", "stray")]
        return [GroupedValue("a", tuple(model for _ in dimensions), 5) for model in ("large", "small")]


def estimate(api: Api, since: datetime | None = SINCE, until: datetime = UNTIL) -> Estimate:
    config = {"currency": "EUR", "rates": [TIERED, BY_MODEL]}
    prices = prices_of(PricesConfig.model_validate(config))
    assert prices is not None
    return read_estimate(cast("MeteringApi", api), prices, {"a": "acme", "b": "acme"}, since, until)


def test_a_customer_pays_for_all_its_subjects_in_each_calendar_month_of_its_own() -> None:
    api = Api()
    found = estimate(api)
    assert found.customers == {"acme": Decimal(13)}, "6 of 16 calls and 5 tokens of 0.1, in two months"
    assert found.unbilled == {"stray": 0}, "8 calls a month are free"
    assert (found.total, found.unpriced, found.gaps) == (Decimal(13), {"tokens": 10}, [])
    october = ("2026-10-20T12:00:00Z", "2026-11-01T00:00:00Z")
    november = ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
    assert api.asked == [
        ("calls", (), *october),
        ("tokens", ("model",), *october),
        ("calls", (), *november),
        ("tokens", ("model",), *november),
    ]


@pytest.mark.parametrize(
    ("api", "gap", "total"),
    [
        (Api("tokens"), "the metering API has no meter tokens", 12),
        (Api(aggregation="max"), "meter tokens neither counts nor sums", 12),
        (Api(dimensions=()), "meter tokens has no dimension model", 12),
    ],
)
def test_what_cannot_be_estimated_is_named_and_left_out(api: Api, gap: str, total: int) -> None:
    found = estimate(api)
    assert (found.gaps, found.total) == ([gap], Decimal(total))
    assert found.left_out()[-1] == f"The estimate is incomplete: {gap}."


def test_what_has_no_price_adds_up_the_same_in_any_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        GroupedValue(subject, ("small",), value) for subject, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))
    ]
    sums = set()
    for order in permutations(rows):
        monkeypatch.setattr(Api, "grouped_usage", lambda *_, found=order: list(found))
        sums.add(estimate(Api("calls"), datetime(2026, 11, 1, tzinfo=UTC)).unpriced["tokens"])
    assert len(sums) == 1


@pytest.mark.parametrize("since", [None, UNTIL - timedelta(days=801)])
def test_a_period_without_an_end_to_its_months_asks_the_metering_api_for_nothing(
    since: datetime | None,
) -> None:
    api = Api()
    found = estimate(api, since)
    assert not found.is_known
    assert found.of_customer("acme") is None
    assert found.gaps
    assert api.asked == []


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [
        ("1204.5", "EUR", "1,204.50 EUR"),
        ("0.0000123", "EUR", "0.0000123 EUR"),
        ("1204.5", "JPY", "1,205 JPY"),
        ("1204.5", "KWD", "1,204.500 KWD"),
        ("0", "EUR", "0.00 EUR"),
        ("123456789012345678901234567890.125", "EUR", "123,456,789,012,345,678,901,234,567,890.13 EUR"),
    ],
)
def test_amounts_are_shown_with_the_digits_of_their_currency(amount: str, currency: str, text: str) -> None:
    assert money(Decimal(amount), currency) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("1204.50", "1204.5"),
        ("0.00", "0"),
        ("1E+3", "1000"),
        ("123456789012345678901234567890.125", "123456789012345678901234567890.125"),
    ],
)
def test_programs_get_amounts_in_full(amount: str, text: str) -> None:
    assert plain(Decimal(amount)) == text


def test_each_line_of_a_customers_month_is_rounded_and_what_nobody_pays_adds_up_exactly() -> None:
    rates = [{"meter": "a", "amount": "0.004"}, {"meter": "b", "amount": "0.005"}]
    prices = prices_of(PricesConfig.model_validate({"currency": "EUR", "rates": rates}))
    assert prices is not None
    found = Estimate(prices, {"paid": "acme"})
    for _month in range(2):
        for meter in ("a", "b"):
            found.add(meter, "paid", (), 1.0)
            found.add(meter, "stray", (), 1.0)
        found.end_month()
    assert found.customers == {"acme": Decimal("0.02")}, "0.00 and 0.01, in two months"
    assert found.unbilled == {"stray": Decimal("0.018")}
