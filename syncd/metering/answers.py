"""Answers of a metering API, whatever its dialect: their checks, and what both dialects read alike.

Each document is held against what was asked for before anything is derived from it. A cache with a wrong
key, a lagging replica or a proxy that answers twice on one connection returns a valid document of *another*
customer; what is written next would then bill the wrong one. Such an answer is an `UnreliableApiError`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from urllib.parse import quote

from syncd.core.errors import (
    BlockedError,
    MalformedError,
    MeterMissingError,
    RefusedError,
    UnreliableApiError,
)
from syncd.core.model import shared
from syncd.http.client import ApiClient, Params
from syncd.http.json import expect_list, expect_object
from syncd.metering.base import ArrivedEvent, GroupedValue, Write, WriteTrial

API = "metering API"
"""How messages call it."""
GONE = frozenset({404, 410, 412})
"""Statuses for a customer that was deleted or never existed."""
NO_SUCH_PATH = frozenset({404, 405, 410})
_LARGEST = 1e18
"""More than any meter counts: an exabyte, or the nanoseconds of 31 years. A sum of these stays finite."""
_UNKNOWN_ID = "00000000000000000000000000"
"""A ULID of the first millisecond of 1970, which no server has ever created."""
PAGE_OF_EVENTS = 100
"""Events of one page; both dialects refuse more."""
PAGE_OF_PARTS = 100
"""Subscriptions and invoices of one customer that are read before its deletion."""


def segment(key: str, what: str) -> str:
    """Return a key as one segment of a path; raises BlockedError for one that libraries or proxies fold.

    Clients, servers and proxies resolve ``.`` and ``..`` in a path, encoded (``%2e``) or not, some also
    after they decode ``%2F`` (RFC 3986, 5.2.4 and 6.2.2): the request would reach another entity.

    OpenMeter decodes a path twice if its encoding is the shortest one (Go's URL.RawPath is then empty, and
    the router passes on the decoded path): ``a%252Fb`` reaches ``a/b``, and ``100%25`` is a 400. So a key
    with a ``%`` is encoded throughout; one of nothing else stays a 400.
    """
    if not key or any(part in (".", "..") for part in re.split(r"[/\\]", key)):
        raise BlockedError(
            f"{what} {key!r} cannot be part of the address of a request, because '.' and '..' lead to another"
            " address. Rename it at its source, or change it by hand"
        )
    if "%" in key:
        return "".join(f"%{byte:02X}" for byte in key.encode())
    return quote(key, safe="")


def id_segment(identity: str) -> str:
    """Return an id that the server assigned as one segment of a path. Raises MalformedError."""
    try:
        return segment(identity, "the id")
    except BlockedError as error:
        raise MalformedError(f"{API}: {error}") from None


def expect_asked(document: Mapping[str, object], what: str, **asked: str) -> None:
    """Raise UnreliableApiError unless each of these fields of the document has the value asked for."""
    for field, wanted in asked.items():
        if (found := document.get(field)) != wanted:
            raise unreliable(f"asked for the {what} with {field} {wanted!r}, it answered with {found!r}")


def expect_written(answer: object, what: str, **asked: str) -> None:
    """Raise UnreliableApiError if the answer to a write is about something else; it may be short or empty."""
    document = mapping(answer)
    named = {field: wanted for field, wanted in asked.items() if document.get(field) is not None}
    expect_asked(document, what, **named)


def unreliable(problem: str) -> UnreliableApiError:
    """Return the error for an answer about something else than was asked for."""
    return UnreliableApiError(
        f"the {API} is unreliable: {problem}. Nothing more is changed. Look for a cache, proxy or replica"
        " between syncd and the API that mixes up answers, then run syncd again"
    )


def expect_distinct(entries: Sequence[Mapping[str, object]], what: str, field: str = "id") -> None:
    """Raise UnreliableApiError if two entries of one answer have the same id and differ."""
    named = [identity for entry in entries if isinstance(identity := entry.get(field), str)]
    if len(set(named)) == len(named):
        return  # as nearly always, and for a hundred thousand customers
    seen: dict[object, Mapping[str, object]] = {}
    for entry in entries:
        identity = entry.get(field)
        if isinstance(identity, str) and seen.setdefault(identity, entry) != entry:
            raise unreliable(f"it listed {what} with {field} {identity!r} twice, with different content")


def expect_among(found: object, asked: Collection[str], what: str) -> None:
    """Raise UnreliableApiError if an answer names (None: does not name) something that was not asked for."""
    if found is not None and found not in asked:
        raise unreliable(f"asked for {what}, it answered with that of {found!r}")


def mapping(value: object) -> dict[str, object]:
    """Return an object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def text_or_none(value: object) -> str | None:
    """Return a text that is not empty, else None."""
    return value if isinstance(value, str) and value else None


