"""Interfaces of a metering API, the same for both dialects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject

_ENDED = "inactive"


@dataclass(frozen=True, slots=True)
class CustomerEdit:
    """Changes to one customer; None leaves a field unchanged."""

    name: str | None = None
    subject_keys: tuple[str, ...] | None = None
    metadata: Mapping[str, str] | None = None
    """Merged into the existing metadata."""


@dataclass(frozen=True, slots=True)
class SubjectWrite:
    """The wanted state of a subject entity; `metadata` are merged into the existing metadata."""

    key: str
    display_name: str | None
    metadata: Mapping[str, object]


Decide = Callable[[ObservedCustomer], CustomerEdit | None]
"""Decides on the current state of a customer; None leaves it alone, `BlockedError` refuses."""


class MeteringTarget(Protocol):
    """A metering API. All methods raise an `ApiError`; `RefusedError` concerns one entity only."""

    def observe(self) -> ObservedState:
        """Return all customers and subject entities, or raise; never returns a part of them."""

    def create_customer(
        self,
        key: str,
        name: str,
        subject_keys: Sequence[str],
        metadata: Mapping[str, str],
        details: CustomerDetails = NO_DETAILS,
    ) -> None:
        """Create a customer. Raises RefusedError with status 409 if key or a subject is in use."""

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        """Return the customer with exactly this key, None if there is none."""

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        """Read a customer, call `decide`, merge and write at once; return whether anything was written.

        Everything that the edit does not name stays. Raises BlockedError if the customer was deleted.
        """

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        """Return all subject entities, None if the server does not have them."""

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        """Create or update subject entities, all of them or none."""

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        """Return the value of a meter for each subject; raises MeterMissingError. Times are RFC 3339."""

    def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The parts of a customer that speak against its deletion.

    `entitlements` are keys of features; `subscriptions` maps the id of every subscription, ended ones
    too, to its status; `others` describe anything else that people added.
    """

    name: str
    details: CustomerDetails = NO_DETAILS
    entitlements: tuple[str, ...] = ()
    subscriptions: Mapping[str, str] | None = None
    others: tuple[str, ...] = ()
    open_invoices: tuple[str, ...] = ()
    """Ids of invoices that are not final; v3 does not show them."""

    @property
    def open_subscriptions(self) -> list[str]:
        """Return the subscriptions that are active or scheduled."""
        return [name for name, status in (self.subscriptions or {}).items() if status != _ENDED]


class Inspector(Protocol):
    """Reads what speaks against deleting a customer."""

    def inspect(self, customer_id: str) -> Inspection | None:
        """Return what depends on a customer, None if it does not exist; raises an ApiError."""


class Remover(Protocol):
    """Deletes; both methods return whether there was anything to delete, and raise an ApiError."""

    def delete_customer(self, customer_id: str) -> bool:
        """Delete a customer; the server refuses one with a subscription or an entitlement."""

    def delete_subject(self, key: str) -> bool:
        """Delete a subject entity."""
