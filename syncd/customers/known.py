"""Values of the directory: customers, names behind subjects, concerns; and what a run makes of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from msgspec import Struct, structs

from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.model import ObservedCustomer, Principal
from syncd.core.ownership import MANAGED_BY, MANAGER, SYNC_OWNER, is_managed
from syncd.core.unbilled import UnbilledSubject, UnbilledUsage

Keeper = Literal["syncd", "finance", "other"]
"""Who manages a customer: this syncd; people, who made it by hand; another owner, such as a second syncd."""

UNSEEN = "new:"
"""Begins the id of a customer that the run has created and no run has observed yet."""


class KnownCustomer(Struct, frozen=True, gc=False):
    """A customer; `owner` names the owner of one that syncd does not manage."""

    id: str
    key: str | None
    name: str
    subject_keys: tuple[str, ...]
    keeper: Keeper
    owner: str | None = None
    subscription: str | None = None

    @property
    def is_unseen(self) -> bool:
        """Return whether its id is not known yet."""
        return self.id.startswith(UNSEEN)

    @property
    def managed_by(self) -> str:
        """Return who manages it, in words."""
        return {"syncd": "syncd", "finance": "Finance (not managed)", "other": f"{self.owner} (not managed)"}[
            self.keeper
        ]


class Name(Struct, frozen=True, gc=False):
    """Who is behind a subject: a principal as its source names it."""

    kind: str
    id: str
    username: str | None
    custom_id: str | None
    tags: tuple[str, ...]
    source: str

    @property
    def text(self) -> str:
        """Return the name to show."""
        return self.username or self.custom_id or self.id

    @property
    def words(self) -> tuple[str, ...]:
        """Return the texts by which it is found; the id is part of most subjects."""
        return tuple(word for word in (self.username, self.custom_id, *self.tags, self.id) if word)


class Concern(Struct, frozen=True, gc=False):
    """A subject that a customer was meant to have and does not, and why; `subject` is empty for the customer.

    `events` and `tokens` are the unbilled usage of the subject in the window of the plan.
    """

    customer_key: str
    subject: str
    blocked: bool
    reason: str
    events: float = 0
    tokens: float = 0


def known(customer: ObservedCustomer, owner_id: str) -> KnownCustomer:
    """Return a customer as the directory keeps it."""
    keeper, owner = keeper_of(customer, owner_id)
    return KnownCustomer(
        customer.id,
        customer.key,
        customer.name,
        customer.subject_keys,
        keeper,
        owner,
        customer.active_subscription,
    )


def keeper_of(customer: ObservedCustomer, owner_id: str) -> tuple[Keeper, str | None]:
    """Return who manages a customer, and the name of another owner."""
    metadata = customer.metadata
    if is_managed(metadata, owner_id):
        return "syncd", None
    if metadata.get(MANAGED_BY) == MANAGER:
        return "other", f"the syncd with owner_id {metadata.get(SYNC_OWNER)}"
    owner = metadata.get(MANAGED_BY) or metadata.get(SYNC_OWNER)
    return ("other", owner) if owner else ("finance", None)


def name_of(principal: Principal) -> Name:
    """Return the name behind a subject of this principal."""
    return Name(
        principal.kind,
        principal.id,
        principal.username,
        principal.custom_id,
        principal.tags,
        principal.source,
    )


def words_of(customer: KnownCustomer, names: Iterable[Name]) -> str:
    """Return the text in which a search looks: the fields of a customer, its subjects and their names."""
    found: dict[str, None] = dict.fromkeys((customer.name, customer.key or "", customer.id))
    found |= dict.fromkeys(customer.subject_keys)
    for name in names:
        found |= dict.fromkeys(name.words)
    return "\n".join(found).casefold()


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
