"""Values of the directory: a customer, the name behind a subject, a concern of a customer. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from syncd.core.model import ObservedCustomer, Principal
from syncd.core.ownership import MANAGED_BY, MANAGER, SYNC_OWNER, is_managed

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
