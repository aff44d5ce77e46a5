"""Engines of SQLAlchemy for both databases, with their time-outs and transactions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, make_url, select

from syncd.core.errors import StateError
from syncd.state.location import OLD_FILE, StateLocation

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
