"""Writing the spool: what is acknowledged is in the files, whatever the disk does meanwhile."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from openmeter_plugin.instances import start_instance
from openmeter_plugin.spool import writer as writer_module
from openmeter_plugin.spool.destination import (
    Destination,
    destination_id,
    queues_directory,
    read_destination,
    token_file,
    write_destination,
)
from openmeter_plugin.spool.segment import (
    LOST,
    MAGIC,
    SKIPPED,
    Damage,
    Record,
    encode_record,
)
from openmeter_plugin.spool.writer import SpoolWriter
from tests.harness.process import eventually
from tests.plugin.spools import (
    QUEUE,
    Acknowledged,
    Disk,
    destination,
    file_of,
    is_locked,
    items,
    payloads,
    running_writer,
    segments,
    small_file_system,
)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk below the spool, retried often."""
    disk = Disk(tmp_path)
    monkeypatch.setattr(os, "write", disk.write)
    monkeypatch.setattr(writer_module, "_RETRY_AFTER", 0.01)
    return disk


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def payload(number: int) -> bytes:
    return SKIPPED + b"record %06d" % number


def record(number: int) -> bytes:
    return encode_record(payload(number))


SIZE = len(record(0))


def hand_over(writer: SpoolWriter, numbers: range, queue: str = QUEUE) -> None:
    for number in numbers:
        writer.append(writer.queue(queue), record(number), number)


def losses(spool: Path) -> list[int]:
    return [orjson.loads(p[1:])["count"] for p in payloads(spool) if p[:1] == LOST]


def not_losses(spool: Path) -> list[bytes]:
    return [p for p in payloads(spool) if p[:1] != LOST]


# What is acknowledged is there


def test_a_record_is_in_the_file_when_its_token_comes_back(tmp_path: Path) -> None:
    missing: list[int] = []
    acknowledged = Acknowledged()

    def notify(tokens: list[int]) -> None:
        there = set(payloads(tmp_path))
        missing.extend(token for token in tokens if payload(token) not in there)
        acknowledged(tokens)

    with running_writer(tmp_path, notify, segment_bytes=20 * SIZE) as writer:
        hand_over(writer, range(500))
        eventually(lambda: len(acknowledged.tokens) == 500, what="the answer to all")
    assert missing == []
    assert acknowledged.tokens == list(range(500))
    assert payloads(tmp_path) == [payload(n) for n in range(500)]


