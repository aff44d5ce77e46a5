"""What a customer is created with: by the mapping file, else by templates, where all members agree.

What the metering API would not take is left out with a warning; it never stops a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from syncd.core.model import NO_DETAILS, CustomerDetails
from syncd.core.ownership import is_label
from syncd.mapping.claims import Claim
from syncd.mapping.rules import MappingRules
from syncd.mapping.templates import fill

_MAX_DESCRIPTION = 1024
_CURRENCY = re.compile(r"[A-Z]{3}")
_COUNTRY = re.compile(r"[A-Z]{2}")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")

Warn = Callable[[str], None]


def details_of(key: str, claims: Sequence[Claim], rules: MappingRules, warn: Warn) -> CustomerDetails:
    """Return the details of the customer of these claims; `warn` is told what is left out."""
    templates = rules.templates
    if not rules.assignments and not templates.creates:
        return NO_DETAILS
    rows = [claim.row.details for claim in claims if claim.row]
    tell: Warn = lambda text: warn(f"customer {key!r}: {text}")  # noqa: E731

    def agreed(what: str, given: Sequence[str | None], template: str | None) -> str | None:
        values = {value for value in given if value}
        if not values and template:
            filled = [fill(template, claim.values) for claim in claims]
            if None in filled and any(filled):
                tell(f"{what} is left out: not every member has what the template {template!r} names")
                return None
            values = {value for value in filled if value}
        if len(values) > 1:
            tell(f"{what} is left out: its members give {', '.join(map(repr, sorted(values)))}")
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
    country = _fitting("country", address.pop("country", None), _COUNTRY, tell)
    if country:
        address["country"] = country
    return CustomerDetails(
        email=_fitting("email", email, _EMAIL, tell),
        currency=_fitting("currency", currency, _CURRENCY, tell),
        description=_shortened(description, tell),
        billing_address=address,
        metadata=_labels(metadata, tell) if rules.labels_only else metadata,
    )


def _names(given: Sequence[Mapping[str, str]], templates: Mapping[str, str]) -> list[str]:
    return sorted({name for mapping in given for name in mapping} | set(templates))


def _fitting(what: str, value: str | None, form: re.Pattern[str], tell: Warn) -> str | None:
    if value is None or form.fullmatch(value):
        return value
    tell(f"{what} {value!r} is left out: the metering API would refuse it")
    return None


def _shortened(description: str | None, tell: Warn) -> str | None:
    if description is None or len(description) <= _MAX_DESCRIPTION:
        return description
    tell(f"description is cut to {_MAX_DESCRIPTION} characters")
    return description[:_MAX_DESCRIPTION]


def _labels(metadata: Mapping[str, str], tell: Warn) -> dict[str, str]:
    for name, value in metadata.items():
        if not is_label(name, value):
            tell(f"metadata {name} {value!r} is left out: it breaks the label rules of the v3 API")
    return {name: value for name, value in metadata.items() if is_label(name, value)}


def _printable(text: str) -> str | None:
    clean = "".join(char if char.isprintable() else " " for char in text).strip()
    return clean.encode("utf-8", "ignore").decode() or None
