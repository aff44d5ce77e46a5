"""Retention of delivered segments, and unreadable segments: no undelivered event is ever removed."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from openmeter_plugin.books.replay import request_redelivery
from openmeter_plugin.books.store import Books
from openmeter_plugin.delivery import process as process_module
from openmeter_plugin.delivery import retention as retention_module
from openmeter_plugin.delivery.clock import SteadyClock
from openmeter_plugin.delivery.options import Retention
from openmeter_plugin.delivery.pipeline import Pipeline
from openmeter_plugin.delivery.retention import Delivered, delivered_now, expired, remove_leftovers
from openmeter_plugin.spool import reader as reader_module
from openmeter_plugin.spool.destination import queues_directory, redirect, write_destination
from openmeter_plugin.spool.queue import Segment
from openmeter_plugin.spool.reader import UNREADABLE
from openmeter_plugin.spool.segment import MAGIC
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    KEEP_NOTHING,
    assert_balanced,
    count,
    delivered,
    delivering,
    ids,
    record,
    run_until_empty,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, refusal, serving
from tests.plugin.spools import QUEUE, destination, file_of, running_writer, segments

pytestmark = pytest.mark.slow

HOUR = 3600.0


def segment(age: float, size: int = 100) -> Delivered:
    since = time.monotonic() - age
    return Delivered(Path(f"{age}.seg"), since, size, found=since)


@pytest.mark.parametrize(
    ("retention", "missing", "removed"),
    [
        (Retention(timedelta(hours=1), 10_000), 0, []),
        (Retention(timedelta(seconds=25), 10_000), 0, [30.0]),
        (Retention(timedelta(seconds=5), 10_000), 0, [30.0, 20.0, 10.0]),
        (Retention(timedelta(hours=1), 250), 0, [30.0]),
        (Retention(timedelta(hours=1), 300), 0, []),
        (Retention(timedelta(hours=1), 99), 0, [30.0, 20.0, 10.0]),
        (Retention(timedelta(hours=1), 10_000), 101, [30.0, 20.0]),
        (Retention(timedelta(0), 10_000), 0, [30.0, 20.0, 10.0]),
        (Retention(timedelta(0), 0, timedelta(seconds=15)), 0, [30.0, 20.0]),
        (Retention(timedelta(0), 0, timedelta(seconds=15)), 201, [30.0, 20.0, 10.0]),
    ],
)
def test_the_oldest_segments_are_removed_first_by_age_by_size_and_for_space(
    retention: Retention, missing: int, removed: list[float]
) -> None:
    files = [segment(age) for age in (20.0, 10.0, 30.0)]
    assert [f.path.name for f in expired(files, retention, missing)] == [f"{age}.seg" for age in removed]


@pytest.mark.parametrize("jump", [-10 * 365 * 86400.0, 10 * 365 * 86400.0], ids=["back", "ahead"])
def test_a_clock_jump_neither_removes_segments_early_nor_keeps_them_for_ever(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    write_destination(tmp_path, destination(server.url))
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    retention = Retention(age=timedelta(seconds=1.5), resend_window=timedelta(0))
    with delivering(tmp_path, retention=retention):
        spooled(tmp_path, [record(n) for n in range(5)])
        written = time.monotonic()
        eventually(lambda: delivered(tmp_path) == 5)
        eventually(lambda: time.monotonic() > written + 0.2)
        offset[0] = jump
        eventually(lambda: segments(tmp_path) == [], what="the removal")
        assert time.monotonic() - written >= 1.2


def test_a_file_with_a_future_timestamp_counts_as_written_now(tmp_path: Path) -> None:
    path = tmp_path / "a.seg"
    path.write_bytes(b"content")
    os.utime(path, (time.time() + 1e6, time.time() + 1e6))
    found = delivered_now(path, SteadyClock())
    assert (found.path, found.size) == (path, 7)
    assert found.since <= time.monotonic()
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert time.monotonic() - delivered_now(path, SteadyClock()).since == pytest.approx(7200, abs=100)


def test_delivered_segments_survive_a_restart_and_are_not_sent_again(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(10)], each_alone=True)
    for _ in range(2):
        run_until_empty(tmp_path)
    assert len(segments(tmp_path)) == 10
    assert set(server.came.values()) == {1}
    run_until_empty(tmp_path, retention=KEEP_NOTHING)
    assert segments(tmp_path) == []


@pytest.mark.parametrize("retention", [Retention(timedelta(0)), Retention(size=0)], ids=["age", "size"])
def test_a_request_resent_around_a_restart_is_counted_once_without_any_retention(
    tmp_path: Path, server: EventsServer, retention: Retention
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(0), record(1, 2)])
    run_until_empty(tmp_path, retention=retention)
    spooled(tmp_path, [record(1, 2), record(3)])
    run_until_empty(tmp_path, retention=retention)
    assert set(server.came.values()) == {1}
    assert (delivered(tmp_path), count(tmp_path, "resent")) == (4, 1)
    assert_balanced(tmp_path)


def test_a_busy_queue_has_its_delivered_segments_removed_too(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Pipeline.work

    async def never_idle(self: Pipeline, *, coalesce: bool) -> bool:
        await work(self, coalesce=coalesce)
        await asyncio.sleep(0.01)
        return True

    monkeypatch.setattr(Pipeline, "work", never_idle)
    write_destination(tmp_path, destination(server.url))
    with delivering(tmp_path, retention=KEEP_NOTHING):
        spooled(tmp_path, [record(n) for n in range(5)], each_alone=True)
        eventually(lambda: segments(tmp_path) == [], what="the removal", seconds=10)
    assert server.taken == ids(range(5))


def test_a_removal_survives_a_power_loss_at_each_moment(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Books that are behind count the removed events as lost, a file that comes back is counted again."""
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(0)])
    (path,) = segments(tmp_path)
    steps: list[str] = []
    fsync, unlink, forget = os.fsync, os.unlink, Books.forget

    def synced(descriptor: int) -> None:
        steps.append(f"sync {file_of(descriptor).name}")
        fsync(descriptor)

    def removed(target: Any, **options: Any) -> None:
        if Path(target) == path:
            steps.append("remove")
        unlink(target, **options)

    def forgotten(books: Books, queue: str, segment: str) -> None:
        steps.append("forget")
        forget(books, queue, segment)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "unlink", removed)
    monkeypatch.setattr(Books, "forget", forgotten)
    run_until_empty(tmp_path, retention=KEEP_NOTHING)
    assert steps == ["sync books.db-wal", "remove", f"sync {QUEUE}", "forget"]


