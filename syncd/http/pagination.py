"""Lists that are paged by number, read whole although they change while they are read.

Sorted by time of creation, what is new comes last, so only deletions shift pages: the entry that
moves onto the page before is then never seen. Three things betray it: a total that is not the
same on each page, fewer different entries than the total, and (where one entry goes as another
comes, which keeps the total) an entry that is younger than the youngest there was at the start.
Then the whole list is read again, a few times, and at last given up: never a part of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from syncd.core.errors import MalformedError, RefusedError

READS = 3
PAGE_SIZES = (1000, 100)
"""What is asked for, and what instead where a server refuses so large a page."""

Entry = dict[str, object]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Page:
    """One page, and how many entries the whole list has; None where the server does not say."""

    entries: Sequence[Entry]
    total: int | None


Fetch = Callable[[int, int], Page]
"""Asks for a page by its number, from 1, and its size."""


def read_all(fetch: Fetch, what: str, *, created: str) -> list[Entry]:
    """Return all entries, in order; `created` names the field with the time of creation.

    Raises MalformedError when the list is never whole, and what `fetch` raises.
    """
    return read_as(lambda entry: entry, fetch, what, created=created)


def read_as(make: Callable[[Entry], _T], fetch: Fetch, what: str, *, created: str) -> list[_T]:
    """Return what `make` makes of each entry, page by page: a long list is never held as it came."""
    for _ in range(READS):
        entries = _read_once(make, fetch, what, created)
        if entries is not None:
            return entries
    raise MalformedError(f"{what} changed during each of {READS} readings; try again when it is quieter")


def _read_once(make: Callable[[Entry], _T], fetch: Fetch, what: str, created: str) -> list[_T] | None:
    page, size = _first(fetch)
    total = page.total
    if total is None:
        raise MalformedError(f"{what}: the answer does not say how many there are")
    if len(page.entries) >= total:
        found = _by_id(page.entries, what, make)
        return list(found.values()) if len(found) == total else None
    # The youngest has to be known before the first page is read, so that page is read once more.
    last = fetch(total, 1)
    youngest = _time(last.entries[0], created) if last.entries else None
    found, number = dict[str, _T](), 0
    while len(found) < total:
        number += 1
        page = fetch(number, size)
        before = len(found)
        found |= _by_id(page.entries, what, make)
        if page.total != total or not page.entries or len(found) < before + len(page.entries):
            return None
    if youngest and any((_time(entry, created) or youngest) > youngest for entry in page.entries):
        return None
    return list(found.values()) if len(found) == total and last.total == total else None


def _first(fetch: Fetch) -> tuple[Page, int]:
    large, small = PAGE_SIZES
    try:
        return fetch(1, large), large
    except RefusedError as error:
        if error.status != 400:
            raise
        return fetch(1, small), small


def _by_id(entries: Sequence[Entry], what: str, make: Callable[[Entry], _T]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for entry in entries:
        identity = entry.get("id")
        if not isinstance(identity, str) or not identity:
            raise MalformedError(f"{what}: an entry has no id")
        found[identity] = make(entry)
    return found


def _time(entry: Entry, field: str) -> datetime | None:
    value = entry.get(field)
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return moment if moment and moment.tzinfo else None
