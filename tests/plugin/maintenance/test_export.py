"""`openmeter-plugin spool dead-letters` and `export`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from openmeter_plugin.maintenance import export
from openmeter_plugin.spool.destination import write_destination
from tests.plugin.deliveries import event, record, run_until_empty, spooled
from tests.plugin.events_server import EventsServer, refusal, serving
from tests.plugin.spool_commands import NEW, OLD, printed, run
from tests.plugin.spools import QUEUE, destination


def test_dead_letters_are_printed_with_the_servers_answer(history: Path) -> None:
    (letter,) = printed("dead-letters", str(history))["dead_letters"]
    assert letter["event_id"] == "event-000003"
    assert (letter["destination"], letter["status"], letter["subject"]) == (QUEUE, 400, "consumer:alice")
    assert (letter["type"], letter["time"]) == ("kong.api_request", OLD)
    assert "event-000003 is bad" in letter["answer"]
    line = run("dead-letters", str(history), "--limit", "5").stdout
    assert line.count("\n") == 1
    assert "event-000003 is bad" in line


def exported(spool: Path, which: str) -> list[dict[str, Any]]:
    result = run("export", f"--{which}", str(spool))
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_export_writes_the_events_as_they_are_sent(history: Path) -> None:
    assert exported(history, "dead-letters") == [json.loads(event(3, time=OLD))]
    assert exported(history, "waiting") == [
        json.loads(event(n, subject="consumer:bob", time=NEW)) for n in (10, 11)
    ]
    every = [found["id"] for found in exported(history, "all")]
    assert sorted(every) == [f"event-{n:06d}" for n in (0, 1, 2, 3, 4, 5, 10, 11)]
    (quarantined,) = exported(history, "quarantine")
    assert (quarantined["id"], quarantined["reason"], quarantined["log"]["request"]["id"]) == (
        1,
        "no_consumer",
        "quarantined-1",
    )


def test_export_into_a_pipe_that_closes_ends_quietly(tmp_path: Path) -> None:
    spooled(tmp_path, [record(n) for n in range(2000)])
    command = f"{sys.executable} -m openmeter_plugin spool export --all {tmp_path} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


def test_export_reads_all_pages(tmp_path: Path) -> None:
    with serving(EventsServer(lambda _: refusal(400, "never"))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(5)])
        run_until_empty(tmp_path)
    assert list(export.dead_letters(tmp_path, page_size=2)) == [event(n) for n in range(5)]