def test_an_undelivered_segment_stays_however_old_or_large(tmp_path: Path) -> None:
    with serving(EventsServer(lambda _: Answer(500))) as server:
        write_destination(tmp_path, destination(server.url))
        spooled(tmp_path, [record(n) for n in range(5)], each_alone=True)
        for path in segments(tmp_path):
            os.utime(path, (0, 0))
        with delivering(tmp_path, retention=Retention(timedelta(0), 0)):
            eventually(lambda: len(server.posts) > 30, what="many retries")
        assert len(segments(tmp_path)) == 5


def test_a_waiting_redelivery_keeps_the_segments_that_it_may_need(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(5)])
    run_until_empty(tmp_path)
    server.script = lambda _: Answer(500)
    request_redelivery(tmp_path, datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
    with delivering(tmp_path, retention=KEEP_NOTHING):
        eventually(lambda: len(server.posts) > 20, what="many retries")
        assert len(segments(tmp_path)) == 1
        server.script = lambda _: Answer()
        eventually(lambda: segments(tmp_path) == [], what="the removal")
    assert set(server.came.values()) == {2}


def test_retained_segments_make_room_on_a_full_disk(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(5)], each_alone=True)
    spooled(tmp_path, [record(n) for n in range(5, 7)])
    run_until_empty(tmp_path)
    assert len(segments(tmp_path)) == 6
    free = 40 * len(record(0))
    of_file_system = os.statvfs_result((1, 1, free * 8, 0, free, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: of_file_system)
    monkeypatch.setattr(retention_module, "_MIN_FREE", free + 3 * len(record(0)))
    run_until_empty(tmp_path)
    assert [path.stat().st_size > 2 * len(record(0)) for path in segments(tmp_path)] == [False, False, True]


def test_segments_that_a_redelivery_needs_make_room_on_a_full_disk_too(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(5)])
    run_until_empty(tmp_path)
    server.script = lambda _: Answer(500)
    request_redelivery(tmp_path, datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
    with delivering(tmp_path):
        eventually(lambda: len(server.posts) > 3, what="a few retries")
        assert len(segments(tmp_path)) == 1
        monkeypatch.setattr(process_module, "shortage", lambda _: 1)
        eventually(lambda: segments(tmp_path) == [], what="the removal")


# Unreadable segments


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, *, reads: int = 1_000_000) -> None:
    """Make this many reads of a file fail, as on a dying disk."""
    pread, left = os.pread, [reads]

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if file_of(descriptor).name == name and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(reader_module, "_RETRY_SECONDS", 0.01)


def test_a_resent_request_is_recognised_after_a_restart_with_a_disk_that_fails_to_read(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(0), record(1)])
    run_until_empty(tmp_path)
    breaking(monkeypatch, segments(tmp_path)[0].name, reads=3)
    spooled(tmp_path, [record(1), record(2)])
    run_until_empty(tmp_path)
    assert set(server.came.values()) == {1}
    assert (delivered(tmp_path), count(tmp_path, "resent")) == (3, 1)


