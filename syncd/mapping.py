"""Principals become desired customers: a pure function, whatever the order of the principals.

What cannot be mapped without doubt becomes a `Problem` that names both sides; it never stops the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from openmeter_plugin.subject import CUSTOMER_TAG, default_subject, tagged_customers
from syncd.model import DesiredCustomer, DesiredSubject, DesiredWorld, Principal, Problem
from syncd.ownership import marks

GroupBy = Literal["none", "tag"]
SubjectField = Literal["id", "username", "custom_id"]

MAX_KEY = 256
MAX_NAME = 256
"""Both from openmeter-v1.yaml, CustomerCreate."""


@dataclass(frozen=True, slots=True)
class MappingRules:
    """The settings that decide the mapping; `anonymous_consumers` holds ids or usernames."""

    owner_id: str
    group_by: GroupBy = "none"
    subject_field: SubjectField = "id"
    include_anonymous: bool = False
    anonymous_consumers: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class _Claim:
    """What one principal asks for: its subject, in this customer."""

    principal: Principal
    subject_key: str
    customer_key: str


def desired_world(principals: Iterable[Principal], rules: MappingRules) -> DesiredWorld:
    """Return the customers that these principals ask for."""
    problems: list[Problem] = []
    claims: list[_Claim] = []
    for principal in _distinct(principals):
        if _is_left_out(principal, rules):
            continue
        claim = _claim(principal, rules)
        if isinstance(claim, Problem):
            problems.append(claim)
        else:
            claims.append(claim)
    claims, contested = _without_shared_subjects(claims)
    claims, crossed = _without_crossed_keys(claims)
    buckets: dict[str, list[_Claim]] = defaultdict(list)
    for claim in claims:
        buckets[claim.customer_key].append(claim)
    customers = tuple(_customer(key, buckets[key], rules.owner_id) for key in sorted(buckets))
    ordered = sorted(problems + contested + crossed, key=lambda problem: problem.reason)
    return DesiredWorld(customers, tuple(ordered))


def display_name(principal: Principal) -> str:
    """Return the name for people: username, else custom_id, else id; one line, at most 256 characters."""
    text = principal.username or principal.custom_id or principal.id
    # A name with control characters or stray blanks would come back different from some servers
    # and be "renamed" at every run.
    clean = "".join(char if char.isprintable() else " " for char in text).strip()
    return clean[:MAX_NAME].strip() or principal.id


def _distinct(principals: Iterable[Principal]) -> list[Principal]:
    """Drop a consumer or application that two sources describe alike: it is the same one, read twice."""
    seen: dict[tuple[str, str], list[Principal]] = {}
    result: list[Principal] = []
    for principal in sorted(principals, key=_order):
        if principal.kind == "static" or not principal.id:
            result.append(principal)
            continue
        variants = seen.setdefault((principal.kind, principal.id), [])
        same = next((i for i, other in enumerate(variants) if _same(principal, other)), None)
        if same is None:
            variants.append(principal)
        elif principal.anonymous:
            variants[same] = replace(variants[same], anonymous=True)
    return result + [principal for variants in seen.values() for principal in variants]


def _order(principal: Principal) -> tuple[str, ...]:
    """Return what sorts principals alike in whatever order the sources name them."""
    names = (principal.username or "", principal.custom_id or "", principal.customer or "")
    return (principal.kind, principal.id, principal.source, *names, *sorted(principal.tags))


def _same(one: Principal, other: Principal) -> bool:
    return (
        one.username == other.username
        and one.custom_id == other.custom_id
        and sorted(one.tags) == sorted(other.tags)
    )


def _is_left_out(principal: Principal, rules: MappingRules) -> bool:
    if principal.kind != "consumer" or rules.include_anonymous:
        return False
    names = {principal.id, principal.username} - {None, ""}
    return principal.anonymous or bool(names & rules.anonymous_consumers)


def _claim(principal: Principal, rules: MappingRules) -> _Claim | Problem:
    subject_key = _subject_key(principal, rules)
    if isinstance(subject_key, Problem):
        return subject_key
    customer_key = _customer_key(principal, subject_key, rules)
    if isinstance(customer_key, Problem):
        return customer_key
    for what, key in (("subject", subject_key), ("customer key", customer_key)):
        if fault := _fault_of_key(key):
            reason = f"{principal.describe()}: its {what} {fault}; change it at the source"
            return Problem(customer_key[:MAX_KEY], (subject_key[:MAX_KEY],), reason)
    return _Claim(principal, subject_key, customer_key)


def _subject_key(principal: Principal, rules: MappingRules) -> str | Problem:
    if principal.kind == "static":
        return principal.id
    if principal.kind == "consumer" and rules.subject_field != "id":
        value = principal.username if rules.subject_field == "username" else principal.custom_id
        if value:
            return value
        reason = (
            f"{principal.describe()} has no {rules.subject_field}, and mapping.subject_field is"
            f" {rules.subject_field}: its usage has no subject. Give it one in Kong"
        )
        return Problem(None, (), reason)
    if not principal.id:
        reason = (
            f"{principal.describe()} has neither an id nor a username, so Kong gives it another id at each"
            " load of the file. Give it an id"
        )
        return Problem(None, (), reason)
    return default_subject(principal.kind, principal.id)


def _customer_key(principal: Principal, subject_key: str, rules: MappingRules) -> str | Problem:
    if principal.kind == "static":
        return principal.customer or subject_key
    if rules.group_by == "none":
        return subject_key
    tagged = tagged_customers(principal.tags)
    if not tagged:
        return subject_key
    if len(tagged) > 1 or "" in tagged:
        said = ", ".join(f"'{CUSTOMER_TAG}{key}'" for key in sorted(tagged))
        reason = f"{principal.describe()} must carry one tag {CUSTOMER_TAG}<key>, but carries {said}"
        return Problem(None, (subject_key,), reason)
    return tagged.pop()


def _fault_of_key(key: str) -> str | None:
    if not key.strip():
        return "is empty"
    if len(key) > MAX_KEY:
        return f"has {len(key)} characters, and {MAX_KEY} is the limit of the metering API"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return None


def _without_shared_subjects(claims: list[_Claim]) -> tuple[list[_Claim], list[Problem]]:
    """Take out the principals that share one subject: whose usage it is cannot be told."""
    by_subject: dict[str, list[_Claim]] = defaultdict(list)
    for claim in claims:
        by_subject[claim.subject_key].append(claim)
    problems = [
        Problem(
            sharing[0].customer_key if len({claim.customer_key for claim in sharing}) == 1 else None,
            (subject_key,),
            f"{_and(claim.principal.describe() for claim in sharing)} have the same subject {subject_key!r}:"
            " their usage cannot be told apart. Give one of them another subject, or leave one source out",
        )
        for subject_key, sharing in by_subject.items()
        if len(sharing) > 1
    ]
    return [sharing[0] for sharing in by_subject.values() if len(sharing) == 1], problems


def _without_crossed_keys(claims: list[_Claim]) -> tuple[list[_Claim], list[Problem]]:
    """Take out customers whose key is the subject of another customer: the API refuses such a pair."""
    home = {claim.subject_key: claim for claim in claims}
    members: dict[str, list[_Claim]] = defaultdict(list)
    for claim in claims:
        members[claim.customer_key].append(claim)
    problems: list[Problem] = []
    crossed: set[str] = set()
    for key, inside in members.items():
        other = home.get(key)
        if other is None or other.customer_key == key:
            continue
        crossed |= {key, other.customer_key}
        who = _and(claim.principal.describe() for claim in inside)
        reason = (
            f"the customer key {key!r} of {who} is also the subject of {other.principal.describe()},"
            f" who belongs to customer {other.customer_key!r}. Rename one of the two"
        )
        keys = [claim.subject_key for claim in inside + members[other.customer_key]]
        problems.append(Problem(key, tuple(sorted(keys)), reason))
    return [claim for claim in claims if claim.customer_key not in crossed], problems


def _customer(key: str, claims: list[_Claim], owner_id: str) -> DesiredCustomer:
    claims = sorted(claims, key=lambda claim: claim.subject_key)
    # The principal that gives the customer its key also gives it its name and source-id.
    namesake = next((claim.principal for claim in claims if claim.subject_key == key), None)
    ours = marks(owner_id, namesake.id if namesake else key)
    return DesiredCustomer(
        key=key,
        name=display_name(namesake) if namesake else key,
        name_follows_source=namesake is not None,
        subjects=tuple(_subject(claim, ours, namesake) for claim in claims),
        marks=ours,
    )


def _subject(claim: _Claim, customer_marks: Mapping[str, str], namesake: Principal | None) -> DesiredSubject:
    """Describe the subject entity so that a server which copies it onto its customer changes nothing there.

    Servers with the subject hook (openmeter/customer/service/hooks/subjectcustomer.go) copy a
    subject's display name and metadata onto its customer at each upsert. So the entity carries its
    customer's marks, and a display name only where that is the customer's name as well, or where
    the configuration names a static subject.
    """
    principal = claim.principal
    named = principal is namesake or (principal.kind == "static" and principal.username)
    return DesiredSubject(
        key=claim.subject_key,
        display_name=display_name(principal) if named else None,
        metadata={**principal.metadata, **customer_marks},
        principal=principal.label(),
    )


def _and(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
