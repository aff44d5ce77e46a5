"""The desired state: a pure function of the principals, whatever their order.

An ambiguous principal becomes a `Problem` that names both sides; the others are mapped nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import attrgetter

from syncd.core.model import DesiredCustomer, DesiredState, DesiredSubject, Principal
from syncd.core.ownership import ownership_metadata
from syncd.mapping.claims import Claim, claims_of, without_collisions
from syncd.mapping.details import details_of
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