def test_a_segment_that_can_never_be_read_again_does_not_hold_up_the_others(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(0)])
    run_until_empty(tmp_path)
    breaking(monkeypatch, segments(tmp_path)[0].name)
    spooled(tmp_path, [record(1)])
    run_until_empty(tmp_path)
    assert server.taken == ids(range(2))


def test_a_segment_that_is_unreadable_for_a_while_is_delivered_afterwards(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(3)], each_alone=True)
    breaking(monkeypatch, segments(tmp_path)[1].name, reads=3)
    run_until_empty(tmp_path)
    assert sorted(server.taken) == ids(range(3))
    assert count(tmp_path, "unreadable_segments") == 0


def test_a_segment_that_stays_unreadable_is_renamed_and_counted_and_the_rest_is_delivered(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(3)], each_alone=True)
    broken = segments(tmp_path)[1]
    content = broken.read_bytes()
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
        breaking(patch, broken.name)
        run_until_empty(tmp_path)
    aside = broken.with_name(f"{broken.name}{UNREADABLE}")
    assert aside.read_bytes() == content
    assert sorted(server.taken) == ["event-000000", "event-000002"]
    assert count(tmp_path, "unreadable_segments") == 1
    assert [line["log_level"] for line in lines if line["event"] == "unreadable_segment_renamed"] == [
        "critical"
    ]
    assert_balanced(tmp_path)
    aside.rename(broken)
    run_until_empty(tmp_path)
    assert sorted(server.taken) == ids(range(3))
    assert_balanced(tmp_path)


@pytest.mark.parametrize("restarts", [0, 2])
def test_the_events_of_a_segment_that_becomes_unreadable_are_lost_until_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: int
) -> None:
    with serving(EventsServer(lambda _: Answer(500))) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=2))
        spooled(tmp_path, [record(n) for n in range(6)])
        with delivering(tmp_path):
            eventually(lambda: waiting(tmp_path) == 6 and server.posts)
        (path,) = segments(tmp_path)
        server.script = lambda _: Answer()
        with monkeypatch.context() as patch:
            breaking(patch, path.name)
            run_until_empty(tmp_path)
        for _ in range(restarts):
            run_until_empty(tmp_path)
        assert (waiting(tmp_path), server.taken) == (0, [])
        assert count(tmp_path, "lost_events", "unreadable") == 6
        path.with_name(f"{path.name}{UNREADABLE}").rename(path)
        run_until_empty(tmp_path)
        assert (waiting(tmp_path), server.taken) == (0, ids(range(6)))
    assert (count(tmp_path, "metered"), count(tmp_path, "lost_events", "unreadable")) == (6, 0)
    assert_balanced(tmp_path)


def test_a_segment_removed_by_hand_stops_nothing(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_RETRY_SECONDS", 0.01)
    write_destination(tmp_path, destination(server.url))
    with serving(EventsServer(lambda _: Answer(500))) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=1))
        spooled(tmp_path, [record(n) for n in range(3)], each_alone=True)
        with delivering(tmp_path):
            eventually(lambda: waiting(tmp_path) == 3)
            segments(tmp_path)[2].unlink()
            server.script = lambda _: Answer()
            eventually(lambda: len(server.taken) >= 2)
            spooled(tmp_path, [record(3)])
            eventually(lambda: "event-000003" in server.taken)
            eventually(lambda: waiting(tmp_path) == 0, what="the end of the backlog")
    # Delivered if it was still in memory.
    assert delivered(tmp_path) + count(tmp_path, "lost_events", "missing") == 4
    assert_balanced(tmp_path)


@pytest.mark.parametrize("copy_is_counted", [True, False])
def test_a_removed_segment_whose_delivery_is_killed_too_is_counted_as_lost_and_nothing_is_sent_twice(
    tmp_path: Path, server: EventsServer, copy_is_counted: bool
) -> None:
    """The saved copy is not sent if it is in the books as resent: the removed file may have been."""
    with serving(EventsServer(lambda _: Answer(500))) as down, ExitStack() as until_killed:
        write_destination(tmp_path, destination(down.url))
        with running_writer(tmp_path, lambda _: None, fsync_interval=60.0) as writer:
            until_killed.enter_context(delivering(tmp_path))
            writer.append(writer.queue(QUEUE), record(0), None)
            eventually(lambda: waiting(tmp_path) == 1, what="delivery to read the segment")
            segments(tmp_path)[0].unlink()
            writer.append(writer.queue(QUEUE), record(1), None)
            eventually(lambda: waiting(tmp_path) == 2, what="delivery to read on in the removed file")
            if not copy_is_counted:
                until_killed.close()
        if copy_is_counted:
            eventually(lambda: count(tmp_path, "resent") == 2, what="delivery to read the copy")
    write_destination(tmp_path, destination(server.url))
    run_until_empty(tmp_path)
    assert count(tmp_path, "lost_events", "missing") == 2
    assert server.taken == ([] if copy_is_counted else ids(range(2)))
    assert set(server.came.values()) <= {1}
    assert_balanced(tmp_path)


