"""Segment files that delivery reads: their content is sent and counted, whatever happened to them."""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.books.database import FILE, connect
from openmeter_plugin.spool.destination import queues_directory, write_destination
from openmeter_plugin.spool.reader import QueueReader
from openmeter_plugin.spool.segment import HEAD_SIZE, LOST, MAGIC, encode_events, encode_record
from tests.harness.books import read_counts
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    KEEP_NOTHING,
    count,
    delivered,
    delivering,
    event,
    ids,
    record,
    run_until_empty,
    skip,
    spooled,
)
from tests.plugin.events_server import Answer, EventsServer, Post, serving
from tests.plugin.spools import (
    QUEUE,
    Acknowledged,
    destination,
    payloads,
    running_writer,
    segments,
    small_file_system,
)

pytestmark = pytest.mark.slow

TOKEN = "token-of-the-delivery-tests"


# The files


def test_a_segment_is_delivered_while_it_grows_and_stays_until_it_is_finished(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url))
    with delivering(tmp_path, retention=KEEP_NOTHING):
        with running_writer(tmp_path) as writer:
            for n in range(30):
                writer.append(writer.queue(QUEUE), record(n), None)
                eventually(lambda n=n: len(server.taken) == n + 1)  # type: ignore[misc]
            assert len(segments(tmp_path)) == 1
        eventually(lambda: segments(tmp_path) == [], what="the removal of the finished segment")
        with closing(connect(tmp_path / FILE)) as db:  # the books forget it after the removal
            eventually(lambda: db.execute("SELECT * FROM positions").fetchall() == [], what="the books")
    assert server.taken == ids(range(30))


def test_finished_segments_are_delivered_in_order_and_removed(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url, max_batch_size=7))
    spooled(tmp_path, [record(n) for n in range(50)], each_alone=True)
    assert len(segments(tmp_path)) == 50
    run_until_empty(tmp_path, retention=KEEP_NOTHING)
    assert server.taken == ids(range(50))
    assert segments(tmp_path) == []


def test_empty_segments_are_removed_too(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    for name in ("0-1-1.seg", "0-1-2.seg"):
        (queues_directory(tmp_path) / QUEUE / name).write_bytes(MAGIC[: int(name[4]) * 4])
    run_until_empty(tmp_path, retention=KEEP_NOTHING)
    assert segments(tmp_path) == []
    assert server.posts == []


def test_a_segment_is_removed_only_once_it_is_entirely_delivered(tmp_path: Path) -> None:
    takes_more = threading.Event()

    def script(post: Post) -> Answer:
        return Answer(500) if len(running.taken) >= 20 and not takes_more.is_set() else Answer()

    running = EventsServer(script)
    with serving(running) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=10))
        spooled(tmp_path, [record(n) for n in range(30)])
        with delivering(tmp_path, retention=KEEP_NOTHING):
            eventually(lambda: len(server.posts) > 4)
            assert len(segments(tmp_path)) == 1
            takes_more.set()
            eventually(lambda: segments(tmp_path) == [])
    assert server.taken == ids(range(30))


def open_segments() -> int:
    return sum(
        os.readlink(path).endswith(".seg")  # noqa: PTH115 - descriptors come and go
        for path in [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
        if os.path.islink(path)  # noqa: PTH114
    )


def test_a_backlog_of_many_files_does_not_need_a_descriptor_for_each(tmp_path: Path) -> None:
    most = 0

    def script(post: Post) -> Answer:
        nonlocal most
        most = max(most, open_segments())
        return Answer()

    with serving(EventsServer(script)) as server:
        write_destination(tmp_path, destination(server.url, max_batch_size=30))
        spooled(tmp_path, [record(n) for n in range(100)], each_alone=True)
        run_until_empty(tmp_path)
    assert server.taken == ids(range(100))
    assert most <= 5


def damaged(segment: Path, change: Callable[[bytes], bytes]) -> None:
    segment.write_bytes(change(segment.read_bytes()))


def test_the_torn_tail_of_a_dead_writer_is_reported_and_passed_over(
    tmp_path: Path, server: EventsServer, lines: list[Any]
) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(5)])
    (segment,) = segments(tmp_path)
    damaged(segment, lambda content: content + record(5)[:-3])
    spooled(tmp_path, [record(n) for n in range(6, 9)])
    run_until_empty(tmp_path, retention=KEEP_NOTHING)
    assert server.taken == ids(range(5), range(6, 9))
    assert count(tmp_path, "damaged_bytes") == len(record(5)) - 3
    (damage,) = [line for line in lines if line["event"] == "spool_damaged"]
    assert (damage["segment"], damage["size"]) == (segment.name, len(record(5)) - 3)
    assert segments(tmp_path) == []


def test_the_reader_waits_for_a_record_that_a_live_writer_has_half_written(tmp_path: Path) -> None:
    written: list[Any] = []
    with running_writer(tmp_path, written.extend) as writer:
        queue = writer.queue(QUEUE)
        writer.append(queue, record(0), 0)
        eventually(lambda: written)
        assert queue.segment is not None
        reader = QueueReader(queue.directory, {})
        try:
            (segment,) = reader.find()
            assert segment.next_unaccounted() is not None
            for byte in record(1)[:-1]:
                os.write(queue.segment.descriptor, bytes((byte,)))
                assert segment.next_unaccounted() is None
            os.write(queue.segment.descriptor, record(1)[-1:])
            found = segment.next_unaccounted()
            assert found is not None
            assert found.events == [event(1)]
        finally:
            reader.close()


