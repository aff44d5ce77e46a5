"""The interface of a metering API: what the other rooms may ask of it, whatever its dialect.

`MeteringApi` is the whole of it. Its parts are interfaces of their own, so that a signature says what a
function may do: few get a `Remover`. Paths, field names, pages and error shapes of the API are known only
to the clients in this room, and a test holds that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Literal, NamedTuple, Protocol

from syncd.core.errors import BlockedError
from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject


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
    """What a run reads and writes. All methods raise an `ApiError`; `RefusedError` concerns one entity only.

    An answer about another entity than was asked for is an `UnreliableApiError`, in every method.
    """

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

    `entitlements` are keys of features; `open_subscriptions` are ids of those that are active or scheduled.
    """

    entitlements: tuple[str, ...] = ()
    open_subscriptions: tuple[str, ...] = ()
    open_invoices: tuple[str, ...] = ()
    """Ids of invoices that are not final; v3 does not show them."""


class Inspector(Protocol):
    """Reads what speaks against deleting a customer."""

    def inspect(self, customer_id: str) -> Inspection | None:
        """Return what depends on a customer, None if it does not exist; raises an ApiError."""


class Remover(Protocol):
    """Deletes; both methods return whether there was anything to delete, and raise an ApiError.

    They read what they delete, call `check` and delete at once; `check` raises `BlockedError` to refuse. A
    retry repeats all three: people may change their mind between two tries.
    """

    def delete_customer(self, customer_id: str, check: Callable[[ObservedCustomer], None]) -> bool:
        """Delete a customer; the server refuses one with a subscription or an entitlement."""

    def delete_subject(self, key: str, check: Callable[[ObservedSubject], None]) -> bool:
        """Delete a subject entity."""


class NoRemover:
    """Refuses every deletion."""

    def delete_customer(self, customer_id: str, check: Callable[[ObservedCustomer], None]) -> bool:  # noqa: ARG002
        """Refuse."""
        raise BlockedError(f"deletions are not allowed here: customer {customer_id}")

    def delete_subject(self, key: str, check: Callable[[ObservedSubject], None]) -> bool:  # noqa: ARG002
        """Refuse."""
        raise BlockedError(f"deletions are not allowed here: subject {key}")


@dataclass(frozen=True, slots=True)
class Meter:
    """Definition of a meter, with the field names of the v3 API."""

    key: str
    name: str
    description: str
    aggregation: str
    event_type: str
    value_property: str | None = None
    dimensions: Mapping[str, str] = field(default_factory=dict)
    id: str | None = field(default=None, compare=False)
    """Assigned by the server; None for a meter that is not created yet."""
    events_from: str | None = field(default=None, compare=False)
    """RFC 3339; older events are not counted. None counts all."""

    def differences(self, observed: Meter) -> list[str]:
        """Describe how the observed meter differs from this one."""
        found = self.value_differences(observed)
        for name, path in self.dimensions.items():
            if name not in observed.dimensions:
                found.append(f"dimension {name} is missing")
            elif observed.dimensions[name] != path:
                found.append(f"dimension {name} is {observed.dimensions[name]!r}, not {path!r}")
        return found

    def value_differences(self, observed: Meter) -> list[str]:
        """Describe what makes the observed meter count something else than this one."""
        return [
            f"{what} is {actual!r}, not {expected!r}"
            for what, actual, expected in (
                ("aggregation", observed.aggregation, self.aggregation),
                ("event type", observed.event_type, self.event_type),
                ("value property", observed.value_property, self.value_property),
            )
            if actual != expected
        ]


class HourlyValue(NamedTuple):
    """The value of a meter for one subject in one window of an hour; `hour` is its start."""

    hour: datetime
    subject: str
    value: float


class GroupedValue(NamedTuple):
    """The value of a meter for one subject and these values of dimensions, in the order asked for."""

    subject: str
    labels: tuple[str, ...]
    """An empty text where the events lack the dimension."""
    value: float


class CustomerValue(NamedTuple):
    """The value of a meter for one subject; `customer_id` is None if the server does not name it."""

    customer_id: str | None
    subject: str
    value: float