# Queues of plugins that are gone


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have queues retired at once when they are empty."""
    monkeypatch.setattr(retention_module, "_EMPTY_SECONDS", 0.0)
    monkeypatch.setattr(process_module, "_LEFTOVER_INTERVAL", 0.1)


@pytest.mark.usefixtures("impatient")
def test_an_empty_queue_is_retired_with_its_counts_kept_and_returns_with_its_next_event(
    tmp_path: Path, server: EventsServer
) -> None:
    directory = queues_directory(tmp_path) / QUEUE
    with (
        running_writer(tmp_path, segment_seconds=0.1, fsync_interval=0.05) as writer,
        delivering(tmp_path, retention=KEEP_NOTHING),
    ):
        queue = writer.describe(destination(server.url, token="the-token"))
        for number in range(3):
            writer.append(queue, record(number), None)
            eventually(lambda number=number: server.taken == ids(range(number + 1)))  # type: ignore[misc]
            eventually(lambda: not directory.exists(), what="the retirement")
        assert [post.headers["authorization"] for post in server.posts] == ["Bearer the-token"] * 3
    assert (count(tmp_path, "metered"), delivered(tmp_path)) == (3, 3)
    assert_balanced(tmp_path)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("use", ["a dead letter", "an event", "a redirect", "a file of somebody"])
def test_a_queue_with_a_use_is_not_retired(tmp_path: Path, use: str) -> None:
    other = "bbbbccccddddeeee"
    answer = refusal() if use == "a dead letter" else Answer(503)
    with serving(EventsServer(lambda _: answer)) as server:
        write_destination(tmp_path, destination(server.url))
        write_destination(tmp_path, destination(server.url, id=other))
        if use in ("a dead letter", "an event"):
            spooled(tmp_path, [record(0)])
        elif use == "a redirect":
            redirect(tmp_path, other, QUEUE)
        else:
            (queues_directory(tmp_path) / QUEUE / "note").touch()
        with delivering(tmp_path, retention=KEEP_NOTHING):
            if use == "a dead letter":
                eventually(lambda: segments(tmp_path) == [], what="the removal")
            elif use == "an event":
                eventually(lambda: server.posts, what="a try")
            write_destination(tmp_path, destination(server.url, id="unused"))
            eventually(lambda: not (queues_directory(tmp_path) / "unused").exists(), what="another's end")
    assert (queues_directory(tmp_path) / QUEUE / "destination.json").exists()


# Temporary files


def test_old_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="the-token"))
    directory = queues_directory(tmp_path) / QUEUE
    left = [
        directory / "00000000000000000001-1-1.tmp",
        directory / ".destination.json.1.tmp",
        tmp_path / "tokens" / f".{QUEUE}.1.tmp",
    ]
    for path in left:
        path.write_bytes(MAGIC)
    assert remove_leftovers(tmp_path) == []
    for path in left:
        os.utime(path, (time.time() - 2 * HOUR,) * 2)
    kept = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path not in left)
    assert sorted(remove_leftovers(tmp_path)) == sorted(left)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == kept


def test_a_delivery_removes_old_temporary_files_when_it_starts(tmp_path: Path) -> None:
    directory = queues_directory(tmp_path) / QUEUE
    directory.mkdir(parents=True)
    leftover = directory / "1-1-1.tmp"
    leftover.touch()
    os.utime(leftover, (0, 0))
    with delivering(tmp_path):
        eventually(lambda: not leftover.exists(), what="the removal")


def test_positions_of_a_removed_segment_are_forgotten(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(0), record(0)])
    run_until_empty(tmp_path)
    for path in segments(tmp_path):
        path.unlink()
    run_until_empty(tmp_path)
    with closing(Books(tmp_path)) as books:
        assert (books.positions(QUEUE), books.resent(QUEUE)) == ({}, set())


def test_a_live_writers_segment_is_never_removed(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    segment: Any = Segment(queues_directory(tmp_path) / QUEUE)
    segment.append(record(0))
    with delivering(tmp_path, retention=Retention(timedelta(0), 0, timedelta(0))):
        eventually(lambda: server.taken == ids(range(1)))
        spooled(tmp_path, [record(1)])
        eventually(lambda: len(segments(tmp_path)) == 1, what="the removal of the other")
        segment.append(record(2))
        eventually(lambda: len(server.taken) == 3)
        segment.close()
        eventually(lambda: segments(tmp_path) == [])
