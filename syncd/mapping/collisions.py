"""Collisions: claims that contradict each other are removed, each as a Problem that names both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from syncd.core.model import Problem
from syncd.mapping.claims import Claim


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
