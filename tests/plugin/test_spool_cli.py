"""`openmeter-plugin spool ...`, as an operator calls it on a spool with a history."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin import cli
from openmeter_plugin.delivery.books_file import FILE
from openmeter_plugin.operations.ledger import read_ledger
from openmeter_plugin.operations.reading import SpoolError
from openmeter_plugin.operations.status import read_status
from openmeter_plugin.operations.verify import verify
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory, write_destination
from openmeter_plugin.spool.segment import QUARANTINED, encode_record
from tests.harness.process import eventually
from tests.plugin.deliveries import delivering, event, record, rejects, run_until_empty, skip, spooled
from tests.plugin.events_server import Answer, EventsServer, serving, take_all
from tests.plugin.spools import QUEUE, destination, running_writer, segments

TOKEN = "token-of-the-spool-commands"
OLD, NEW = "2026-11-20T05:49:03.779Z", "2026-11-22T07:00:00.000Z"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, as `openmeter-plugin` does: a new one takes ten times as long."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    status: int | str | None = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["openmeter-plugin", "spool", *arguments])
        try:
            cli.run()
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(arguments, status, *texts)


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", "spool", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | environment,
    )


def printed(*arguments: str, status: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.returncode == status, result.stderr
    return json.loads(result.stdout)


def on_a_terminal(*arguments: str) -> str:
    """Run a command on a terminal and return what stands on it."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "openmeter_plugin", "spool", *arguments]
    with closing(os.fdopen(master, "rb", buffering=0)) as screen:
        environment = os.environ | {"COLUMNS": "140", "TERM": "dumb"}
        process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        seen = b""
        try:
            while more := screen.read(65536):
                seen += more
        except OSError:  # how a terminal ends
            pass
        assert process.wait(20) == 0, seen.decode()
    return seen.decode()


def set_aside(number: int) -> bytes:
    log = {"request": {"id": f"set-aside-{number}"}, "started_at": 1}
    return encode_record(QUARANTINED + orjson.dumps({"reason": "no_consumer", "log": log}))


@pytest.fixture
def server() -> Iterator[EventsServer]:
    with serving(EventsServer(rejects({"event-000003"}))) as running:
        yield running


@pytest.fixture
def history(tmp_path: Path, server: EventsServer) -> Path:
    """A spool: 5 events delivered, 1 refused, 2 requests skipped, 1 set aside, 1 resent, 2 new events."""
    spool = tmp_path / "spool"
    write_destination(spool, destination(server.url, token=TOKEN))
    spooled(
        spool,
        [*(record(n, time=OLD) for n in range(6)), record(5, time=OLD), skip(), skip("status_excluded")],
    )
    spooled(spool, [set_aside(1)], QUARANTINE)
    run_until_empty(spool)
    spooled(spool, [record(10, 11, subject="consumer:bob", time=NEW)])
    return spool


# status


def test_status_tells_what_became_of_every_request_and_event(history: Path, server: EventsServer) -> None:
    status = printed("status", str(history))
    found = {d["id"]: d for d in status["destinations"]}
    assert set(found) == {QUEUE, QUARANTINE}
    books = found[QUEUE]["books"]
    assert books["requests"] == 9
    assert (books["metered"], books["resent"], books["quarantined"]) == (6, 1, 0)
    assert books["skipped"] == {"no_consumer": 1, "status_excluded": 1}
    assert (books["events"], books["delivered"], books["dead_lettered"], books["waiting"]) == (6, 5, 1, 0)
    assert found[QUEUE]["not_accounted"] == {"requests": 1, "events": 2, "lost": 0}
    assert found[QUEUE]["depth"] == 2
    assert found[QUEUE]["oldest_waiting"]["time"] == NEW
    assert found[QUEUE]["endpoint"] == server.url
    assert found[QUEUE]["bytes"] == sum(path.stat().st_size for path in segments(history))
    assert found[QUARANTINE]["books"]["quarantined"] == 1
    assert found[QUARANTINE]["endpoint"] is None
    assert status["total"]["books"]["requests"] == 10
    assert (status["dead_letters"], status["quarantined"], status["delivery_running"]) == (1, 1, False)


