"""Client of OpenMeter's v1 API (openmeter-v1.yaml): camelCase, `metadata`, subject entities on some servers.

PUT clears the fields that the body lacks (description, metadata, usage attribution, billing address, key),
and there is no ETag. So an update reads the customer, changes only syncd's own fields in that document and
writes it back at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from syncd.core.errors import BlockedError, MalformedError, MeterMissingError, RefusedError
from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedState, ObservedSubject
from syncd.http.client import ApiClient, Endpoint, expect_list, expect_object, expect_objects
from syncd.http.pagination import Page, read_as
from syncd.http.retry import Retry
from syncd.metering.base import CustomerEdit, Decide, SubjectWrite

_API = "metering API"
_CUSTOMERS = "/api/v1/customers"
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

_GONE = frozenset({404, 410, 412})
# "canceled" is still active until the end of its period (Subscription.activeTo).
_RUNNING = frozenset({"active", "canceled"})


class OpenMeterV1:
    """A `MeteringTarget` of dialect openmeter-v1."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._client = ApiClient(endpoint, retry)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def observe(self) -> ObservedState:
        """Return all customers and subject entities."""
        return ObservedState(self._customers(), self.subjects())

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
        body: dict[str, object] = {
            "key": key,
            "name": name,
            "metadata": {**details.metadata, **metadata},
            "usageAttribution": {"subjectKeys": list(subject_keys)},
            "description": details.description,
            "primaryEmail": details.email,
            "currency": details.currency,
            "billingAddress": address or None,
        }
        self._client.request(
            "POST", _CUSTOMERS, body={field: value for field, value in body.items() if value is not None}
        )

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        """Return the customer with exactly this key (the path accepts ids too)."""
        document = self._read(key)
        found = _observed_customer(document) if document else None
        return found if found and found.key == key else None

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        """Read, decide, merge, write; a retry repeats all four, so that it undoes no other edit."""
        return self._client.repeat(lambda: self._edit_once(customer_id, decide))

    def _edit_once(self, customer_id: str, decide: Decide) -> bool:
        document = self._read(customer_id, repeat=False)
        if document is None:
            raise BlockedError("the customer was deleted in the meantime; plan again")
        observed = _observed_customer(document)
        edit = decide(observed)
        if edit is None:
            return False
        body = _merged(document, edit)
        if body == _replaceable(document):
            return False
        try:
            path = f"{_CUSTOMERS}/{quote(observed.id, safe='')}"
            self._client.request("PUT", path, body=body, repeat=False)
        except RefusedError as error:
            if error.status not in _GONE:
                raise
            raise BlockedError("the customer was deleted in the meantime; plan again") from None
        return True

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        """Return all subject entities, None if the server has no such endpoint."""
        try:
            listed = self._client.get("/api/v1/subjects")
        except RefusedError as error:
            if error.status in {404, 405, 410}:
                return None
            raise
        entries = expect_list(listed, _API, "/api/v1/subjects")
        return tuple(_observed_subject(expect_object(entry, _API, "a subject")) for entry in entries)

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        """Create or update subject entities; fields that a write does not name stay."""
        body: list[dict[str, object]] = []
        for write in writes:
            entry: dict[str, object] = {"key": write.key, "metadata": dict(write.metadata)}
            if write.display_name is not None:
                entry["displayName"] = write.display_name
            body.append(entry)
        self._client.request("POST", "/api/v1/subjects", body=body)

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        """Return the value of a meter for each subject, over the whole period."""
        params: dict[str, str | int | list[str]] = {"groupBy": ["subject"]}
        params |= {name: value for name, value in (("from", since), ("to", until)) if value}
        path = f"/api/v1/meters/{quote(meter, safe='')}/query"
        try:
            answer = expect_object(self._client.get(path, params), _API, path)
        except RefusedError as error:
            if error.status != 404:
                raise
            raise MeterMissingError(
                f"the metering API has no meter {meter!r}; `syncd meters apply` creates it"
            ) from None
        values: dict[str, float] = {}
        for entry in expect_list(answer.get("data"), _API, f"data of {path}"):
            row = expect_object(entry, _API, "a row of usage")
            subject, value = row.get("subject") or "", row.get("value")
            if not isinstance(subject, str) or isinstance(value, bool) or not isinstance(value, int | float):
                raise MalformedError(f"{_API}: a row of {path} has no subject or no value")
            values[subject] = values.get(subject, 0) + value
        return values

    def _read(self, id_or_key: str, *, repeat: bool = True) -> dict[str, object] | None:
        """Return a customer, None if there is none; by id the server returns deleted ones (`deletedAt`)."""
        path = f"{_CUSTOMERS}/{quote(id_or_key, safe='')}"
        try:
            answer = self._client.request("GET", path, params={"expand": ["subscriptions"]}, repeat=repeat)
        except RefusedError as error:
            if error.status in _GONE:
                return None
            raise
        document = expect_object(answer, _API, path)
        return None if document.get("deletedAt") else document

    def _customers(self) -> tuple[ObservedCustomer, ...]:
        what = f"{_CUSTOMERS} of the {_API}"
        return tuple(read_as(_observed_customer, self._page, what, created="createdAt"))

    def _page(self, number: int, size: int) -> Page:
        params: dict[str, str | int | list[str]] = {
            "page": number,
            "pageSize": size,
            "orderBy": "createdAt",
            "order": "ASC",
            "expand": ["subscriptions"],
        }
        page = expect_object(self._client.get(_CUSTOMERS, params), _API, _CUSTOMERS)
        items = expect_objects(page.get("items"), _API, f"items of {_CUSTOMERS}", "a customer")
        total = page.get("totalCount")
        return Page(items, total if isinstance(total, int) else None)


