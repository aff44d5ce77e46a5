"""Tables that visitors sort, search, filter, leaf through and download as CSV. Pure but for the response.

A page describes its table once (`Table`), and its query parameters say what is shown: ``sort=-requests``
(descending), ``q=acme``, the name of a `Choice`, ``page=2``, ``csv=1``. Wrong values mean the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar

from starlette.responses import Response

from syncd.core.text_csv import Cell, document
from syncd.dashboard.views import Pages, page_of

_T = TypeVar("_T")
_LONGEST_SEARCH: Final = 200
PAGE_SIZE: Final = 50


@dataclass(frozen=True, slots=True)
class Column(Generic[_T]):
    """A column; `of` returns the value by which it is sorted and that the CSV has.

    A column of numbers is sorted descending at first. One that is only in the CSV has `shown=False`.
    """

    name: str
    title: str
    of: Callable[[_T], Cell]
    number: bool = False
    sortable: bool = True
    shown: bool = True


@dataclass(frozen=True, slots=True)
class Choice(Generic[_T]):
    """A filter: the first of `options` (value to title) shows all rows, another one those that fit it."""

    name: str
    title: str
    options: Mapping[str, str]
    fits: Callable[[_T, str], bool]


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a column: what its link sorts by, and how the table is sorted by it now."""

    title: str
    number: bool
    link: str | None
    """The value of `sort` that a click asks for; None if the column is not sortable."""
    sorted: Literal["ascending", "descending"] | None


@dataclass(frozen=True, slots=True)
class View(Generic[_T]):
    """What a visitor sees of a table."""

    rows: Sequence[_T]
    """Those of this page."""
    found: Sequence[_T]
    """All that the search and filters leave, sorted."""
    total: int
    """How many there are without search and filters."""
    heads: tuple[Head, ...]
    pages: Pages
    search: str
    chosen: Mapping[str, str]
    """The value of each filter."""
    query: Mapping[str, str] = field(default_factory=dict)
    """The parameters that are not the default, without those of the page and the CSV."""

    def with_query(self, **changes: object) -> dict[str, object]:
        """Return the parameters of a link that changes some of them; None leaves one out."""
        return {name: value for name, value in {**self.query, **changes}.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Table(Generic[_T]):
    """A table: its columns, the default order (a column's name, ``-`` for descending), search and filters."""

    columns: tuple[Column[_T], ...]
    order: str
    choices: tuple[Choice[_T], ...] = ()
    searched: Callable[[_T], Iterable[str | None]] | None = None
    """The texts of a row in which the search looks, in upper and lower case alike."""
    size: int = PAGE_SIZE

    def view(self, rows: Iterable[_T], query: Mapping[str, str]) -> View[_T]:
        """Return what the query parameters ask for."""
        every = list(rows)
        search = query.get("q", "").strip()[:_LONGEST_SEARCH]
        chosen = {choice.name: self._value(choice, query) for choice in self.choices}
        found = [row for row in every if self._shows(row, search.casefold(), chosen)]
        order = self._order(query)
        found = self._sorted(found, order)
        number = query.get("page", "")
        pages = page_of(len(found), int(number) if _is_number(number) else 1, self.size)
        kept = {"q": search, "sort": order if order != self.order else ""}
        kept |= {c.name: v for c in self.choices if (v := chosen[c.name]) != next(iter(c.options))}
        return View(
            pages.cut(found),
            found,
            len(every),
            self._heads(order),
            pages,
            search,
            chosen,
            {name: value for name, value in kept.items() if value},
        )

    def csv(self, view: View[_T], name: str) -> Response:
        """Return all rows that the search and filters leave as a download called `name`."""
        rows = ([column.of(row) for column in self.columns] for row in view.found)
        return csv_response(name, [column.name for column in self.columns], rows)

    def _value(self, choice: Choice[_T], query: Mapping[str, str]) -> str:
        wanted = query.get(choice.name, "")
        return wanted if wanted in choice.options else next(iter(choice.options))

    def _shows(self, row: _T, search: str, chosen: Mapping[str, str]) -> bool:
        for choice in self.choices:
            value = chosen[choice.name]
            if value != next(iter(choice.options)) and not choice.fits(row, value):
                return False
        if not search or self.searched is None:
            return True
        return any(text and search in text.casefold() for text in self.searched(row))

    def _order(self, query: Mapping[str, str]) -> str:
        wanted = query.get("sort", "")
        named = {column.name for column in self.columns if column.sortable}
        return wanted if wanted.removeprefix("-") in named else self.order

    def _sorted(self, rows: list[_T], order: str) -> list[_T]:
        """Return the rows in an order; equal ones keep theirs, and rows without a value come last."""
        column = next(column for column in self.columns if column.name == order.removeprefix("-"))
        known = [row for row in rows if column.of(row) is not None]
        unknown = [row for row in rows if column.of(row) is None]
        known.sort(key=lambda row: _sortable(column.of(row)), reverse=order.startswith("-"))
        return known + unknown

    def _heads(self, order: str) -> tuple[Head, ...]:
        heads = []
        for column in self.columns:
            if not column.shown:
                continue
            now: Literal["ascending", "descending"] | None = None
            if order.removeprefix("-") == column.name:
                now = "descending" if order.startswith("-") else "ascending"
            first, other = column.name, f"-{column.name}"
            if column.number:
                first, other = other, first
            link = other if order == first else first
            heads.append(Head(column.title, column.number, link if column.sortable else None, now))
        return tuple(heads)


def csv_response(name: str, heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Response:
    """Return rows as a CSV file that browsers download; `name` is ASCII without quotes."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
    return Response(document(heads, rows), media_type="text/csv; charset=utf-8", headers=headers)


def _sortable(value: Cell) -> Any:  # a column has values of one kind
    return (value.casefold(), value) if isinstance(value, str) else value


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
