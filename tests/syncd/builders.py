"""Builders of principals, observed states and plans for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from msgspec import Struct, structs

from syncd.core.changes import Plan
from syncd.core.model import ObservedCustomer, ObservedState, ObservedSubject, Principal
from syncd.core.ownership import ownership_metadata
from syncd.core.policy import Policy
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules, Templates
from syncd.planning.plan import PlanOptions, make_plan

_T = TypeVar("_T")

OWNER = "default"
KEYED_BY_SUBJECT = Templates(key="{subject}")
"""The hardest case: a customer's key attributes usage as its subject keys do."""
RULES = MappingRules(owner_id=OWNER, templates=KEYED_BY_SUBJECT)
BY_TAG = MappingRules(owner_id=OWNER, group_by="tag", templates=KEYED_BY_SUBJECT)


def consumer(
    identity: str, username: str | None = None, *tags: str, custom_id: str | None = None, source: str = "kong"
) -> Principal:
    return Principal("consumer", identity, source, username, custom_id, tags)


def static(key: str, *, customer: str | None = None, name: str | None = None, **metadata: str) -> Principal:
    return Principal("static", key, "static", name, metadata=metadata, customer=customer)


def customer(
    key: str | None,
    *subjects: str,
    name: str = "",
    owner: str | None = None,
    subscription: str | None = None,
    identity: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ObservedCustomer:
    """An observed customer; managed if `owner` is given."""
    ownership = ownership_metadata(owner, key or "x") if owner else {}
    found = {**ownership, **(metadata or {})}
    return ObservedCustomer(
        identity or f"id-{key}", key, name or (key or "nameless"), subjects, found, subscription
    )


def observed(
    *customers: ObservedCustomer, subjects: tuple[ObservedSubject, ...] | None = None
) -> ObservedState:
    return ObservedState(customers, subjects)


def plan_for(
    principals: list[Principal],
    state: ObservedState,
    *,
    rules: MappingRules = RULES,
    policy: Policy = "upsert-only",
    options: PlanOptions | None = None,
) -> Plan:
    desired = desired_state(principals, rules)
    return make_plan(desired, state, owner_id=rules.owner_id, policy=policy, options=options)


def lines(plan: Plan) -> list[str]:
    """Return one line per change: ``kind customer-key subject subject``."""
    return [" ".join([str(c.kind), c.customer_key or "-", *c.subject_keys]) for c in plan.changes]


def replace(value: _T, **changes: object) -> _T:
    """Return a struct or dataclass with other fields."""
    if isinstance(value, Struct):
        return structs.replace(value, **changes)
    return dataclasses.replace(value, **changes)  # type: ignore[type-var]
