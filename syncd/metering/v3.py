"""Client of OpenMeter's v3 API (openmeter-v3.yaml, konnect-metering-and-billing-v3.yaml).

Konnect and newer self-hosted servers speak it. `url` ends before ``/openmeter/...``:
https://us.api.konghq.com/v3, http://openmeter:8888/api/v3. Differences from v1: snake_case; `labels` with
rules of their own instead of `metadata`; a key that is required and never changes; PUT by id only;
subscriptions in a separate list; no subject entities.

PUT replaces labels, description, attribution and billing address here too. Two traps of the server
(api/v3/labels, openmeter/customer/adapter): labels that the server created come back with the prefix
``openmeter_`` and are refused when sent, so they are omitted; and metadata that break the label rules,
which only v1 can write, are invisible here and lost in any PUT through v3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from syncd.core.errors import BlockedError, MalformedError, MeterMissingError, RefusedError
from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject
from syncd.core.ownership import has_reserved_prefix, valid_labels
from syncd.http.client import ApiClient, Endpoint, Params, expect_list, expect_object
from syncd.http.pagination import Fetch, Page, read_all, read_as
from syncd.http.retry import Retry
from syncd.metering.base import CustomerEdit, Decide, SubjectWrite

_API = "metering API"
_CUSTOMERS = "/openmeter/customers"
_SUBSCRIPTIONS = "/openmeter/subscriptions"
_METERS = "/openmeter/meters"
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

_GONE = frozenset({404, 410, 412})
# "canceled" is still active until the end of its period.
_RUNNING: Params = {"filter[status][oeq]": "active,canceled"}


class OpenMeterV3:
    """A `MeteringTarget` of dialect openmeter-v3."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._client = ApiClient(endpoint, retry)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def observe(self) -> ObservedState:
        """Return all customers; there are no subject entities."""
        running = self._running(_RUNNING)
        fetch = self._fetch(_CUSTOMERS, {"sort": "created_at"})
        what = f"{_CUSTOMERS} of the {_API}"
        found = read_as(lambda document: _observed(document, running), fetch, what, created="created_at")
        return ObservedState(tuple(found), None)

    def create_customer(
        self,
        key: str,
        name: str,
        subject_keys: Sequence[str],
        metadata: Mapping[str, str],
        details: CustomerDetails = NO_DETAILS,
    ) -> None:
        """Create a customer; the retry after a lost answer may get 409."""
        body: dict[str, object] = {
            "key": key,
            "name": name,
            "labels": valid_labels({**details.metadata, **metadata}),
            "usage_attribution": {"subject_keys": list(subject_keys)},
            "description": details.description,
            "primary_email": details.email,
            "currency": details.currency,
            "billing_address": dict(details.billing_address) or None,
        }
        self._client.request(
            "POST", _CUSTOMERS, body={field: value for field, value in body.items() if value is not None}
        )

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        """Return the customer with exactly this key."""
        found = self._list(_CUSTOMERS, {"filter[key][eq]": key, "sort": "created_at"}, created="created_at")
        live = [
            document for document in found if document.get("key") == key and not document.get("deleted_at")
        ]
        return self._with_subscription(live[0]) if live else None

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        """Read, decide, merge, write; a retry repeats all four, so that it undoes no other edit."""
        return self._client.repeat(lambda: self._edit_once(customer_id, decide))

    def _edit_once(self, customer_id: str, decide: Decide) -> bool:
        path = f"{_CUSTOMERS}/{quote(customer_id, safe='')}"
        document = self._read(path)
        if document is None:
            raise BlockedError("the customer was deleted in the meantime; plan again")
        edit = decide(self._with_subscription(document, repeat=False))
        if edit is None:
            return False
        body = _merged(document, edit)
        if body == _replaceable(document):
            return False
        try:
            self._client.request("PUT", path, body=body, repeat=False)
        except RefusedError as error:
            if error.status not in _GONE:
                raise
            raise BlockedError("the customer was deleted in the meantime; plan again") from None
        return True

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        """Return None: this API has no subject entities."""
        return None

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        """Accept an empty list only: this API has no subject entities."""
        if writes:
            raise MalformedError(f"the {_API} has no subject entities (dialect openmeter-v3)")

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        """Return the value of a meter for each subject, over the whole period."""
        path = f"{_METERS}/{quote(self._meter_id(meter), safe='')}/query"
        body: dict[str, object] = {"group_by_dimensions": ["subject"]}
        body |= {name: value for name, value in (("from", since), ("to", until)) if value}
        answer = expect_object(self._client.request("POST", path, body=body), _API, path)
        values: dict[str, float] = defaultdict(float)
        for entry in expect_list(answer.get("data"), _API, f"data of {path}"):
            row = expect_object(entry, _API, "a row of usage")
            subject = _mapping(row.get("dimensions")).get("subject") or ""
            values[str(subject)] += _number(row.get("value"), path)
        return dict(values)

    def _meter_id(self, key: str) -> str:
        found = self._list(_METERS, {"filter[key][eq]": key}, created="created_at")
        identity = next((document["id"] for document in found if document.get("key") == key), None)
        if identity is None:
            raise MeterMissingError(f"the {_API} has no meter {key!r}; `syncd meters apply` creates it")
        return str(identity)

    def _read(self, path: str) -> dict[str, object] | None:
        """Return a customer, None if there is none; the server also returns deleted ones (`deleted_at`)."""
        try:
            answer = self._client.request("GET", path, repeat=False)
        except RefusedError as error:
            if error.status in _GONE:
                return None
            raise
        document = expect_object(answer, _API, path)
        return None if document.get("deleted_at") else document

    def _with_subscription(self, document: dict[str, object], *, repeat: bool = True) -> ObservedCustomer:
        filters = {**_RUNNING, "filter[customer_id][eq]": str(document.get("id"))}
        return _observed(document, self._running(filters, repeat=repeat))

    def _running(self, filters: Params, *, repeat: bool = True) -> dict[str, str]:
        """Return the id of an active subscription for each customer that has one."""
        params = {**filters, "sort": "id"}  # ids begin with the time of creation
        listed = self._list(_SUBSCRIPTIONS, params, created="created_at", repeat=repeat)
        return {str(document.get("customer_id")): str(document.get("id")) for document in listed}

    def _list(
        self, path: str, params: Params, *, created: str, repeat: bool = True
    ) -> list[dict[str, object]]:
        return read_all(self._fetch(path, params, repeat=repeat), f"{path} of the {_API}", created=created)

    def _fetch(self, path: str, params: Params, *, repeat: bool = True) -> Fetch:
        def fetch(number: int, size: int) -> Page:
            query = {**params, "page[size]": size, "page[number]": number}
            page = expect_object(self._client.request("GET", path, params=query, repeat=repeat), _API, path)
            entries = expect_list(page.get("data"), _API, f"data of {path}")
            total = _mapping(_mapping(page.get("meta")).get("page")).get("total")
            return Page(
                [expect_object(entry, _API, f"an entry of {path}") for entry in entries],
                int(total) if isinstance(total, int | float) else None,
            )

        return fetch


