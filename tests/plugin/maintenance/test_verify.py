"""`openmeter-plugin spool verify` finds every difference and reports no false ones."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.ledger import read_ledger
from openmeter_plugin.books.status import QueueFiles, read_status
from openmeter_plugin.maintenance import verify as verify_module
from openmeter_plugin.maintenance.verify import verify
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import KEEP_NOTHING, delivering, record, run_until_empty, skip, spooled
from tests.plugin.events_server import Answer, EventsServer, serving, take_all
from tests.plugin.spool_commands import NEW, printed, run
from tests.plugin.spools import QUEUE, destination, segments

pytestmark = pytest.mark.slow


def test_verify_accepts_a_correct_spool(history: Path) -> None:
    result = run("verify", str(history))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("the books agree\n")
    found = printed("verify", str(history))
    assert (found["ok"], found["waiting"], found["not_accounted"]["events"]) == (True, 0, 2)
    assert (found["segments"], found["records"], found["damaged_bytes"]) == (3, 11, 0)


def in_books(statement: str) -> Callable[[Path], None]:
    def change(spool: Path) -> None:
        with closing(sqlite3.connect(spool / FILE)) as db:
            assert db.execute(statement).rowcount > 0
            db.commit()

    return change


def in_first_segment(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(spool: Path) -> None:
        path = segments(spool)[0]
        path.write_bytes(change(path.read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_books("UPDATE counts SET value = value + 1 WHERE name = 'requests'"), "requests are 10, but"),
        (in_books("UPDATE counts SET value = value - 1 WHERE name = 'delivered'"), "events are 6, but"),
        (in_books("UPDATE ledger SET delivered = delivered - 1"), "accepted 6, but delivered 4"),
        (in_books("DELETE FROM dead_letters"), "dead-lettered 1, but 0 dead letters are there"),
        (in_books("UPDATE positions SET delivered = 8 WHERE delivered > 8"), "but 6 in the segments"),
        (in_books("UPDATE positions SET delivered = accounted + 1"), "but accounted for up to"),
        (
            in_books("DELETE FROM quarantine"),
            "the counts have 1 request in quarantine, the quarantine has 0",
        ),
        (in_first_segment(lambda content: content[:100]), "has 100 bytes"),
        (
            in_first_segment(lambda c: c[:60] + bytes([c[60] ^ 1]) + c[61:]),
            "damaged in the segments: ",
        ),
        (in_first_segment(lambda content: b"NOSEGMNT" + content[8:]), "does not start with a segment header"),
    ],
)
def test_verify_reports_every_difference(history: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(history)
    found = verify(history)
    assert not found.ok
    assert any(message in difference for difference in found.differences), found.differences


def test_a_segment_that_is_removed_during_the_verification_is_no_difference(
    history: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = lambda _: Answer(503)
    with delivering(history):
        eventually(lambda: read_status(history).total.books.waiting == 2, what="the accounting")
    server.script = take_all
    recount = verify_module._recount
    removed: list[str] = []

    def late(files: QueueFiles, known: Any) -> verify_module._Recount:
        if files.directory.name == QUEUE and not removed:
            run_until_empty(history, retention=KEEP_NOTHING)
            removed.extend(files.sizes)
        return recount(files, known)

    monkeypatch.setattr(verify_module, "_recount", late)
    found = verify(history)
    assert found.ok, found.differences
    assert len(removed) == 2
    assert segments(history) == []


def test_verify_exits_with_1_and_prints_the_differences_on_standard_error(history: Path) -> None:
    in_books("UPDATE counts SET value = value + 1 WHERE name = 'requests'")(history)
    result = run("verify", str(history))
    assert result.returncode == 1
    assert f"openmeter-plugin: {QUEUE}: requests are 10" in result.stderr
    assert printed("verify", str(history), status=1)["ok"] is False


def test_damage_that_is_accounted_for_is_no_difference(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(1), record(2)])
    in_first_segment(lambda c: c[:60] + bytes([c[60] ^ 1]) + c[61:])(tmp_path)
    run_until_empty(tmp_path)
    found = verify(tmp_path)
    assert found.ok, found.differences
    assert found.damaged_bytes > 0


def test_waiting_events_are_compared_by_ledger_line(tmp_path: Path) -> None:
    with serving(EventsServer(lambda _: Answer(503))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(1), record(2, 3, subject="consumer:bob", time=NEW), skip()])
        with delivering(tmp_path):
            eventually(lambda: read_status(tmp_path).total.books.events == 3, what="the accounting")
            found = verify(tmp_path)
            assert (found.ok, found.waiting) == (True, 3), found.differences
            ledger = read_ledger(tmp_path)
    assert [(line.hour, line.waiting) for line in ledger.lines] == [
        ("2026-11-22T05", 1),
        ("2026-11-22T07", 2),
    ]
    assert ledger.hours_with_waiting_events == ["2026-11-22T05", "2026-11-22T07"]
