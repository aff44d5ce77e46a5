"""One page of customers with their usage, read from the metering API.

The metering API itself searches, paginates and attributes usage to customers, so a page takes at most five
requests, however many customers there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal
from urllib.parse import quote

from syncd.config.settings import Config
from syncd.core.errors import ApiError, MalformedError, MeterMissingError, RefusedError
from syncd.dashboard.probes import probe_client
from syncd.http.client import ApiClient, Params, expect_list, expect_object
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER
from syncd.runs.factory import metering_endpoint
from syncd.runs.unbilled import rfc3339

PAGE_SIZE: Final = 25
MAX_SUBJECTS: Final = 100
"""Subjects shown of one customer; its totals include all of them."""

Field = Literal["name", "key", "subject"]
FIELDS: Final[tuple[Field, ...]] = ("name", "key", "subject")
_API: Final = "metering API"
_V3_FIELDS: Final = {"name": "name", "key": "key", "subject": "usage_attribution_subject_key"}

UsageByCustomer = Mapping[str, Mapping[str, float]]
"""Customer id -> subject -> value of a meter."""


@dataclass(frozen=True, slots=True)
class Span:
    """A span of event time; `until` None means now. Both ends are midnight UTC."""

    name: str
    title: str
    since: datetime
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ListedCustomer:
    """A customer of the list; subjects in the order of the metering API."""

    id: str
    key: str | None
    name: str
    subject_keys: tuple[str, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Page:
    """One page of customers. `total` counts all pages; it is None if the API does not send it.

    If usage cannot be read, it is empty and `usage_problem` has the reason.
    """

    customers: tuple[ListedCustomer, ...]
    total: int | None
    requests: UsageByCustomer
    tokens: UsageByCustomer
    usage_problem: str | None = None


def spans(now: datetime) -> tuple[Span, ...]:
    """Return the selectable spans, the default first."""
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = today.replace(day=1)
    last_month = (month - timedelta(days=1)).replace(day=1)
    return (
        Span("31d", "last 31 days", today - timedelta(days=31)),
        Span("7d", "last 7 days", today - timedelta(days=7)),
        Span("today", "today", today),
        Span("month", f"{month:%B %Y}", month),
        Span("last-month", f"{last_month:%B %Y}", last_month, month),
    )


def read_page(config: Config, field: Field, text: str, number: int, span: Span) -> Page:
    """Return a page of the customers whose `field` contains `text`; raises ApiError."""
    with probe_client(metering_endpoint(config)) as client:
        kind: type[_V1 | _V3] = _V3 if config.metering.dialect == "openmeter-v3" else _V1
        api = kind(client)
        customers, total = api.customers(field, text, number)
        if not customers:
            return Page((), total, {}, {})
        try:
            requests, tokens = (
                _by_customer(customers, api.usage(meter, [customer.id for customer in customers], span))
                for meter in (REQUESTS_METER, TOKENS_METER)
            )
        except (ApiError, MeterMissingError) as error:
            return Page(customers, total, {}, {}, str(error))
        return Page(customers, total, requests, tokens)


_Row = tuple[str | None, str, float]
"""Customer id if the server sends it, subject, value."""


def _by_customer(customers: Sequence[ListedCustomer], rows: Iterable[_Row]) -> UsageByCustomer:
    """Add up rows by customer; leaves out other customers, which some servers do not filter out."""
    customer_of = {customer.id: customer.id for customer in customers}
    customer_of.update({customer.key: customer.id for customer in customers if customer.key})
    customer_of.update({key: customer.id for customer in customers for key in customer.subject_keys})
    ids = {customer.id for customer in customers}
    used: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for customer_id, subject, value in rows:
        owner = customer_id if customer_id in ids else customer_of.get(subject)
        if owner is not None:
            used[owner][subject] += value
    return used


class _V1:
    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def customers(
        self, field: Field, text: str, number: int
    ) -> tuple[tuple[ListedCustomer, ...], int | None]:
        path = "/api/v1/customers"
        params: dict[str, str | int | list[str]] = {"page": number, "pageSize": PAGE_SIZE, "orderBy": "name"}
        if text:
            params[field] = text
        document = expect_object(self._client.get(path, params), _API, path)
        items = expect_list(document.get("items"), _API, f"items of {path}")
        total = document.get("totalCount")
        found = (_listed(item, "usageAttribution", "subjectKeys", "metadata") for item in items)
        return tuple(found), total if isinstance(total, int) else None

    def usage(self, meter: str, customers: Sequence[str], span: Span) -> list[_Row]:
        path = f"/api/v1/meters/{quote(meter, safe='')}/query"
        params: dict[str, str | int | list[str]] = {
            "groupBy": ["subject", "customer_id"],
            "filterCustomerId": list(customers),
            "from": rfc3339(span.since),
        }
        if span.until:
            params["to"] = rfc3339(span.until)
        try:
            document = expect_object(self._client.get(path, params), _API, path)
        except RefusedError as error:
            if error.status != 404 or "meter" not in error.detail:
                raise
            raise _missing(meter) from None
        rows = expect_list(document.get("data"), _API, f"data of {path}")
        return [_row(row, row.get("customerId"), row.get("subject")) for row in map(_object, rows)]


class _V3:
    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def customers(
        self, field: Field, text: str, number: int
    ) -> tuple[tuple[ListedCustomer, ...], int | None]:
        path = "/openmeter/customers"
        params: Params = {"page[size]": PAGE_SIZE, "page[number]": number, "sort": "name"}
        if text:
            params = {**params, f"filter[{_V3_FIELDS[field]}][contains]": text}
        document = expect_object(self._client.get(path, params), _API, path)
        items = expect_list(document.get("data"), _API, f"data of {path}")
        total = _mapping(_mapping(document.get("meta")).get("page")).get("total")
        found = (_listed(item, "usage_attribution", "subject_keys", "labels") for item in items)
        return tuple(found), int(total) if isinstance(total, int | float) else None

    def usage(self, meter: str, customers: Sequence[str], span: Span) -> list[_Row]:
        path = f"/openmeter/meters/{quote(self._meter_id(meter), safe='')}/query"
        body: dict[str, object] = {
            "group_by_dimensions": ["subject", "customer_id"],
            "filters": {"dimensions": {"customer_id": {"in": list(customers)}}},
            "from": rfc3339(span.since),
        }
        if span.until:
            body["to"] = rfc3339(span.until)
        document = expect_object(self._client.request("POST", path, body=body), _API, path)
        found = []
        for row in map(_object, expect_list(document.get("data"), _API, f"data of {path}")):
            dimensions = _mapping(row.get("dimensions"))
            found.append(_row(row, dimensions.get("customer_id"), dimensions.get("subject")))
        return found

    def _meter_id(self, key: str) -> str:
        path = "/openmeter/meters"
        document = expect_object(self._client.get(path, {"filter[key][eq]": key}), _API, path)
        for item in map(_object, expect_list(document.get("data"), _API, f"data of {path}")):
            if item.get("key") == key:
                return str(item.get("id"))
        raise _missing(key)


def _missing(meter: str) -> MeterMissingError:
    return MeterMissingError(f"the {_API} has no meter {meter!r}; `syncd meters apply` creates it")


def _listed(item: object, attribution: str, keys: str, metadata: str) -> ListedCustomer:
    document = _object(item)
    identity, name, key = document.get("id"), document.get("name"), document.get("key")
    subjects = _mapping(document.get(attribution)).get(keys) or []
    if not isinstance(identity, str) or not isinstance(name, str) or not isinstance(subjects, list):
        raise MalformedError(f"{_API}: a customer without id, name or a list of subject keys")
    entries = _mapping(document.get(metadata))
    return ListedCustomer(
        identity,
        key if isinstance(key, str) and key else None,
        name,
        tuple(str(subject) for subject in subjects),
        {name: value for name, value in entries.items() if isinstance(value, str)},
    )


def _row(row: Mapping[str, object], customer: object, subject: object) -> _Row:
    value = row.get("value")  # v1: a number; v3: a string of any precision
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise MalformedError(f"{_API}: a row of usage has no value")
    try:
        figure = float(value)
    except ValueError:
        raise MalformedError(f"{_API}: the value of a row of usage is not a number") from None
    return customer if isinstance(customer, str) else None, str(subject or ""), figure


def _object(value: object) -> dict[str, object]:
    return expect_object(value, _API, "an entry of a list")


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
