"""The schema: the tables of the code are those that the revisions make, and foreign ones are refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event

import syncd.state.migrations
from syncd.core.errors import StateError
from syncd.state import tables
from syncd.state.database import WRITING, State, is_current, make_engine, migrate
from syncd.state.location import StateLocation
from tests.harness.postgres import Postgres


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return list(compare_metadata(context, tables.metadata))


def test_the_revisions_make_the_tables_of_the_code(where: StateLocation) -> None:
    engine = make_engine(where)
    with engine.connect() as connection:
        connection.execution_options(**{WRITING: True})
        with connection.begin():
            migrate(connection)
            assert differences(connection) == []
            assert is_current(connection, "it")
    engine.dispose()


def test_alembic_goes_on_from_a_new_database(where: StateLocation) -> None:
    with State(where) as state, state.writing() as connection:
        migrate(connection)
        assert differences(connection) == []
        assert is_current(connection, "it")


def test_the_newest_revision_is_the_one_that_the_code_expects() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(syncd.state.migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [tables.REVISION]


def test_two_processes_may_create_the_state_at_once(where: StateLocation) -> None:
    def opened(_: int) -> State:
        return State(where)

    with ThreadPoolExecutor(8) as pool:
        for state in pool.map(opened, range(8)):
            state.close()


def test_a_state_whose_creation_failed_half_way_is_created_by_the_next_process(
    where: StateLocation,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    event.listen(tables.closed_months, "after_create", stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            State(where)
    finally:
        event.remove(tables.closed_months, "after_create", stop)
    with State(where) as state, state.reading() as connection:
        assert differences(connection) == []


@pytest.mark.slow
def test_tables_of_others_in_a_schema_of_the_search_path_are_never_used(
    tmp_path: Path, postgres: Postgres
) -> None:
    database = postgres.new_database()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA own")
        connection.execute("CREATE TABLE public.leases (name text)")
        connection.execute("CREATE TABLE public.alembic_version (version_num text)")
    where = StateLocation(tmp_path, f"{database}?options=-csearch_path%3Down,public")
    for _ in range(2):
        with State(where) as state, state.reading() as reading:
            assert differences(reading) == []
    with psycopg.connect(database) as connection:
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'own'").fetchall()
        assert {name for (name,) in found} == {*tables.metadata.tables, "alembic_version"}
        assert connection.execute("SELECT * FROM public.alembic_version").fetchall() == []


def set_revision(folder: Path, revision: str) -> None:
    State(StateLocation(folder)).close()
    with closing(sqlite3.connect(folder / "state.sqlite3")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_the_state_of_a_newer_syncd_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    set_revision(tmp_path, "0099")
    for _ in range(2):
        with pytest.raises(StateError, match="newer syncd: its schema has revision 0099"):
            State(StateLocation(tmp_path))


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.sqlite3")) as database:
        database.execute("CREATE TABLE invoices (id)")
    with pytest.raises(StateError, match=r"tables that syncd did not create \(invoices\)"):
        State(StateLocation(tmp_path))


@pytest.mark.parametrize("opened", [False, True], ids=["new", "up to date"])
def test_alembic_is_not_imported_for_a_database_that_is(tmp_path: Path, *, opened: bool) -> None:
    if opened:
        State(StateLocation(tmp_path)).close()
    code = """
import pathlib, sys
from syncd.state.database import State
from syncd.state.location import StateLocation
State(StateLocation(pathlib.Path(sys.argv[1]))).close()
print("alembic" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