@pytest.mark.parametrize("at", [0, HEAD_SIZE - 1, HEAD_SIZE + 20])
def test_a_flipped_byte_costs_only_its_record(tmp_path: Path, server: EventsServer, at: int) -> None:
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n) for n in range(10)])
    (segment,) = segments(tmp_path)
    place = len(MAGIC) + 4 * len(record(0)) + at
    damaged(segment, lambda c: c[:place] + bytes((c[place] ^ 0x10,)) + c[place + 1 :])
    run_until_empty(tmp_path)
    assert server.taken == ids(range(4), range(5, 10))
    assert count(tmp_path, "damaged_bytes") == len(record(0))


def test_a_file_that_is_not_a_segment_stops_nothing(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    (queues_directory(tmp_path) / QUEUE / "0.seg").write_bytes(bytes(3_000_000) + record(1)[:20])
    (queues_directory(tmp_path) / QUEUE / "other.txt").write_text("not ours")
    spooled(tmp_path, [record(n) for n in range(10)])
    run_until_empty(tmp_path)
    assert server.taken == ids(range(10))


def test_a_record_larger_than_one_read_is_delivered(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    big = encode_events([event(1, pad="x" * 3_000_000)])
    spooled(tmp_path, [record(0), big, record(2)])
    run_until_empty(tmp_path)
    assert server.taken == ids(range(3))


def test_a_spool_that_fills_its_file_system_recovers_without_help(
    tmp_path: Path,
) -> None:
    with small_file_system(tmp_path / "spool", "8m") as spool, serving() as server:
        write_destination(spool, destination(server.url))
        acknowledged = Acknowledged()
        with running_writer(spool, acknowledged, fsync_interval=0.05) as writer:
            queue = writer.queue(QUEUE)
            for n in range(300):
                writer.append(queue, encode_events([event(n, pad="x" * 30_000)]), None)
            eventually(lambda: len(acknowledged.tokens) == 300, what="the answers to Kong")
            assert len(payloads(spool)) < 300
            with delivering(spool, retention=KEEP_NOTHING):
                eventually(lambda: delivered(spool) == 300, what="the delivery of all")
    assert server.taken == ids(range(300))
    assert set(server.came.values()) == {1}


# Counts


def test_every_outcome_is_counted_and_only_events_are_sent(tmp_path: Path, server: EventsServer) -> None:
    write_destination(tmp_path, destination(server.url))
    lost = encode_record(LOST + b'{"count":7,"reason":"disk"}')
    spooled(tmp_path, [skip(), skip("no_header"), record(0, 1, 2), lost, skip(), record(3), lost])
    run_until_empty(tmp_path)
    assert read_counts(tmp_path)[QUEUE] == Counter(
        {
            ("requests", ""): 5,
            ("metered", ""): 2,
            ("skipped", "no_consumer"): 2,
            ("skipped", "no_header"): 1,
            ("events", ""): 4,
            ("delivered", ""): 4,
            ("lost", "disk"): 14,
        }
    )
    assert server.taken == ids(range(4))


def test_skips_alone_are_counted_without_a_post_and_without_a_destination(tmp_path: Path) -> None:
    spooled(tmp_path, [skip() for _ in range(25_000)])
    run_until_empty(tmp_path, retention=KEEP_NOTHING)
    assert count(tmp_path, "requests") == 25_000
    assert segments(tmp_path) == []


def test_skips_are_counted_at_once_whatever_the_coalescing_delay(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, max_coalescing_delay=60))
    spooled(tmp_path, [skip()])
    with delivering(tmp_path):
        eventually(lambda: count(tmp_path, "skipped", "no_consumer") == 1, seconds=5)


# Draining


def test_draining_an_empty_spool_ends_at_once(tmp_path: Path) -> None:
    run_until_empty(tmp_path)
    write_destination(tmp_path, destination())
    run_until_empty(tmp_path)


def test_draining_ends_although_a_writer_still_has_its_segment_open(
    tmp_path: Path, server: EventsServer
) -> None:
    write_destination(tmp_path, destination(server.url, max_coalescing_delay=60))
    written: list[Any] = []
    with running_writer(tmp_path, written.extend) as writer:
        for n in range(10):
            writer.append(writer.queue(QUEUE), record(n), n)
        eventually(lambda: len(written) == 10)
        run_until_empty(tmp_path)
    assert server.taken == ids(range(10))


def test_usage_is_readable_by_its_owner_only_whatever_the_umask(tmp_path: Path, server: EventsServer) -> None:
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    before = os.umask(0)
    try:
        write_destination(spool, destination(server.url, token="stored"))
        spooled(spool, [record(1), encode_record(b"Zfuture"), record(2)])
        run_until_empty(spool)
    finally:
        os.umask(before)
    below = {str(path.relative_to(spool)): stat.S_IMODE(path.stat().st_mode) for path in spool.rglob("*")}
    assert {"books.db", "damaged", "tokens", "queues", "delivery.lock"} < set(below)
    open_to_others = [name for name, mode in below.items() if mode & 0o077]
    # Files in a folder that only its owner may enter are out of reach, whatever their own mode.
    assert [name for name in open_to_others if name != "queues"] == []
