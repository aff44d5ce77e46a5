"""Claims: the subject and the customer of each principal, and which claims contradict each other.

An ambiguous principal becomes a Problem; so do claims that contradict each other, which names both sides.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from msgspec import Struct, structs

from openmeter_plugin.metering.subject import CUSTOMER_TAG, tagged_customers
from syncd.core.model import Principal, Problem
from syncd.mapping.rules import (
    MAX_KEY,
    Assignment,
    MappingRules,
    assignment_of,
    fields_of,
    filled,
    missing_fields,
)

Index = Mapping[tuple[str, str, str], Assignment]


class Claim(Struct, frozen=True, gc=False):
    """A principal, its subject and its customer; `group` names the group that it is in, if any.

    `row` is its row of the mapping file. `joined`: the customer comes from the application that the
    consumer represents on a gateway, or the reverse. `shared`: the whole group has this subject
    (`mapping.subject_field: tag`).
    """

    principal: Principal
    subject_key: str
    customer_key: str
    group: str | None = None
    row: Assignment | None = None
    joined: bool = False
    shared: bool = False

    @property
    def values(self) -> Mapping[str, str]:
        """Return the values of the template fields; not stored, since there may be 100,000 claims."""
        return fields_of(self.principal, self.subject_key, self.group)

    @property
    def is_single(self) -> bool:
        """Return whether it claims a customer of its own, which is named after it."""
        own = self.principal.customer in (None, self.subject_key)
        return own and self.group is None and not self.joined

    @property
    def is_keyed_by_identity(self) -> bool:
        """Return whether its customer's key is unique to it: its subject, or made by `DEFAULT_KEY`."""
        unique = (self.subject_key, f"{self.principal.kind}-{self.principal.id}")
        return self.customer_key in unique


def claims_of(principals: Iterable[Principal], rules: MappingRules) -> tuple[list[Claim], list[Problem]]:
    """Return the claims of all principals that are not excluded, and the problems of the others."""
    index = rules.index()
    claims: list[Claim] = []
    problems: list[Problem] = []
    for principal in distinct(principals):
        if is_excluded(principal, rules):
            continue
        found = _claim(principal, rules, index)
        if isinstance(found, Claim):
            claims.append(found)
        else:
            problems.append(found)
    return _with_applications(claims, problems), problems


def subjects_of(principals: Iterable[Principal], rules: MappingRules) -> Iterator[tuple[str, Principal]]:
    """Yield each principal with its subject, if it has one: also of those without a customer.

    Members of a group may have the same subject, and so may principals that contradict each other.
    """
    index = rules.index()
    for principal in distinct(principals):
        group: str | Problem | None = None
        if _shares_subject(principal, rules):
            group = _group(principal, rules, assignment_of(principal, index) if index else None)
        found = group if isinstance(group, str) else _subject_key(principal, rules)
        if isinstance(found, str) and found:
            yield found, principal


def _shares_subject(principal: Principal, rules: MappingRules) -> bool:
    """Return whether its subject is that of its group, if it has one."""
    return rules.subject_field == "tag" and principal.kind == "consumer"


def distinct(principals: Iterable[Principal]) -> list[Principal]:
    """Drop a consumer or application that two sources describe alike: it is the same one, read twice.

    For a consumer that a portal names only through its application, Kong's own description is used.
    """
    principals = list(principals)
    if len({(principal.kind, principal.id) for principal in principals}) == len(principals):
        return principals
    unmerged: list[Principal] = []
    found: dict[tuple[str, str], list[Principal]] = {}
    for principal in principals:
        if principal.kind == "static" or not principal.id:
            unmerged.append(principal)
        else:
            found.setdefault((principal.kind, principal.id), []).append(principal)
    return unmerged + [principal for named in found.values() for principal in _variants(named)]


def _variants(named: list[Principal]) -> list[Principal]:
    """Merge the descriptions of one id, as far as they agree."""
    if len(named) == 1:
        return named
    variants: list[Principal] = []
    for principal in sorted(named, key=_order):
        same = next((i for i, other in enumerate(variants) if _same(principal, other)), None)
        if same is None:
            variants.append(principal)
        else:
            variants[same] = _merged(variants[same], principal)
    return variants


def _order(principal: Principal) -> tuple[str, ...]:
    """Return a sort key that does not depend on the order of the sources."""
    names = (principal.username or "", principal.custom_id or "", principal.customer or "")
    last = (principal.application or "", principal.owner or "")
    return (principal.kind, principal.id, principal.source, *names, *last, *sorted(principal.tags))


def _same(one: Principal, other: Principal) -> bool:
    if one.application and other.application:
        return one.application == other.application
    if one.application or other.application:
        return True
    return (
        one.username == other.username
        and one.custom_id == other.custom_id
        and sorted(one.tags) == sorted(other.tags)
        and one.owner == other.owner
    )


def _merged(one: Principal, other: Principal) -> Principal:
    if one.application and not other.application:
        one, other = other, one
    merged = structs.replace(one, anonymous=one.anonymous or other.anonymous)
    return structs.replace(merged, application=one.application or other.application)


