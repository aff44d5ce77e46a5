"""The directory of customers in the state: written by each run, read and searched by pages.

A run writes what it has observed (`observe`), and at its end what its changes made of that (`settle`). Most
runs observe what is there already: then nothing is written but the time.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, delete, insert, or_, select, update

from syncd.core.changes import Outcome, Plan
from syncd.core.model import ObservedCustomer, Principal
from syncd.core.unbilled import UnbilledUsage
from syncd.customers.known import (
    Concern,
    KnownCustomer,
    Name,
    after,
    concerns,
    id_of,
    known,
    made,
    name_of,
    words_of,
)
from syncd.state import tables
from syncd.state.database import State, upserting

_BATCH: Final = 500
"""Values of one statement: SQLite allows 32,766, and older builds of it 999."""

_customers, _names = tables.known_customers.c, tables.known_names.c
_concerns, _directory = tables.known_concerns.c, tables.directory.c


@dataclass(frozen=True, slots=True)
class Edition:
    """The content of the directory: `version` grows with each change, `at` is when it was observed."""

    version: int
    at: datetime


class Directory:
    """The customers of a state; thread-safe. All methods raise StateError."""

    def __init__(self, state: State) -> None:
        self._state = state

    # Written by runs

    def observe(
        self,
        customers: Sequence[ObservedCustomer],
        subjects: Iterable[tuple[str, Principal]],
        owner_id: str,
        at: datetime,
    ) -> None:
        """Keep what a run has observed: all customers, and the principals behind subjects."""
        behind: dict[str, list[Principal]] = defaultdict(list)
        for subject, principal in subjects:
            behind[subject].append(principal)
        digest = _digest(customers, behind, owner_id)
        with self._state.writing() as connection:
            row = connection.execute(select(_directory.digest)).first()
            if row is not None and row.digest == digest:
                connection.execute(update(tables.directory).values(at=at.isoformat()))
                return
            connection.execute(delete(tables.known_customers))
            connection.execute(delete(tables.known_names))
            # One at a time: with 100,000 principals the values of all would take 50 MiB more.
            found = (known(customer, owner_id) for customer in customers)
            _insert(
                connection,
                tables.known_customers,
                _rows(found, lambda subject: map(name_of, behind.get(subject, ()))),
            )
            _insert(connection, tables.known_names, _name_rows(behind))
            now = {"digest": digest, "at": at.isoformat()}
            if not _new_edition(connection, **now):
                connection.execute(insert(tables.directory).values(number=1, version=1, **now))

    def settle(self, plan: Plan, outcomes: Iterable[Outcome], unbilled: UnbilledUsage | None) -> None:
        """Keep what a run that has ended made of its customers, and their concerns."""
        changes = made(outcomes)
        stands = concerns(plan, unbilled)
        with self._state.writing() as connection:
            if changes:
                ids = list(dict.fromkeys(map(id_of, changes)))
                there = {one.id: one for one in _with_ids(connection, ids)}
                now = after(there, changes)
                for some in _batches(ids):
                    connection.execute(delete(tables.known_customers).where(_customers.id.in_(some)))
                left = [one for identity in ids if (one := now.get(identity)) is not None]
                subjects = [subject for one in left for subject in one.subject_keys]
                names = _names_of(connection, subjects)
                _insert(connection, tables.known_customers, _rows(left, lambda key: names.get(key, ())))
            standing = sorted(_all_concerns(connection), key=_place)
            if not changes and standing == sorted(stands, key=_place):
                return
            connection.execute(delete(tables.known_concerns))
            _insert(connection, tables.known_concerns, (_concern_row(one) for one in stands))
            # The next run observes ids and names that this one could not know.
            _new_edition(connection, **({"digest": ""} if changes else {}))

    # Read by pages

    def edition(self) -> Edition | None:
        """Return which content this is; None before the first run."""
        with self._state.reading() as connection:
            row = connection.execute(select(_directory.version, _directory.at)).first()
        return Edition(row.version, datetime.fromisoformat(row.at)) if row else None

    def customers(self) -> tuple[KnownCustomer, ...]:
        """Return all customers, sorted by name."""
        with self._state.reading() as connection:
            rows = connection.execute(select(*_SHOWN).order_by(_customers.name, _customers.id))
            return tuple(_customer(row) for row in rows)

    def customer(self, key: str) -> KnownCustomer | None:
        """Return the customer with this key, or else with this id."""
        with self._state.reading() as connection:
            rows = connection.execute(
                select(*_SHOWN).where(or_(_customers.key == key, _customers.id == key)).limit(2)
            ).all()
        found = [_customer(row) for row in rows]
        return next((one for one in found if one.key == key), found[0] if found else None)

    def search(self, text: str) -> frozenset[str]:
        """Return the ids of the customers with a text in their fields, subjects or the names behind them.

        Also of those that are meant to have such a subject, and that something keeps from getting it.
        """
        text = text.strip().casefold()
        meant = select(_concerns.customer_key).join(tables.known_names, _names.subject == _concerns.subject)
        meant = meant.where(_names.words.contains(text, autoescape=True))
        wanted = or_(_customers.words.contains(text, autoescape=True), _customers.key.in_(meant))
        with self._state.reading() as connection:
            return frozenset(connection.execute(select(_customers.id).where(wanted)).scalars())

    def names(self, subjects: Sequence[str]) -> Mapping[str, Sequence[Name]]:
        """Return who is behind each of these subjects, as far as a source names them."""
        with self._state.reading() as connection:
            return _names_of(connection, subjects)

    def attributed(self, customer: KnownCustomer) -> tuple[str, ...]:
        """Return the subjects whose usage is attributed to a customer, its key included, as `owners` does."""
        own = [customer.key] if customer.key else []
        others: set[str] = set()
        with self._state.reading() as connection:
            for some in _batches(customer.subject_keys):
                wanted = select(_customers.key).where(_customers.key.in_(some), _customers.id != customer.id)
                others.update(connection.execute(wanted).scalars())
        return tuple(dict.fromkeys([key for key in customer.subject_keys if key not in others] + own))

    def concerns(self, customer_key: str) -> tuple[Concern, ...]:
        """Return the concerns of a customer, most usage first."""
        with self._state.reading() as connection:
            found = _all_concerns(connection, customer_key)
        return tuple(sorted(found, key=lambda one: (-one.events, -one.tokens, one.subject)))

    def all_concerns(self) -> tuple[Concern, ...]:
        """Return the concerns of all customers."""
        with self._state.reading() as connection:
            return tuple(_all_concerns(connection))


_SHOWN = (
    _customers.id,
    _customers.key,
    _customers.name,
    _customers.subjects,
    _customers.keeper,
    _customers.owner,
    _customers.subscription,
)


_decode = msgspec.json.Decoder(tuple[str, ...]).decode


def _customer(row: Any) -> KnownCustomer:
    identity, key, name, subjects, keeper, owner, subscription = row
    return KnownCustomer(identity, key, name, _decode(subjects), keeper, owner, subscription)


def _rows(
    customers: Iterable[KnownCustomer], names: Callable[[str], Iterable[Name]]
) -> Iterator[dict[str, object]]:
    """Return the rows of customers; `names` returns who is behind a subject."""
    for one in customers:
        behind = (name for subject in one.subject_keys for name in names(subject))
        yield {
            "id": one.id,
            "key": one.key,
            "name": one.name,
            "subjects": _json(one.subject_keys),
            "keeper": one.keeper,
            "owner": one.owner,
            "subscription": one.subscription,
            "words": words_of(one, behind),
        }


def _name_rows(behind: Mapping[str, Sequence[Principal]]) -> Iterator[dict[str, object]]:
    for subject, several in behind.items():
        for number, one in enumerate(map(name_of, several)):
            yield {
                "subject": subject,
                "number": number,
                "kind": one.kind,
                "id": one.id,
                "username": one.username,
                "custom_id": one.custom_id,
                "tags": _json(one.tags),
                "source": one.source,
                "words": "\n".join((subject, *one.words)).casefold(),
            }


def _concern_row(one: Concern) -> dict[str, object]:
    return {name: getattr(one, name) for name in one.__struct_fields__}


def _place(one: Concern) -> tuple[str, str]:
    return one.customer_key, one.subject


def _all_concerns(connection: Connection, customer_key: str | None = None) -> list[Concern]:
    wanted = select(tables.known_concerns)
    if customer_key is not None:
        wanted = wanted.where(_concerns.customer_key == customer_key)
    return [
        Concern(row.customer_key, row.subject, row.blocked, row.reason, row.events, row.tokens)
        for row in connection.execute(wanted)
    ]


def _with_ids(connection: Connection, ids: Sequence[str]) -> Iterator[KnownCustomer]:
    for some in _batches(ids):
        yield from map(_customer, connection.execute(select(*_SHOWN).where(_customers.id.in_(some))))


def _names_of(connection: Connection, subjects: Sequence[str]) -> Mapping[str, Sequence[Name]]:
    found: dict[str, list[Name]] = defaultdict(list)
    for some in _batches(subjects):
        wanted = select(tables.known_names).where(_names.subject.in_(some)).order_by(_names.number)
        for row in connection.execute(wanted):
            tags = _decode(row.tags)
            found[row.subject].append(Name(row.kind, row.id, row.username, row.custom_id, tags, row.source))
    return found


def _insert(connection: Connection, table: Any, rows: Iterable[dict[str, object]]) -> None:
    """Insert rows, some at a time: no list of all rows is made.

    Two keys that differ only in what a database cannot hold are one there; the first is kept.
    """
    for some in _batches(rows):
        connection.execute(upserting(connection, table).on_conflict_do_nothing(), some)


def _batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    several: list[Any] = []
    for value in values:
        several.append(value)
        if len(several) == _BATCH:
            yield several
            several = []
    if several:
        yield several


def _new_edition(connection: Connection, **values: str) -> bool:
    """Count one more edition; returns False if there is none yet."""
    grown = update(tables.directory).values(version=_directory.version + 1, **values)
    return connection.execute(grown).rowcount > 0


def _digest(
    customers: Iterable[ObservedCustomer], behind: Mapping[str, Sequence[Principal]], owner_id: str
) -> str:
    """Return a digest of what was observed, whatever its order."""
    found = hashlib.blake2b(digest_size=16)
    for one in sorted(customers, key=lambda customer: customer.id):
        found.update(repr(known(one, owner_id)).encode("utf-8", "surrogatepass"))
    for subject in sorted(behind):
        names = [name_of(principal) for principal in behind[subject]]
        found.update(repr((subject, names)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _json(texts: Sequence[str]) -> str:
    """Return texts as JSON in which `tables.Text` replaces what a database cannot hold."""
    return json.dumps(texts, ensure_ascii=False)
