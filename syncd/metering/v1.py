"""Client of OpenMeter's v1 API (openmeter-v1.yaml): camelCase, `metadata`, subject entities on some servers.

Traps of the server:

- PUT clears the fields that the body lacks (description, metadata, usage attribution, billing address, key),
  and there is no ETag. So an edit reads the customer, changes only syncd's own fields in that document and
  writes it back at once.
- A path takes ids and keys alike, so a customer that was asked for by key may be found by its id.
- Filters of lists, even `id` of events, match parts of the value.
- OpenMeter refuses to delete a customer with an active subscription, an active entitlement or an invoice
  that is not final (openmeter/{subscription,entitlement}/validators/customer, billing/validators/customer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date

from syncd.core.errors import MalformedError, RefusedError
from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.json import expect_object, expect_objects
from syncd.http.pagination import Page, read_as
from syncd.http.retry import Retry
from syncd.metering import account, answers
from syncd.metering.answers import API, PAGE_OF_PARTS, id_segment, mapping, segment
from syncd.metering.base import (
    Account,
    ArrivedEvent,
    CustomerEdit,
    CustomerField,
    CustomerPage,
    CustomerValue,
    Decide,
    GroupedValue,
    HourlyValue,
    Inspection,
    Meter,
    SubjectWrite,
    Write,
    WriteTrial,
)

_CUSTOMERS = "/api/v1/customers"
_SUBJECTS = "/api/v1/subjects"
_METERS = "/api/v1/meters"
_EVENTS = "/api/v1/events"
_OPEN_INVOICE = ["gathering", "draft", "issuing"]
_REPLACEABLE = (
    "key",
    "name",
    "description",
    "metadata",
    "usageAttribution",
    "primaryEmail",
    "currency",
    "billingAddress",
)
"""CustomerReplaceUpdate: the fields that PUT accepts, all of which have to be sent back."""

# "canceled" is still active until the end of its period (Subscription.activeTo).
_RUNNING = frozenset({"active", "canceled"})

_Params = dict[str, str | int | list[str]]


class OpenMeterV1:
    """The `MeteringApi` of dialect openmeter-v1."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._client = ApiClient(endpoint, retry)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # Customers

    def observe(self) -> ObservedState:
        """Return all customers and subject entities."""
        what = f"{_CUSTOMERS} of the {API}"
        customers = tuple(read_as(_observed_customer, self._page, what, created="createdAt"))
        return ObservedState(customers, self.subjects())

    def count_customers(self) -> int | None:
        """Return how many customers there are."""
        return answers.whole_or_none(self._customers({"page": 1, "pageSize": 1}).get("totalCount"))

    def find_customers(self, field: CustomerField, text: str, page: int, size: int) -> CustomerPage:
        """Return a page of customers; the filters match parts of a field."""
        params: _Params = {"page": page, "pageSize": size, "orderBy": "name"}
        found = self._customers(params | ({field: text} if text else {}))
        items = _items(found)
        total = answers.whole_or_none(found.get("totalCount"))
        return CustomerPage(tuple(map(_observed_customer, items)), total)

    def create_customer(
        self,
        key: str,
        name: str,
        subject_keys: Sequence[str],
        metadata: Mapping[str, str],
        details: CustomerDetails = NO_DETAILS,
    ) -> None:
        """Create a customer; the retry after a lost answer may get 409."""
        address = {_camel(part): value for part, value in details.billing_address.items()}
        body = {
            "key": key,
            "name": name,
            "metadata": {**details.metadata, **metadata},
            "usageAttribution": {"subjectKeys": list(subject_keys)},
            "description": details.description,
            "primaryEmail": details.email,
            "currency": details.currency,
            "billingAddress": address or None,
        }
        made = self._client.request("POST", _CUSTOMERS, body=answers.without_none(body))
        answers.expect_written(made, "created customer", key=key)

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        """Return the customer with exactly this key."""
        document = answers.object_or_none(self._client, f"{_CUSTOMERS}/{segment(key, 'customer')}")
        if document is None or document.get("id") == key != document.get("key"):
            return None
        answers.expect_asked(document, "customer", key=key)
        return None if document.get("deletedAt") else _observed_customer(document)

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        """Read, decide, merge, write; a retry repeats all four, so that it undoes no other edit."""
        return self._client.repeat(lambda: self._edit_once(customer_id, decide))

    def _edit_once(self, customer_id: str, decide: Decide) -> bool:
        document = self._by_id(customer_id, repeat=False)
        if document is None:
            raise answers.deleted_meanwhile()
        edit = decide(_observed_customer(document))
        if edit is None:
            return False
        body = _merged(document, edit)
        if body == _replaceable(document):
            return False
        asked = {"id": customer_id} | ({"key": str(body["key"])} if "key" in body else {})
        answers.put_customer(self._client, f"{_CUSTOMERS}/{id_segment(customer_id)}", body, **asked)
        return True

    def _by_id(self, customer_id: str, *, repeat: bool = True) -> dict[str, object] | None:
        """Return a customer, None if there is none; the server also returns deleted ones (`deletedAt`)."""
        path = f"{_CUSTOMERS}/{id_segment(customer_id)}"
        document = answers.object_or_none(self._client, path, repeat=repeat)
        if document is None:
            return None
        answers.expect_asked(document, "customer", id=customer_id)
        return None if document.get("deletedAt") else document

    def _page(self, number: int, size: int) -> Page:
        params: _Params = {
            "page": number,
            "pageSize": size,
            "orderBy": "createdAt",
            "order": "ASC",
            "expand": ["subscriptions"],
        }
        page = self._customers(params)
        return Page(_items(page), answers.whole_or_none(page.get("totalCount")))

    def _customers(self, params: _Params) -> dict[str, object]:
        return expect_object(self._client.get(_CUSTOMERS, params), API, _CUSTOMERS)

    # Subject entities

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        """Return all subject entities, None if the server has no such endpoint."""
        try:
            listed = self._client.get(_SUBJECTS)
        except RefusedError as error:
            if error.status in answers.NO_SUCH_PATH:
                return None
            raise
        entries = answers.objects(listed, _SUBJECTS, "a subject")
        answers.expect_distinct(entries, "the subject", "key")
        return tuple(map(_observed_subject, entries))

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        """Create or update subject entities; fields that a write does not name stay."""
        body: list[dict[str, object]] = []
        for write in writes:
            entry: dict[str, object] = {"key": write.key, "metadata": dict(write.metadata)}
            if write.display_name is not None:
                entry["displayName"] = write.display_name
            body.append(entry)
        written = self._client.request("POST", _SUBJECTS, body=body)
        keys = {write.key for write in writes}
        for answered in written if isinstance(written, list) else ():
            answers.expect_among(mapping(answered).get("key"), keys, "the subjects that were written")

    # What a customer has

    def account(self, customer_id: str) -> Account:
        """Return what a customer has."""
        return account.read_v1(self._client, customer_id)

    # Deletions

    def inspect(self, customer_id: str) -> Inspection | None:
        """Return what depends on a customer; four requests."""
        if self._by_id(customer_id) is None:
            return None
        path = f"{_CUSTOMERS}/{id_segment(customer_id)}"
        page = {"page": 1, "pageSize": PAGE_OF_PARTS}
        access = answers.object_or_none(self._client, f"{path}/access") or {}
        subscriptions = answers.parts(self._client, f"{path}/subscriptions", "items", page)
        for entry in subscriptions:
            answers.expect_among(entry.get("customerId"), {customer_id}, f"subscriptions of {customer_id}")
        return Inspection(
            tuple(sorted(mapping(access.get("entitlements")))),
            answers.open_subscriptions(subscriptions),
            self._open_invoices(customer_id),
        )

    def _open_invoices(self, customer_id: str) -> tuple[str, ...]:
        """Return the invoices that forbid a deletion: a list without `statuses` leaves gathering ones out."""
        wanted: _Params = {
            "statuses": _OPEN_INVOICE,
            "customers": customer_id,
            "page": 1,
            "pageSize": PAGE_OF_PARTS,
        }
        found = answers.parts(self._client, "/api/v1/billing/invoices", "items", wanted)
        return tuple(str(entry.get("id")) for entry in found)

    def delete_customer(self, customer_id: str, check: Callable[[ObservedCustomer], None]) -> bool:
        """Read, check and delete a customer by its id."""

        def attempt() -> bool:
            document = self._by_id(customer_id, repeat=False)
            if document is None:
                return False
            check(_observed_customer(document))
            return answers.deleted(self._client, f"{_CUSTOMERS}/{id_segment(customer_id)}")

        return self._client.repeat(attempt)

    def delete_subject(self, key: str, check: Callable[[ObservedSubject], None]) -> bool:
        """Read, check and delete a subject entity."""
        path = f"{_SUBJECTS}/{segment(key, 'subject')}"

        def attempt() -> bool:
            document = answers.object_or_none(self._client, path, repeat=False)
            if document is None:
                return False
            answers.expect_asked(document, "subject", key=key)
            check(_observed_subject(document))
            return answers.deleted(self._client, path)

        return self._client.repeat(attempt)

    # Meters and usage

    def meters(self) -> dict[str, Meter]:
        """Return all meters by key."""
        listed = answers.objects(self._client.get(_METERS), _METERS, "a meter")
        answers.expect_distinct(listed, "the meter", "slug")
        return {meter.key: meter for meter in map(_meter, listed)}

    def create_meter(self, meter: Meter) -> None:
        """Create a meter; raises RefusedError with status 409 if its key is in use."""
        body = {
            "slug": meter.key,
            "name": meter.name,
            "description": meter.description,
            "aggregation": meter.aggregation.upper(),
            "eventType": meter.event_type,
            "valueProperty": meter.value_property,
            "groupBy": dict(meter.dimensions),
        }
        made = self._client.request("POST", _METERS, body=answers.without_none(body))
        answers.expect_written(made, "created meter", slug=meter.key)

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        """Return the value of a meter for each subject, over the whole period."""
        values: dict[str, float] = {}
        what = f"usage of {meter}"
        for row in self._query(meter, {"groupBy": ["subject"]}, since, until):
            subject = answers.subject_of(row.get("subject"), what)
            values[subject] = values.get(subject, 0) + answers.number(row.get("value"), what)
        return values

    def hourly_usage(self, meter: Meter, since: str, until: str) -> list[HourlyValue]:
        """Return the values of a meter by hour and subject; in the specification `to` is inclusive."""
        what = f"hourly usage of {meter.key}"
        return [
            HourlyValue(
                answers.moment(row.get("windowStart"), f"a row of {what}"),
                answers.subject_of(row.get("subject"), what),
                answers.number(row.get("value"), what),
            )
            for row in self._query(meter.key, {"windowSize": "HOUR", "groupBy": ["subject"]}, since, until)
        ]

    def daily_totals(self, meter: Meter, since: str, until: str) -> Mapping[date, float]:
        """Return the value of a meter for each UTC day with events."""
        what = f"daily usage of {meter.key}"
        rows = self._query(meter.key, {"windowSize": "DAY"}, since, until)
        return answers.by_day(((row.get("windowStart"), row.get("value")) for row in rows), what)

    def grouped_usage(
        self, meter: Meter, dimensions: Sequence[str], since: str, until: str
    ) -> list[GroupedValue]:
        """Return the values of a meter by subject and dimensions."""
        rows = self._query(meter.key, {"groupBy": ["subject", *dimensions]}, since, until)
        listed = ((row.get("subject"), mapping(row.get("groupBy")), row.get("value")) for row in rows)
        return answers.grouped(listed, dimensions, f"usage of {meter.key} by dimension")

    def customer_usage(
        self, meter: str, customers: Sequence[str], since: str, until: str | None
    ) -> list[CustomerValue]:
        """Return the values of a meter for these customers."""
        filters: _Params = {"groupBy": ["subject", "customer_id"], "filterCustomerId": list(customers)}
        what, found = f"usage of {meter} by customer", []
        for row in self._query(meter, filters, since, until):
            customer = answers.text_or_none(row.get("customerId"))
            answers.expect_among(customer, customers, what)
            subject = answers.subject_of(row.get("subject"), what)
            found.append(CustomerValue(customer, subject, answers.number(row.get("value"), what)))
        return found

    def _query(
        self, meter: str, params: _Params, since: str | None, until: str | None
    ) -> list[dict[str, object]]:
        path = f"{_METERS}/{segment(meter, 'meter')}/query"
        period = {name: value for name, value in (("from", since), ("to", until)) if value}
        try:
            answer = expect_object(self._client.get(path, {**params, **period}), API, path)
        except RefusedError as error:
            # With a filter, 404 may also be for a customer that is gone.
            if error.status != 404 or ("filterCustomerId" in params and "meter" not in error.detail):
                raise
            raise answers.missing_meter(meter) from None
        return answers.entries_of(answer, "data", path, "a row of usage")

    # Events

    def send_event(self, event: Mapping[str, object]) -> None:
        """Send one CloudEvent, once."""
        self._client.request("POST", _EVENTS, body=dict(event), repeat=False)

    def count_events(self, event_id: str) -> int:
        """Return how many events with exactly this id are stored: the filter matches parts of ids."""
        listed = answers.objects(self._client.get(_EVENTS, {"id": event_id}), _EVENTS, "an event")
        return sum(mapping(entry.get("event")).get("id") == event_id for entry in listed)

    def latest_events(self) -> list[ArrivedEvent]:
        """Return the latest hundred events of the last 72 hours, by their time."""
        answer = self._client.get(_EVENTS, {"limit": answers.PAGE_OF_EVENTS})
        listed = answers.objects(answer, _EVENTS, "an event")
        return [answers.arrived(entry, entry.get("customerId")) for entry in listed]

    # Permissions

    def try_write(self, write: Write) -> WriteTrial:
        """Check a permission: a customer needs a name (400), the id is unused (404), no subject is named."""
        return answers.try_write(self._client, write, _CUSTOMERS, _SUBJECTS)


