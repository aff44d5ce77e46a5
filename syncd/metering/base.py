"""The interface of a metering API, in syncd's words; dialects differ behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject

_ENDED = "inactive"


@dataclass(frozen=True, slots=True)
class CustomerEdit:
    """What to change of a customer; None leaves a field as it is."""

    name: str | None = None
    subject_keys: tuple[str, ...] | None = None
    metadata: Mapping[str, str] | None = None
    """Merged into what is there."""


@dataclass(frozen=True, slots=True)
class SubjectWrite:
    """What a subject entity shall carry; `metadata` are merged into what is there."""

    key: str
    display_name: str | None
    metadata: Mapping[str, object]


Decide = Callable[[ObservedCustomer], CustomerEdit | None]
"""Looks at the customer as it is now; None leaves it alone, `BlockedError` refuses."""


class MeteringTarget(Protocol):
    """A metering API. All methods raise the `ApiError` that fits; `RefusedError` concerns one entity only."""

    def observe(self) -> ObservedState:
        """Return all customers and subject entities, or raise: never a part of them."""

    def create_customer(
        self,
        key: str,
        name: str,
        subject_keys: Sequence[str],
        metadata: Mapping[str, str],
        details: CustomerDetails = NO_DETAILS,
    ) -> None:
        """Create a customer. Raises RefusedError with status 409 where key or a subject is in use."""

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        """Return the customer that has exactly this key, None if there is none."""

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        """Read a customer, ask `decide`, merge and write at once; tell whether anything was written.

        Everything that the edit does not name survives. Raises BlockedError if the customer is gone.
        """

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        """Return all subject entities, None where the server has none."""

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        """Create or update subject entities, all or none of them."""

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        """Return the value of a meter for each subject; raises MeterMissingError. Times are RFC 3339."""

    def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """One customer, as far as a deletion is concerned.

    `entitlements` are keys of features; `subscriptions` maps the id of each that there ever was to its
    status; `others` are words for what else people gave it.
    """

    name: str
    details: CustomerDetails = NO_DETAILS
    entitlements: tuple[str, ...] = ()
    subscriptions: Mapping[str, str] | None = None
    others: tuple[str, ...] = ()

    @property
    def open_subscriptions(self) -> list[str]:
        """Return the subscriptions that run or are still to start."""
        return [name for name, status in (self.subscriptions or {}).items() if status != _ENDED]


class Inspector(Protocol):
    """Who can look at a customer."""

    def inspect(self, customer_id: str) -> Inspection | None:
        """Return what hangs on a customer, None if it is gone; raises the ApiError that fits."""


class Remover(Protocol):
    """What can delete; both methods tell whether there was anything, and raise the ApiError that fits."""

    def delete_customer(self, customer_id: str) -> bool:
        """Delete a customer; the server refuses one with a subscription or an entitlement."""

    def delete_subject(self, key: str) -> bool:
        """Delete a subject entity."""