def is_excluded(principal: Principal, rules: MappingRules) -> bool:
    """Return whether it is an anonymous consumer, which gets no customer."""
    if principal.kind != "consumer" or rules.include_anonymous:
        return False
    if principal.anonymous or not rules.anonymous_consumers:
        return principal.anonymous
    names = {principal.id, principal.username} - {None, ""}
    return not rules.anonymous_consumers.isdisjoint(names)


def _claim(principal: Principal, rules: MappingRules, index: Index) -> Claim | Problem:
    row = assignment_of(principal, index) if index else None
    group = _group(principal, rules, row)
    shared = _shares_subject(principal, rules) and isinstance(group, str)
    subject_key = group if shared and isinstance(group, str) else _subject_key(principal, rules)
    if isinstance(subject_key, Problem):
        return subject_key
    if isinstance(group, Problem):
        return replace(group, subject_keys=(subject_key,))
    template = rules.templates.key if group is None else rules.templates.group_key
    customer_key = principal.customer or filled(template, principal, subject_key, group)
    if customer_key is None:
        absent = " and ".join(missing_fields(template, fields_of(principal, subject_key, group)))
        reason = (
            f"{principal.describe()} has no {absent}, and the template {template!r} of its customer's key"
        )
        return Problem(None, (subject_key,), f"{reason} needs it")
    if not (_is_plain(subject_key) and _is_plain(customer_key)):
        for what, key in (("subject", subject_key), ("customer key", customer_key)):
            if fault := _key_fault(key):
                reason = f"{principal.describe()}: its {what} {fault}; change it at the source"
                return Problem(customer_key[:MAX_KEY], (subject_key[:MAX_KEY],), reason)
    return Claim(principal, subject_key, customer_key, group, row, shared=shared)


def _subject_key(principal: Principal, rules: MappingRules) -> str | Problem:
    if principal.kind == "static":
        return principal.id
    if principal.kind == "consumer" and rules.subject_field in ("username", "custom_id"):
        value = principal.username if rules.subject_field == "username" else principal.custom_id
        if value:
            return value
        reason = (
            f"{principal.describe()} has no {rules.subject_field}, and mapping.subject_field is"
            f" {rules.subject_field}: its usage has no subject. Give it one in Kong"
        )
        return Problem(None, (), reason)
    if not principal.id:
        why = (
            "comes from a decK file without an id, so Kong gave it a random one. Give it an id there, read it"
            " from the source kong-admin or konnect-consumers, or use mapping.subject_field: username"
            if principal.username
            else "has neither an id nor a username, so Kong gives it another id at each load of the file."
            " Give it an id"
        )
        return Problem(None, (), f"{principal.describe()} {why}")
    return rules.prefixes.subject(principal.kind, principal.id)


def _group(principal: Principal, rules: MappingRules, row: Assignment | None) -> str | Problem | None:
    """Return the group of the principal, None if it has a customer of its own."""
    if principal.kind == "static":
        return None
    match rules.group_by:
        case "custom_id":
            return principal.custom_id
        case "owner":
            return principal.owner
        case "file":
            return row.customer if row else None
        case "tag":
            return _tagged(principal)
        case _:
            return None


def _tagged(principal: Principal) -> str | Problem | None:
    if CUSTOMER_TAG not in "".join(principal.tags):
        return None
    tagged = tagged_customers(principal.tags)
    if not tagged:
        return None
    if len(tagged) > 1 or "" in tagged:
        listed = ", ".join(f"'{CUSTOMER_TAG}{key}'" for key in sorted(tagged))
        return Problem(
            None, (), f"{principal.describe()} must carry one tag {CUSTOMER_TAG}<key>, but carries {listed}"
        )
    return tagged.pop()


def _is_plain(key: str) -> bool:
    """Return whether a key is certainly valid, by a cheap check."""
    return key.isascii() and key.isprintable() and 0 < len(key) <= MAX_KEY and not key.isspace()


def _key_fault(key: str) -> str | None:
    if not key.strip():
        return "is empty"
    if len(key) > MAX_KEY:
        return f"has {len(key)} characters; the metering API allows {MAX_KEY}"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    # The metering API answers 500 to NUL in any text, since PostgreSQL cannot store it. Other control
    # characters can be stored, and then are invisible in a list, an invoice or a log.
    control = next((char for char in key if unicodedata.category(char) == "Cc"), None)
    if control is not None:
        return f"contains the control character U+{ord(control):04X}"
    return None


