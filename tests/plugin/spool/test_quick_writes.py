"""Writes on the serving thread: only if they are certain to be quick, and with the same guarantees."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.spool import writer as writer_module
from openmeter_plugin.spool.queue import Item
from openmeter_plugin.spool.segment import SKIPPED, encode_record
from openmeter_plugin.spool.writer import SpoolWriter
from tests.harness.process import eventually
from tests.plugin.spool_records import SIZE, payload
from tests.plugin.spools import QUEUE, Acknowledged, Disk, payloads, running_writer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    """Make no write count as slow, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "SLOW_WRITE", 60.0)
        yield


def items(writer: SpoolWriter, numbers: range, queue: str = QUEUE) -> list[Item]:
    return [(writer.queue(queue), encode_record(payload(n)), n, None) for n in numbers]


def opened(writer: SpoolWriter, acknowledged: Acknowledged, queue: str = QUEUE) -> None:
    """Make the writer's thread open the queue's first segment with record 0."""
    before = len(acknowledged.tokens)
    writer.append_all(items(writer, range(1), queue))
    eventually(lambda: len(acknowledged.tokens) > before, what="the first record")
    eventually(lambda: not writer._write_lock.locked(), what="the thread to be idle")


def test_a_record_is_in_the_file_when_its_token_is_returned(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        opened(writer, acknowledged)
        tokens, left = writer.append_now(items(writer, range(1, 4)))
        assert (tokens, list(left)) == ([1, 2, 3], [])
        assert payloads(tmp_path) == [payload(n) for n in range(4)]
        assert acknowledged.tokens == [0]


def test_nothing_is_written_before_the_thread_has_opened_a_segment(tmp_path: Path) -> None:
    with running_writer(tmp_path) as writer:
        wanted = items(writer, range(2))
        assert writer.append_now(wanted) == ([], wanted)


def test_with_fsync_always_the_thread_writes_everything(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, fsync="always") as writer:
        opened(writer, acknowledged)
        wanted = items(writer, range(1, 2))
        assert writer.append_now(wanted) == ([], wanted)


def test_the_thread_writes_what_needs_another_segment(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, segment_bytes=SIZE) as writer:
        opened(writer, acknowledged)
        wanted = items(writer, range(1, 2))
        assert writer.append_now(wanted) == ([], wanted)


def test_the_serving_thread_does_not_wait_while_the_thread_writes(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        opened(writer, acknowledged)
        disk.open_gate.clear()
        writer.append_all(items(writer, range(1, 2)))
        disk.at_gate.wait(10)
        wanted = items(writer, range(2, 3))
        assert writer.append_now(wanted) == ([], wanted)
        disk.open_gate.set()


def test_after_a_slow_write_the_thread_writes_the_next_record(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        opened(writer, acknowledged)
        monkeypatch.setattr(writer_module, "SLOW_WRITE", 0.005)
        disk.open_gate.clear()
        threading.Timer(0.05, disk.open_gate.set).start()
        assert writer.append_now(items(writer, range(1, 2)))[0] == [1]
        wanted = items(writer, range(2, 3))
        assert writer.append_now(wanted) == ([], wanted)


def test_a_queue_without_a_segment_does_not_slow_down_another(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        opened(writer, acknowledged, "b" * 16)
        without, quick = items(writer, range(1, 2), "a" * 16), items(writer, range(2, 3), "b" * 16)
        assert writer.append_now([*without, *quick]) == ([2], without)


@given(room=st.integers(0, 5 * SIZE), count=st.integers(1, 5))
def test_a_disk_that_accepts_only_a_part_gets_every_record_once(
    tmp_path_factory: pytest.TempPathFactory, room: int, count: int
) -> None:
    spool = tmp_path_factory.mktemp("spool")
    disk, acknowledged = Disk(spool), Acknowledged()
    with pytest.MonkeyPatch.context() as patch, running_writer(spool, acknowledged) as writer:
        patch.setattr(os, "write", disk.write)
        opened(writer, acknowledged)
        disk.room = room
        tokens, left = writer.append_now(items(writer, range(1, count + 1)))
        assert tokens == list(range(1, len(tokens) + 1))
        assert len(tokens) == min(count, room // SIZE)
        assert [item[2] for item in left] == list(range(len(tokens) + 1, count + 1))
        disk.room = None
        writer.append_all(left)
        eventually(lambda: len(acknowledged.tokens) == 1 + len(left), what="the rest")
        assert payloads(spool) == [payload(n) for n in range(count + 1)]


def test_no_record_overtakes_those_that_wait_for_a_failed_disk(tmp_path: Path, disk: Disk) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged) as writer:
        opened(writer, acknowledged)
        disk.room = 0
        writer.append_all(items(writer, range(1, 2)))
        eventually(lambda: acknowledged.tokens == [0, 1], what="an answer from memory")
        eventually(lambda: writer._write_lock.acquire(blocking=False), what="the lock")
        disk.room = None
        writer._write_lock.release()
        _, left = writer.append_now(items(writer, range(2, 3)))
        writer.append_all(left)
        eventually(lambda: len(payloads(tmp_path)) == 3, what="the recovery")
        assert payloads(tmp_path) == [payload(n) for n in range(3)]


def test_during_a_stall_records_wait_in_bounded_memory_and_those_beyond_are_counted_as_lost(
    tmp_path: Path, disk: Disk
) -> None:
    acknowledged: Any = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=3 * SIZE, stalled_after=0.01) as writer:
        opened(writer, acknowledged)
        disk.open_gate.clear()
        writer.append_all(items(writer, range(1, 2)))
        eventually(lambda: writer.stalled, what="the stall")
        writer.append_while_stalled(items(writer, range(2, 7)))
        disk.open_gate.set()
        eventually(lambda: not writer.stalled, what="the end of the stall")
        eventually(lambda: len(payloads(tmp_path)) == 6, what="the held records")
    written = payloads(tmp_path)
    assert [p for p in written if p[:1] == SKIPPED] == [payload(n) for n in range(5)]
    assert [p for p in written if p[:1] != SKIPPED] == [b'L{"count":2,"reason":"disk"}']


def test_each_stall_has_the_whole_memory_bound(tmp_path: Path, disk: Disk) -> None:
    acknowledged: Any = Acknowledged()
    with running_writer(tmp_path, acknowledged, max_waiting_bytes=3 * SIZE, stalled_after=0.01) as writer:
        opened(writer, acknowledged)
        for first in (1, 5, 9):
            disk.open_gate.clear()
            writer.append_all(items(writer, range(first, first + 1)))
            eventually(lambda: writer.stalled, what="the stall")
            writer.append_while_stalled(items(writer, range(first + 1, first + 4)))
            disk.open_gate.set()
            eventually(lambda: not writer.stalled, what="the end of the stall")
            eventually(lambda n=first: len(payloads(tmp_path)) == n + 4, what="what was kept")  # type: ignore[misc]
            writer.end_stall()
    assert payloads(tmp_path) == [payload(n) for n in range(13)]
