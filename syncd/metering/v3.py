"""Client of OpenMeter's v3 API (openmeter-v3.yaml, konnect-metering-and-billing-v3.yaml).

Konnect and newer self-hosted servers speak it. `url` ends before ``/openmeter/...``:
https://us.api.konghq.com/v3, http://openmeter:8888/api/v3. Differences from v1: snake_case; `labels` with
rules of their own instead of `metadata`; a key that is required and never changes; paths with ids only;
subscriptions in a separate list; no subject entities; figures as text.

Traps of the server (api/v3/labels, openmeter/customer/adapter):

- PUT replaces labels, description, attribution and billing address here too.
- Labels that the server created come back with the prefix ``openmeter_`` and are refused when sent, so they
  are omitted.
- Metadata that break the label rules, which only v1 can write, are invisible here and lost in any PUT.
- DELETE of a missing customer is 204, and it is refused for the same reasons as in v1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date

from syncd.core.errors import MalformedError
from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject
from syncd.core.ownership import has_reserved_prefix, valid_labels
from syncd.http.client import ApiClient, Params
from syncd.http.endpoint import Endpoint
from syncd.http.json import expect_object
from syncd.http.pagination import Fetch, Page, read_all, read_as
from syncd.http.retry import Retry
from syncd.metering import account, answers
from syncd.metering.answers import API, PAGE_OF_PARTS, id_segment, mapping
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

_CUSTOMERS = "/openmeter/customers"
_SUBSCRIPTIONS = "/openmeter/subscriptions"
_METERS = "/openmeter/meters"
_EVENTS = "/openmeter/events"
_REPLACEABLE = (
    "name",
    "description",
    "labels",
    "usage_attribution",
    "primary_email",
    "currency",
    "billing_address",
)
"""UpsertCustomerRequest: the fields that PUT accepts, all of which have to be sent back."""

_SEARCHED = {"name": "name", "key": "key", "subject": "usage_attribution_subject_key"}
# "canceled" is still active until the end of its period.
_RUNNING: Params = {"filter[status][oeq]": "active,canceled"}


class OpenMeterV3:
    """The `MeteringApi` of dialect openmeter-v3."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._endpoint, self._retry = endpoint, retry
        self._client = ApiClient(endpoint, retry)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # Customers

    def observe(self) -> ObservedState:
        """Return all customers; there are no subject entities."""
        running = self._running(None)
        fetch = self._fetch(_CUSTOMERS, {"sort": "created_at"})
        what = f"{_CUSTOMERS} of the {API}"
        found = read_as(lambda document: _observed(document, running), fetch, what, created="created_at")
        return ObservedState(tuple(found), None)

    def count_customers(self) -> int | None:
        """Return how many customers there are."""
        return self._fetch(_CUSTOMERS, {})(1, 1).total

    def find_customers(self, field: CustomerField, text: str, page: int, size: int) -> CustomerPage:
        """Return a page of customers whose field contains the text."""
        filters = {f"filter[{_SEARCHED[field]}][contains]": text} if text else {}
        found = self._fetch(_CUSTOMERS, {"sort": "name", **filters})(page, size)
        return CustomerPage(tuple(_observed(entry, {}) for entry in found.entries), found.total)

    def create_customer(
        self,
        key: str,
        name: str,
        subject_keys: Sequence[str],
        metadata: Mapping[str, str],
        details: CustomerDetails = NO_DETAILS,
    ) -> None:
        """Create a customer; the retry after a lost answer may get 409."""
        body = {
            "key": key,
            "name": name,
            "labels": valid_labels({**details.metadata, **metadata}),
            "usage_attribution": {"subject_keys": list(subject_keys)},
            "description": details.description,
            "primary_email": details.email,
            "currency": details.currency,
            "billing_address": dict(details.billing_address) or None,
        }
        made = self._client.request("POST", _CUSTOMERS, body=answers.without_none(body))
        answers.expect_written(made, "created customer", key=key)

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        """Return the customer with exactly this key."""
        found = self._list(_CUSTOMERS, {"filter[key][eq]": key, "sort": "created_at"})
        for document in found:
            answers.expect_asked(document, "customer", key=key)
        live = [document for document in found if not document.get("deleted_at")]
        return self._with_subscription(live[0]) if live else None

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        """Read, decide, merge, write; a retry repeats all four, so that it undoes no other edit."""
        return self._client.repeat(lambda: self._edit_once(customer_id, decide))

    def _edit_once(self, customer_id: str, decide: Decide) -> bool:
        document = self._read(customer_id, repeat=False)
        if document is None:
            raise answers.deleted_meanwhile()
        edit = decide(self._with_subscription(document, repeat=False))
        if edit is None:
            return False
        body = _merged(document, edit)
        if body == _replaceable(document):
            return False
        path, key = f"{_CUSTOMERS}/{id_segment(customer_id)}", str(document.get("key"))  # it never changes
        answers.put_customer(self._client, path, body, id=customer_id, key=key)
        return True

    def _read(self, customer_id: str, *, repeat: bool = True) -> dict[str, object] | None:
        """Return a customer, None if there is none; the server also returns deleted ones (`deleted_at`)."""
        path = f"{_CUSTOMERS}/{id_segment(customer_id)}"
        document = answers.object_or_none(self._client, path, repeat=repeat)
        if document is None:
            return None
        answers.expect_asked(document, "customer", id=customer_id)
        return None if document.get("deleted_at") else document

    def _with_subscription(self, document: dict[str, object], *, repeat: bool = True) -> ObservedCustomer:
        return _observed(document, self._running(str(document.get("id")), repeat=repeat))

    def _running(self, customer_id: str | None, *, repeat: bool = True) -> dict[str, str]:
        """Return the id of an active subscription for each customer that has one, or for this customer."""
        params = {**_RUNNING, "sort": "id"}  # ids begin with the time of creation
        if customer_id is not None:
            params["filter[customer_id][eq]"] = customer_id
        listed = self._list(_SUBSCRIPTIONS, params, repeat=repeat)
        if customer_id is not None:
            _expect_subscriptions(listed, customer_id)
        return {str(document.get("customer_id")): str(document.get("id")) for document in listed}

    # Subject entities

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        """Return None: this API has no subject entities."""
        return None

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        """Accept an empty list only: this API has no subject entities."""
        if writes:
            raise MalformedError(f"the {API} has no subject entities (dialect openmeter-v3)")

    # What a customer has

    def account(self, customer_id: str) -> Account:
        """Return what a customer has; a self-hosted server's v1 says how much is left."""
        url = self._endpoint.url
        if not url.endswith("/api/v3"):
            return account.read_v3(self._client, None, customer_id)
        with ApiClient(replace(self._endpoint, url=url.removesuffix("/v3")), self._retry) as v1:
            return account.read_v3(self._client, v1, customer_id)

    # Deletions

    def inspect(self, customer_id: str) -> Inspection | None:
        """Return what depends on a customer; three requests."""
        if self._read(customer_id) is None:
            return None
        path = f"{_CUSTOMERS}/{id_segment(customer_id)}"
        page: Params = {"page[size]": PAGE_OF_PARTS, "page[number]": 1}
        access = answers.parts(self._client, f"{path}/entitlement-access", "data", None)
        filters = {**page, "filter[customer_id][eq]": customer_id}
        subscriptions = answers.parts(self._client, _SUBSCRIPTIONS, "data", filters)
        _expect_subscriptions(subscriptions, customer_id)
        return Inspection(
            tuple(sorted(str(entry.get("feature_key")) for entry in access)),
            answers.open_subscriptions(subscriptions),
        )

    def delete_customer(self, customer_id: str, check: Callable[[ObservedCustomer], None]) -> bool:
        """Read, check and delete a customer by its id."""

        def attempt() -> bool:
            document = self._read(customer_id, repeat=False)
            if document is None:
                return False
            check(self._with_subscription(document, repeat=False))
            return answers.deleted(self._client, f"{_CUSTOMERS}/{id_segment(customer_id)}")

        return self._client.repeat(attempt)

    def delete_subject(self, key: str, check: Callable[[ObservedSubject], None]) -> bool:  # noqa: ARG002
        """Return False: this API has no subject entities."""
        return False

    # Meters and usage

    def meters(self) -> dict[str, Meter]:
        """Return all meters by key."""
        listed = self._list(_METERS, {})
        answers.expect_distinct(listed, "the meter", "key")
        return {meter.key: meter for meter in map(_meter, listed)}

    def create_meter(self, meter: Meter) -> None:
        """Create a meter; raises RefusedError with status 409 if its key is in use."""
        body = {
            "key": meter.key,
            "name": meter.name,
            "description": meter.description,
            "aggregation": meter.aggregation,
            "event_type": meter.event_type,
            "value_property": meter.value_property,
            "dimensions": dict(meter.dimensions),
        }
        made = self._client.request("POST", _METERS, body=answers.without_none(body))
        answers.expect_written(made, "created meter", key=meter.key)

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        """Return the value of a meter for each subject, over the whole period."""
        values: dict[str, float] = defaultdict(float)
        what = f"usage of {meter}"
        query = {"group_by_dimensions": ["subject"]}
        for row in self._query(self._meter_id(meter), query, since, until):
            subject = answers.subject_of(mapping(row.get("dimensions")).get("subject"), what)
            values[subject] += answers.number(row.get("value"), what)
        return dict(values)

    def hourly_usage(self, meter: Meter, since: str, until: str) -> list[HourlyValue]:
        """Return the values of a meter by hour and subject."""
        what = f"hourly usage of {meter.key}"
        query = {"granularity": "PT1H", "group_by_dimensions": ["subject"]}
        return [
            HourlyValue(
                answers.moment(row.get("from"), f"a row of {what}"),
                answers.subject_of(mapping(row.get("dimensions")).get("subject"), what),
                answers.number(row.get("value"), what),
            )
            for row in self._query(meter.id or self._meter_id(meter.key), query, since, until)
        ]

    def daily_totals(self, meter: Meter, since: str, until: str) -> Mapping[date, float]:
        """Return the value of a meter for each UTC day with events."""
        what = f"daily usage of {meter.key}"
        rows = self._query(meter.id or self._meter_id(meter.key), {"granularity": "P1D"}, since, until)
        return answers.by_day(((row.get("from"), row.get("value")) for row in rows), what)

    def grouped_usage(
        self, meter: Meter, dimensions: Sequence[str], since: str, until: str
    ) -> list[GroupedValue]:
        """Return the values of a meter by subject and dimensions."""
        query = {"group_by_dimensions": ["subject", *dimensions]}
        rows = self._query(meter.id or self._meter_id(meter.key), query, since, until)
        named = ((mapping(row.get("dimensions")), row.get("value")) for row in rows)
        listed = ((labels.get("subject"), labels, value) for labels, value in named)
        return answers.grouped(listed, dimensions, f"usage of {meter.key} by dimension")

    def customer_usage(
        self, meter: str, customers: Sequence[str], since: str, until: str | None
    ) -> list[CustomerValue]:
        """Return the values of a meter for these customers."""
        query = {
            "group_by_dimensions": ["subject", "customer_id"],
            "filters": {"dimensions": {"customer_id": {"in": list(customers)}}},
        }
        what, found = f"usage of {meter} by customer", []
        for row in self._query(self._meter_id(meter), query, since, until):
            dimensions = mapping(row.get("dimensions"))
            customer = answers.text_or_none(dimensions.get("customer_id"))
            answers.expect_among(customer, customers, what)
            subject = answers.subject_of(dimensions.get("subject"), what)
            found.append(CustomerValue(customer, subject, answers.number(row.get("value"), what)))
        return found

    def _query(
        self, meter_id: str, query: Mapping[str, object], since: str | None, until: str | None
    ) -> list[dict[str, object]]:
        path = f"{_METERS}/{id_segment(meter_id)}/query"
        period = {name: value for name, value in (("from", since), ("to", until)) if value}
        # This POST only reads, so it is retried like a GET.
        answer = expect_object(self._client.request("POST", path, body={**query, **period}), API, path)
        return answers.entries_of(answer, "data", path, "a row of usage")

    def _meter_id(self, key: str) -> str:
        found = self._list(_METERS, {"filter[key][eq]": key})
        for document in found:
            answers.expect_asked(document, "meter", key=key)
        if not found:
            raise answers.missing_meter(key)
        return str(found[0]["id"])

    # Events

    def send_event(self, event: Mapping[str, object]) -> None:
        """Send one CloudEvent, once."""
        self._client.request("POST", _EVENTS, body=dict(event), repeat=False)

    def count_events(self, event_id: str) -> int:
        """Return how many events with exactly this id are stored."""
        answer = expect_object(self._client.get(_EVENTS, {"filter[id][eq]": event_id}), API, _EVENTS)
        listed = answers.entries_of(answer, "data", _EVENTS, "an event")
        return sum(mapping(entry.get("event")).get("id") == event_id for entry in listed)

    def latest_events(self) -> list[ArrivedEvent]:
        """Return the latest hundred events, by their time."""
        answer = expect_object(
            self._client.get(_EVENTS, {"page[size]": answers.PAGE_OF_EVENTS}), API, _EVENTS
        )
        listed = answers.entries_of(answer, "data", _EVENTS, "an event")
        return [answers.arrived(entry, mapping(entry.get("customer")).get("id")) for entry in listed]

    # Permissions

    def try_write(self, write: Write) -> WriteTrial:
        """Check a permission: a customer needs a name (400), the id is unused (404; 204 if deleted)."""
        return answers.try_write(self._client, write, _CUSTOMERS, None)

    # Lists

    def _list(self, path: str, params: Params, *, repeat: bool = True) -> list[dict[str, object]]:
        what = f"{path} of the {API}"
        return read_all(self._fetch(path, params, repeat=repeat), what, created="created_at")

    def _fetch(self, path: str, params: Params, *, repeat: bool = True) -> Fetch:
        def fetch(number: int, size: int) -> Page:
            query = {**params, "page[size]": size, "page[number]": number}
            page = expect_object(self._client.request("GET", path, params=query, repeat=repeat), API, path)
            entries = answers.entries_of(page, "data", path, f"an entry of {path}")
            answers.expect_distinct(entries, f"an entry of {path}")
            total = mapping(mapping(page.get("meta")).get("page")).get("total")
            return Page(entries, answers.whole_or_none(total))

        return fetch


