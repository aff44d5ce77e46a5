"""The open state: transactions of the stores, on an engine of SQLAlchemy.

One transaction writes at a time, so stores need no care for conflicts. Readers see the state as it was when
they began, and wait for no writer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from syncd.core.errors import StateError
from syncd.state import schema
from syncd.state.engines import WRITING, make_engine
from syncd.state.location import StateLocation

_READING: Final = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
"""Execution options of PostgreSQL for readers; those of SQLite see one moment by themselves."""


class State:
    """The state of one location; thread-safe. Everything raises StateError."""

    def __init__(self, where: StateLocation) -> None:
        self.where = where
        self._closed = False
        self._writer = threading.Lock()
        self._engine = make_engine(where)
        try:
            self._bring_up_to_date()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Begin a transaction that only reads."""
        with self.errors_named(), self._engine.connect() as connection:
            if self.where.url is not None:
                connection.execution_options(**_READING)
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Begin a transaction that writes; it is committed at the end, or rolled back after an exception."""
        with self.errors_named(), self._writer, self._engine.connect() as connection:
            connection.execution_options(**{WRITING: True})
            with connection.begin():
                yield connection

    def session(self) -> Connection:
        """Return a connection of its own, which commits each statement at once; close it after use."""
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()
        return connection

    def _bring_up_to_date(self) -> None:
        with self.reading() as connection:
            if schema.is_current(connection, str(self.where)):
                return
        # Two processes may open a new database at once: the second finds it done.
        with self.writing() as connection:
            if not schema.is_current(connection, str(self.where)):
                schema.bring_up_to_date(connection)

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Raise errors of the database as StateError, with the setting and without values."""
        if self._closed:
            raise StateError(f"the state {self.where} cannot be used: it is closed")
        try:
            yield
        except SQLAlchemyError as error:
            # Not the error itself: it quotes the statement with its values.
            what = error.orig if isinstance(error, DBAPIError) else error
            said = self.where.without_secrets(str(what)).strip()
            raise StateError(f"the state {self.where} cannot be used: {said}") from None


def upserting(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return an insert with `on_conflict_do_update` and `on_conflict_do_nothing`."""
    return sqlite.insert(table) if connection.engine.name == "sqlite" else postgresql.insert(table)
