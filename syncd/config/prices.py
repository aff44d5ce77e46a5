"""Prices of usage, for estimates; what customers really pay is in the metering API's own plans."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from syncd.config.types import Key, Section

_SCHEMA = WithJsonSchema({"type": ["number", "string"], "examples": ["0.0002"]})
_MAX_DIGITS = 30


def _decimal(value: object) -> object:
    """Return a number of YAML as the decimal that was written: 0.1 is not 0.1000000000000000055."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number, such as 0.0002")  # noqa: TRY004 - pydantic wants ValueError
    try:
        found = Decimal(str(value).strip())
    except ArithmeticError:
        raise ValueError("must be a number, such as 0.0002") from None
    if not found.is_finite():
        raise ValueError("must be a finite number")
    if found < 0:
        raise ValueError("must not be negative")
    if len(found.as_tuple().digits) > _MAX_DIGITS or abs(found.adjusted()) > _MAX_DIGITS:
        raise ValueError(f"must have at most {_MAX_DIGITS} digits")
    return found


def _positive(value: object) -> object:
    found = _decimal(value)
    if not found:
        raise ValueError("must be greater than 0")
    return found


def _values(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {name: (entry,) if isinstance(entry, str) else entry for name, entry in value.items()}


Money = Annotated[Decimal, BeforeValidator(_decimal), _SCHEMA]
Quantity = Annotated[Decimal, BeforeValidator(_positive), _SCHEMA]
Where = Annotated[
    dict[str, tuple[str, ...]],
    BeforeValidator(_values),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
            },
        }
    ),
]


class TierConfig(Section):
    """A tier of a graduated or volume price."""

    up_to: Quantity | None = None
    """The last quantity in the tier, that included. Unset for the last tier."""
    amount: Money | None = None
    """Price of `per` units in the tier."""
    flat: Money | None = None
    """Charged once when the tier is reached."""

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if self.amount is None and self.flat is None:
            raise ValueError("needs amount, flat or both")
        return self


class RateConfig(Section):
    """The price of some usage of a meter."""

    meter: Key
    """Key of the meter, such as `kong_llm_tokens`."""
    where: Where = Field(default={})
    """Only usage with these values of the meter's dimensions: `{model: gpt-4o, type: [input, output]}`."""
    price: Literal["unit", "package", "flat", "graduated", "volume"] = "unit"
    """How the quantity of a customer and a month is charged, as OpenMeter's prices of these names are: each
    unit; each begun package; once, whatever the quantity; each tier at its own price; all at the price of
    the last tier that is reached."""
    amount: Money | None = None
    """Price of `per` units, of a package, or the flat price. Not with tiers."""
    per: Quantity = Decimal(1)
    """How many units `amount` is for: `1000000` for a price of a million tokens. The size of a package."""
    tiers: tuple[TierConfig, ...] = ()
    """The tiers of a graduated or volume price, the smallest first."""

    @field_validator("where")
    @classmethod
    def _names_values(cls, where: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, values in where.items():
            if not values:
                raise ValueError(f"names no value of {name}")
        return where

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.price not in ("graduated", "volume"):
            if self.tiers:
                raise ValueError(f"tiers belong to graduated and volume prices; price is {self.price}")
            if self.amount is None:
                raise ValueError(f"amount is required for a {self.price} price")
            return self
        if self.amount is not None:
            raise ValueError(f"amount belongs into the tiers of a {self.price} price")
        if not self.tiers:
            raise ValueError(f"tiers are required for a {self.price} price")
        bounds = [tier.up_to for tier in self.tiers]
        if bounds[-1] is not None or None in bounds[:-1]:
            raise ValueError("tiers: all but the last one need up_to, and the last one has none")
        known = [bound for bound in bounds if bound is not None]
        if known != sorted(set(known)):
            raise ValueError("tiers: each up_to must be greater than the one before")
        return self


class PricesConfig(Section):
    """Prices for estimates: usage is charged by the first rate that fits it, what none fits by none."""

    currency: str = Field(pattern=r"^[A-Z]{3}$")
    """Currency of all rates, such as `EUR`."""
    rates: tuple[RateConfig, ...] = Field(min_length=1)
    """The rates, in the order in which they are tried."""

    @field_validator("rates")
    @classmethod
    def _reachable(cls, rates: tuple[RateConfig, ...]) -> tuple[RateConfig, ...]:
        whole: dict[str, int] = {}
        for index, rate in enumerate(rates):
            if rate.meter in whole:
                raise ValueError(
                    f"rate {index} never applies: rate {whole[rate.meter]} already fits all usage of"
                    f" {rate.meter}. Put the rates with `where` first"
                )
            if not rate.where:
                whole[rate.meter] = index
        return rates