def _items(page: Mapping[str, object]) -> list[dict[str, object]]:
    items = expect_objects(page.get("items"), API, f"items of {_CUSTOMERS}", "a customer")
    answers.expect_distinct(items, "the customer")
    return items


def _replaceable(document: dict[str, object]) -> dict[str, object]:
    return {name: document[name] for name in _REPLACEABLE if document.get(name) is not None}


def _merged(document: dict[str, object], edit: CustomerEdit) -> dict[str, object]:
    body = _replaceable(document)
    if edit.name is not None:
        body["name"] = edit.name
    if edit.metadata is not None:
        body["metadata"] = {**mapping(document.get("metadata")), **edit.metadata}
    if edit.subject_keys is not None:
        attribution = mapping(document.get("usageAttribution"))
        body["usageAttribution"] = {**attribution, "subjectKeys": list(edit.subject_keys)}
    return body


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _observed_customer(document: dict[str, object]) -> ObservedCustomer:
    identity, name, key = document.get("id"), document.get("name"), document.get("key")
    attribution = document.get("usageAttribution")
    keys = attribution.get("subjectKeys") or [] if isinstance(attribution, dict) else []
    if not isinstance(identity, str) or not isinstance(name, str) or not isinstance(keys, list):
        raise MalformedError(f"{API}: a customer without id, name or a list of subject keys")
    return ObservedCustomer(
        identity,
        key if isinstance(key, str) and key else None,
        name,
        tuple(map(str, keys)),
        answers.texts(document.get("metadata")),
        _active_subscription(document),
    )


