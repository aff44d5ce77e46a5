"""The open state: transactions of the stores, on an engine of SQLAlchemy; its schema; and its copy elsewhere.

One transaction writes at a time, so stores need no care for conflicts. Readers see the state as it was when
they began, and wait for no writer.

A database whose schema is up to date costs one query to open. An empty one gets the tables at once: to
import Alembic, which applies the revisions, takes 0.3 s, a third of a first `syncd plan`. A test holds that
both ways lead to the same tables.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from sqlalchemy import Connection, Table, func, insert, inspect, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from syncd.core.errors import StateError
from syncd.state.engines import WRITING, make_engine
from syncd.state.location import StateLocation
from syncd.state.tables import LOCAL, REVISION, metadata

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
            if is_current(connection, str(self.where)):
                return
        # Two processes may open a new database at once: the second finds it done.
        with self.writing() as connection:
            if not is_current(connection, str(self.where)):
                bring_up_to_date(connection)

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


_MIGRATIONS = Path(__file__).with_name("migrations")


def is_current(connection: Connection, where: str) -> bool:
    """Return whether the schema is that of this version; raises StateError if it is not one of syncd's."""
    names = _tables(connection)
    if "alembic_version" not in names:
        if names:
            raise StateError(
                f"the database {where} has tables that syncd did not create ({', '.join(sorted(names)[:5])})."
                " Give syncd a database of its own"
            )
        return False
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if found == REVISION:
        return True
    if found not in _known():
        raise StateError(
            f"the state {where} was written by a newer syncd: its schema has revision {found}, and this"
            f" syncd knows {REVISION}. Use that syncd, or another place for the state"
        )
    return False


def bring_up_to_date(connection: Connection) -> None:
    """Create the tables, or apply the revisions that they lack, in the transaction of this connection."""
    if _tables(connection):
        migrate(connection)
        return
    # Without a check, which would also find tables of others, as `_tables` says.
    metadata.create_all(connection, checkfirst=False)
    # As Alembic creates it, which reads it from the next revision on.
    connection.execute(
        text(
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL,"
            " CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
        )
    )
    connection.execute(text("INSERT INTO alembic_version VALUES (:revision)"), {"revision": REVISION})


def migrate(connection: Connection) -> None:
    """Apply the revisions that the schema lacks with Alembic."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    # ConfigParser reads % as the start of a reference.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _tables(connection: Connection) -> list[str]:
    """Return the tables of the schema that new ones go to, not of those further on in the search path."""
    inspector = inspect(connection)
    return inspector.get_table_names(inspector.default_schema_name)


def _known() -> frozenset[str]:
    """Return the revisions of this version: each file's name begins with its own."""
    files = (_MIGRATIONS / "versions").glob("[0-9]*.py")
    return frozenset(file.name.partition("_")[0] for file in files)


_ROWS_AT_ONCE = 500


def copy_state(source: State, target: State) -> dict[str, int]:
    """Copy all rows in one transaction; return how many, by table.

    Raises StateError if the target has rows already.
    """
    tables = [table for table in metadata.sorted_tables if LOCAL not in table.info]
    with source.reading() as read, target.writing() as write:
        if taken := [table.name for table in tables if write.execute(select(table).limit(1)).first()]:
            raise StateError(
                f"the state {target.where} is not empty ({', '.join(taken)}), so nothing was copied. Give an"
                " empty database, or delete the file"
            )
        copied = {table.name: _copy_rows(table, read, write) for table in tables}
        if target.where.url is not None:
            for table in tables:
                _continue_numbers(table, write)
    return copied


def _copy_rows(table: Table, read: Connection, write: Connection) -> int:
    ordered = select(table).order_by(*table.primary_key)
    rows = read.execute(ordered, execution_options={"yield_per": _ROWS_AT_ONCE}).mappings()
    copied = 0
    for batch in rows.partitions():
        write.execute(insert(table), [dict(row) for row in batch])
        copied += len(batch)
    return copied


def _continue_numbers(table: Table, write: Connection) -> None:
    """Let PostgreSQL number new rows after those that were copied with their numbers."""
    column = table.autoincrement_column
    if column is None:
        return
    sequence = text("SELECT pg_get_serial_sequence(:table, :column)")
    name = write.execute(sequence, {"table": table.name, "column": column.name}).scalar()
    last = write.execute(select(func.max(column))).scalar()
    if name and last:
        write.execute(select(func.setval(name, last)))