def _expect_subscriptions(listed: Sequence[Mapping[str, object]], customer_id: str) -> None:
    for entry in listed:
        answers.expect_among(entry.get("customer_id"), {customer_id}, f"subscriptions of {customer_id}")


def _replaceable(document: dict[str, object]) -> dict[str, object]:
    body = {name: document[name] for name in _REPLACEABLE if document.get(name) is not None}
    if "labels" in body:
        labels = mapping(body["labels"])
        body["labels"] = {name: value for name, value in labels.items() if not has_reserved_prefix(name)}
    return body


def _merged(document: dict[str, object], edit: CustomerEdit) -> dict[str, object]:
    body = _replaceable(document)
    if edit.name is not None:
        body["name"] = edit.name
    if edit.metadata is not None:
        body["labels"] = {**mapping(body.get("labels")), **valid_labels(edit.metadata)}
    if edit.subject_keys is not None:
        attribution = mapping(document.get("usage_attribution"))
        body["usage_attribution"] = {**attribution, "subject_keys": list(edit.subject_keys)}
    return body


def _observed(document: dict[str, object], running: Mapping[str, str]) -> ObservedCustomer:
    identity, name, key = document.get("id"), document.get("name"), document.get("key")
    keys = mapping(document.get("usage_attribution")).get("subject_keys") or []
    if not isinstance(identity, str) or not isinstance(name, str) or not isinstance(keys, list):
        raise MalformedError(f"{API}: a customer without id, name or a list of subject keys")
    return ObservedCustomer(
        id=identity,
        key=key if isinstance(key, str) and key else None,
        name=name,
        subject_keys=tuple(map(str, keys)),
        metadata=answers.texts(document.get("labels")),
        active_subscription=running.get(identity),
    )


def _meter(document: Mapping[str, object]) -> Meter:
    key = str(document.get("key"))
    return Meter(
        key=key,
        name=str(document.get("name") or key),
        description=str(document.get("description") or ""),
        aggregation=str(document.get("aggregation")).lower(),
        event_type=str(document.get("event_type")),
        value_property=answers.text_or_none(document.get("value_property")),
        dimensions={name: str(path) for name, path in mapping(document.get("dimensions")).items()},
        id=answers.text_or_none(document.get("id")),
        events_from=answers.text_or_none(document.get("events_from")),
    )
