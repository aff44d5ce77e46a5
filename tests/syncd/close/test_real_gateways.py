"""Closing a month that two real plugin servers had traffic in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.process import eventually
from tests.syncd.audits import Audited, audited
from tests.syncd.close.worlds import BEFORE, MONTH

pytestmark = pytest.mark.slow

FIRST_HOUR = MONTH.since.replace(hour=0)
LAST_HOUR = MONTH.until.replace(hour=0) - (MONTH.until - MONTH.since) / (
    (MONTH.until - MONTH.since).days * 24
)


def close(there: Audited, *arguments: str) -> tuple[int, dict[str, Any]]:
    project = there.project()
    result = project.call("close", str(MONTH), "--settle", "0", "-o", "json", *arguments)
    return result.returncode, json.loads(result.stdout)["report"] if result.stdout else {}


def kinds(report: dict[str, Any]) -> list[str]:
    return [one["kind"] for one in report["against"]]


def test_a_month_of_real_gateways_is_reported_to_the_event(tmp_path: Path) -> None:
    with audited(tmp_path, "east", "west") as there:
        east, west = there.sites
        east.serve("alice", FIRST_HOUR, 3)
        west.serve("alice", LAST_HOUR, 4)
        west.serve("bob", FIRST_HOUR, 2, llm=True)
        east.serve("alice", MONTH.until, 5)  # not of the month
        status, report = close(there)
        assert (status, kinds(report)) == (2, ["unbilled"]), "nobody has a customer here"
        assert report["totals"]["requests"] == 3 + 4 + 2
        assert [one["counted"] for one in report["audit"]["types"]] == [9, 4]
        accepted = ("--accept", "unbilled", "--reason", "no customers yet", "--by", "mia")
        assert close(there, *accepted)[0] == 0

        # A gateway that cannot deliver: its events of the month wait.
        there.metering.fault(path="/api/v1/events", status=503)
        west.serve("alice", LAST_HOUR, 1, settled=False)
        with west.client() as client:
            eventually(lambda: client.spool().total.backlog == 1, what="a waiting event")
        assert kinds(close(there)[1]) == ["open-hours", "unbilled"]
        there.metering.clear_faults()
        west.settle()
        assert close(there, *accepted)[0] == 0

        # Dead letters of the month, and of the month before it.
        there.metering.fault(path="/api/v1/events", status=400)
        west.serve("alice", LAST_HOUR, 2)
        west.serve("alice", BEFORE.since, 1)
        there.metering.clear_faults()
        status, report = close(there)
        assert (status, kinds(report)) == (2, ["dead-letters", "unbilled"])
        assert [one["dead_letters"] for one in report["gateways"]] == [0, 2]

        # A gateway that is gone.
        east.server.process.kill()
        status, report = close(there)
        assert (status, kinds(report)[0]) == (2, "gateway")
        assert report["audit"] is None