def test_records_of_many_threads_are_all_acknowledged_and_each_once_in_the_file(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        threads = [
            threading.Thread(target=hand_over, args=(writer, range(start, start + 200)))
            for start in range(0, 1600, 200)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(acknowledged.tokens) == list(range(1600))
    assert sorted(payloads(tmp_path)) == [payload(n) for n in range(1600)]


def test_what_was_handed_over_before_the_stop_is_written(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    writer = SpoolWriter(tmp_path, acknowledged, fsync="never")
    writer.start()
    hand_over(writer, range(1000))
    assert writer.close(10)
    assert acknowledged.tokens == list(range(1000))
    assert payloads(tmp_path) == [payload(n) for n in range(1000)]


def test_records_that_come_while_one_write_is_under_way_share_the_next(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        hand_over(writer, range(1))
        eventually(lambda: acknowledged.tokens == [0])
        disk.open_gate.clear()
        hand_over(writer, range(1, 2))
        assert disk.at_gate.wait(10)
        hand_over(writer, range(2, 100))
        disk.writes.clear()
        disk.open_gate.set()
        eventually(lambda: len(acknowledged.tokens) == 100, what="the answer to all")
    assert disk.writes == [SIZE, 98 * SIZE]
    assert [len(group) for group in acknowledged.groups] == [1, 1, 98]


def test_handing_over_does_not_wait_for_a_disk_that_hangs(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        disk.open_gate.clear()
        started = time.monotonic()
        hand_over(writer, range(2000))
        writer.describe(destination(id="another"))
        waited = time.monotonic() - started
        assert acknowledged.tokens == []
        disk.open_gate.set()
        eventually(lambda: len(acknowledged.tokens) == 2000, what="the answer to all")
    assert waited < 1


def test_each_queue_has_files_of_its_own(tmp_path: Path) -> None:
    with running_writer(tmp_path) as writer:
        hand_over(writer, range(5), "one")
        hand_over(writer, range(5, 9), "two")
    assert payloads(tmp_path, "one") == [payload(n) for n in range(5)]
    assert payloads(tmp_path, "two") == [payload(n) for n in range(5, 9)]


# Segments


def test_a_segment_that_is_full_is_followed_by_another(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, segment_bytes=10 * SIZE) as writer:
        for number in range(35):
            hand_over(writer, range(number, number + 1))
            eventually(lambda number=number: len(acknowledged.tokens) > number)  # type: ignore[misc]
    sizes = [path.stat().st_size for path in segments(tmp_path)]
    assert sizes == [len(MAGIC) + 10 * SIZE] * 3 + [len(MAGIC) + 5 * SIZE]
    assert payloads(tmp_path) == [payload(n) for n in range(35)]


def test_a_segment_that_is_old_is_followed_by_another(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, segment_seconds=0) as writer:
        for number in range(3):
            hand_over(writer, range(number, number + 1))
            eventually(lambda number=number: len(acknowledged.tokens) > number)  # type: ignore[misc]
    assert len(segments(tmp_path)) == 3
    assert payloads(tmp_path) == [payload(n) for n in range(3)]


def test_a_segment_is_locked_while_it_may_grow_and_free_when_another_followed(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, segment_bytes=SIZE, fsync_interval=0.01) as writer:
        hand_over(writer, range(1))
        eventually(lambda: len(acknowledged.tokens) == 1)
        (first,) = segments(tmp_path)
        assert is_locked(first)
        hand_over(writer, range(1, 2))
        eventually(lambda: not is_locked(first), what="the end of the first segment")
        assert is_locked(segments(tmp_path)[1])
    assert not any(is_locked(path) for path in segments(tmp_path))


def test_a_segment_has_its_name_only_when_it_is_locked_and_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[tuple[bool, bytes]] = []
    rename = Path.rename

    def checked(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp" and target.suffix == ".seg":
            named.append((is_locked(path), path.read_bytes()))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    with running_writer(tmp_path, segment_bytes=1) as writer:
        hand_over(writer, range(1))
    assert named == [(True, MAGIC)]


def test_two_writers_never_share_a_segment(tmp_path: Path) -> None:
    with running_writer(tmp_path) as one, running_writer(tmp_path) as other:
        hand_over(one, range(100))
        hand_over(other, range(100, 200))
    assert len(segments(tmp_path)) == 2
    assert sorted(payloads(tmp_path)) == [payload(n) for n in range(200)]


def test_a_segment_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with running_writer(tmp_path) as writer:
            hand_over(writer, range(1))
    finally:
        os.umask(before)
    (segment,) = segments(tmp_path)
    assert stat.S_IMODE(segment.stat().st_mode) == 0o600
    assert stat.S_IMODE(segment.parent.stat().st_mode) == 0o700


# Putting it on the disk


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    fdatasync = os.fdatasync

    def recorded(descriptor: int) -> None:
        calls.append(str(file_of(descriptor)))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", recorded)
    return calls


def test_fsync_always_puts_a_record_on_the_disk_before_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = synced(monkeypatch)
    at_answer: list[int] = []
    with running_writer(
        tmp_path, lambda _: at_answer.append(len(calls)), fsync="always", fsync_interval=60
    ) as writer:
        hand_over(writer, range(1))
        eventually(lambda: at_answer)
    assert at_answer == [1]


def test_fsync_always_puts_the_new_segments_name_on_the_disk_before_the_answer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        calls.append(file_of(descriptor))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    at_answer: list[list[Path]] = []
    with running_writer(tmp_path, lambda _: at_answer.append(calls[:]), fsync="always") as writer:
        for number in range(2):
            hand_over(writer, range(number, number + 1))
            eventually(lambda number=number: len(at_answer) > number)  # type: ignore[misc]
    queues = queues_directory(tmp_path)
    assert at_answer == [[queues / QUEUE, queues, tmp_path]] * 2


def test_fsync_interval_puts_a_record_on_the_disk_soon_after_and_then_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = synced(monkeypatch)
    with running_writer(tmp_path, fsync="interval", fsync_interval=0.01) as writer:
        hand_over(writer, range(1))
        eventually(lambda: calls, what="the sync")
        (segment,) = segments(tmp_path)
        writer._syncer._stopped.wait(0.1)  # ten intervals in which nothing is written
        assert calls == [str(segment)]


def test_fsync_never_leaves_it_to_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = synced(monkeypatch)
    with running_writer(tmp_path, fsync="never", fsync_interval=0.01, segment_bytes=SIZE) as writer:
        hand_over(writer, range(10))
    assert payloads(tmp_path) == [payload(n) for n in range(10)]
    assert calls == []


def test_a_segment_is_put_on_the_disk_before_it_counts_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[bool] = []
    fdatasync = os.fdatasync

    def recorded(descriptor: int) -> None:
        locked.append(is_locked(file_of(descriptor)))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", recorded)
    with running_writer(tmp_path, fsync="interval", fsync_interval=60) as writer:
        hand_over(writer, range(1))
    assert locked == [True]


# A disk that fails


def test_a_full_disk_loses_nothing_that_fits_into_memory_and_keeps_the_order(
    tmp_path: Path, disk: Disk
) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        disk.room = len(MAGIC) + 2 * SIZE + SIZE // 2
        hand_over(writer, range(10))
        eventually(lambda: len(acknowledged.tokens) == 10, what="an answer for Kong")
        eventually(lambda: disk.refused > 3, what="a few tries")
        assert payloads(tmp_path) == [payload(0), payload(1)]
        hand_over(writer, range(10, 20))
        eventually(lambda: len(acknowledged.tokens) == 20, what="an answer for Kong")
        disk.room = None
        eventually(lambda: len(payloads(tmp_path)) == 20, what="writing again")
    assert payloads(tmp_path) == [payload(n) for n in range(20)]
    assert [d.end - d.start for d in items(tmp_path) if isinstance(d, Damage)] == [SIZE // 2]
    first, *_ = segments(tmp_path)
    assert first.stat().st_size == len(MAGIC) + 2 * SIZE + SIZE // 2  # left as it was


def test_a_disk_that_takes_a_little_at_a_time_gets_every_record_once(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        disk.room = 0
        hand_over(writer, range(30))
        eventually(lambda: len(acknowledged.tokens) == 30, what="an answer for Kong")
        for room in (len(MAGIC) + SIZE - 1, len(MAGIC) + SIZE, len(MAGIC) + 3 * SIZE + 1, 5, len(MAGIC)):
            refused = disk.refused
            disk.room = room
            eventually(lambda refused=refused: disk.refused > refused + 1)  # type: ignore[misc]
        disk.room = None
        eventually(lambda: len(payloads(tmp_path)) >= 30, what="writing again")
    assert payloads(tmp_path) == [payload(n) for n in range(30)]


def test_a_disk_that_takes_half_a_header_leaves_no_segment_that_readers_would_misread(
    tmp_path: Path, disk: Disk
) -> None:
    with running_writer(tmp_path) as writer:
        disk.room = len(MAGIC) - 3
        hand_over(writer, range(1))
        eventually(lambda: disk.refused > 1, what="a few tries")
        assert segments(tmp_path) == []
        disk.room = None
        eventually(lambda: payloads(tmp_path) == [payload(0)], what="writing again")
    assert [path.suffix for path in (queues_directory(tmp_path) / QUEUE).iterdir()] == [".seg"]


def test_what_has_no_room_in_memory_is_counted_as_lost_in_the_spool(
    tmp_path: Path, disk: Disk, lines: list[Any]
) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=5 * SIZE) as writer:
        disk.room = 0
        hand_over(writer, range(12))
        eventually(lambda: len(acknowledged.tokens) == 12, what="an answer for Kong")
        disk.room = None
        eventually(lambda: len(payloads(tmp_path)) == 6, what="writing again")
    assert losses(tmp_path) == [7]
    assert not_losses(tmp_path) == [payload(n) for n in range(5)]
    assert [line["records"] for line in lines if line["event"] == "usage_lost"] != []


def test_the_bound_of_the_memory_is_for_all_queues_together(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=6 * SIZE) as writer:
        disk.room = 0
        for number in range(12):
            hand_over(writer, range(number, number + 1), f"queue-{number % 4}")
            eventually(lambda number=number: len(acknowledged.tokens) > number)  # type: ignore[misc]
        assert sum(len(writer.queue(f"queue-{n}").waiting) for n in range(4)) == 6
        disk.room = None
        eventually(lambda: not any(writer.queue(f"queue-{n}").failing for n in range(4)))
        disk.room = 0
        hand_over(writer, range(20, 26), "queue-0")
        eventually(lambda: len(acknowledged.tokens) == 18)
        assert len(writer.queue("queue-0").waiting) == 6, "the others gave theirs back"
        disk.room = None
    read = [p for n in range(4) for p in payloads(tmp_path, f"queue-{n}")]
    lost = sum(orjson.loads(p[1:])["count"] for p in read if p[:1] == LOST)
    assert lost == 6
    assert len([p for p in read if p[:1] != LOST]) == 12


def test_a_long_outage_loses_no_more_than_came_beyond_the_bound(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=5 * SIZE) as writer:
        disk.room = 0
        for start in range(0, 12, 3):
            hand_over(writer, range(start, start + 3))
            eventually(lambda end=start + 3: len(acknowledged.tokens) == end)  # type: ignore[misc]
        eventually(lambda: disk.refused > 30, what="many tries")
        disk.room = None
        eventually(lambda: len(not_losses(tmp_path)) == 5, what="writing again")
        hand_over(writer, range(100, 101))
        eventually(lambda: payload(100) in payloads(tmp_path))
    assert sum(losses(tmp_path)) == 7
    assert not_losses(tmp_path) == [payload(n) for n in (*range(5), 100)]


def test_a_count_of_losses_that_could_be_written_only_in_half_is_written_once(
    tmp_path: Path, disk: Disk
) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=SIZE) as writer:
        disk.room = 0
        hand_over(writer, range(3))
        eventually(lambda: len(acknowledged.tokens) == 3, what="an answer for Kong")
        disk.room = len(MAGIC) + 20
        eventually(lambda: disk.room == 0, what="half a record")
        disk.room = None
        eventually(lambda: payload(0) in payloads(tmp_path), what="writing again")
    assert losses(tmp_path) == [2]
    assert not_losses(tmp_path) == [payload(0)]


def test_one_failing_queue_does_not_hold_up_another(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    (queues_directory(tmp_path)).mkdir()
    (queues_directory(tmp_path) / "broken").write_text("a file where the directory should be")
    with running_writer(tmp_path, acknowledged) as writer:
        hand_over(writer, range(5), "broken")
        hand_over(writer, range(5, 10))
        eventually(lambda: len(acknowledged.tokens) == 10, what="an answer for Kong")
        assert payloads(tmp_path) == [payload(n) for n in range(5, 10)]


def test_a_directory_that_cannot_be_made_at_first_gets_its_records_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_AFTER", 0.01)
    obstacle = queues_directory(tmp_path)
    obstacle.write_text("in the way")
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        hand_over(writer, range(5))
        eventually(lambda: len(acknowledged.tokens) == 5, what="an answer for Kong")
        obstacle.unlink()
        eventually(lambda: len(segments(tmp_path)) == 1 and len(payloads(tmp_path)) == 5)
    assert payloads(tmp_path) == [payload(n) for n in range(5)]


def test_a_queue_whose_directory_somebody_removed_gets_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_AFTER", 0.01)
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        hand_over(writer, range(1))
        eventually(lambda: acknowledged.tokens == [0])
        shutil.rmtree(queues_directory(tmp_path))
        hand_over(writer, range(1, 3))
        eventually(lambda: payloads(tmp_path) == [payload(1), payload(2)], what="writing again")


def test_a_stop_with_a_full_disk_says_what_is_lost(tmp_path: Path, disk: Disk, lines: list[Any]) -> None:
    acknowledged = Acknowledged()
    writer = SpoolWriter(tmp_path, acknowledged, fsync="never", max_waiting_bytes=3 * SIZE)
    writer.start()
    disk.room = 0
    hand_over(writer, range(5))
    eventually(lambda: len(acknowledged.tokens) == 5, what="an answer for Kong")
    assert not writer.close(10)
    assert [line["records"] for line in lines if line["event"] == "usage_lost"][-1] == 5


def test_a_full_file_system_takes_everything_once_it_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_AFTER", 0.01)
    with small_file_system(tmp_path / "spool", "256k") as spool:
        ballast = spool / "ballast"
        ballast.write_bytes(bytes(150 * 1024))
        acknowledged = Acknowledged()
        with running_writer(spool, acknowledged) as writer:
            for start in range(0, 4000, 100):
                hand_over(writer, range(start, start + 100))
                eventually(lambda end=start + 100: len(acknowledged.tokens) == end)  # type: ignore[misc]
            assert 0 < len(payloads(spool)) < 4000
            ballast.unlink()
            eventually(lambda: len(payloads(spool)) >= 4000, what="writing again")
        assert payloads(spool) == [payload(n) for n in range(4000)]


def test_a_file_system_is_never_filled_to_the_last_byte_and_the_full_segment_is_let_go(
    tmp_path: Path,
) -> None:
    with small_file_system(tmp_path / "spool", "256k") as spool:
        acknowledged = Acknowledged()
        with running_writer(spool, acknowledged, fsync_interval=0.01) as writer:
            hand_over(writer, range(20_000))
            eventually(lambda: len(acknowledged.tokens) == 20_000, what="an answer for Kong")
            eventually(lambda: not any(is_locked(path) for path in segments(spool)))
            system = os.statvfs(spool)
        assert system.f_bavail * system.f_frsize >= 24 * 1024
        assert damaged_bytes(spool) == 0


def damaged_bytes(spool: Path) -> int:
    return sum(item.end - item.start for item in items(spool) if isinstance(item, Damage))


def test_a_process_whose_writer_fails_ends_rather_than_leaving_kong_without_answers(tmp_path: Path) -> None:
    program = """
import sys, threading
from pathlib import Path
from openmeter_plugin.spool.writer import SpoolWriter
def notify(tokens): raise RuntimeError("a fault of ours")
writer = SpoolWriter(Path(sys.argv[1]), notify)
writer.start()
writer.append(writer.queue("q"), b"record", 1)
threading.Event().wait(30)
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=20)
    assert ended.returncode == os.EX_SOFTWARE
    assert b"spool_writer_crashed" in ended.stdout + ended.stderr


# Where a queue's events go


def test_a_destination_is_described_beside_its_queue_and_read_back_with_its_token(tmp_path: Path) -> None:
    described = destination("https://host/events", token="the-token", max_batch_size=7, ssl_verify=False)
    with running_writer(tmp_path) as writer:
        queue = writer.describe(described)
        assert queue is writer.queue(QUEUE)
    assert read_destination(tmp_path, QUEUE) == described


def test_a_file_that_cannot_be_replaced_leaves_nothing_half_made(tmp_path: Path, disk: Disk) -> None:
    write_destination(tmp_path, destination())
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "tokens" / QUEUE).mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_destination(tmp_path, destination(token="the-token"))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "tokens", tmp_path / "tokens" / QUEUE])


@pytest.mark.parametrize("token", ["", None])
def test_a_reference_that_kong_could_not_resolve_keeps_the_last_token_and_says_so(
    tmp_path: Path, lines: list[Any], token: str | None
) -> None:
    reference = {"api_token": "{vault://env/token}"}
    config = {"ingest_endpoint": "http://127.0.0.1:9/events", "$refs": reference, "api_token": "resolved"}
    with running_writer(tmp_path) as writer:
        first = start_instance(1, orjson.dumps(config), writer)
        second = start_instance(2, orjson.dumps(config | {"api_token": token}), writer)
    assert first.queue is second.queue
    assert token_file(tmp_path, first.queue.id).read_text() == "resolved"
    assert [line["log_level"] for line in lines if line["event"] == "token_not_resolved"] == ["error"]
    with running_writer(tmp_path) as writer:
        start_instance(3, orjson.dumps(config | {"api_token": "rotated"}), writer)
    assert token_file(tmp_path, first.queue.id).read_text() == "rotated"


def test_the_files_with_destination_and_token_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_destination(tmp_path, destination(token="the-token"))
    finally:
        os.umask(before)
    token = token_file(tmp_path, QUEUE)
    description = queues_directory(tmp_path) / QUEUE / "destination.json"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(description.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(description.parent.stat().st_mode) == 0o700


def test_the_token_is_in_no_file_but_its_own_and_in_no_repr(tmp_path: Path) -> None:
    described = destination(token="the-token")
    write_destination(tmp_path, described)
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and b"the-token" in p.read_bytes()]
    assert holding == [token_file(tmp_path, QUEUE)]
    assert "the-token" not in repr(described)


def test_a_new_token_takes_the_place_of_the_old_one_and_none_removes_it(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="old"))
    write_destination(tmp_path, destination(token="new"))
    assert token_file(tmp_path, QUEUE).read_text() == "new"
    write_destination(tmp_path, destination(token=None))
    found = read_destination(tmp_path, QUEUE)
    assert found is not None
    assert found.token is None


def test_white_space_around_a_token_in_a_file_is_not_part_of_it(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="old"))
    token_file(tmp_path, QUEUE).write_text("  new\n")
    found = read_destination(tmp_path, QUEUE)
    assert found is not None
    assert found.token == "new"


def test_a_description_that_says_the_same_again_leaves_the_file_alone(tmp_path: Path) -> None:
    write_destination(tmp_path, destination(token="the-token"))
    files = [token_file(tmp_path, QUEUE), queues_directory(tmp_path) / QUEUE / "destination.json"]
    before = [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    write_destination(tmp_path, destination(token="the-token"))
    assert [(f.stat().st_ino, f.stat().st_mtime_ns) for f in files] == before


def test_a_description_that_cannot_be_written_holds_up_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_AFTER", 0.01)
    obstacle = tmp_path / "tokens"
    obstacle.write_text("in the way")
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        queue = writer.describe(destination(token="the-token"))
        writer.append(queue, record(1), 1)
        eventually(lambda: acknowledged.tokens == [1], what="an answer for Kong")
        assert payloads(tmp_path) == [payload(1)]
        obstacle.unlink()
        eventually(token_file(tmp_path, QUEUE).exists, what="the token's file")
    assert payloads(tmp_path) == [payload(1)]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", "{}", '{"id": "x"}', '{"endpoint": "x"}'])
def test_a_damaged_description_is_a_value_error(tmp_path: Path, content: str) -> None:
    write_destination(tmp_path, destination())
    (queues_directory(tmp_path) / QUEUE / "destination.json").write_text(content)
    with pytest.raises(ValueError, match=r"\S"):
        read_destination(tmp_path, QUEUE)


def test_a_queue_without_a_description_has_no_destination(tmp_path: Path) -> None:
    assert read_destination(tmp_path, QUEUE) is None


def test_what_a_later_version_describes_besides_is_passed_over(tmp_path: Path) -> None:
    write_destination(tmp_path, destination())
    file = queues_directory(tmp_path) / QUEUE / "destination.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"later": 1}))
    assert read_destination(tmp_path, QUEUE) == destination()


def test_destinations_are_told_apart_by_endpoint_and_credential() -> None:
    ids = {destination_id(e, c) for e in ("http://a", "http://b") for c in ("", "plugin", "{vault://x}")}
    assert len(ids) == 6
    assert destination_id("http://a", "plugin") == destination_id("http://a", "plugin")


def test_a_record_is_what_is_read_from_a_segment(tmp_path: Path) -> None:
    with running_writer(tmp_path) as writer:
        hand_over(writer, range(1))
    (item,) = items(tmp_path)
    assert item == Record(SKIPPED, payload(0)[1:], len(MAGIC) + SIZE)
    assert isinstance(destination(), Destination)
