"""The state in a SQLite file: who may read it, who writes when, and what is refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from syncd.core.errors import StateError
from syncd.state import tables
from syncd.state.database import State
from syncd.state.location import StateLocation


def test_only_its_user_may_read_the_state(tmp_path: Path) -> None:
    where = StateLocation(tmp_path / "new" / "state")
    with State(where) as state, state.writing() as connection:
        connection.execute(insert(tables.plans), {"hash": "x", "document": b""})
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in where.folder.iterdir()}
    assert modes == dict.fromkeys(["state.sqlite3", "state.sqlite3-wal", "state.sqlite3-shm"], "0o600")
    assert where.folder.stat().st_mode & 0o777 == 0o700


def test_a_committed_transaction_outlives_a_kill(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from sqlalchemy import insert
from syncd.state import tables
from syncd.state.database import State
from syncd.state.location import StateLocation
state = State(StateLocation(pathlib.Path(sys.argv[1])))
for name in ("committed", "not committed"):
    with state.writing() as connection:
        connection.execute(insert(tables.plans), {"hash": name, "document": b""})
        if name == "not committed":
            os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    with State(StateLocation(tmp_path)) as state, state.reading() as connection:
        assert connection.execute(select(tables.plans.c.hash)).scalars().all() == ["committed"]


def test_an_exception_rolls_the_transaction_back(tmp_path: Path) -> None:
    with State(StateLocation(tmp_path)) as state:

        def fail() -> None:
            with state.writing() as connection:
                connection.execute(insert(tables.plans), {"hash": "x", "document": b""})
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        with state.reading() as connection:
            assert connection.execute(select(tables.plans)).all() == []


def test_a_reader_sees_one_moment_and_waits_for_no_writer(tmp_path: Path) -> None:
    with State(StateLocation(tmp_path)) as state, state.writing() as writer:
        writer.execute(insert(tables.plans), {"hash": "x", "document": b""})
        with State(StateLocation(tmp_path)) as other, other.reading() as reader:
            assert reader.execute(select(tables.plans)).all() == []


def test_threads_that_read_what_they_change_lose_no_update(tmp_path: Path) -> None:
    with State(StateLocation(tmp_path)) as one, State(StateLocation(tmp_path)) as other:

        def append(number: int) -> None:
            with (one, other)[number % 2].writing() as connection:
                count = len(connection.execute(select(tables.plans)).all())
                connection.execute(insert(tables.plans), {"hash": str(count), "document": b""})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(append, range(80)))
        with one.reading() as connection:
            assert len(connection.execute(select(tables.plans)).all()) == 80


def test_texts_of_any_origin_can_be_stored(tmp_path: Path) -> None:
    with State(StateLocation(tmp_path)) as state, state.writing() as connection:
        connection.execute(insert(tables.plans), {"hash": "a\x00b\ud800c\U0001f600", "document": b""})
        assert connection.execute(select(tables.plans.c.hash)).scalar() == "a\ufffdb\ufffdc\U0001f600"


def test_an_error_names_the_setting_and_quotes_no_values(tmp_path: Path) -> None:
    row = {"hash": "something secret", "document": b""}
    with State(StateLocation(tmp_path)) as state, state.writing() as connection:
        connection.execute(insert(tables.plans), row)
    with State(StateLocation(tmp_path)) as state:
        with pytest.raises(StateError, match=r"daemon\.state_dir") as raised, state.writing() as connection:
            connection.execute(insert(tables.plans), row)
        assert "secret" not in str(raised.value)


def test_a_closed_state_is_not_opened_again(tmp_path: Path) -> None:
    state = State(StateLocation(tmp_path))
    state.close()
    with pytest.raises(StateError, match="closed"), state.reading():
        pass


def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite3").write_bytes(b"this is not a database, " * 100)
    with pytest.raises(StateError, match=r"state\.sqlite3 \(daemon\.state_dir\) cannot be used"):
        State(StateLocation(tmp_path))


def test_the_history_of_an_unreleased_version_is_refused_and_kept(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "history.sqlite3")) as database:
        database.execute("CREATE TABLE runs (id)")
    for _ in range(2):
        with pytest.raises(StateError, match="Move the file away"):
            State(StateLocation(tmp_path))
    (tmp_path / "history.sqlite3").rename(tmp_path / "old")
    State(StateLocation(tmp_path)).close()
