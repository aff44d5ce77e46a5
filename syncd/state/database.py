"""The open state: transactions of the stores, on an engine of SQLAlchemy.

One transaction writes at a time, so stores need no care for conflicts. Readers see the state as it was when
they began, and wait for no writer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from sqlalchemy import Connection, Engine, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from syncd.core.errors import StateError
from syncd.state import schema
from syncd.state.location import OLD_FILE, StateLocation

_BUSY_SECONDS = 30
"""How long a transaction waits for that of another process."""
_WRITING = {"syncd_writing": True}


class State:
    """The state of one location; thread-safe. Everything raises StateError."""

    def __init__(self, where: StateLocation) -> None:
        self.where = where
        self._closed = False
        self._writer = threading.Lock()
        _prepare(where)
        self._engine = _sqlite_engine(where)
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
        with self._errors_named(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Begin a transaction that writes; it is committed at the end, or rolled back after an exception."""
        with self._errors_named(), self._writer, self._engine.connect() as connection:
            connection.execution_options(**_WRITING)
            with connection.begin():
                yield connection

    def _bring_up_to_date(self) -> None:
        with self.reading() as connection:
            if schema.is_current(connection, str(self.where)):
                return
        # Two processes may open a new database at once: the second finds it done.
        with self.writing() as connection:
            if not schema.is_current(connection, str(self.where)):
                schema.bring_up_to_date(connection)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        if self._closed:
            raise StateError(f"the state {self.where} cannot be used: it is closed")
        try:
            yield
        except SQLAlchemyError as error:
            # Not the error itself: it quotes the statement with its values.
            what = error.orig if isinstance(error, DBAPIError) else type(error).__name__
            raise StateError(f"the state {self.where} cannot be used: {what}") from None


def upserting(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return an insert with `on_conflict_do_update` and `on_conflict_do_nothing`."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)


def _prepare(where: StateLocation) -> None:
    """Create the folder and the file, for this user only."""
    try:
        where.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (where.folder / OLD_FILE).exists() and not where.file.exists():
            raise StateError(
                f"{where.folder / OLD_FILE} is the history of a version before 0.1.0, which this one does not"
                " read. Move the file away, or delete it; the history then begins anew"
            )
        # SQLite creates its other files with the mode of this one.
        os.close(os.open(where.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StateError(f"the state {where} cannot be used: {error}") from None


def _sqlite_engine(where: StateLocation) -> Engine:
    engine = create_engine(
        f"sqlite:///{where.file}", connect_args={"timeout": _BUSY_SECONDS, "isolation_level": None}
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that begins as a reader cannot always become a writer later.
        immediate = "syncd_writing" in connection.get_execution_options()
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine
