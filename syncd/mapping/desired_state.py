"""The desired state: a pure function of the principals, whatever their order.

An ambiguous principal becomes a `Problem` that names both sides; the others are mapped nevertheless.

Details that a customer is created with come from the mapping file, else from templates, if all members agree.
One that the metering API would refuse is omitted with a warning; it never stops a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter

from syncd.core.model import (
    NO_DETAILS,
    CustomerDetails,
    DesiredCustomer,
    DesiredState,
    DesiredSubject,
    Principal,
)
from syncd.core.ownership import is_label, ownership_metadata
from syncd.mapping.claims import Claim, claims_of, without_collisions
from syncd.mapping.rules import MAX_NAME, MappingRules, fill

_CUSTOMER_KEY = attrgetter("customer_key")


def desired_state(principals: Iterable[Principal], rules: MappingRules) -> DesiredState:
    """Return the customers that these principals call for."""
    principals = list(principals)
    claims, problems = claims_of(principals, rules)
    known = _known(claims, rules)
    claims, collisions = without_collisions(claims)
    claims.sort(key=_CUSTOMER_KEY)
    warnings = _rows_of_nobody(principals, rules)
    customers = tuple(
        [_customer(key, list(inside), rules, warnings) for key, inside in groupby(claims, key=_CUSTOMER_KEY)]
    )
    ordered = sorted(problems + collisions, key=lambda problem: problem.reason)
    prefixes = (rules.prefixes.consumer, rules.prefixes.application)
    return DesiredState(customers, tuple(ordered), tuple(warnings), known, prefixes)


def _rows_of_nobody(principals: Iterable[Principal], rules: MappingRules) -> list[str]:
    """Return a warning for each row of the mapping file that names no principal: mostly a slip of the pen."""
    if not rules.assignments:
        return []
    names = {(principal.kind, principal.id) for principal in principals}
    names |= {(principal.kind, principal.username) for principal in principals if principal.username}
    return [
        f"{row.place}: no source has {row.kind} {row.id or row.username!r}, so this row has no effect."
        f" Correct its {'id' if row.id else 'username'}, or remove the row"
        for row in rules.assignments
        if (row.kind, row.id or row.username) not in names
    ]


def _known(claims: Iterable[Claim], rules: MappingRules) -> frozenset[str]:
    """Return the subjects that group members had before their group got one of its own."""
    return frozenset(
        rules.prefixes.consumer + claim.principal.id
        for claim in claims
        if claim.shared and claim.principal.id
    )


def display_name(principal: Principal) -> str:
    """Return the display name: username, else custom_id, else id; one line, at most 256 characters."""
    text = principal.username or principal.custom_id or principal.id
    return _name(text) or principal.id


def _name(text: str) -> str:
    # Some servers return a name with control characters or stray blanks in another form, so that every run
    # would "rename" it.
    if not text.isprintable():
        text = "".join(char if char.isprintable() else " " for char in text)
    return text.strip()[:MAX_NAME].strip()


def _customer(key: str, claims: list[Claim], rules: MappingRules, warnings: list[str]) -> DesiredCustomer:
    if len(claims) > 1:
        claims.sort(key=lambda claim: claim.subject_key)
    # The principal that determines the key also determines name and source-id.
    own = None
    for claim in claims:
        if claim.is_single or (claim.subject_key == key and not claim.shared):
            own = claim
            break
    namesake = own.principal if own else None
    ownership = ownership_metadata(rules.owner_id, namesake.id if namesake and namesake.id else key)
    name = _customer_name(key, own, claims, rules, warnings)
    return DesiredCustomer(
        key=key,
        name=name,
        name_follows_source=namesake is not None and not (own and own.row and own.row.name),
        subjects=tuple(
            [
                _subject(claim, ownership, name if claim is own else None, rules)
                for claim in _by_subject(claims)
            ]
        ),
        ownership=ownership,
        details=details_of(key, claims, rules, warnings.append),
    )


def _by_subject(claims: list[Claim]) -> list[Claim]:
    """Return one claim for each subject: members of a group may share one."""
    if len(claims) == 1 or not any(claim.shared for claim in claims):
        return claims
    return list({claim.subject_key: claim for claim in claims}.values())


def _customer_name(
    key: str, own: Claim | None, claims: list[Claim], rules: MappingRules, warnings: list[str]
) -> str:
    given = (
        sorted({claim.row.name for claim in claims if claim.row and claim.row.name})
        if rules.assignments
        else ()
    )
    if len(given) > 1:
        warnings.append(f"customer {key!r}: its rows of the mapping file name it {' and '.join(given)}")
    elif given:
        return _name(given[0]) or key
    if own is None:
        group = next((claim.group for claim in claims if claim.group), key)
        return _name(fill(rules.templates.group_name, {"group": group}) or key) or key
    if rules.templates.name and (text := _name(fill(rules.templates.name, own.values) or "")):
        return text
    return display_name(own.principal)


def _subject(
    claim: Claim, ownership: Mapping[str, str], customer_name: str | None, rules: MappingRules
) -> DesiredSubject:
    """Return the subject, made so that copying its entity onto its customer changes nothing there.

    Servers with the subject hook (openmeter/customer/service/hooks/subjectcustomer.go) copy a
    subject's display name and metadata onto its customer at each upsert. So the entity carries its
    customer's ownership metadata, and a display name only if that is the customer's name as well (then
    `customer_name` is given), or if the configuration names a static subject.
    """
    principal = claim.principal
    if claim.shared:
        return DesiredSubject(claim.subject_key, None, ownership, f"consumers tagged {claim.group!r}")
    static = display_name(principal) if principal.kind == "static" and principal.username else None
    return DesiredSubject(
        key=claim.subject_key,
        display_name=customer_name or static,
        metadata={**principal.metadata, **ownership} if principal.metadata else ownership,
        principal=principal.label(),
        own_key=fill(rules.templates.key, claim.values) if rules.max_subjects_per_customer else None,
    )


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
