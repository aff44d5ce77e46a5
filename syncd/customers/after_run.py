"""Customers after a run: what its changes made of those that it had observed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import structs

from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.unbilled import UnbilledSubject, UnbilledUsage
from syncd.customers.known import UNSEEN, Concern, KnownCustomer

_MADE = frozenset({Status.DONE, Status.UNCHANGED})
_KINDS = frozenset(
    {
        ChangeKind.ADOPT_CUSTOMER,
        ChangeKind.MOVE_SUBJECTS,
        ChangeKind.DETACH_SUBJECTS,
        ChangeKind.CREATE_CUSTOMER,
        ChangeKind.ATTACH_SUBJECTS,
        ChangeKind.RENAME_CUSTOMER,
        ChangeKind.DELETE_CUSTOMER,
    }
)
"""The kinds that change what the directory keeps of a customer."""


def made(outcomes: Iterable[Outcome]) -> list[Change]:
    """Return the changes of customers that were made."""
    return [one.change for one in outcomes if one.status in _MADE and one.change.kind in _KINDS]


def id_of(change: Change) -> str:
    """Return the id by which the directory knows the customer of a change."""
    return change.customer_id or f"{UNSEEN}{change.customer_key}"


def after(
    customers: Mapping[str, KnownCustomer], changes: Iterable[Change]
) -> dict[str, KnownCustomer | None]:
    """Return the customers that these changes concern, by id, as they are now; None for deleted ones."""
    now: dict[str, KnownCustomer | None] = dict(customers)
    for change in changes:
        identity = id_of(change)
        if change.kind is ChangeKind.CREATE_CUSTOMER:
            name = change.after.name if change.after and change.after.name else change.customer_key or ""
            now[identity] = KnownCustomer(identity, change.customer_key, name, change.subject_keys, "syncd")
            continue
        there = now.get(identity)
        if there is not None:
            now[identity] = _changed(there, change)
    return now


def _changed(customer: KnownCustomer, change: Change) -> KnownCustomer | None:
    match change.kind:
        case ChangeKind.DELETE_CUSTOMER:
            return None
        case ChangeKind.ADOPT_CUSTOMER:
            return structs.replace(customer, keeper="syncd", owner=None)
        case ChangeKind.RENAME_CUSTOMER:
            name = change.after.name if change.after else None
            return structs.replace(customer, name=name or customer.name)
        case ChangeKind.ATTACH_SUBJECTS:
            subjects = dict.fromkeys((*customer.subject_keys, *change.subject_keys))
            return structs.replace(customer, subject_keys=tuple(subjects))
        case _:
            left = tuple(key for key in customer.subject_keys if key not in change.subject_keys)
            return structs.replace(customer, subject_keys=left)


def concerns(plan: Plan, unbilled: UnbilledUsage | None) -> list[Concern]:
    """Return the concerns of a plan's customers: blocked changes, and usage not billed to them yet.

    `unbilled` is that after the run (`Run.unbilled`).
    """
    usage = {subject.key: subject for subject in unbilled.subjects} if unbilled else {}
    found: dict[tuple[str, str], Concern] = {}
    for change in plan.of(ChangeKind.BLOCKED):
        for subject in change.subject_keys or ("",):
            _add(found, change, subject, usage, blocked=True)
    for change in (*plan.of(ChangeKind.CREATE_CUSTOMER), *plan.of(ChangeKind.ATTACH_SUBJECTS)):
        for subject in change.subject_keys:
            if subject in usage:
                _add(found, change, subject, usage, blocked=False)
    return list(found.values())


def _add(
    found: dict[tuple[str, str], Concern],
    change: Change,
    subject: str,
    usage: Mapping[str, UnbilledSubject],
    *,
    blocked: bool,
) -> None:
    if change.customer_key is None:
        return
    used = usage.get(subject)
    events, tokens = (used.events, used.tokens) if used else (0, 0)
    found.setdefault(
        (change.customer_key, subject),
        Concern(change.customer_key, subject, blocked, change.reason, events, tokens),
    )