def test_status_prints_plain_lines_where_there_is_no_terminal(history: Path) -> None:
    result = run("status", str(history))
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        "  requests 9 = metered 6 + skipped 2 (no_consumer 1, status_excluded 1) + quarantined 0 + resent 1\n"
        "  events 6 = delivered 5 + dead-lettered 1 + waiting 0\n"
        "  not accounted for yet: 1 requests with 2 events, 0 lost\n"
    ) in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stdout.endswith(
        "delivery not running; 1 dead letters and 1 requests in quarantine to replay\n"
    )


def test_status_prints_a_table_on_a_terminal(history: Path) -> None:
    screen = on_a_terminal("status", str(history))
    assert "delivered" in screen
    assert "│" in screen or "|" in screen


def test_the_directory_may_come_from_the_environment(history: Path) -> None:
    result = run_process("status", "--json", OPENMETER_PLUGIN_SPOOL=str(history))
    assert json.loads(result.stdout)["total"]["depth"] == 2


def test_no_command_shows_a_token_or_what_else_is_secret_in_an_address(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    write_destination(spool, destination("https://user:pass@host/events?key=hidden", token=TOKEN))
    spooled(spool, [record(1)])
    outputs = [run(name, str(spool)) for name in ("status", "verify", "dead-letters")]
    outputs += [run("status", str(spool), "--json"), run("export", "--all", str(spool))]
    text = "".join(result.stdout + result.stderr for result in outputs)
    assert "https://host/events" in text
    assert not any(secret in text for secret in (TOKEN, "pass", "hidden"))


@pytest.mark.parametrize(
    "arguments",
    [("status", "--bogus"), ("export",), ("export", "--all", "--waiting"), ("drain", "--timeout", "soon")],
)
def test_a_usage_error_ends_with_64(history: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, str(history))
    assert (result.returncode, result.stdout) == (os.EX_USAGE, "")


@pytest.mark.parametrize("name", ["status", "verify", "dead-letters", "drain"])
def test_a_mistyped_directory_is_told_in_a_sentence(tmp_path: Path, name: str) -> None:
    for directory in (tmp_path / "nothing", tmp_path):
        result = run(name, str(directory))
        assert result.returncode == 1
        assert result.stderr.startswith(f"openmeter-plugin: {directory} is not a ")
        assert "Traceback" not in result.stderr


def test_books_that_are_no_database_are_told_in_a_sentence(history: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (history / f"{FILE}{suffix}").write_bytes(b"this is no database at all, " * 100)
    for name in ("status", "verify", "dead-letters"):
        result = run(name, str(history))
        assert result.returncode == 1
        assert result.stderr.startswith(f"openmeter-plugin: the books ({FILE}) cannot be read: ")
        assert "Traceback" not in result.stderr


def test_reading_goes_on_beside_a_delivery_and_a_writer(history: Path) -> None:
    with delivering(history), running_writer(history) as writer:
        for number in range(100, 200):
            writer.append(writer.queue(QUEUE), record(number), None)
        status = run_process("status", "--json", str(history))
        assert json.loads(status.stdout)["delivery_running"] is True
        assert run_process("verify", str(history)).returncode == 0
        eventually(lambda: read_status(history).total.depth == 0, what="the delivery")
    assert read_status(history).total.books.delivered == 107


def test_a_read_only_copy_is_read_without_a_trace(history: Path, tmp_path: Path) -> None:
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


# verify


def test_verify_finds_nothing_wrong_with_a_spool_that_is_right(history: Path) -> None:
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
    ("damage", "says"),
    [
        (in_books("UPDATE counts SET value = value + 1 WHERE name = 'requests'"), "requests are 10, but"),
        (in_books("UPDATE counts SET value = value - 1 WHERE name = 'delivered'"), "events are 6, but"),
        (in_books("UPDATE ledger SET delivered = delivered - 1"), "accepted 6, but delivered 4"),
        (in_books("DELETE FROM dead_letters"), "dead-lettered 1, but 0 dead letters are kept"),
        (in_books("UPDATE positions SET delivered = 8 WHERE delivered > 8"), "waiting in the segments 6"),
        (in_first_segment(lambda content: content[:100]), "has 100 bytes"),
        (
            in_first_segment(lambda c: c[:60] + bytes([c[60] ^ 1]) + c[61:]),
            "bytes of the segments are damaged",
        ),
        (in_first_segment(lambda content: b"NOSEGMNT" + content[8:]), "does not begin as a segment does"),
    ],
)
def test_verify_tells_every_difference(history: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(history)
    found = verify(history)
    assert not found.ok
    assert any(says in difference for difference in found.differences), found.differences


def test_verify_ends_with_1_and_tells_the_differences_on_standard_error(history: Path) -> None:
    in_books("UPDATE counts SET value = value + 1 WHERE name = 'requests'")(history)
    result = run("verify", str(history))
    assert result.returncode == 1
    assert f"openmeter-plugin: {QUEUE}: requests are 10" in result.stderr
    assert printed("verify", str(history), status=1)["ok"] is False


def test_damage_that_was_accounted_for_as_such_is_no_difference(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(1), record(2)])
    in_first_segment(lambda c: c[:60] + bytes([c[60] ^ 1]) + c[61:])(tmp_path)
    run_until_empty(tmp_path)
    found = verify(tmp_path)
    assert found.ok, found.differences
    assert found.damaged_bytes > 0


def test_what_waits_is_recounted_line_by_line(tmp_path: Path) -> None:
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


# dead letters and export


def test_dead_letters_are_told_with_the_servers_answer(history: Path) -> None:
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
    (kept,) = exported(history, "quarantine")
    assert (kept["id"], kept["reason"], kept["log"]["request"]["id"]) == (1, "no_consumer", "set-aside-1")


def test_export_into_a_pipe_that_closes_ends_quietly(tmp_path: Path) -> None:
    spooled(tmp_path, [record(n) for n in range(2000)])
    command = f"{sys.executable} -m openmeter_plugin spool export --all {tmp_path} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


# drain


def test_drain_delivers_an_orphaned_volume_and_ends_with_0(history: Path, server: EventsServer) -> None:
    result = run_process("drain", str(history))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "7 events delivered, 0 left waiting, 1 dead letters, 1 requests in quarantine\n"
    assert set(server.taken) == {f"event-{n:06d}" for n in (0, 1, 2, 4, 5, 10, 11)}
    assert server.posts[-1].headers["authorization"] == f"Bearer {TOKEN}"
    assert segments(history), "nothing is removed"
    assert run_process("drain", str(history)).returncode == 0


def test_drain_shows_its_progress_on_a_terminal(history: Path) -> None:
    screen = on_a_terminal("drain", str(history))
    assert "events" in screen
    assert "7 events delivered, 0 left waiting" in screen


def test_drain_ends_with_1_when_its_time_is_up_and_something_is_left(tmp_path: Path) -> None:
    write_destination(tmp_path, destination("http://127.0.0.1:9/events"))
    spooled(tmp_path, [record(1), record(2)])
    result = run_process("drain", str(tmp_path), "--timeout", "0.5s")
    assert result.returncode == 1
    assert result.stdout.startswith("0 events delivered, 2 left waiting")
    assert "Traceback" not in result.stderr


def test_drain_sends_to_another_address_with_another_token(tmp_path: Path) -> None:
    write_destination(tmp_path / "spool", destination("http://127.0.0.1:9/events"))
    spooled(tmp_path / "spool", [record(1), record(2)])
    (tmp_path / "token").write_text("another-token\n")
    with serving() as server:
        options = ["--endpoint", server.url, "--token-file", str(tmp_path / "token")]
        result = run_process("drain", str(tmp_path / "spool"), *options)
        assert result.returncode == 0, result.stderr
        assert server.taken == ["event-000001", "event-000002"]
        assert server.posts[0].headers["authorization"] == "Bearer another-token"


def test_drain_does_not_send_several_destinations_to_one_address(tmp_path: Path) -> None:
    for queue in (QUEUE, "1111222233334444"):
        spooled(tmp_path, [record(1)], queue)
    result = run_process("drain", str(tmp_path), "--endpoint", "http://127.0.0.1:9/")
    assert result.returncode == 1
    assert "would send all of these to one address" in result.stderr


def test_drain_leaves_a_spool_alone_that_somebody_delivers(history: Path) -> None:
    with delivering(history):
        eventually(lambda: read_status(history).delivery_running, what="the lock")
        result = run_process("drain", str(history))
    assert result.returncode == 1
    assert "a delivery is running on this spool already" in result.stderr


# the parts that commands have no way to


def test_a_spool_that_nobody_has_read_yet_is_not_empty(tmp_path: Path) -> None:
    spooled(tmp_path, [record(1), skip()])
    status = read_status(tmp_path)
    assert (status.total.depth, status.total.not_accounted.requests) == (1, 2)
    assert status.total.books.requests == 0
    assert verify(tmp_path).ok
    assert read_ledger(tmp_path).hours_with_waiting_events == ["2026-11-22T05"]


def test_books_without_permission_to_read_raise_what_can_be_told(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(SpoolError, match="cannot be read"):
        read_status(tmp_path)


def test_the_ledger_is_read_page_by_page(tmp_path: Path, server: EventsServer) -> None:
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


def test_the_queues_directory_is_where_the_commands_look(tmp_path: Path) -> None:
    spooled(tmp_path, [record(1)])
    assert [path.name for path in queues_directory(tmp_path).iterdir()] == [QUEUE]


# replay


CONFIG = """
ingest_endpoint: {url}
subject:
  look_up_value_in: consumer
  field: id
  missing: fallback
  fallback_subject: unassigned
"""


def test_replayed_dead_letters_are_sent_by_the_next_delivery(history: Path, server: EventsServer) -> None:
    server.script = take_all
    result = run("replay", "--all", str(history))
    assert (result.returncode, result.stdout) == (0, "1 dead letters will be sent again\n")
    assert "no delivery is running" in result.stderr
    assert printed("dead-letters", str(history))["dead_letters"][0]["to_be_replayed"] is True
    assert run_process("drain", str(history)).returncode == 0
    assert "event-000003" in server.taken
    found = verify(history)
    assert found.ok, found.differences
    assert read_status(history).total.books.dead_lettered == 0


def test_only_the_dead_letters_that_are_named_are_replayed(history: Path) -> None:
    assert run("replay", "--id", "4711", str(history)).stdout == "0 dead letters will be sent again\n"
    assert run("replay", "--id", "4711", "--id", "1", str(history)).stdout.startswith("1 dead letters")


def test_what_was_set_aside_becomes_events_under_mended_settings(
    history: Path, server: EventsServer, tmp_path: Path
) -> None:
    config = tmp_path / "mended.yaml"
    config.write_text(CONFIG.format(url=server.url))
    config.chmod(0o600)
    result = run("replay", "--quarantine", "--all", "--config", str(config), str(history))
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "1 requests became 1 events, which will be sent; 0 were skipped, 0 stay in quarantine\n"
    )
    assert verify(history).ok, verify(history).differences
    assert run_process("drain", str(history)).returncode == 0
    assert "set-aside-1" in server.taken
    assert read_status(history).quarantined == 0
    assert verify(history).ok, verify(history).differences


@pytest.mark.parametrize("arguments", [(), ("--all", "--id", "1")])
def test_a_replay_of_nothing_in_particular_is_a_usage_error(
    history: Path, arguments: tuple[str, ...]
) -> None:
    assert run("replay", *arguments, str(history)).returncode == os.EX_USAGE


def test_a_replay_with_settings_that_cannot_be_used_says_why(history: Path, tmp_path: Path) -> None:
    result = run("replay", "--quarantine", "--all", "--config", str(tmp_path / "nothing.yaml"), str(history))
    assert result.returncode == 1
    assert result.stderr.startswith("openmeter-plugin: --config: ")
    assert "cannot be read" in result.stderr
