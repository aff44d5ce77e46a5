"""Principals become desired customers: a pure function, whatever the order of the principals.

What cannot be mapped without doubt becomes a `Problem` that names both sides; it never stops the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import attrgetter

from openmeter_plugin.metering.subject import default_subject
from syncd.core.model import DesiredCustomer, DesiredState, DesiredSubject, Principal
from syncd.core.ownership import ownership_metadata
from syncd.mapping.claims import Claim, claims_of
from syncd.mapping.collisions import without_collisions
from syncd.mapping.details import details_of
from syncd.mapping.rules import MAX_NAME, MappingRules
from syncd.mapping.templates import fill

_CUSTOMER_KEY = attrgetter("customer_key")


def desired_state(principals: Iterable[Principal], rules: MappingRules) -> DesiredState:
    """Return the customers that these principals ask for."""
    claims, problems = claims_of(principals, rules)
    known = _known(claims)
    claims, collisions = without_collisions(claims)
    claims.sort(key=_CUSTOMER_KEY)
    warnings: list[str] = []
    customers = tuple(
        [_customer(key, list(inside), rules, warnings) for key, inside in groupby(claims, key=_CUSTOMER_KEY)]
    )
    ordered = sorted(problems + collisions, key=lambda problem: problem.reason)
    return DesiredState(customers, tuple(ordered), tuple(warnings), known)


def _known(claims: Iterable[Claim]) -> frozenset[str]:
    """Return the subjects of the members of groups from before the group had one of its own."""
    return frozenset(
        default_subject("consumer", claim.principal.id)
        for claim in claims
        if claim.shared and claim.principal.id
    )


def display_name(principal: Principal) -> str:
    """Return the name for people: username, else custom_id, else id; one line, at most 256 characters."""
    text = principal.username or principal.custom_id or principal.id
    return _name(text) or principal.id


def _name(text: str) -> str:
    # A name with control characters or stray blanks would come back different from some servers
    # and be "renamed" at every run.
    if not text.isprintable():
        text = "".join(char if char.isprintable() else " " for char in text)
    return text.strip()[:MAX_NAME].strip()


def _customer(key: str, claims: list[Claim], rules: MappingRules, warnings: list[str]) -> DesiredCustomer:
    if len(claims) > 1:
        claims.sort(key=lambda claim: claim.subject_key)
    # The principal that gives the customer its key also gives it its name and source-id.
    own = None
    for claim in claims:
        if claim.is_single or (claim.subject_key == key and not claim.shared):
            own = claim
            break
    namesake = own.principal if own else None
    ours = ownership_metadata(rules.owner_id, namesake.id if namesake else key)
    name = _customer_name(key, own, claims, rules, warnings)
    return DesiredCustomer(
        key=key,
        name=name,
        name_follows_source=namesake is not None and not (own and own.row and own.row.name),
        subjects=tuple(
            [_subject(claim, ours, name if claim is own else None, rules) for claim in _apart(claims)]
        ),
        marks=ours,
        details=details_of(key, claims, rules, warnings.append),
    )


def _apart(claims: list[Claim]) -> list[Claim]:
    """Return one claim for each subject: the members of a group may share one."""
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
    claim: Claim, customer_marks: Mapping[str, str], customer_name: str | None, rules: MappingRules
) -> DesiredSubject:
    """Describe the subject entity so that a server which copies it onto its customer changes nothing there.

    Servers with the subject hook (openmeter/customer/service/hooks/subjectcustomer.go) copy a
    subject's display name and metadata onto its customer at each upsert. So the entity carries its
    customer's marks, and a display name only where that is the customer's name as well (then
    `customer_name` is given), or where the configuration names a static subject.
    """
    principal = claim.principal
    if claim.shared:
        return DesiredSubject(claim.subject_key, None, customer_marks, f"consumers tagged {claim.group!r}")
    static = display_name(principal) if principal.kind == "static" and principal.username else None
    return DesiredSubject(
        key=claim.subject_key,
        display_name=customer_name or static,
        metadata={**principal.metadata, **customer_marks} if principal.metadata else customer_marks,
        principal=principal.label(),
        own_key=fill(rules.templates.key, claim.values) if rules.max_subjects_per_customer else None,
    )