def _replaceable(document: dict[str, object]) -> dict[str, object]:
    return {name: document[name] for name in _REPLACEABLE if document.get(name) is not None}


def _merged(document: dict[str, object], edit: CustomerEdit) -> dict[str, object]:
    body = _replaceable(document)
    if edit.name is not None:
        body["name"] = edit.name
    if edit.metadata is not None:
        body["metadata"] = {**_mapping(document.get("metadata")), **edit.metadata}
    if edit.subject_keys is not None:
        attribution = _mapping(document.get("usageAttribution"))
        body["usageAttribution"] = {**attribution, "subjectKeys": list(edit.subject_keys)}
    return body


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _observed_customer(document: dict[str, object]) -> ObservedCustomer:
    identity, name, key = document.get("id"), document.get("name"), document.get("key")
    attribution, metadata = document.get("usageAttribution"), document.get("metadata")
    keys = attribution.get("subjectKeys") or [] if isinstance(attribution, dict) else []
    if not isinstance(identity, str) or not isinstance(name, str) or not isinstance(keys, list):
        raise MalformedError(f"{_API}: a customer without id, name or a list of subject keys")
    return ObservedCustomer(
        identity,
        key if isinstance(key, str) and key else None,
        name,
        tuple(map(str, keys)),
        {name: value for name, value in _mapping(metadata).items() if isinstance(value, str)},
        _active_subscription(document),
    )


def _active_subscription(document: dict[str, object]) -> str | None:
    current = document.get("currentSubscriptionId")
    if isinstance(current, str) and current:
        return current
    listed = document.get("subscriptions")
    for subscription in listed if isinstance(listed, list) else ():
        fields = _mapping(subscription)
        if fields.get("status") in _RUNNING:
            return str(fields.get("id"))
    return None


def _observed_subject(document: dict[str, object]) -> ObservedSubject:
    key, display_name = document.get("key"), document.get("displayName")
    if not isinstance(key, str):
        raise MalformedError(f"{_API}: a subject without key")
    return ObservedSubject(
        key=key,
        display_name=display_name if isinstance(display_name, str) else None,
        metadata=_mapping(document.get("metadata")),
    )
