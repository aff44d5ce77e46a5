"""A full, slow or broken disk: nothing that fits into memory is lost, and what is lost is counted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from openmeter_plugin.spool.destination import queues_directory
from openmeter_plugin.spool.segment import LOST, MAGIC, Damage
from openmeter_plugin.spool.writer import SpoolWriter
from tests.harness.process import eventually
from tests.plugin.spool_records import SIZE, hand_over, payload
from tests.plugin.spools import (
    QUEUE,
    Acknowledged,
    Disk,
    is_locked,
    items,
    payloads,
    running_writer,
    segments,
    small_file_system,
)


def losses(spool: Path) -> list[int]:
    return [orjson.loads(p[1:])["count"] for p in payloads(spool) if p[:1] == LOST]


def not_losses(spool: Path) -> list[bytes]:
    return [p for p in payloads(spool) if p[:1] != LOST]


# A disk that fails


def test_a_full_disk_loses_nothing_that_fits_into_memory_and_keeps_the_order(
    tmp_path: Path, disk: Disk
) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        disk.room = len(MAGIC) + 2 * SIZE + SIZE // 2
        hand_over(writer, range(10))
        eventually(lambda: len(acknowledged.tokens) == 10, what="the answers to Kong")
        eventually(lambda: disk.refused > 3, what="a few retries")
        assert payloads(tmp_path) == [payload(0), payload(1)]
        hand_over(writer, range(10, 20))
        eventually(lambda: len(acknowledged.tokens) == 20, what="the answers to Kong")
        disk.room = None
        eventually(lambda: len(payloads(tmp_path)) == 20, what="the recovery")
    assert payloads(tmp_path) == [payload(n) for n in range(20)]
    assert [d.end - d.start for d in items(tmp_path) if isinstance(d, Damage)] == [SIZE // 2]
    first, *_ = segments(tmp_path)
    assert first.stat().st_size == len(MAGIC) + 2 * SIZE + SIZE // 2  # left as it was


def test_a_disk_that_accepts_a_little_at_a_time_gets_every_record_once(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        disk.room = 0
        hand_over(writer, range(30))
        eventually(lambda: len(acknowledged.tokens) == 30, what="the answers to Kong")
        for room in (len(MAGIC) + SIZE - 1, len(MAGIC) + SIZE, len(MAGIC) + 3 * SIZE + 1, 5, len(MAGIC)):
            refused = disk.refused
            disk.room = room
            eventually(lambda refused=refused: disk.refused > refused + 1)  # type: ignore[misc]
        disk.room = None
        eventually(lambda: len(payloads(tmp_path)) >= 30, what="the recovery")
    assert payloads(tmp_path) == [payload(n) for n in range(30)]


def test_a_disk_that_accepts_half_a_header_leaves_no_segment_that_readers_would_misread(
    tmp_path: Path, disk: Disk
) -> None:
    with running_writer(tmp_path) as writer:
        disk.room = len(MAGIC) - 3
        hand_over(writer, range(1))
        eventually(lambda: disk.refused > 1, what="a few retries")
        assert segments(tmp_path) == []
        disk.room = None
        eventually(lambda: payloads(tmp_path) == [payload(0)], what="the recovery")
    assert [path.suffix for path in (queues_directory(tmp_path) / QUEUE).iterdir()] == [".seg"]


def test_records_that_do_not_fit_into_memory_are_counted_as_lost_in_the_spool(
    tmp_path: Path, disk: Disk, lines: list[Any]
) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=5 * SIZE) as writer:
        disk.room = 0
        hand_over(writer, range(12))
        eventually(lambda: len(acknowledged.tokens) == 12, what="the answers to Kong")
        disk.room = None
        eventually(lambda: len(payloads(tmp_path)) == 6, what="the recovery")
    assert losses(tmp_path) == [7]
    assert not_losses(tmp_path) == [payload(n) for n in range(5)]
    assert [line["records"] for line in lines if line["event"] == "usage_lost"] != []


def test_all_queues_share_one_memory_bound(tmp_path: Path, disk: Disk) -> None:
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


def test_a_long_outage_loses_only_what_exceeds_the_bound(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=5 * SIZE) as writer:
        disk.room = 0
        for start in range(0, 12, 3):
            hand_over(writer, range(start, start + 3))
            eventually(lambda end=start + 3: len(acknowledged.tokens) == end)  # type: ignore[misc]
        eventually(lambda: disk.refused > 30, what="many retries")
        disk.room = None
        eventually(lambda: len(not_losses(tmp_path)) == 5, what="the recovery")
        hand_over(writer, range(100, 101))
        eventually(lambda: payload(100) in payloads(tmp_path))
    assert sum(losses(tmp_path)) == 7
    assert not_losses(tmp_path) == [payload(n) for n in (*range(5), 100)]


def test_a_loss_record_that_was_half_written_is_counted_once(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=SIZE) as writer:
        disk.room = 0
        hand_over(writer, range(3))
        eventually(lambda: len(acknowledged.tokens) == 3, what="the answers to Kong")
        disk.room = len(MAGIC) + 20
        eventually(lambda: disk.room == 0, what="half a record")
        disk.room = None
        eventually(lambda: payload(0) in payloads(tmp_path), what="the recovery")
    assert losses(tmp_path) == [2]
    assert not_losses(tmp_path) == [payload(0)]


def test_one_failing_queue_does_not_hold_up_another(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    (queues_directory(tmp_path)).mkdir()
    (queues_directory(tmp_path) / "broken").write_text("a file where the directory should be")
    with running_writer(tmp_path, acknowledged) as writer:
        hand_over(writer, range(5), "broken")
        hand_over(writer, range(5, 10))
        eventually(lambda: len(acknowledged.tokens) == 10, what="the answers to Kong")
        assert payloads(tmp_path) == [payload(n) for n in range(5, 10)]


def test_a_directory_that_cannot_be_created_at_first_gets_its_records_later(tmp_path: Path) -> None:
    obstacle = queues_directory(tmp_path)
    obstacle.write_text("in the way")
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        hand_over(writer, range(5))
        eventually(lambda: len(acknowledged.tokens) == 5, what="the answers to Kong")
        obstacle.unlink()
        eventually(lambda: len(segments(tmp_path)) == 1 and len(payloads(tmp_path)) == 5)
    assert payloads(tmp_path) == [payload(n) for n in range(5)]


def test_a_removed_queue_directory_is_created_again(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        hand_over(writer, range(1))
        eventually(lambda: acknowledged.tokens == [0])
        shutil.rmtree(queues_directory(tmp_path))
        hand_over(writer, range(1, 3))
        eventually(lambda: payloads(tmp_path) == [payload(1), payload(2)], what="the recovery")


def test_a_stop_with_a_full_disk_logs_what_is_lost(tmp_path: Path, disk: Disk, lines: list[Any]) -> None:
    acknowledged = Acknowledged()
    writer = SpoolWriter(tmp_path, acknowledged, fsync="never", max_waiting_bytes=3 * SIZE)
    writer.start()
    disk.room = 0
    hand_over(writer, range(5))
    eventually(lambda: len(acknowledged.tokens) == 5, what="the answers to Kong")
    assert not writer.close(10)
    assert [line["records"] for line in lines if line["event"] == "usage_lost"][-1] == 5


def test_a_stop_on_a_disk_that_hangs_takes_no_longer_than_its_bound(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, hangs = threading.Event(), threading.Event()

    def hang(descriptor: int) -> None:
        syncing.set()
        hangs.wait(30)

    monkeypatch.setattr("os.fdatasync", hang)
    acknowledged = Acknowledged()
    writer = SpoolWriter(tmp_path, acknowledged, fsync="interval", fsync_interval=0.01)
    writer.start()
    hand_over(writer, range(1))
    eventually(syncing.is_set, what="the syncer to hang")
    disk.open_gate.clear()
    hand_over(writer, range(1, 2))
    eventually(disk.at_gate.is_set, what="the writer to hang")
    began = time.monotonic()
    assert not writer.close(0.6)
    assert time.monotonic() - began < 1.1, "0.6 s for each thread is 1.2 s"
    hangs.set()
    disk.open_gate.set()


def test_a_full_file_system_gets_everything_once_it_has_room_again(tmp_path: Path) -> None:
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
            eventually(lambda: len(payloads(spool)) >= 4000, what="the recovery")
        assert payloads(spool) == [payload(n) for n in range(4000)]


def test_a_file_system_is_never_filled_to_the_last_byte_and_the_full_segment_is_unlocked(
    tmp_path: Path,
) -> None:
    with small_file_system(tmp_path / "spool", "256k") as spool:
        acknowledged = Acknowledged()
        with running_writer(spool, acknowledged, fsync_interval=0.01) as writer:
            hand_over(writer, range(20_000))
            eventually(lambda: len(acknowledged.tokens) == 20_000, what="the answers to Kong")
            eventually(lambda: not any(is_locked(path) for path in segments(spool)))
            system = os.statvfs(spool)
        assert system.f_bavail * system.f_frsize >= 24 * 1024
        assert damaged_bytes(spool) == 0


def damaged_bytes(spool: Path) -> int:
    return sum(item.end - item.start for item in items(spool) if isinstance(item, Damage))


def test_a_process_whose_writer_fails_exits_instead_of_leaving_kong_without_answers(tmp_path: Path) -> None:
    program = """
import sys, threading
from pathlib import Path
from openmeter_plugin.spool.writer import SpoolWriter
def notify(tokens): raise RuntimeError("an internal error")
writer = SpoolWriter(Path(sys.argv[1]), notify)
writer.start()
writer.append(writer.queue("q"), b"record", 1)
threading.Event().wait(30)
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=20)
    assert ended.returncode == os.EX_SOFTWARE
    assert b"spool_writer_crashed" in ended.stdout + ended.stderr
