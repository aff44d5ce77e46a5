"""`openmeter-plugin spool status`, and behavior that all spool commands share."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.ledger import read_ledger
from openmeter_plugin.books.read_models import SpoolError
from openmeter_plugin.books.status import read_status
from openmeter_plugin.maintenance.verify import verify
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory, write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import delivering, record, run_until_empty, skip, spooled
from tests.plugin.events_server import EventsServer
from tests.plugin.spool_commands import NEW, OLD, TOKEN, on_a_terminal, printed, run, run_process
from tests.plugin.spools import QUEUE, destination, running_writer, segments

pytestmark = pytest.mark.slow

# status


def test_status_accounts_for_every_request_and_event(history: Path, server: EventsServer) -> None:
    status = printed("status", str(history))
    found = {d["id"]: d for d in status["destinations"]}
    assert set(found) == {QUEUE, QUARANTINE}
    books = found[QUEUE]["books"]
    assert books["requests"] == 9
    assert (books["metered"], books["resent"], books["quarantined"]) == (6, 1, 0)
    assert books["skipped"] == {"no_consumer": 1, "status_excluded": 1}
    assert (books["events"], books["delivered"], books["dead_lettered"], books["waiting"]) == (6, 5, 1, 0)
    assert found[QUEUE]["not_accounted"] == {"requests": 1, "events": 2, "lost": 0}
    assert found[QUEUE]["backlog"] == 2
    assert found[QUEUE]["oldest_waiting"]["time"] == NEW
    assert found[QUEUE]["endpoint"] == server.url
    assert found[QUEUE]["bytes"] == sum(path.stat().st_size for path in segments(history))
    assert found[QUARANTINE]["books"]["quarantined"] == 1
    assert found[QUARANTINE]["endpoint"] is None
    assert status["total"]["books"]["requests"] == 10
    assert (status["dead_letters"], status["quarantined"], status["delivery_running"]) == (1, 1, False)


def test_status_prints_plain_lines_without_a_terminal(history: Path) -> None:
    result = run("status", str(history))
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        "  requests 9 = metered 6 + skipped 2 (no_consumer 1, status_excluded 1) + quarantined 0 + resent 1\n"
        "  events 6 = delivered 5 + dead-lettered 1 + waiting 0\n"
        "  not accounted for yet: 1 request with 2 events, 0 lost\n"
    ) in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stdout.endswith(
        "delivery not running; 1 dead letter and 1 request in quarantine to replay\n"
    )


def test_status_prints_a_table_on_a_terminal(history: Path) -> None:
    screen = on_a_terminal("status", str(history))
    assert "delivered" in screen
    assert "│" in screen or "|" in screen


def test_the_directory_may_come_from_the_environment(history: Path) -> None:
    result = run_process("status", "--output=json", OPENMETER_PLUGIN_SPOOL=str(history))
    assert json.loads(result.stdout)["total"]["backlog"] == 2


def test_no_command_shows_a_token_or_the_secrets_of_a_url(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    write_destination(spool, destination("https://user:pass@host/events?key=hidden", token=TOKEN))
    spooled(spool, [record(1)])
    outputs = [run(name, str(spool)) for name in ("status", "verify", "dead-letters")]
    outputs += [run("status", str(spool), "--output=json"), run("export", "--all", str(spool))]
    text = "".join(result.stdout + result.stderr for result in outputs)
    assert "https://host/events" in text
    assert not any(secret in text for secret in (TOKEN, "pass", "hidden"))


@pytest.mark.parametrize(
    "arguments",
    [("status", "--bogus"), ("export",), ("export", "--all", "--waiting"), ("drain", "--timeout", "soon")],
)
def test_a_usage_error_exits_with_64(history: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, str(history))
    assert (result.returncode, result.stdout) == (os.EX_USAGE, "")


@pytest.mark.parametrize("name", ["status", "verify", "dead-letters", "drain"])
def test_a_mistyped_directory_has_an_error_message(tmp_path: Path, name: str) -> None:
    for directory in (tmp_path / "nothing", tmp_path):
        result = run(name, str(directory))
        assert result.returncode == 1
        assert result.stderr.startswith(f"openmeter-plugin: {directory} is not a ")
        assert "Traceback" not in result.stderr


def test_damaged_books_have_an_error_message(history: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (history / f"{FILE}{suffix}").write_bytes(b"this is not a database, " * 100)
    for name in ("status", "verify", "dead-letters"):
        result = run(name, str(history))
        assert result.returncode == 1
        assert result.stderr.startswith(f"openmeter-plugin: the books ({FILE}) cannot be read: ")
        assert "Traceback" not in result.stderr


def test_the_spool_can_be_read_during_writing_and_delivery(history: Path) -> None:
    with delivering(history), running_writer(history) as writer:
        for number in range(100, 200):
            writer.append(writer.queue(QUEUE), record(number), None)
        status = run_process("status", "--output=json", str(history))
        assert json.loads(status.stdout)["delivery_running"] is True
        assert run_process("verify", str(history)).returncode == 0
        eventually(lambda: read_status(history).total.backlog == 0, what="the delivery")
    assert read_status(history).total.books.delivered == 107


def test_a_read_only_copy_is_read_and_not_changed(history: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(history, copy)
    with closing(sqlite3.connect(copy / FILE)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("UPDATE counts SET value = value")
        db.commit()
        shutil.copyfile(copy / FILE, tmp_path / "main")
        shutil.copyfile(copy / f"{FILE}-wal", tmp_path / "wal")
    shutil.copyfile(tmp_path / "main", copy / FILE)
    shutil.copyfile(tmp_path / "wal", copy / f"{FILE}-wal")  # as after kill -9
    mount = ["mount", "--bind", "-o", "ro", str(copy), str(copy)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a read-only mount cannot be made here")
    try:
        before = sorted(copy.iterdir())
        assert printed("status", str(copy))["total"]["books"]["requests"] == 10
        assert printed("verify", str(copy))["ok"] is True
        assert run("export", "--waiting", str(copy)).stdout.count("\n") == 2
        result = run_process("drain", str(copy))
        assert result.returncode == 1
        assert "cannot be written" in result.stderr
        assert "Traceback" not in result.stderr
        assert sorted(copy.iterdir()) == before
    finally:
        subprocess.run(["umount", "--lazy", str(copy)], check=True)


# functions below the commands


def test_a_spool_without_books_is_not_empty(tmp_path: Path) -> None:
    spooled(tmp_path, [record(1), skip()])
    status = read_status(tmp_path)
    assert (status.total.backlog, status.total.not_accounted.requests) == (1, 2)
    assert status.total.books.requests == 0
    assert verify(tmp_path).ok
    assert read_ledger(tmp_path).hours_with_waiting_events == ["2026-11-22T05"]


def test_unreadable_books_raise_a_spool_error(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(SpoolError, match="cannot be read"):
        read_status(tmp_path)


def test_the_ledger_is_read_in_pages(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n, subject=f"consumer:{n % 7}") for n in range(10, 40)])
    run_until_empty(tmp_path)
    subjects: list[str] = []
    after = None
    while True:
        page = read_ledger(tmp_path, after=after, limit=3)
        subjects += [line.subject for line in page.lines]
        after = page.next
        if after is None:
            break
    assert subjects == [f"consumer:{n}" for n in range(7)]
    with pytest.raises(ValueError, match="after must be"):
        read_ledger(tmp_path, after="bogus")


@pytest.mark.parametrize(
    ("span", "hours"),
    [
        (("", "~"), ["2026-11-20T05", "2026-11-22T07"]),
        (("2026-11-20T06", "~"), ["2026-11-22T07"]),
        (("", "2026-11-22T07"), ["2026-11-20T05"]),
        (("2026-11-20T05", "2026-11-20T05"), []),
    ],
    ids=str,
)
def test_the_hours_with_waiting_events_are_those_of_the_span(
    tmp_path: Path, span: tuple[str, str], hours: list[str]
) -> None:
    spooled(tmp_path, [record(1, time=OLD), record(2, time=NEW)])
    assert read_ledger(tmp_path, *span).hours_with_waiting_events == hours


def test_the_queues_directory_has_a_folder_per_queue(tmp_path: Path) -> None:
    spooled(tmp_path, [record(1)])
    assert [path.name for path in queues_directory(tmp_path).iterdir()] == [QUEUE]
