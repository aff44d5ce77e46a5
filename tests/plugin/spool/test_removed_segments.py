"""Segments that somebody removes or moves while a worker writes to them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.spool import destination, queue
from openmeter_plugin.spool.queue import Segment
from openmeter_plugin.spool.segment import MAGIC
from openmeter_plugin.spool.writer import SpoolWriter
from tests.harness.process import eventually
from tests.plugin.spool_records import hand_over, payload
from tests.plugin.spools import QUEUE, Acknowledged, payloads, running_writer, segments


def written(writer: SpoolWriter, acknowledged: Acknowledged, number: int) -> None:
    """Write a record, which Kong has its answer for."""
    hand_over(writer, range(number, number + 1))
    eventually(lambda: number in acknowledged.tokens)


def open_segment(writer: SpoolWriter) -> Segment:
    """Return the segment that is written to."""
    segment = writer.queue(QUEUE).segment
    assert segment is not None
    return segment


def looked_after(writer: SpoolWriter) -> None:
    """Wait until the syncer has seen all that is written in its place."""
    segment = open_segment(writer)
    eventually(lambda: segment.size_in_place == segment.size)


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
def test_what_is_acknowledged_after_the_open_segment_was_removed_is_in_the_spool(
    tmp_path: Path, fsync: str
) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, fsync=fsync, fsync_interval=0.02) as writer:
        written(writer, acknowledged, 0)
        looked_after(writer)
        removed = open_segment(writer)
        removed.path.unlink()
        written(writer, acknowledged, 1)
        eventually(lambda: removed.opened < 0, what="the syncer to notice")
        written(writer, acknowledged, 2)
        assert open_segment(writer) is not removed
    assert sorted(payloads(tmp_path)) == [payload(1), payload(2)]


def test_a_removed_segment_is_saved_at_the_stop_and_with_its_folder(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, fsync_interval=60.0) as writer:
        written(writer, acknowledged, 0)
        (path,) = segments(tmp_path)
        path.unlink()
        path.parent.rmdir()
        written(writer, acknowledged, 1)
    assert sorted(payloads(tmp_path)) == [payload(0), payload(1)], "the syncer never saw 0 in its place"


def test_a_moved_segment_is_replaced_but_not_copied(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, fsync_interval=0.02) as writer:
        written(writer, acknowledged, 0)
        looked_after(writer)
        moved = open_segment(writer)
        moved.path.rename(tmp_path / "moved")
        written(writer, acknowledged, 1)
        eventually(lambda: moved.opened < 0, what="the syncer to notice")
        written(writer, acknowledged, 2)
    assert payloads(tmp_path) == [payload(2)]
    assert len((tmp_path / "moved").read_bytes()) == moved.size, "it still has what was written to it"


def test_a_segment_in_its_place_stays_open_and_is_never_copied(tmp_path: Path) -> None:
    acknowledged = Acknowledged()
    with running_writer(tmp_path, acknowledged, fsync_interval=0.005) as writer:
        for number in range(20):
            written(writer, acknowledged, number)
        looked_after(writer)
    assert len(segments(tmp_path)) == 1
    assert payloads(tmp_path) == [payload(number) for number in range(20)]


def test_a_full_disk_delays_the_copy_of_a_removed_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, refused = [True], []
    write_atomically = destination.write_atomically

    def limited(path: Path, content: bytes) -> None:
        if full[0]:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, content)

    monkeypatch.setattr(queue, "write_atomically", limited)
    acknowledged: Any = Acknowledged()
    with running_writer(tmp_path, acknowledged, fsync_interval=0.02) as writer:
        written(writer, acknowledged, 0)
        looked_after(writer)
        removed = open_segment(writer)
        removed.path.unlink()
        written(writer, acknowledged, 1)
        eventually(lambda: removed.opened < 0, what="the syncer to notice")
        written(writer, acknowledged, 2)
        eventually(lambda: len(refused) > 2, what="several tries")
        full[0] = False
        eventually(lambda: len(segments(tmp_path)) == 2, what="the copy")
    assert sorted(payloads(tmp_path)) == [payload(1), payload(2)]
    assert all(path.read_bytes().startswith(MAGIC) for path in segments(tmp_path))
