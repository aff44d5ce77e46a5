"""Complete reads of lists that are paged by number and may change during the read.

In the order of creation new entries come last, so only deletions shift pages: the entry that moves to the
previous page is then missed. Three signs reveal it: a total that differs between pages, fewer distinct
entries than the total, and (if one entry is added for each one deleted, which keeps the total) an entry
younger than the youngest at the start. The whole list is then read again, up to `_MAX_READS` times,
before the read fails: it never returns a part of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from syncd.core.errors import MalformedError, RefusedError

_MAX_READS = 3
_PAGE_SIZES = (1000, 100)
"""The size that is asked for, and the smaller one for a server that refuses it."""

_MAX_PAGES = 10_000
"""Pages of one list: a list that never ends must not fill the memory."""

Entry = dict[str, object]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Page:
    """One page, and the number of entries in the whole list; None if the server does not say."""

    entries: Sequence[Entry]
    total: int | None


Fetch = Callable[[int, int], Page]
"""Requests a page by its number, from 1, and its size."""


def read_all(fetch: Fetch, what: str, *, created: str, max_pages: int = _MAX_PAGES) -> list[Entry]:
    """Return all entries, in order; `created` names the field with the time of creation.

    Raises MalformedError if no read is complete, and any error of `fetch`.
    """
    return read_as(lambda entry: entry, fetch, what, created=created, max_pages=max_pages)


def read_as(
    make: Callable[[Entry], _T], fetch: Fetch, what: str, *, created: str, max_pages: int = _MAX_PAGES
) -> list[_T]:
    """Return all entries, each converted by `make`; the raw entries of only one page are in memory."""
    for _ in range(_MAX_READS):
        entries = _read_once(make, fetch, what, created, max_pages)
        if entries is not None:
            return entries
    raise MalformedError(f"{what} changed during each of {_MAX_READS} readings; try again later")


def _read_once(
    make: Callable[[Entry], _T], fetch: Fetch, what: str, created: str, max_pages: int
) -> list[_T] | None:
    page, size = _first(fetch)
    total = page.total
    if total is None:
        raise MalformedError(f"{what}: the answer does not say how many there are")
    if len(page.entries) >= total:
        found = _by_id(page.entries, what, make)
        return list(found.values()) if len(found) == total else None
    # The youngest entry must be known before the pages are read, hence the first page is read again.
    last = fetch(total, 1)
    youngest = _time(last.entries[0], created) if last.entries else None
    found, number = dict[str, _T](), 0
    while len(found) < total:
        number += 1
        if number > max_pages:
            raise MalformedError(f"{what}: more than {max_pages:,} pages; is its URL right?")
        page = fetch(number, size)
        before = len(found)
        found |= _by_id(page.entries, what, make)
        if page.total != total or not page.entries or len(found) < before + len(page.entries):
            return None
    if youngest and any((_time(entry, created) or youngest) > youngest for entry in page.entries):
        return None
    return list(found.values()) if len(found) == total and last.total == total else None


def _first(fetch: Fetch) -> tuple[Page, int]:
    large, small = _PAGE_SIZES
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
