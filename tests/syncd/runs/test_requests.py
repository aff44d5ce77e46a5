"""Requested runs that several daemons share."""

from __future__ import annotations

import zlib
from datetime import UTC, datetime

from sqlalchemy import insert

from syncd.runs.options import RunOptions
from syncd.runs.requests import Requests
from syncd.runs.run import Run
from syncd.state import tables
from syncd.state.database import State
from syncd.state.location import StateLocation


def test_a_request_that_a_newer_syncd_accepted_keeps_no_other_waiting(where: StateLocation) -> None:
    with State(where) as state:
        requests = Requests(state, lambda: None)
        newer = zlib.compress(b'{"dry_run": false, "reviewed": null, "an_option_of_later": true}')
        row = {"id": "newer", "options": newer, "summary": '{"trigger": "manual"}'}
        with state.writing() as connection:
            connection.execute(insert(tables.requested_runs), row)
        known = requests.add(Run("known", "manual", RunOptions(), datetime.now(UTC)))
        assert requests.get("newer") is None
        assert [run.id for run in requests.take(1)] == [known.id]
        assert requests.take(1) == []
        assert [run.id for run in requests.take(2)] == [known.id], "the next leader tries again"
