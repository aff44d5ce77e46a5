"""OpenMeter's v1 API (openmeter-v1.yaml): camelCase, `metadata`, PUT replaces, subjects on some servers.

PUT clears what it leaves out (description, metadata, usage attribution, billing address, key), and
there is no ETag. So an update reads the customer, changes only what we own in that very document
and writes it back at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from syncd.errors import BlockedError, MalformedError, MeterMissingError, RefusedError
from syncd.http import ApiClient, Endpoint, expect_list, expect_object
from syncd.model import ObservedCustomer, ObservedSubject, ObservedWorld
from syncd.retry import Retry
from syncd.targets.base import CustomerEdit, Decide, SubjectWrite

_API = "metering API"
_PAGE_SIZE = 1000
_READS = 3
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
"""CustomerReplaceUpdate: what PUT accepts, hence what has to be sent back."""

# "canceled" still runs until the end of its period (Subscription.activeTo).
_RUNNING = frozenset({"active", "canceled"})


class OpenMeterV1:
    """A `MeteringTarget` of dialect openmeter-v1."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._client = ApiClient(endpoint, retry)
        self._retry = retry

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def observe(self) -> ObservedWorld:
        """Return all customers and subject entities."""
        return ObservedWorld(self._customers(), self.subjects())

    def create_customer(
        self, key: str, name: str, subject_keys: Sequence[str], metadata: Mapping[str, str]
    ) -> None:
        """Create a customer; repeated after a lost answer, which may then answer 409."""
        body = {
            "key": key,
            "name": name,
            "metadata": dict(metadata),
            "usageAttribution": {"subjectKeys": list(subject_keys)},
        }
        self._client.request("POST", "/api/v1/customers", body=body)

    def customer_by_key(self, key: str) -> ObservedCustomer | None:
        """Return the customer that has exactly this key (the path takes ids as well)."""
        document = self._read(key)
        found = _observed_customer(document) if document else None
        return found if found and found.key == key else None

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        """Read, decide, merge, write; after a lost answer all four again, so that nobody's edit is undone."""
        return self._retry.run(lambda: self._edit_once(customer_id, decide))

    def _edit_once(self, customer_id: str, decide: Decide) -> bool:
        document = self._read(customer_id, repeat=False)
        if document is None:
            raise BlockedError("the customer was deleted meanwhile; plan again")
        observed = _observed_customer(document)
        edit = decide(observed)
        if edit is None:
            return False
        body = _merged(document, edit)
        if body == _replaceable(document):
            return False
        self._client.request(
            "PUT", f"/api/v1/customers/{quote(observed.id, safe='')}", body=body, repeat=False
        )
        return True

    def subjects(self) -> tuple[ObservedSubject, ...] | None:
        """Return all subject entities; 404 says that the server has no such endpoint."""
        try:
            listed = self._client.get("/api/v1/subjects")
        except RefusedError as error:
            if error.status in {404, 405, 410}:
                return None
            raise
        entries = expect_list(listed, _API, "/api/v1/subjects")
        return tuple(_observed_subject(expect_object(entry, _API, "a subject")) for entry in entries)

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        """Create or update subject entities; what a write does not name is left as it is."""
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
                f"the metering API has no meter {meter!r}; create it there, then ask again"
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
        """Return a customer, None if there is none; a deleted one is answered by its id, with `deletedAt`."""
        path = f"/api/v1/customers/{quote(id_or_key, safe='')}"
        try:
            answer = self._client.request("GET", path, params={"expand": ["subscriptions"]}, repeat=repeat)
        except RefusedError as error:
            if error.status in {404, 410, 412}:
                return None
            raise
        document = expect_object(answer, _API, path)
        return None if document.get("deletedAt") else document

    def _customers(self) -> tuple[ObservedCustomer, ...]:
        """Read all pages; pages shift when customers come or go meanwhile, which the total betrays."""
        for _ in range(_READS):
            customers = self._customers_once()
            if customers is not None:
                return customers
        raise MalformedError(
            f"the customers of the {_API} changed during each of {_READS} readings;"
            " try again when it is quieter"
        )

    def _customers_once(self) -> tuple[ObservedCustomer, ...] | None:
        found: dict[str, ObservedCustomer] = {}
        total: int | None = None
        number = 1
        while True:
            page = self._page(number)
            items = expect_list(page.get("items"), _API, "items of /api/v1/customers")
            count = page.get("totalCount")
            if not isinstance(count, int) or (total is not None and count != total):
                return None
            total = count
            for item in items:
                customer = _observed_customer(expect_object(item, _API, "a customer"))
                if customer.id in found:
                    return None
                found[customer.id] = customer
            if len(found) >= total:
                return tuple(found.values())
            if not items:
                return None
            number += 1

    def _page(self, number: int) -> dict[str, object]:
        params: dict[str, str | int | list[str]] = {
            "page": number,
            "pageSize": _PAGE_SIZE,
            "orderBy": "createdAt",
            "order": "ASC",
            "expand": ["subscriptions"],
        }
        return expect_object(self._client.get("/api/v1/customers", params), _API, "/api/v1/customers")


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


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _observed_customer(document: dict[str, object]) -> ObservedCustomer:
    identity, name, key = document.get("id"), document.get("name"), document.get("key")
    keys = _mapping(document.get("usageAttribution")).get("subjectKeys") or []
    metadata = _mapping(document.get("metadata"))
    if not isinstance(identity, str) or not isinstance(name, str) or not isinstance(keys, list):
        raise MalformedError(f"{_API}: a customer without id, name or a list of subject keys")
    return ObservedCustomer(
        id=identity,
        key=key if isinstance(key, str) and key else None,
        name=name,
        subject_keys=tuple(str(subject) for subject in keys),
        metadata={name: value for name, value in metadata.items() if isinstance(value, str)},
        active_subscription=_active_subscription(document),
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