class ArrivedEvent(NamedTuple):
    """An event that the metering API has stored; `customer_id` is whom it is attributed to, if anyone."""

    type: str
    subject: str
    customer_id: str | None


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription of a customer; `plan` is the key of its plan, None for one without."""

    id: str
    name: str
    plan: str | None
    version: int | None
    status: str
    active_from: datetime | None
    active_to: datetime | None


@dataclass(frozen=True, slots=True)
class Entitlement:
    """What a customer may use of a feature; `left` of `quota` is None where the server does not say.

    `resets_at` is when the quota is issued again. `config` is the text of a static entitlement.
    """

    feature: str
    has_access: bool
    left: float | None = None
    used: float | None = None
    quota: float | None = None
    overage: float | None = None
    resets_at: datetime | None = None
    config: str | None = None


@dataclass(frozen=True, slots=True)
class Credit:
    """The credits of a customer in one currency, as the server writes the amounts."""

    currency: str
    left: str
    pending: str


@dataclass(frozen=True, slots=True)
class Account:
    """What a customer has, as far as the server reports it; subscriptions that have ended are left out."""

    subscriptions: tuple[Subscription, ...] = ()
    entitlements: tuple[Entitlement, ...] = ()
    credits: tuple[Credit, ...] = ()


CustomerField = Literal["name", "key", "subject"]
"""A field of customers that can be searched."""


@dataclass(frozen=True, slots=True)
class CustomerPage:
    """A page of customers, without their subscriptions. `total` counts all pages, None if it is unknown."""

    customers: tuple[ObservedCustomer, ...]
    total: int | None


Write = Literal["create customers", "change customers", "delete customers", "write subjects"]
"""A permission that a token needs."""


@dataclass(frozen=True, slots=True)
class WriteTrial:
    """The answer to a write that changes nothing; `said` is that answer, or the request that was accepted.

    "no such path": the server cannot do this at all. "accepted": it took what it should have refused.
    """

    outcome: Literal["allowed", "no such path", "accepted"]
    said: str = ""


class MeteringApi(MeteringTarget, Inspector, Remover, Protocol):
    """A whole metering API: also its meters, events, usage by hour and customer, and permissions."""

    def count_customers(self) -> int | None:
        """Return how many customers there are, None if the server does not say; one small request."""

    def find_customers(self, field: CustomerField, text: str, page: int, size: int) -> CustomerPage:
        """Return a page, from 1, of the customers whose field contains the text, sorted by name."""

    def account(self, customer_id: str) -> Account:
        """Return what a customer has: subscriptions, entitlements, credits; raises an ApiError."""

    def meters(self) -> Mapping[str, Meter]:
        """Return all meters by key."""

    def create_meter(self, meter: Meter) -> None:
        """Create a meter. Raises RefusedError with status 409 if its key is in use."""

    def hourly_usage(self, meter: Meter, since: str, until: str) -> Sequence[HourlyValue]:
        """Return the values of a meter by hour (UTC) and subject; an hour without events has none.

        A server may include the hour that begins at `until`.
        """

    def daily_totals(self, meter: Meter, since: str, until: str) -> Mapping[date, float]:
        """Return the value of a meter for each UTC day with events; both times are midnights."""

    def grouped_usage(
        self, meter: Meter, dimensions: Sequence[str], since: str, until: str
    ) -> Sequence[GroupedValue]:
        """Return the values of a meter by subject and these of its dimensions; each combination once."""

    def customer_usage(
        self, meter: str, customers: Sequence[str], since: str, until: str | None
    ) -> Sequence[CustomerValue]:
        """Return the values of a meter for these customers, by id; raises MeterMissingError.

        A server may add subjects of other customers without naming the customer.
        """

    def send_event(self, event: Mapping[str, object]) -> None:
        """Send one CloudEvent, once."""

    def count_events(self, event_id: str) -> int:
        """Return how many events with exactly this id are stored."""

    def latest_events(self) -> Sequence[ArrivedEvent]:
        """Return the latest hundred events, by their time."""

    def try_write(self, write: Write) -> WriteTrial:
        """Check a permission, by a write that changes nothing; raises UnauthorizedError without it."""