def whole_or_none(value: object) -> int | None:
    """Return a count; v3 sends it as a float."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def texts(value: object) -> dict[str, str]:
    """Return the entries of an object that are texts."""
    return {name: shared(entry) for name, entry in mapping(value).items() if isinstance(entry, str)}


def number(value: object, what: str) -> float:
    """Return a figure: v1 sends a number, v3 a string of any precision. Raises MalformedError."""
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            found = float(value)
            if abs(found) <= _LARGEST:  # neither NaN nor infinite
                return found
    except (ValueError, OverflowError):
        pass
    raise MalformedError(f"{API}: a row of {what} has no number as its value, or one that no meter can have")


def subject_of(value: object, what: str) -> str:
    """Return the subject of a row of usage; events without one have the empty subject."""
    if value is None or isinstance(value, str):
        return value or ""
    raise MalformedError(f"{API}: a row of {what} has no subject")


def moment(value: object, what: str) -> datetime:
    """Return an RFC 3339 time. Raises MalformedError."""
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        raise MalformedError(f"{API}: {what} has an invalid time {value!r}") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def by_day(rows: Iterable[tuple[object, object]], what: str) -> dict[date, float]:
    """Return windows of a day by their UTC day."""
    found: dict[date, float] = {}
    for start, value in rows:
        day = moment(start, f"a row of {what}").astimezone(UTC).date()
        found[day] = found.get(day, 0) + number(value, what)
    return found


def grouped(
    rows: Iterable[tuple[object, Mapping[str, object], object]], dimensions: Sequence[str], what: str
) -> list[GroupedValue]:
    """Return rows of subject, dimensions and value; rows of the same subject and values are added up.

    An event without the dimension may come as an empty text or as null: both are the empty label.
    """
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    for subject, labels, value in rows:
        values = tuple(shared(_label(labels.get(name))) for name in dimensions)
        key = (subject_of(subject, what), values)
        found[key] = found.get(key, 0) + number(value, what)
    return [GroupedValue(subject, labels, value) for (subject, labels), value in found.items()]


def _label(value: object) -> str:
    return value if isinstance(value, str) else ""


def without_none(body: Mapping[str, object]) -> dict[str, object]:
    """Return a body without the fields that are None."""
    return {name: value for name, value in body.items() if value is not None}


def arrived(entry: Mapping[str, object], customer_id: object) -> ArrivedEvent:
    """Return an entry of a list of events."""
    event = mapping(entry.get("event"))
    return ArrivedEvent(
        str(event.get("type") or ""),
        subject_of(event.get("subject"), "the latest events"),
        text_or_none(customer_id),
    )


def missing_meter(key: str) -> MeterMissingError:
    """Return the error for a meter that the server does not have."""
    return MeterMissingError(f"the {API} has no meter {key!r}; `syncd meters apply` creates it")


def deleted_meanwhile() -> BlockedError:
    """Return the error for a change of a customer that is gone."""
    return BlockedError("the customer was deleted in the meantime; plan again")


def entries_of(document: Mapping[str, object], field: str, path: str, what: str) -> list[dict[str, object]]:
    """Return the list in this field, each entry checked to be an object."""
    return objects(document.get(field), f"{field} of {path}", what)


def objects(value: object, where: str, what: str) -> list[dict[str, object]]:
    """Return a list of objects. Raises MalformedError."""
    return [expect_object(entry, API, what) for entry in expect_list(value, API, where)]


def object_or_none(
    client: ApiClient, path: str, params: Params | None = None, *, repeat: bool = True
) -> dict[str, object] | None:
    """Return the object at a path, None if the server does not have it."""
    try:
        return expect_object(client.request("GET", path, params=params, repeat=repeat), API, path)
    except RefusedError as error:
        if error.status not in GONE:
            raise
        return None


def parts(client: ApiClient, path: str, field: str, params: Params | None) -> list[dict[str, object]]:
    """Return the first page of a list, an empty one on an edition of the server without such a list."""
    answer = object_or_none(client, path, params)
    return [] if answer is None else entries_of(answer, field, path, f"an entry of {path}")


def open_subscriptions(listed: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """Return the ids of the subscriptions that have not ended."""
    found = [str(entry.get("id")) for entry in listed if entry.get("status") != "inactive"]
    if len(listed) >= PAGE_OF_PARTS:
        # Only the first page is read. An active one may follow on the next page, so assume that it does.
        found.append("and perhaps more than were listed")
    return tuple(found)


def put_customer(client: ApiClient, path: str, body: Mapping[str, object], **asked: str) -> None:
    """Replace a customer, once; raises BlockedError if it was deleted in the meantime."""
    try:
        written = client.request("PUT", path, body=body, repeat=False)
    except RefusedError as error:
        if error.status not in GONE:
            raise
        raise deleted_meanwhile() from None
    expect_written(written, "changed customer", **asked)


def deleted(client: ApiClient, path: str) -> bool:
    """Delete and return whether there was anything to delete; sent once, see `Remover`."""
    try:
        client.request("DELETE", path, repeat=False)
    except RefusedError as error:
        if error.status in GONE:
            return False
        raise
    return True


def try_write(client: ApiClient, write: Write, customers: str, subjects: str | None) -> WriteTrial:
    """Send a write that changes nothing; `subjects` is None for a dialect without subject entities.

    A server checks the token before the body: 401 and 403 mean that the permission is missing, any other
    4xx that it is granted. Raises UnauthorizedError for the first, other ApiErrors if it cannot be told.
    """
    requests: dict[Write, tuple[str, str | None, object]] = {
        "create customers": ("POST", customers, {}),
        "change customers": ("PUT", f"{customers}/{_UNKNOWN_ID}", {}),
        "delete customers": ("DELETE", f"{customers}/{_UNKNOWN_ID}", None),
        "write subjects": ("POST", subjects, []),
    }
    method, path, body = requests[write]
    if path is None:
        return WriteTrial("no such path", "this dialect has no subject entities")
    try:
        client.request(method, path, body=body, repeat=False)
    except RefusedError as error:
        # Of a path with an unknown id, 404 is the answer that is wanted.
        absent = frozenset({405}) if _UNKNOWN_ID in path else NO_SUCH_PATH
        return WriteTrial("no such path" if error.status in absent else "allowed", str(error))
    harmless = write in ("delete customers", "write subjects")
    return WriteTrial("allowed" if harmless else "accepted", f"{method} {path}")
