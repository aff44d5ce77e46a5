"""The open state: its engine of SQLAlchemy, with time-outs and transactions; its schema; its copy elsewhere.

One transaction writes at a time, so stores need no care for conflicts. Readers see the state as it was when
they began, and wait for no writer.

A database whose schema is up to date costs one query to open. An empty one gets the tables at once: to
import Alembic, which applies the revisions, takes 0.3 s, a third of a first `syncd plan`. A test holds that
both ways lead to the same tables.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import (
    Connection,
    Engine,
    Table,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from syncd.core.errors import StateError
from syncd.state.location import OLD_FILE, StateLocation
from syncd.state.tables import LOCAL, REVISION, metadata

BUSY_SECONDS = 30
"""How long a transaction waits for that of another process."""
IDLE_SECONDS = 6
"""How long PostgreSQL waits for a client that is silent within a transaction, or while it holds a lease."""
WRITING = "syncd_writing"
"""Execution option of a transaction that writes."""
_SYNCD = 0x73796E63
"""First half of the keys of advisory locks, which all programs in a database share: "sync" in ASCII."""
WRITER = (_SYNCD, 2)
"""Key of the lease of the writer."""
LEADER = (_SYNCD, 3)
"""Key of the lease of the leader."""
_TRANSACTION = (_SYNCD, 1)
_OLDEST = 140000
"""PostgreSQL 14, the first with idle_session_timeout."""


def make_engine(where: StateLocation) -> Engine:
    """Return an engine for this location; raises StateError if there can be none."""
    return _sqlite(where) if where.url is None else _postgresql(where, where.url)


def _sqlite(where: StateLocation) -> Engine:
    _prepare(where)
    engine = create_engine(
        f"sqlite:///{where.file}", connect_args={"timeout": BUSY_SECONDS, "isolation_level": None}
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that begins as a reader cannot always become a writer later.
        writes = WRITING in connection.get_execution_options()
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _prepare(where: StateLocation) -> None:
    """Create the folder and the file, for this user only."""
    try:
        where.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (where.folder / OLD_FILE).exists() and not where.file.exists():
            raise StateError(
                f"{where.folder / OLD_FILE} is the history of a version before 0.1.0, which this one does not"
                " read. Move the file away, or delete it; the history then starts empty"
            )
        # SQLite creates its other files with the mode of this one.
        os.close(os.open(where.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StateError(f"the state {where} cannot be used: {error}") from None


def _postgresql(where: StateLocation, given: str) -> Engine:
    if find_spec("psycopg") is None:
        raise StateError(
            "daemon.state_url needs the driver of PostgreSQL, which is not installed; run:"
            " pip install 'kong-openmeter[postgres]'"
        )
    url = make_url(given).set(drivername="postgresql+psycopg")
    engine = create_engine(
        url.difference_update_query(["options"]),
        connect_args=_parameters(url.query),
        pool_pre_ping=True,  # the server may have been restarted
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def check(connection: Any, _record: object) -> None:
        if connection.info.server_version < _OLDEST:
            version = connection.info.parameter_status("server_version")
            raise StateError(f"the state {where} is in PostgreSQL {version}; syncd needs 14 or newer")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if WRITING in connection.get_execution_options():
            # As in SQLite, so that stores work alike on both.
            connection.execute(select(func.pg_advisory_xact_lock(*_TRANSACTION)))

    return engine


def _parameters(given: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of a connection that the URL does not have: nothing waits without an end."""
    options = {
        "statement_timeout": f"{BUSY_SECONDS}s",
        "lock_timeout": f"{BUSY_SECONDS}s",
        # A frozen process in the middle of a transaction would keep all others from writing.
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
    }
    chosen = [f"-c {name}={value}" for name, value in options.items()]
    defaults = {
        "application_name": "syncd",
        "connect_timeout": 5,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    parameters: dict[str, object] = {name: value for name, value in defaults.items() if name not in given}
    parameters["options"] = " ".join([*chosen, str(given.get("options", ""))]).strip()
    return parameters


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