def _with_applications(claims: list[Claim], problems: list[Problem]) -> list[Claim]:
    """Put a consumer that represents an application on a gateway into that application's customer.

    Usage may come under either subject. If both are in groups, the groups have to be the same.
    """
    applications = {claim.principal.id: claim for claim in claims if claim.principal.kind == "application"}
    if not applications:
        return claims
    claims = sorted(claims, key=lambda claim: _order(claim.principal))
    applications = {claim.principal.id: claim for claim in claims if claim.principal.kind == "application"}
    agreed: list[Claim] = []
    moved: dict[str, Claim] = {}
    for claim in claims:
        home = applications.get(claim.principal.application or "")
        if home is None or claim.principal.kind != "consumer":
            agreed.append(claim)
        elif claim.group is None:
            agreed.append(
                structs.replace(claim, customer_key=home.customer_key, group=home.group, joined=True)
            )
        elif home.group is None:
            moved.setdefault(home.principal.id, claim)
            agreed.append(claim)
        elif claim.customer_key == home.customer_key:
            agreed.append(claim)
        else:
            reason = (
                f"{claim.principal.describe()} belongs to customer {claim.customer_key!r}, but the"
                f" application it is mapped to, {home.principal.describe()}, belongs to"
                f" {home.customer_key!r}. Put both into the same customer"
            )
            problems.append(Problem(claim.customer_key, (claim.subject_key,), reason))
    return [_moved(claim, moved.get(claim.principal.id)) for claim in agreed]


def _moved(claim: Claim, to: Claim | None) -> Claim:
    if to is None or claim.principal.kind != "application":
        return claim
    return structs.replace(claim, customer_key=to.customer_key, group=to.group, joined=True)


def without_collisions(claims: list[Claim]) -> tuple[list[Claim], list[Problem]]:
    """Return the claims that do not contradict each other, and the problems of the others."""
    claims, contested = _without_shared_subjects(claims)
    claims, same_key = _without_accidental_groups(claims)
    claims, crossed = _without_crossed_keys(claims)
    return claims, contested + same_key + crossed


def _without_shared_subjects(claims: list[Claim]) -> tuple[list[Claim], list[Problem]]:
    """Remove principals that share one subject: their usage cannot be distinguished."""
    if len({claim.subject_key for claim in claims}) == len(claims):
        return claims, []
    by_subject: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        by_subject[claim.subject_key].append(claim)
    contested = {key: sharing for key, sharing in by_subject.items() if _is_contested(sharing)}
    problems = [
        Problem(
            sharing[0].customer_key if len({claim.customer_key for claim in sharing}) == 1 else None,
            (subject_key,),
            f"{_names(sharing)} have the same subject {subject_key!r}, so their usage cannot be"
            " distinguished. Give one of them another subject, or remove one source",
        )
        for subject_key, sharing in contested.items()
    ]
    return [claim for claim in claims if claim.subject_key not in contested], problems


def _is_contested(sharing: list[Claim]) -> bool:
    """Return whether several claim one subject, other than as members of one group that sends it."""
    return len(sharing) > 1 and not all(claim.shared for claim in sharing)


def _without_accidental_groups(claims: list[Claim]) -> tuple[list[Claim], list[Problem]]:
    """Remove ungrouped principals that share a customer key only because of a template.

    A group with the key of a principal's own customer is intended if that key is the principal's subject
    or contains its id (``customer:consumer-<id>``), and accidental if a template made the key of a name.
    """
    problems: list[Problem] = []
    taken: set[str] = set()
    for key, inside in _shared(claims).items():
        single = [claim for claim in inside if claim.is_single]
        others = [claim for claim in inside if not claim.is_single and not claim.joined]
        by_template = [claim for claim in single if not claim.is_keyed_by_identity]
        if len(single) > 1 or (by_template and others):
            accidental = single + (others if by_template else [])
            reason = (
                f"{_names(accidental)} would share the customer {key!r}, though nothing groups them."
                " Use a key template that gives each its own key, or group them on purpose"
            )
            problems.append(Problem(key, tuple(sorted(claim.subject_key for claim in inside)), reason))
            taken.add(key)
    return [claim for claim in claims if claim.customer_key not in taken], problems


def _without_crossed_keys(claims: list[Claim]) -> tuple[list[Claim], list[Problem]]:
    """Remove customers whose key is the subject of another customer: the API refuses such a pair."""
    home = {claim.subject_key: claim for claim in claims}
    # Most keys are not another customer's subject, and need no further check.
    if not any(home[c.customer_key].customer_key != c.customer_key for c in claims if c.customer_key in home):
        return claims, []
    members = _by_customer(claims)
    problems: list[Problem] = []
    crossed: set[str] = set()
    for key, inside in members.items():
        other = home.get(key)
        if other is None or other.customer_key == key:
            continue
        crossed |= {key, other.customer_key}
        reason = (
            f"the customer key {key!r} of {_names(inside)} is also the subject of"
            f" {other.principal.describe()}, which belongs to customer {other.customer_key!r}."
            " Rename one of the two"
        )
        keys = [claim.subject_key for claim in inside + members[other.customer_key]]
        problems.append(Problem(key, tuple(sorted(keys)), reason))
    return [claim for claim in claims if claim.customer_key not in crossed], problems


def _shared(claims: list[Claim]) -> dict[str, list[Claim]]:
    """Return the claims of each customer that several claims name."""
    if len({claim.customer_key for claim in claims}) == len(claims):
        return {}
    return {key: inside for key, inside in _by_customer(claims).items() if len(inside) > 1}


def _by_customer(claims: list[Claim]) -> dict[str, list[Claim]]:
    members: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        members[claim.customer_key].append(claim)
    return members


def _names(claims: Iterable[Claim]) -> str:
    return " and ".join(sorted(claim.principal.describe() for claim in claims))
