"""The state in a SQLite file: who may read it, who writes when, and what is refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from syncd.core.errors import StateError
from syncd.state import tables
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.harness.ports import free_port
from tests.harness.postgres import Postgres


def test_only_its_user_may_read_the_state(tmp_path: Path) -> None:
    where = StateLocation(tmp_path / "new" / "state")
    with State(where) as state, state.writing() as connection:
        connection.execute(insert(tables.plans), {"hash": "x", "document": b""})
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in where.folder.iterdir()}
    assert modes == dict.fromkeys(["state.sqlite3", "state.sqlite3-wal", "state.sqlite3-shm"], "0o600")
    assert where.folder.stat().st_mode & 0o777 == 0o700


def test_a_committed_transaction_outlives_a_kill(where: StateLocation) -> None:
    code = """
import os, pathlib, sys
from sqlalchemy import insert
from syncd.state import tables
from syncd.state.database import State
from syncd.state.location import StateLocation
state = State(StateLocation(pathlib.Path(sys.argv[1]), sys.argv[2] or None))
for name in ("committed", "not committed"):
    with state.writing() as connection:
        connection.execute(insert(tables.plans), {"hash": name, "document": b""})
        if name == "not committed":
            os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(where.folder), where.url or ""])
    assert done.returncode == -9
    with State(where) as state, state.reading() as connection:
        assert connection.execute(select(tables.plans.c.hash)).scalars().all() == ["committed"]


def test_an_exception_rolls_the_transaction_back(where: StateLocation) -> None:
    with State(where) as state:

        def fail() -> None:
            with state.writing() as connection:
                connection.execute(insert(tables.plans), {"hash": "x", "document": b""})
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        with state.reading() as connection:
            assert connection.execute(select(tables.plans)).all() == []


def test_a_reader_sees_one_moment_and_waits_for_no_writer(where: StateLocation) -> None:
    with State(where) as state, state.writing() as writer:
        writer.execute(insert(tables.plans), {"hash": "x", "document": b""})
        with State(where) as other, other.reading() as reader:
            assert reader.execute(select(tables.plans)).all() == []


def test_threads_that_read_what_they_change_lose_no_update(where: StateLocation) -> None:
    with State(where) as one, State(where) as other:

        def append(number: int) -> None:
            with (one, other)[number % 2].writing() as connection:
                count = len(connection.execute(select(tables.plans)).all())
                connection.execute(insert(tables.plans), {"hash": str(count), "document": b""})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(append, range(80)))
        with one.reading() as connection:
            assert len(connection.execute(select(tables.plans)).all()) == 80


def test_texts_of_any_origin_can_be_stored(where: StateLocation) -> None:
    with State(where) as state, state.writing() as connection:
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


def test_a_closed_state_is_not_opened_again(where: StateLocation) -> None:
    state = State(where)
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


def test_a_reader_cannot_write(where: StateLocation) -> None:
    if where.url is None:
        pytest.skip("SQLite has no transactions that only read")
    with (
        State(where) as state,
        pytest.raises(StateError, match="read-only"),
        state.reading() as connection,
    ):
        connection.execute(insert(tables.plans), {"hash": "x", "document": b""})


@pytest.mark.slow
def test_errors_of_postgresql_name_the_database_without_its_password(postgres: Postgres) -> None:
    wrong = StateLocation(Path(), postgres.new_database().replace("pass%20word", "wrong%20word"))
    with pytest.raises(StateError) as raised:
        State(wrong)
    said = str(raised.value)
    assert f"postgresql://syncd@127.0.0.1:{postgres.port}/syncd_" in said
    assert "(daemon.state_url)" in said
    assert "password authentication failed" in said
    for shown in (said, repr(wrong), str(wrong)):
        assert "word" not in shown.replace("password authentication", "")


@pytest.mark.parametrize("name", ["password", "sslpassword"])
def test_a_password_among_the_parameters_is_masked_too(tmp_path: Path, name: str) -> None:
    where = StateLocation(tmp_path, f"postgresql://syncd@127.0.0.1/syncd?{name}=geheim%2F1&port=1")
    assert where.without_secrets("no geheim/1, nor a geheim") == "no ***, nor a geheim"
    assert "geheim" not in str(where)


def test_a_database_that_does_not_answer_is_an_error_soon() -> None:
    with pytest.raises(StateError, match=r"daemon\.state_url"):
        State(StateLocation(Path(), f"postgresql://syncd@127.0.0.1:{free_port()}/syncd"))


@pytest.mark.slow
def test_a_process_that_stops_within_a_transaction_keeps_others_from_writing_for_a_few_seconds(
    postgres: Postgres,
) -> None:
    where = StateLocation(Path(), postgres.new_database())
    with State(where) as frozen, State(where) as other:

        def freeze() -> None:
            with frozen.writing() as connection:
                connection.execute(insert(tables.plans), {"hash": "x", "document": b""})
                begun = time.monotonic()
                with other.writing() as writer:
                    writer.execute(insert(tables.plans), {"hash": "y", "document": b""})
                assert time.monotonic() - begun < 15

        with pytest.raises(StateError):
            freeze()
        with other.reading() as connection:
            assert connection.execute(select(tables.plans.c.hash)).scalars().all() == ["y"]


def test_a_missing_driver_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncd.state.database.find_spec", lambda _name: None)
    with pytest.raises(StateError, match=r"pip install 'kong-openmeter\[postgres\]'"):
        State(StateLocation(Path(), "postgresql://syncd@127.0.0.1/syncd"))
