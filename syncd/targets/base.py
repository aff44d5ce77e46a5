"""The interface of a metering API, in syncd's words; dialects differ behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from syncd.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedSubject, ObservedWorld


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

    def observe(self) -> ObservedWorld:
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
