"""The state moves from SQLite to PostgreSQL and back, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from syncd.core.changes import Outcome, Status
from syncd.core.errors import StateError
from syncd.runs.history import History
from syncd.runs.options import RunOptions
from syncd.runs.run import RunState, new_run
from syncd.state import tables
from syncd.state.database import State, copy_state
from syncd.state.location import StateLocation
from tests.harness.postgres import PASSWORD, Postgres
from tests.syncd.builders import consumer, observed, plan_for
from tests.syncd.processes import Project

pytestmark = pytest.mark.slow

PLAN = plan_for([consumer("1", "alice"), consumer("2", "bob")], observed())


def rows_of(state: State) -> Mapping[str, list[tuple[object, ...]]]:
    with state.reading() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in tables.metadata.sorted_tables
        }


def with_runs(state: State, number: int) -> None:
    history = History(state)
    for index in range(number):
        one = replace(new_run("manual", RunOptions()), state=RunState.SUCCEEDED, plan=PLAN)
        history.save(one.summary(), one.plan)
        history.record(one.id, 1, [Outcome(change, Status.DONE) for change in PLAN.changes])
        if index % 2:
            history.begin(one.id, PLAN.changes[:1])


def test_the_state_is_the_same_after_the_move_there_and_back(tmp_path: Path, postgres: Postgres) -> None:
    there = StateLocation(tmp_path, postgres.new_database())
    with (
        State(StateLocation(tmp_path / "old")) as old,
        State(there) as database,
        State(StateLocation(tmp_path / "new")) as new,
    ):
        with_runs(old, 1203)
        copied = copy_state(old, database)
        assert (copied["runs"], copied["plans"]) == (1203, 1)
        assert rows_of(database) == rows_of(old)
        copy_state(database, new)
        assert rows_of(new) == rows_of(old)
        # Numbers go on after those that were copied.
        for state in (database, new):
            with_runs(state, 1)
            assert len(History(state).runs(2000)) == 1204
            assert rows_of(state)["runs"][-1][0] == 1204


def test_a_state_is_never_copied_over_another(tmp_path: Path, postgres: Postgres) -> None:
    there = StateLocation(tmp_path, postgres.new_database())
    with State(StateLocation(tmp_path)) as file, State(there) as database:
        with_runs(file, 2)
        with_runs(database, 1)
        before = rows_of(database)
        with pytest.raises(StateError, match="is not empty"):
            copy_state(file, database)
        assert rows_of(database) == before


def test_the_command_moves_the_history(project: Project, postgres: Postgres) -> None:
    assert project.call("apply", "--yes").returncode == 0
    url = postgres.new_database()
    project.configure(f"daemon: {{state_url: '{url}'}}\n")
    assert "No runs yet" in project.call("history").stdout
    moved = project.call("state", "migrate", "--to=postgresql", "--output=json")
    assert moved.returncode == 0, moved.stderr
    assert json.loads(moved.stdout)["rows"]["runs"] == 1
    assert PASSWORD not in moved.stdout
    assert "pass%20word" not in moved.stdout
    (run,) = json.loads(project.call("history", "--output=json").stdout)
    assert run["state"] == "succeeded"
    refused = project.call("state", "migrate", "--to=sqlite")
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr


def test_the_command_needs_a_database(project: Project) -> None:
    done = project.call("state", "migrate", "--to=postgresql")
    assert done.returncode == 1
    assert "SYNCD_DAEMON__STATE_URL" in done.stderr