def _active_subscription(document: dict[str, object]) -> str | None:
    current = document.get("currentSubscriptionId")
    if isinstance(current, str) and current:
        return current
    listed = document.get("subscriptions")
    for subscription in listed if isinstance(listed, list) else ():
        fields = mapping(subscription)
        if fields.get("status") in _RUNNING:
            return str(fields.get("id"))
    return None


def _observed_subject(document: dict[str, object]) -> ObservedSubject:
    key, display_name = document.get("key"), document.get("displayName")
    if not isinstance(key, str):
        raise MalformedError(f"{API}: a subject without key")
    return ObservedSubject(
        key=key,
        display_name=display_name if isinstance(display_name, str) else None,
        metadata=mapping(document.get("metadata")),
    )


def _meter(document: Mapping[str, object]) -> Meter:
    key = str(document.get("slug"))
    return Meter(
        key=key,
        name=str(document.get("name") or key),
        description=str(document.get("description") or ""),
        aggregation=str(document.get("aggregation")).lower(),
        event_type=str(document.get("eventType")),
        value_property=answers.text_or_none(document.get("valueProperty")),
        dimensions={name: str(path) for name, path in mapping(document.get("groupBy")).items()},
        id=answers.text_or_none(document.get("id")),
        events_from=answers.text_or_none(document.get("eventFrom")),
    )