def _replaceable(document: dict[str, object]) -> dict[str, object]:
    body = {name: document[name] for name in _REPLACEABLE if document.get(name) is not None}
    if "labels" in body:
        labels = _mapping(body["labels"])
        body["labels"] = {name: value for name, value in labels.items() if not has_reserved_prefix(name)}
    return body


def _merged(document: dict[str, object], edit: CustomerEdit) -> dict[str, object]:
    body = _replaceable(document)
    if edit.name is not None:
        body["name"] = edit.name
    if edit.metadata is not None:
        body["labels"] = {**_mapping(body.get("labels")), **valid_labels(edit.metadata)}
    keys = edit.subject_keys
    if keys is not None:
        body["usage_attribution"] = {
            **_mapping(document.get("usage_attribution")),
            "subject_keys": list(keys),
        }
    return body


def _observed(document: dict[str, object], running: Mapping[str, str]) -> ObservedCustomer:
    identity, name, key = document.get("id"), document.get("name"), document.get("key")
    keys = _mapping(document.get("usage_attribution")).get("subject_keys") or []
    if not isinstance(identity, str) or not isinstance(name, str) or not isinstance(keys, list):
        raise MalformedError(f"{_API}: a customer without id, name or a list of subject keys")
    labels = _mapping(document.get("labels"))
    return ObservedCustomer(
        id=identity,
        key=key if isinstance(key, str) and key else None,
        name=name,
        subject_keys=tuple(str(subject) for subject in keys),
        metadata={name: value for name, value in labels.items() if isinstance(value, str)},
        active_subscription=running.get(identity),
    )


def _number(value: object, path: str) -> float:
    # By the specification a string of any precision.
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise MalformedError(f"{_API}: a row of {path} has no number as its value")


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
