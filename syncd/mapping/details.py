"""Details that a customer is created with: from the mapping file, else from templates, if all members agree.

A value that the metering API would refuse is omitted with a warning; it never stops a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from syncd.core.model import NO_DETAILS, CustomerDetails
from syncd.core.ownership import is_label
from syncd.mapping.claims import Claim
from syncd.mapping.rules import MappingRules, fill

_MAX_DESCRIPTION = 1024
_COUNTRY = re.compile(r"[A-Z]{2}")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
# ISO 4217, list one (SIX, published 2026-01-01), without funds, metals and units of account. The server
# refuses a customer with any other code: "invalid fiat currency".
_ISO_4217 = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD
CDF CHF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD
GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD
KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO
NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE
SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UYW UZS VED VES
VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG
"""
_CURRENCIES = frozenset(_ISO_4217.split())

Warn = Callable[[str], None]


def details_of(key: str, claims: Sequence[Claim], rules: MappingRules, warn: Warn) -> CustomerDetails:
    """Return the details of the customer of these claims; calls `warn` for each omitted value."""
    templates = rules.templates
    if not rules.assignments and not templates.creates:
        return NO_DETAILS
    rows = [claim.row.details for claim in claims if claim.row]
    warn_of_customer: Warn = lambda text: warn(f"customer {key!r}: {text}")  # noqa: E731

    def agreed(what: str, given: Sequence[str | None], template: str | None) -> str | None:
        values = {value for value in given if value}
        if not values and template:
            filled = [fill(template, claim.values) for claim in claims]
            if None in filled and any(filled):
                warn_of_customer(f"{what} is omitted: not every member can fill the template {template!r}")
                return None
            values = {value for value in filled if value}
        if len(values) > 1:
            listed = ", ".join(map(repr, sorted(values)))
            warn_of_customer(f"{what} is omitted: its members have different values: {listed}")
            return None
        return _printable(values.pop()) if values else None

    email = agreed("email", [row.email for row in rows], templates.email)
    currency = agreed("currency", [row.currency for row in rows], templates.currency)
    description = agreed("description", [row.description for row in rows], templates.description)
    address = {
        part: value
        for part in _names([row.billing_address for row in rows], templates.billing_address)
        if (
            value := agreed(
                part, [row.billing_address.get(part) for row in rows], templates.billing_address.get(part)
            )
        )
    }
    metadata = {
        name: value
        for name in _names([row.metadata for row in rows], templates.metadata)
        if (value := agreed(name, [row.metadata.get(name) for row in rows], templates.metadata.get(name)))
    }
    country = _fitting("country", address.pop("country", None), _COUNTRY.fullmatch, warn_of_customer)
    if country:
        address["country"] = country
    return CustomerDetails(
        email=_fitting("email", email, _EMAIL.fullmatch, warn_of_customer),
        currency=_fitting("currency", currency, _CURRENCIES.__contains__, warn_of_customer),
        description=_shortened(description, warn_of_customer),
        billing_address=address,
        metadata=_labels(metadata, warn_of_customer) if rules.labels_only else metadata,
    )


def _names(given: Sequence[Mapping[str, str]], templates: Mapping[str, str]) -> list[str]:
    return sorted({name for mapping in given for name in mapping} | set(templates))


def _fitting(what: str, value: str | None, accepted: Callable[[str], object], warn: Warn) -> str | None:
    if value is None or accepted(value):
        return value
    warn(f"{what} {value!r} is omitted: the metering API would refuse it")
    return None


def _shortened(description: str | None, warn: Warn) -> str | None:
    if description is None or len(description) <= _MAX_DESCRIPTION:
        return description
    warn(f"description is cut to {_MAX_DESCRIPTION} characters")
    return description[:_MAX_DESCRIPTION]


def _labels(metadata: Mapping[str, str], warn: Warn) -> dict[str, str]:
    for name, value in metadata.items():
        if not is_label(name, value):
            warn(f"metadata {name} {value!r} is omitted: it breaks the label rules of the v3 API")
    return {name: value for name, value in metadata.items() if is_label(name, value)}


def _printable(text: str) -> str | None:
    clean = "".join(char if char.isprintable() else " " for char in text).strip()
    return clean.encode("utf-8", "ignore").decode() or None
