"""The spool writer: acknowledged records are in segment files, and synced as configured."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from openmeter_plugin.spool.destination import Destination, queues_directory
from openmeter_plugin.spool.segment import MAGIC, SKIPPED, Record
from openmeter_plugin.spool.writer import SpoolWriter
from tests.harness.process import eventually
from tests.plugin.spool_records import SIZE, hand_over, payload
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
)

# Acknowledged records


def test_a_record_is_in_the_file_when_its_token_is_returned(tmp_path: Path) -> None:
    missing: list[int] = []
    acknowledged = Acknowledged()

    def notify(tokens: list[int]) -> None:
        there = set(payloads(tmp_path))
        missing.extend(token for token in tokens if payload(token) not in there)
        acknowledged(tokens)

    with running_writer(tmp_path, notify, segment_bytes=20 * SIZE) as writer:
        hand_over(writer, range(500))
        eventually(lambda: len(acknowledged.tokens) == 500, what="all answers")
    assert missing == []
    assert acknowledged.tokens == list(range(500))
    assert payloads(tmp_path) == [payload(n) for n in range(500)]


def test_records_from_many_threads_are_all_acknowledged_and_in_the_file_once(tmp_path: Path) -> None:
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


def test_records_handed_over_before_a_stop_are_written(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    writer = SpoolWriter(tmp_path, acknowledged, fsync="never")
    writer.start()
    hand_over(writer, range(1000))
    assert writer.close(10)
    assert acknowledged.tokens == list(range(1000))
    assert payloads(tmp_path) == [payload(n) for n in range(1000)]


def test_records_that_arrive_during_a_write_share_the_next_one(tmp_path: Path, disk: Disk) -> None:
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
        eventually(lambda: len(acknowledged.tokens) == 100, what="all answers")
    assert disk.writes == [SIZE, 98 * SIZE]
    assert [len(group) for group in acknowledged.groups] == [1, 1, 98]


def test_handing_over_does_not_wait_for_a_stalled_disk(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        disk.open_gate.clear()
        started = time.monotonic()
        hand_over(writer, range(2000))
        writer.describe(destination(id="another"))
        waited = time.monotonic() - started
        assert acknowledged.tokens == []
        disk.open_gate.set()
        eventually(lambda: len(acknowledged.tokens) == 2000, what="all answers")
    assert waited < 1


def test_each_queue_has_its_own_files(tmp_path: Path) -> None:
    with running_writer(tmp_path) as writer:
        hand_over(writer, range(5), "one")
        hand_over(writer, range(5, 9), "two")
    assert payloads(tmp_path, "one") == [payload(n) for n in range(5)]
    assert payloads(tmp_path, "two") == [payload(n) for n in range(5, 9)]


# Segments


def test_a_full_segment_is_followed_by_another(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, segment_bytes=10 * SIZE) as writer:
        for number in range(35):
            hand_over(writer, range(number, number + 1))
            eventually(lambda number=number: len(acknowledged.tokens) > number)  # type: ignore[misc]
    sizes = [path.stat().st_size for path in segments(tmp_path)]
    assert sizes == [len(MAGIC) + 10 * SIZE] * 3 + [len(MAGIC) + 5 * SIZE]
    assert payloads(tmp_path) == [payload(n) for n in range(35)]


def test_an_old_segment_is_followed_by_another(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, segment_seconds=0) as writer:
        for number in range(3):
            hand_over(writer, range(number, number + 1))
            eventually(lambda number=number: len(acknowledged.tokens) > number)  # type: ignore[misc]
    assert len(segments(tmp_path)) == 3
    assert payloads(tmp_path) == [payload(n) for n in range(3)]


def test_an_old_segment_is_closed_although_nothing_follows(tmp_path: Path) -> None:
    """Else the last segment of a plugin that is gone would never count as delivered."""
    with running_writer(tmp_path, segment_seconds=0.05, fsync_interval=0.01) as writer:
        hand_over(writer, range(1))
        eventually(lambda: [is_locked(path) for path in segments(tmp_path)] == [False])
        hand_over(writer, range(1, 2))
        eventually(lambda: len(segments(tmp_path)) == 2)
    assert payloads(tmp_path) == [payload(0), payload(1)]


def test_a_segment_is_locked_while_it_may_grow_and_unlocked_once_another_follows(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, segment_bytes=2 * SIZE, fsync_interval=0.01) as writer:
        hand_over(writer, range(1))
        eventually(lambda: len(acknowledged.tokens) == 1)
        (first,) = segments(tmp_path)
        assert is_locked(first)
        for number in (1, 2):
            hand_over(writer, range(number, number + 1))
            eventually(lambda number=number: len(acknowledged.tokens) == number + 1)  # type: ignore[misc]
        eventually(lambda: not is_locked(first), what="the end of the first segment")
        assert is_locked(segments(tmp_path)[1])
    assert not any(is_locked(path) for path in segments(tmp_path))


def test_a_segment_gets_its_name_only_once_it_is_locked_and_has_its_header(
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


# Syncing


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    fdatasync = os.fdatasync

    def recorded(descriptor: int) -> None:
        calls.append(str(file_of(descriptor)))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", recorded)
    return calls


def test_fsync_always_syncs_a_record_before_its_answer(
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


def test_fsync_always_also_syncs_a_new_segments_directories_before_the_answer(
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


def test_fsync_always_syncs_what_a_full_disk_took_of_a_write_before_its_answer(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = synced(monkeypatch)
    at_answer: list[int] = []
    with running_writer(
        tmp_path, lambda _: at_answer.append(len(calls)), fsync="always", fsync_interval=60
    ) as writer:
        disk.room = len(MAGIC) + 2 * SIZE + SIZE // 2
        hand_over(writer, range(3))
        eventually(lambda: at_answer, what="the answers to Kong")
        assert payloads(tmp_path) == [payload(0), payload(1)]
        disk.room = None
    assert at_answer == [1]


def test_fsync_interval_syncs_a_record_soon_and_then_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = synced(monkeypatch)
    with running_writer(tmp_path, fsync="interval", fsync_interval=0.01) as writer:
        hand_over(writer, range(1))
        eventually(lambda: calls, what="the sync")
        (segment,) = segments(tmp_path)
        writer._syncer._stopped.wait(0.1)  # ten intervals without a write
        assert calls == [str(segment)]


def test_fsync_never_leaves_syncing_to_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = synced(monkeypatch)
    with running_writer(tmp_path, fsync="never", fsync_interval=0.01, segment_bytes=SIZE) as writer:
        hand_over(writer, range(10))
    assert payloads(tmp_path) == [payload(n) for n in range(10)]
    assert calls == []


def test_a_segment_is_synced_before_it_is_unlocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []
    fdatasync = os.fdatasync

    def recorded(descriptor: int) -> None:
        locked.append(is_locked(file_of(descriptor)))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", recorded)
    with running_writer(tmp_path, fsync="interval", fsync_interval=60) as writer:
        hand_over(writer, range(1))
    assert locked == [True]


# Records


def test_a_record_is_read_back_from_its_segment(tmp_path: Path) -> None:
    with running_writer(tmp_path) as writer:
        hand_over(writer, range(1))
    (item,) = items(tmp_path)
    assert item == Record(SKIPPED, payload(0)[1:], len(MAGIC) + SIZE)
    assert isinstance(destination(), Destination)
